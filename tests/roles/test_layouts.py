"""Every layout of training computes what one device computes."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from fixed_rollouts import ADVANTAGES, make_config, make_rollouts

from jaxrl_llm import models
from jaxrl_llm.data.packing import Layout
from jaxrl_llm.models import layer_loop
from jaxrl_llm.models.attention import flash
from jaxrl_llm.roles.sharded_model import ModelSettings, ShardedModel
from jaxrl_llm.sharding import mesh, rules
from jaxrl_llm.training.checkpoint import Checkpoints
from jaxrl_llm.training.roles import actor_of

LAYOUTS = {
    "FSDP": {"fsdp": 8},
    "HSDP": {"data": 2, "fsdp": 4},
    "tensor and sequence": {"tensor": 8},
    "context": {"context": 8},
    "FSDP, tensor": {"fsdp": 2, "tensor": 4},
    "HSDP, tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "FSDP, context": {"fsdp": 4, "context": 2},
    "context, tensor": {"context": 2, "tensor": 4},
    "all": {"data": 2, "context": 2, "tensor": 2},
    "experts that there are none of": {"expert": 4, "tensor": 2},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Eight heads, which share two key/value heads; 264 tokens of vocabulary."""
    directory = tmp_path_factory.mktemp("layouts") / "model"
    return tiny.checkpoint(directory, num_heads=8, num_kv_heads=2, tie_embeddings=False)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """A layer without and two with eight experts."""
    directory = tmp_path_factory.mktemp("layouts") / "experts"
    return tiny.checkpoint(directory, **tiny.with_experts())


def learner(path, axes, **actor):
    axes = {"data": 1, "fsdp": 1, "tensor": 1, **axes}
    on = mesh.make(
        {name: axes[name] for name in mesh.AXES if name in axes},
        jax.devices()[: math.prod(axes.values())],
    )
    actor = {"entropy_coeff": 0.1, **actor}
    return actor_of(make_config(path, **actor), models.open(path), on)


def gradient(made):
    """Of a sum over log-probabilities and entropies, and that sum."""
    rows = made.policy.on_devices(made.make_rows(*make_rollouts(), ADVANTAGES))

    def loss(params):
        found = made.policy.logprobs(params, rows)
        return jnp.sum(found.logprobs * rows.advantages + 0.1 * found.entropy)

    value, found = jax.jit(jax.value_and_grad(loss))(made.start().params)
    return value, jax.device_get(found)


@functools.cache
def gradient_alone(path, **actor):
    return gradient(learner(path, {}, **actor))


# FSDP beside the others is in test_actor, and so is a whole update.
QUICK = {("all", True)}


@pytest.mark.parametrize(
    "layout, packed",
    [
        pytest.param(
            layout, packed, marks=() if (layout, packed) in QUICK else pytest.mark.slow
        )
        for layout in LAYOUTS
        for packed in (False, True)
    ],
)
def test_loss_and_gradients_are_those_of_one_device(layout, packed, model):
    assert_as_alone(model, LAYOUTS[layout], packed)


