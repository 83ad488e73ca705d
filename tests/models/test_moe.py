"""Experts: which ones tokens go to, and that each token goes through all of its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models import Architecture, Moe, grouped, moe

E, D, F, M = 4, 16, 32, 40
SIZES = {
    "uneven": [3, 0, 19, 5],  # and thirteen rows of no group
    "all rows of one group": [0, 0, M, 0],
    "no rows": [0, 0, 0, 0],
    "a row each": [1, 1, 1, 1],
}


def drawn(*shape, seed=0):
    values = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(values, jnp.float32)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("kernel", ["blocked", "ragged", "triton_interpreted"])
def test_a_grouped_product_and_its_gradients(kernel, sizes, transposed):
    w = np.asarray(drawn(E, D, F))
    matrices = w.swapaxes(1, 2) if transposed else w
    x = np.array(drawn(M, matrices.shape[1], seed=1))
    gradient = np.array(drawn(M, matrices.shape[2]))
    result, of_x, of_w = np.zeros_like(gradient), np.zeros_like(x), np.zeros_like(w)
    for row, e in enumerate(np.repeat(np.arange(E), sizes)):
        result[row] = x[row] @ matrices[e]
        of_x[row] = matrices[e] @ gradient[row]
        outer = np.outer(x[row], gradient[row])
        of_w[e] += outer.T if transposed else outer

    @jax.jit
    def run(x, w, gradient):
        product = functools.partial(
            grouped.product,
            sizes=jnp.array(sizes),
            kernel=kernel,
            transposed=transposed,
        )
        found, pullback = jax.vjp(lambda x, w: product(x, w), x, w)
        return found, *pullback(gradient)

    # What lies in rows of no group, such as a NaN, goes nowhere.
    x[sum(sizes) :], gradient[sum(sizes) :] = np.nan, np.nan
    for found, wanted in zip(run(x, w, gradient), (result, of_x, of_w), strict=True):
        np.testing.assert_allclose(found, wanted, atol=3e-5)


def test_a_kernel_says_which_widths_it_takes():
    with pytest.raises(ValueError, match="a width of 24 is no multiple of 16"):
        grouped.product(
            drawn(8, 24), drawn(2, 24, 16), jnp.array([4, 4]), "triton_interpreted"
        )


def test_sums_of_bfloat16_are_float32():
    # 1 and 4096 times 2^-9: a sum in bfloat16 would stay at 1.
    x = jnp.full((8, 4097), 2.0**-9, jnp.bfloat16).at[:, 0].set(1.0)
    w = jnp.ones((2, 4097, 1), jnp.bfloat16)
    sizes = jnp.array([8, 0])
    for kernel in ("blocked", "ragged"):

        @jax.jit
        def run(w, kernel=kernel):
            return jax.vjp(lambda w: grouped.product(x, w, sizes, kernel), w)

        found, pullback = run(w)
        np.testing.assert_array_equal(found.astype(jnp.float32), 9.0)
        (of_w,) = pullback(jnp.ones((8, 1), jnp.bfloat16))
        np.testing.assert_array_equal(of_w[0, 0].astype(jnp.float32), 8.0)


def test_the_router_computes_in_float32():
    x, router = drawn(1, 3, D).astype(jnp.bfloat16), drawn(D, E)
    logits = moe.router_logits(x, router)
    assert logits.dtype == jnp.float32
    exact = np.asarray(x, np.float64)[0] @ np.asarray(
        router.astype(jnp.bfloat16), np.float64
    )
    np.testing.assert_allclose(logits[0], exact, rtol=1e-5, atol=1e-6)
    routes = moe.route(Moe(num_experts=E, top_k=2, expert_size=F), logits)
    assert routes.gates.dtype == jnp.float32
    probabilities = np.exp(exact) / np.exp(exact).sum(axis=-1, keepdims=True)
    best = np.sort(probabilities, axis=-1)[:, ::-1][:, :2]
    np.testing.assert_allclose(routes.gates[0], best, rtol=1e-5)


def test_a_selection_bias_chooses_and_does_not_weight():
    how = Moe(num_experts=E, top_k=1, expert_size=F, score="sigmoid", scale=2.0)
    logits = jnp.array([[[0.0, 1.0, 2.0, 3.0]]])
    routes = moe.route(how, logits, jnp.array([9.0, 0.0, 0.0, 0.0]))
    assert routes.chosen.tolist() == [[[0]]]
    np.testing.assert_allclose(routes.gates, 2.0 * 0.5)


def test_experts_are_of_the_best_groups_only():
    # The best expert of all is the third, but its group's best two add up to less.
    how = Moe(num_experts=6, top_k=2, expert_size=F, groups=3, chosen_groups=1)
    logits = jnp.log(jnp.array([[[0.20, 0.19, 0.30, 0.02, 0.19, 0.1]]]))
    assert moe.route(how, logits).chosen.tolist() == [[[0, 1]]]


def layer(x, logits, weights, k, **how):
    """The experts of every token one after the other, in float64."""
    gate, up, down = (np.asarray(w, np.float64) for w in weights)
    routes = moe.route(Moe(num_experts=E, top_k=k, expert_size=F), logits)
    out = np.zeros(x.shape)
    for at in np.ndindex(x.shape[:2]):
        for e, weight in zip(routes.chosen[at], routes.gates[at], strict=True):
            inner = x[at] @ gate[e]
            hidden = inner / (1 + np.exp(-inner)) * (x[at] @ up[e])
            out[at] += float(weight) * (down[e] @ hidden)
    return routes, out


@pytest.mark.parametrize("tokens", [2, 9])
@pytest.mark.parametrize("everywhere", [False, True])
def test_every_token_goes_through_its_experts(tokens, everywhere):
    # Two tokens need no more matrices than there are, and take only those.
    x, weights = drawn(1, tokens, D), [drawn(E, D, F, seed=i) for i in range(3)]
    logits = drawn(1, tokens, E, seed=9)
    if everywhere:  # all tokens go to the same experts
        logits = jnp.broadcast_to(jnp.array([9.0, 0.0, 5.0, 0.0]), logits.shape)
    routes, wanted = layer(np.asarray(x), logits, weights, 2)
    alone = jax.jit(moe.alone, static_argnums=3)
    found = alone(x, routes, moe.Weights(*weights), jax.nn.silu)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-4)
    # What experts add that are elsewhere is left to others.
    halves = [
        alone(
            x,
            routes,
            moe.Weights(*(w[first : first + 2] for w in weights)),
            jax.nn.silu,
            first=first,
        )
        for first in (0, 2)
    ]
    np.testing.assert_allclose(sum(halves), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 5}, "top_k 5 of 4 experts"),
        ({"groups": 3}, "4 experts in 3 groups"),
        ({"groups": 4}, "4 groups of 4 experts have less than two"),
        ({"groups": 2, "top_k": 3}, "top_k 3 is more than 1 groups of 2"),
    ],
)
def test_experts_that_cannot_be_chosen_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Moe(**{"num_experts": 4, "top_k": 2, "expert_size": 8} | fields)


def test_layers_with_experts_and_others_are_told_apart():
    how = {
        "model_type": "qwen3_moe", "vocab_size": 8, "hidden_size": 8, "num_heads": 1,
        "intermediate_size": 8, "num_kv_heads": 1, "head_dim": 8, "norm_eps": 1e-6,
        "rope": (None,), "num_layers": 5, "rope_of_layer": (0,) * 5,
        "window_of_layer": (None,) * 5,
    }  # fmt: skip
    some = Moe(num_experts=4, top_k=2, expert_size=8, dense_layers=(0, 3))
    arch = Architecture(**how, moe=some)
    assert arch.runs == [range(1), range(1, 3), range(3, 4), range(4, 5)]
    for layers, message in [((5,), "dense_layers has 5"), (range(5), "all layers")]:
        all_of = Moe(num_experts=4, top_k=2, expert_size=8, dense_layers=tuple(layers))
        with pytest.raises(ValueError, match=message):
            Architecture(**how, moe=all_of)
