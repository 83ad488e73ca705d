"""One update for objectives of every kind: pairs, preferences, distillation, and what
is frozen. Each against a gradient worked out directly, and in micro-batches."""

import dataclasses
import functools
from dataclasses import dataclass

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm.algorithms import logprobs, masked
from jaxrl_llm.algorithms.objectives import SEQUENCES_TOGETHER, Objective
from jaxrl_llm.algorithms.preference import BradleyTerry, Dpo, DpoSettings
from jaxrl_llm.algorithms.update import TrainState, accumulate, update
from jaxrl_llm.data.rows import TrainBatch

V, D, T, PAIRS, PROMPT = 11, 4, 12, 5, 2
RNG = np.random.default_rng(0)
# Lengths of both responses of each pair: the better one first.
LENGTHS = [(1, 4), (3, 2), (4, 4), (2, 1), (3, 3)]
SGD = optax.sgd(-1.0)  # so that what is added to the parameters is the gradient


def make_batch():
    """Each row has a pair: prompt, better response, prompt, worse response."""
    tokens, ids = np.zeros((PAIRS, T), np.int32), np.full((PAIRS, T), -1, np.int32)
    positions, mask = np.zeros((PAIRS, T), np.int32), np.zeros((PAIRS, T), bool)
    is_prompt = np.zeros((PAIRS, T), bool)
    for pair, lengths in enumerate(LENGTHS):
        start = 0
        for side, length in enumerate(lengths):
            where = slice(start, start + PROMPT + length)
            tokens[pair, where] = RNG.integers(0, V, PROMPT + length)
            ids[pair, where] = 2 * pair + side
            positions[pair, where] = np.arange(PROMPT + length)
            is_prompt[pair, start : start + PROMPT] = True
            mask[pair, start + PROMPT : where.stop] = True
            start = where.stop
    drawn = RNG.uniform(-3, -1, (PAIRS, T)).astype(np.float32)
    return TrainBatch(
        tokens=jnp.asarray(tokens),
        sequence_ids=jnp.asarray(ids),
        positions=jnp.asarray(positions),
        is_prompt=jnp.asarray(is_prompt),
        response_mask=jnp.asarray(mask),
        sampler_logprobs=jnp.asarray(drawn * mask),
        advantages=jnp.zeros((PAIRS, T)),
        ref_logprobs=jnp.asarray(drawn * mask),
        num_sequences=2 * PAIRS,
        sequence_capacity=3,
    )


BATCH = make_batch()


