"""From hidden states to the log-probabilities of tokens, without all the logits.

This is the one place of the shift by one: what a model computes at index t - 1 predicts
the token at index t, and from here on index t of every array talks about token t.

Shapes: R = rows, T = tokens in a row, D = model, V = vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Logprobs(NamedTuple):
    """What a model says about tokens given those before them; 0.0 where not asked."""

    logprobs: Float[Array, "R T"]
    """Log-probability of the token that stands there, nats."""
    entropy: Float[Array, "R T"]
    """Of the distribution it was drawn from, nats."""


def of_tokens(
    hidden: Float[Array, "R T D"],
    output_matrix: Float[Array, "V D"],
    tokens: Int[Array, "R T"],
    positions: Int[Array, "R T"],
    mask: Bool[Array, "R T"],
    *,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    capacity: int | None = None,
    chunk: int = 2048,
) -> Logprobs:
    """Log-probability and entropy of the tokens that `mask` asks for.

        logits[r, t]   = softcap(hidden[r, t - 1] @ output_matrix.T) / temperature
        logprobs[r, t] = logits[r, t, tokens[r, t]] - logsumexp(logits[r, t])
        entropy[r, t]  = logsumexp(logits[r, t]) - sum(softmax(logits) * logits)[r, t]

    The product with the output matrix runs in the dtype of `hidden` and accumulates in
    float32; everything after it is float32. The [R, T, V] logits never exist at once,
    neither forward nor backward.

    Args:
      hidden: after the final norm.
      positions: of each token in its sequence. One at position 0 has nothing before it
        and gets 0.0, whatever `mask` says.
      mask: tokens to look at, usually the responses.
      logit_softcap: softcap(x) = cap * tanh(x / cap); None for the identity.
      capacity: static; only so many tokens of each row are multiplied with the output
        matrix. If a row asks for more, those are NaN. T if not given.
      chunk: logits exist for about so many tokens at a time, over all devices.
    """
    mask = mask & (positions > 0)
    capacity = tokens.shape[1] if capacity is None else min(capacity, tokens.shape[1])
    # Chosen row by row, so that rows stay on the devices they are split over.
    chosen = jnp.argsort(~mask, axis=1, stable=True)[:, :capacity]
    before = jnp.maximum(chosen - 1, 0)
    scored = _in_chunks(
        lambda h, t: _score(h, output_matrix, t, temperature, logit_softcap),
        jnp.take_along_axis(hidden, before[..., None], axis=1),
        jnp.take_along_axis(tokens, chosen, axis=1),
        max(1, chunk // tokens.shape[0]),
    )
    rank = jnp.cumsum(mask, axis=1) - 1
    return Logprobs(
        *(
            jnp.where(mask, jnp.take_along_axis(x, rank, axis=1, mode="fill"), 0.0)
            for x in scored
        )
    )


def before(
    x: Float[Array, "R T"], positions: Int[Array, "R T"], mask: Bool[Array, "R T"]
) -> Float[Array, "R T"]:
    """x[r, t - 1]: what was known before token t, such as the value of that state.

    0.0 where `mask` is False and where nothing comes before (position 0).
    """
    return jnp.where(mask & (positions > 0), jnp.roll(x, 1, axis=1), 0.0)


def sum_pi_squared(
    hidden: Float[Array, "R T D"],
    output_matrix: Float[Array, "V D"],
    positions: Int[Array, "R T"],
    mask: Bool[Array, "R T"],
    *,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    chunk: int = 2048,
) -> Float[Array, "R T"]:
    """How sure the policy was before each token: 1 if it knew, 1 / V if it had no idea.

        sum over v of p[v]^2 = exp(logsumexp(2 * logits) - 2 * logsumexp(logits))

    0.0 where `mask` is False. Arguments as in `of_tokens`; not for differentiation.
    """

    def of_state(hidden, _):
        logits = _logits(hidden, output_matrix, temperature, logit_softcap)
        whole = jax.nn.logsumexp(logits, axis=-1)
        return jnp.exp(jax.nn.logsumexp(2.0 * logits, axis=-1) - 2.0 * whole)

    length = max(1, chunk // hidden.shape[0])
    return before(_in_chunks(of_state, hidden, positions, length), positions, mask)


def _logits(hidden, output_matrix, temperature, logit_softcap):
    logits = jnp.einsum(
        "rtd,vd->rtv",
        hidden,
        output_matrix.astype(hidden.dtype),
        preferred_element_type=jnp.float32,
    )
    if logit_softcap is not None:
        logits = logit_softcap * jnp.tanh(logits / logit_softcap)
    return logits / temperature


def _score(hidden, output_matrix, tokens, temperature, logit_softcap) -> Logprobs:
    logits = _logits(hidden, output_matrix, temperature, logit_softcap)
    total = jax.nn.logsumexp(logits, axis=-1)
    own = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    mean = jnp.sum(jnp.exp(logits - total[..., None]) * logits, axis=-1)
    return Logprobs(own - total, total - mean)


def _in_chunks(score, hidden, tokens, size: int):
    """`score` on `size` columns at a time; backward, one chunk is computed again."""
    R, T = tokens.shape
    if T <= size:
        return score(hidden, tokens)
    count = -(-T // size)

    def split(x):
        pad = [(0, 0), (0, count * size - T)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, pad).reshape(R, count, size, *x.shape[2:]).swapaxes(0, 1)

    scored = jax.lax.map(
        jax.checkpoint(lambda part: score(*part)), (split(hidden), split(tokens))
    )
    return jax.tree.map(
        lambda x: x.swapaxes(0, 1).reshape(R, count * size)[:, :T], scored
    )
