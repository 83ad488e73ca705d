import jax.numpy as jnp
import numpy as np

from jaxrl_llm.algorithms import entropy_covariance as covariance

MASK = jnp.array([[True, True, True, True, False]])
# Means 2.5 and 0.
LOGPROBS = jnp.array([[1.0, 2.0, 3.0, 4.0, 9.0]])
ADVANTAGES = jnp.array([[-1.0, 1.0, -1.0, 1.0, 9.0]])
COVARIANCES = [[1.5, -0.5, -0.5, 1.5]]


def bits(seed=0, order=(0, 1)):
    """Of two sequences in one row, 20 tokens each."""
    tokens = jnp.arange(40).reshape(2, 20) % 7
    return covariance.random_bits(
        tokens[jnp.array(order)].reshape(1, 40),
        jnp.tile(jnp.arange(20), 2)[None],
        jnp.repeat(jnp.arange(2), 20)[None],
        2,
        jnp.int32(seed),
    )


def test_covariance_by_hand():
    got = covariance.covariance(LOGPROBS, ADVANTAGES, MASK)
    np.testing.assert_allclose(got[:, :4], COVARIANCES, rtol=1e-6)


def test_the_largest_are_chosen_exactly_as_many_as_asked_for():
    found = covariance.covariance(LOGPROBS, ADVANTAGES, MASK)
    for ratio, count in [(0.5, 2), (0.01, 1), (0.9, 3)]:
        chosen = covariance.largest(found, MASK, bits()[:, :5], kl_cov_ratio=ratio)
        assert chosen.sum() == count and not chosen[0, 4]
    chosen = covariance.largest(found, MASK, bits()[:, :5], kl_cov_ratio=0.5)
    np.testing.assert_array_equal(chosen[0, :4], [True, False, False, True])


def test_only_eligible_tokens_between_the_bounds_are_chosen():
    how = {"clip_cov_ratio": 1.0, "clip_cov_lb": 1.0, "clip_cov_ub": 5.0}
    found = covariance.covariance(LOGPROBS, ADVANTAGES, MASK)
    eligible = jnp.array([[False, True, True, True, True]])
    chosen = covariance.some_between(found, eligible, MASK, bits()[:, :5], **how)
    np.testing.assert_array_equal(chosen, [[False, False, False, True, False]])


def test_no_tokens_no_choice():
    nothing = jnp.zeros_like(MASK)
    chosen = covariance.largest(LOGPROBS, nothing, bits()[:, :5], kl_cov_ratio=1.0)
    assert not chosen.any()


def test_random_numbers_belong_to_what_a_sequence_says():
    first, second = jnp.split(bits(), 2, axis=1)
    swapped_second, swapped_first = jnp.split(bits(order=(1, 0)), 2, axis=1)
    np.testing.assert_array_equal(first, swapped_first)
    np.testing.assert_array_equal(second, swapped_second)
    assert np.unique(bits()).size == 40
    assert not np.any(bits() == bits(seed=1))


def test_random_numbers_are_spread_evenly():
    many = jnp.concatenate([bits(seed) for seed in range(100)]).ravel()
    share = np.bincount(np.asarray(many >> 29), minlength=8) / many.size
    np.testing.assert_allclose(share, np.full(8, 1 / 8), atol=0.03)
