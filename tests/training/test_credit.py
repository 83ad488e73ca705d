"""Which estimator a configuration gets, from rewards to rows."""

import dataclasses
import inspect
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixed_rollouts import EIGHT, make_config, make_rollouts
from observations import anew

from jaxrl_llm import models
from jaxrl_llm.algorithms import advantages, masked
from jaxrl_llm.config import plugins
from jaxrl_llm.config.algorithm import ESTIMATORS
from jaxrl_llm.config.schema import Config
from jaxrl_llm.config.schema_algorithm import AlgorithmConfig
from jaxrl_llm.data import packing
from jaxrl_llm.data.packing import Layout
from jaxrl_llm.sharding import mesh
from jaxrl_llm.training import credit as estimate
from jaxrl_llm.training import playing
from jaxrl_llm.training.roles import actor_of

PROMPTS, EPISODES = make_rollouts()
LENGTHS = np.array([[5, 2], [7, 3], [1, 8], [4, 4]])
REWARDS = np.array([[1, 0], [0.5, 2], [0, 0], [1, 3]], np.float32)


def made(path, pack_length=None, old=None, ref=None, kl_coef=None, **algorithm):
    """(rows, mean advantage of each response)."""
    config = make_config(path, pack_length=pack_length)
    on = mesh.make(
        dict(zip(("data", "fsdp", "tensor"), EIGHT, strict=True)), jax.devices()
    )
    learner = actor_of(config, models.open(path), on)
    rows = learner.make_rows(PROMPTS, EPISODES, np.zeros_like(REWARDS))
    if kl_coef is not None:
        filled = [np.where(rows.response_mask, np.float32(x), 0.0) for x in (old, ref)]
        rows = dataclasses.replace(rows, old_logprobs=filled[0], ref_logprobs=filled[1])
    judged = estimate.Judged(
        rewards=REWARDS,
        by_function=REWARDS[None],
        weights=np.ones(1, np.float32),
        baselines=np.array([1, 2, 3, 4], np.float32),
        kl_coef=kl_coef,
    )
    rows, found = jax.device_get(
        estimate.advantages_of(rows, judged, algorithm=AlgorithmConfig(**algorithm))
    )
    means = masked.sequence_means(
        *map(jnp.asarray, (rows.advantages, rows.response_mask, rows.sequence_ids)),
        rows.num_sequences,
    )
    return rows, np.asarray(means).reshape(REWARDS.shape), found


def centred():
    return REWARDS - REWARDS.mean(axis=1, keepdims=True)


def whitened(x):
    """Each token counting once."""
    copies = np.repeat(x.ravel(), LENGTHS.ravel())
    return (x - copies.mean()) / copies.std(ddof=1)


def normalized():
    return centred() / (REWARDS.std(axis=1, ddof=1, keepdims=True) + 1e-6)


EXPECTED = {
    "grpo": normalized,
    "grpo_passk": lambda: np.where(centred() > 0, 2 * normalized(), 0),
    "gdpo": lambda: whitened(normalized()),
    "rloo": lambda: 2 * centred(),
    "opo": lambda: (
        REWARDS
        - (REWARDS * LENGTHS).sum(axis=1, keepdims=True)
        / LENGTHS.sum(axis=1, keepdims=True)
    ),
    "gpg": lambda: centred() * 8 / 5,
    "remax": lambda: REWARDS - np.array([[1], [2], [3], [4]]),
    "reinforce_plus_plus": lambda: whitened(REWARDS),
    "reinforce_plus_plus_baseline": lambda: whitened(centred()),
}


@pytest.mark.parametrize("estimator", EXPECTED)
def test_every_estimator_by_name(tiny_model, estimator):
    rows, means, _ = made(tiny_model, adv_estimator=estimator)
    np.testing.assert_allclose(means, EXPECTED[estimator](), rtol=1e-5, atol=1e-6)
    assert rows.advantages.shape == rows.tokens.shape
    for s, expected in enumerate(means.ravel()):
        where = (rows.sequence_ids == s) & rows.response_mask
        assert where.sum() == LENGTHS.ravel()[s]
        np.testing.assert_allclose(
            rows.advantages[where], expected, rtol=1e-5, atol=1e-6
        )
    assert not rows.advantages[~rows.response_mask].any()


