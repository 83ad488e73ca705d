import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.algorithms import advantages

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


def test_rloo_leaves_one_out():
    # 1 - (2 + 6) / 2 and so on.
    got = advantages.rloo(jnp.array([[1.0, 2.0, 6.0]]))
    np.testing.assert_allclose(got, [[-3.0, -1.5, 4.5]], rtol=1e-6)


def test_opo_weighs_by_length():
    # Baseline (1 * 1 + 3 * 5) / 4 = 4.
    got = advantages.opo(jnp.array([[1.0, 5.0]]), jnp.array([[1, 3]]))
    np.testing.assert_allclose(got, [[-3.0, 1.0]])


def test_gpg_scales_up_for_rewards_of_zero():
    # 4 responses, 1 with a reward.
    got = advantages.gpg(jnp.array([[1.0, 0.0], [0.0, 0.0]]))
    np.testing.assert_allclose(got, [[2.0, -2.0], [0.0, 0.0]])


def test_passk_rewards_only_the_best_by_its_lead():
    got = advantages.grpo_passk(
        jnp.array([[1.0, 4.0, 2.0], [3.0, 3.0, 1.0]]), normalize_by_std=False
    )
    np.testing.assert_array_equal(got, [[0.0, 2.0, 0.0], [0.0, 0.0, 0.0]])


def test_passk_needs_a_second_best():
    with pytest.raises(ValueError, match="at least 2 responses per prompt, got 1"):
        advantages.grpo_passk(jnp.ones((3, 1)), normalize_by_std=True)


def test_gdpo_compares_only_what_a_function_judges():
    # 2 and 3 differ from their mean by the same; of 4 tokens, one for each response,
    # the variance is 2 a^2 / 3.
    rewards = np.array([[[2.0, np.nan, 3.0, np.nan]]], np.float32)
    weights, lengths = jnp.ones(1), jnp.ones((1, 4), int)
    expected = np.sqrt(1.5) * np.array([[-1.0, 0.0, 1.0, 0.0]])
    filled, judged = jnp.array(np.nan_to_num(rewards)), jnp.array(~np.isnan(rewards))
    for normalize in (True, False):
        how = {"normalize_by_std": normalize}
        got = advantages.gdpo(filled, weights, lengths, judged, **how)
        np.testing.assert_allclose(got, expected, atol=1e-5)
        with jax.debug_nans(False):  # which stand for None here
            same = advantages.gdpo(jnp.array(rewards), weights, lengths, **how)
        np.testing.assert_array_equal(same, got)


def test_gdpo_does_not_let_a_large_reward_drown_a_small_one():
    # Summed, 100 - 1 and 0 + 1; each on its own, the two cancel.
    rewards = jnp.array([[[100.0, 0.0]], [[-1.0, 1.0]]])
    got = advantages.gdpo(
        rewards, jnp.array([1.0, 1.0]), jnp.array([[5, 7]]), normalize_by_std=True
    )
    np.testing.assert_allclose(got, [[0.0, 0.0]], atol=1e-2)


GROUP = {
    "rloo": advantages.rloo,
    "opo": lambda r: advantages.opo(r, jnp.full(r.shape, 3)),
    "gpg": advantages.gpg,
    "reinforce_plus_plus_baseline": lambda r: advantages.reinforce_plus_plus_baseline(
        r, jnp.full(r.shape, 3)
    ),
    "gdpo": lambda r: advantages.gdpo(
        r[None], jnp.ones(1), jnp.full(r.shape, 3), normalize_by_std=True
    ),
}


@pytest.mark.parametrize("name", GROUP)
@pytest.mark.parametrize("rewards", [[[0.1] * 7], [[0.1], [0.1], [-3.0]]])
def test_no_difference_and_no_group_give_exactly_zero(name, rewards):
    # veRL trains on the raw reward of a group of one.
    got = GROUP[name](jnp.array(rewards))
    np.testing.assert_array_equal(got, np.zeros_like(rewards))


# Two responses of three sampled tokens after a prompt of one; an observation (mask
# False) within the first. One per row, and both in one row in the other order.
APART = {
    "mask": [[0, 1, 1, 0, 1], [0, 1, 1, 1, 0]],
    "ids": [[0, 0, 0, 0, 0], [1, 1, 1, 1, -1]],
    "positions": [[0, 1, 2, 3, 4], [0, 1, 2, 3, 0]],
    "prompt": [[1, 0, 0, 0, 0], [1, 0, 0, 0, 0]],
    "rewards": [[0, 0.5, 0, 7, 1], [0, 0, 0, 2, 0]],
    "values": [[0, 0.1, 0.2, 9, 0.3], [0, 0.4, 0.5, 0.6, 0]],
    "logprobs": [[0, -1, -2, 0, -0.5], [0, -0.3, -1, -2, 0]],
    "pi": [[0, 0.3, 0.4, 0, 0.6], [0, 0.7, 0.5, 0.2, 0]],
}
DTYPES = {"mask": bool, "prompt": bool, "ids": np.int32, "positions": np.int32}
ORDER = [5, 6, 7, 8, 0, 1, 2, 3, 4]  # of the flattened arrays


