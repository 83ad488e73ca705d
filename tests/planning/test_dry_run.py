import dataclasses
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
import tiny

from jaxrl_llm import models
from jaxrl_llm.config import parsing
from jaxrl_llm.config.names import ConfigError
from jaxrl_llm.planning import dry_run
from jaxrl_llm.rewards import RewardError, RewardFunction
from jaxrl_llm.tracking import run_lock
from jaxrl_llm.training import checkpoint
from jaxrl_llm.training.build import build
from jaxrl_llm.training.checkpoint import CheckpointError
from jaxrl_llm.training.rehearsal import rehearse


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


WORKS_IN = {"prefill": 70_000, "decode": 50_000}


@pytest.fixture(scope="module")
def sizes(job):
    """What a device holds; the programs of generation take long to compile."""
    asked = []

    def lower(*largest):
        asked.append(largest)
        return dict(WORKS_IN)

    real = dry_run.temporary
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job.engine, "lower", lower)
        known = lambda x: x if isinstance(x, int) else real(x)  # noqa: E731
        patch.setattr(dry_run, "temporary", known)
        found = dry_run.memory_per_device(job)
    # 2 prompts x 2 responses; the longest prompt has "cc" and the template around it.
    longest = max(len(prompt.tokens) for prompt in job.data.train)
    assert asked == [(4, 2, longest)]
    return found


@pytest.mark.slow
def test_generation_is_counted_as_it_compiles(job):
    (held,) = dry_run.memory_per_device(job).values()
    asked = job.engine.lower(4, 2, max(len(p.tokens) for p in job.data.train))
    for name, program in asked.items():
        found = program.compile().memory_analysis().temp_size_in_bytes
        assert held[name] == found > 0


@pytest.fixture
def sized(sizes, monkeypatch):
    """What a dry run shows, without compiling it again."""
    monkeypatch.setattr(dry_run, "memory_per_device", lambda job: sizes)


def test_memory_is_that_of_the_arrays(job, sizes):
    (memory,) = sizes.values()
    state = job.actor.start()

    def on_one_device(tree):
        return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))

    assert memory["weights"] == on_one_device(state.params)
    assert memory["optimizer"] == on_one_device(state.opt_state)
    generation = jax.jit(lambda p: models.unstack(job.source.arch, p, "float32"))(
        state.params
    )
    whole = sum(x.nbytes for x in jax.tree.leaves(generation))
    assert memory["generation weights"] == whole  # one replica on each of 8 devices
    # 4 responses on 8 devices: 8 rows each, which are the fewest, of 64 positions, half
    # as much for those that wait, and page 0; keys and values, 2 layers, 2 heads of 8
    # numbers of 4 bytes.
    assert memory["generation cache"] == 2 * 2 * (8 + 4 + 1) * 64 * 2 * 8 * 4
    assert memory["reference"] == memory["weights"]
    assert memory["gradients, activations"] > memory["weights"]


def test_it_prints_the_run_and_writes_nothing(job, capsys, sized):
    assert dry_run.show(job)
    assert not Path(job.config.output_dir).exists()
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


def with_config(job, **changed):
    """The job with other settings, by dotted keys with __."""
    values = job.config.model_dump(mode="json")
    for key, value in changed.items():
        parsing.put(values, key.split("__"), value)
    return dataclasses.replace(job, config=parsing.parse(values, "test"))


@pytest.fixture
def begun(job, tmp_path):
    """The job in the directory of a run that has two steps and checkpoints of them."""
    made = with_config(job, output_dir=str(tmp_path), trainer__total_training_steps=3)
    values = made.config.model_dump(mode="json")
    (tmp_path / "config.yaml").write_text(json.dumps(values))
    (tmp_path / "inputs.json").write_text(json.dumps(made.inputs))
    lines = [json.dumps({"step": step}) + "\n" for step in range(3)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    (tmp_path / "rollouts").mkdir()
    for step in (1, 2):
        (tmp_path / f"rollouts/train_{step:06d}.jsonl").write_text("{}\n")
        (tmp_path / f"checkpoints/{step}").mkdir(parents=True)
    return made


def left(begun):
    folder = Path(begun.config.output_dir)
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_run_that_would_go_on_says_from_where(begun):
    before = left(begun)
    assert rehearse(begun) == ["the run goes on from step 2"]
    done = with_config(begun, trainer__total_training_steps=2)
    changed, complete = rehearse(done)
    assert changed.startswith("trainer.total_training_steps was 3, is 2; the run take")
    assert complete.endswith("is complete after 2 steps")
    assert left(begun) == before


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"seed": 9}, "holds a run with other settings; .* seed was 0, is 9"),
        ({"trainer__resume": "never"}, "trainer.resume is never, but output_dir"),
    ],
)
def test_what_train_would_refuse_is_refused(begun, changed, message):
    with pytest.raises(ConfigError, match=message):
        dry_run.show(with_config(begun, **changed))


