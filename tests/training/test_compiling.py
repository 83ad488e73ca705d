import dataclasses
import json

import pytest
import tiny
from short_run import GRPO, make_config, mean_id

from jaxrl_llm.rewards import RewardFunction
from jaxrl_llm.sharding import ahead
from jaxrl_llm.tracking import performance, run_directory
from jaxrl_llm.training.build import build
from jaxrl_llm.training.loop import run
from jaxrl_llm.training.schedule import Synchronous

LONGEST = (80, 9, 50, 3, 80, 20)
"""Tokens that a response of each step may have: they grow, shrink and jump."""


class Cut:
    """An engine whose responses end after `most` tokens, if that is given."""

    def __init__(self, engine):
        self.engine, self.most = engine, None

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def submit(self, requests):
        def cut(request):
            how = dataclasses.replace(request.sampling, max_tokens=self.most)
            return dataclasses.replace(request, sampling=how)

        self.engine.submit([cut(r) for r in requests] if self.most else requests)


def compilations(config):
    """Programs that were compiled, or read from a cache, in each step of a run."""
    job = build(config, [RewardFunction(name="mean_id", function=mean_id)])
    engine = Cut(job.engine)

    class InSteps(Synchronous):
        def experience(self, step):
            engine.most = LONGEST[step - 1]
            try:
                return super().experience(step)
            finally:
                engine.most = None

    found = run(dataclasses.replace(job, engine=engine), InSteps).directory
    lines = run_directory.read(found)
    lengths = [line.get("response_length/max") for line in lines[1:]]
    assert lengths == list(LONGEST)
    return [line["perf/compilations"] for line in lines]


@pytest.mark.parametrize(
    "changed",
    [
        {},
        pytest.param(
            {"actor.pack_length": 128, "actor.use_kl_loss": True},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"actor.pack_length": 256, "actor.share_prompts": True},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"algorithm.adv_estimator": "remax", "actor.ppo_mini_batch_size": 2,
             "actor.ref_refresh_steps": 2, "actor.use_kl_loss": True},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"algorithm.adv_estimator": "gae", "critic.dtype": "float32",
             "critic.remat": "none", "trainer.critic_warmup": 2},
            marks=pytest.mark.slow,
        ),
        pytest.param({"reward.model.path": "judge"}, marks=pytest.mark.slow),
    ],
    ids=["rows", "packed", "shared", "refreshed", "critic", "judged"],
)  # fmt: skip
def test_after_the_first_step_nothing_compiles(changed, tiny_model, tmp_path):
    if "reward.model.path" in changed:
        judge = tiny.reward_model(tmp_path / "judge")
        changed = {"reward.model.path": judge, "reward.model.dtype": "float32"}
    held_out = tmp_path / "held_out.jsonl"
    rows = [{"prompt": f"{i} asks", "answer": ""} for i in range(7)]
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config(
        tiny_model,
        tmp_path,
        **GRPO
        | {
            "data.val.path": str(held_out),
            "data.train_batch_size": 4,
            "rollout.n": 4,
            "rollout.max_response_length": 80,
            "rollout.decode_chunk": 8,
            "actor.mesh": {"data": 1, "fsdp": -1},
            "trainer.total_training_steps": len(LONGEST),
            "trainer.test_freq": 3,
            "trainer.val_before_train": False,
            # The first checkpoint of what several devices hold compiles orbax's slices.
            "trainer.save_freq": 100,
        }
        | changed,
    )
    first, one, *later = compilations(config)
    assert first + one > 0
    assert later == [0] * len(later)


def test_what_is_compiled_in_the_background_is_told_apart():
    assert ahead.THREADS == performance.BACKGROUND