@pytest.mark.parametrize("pack_length", [None, 40])
def test_reinforce_plus_plus_discounts_per_token(tiny_model, pack_length):
    rows, means, _ = made(
        tiny_model, pack_length, adv_estimator="reinforce_plus_plus", gamma=0.5
    )
    returns = [
        reward * 0.5 ** np.arange(length)[::-1]
        for reward, length in zip(REWARDS.ravel(), LENGTHS.ravel(), strict=True)
    ]
    every = np.concatenate(returns)
    for s, expected in enumerate(returns):
        expected = (expected - every.mean()) / every.std(ddof=1)
        where = (rows.sequence_ids == s) & rows.response_mask
        np.testing.assert_allclose(rows.advantages[where], expected, rtol=1e-4)
        np.testing.assert_allclose(means.ravel()[s], expected.mean(), rtol=1e-4)


@pytest.mark.parametrize("estimator", ["grpo", "rloo", "reinforce_plus_plus"])
def test_kl_in_the_reward_is_taken_off_every_token(tiny_model, estimator):
    # log-probability - reference is 1 nat at each token.
    rows, means, found = made(
        tiny_model,
        old=-1.0,
        ref=-2.0,
        kl_coef=np.float32(0.1),
        adv_estimator=estimator,
        use_kl_in_reward=True,
    )
    assert found["actor/reward_kl_penalty"] == pytest.approx(1.0)
    totals = REWARDS - 0.1 * LENGTHS
    centred = totals - totals.mean(axis=1, keepdims=True)
    if estimator == "rloo":
        expected = 2 * centred
    elif estimator == "grpo":
        expected = centred / (totals.std(axis=1, ddof=1, keepdims=True) + 1e-6)
    else:  # what is still to come, from each token on
        togo = [
            reward - 0.1 * np.arange(length, 0, -1)
            for reward, length in zip(REWARDS.ravel(), LENGTHS.ravel(), strict=True)
        ]
        every = np.concatenate(togo)
        scaled = [(x - every.mean()).mean() / every.std(ddof=1) for x in togo]
        expected = np.reshape(scaled, REWARDS.shape)
    np.testing.assert_allclose(means, expected, rtol=1e-4, atol=1e-5)


def test_an_estimator_of_ones_own_gives_one_advantage_for_each_response(tiny_model):
    def halves(rewards, lengths, baselines, normalize_by_std, *, share):
        assert normalize_by_std
        return rewards - share * baselines[:, None] + 0 * lengths

    rows, means, _ = made(
        tiny_model, adv_estimator=plugins.offer(halves), adv_params={"share": 0.5}
    )
    np.testing.assert_allclose(means, REWARDS - 0.5 * np.array([[1], [2], [3], [4]]))
    assert not rows.advantages[~rows.response_mask].any()


def test_an_estimator_of_ones_own_may_judge_tokens(tiny_model):
    def togo(token_rewards, mask, sequence_ids, gamma):
        found = advantages.discounted_returns(
            token_rewards, mask, sequence_ids, gamma=gamma
        )
        return found + 1.0  # what it says of other tokens does not matter

    rows, _, _ = made(tiny_model, 40, adv_estimator=plugins.offer(togo), gamma=0.5)
    for s, (reward, length) in enumerate(
        zip(REWARDS.ravel(), LENGTHS.ravel(), strict=True)
    ):
        where = (rows.sequence_ids == s) & rows.response_mask
        wanted = 1 + reward * 0.5 ** np.arange(length)[::-1]
        np.testing.assert_allclose(rows.advantages[where], wanted)
    assert not rows.advantages[~rows.response_mask].any()


@pytest.mark.parametrize(
    "estimator, said",
    [
        (lambda rewards: rewards.mean(), r"use \(4, 2\), one advantage for each resp"),
        (lambda values: values, "takes values, so it returns .advantages, returns."),
    ],
)
def test_an_estimator_that_returns_something_else_is_refused(
    tiny_model, estimator, said
):
    with pytest.raises(ValueError, match=said):
        made(tiny_model, adv_estimator=plugins.offer(estimator))


