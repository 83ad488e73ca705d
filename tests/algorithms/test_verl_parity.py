"""The numbers of veRL 0.9.1: stored ones, and fresh ones where it is installed.

data/golden_verl_0.9.1.json was computed with the PyPI package verl 0.9.1 and torch:
every estimator, loss (with its gradient), KL kind, value loss and rollout correction on
one small batch. Its arrays are response-aligned, one response per row.

Where veRL is wrong we differ on purpose; those tests say so in their names.
"""

import functools
import json
import math
import pathlib
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.algorithms import (
    advantages,
    grpo,
    kl,
    logprobs,
    losses,
    masked,
    statistics,
)
from jaxrl_llm.algorithms.rollout_correction import Correction, Rejection, correct
from jaxrl_llm.data.rows import TrainBatch

GOLDEN = json.loads(
    (pathlib.Path(__file__).parents[1] / "golden/golden_verl_0.9.1.json").read_text()
)
INPUTS = {
    name: jnp.array(x, jnp.float32)
    for name, x in GOLDEN["inputs"].items()
    if name != "index"
}
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def rows_of(mask):
    """Sequence ids: the row's number up to its last response token, then padding."""
    mask = np.asarray(mask) > 0
    until = mask[:, ::-1].cumsum(axis=1)[:, ::-1] > 0
    return jnp.where(until, np.arange(len(mask))[:, None], -1).astype(jnp.int32)


MASK = INPUTS["mask"] > 0
IDS = rows_of(MASK)
B = len(MASK)
LENGTHS = MASK.sum(axis=1).reshape(2, 2)
REWARDS = jnp.where(MASK, INPUTS["token_level_rewards"], 0.0)
SCORES = REWARDS.sum(axis=1).reshape(2, 2)  # groups a, a, b, b
GROUPS = jnp.array([0, 0, 1, 1])


def per_token(estimate):
    """[P, G] at every response token."""
    return jnp.where(MASK, estimate.reshape(B, 1), 0.0)


def masked_out(x):
    """veRL leaves numbers where no response token is; nobody may use them."""
    return np.where(MASK, np.array(x), 0.0)


GAE = functools.partial(advantages.gae, REWARDS, INPUTS["values"], MASK, IDS)
OTB = (REWARDS, INPUTS["old_log_prob"], INPUTS["sum_pi_squared"], MASK, IDS)
POSITIONS = jnp.broadcast_to(jnp.arange(MASK.shape[1]), MASK.shape)
NO_PROMPT = jnp.zeros_like(MASK)
ESTIMATORS = {
    "gae g=1 lam=1": lambda: GAE(gamma=1.0, lam=1.0)[0],
    "gae g=.99 lam=.95": lambda: GAE(gamma=0.99, lam=0.95)[0],
    "grpo norm_std=True": lambda: advantages.grpo(SCORES, normalize_by_std=True),
    "grpo norm_std=False": lambda: advantages.grpo(SCORES, normalize_by_std=False),
    "grpo_passk": lambda: advantages.grpo_passk(SCORES, normalize_by_std=True),
    "reinforce_plus_plus g=.9": lambda: advantages.reinforce_plus_plus(
        REWARDS, MASK, IDS, gamma=0.9
    ),
    "reinforce_plus_plus_baseline": lambda: advantages.reinforce_plus_plus_baseline(
        SCORES, LENGTHS
    ),
    "rloo": lambda: advantages.rloo(SCORES),
    "opo": lambda: advantages.opo(SCORES, LENGTHS),
    "gpg": lambda: advantages.gpg(SCORES),
    "remax base=[.5,.5,.2,.2]": lambda: advantages.remax(
        REWARDS, jnp.array([0.5, 0.5, 0.2, 0.2]), MASK, IDS
    ),
    "gdpo (fallback: one reward)": lambda: advantages.gdpo(
        SCORES[None], jnp.ones(1), LENGTHS, normalize_by_std=True
    ),
    "optimal_token_baseline": lambda: advantages.optimal_token_baseline(
        *OTB, POSITIONS, NO_PROMPT, GROUPS
    ),
    "tir_optimal_token_baseline": lambda: advantages.tir_optimal_token_baseline(
        *OTB, GROUPS
    ),
}
ESTIMATORS["grpo_vectorized norm_std=True"] = ESTIMATORS["grpo norm_std=True"]
ESTIMATORS["grpo_vectorized norm_std=False"] = ESTIMATORS["grpo norm_std=False"]
ESTIMATORS["rloo_vectorized"] = ESTIMATORS["rloo"]
SINGLETON = "grpo singleton group"