def make_params(key):
    shapes = {"tokens": (V, D), "output": (V, D), "head": (D,)}
    keys = jax.random.split(jax.random.key(key), 3)
    return {
        name: jax.random.normal(k, shape)
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def hidden_fn(params, rows):
    """Hidden states and the output matrix; no attention."""
    place = jnp.cos(rows.positions)[..., None]
    return jnp.tanh(params["tokens"][rows.tokens] + place), params["output"]


def logprob_fn(params, rows):
    hidden, matrix = hidden_fn(params, rows)
    where = rows.tokens, rows.positions, rows.response_mask
    return logprobs.of_tokens(hidden, matrix, *where)


def score_fn(params, rows):
    """A score after each token; that after the last is the response's."""
    return hidden_fn(params, rows)[0] @ params["head"]


@dataclass(frozen=True)
class Distillation(Objective):
    """KL(teacher || student) of each token, from hidden states and output matrices of
    both, a few columns of the rows at a time: the logits of a row never all exist."""

    chunk: int = 4
    name: str = "actor"

    def plan(self, batch, seen, step):
        return masked.token_weights(batch.response_mask)

    def loss(self, rows, outputs, planned):
        (hidden, matrix), (known, known_matrix) = outputs

        @jax.checkpoint
        def of_chunk(columns):
            logs = jax.nn.log_softmax(columns[0] @ matrix.T)
            wanted = jax.nn.log_softmax(columns[1] @ known_matrix.T)
            return jnp.sum(jnp.exp(wanted) * (wanted - logs), axis=-1)

        def chunks(x):
            return x.reshape(len(x), -1, self.chunk, x.shape[-1]).swapaxes(0, 1)

        divergence = jax.lax.map(of_chunk, (chunks(hidden), chunks(known)))
        divergence = divergence.swapaxes(0, 1).reshape(rows.tokens.shape)
        return masked.weighted_sum(divergence, planned), divergence

    def metrics(self, batch, kept, planned):
        mask = batch.response_mask
        return {
            "actor/kl": masked.weighted_sum(kept, planned),
            "actor/kl_max": jnp.max(jnp.where(mask, kept, 0.0)),
        }


def both_fn(teacher, params, rows):
    return hidden_fn(params, rows), hidden_fn(teacher, rows)


TEACHER = make_params(1)
PREFERENCE = Dpo(DpoSettings(beta=0.3))


ON_HOST = jax.device_get(BATCH)


def pieces(pair):
    """Both sequences of a pair, each in a row of its own without padding."""
    for side in (0, 1):
        at = ON_HOST.sequence_ids[pair] == 2 * pair + side
        yield jax.tree.map(
            lambda x, at=at: jnp.asarray(x[pair : pair + 1, at]), ON_HOST
        )


def bradley_terry(params):
    """The same objective, sequence by sequence."""
    total = 0.0
    for pair in range(PAIRS):
        better, worse = (score_fn(params, x)[0, -1] for x in pieces(pair))
        total += jnp.log1p(jnp.exp(worse - better))
    return total / PAIRS


def preference(params):
    total = 0.0
    for pair in range(PAIRS):
        better, worse = (
            jnp.sum(logprob_fn(params, x).logprobs - x.ref_logprobs)
            for x in pieces(pair)
        )
        total += jnp.log1p(jnp.exp(-0.3 * (better - worse)))
    return total / PAIRS


def distillation(params):
    hidden, matrix = hidden_fn(params, BATCH)
    known, known_matrix = hidden_fn(TEACHER, BATCH)
    p = jax.nn.softmax(known @ known_matrix.T)
    q = jax.nn.softmax(hidden @ matrix.T)
    each = jnp.sum(p * jnp.log(p / q), axis=-1)
    return jnp.sum(each * BATCH.response_mask) / jnp.sum(BATCH.response_mask)


CASES = {
    "reward model": (BradleyTerry(), score_fn, bradley_terry),
    "preferences": (PREFERENCE, logprob_fn, preference),
    "distillation": (
        Distillation(),
        functools.partial(both_fn, TEACHER),
        distillation,
    ),
}


# Programs that run once: compiling them well would take longer than it saves.
QUICKLY = {"compiler_options": {"xla_backend_optimization_level": 0}}


@functools.partial(jax.jit, static_argnums=(1, 2, 3), **QUICKLY)
def step(params, objective, outputs_fn, micro_batch_size=None):
    state = TrainState(params, SGD.init(params), jnp.int32(0))
    after, metrics = update(
        state,
        BATCH,
        objective,
        SGD,
        outputs_fn=outputs_fn,
        micro_batch_size=micro_batch_size,
    )
    return jax.tree.map(jnp.subtract, after.params, params), metrics


@pytest.mark.parametrize("case", CASES)
def test_an_objective_gets_the_gradient_of_its_equation(case):
    objective, outputs_fn, equation = CASES[case]
    grad, metrics = step(make_params(0), objective, outputs_fn)
    wanted = jax.jit(jax.grad(equation), **QUICKLY)(make_params(0))
    chex.assert_trees_all_close(grad, wanted, rtol=1e-5, atol=1e-6)
    norm = metrics[f"{objective.name}/grad_norm"]
    np.testing.assert_allclose(norm, optax.tree.norm(wanted), rtol=1e-5)
    assert metrics[f"{objective.name}/update_skipped"] == 0


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("micro_batch_size", [1, 2])  # of 5 rows
def test_micro_batches_change_no_objective(case, micro_batch_size):
    objective, outputs_fn, _ = CASES[case]
    got = step(make_params(0), objective, outputs_fn, micro_batch_size)
    wanted = step(make_params(0), objective, outputs_fn)
    chex.assert_trees_all_close(got, wanted, rtol=1e-6, atol=1e-6)


def test_objectives_measure_what_they_say():
    params = make_params(0)
    _, metrics = step(params, *CASES["reward model"][:2])
    scores, right = jax.device_get(jax.jit(score_fn)(params, BATCH)), []
    for pair, lengths in enumerate(LENGTHS):
        end = PROMPT + lengths[0]
        right.append(
            scores[pair, end - 1] > scores[pair, end + PROMPT + lengths[1] - 1]
        )
    assert 0 < sum(right) < PAIRS, "the case is worth nothing otherwise"
    np.testing.assert_allclose(metrics["rm/accuracy"], np.mean(right))
    _, metrics = step(params, *CASES["distillation"][:2], 2)
    wanted = jax.jit(distillation)(params)
    np.testing.assert_allclose(metrics["actor/kl"], wanted, rtol=1e-5)
    assert metrics["actor/kl_max"] > metrics["actor/kl"]


def test_distillation_keeps_no_logits_of_whole_rows():
    def shapes(function):
        return str(jax.make_jaxpr(jax.grad(function))(make_params(0)))

    def chunked(params):
        outputs = both_fn(TEACHER, params, BATCH)
        weights = masked.token_weights(BATCH.response_mask)
        return Distillation().loss(BATCH, outputs, weights)[0]

    whole = f"{PAIRS},{T},{V}]"
    assert whole in shapes(distillation)
    assert whole not in shapes(chunked)
    assert f"[{PAIRS},4,{V}]" in shapes(chunked)


def test_what_outputs_close_over_gets_no_gradient():
    """Frozen weights: nothing of their shape is added up, and they stay."""

    def shared(frozen, params, rows):
        return logprob_fn(params | frozen, rows)

    def frozen_step(trained, frozen):
        state = TrainState(trained, SGD.init(trained), jnp.int32(0))
        outputs_fn = functools.partial(shared, frozen)
        return update(
            state, BATCH, PREFERENCE, SGD, outputs_fn=outputs_fn, micro_batch_size=2
        )[0].params

    params = make_params(0)
    frozen = {"tokens": params.pop("tokens")}
    params.pop("head")
    after = jax.jit(frozen_step)(params, frozen)
    whole, _ = step(make_params(0), PREFERENCE, logprob_fn)
    np.testing.assert_allclose(
        after["output"] - params["output"], whole["output"], rtol=1e-5, atol=1e-6
    )
    assert after.keys() == {"output"}
    # What the loop of micro-batches carries is the trained gradient, [V, D] once.
    program = jax.make_jaxpr(frozen_step)(params, frozen)
    (loop,) = (e for e in program.eqns if e.primitive.name == "while")
    carried = [x.aval.shape for x in loop.outvars]
    assert carried.count((V, D)) == 1
    whole = jax.make_jaxpr(lambda p: step.__wrapped__(p, PREFERENCE, logprob_fn, 2)[0])(
        make_params(0)
    )
    (loop,) = (e for e in whole.eqns if e.primitive.name == "while")
    assert [x.aval.shape for x in loop.outvars].count((V, D)) == 2


def test_arrays_keep_their_trailing_axes():
    beside = jnp.arange(PAIRS * T * 3 * 2, dtype=jnp.float32).reshape(PAIRS, T, 3, 2)

    def function(params, rows, part):
        assert part.shape[1:] == (T, 3, 2)
        return part.sum(), (part + rows.tokens[..., None, None], part[:, 0, 0, 0])

    @jax.jit
    def found():
        return [accumulate(function, None, BATCH, beside, n) for n in (None, 1, 2, 3)]

    for total, (kept, per_row) in found():
        assert total == beside.sum()
        np.testing.assert_array_equal(kept, beside + BATCH.tokens[..., None, None])
        np.testing.assert_array_equal(per_row, beside[:, 0, 0, 0])


def test_segments_say_what_must_share_a_row():
    together = {objective.segments for objective, _, _ in CASES.values()}
    assert {SEQUENCES_TOGETHER[s] for s in together} == {1, 2}


def test_half_a_pair_is_an_error():
    odd = dataclasses.replace(BATCH, num_sequences=BATCH.num_sequences - 1)
    params = make_params(0)
    state = TrainState(params, SGD.init(params), jnp.int32(0))
    name = PREFERENCE.name
    with pytest.raises(ValueError, match=f"sequences are no whole number .* {name}"):
        update(state, odd, PREFERENCE, SGD, outputs_fn=logprob_fn)
