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
from toy_policy import (
    OPTIMIZER,
    logprob_fn,
    make_batch,
    make_state,
)

from jaxrl_llm.algorithms import grpo, logprobs
from jaxrl_llm.algorithms import update as updates
from jaxrl_llm.sharding import mesh


@functools.cache
def compiled(optimizer, settings):
    update = functools.partial(
        grpo.update, logprob_fn=logprob_fn, optimizer=optimizer, settings=settings
    )
    return jax.jit(update)


def step(batch, optimizer=OPTIMIZER, **fields):
    """One update of the first state."""
    return compiled(optimizer, grpo.Settings(**fields))(make_state(optimizer), batch)


ALL_TERMS = {"entropy_coeff": 0.1, "kl_loss_coef": 0.5}


def assert_same(one, other, rtol=1e-6):
    """The same parameters (so the same gradient, under SGD) and the same metrics."""
    chex.assert_trees_all_close(one, other, rtol=rtol, atol=rtol)


@functools.cache
def reference(mode):
    return step(make_batch(), loss_agg_mode=mode, **ALL_TERMS)


@pytest.mark.parametrize(
    "mode, micro_batch_size, how",
    [
        ("token-mean", 1, {}),
        pytest.param("token-mean", 4, {}, marks=pytest.mark.slow),  # of 6 rows
        pytest.param("seq-mean-token-mean", 2, {}, marks=pytest.mark.slow),
        ("seq-mean-token-mean", 5, {}),
        pytest.param("token-mean", None, {"pack_length": 14}, marks=pytest.mark.slow),
        ("seq-mean-token-mean", None, {"order": (2, 0, 1)}),
        ("seq-mean-token-mean", 3, {"order": (1, 2, 0), "pack_length": 15}),
        pytest.param(
            "token-mean",
            3,
            {"pack_length": 16, "rows_multiple": 8},
            marks=pytest.mark.slow,
        ),
        ("token-mean", 2, {"pack_length": 20, "share_prompts": True}),
    ],
)
def test_micro_batches_packing_order_and_padding_change_nothing(
    mode, micro_batch_size, how
):
    got = step(
        make_batch(**how),
        loss_agg_mode=mode,
        micro_batch_size=micro_batch_size,
        **ALL_TERMS,
    )
    assert_same(got, reference(mode))


@pytest.mark.parametrize(
    "mode, micro_batch_size",
    [
        pytest.param("token-mean", None, marks=pytest.mark.slow),
        ("seq-mean-token-mean", 8),
    ],
)
def test_eight_devices_change_nothing(mode, micro_batch_size):
    rows = NamedSharding(mesh.make({"data": 8}), P("data"))
    got = step(
        jax.device_put(make_batch(rows_multiple=16), rows),
        loss_agg_mode=mode,
        micro_batch_size=micro_batch_size,
        **ALL_TERMS,
    )
    assert_same(got, reference(mode))


def test_every_device_keeps_its_rows():
    # Micro-batches and the choice of response tokens must not move activations.
    rows = NamedSharding(mesh.make({"data": 8}), P("data"))
    update = compiled(OPTIMIZER, grpo.Settings(micro_batch_size=8))
    batch = jax.device_put(make_batch(rows_multiple=16), rows)
    program = update.lower(make_state(), batch).compile().as_text()
    assert "all-reduce" in program
    moves = ("all-gather", "all-to-all", "collective-permute")
    assert not any(move in program for move in moves)


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_on_policy_the_ratio_is_one(micro_batch_size):
    # Loss of a token is -A; of the four response tokens of prompt 0 and so on:
    # 1 * 1 + 4 * -1 + 2 * 0.3 + 6 * -0.3 + 3 * -2 + 1 * 2 = -8.2 over 17 tokens.
    _, metrics = step(make_batch(off_policy=False), micro_batch_size=micro_batch_size)
    assert metrics["actor/ppo_kl"] == 0 and metrics["actor/pg_clipfrac"] == 0
    np.testing.assert_allclose(metrics["actor/pg_loss"], 8.2 / 17, rtol=1e-6)


def test_old_logprobs_of_the_same_weights_are_the_same_as_none():
    batch = make_batch(off_policy=False)
    old = logprob_fn(make_state().params, batch).logprobs
    assert_same(step(dataclasses.replace(batch, old_logprobs=old)), step(batch))