def arrange(packed):
    def one(name, x):
        x = np.array(x, DTYPES.get(name, np.float32))
        return jnp.asarray(x.ravel()[ORDER][None] if packed else x)

    return {name: one(name, x) for name, x in APART.items()}


def tokens(x, packed):
    """Of the sampled tokens, sequence by sequence."""
    x = np.asarray(x)
    return (
        x[0, [5, 6, 8, 1, 2, 3]]
        if packed
        else x[[0, 0, 0, 1, 1, 1], [1, 2, 4, 1, 2, 3]]
    )


both_layouts = pytest.mark.parametrize("packed", [False, True])


@both_layouts
def test_discounted_returns_skip_observations(packed):
    a = arrange(packed)
    got = advantages.discounted_returns(a["rewards"], a["mask"], a["ids"], gamma=0.5)
    # 0.5 + 0.5 * (0 + 0.5 * 1); the reward of 7 on an observation does not count.
    expected = [0.75, 0.5, 1.0, 0.5, 1.0, 2.0]
    np.testing.assert_allclose(tokens(got, packed), expected)
    assert not np.any(np.where(a["mask"], 0, got))


@both_layouts
def test_gae_is_a_loop_over_sampled_tokens(packed):
    a = arrange(packed)
    _, returns = advantages.gae(
        a["rewards"], a["values"], a["mask"], a["ids"], gamma=0.9, lam=0.8
    )
    for s, row in enumerate([[1, 2, 4], [1, 2, 3]]):
        value, advantage = 0.0, 0.0
        for i, t in reversed(list(enumerate(row))):
            here = APART["values"][s][t]
            delta = APART["rewards"][s][t] + 0.9 * value - here
            value, advantage = here, delta + 0.9 * 0.8 * advantage
            got = tokens(returns, packed)[3 * s + i]
            np.testing.assert_allclose(got, advantage + here, rtol=1e-5)


@both_layouts
def test_remax_subtracts_the_greedy_reward(packed):
    a = arrange(packed)
    got = advantages.remax(a["rewards"], jnp.array([1.0, 2.0]), a["mask"], a["ids"])
    np.testing.assert_allclose(tokens(got, packed), [0.5, 0.0, 0.0, 0.0, 0.0, 0.0])


@both_layouts
def test_a_reward_goes_to_the_last_sampled_token(packed):
    a = arrange(packed)
    got = advantages.at_last_token(
        jnp.array([3.0, 4.0]), a["mask"], a["ids"], a["positions"]
    )
    np.testing.assert_array_equal(tokens(got, packed), [0, 0, 3, 0, 0, 4])


@both_layouts
def test_the_optimal_token_baseline_by_hand(packed):
    a = arrange(packed)
    rows = (a["rewards"], a["logprobs"], a["pi"], a["mask"], a["ids"])
    got = advantages.tir_optimal_token_baseline(*rows, jnp.array([0, 0]))
    w = [
        np.cumsum([1 - 2 * np.exp(logprobs[t]) + pi[t] for t in row])
        for logprobs, pi, row in zip(
            APART["logprobs"], APART["pi"], [[1, 2, 4], [1, 2, 3]], strict=True
        )
    ]
    returns = np.array([[1.5, 1.0, 1.0], [2.0, 2.0, 2.0]])
    baseline = (returns * w).sum(axis=0) / np.sum(w, axis=0)
    np.testing.assert_allclose(
        tokens(got, packed), (returns - baseline).ravel(), rtol=1e-5, atol=1e-6
    )
    # Counted with observations, the first response has steps 0, 1, 3, and the last of
    # the second (step 2) and of the first (step 3) are compared with nobody.
    behind = a["positions"], a["prompt"]
    got = advantages.optimal_token_baseline(*rows, *behind, jnp.array([0, 0]))
    expected = (returns - baseline) * [1, 1, 0]
    np.testing.assert_allclose(
        tokens(got, packed), expected.ravel(), rtol=1e-5, atol=1e-6
    )


def test_pf_ppo_prefers_what_was_judged_clearly():
    rewards = jnp.array([-2.0, 0.0, 1.0, 3.0])
    for method, expected in [
        ("pow", [4, 0, 1, 9]),
        ("max_min", [1, 0, 0, 1]),
        ("max_random", [0.1, 0.1, 0.1, 0.4]),
    ]:
        weights = advantages.pf_ppo_weights(rewards, method)
        np.testing.assert_allclose(weights, expected, atol=1e-6)


def test_pf_ppo_never_draws_what_is_not_learned_from():
    rewards = jnp.array([-2.0, 0.0, 1.0, 3.0])
    for method, expected in [
        ("pow", [0, 1e-8, 1, 0]),
        ("max_min", [0, 1, 1, 0]),
        ("max_random", [0, 0.1, 0.4, 0]),
    ]:
        how = {"counted": jnp.array([False, True, True, False])}
        weights = advantages.pf_ppo_weights(rewards, method, **how)
        np.testing.assert_allclose(weights, expected, rtol=1e-5)
        drawn = advantages.resample(jax.random.key(0), jnp.tile(weights, 250)) % 4
        assert not np.isin(drawn, [0, 3]).any()
        none = advantages.pf_ppo_weights(rewards, method, counted=jnp.zeros(4, bool))
        assert len(set(none.tolist())) == 1 and none[0] > 0


