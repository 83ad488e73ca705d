"""Every loop over layers computes the same, and keeps no more than it must."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxrl_llm import models
from jaxrl_llm.models import Rope
from jaxrl_llm.models import layer_loop as loop
from jaxrl_llm.sharding import mesh

LOOPS = [loop.scan, loop.unrolled, loop.in_place]
LAYERS = 3
# Alternating windows and rotations, as some families have them.
MIXED = {
    "num_layers": LAYERS,
    "rope": (Rope(theta=1e4), Rope(theta=100.0)),
    "rope_of_layer": (0, 1, 0),
    "window_of_layer": (None, 2, None),
}
TOKENS = jnp.arange(12).reshape(2, 6) * 7
POSITIONS = jnp.array([[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 2]])
IDS = jnp.array([[0] * 6, [0, 0, 0, 1, 1, 1]])


@functools.cache
def loss_and_gradients(over, remat, mixed):
    arch = tiny.arch(**(MIXED if mixed else {"num_layers": LAYERS}))
    params = models.init(arch, jax.random.key(0))

    def loss(params):
        hidden = models.forward(
            arch, params, TOKENS, POSITIONS, IDS,
            dtype=jnp.float32, remat=remat, loop=over,
        )  # fmt: skip
        return jnp.sum(jnp.sin(hidden))

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize(
    "over, remat, mixed",
    [
        pytest.param(loop.in_place, "none", True, marks=pytest.mark.slow),
        (loop.in_place, "dots", True),
        pytest.param(loop.in_place, "full", True, marks=pytest.mark.slow),
        (loop.in_place, "dots", False),
        (loop.unrolled, "dots", True),
    ],
)
def test_every_loop_computes_the_same(over, remat, mixed):
    got = loss_and_gradients(over, remat, mixed)
    wanted = loss_and_gradients(loop.scan, "none", mixed)
    # A gradient is a sum of terms as large as the largest of its array.
    largest = jax.tree.map(lambda x: max(1.0, float(jnp.abs(x).max())), wanted)
    got, wanted = (jax.tree.map(jnp.divide, x, largest) for x in (got, wanted))
    chex.assert_trees_all_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "platform, devices, wanted, remat, over",
    [
        ("cpu", 1, "auto", "dots", loop.scan),
        ("tpu", 8, "auto", "none", loop.scan),
        ("tpu", 8, "always", "none", loop.unrolled),
        ("gpu", 1, "auto", "dots", loop.in_place),
        ("gpu", 1, "auto", "full", loop.in_place),
        ("gpu", 1, "auto", "none", loop.unrolled),
        ("gpu", 1, "always", "dots", loop.unrolled),
        ("gpu", 8, "auto", "dots", loop.unrolled),
        ("gpu", 8, "never", "none", loop.in_place),
        ("gpu", 8, "never", "offload", loop.scan),
    ],
)
def test_platform_and_remat_choose(monkeypatch, platform, devices, wanted, remat, over):
    monkeypatch.setattr(loop, "platform_of", lambda _: platform)
    on = mesh.make({"data": devices}, jax.devices()[:devices])
    assert loop.choose(on, wanted, remat) is over


def stack(count):
    """`count` layers of x + tanh(x a) b, 4 wide, and one row of x."""
    draw = np.random.default_rng(1).standard_normal
    weights = {name: jnp.float32(draw((count, 4, 4)) / 2) for name in "ab"}
    return jnp.float32(draw(4)), weights


def layer(x, weights, i):
    return x + jnp.tanh(x @ weights["a"]) @ weights["b"]


@pytest.mark.parametrize("over", LOOPS)
def test_the_gradient_is_that_of_a_python_loop(over):
    def by_hand(x, weights):
        for i in range(LAYERS):
            x = layer(x, jax.tree.map(lambda w, i=i: w[i], weights), i)
        return jnp.sum(x**2)

    def looped(x, weights):
        return jnp.sum(over(layer, x, weights) ** 2)

    got = jax.value_and_grad(looped, argnums=(0, 1))(*stack(LAYERS))
    wanted = jax.value_and_grad(by_hand, argnums=(0, 1))(*stack(LAYERS))
    chex.assert_trees_all_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_layer_may_ask_for_a_constant():
    def doubled(x, weights, i):
        return 2.0 * x * weights["scale"]  # JAX keeps 2.0 itself

    x, weights = jnp.float32([1.0, -1.0]), {"scale": jnp.float32([1.0, 3.0, 0.5])}
    gradient = jax.grad(lambda x: jnp.sum(loop.in_place(doubled, x, weights)))(x)
    np.testing.assert_array_equal(gradient, [12.0, 12.0])  # 2^3 * 1 * 3 * 0.5


def test_what_a_layer_closes_over_may_be_traced():
    @jax.jit
    def found(scale):
        def scaled(x, weights, i):
            return scale * layer(x, weights, i)

        def loss(over, x, weights):
            return jnp.sum(over(scaled, x, weights) ** 2)

        return [
            jax.grad(lambda w, over=over: loss(over, stack(2)[0], w))(stack(2)[1])
            for over in (loop.in_place, loop.scan)
        ]

    chex.assert_trees_all_close(*found(0.5), rtol=1e-6)


@pytest.mark.parametrize(
    "policy, kept",
    [
        (jax.checkpoint_policies.nothing_saveable, 1),  # x
        (jax.checkpoint_policies.dots_saveable, 2),  # x and x a
    ],
)
def test_only_what_the_policy_names_is_kept(policy, kept):
    remat = jax.checkpoint(layer, policy=policy, prevent_cse=False)
    x, weights = stack(LAYERS)
    _, pullback = jax.vjp(lambda *given: loop.in_place(remat, *given), x, weights)
    shapes = [leaf.shape for leaf in jax.tree.leaves(pullback)]
    assert shapes.count((LAYERS, 4)) == kept
    assert shapes.count((LAYERS, 4, 4)) == 2  # the weights


def lowered(over, count):
    loss = jax.grad(lambda x, w: jnp.sum(over(layer, x, w)), argnums=(0, 1))
    return jax.jit(loss).lower(*stack(count)).as_text()


def test_only_an_unrolled_loop_grows_with_depth():
    def sizes(over):
        return [len(lowered(over, count).splitlines()) for count in (2, 20)]

    for over in (loop.scan, loop.in_place):
        shallow, deep = sizes(over)
        assert deep == shallow
    shallow, deep = sizes(loop.unrolled)
    assert deep > 2 * shallow


@functools.cache
def half_trained(over):
    """The gradient of `a` and `b` of eight layers, and of `b` alone, as programs."""
    shape = jax.ShapeDtypeStruct((8, 64, 64), jnp.float32)
    x = jax.ShapeDtypeStruct((64,), jnp.float32)

    def loss(trained, frozen, x):
        return jnp.sum(over(layer, x, models.merge(trained, frozen)) ** 2)

    def lowered(*halves):
        return jax.jit(jax.grad(loss)).lower(*halves, x)

    whole = lowered({"a": shape, "b": shape}, {})
    half = lowered({"a": None, "b": shape}, {"a": shape, "b": None})
    return [(program, program.compile()) for program in (whole, half)]


@pytest.mark.parametrize("over", LOOPS)
def test_the_gradient_of_a_trained_half_is_its_part_of_the_whole(over):
    (_, whole), (_, half) = half_trained(over)
    draw = np.random.default_rng(1).standard_normal
    a, b = (jnp.float32(draw((8, 64, 64)) / 8) for _ in range(2))
    x = jnp.float32(draw(64))
    found = half({"a": None, "b": b}, {"a": a, "b": None}, x)
    assert found["a"] is None
    wanted = whole({"a": a, "b": b}, {}, x)["b"]
    np.testing.assert_allclose(found["b"], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("over", LOOPS)
def test_the_gradient_of_a_frozen_half_is_neither_computed_nor_kept(over):
    (whole, whole_compiled), (half, half_compiled) = half_trained(over)
    one, other = (x.memory_analysis() for x in (whole_compiled, half_compiled))
    assert one.output_size_in_bytes - other.output_size_in_bytes >= 8 * 64 * 64 * 4
    assert other.temp_size_in_bytes <= one.temp_size_in_bytes
    # Of a layer, forward x a and tanh(.) b; backward what x, tanh(.) and b have of the
    # gradient, and a if it is trained. Layers that are unrolled share one function.
    products = [program.as_text().count("dot_general") for program in (whole, half)]
    assert products == [6, 5]


def test_a_trained_and_a_frozen_tree_are_one_again_when_merged():
    params = {"layers": {"q": 1.0, "norm": 2.0}, "norm": {"scale": 3.0}}
    halves = models.split_params(params, lambda name: name == "layers.q")
    assert halves == (
        {"layers": {"q": 1.0}},
        {"layers": {"norm": 2.0}, "norm": {"scale": 3.0}},
    )
    assert models.merge(*halves) == params == models.merge(params, None)
    adapters = {"layers": {"lora": {"a": 4.0}}}
    assert models.merge(adapters, params)["layers"] == {
        "q": 1.0, "norm": 2.0, "lora": {"a": 4.0},
    }  # fmt: skip
    with pytest.raises(ValueError, match="trained and frozen: .*one of the two trees"):
        models.merge(params, halves[1])


def test_a_decoder_is_differentiated_in_its_trained_half():
    arch = tiny.arch(num_layers=LAYERS)
    params = models.init(arch, jax.random.key(0))

    def loss(trained, frozen):
        hidden = models.forward(
            arch, models.merge(trained, frozen), TOKENS, POSITIONS, IDS,
            dtype=jnp.float32, remat="dots", loop=loop.in_place,
        )  # fmt: skip
        return jnp.sum(jnp.sin(hidden))

    def is_trained(name):
        return name in ("layers.q", "layers.down", "norm.scale")

    found = jax.jit(jax.grad(loss))(*models.split_params(params, is_trained))
    _, whole = loss_and_gradients(loop.in_place, "dots", False)
    wanted, _ = models.split_params(whole, is_trained)
    assert len(jax.tree.leaves(found)) == 3
    chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.accelerator
def test_a_gpu_computes_each_product_once_and_copies_no_stack():
    if jax.default_backend() != "gpu":
        pytest.skip("of a GPU's compiler")
    remat = jax.checkpoint(
        layer, policy=jax.checkpoint_policies.dots_saveable, prevent_cse=False
    )

    def loss(x, weights):
        return jnp.sum(jnp.float32(loop.in_place(remat, x, weights)))

    x, *weights = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        for shape in ((256, 512), (8, 512, 1024), (8, 1024, 512))
    )
    step = jax.jit(
        jax.grad(loss, argnums=(0, 1)), compiler_options=loop.COMPILER_OPTIONS
    )
    weights = dict(zip("ab", weights, strict=True))
    text = step.lower(x, weights).compile().as_text()
    # Forward x a and tanh(.) b; backward two for each.
    assert len(re.findall('custom_call_target="__cublas', text)) == 6
    # x, x a, and two gradients begin without zeros, and are written in place.
    assert text.count('"AllocateBuffer"') == 4
    assert not re.search(r"= bf16\[8,\d+,\d+\]\S* (copy|copy-start)\(", text)
