import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import advantages

R2 = 2**0.5


def grpo(rewards, normalize_by_std=True):
    return advantages.grpo(jnp.array(rewards), normalize_by_std=normalize_by_std)


def test_grpo_by_hand():
    # Group 1: mean 2, deviations -1 0 1, unbiased std sqrt(2 / 2) = 1.
    # Group 2: mean 4, deviations -2 0 2, unbiased std sqrt(8 / 2) = 2.
    np.testing.assert_allclose(
        grpo([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]]),
        [[-1.0, 0.0, 1.0], [-1.0, 0.0, 1.0]],
        atol=2e-6,
    )


def test_grpo_has_verl_s_numbers():
    # veRL 0.9.1, compute_grpo_outcome_advantage: rewards 1, 0 and 0.5, 2.
    np.testing.assert_allclose(
        grpo([[1.0, 0.0], [0.5, 2.0]]),
        [[0.7071058, -0.7071058], [-0.7071062, 0.7071062]],
        rtol=2e-7,
    )


def test_dr_grpo_only_centres():
    np.testing.assert_allclose(
        grpo([[1.0, 0.0], [0.5, 2.0]], normalize_by_std=False),
        [[0.5, -0.5], [-0.75, 0.75]],
    )


@pytest.mark.parametrize("normalize", [True, False])
def test_equal_rewards_give_exactly_zero(normalize):
    # The mean of these in float32 is not 0.1.
    np.testing.assert_array_equal(grpo([[0.1] * 7], normalize), np.zeros((1, 7)))


def test_a_group_of_one_gets_zero_where_verl_gives_its_reward():
    np.testing.assert_array_equal(grpo([[3.0], [-1.0]]), [[0.0], [0.0]])