# Every pair of axes that experts can be split with, and experts over all devices.
WITH_EXPERTS = {
    "experts": {"expert": 8},
    "experts, FSDP, tensor": {"expert": 2, "fsdp": 2, "tensor": 2},
    "experts, context, tensor": {"expert": 2, "context": 2, "tensor": 2},
    "experts, FSDP, context": {"expert": 2, "fsdp": 2, "context": 2},
    "experts, HSDP": {"expert": 4, "data": 2},
    "no experts split": {"fsdp": 4, "tensor": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", WITH_EXPERTS)
def test_experts_compute_what_they_do_on_one_device(layout, experts):
    assert_as_alone(experts, WITH_EXPERTS[layout], True)


def assert_as_alone(model, axes, packed):
    """Loss and gradients on a mesh are those of one device."""
    packed = {"pack_length": 32} if packed else {}
    made = learner(model, axes, **packed)
    wanted_loss, wanted = gradient_alone(model, **packed)
    loss, found = gradient(made)
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
    for (path, got), other in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True
    ):
        name, scale = jax.tree_util.keystr(path), np.abs(other).max()
        assert scale > 0 or "selection_bias" in name
        np.testing.assert_allclose(got, other, rtol=0, atol=1e-5 * scale, err_msg=name)


@pytest.mark.parametrize(
    "layout", [pytest.param(x, marks=pytest.mark.slow) for x in ("all", "HSDP, tensor")]
)
def test_an_update_is_that_of_one_device(layout, model):
    def updated(axes):
        made = learner(model, axes)
        rows = made.make_rows(*make_rollouts(), ADVANTAGES)
        return made.update(made.start(), rows, seed=3)[1]

    found, wanted = updated(LAYOUTS[layout]), updated({})
    for name in found.keys() - {"perf/token_efficiency"}:
        np.testing.assert_allclose(found[name], wanted[name], 1e-5, 1e-6, err_msg=name)


@functools.cache
def program_of_eight(path, **actor):
    return learner(path, {"tensor": 8}, **actor).compile_largest_update().as_text()


def test_no_device_holds_all_logits_or_the_whole_output_matrix(model):
    text = program_of_eight(model)
    # 264 tokens of vocabulary over eight devices: 33 each, and a width of 32.
    assert re.search(r"f32\[[\d,]*33\]", text)
    assert not re.search(r"f32\[[\d,]*\b264\b[\d,]*\]", text)


def test_between_blocks_tokens_are_split_too(model):
    # Sequence parallelism: rows of 16 tokens, 2 on each device, all of the width of 32.
    assert re.search(r"f32\[\d+,2,32\]", program_of_eight(model))
    made = learner(model, {"tensor": 8}, rules={"residual": "context"})
    assert not re.search(r"f32\[\d+,2,32\]", made.compile_largest_update().as_text())


@pytest.mark.parametrize(
    "axes",
    [
        # That states come back on another mesh is in test_checkpoint.
        pytest.param(axes, marks=pytest.mark.slow)
        for axes in ({"data": 2, "tensor": 2}, {"fsdp": 4}, {})
    ],
    ids=str,
)
def test_a_checkpoint_of_eight_devices_goes_on_with_others(axes, model, tmp_path):
    first = learner(model, {"fsdp": 8})
    rows = first.make_rows(*make_rollouts(), ADVANTAGES)
    state, _ = first.update(first.start(), rows, seed=3)
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(1, state, {})
    wanted = first.update(state, rows, seed=4)[1]
    other = learner(model, axes)
    with Checkpoints(tmp_path, 1) as checkpoints:
        _, restored, _ = checkpoints.restore(other.abstract_state())
    rows = other.make_rows(*make_rollouts(), ADVANTAGES)
    _, found = other.update(restored, rows, seed=4)
    for name in found.keys() - {"perf/token_efficiency"}:
        np.testing.assert_allclose(found[name], wanted[name], 1e-5, 1e-6, err_msg=name)


@pytest.mark.parametrize(
    "axes, actor, message",
    [
        ({"tensor": 3}, {}, "layers.down: dimension 2 of shape .* of size 3"),
        ({"context": 2}, {"pack_length": 33}, "do not divide actor.pack_length 33"),
        (
            {"context": 2},
            {"pack_length": 32, "share_prompts": True},
            "actor.share_prompts needs whole rows",
        ),
        ({}, {"rules": {"mlp": "fsdp"}}, "would use a mesh axis twice"),
    ],
)
def test_what_cannot_be_split_is_said_before_anything_is_compiled(
    axes, actor, message, model
):
    with pytest.raises(ValueError, match=message):
        learner(model, axes, **actor)


def test_there_are_not_more_devices_than_heads_to_split(tiny_model):
    with pytest.raises(ValueError, match="4 attention heads .* over 4 x 2 devices"):
        learner(tiny_model, {"tensor": 4, "context": 2})


def test_rules_know_their_axes():
    on = mesh.make({"data": 2, "tensor": 4})
    with pytest.raises(ValueError, match="rule mlp: 'columns' names 'columns'"):
        rules.Partition(on, {"mlp": "columns"})
    partition = rules.Partition(on, rules.TRAIN)
    assert partition.parts("rows") == 2  # this mesh has no "fsdp"
    with pytest.raises(ValueError, match="axis 'width' has no rule"):
        partition.sharding("width")


def test_heads_that_do_not_divide_stay_whole():
    on = mesh.make({"data": 1, "tensor": 8})
    shapes = {"k": jax.ShapeDtypeStruct((32, 2, 8), jnp.float32)}
    axes = {"k": ("embed", "kv_heads", "head")}
    fitted = rules.fit(rules.TRAIN, shapes, axes, on, optional=("vocab", "kv_heads"))
    assert fitted["kv_heads"] is None and fitted["heads"] == "tensor"


@pytest.mark.parametrize(
    ("platform", "layout", "how", "devices", "ordered"),
    [
        ("gpu", Layout(longest=1024), {}, 1, True),
        ("gpu", Layout(longest=4096), {}, 1, False),  # memory for 4096 x 4096
        ("gpu", Layout(longest=512, pack_length=1024), {}, 1, False),
        ("gpu", Layout(longest=1024, contexts=2), {}, 1, False),  # as if packed
        ("gpu", Layout(longest=512, pack_length=1024), {"attention": "xla"}, 1, True),
        # XLA then finds one of several equal backward passes of cuDNN only.
        ("gpu", Layout(longest=1024), {"remat": "none"}, 1, False),
        ("gpu", Layout(longest=1024), {"unroll": "always"}, 1, False),
        ("gpu", Layout(longest=1024), {}, 2, False),
        ("gpu", Layout(longest=1024), {"attention": "xla"}, 2, True),
        ("cpu", Layout(longest=4096), {}, 1, True),
    ],
)
def test_sums_are_ordered_where_that_needs_no_more_memory(
    platform, layout, how, devices, ordered, monkeypatch
):
    for module in (flash, layer_loop):
        monkeypatch.setattr(module, "platform_of", lambda mesh: platform)
    settings = ModelSettings(rows=layout, **{"remat": "full"} | how)
    one = mesh.make({"data": 1, "fsdp": devices}, jax.devices()[:devices])
    found = ShardedModel(tiny.arch(), one, settings).update_options[
        "xla_gpu_exclude_nondeterministic_ops"
    ]
    assert found == ordered
