"""Per-token estimators of KL(policy || reference) from tokens the policy sampled.

Each takes the log-probability of the sampled tokens under both, in nats. All three are
0 where the two agree. They differ in what they are on average over tokens drawn from
the policy, and, differentiated through `logprobs` as a loss, in what their gradient is:

             mean value       mean gradient
    k1       KL               0: no pull towards the reference at all
    k2       biased, small    that of KL(policy || reference)
    k3       KL               that of KL(reference || policy)

Source: Schulman 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html).

Shapes: R = rows, T = tokens in a row.
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

Estimator = Literal["k1", "k2", "k3"]

_MAX_LOG_RATIO, _MAX_K3 = 20.0, 10.0


def estimate(
    kind: Estimator, logprobs: Float[Array, "R T"], ref_logprobs: Float[Array, "R T"]
) -> Float[Array, "R T"]:
    """The estimator of that name."""
    match kind:
        case "k1":
            return k1(logprobs, ref_logprobs)
        case "k2":
            return k2(logprobs, ref_logprobs)
        case "k3":
            return k3(logprobs, ref_logprobs)
    raise ValueError(f"kl_loss_type is {kind!r}; known: 'k1', 'k2', 'k3'")


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


def adapt(
    coef: float, measured: float, *, target: float, horizon: float, count: int
) -> float:
    """The next weight of a KL penalty, which keeps the KL near `target`.

        coef * (1 + clip(measured / target - 1, -0.2, 0.2) * count / horizon)

    Args:
      measured: KL per sequence of this step, nats.
      horizon: sequences over which the weight may change by a fifth.
      count: sequences in this step.

    Source: Ziegler et al. 2019, section 2.2 (arXiv:1909.08593).
    """
    error = min(max(measured / target - 1.0, -0.2), 0.2)
    return coef * (1.0 + error * count / horizon)
