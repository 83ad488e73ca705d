"""A policy that learns from a teacher: what its updates are, in any layout of rows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_policy import hidden_states, logprob_fn, make_batch, make_state

from jaxrl_llm.algorithms import distillation, grpo, masked, update
from jaxrl_llm.algorithms.distilled_policy import DistilledPolicy, Settings
from jaxrl_llm.data import packing
from jaxrl_llm.data.rows import previous_tokens

TEACHER, BETA, TOPK = make_state(key=2).params, 0.3, 3
HALF = {"coef": 0.5, "beta": BETA, "topk": TOPK}
CASES = (
    Settings(mode="reverse_kl", **HALF),
    Settings(mode="reverse_kl", with_rewards=True, **HALF),
    Settings(mode="forward_kl_topk", **HALF),
    Settings(mode="jsd", with_rewards=True, **HALF),
)
POLICY = grpo.Settings(
    entropy_coeff=0.1, kl_loss_coef=0.2, loss_agg_mode="seq-mean-token-mean"
)


def asked(rows):
    """What functions of `distillation` have to know of rows."""
    return {
        "tokens": rows.tokens,
        "positions": rows.positions,
        "mask": rows.response_mask,
        "previous": previous_tokens(rows),
    }


def with_words(batch, topk=TOPK):
    batch = jax.device_put(batch)
    said = distillation.taught(
        hidden_states(TEACHER, batch), TEACHER["output"], **asked(batch), topk=topk
    )
    return dataclasses.replace(batch, taught=said)


def outputs_of(mode):
    def outputs(params, rows):
        given = hidden_states(params, rows), params["output"]
        if mode == "reverse_kl":
            return logprob_fn(params, rows)
        if mode == "jsd":
            teacher = hidden_states(TEACHER, rows), TEACHER["output"]
            return distillation.with_teacher(
                *given, **asked(rows), teacher=teacher, beta=BETA
            )
        return distillation.with_topk(*given, **asked(rows), said=rows.taught)

    return outputs


@functools.partial(
    jax.jit,
    static_argnames=("cases", "micro_batch_size", "policy"),
    compiler_options={"xla_backend_optimization_level": 0},
)
def gradients(batch, cases, micro_batch_size=None, policy=POLICY):
    """The gradient and the metrics under each of the settings."""
    optimizer = optax.sgd(-1.0)  # what is added to the parameters is the gradient
    state, found = make_state(optimizer), []
    for case in cases:
        objective, outputs_fn = grpo.Policy(policy), logprob_fn
        if case is not None:
            objective = DistilledPolicy(policy, case)
            outputs_fn = outputs_of(case.mode)
        after, metrics = update.update(
            state,
            batch,
            objective,
            optimizer,
            outputs_fn=outputs_fn,
            micro_batch_size=micro_batch_size,
        )
        found.append((jax.tree.map(jnp.subtract, after.params, state.params), metrics))
    return found


@functools.cache
def whole():
    return gradients(with_words(make_batch()), CASES)


def close(got, wanted, label=""):
    for x, y in zip(*map(jax.tree.leaves, (got, wanted)), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6, err_msg=label)


def shared_prompts():
    layout = packing.Layout(pack_length=24, share_prompts=True)
    rows = jax.device_get(make_batch(order=(2, 0, 1), pack_length=15))
    return packing.take(rows, range(rows.num_sequences), layout=layout)


@pytest.mark.parametrize(
    "layout",
    ["shared prompts", "packed", "moved with the words"],
)
@pytest.mark.slow
def test_no_mode_depends_on_micro_batches_or_the_layout_of_rows(layout):
    if layout == "shared prompts":
        batch = with_words(shared_prompts())
    elif layout == "packed":
        batch = with_words(make_batch(order=(1, 2, 0), pack_length=15))
    else:  # as mini-batches are made of rows that the teacher has seen
        rows = jax.device_get(with_words(make_batch()))
        packed = packing.Layout(pack_length=15)
        batch = packing.take(rows, range(rows.num_sequences), layout=packed)
        batch = jax.device_put(batch)
    for case, got, wanted in zip(
        CASES, gradients(batch, CASES, 1), whole(), strict=True
    ):
        close(got, wanted, f"{case.mode} {layout}")


@pytest.mark.slow
def test_a_sampled_token_counts_as_its_negative_reverse_kl_says():
    batch = with_words(make_batch())
    reverse = batch.old_logprobs - batch.taught.logprobs
    worth = jnp.where(batch.response_mask, -0.5 * reverse, 0.0)
    alone = dataclasses.replace(batch, advantages=worth, taught=None)
    both = dataclasses.replace(alone, advantages=batch.advantages + worth)
    for rows, (gradient, metrics) in zip((alone, both), whole(), strict=False):
        ((wanted, same),) = gradients(rows, (None,))
        close(gradient, wanted)
        close({name: metrics[name] for name in same}, same)
        mean = masked.sequence_mean(
            reverse, batch.response_mask, batch.sequence_ids, batch.num_sequences
        )
        np.testing.assert_allclose(metrics["distillation/loss"], mean, rtol=1e-5)


@pytest.mark.slow
def test_a_divergence_is_added_with_its_weight_to_what_else_there_is():
    batch = with_words(make_batch())
    state, where = make_state(), (batch.response_mask, batch.sequence_ids)
    for case, (gradient, metrics) in list(zip(CASES, whole(), strict=True))[2:]:

        def far(params, mode=case.mode):
            found = outputs_of(mode)(params, batch).divergence
            return masked.sequence_mean(found, *where, batch.num_sequences)

        value, own = jax.value_and_grad(far)(state.params)
        rows = batch
        if not case.with_rewards:  # the entropy and the KL term stay
            zeros = jnp.zeros_like(batch.advantages)
            rows = dataclasses.replace(batch, advantages=zeros)
        ((others, same),) = gradients(rows, (None,))
        close(gradient, jax.tree.map(lambda x, y: x + 0.5 * y, others, own), case.mode)
        np.testing.assert_allclose(metrics["distillation/loss"], value, rtol=1e-5)
        total = same["actor/loss"] + 0.5 * value
        np.testing.assert_allclose(metrics["actor/loss"], total, rtol=1e-5)
        assert ("actor/pg_loss" in metrics) is case.with_rewards


@pytest.mark.slow
def test_every_mode_moves_the_student_to_its_teacher():
    plain = dataclasses.replace(POLICY, entropy_coeff=0.0, kl_loss_coef=0.0)
    batch = with_words(make_batch(off_policy=False))
    cases = tuple(case for case in CASES if not case.with_rewards)
    jsd = outputs_of("jsd")
    before = jsd(make_state().params, batch).divergence
    for case, (gradient, metrics) in zip(
        cases, gradients(batch, cases, policy=plain), strict=True
    ):
        params = jax.tree.map(lambda p, g: p - 0.1 * g, make_state().params, gradient)
        gain = before - jsd(params, batch).divergence
        assert jnp.sum(gain) > 0.005, case.mode
        assert 0 < metrics["distillation/teacher_entropy"] < np.log(7)
        assert metrics["distillation/teacher_logprob"] < 0
    assert 0 < metrics["distillation/teacher_mass"] < 1


@pytest.mark.slow
def test_a_token_that_the_teacher_does_not_know_counts_nothing():
    batch = with_words(make_batch())
    unknown = batch.response_mask & (batch.tokens == 3)
    assert unknown.any()
    hole = jnp.where(unknown, -jnp.inf, batch.taught.logprobs)
    said = batch.taught._replace(logprobs=hole)
    ((gradient, metrics),) = gradients(
        dataclasses.replace(batch, taught=said), CASES[:1]
    )
    reverse = jnp.where(unknown, 0.0, batch.old_logprobs - batch.taught.logprobs)
    worth = jnp.where(batch.response_mask, -0.5 * reverse, 0.0)
    alone = dataclasses.replace(batch, advantages=worth, taught=None)
    close(gradient, gradients(alone, (None,))[0][0])
    assert all(np.isfinite(x) for x in metrics.values())


def test_rows_without_the_teachers_words_are_refused():
    with pytest.raises(ValueError, match=r"mode is reverse_kl .* nothing that a"):
        gradients(make_batch(), CASES[:1])