def test_an_update_makes_good_responses_likelier_and_bad_ones_rarer():
    batch = make_batch(off_policy=False)
    state, _ = step(batch)
    before = logprob_fn(make_state().params, batch).logprobs
    after = logprob_fn(state.params, batch).logprobs
    assert jnp.sum(batch.advantages * (after - before)) > 0.1
    assert state.step == 1


def test_the_metrics_are_those_of_a_loop_over_tokens():
    batch = make_batch()
    _, metrics = step(batch, loss_agg_mode="seq-mean-token-mean", **ALL_TERMS)
    own, entropies, _ = logprob_fn(make_state().params, batch)
    pg, kl, ent, clipped, lower, ppo_kl, diff, k3 = ([] for _ in range(8))
    for s in range(6):
        where = np.nonzero((batch.sequence_ids == s) & batch.response_mask)
        new, old, ref, A, entropy, sampler = (
            np.asarray(x, np.float64)[where]
            for x in (
                own,
                batch.old_logprobs,
                batch.ref_logprobs,
                batch.advantages,
                entropies,
                batch.sampler_logprobs,
            )
        )
        ratio = np.exp(new - old)
        bound = np.clip(ratio, 0.8, 1.2)
        loss = -np.minimum(ratio * A, bound * A)
        pg.append(np.mean(np.where(A < 0, np.minimum(loss, -3 * A), loss)))
        kl.append(np.mean(np.exp(ref - new) - (ref - new) - 1))
        ent.append(np.mean(entropy))
        clipped += (bound * A < ratio * A).tolist()
        lower += ((A < 0) & (ratio > 3)).tolist()
        ppo_kl += (old - new).tolist()
        diff += np.abs(sampler - old).tolist()
        k3 += (np.exp(old - sampler) - (old - sampler) - 1).tolist()
    expected = {
        "actor/pg_loss": np.mean(pg),
        "actor/kl_loss": np.mean(kl),
        "actor/entropy": np.mean(ent),
        "actor/loss": np.mean(pg) - 0.1 * np.mean(ent) + 0.5 * np.mean(kl),
        "actor/pg_clipfrac": np.mean(clipped),
        "actor/pg_clipfrac_lower": np.mean(lower),
        "actor/ppo_kl": np.mean(ppo_kl),
        "mismatch/logprob_diff_mean": np.mean(diff),
        "mismatch/logprob_diff_max": np.max(diff),
        "mismatch/kl": np.mean(k3),
        "actor/update_skipped": 0.0,
    }
    assert 0 < expected["actor/pg_clipfrac"] < 1, "the case is worth nothing otherwise"
    assert expected.keys() | {"actor/grad_norm"} == metrics.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)


def test_grad_norm_is_that_of_the_step():
    state, metrics = step(make_batch(), **ALL_TERMS)
    moved = jax.tree.map(
        lambda new, old: (old - new) / 0.1, state.params, make_state().params
    )
    norm = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(moved)))
    np.testing.assert_allclose(metrics["actor/grad_norm"], norm, rtol=1e-5)


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_an_update_that_is_not_finite_is_skipped(micro_batch_size):
    adam = optax.adam(0.1)
    batch = make_batch(off_policy=False)
    batch = dataclasses.replace(
        batch, advantages=jnp.where(batch.response_mask, jnp.inf, 0.0)
    )
    with jax.debug_nans(False):
        state, metrics = step(batch, optimizer=adam, micro_batch_size=micro_batch_size)
        state, metrics = jax.device_get((state, metrics))
    assert metrics["actor/update_skipped"] == 1 and state.step == 1
    before = make_state(adam)
    chex.assert_trees_all_equal(state.params, before.params)
    chex.assert_trees_all_equal(state.opt_state, before.opt_state)


def test_equal_rewards_change_nothing():
    batch = make_batch(off_policy=False)
    batch = dataclasses.replace(batch, advantages=jnp.zeros_like(batch.advantages))
    state, metrics = step(batch)
    assert metrics["actor/grad_norm"] == 0
    assert_same(state.params, make_state().params)


def test_a_batch_without_responses_changes_nothing():
    batch = make_batch()
    nothing = jnp.zeros_like(batch.response_mask)
    state, metrics = step(dataclasses.replace(batch, response_mask=nothing))
    assert metrics["actor/loss"] == 0 and metrics["actor/grad_norm"] == 0
    assert_same(state.params, make_state().params)


