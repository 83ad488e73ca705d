"""Expected values are worked out in the comments, not copied from a run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import losses, masked

LOG2 = float(np.log(2.0))
CASES = [
    # log-ratio, advantage, loss, clipped
    (0.0, 3.0, -3.0, False),  # on-policy: loss is -A
    (LOG2, 1.0, -1.2, True),  # good token, ratio 2 -> clipped to 1 + 0.2
    (LOG2, -1.0, 2.0, False),  # bad token made likelier: never clipped
    (-LOG2, 1.0, -0.5, False),  # good token made rarer: never clipped
    (-LOG2, -1.0, 0.8, True),  # bad token, ratio 1/2 -> clipped to 1 - 0.2
    (LOG2, 0.0, 0.0, False),  # an advantage of 0 moves nothing
]


def surrogate(logprobs, old_logprobs, advantages, low=0.2, high=0.2):
    return losses.clipped_surrogate(
        logprobs, old_logprobs, advantages, clip_ratio_low=low, clip_ratio_high=high
    )


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("log_ratio, advantage, expected, clipped", CASES)
def test_clipped_surrogate_by_hand(log_ratio, advantage, expected, clipped, jit):
    loss = jax.jit(surrogate) if jit else surrogate
    arguments = (
        jnp.full((1, 1), log_ratio),
        jnp.zeros((1, 1)),
        jnp.full((1, 1), advantage),
    )
    np.testing.assert_allclose(loss(*arguments), [[expected]], rtol=1e-6)
    assert clipped == losses.is_clipped(
        *arguments, clip_ratio_low=0.2, clip_ratio_high=0.2
    )


def test_bounds_are_separate():
    # Ratio 2 against 1 + 0.5, ratio 1/2 against 1 - 0.1.
    loss = surrogate(
        jnp.array([[LOG2, -LOG2]]),
        jnp.zeros((1, 2)),
        jnp.array([[1.0, -1.0]]),
        low=0.1,
        high=0.5,
    )
    np.testing.assert_allclose(loss, [[-1.5, 0.9]], rtol=1e-6)


def test_clipped_surrogate_has_no_gradient_past_the_bound():
    # Both tokens are at ratio 2: the good one is past its bound, the bad one is not.
    advantages = jnp.array([[1.0, -1.0]])
    grad = jax.grad(lambda x: surrogate(x, jnp.zeros((1, 2)), advantages).sum())
    np.testing.assert_allclose(grad(jnp.full((1, 2), LOG2)), [[0.0, 2.0]], rtol=1e-6)


def test_clipped_surrogate_is_policy_gradient_when_on_policy():
    # With old_logprobs == logprobs the gradient must be -A, not 0.
    advantages = jnp.array([[1.0, -3.0]])
    grad = jax.grad(lambda x: surrogate(x, x, advantages).sum())
    np.testing.assert_allclose(grad(jnp.full((1, 2), -1.5)), -advantages)


@pytest.mark.parametrize("log_ratio, expected", [(100.0, -1.2), (-100.0, -np.exp(-20))])
def test_clipped_surrogate_survives_a_huge_mismatch(log_ratio, expected):
    def loss(x):
        return surrogate(x, jnp.zeros((1, 1)), jnp.ones((1, 1))).sum()

    value, grad = jax.value_and_grad(loss)(jnp.full((1, 1), log_ratio))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_array_equal(grad, [[0.0]])


def test_clipped_surrogate_has_verl_s_numbers():
    # veRL 0.9.1, policy loss "vanilla", token-mean, bounds 0.2: one row of four tokens.
    mask = jnp.array([[1, 1, 1, 1, 0]], bool)
    old_logprobs = jnp.array([[-0.5, -1.0, -0.2, -2.0, 0.0]])
    advantages = mask.astype(jnp.float32)

    def loss(logprobs):
        per_token = surrogate(logprobs, old_logprobs, advantages)
        return masked.token_mean(per_token, mask)

    grad = jax.grad(loss)(jnp.array([[-0.4, -1.3, -0.2, -1.5, 0.0]]))
    # The stored gradient divides by 12 tokens: this row is a third of its batch.
    np.testing.assert_allclose(
        grad / 3, [[-0.0920976, -0.0617349, -0.0833333, 0.0, 0.0]], atol=1e-7
    )


def test_shapes_are_checked():
    with pytest.raises(Exception, match="advantages"):
        surrogate(jnp.zeros((2, 3)), jnp.zeros((2, 3)), jnp.zeros((2,)))
