"""Every loss, aggregation and correction: how a batch is laid out changes nothing.

One program evaluates all settings, so that a layout is compiled once.
"""

import dataclasses
import functools
import itertools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from toy_policy import logprob_fn, make_batch, make_state

from jaxrl_llm.algorithms import grpo, masked
from jaxrl_llm.algorithms.rollout_correction import Correction, Rejection
from jaxrl_llm.config.algorithm import LOSSES
from jaxrl_llm.data import packing
from jaxrl_llm.sharding import mesh

NUMBERS = {
    "clip_cov_ratio": 0.3,
    "clip_cov_lb": 0.0,
    "kl_cov_ratio": 0.2,
    "dro_beta": 0.1,
    "loss_scale_factor": 6.0,
    "entropy_coeff": 0.1,
    "kl_loss_coef": 0.5,
}
BOUNDS = {"k1": (0.3, 3.0), "k2": (None, 0.6), "k3": (None, 0.6)}
TOKEN_K1 = ("token_k1", (0.3, 3.0))
TOKEN = {"rollout_is": "token", "is_bounds": (None, 2.0)}
REJECTIONS = [(kind, BOUNDS[kind[-2:]]) for kind in get_args(Rejection)]
OTHERS = [
    None,
    Correction(**TOKEN),
    Correction(rollout_is="sequence", is_bounds=(None, 2.0)),
    Correction(rollout_is="token", is_bounds=(0.5, 2.0)),
    Correction(**TOKEN, rollout_is_batch_normalize=True),
    Correction(**TOKEN, rejections=(TOKEN_K1, ("seq_max_k2", (None, 2.0)))),
    Correction(bypass_mode=True, **TOKEN, rejections=(TOKEN_K1,)),
    Correction(
        bypass_mode=True,
        loss_type="reinforce",
        rollout_is="sequence",
        rollout_is_batch_normalize=True,
        rejections=(("seq_mean_k3", (None, 1.0)),),
    ),
]
CORRECTIONS = [*OTHERS, *(Correction(rejections=(one,)) for one in REJECTIONS)]
# Several rejections at once; the metrics tell what each rejects.
FEWER = [
    *OTHERS,
    *(Correction(rejections=tuple(REJECTIONS[i::4])) for i in range(4)),
]
MODES, MEANS = tuple(LOSSES), get_args(masked.Aggregation)


def settings(mode, mean, correction):
    return grpo.Settings(
        loss_mode=mode, loss_agg_mode=mean, correction=correction, **NUMBERS
    )


# Each loss, each aggregation and each correction at least once, in 12 settings.
SOME = tuple(
    settings(mode, mean, correction)
    for mode, mean, correction, _ in zip(
        itertools.cycle(MODES), itertools.cycle(MEANS), itertools.cycle(FEWER),
        range(max(len(MODES), len(FEWER))),
    )
)  # fmt: skip
ALL = tuple(itertools.starmap(settings, itertools.product(MODES, MEANS, CORRECTIONS)))
OFF_POLICY = make_batch()
PER_LOSS = tuple(settings(mode, "seq-mean-token-mean", None) for mode in MODES)


# Programs this large run once: compiling them well would take longer than it saves.
@functools.partial(
    jax.jit,
    static_argnames=("cases", "micro_batch_size"),
    compiler_options={"xla_backend_optimization_level": 0},
)
def gradients(batch, cases, micro_batch_size=None):
    """The gradient and the metrics under each of the settings."""
    optimizer = optax.sgd(
        -1.0
    )  # so that what is added to the parameters is the gradient
    state = make_state(optimizer)
    found = []
    for case in cases:
        case = dataclasses.replace(case, micro_batch_size=micro_batch_size)
        after, metrics = grpo.update(
            state, batch, logprob_fn=logprob_fn, optimizer=optimizer, settings=case
        )
        found.append((jax.tree.map(jnp.subtract, after.params, state.params), metrics))
    return found


def split(batch, devices=8):
    rows = NamedSharding(mesh.make({"data": devices}), P("data"))
    return jax.device_put(batch, rows)


HARDEST = "packed, another order, micro-batches"
SHARED = "laid out anew with shared prompts, another order, micro-batches"


