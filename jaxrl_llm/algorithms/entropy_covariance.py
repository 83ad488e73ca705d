"""Which tokens would cost the most entropy: the choices behind Clip-Cov and KL-Cov.

A token that is already likely and still rewarded, or unlikely and punished, lowers the
entropy of the policy. Its share is the covariance of log-probability and advantage.
Choices are made over a whole mini-batch, so that micro-batches do not matter, and what
is random in them depends on what a sequence says, so that neither its row nor the order
of sequences does.

Source: Cui et al. 2025 (arXiv:2505.22617).

Shapes: R = rows, T = tokens in a row.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxrl_llm.algorithms import losses, masked


def clip_cov(
    logprobs: Float[Array, "R T"],
    old_logprobs: Float[Array, "R T"],
    advantages: Float[Array, "R T"],
    mask: Bool[Array, "R T"],
    tokens: Int[Array, "R T"],
    positions: Int[Array, "R T"],
    sequence_ids: Int[Array, "R T"],
    num_sequences: int,
    step: Int[Array, ""],
    *,
    is_prompt: Bool[Array, "R T"] | None = None,
    prompt_ids: Int[Array, "R T"] | None = None,
    clip_ratio_low: float,
    clip_ratio_high: float,
    clip_cov_ratio: float,
    clip_cov_lb: float,
    clip_cov_ub: float,
) -> Bool[Array, "R T"]:
    """Clip-Cov's choice, `some_between`, of the tokens that are not clipped anyway.

    Args:
      step: what is random differs from one to the next.
      is_prompt, prompt_ids: as of `random_bits`.
    """
    found = covariance(logprobs, advantages, mask)
    whole = tokens, positions, sequence_ids, num_sequences
    shared = {"is_prompt": is_prompt, "prompt_ids": prompt_ids}
    bits = random_bits(*whole, step, **shared)
    clipped = losses.is_clipped(
        logprobs,
        old_logprobs,
        advantages,
        clip_ratio_low=clip_ratio_low,
        clip_ratio_high=clip_ratio_high,
    )
    return some_between(
        found,
        ~clipped,
        mask,
        bits,
        clip_cov_ratio=clip_cov_ratio,
        clip_cov_lb=clip_cov_lb,
        clip_cov_ub=clip_cov_ub,
    )


def kl_cov(
    logprobs: Float[Array, "R T"],
    advantages: Float[Array, "R T"],
    mask: Bool[Array, "R T"],
    tokens: Int[Array, "R T"],
    positions: Int[Array, "R T"],
    sequence_ids: Int[Array, "R T"],
    num_sequences: int,
    step: Int[Array, ""],
    *,
    is_prompt: Bool[Array, "R T"] | None = None,
    prompt_ids: Int[Array, "R T"] | None = None,
    kl_cov_ratio: float,
) -> Bool[Array, "R T"]:
    """KL-Cov's choice: `largest`, with equals decided as `step` draws them."""
    found = covariance(logprobs, advantages, mask)
    whole = tokens, positions, sequence_ids, num_sequences
    shared = {"is_prompt": is_prompt, "prompt_ids": prompt_ids}
    bits = random_bits(*whole, step, **shared)
    return largest(found, mask, bits, kl_cov_ratio=kl_cov_ratio)


def covariance(
    logprobs: Float[Array, "R T"],
    advantages: Float[Array, "R T"],
    mask: Bool[Array, "R T"],
) -> Float[Array, "R T"]:
    """(logprobs - mean) * (advantages - mean), means over all unmasked tokens."""
    return (logprobs - masked.token_mean(logprobs, mask)) * (
        advantages - masked.token_mean(advantages, mask)
    )


def some_between(
    covariances: Float[Array, "R T"],
    eligible: Bool[Array, "R T"],
    mask: Bool[Array, "R T"],
    bits: UInt32[Array, "R T"],
    *,
    clip_cov_ratio: float,
    clip_cov_lb: float,
    clip_cov_ub: float,
) -> Bool[Array, "R T"]:
    """Clip-Cov's choice: random tokens whose covariance lies between the bounds.

    At most max(1, floor(clip_cov_ratio * tokens of `mask`)) of them.

    Args:
      eligible: tokens that may be chosen: those that are not clipped anyway.
      bits: random; decides who is chosen.
    """
    between = (covariances > clip_cov_lb) & (covariances < clip_cov_ub)
    count = _share(clip_cov_ratio, mask)
    return _first(count, jnp.zeros_like(covariances), bits, eligible & between & mask)


def largest(
    covariances: Float[Array, "R T"],
    mask: Bool[Array, "R T"],
    bits: UInt32[Array, "R T"],
    *,
    kl_cov_ratio: float,
) -> Bool[Array, "R T"]:
    """KL-Cov's choice: the tokens with the largest covariance.

    max(1, floor(kl_cov_ratio * tokens of `mask`)) of them.

    Args:
      bits: random; decides between equals.
    """
    return _first(_share(kl_cov_ratio, mask), -covariances, bits, mask)


def random_bits(
    tokens: Int[Array, "R T"],
    positions: Int[Array, "R T"],
    sequence_ids: Int[Array, "R T"],
    num_sequences: int,
    seed: Int[Array, ""],
    *,
    is_prompt: Bool[Array, "R T"] | None = None,
    prompt_ids: Int[Array, "R T"] | None = None,
) -> UInt32[Array, "R T"]:
    """A random number for every token behind a prompt: a function of `seed`, the tokens
    of its sequence and its position in it, and of nothing else.

    Two sequences with the same tokens get the same numbers.

    Args:
      is_prompt, prompt_ids: as in `TrainBatch`; needed where prompts are shared.
    """
    here = _mixed(tokens.astype(jnp.uint32) ^ _mixed(positions.astype(jnp.uint32)))
    own = sequence_ids >= 0
    if prompt_ids is not None:
        own &= ~is_prompt
    whole = masked.sequence_sum(here, own, sequence_ids, num_sequences)[sequence_ids]
    if prompt_ids is not None:
        of_prompts = masked.sequence_sum(here, is_prompt, prompt_ids, num_sequences)
        whole = whole + of_prompts[prompt_ids]
    state = _mixed(whole ^ _mixed(seed.astype(jnp.uint32)))
    return _mixed(state ^ here)


def _mixed(x: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """A bijection of 32-bit numbers that scatters neighbours.

    Source: MurmurHash3's finalizer (github.com/aappleby/smhasher), plus one so that 0
    is no fixed point.
    """
    x = x + jnp.uint32(0x9E3779B9)
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _share(ratio, mask):
    return jnp.maximum(jnp.floor(ratio * jnp.sum(mask)), 1).astype(jnp.int32)


def _first(count, key, bits, mask):
    """The first `count` tokens of `mask`, by `key` and then by `bits`."""
    order = jnp.lexsort((bits.ravel(), key.ravel(), ~mask.ravel()))
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(order.size))
    return mask & (rank.reshape(mask.shape) < count)
