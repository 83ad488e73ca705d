"""Per-token estimators of KL(policy || reference) from tokens the policy sampled.

Each takes the log-probability of the sampled tokens under both, in nats. All are 0
where the two agree. They differ in what they are on average over tokens drawn from
the policy, and, differentiated through `logprobs` as a loss, in what their gradient is:

             mean value       mean gradient
    k1       KL               0: no pull towards the reference at all
    k2       biased, small    that of KL(policy || reference)
    k3       KL               that of KL(reference || policy)
    absolute biased           none of these
    NAME+    that of NAME     that of k2

Source: Schulman 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html);
the kinds with a + are veRL's.

Shapes: R = rows, T = tokens in a row, V = vocabulary.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# veRL has two names for most of them: kl = k1, mse = k2, low_var_kl = k3.
Estimator = Literal[
    "k1", "k2", "k3", "abs", "kl", "mse", "low_var_kl",
    "k1+", "k2+", "k3+", "abs+", "kl+", "mse+", "low_var_kl+",
]  # fmt: skip

_MAX_LOG_RATIO, _MAX_K3 = 20.0, 10.0


def estimate(
    kind: Estimator, logprobs: Float[Array, "R T"], ref_logprobs: Float[Array, "R T"]
) -> Float[Array, "R T"]:
    """The estimator of that name."""
    if kind.endswith("+"):
        value = estimate(kind.removesuffix("+"), logprobs, ref_logprobs)
        pull = k2(logprobs, ref_logprobs)
        return jax.lax.stop_gradient(value - pull) + pull
    match kind:
        case "k1" | "kl":
            return k1(logprobs, ref_logprobs)
        case "k2" | "mse":
            return k2(logprobs, ref_logprobs)
        case "k3" | "low_var_kl":
            return k3(logprobs, ref_logprobs)
        case "abs":
            return absolute(logprobs, ref_logprobs)
    raise ValueError(
        f"kl_loss_type is {kind!r}; known: {', '.join(get_args(Estimator))}"
    )


def k1(
    logprobs: Float[Array, "R T"], ref_logprobs: Float[Array, "R T"]
) -> Float[Array, "R T"]:
    """logprobs - ref_logprobs. Unbiased; negative for about half of all tokens."""
    return logprobs - ref_logprobs


def k2(
    logprobs: Float[Array, "R T"], ref_logprobs: Float[Array, "R T"]
) -> Float[Array, "R T"]:
    """(logprobs - ref_logprobs)^2 / 2. Never negative."""
    return 0.5 * jnp.square(logprobs - ref_logprobs)


def k3(
    logprobs: Float[Array, "R T"], ref_logprobs: Float[Array, "R T"]
) -> Float[Array, "R T"]:
    """exp(d) - 1 - d with d = ref_logprobs - logprobs. Unbiased and never negative.

    As in veRL, d is clamped to +-20 and the result to at most 10, beyond which no
    gradient flows.
    """
    d = jnp.clip(ref_logprobs - logprobs, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    return jnp.minimum(jnp.expm1(d) - d, _MAX_K3)


def absolute(
    logprobs: Float[Array, "R T"], ref_logprobs: Float[Array, "R T"]
) -> Float[Array, "R T"]:
    """|logprobs - ref_logprobs|. Pulls with the same force however near they are."""
    difference = logprobs - ref_logprobs
    return difference * jnp.sign(difference)  # jnp.abs has gradient 1 at 0


def full(
    logits: Float[Array, "R T V"], ref_logits: Float[Array, "R T V"]
) -> Float[Array, "R T"]:
    """KL(policy || reference) itself, over the vocabulary.

        sum over v of p[v] * (log p[v] - log ref_p[v])

    Args:
      logits: of the policy where the token was drawn, or log-probabilities.
      ref_logits: of the reference; not differentiated.
    """
    logp = jax.nn.log_softmax(logits)
    ref_logp = jax.nn.log_softmax(jax.lax.stop_gradient(ref_logits))
    return jnp.sum(jnp.exp(logp) * (logp - ref_logp), axis=-1)


def in_reward(
    rewards: Float[Array, "R T"],
    logprobs: Float[Array, "R T"],
    ref_logprobs: Float[Array, "R T"],
    response_mask: Bool[Array, "R T"],
    *,
    kind: Estimator,
    coef: float | Float[Array, ""],
) -> Float[Array, "R T"]:
    """rewards - coef * KL on tokens of `response_mask`; `rewards` elsewhere.

    Args:
      logprobs: under the policy before the update.

    Source: Ziegler et al. 2019, section 2 (arXiv:1909.08593).
    """
    penalty = estimate(kind, logprobs, ref_logprobs)
    return rewards - coef * jnp.where(response_mask, penalty, 0.0)


def next_coef(
    controller: Literal["fixed", "adaptive"],
    coef: float | Float[Array, ""],
    current_kl: float | Float[Array, ""],
    num_sequences: int,
    *,
    target_kl: float,
    horizon: float | int,
) -> float | Float[Array, ""]:
    """The coefficient of `in_reward` for the next step.

        fixed:     coef
        adaptive:  coef * (1 + clip(current_kl / target_kl - 1, -0.2, 0.2)
                               * num_sequences / horizon)

    Args:
      current_kl: of this step, in the units of `target_kl`.
      num_sequences: in this step.
      horizon: sequences over which the coefficient may change by a fifth or so.

    Source: Ziegler et al. 2019, section 2.2 (arXiv:1909.08593).
    """
    if controller == "fixed":
        return coef
    error = jnp.clip(current_kl / target_kl - 1.0, -0.2, 0.2)
    return coef * (1.0 + error * num_sequences / horizon)
