"""Means over the tokens that count.

A mean is a weighted sum whose weights depend on masks alone. Weights are made once for
a whole mini-batch; its micro-batches then add up to the same mean, whatever their size.

Under `jit`, a sharded array is still one global array, so these sums already run
over every device and every host. No data-parallel size appears in any formula.

Shapes: R = rows, T = tokens in a row; a row may hold several of the S sequences.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

Aggregation = Literal[
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
]


def weights(
    mode: Aggregation,
    mask: Bool[Array, "R T"],
    sequence_ids: Int[Array, "R T"],
    num_sequences: int,
    loss_scale_factor: float | None = None,
) -> Float[Array, "R T"]:
    """What each token counts in the loss, by veRL's names. S = sequences with tokens.

        token-mean               mask / number of tokens
        token-sum                mask
        seq-mean-token-sum       mask / S
        seq-mean-token-mean      mask / (tokens of the sequence * S)
        seq-mean-token-sum-norm  mask / (loss_scale_factor * S)

    Args:
      sequence_ids: below `num_sequences`; anything where `mask` is False.
      loss_scale_factor: tokens, the same for all batches, such as the longest response
        allowed. (veRL's default is the width that a micro-batch happens to be padded
        to.)

    Raises:
      ValueError: an unknown mode, or seq-mean-token-sum-norm without its factor.
    """
    match mode:
        case "token-mean":
            return token_weights(mask)
        case "token-sum":
            return mask.astype(jnp.float32)
        case "seq-mean-token-sum":
            return mask / _num_nonempty(mask, sequence_ids, num_sequences)
        case "seq-mean-token-mean":
            return sequence_weights(mask, sequence_ids, num_sequences)
        case "seq-mean-token-sum-norm":
            if loss_scale_factor is None:
                raise ValueError(
                    "loss_agg_mode seq-mean-token-sum-norm needs loss_scale_factor, "
                    "such as the longest response allowed"
                )
            total = _num_nonempty(mask, sequence_ids, num_sequences)
            return mask / (loss_scale_factor * total)
    known = ", ".join(get_args(Aggregation))
    raise ValueError(f"loss_agg_mode is {mode!r}; known: {known}")


def num_counted(
    mode: Aggregation,
    mask: Bool[Array, "R T"],
    sequence_ids: Int[Array, "R T"],
    num_sequences: int,
) -> Num[Array, ""] | int:
    """What `weights` of that mode make a mean over: so many tokens, or sequences that
    have any; 1 for a sum over the whole mini-batch."""
    if mode == "token-sum":
        return 1
    if mode == "token-mean":
        return jnp.sum(mask)
    lengths = sequence_sum(mask.astype(jnp.int32), mask, sequence_ids, num_sequences)
    return jnp.sum(lengths > 0)


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
    lengths = sequence_sum(mask.astype(jnp.int32), mask, sequence_ids, num_sequences)
    return mask / jnp.maximum(lengths[sequence_ids] * jnp.sum(lengths > 0), 1)


def _num_nonempty(mask, sequence_ids, num_sequences):
    """Sequences with unmasked tokens; 1 if there are none."""
    lengths = sequence_sum(mask.astype(jnp.int32), mask, sequence_ids, num_sequences)
    return jnp.maximum(jnp.sum(lengths > 0), 1)


def sequence_sum(
    x: Num[Array, "R T"],
    mask: Bool[Array, "R T"],
    sequence_ids: Int[Array, "R T"],
    num_sequences: int,
) -> Num[Array, " S"]:
    """Sum of `x` over the unmasked tokens of each sequence, wherever its row is."""
    return jax.ops.segment_sum(
        jnp.where(mask, x, 0).ravel(), sequence_ids.ravel(), num_sequences
    )


def is_last(sequence_ids: Int[Array, "R T"]) -> Bool[Array, "R T"]:
    """Whether a token is the last of its sequence, none of which is split over rows."""
    after = jnp.pad(sequence_ids[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    return (sequence_ids >= 0) & (sequence_ids != after)


def sequence_means(
    x: Float[Array, "R T"],
    mask: Bool[Array, "R T"],
    sequence_ids: Int[Array, "R T"],
    num_sequences: int,
) -> Float[Array, " S"]:
    """Mean of `x` over the unmasked tokens of each sequence; 0 for one without any."""
    where = (mask, sequence_ids, num_sequences)
    lengths = sequence_sum(mask.astype(jnp.int32), *where)
    return sequence_sum(x, *where) / jnp.maximum(lengths, 1)


def sequence_average(
    x: Float[Array, "R T"],
    mask: Bool[Array, "R T"],
    sequence_ids: Int[Array, "R T"],
    num_sequences: int,
) -> Float[Array, "R T"]:
    """Every unmasked token gets the mean of `x` over those of its sequence; others 0.

    All tokens of a sequence must be there; it may share its row with others.
    """
    means = sequence_means(x, mask, sequence_ids, num_sequences)
    return jnp.where(mask, means[sequence_ids], 0.0)


def whiten(
    x: Float[Array, "*shape"], counts: Num[Array, "*shape"] | Bool[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Mean 0 and variance 1 over all entries, entry i taken `counts[i]` times.

        (x - mean) / sqrt(var + 1e-8),   var with divisor sum(counts) - 1

    0 where the count is 0, and exactly 0 everywhere if all entries that count are
    equal. (veRL raises for a single one.)

    Args:
      counts: a mask, or for values that belong to whole sequences their lengths.
    """
    used = counts > 0
    total = jnp.sum(counts)
    # Against the largest, equal ones differ by exactly 0: no rounding of a mean.
    largest = jnp.max(x, where=used, initial=-jnp.inf)
    shifted = jnp.where(used, x - largest, 0.0)
    centred = shifted - jnp.sum(counts * shifted) / jnp.maximum(total, 1)
    variance = jnp.sum(counts * jnp.square(centred)) / jnp.maximum(total - 1, 1)
    return jnp.where(used, centred * jax.lax.rsqrt(variance + 1e-8), 0.0)


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


def explained_variance(
    predictions: Float[Array, "R T"],
    targets: Float[Array, "R T"],
    mask: Bool[Array, "R T"],
) -> Float[Array, ""]:
    """1 - variance(targets - predictions) / (variance(targets) + 1e-5).

    1 for perfect predictions, 0 for any constant, negative for worse than that. The
    constant, which is veRL's, keeps it finite where all targets are equal.
    """

    errors = variance(targets - predictions, mask)
    return 1.0 - errors / (variance(targets, mask) + 1e-5)


def variance(x: Float[Array, "R T"], mask: Bool[Array, "R T"]) -> Float[Array, ""]:
    """Mean square distance from the mean, over all unmasked tokens."""
    return token_mean((x - token_mean(x, mask)) ** 2, mask)
