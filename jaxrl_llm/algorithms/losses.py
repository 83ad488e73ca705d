"""Policy losses for token sequences, and the loss of a value function.

Every function here takes numbers that were computed elsewhere and returns one number
per token, `[R, T]`. Nothing in this file knows about models, meshes or configs, so each
loss can be used in any JAX program and checked by hand. `masked` turns per-token losses
into the scalar that is differentiated.

Most are elementwise. `sequence_log_ratio`, `gspo` and `gmpo` look at whole sequences,
which may share rows; they take a mask and `sequence_ids`.

A run gives a loss what it asks for by name (`config.algorithm.LOSSES`). What ends in
`_clipped` is for the metrics of a loss: where a bound has taken the gradient away (in
`cispo`, limits it), and where that is the second bound.

Shapes: R = rows, T = tokens in a row. Units: log-probabilities are in nats; advantages
in units of reward. `logprobs` is what is differentiated; nothing else is.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.algorithms import masked

# exp(20) ~ 5e8 still fits in float32 with room for the product with an advantage.
_MAX_LOG_RATIO = 20.0
# What GSPO clamps the logarithm of a sequence's ratio to, from above only.
_MAX_SEQUENCE_LOG_RATIO = 10.0


def clipped_surrogate(
    logprobs: Float[Array, "R T"],
    old_logprobs: Float[Array, "R T"],
    advantages: Float[Array, "R T"],
    *,
    clip_ratio_low: float,
    clip_ratio_high: float,
    clip_ratio_c: float | None = None,
) -> Float[Array, "R T"]:
    """The PPO objective for each token, negated so that it is minimised.

        ratio   = exp(logprobs - old_logprobs)
        clipped = clip(ratio, 1 - clip_ratio_low, 1 + clip_ratio_high)
        loss    = -min(ratio * advantages, clipped * advantages)
        loss    = min(loss, -clip_ratio_c * advantages)   where advantages < 0

    The minimum makes the bound one-sided: a token that has moved past the bound in the
    direction its advantage asks for gets no gradient; one that moved the other way is
    still pulled back. Log-ratios are clamped to +-20, beyond which no gradient flows.

    Args:
      logprobs: log-probability of each token under the policy being trained.
      old_logprobs: the same under the policy that defines the trust region, usually
        the weights at the start of this update. Not differentiated.
      advantages: how much better each token was than expected. Not differentiated.
      clip_ratio_low: how far the ratio may fall below 1, in [0, 1].
      clip_ratio_high: how far it may rise above 1. Equal to `clip_ratio_low` in PPO;
        larger in DAPO ("clip-higher").
      clip_ratio_c: over 1; the ratio beyond which a token with negative advantage gets
        no gradient either ("dual clip"). None: no such bound.

    Returns:
      The loss of each token. At `logprobs == old_logprobs` it equals `-advantages`.

    Source: Schulman et al. 2017, eq. 7 (arXiv:1707.06347); separate bounds from Yu et
    al. 2025, section 3.1 (arXiv:2503.14476); dual clip from Ye et al. 2019
    (arXiv:1912.09729).
    """
    advantages = jax.lax.stop_gradient(advantages)
    ratio = _ratio(logprobs, old_logprobs)
    clipped = jnp.clip(ratio, 1.0 - clip_ratio_low, 1.0 + clip_ratio_high)
    loss = -jnp.minimum(ratio * advantages, clipped * advantages)
    if clip_ratio_c is None:
        return loss
    most = -clip_ratio_c * advantages
    return jnp.where(advantages < 0, jnp.minimum(loss, most), loss)


def is_clipped(
    logprobs: Float[Array, "R T"],
    old_logprobs: Float[Array, "R T"],
    advantages: Float[Array, "R T"],
    *,
    clip_ratio_low: float,
    clip_ratio_high: float,
) -> Bool[Array, "R T"]:
    """Whether the bound is what decides `clipped_surrogate`, so no gradient flows.

        clipped * advantages < ratio * advantages

    Its mean over tokens is the clip fraction.
    """
    ratio = _ratio(logprobs, old_logprobs)
    clipped = jnp.clip(ratio, 1.0 - clip_ratio_low, 1.0 + clip_ratio_high)
    return clipped * advantages < ratio * advantages


def vanilla_clipped(
    logprobs: Float[Array, "R T"],
    old_logprobs: Float[Array, "R T"],
    advantages: Float[Array, "R T"],
    *,
    clip_ratio_low: float,
    clip_ratio_high: float,
    clip_ratio_c: float | None,
) -> tuple[Bool[Array, "R T"], Bool[Array, "R T"]]:
    """`is_clipped`, and where the dual clip of `clipped_surrogate` decides."""
    pair = logprobs, old_logprobs
    bounds = {"clip_ratio_low": clip_ratio_low, "clip_ratio_high": clip_ratio_high}
    clipped = is_clipped(*pair, advantages, **bounds)
    if clip_ratio_c is None:
        return clipped, jnp.zeros_like(clipped)
    return clipped, (advantages < 0) & is_over(*pair, clip_ratio_c)


def is_over(
    logprobs: Float[Array, "R T"], old_logprobs: Float[Array, "R T"], most: float
) -> Bool[Array, "R T"]:
    """ratio > most."""
    return _ratio(logprobs, old_logprobs) > most


def is_outside(
    logprobs: Float[Array, "R T"],
    old_logprobs: Float[Array, "R T"],
    *,
    clip_ratio_low: float,
    clip_ratio_high: float,
    log: bool = False,
) -> Bool[Array, "R T"]:
    """Whether the ratio is outside [1 - low, 1 + high], or its logarithm outside
    [-low, high]: the tokens `cispo` and `gmpo` clip."""
    if log:
        x, middle = logprobs - old_logprobs, 0.0
    else:
        x, middle = _ratio(logprobs, old_logprobs), 1.0
    return (x < middle - clip_ratio_low) | (x > middle + clip_ratio_high)


def decoupled_surrogate(
    logprobs: Float[Array, "R T"],
    proximal_logprobs: Float[Array, "R T"],
    behavior_logprobs: Float[Array, "R T"],
    advantages: Float[Array, "R T"],
    *,
    clip_ratio_low: float,
    clip_ratio_high: float,
) -> Float[Array, "R T"]:
    """PPO with three policies: sampled from one, kept near another.

        exp(proximal_logprobs - behavior_logprobs) * clipped_surrogate

    Args:
      proximal_logprobs: under the policy that the trust region is centred on.
      behavior_logprobs: under the policy that sampled the tokens.

    Source: Hilton et al. 2021 (arXiv:2110.00641).
    """
    weights = jax.lax.stop_gradient(_ratio(proximal_logprobs, behavior_logprobs))
    return weights * clipped_surrogate(
        logprobs,
        proximal_logprobs,
        advantages,
        clip_ratio_low=clip_ratio_low,
        clip_ratio_high=clip_ratio_high,
    )


def dppo(
    logprobs: Float[Array, "R T"],
    old_logprobs: Float[Array, "R T"],
    advantages: Float[Array, "R T"],
    inside: Bool[Array, "R T"],
    *,
    clip_ratio_c: float,
) -> Float[Array, "R T"]:
    """Policy gradient on the tokens inside a trust region that a divergence defines.

        loss = -advantages * sg(min(ratio, clip_ratio_c)) * logprobs * inside

    Args:
      inside: `inside_tv` or `inside_kl`.
      clip_ratio_c: bound of the importance weight; the paper advises a large one.

    Source: DPPO, 2026 (arXiv:2602.04879).
    """
    advantages = jax.lax.stop_gradient(advantages)
    weights = jnp.minimum(_ratio(logprobs, old_logprobs), clip_ratio_c)
    return -advantages * jax.lax.stop_gradient(weights * inside) * logprobs


def inside_tv(
    logprobs: Float[Array, "R T"],
    old_logprobs: Float[Array, "R T"],
    advantages: Float[Array, "R T"],
    *,
    clip_ratio_low: float,
    clip_ratio_high: float,
) -> Bool[Array, "R T"]:
    """Whether a token's probability has moved at most so far the way it is pushed.

        p - old_p <= clip_ratio_high     where advantages > 0
        p - old_p >= -clip_ratio_low     elsewhere

    |p - old_p| is the total variation between "this token or another" under both.
    """
    change = _probability(logprobs) - _probability(old_logprobs)
    return jnp.where(
        advantages > 0, change <= clip_ratio_high, change >= -clip_ratio_low
    )


def inside_kl(
    logprobs: Float[Array, "R T"],
    old_logprobs: Float[Array, "R T"],
    advantages: Float[Array, "R T"],
    *,
    clip_ratio_low: float,
    clip_ratio_high: float,
) -> Bool[Array, "R T"]:
    """Like `inside_tv`, with the divergence between "this token or another" under both.

    kl = old_p * log(old_p / p) + (1 - old_p) * log((1 - old_p) / (1 - p)), at most
    `clip_ratio_high` where advantages > 0 and `clip_ratio_low` elsewhere; a token that
    has moved against its advantage is always inside.
    """
    new, old = _probability(logprobs), _probability(old_logprobs)
    others = jnp.log((1.0 - old + 1e-8) / (1.0 - new + 1e-8))
    kl = old * (old_logprobs - logprobs) + (1.0 - old) * others
    return jnp.where(
        advantages > 0,
        (kl <= clip_ratio_high) | (new <= old),
        (kl <= clip_ratio_low) | (new >= old),
    )


def dppo_tv(
    logprobs: Float[Array, "R T"],
    old_logprobs: Float[Array, "R T"],
    advantages: Float[Array, "R T"],
    *,
    clip_ratio_low: float,
    clip_ratio_high: float,
    clip_ratio_c: float | None,
) -> Float[Array, "R T"]:
    """`dppo` with the trust region `inside_tv`.

    Args:
      clip_ratio_low, clip_ratio_high: bounds of the total variation.
      clip_ratio_c: bound of the importance weight; None for none.
    """
    given = logprobs, old_logprobs, advantages
    bounds = {"clip_ratio_low": clip_ratio_low, "clip_ratio_high": clip_ratio_high}
    inside = inside_tv(*given, **bounds)
    return dppo(*given, inside, clip_ratio_c=_or_none(clip_ratio_c))


def dppo_tv_clipped(
    logprobs: Float[Array, "R T"],
    old_logprobs: Float[Array, "R T"],
    advantages: Float[Array, "R T"],
    *,
    clip_ratio_low: float,
    clip_ratio_high: float,
    clip_ratio_c: float | None,
) -> tuple[Bool[Array, "R T"], Bool[Array, "R T"]]:
    """Outside of the trust region, and inside with a bounded weight."""
    pair = logprobs, old_logprobs
    bounds = {"clip_ratio_low": clip_ratio_low, "clip_ratio_high": clip_ratio_high}
    inside = inside_tv(*pair, advantages, **bounds)
    return ~inside, inside & is_over(*pair, _or_none(clip_ratio_c))


def dppo_kl(
    logprobs: Float[Array, "R T"],
    old_logprobs: Float[Array, "R T"],
    advantages: Float[Array, "R T"],
    *,
    clip_ratio_low: float,
    clip_ratio_high: float,
    clip_ratio_c: float | None,
) -> Float[Array, "R T"]:
    """`dppo` with the trust region `inside_kl`.

    Args:
      clip_ratio_low, clip_ratio_high: bounds of the KL divergence.
      clip_ratio_c: bound of the importance weight; None for none.
    """
    given = logprobs, old_logprobs, advantages
    bounds = {"clip_ratio_low": clip_ratio_low, "clip_ratio_high": clip_ratio_high}
    inside = inside_kl(*given, **bounds)
    return dppo(*given, inside, clip_ratio_c=_or_none(clip_ratio_c))


def dppo_kl_clipped(
    logprobs: Float[Array, "R T"],
    old_logprobs: Float[Array, "R T"],
    advantages: Float[Array, "R T"],
    *,
    clip_ratio_low: float,
    clip_ratio_high: float,
    clip_ratio_c: float | None,
) -> tuple[Bool[Array, "R T"], Bool[Array, "R T"]]:
    """Outside of the trust region, and inside with a bounded weight."""
    pair = logprobs, old_logprobs
    bounds = {"clip_ratio_low": clip_ratio_low, "clip_ratio_high": clip_ratio_high}
    inside = inside_kl(*pair, advantages, **bounds)
    return ~inside, inside & is_over(*pair, _or_none(clip_ratio_c))


def sequence_log_ratio(
    logprobs: Float[Array, "R T"],
    old_logprobs: Float[Array, "R T"],
    mask: Bool[Array, "R T"],
    sequence_ids: Int[Array, "R T"],
    num_sequences: int,
) -> Float[Array, "R T"]:
    """GSPO's log-ratio of a sequence per token, with each token's own gradient.

        mean over the sequence of (logprobs - old_logprobs), not differentiated
        + logprobs - sg(logprobs)

    at most 10. In GSPO's loss, `clipped_surrogate(this, zeros, advantages)`, all tokens
    of a response are clipped, or none.

    Source: GSPO-token of Zheng et al. 2025 (arXiv:2507.18071).
    """
    means = masked.sequence_average(
        logprobs - old_logprobs, mask, sequence_ids, num_sequences
    )
    value = jax.lax.stop_gradient(jnp.minimum(means, _MAX_SEQUENCE_LOG_RATIO))
    pull = logprobs - jax.lax.stop_gradient(logprobs)
    return value + jnp.where(means < _MAX_SEQUENCE_LOG_RATIO, pull, 0.0)


def gspo(
    logprobs: Float[Array, "R T"],
    old_logprobs: Float[Array, "R T"],
    advantages: Float[Array, "R T"],
    mask: Bool[Array, "R T"],
    sequence_ids: Int[Array, "R T"],
    num_sequences: int,
    *,
    clip_ratio_low: float,
    clip_ratio_high: float,
) -> Float[Array, "R T"]:
    """`clipped_surrogate` of `sequence_log_ratio`: GSPO.

    Source: Zheng et al. 2025 (arXiv:2507.18071).
    """
    ratio = sequence_log_ratio(
        logprobs, old_logprobs, mask, sequence_ids, num_sequences
    )
    bounds = {"clip_ratio_low": clip_ratio_low, "clip_ratio_high": clip_ratio_high}
    return clipped_surrogate(ratio, jnp.zeros_like(ratio), advantages, **bounds)


def gspo_clipped(
    logprobs: Float[Array, "R T"],
    old_logprobs: Float[Array, "R T"],
    advantages: Float[Array, "R T"],
    mask: Bool[Array, "R T"],
    sequence_ids: Int[Array, "R T"],
    num_sequences: int,
    *,
    clip_ratio_low: float,
    clip_ratio_high: float,
) -> tuple[Bool[Array, "R T"], Bool[Array, "R T"]]:
    """`is_clipped` of `sequence_log_ratio`; there is no second bound."""
    ratio = sequence_log_ratio(
        logprobs, old_logprobs, mask, sequence_ids, num_sequences
    )
    bounds = {"clip_ratio_low": clip_ratio_low, "clip_ratio_high": clip_ratio_high}
    clipped = is_clipped(ratio, jnp.zeros_like(ratio), advantages, **bounds)
    return clipped, jnp.zeros_like(clipped)


def gmpo(
    logprobs: Float[Array, "R T"],
    old_logprobs: Float[Array, "R T"],
    advantages: Float[Array, "R T"],
    mask: Bool[Array, "R T"],
    sequence_ids: Int[Array, "R T"],
    num_sequences: int,
    *,
    clip_ratio_low: float,
    clip_ratio_high: float,
) -> Float[Array, "R T"]:
    """Geometric instead of arithmetic mean of a response's ratios (veRL: geo_mean).

        clipped = clip(log_ratio, -clip_ratio_low, clip_ratio_high)
        bounded = the one of log_ratio and clipped that is worse for the advantage
        loss    = -mean(advantages) * exp(mean(bounded)),   means over the sequence

    at every token of the sequence, so that the published objective is its sequence
    mean (`seq-mean-token-mean`). Mean log-ratios are clamped to +-20.

    Source: Zhao et al. 2025 (arXiv:2507.20673).
    """
    where = (mask, sequence_ids, num_sequences)
    advantages = jax.lax.stop_gradient(advantages)
    log_ratio = logprobs - jax.lax.stop_gradient(old_logprobs)
    sign = jnp.sign(advantages)
    clipped = jnp.clip(log_ratio, -clip_ratio_low, clip_ratio_high)
    bounded = sign * jnp.minimum(sign * log_ratio, sign * clipped)
    mean = masked.sequence_average(bounded, *where)
    ratio = jnp.exp(jnp.clip(mean, -_MAX_LOG_RATIO, _MAX_LOG_RATIO))
    return -masked.sequence_average(advantages, *where) * ratio


def gmpo_clipped(
    logprobs: Float[Array, "R T"],
    old_logprobs: Float[Array, "R T"],
    advantages: Float[Array, "R T"],
    *,
    clip_ratio_low: float,
    clip_ratio_high: float,
) -> tuple[Bool[Array, "R T"], Bool[Array, "R T"]]:
    """Log-ratios outside of the bounds, of good tokens and of bad ones."""
    bounds = {"clip_ratio_low": clip_ratio_low, "clip_ratio_high": clip_ratio_high}
    outside = is_outside(logprobs, old_logprobs, **bounds, log=True)
    return outside & (advantages > 0), outside & (advantages < 0)


def sapo(
    logprobs: Float[Array, "R T"],
    old_logprobs: Float[Array, "R T"],
    advantages: Float[Array, "R T"],
    *,
    tau_pos: float,
    tau_neg: float,
) -> Float[Array, "R T"]:
    """A smooth gate instead of a clip.

        loss = -advantages * 4 / tau * sigmoid(tau * (ratio - 1))

    whose gradient on-policy is that of the policy gradient. Log-ratios are clamped to
    +-20.

    Args:
      tau_pos: how fast the gradient dies away from ratio 1 where advantages > 0.
      tau_neg: elsewhere.

    Source: Gao et al. 2025 (arXiv:2511.20347).
    """
    advantages = jax.lax.stop_gradient(advantages)
    tau = jnp.where(advantages > 0, tau_pos, tau_neg)
    gate = jax.nn.sigmoid(tau * (_ratio(logprobs, old_logprobs) - 1.0)) * 4.0 / tau
    return -advantages * gate


def cispo(
    logprobs: Float[Array, "R T"],
    old_logprobs: Float[Array, "R T"],
    advantages: Float[Array, "R T"],
    *,
    clip_ratio_low: float,
    clip_ratio_high: float,
) -> Float[Array, "R T"]:
    """Policy gradient whose importance weight is clipped; no token loses its gradient.

        loss = -advantages * sg(clip(ratio, 1 - low, 1 + high)) * logprobs

    Source: MiniMax 2025 (arXiv:2506.13585).
    """
    ratio = _ratio(logprobs, old_logprobs)
    weights = jnp.clip(ratio, 1.0 - clip_ratio_low, 1.0 + clip_ratio_high)
    return -jax.lax.stop_gradient(advantages * weights) * logprobs


def cispo_clipped(
    logprobs: Float[Array, "R T"],
    old_logprobs: Float[Array, "R T"],
    *,
    clip_ratio_low: float,
    clip_ratio_high: float,
) -> tuple[Bool[Array, "R T"], Bool[Array, "R T"]]:
    """Clipped importance weights; there is no second bound."""
    bounds = {"clip_ratio_low": clip_ratio_low, "clip_ratio_high": clip_ratio_high}
    outside = is_outside(logprobs, old_logprobs, **bounds)
    return outside, jnp.zeros_like(outside)


def dro(
    logprobs: Float[Array, "R T"],
    old_logprobs: Float[Array, "R T"],
    advantages: Float[Array, "R T"],
    *,
    beta: float,
) -> Float[Array, "R T"]:
    """Policy gradient with a quadratic pull towards the old policy instead of a clip.

        loss = -(advantages * logprobs - beta / 2 * (logprobs - old_logprobs)^2)

    Source: Richemond et al. 2024 (arXiv:2405.19107), as in veRL without its value
    function.
    """
    log_ratio = logprobs - jax.lax.stop_gradient(old_logprobs)
    pull = 0.5 * beta * jnp.square(log_ratio)
    return pull - jax.lax.stop_gradient(advantages) * logprobs


def reinforce(
    logprobs: Float[Array, "R T"], advantages: Float[Array, "R T"]
) -> Float[Array, "R T"]:
    """The policy gradient: -advantages * logprobs (veRL: gpg, and reinforce).

    Source: Williams 1992 (doi:10.1007/BF00992696); GPG, Chu et al. 2025
    (arXiv:2504.02546), differs in the advantages only.
    """
    return -jax.lax.stop_gradient(advantages) * logprobs


def clip_cov(
    logprobs: Float[Array, "R T"],
    old_logprobs: Float[Array, "R T"],
    advantages: Float[Array, "R T"],
    chosen: Bool[Array, "R T"],
    *,
    clip_ratio_low: float,
    clip_ratio_high: float,
) -> Float[Array, "R T"]:
    """`clipped_surrogate`, and 0 on tokens that would cost too much entropy.

    Args:
      chosen: `entropy_covariance.clip_cov` over the whole mini-batch.

    Source: Clip-Cov of Cui et al. 2025 (arXiv:2505.22617).
    """
    bounds = {"clip_ratio_low": clip_ratio_low, "clip_ratio_high": clip_ratio_high}
    loss = clipped_surrogate(logprobs, old_logprobs, advantages, **bounds)
    return jnp.where(chosen, 0.0, loss)


def clip_cov_clipped(
    chosen: Bool[Array, "R T"],
) -> tuple[Bool[Array, "R T"], Bool[Array, "R T"]]:
    """The tokens that were chosen; there is no second bound."""
    return chosen, jnp.zeros_like(chosen)


def kl_cov(
    logprobs: Float[Array, "R T"],
    old_logprobs: Float[Array, "R T"],
    advantages: Float[Array, "R T"],
    chosen: Bool[Array, "R T"],
    *,
    ppo_kl_coef: float,
) -> Float[Array, "R T"]:
    """No clip; tokens that would cost too much entropy are held back.

        loss = -advantages * ratio + ppo_kl_coef * |logprobs - old_logprobs| * chosen

    Log-ratios are clamped to +-20 in the ratio.

    Args:
      chosen: `entropy_covariance.kl_cov` over the whole mini-batch.

    Source: KL-Cov of Cui et al. 2025 (arXiv:2505.22617).
    """
    away = logprobs - jax.lax.stop_gradient(old_logprobs)
    away = away * jnp.sign(away)  # jnp.abs has gradient 1 at 0
    gain = jax.lax.stop_gradient(advantages) * _ratio(logprobs, old_logprobs)
    return jnp.where(chosen, ppo_kl_coef * away, 0.0) - gain


def value_loss(
    values: Float[Array, "R T"],
    old_values: Float[Array, "R T"],
    returns: Float[Array, "R T"],
    *,
    cliprange_value: float,
) -> Float[Array, "R T"]:
    """How far a critic is from the returns, pessimistic where it moved far.

        clipped = clip(values, old_values - cliprange_value, old_values + ...)
        loss    = max((values - returns)^2, (clipped - returns)^2) / 2

    Args:
      values: of the critic being trained; the only one differentiated.
      old_values: of the critic when the advantages were estimated.

    Source: OpenAI baselines, ppo2 (github.com/openai/baselines); described by Engstrom
    et al. 2020 (arXiv:2005.12729).
    """
    clipped = _clip_around(values, old_values, cliprange_value)
    miss, clipped_miss = jnp.square(values - returns), jnp.square(clipped - returns)
    return 0.5 * jnp.maximum(miss, clipped_miss)


def is_value_clipped(
    values: Float[Array, "R T"],
    old_values: Float[Array, "R T"],
    returns: Float[Array, "R T"],
    *,
    cliprange_value: float,
) -> Bool[Array, "R T"]:
    """Whether the clipped value decides `value_loss`, so no gradient flows."""
    clipped = _clip_around(values, old_values, cliprange_value)
    return jnp.square(clipped - returns) > jnp.square(values - returns)


def _clip_around(values, old_values, distance):
    old_values = jax.lax.stop_gradient(old_values)
    return jnp.clip(values, old_values - distance, old_values + distance)


def _or_none(most):
    return jnp.inf if most is None else most


def _ratio(logprobs, old_logprobs):
    log_ratio = logprobs - jax.lax.stop_gradient(old_logprobs)
    return jnp.exp(jnp.clip(log_ratio, -_MAX_LOG_RATIO, _MAX_LOG_RATIO))


def _probability(logprobs):
    """At most 1, which a log-probability rounded in another program may exceed."""
    return jnp.exp(jnp.minimum(logprobs, 0.0))
