"""Correcting for tokens that were sampled from another distribution than the trainer's.

An engine with other kernels or older weights gives a token a slightly different
probability than the trainer does. Two remedies, which combine:

    importance weights  multiply a token's loss by trainer / sampler probability
    rejection           leave tokens or responses out where the two are too far apart

`correct` applies both and measures the mismatch. All of it is over whole mini-batches.

log_ratio is trainer - sampler log-probability of a token. Everything that is
exponentiated is clamped to +-20 first.

Source: veRL 0.9.1, rollout_corr_helper.py, which gives the metrics their names.

Shapes: R = rows, T = tokens in a row; S = sequences, which may share rows.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.algorithms import masked, statistics
from jaxrl_llm.algorithms.statistics import (
    Derived,
    Largest,
    Least,
    Mean,
    Moments,
    Statistic,
    Statistics,
)

Level = Literal["token", "sequence"]
Rejection = Literal[
    "token_k1", "token_k2", "token_k3",
    "seq_sum_k1", "seq_sum_k2", "seq_sum_k3",
    "seq_mean_k1", "seq_mean_k2", "seq_mean_k3",
    "seq_max_k2", "seq_max_k3",
]  # fmt: skip
Bounds = tuple[float | None, float]

_BOUND = 20.0


@dataclass(frozen=True, kw_only=True)
class Correction:
    """What is corrected, and how. All off: the mismatch is only measured."""

    rollout_is: Level | None = None
    """Importance weights of single tokens, or of whole responses (their product)."""
    is_bounds: Bounds = (None, 2.0)
    """(None, upper): larger weights are cut down to `upper` (truncated importance
    sampling). (lower, upper): weights outside become 0 (IcePop)."""
    rollout_is_batch_normalize: bool = False
    """Divide the weights by their mean."""
    rejections: tuple[tuple[Rejection, Bounds], ...] = ()
    """All of them must let a token pass; see `keep`."""
    bypass_mode: bool = False
    """Two policies: the trust region is centred on the sampler's log-probabilities, and
    the trainer's policy is the one being trained. Otherwise three: the trainer's is the
    one before the step, which the trust region is centred on."""
    loss_type: Literal["ppo_clip", "reinforce"] = "ppo_clip"
    """bypass_mode only. ppo_clip: the clipped ratio itself corrects, so importance
    weights are only measured. reinforce: policy gradient with the weights."""

    @property
    def weighs(self) -> bool:
        """Whether importance weights enter the loss."""
        used = not self.bypass_mode or self.is_policy_gradient
        return self.rollout_is is not None and used

    @property
    def is_policy_gradient(self) -> bool:
        """Whether the plain policy gradient takes the place of the run's loss."""
        return self.bypass_mode and self.loss_type != "ppo_clip"


class Sequences(NamedTuple):
    """Where the tokens of each sequence are."""

    mask: Bool[Array, "R T"]
    """Response tokens."""
    ids: Int[Array, "R T"]
    num: int

    def sum(self, x: Float[Array, "R T"]) -> Float[Array, " S"]:
        """Over each sequence."""
        return masked.sequence_sum(x, self.mask, self.ids, self.num)

    def mean(self, x: Float[Array, "R T"]) -> Float[Array, " S"]:
        """Over each sequence; 0 for one without tokens."""
        return masked.sequence_means(x, self.mask, self.ids, self.num)

    def max(self, x: Float[Array, "R T"]) -> Float[Array, " S"]:
        """Over each sequence, of numbers that are not negative."""
        least = jnp.where(self.mask, x, 0.0)
        found = jax.ops.segment_max(least.ravel(), self.ids.ravel(), self.num)
        return jnp.maximum(found, 0.0)

    def spread(self, x: Float[Array, " S"]) -> Float[Array, "R T"]:
        """Every response token gets the number of its sequence; others 0."""
        return jnp.where(self.mask, x[self.ids], 0.0)

    def nonempty(self) -> Bool[Array, " S"]:
        """Which have response tokens."""
        return self.sum(jnp.ones(self.mask.shape)) > 0


class Corrected(NamedTuple):
    """What `correct` finds."""

    weights: Float[Array, "R T"] | None
    """Weight of each response token's loss, 0 elsewhere; None: not asked for."""
    mask: Bool[Array, "R T"]
    """Response tokens that were not rejected."""
    metrics: Statistics


