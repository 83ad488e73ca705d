import dataclasses
import re
from pathlib import Path

import jax
import pytest
import tiny

from jaxrl_llm import models
from jaxrl_llm.config import parsing
from jaxrl_llm.planning import dry_run
from jaxrl_llm.rewards import RewardError, RewardFunction
from jaxrl_llm.training.build import build


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dry_run")
    model = tiny.checkpoint(folder / "model")
    data = folder / "rows.jsonl"
    data.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "cc", "answer": "d"}\n')
    values = {
        "output_dir": str(folder / "run"),
        "model": {"path": model},
        "data": {
            "train": {"path": str(data)},
            "train_batch_size": 2,
            "max_prompt_length": 60,
        },
        "rollout": {"n": 2, "max_response_length": 4, "dtype": "float32"},
        "actor": {"dtype": "float32", "use_kl_loss": True, "micro_batch_size": 8},
        "reward": {"functions": [{"name": "exact"}]},
        "trainer": {"total_training_steps": 1},
    }
    return build(parsing.parse(values, "test"))


def test_memory_is_that_of_the_arrays(job):
    (memory,) = dry_run.memory_per_device(job).values()
    state = job.actor.start()

    def on_one_device(tree):
        return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))

    assert memory["weights"] == on_one_device(state.params)
    assert memory["optimizer"] == on_one_device(state.opt_state)
    generation = jax.jit(lambda p: models.unstack(p, "float32"))(state.params)
    whole = sum(x.nbytes for x in jax.tree.leaves(generation))
    assert memory["generation weights"] == whole  # one replica on each of 8 devices
    # 4 responses on 8 devices: 8 rows each, which are the fewest, of 64 positions, half
    # as much for those that wait, and page 0; keys and values, 2 layers, 2 heads of 8
    # numbers of 4 bytes.
    assert memory["generation cache"] == 2 * 2 * (8 + 4 + 1) * 64 * 2 * 8 * 4
    assert memory["reference"] == memory["weights"]
    assert memory["gradients, activations"] > memory["weights"]


def test_it_prints_the_run_and_writes_nothing(job, capsys):
    dry_run.show(job)
    shown = capsys.readouterr().out
    assert "total_training_steps: 1" in shown
    assert f"{models.num_params(job.source.arch):,}" in shown
    assert "at most 256" in shown  # tokens: 2 prompts x 2 responses x (60 + 4)
    assert re.search(r"exact +│ 0 ", shown)  # what a made-up response is worth


def test_it_calls_every_reward_function(job):
    def fails(completions):
        raise ValueError(completions[0])

    term = RewardFunction(name="mine", function=fails)
    rewards = dataclasses.replace(job.rewards, functions=(term,))
    with pytest.raises(RewardError, match="'mine' raised ValueError: .*made up"):
        dry_run.tried_out(dataclasses.replace(job, rewards=rewards))
    assert not Path(job.config.output_dir).exists()
