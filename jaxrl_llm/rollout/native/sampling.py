"""Drawing one token per row from logits, on device, without sorting unless asked to.

B = rows, V = vocabulary. Everything is float32.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt

Mode = Literal["plain", "tempered", "truncated"]
"""What rows may ask for. plain: temperature 1, nothing cut off. tempered: any
temperature. truncated: top_k, top_p and min_p too, which need a sort. The most likely
token, temperature 0, in all of them."""
_BLOCK = 128  # tokens per block of the two-level inverse of the distribution function


class Sampled(NamedTuple):
    """A token for every row, and how likely it was."""

    tokens: Int[Array, " B"]
    logprobs: Float[Array, " B"]
    """Under the distribution that was sampled from."""
    full_logprobs: Float[Array, " B"]
    """Under softmax(logits / temperature), before anything was cut off; at temperature
    0 under softmax(logits)."""
    raw_logprobs: Float[Array, " B"]
    """Under softmax(logits)."""
    top_tokens: Int[Array, "B N"]
    """The most likely ones, the first first."""
    top_logprobs: Float[Array, "B N"]
    """Under the distribution that was sampled from; at temperature 0, where that is a
    single token, under softmax(logits)."""


def row_keys(
    seeds: UInt[Array, " B"],
    prompt_ids: Int[Array, " B"],
    samples: Int[Array, " B"],
    turns: Int[Array, " B"],
) -> Key[Array, " B"]:
    """One key per response: a function of what is asked, not of where it runs. What a
    later turn folds in is no number of a token."""

    def key(seed, prompt_id, sample, turn):
        first = jax.random.fold_in(
            jax.random.fold_in(jax.random.key(seed), prompt_id), sample
        )
        return jax.lax.select(turn == 0, first, jax.random.fold_in(first, -turn))

    return jax.vmap(key)(seeds, prompt_ids, samples, turns)


def sample(
    logits: Float[Array, "B V"],
    keys: Key[Array, " B"],
    counts: Int[Array, " B"],
    temperature: Float[Array, " B"],
    top_k: Int[Array, " B"],
    top_p: Float[Array, " B"],
    min_p: Float[Array, " B"],
    *,
    mode: Mode,
    top: int = 0,
) -> Sampled:
    """Draws token number `counts` of every response.

    Args:
      keys: of the responses; the draw uses fold_in(key, count).
      temperature: 0 takes the most likely token, with log-probability 0.
      top_k, top_p, min_p: see `Sampling`.
      mode: static; a promise about all rows. Less is computed for less.
      top: static; N, how many of the most likely tokens to tell.
    """
    uniforms = jax.vmap(
        lambda key, count: jax.random.uniform(jax.random.fold_in(key, count), (2,))
    )(keys, counts)
    greedy = temperature == 0.0
    if mode == "plain":
        tokens, logprobs = draw(logits, uniforms, greedy)
        certain = jnp.where(greedy, 0.0, logprobs)
        return Sampled(tokens, certain, logprobs, logprobs, *most_likely(logits, top))
    full = scaled = logits / jnp.where(greedy, 1.0, temperature)[:, None]
    if mode == "truncated":
        scaled = truncate(full, top_k, top_p, min_p)
    tokens, logprobs = draw(scaled, uniforms, greedy)
    raw_logprobs = _logprobs(logits, tokens)
    full_logprobs = _logprobs(full, tokens) if mode == "truncated" else logprobs
    return Sampled(
        tokens,
        jnp.where(greedy, 0.0, logprobs),
        jnp.where(greedy, raw_logprobs, full_logprobs),
        raw_logprobs,
        *most_likely(jnp.where(greedy[:, None], logits, scaled), top),
    )


def most_likely(
    logits: Float[Array, "B V"], count: int
) -> tuple[Int[Array, "B N"], Float[Array, "B N"]]:
    """The tokens of the largest logits, and their log-probabilities."""
    if count == 0:
        nothing = jnp.zeros((len(logits), 0))
        return nothing.astype(jnp.int32), nothing
    values, tokens = jax.lax.top_k(logits, count)
    return tokens, values - jax.nn.logsumexp(logits, axis=-1, keepdims=True)


def truncate(
    logits: Float[Array, "B V"],
    top_k: Int[Array, " B"],
    top_p: Float[Array, " B"],
    min_p: Float[Array, " B"],
) -> Float[Array, "B V"]:
    """Logits with every token that may not be drawn at -inf.

    In vLLM's order: min_p against the most likely token, then the top_k of what is
    left, then the smallest set of those whose renormalised probability reaches top_p.
    Tokens exactly as likely as the last one kept are kept too.

    Source: top-k Fan et al. 2018 (arXiv:1805.04833); top-p Holtzman et al. 2020
    (arXiv:1904.09751); min-p Nguyen et al. 2024 (arXiv:2407.01082).
    """
    V = logits.shape[-1]
    floor = logits.max(axis=-1) + jnp.log(min_p)
    ordered = jnp.sort(logits, axis=-1, descending=True)
    kth = jnp.where(top_k < 1, V, jnp.minimum(top_k, V)) - 1
    floor = jnp.maximum(floor, jnp.take_along_axis(ordered, kth[:, None], axis=1)[:, 0])
    ordered = jnp.where(ordered >= floor[:, None], ordered, -jnp.inf)
    probs = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    kept = (before < top_p[:, None]) & jnp.isfinite(ordered)
    # top_p = 1 keeps everything, however the sum above was rounded.
    kept |= (top_p >= 1.0)[:, None] & jnp.isfinite(ordered)
    floor = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1)
    return jnp.where(logits >= floor[:, None], logits, -jnp.inf)


def draw(
    logits: Float[Array, "B V"],
    uniforms: Float[Array, "B 2"],
    greedy: Bool[Array, " B"],
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """A token from softmax(logits), and its log-probability, by inverting the
    distribution function twice; where `greedy`, the most likely token.

    The first uniform number picks a block of 128 neighbouring tokens with its total
    probability, the second a token within it. One pass over the vocabulary, and two
    random numbers per token instead of V.
    """
    B, V = logits.shape
    pad = ((0, 0), (0, -V % _BLOCK))
    blocks = jnp.pad(logits, pad, constant_values=-jnp.inf).reshape(B, -1, _BLOCK)
    peaks = jnp.maximum(blocks.max(axis=-1), jnp.finfo(logits.dtype).min)
    totals = jnp.exp(blocks - peaks[..., None]).sum(axis=-1)
    peak = peaks.max(axis=-1, keepdims=True)
    totals *= jnp.exp(peaks - peak)
    block = _invert(totals, uniforms[:, 0])
    block = jnp.where(greedy, jnp.argmax(peaks, axis=-1), block)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0] - peak
    place = _invert(jnp.exp(inside), uniforms[:, 1])
    place = jnp.where(greedy, jnp.argmax(inside, axis=-1), place)
    chosen = jnp.take_along_axis(inside, place[:, None], axis=1)[:, 0]
    return block * _BLOCK + place, chosen - jnp.log(totals.sum(axis=-1))


def _logprobs(
    logits: Float[Array, "B V"], tokens: Int[Array, " B"]
) -> Float[Array, " B"]:
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def _invert(weights: Float[Array, "B n"], uniforms: Float[Array, " B"]):
    """Index i with probability weights[i] / sum; never one whose weight is 0."""
    total = jnp.cumsum(weights, axis=-1)
    index = jnp.sum(total <= uniforms[:, None] * total[:, -1:], axis=-1)
    places = jnp.arange(weights.shape[-1])[None]
    last = jnp.max(jnp.where(weights > 0, places, 0), axis=-1)
    return jnp.minimum(index, last).astype(jnp.int32)
