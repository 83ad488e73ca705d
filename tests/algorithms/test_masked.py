import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.algorithms import masked

# One row with two sequences, 1 and 3 tokens that count, and one of padding only.
X = jnp.array([[9.0, 2.0, 9.0, 4.0, 6.0, 8.0], [9.0] * 6])
MASK = jnp.array([[0, 1, 0, 1, 1, 1], [0] * 6], bool)
IDS = jnp.array([[0, 0, 1, 1, 1, 1], [-1] * 6])


def test_token_mean_by_hand():
    # (2 + 4 + 6 + 8) / 4
    np.testing.assert_allclose(masked.token_mean(X, MASK), 5.0, rtol=1e-6)


def test_sequence_mean_by_hand():
    # (2 / 1 + (4 + 6 + 8) / 3) / 2
    np.testing.assert_allclose(masked.sequence_mean(X, MASK, IDS, 2), 4.0, rtol=1e-6)


def test_sequences_without_tokens_do_not_count():
    np.testing.assert_allclose(masked.sequence_mean(X, MASK, IDS, 7), 4.0, rtol=1e-6)


@pytest.mark.parametrize(
    "mode, expected",
    [
        ("token-mean", 5.0),
        ("token-sum", 20.0),
        ("seq-mean-token-sum", 10.0),  # (2 + 18) / 2
        ("seq-mean-token-mean", 4.0),
        ("seq-mean-token-sum-norm", 2.5),  # (2 + 18) / 4 / 2
    ],
)
def test_weights_by_name(mode, expected):
    # A third sequence has no tokens.
    weights = masked.weights(mode, MASK, IDS, 3, loss_scale_factor=4.0)
    np.testing.assert_allclose(masked.weighted_sum(X, weights), expected, rtol=1e-6)


def test_an_empty_mask_gives_zero():
    nothing = jnp.zeros_like(MASK)
    assert masked.token_mean(X, nothing) == 0
    assert masked.sequence_mean(X, nothing, IDS, 2) == 0


def test_what_stands_under_the_mask_does_not_matter():
    with jax.debug_nans(False):
        x = jnp.where(MASK, X, jnp.nan)
        value, grad = jax.value_and_grad(masked.token_mean)(x, MASK)
    np.testing.assert_allclose(value, 5.0, rtol=1e-6)
    np.testing.assert_array_equal(grad, np.where(MASK, 0.25, 0.0))


def test_means_of_halves_of_a_batch_add_up():
    # A sequence per row, so that rows can be taken apart.
    x = jnp.arange(12.0).reshape(4, 3)
    mask = jnp.array([[0, 0, 1], [0, 1, 1], [1, 1, 1], [0, 0, 1]], bool)
    ids = jnp.repeat(jnp.arange(4)[:, None], 3, axis=1)
    # (2 + (4 + 5) / 2 + (6 + 7 + 8) / 3 + 11) / 4
    weights = masked.sequence_weights(mask, ids, 4)
    halves = [masked.weighted_sum(x[i], weights[i]) for i in (slice(1), slice(1, 4))]
    np.testing.assert_allclose(sum(halves), 24.5 / 4, rtol=1e-6)


def test_a_scale_has_no_default():
    with pytest.raises(ValueError, match="needs loss_scale_factor"):
        masked.weights("seq-mean-token-sum-norm", MASK, IDS, 2)


def test_the_average_of_a_sequence_is_at_each_of_its_tokens():
    # 2 / 1 and (4 + 6 + 8) / 3
    np.testing.assert_allclose(
        masked.sequence_average(X, MASK, IDS, 2), [[0, 2, 0, 6, 6, 6], [0] * 6]
    )


def test_whitening_by_hand():
    # veRL 0.9.1, masked_whiten: 1, 2, 3 -> -1, 0, 1; what is masked is 0 here.
    mask = jnp.array([True, True, True, False])
    whitened = masked.whiten(jnp.array([1.0, 2.0, 3.0, 9.0]), mask)
    np.testing.assert_allclose(whitened, [-1, 0, 1, 0], atol=1e-6)


def test_counts_whiten_like_as_many_copies():
    copies = masked.whiten(jnp.array([1.0, 4.0, 4.0, 4.0]), jnp.ones(4))
    counted = masked.whiten(jnp.array([1.0, 4.0]), jnp.array([1, 3]))
    np.testing.assert_allclose(counted, copies[:2], rtol=1e-6)


@pytest.mark.parametrize("counts", [[1, 1, 1], [0, 1, 0], [0, 0, 0]])
def test_whitening_equals_gives_exactly_zero(counts):
    # veRL raises for a single entry.
    whitened = masked.whiten(jnp.full(3, 0.1), jnp.array(counts))
    np.testing.assert_array_equal(whitened, jnp.zeros(3))
