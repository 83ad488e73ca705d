import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.rollout.native import sampling

# A known distribution over 300 tokens (three blocks): 0.5, 0.25, 0.15, 0.1 on four.
TOKENS = np.array([7, 130, 131, 299])
PROBS = np.array([0.5, 0.25, 0.15, 0.1])
LOGITS = np.full(300, -np.inf, np.float32)
LOGITS[TOKENS] = np.log(PROBS) + 3.0  # a constant changes nothing


# One program for all the numbers that a row may ask for.
SAMPLE = jax.jit(sampling.sample, static_argnames=("mode", "top"))


def draw_many(
    n=20_000, *, temperature=1.0, top_k=-1, top_p=1.0, min_p=0.0, mode=None, top=0
):
    keys = sampling.row_keys(
        jnp.zeros(n, jnp.uint32),
        jnp.zeros(n, jnp.int32),
        jnp.arange(n),
        jnp.zeros(n, jnp.int32),
    )
    if mode is None:
        mode = "truncated" if top_k != -1 or top_p < 1 or min_p > 0 else "tempered"
    rows = np.broadcast_to(LOGITS, (n, 300))
    options = [np.full(n, x, np.float32) for x in (temperature, top_p, min_p)]
    return SAMPLE(
        jnp.asarray(rows),
        keys,
        jnp.zeros(n, jnp.int32),
        temperature=jnp.asarray(options[0]),
        top_k=jnp.full(n, top_k),
        top_p=jnp.asarray(options[1]),
        min_p=jnp.asarray(options[2]),
        mode=mode,
        top=top,
    )


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, [0.5, 0.25, 0.15, 0.1]),
        ({"mode": "plain"}, [0.5, 0.25, 0.15, 0.1]),
        pytest.param({"mode": "truncated"}, PROBS, marks=pytest.mark.slow),
        # p^2, renormalised: .25 .0625 .0225 .01 over .345
        ({"temperature": 0.5}, np.array([0.25, 0.0625, 0.0225, 0.01]) / 0.345),
        # Sorting all these rows takes seconds; each cut is made in a case below too.
        pytest.param({"top_k": 2}, [2 / 3, 1 / 3, 0, 0], marks=pytest.mark.slow),
        # .5 < .7, .5 + .25 >= .7: two tokens reach it
        pytest.param({"top_p": 0.7}, [2 / 3, 1 / 3, 0, 0], marks=pytest.mark.slow),
        # at least 0.3 * 0.5 = 0.15 (up to rounding: 0.29): three tokens
        ({"min_p": 0.29}, np.array([0.5, 0.25, 0.15, 0]) / 0.9),
        # top_k 3 leaves .5/.9 = .556, .278, .167; .556 + .278 = .83 >= .6
        ({"top_k": 3, "top_p": 0.6}, [2 / 3, 1 / 3, 0, 0]),
        ({"temperature": 0.0}, [1, 0, 0, 0]),
        ({"temperature": 0.0, "mode": "plain"}, [1, 0, 0, 0]),
    ],
    ids=str,
)
def test_samples_follow_the_distribution(options, expected):
    sampled = draw_many(**options)
    counts = np.array([(sampled.tokens == token).sum() for token in TOKENS])
    n = len(sampled.tokens)
    assert counts.sum() == n  # nothing of probability 0 is ever drawn
    expected = np.asarray(expected)
    error = np.sqrt(np.maximum(expected * (1 - expected), 1e-9) * n)
    assert np.all(np.abs(counts - expected * n) <= 4 * error + 1e-3)
    for token, p in zip(TOKENS, expected, strict=True):
        here = np.asarray(sampled.logprobs)[np.asarray(sampled.tokens) == token]
        np.testing.assert_allclose(here, np.log(p) if p else here, atol=1e-5)


def test_raw_logprobs_ignore_temperature_and_truncation():
    sampled = draw_many(64, temperature=0.3, top_k=2)
    index = np.searchsorted(TOKENS, np.asarray(sampled.tokens))
    np.testing.assert_allclose(sampled.raw_logprobs, np.log(PROBS)[index], atol=1e-5)


