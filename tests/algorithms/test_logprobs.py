import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.algorithms import logprobs

R, T, D, V = 3, 10, 4, 11
# Row 0 is one sequence; row 1 two, and padding; row 2 padding only.
POSITIONS = jnp.array([range(10), [0, 1, 2, 3, 0, 1, 2, 0, 0, 0], [0] * 10])
MASK = jnp.array(
    [
        [0, 0, 0, 1, 1, 1, 1, 1, 1, 1],
        [0, 0, 1, 1, 0, 1, 1, 0, 0, 0],
        [0] * 10,
    ],
    bool,
)


def make(key=0):
    keys = jax.random.split(jax.random.key(key), 3)
    hidden = jax.random.normal(keys[0], (R, T, D))
    output_matrix = jax.random.normal(keys[1], (V, D))
    return hidden, output_matrix, jax.random.randint(keys[2], (R, T), 0, V)


def naive(hidden, output_matrix, tokens, *, temperature=1.0, softcap=None):
    """The whole [R, T, V], one log-softmax, shifted by one."""
    logits = hidden @ output_matrix.T
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    p = jax.nn.log_softmax(logits / temperature)
    p = jnp.roll(p, 1, axis=1)
    own = jnp.take_along_axis(p, tokens[..., None], axis=2)[..., 0]
    entropy = -jnp.sum(jnp.exp(p) * p, axis=2)
    return jnp.where(MASK, own, 0.0), jnp.where(MASK, entropy, 0.0)


@pytest.mark.parametrize(
    "chunk, temperature, softcap",
    [
        (1000, 1.0, None),  # everything at once
        (1000, 0.7, 2.0),
        (1, 0.7, 2.0),  # one token of every row at a time
        (6, 1.0, None),  # two at a time
        (9, 1.0, 2.0),  # three at a time: ten do not divide
    ],
)
def test_equals_the_naive_log_softmax_and_its_gradient(chunk, temperature, softcap):
    hidden, output_matrix, tokens = make()

    def loss(score):
        def f(hidden, output_matrix):
            own, entropy = score(hidden, output_matrix)[:2]
            return jnp.sum(own * jnp.cos(own)) + jnp.sum(jnp.sin(entropy)), own

        return jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))

    ours = functools.partial(
        logprobs.of_tokens,
        tokens=tokens,
        positions=POSITIONS,
        mask=MASK,
        temperature=temperature,
        logit_softcap=softcap,
        chunk=chunk,
    )
    theirs = functools.partial(
        naive, tokens=tokens, temperature=temperature, softcap=softcap
    )
    (value, own), grads = loss(ours)(hidden, output_matrix)
    (expected, expected_own), expected_grads = loss(theirs)(hidden, output_matrix)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(own, expected_own, rtol=1e-5, atol=1e-6)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, expected_grad, rtol=1e-4, atol=1e-5)


def test_by_hand():
    # Two tokens, hidden state 1, logits (0, log 3): p = 1/4, 3/4.
    hidden = jnp.array([[[1.0], [5.0]]])
    output_matrix = jnp.array([[0.0], [np.log(3.0)]], jnp.float32)
    got = logprobs.of_tokens(
        hidden,
        output_matrix,
        tokens=jnp.array([[0, 1]]),
        positions=jnp.array([[0, 1]]),
        mask=jnp.array([[False, True]]),
    )
    entropy = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))
    np.testing.assert_allclose(got.logprobs, [[0.0, np.log(0.75)]], rtol=1e-6)
    np.testing.assert_allclose(got.entropy, [[0.0, entropy]], rtol=1e-6)


def test_the_first_token_of_a_sequence_gets_zero():
    everything = jnp.ones((R, T), bool)
    got = logprobs.of_tokens(*make(), POSITIONS, everything)
    np.testing.assert_array_equal(got.logprobs == 0, POSITIONS == 0)
    np.testing.assert_array_equal(got.entropy == 0, POSITIONS == 0)


def test_nothing_depends_on_tokens_that_are_not_asked_for():
    hidden, output_matrix, tokens = make()
    used = jnp.roll(MASK, -1, axis=1)
    other = make(key=1)
    got = logprobs.of_tokens(
        jnp.where(used[..., None], hidden, other[0]),
        output_matrix,
        jnp.where(MASK, tokens, other[2]),
        POSITIONS,
        MASK,
    )
    expected = logprobs.of_tokens(hidden, output_matrix, tokens, POSITIONS, MASK)
    np.testing.assert_array_equal(got.logprobs, expected.logprobs)


def test_a_constant_entropy_has_its_value_and_no_gradient():
    hidden, output_matrix, tokens = make()

    def entropy(hidden, gradient):
        return logprobs.of_tokens(
            hidden, output_matrix, tokens, POSITIONS, MASK, entropy_gradient=gradient
        ).entropy.sum()

    assert entropy(hidden, False) == entropy(hidden, True) > 0
    assert jnp.all(jax.grad(entropy)(hidden, False) == 0)
    assert jnp.any(jax.grad(entropy)(hidden, True) != 0)