def test_resampling_draws_in_proportion():
    weights = jnp.tile(jnp.array([1.0, 3.0, 0.0, 0.0]) + 1e-8, 250)
    drawn = np.asarray(advantages.resample(jax.random.key(0), weights)) % 4
    share = np.bincount(drawn, minlength=4) / 1000
    np.testing.assert_allclose(share, [0.25, 0.75, 0.0, 0.0], atol=0.03)


@both_layouts
def test_steps_of_the_optimal_token_baseline_begin_behind_the_prompt(packed):
    """Even if the policy reads before it writes: veRL's columns of a response."""
    mask = np.array([[0, 0, 1, 1], [0, 1, 1, 1]], bool)
    is_prompt = np.array([[1, 0, 0, 0], [1, 0, 0, 0]], bool)
    rewards = np.array([[0, 0, 0, 2], [0, 0, 0, 1]], np.float32)
    logprobs = np.array([[0, 0, -1, -2], [0, -0.3, -1, -2]], np.float32)
    pi = np.array([[0, 0, 0.3, 0.4], [0, 0.7, 0.5, 0.2]], np.float32)
    ids, positions = np.repeat([[0], [1]], 4, axis=1), np.tile(np.arange(4), (2, 1))
    arrays = (rewards, logprobs, pi, mask, ids, positions, is_prompt)
    if packed:
        arrays = tuple(x[::-1].reshape(1, -1) for x in arrays)
    got = advantages.optimal_token_baseline(
        *map(jnp.asarray, arrays), jnp.zeros(2, int)
    )
    if packed:
        got = got.reshape(2, 4)[::-1]
    returns = np.array([[2, 2, 2], [1, 1, 1]])
    w = np.cumsum(((1 - 2 * np.exp(logprobs) + pi) * mask)[:, 1:], axis=1)
    behind = mask[:, 1:]
    baseline = (returns * w * behind).sum(axis=0) / (w * behind).sum(axis=0)
    expected = (returns - baseline) * behind
    # The second response has sampled more; its third token is compared with nobody.
    expected[1, 2] = 1
    np.testing.assert_allclose(got[:, 1:], expected, rtol=1e-5, atol=1e-6)


def test_turns_are_compared_with_the_same_turn_of_others():
    rewards = jnp.array(
        [[[1, 0, 4], [3, 2, 0], [0, 0, 0]], [[5, 0, 0]] * 3], jnp.float32
    )
    counts = jnp.array([[3, 2, 2], [1, 1, 1]])
    # To go: 1 + 0.5 * (0 + 0.5 * 4), 3 + 0.5 * 2, 0; then 2, 2, 0; then 4 alone.
    expected = np.zeros((2, 3, 3))
    expected[0, :, 0] = np.array([2, 4, 0]) - 2
    expected[0, :, 1] = np.array([2, 2, 0]) - 4 / 3
    got = advantages.turn_grpo(rewards, counts, gamma=0.5, normalize_by_std=False)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    expected[0, :, 0] /= np.std([2, 4, 0], ddof=1)
    expected[0, :, 1] /= np.std([2, 2, 0], ddof=1)
    got = advantages.turn_grpo(rewards, counts, gamma=0.5, normalize_by_std=True)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert not got[1].any()  # all equal: exactly 0
    once = jnp.array([[1.0, 2, 4], [0, 0, 1]])
    np.testing.assert_allclose(
        advantages.turn_grpo(
            once[..., None],
            jnp.ones((2, 3), jnp.int32),
            gamma=0.5,
            normalize_by_std=True,
        )[..., 0],
        advantages.grpo(once, normalize_by_std=True),
        rtol=1e-6,
    )


def test_turns_are_told_apart_by_what_was_read_between():
    # A prompt, two responses that share it, padding; the second begins with a tool.
    ids = jnp.array([[0, 0, 0, 0, 0, 0, 1, 1, 1, -1]])
    mask = jnp.array([[0, 1, 1, 0, 1, 1, 0, 1, 1, 0]], bool)
    found = advantages.turns(mask, ids)
    np.testing.assert_array_equal(found[mask], [0, 0, 1, 1, 0, 0])
    neighbours = jnp.array([[0, 0, 1, 1, -1, -1]])
    both = jnp.array([[1, 1, 1, 1, 0, 0]], bool)
    assert not advantages.turns(both, neighbours).any()
    rewards = jnp.array([[1.0, 2.0], [3.0, 0.0]])
    np.testing.assert_array_equal(
        advantages.at_turn_ends(rewards, mask, ids), [[0, 0, 1, 0, 0, 2, 0, 0, 3, 0]]
    )
    np.testing.assert_array_equal(
        advantages.at_turn_ends(rewards, both, neighbours), [[0, 1, 0, 3, 0, 0]]
    )