def share(make):
    """Packed rows, laid out anew with one copy of each prompt."""
    layout = packing.Layout(pack_length=24, share_prompts=True)
    rows = jax.device_get(make(order=(2, 0, 1), pack_length=15))
    return packing.take(rows, range(rows.num_sequences), layout=layout)


LAYOUTS = {
    "micro-batches": (lambda make: make(), 2),
    HARDEST: (
        lambda make: make(order=(2, 0, 1), pack_length=15),
        1,
    ),
    SHARED: (share, 1),
    "eight devices": (lambda make: split(make(rows_multiple=8)), None),
}


def assert_same(found, wanted, cases):
    for (grad, metrics), (grad_wanted, metrics_wanted), case in zip(
        found, wanted, cases, strict=True
    ):
        label = f"{case.loss_mode} {case.loss_agg_mode} {case.correction}"
        for got, expected in zip(
            *map(jax.tree.leaves, (grad, grad_wanted)), strict=True
        ):
            scale = max(1.0, float(jnp.abs(expected).max()))
            np.testing.assert_allclose(got, expected, atol=1e-6 * scale, err_msg=label)
        for name, expected in metrics_wanted.items():
            # Exponentials of sums of log-ratios amplify rounding.
            loose = 1e-6 if name == "actor/loss" else 2e-5
            np.testing.assert_allclose(
                metrics[name],
                expected,
                rtol=loose,
                atol=loose,
                err_msg=f"{label} {name}",
            )


@functools.cache
def reference(cases, off_policy):
    return gradients(make_batch(off_policy=off_policy), cases)


