"""The loss of supervised fine-tuning, and what the rest of an update does with it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_policy

from jaxrl_llm.algorithms import sft, statistics
from jaxrl_llm.algorithms import update as updates
from jaxrl_llm.algorithms.sft import Sft
from jaxrl_llm.data import packing
from jaxrl_llm.data.packing import Layout

BATCH = toy_policy.make_batch(off_policy=False)


def told(params, rows):
    """Outputs of the toy policy, with a share of tokens that are the likeliest."""
    found = toy_policy.logprob_fn(params, rows)
    likeliest = jnp.where(rows.response_mask, (rows.tokens % 2).astype(jnp.float32), 0)
    return found._replace(is_likeliest=likeliest)


@functools.partial(jax.jit, static_argnums=(1, 2))
def updated(batch, micro_batch_size=None, loss_type="nll"):
    return sft.update(
        toy_policy.make_state(),
        batch,
        logprob_fn=told,
        optimizer=toy_policy.OPTIMIZER,
        loss_type=loss_type,
        micro_batch_size=micro_batch_size,
    )


@functools.partial(jax.jit, static_argnums=(2,))
def measured(params, batch, size=None):
    return updates.measure(params, batch, Sft(), outputs_fn=told, micro_batch_size=size)


@pytest.mark.parametrize(
    "loss_type", ["nll", pytest.param("dft", marks=pytest.mark.slow)]
)
def test_the_loss_is_a_mean_over_all_tokens_to_learn(loss_type):
    params = toy_policy.make_state().params
    mask = np.asarray(BATCH.response_mask)

    def loss(params):
        logprobs = toy_policy.logprob_fn(params, BATCH).logprobs
        weights = jax.lax.stop_gradient(jnp.exp(logprobs)) if loss_type == "dft" else 1
        return -jnp.sum(logprobs * weights * mask) / mask.sum()

    value, grads = jax.value_and_grad(loss)(params)
    state, metrics = updated(BATCH, loss_type=loss_type)
    np.testing.assert_allclose(metrics["sft/loss"], value, rtol=1e-6)
    for new, old, grad in zip(
        *map(jax.tree.leaves, (state.params, params, grads)), strict=True
    ):
        np.testing.assert_allclose(old - new, 0.1 * grad, atol=1e-6)
    logprobs = np.asarray(toy_policy.logprob_fn(params, BATCH).logprobs)[mask]
    np.testing.assert_allclose(
        metrics["sft/perplexity"], np.exp(-logprobs.mean()), rtol=1e-6
    )
    odd = (np.asarray(BATCH.tokens)[mask] % 2).mean()
    np.testing.assert_allclose(metrics["sft/mean_token_accuracy"], odd, rtol=1e-6)


def test_micro_batches_packing_and_order_make_no_difference():
    whole, metrics = updated(BATCH)
    packed = toy_policy.make_batch(order=(2, 0, 1), off_policy=False, pack_length=16)
    ways = {"micro-batches": (BATCH, 2), "packed, in another order": (packed, 1)}
    for name, (batch, size) in ways.items():
        state, found = updated(batch, size)
        for a, b in zip(
            *map(jax.tree.leaves, (whole.params, state.params)), strict=True
        ):
            np.testing.assert_allclose(a, b, atol=1e-6, err_msg=name)
        for key, value in metrics.items():
            np.testing.assert_allclose(found[key], value, rtol=1e-5, err_msg=name)


@pytest.mark.slow  # two more programs
def test_held_out_rows_in_parts_are_measured_as_a_whole():
    params = toy_policy.make_state().params
    whole = statistics.join([jax.device_get(measured(params, BATCH))])
    host = jax.device_get(BATCH)
    layout = Layout(most_sequences=4)
    parts = [packing.take(host, those, layout=layout) for those in (range(4), [4, 5])]
    found = [measured(params, jax.device_put(part), 2) for part in parts]
    joined = statistics.join(jax.device_get(found))
    assert (
        joined.keys()
        == whole.keys()
        == {*("sft/loss", "sft/perplexity", "sft/entropy", "sft/mean_token_accuracy")}
    )
    for name, value in whole.items():
        np.testing.assert_allclose(joined[name], value, rtol=1e-5, err_msg=name)
    # And they are those of an update before its step.
    _, metrics = updated(BATCH)
    for name, value in whole.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6, err_msg=name)


def test_a_batch_with_nothing_to_learn_changes_nothing():
    empty = dataclasses.replace(BATCH, response_mask=BATCH.response_mask & False)
    state, metrics = updated(empty)
    assert metrics["sft/loss"] == 0 and metrics["sft/update_skipped"] == 0
    for a, b in zip(
        *map(jax.tree.leaves, (state.params, toy_policy.make_state().params)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6)  # drawn in a program, and not
