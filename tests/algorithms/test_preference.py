"""Reward models' and DPO's losses against TRL's, and in every layout.

The numbers of TRL 1.16.0 are in golden/trl_1.16.0_preference.json, made by
support/trl_preference.py, and made anew where it is installed. What stands for a model
looks its numbers up by sequence and position, so that a gradient is one in them.
"""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trl_preference
from trl_preference import BETA, DPO, LENGTH, LENGTHS, PAIRS, PROMPT, REWARDS, SMOOTHING

from jaxrl_llm.algorithms import preference
from jaxrl_llm.algorithms.logprobs import Logprobs
from jaxrl_llm.algorithms.preference import BradleyTerry, Dpo, DpoSettings
from jaxrl_llm.algorithms.update import TrainState, update
from jaxrl_llm.config.algorithm import PREFERENCE_LOSSES
from jaxrl_llm.data.packing import Layout, make_rows
from jaxrl_llm.data.types import Episode, Prompt, Turn

PATH = pathlib.Path(__file__).parents[1] / "golden/trl_1.16.0_preference.json"
GOLDEN = json.loads(PATH.read_text())
GIVEN = {name: np.array(x, np.float32) for name, x in GOLDEN["inputs"].items()}
OURS = [side * PAIRS + pair for pair in range(PAIRS) for side in range(2)]
"""TRL's number of our sequence: it has all chosen ones first."""
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
same = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)

PLAIN = Layout(sequences_together=2)
# Packed rows, some of them padding, with one copy of each prompt.
HARDEST = Layout(
    sequences_together=2,
    pack_length=32,
    share_prompts=True,
    micro_batch_size=1,
    rows_multiple=2,
    most_sequences=2 * PAIRS + 4,
)


# Every loss is in one of them.
SOME = (
    ("dpo", "sigmoid and sft"),
    ("dpo", "hinge, ipo, robust and sft"),
    ("reward", "both"),
)


