"""veRL's numbers are in test_verl_parity.py; these are worked by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.algorithms.rollout_correction import Correction, correct

LOG2 = float(np.log(2.0))
# Ratios 2, 1/2, 1 of sequence 0 and 4 of sequence 1, in one row with padding.
LOG_RATIO = jnp.array([[LOG2, -LOG2, 0.0, 2 * LOG2, 9.0]])
MASK = jnp.array([[True, True, True, True, False]])
IDS = jnp.array([[0, 0, 0, 1, -1]])


def corrected(log_ratio=LOG_RATIO, mask=MASK, **fields):
    zeros = jnp.zeros_like(log_ratio)
    return correct(log_ratio, zeros, mask, IDS, 3, Correction(**fields))


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"rollout_is": "token"}, [2, 0.5, 1, 2, 0]),  # 4 cut down to 2
        ({"rollout_is": "token", "is_bounds": (0.6, 3.0)}, [2, 0, 1, 0, 0]),
        ({"rollout_is": "sequence", "is_bounds": (None, 3.0)}, [1, 1, 1, 3, 0]),
        (
            {"rollout_is": "token", "rollout_is_batch_normalize": True},
            np.array([2, 0.5, 1, 2, 0]) / (5.5 / 4),
        ),
        (  # by sequences: (1 + 2) / 2
            {"rollout_is": "sequence", "rollout_is_batch_normalize": True},
            np.array([1, 1, 1, 2, 0]) / 1.5,
        ),
    ],
)
def test_importance_weights_by_hand(fields, expected):
    np.testing.assert_allclose(corrected(**fields).weights, [expected], rtol=1e-6)


@pytest.mark.parametrize(
    "kind, bounds, expected",
    [
        ("token_k1", (0.6, 3.0), [1, 0, 1, 0]),
        ("token_k2", (None, 0.5), [1, 1, 1, 0]),  # log(2)^2 / 2 = .24 and .96
        ("token_k3", (None, 0.25), [0, 1, 1, 0]),  # 2 - 1 - log 2 = .31; .19; 0; 1.6
        ("seq_sum_k1", (0.9, 1.1), [1, 1, 1, 0]),  # product 1 and 4
        ("seq_mean_k1", (0.9, 4.1), [1, 1, 1, 1]),
        ("seq_sum_k2", (None, 0.4), [0, 0, 0, 0]),  # .48 and .96
        ("seq_mean_k2", (None, 0.4), [1, 1, 1, 0]),  # .16
        ("seq_max_k3", (None, 0.3), [0, 0, 0, 0]),
        ("seq_max_k3", (None, 0.31), [1, 1, 1, 0]),
    ],
)
def test_rejections_by_hand(kind, bounds, expected):
    found = corrected(rejections=((kind, bounds),))
    np.testing.assert_array_equal(found.mask, [[*map(bool, expected), False]])
    share = float(found.metrics["rollout_corr/rollout_rs_masked_fraction"])
    np.testing.assert_allclose(share, 1 - np.mean(expected))


def test_all_rejections_must_let_a_token_pass():
    found = corrected(rejections=(("token_k1", (0.6, 9.0)), ("token_k3", (None, 0.31))))
    np.testing.assert_array_equal(found.mask, [[True, False, True, False, False]])


def test_bounds_of_k1_come_in_pairs():
    with pytest.raises(ValueError, match="token_k1 needs a lower and an upper bound"):
        corrected(rejections=(("token_k1", (None, 2.0)),))


def test_equal_policies_have_no_mismatch():
    found = corrected(jnp.zeros_like(LOG_RATIO), rollout_is="sequence")
    zero = ("kl", "k3_kl", "log_ppl_diff", "log_ppl_abs_diff", "chi2_token", "chi2_seq")
    assert all(float(found.metrics[f"rollout_corr/{name}"]) == 0 for name in zero)
    assert float(found.metrics["rollout_corr/rollout_is_eff_sample_size"]) == 1


def test_without_tokens_everything_is_finite():
    # veRL raises.
    found = corrected(
        mask=jnp.zeros_like(MASK),
        rollout_is="sequence",
        rollout_is_batch_normalize=True,
        rejections=(("seq_max_k2", (None, 1.0)),),
    )
    assert all(np.isfinite(float(x)) for x in found.metrics.values())
    assert not found.mask.any() and not found.weights.any()
