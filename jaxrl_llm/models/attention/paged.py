"""The decoder over a cache made of pages: reading prompts, and one more token per row.

A page holds keys and values of S neighbouring positions of one sequence, in every
layer. A table says where a sequence's pages are: position p is at place p % S of page
tables[b, p // S]. Page 0 belongs to nobody and fills up tables.

B = rows, T = new tokens in a row, n = pages of the longest sequence, P = pages, K =
key/value heads, H = head size.

A place of -1 is nowhere: that token's key and value are not kept.

Source: Kwon et al. 2023 (arXiv:2309.06180).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxrl_llm.models.apply import Params, model
from jaxrl_llm.models.architecture import Architecture
from jaxrl_llm.models.attention.packed import PackedAttention, Window
from jaxrl_llm.models.decoder import RotaryTable, rotate
from jaxrl_llm.models.moe import Experts, alone
from jaxrl_llm.models.quantised import Quantised, like, plain

PagedAttention = Callable[..., tuple[Any, Any, Any]]
"""`attend`, or something of the same arguments and results."""
Cache = Float[Array, "K P S H"] | Quantised
"""Keys, or values, of one layer; quantised, a scale [K P S] for each."""


@no_type_check  # JAX also builds such trees of shapes or shardings
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pages:
    """Keys and values of every layer."""

    keys: tuple[Cache, ...]
    values: tuple[Cache, ...]

    @property
    def size(self) -> int:
        """S, positions in a page."""
        return self.keys[0].shape[2]


def empty(arch: Architecture, num_pages: int, page_size: int, dtype: Any) -> Pages:
    """Pages of zeros; quantised if `dtype` has 8 bits."""
    shape = arch.num_kv_heads, num_pages, page_size, arch.head_dim

    def zeros() -> Cache:
        values = jnp.zeros(shape, dtype)
        return Quantised(values, jnp.zeros(shape[:-1])) if bits == 8 else values

    bits, layers = 8 * jnp.dtype(dtype).itemsize, range(arch.num_layers)
    return Pages(tuple(zeros() for _ in layers), tuple(zeros() for _ in layers))


def places(
    tables: Int[Array, "B n"], positions: Int[Array, "B T"], size: int
) -> Int[Array, "B T"]:
    """Where positions are in pages of a size; -1 for a position of -1."""
    page = jnp.take_along_axis(tables, jnp.maximum(positions, 0) // size, axis=1)
    return jnp.where(positions < 0, -1, page * size + positions % size)


def keep(
    cache: Cache, new: Float[Array, "B T K H"], places: Int[Array, "B T"]
) -> Cache:
    """The cache with new keys, or values, at their places."""
    (_, P, S, _), at = cache.shape, places.reshape(-1)
    # Every place is another, also those outside, where writes are dropped: with places
    # that could meet, a GPU writes atomically, and waits where many are the same.
    at = jnp.where(at < 0, P * S + jnp.arange(len(at)), at)
    new = new.reshape(-1, *new.shape[2:]).swapaxes(0, 1)
    return jax.tree.map(
        lambda x, new: x.at[:, at // S, at % S].set(
            new, mode="drop", unique_indices=True
        ),
        cache,
        like(new, cache),
    )


def copy(pages: Pages, source: Int[Array, " c"], target: Int[Array, " c"]) -> Pages:
    """What is in the pages `source` is also in the pages `target`; -1 is none."""
    beyond = pages.keys[0].shape[1] + jnp.arange(len(target))
    target = jnp.where(target < 0, beyond, target)
    return jax.tree.map(
        lambda x: x.at[:, target].set(x[:, source], mode="drop", unique_indices=True),
        pages,
    )


def prefill(
    arch: Architecture,
    params: Params,
    tokens: Int[Array, "R T"],
    positions: Int[Array, "R T"],
    sequence_ids: Int[Array, "R T"],
    places: Int[Array, "R T"],
    pages: Pages,
    *,
    dtype: Any,
    attention: PackedAttention,
    experts: Experts = alone,
    inline: bool = True,
) -> tuple[Float[Array, "R T D"], Pages]:
    """Prefills the beginnings of sequences, packed in rows.

    Args:
      params: fused or unstacked; a fused layer may have adapters, "lora".
      sequence_ids: a token sees its own sequence; padding has an id of its own.
      places: where each token's key and value belong, page * S + place within it.
        No two tokens share one.
      experts: how they are computed, see `expert_parallel.choose`.
      inline: lower every layer by itself, and not one of a kind that is called. Needed
        where XLA partitions the layers.

    Returns:
      Final hidden states, and the pages with what was read.
    """

    def attend_row(i, q, k, v, rotary, keys, values):
        q, k = rotated(q, k, rotary)
        # Later tokens see what is kept, so these do too.
        found = attention(
            q,
            plain(like(k, keys), dtype),
            plain(like(v, values), dtype),
            sequence_ids,
            positions,
            window=arch.window_of_layer[i],
            scale=arch.attention_scale,
            softcap=arch.attention_softcap,
        )
        return found, (keep(keys, k, places), keep(values, v, places))

    how = {"dtype": dtype, "experts": experts, "inline": inline}
    return _run(arch, params, tokens, positions, pages, attend_row, **how)


def extend(
    arch: Architecture,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    tables: Int[Array, "B n"],
    pages: Pages,
    *,
    dtype: Any,
    attention: PagedAttention,
    experts: Experts = alone,
    inline: bool = True,
) -> tuple[Float[Array, "B T D"], Pages]:
    """More tokens of sequences whose beginnings are in the pages: one each to decode,
    many to read a long prompt piece by piece.

    Args:
      params: fused or unstacked.
      positions: where each token stands in its sequence; -1 for padding.
      experts, inline: as of `prefill`.

    Returns:
      Final hidden states, and the pages with these tokens.
    """

    def attend_pages(i, q, k, v, rotary, keys, values):
        found, *kept = attention(
            q,
            k,
            v,
            rotary,
            keys,
            values,
            tables,
            positions,
            window=arch.window_of_layer[i],
            scale=arch.attention_scale,
            softcap=arch.attention_softcap,
        )
        return found, kept

    how = {"dtype": dtype, "experts": experts, "inline": inline}
    return _run(arch, params, tokens, positions, pages, attend_pages, **how)


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    rotary: RotaryTable,
    keys: Cache,
    values: Cache,
    tables: Int[Array, "B n"],
    positions: Int[Array, "B T"],
    *,
    window: Window,
    scale: float,
    softcap: float | None = None,
) -> tuple[Float[Array, "B T N H"], Cache, Cache]:
    """Rotates queries and new keys, keeps keys and values at their positions, then
    computes softmax(cap(scale * q k^T)) v over the positions up to each query's own.

    A page at a time, from the first that any row sees to the last: pages that nobody
    has filled are not read. A query at position -1 gets something finite and unused,
    and nothing of it is kept.

    Returns:
      What the queries found, and the caches.

    Source: online softmax, Milakov and Gimelshein 2018 (arXiv:1805.02867).
    """
    B, T, N, H = q.shape
    K, _, S, _ = keys.shape
    G = N // K
    q, k = rotated(q, k, rotary)
    at = places(tables, positions, S)
    keys, values = keep(keys, k, at), keep(values, v, at)
    q = q.reshape(B, T, K, G, H).transpose(2, 0, 3, 1, 4).reshape(K, B, G * T, H)

    def page(j, carry):
        peak, total, out = carry
        at = jax.lax.dynamic_index_in_dim(tables, j, axis=1, keepdims=False)
        k, v = (
            plain(jax.tree.map(lambda x: x[:, at], cache), q.dtype)
            for cache in (keys, values)
        )
        scores = scale * jnp.einsum(
            "kbqh,kbsh->kbqs", q, k, preferred_element_type=jnp.float32
        )
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        distance = positions[:, :, None] - (j * S + jnp.arange(S))[None, None]
        seen = distance >= 0
        if window is not None:
            seen &= distance < window
        seen = jnp.broadcast_to(seen[:, None], (B, G, T, S)).reshape(B, G * T, S)
        scores = jnp.where(seen[None], scores, -1e30)
        new = jnp.maximum(peak, scores.max(axis=-1))
        shrink, probs = jnp.exp(peak - new), jnp.exp(scores - new[..., None])
        products = jnp.einsum(
            "kbqs,kbsh->kbqh",
            probs.astype(q.dtype),
            v,
            preferred_element_type=jnp.float32,
        )
        out = out * shrink[..., None] + products
        return new, total * shrink + probs.sum(axis=-1), out

    last = jnp.max(positions) // S + 1
    first = 0
    if window is not None:
        oldest = jnp.where(positions < 0, jnp.max(positions), positions).min()
        first = jnp.maximum(oldest - window + 1, 0) // S
    start = (
        jnp.full((K, B, G * T), -1e30),
        jnp.zeros((K, B, G * T)),
        jnp.zeros((K, B, G * T, H)),
    )
    _, total, out = jax.lax.fori_loop(first, last, page, start)
    out = (out / jnp.maximum(total, 1e-30)[..., None]).astype(q.dtype)
    out = out.reshape(K, B, G, T, H).transpose(1, 3, 0, 2, 4)
    return out.reshape(B, T, N, H), keys, values


def rotated(q, k, rotary: RotaryTable):
    """Queries and keys, turned by the angles of their positions if there are any."""
    return (q, k) if rotary is None else (rotate(q, *rotary), rotate(k, *rotary))


def _run(
    arch, params, tokens, positions, pages, attend_layer, *, dtype, experts, inline
):
    adapters = [layer.get("lora") for _, layer in sorted(params["layers"].items())]
    layers = {
        i: {name: x for name, x in layer.items() if name != "lora"}
        for i, layer in params["layers"].items()
    }
    decoder = model(arch, params | {"layers": layers})
    tables = decoder.rotary_tables(positions)
    x, keys, values = decoder.embed(tokens, dtype), [], []

    # Layers of a kind are traced once: Python takes longer to trace all of them than
    # the compiler to make a program of them, which is the same program as without. With
    # calls, they are lowered once too; partitioned over "tensor" by each replica, XLA
    # aborts at them.
    @functools.partial(jax.jit, static_argnums=(0, 1), inline=inline)
    def run_layer(like, graph, weights, adapters, x, keys, values):
        def attend_and_keep(q, k, v):
            rotary = tables[arch.rope_of_layer[like]]
            return attend_layer(like, q, k, v, rotary, keys, values)

        # Attention rotates by itself: a kernel can do it on the way.
        layer = nnx.merge(graph, weights)
        return layer(x, None, attend_and_keep, adapters=adapters, experts=experts)

    kinds: dict[Any, int] = {}
    for i, layer in enumerate(decoder.layers):
        kind = arch.window_of_layer[i], arch.rope_of_layer[i], arch.has_experts(i)
        like = kinds.setdefault(kind, i)
        x, (k, v) = run_layer(
            like, *nnx.split(layer), adapters[i], x, pages.keys[i], pages.values[i]
        )
        keys.append(k)
        values.append(v)
    return decoder.norm(x), Pages(tuple(keys), tuple(values))
