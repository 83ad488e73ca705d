import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.algorithms import kl

# A policy over three tokens and a reference.
LOGITS = jnp.array([[0.3, -0.5, 1.1]])
REF = jax.nn.log_softmax(jnp.array([[1.0, 0.2, -0.4]]))


def policy(logits):
    return jax.nn.log_softmax(logits)


def expected_gradient(estimator):
    """Over tokens drawn from the policy: sum_x pi(x) * d estimator(x) / d logits."""
    per_token = jax.jacobian(lambda x: estimator(policy(x), REF)[0])(LOGITS)[:, 0]
    return jnp.exp(policy(LOGITS))[0] @ per_token


def forward_kl(logits):
    return jnp.sum(jnp.exp(policy(logits)) * (policy(logits) - REF))


def reverse_kl(logits):
    return jnp.sum(jnp.exp(REF) * (REF - policy(logits)))


@pytest.mark.parametrize(
    "name, expected",
    [
        ("k1", [0.1, -0.3, 0.5]),
        ("k2", [0.005, 0.045, 0.125]),
        # exp(-0.1) + 0.1 - 1 and so on; veRL 0.9.1, kl_penalty "low_var_kl"
        ("k3", [0.0048374, 0.0498588, 0.1065307]),
    ],
)
def test_estimators_by_hand(name, expected):
    difference = jnp.array([[0.1, -0.3, 0.5]])
    logprobs = jnp.full((1, 3), -2.0) + difference
    ref_logprobs = jnp.full((1, 3), -2.0)
    got = kl.estimate(name, logprobs, ref_logprobs)
    np.testing.assert_allclose(got, [expected], rtol=1e-5)


@pytest.mark.parametrize("estimator", [kl.k1, kl.k3])
def test_k1_and_k3_are_unbiased(estimator):
    mean = jnp.sum(jnp.exp(policy(LOGITS)) * estimator(policy(LOGITS), REF))
    np.testing.assert_allclose(mean, forward_kl(LOGITS), rtol=1e-5)


@pytest.mark.parametrize("estimator", [kl.k2, kl.k3])
def test_k2_and_k3_are_never_negative(estimator):
    x = jnp.linspace(-30.0, 30.0, 1001)[None]
    assert jnp.all(estimator(x, jnp.zeros_like(x)) >= 0)


def test_k1_has_no_gradient_on_average():
    np.testing.assert_allclose(expected_gradient(kl.k1), jnp.zeros(3), atol=1e-6)


def test_k2_has_the_gradient_of_the_kl_on_average():
    expected = jax.grad(forward_kl)(LOGITS)[0]
    np.testing.assert_allclose(expected_gradient(kl.k2), expected, rtol=1e-5)


def test_k3_has_the_gradient_of_the_reversed_kl_on_average():
    expected = jax.grad(reverse_kl)(LOGITS)[0]
    np.testing.assert_allclose(expected_gradient(kl.k3), expected, rtol=1e-5)


def test_k3_is_clamped_without_nan():
    x = jnp.array([[-100.0, 100.0, -30.0, 30.0]])
    value, grad = jax.value_and_grad(lambda x: kl.k3(x, jnp.zeros_like(x)).sum())(x)
    assert value == 40.0
    np.testing.assert_array_equal(grad, jnp.zeros((1, 4)))


@pytest.mark.parametrize("name", ["kl", "mse", "low_var_kl", "abs"])
def test_verl_s_other_names(name):
    other = {"kl": kl.k1, "mse": kl.k2, "low_var_kl": kl.k3, "abs": kl.absolute}[name]
    x, zeros = jnp.array([[0.3, -0.2]]), jnp.zeros((1, 2))
    np.testing.assert_array_equal(kl.estimate(name, x, zeros), other(x, zeros))


@pytest.mark.parametrize("name", ["k1", "k3", "abs", "low_var_kl"])
def test_a_plus_keeps_the_value_and_takes_the_gradient_of_k2(name):
    x, zeros = jnp.array([[0.3, -0.2, 0.0]]), jnp.zeros((1, 3))
    value, pullback = jax.vjp(lambda x: kl.estimate(name + "+", x, zeros), x)
    np.testing.assert_allclose(value, kl.estimate(name, x, zeros), atol=1e-8)
    np.testing.assert_allclose(pullback(jnp.ones_like(x))[0], x)  # of x^2 / 2


def test_the_absolute_difference_does_not_pull_where_there_is_none():
    grad = jax.grad(lambda x: kl.absolute(x, jnp.zeros((1, 3))).sum())
    np.testing.assert_array_equal(grad(jnp.array([[0.1, -0.3, 0.0]])), [[1, -1, 0]])


def test_an_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="kl_loss_type is 'k4'; known: k1, k2"):
        inspect.unwrap(kl.estimate)("k4", jnp.zeros((1, 1)), jnp.zeros((1, 1)))


def test_the_full_kl_is_the_sum_over_the_vocabulary():
    logits, ref = LOGITS[None], REF[None] + 3.0  # which a softmax does not see
    np.testing.assert_allclose(kl.full(logits, ref), [[forward_kl(LOGITS)]], rtol=1e-6)
    grad = jax.grad(lambda x: kl.full(x, ref).sum())(logits)
    np.testing.assert_allclose(grad[0], jax.grad(forward_kl)(LOGITS), rtol=1e-5)


def test_kl_is_taken_from_the_reward_of_response_tokens():
    rewards = kl.in_reward(
        jnp.array([[0.0, 0.0, 1.0]]),
        jnp.array([[9.0, -1.0, -2.0]]),
        jnp.array([[0.0, -1.5, -1.0]]),
        jnp.array([[False, True, True]]),
        kind="k1",
        coef=0.1,
    )
    np.testing.assert_allclose(rewards, [[0.0, -0.05, 1.1]], rtol=1e-6)


@pytest.mark.parametrize(
    "current, expected",
    [
        (6.0, 0.2),  # on target
        (6.6, 0.2 * (1 + 0.1 * 256 / 10000)),  # 10 % over it
        (99.0, 0.2 * (1 + 0.2 * 256 / 10000)),  # at most a fifth counts
        (0.0, 0.2 * (1 - 0.2 * 256 / 10000)),
    ],
)
def test_the_adaptive_coefficient_by_hand(current, expected):
    how = {"target_kl": 6.0, "horizon": 10000}
    got = kl.next_coef("adaptive", 0.2, current, 256, **how)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert kl.next_coef("fixed", 0.2, current, 256, **how) == 0.2