def test_every_stored_estimate_is_compared():
    assert {*ESTIMATORS, SINGLETON} == GOLDEN["advantage"].keys()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_advantages(name):
    estimate = ESTIMATORS[name]()
    if estimate.shape == (2, 2):
        estimate = per_token(estimate)
    close(estimate, masked_out(GOLDEN["advantage"][name]["adv"]))
    assert not np.any(np.where(MASK, 0.0, estimate))


def test_a_group_of_one_gets_zero_where_verl_gives_its_reward():
    assert GOLDEN["advantage"][SINGLETON]["adv"][0][0] == 0.999999
    assert advantages.grpo(jnp.ones((1, 1)), normalize_by_std=True) == 0


@pytest.mark.parametrize("gamma, lam", [("1", "1"), (".99", ".95")])
def test_returns_of_gae(gamma, lam):
    stored = GOLDEN["advantage"][f"gae g={gamma} lam={lam}"]["ret"]
    close(GAE(gamma=float(gamma), lam=float(lam))[1], masked_out(stored))


@pytest.mark.parametrize(
    "name, gamma", [("reinforce_plus_plus g=.9", 0.9), ("remax base=[.5,.5,.2,.2]", 1)]
)
def test_returns(name, gamma):
    returns = advantages.discounted_returns(REWARDS, MASK, IDS, gamma=float(gamma))
    close(returns, masked_out(GOLDEN["advantage"][name]["ret"]))


def batch_of(inputs):
    """What an update gets, one response per row and no prompt."""
    mask = inputs["mask"] > 0
    return TrainBatch(
        tokens=jnp.zeros(mask.shape, jnp.int32),
        sequence_ids=rows_of(mask),
        positions=jnp.broadcast_to(jnp.arange(mask.shape[1]), mask.shape),
        is_prompt=jnp.zeros_like(mask),
        response_mask=mask,
        sampler_logprobs=inputs["rollout_log_prob"],
        advantages=inputs["advantages"],
        old_logprobs=inputs["old_log_prob"],
        num_sequences=len(mask),
        sequence_capacity=2,
    )


@functools.partial(jax.jit, static_argnames="settings")
def evaluate(batch, own, settings):
    """(loss, metrics), and the gradient in the log-probabilities."""

    def loss_fn(own):
        scored = logprobs.Logprobs(own, jnp.zeros_like(own))
        planned = grpo.plan(
            batch,
            jax.lax.stop_gradient(scored),
            jnp.int32(0),
            settings,
        )
        metrics = grpo.objective(batch, scored, planned, settings)
        return metrics["actor/pg_loss"], metrics

    return jax.value_and_grad(loss_fn, has_aux=True)(own)


WIDTH = MASK.shape[1]
TIS = Correction(rollout_is="token", is_bounds=(None, 2.0))
# veRL's bounds of token_k1 are those of sampler / trainer: hence the reciprocals.
REJECTED = (("token_k1", (1 / 1.6, 1 / 0.6)),)
BYPASS = functools.partial(
    Correction,
    bypass_mode=True,
    rollout_is="token",
    is_bounds=(None, 2.0),
    rejections=REJECTED,
)
SEQUENCE_MEAN = "seq-mean-token-mean"
LOSSES = {
    **{
        f"vanilla {mode}": {"loss_agg_mode": mode, "loss_scale_factor": float(WIDTH)}
        for mode in get_args(masked.Aggregation)
    },
    "vanilla clip_high=.28": {"clip_ratio_high": 0.28},
    # Whole batches on two devices: ours is the same without being told.
    "vanilla token-mean global(dp=2,ntok=24,gbs=8)": {},
    "vanilla seq-mean-token-mean global(dp=2,gbs=8)": {"loss_agg_mode": SEQUENCE_MEAN},
    "vanilla + token TIS C=2": {"correction": TIS},
    "gspo": {"loss_mode": "gspo"},
    "gspo agg=seq-mean-token-mean": {
        "loss_mode": "gspo",
        "loss_agg_mode": SEQUENCE_MEAN,
    },
    # veRL takes these two means whatever loss_agg_mode says.
    "sapo": {"loss_mode": "sapo", "loss_agg_mode": SEQUENCE_MEAN},
    "geo_mean": {"loss_mode": "geo_mean", "loss_agg_mode": SEQUENCE_MEAN},
    "gpg": {"loss_mode": "gpg"},
    "cispo": {"loss_mode": "cispo"},
    "dppo_tv": {"loss_mode": "dppo_tv"},
    "dppo_kl": {"loss_mode": "dppo_kl"},
    "dro beta=.05": {"loss_mode": "dro", "dro_beta": 0.05},
    "kl_cov ratio=.2 coef=.1": {"loss_mode": "kl_cov", "kl_cov_ratio": 0.2},
    "clip_cov ratio=1 lb=.05 ub=5 (deterministic: all eligible)": {
        "loss_mode": "clip_cov",
        "clip_cov_ratio": 1.0,
        "clip_cov_lb": 0.05,
    },
    "bypass_mode ppo_clip token IS C=2 + token_k1 0.6_1.6": {"correction": BYPASS()},
    "bypass_mode reinforce token IS C=2 + token_k1 0.6_1.6": {
        "correction": BYPASS(loss_type="reinforce")
    },
}


