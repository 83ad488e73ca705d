"""Metrics of mini-batches join into those of one computation over all of them."""

import dataclasses
import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm.algorithms import grpo, masked, ppo, statistics
from jaxrl_llm.algorithms import update as updates
from jaxrl_llm.algorithms.logprobs import Logprobs
from jaxrl_llm.algorithms.rollout_correction import Correction, Rejection
from jaxrl_llm.algorithms.statistics import Count, Derived, Largest, Least, Mean
from jaxrl_llm.data.rows import TrainBatch

R, T = 6, 8
LENGTHS = [7, 1, 5, 3, 0, 6]  # response tokens; one sequence has none
PARTS = [[0, 1, 2], [3, 4], [5]]  # unequal


@functools.cache
def whole():
    """A row for each sequence, and a second policy's numbers."""
    rng = np.random.default_rng(0)
    mask = np.arange(T) >= T - np.array(LENGTHS)[:, None]

    def draw(scale):
        return np.where(mask, rng.normal(size=(R, T)) * scale, 0).astype(np.float32)

    batch = TrainBatch(
        tokens=np.ones((R, T), np.int32),
        sequence_ids=np.repeat(np.arange(R, dtype=np.int32), T).reshape(R, T),
        positions=np.broadcast_to(np.arange(T, dtype=np.int32), (R, T)),
        is_prompt=~mask,
        response_mask=mask,
        sampler_logprobs=draw(0.5) - 1,
        old_logprobs=draw(0.5) - 1,
        ref_logprobs=draw(0.5) - 1,
        advantages=draw(1.0),
        values=draw(1.0),
        returns=draw(2.0) + 1,
        num_sequences=R,
        sequence_capacity=2,
    )
    return batch, Logprobs(draw(0.5) - 1, np.abs(draw(1.0)))


def part(tree, rows):
    """These rows of every array, and rows of padding."""

    def take(x):
        return np.concatenate([x[rows], np.zeros((R - len(rows), T), x.dtype)])

    return jax.tree.map(take, tree)


def parts():
    batch, outputs = whole()
    for rows in PARTS:
        ids = np.full((R, T), -1, np.int32)
        ids[: len(rows)] = np.arange(len(rows))[:, None]
        some = dataclasses.replace(part(batch, rows), sequence_ids=ids)
        yield some, part(outputs, rows)


def both(objective, made):
    """The metrics of all, and those of the parts joined."""

    @jax.jit
    def metrics(batch, outputs):
        seen = objective.read(batch)
        planned = objective.plan(seen, outputs, jnp.int32(0))
        return objective.metrics(batch, made(outputs), planned)

    batch, outputs = whole()
    found = jax.device_get([metrics(*some) for some in parts()])
    one = jax.device_get(metrics(batch, outputs))
    return {name: float(x) for name, x in one.items()}, statistics.join(found)


KINDS = [
    (kind, (0.3, 3.0) if kind.endswith("k1") else (None, 2.0))
    for kind in get_args(Rejection)
]


@pytest.mark.parametrize(
    "aggregation, correction",
    [
        ("token-mean", {"rejections": tuple(KINDS[:1]), "rollout_is": "token"}),
        pytest.param(
            "token-mean",
            {"rejections": tuple(KINDS), "rollout_is": "sequence"},
            marks=pytest.mark.slow,
        ),
        (
            "seq-mean-token-mean",
            {"rollout_is": "sequence", "is_bounds": (0.5, 2.0), "bypass_mode": True},
        ),
        ("seq-mean-token-sum", {}),
    ],
)
def test_a_policy_s(aggregation, correction):
    settings = grpo.Settings(
        loss_agg_mode=aggregation, correction=Correction(**correction), kl_loss_coef=0.1
    )
    one, joined = both(grpo.Policy(settings), lambda outputs: outputs)
    assert one.keys() == joined.keys()
    for name, value in one.items():
        np.testing.assert_allclose(
            joined[name], value, rtol=2e-5, atol=1e-6, err_msg=name
        )


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_a_critic_s(aggregation):
    objective = ppo.Critic(ppo.CriticSettings(loss_agg_mode=aggregation))
    one, joined = both(objective, lambda outputs: outputs.logprobs)
    for name, value in one.items():
        np.testing.assert_allclose(joined[name], value, rtol=2e-5, err_msg=name)


def test_what_a_mean_is_over_by_hand():
    joined = statistics.join(
        [
            {
                "a": Mean(1.0, 3),
                "b": Largest(2.0, 1),
                "c": Least(2.0, 1),
                "d": Count(1),
            },
            {
                "a": Mean(5.0, 1),
                "b": Largest(7.0, 0),
                "c": Least(-3.0, 2),
                "d": Count(1),
            },
        ]
    )
    assert joined == {"a": 2.0, "b": 2.0, "c": -3.0, "d": 2.0}


def test_metrics_that_do_not_say_it_go_by_their_names():
    parts = [
        {"x": 1.0, "x_max": 1.0, "x_min": 1.0},
        {"x": 2.0, "x_max": 3.0, "x_min": 3.0},
    ]
    assert statistics.join(parts) == {"x": 1.5, "x_max": 3.0, "x_min": 1.0}


def test_of_nothing_the_first_value_stays():
    empty = statistics.Moments(0.0, 0.0, 0)
    made = {"x": Mean(0.0, 0), "y": Derived(0.0, (empty,), statistics.deviation)}
    assert statistics.join([made, made]) == {"x": 0.0, "y": 0.0}


def test_one_mini_batch_keeps_its_numbers():
    x = np.float32(0.1)
    deviation = Derived(x, (statistics.Moments(x, x, 3),), statistics.deviation)
    found = statistics.join([{"a": Mean(x, 7), "b": deviation, "c": Count(x)}])
    assert found == dict.fromkeys("abc", float(x))


def test_a_schedule_goes_on_where_a_step_is_skipped():
    """So the rate of update n is schedule(n), whatever came before."""
    optimizer = optax.adam(optax.linear_schedule(1.0, 0.0, 4))
    params = {"w": jnp.ones(2)}
    state = updates.TrainState(params, optimizer.init(params), jnp.int32(0))
    moved = []
    for gradient in (1.0, np.nan, 1.0):
        before = state.params["w"]
        with jax.debug_nans(False):
            grads = {"w": jnp.full(2, gradient)}
            state, _, skipped = updates.apply(state, grads, optimizer)
        assert skipped == np.isnan(gradient)
        moved.append(float((before - state.params["w"])[0]))
    # Adam's step by a constant gradient is the rate: 1, nothing, 1 - 2 / 4.
    np.testing.assert_allclose(moved, [1.0, 0.0, 0.5], rtol=1e-4)
    adam, schedule = state.opt_state
    assert (adam.count, schedule.count, state.step) == (2, 3, 3)


def test_the_loss_is_a_mean_over_what_its_weights_say():
    batch, _ = whole()
    where = batch.response_mask, batch.sequence_ids, R
    for mode, expected in {
        "token-mean": 22,
        "token-sum": 1,
        "seq-mean-token-sum": 5,
        "seq-mean-token-mean": 5,
        "seq-mean-token-sum-norm": 5,
    }.items():
        assert masked.num_counted(mode, *map(jnp.asarray, where[:2]), R) == expected