def correct(
    logprobs: Float[Array, "R T"],
    sampler_logprobs: Float[Array, "R T"],
    mask: Bool[Array, "R T"],
    sequence_ids: Int[Array, "R T"],
    num_sequences: int,
    settings: Correction,
) -> Corrected:
    """Weights, rejection and metrics (`rollout_corr/...`) of a mini-batch.

    Args:
      logprobs: under the trainer's policy; see `Correction.bypass_mode`. Not
        differentiated, and nor is anything else here.
    """
    logprobs = jnp.where(mask, jax.lax.stop_gradient(logprobs), 0.0)
    sampler_logprobs = jnp.where(mask, sampler_logprobs, 0.0)
    sequences = Sequences(mask, sequence_ids, num_sequences)
    log_ratio = logprobs - sampler_logprobs
    found, weights, kept = (
        mismatch_metrics(logprobs, sampler_logprobs, sequences),
        None,
        mask,
    )
    if settings.rollout_is is not None:
        raw = raw_weights(log_ratio, sequences, settings.rollout_is)
        weights = bound(raw, settings.is_bounds)
        found |= weight_metrics(
            weights, raw, log_ratio, sequences, settings.rollout_is, settings.is_bounds
        )
        if settings.rollout_is_batch_normalize:
            mean = mean_weight(weights, sequences, settings.rollout_is)
            found["rollout_is_batch_norm_factor"] = Mean(
                mean, _num_counted(sequences, settings.rollout_is)
            )
            weights = weights / mean
    for kind, bounds in settings.rejections:
        passes = keep(kind, log_ratio, sequences, bounds)
        found |= rejection_metrics(kind, log_ratio, sequences, bounds, passes)
        kept = kept & passes
    if settings.rejections:
        found |= _masked_fractions("rollout_rs", kept, sequences)
    return Corrected(weights, kept, {f"rollout_corr/{k}": v for k, v in found.items()})


def raw_weights(
    log_ratio: Float[Array, "R T"], sequences: Sequences, level: Level
) -> Float[Array, "R T"]:
    """Trainer / sampler probability of each token, or of its whole response.

    token: little variance, biased. sequence: unbiased, much variance.
    """
    if level == "sequence":
        log_ratio = sequences.spread(sequences.sum(log_ratio))
    return jnp.where(sequences.mask, _exp(log_ratio), 0.0)


def bound(weights: Float[Array, "R T"], bounds: Bounds) -> Float[Array, "R T"]:
    """Truncated importance sampling without a lower bound, IcePop with one.

        min(weights, upper)   or   weights where lower <= weights <= upper, else 0

    Source: fengyao.notion.site/off-policy-rl (truncation); Ring-1T, 2025
    (arXiv:2510.18855) (IcePop).
    """
    lower, upper = bounds
    if lower is None:
        return jnp.minimum(weights, upper)
    return jnp.where((weights >= lower) & (weights <= upper), weights, 0.0)


def mean_weight(
    weights: Float[Array, "R T"], sequences: Sequences, level: Level
) -> Float[Array, ""]:
    """Over tokens, or over sequences that have any; 1 if all weights are 0."""
    if level == "token":
        mean = masked.token_mean(weights, sequences.mask)
    else:
        mean = _mean(sequences.mean(weights), sequences.nonempty())
    return jnp.where(mean > 1e-8, mean, 1.0)


def _num_counted(sequences: Sequences, level: Level) -> Int[Array, ""]:
    """What `mean_weight` is over."""
    return jnp.sum(sequences.mask if level == "token" else sequences.nonempty())


def keep(
    kind: Rejection,
    log_ratio: Float[Array, "R T"],
    sequences: Sequences,
    bounds: Bounds,
) -> Bool[Array, "R T"]:
    """Which response tokens the rejection of that name lets pass.

    k1 kinds keep tokens (token_k1) or responses whose ratio lies within the bounds:
    lower <= exp(log_ratio) <= upper, of a response the product (seq_sum_k1) or the
    geometric mean (seq_mean_k1) of its tokens' ratios. (veRL bounds sampler / trainer
    instead: its `lower_upper` is our (1 / upper, 1 / lower).)

    k2 and k3 kinds keep those whose divergence is at most `upper`: log_ratio^2 / 2, or
    exp(log_ratio) - 1 - log_ratio, of a response the sum, mean or maximum.
    """
    lower, upper = _thresholds(kind, bounds)
    statistic = _statistic(kind, log_ratio, sequences)
    return sequences.mask & (statistic >= lower) & (statistic <= upper)