def test_every_stored_loss_is_compared():
    assert LOSSES.keys() == GOLDEN["policy_loss"].keys()


@pytest.mark.parametrize("name", LOSSES)
def test_policy_losses(name):
    stored, settings = GOLDEN["policy_loss"][name], grpo.Settings(**LOSSES[name])
    batch, own = batch_of(INPUTS), INPUTS["log_prob"]
    if name.startswith("bypass"):  # veRL was given them as the sampler's
        batch = batch_of(INPUTS | {"rollout_log_prob": INPUTS["old_log_prob"]})
    (loss, metrics), grad = evaluate(batch, own, settings)
    close(loss, stored["loss"])
    close(grad, stored["grad"])
    if settings.correction and settings.correction.bypass_mode:
        scored = logprobs.Logprobs(own, own)
        metrics |= statistics.values(grpo.correct(batch, scored, settings).metrics)
    for key, value in stored["metrics"].items():
        if (name.split()[0], key) == ("kl_cov", "actor/ppo_kl"):
            continue  # test_kl_cov_s_ppo_kl_is_signed_like_all_others
        close(metrics[key], value, err_msg=key)


def test_kl_cov_s_ppo_kl_is_signed_like_all_others_where_verl_takes_absolutes():
    stored = GOLDEN["policy_loss"]["kl_cov ratio=.2 coef=.1"]["metrics"]
    away = (INPUTS["old_log_prob"] - INPUTS["log_prob"])[MASK]
    close(jnp.abs(away).mean(), stored["actor/ppo_kl"])
    settings = grpo.Settings(loss_mode="kl_cov")
    (_, metrics), _ = evaluate(batch_of(INPUTS), INPUTS["log_prob"], settings)
    close(metrics["actor/ppo_kl"], away.mean())


KL_CASES = [name for name in GOLDEN["kl_penalty"] if "extreme" not in name]


@pytest.mark.parametrize("name", KL_CASES)
def test_kl_estimators(name):
    own, ref = INPUTS["log_prob"][:1], INPUTS["old_log_prob"][:1]
    estimate, pullback = jax.vjp(lambda x: kl.estimate(name, x, ref), own)
    close(estimate[0], GOLDEN["kl_penalty"][name]["row0"])
    (grad,) = pullback(jnp.ones_like(own))
    close(grad[0], GOLDEN["kl_penalty"][name]["grad0"])


def test_k3_far_away():
    (stored,) = set(GOLDEN["kl_penalty"]) - set(KL_CASES)
    assert stored == "k3 extreme (+30,-30)"
    far = jnp.array([[30.0, -30.0]])
    close(kl.k3(far, jnp.zeros((1, 2))), GOLDEN["kl_penalty"][stored])


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_value_loss(mode):
    stored = GOLDEN["value_loss"]
    returns = jnp.array(stored["returns"])
    known = (INPUTS["values"], returns)
    bound = {"cliprange_value": stored["cliprange_value"]}

    def loss_fn(values):
        weights = masked.weights(mode, MASK, IDS, B)
        return masked.weighted_sum(losses.value_loss(values, *known, **bound), weights)

    values = jnp.array(stored["vpreds"])
    loss, grad = jax.value_and_grad(loss_fn)(values)
    close(loss, stored[mode]["loss"])
    close(grad, stored[mode]["grad"])
    clipped = losses.is_value_clipped(values, *known, **bound)
    close(masked.token_mean(clipped.astype(float), MASK), stored[mode]["clipfrac"])


