"""Expected values are worked out in the comments, not copied from a run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.algorithms import losses, masked

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


def pair(*log_ratios):
    """logprobs and old_logprobs of one row, the old ones -1."""
    old = jnp.full((1, len(log_ratios)), -1.0)
    return old + jnp.array([log_ratios]), old


@pytest.mark.parametrize(
    "log_ratio, advantage, expected",
    [
        (np.log(5.0), -1.0, 3.0),  # veRL 0.9.1's own cases of the dual clip
        (np.log(1.5), 1.0, -1.2),
        (np.log(0.5), -1.0, 0.8),
        (np.log(2.0), -1.0, 2.0),  # below c
    ],
)
def test_dual_clip_by_hand(log_ratio, advantage, expected):
    loss = losses.clipped_surrogate(
        *pair(log_ratio),
        jnp.full((1, 1), advantage),
        clip_ratio_low=0.2,
        clip_ratio_high=0.2,
        clip_ratio_c=3.0,
    )
    np.testing.assert_allclose(loss, [[expected]], rtol=1e-6)


def test_three_policies_weigh_the_clipped_surrogate():
    # proximal / behavior = 2 and 1/2; ratio to the proximal one 2 and 1.
    logprobs, proximal = pair(LOG2, 0.0)
    behavior = proximal - jnp.array([[LOG2, -LOG2]])
    bounds = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2}
    loss = losses.decoupled_surrogate(
        logprobs, proximal, behavior, jnp.array([[1.0, -1.0]]), **bounds
    )
    np.testing.assert_allclose(loss, [[2 * -1.2, 0.5 * 1.0]], rtol=1e-6)


def test_dppo_leaves_out_what_has_moved_too_far_the_way_it_is_pushed():
    # Probabilities .3 and .6, before .2 and .8, bounds .05: both went too far when
    # pushed that way, neither when pushed back.
    logprobs, old = jnp.log(jnp.array([[0.3, 0.6]])), jnp.log(jnp.array([[0.2, 0.8]]))
    bounds = {"clip_ratio_low": 0.05, "clip_ratio_high": 0.05}
    for advantages, expected in [([1.0, -1.0], False), ([-1.0, 1.0], True)]:
        inside = losses.inside_tv(logprobs, old, jnp.array([advantages]), **bounds)
        np.testing.assert_array_equal(inside, [[expected, expected]])
    loss = losses.dppo(
        logprobs, old, jnp.ones((1, 2)), jnp.array([[True, False]]), clip_ratio_c=1.2
    )
    np.testing.assert_allclose(loss, [[-1.2 * np.log(0.3), 0.0]], rtol=1e-6)


def test_the_binary_kl_by_hand():
    # old .5, new .9: .5 log(.5 / .9) + .5 log(.5 / .1) = 0.5108
    logprobs, old = jnp.log(jnp.array([[0.9]])), jnp.log(jnp.array([[0.5]]))
    for bound, expected in [(0.510, False), (0.512, True)]:
        inside = losses.inside_kl(
            logprobs, old, jnp.ones((1, 1)), clip_ratio_low=0.0, clip_ratio_high=bound
        )
        assert inside == expected


IDS = jnp.array([[0, 0, 1, 1, 1, 1]])
MASK = jnp.array([[True, True, False, True, True, True]])


def test_gspo_gives_every_token_the_ratio_of_its_sequence_and_its_own_gradient():
    # Means of the log-ratios: (.2 + .4) / 2 and (.1 + .1 - .5) / 3.
    logprobs, old = pair(0.2, 0.4, 9.0, 0.1, 0.1, -0.5)
    ratio, pullback = jax.vjp(
        lambda x: losses.sequence_log_ratio(x, old, MASK, IDS, 2), logprobs
    )
    expected = [[0.3, 0.3, 0.0, -0.1, -0.1, -0.1]]
    np.testing.assert_allclose(ratio, expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(pullback(MASK.astype(jnp.float32))[0], MASK)


def test_gmpo_by_hand():
    # Sequence 0, advantage 1: log-ratios .2 and .4, the second clipped to .3.
    # Sequence 1, advantage -1: .1, .1, -.5; the last clipped to -.2. The maximum of
    # -log_ratio and -clipped is worse: mean (.1 + .1 - .2) / 3 = 0.
    logprobs, old = pair(0.2, 0.4, 9.0, 0.1, 0.1, -0.5)
    advantages = jnp.array([[1.0, 1.0, 0.0, -1.0, -1.0, -1.0]])
    loss = losses.gmpo(
        logprobs, old, advantages, MASK, IDS, 2, clip_ratio_low=0.2, clip_ratio_high=0.3
    )
    first = -np.exp(0.25)
    np.testing.assert_allclose(loss, [[first, first, 0, 1, 1, 1]], rtol=1e-6)


def test_sapo_by_hand():
    # Ratio 2. tau 2: 4 / 2 * sigmoid(2) = 1.7615942; tau 1: 4 * sigmoid(1) = 2.924234
    loss = losses.sapo(
        *pair(LOG2, LOG2), jnp.array([[1.0, -1.0]]), tau_pos=2.0, tau_neg=1.0
    )
    np.testing.assert_allclose(loss, [[-1.7615942, 2.924234]], rtol=1e-6)


def test_cispo_clips_the_weight_but_not_the_gradient():
    def loss(logprobs):
        return losses.cispo(
            logprobs, old, jnp.ones((1, 2)), clip_ratio_low=0.2, clip_ratio_high=0.3
        )

    logprobs, old = pair(LOG2, -LOG2)
    value, pullback = jax.vjp(loss, logprobs)
    np.testing.assert_allclose(value, -jnp.array([[1.3, 0.8]]) * logprobs, rtol=1e-6)
    np.testing.assert_allclose(pullback(jnp.ones((1, 2)))[0], [[-1.3, -0.8]], rtol=1e-6)


def test_dro_by_hand():
    # -(2 * -0.7) + 0.5 / 2 * 0.3^2
    loss = losses.dro(*pair(0.3), jnp.full((1, 1), 2.0), beta=0.5)
    np.testing.assert_allclose(loss, [[1.4 + 0.0225]], rtol=1e-6)


def test_reinforce_by_hand():
    loss = losses.reinforce(jnp.array([[-0.5, -2.0]]), jnp.array([[1.0, -3.0]]))
    np.testing.assert_array_equal(loss, [[0.5, -6.0]])


def test_the_covariance_losses_treat_chosen_tokens_differently():
    logprobs, old = pair(LOG2, LOG2)
    advantages, chosen = jnp.full((1, 2), -1.0), jnp.array([[True, False]])
    bounds = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2}
    clip = losses.clip_cov(logprobs, old, advantages, chosen, **bounds)
    np.testing.assert_allclose(clip, [[0.0, 2.0]], rtol=1e-6)
    kl = losses.kl_cov(logprobs, old, advantages, chosen, ppo_kl_coef=0.1)
    np.testing.assert_allclose(kl, [[2.0 + 0.1 * LOG2, 2.0]], rtol=1e-6)


def test_value_loss_by_hand():
    # Old 0, bound .5, returns 1: a value of .4 misses by .6; one of 2 by 1 (clipped:
    # only .5); one of -1 counts as -1, which is worse than -.5.
    known = (jnp.zeros((1, 3)), jnp.ones((1, 3)))
    values = jnp.array([[0.4, 2.0, -1.0]])
    loss = losses.value_loss(values, *known, cliprange_value=0.5)
    np.testing.assert_allclose(loss, [[0.18, 0.5, 2.0]], rtol=1e-6)
    # Past the bound towards the return, the clipped value decides: no gradient.
    one = (jnp.full((1, 1), 0.9), jnp.zeros((1, 1)), jnp.ones((1, 1)))
    assert losses.is_value_clipped(*one, cliprange_value=0.5)
    grad = jax.grad(lambda v: losses.value_loss(v, *one[1:], cliprange_value=0.5).sum())
    assert grad(one[0]) == 0