def test_other_inputs_missing_steps_and_a_run_under_way_are_refused(begun):
    folder = Path(begun.config.output_dir)
    with pytest.raises(ConfigError, match="is in use"):
        with ThreadPoolExecutor() as pool, run_lock.locked(folder):
            pool.submit(rehearse, begun).result()
    changed = {**begun.inputs, "functions": {"reward function 'mine'": "f"}}
    with pytest.raises(ConfigError, match="source of reward function 'mine'"):
        rehearse(dataclasses.replace(begun, inputs=changed))
    (folder / "metrics.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(CheckpointError, match="whole up to step 0, but .* steps .1, 2"):
        rehearse(begun)


def test_fewer_prompts_than_a_batch_and_a_full_disk_are_refused(job, monkeypatch):
    with pytest.raises(ValueError, match="data.train_batch_size is 64 but there are 2"):
        rehearse(with_config(job, data__train_batch_size=64))
    full = lambda _: SimpleNamespace(free=0)  # noqa: E731
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", full)
    with pytest.raises(OSError, match="but only 0.00 GB are free"):
        rehearse(job)
    assert not Path(job.config.output_dir).exists()


def test_it_says_whether_the_run_fits_and_what_to_change(
    job, sizes, sized, capsys, monkeypatch
):
    (held,) = sizes.values()
    stays = ("weights", "optimizer", "reference", "generation weights")
    kept = sum(held[name] for name in stays)
    works = max(WORKS_IN.values())
    least, cache = held["generation cache, at least"], held["generation cache"]
    learning = kept + held["gradients, activations"]
    # One sequence of 64 tokens, and page 0: a page has 64.
    assert least == cache * 2 // 13 and min(held.values()) > 0
    assert held["new weights on their way"] < held["generation weights"]
    assert dry_run.at_once(job.config, held) == {
        "update_actor": learning,
        "gen": kept + works + least,
        "update_weights": kept + held["new weights on their way"],
    }
    given = with_config(job, rollout__cache_gib=1.0)
    assert dry_run.at_once(given.config, held)["gen"] == kept + works + cache
    away = with_config(job, actor__offload=["optimizer", "reference"])
    rest = kept - held["optimizer"] - held["reference"]
    assert dry_run.at_once(away.config, held) == {
        "update_actor": learning - held["reference"],
        "gen": rest + works + least,
        "update_weights": rest + held["new weights on their way"],
    }
    for limit, fits in ((learning, True), (learning - 1, False)):
        monkeypatch.setattr(dry_run.hardware, "memory_limit", lambda limit=limit: limit)
        assert dry_run.show(job) == fits
        shown = capsys.readouterr().out
        assert ("it fits" in shown) == fits
        assert ("does not fit, by 0.000 GiB; change one" in shown) != fits
        assert ("actor.remat: full" in shown or "actor.offload" in shown) != fits
    more = {"all devices": held | {"prefill": 2**30}}
    said = "\n".join(dry_run.too_much(given, more, "all devices", 2**30 + kept))
    assert "does not fit" in said and "rollout.prefill_tokens: 4096" in said
    assert re.search(r"rollout.cache_gib: 0.9 \(now 1.0\)", said)


def test_what_needs_other_devices_names_the_plan(tmp_path, capsys, job):
    path = tmp_path / "big.yaml"
    path.write_text("# Planned: jaxrl plan big.yaml --topology v5p:2x4x4\nseed: 0\n")
    large = with_config(job, actor__mesh__fsdp=7)
    with pytest.raises(ConfigError, match="written for:\n  jaxrl plan big.yaml --top"):
        dry_run.check_devices(large.config, path)
    dry_run.check_devices(job.config, path)
    assert "  jaxrl plan big.yaml --topology v5p:2x4x4\n" in capsys.readouterr().out
    path.write_text("seed: 0\n")
    with pytest.raises(ConfigError, match=f"jaxrl plan {path} --topology KIND:SIZE"):
        dry_run.check_devices(large.config, path)