def test_adaptive_kl():
    (stored,) = [x for name, x in GOLDEN.items() if name.startswith("adaptive_kl")]
    coef = 0.2
    for current, expected in zip([3.0, 6.0, 9.0, 100.0], stored, strict=True):
        coef = kl.next_coef(
            "adaptive", coef, current, 256, target_kl=6.0, horizon=10000
        )
        close(coef, expected)


# The thresholds with which veRL 0.9.1 gives the stored numbers; they are not stored.
K1_BOUNDS = {"token": (0.8, 1.3), "seq_sum": (0.6, 1.5), "seq_mean": (0.9, 1.1)}
UPPER = {"token": 0.02, "seq_sum": 0.05, "seq_mean": 0.02, "seq_max": 0.1}


def stored_bounds(kind):
    over, _, estimator = kind.rpartition("_")
    if estimator != "k1":
        return None, UPPER[over]
    lower, upper = K1_BOUNDS[over]
    return 1 / upper, 1 / lower  # veRL's are of sampler / trainer


CORRECTIONS = {
    "token C=2": TIS,
    "sequence C=2": Correction(rollout_is="sequence", is_bounds=(None, 2.0)),
    "token icepop .8_1.3": Correction(rollout_is="token", is_bounds=(0.8, 1.3)),
    "token C=2 batchnorm": Correction(
        rollout_is="token", is_bounds=(None, 2.0), rollout_is_batch_normalize=True
    ),
} | {
    f"rs {kind}": Correction(rejections=((kind, stored_bounds(kind)),))
    for kind in get_args(Rejection)
}
ASYMMETRY = "asymmetry: ratios [1.5, 0.667] bounds 0.5_1.2 -> mask"


def test_every_stored_correction_is_compared():
    assert {*CORRECTIONS, ASYMMETRY} == GOLDEN["rollout_correction"].keys()


@pytest.mark.parametrize("name", CORRECTIONS)
def test_rollout_correction(name):
    stored = GOLDEN["rollout_correction"][name]
    found = correct(
        INPUTS["old_log_prob"],
        INPUTS["rollout_log_prob"],
        MASK,
        IDS,
        B,
        CORRECTIONS[name],
    )
    assert (found.weights is None) == (stored["weights"] is None)
    if found.weights is not None:
        close(found.weights, stored["weights"])
    np.testing.assert_array_equal(found.mask, np.array(stored["mask"]) > 0)
    assert found.metrics.keys() >= stored["metrics"].keys()
    for key, value in stored["metrics"].items():
        close(float(found.metrics[key]), value, err_msg=key)


def test_k1_bounds_are_those_of_trainer_over_sampler_where_verl_s_are_inverted():
    # Bounds 0.5 to 1.2: 1.5 is too much and 0.667 is not; veRL keeps 1.5.
    assert GOLDEN["rollout_correction"][ASYMMETRY] == [[1.0, 0.0]]
    ratios, mask = jnp.array([[1.5, 0.667]]), jnp.ones((1, 2), bool)
    kept = {}
    for bounds in [(0.5, 1.2), (1 / 1.2, 1 / 0.5)]:
        kept[bounds] = correct(
            jnp.log(ratios),
            jnp.zeros((1, 2)),
            mask,
            jnp.zeros((1, 2), jnp.int32),
            1,
            Correction(rejections=(("token_k1", bounds),)),
        ).mask.tolist()
    assert kept == {(0.5, 1.2): [[False, True]], (1 / 1.2, 2.0): [[True, False]]}


def test_the_metrics_are_all_finite_where_verl_s_overflow():
    far = jnp.array([[100.0, -100.0]])
    settings = Correction(
        rollout_is="sequence", rejections=(("seq_sum_k1", (0.5, 2.0)),)
    )
    one = (jnp.ones((1, 2), bool), jnp.zeros((1, 2), jnp.int32), 1)
    found = correct(far, jnp.zeros((1, 2)), *one, settings)
    assert all(math.isfinite(x) for x in found.metrics.values())


# Fresh numbers, where torch and veRL are:
#   pip install --no-deps verl==0.9.1
#   pip install torch ray tensordict omegaconf hydra-core codetiming torchdata