def _thresholds(kind, bounds):
    """Bounds of `_statistic`, whose k1 is the logarithm of sampler / trainer."""
    lower, upper = bounds
    if kind.endswith("k1"):
        if lower is None:
            raise ValueError(f"{kind} needs a lower and an upper bound, got {bounds}")
        return -math.log(upper), -math.log(lower)
    return -math.inf, upper


def _statistic(kind, log_ratio, sequences):
    """What a rejection looks at, per response token."""
    over, _, name = kind.rpartition("_")
    x = jnp.clip(log_ratio, -_BOUND, _BOUND)
    match name:
        case "k1":
            per_token = -x
        case "k2":
            per_token = 0.5 * jnp.square(x)
        case "k3":
            per_token = jnp.expm1(x) - x
        case _:
            known = ", ".join(get_args(Rejection))
            raise ValueError(f"rollout_rs has {kind!r}; known: {known}")
    match over:
        case "seq_sum":
            return sequences.spread(sequences.sum(per_token))
        case "seq_mean":
            return sequences.spread(sequences.mean(per_token))
        case "seq_max":
            return sequences.spread(sequences.max(per_token))
    return jnp.where(sequences.mask, per_token, 0.0)


def mismatch_metrics(
    logprobs: Float[Array, "R T"],
    sampler_logprobs: Float[Array, "R T"],
    sequences: Sequences,
) -> Statistics:
    """How far apart the two policies are. kl and k3_kl are KL(sampler || trainer)."""
    log_ratio = logprobs - sampler_logprobs
    some = sequences.nonempty()
    ours, theirs = sequences.mean(-logprobs), sequences.mean(-sampler_logprobs)
    difference = ours - theirs
    x = jnp.clip(log_ratio, -_BOUND, _BOUND)
    return {
        "training_ppl": _share(_exp(ours), some),
        "training_log_ppl": _share(ours, some),
        "rollout_ppl": _share(_exp(theirs), some),
        "rollout_log_ppl": _share(theirs, some),
        "kl": _of_tokens(-log_ratio, sequences.mask),
        "k3_kl": _of_tokens(jnp.expm1(x) - x, sequences.mask),
        "log_ppl_diff": _share(difference, some),
        "log_ppl_abs_diff": _share(jnp.abs(difference), some),
        **_extremes("log_ppl_diff", difference, some),
        "ppl_ratio": _share(_exp(difference), some),
        "chi2_token": Mean(
            masked.token_mean(jnp.exp(2.0 * x), sequences.mask) - 1.0,
            jnp.sum(sequences.mask),
        ),
        "chi2_seq": Mean(
            _mean(jnp.square(_exp(sequences.sum(log_ratio))), some) - 1.0,
            jnp.sum(some),
        ),
    }


def weight_metrics(
    weights: Float[Array, "R T"],
    raw: Float[Array, "R T"],
    log_ratio: Float[Array, "R T"],
    sequences: Sequences,
    level: Level,
    bounds: Bounds,
) -> Statistics:
    """Metrics of importance weights after `bound`; fractions out of bounds are before
    it."""
    mask, some = sequences.mask, sequences.nonempty()
    icepop, upper = bounds[0] is not None, bounds[1]
    lower = bounds[0] if icepop else 1.0 / upper
    mean = masked.token_mean(weights, mask)
    square = masked.token_mean(jnp.square(weights), mask)
    variance, tokens = jnp.maximum(square - jnp.square(mean), 0.0), jnp.sum(mask)
    moments = (Moments(mean, variance, tokens),)
    per_sequence, raw_per_sequence = sequences.mean(weights), sequences.mean(raw)
    if level == "sequence":
        totals = sequences.sum(log_ratio)
        most, least = _exp(_max(totals, some)), _exp(-_max(-totals, some))
        high = _share(totals > math.log(upper), some)
        low = _share(totals < math.log(lower), some)
    else:
        most, least = _max(weights, mask), -_max(-weights, mask)
        high, low = _share(raw > upper, mask), _share(raw < lower, mask)
    found = {
        "rollout_is_mean": Mean(mean, tokens),
        "rollout_is_max": Largest(most, tokens),
        "rollout_is_min": Least(least, tokens),
        "rollout_is_std": Derived(jnp.sqrt(variance), moments, statistics.deviation),
        "rollout_is_eff_sample_size": Derived(
            jnp.square(mean) / jnp.maximum(square, 1e-20),
            moments,
            statistics.effective_share,
        ),
        "rollout_is_ratio_fraction_high": high,
        "rollout_is_ratio_fraction_low": low,
        **_sequence_metrics("rollout_is_seq", per_sequence, some),
        "rollout_is_seq_max_deviation": _largest(jnp.abs(per_sequence - 1.0), some),
        "rollout_is_seq_fraction_high": _share(raw_per_sequence > upper, some),
        "rollout_is_seq_fraction_low": _share(raw_per_sequence < lower, some),
    }
    if icepop:
        found["rollout_is_oob_ratio"] = _share((raw < lower) | (raw > upper), mask)
    return found