@pytest.mark.parametrize("mismatch", [-100.0, 100.0])
def test_a_huge_mismatch_stays_finite(mismatch):
    batch = make_batch()
    batch = dataclasses.replace(
        batch,
        old_logprobs=batch.old_logprobs + mismatch * batch.response_mask,
        ref_logprobs=batch.ref_logprobs - mismatch * batch.response_mask,
    )
    state, metrics = step(batch, **ALL_TERMS)
    assert metrics["actor/update_skipped"] == 0
    chex.assert_tree_all_finite((state, metrics))


def test_a_reference_without_a_coefficient_is_only_measured():
    batch = make_batch()
    state, metrics = step(batch, kl_loss_coef=0.0)
    without, others = step(dataclasses.replace(batch, ref_logprobs=None))
    assert metrics.keys() - others.keys() == {"actor/kl_loss"}
    assert_same(state, without)


def test_a_kl_loss_needs_a_reference():
    with pytest.raises(ValueError, match="kl_loss_coef is 0.1 but the batch has no"):
        step(make_batch(off_policy=False), kl_loss_coef=0.1)


def test_low_precision_gradients_add_up_in_float32():
    # 300 micro-batches that add 1 / 300 each: in bfloat16 the sum gets stuck at 1/2.
    def function(params, rows, weights):
        return weights.sum().astype(jnp.bfloat16), logprobs.Logprobs(weights, weights)

    rows = jax.tree.map(lambda x: jnp.resize(x, (300, 16)), make_batch())
    weights = jnp.full((300, 16), 1 / 4800)
    total, _ = updates.accumulate(function, None, rows, weights, 1)
    np.testing.assert_allclose(total, 1.0, rtol=4e-3)


def test_logprobs_of_some_rows_at_a_time_are_those_of_all():
    params, batch = make_state().params, make_batch()
    terms, got = updates.accumulate(
        lambda params, rows, _: ((), logprob_fn(params, rows)),
        params,
        batch,
        jnp.zeros(batch.tokens.shape),
        4,
    )
    assert terms == ()
    assert_same(got, logprob_fn(params, batch))


def test_a_state_may_hold_shardings():
    everywhere = NamedSharding(mesh.make({"data": 8}), P())
    shardings = jax.tree.map(lambda _: everywhere, make_state())
    state, _ = jax.jit(
        functools.partial(
            grpo.update,
            logprob_fn=logprob_fn,
            optimizer=OPTIMIZER,
            settings=grpo.Settings(),
        ),
        out_shardings=(shardings, None),
    )(make_state(), make_batch())
    assert state.step.sharding == everywhere


def clipped_by_hand(
    logprobs, old_logprobs, advantages, clip_ratio_low, clip_ratio_high
):
    ratio = jnp.exp(logprobs - old_logprobs)
    bound = jnp.clip(ratio, 1 - clip_ratio_low, 1 + clip_ratio_high)
    return -jnp.minimum(ratio * advantages, bound * advantages)


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_a_loss_of_ones_own_takes_the_place_of_a_built_in_one(micro_batch_size):
    numbers = {"clip_ratio_high": 0.3, "clip_ratio_c": None}
    got = step(
        make_batch(),
        loss_mode=clipped_by_hand,
        micro_batch_size=micro_batch_size,
        **numbers,
        **ALL_TERMS,
    )
    wanted = step(make_batch(), **numbers, **ALL_TERMS)
    got[1]["actor/pg_clipfrac"] = wanted[1]["actor/pg_clipfrac"]  # not known of it
    assert_same(got, wanted)


def test_params_of_a_loss_come_before_the_settings():
    def loss(logprobs, advantages, tau_pos, *, scale):
        return -tau_pos * scale * advantages * logprobs

    batch = make_batch()
    wanted = step(batch, loss_mode="gpg")[1]["actor/pg_loss"]
    for params, factor in (
        ({"scale": 3.0}, 6.0),
        ({"scale": 3.0, "tau_pos": 1.0}, 3.0),
    ):
        got = step(batch, loss_mode=loss, params=params, tau_pos=2.0)[1]
        np.testing.assert_allclose(got["actor/pg_loss"], factor * wanted, rtol=1e-5)


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"loss_mode": "vanila"}, "loss_mode is 'vanila', did you mean 'vanilla'?"),
        ({"loss_mode": "dro"}, "loss_mode dro needs dro_beta > 0, such as 0.05, got N"),
        (
            {"loss_mode": lambda logprobs: logprobs.sum()},
            "returned an array of shape .., not one number for each token, .6, 16.",
        ),
    ],
)
def test_a_loss_that_cannot_be_is_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        step(make_batch(), **fields)