def draw(seed, observations=True):
    """A batch like the stored one: 12 responses of up to 9 tokens, 3 prompts."""
    rng = np.random.default_rng(seed)
    shape = (12, 9)
    mask = np.arange(9) < rng.integers(1, 10, (12, 1))
    if observations:  # anywhere in a response but at its end
        inner = mask & np.roll(mask, -1, axis=1)
        inner[:, -1] = False
        mask &= ~(inner & (rng.random(shape) < 0.2))
    last = np.argmax(np.where(mask, np.arange(9), -1), axis=1)
    rewards = np.zeros(shape)
    rewards[np.arange(12), last] = rng.choice([0.0, 0.5, 1.0, 2.0], 12)
    old = -rng.exponential(1.0, shape)
    arrays = {
        "mask": mask,
        "token_level_rewards": rewards,
        "values": rng.normal(size=shape),
        "old_log_prob": old,
        "log_prob": np.minimum(old + 0.3 * rng.normal(size=shape), -1e-3),
        "rollout_log_prob": np.minimum(old + 0.3 * rng.normal(size=shape), -1e-3),
        "sum_pi_squared": rng.uniform(0.1, 1, shape),
        "advantages": np.repeat(rng.normal(size=(12, 1)), 9, axis=1),
        "returns": rng.normal(size=shape),
    }
    return {name: np.where(mask, x, 0).astype(np.float32) for name, x in arrays.items()}


@pytest.fixture(scope="module")
def verl():
    """veRL's two modules, or a skip."""
    pytest.importorskip("torch")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        algos = pytest.importorskip("verl.trainer.ppo.core_algos", exc_type=ImportError)
        from verl.trainer.ppo import rollout_corr_helper
    return algos, rollout_corr_helper


fresh = pytest.mark.parametrize("seed", range(10))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@fresh
def test_fresh_advantages(verl, seed):
    import torch

    algos, _ = verl
    drawn = draw(seed)
    t = {name: torch.from_numpy(x) for name, x in drawn.items()}
    j = {name: jnp.asarray(x) for name, x in drawn.items()}
    mask, ids = drawn["mask"] > 0, rows_of(drawn["mask"])
    scores = j["token_level_rewards"].sum(axis=1).reshape(3, 4)
    lengths = jnp.asarray(mask.sum(axis=1)).reshape(3, 4)
    index = np.repeat(np.array(["a", "b", "c"], object), 4)
    groups = jnp.repeat(jnp.arange(3), 4)
    positions = jnp.broadcast_to(jnp.arange(9), mask.shape)
    behind = positions, jnp.zeros(mask.shape, bool)
    rows = (j["token_level_rewards"], jnp.asarray(mask), ids)
    otb = (rows[0], j["old_log_prob"], j["sum_pi_squared"], *rows[1:])
    known = (t["token_level_rewards"], t["mask"])
    grouped = {"index": index}
    discount = algos.AlgoConfig(gamma=0.9)
    baselines = np.linspace(0, 1, 12, dtype=np.float32)
    tensors = {k: t[v] for k, v in [("old_log_probs", "old_log_prob"),
                                    ("sum_pi_squared", "sum_pi_squared")]}  # fmt: skip
    weights = torch.from_numpy(np.where(mask, 1.5 - 0.1 * drawn["values"], 0.0)).float()
    weighted = {**grouped, **tensors, "rollout_is_weights": weights}
    correction = jnp.asarray(weights.numpy())
    passk = algos.AlgoConfig(norm_adv_by_std_in_grpo=True)
    pairs = [
        (
            algos.compute_gae_advantage_return(
                known[0], t["values"], known[1], 0.95, 0.9
            ),
            advantages.gae(rows[0], j["values"], *rows[1:], gamma=0.95, lam=0.9)[0],
        ),
        *(
            (
                algos.compute_grpo_outcome_advantage(
                    *known, index, norm_adv_by_std_in_grpo=norm
                ),
                advantages.grpo(scores, normalize_by_std=norm),
            )
            for norm in (True, False)
        ),
        (
            algos.compute_grpo_passk_outcome_advantage(*known, index, config=passk),
            advantages.grpo_passk(scores, normalize_by_std=True),
        ),
        (
            algos.compute_rloo_outcome_advantage(*known, index),
            advantages.rloo(scores),
        ),
        (
            algos.compute_opo_outcome_advantage(*known, index),
            advantages.opo(scores, lengths),
        ),
        (algos.compute_gpg_outcome_advantage(*known, index), advantages.gpg(scores)),
        (
            algos.compute_gdpo_outcome_advantage(*known, index),
            advantages.gdpo(scores[None], jnp.ones(1), lengths, normalize_by_std=True),
        ),
        (
            algos.compute_reinforce_plus_plus_baseline_outcome_advantage(*known, index),
            advantages.reinforce_plus_plus_baseline(scores, lengths),
        ),
        (
            algos.compute_reinforce_plus_plus_outcome_advantage(
                *known, config=discount
            ),
            advantages.reinforce_plus_plus(*rows, gamma=0.9),
        ),
        (
            algos.compute_remax_outcome_advantage(
                known[0], torch.from_numpy(baselines), known[1]
            ),
            advantages.remax(rows[0], jnp.asarray(baselines), *rows[1:]),
        ),
        (
            algos.compute_optimal_token_baseline_advantage(
                *known, **grouped, **tensors
            ),
            advantages.optimal_token_baseline(*otb, *behind, groups),
        ),
        (
            algos.compute_optimal_token_baseline_advantage(*known, **weighted),
            advantages.optimal_token_baseline(
                *otb, *behind, groups, correction=correction
            ),
        ),
        (
            algos.compute_multi_turn_optimal_token_baseline_advantage(
                *known, **weighted
            ),
            advantages.tir_optimal_token_baseline(*otb, groups, correction=correction),
        ),
    ]
    for (theirs, _), ours in pairs:
        if ours.shape == (3, 4):
            ours = np.where(mask, ours.reshape(12, 1), 0.0)
        np.testing.assert_allclose(
            ours, np.where(mask, theirs.numpy(), 0.0), rtol=1e-5, atol=2e-5
        )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@fresh
