import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import kl

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