def rejection_metrics(
    kind: Rejection,
    log_ratio: Float[Array, "R T"],
    sequences: Sequences,
    bounds: Bounds,
    passes: Bool[Array, "R T"],
) -> Statistics:
    """Metrics of what one rejection looks at, and how much of it does not pass.

    The statistic of k1 kinds is the logarithm of sampler / trainer, as in veRL.
    """
    lower, upper = _thresholds(kind, bounds)
    statistic = _statistic(kind, log_ratio, sequences)
    mask, some = sequences.mask, sequences.nonempty()
    per_sequence = sequences.mean(statistic)
    values, where = (
        (statistic, mask) if kind.startswith("token") else (per_sequence, some)
    )
    cut = jnp.clip(statistic, lower if kind.endswith("k1") else 0.0, upper)
    mean = masked.token_mean(cut, mask)
    variance = masked.token_mean(jnp.square(cut), mask) - jnp.square(mean)
    variance = jnp.maximum(variance, 0.0)
    found = {
        "mean": _of_tokens(statistic, mask),
        **_extremes("", values, where),
        "fraction_high": _share(values > upper, where),
        "fraction_low": _share(values < lower, where),
        "std": Derived(
            jnp.sqrt(variance),
            (Moments(mean, variance, jnp.sum(mask)),),
            statistics.deviation,
        ),
        **_sequence_metrics("seq", per_sequence, some),
        "seq_max_deviation": _largest(jnp.abs(per_sequence), some),
        "seq_fraction_high": _share(per_sequence > upper, some),
        **_masked_fractions("", passes, sequences),
    }
    if kind.endswith("k1"):
        found["seq_fraction_low"] = _share(per_sequence < lower, some)
    return {f"rollout_rs_{kind}_{k.lstrip('_')}": v for k, v in found.items()}


def _sequence_metrics(prefix, x, some):
    mean = _mean(x, some)
    squares = jnp.sum(jnp.where(some, jnp.square(x - mean), 0.0))
    count = jnp.sum(some)
    return {
        f"{prefix}_mean": Mean(mean, count),
        f"{prefix}_std": Derived(
            jnp.sqrt(squares / jnp.maximum(count - 1, 1)),
            (Moments(mean, squares / jnp.maximum(count, 1), count),),
            statistics.sample_deviation,
        ),
        **_extremes(prefix, x, some),
    }


def _masked_fractions(prefix, passes, sequences):
    rejected = sequences.mask & ~passes
    hit = sequences.sum(rejected.astype(jnp.float32)) > 0
    return {
        f"{prefix}_masked_fraction": _share(rejected, sequences.mask),
        f"{prefix}_seq_masked_fraction": _share(hit, sequences.nonempty()),
    }


def _of_tokens(x, mask) -> Statistic:
    return Mean(masked.token_mean(x, mask), jnp.sum(mask))


def _share(x, where) -> Statistic:
    return Mean(_mean(x, where), jnp.sum(where))


def _largest(x, where) -> Statistic:
    return Largest(_max(x, where), jnp.sum(where))


def _extremes(prefix, x, where) -> Statistics:
    least = Least(-_max(-x, where), jnp.sum(where))
    return {f"{prefix}_max": _largest(x, where), f"{prefix}_min": least}


def _exp(x):
    return jnp.exp(jnp.clip(x, -_BOUND, _BOUND))


def _mean(x, where):
    return jnp.sum(jnp.where(where, x, 0.0)) / jnp.maximum(jnp.sum(where), 1)


def _max(x, where):
    """0 if there is none."""
    return jnp.where(
        jnp.any(where), jnp.max(jnp.where(where, x, -jnp.inf), initial=-jnp.inf), 0.0
    )