def make_batch(layout):
    prompts, episodes = [], []
    for sequence, pair in enumerate(np.repeat(range(PAIRS), 2)):
        count = LENGTHS[pair][sequence % 2]
        tokens = (100 + int(pair),) * PROMPT
        prompts.append(Prompt(id=sequence, content="", tokens=tokens, columns={}))
        turn = dataclasses.replace(
            Turn.observed("assistant", range(count), ""),
            response_mask=np.ones(count, bool),
        )
        episodes.append([Episode(prompt_id=sequence, sample=0, turns=(turn,))])
    nothing = np.zeros((2 * PAIRS, 1), np.float32)
    batch = make_rows(prompts, episodes, nothing, layout=layout)
    ref = looked_up(GIVEN["ref_logprobs"][OURS], batch)
    margins = GIVEN["margins"][batch.sequence_ids // 2]
    return dataclasses.replace(batch, ref_logprobs=ref, margins=margins)


def looked_up(table, rows):
    """The number of each token; a shared prompt is that of the first behind it."""
    ids = jnp.clip(rows.sequence_ids, 0, len(table) - 1)
    return table[ids, rows.positions] * (rows.sequence_ids >= 0)


def logprob_fn(params, rows):
    found = looked_up(params, rows) * rows.response_mask
    return Logprobs(found, jnp.zeros_like(found))


def value_fn(params, rows):
    """A score after the last token, and other numbers before it."""
    ids = jnp.clip(rows.sequence_ids, 0, len(params) - 1)
    last = jnp.array(LENGTHS).ravel() + PROMPT - 1
    found = jnp.where(rows.positions == last[ids], params[ids], 7.0 + rows.positions)
    return found * (rows.sequence_ids >= 0)


def turned(chosen_ratios, rejected_ratios):
    return rejected_ratios - chosen_ratios


OWN = {"own": ((turned,), (1.0,))}


def settings_of(case):
    losses, weights = (DPO | OWN).get(case, ((case,), (1.0,)))
    return DpoSettings(
        loss_type=tuple(losses),
        loss_weights=tuple(weights),
        beta=BETA,
        label_smoothing=SMOOTHING,
    )


EVERY = (
    *(("dpo", case) for case in (*DPO, *OWN)),
    *(("reward", case) for case in REWARDS),
)


# A program that runs once: compiling it well would take longer than it saves.
@functools.partial(
    jax.jit,
    static_argnames=("micro_batch_size", "cases"),
    compiler_options={"xla_backend_optimization_level": 0},
)
def gradients(batch, micro_batch_size=None, *, cases):
    """Gradient and metrics of each case."""
    sgd = optax.sgd(-1.0)  # so that what is added to the parameters is the gradient

    def of(objective, outputs_fn, params, batch):
        state = TrainState(params, sgd.init(params), jnp.int32(0))
        how = {"outputs_fn": outputs_fn, "micro_batch_size": micro_batch_size}
        after, metrics = update(state, batch, objective, sgd, **how)
        return after.params - params, metrics

    logprobs, scores = (jnp.array(GIVEN[k][OURS]) for k in ("logprobs", "scores"))
    found = {}
    for kind, case in cases:
        if kind == "dpo":
            objective = Dpo(settings_of(case))
            found[kind, case] = of(objective, logprob_fn, logprobs, batch)
            continue
        coefficient, has_margins = REWARDS[case]
        rows = batch if has_margins else dataclasses.replace(batch, margins=None)
        objective = BradleyTerry(coefficient or 0.0)
        found[kind, case] = of(objective, value_fn, scores, rows)
    return found


@functools.cache
def found_in(layout, cases=EVERY):
    batch = jax.device_put(make_batch(layout))
    return jax.device_get(gradients(batch, layout.micro_batch_size, cases=cases))


@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_loss_gradient_and_metrics_are_trls(kind):
    assert_trls(kind, GOLDEN)


def assert_trls(kind, golden):
    prefix = {"dpo": "", "reward": "rm/"}[kind]
    for case, wanted in golden[kind].items():
        gradient, metrics = found_in(PLAIN)[kind, case]
        close(gradient, np.array(wanted["gradient"])[OURS], err_msg=case)
        close(metrics[f"{'dpo' if kind == 'dpo' else 'rm'}/loss"], wanted["loss"])
        for name, value in wanted["metrics"].items():
            close(metrics[prefix + name], value, err_msg=f"{case} {name}")


def test_micro_batches_packing_and_padding_change_nothing():
    wanted = found_in(PLAIN)
    for case, (gradient, metrics) in found_in(HARDEST, SOME).items():
        same(gradient, wanted[case][0], err_msg=str(case))
        for name, value in metrics.items():
            same(value, wanted[case][1][name], err_msg=f"{case} {name}")


def test_each_loss_of_several_is_told():
    _, metrics = found_in(PLAIN)["dpo", "sigmoid and sft"]
    parts = metrics["dpo/sigmoid_loss"], metrics["dpo/sft_loss"]
    same(metrics["dpo/loss"], parts[0] + 0.5 * parts[1])
    _, metrics = found_in(PLAIN)["dpo", "sigmoid"]
    assert "dpo/sigmoid_loss" not in metrics


def test_losses_that_can_be_checked_by_hand():
    one, none = jnp.array([1.0]), jnp.array([0.0])
    assert preference.bradley_terry(one, one)[0] == pytest.approx(np.log(2))
    assert preference.bradley_terry(one, none, one)[0] == pytest.approx(np.log(2))
    assert preference.centring(one, one)[0] == 4.0
    assert preference.hinge(20 * one, none, beta=0.1)[0] == 0.0
    lengths = jnp.array([2]), jnp.array([1])
    assert preference.ipo(10 * one, none, *lengths, beta=0.1)[0] == 0.0
    loss = preference.sigmoid(one, none, beta=0.3)
    same(preference.robust(one, none, beta=0.3, label_smoothing=0.0), loss)


def test_every_loss_of_the_table_is_compared_with_trls():
    compared = {name for losses, _ in DPO.values() for name in losses}
    assert compared == {*PREFERENCE_LOSSES, preference.SFT}


def test_a_loss_of_ones_own():
    margin = GOLDEN["dpo"]["sigmoid"]["metrics"]["rewards/margins"] / BETA
    close(found_in(PLAIN)["dpo", "own"][1]["dpo/loss"], -margin)


@pytest.mark.parametrize(
    "kind, message",
    [
        ("sigmod", "did you mean 'sigmoid'"),
        (lambda logits: logits, "asks for 'logits'"),
        (lambda beta: jnp.zeros(3), "one number for each pair"),
    ],
)
def test_a_loss_that_does_not_fit(kind, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(gradients, make_batch(PLAIN), cases=(("dpo", kind),))


def test_settings_and_batches_that_do_not_fit():
    with pytest.raises(ValueError, match=r"loss_weights \[1.0\] has 1 numbers"):
        DpoSettings(loss_type=("sigmoid", "sft"))
    batch = dataclasses.replace(make_batch(PLAIN), ref_logprobs=None)
    with pytest.raises(ValueError, match="needs batch.ref_logprobs"):
        Dpo().read(batch)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_fresh_numbers_of_trl(kind):
    pytest.importorskip("trl")
    fresh = trl_preference.numbers()
    assert fresh["inputs"] == GOLDEN["inputs"]
    assert np.array(fresh["inputs"]["mask"]).shape == (2 * PAIRS, LENGTH)
    assert_trls(kind, fresh)
