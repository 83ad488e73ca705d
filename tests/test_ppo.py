"""GAE, the value loss and PPO's update, on arrays. Whole runs: test_critic.py."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl_llm import advantages, grpo, kl, logprobs, losses, masked, ppo
from jaxrl_llm.batch import Completion, Prompt, make_rows
from sharding import mesh

# Four sequences, one of which has an observation in its middle, and what veRL 0.9.1
# computes for them: compute_gae_advantage_return and compute_value_loss.
MASK = np.array(
    [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 1], [1, 0, 0, 0, 0]], bool
)
IDS = np.arange(4)[:, None] * np.ones((1, 5), int)
REWARDS = np.array(
    [[0, 0, 0, 1.0, 0], [0] * 5, [0, 0, 0, 0, 0.5], [2.0, 0, 0, 0, 0]], np.float32
)
VALUES = np.array(
    [
        [0.1, 0.2, 0.3, 0.4, 9.0],
        [0.5, 0.4, 0.3, 9.0, 9.0],
        [0.0, 0.1, 9.0, 0.2, 0.3],
        [1.5, 9.0, 9.0, 9.0, 9.0],
    ],
    np.float32,
)
VERL_ADVANTAGES = {
    (1.0, 1.0): [
        [1.2539041, 1.0419766, 0.8300492, 0.6181217],
        [-1.7130799, -1.5011526, -1.2892251],
        [0.4061942, 0.1942668, -0.0176606, -0.2295881],
        [0.4061942],
    ],
    (0.99, 0.95): [
        [1.120554, 0.9942415, 0.8623677, 0.7245806],
        [-1.7117916, -1.5265136, -1.3319436],
        [0.3666345, 0.1901964, 0.0050257, -0.1894301],
        [0.496078],
    ],
}
VERL_RETURNS = {
    (1.0, 1.0): [[1.0] * 4, [0.0] * 3, [0.5] * 4, [2.0]],
    (0.99, 0.95): [
        [0.8732905, 0.9180121, 0.9603, 1.0],
        [0.0337664, 0.01485, 0.0],
        [0.4433514, 0.4661365, 0.4851, 0.5],
        [2.0],
    ],
}
PREDICTIONS = np.array(
    [
        [0.7, -0.5, 0.4, 0.4, 9.0],
        [0.7, 1.3, 0.2, 9.0, 9.0],
        [0.3, 0.4, 9.0, -0.4, 0.4],
        [0.7, 9.0, 9.0, 9.0, 9.0],
    ],
    np.float32,
)
VERL_VALUE_LOSS = {
    "token-mean": (
        0.3295834,
        [
            [0.0, -0.125, -0.05, -0.05, 0.0],
            [0.0583333, 0.1083333, 0.0166667, 0.0, 0.0],
            [-0.0166667, -0.0083333, 0.0, -0.075, -0.0083333],
            [-0.1083333, 0.0, 0.0, 0.0, 0.0],
        ],
    ),
    "seq-mean-token-mean": (
        0.42875,
        [
            [0.0, -0.09375, -0.0375, -0.0375, 0.0],
            [0.0583333, 0.1083333, 0.0166667, 0.0, 0.0],
            [-0.0125, -0.00625, 0.0, -0.05625, -0.00625],
            [-0.325, 0.0, 0.0, 0.0, 0.0],
        ],
    ),
}


def gae(rewards, values, mask, ids, gamma, lam):
    found = advantages.gae(
        *map(jnp.asarray, (rewards, values, mask, ids)), gamma=gamma, lam=lam
    )
    return jax.device_get(found)


@pytest.mark.parametrize("gamma, lam", VERL_ADVANTAGES)
def test_gae_is_verl_s(gamma, lam):
    estimate, returns = gae(REWARDS, VALUES, MASK, IDS, gamma, lam)
    whitened = masked.whiten(jnp.asarray(estimate), jnp.asarray(MASK))
    for got, wanted in (
        (whitened, VERL_ADVANTAGES[gamma, lam]),
        (returns, VERL_RETURNS[gamma, lam]),
    ):
        np.testing.assert_allclose(got[MASK], np.concatenate(wanted), atol=1e-5)
        assert not np.asarray(got)[~MASK].any()


def test_gae_is_a_loop_over_the_tokens_of_each_sequence():
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 3, 12)).astype(np.float32)
    mask = rng.random((3, 12)) < 0.7
    ids = np.array([[0] * 5 + [1] * 7, [2] * 3 + [3] * 6 + [-1] * 3, [4] * 12])
    expected = np.zeros((3, 12))
    for s in range(5):
        later = (0.0, 0.0)
        for r, t in reversed(np.argwhere((ids == s) & mask)):
            delta = rewards[r, t] + 0.9 * later[0] - values[r, t]
            expected[r, t] = delta + 0.9 * 0.8 * later[1]
            later = values[r, t], expected[r, t]
    got, returns = gae(rewards, values, mask & (ids >= 0), ids, 0.9, 0.8)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        returns, np.where(mask & (ids >= 0), expected + values, 0), atol=1e-5
    )


def test_a_score_goes_to_the_last_token_that_was_sampled():
    mask = jnp.array([[0, 1, 1, 0, 0, 1, 0], [0, 1, 0, 1, 0, 0, 0]], bool)
    ids = jnp.array([[2, 2, 2, 2, 0, 0, -1], [1, 1, 1, 1, 1, 3, -1]])
    got = advantages.token_rewards(jnp.array([5.0, 6.0, 7.0, 8.0]), mask, ids)
    # Sequence 3 has sampled nothing.
    np.testing.assert_array_equal(got, [[0, 0, 7, 0, 0, 5, 0], [0, 0, 0, 6, 0, 0, 0]])


def test_whitening_by_hand():
    # Mean 2, unbiased variance 1.
    x = jnp.array([[1.0, 9.0, 2.0, 3.0]])
    mask = jnp.array([[True, False, True, True]])
    np.testing.assert_allclose(masked.whiten(x, mask), [[-1, 0, 0, 1]], atol=1e-6)


@pytest.mark.parametrize("mask", [[[False, False]], [[True, False]]])
def test_nothing_to_compare_with_whitens_to_zero(mask):
    # veRL raises an error here.
    got = masked.whiten(jnp.array([[3.0, 4.0]]), jnp.array(mask))
    np.testing.assert_array_equal(got, [[0.0, 0.0]])


def test_explained_variance_by_hand():
    # Targets 0 1 2: variance 2/3. Errors 0 0 1: variance 2/9.
    mask = jnp.array([[True, True, True, False]])
    targets = jnp.array([[0.0, 1.0, 2.0, 9.0]])
    for predictions, wanted in (
        ([[0.0, 1.0, 2.0, 0.0]], 1.0),
        ([[0.0, 1.0, 1.0, 0.0]], 2 / 3),
        ([[5.0, 5.0, 5.0, 0.0]], 0.0),
    ):
        got = masked.explained_variance(jnp.array(predictions), targets, mask)
        np.testing.assert_allclose(got, wanted, atol=2e-5)


@pytest.mark.parametrize(
    "value, old, target, loss, clipped, slope",
    [
        (0.3, 0.0, 1.0, 0.245, False, -0.7),  # within the range: (0.3 - 1)^2 / 2
        (0.8, 0.0, 1.0, 0.125, True, 0.0),  # moved too far towards it: 0.5 counts
        (-0.8, 0.0, 1.0, 1.62, False, -1.8),  # moved away: pulled back
        (0.8, 0.0, 0.2, 0.18, False, 0.6),  # moved past it
    ],
)
def test_the_value_loss_by_hand(value, old, target, loss, clipped, slope):
    def loss_of(value):
        return losses.clipped_value(
            value, jnp.full((1, 1), old), jnp.full((1, 1), target), cliprange_value=0.5
        )[0, 0]

    value = jnp.full((1, 1), value)
    np.testing.assert_allclose(loss_of(value), loss, rtol=1e-5)
    np.testing.assert_allclose(jax.grad(loss_of)(value)[0, 0], slope, atol=1e-6)
    got = losses.is_value_clipped(
        value, jnp.full((1, 1), old), jnp.full((1, 1), target), cliprange_value=0.5
    )
    assert bool(got[0, 0]) == clipped


@pytest.mark.parametrize("mode", VERL_VALUE_LOSS)
def test_the_value_loss_is_verl_s(mode):
    _, returns = gae(REWARDS, VALUES, MASK, IDS, 1.0, 1.0)
    mask, ids = jnp.asarray(MASK), jnp.asarray(IDS)
    weights = masked.weights(mode, mask, ids, 4)

    def loss(predictions):
        each = losses.clipped_value(
            predictions, jnp.asarray(VALUES), jnp.asarray(returns), cliprange_value=0.5
        )
        return masked.weighted_sum(each, weights)

    expected, slopes = VERL_VALUE_LOSS[mode]
    got, grad = jax.value_and_grad(loss)(jnp.asarray(PREDICTIONS))
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_allclose(grad, slopes, atol=1e-5)
    clipped = losses.is_value_clipped(
        jnp.asarray(PREDICTIONS),
        jnp.asarray(VALUES),
        jnp.asarray(returns),
        cliprange_value=0.5,
    )
    fraction = masked.token_mean(clipped.astype(jnp.float32), mask)
    np.testing.assert_allclose(fraction, 0.0833333, atol=1e-5)


def test_the_adaptive_coefficient_is_verl_s():
    # AdaptiveKLController(0.2, target_kl=6, horizon=10000), 256 sequences a step.
    coef = 0.2
    for measured, wanted in (
        (3.0, 0.198976),
        (6.0, 0.198976),
        (9.0, 0.199994757),
        (100.0, 0.20101873),
    ):
        coef = kl.adapt(coef, measured, target=6.0, horizon=1e4, count=256)
        np.testing.assert_allclose(coef, wanted, rtol=1e-6)


VOCAB, WIDTH = 7, 4
RNG = np.random.default_rng(0)
PROMPTS = [
    Prompt(
        id=p, content="", tokens=tuple(RNG.integers(0, VOCAB, n).tolist()), columns={}
    )
    for p, n in enumerate([3, 5, 2])
]
COMPLETIONS = [
    [
        Completion(
            prompt_id=p,
            sample=g,
            tokens=RNG.integers(0, VOCAB, n).astype(np.int32),
            logprobs=RNG.uniform(-3, -1, n).astype(np.float32),
            raw_logprobs=np.zeros(n, np.float32),
            finish_reason="stop",
            weight_version=0,
            text="",
        )
        for g, n in enumerate(lengths)
    ]
    for p, lengths in enumerate([(1, 4), (2, 6), (3, 1)])
]
SCORES = np.array([[1.0, -1.0], [0.3, -0.3], [-2.0, 2.0]], np.float32)
ADAM, SGD = optax.adam(0.03), optax.sgd(0.1)


def hidden(params, rows):
    """No attention, so packing is only a matter of positions."""
    return jnp.tanh(params["tokens"][rows.tokens] + params["positions"][rows.positions])


@jax.jit
def value_fn(params, rows):
    after = hidden(params, rows) @ params["output"][0]
    return logprobs.before(after, rows.positions, rows.response_mask)


@jax.jit
def logprob_fn(params, rows):
    return logprobs.of_tokens(
        hidden(params, rows),
        params["output"],
        rows.tokens,
        rows.positions,
        rows.response_mask,
        capacity=rows.response_capacity,
    )


def make_params(key):
    shapes = {"tokens": (VOCAB, WIDTH), "positions": (16, WIDTH)}
    keys = jax.random.split(jax.random.key(key), 3)
    return {
        name: jax.random.normal(k, shape)
        for k, (name, shape) in zip(
            keys, (shapes | {"output": (VOCAB, WIDTH)}).items(), strict=True
        )
    }


def make_state(optimizer, key=0):
    params = make_params(key)
    return grpo.TrainState(params, optimizer.init(params), jnp.int32(0))


def make_batch(order=(0, 1, 2), **how):
    """Credited with the values of other weights than those that are updated, so that
    some of the value loss is clipped."""
    batch = make_rows(
        [PROMPTS[p] for p in order],
        [COMPLETIONS[p] for p in order],
        np.zeros((3, 2), np.float32),
        **how,
    )
    return credited(jax.device_put(batch), make_params(1), SCORES[list(order)])


@jax.jit
def credited(batch, params, scores):
    rewards = advantages.token_rewards(
        scores.ravel(), batch.response_mask, batch.sequence_ids
    )
    return ppo.credit(batch, rewards, value_fn(params, batch), gamma=0.9, lam=0.8)


@functools.cache
def compiled(optimizer, settings):
    return jax.jit(
        functools.partial(
            ppo.update_critic,
            value_fn=value_fn,
            optimizer=optimizer,
            settings=settings,
        )
    )


def step(batch, **fields):
    return compiled(SGD, ppo.CriticSettings(**fields))(make_state(SGD), batch)


def assert_same(one, other, rtol=1e-6):
    for got, wanted in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=rtol, atol=rtol)


@functools.cache
def reference(mode):
    return step(make_batch(), loss_agg_mode=mode)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize(
    "micro_batch_size, how",
    [
        (1, {}),
        (4, {}),  # of 6 rows
        (None, {"pack_length": 11}),
        (None, {"order": (2, 0, 1)}),
        (3, {"order": (1, 2, 0), "pack_length": 12, "rows_multiple": 8}),
    ],
)
def test_micro_batches_packing_order_and_padding_change_nothing(
    mode, micro_batch_size, how
):
    batch = make_batch(**how)
    got = step(batch, loss_agg_mode=mode, micro_batch_size=micro_batch_size)
    assert_same(got, reference(mode))


@pytest.mark.parametrize("micro_batch_size", [None, 8])
def test_eight_devices_change_nothing(micro_batch_size):
    rows = NamedSharding(mesh.make({"data": 8}), P("data"))
    batch = jax.device_put(make_batch(rows_multiple=16), rows)
    got = step(batch, micro_batch_size=micro_batch_size)
    assert_same(got, reference("token-mean"))


def test_the_metrics_are_those_of_a_loop_over_tokens():
    batch = make_batch()
    _, metrics = step(batch)
    values = value_fn(make_params(0), batch)
    where = np.asarray(batch.response_mask)
    new, old, target = (
        np.asarray(x, np.float64)[where] for x in (values, batch.values, batch.returns)
    )
    bound = np.clip(new, old - 0.5, old + 0.5)
    expected = {
        "critic/vf_loss": np.mean(
            np.maximum((new - target) ** 2, (bound - target) ** 2) / 2
        ),
        "critic/vf_clipfrac": np.mean((bound - target) ** 2 > (new - target) ** 2),
        "critic/vpred_mean": np.mean(new),
        "critic/vf_explained_var": 1 - np.var(target - new) / np.var(target),
        "critic/update_skipped": 0.0,
    }
    assert 0 < expected["critic/vf_clipfrac"] < 1, "the case is worth nothing otherwise"
    assert expected.keys() | {"critic/grad_norm"} == metrics.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)


def test_advantages_are_whitened_over_the_whole_batch():
    batch = make_batch(pack_length=12)
    chosen = np.asarray(batch.advantages)[np.asarray(batch.response_mask)]
    np.testing.assert_allclose(chosen.mean(), 0, atol=1e-6)
    np.testing.assert_allclose(chosen.std(ddof=1), 1, rtol=1e-5)


def test_a_batch_without_responses_changes_nothing():
    batch = make_batch()
    nothing = jnp.zeros_like(batch.response_mask)
    batch = credited(
        dataclasses.replace(batch, response_mask=nothing), make_params(1), SCORES
    )
    state, metrics = step(batch)
    assert metrics["critic/vf_loss"] == 0 and metrics["critic/grad_norm"] == 0
    assert not batch.advantages.any()
    assert_same(state.params, make_params(0))


def test_an_update_that_is_not_finite_is_skipped():
    batch = make_batch()
    batch = dataclasses.replace(
        batch, returns=jnp.where(batch.response_mask, jnp.inf, 0.0)
    )
    with jax.debug_nans(False):
        state, metrics = jax.device_get(step(batch))
    assert metrics["critic/update_skipped"] == 1 and state.step == 1
    assert_same(state.params, make_params(0))


@pytest.mark.parametrize("name", ["values", "returns"])
def test_a_critic_needs_values_and_returns(name):
    batch = dataclasses.replace(make_batch(), **{name: None})
    with pytest.raises(ValueError, match=f"a critic needs batch.{name}"):
        step(batch)


def test_a_critic_learns_what_to_expect():
    batch, state = make_batch(), make_state(ADAM)
    update = compiled(ADAM, ppo.CriticSettings(cliprange_value=10.0))
    for _ in range(200):
        state, metrics = update(state, batch)
    # Responses to one prompt start in one state, so not all can be known.
    assert metrics["critic/vf_explained_var"] > 0.5


def test_an_update_moves_the_critic_and_the_policy():
    batch = make_batch()
    update = functools.partial(
        ppo.update,
        logprob_fn=logprob_fn,
        value_fn=value_fn,
        actor_optimizer=SGD,
        critic_optimizer=SGD,
        actor_settings=grpo.Settings(),
        critic_settings=ppo.CriticSettings(),
    )
    state = ppo.TrainState(make_state(SGD, key=2), make_state(SGD))
    after, metrics = jax.jit(update)(state, batch)
    critic, judged = reference("token-mean")
    assert_same(after.critic, critic)
    assert_same({name: metrics[name] for name in judged}, judged)
    assert metrics["actor/ppo_kl"] == 0 and metrics["actor/pg_clipfrac"] == 0
    moved = logprob_fn(after.actor.params, batch).logprobs
    moved -= logprob_fn(state.actor.params, batch).logprobs
    assert jnp.sum(moved * batch.advantages) > 0