PACKED = Layout(pack_length=20, contexts=9)
SHARED = Layout(pack_length=40, share_prompts=True)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_is_the_same_in_any_layout(estimator):
    """Of episodes with observations, which get no advantage."""
    rng = np.random.default_rng(0)
    rows = packing.make_rows(PROMPTS, EPISODES, np.zeros_like(REWARDS))

    def drawn():
        return np.where(rows.response_mask, rng.uniform(0.1, 0.9, rows.tokens.shape), 0)

    names = ("old_logprobs", "values", "returns")  # what the estimators look at
    rows = dataclasses.replace(
        rows, **{name: drawn().astype(np.float32) for name in names}
    )
    rows = dataclasses.replace(rows, old_logprobs=-rows.old_logprobs)
    of_turns, counts = playing.turn_rewards(EPISODES, REWARDS, 6)
    assert counts.min() == 1 and counts.max() > 2
    np.testing.assert_array_equal(of_turns.sum(axis=2), REWARDS)
    there = np.arange(6) < counts[..., None]
    of_turns[there] = rng.normal(size=there.sum())

    def credited(layout):
        there = packing.take(rows, range(rows.num_sequences), layout=layout)
        judged = estimate.Judged(
            rewards=REWARDS,
            by_function=REWARDS[None],
            weights=np.ones(1, np.float32),
            baselines=np.array([1, 2, 3, 4], np.float32),
            values=there.values,
            sum_pi_squared=there.returns,
            turn_rewards=of_turns,
            num_turns=counts,
        )
        algorithm = AlgorithmConfig(adv_estimator=estimator, gamma=0.9, lam=0.8)
        found, _ = jax.device_get(
            estimate.advantages_of(there, judged, algorithm=algorithm)
        )
        back = packing.take(found, range(rows.num_sequences))
        assert not back.advantages[~rows.response_mask].any()
        return back

    wanted = credited(Layout())
    for got, other in zip(
        *map(jax.tree.leaves, (credited(SHARED), wanted)), strict=True
    ):
        np.testing.assert_allclose(got, other, rtol=1e-5, atol=1e-6)
    # An episode may go on in new contexts: it is one, and its credit is the same.
    forked = packing.make_rows(
        PROMPTS,
        [[anew(e) for e in group] for group in EPISODES],
        np.zeros_like(REWARDS),
        layout=Layout(contexts=9),
    )
    assert forked.contexts.max() > 1 and (forked.positions != rows.positions).any()
    names = "contexts", "positions"
    rows = dataclasses.replace(rows, **{name: getattr(forked, name) for name in names})
    got = credited(PACKED)
    for name in ("advantages", "values", "returns"):
        pair = getattr(got, name), getattr(wanted, name)
        np.testing.assert_allclose(*pair, rtol=1e-5, atol=1e-6)


def test_what_was_cut_off_counts_in_no_loss():
    episodes = [list(group) for group in EPISODES]
    cut = [(0, 1), (2, 0), (2, 1)]
    for p, group in enumerate(episodes):
        for g, episode in enumerate(group):
            reason = "length" if (p, g) in cut else "stop"
            turns = [
                dataclasses.replace(t, finish_reason=reason) for t in episode.turns
            ]
            group[g] = dataclasses.replace(episode, turns=tuple(turns))
    worth = np.arange(1.0, 9.0, dtype=np.float32).reshape(4, 2)
    layout = Layout(pack_length=32, rows_multiple=4)
    rows = packing.make_rows(PROMPTS, episodes, worth, layout=layout)
    found, share = estimate.without_truncated(rows, episodes)
    assert share == 3 / 8
    sequences = [2 * p + g for p, g in cut]
    is_cut = np.isin(rows.sequence_ids, sequences)
    np.testing.assert_array_equal(found.response_mask, rows.response_mask & ~is_cut)
    assert not found.response_mask[found.sequence_ids < 0].any()
    assert (found.advantages[is_cut] == 0).all()
    kept = estimate.per_response(found, (4, 2))
    expected = np.where(np.isin(np.arange(8).reshape(4, 2), sequences), 0, worth)
    np.testing.assert_array_equal(kept, expected)
    # A mean over tokens is then one over those of the others.
    per_token = jnp.asarray(np.random.default_rng(0).normal(size=rows.tokens.shape))
    mean = masked.token_mean(per_token, jnp.asarray(found.response_mask))
    others = np.asarray(per_token)[rows.response_mask & ~is_cut]
    np.testing.assert_allclose(mean, others.mean(), rtol=1e-5)


