"""Runs of a model with experts on eight simulated devices."""

import json

import jax
import numpy as np
import pytest
import short_run
import tiny

from jaxrl_llm import models
from jaxrl_llm.models import Moe, Rope
from jaxrl_llm.planning import dry_run, planner
from jaxrl_llm.training import build, loop

pytestmark = pytest.mark.slow

EXPERTS = {
    "actor.mesh": {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2},
    "actor.optim.lr": 1e-2,
    "actor.ppo_mini_batch_size": 4,
    "actor.router_replay": "R2",
    "actor.router_aux_loss_coef": 0.01,
    "rollout.mesh": {"data": 4, "tensor": 2},
    "reward.functions": [{"name": "tiny:small_ids"}],
    "trainer.total_training_steps": 8,
    "trainer.save_hf": True,
}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """Three layers, the first without experts; in the others six, two for a token."""
    some = Moe(num_experts=6, top_k=2, expert_size=16, dense_layers=(0,))
    fields = tiny.with_experts(
        model_type="qwen3_moe", rope=(Rope(theta=1e4),), moe=some
    )
    return tiny.checkpoint(tmp_path_factory.mktemp("model") / "qwen", **fields)


def lines(directory):
    text = (directory / "run/metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_a_run_learns_saves_and_goes_on(qwen, tmp_path):
    config = short_run.make_config(qwen, tmp_path, **short_run.GRPO | EXPERTS)
    loop.run(build.build(config))
    found = lines(tmp_path)[1:]
    for line in found:
        # The sampler has the trainer's weights, experts and all.
        assert line["mismatch/logprob_diff_max"] < 1e-3
        assert 0.5 < line["actor/route_agreement"] <= 1
        assert line["actor/router_aux_loss"] > 1.9
    means = [line["critic/rewards/mean"] for line in found]
    assert np.mean(means[-2:]) > np.mean(means[:2]) + 0.05
    [saved] = (tmp_path / "run").glob("**/model.safetensors")
    arch, params, _ = models.load(saved.parent)
    assert arch.moe == models.load(qwen).arch.moe
    before = models.load(qwen).params["layers"]["moe"]
    for name, x in params["layers"]["moe"].items():
        assert np.abs(x - before[name]).max() > 1e-4, name


def test_a_run_with_whole_layers_on_each_device_gives_the_same_numbers(qwen, tmp_path):
    steps = {"trainer.total_training_steps": 2, "trainer.save_hf": False}
    whole = {"actor.mesh": {"data": 8, "fsdp": 1}, "rollout.mesh": {"data": 8}}
    found = []
    for name, changed in (("split", {}), ("whole", whole)):
        config = short_run.make_config(
            qwen, tmp_path / name, **short_run.GRPO | EXPERTS | steps | changed
        )
        loop.run(build.build(config))
        found.append(lines(tmp_path / name))
    for got, wanted in zip(*found, strict=True):
        for name, value in wanted.items():
            if name.startswith("actor/"):
                np.testing.assert_allclose(got[name], value, 1e-3, 1e-4, err_msg=name)


def test_a_plan_counts_experts_where_they_lie(qwen, tmp_path):
    config = short_run.make_config(qwen, tmp_path, **short_run.GRPO | EXPERTS)
    job = build.build(config)
    (plan,) = planner.estimate(config, jax.devices())
    (held,) = dry_run.memory_per_device(job).values()
    params = job.actor.start().params
    one = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(params))
    assert plan.held["weights"] == held["weights"] == one
    gate = params["layers"]["moe"]["gate"]
    # Two layers, half of six experts, half of the width, half of an expert's.
    assert gate.addressable_shards[0].data.shape == (2, 3, 16, 8)