@pytest.mark.parametrize(
    "layout",
    [
        SHARED,
        pytest.param(HARDEST, marks=pytest.mark.slow),
        pytest.param("eight devices", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "cases", [SOME[::2], pytest.param(SOME[1::2], marks=pytest.mark.slow)], ids=len
)
def test_some_of_everything_is_the_same_in_any_layout(layout, cases):
    arrange, micro_batch_size = LAYOUTS[layout]
    found = gradients(arrange(make_batch), cases, micro_batch_size)
    assert_same(found, reference(cases, True), cases)


def test_what_is_said_of_tokens_that_were_not_sampled_counts_nowhere():
    cases, rng = SOME[::2], np.random.default_rng(1)
    wanted = gradients(OFF_POLICY, cases)
    sampled = np.asarray(OFF_POLICY.response_mask)

    def elsewhere(x):
        return jnp.where(sampled, x, rng.uniform(-9, 9, x.shape).astype(np.float32))

    names = ("sampler_logprobs", "old_logprobs", "ref_logprobs", "advantages")
    changed = {name: elsewhere(getattr(OFF_POLICY, name)) for name in names}
    found = gradients(dataclasses.replace(OFF_POLICY, **changed), cases)
    for got, other in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        np.testing.assert_array_equal(got, other)
    # The words themselves do: what comes behind them was drawn by them.
    heard = np.asarray(OFF_POLICY.sequence_ids >= 0) & ~sampled
    heard &= ~np.asarray(OFF_POLICY.is_prompt)
    assert heard.sum() >= 5
    tokens = jnp.where(heard, (OFF_POLICY.tokens + 1) % 7, OFF_POLICY.tokens)
    found = gradients(dataclasses.replace(OFF_POLICY, tokens=tokens), cases)
    assert any(
        not np.allclose(got, other)
        for got, other in zip(*map(jax.tree.leaves, (found, wanted)), strict=True)
    )


@pytest.mark.slow
def test_without_old_logprobs_too():
    """The correction then needs the log-probabilities of all rows first."""
    cases = tuple(case for case in SOME if case.correction is not None)[::3]
    cases = tuple(dataclasses.replace(case, kl_loss_coef=0.0) for case in cases)
    make = functools.partial(make_batch, off_policy=False)
    arrange, micro_batch_size = LAYOUTS[HARDEST]
    found = gradients(arrange(make), cases, micro_batch_size)
    assert_same(found, reference(cases, False), cases)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_every_combination_is_the_same_in_any_layout(mode, layout):
    cases = tuple(case for case in ALL if case.loss_mode == mode)
    arrange, micro_batch_size = LAYOUTS[layout]
    found = gradients(arrange(make_batch), cases, micro_batch_size)
    assert_same(found, reference(cases, True), cases)


@pytest.mark.slow
def test_the_corrections_of_these_tests_do_something():
    """Otherwise that they change nothing would say nothing."""
    for case, (_, metrics) in zip(SOME, reference(SOME, True), strict=True):
        if case.correction and case.correction.rejections:
            share = metrics["rollout_corr/rollout_rs_masked_fraction"]
            assert 0 < share < 1, case.correction


def plain(batch, **fields):
    """Gradients and metrics of every loss, without entropy and KL."""
    bare = {"entropy_coeff": 0.0, "kl_loss_coef": 0.0} | fields
    cases = tuple(dataclasses.replace(case, **bare) for case in PER_LOSS)
    return zip(MODES, gradients(batch, cases), strict=True)


def own_logprobs(batch):
    return logprob_fn(make_state().params, batch).logprobs


ON_POLICY = make_batch(off_policy=False)


def test_on_policy_every_ratio_is_one():
    for mode, (_, metrics) in plain(ON_POLICY):
        assert metrics["actor/ppo_kl"] == 0, mode
        if mode != "clip_cov":  # which drops tokens by covariance
            assert metrics["actor/pg_clipfrac"] == 0, mode


# GMPO's advantage is the whole response's; the others push each token on its own.
def test_on_policy_every_loss_but_those_of_covariance_is_the_policy_gradient():
    expected = dict(plain(ON_POLICY))["gpg"][0]
    for mode, (grad, _) in plain(ON_POLICY):
        if mode in ("clip_cov", "kl_cov"):
            continue
        for got, wanted in zip(*map(jax.tree.leaves, (grad, expected)), strict=True):
            np.testing.assert_allclose(got, wanted, atol=2e-6, err_msg=mode)


def test_every_loss_makes_rewarded_tokens_likelier():
    before = own_logprobs(ON_POLICY)
    for mode, (grad, _) in plain(ON_POLICY):
        params = jax.tree.map(lambda p, g: p - 0.1 * g, make_state().params, grad)
        gain = logprob_fn(params, ON_POLICY).logprobs - before
        assert jnp.sum(ON_POLICY.advantages * gain) > 0.01, mode


EDGES = {
    "no response tokens": {
        "response_mask": jnp.zeros_like(OFF_POLICY.response_mask),
    },
    "all rewards equal": {"advantages": jnp.zeros_like(OFF_POLICY.advantages)},
    "log-ratios of 100": {
        "old_logprobs": OFF_POLICY.old_logprobs - 100.0 * OFF_POLICY.response_mask
    },
    "log-ratios of -100": {
        "old_logprobs": OFF_POLICY.old_logprobs + 100.0 * OFF_POLICY.response_mask
    },
    "a sampler 100 away": {
        "sampler_logprobs": OFF_POLICY.sampler_logprobs
        - 100.0 * OFF_POLICY.response_mask
    },
}


@pytest.mark.parametrize("edge", EDGES)
def test_at_the_edges_everything_stays_finite(edge):
    batch = dataclasses.replace(OFF_POLICY, **EDGES[edge])
    for case, found in zip(SOME, gradients(batch, SOME), strict=True):
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(found)), case
        assert found[1]["actor/update_skipped"] == 0


@pytest.mark.parametrize("edge", ["no response tokens", "all rewards equal"])
def test_nothing_to_learn_changes_nothing(edge):
    batch = dataclasses.replace(ON_POLICY, **EDGES[edge])
    for mode, (grad, _) in plain(batch):
        assert not any(np.any(x) for x in jax.tree.leaves(grad)), mode


def test_random_choices_differ_from_step_to_step():
    case = dataclasses.replace(
        settings("clip_cov", "token-mean", None), clip_cov_lb=-1e9, clip_cov_ub=1e9
    )
    scored = logprob_fn(make_state().params, OFF_POLICY)
    plan = jax.jit(grpo.plan, static_argnums=3)
    chosen = [plan(OFF_POLICY, scored, jnp.int32(i), case).chosen for i in (0, 1)]
    assert chosen[0].sum() == chosen[1].sum() == 5  # floor(0.3 * 17)
    assert jnp.any(chosen[0] != chosen[1])