def test_fresh_policy_losses(verl, seed):
    import torch
    from verl.workers.config import ActorConfig, PolicyLossConfig

    algos, _ = verl
    drawn = draw(seed)
    batch = batch_of({name: jnp.asarray(x) for name, x in drawn.items()})
    cases = [
        (mode, mean, {}, {})
        for mode in ("vanilla", "gspo", "gpg", "cispo", "dppo_tv", "dppo_kl")
        for mean in get_args(masked.Aggregation)
    ] + [
        ("sapo", SEQUENCE_MEAN, {}, {}),
        ("geo_mean", SEQUENCE_MEAN, {}, {}),
        ("dro", "token-mean", {}, {"dro_beta": 0.3}),
        ("kl_cov", "token-mean", {}, {"kl_cov_ratio": 0.2, "ppo_kl_coef": 0.5}),
        ("clip_cov", "token-mean", {}, {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.05}),
        ("vanilla", "token-mean", {"clip_ratio_c": 1.1, "clip_ratio_high": 0.3}, {}),
        ("dppo_tv", "token-mean", {"clip_ratio_c": 1.2, "clip_ratio_low": 0.05}, {}),
        ("dppo_kl", "token-mean", {"clip_ratio_high": 0.01, "clip_ratio_low": 0.1}, {}),
    ]  # fmt: skip
    for mode, mean, fields, numbers in cases:
        for importance in (None, TIS):
            weights = None
            if importance is not None:
                clamped = np.exp(drawn["old_log_prob"] - drawn["rollout_log_prob"])
                clamped = np.minimum(clamped, 2.0) * drawn["mask"]
                weights = torch.from_numpy(clamped.astype(np.float32))
            own = torch.from_numpy(drawn["log_prob"]).requires_grad_()
            config = ActorConfig(
                strategy="fsdp",
                rollout_n=1,
                ppo_micro_batch_size_per_gpu=1,
                policy_loss=PolicyLossConfig(loss_mode=mode, **numbers),
                **{"clip_ratio_low": 0.2, "clip_ratio_high": 0.2} | fields,
            )
            loss, metrics = algos.get_policy_loss_fn(mode)(
                torch.from_numpy(drawn["old_log_prob"]),
                own,
                torch.from_numpy(drawn["advantages"]),
                torch.from_numpy(drawn["mask"]),
                loss_agg_mode=mean,
                config=config,
                rollout_is_weights=weights,
            )
            loss.backward()
            settings = grpo.Settings(
                loss_mode=mode,
                loss_agg_mode=mean,
                loss_scale_factor=9.0,
                correction=importance,
                **fields,
                **numbers,
            )
            (ours, found), grad = evaluate(
                batch, jnp.asarray(drawn["log_prob"]), settings
            )
            message = f"{mode} {mean} {importance}"
            close(ours, loss.item(), err_msg=message)
            close(grad, own.grad.numpy() * drawn["mask"], err_msg=message)
            for name, value in metrics.items():
                if (mode, name) != ("kl_cov", "actor/ppo_kl"):
                    close(found[name], value, err_msg=f"{message} {name}")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@fresh