@pytest.mark.parametrize("chunk", [1000, 6, 9])
def test_kept_probabilities_give_the_same_gradient(chunk):
    hidden, output_matrix, tokens = make()

    def loss(hidden, output_matrix, keep):
        own = logprobs.of_tokens(
            hidden, output_matrix, tokens, POSITIONS, MASK,
            temperature=0.7, entropy_gradient=False, keep=keep, chunk=chunk,
        ).logprobs  # fmt: skip
        return jnp.sum(own * jnp.cos(own))

    got, wanted = (
        jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=2)(
            hidden, output_matrix, keep
        )
        for keep in (True, False)
    )
    chex.assert_trees_all_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk, softcap", [(1000, 2.0), (6, None)])
def test_without_a_gradient_of_the_matrix_logits_are_computed_once(chunk, softcap):
    hidden, output_matrix, tokens = make()
    before = jnp.maximum(jnp.arange(T)[None] - 1, 0) + jnp.zeros((R, 1), jnp.int32)

    def loss(hidden, previous, matrix_gradient):
        own = logprobs.of_tokens(
            hidden, output_matrix, tokens, POSITIONS, MASK,
            previous=previous, temperature=0.7, logit_softcap=softcap, chunk=chunk,
            entropy_gradient=False, matrix_gradient=matrix_gradient,
        ).logprobs  # fmt: skip
        return jnp.sum(own * jnp.cos(own))

    grad = jax.value_and_grad(loss)
    for previous in (None, before):
        got = grad(hidden, previous, False)
        chex.assert_trees_all_close(
            got, grad(hidden, previous, True), rtol=1e-5, atol=1e-6
        )
    for matrix_gradient, products in ((False, 2), (True, 4)):
        lowered = jax.jit(grad, static_argnums=2).lower(hidden, None, matrix_gradient)
        assert lowered.as_text().count("stablehlo.dot_general") == products


@pytest.mark.parametrize("how", [{}, {"logit_softcap": 2.0, "entropy_gradient": False}])
def test_what_needs_the_logits_keeps_no_probabilities(how):
    with pytest.raises(ValueError, match="keep needs entropy_gradient=False"):
        logprobs.of_tokens(*make(), POSITIONS, MASK, keep=True, **how)


def test_tokens_that_are_not_asked_for_cost_no_chunk():
    # 16 of 64 columns are asked for, four at a time: four trips around either loop.
    trips = []
    hidden, output_matrix = jnp.ones((1, 64, D)), jnp.ones((V, D))
    place = jnp.arange(64)[None]

    def scored(mask):
        with jax.disable_jit():
            logprobs.of_tokens(hidden, output_matrix, place % V, place, mask, chunk=4)

    einsum = jnp.einsum

    def counting(*args, **kwargs):
        trips.append(args[0])
        return einsum(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprobs.jnp, "einsum", counting)
        scored(place >= 48)
    assert len(trips) == 4


def test_the_peak_memory_does_not_grow_with_tokens_times_vocabulary():
    width, vocabulary = 8, 4096

    def temporary_bytes(length):
        def loss(hidden, output_matrix):
            place = jnp.arange(length)[None]
            scored = logprobs.of_tokens(
                hidden, output_matrix, place, place, place > 0, chunk=64
            )
            return scored.logprobs.sum() + scored.entropy.sum()

        shapes = [(1, length, width), (vocabulary, width)]
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(
            *[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        )
        return compiled.compile().memory_analysis().temp_size_in_bytes

    more = temporary_bytes(4096) - temporary_bytes(512)
    # A few arrays of hidden states and scalars per token; one logit each is 58 MB.
    assert more < 10 * (4096 - 512) * width * 4


def test_bfloat16_hidden_states_accumulate_in_float32():
    hidden, output_matrix, tokens = make()
    rounded = [x.astype(jnp.bfloat16) for x in (hidden, output_matrix)]
    got = logprobs.of_tokens(
        rounded[0], output_matrix, tokens, POSITIONS, MASK
    ).logprobs
    expected, _ = naive(*[x.astype(jnp.float32) for x in rounded], tokens)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "chunk, temperature, softcap", [(1000, 1.0, None), (6, 0.7, 2.0)]
)
def test_sum_pi_squared_is_the_sum_of_the_squares_of_the_softmax(
    chunk, temperature, softcap
):
    hidden, output_matrix, _ = make()
    logits = np.asarray(hidden @ output_matrix.T, np.float64)
    if softcap:
        logits = softcap * np.tanh(logits / softcap)
    p = np.exp(logits / temperature)
    p /= p.sum(axis=2, keepdims=True)
    expected = np.roll((p**2).sum(axis=2), 1, axis=1)
    expected = np.where(MASK & (POSITIONS > 0), expected, 0.0)
    got = logprobs.sum_pi_squared(
        hidden,
        output_matrix,
        POSITIONS,
        MASK,
        temperature=temperature,
        logit_softcap=softcap,
        chunk=chunk,
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5)
