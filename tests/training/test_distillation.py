"""Runs that learn from a teacher of another size, on eight simulated devices."""

import functools
import json

import numpy as np
import pytest
import short_run
import tiny

from jaxrl_llm import api
from jaxrl_llm.planning import dry_run, planner
from jaxrl_llm.training import build, compiling, loop

pytestmark = pytest.mark.slow

MODES = ("reverse_kl", "forward_kl_topk", "jsd")
STEPS = 6


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Wider than the tiny model, and with more padding behind its tokens."""
    folder = tmp_path_factory.mktemp("teacher") / "model"
    return tiny.checkpoint(
        folder, hidden_size=64, num_heads=8, vocab_size=272, tie_embeddings=False
    )


def changes(teacher, mode, **changed):
    found = short_run.GRPO | {
        "distillation.teacher.path": teacher,
        "distillation.teacher.dtype": "float32",
        "distillation.mode": mode,
        "reward.functions": [],
        "actor.optim.lr": 1e-2,
        "trainer.total_training_steps": STEPS,
    }
    if mode == "forward_kl_topk":
        found["distillation.topk"] = 16
    return found | changed


def lines(directory):
    text = (directory / "run/metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def learned(line):
    names = ("distillation/", "actor/", "response_length/")
    return {k: v for k, v in line.items() if k.startswith(names)}


@functools.cache
def finished(model, teacher, mode, directory):
    loop.run(
        build.build(short_run.make_config(model, directory, **changes(teacher, mode)))
    )
    return lines(directory)


@pytest.mark.parametrize("mode", MODES)
def test_without_any_reward_the_policy_comes_nearer_to_its_teacher(
    mode, tiny_model, teacher, tmp_path
):
    found = finished(tiny_model, teacher, mode, tmp_path)
    losses = [line["distillation/loss"] for line in found[1:]]
    assert losses[-1] < 0.8 * losses[0]
    assert not any(name.startswith("critic/rewards") for name in found[1])
    assert ("timing_s/teacher" in found[1]) is (mode != "jsd")
    for line in found[2:]:  # all programs were compiled ahead
        assert line["perf/compilations"] == 0


@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_stopped_goes_on_bit_for_bit(mode, tiny_model, teacher, tmp_path):
    whole = finished(tiny_model, teacher, mode, tmp_path / "whole")
    for steps in (3, STEPS):
        changed = changes(teacher, mode, **{"trainer.total_training_steps": steps})
        config = short_run.make_config(tiny_model, tmp_path / "parts", **changed)
        loop.run(build.build(config))
    again = lines(tmp_path / "parts")
    assert [*map(learned, again)] == [*map(learned, whole)]


def test_a_teacher_on_devices_of_its_own_says_the_same(tiny_model, teacher, tmp_path):
    together = finished(tiny_model, teacher, "forward_kl_topk", tmp_path / "one")
    apart = changes(
        teacher,
        "forward_kl_topk",
        **{
            "placement": {
                "groups": {"learn": "0-3", "teach": "4-7"},
                "actor": "learn",
                "teacher": "teach",
            },
            "distillation.teacher.mesh": {"fsdp": 2, "tensor": 2},
            "distillation.teacher.micro_batch_size": 4,
            "distillation.teacher.offload": True,
        },
    )
    config = short_run.make_config(tiny_model, tmp_path / "two", **apart)
    loop.run(build.build(config))
    for got, wanted in zip(lines(tmp_path / "two"), together, strict=True):
        for name, value in learned(wanted).items():
            np.testing.assert_allclose(got[name], value, 1e-4, 1e-5, err_msg=name)


def test_with_rewards_both_are_learned(tiny_model, teacher, tmp_path):
    both = {
        "distillation.with_rewards": True,
        "distillation.coef": 0.1,
        "reward.functions": [{"name": "tiny:small_ids"}],
    }
    changed = changes(teacher, "jsd", **both)
    loop.run(build.build(short_run.make_config(tiny_model, tmp_path, **changed)))
    found = lines(tmp_path)
    assert "actor/pg_loss" in found[1] and "critic/rewards/mean" in found[1]
    for line in found[1:]:
        whole = line["actor/pg_loss"] + 0.1 * line["distillation/loss"]
        np.testing.assert_allclose(line["actor/loss"], whole, rtol=1e-4)


def test_one_call_needs_no_reward(tiny_model, teacher, tmp_path):
    result = api.train(
        tiny_model,
        [f"{i} says" for i in range(8)],
        [],
        steps=2,
        output_dir=tmp_path / "run",
        settings={
            "distillation.teacher.path": teacher,
            "data.train_batch_size": 4,
            "data.max_prompt_length": 64,
            "rollout.n": 1,
            "rollout.max_response_length": 4,
        },
    )
    table = result.table()
    assert np.isfinite(table["distillation/loss"].dropna()).all()


@pytest.mark.parametrize("mode", ["forward_kl_topk", "jsd"])
def test_the_teacher_is_counted_and_compiled_before_a_run(
    mode, tiny_model, teacher, tmp_path, capsys
):
    config = short_run.make_config(tiny_model, tmp_path, **changes(teacher, mode))
    job = build.build(config)
    named = [name for name in compiling.programs(job) if name.startswith("teacher ")]
    assert bool(named) is (mode != "jsd")
    (held,) = dry_run.memory_per_device(job).values()
    assert held["teacher"] > held["weights"]
    assert dry_run.show(job)
    assert "distillation" in capsys.readouterr().out
    (plan,) = planner.estimate(config, build.jax.devices())
    assert plan.held["teacher"] == held["teacher"]
    assert ("teacher's log-probabilities" in plan.programs) is (mode != "jsd")


def test_an_evaluation_needs_no_teacher(tiny_model, tmp_path):
    changed = changes("gone", "jsd", **{"reward.functions": [{"name": "exact"}]})
    questions = {"data.val": {"path": str(tmp_path / "questions.jsonl")}}
    config = short_run.make_config(tiny_model, tmp_path, **changed | questions)
    job = build.build(config, learns=False)
    assert job.actor.teacher is None and len(job.data.val) == 16
    config = short_run.make_config(tiny_model, tmp_path, **changed)
    with pytest.raises(ValueError, match="distillation.teacher.path gone"):
        build.build(config)
