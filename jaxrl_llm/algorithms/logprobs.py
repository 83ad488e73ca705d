"""From hidden states to the log-probabilities of tokens, without all the logits.

This is the one place of the shift by one: what a model computes at index t - 1 predicts
the token at index t, and from here on index t of every array talks about token t.

Shapes: R = rows, T = tokens in a row, D = model, V = vocabulary, d = D or a part of it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Logprobs(NamedTuple):
    """What a model says about tokens given those before them; 0.0 where not asked."""

    logprobs: Float[Array, "R T"]
    """Log-probability of the token that stands there, nats."""
    entropy: Float[Array, "R T"]
    """Entropy of the distribution the token was drawn from, nats."""
    is_likeliest: Float[Array, "R T"] | None = None
    """1.0 where no other token is more likely, else 0.0; None if nobody asked."""


def of_tokens(
    hidden: Float[Array, "R T D"],
    output_matrix: Float[Array, "V d"],
    tokens: Int[Array, "R T"],
    positions: Int[Array, "R T"],
    mask: Bool[Array, "R T"],
    *,
    previous: Int[Array, "R T"] | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    entropy_gradient: bool = True,
    matrix_gradient: bool = True,
    keep: bool = False,
    likeliest: bool = False,
    chunk: int = 4096,
    split: tuple[str, ...] = (),
) -> Logprobs:
    """Log-probability and entropy of the tokens that `mask` asks for.

        logits[r, t]   = softcap(hidden[r, t - 1] @ output_matrix.T) / temperature
        logprobs[r, t] = logits[r, t, tokens[r, t]] - logsumexp(logits[r, t])
        entropy[r, t]  = logsumexp(logits[r, t]) - sum(softmax(logits) * logits)[r, t]

    The products with the output matrix run in the dtype of `hidden` and accumulate in
    float32; everything between them is float32. The [R, T, V] logits never exist at
    once, neither forward nor backward (unless `keep`), and only tokens that `mask` asks
    for cost anything.

    Args:
      hidden: after the final norm.
      positions: of each token in its sequence. One at position 0 has nothing before it
        and gets 0.0, whatever `mask` says.
      mask: tokens to look at, usually the responses.
      previous: where in its row the token before each stands; to its left if not given.
      logit_softcap: softcap(x) = cap * tanh(x / cap); None for the identity.
      entropy_gradient: if False, the entropy is a constant to differentiation.
      matrix_gradient: if False, `output_matrix` is one. Without a gradient of the
        entropy either, the logits are computed once: a token's gradient is then the
        cotangent of its log-probability times a vector [D] that is known beforehand.
      keep: softmax(logits), [R, T, V] in the dtype of `hidden`, for the backward pass,
        rather than computing the logits again. Only without a gradient of the entropy
        and a score cap, which need the logits themselves.
      likeliest: also tell where the token is the most likely one.
      chunk: logits exist for about so many tokens at a time.
      split: axes of a `jax.shard_map` around this, over which `output_matrix` is split
        along D and rows are split too. Its parts meet here, in the dtype of `hidden`;
        their gradients are summed over these axes in float32, once.
    """
    size = min(max(1, chunk // tokens.shape[0]), tokens.shape[1])
    mask = mask & (positions > 0)
    if keep and (entropy_gradient or logit_softcap is not None):
        raise ValueError(
            "keep needs entropy_gradient=False and logit_softcap=None, got "
            f"{entropy_gradient} and {logit_softcap}"
        )
    how = _How(
        temperature,
        logit_softcap,
        entropy_gradient,
        size,
        split,
        keep=keep,
        matrix_gradient=matrix_gradient,
        slope=not (matrix_gradient or entropy_gradient or keep),
        likeliest=likeliest,
    )
    with jax.named_scope("logprobs"):
        return Logprobs(*_score(hidden, output_matrix, tokens, mask, previous, how))


def of_logits(
    function: Callable[[Array, Array | None, Any], Any],
    hidden: Float[Array, "R T D"],
    output_matrix: Float[Array, "V d"],
    beside: Any,
    positions: Int[Array, "R T"],
    mask: Bool[Array, "R T"],
    *,
    other: tuple[Array, Array] | None = None,
    previous: Int[Array, "R T"] | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    other_softcap: float | None = None,
    chunk: int = 4096,
    split: tuple[str, ...] = (),
    other_split: tuple[str, ...] = (),
) -> Any:
    """Anything that is found token by token from the logits it was drawn from.

        found[r, t] = function(logits[r, t], other_logits[r, t], beside[r, t])

    with logits as in `of_tokens`. They exist for `chunk` tokens at a time, forward and
    backward; only tokens that `mask` asks for cost anything, and others get 0.

    Args:
      function: `(logits [R, t, V], other logits or None, beside [R, t, ...]) -> found`,
        a tree of [R, t, ...]. It is differentiated in `logits`, from which `hidden` and
        `output_matrix` get their gradients, if all that it returns are floats.
      beside: a tree of [R, T, ...] that talks about token t.
      other: hidden states and output matrix of another model that reads the same rows,
        such as a teacher. Not differentiated.
      other_softcap, other_split: as `logit_softcap` and `split`, of the other model.
      chunk: logits exist for about so many tokens at a time, those of both models
        together.

    The remaining arguments are those of `of_tokens`.
    """
    chunk = chunk if other is None else chunk // 2
    size = min(max(1, chunk // mask.shape[0]), mask.shape[1])
    mask = mask & (positions > 0)
    how = _How(temperature, logit_softcap, True, size, split)
    others = _How(temperature, other_softcap, True, size, other_split)
    with jax.named_scope("logits"):
        return _apply(
            hidden, output_matrix, other, beside, mask, previous, function, how, others
        )


def before(
    x: Float[Array, "R T"],
    positions: Int[Array, "R T"],
    mask: Bool[Array, "R T"],
    previous: Int[Array, "R T"] | None = None,
) -> Float[Array, "R T"]:
    """x[r, t - 1]: what was known before token t, such as the value of that state.

    0.0 where `mask` is False and where nothing comes before (position 0).

    Args:
      previous: where in its row the token before each stands; to its left if not given.
    """
    if previous is None:
        shifted = jnp.roll(x, 1, axis=1)
    else:
        shifted = jnp.take_along_axis(x, previous, axis=1)
    return jnp.where(mask & (positions > 0), shifted, 0.0)


def sum_pi_squared(
    hidden: Float[Array, "R T D"],
    output_matrix: Float[Array, "V d"],
    positions: Int[Array, "R T"],
    mask: Bool[Array, "R T"],
    *,
    previous: Int[Array, "R T"] | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    chunk: int = 4096,
    split: tuple[str, ...] = (),
) -> Float[Array, "R T"]:
    """How sure the policy was before each token: 1 if it knew, 1 / V if it had no idea.

        sum over v of p[v]^2 = exp(logsumexp(2 * logits) - 2 * logsumexp(logits))

    0.0 where `mask` is False. Arguments as in `of_tokens`; not for differentiation.
    """
    size = min(max(1, chunk // mask.shape[0]), mask.shape[1])
    mask = mask & (positions > 0)
    how = _How(temperature, logit_softcap, False, size, split)
    matrix = _whole(output_matrix, hidden.dtype, how)
    chosen = _choose(hidden, mask, previous, size)

    def of_chunk(i, found):
        logits = _logits(_columns(chosen.hidden, i, size), matrix, how)
        whole = jax.nn.logsumexp(logits, axis=-1)
        sure = jnp.exp(jax.nn.logsumexp(2.0 * logits, axis=-1) - 2.0 * whole)
        return _put(found, sure, i, size)

    found = jnp.zeros(chosen.order.shape)
    found = jax.lax.fori_loop(0, chosen.chunks, of_chunk, found)
    return _back(found, chosen, mask)


class _How(NamedTuple):
    """Static settings of `_score`."""

    temperature: float
    logit_softcap: float | None
    entropy_gradient: bool
    size: int
    split: tuple[str, ...]
    keep: bool = False
    matrix_gradient: bool = True
    slope: bool = False
    likeliest: bool = False


class _Chosen(NamedTuple):
    """The tokens that are asked for, first in each row: n columns, whole chunks.

    Chosen row by row, so that rows stay on the devices they are split over.
    """

    hidden: Float[Array, "R n D"]
    """What was known before each."""
    order: Int[Array, "R n"]
    """Where each stands in its row."""
    previous: Int[Array, "R n"]
    """Where the token before it stands."""
    rank: Int[Array, "R T"]
    """Its column here, of every token that is asked for."""
    chunks: Int[Array, ""]
    """How many chunks have any, in any row."""


def _choose(hidden, mask, previous, size: int) -> _Chosen:
    T = mask.shape[1]
    rank = jnp.cumsum(mask, axis=1) - 1
    order = jnp.argsort(~mask, axis=1, stable=True)
    order = jnp.pad(order, ((0, 0), (0, -T % size)))
    if previous is None:
        left = jnp.maximum(order - 1, 0)
    else:
        left = jnp.take_along_axis(previous, order, axis=1)
    known = jnp.take_along_axis(hidden, left[..., None], axis=1)
    most = jnp.max(rank[:, -1]) + 1
    return _Chosen(known, order, left, rank, -(-most // size))


def _back(x: Float[Array, "R n"], chosen: _Chosen, mask) -> Float[Array, "R T"]:
    """What was found of the chosen tokens to where they stand; 0.0 elsewhere."""
    found = jnp.take_along_axis(x, jnp.maximum(chosen.rank, 0), axis=1)
    return jnp.where(mask, found, 0.0)


def _taken(x: Array, columns: Int[Array, "R n"]) -> Array:
    """The columns of [R, T, ...]."""
    columns = columns.reshape(*columns.shape, *(1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, columns, axis=1)


def _whole(matrix, dtype, how: _How) -> Float[Array, "V D"]:
    matrix = matrix.astype(dtype)
    if not how.split:
        return matrix
    return jax.lax.all_gather(matrix, how.split, axis=1, tiled=True)


def _columns(x: Array, i, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis=1)


def _put(into: Array, x: Array, i, size: int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(into, x, i * size, axis=1)


def _logits(hidden, matrix, how: _How) -> Float[Array, "R t V"]:
    return _scaled(_products(hidden, matrix), how)


def _products(hidden, matrix) -> Float[Array, "R t V"]:
    return jnp.einsum("rtd,vd->rtv", hidden, matrix, preferred_element_type=jnp.float32)


def _scaled(logits: Float[Array, "R t V"], how: _How) -> Float[Array, "R t V"]:
    if how.logit_softcap is not None:
        logits = how.logit_softcap * jnp.tanh(logits / how.logit_softcap)
    return logits / how.temperature


def _met(
    d_known, d_matrix, hidden, output_matrix, chosen, there, mask, previous, how
) -> tuple[Array, Array | None]:
    """Gradients of hidden states and output matrix, from those of what was known before
    each chosen token and of the whole matrix, if that has one."""
    if how.split and d_matrix is not None:
        d_matrix = jax.lax.psum_scatter(
            d_matrix, how.split, scatter_dimension=1, tiled=True
        )
    if previous is None:  # what was known before a token serves only that token
        rank = jnp.roll(jnp.maximum(chosen.rank, 0), -1, axis=1)
        d_hidden = jnp.take_along_axis(d_known, rank[..., None], axis=1)
        asked = jnp.roll(mask, -1, axis=1)[..., None]  # position 0 never is
        d_hidden = jnp.where(asked, d_hidden, jnp.zeros((), hidden.dtype))
    else:
        rows = jnp.arange(hidden.shape[0])[:, None]
        d_known = jnp.where(there[..., None], d_known, 0.0)
        d_hidden = jnp.zeros(hidden.shape, jnp.float32)
        d_hidden = d_hidden.at[rows, chosen.previous].add(d_known.astype(jnp.float32))
        d_hidden = d_hidden.astype(hidden.dtype)
    if d_matrix is not None:
        d_matrix = d_matrix.astype(output_matrix.dtype)
    return d_hidden, d_matrix


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _score(hidden, output_matrix, tokens, mask, previous, how: _How):
    how = how._replace(keep=False, slope=False)
    return _score_forward(hidden, output_matrix, tokens, mask, previous, how)[0]


def _score_forward(hidden, output_matrix, tokens, mask, previous, how: _How):
    matrix = _whole(output_matrix, hidden.dtype, how)
    chosen = _choose(hidden, mask, previous, how.size)
    tokens = jnp.take_along_axis(tokens, chosen.order, axis=1)

    def of_chunk(i, carry):
        found, kept = carry
        logits = _logits(_columns(chosen.hidden, i, how.size), matrix, how)
        own = _columns(tokens, i, how.size)[..., None]
        own = jnp.take_along_axis(logits, own, axis=-1)[..., 0]
        most = jnp.max(logits, axis=-1)
        weights = jnp.exp(logits - most[..., None])
        norm = jnp.sum(weights, axis=-1)
        mean = jnp.sum(weights * logits, axis=-1) / norm
        new = (own, most + jnp.log(norm), mean)
        if how.likeliest:
            new += ((own >= most).astype(jnp.float32),)
        found = tuple(
            _put(into, x, i, how.size) for into, x in zip(found, new, strict=True)
        )
        if how.keep:
            p = jnp.exp(logits - new[1][..., None]).astype(hidden.dtype)
            kept = _put(kept, p, i, how.size)
        if how.slope:
            p = jnp.exp(logits - new[1][..., None])
            own = _columns(tokens, i, how.size)[..., None]
            slope = _d_logits(p, logits, own, 1.0, 1.0, how).astype(hidden.dtype)
            slope = jnp.einsum("rtv,vd->rtd", slope, matrix)
            kept = _put(kept, slope, i, how.size)
        return found, kept

    zeros = (jnp.zeros(tokens.shape),) * (3 + how.likeliest)
    kept = None
    if how.keep:
        kept = jnp.zeros((*tokens.shape, len(matrix)), hidden.dtype)
    if how.slope:
        kept = jnp.zeros_like(chosen.hidden)
    (own, total, mean, *likeliest), kept = jax.lax.fori_loop(
        0, chosen.chunks, of_chunk, (zeros, kept)
    )
    scored = _back(own - total, chosen, mask), _back(total - mean, chosen, mask)
    scored += tuple(_back(x, chosen, mask) for x in likeliest)
    return scored, (hidden, output_matrix, tokens, mask, previous, total, mean, kept)


def _score_backward(how: _How, kept, cotangents):
    """With p = softmax(logits), g and e the cotangents of logprobs and entropy:

    d logits[v] = g * [v = token] - p[v] * (g + e * (logits[v] - sum(p * logits)))
    """
    hidden, output_matrix, tokens, mask, previous, total, mean, known_before = kept
    matrix = _whole(output_matrix, hidden.dtype, how)
    chosen = _choose(hidden, mask, previous, how.size)
    there = jnp.arange(tokens.shape[1])[None] <= chosen.rank[:, -1:]
    of_logprob, of_entropy = (
        jnp.where(there, jnp.take_along_axis(x, chosen.order, axis=1), 0.0)
        for x in cotangents[:2]
    )

    def of_chunk(i, grads):
        known = _columns(chosen.hidden, i, how.size)
        own, g, e, log_norm, expected = (
            _columns(x, i, how.size)[..., None]
            for x in (tokens, of_logprob, of_entropy, total, mean)
        )
        if how.keep:
            p, logits = _columns(known_before, i, how.size).astype(jnp.float32), None
        else:
            logits = _logits(known, matrix, how)
            p = jnp.exp(logits - log_norm)
        pull = g + e * (logits - expected) if how.entropy_gradient else g
        d_logits = _d_logits(p, logits, own, g, pull, how).astype(hidden.dtype)
        d_hidden = jnp.einsum("rtv,vd->rtd", d_logits, matrix)
        if not how.matrix_gradient:
            return _put(grads[0], d_hidden, i, how.size), None
        d_matrix = jnp.einsum(
            "rtv,rtd->vd", d_logits, known, preferred_element_type=jnp.float32
        )
        return _put(grads[0], d_hidden, i, how.size), grads[1] + d_matrix

    zeros = jnp.zeros_like(chosen.hidden), None
    if how.matrix_gradient:
        zeros = zeros[0], jnp.zeros(matrix.shape, jnp.float32)
    if how.slope:
        d_known, d_matrix = of_logprob[..., None] * known_before, None
        d_known = d_known.astype(hidden.dtype)
    else:
        d_known, d_matrix = jax.lax.fori_loop(0, chosen.chunks, of_chunk, zeros)
    d_hidden, d_matrix = _met(
        d_known, d_matrix, hidden, output_matrix, chosen, there, mask, previous, how
    )
    return d_hidden, d_matrix, None, None, None


def _d_logits(p, logits, own, g, pull, how: _How) -> Float[Array, "R t V"]:
    """The cotangent of products with the output matrix: see `_score_backward`."""
    is_own = jnp.arange(p.shape[-1])[None, None] == own
    found = (jnp.where(is_own, g, 0.0) - p * pull) / how.temperature
    if how.logit_softcap is None:
        return found
    capped = logits * (how.temperature / how.logit_softcap)
    return found * (1.0 - capped**2)


_score.defvjp(_score_forward, _score_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _apply(hidden, output_matrix, other, beside, mask, previous, function, how, others):
    given = hidden, output_matrix, other, beside, mask, previous
    return _apply_forward(*given, function, how, others)[0]


def _chunks(given, how: _How, others: _How):
    """The chosen tokens, the whole output matrix, and what gives the inputs of chunk i
    but for its logits: known before, logits of the other model, beside."""
    hidden, output_matrix, other, beside, mask, previous = given
    matrix = _whole(output_matrix, hidden.dtype, how)
    chosen = _choose(hidden, mask, previous, how.size)
    beside = jax.tree.map(lambda x: _taken(x, chosen.order), beside)
    if other is not None:
        other_known = _taken(other[0], chosen.previous)
        other_matrix = _whole(other[1], other[0].dtype, others)

    def part(i):
        known, here = jax.tree.map(
            lambda x: _columns(x, i, how.size), (chosen.hidden, beside)
        )
        if other is None:
            return known, None, here
        said = _logits(_columns(other_known, i, how.size), other_matrix, others)
        return known, said, here

    return chosen, matrix, part


def _apply_forward(
    hidden, output_matrix, other, beside, mask, previous, function, how, others
):
    given = hidden, output_matrix, other, beside, mask, previous
    chosen, matrix, part = _chunks(given, how, others)

    def of_chunk(i):
        known, said, here = part(i)
        return function(_logits(known, matrix, how), said, here)

    rows, columns = chosen.order.shape
    found = jax.tree.map(
        lambda x: jnp.zeros((rows, columns, *x.shape[2:]), x.dtype),
        jax.eval_shape(of_chunk, jnp.int32(0)),
    )
    found = jax.lax.fori_loop(
        0,
        chosen.chunks,
        lambda i, found: jax.tree.map(
            lambda into, x: _put(into, x, i, how.size), found, of_chunk(i)
        ),
        found,
    )

    def back(x):
        asked = mask.reshape(*mask.shape, *(1,) * (x.ndim - 2))
        return jnp.where(asked, _taken(x, jnp.maximum(chosen.rank, 0)), 0)

    return jax.tree.map(back, found), given


def _apply_backward(function, how: _How, others: _How, given, cotangents):
    hidden, output_matrix, _, _, mask, previous = given
    chosen, matrix, part = _chunks(given, how, others)
    there = jnp.arange(chosen.order.shape[1])[None] <= chosen.rank[:, -1:]
    cotangents = jax.tree.map(
        lambda x: jnp.where(there, jnp.take_along_axis(x, chosen.order, axis=1), 0.0),
        cotangents,
    )

    def of_chunk(i, grads):
        known, said, here = part(i)
        _, pull = jax.vjp(
            lambda products: function(_scaled(products, how), said, here),
            _products(known, matrix),
        )
        (d_logits,) = pull(jax.tree.map(lambda x: _columns(x, i, how.size), cotangents))
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden = jnp.einsum("rtv,vd->rtd", d_logits, matrix)
        d_matrix = jnp.einsum(
            "rtv,rtd->vd", d_logits, known, preferred_element_type=jnp.float32
        )
        return _put(grads[0], d_hidden, i, how.size), grads[1] + d_matrix

    zeros = jnp.zeros_like(chosen.hidden), jnp.zeros(matrix.shape, jnp.float32)
    d_known, d_matrix = jax.lax.fori_loop(0, chosen.chunks, of_chunk, zeros)
    gradients = _met(
        d_known, d_matrix, hidden, output_matrix, chosen, there, mask, previous, how
    )
    return (*gradients, None, None, None, None)


_apply.defvjp(_apply_forward, _apply_backward)
