"""PPO's update of a critic, on arrays. Whole runs: test_critic.py."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from observations import insert

from jaxrl_llm.algorithms import advantages, grpo, logprobs, masked, ppo
from jaxrl_llm.data.packing import Layout, make_rows
from jaxrl_llm.data.rows import previous_tokens
from jaxrl_llm.data.types import Completion, Episode, Prompt
from jaxrl_llm.sharding import mesh


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


VOCAB, WIDTH = 7, 4
RNG = np.random.default_rng(0)
PROMPTS = [
    Prompt(
        id=p, content="", tokens=tuple(RNG.integers(0, VOCAB, n).tolist()), columns={}
    )
    for p, n in enumerate([3, 5, 2])
]
SAMPLED = [
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
OBSERVED = {(0, 1): {0: [2, 5]}, (1, 1): {1: [3], 4: [6, 0]}, (2, 0): {0: [1], 2: [4]}}
EPISODES = [
    [insert(Episode.of(c), OBSERVED.get((p, g), {})) for g, c in enumerate(group)]
    for p, group in enumerate(SAMPLED)
]
SCORES = np.array([[1.0, -1.0], [0.3, -0.3], [-2.0, 2.0]], np.float32)
ADAM, SGD = optax.adam(0.03), optax.sgd(0.1)


def hidden(params, rows):
    """No attention, so packing is only a matter of positions."""
    return jnp.tanh(params["tokens"][rows.tokens] + params["positions"][rows.positions])


@jax.jit
def value_fn(params, rows):
    after = hidden(params, rows) @ params["output"][0]
    previous = previous_tokens(rows)
    return logprobs.before(after, rows.positions, rows.response_mask, previous)


@jax.jit
def logprob_fn(params, rows):
    return logprobs.of_tokens(
        hidden(params, rows),
        params["output"],
        rows.tokens,
        rows.positions,
        rows.response_mask,
        previous=previous_tokens(rows),
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
        [EPISODES[p] for p in order],
        np.zeros((3, 2), np.float32),
        layout=Layout(**how),
    )
    return credited(jax.device_put(batch), make_params(1), SCORES[list(order)])


@jax.jit
def credited(batch, params, scores):
    rewards = advantages.at_last_token(
        scores.ravel(), batch.response_mask, batch.sequence_ids, batch.positions
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
    chex.assert_trees_all_close(one, other, rtol=rtol, atol=rtol)


@functools.cache
def reference(mode):
    return step(make_batch(), loss_agg_mode=mode)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize(
    "micro_batch_size, how",
    [
        pytest.param(1, {}, marks=pytest.mark.slow),
        (4, {}),  # of 6 rows
        pytest.param(None, {"pack_length": 14}, marks=pytest.mark.slow),
        (None, {"order": (2, 0, 1)}),
        (3, {"order": (1, 2, 0), "pack_length": 15, "rows_multiple": 8}),
        (1, {"pack_length": 20, "share_prompts": True}),
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
    batch = make_batch(pack_length=15)
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
