"""Means over the tokens that count.

A mean is a weighted sum whose weights depend on masks alone. Weights are made once for
a whole mini-batch; its micro-batches then add up to the same mean, whatever their size.

Under `jit`, a sharded array is still one global array, so these sums already run
over every device and every host. No data-parallel size appears in any formula.

Shapes: R = rows, T = tokens in a row; a row may hold several sequences.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Aggregation = Literal["token-mean", "seq-mean-token-mean"]


def weights(
    mode: Aggregation,
    mask: Bool[Array, "R T"],
    sequence_ids: Int[Array, "R T"],
    num_sequences: int,
) -> Float[Array, "R T"]:
    """The weights of `token_mean` or `sequence_mean`, by veRL's names."""
    match mode:
        case "token-mean":
            return token_weights(mask)
        case "seq-mean-token-mean":
            return sequence_weights(mask, sequence_ids, num_sequences)
    raise ValueError(
        f"loss_agg_mode is {mode!r}; known: 'token-mean', 'seq-mean-token-mean'"
    )


def token_weights(mask: Bool[Array, "R T"]) -> Float[Array, "R T"]:
    """mask / number of unmasked tokens; all 0 if there are none."""
    return mask / jnp.maximum(jnp.sum(mask), 1)


def sequence_weights(
    mask: Bool[Array, "R T"], sequence_ids: Int[Array, "R T"], num_sequences: int
) -> Float[Array, "R T"]:
    """mask / (unmasked tokens of the sequence * sequences that have any).

    Args:
      sequence_ids: below `num_sequences`; anything where `mask` is False.
    """
    lengths = jax.ops.segment_sum(
        mask.ravel().astype(jnp.int32), sequence_ids.ravel(), num_sequences
    )
    return mask / jnp.maximum(lengths[sequence_ids] * jnp.sum(lengths > 0), 1)


def weighted_sum(
    x: Float[Array, "R T"], weights: Float[Array, "R T"]
) -> Float[Array, ""]:
    """sum(weights * x); what `x` holds where the weight is 0 does not matter."""
    return jnp.sum(weights * x, where=weights != 0)


def token_mean(x: Float[Array, "R T"], mask: Bool[Array, "R T"]) -> Float[Array, ""]:
    """Mean of `x` over all unmasked tokens; 0 if there are none.

    Long responses weigh more than short ones. This is the DAPO normalisation; GRPO as
    published is `sequence_mean`.

    Source: Yu et al. 2025, section 3.3 (arXiv:2503.14476).
    """
    return weighted_sum(x, token_weights(mask))


def sequence_mean(
    x: Float[Array, "R T"],
    mask: Bool[Array, "R T"],
    sequence_ids: Int[Array, "R T"],
    num_sequences: int,
) -> Float[Array, ""]:
    """Mean over sequences of the mean of `x` over the sequence's unmasked tokens.

    A sequence without any does not count; 0 if there are none at all.

    Source: Shao et al. 2024, eq. 3 (arXiv:2402.03300).
    """
    return weighted_sum(x, sequence_weights(mask, sequence_ids, num_sequences))


def whiten(
    x: Float[Array, "R T"], mask: Bool[Array, "R T"], *, eps: float = 1e-8
) -> Float[Array, "R T"]:
    """(x - mean) / sqrt(variance + eps) over the unmasked tokens; 0 on the others.

    The variance is unbiased. One token alone gives 0, where veRL raises an error.

    Source: `masked_whiten` of TRL and veRL.
    """
    centred = jnp.where(mask, x - token_mean(x, mask), 0.0)
    variance = jnp.sum(centred**2) / jnp.maximum(jnp.sum(mask) - 1, 1)
    return centred * jax.lax.rsqrt(variance + eps)


def explained_variance(
    predictions: Float[Array, "R T"],
    targets: Float[Array, "R T"],
    mask: Bool[Array, "R T"],
) -> Float[Array, ""]:
    """1 - variance(targets - predictions) / (variance(targets) + 1e-5).

    1 for perfect predictions, 0 for any constant, negative for worse than that. The
    constant, which is veRL's, keeps it finite where all targets are equal.
    """

    def variance(x):
        return token_mean((x - token_mean(x, mask)) ** 2, mask)

    return 1.0 - variance(targets - predictions) / (variance(targets) + 1e-5)
