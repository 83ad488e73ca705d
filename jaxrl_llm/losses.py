"""Policy and value losses for token sequences.

Every function here is elementwise over `[R, T]`: it takes numbers that were
computed elsewhere and returns one loss per token. Nothing in this file knows
about models, meshes, configs or masks, so each loss can be used in any JAX
program and checked by hand. `masked` turns per-token losses into the scalar that is
differentiated.

Shapes: R = rows, T = tokens in a row. Units: log-probabilities are in nats; advantages
in units of reward.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# exp(20) ~ 5e8 still fits in float32 with room for the product with an advantage.
_MAX_LOG_RATIO = 20.0


def clipped_surrogate(
    logprobs: Float[Array, "R T"],
    old_logprobs: Float[Array, "R T"],
    advantages: Float[Array, "R T"],
    *,
    clip_ratio_low: float,
    clip_ratio_high: float,
) -> Float[Array, "R T"]:
    """The PPO objective for each token, negated so that it is minimised.

        ratio   = exp(logprobs - old_logprobs)
        clipped = clip(ratio, 1 - clip_ratio_low, 1 + clip_ratio_high)
        loss    = -min(ratio * advantages, clipped * advantages)

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

    Returns:
      The loss of each token. At `logprobs == old_logprobs` it equals `-advantages`.

    Source: Schulman et al. 2017, eq. 7 (arXiv:1707.06347); separate bounds from Yu et
    al. 2025, section 3.1 (arXiv:2503.14476).
    """
    advantages = jax.lax.stop_gradient(advantages)
    ratio = _ratio(logprobs, old_logprobs)
    clipped = jnp.clip(ratio, 1.0 - clip_ratio_low, 1.0 + clip_ratio_high)
    return -jnp.minimum(ratio * advantages, clipped * advantages)


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


def clipped_value(
    values: Float[Array, "R T"],
    old_values: Float[Array, "R T"],
    returns: Float[Array, "R T"],
    *,
    cliprange_value: float,
) -> Float[Array, "R T"]:
    """Squared error of each value, with a bound on how far an update moves it.

        clipped = clip(values, old_values - range, old_values + range)
        loss    = max((values - returns)^2, (clipped - returns)^2) / 2

    A value that has moved past the bound towards its return gets no gradient.

    Args:
      values: predictions of the critic being trained.
      old_values: its predictions before this update. Not differentiated.
      returns: what they should have been. Not differentiated.
      cliprange_value: the range, in units of the returns.

    Source: baselines' PPO2, as described in Huang et al. 2022, detail 9
    ("The 37 implementation details of PPO").
    """
    errors = _value_errors(values, old_values, returns, cliprange_value)
    return 0.5 * jnp.maximum(*errors)


def is_value_clipped(
    values: Float[Array, "R T"],
    old_values: Float[Array, "R T"],
    returns: Float[Array, "R T"],
    *,
    cliprange_value: float,
) -> Bool[Array, "R T"]:
    """Whether the bound is what decides `clipped_value`."""
    free, clipped = _value_errors(values, old_values, returns, cliprange_value)
    return clipped > free


def _value_errors(values, old_values, returns, cliprange_value):
    old_values, returns = jax.lax.stop_gradient((old_values, returns))
    clipped = jnp.clip(
        values, old_values - cliprange_value, old_values + cliprange_value
    )
    return (values - returns) ** 2, (clipped - returns) ** 2


def _ratio(logprobs, old_logprobs):
    log_ratio = logprobs - jax.lax.stop_gradient(old_logprobs)
    return jnp.exp(jnp.clip(log_ratio, -_MAX_LOG_RATIO, _MAX_LOG_RATIO))