@pytest.mark.parametrize(
    "options, probs",
    [
        ({"mode": "plain"}, PROBS),
        ({"temperature": 0.5}, np.array([0.25, 0.0625, 0.0225, 0.01]) / 0.345),
        (
            {"temperature": 0.5, "top_k": 2},
            np.array([0.25, 0.0625, 0.0225, 0.01]) / 0.345,
        ),
        ({"top_p": 0.7}, PROBS),
        ({"min_p": 0.29, "top_k": 3}, PROBS),
        ({"temperature": 0.0}, PROBS),
        ({"temperature": 0.0, "mode": "plain"}, PROBS),
    ],
    ids=str,
)
def test_full_logprobs_ignore_what_is_cut_off(options, probs):
    sampled = draw_many(64, **options)
    index = np.searchsorted(TOKENS, np.asarray(sampled.tokens))
    np.testing.assert_allclose(sampled.full_logprobs, np.log(probs)[index], atol=1e-5)


@pytest.mark.parametrize(
    "options, probs",
    [({"mode": "plain"}, PROBS[:3]), ({"top_k": 2}, [2 / 3, 1 / 3, 0])],
    ids=str,
)
def test_the_most_likely_tokens_are_told(options, probs):
    sampled = draw_many(4, **options, top=3)
    wanted = np.broadcast_to(np.asarray(probs, np.float32), (4, 3))
    np.testing.assert_allclose(np.exp(sampled.top_logprobs), wanted, atol=1e-6)
    kept = np.count_nonzero(probs)
    np.testing.assert_array_equal(
        sampled.top_tokens[:, :kept], np.broadcast_to(TOKENS[:kept], (4, kept))
    )


def test_draw_inverts_the_distribution_function():
    # First number: which block (tokens 0-127 hold .5, 128-255 .4, 256-299 .1).
    # Second: which token inside (130 holds .25 of .4 = .625, then 131).
    cases = [
        (0.0, 0.9, 7),
        (0.49, 0.0, 7),
        (0.51, 0.62, 130),
        (0.51, 0.63, 131),
        (0.89, 0.999999, 131),
        (0.91, 0.5, 299),
        (0.99999994, 0.99999994, 299),
    ]
    for first, second, token in cases:
        drawn, logprob = jax.jit(sampling.draw)(
            jnp.asarray(LOGITS)[None],
            jnp.array([[first, second]], jnp.float32),
            jnp.array([False]),
        )
        assert drawn[0] == token, (first, second)
        expected = np.log(PROBS[TOKENS == token])
        np.testing.assert_allclose(logprob, expected, atol=1e-6)


def test_truncate_keeps_ties_and_never_everything_away():
    logits = jnp.log(jnp.array([[0.4, 0.3, 0.3]]))
    truncate = jax.jit(sampling.truncate)
    kept = truncate(logits, *map(jnp.atleast_1d, (2, 1.0, 0.0)))
    assert np.isfinite(kept).all()  # both 0.3 stand in second place
    kept = truncate(logits, *map(jnp.atleast_1d, (-1, 1e-9, 0.0)))
    np.testing.assert_array_equal(np.isfinite(kept), [[True, False, False]])


def test_keys_tell_every_turn_of_every_response_apart():
    grid = np.meshgrid([0, 1], [0, 1, 2], [0, 1], [0, 1, 2], indexing="ij")
    seeds, prompts, samples, turns = (x.ravel() for x in grid)
    keys = sampling.row_keys(
        jnp.asarray(seeds, jnp.uint32),
        jnp.asarray(prompts, jnp.int32),
        jnp.asarray(samples, jnp.int32),
        jnp.asarray(turns, jnp.int32),
    )
    assert len(np.unique(jax.random.key_data(keys), axis=0)) == 36
    first = jax.random.fold_in(jax.random.fold_in(jax.random.key(1), 0), 1)
    [at] = np.flatnonzero((seeds == 1) & (prompts == 0) & (samples == 1) & (turns == 0))
    assert (jax.random.key_data(keys[at]) == jax.random.key_data(first)).all()