def test_pf_ppo_draws_no_masked_response():
    rows = packing.make_rows(PROMPTS, EPISODES, np.zeros_like(REWARDS))
    kept = estimate.without(rows, [s not in (1, 4) for s in range(8)])
    config = make_config("unused").model_dump()
    config["algorithm"] |= {"adv_estimator": "gae", "pf_ppo": {"weight_pow": 1e-9}}
    job = SimpleNamespace(
        config=Config.model_validate(config), actor=SimpleNamespace(take=packing.take)
    )
    draw_again = inspect.unwrap(estimate.draw_again)  # the job is no whole one
    drawn = {
        tuple(again.tokens[again.sequence_ids == s])
        for step in range(8)
        for again in [draw_again(job, kept, REWARDS, step)]
        for s in range(again.num_sequences)
    }
    assert drawn == {tuple(rows.tokens[rows.sequence_ids == s]) for s in (1, 4)}


def among_others(lengths):
    """Advantages of rewards 1, 0 and 1 that are a whole group, by estimator."""
    rewards = np.array([1.0, 0, 1])
    each = rewards - rewards.mean()
    std = rewards.std(ddof=1)
    tokens = np.repeat(each, lengths)
    white = (each - tokens.mean()) / tokens.std(ddof=1)
    return {
        "grpo": each / std,
        "grpo_passk": 0 * each,
        "turn_grpo": each / std,
        "gdpo": white,
        "reinforce_plus_plus_baseline": white,
        "rloo": 1.5 * each,
        "opo": rewards - (rewards * lengths).sum() / lengths.sum(),
        "gpg": 1.5 * each,
        "remax": rewards - 0.5,
    }


@pytest.mark.parametrize("estimator", among_others(np.array([5, 2, 7])))
def test_what_is_masked_is_none_of_its_group(estimator):
    """Of two groups of four; of the second, nobody has judged any."""
    rows = packing.make_rows(PROMPTS, EPISODES, np.zeros_like(REWARDS))
    lengths, by_turn = LENGTHS.reshape(2, 4), estimator == "turn_grpo"

    def credited(rewards, out):
        out = np.array([out, [True] * 4])
        given = np.where(out, np.float32(np.nan), np.array([rewards] * 2, np.float32))
        judged = estimate.Judged(
            rewards=np.nan_to_num(given),
            by_function=given[None],
            weights=np.ones(1, np.float32),
            baselines=np.full(2, 0.5, np.float32),
            turn_rewards=np.nan_to_num(given)[..., None] if by_turn else None,
            num_turns=np.where(out, 0, 1).astype(np.int32) if by_turn else None,
        )
        there = estimate.without(rows, out.ravel().tolist())
        algorithm = AlgorithmConfig(adv_estimator=estimator)
        found, _ = jax.device_get(
            estimate.advantages_of(there, judged, algorithm=algorithm)
        )
        found = estimate.per_response(found, (2, 4))
        assert not found[out].any()
        return found[0]

    left = [False, False, True, False]
    got = credited([1, 0, 9, 1], left)[[0, 1, 3]]
    wanted = among_others(lengths[0, [0, 1, 3]])[estimator]
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    if estimator != "remax":
        assert not credited([1, 1, 9, 1], left).any()
        assert not credited([1, 9, 9, 9], [False, True, True, True]).any()
    if estimator == "grpo_passk":
        got = credited([1, 0, 9, 9], [False, False, True, True])
        np.testing.assert_allclose(got, [2**0.5, 0, 0, 0], rtol=1e-5)