def test_fresh_kl_and_value_losses(verl, seed):
    import torch

    algos, _ = verl
    drawn = draw(seed)
    t = {name: torch.from_numpy(x) for name, x in drawn.items()}
    j = {name: jnp.asarray(x) for name, x in drawn.items()}
    for kind in get_args(kl.Estimator):
        own = t["log_prob"].clone().requires_grad_()
        theirs = algos.kl_penalty(own, t["old_log_prob"], kind)
        theirs.sum().backward()
        ours, pullback = jax.vjp(
            lambda x, kind=kind: kl.estimate(kind, x, j["old_log_prob"]), j["log_prob"]
        )
        close(ours, theirs.detach().numpy(), err_msg=kind)
        close(pullback(jnp.ones_like(ours))[0], own.grad.numpy(), err_msg=kind)
    mask = drawn["mask"] > 0
    for mode in get_args(masked.Aggregation):
        values = t["log_prob"].clone().requires_grad_()
        loss, clipped = algos.compute_value_loss(
            values, t["returns"], t["values"], t["mask"], 0.5, mode
        )
        loss.backward()

        def ours_of(values, mode=mode):
            weights = masked.weights(mode, jnp.asarray(mask), rows_of(mask), 12, 9.0)
            known = (j["values"], j["returns"])
            each = losses.value_loss(values, *known, cliprange_value=0.5)
            return masked.weighted_sum(each, weights)

        ours, grad = jax.value_and_grad(ours_of)(j["log_prob"])
        close(ours, loss.item(), err_msg=mode)
        close(grad, values.grad.numpy(), err_msg=mode)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@fresh
def test_fresh_rollout_corrections(verl, seed):
    import torch

    _, helper = verl
    drawn = draw(seed)
    mask, ids = jnp.asarray(drawn["mask"] > 0), rows_of(drawn["mask"])
    kinds = get_args(Rejection)
    cases = [
        ({"rollout_is": level, "rollout_is_threshold": text,
          "rollout_is_batch_normalize": normalize},
         Correction(rollout_is=level, is_bounds=bounds,
                    rollout_is_batch_normalize=normalize))
        for level in ("token", "sequence")
        for text, bounds in [(1.2, (None, 1.2)), ("0.7_1.3", (0.7, 1.3))]
        for normalize in (False, True)
    ] + [
        ({"rollout_rs": kind, "rollout_rs_threshold": "0.8_1.1"},
         Correction(rejections=((kind, (1 / 1.1, 1 / 0.8)),)))
        for kind in kinds if kind.endswith("k1")
    ] + [
        ({"rollout_rs": kind, "rollout_rs_threshold": 0.05},
         Correction(rejections=((kind, (None, 0.05)),)))
        for kind in kinds if not kind.endswith("k1")
    ] + [
        ({"rollout_rs": "token_k1,seq_max_k3", "rollout_rs_threshold": "0.8_1.1,0.3"},
         Correction(rejections=(("token_k1", (1 / 1.1, 1 / 0.8)),
                                ("seq_max_k3", (None, 0.3))))),
    ]  # fmt: skip
    for theirs, ours in cases:
        weights, kept, metrics = helper.compute_rollout_correction_and_rejection_mask(
            torch.from_numpy(drawn["old_log_prob"]),
            torch.from_numpy(drawn["rollout_log_prob"]),
            torch.from_numpy(drawn["mask"]),
            **theirs,
        )
        found = correct(
            jnp.asarray(drawn["old_log_prob"]),
            jnp.asarray(drawn["rollout_log_prob"]),
            mask,
            ids,
            12,
            ours,
        )
        np.testing.assert_array_equal(found.mask, kept.numpy() > 0, err_msg=str(theirs))
        if weights is not None:
            close(found.weights, weights.batch["rollout_is_weights"].numpy())
        for name, value in metrics.items():
            np.testing.assert_allclose(
                float(found.metrics[name]),
                value,
                rtol=1e-5,
                atol=3e-5,
                err_msg=f"{theirs} {name}",
            )
