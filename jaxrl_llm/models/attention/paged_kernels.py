"""Attention of one new token per row over pages, chosen by platform.

    GPU   a Pallas kernel that splits long sequences over the machine
    TPU   paged attention of JAX
    else  `paged.attend`, plain XLA

More than one new token (a long prompt, piece by piece) is always `paged.attend`'s.
Shapes as in `paged`.
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxrl_llm.models.attention import paged
from jaxrl_llm.models.attention.packed import Window
from jaxrl_llm.models.attention.paged import Cache, PagedAttention
from jaxrl_llm.models.decoder import RotaryTable
from jaxrl_llm.models.partitioning import on_each_device
from jaxrl_llm.models.quantised import Quantised, quantise
from jaxrl_llm.sharding.mesh import platform_of

_FEWEST_KEYS = 128
"""That are worth a program of their own."""
_PROGRAMS = 512
"""That keep a GPU of some 130 processors busy."""


def choose(
    mesh: Mesh, head_dim: int, wanted: Literal["auto", "xla"] = "auto"
) -> PagedAttention:
    """The fastest attention of the devices of `mesh`, or the reference if wanted.

    Args:
      mesh: heads are split over "tensor".
      head_dim: a GPU's kernel needs a power of two, a TPU's a multiple of 128.
    """
    platform = platform_of(mesh)
    if wanted == "xla":
        return paged.attend
    if platform == "gpu" and head_dim & (head_dim - 1) == 0:
        return functools.partial(_one_token, split_keys, mesh)
    if platform == "tpu" and head_dim % 128 == 0:
        return functools.partial(_one_token, on_tpu, mesh)
    return paged.attend


def _one_token(
    kernel, mesh, q, k, v, rotary, keys, values, tables, positions, **options
):
    """Each device runs the kernel on its own heads."""
    arguments = q, k, v, rotary, keys, values, tables, positions
    if q.shape[1] > 1:
        return paged.attend(*arguments, **options)
    local = functools.partial(kernel, **options)
    if mesh.size > 1:
        heads, cache = P(None, None, "tensor"), P("tensor")
        local = on_each_device(
            local,
            mesh,
            inputs=(heads, heads, heads, P(), cache, cache, P(), P()),
            outputs=(heads, cache, cache),
        )
    return local(*arguments)


def split_keys(
    q: Float[Array, "B 1 N H"],
    k: Float[Array, "B 1 K H"],
    v: Float[Array, "B 1 K H"],
    rotary: RotaryTable,
    keys: Cache,
    values: Cache,
    tables: Int[Array, "B n"],
    positions: Int[Array, "B 1"],
    *,
    window: Window,
    scale: float,
    softcap: float | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B 1 N H"], Cache, Cache]:
    """`paged.attend` on a GPU. Rows, heads and parts of the keys run side by side; what
    the parts found is then joined by their weights. Queries and the new key are rotated
    on the way; new key and value are written by the part that they belong to.

    Args:
      interpret: run the kernel without a GPU, slowly.

    Source: Dao et al. 2023, "Flash-Decoding for long-context inference".
    """
    (B, _, N, H), (K, _, S, _), n = q.shape, keys.shape, tables.shape[1]
    if rotary is not None and 2 * rotary[0].shape[-1] < H:
        q, k = paged.rotated(q, k, rotary)
        rotary = None
    G = N // K
    splits = min(-(-_PROGRAMS // (B * K)), -(-n * S // _FEWEST_KEYS))
    per_split = -(-n // splits)
    splits = -(-n // per_split)
    caches, form = jax.tree.flatten((keys, values))

    def of_head(x):
        zeros = (0,) * (x.ndim - 1)
        return pl.BlockSpec((None, *x.shape[1:]), lambda b, k, s: (k, *zeros))

    def of_part(*block):
        zeros = (0,) * len(block)
        return pl.BlockSpec(
            (None, None, None, *block), lambda b, k, s: (b, s, k, *zeros)
        )

    angles = [
        pl.BlockSpec((None, None, H // 2), lambda b, k, s: (b, 0, 0))
        for _ in rotary or ()
    ]
    out, peak, total, *caches = pl.pallas_call(
        functools.partial(
            _split,
            num_caches=len(caches),
            window=window,
            scale=scale,
            softcap=softcap,
            per_split=per_split,
            wait=(lambda: None) if interpret else triton.debug_barrier,
        ),
        grid=(B, K, splits),
        in_specs=[
            pl.BlockSpec((None, n), lambda b, k, s: (b, 0)),
            pl.BlockSpec((None, 1), lambda b, k, s: (b, 0)),
            pl.BlockSpec((None, None, G, H), lambda b, k, s: (b, k, 0, 0)),
            pl.BlockSpec((None, None, 1, H), lambda b, k, s: (b, 0, k, 0)),
            pl.BlockSpec((None, None, 1, H), lambda b, k, s: (b, 0, k, 0)),
            *map(of_head, caches),
            *angles,
        ],
        out_specs=[of_part(G, H), of_part(G), of_part(G), *map(of_head, caches)],
        out_shape=[
            jax.ShapeDtypeStruct(
                (B, splits, K, G, H), q.dtype if splits == 1 else jnp.float32
            ),
            jax.ShapeDtypeStruct((B, splits, K, G), jnp.float32),
            jax.ShapeDtypeStruct((B, splits, K, G), jnp.float32),
            *[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in caches],
        ],
        input_output_aliases={5 + i: 3 + i for i in range(len(caches))},
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=4),
        interpret=interpret,
        name="split_keys",
    )(tables, positions, q.reshape(B, K, G, H), k, v, *caches, *(rotary or ()))
    if splits > 1:
        weight = jnp.exp(peak - peak.max(axis=1, keepdims=True)) * total
        weight /= jnp.maximum(weight.sum(axis=1, keepdims=True), 1e-30)
        out = (weight[..., None] * out).sum(axis=1)
    return out.reshape(q.shape).astype(q.dtype), *jax.tree.unflatten(form, caches)


def _split(
    tables,  # [n]
    positions,  # [1]
    q,  # [G, H]
    k_new,  # [1, H]
    v_new,
    *others,  # caches; cosines and sines [H / 2], if any; results
    num_caches: int,
    window: int | None,
    scale: float,
    softcap: float | None,
    per_split: int,
    wait: Callable[[], None],
):
    # Caches are where they were before: keys [P, S, H] and, quantised, their scales
    # [P, S]; values likewise.
    caches = others[-num_caches:]
    keys, values = caches[: num_caches // 2], caches[num_caches // 2 :]
    # out [G, H], peaks and totals [G]
    *rotary, out, peaks, totals = others[num_caches:-num_caches]
    (G, H), S, position = q.shape, keys[0].shape[1], positions[0]
    rows = max(16, 1 << (G - 1).bit_length())  # tensor cores take no fewer
    of_head = jnp.arange(rows) < G
    of_head_each = jnp.broadcast_to(of_head[:, None], (rows, H))
    queries = _rotated(q, rows, rotary, of_head_each)
    first = pl.program_id(2) * per_split
    last = jnp.minimum(first + per_split, pl.cdiv(position + 1, S))
    if window is not None:
        first = jnp.maximum(first, jnp.maximum(position - window + 1, 0) // S)
    own = jnp.maximum(position, 0) // S
    mine = (position >= 0) & (own >= first) & (own < last)
    for (cache, *scales), new in (
        (keys, _rotated(k_new, 1, rotary, jnp.ones((1, H), bool))),
        (values, v_new[...]),
    ):
        place = tables[own], pl.ds(position % S, 1)
        if scales:
            new, its_scale = quantise(new, cache.dtype)
            here = jnp.broadcast_to(mine, (1,))
            triton.store(scales[0].at[place], its_scale, mask=here)
        here = jnp.broadcast_to(mine, (1, H))
        triton.store(cache.at[*place, :], new.astype(cache.dtype), mask=here)
    wait()

    def page(i, carry):
        peak, total, acc = carry
        at = tables[i]
        k, v = (cache[0][at].astype(queries.dtype) for cache in (keys, values))
        scores = scale * triton.dot(queries, k.T, allow_tf32=False)
        scores = _scaled(scores, keys, at)
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        distance = position - (i * S + jnp.arange(S))
        seen = distance >= 0
        if window is not None:
            seen &= distance < window
        scores = jnp.where(seen[None, :], scores, -1e30)
        new = jnp.maximum(peak, scores.max(axis=1))
        shrink, probs = jnp.exp(peak - new), jnp.exp(scores - new[:, None])
        weights = _scaled(probs, values, at).astype(v.dtype)
        products = triton.dot(weights, v, allow_tf32=False)
        return (
            new,
            total * shrink + probs.sum(axis=1),
            acc * shrink[:, None] + products,
        )

    start = (
        jnp.full((rows,), -1e30, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
        jnp.zeros((rows, H), jnp.float32),
    )
    peak, total, acc = jax.lax.fori_loop(first, last, page, start)
    mean = acc / jnp.maximum(total, 1e-30)[:, None]
    there = jnp.arange(rows)
    triton.store(out.at[_each(rows, H)], mean.astype(out.dtype), mask=of_head_each)
    triton.store(peaks.at[there], peak, mask=of_head)
    triton.store(totals.at[there], total, mask=of_head)


def _scaled(x, cache, page):
    """x [G, S] times the scales of a page's keys or values, if they have any."""
    return x * cache[1][page][None] if len(cache) > 1 else x


def _rotated(x, rows: int, rotary, mask):
    """`rotate` of x [rows, H], read from where it is."""
    H = x.shape[-1]
    row, column = _each(rows, H)
    whole = triton.load(x.at[row, column], mask=mask, other=0.0)
    if not rotary:
        return whole
    at, (cos, sin) = jnp.arange(H), rotary
    other = triton.load(x.at[row, (column + H // 2) % H], mask=mask, other=0.0)
    angle = at % (H // 2)
    turned = jnp.where(at < H // 2, -1.0, 1.0) * triton.load(sin.at[angle])
    out = whole.astype(jnp.float32) * triton.load(cos.at[angle])[None]
    return (out + other.astype(jnp.float32) * turned[None]).astype(x.dtype)


def _each(rows: int, columns: int):
    """Indices of every place. Unlike a slice they may lead over the edge, if masked."""
    return tuple(
        jnp.broadcast_to(x, (rows, columns))
        for x in (jnp.arange(rows)[:, None], jnp.arange(columns)[None])
    )


def on_tpu(
    q: Float[Array, "B 1 N H"],
    k: Float[Array, "B 1 K H"],
    v: Float[Array, "B 1 K H"],
    rotary: RotaryTable,
    keys: Cache,
    values: Cache,
    tables: Int[Array, "B n"],
    positions: Int[Array, "B 1"],
    *,
    window: Window,
    scale: float,
    softcap: float | None = None,
) -> tuple[Float[Array, "B 1 N H"], Cache, Cache]:
    """`paged.attend` by JAX's paged attention for TPUs, which has no windows: they go
    to the reference, and so do quantised caches."""
    from jax.experimental.pallas.ops.tpu import paged_attention as library

    if window is not None or isinstance(keys, Quantised):
        return paged.attend(
            q, k, v, rotary, keys, values, tables, positions,
            window=window, scale=scale, softcap=softcap,
        )  # fmt: skip
    q, k = paged.rotated(q, k, rotary)
    places = paged.places(tables, positions, keys.shape[2])
    keys, values = _keep_by_head(keys, k, places), _keep_by_head(values, v, places)
    blocks = next(i for i in (8, 4, 2, 1) if tables.shape[1] % i == 0)
    found = library.paged_attention(
        q[:, 0] * jnp.asarray(scale, q.dtype),
        keys,
        values,
        jnp.maximum(positions[:, 0] + 1, 1),
        tables,
        attn_logits_soft_cap=softcap,
        pages_per_compute_block=blocks,
    )
    return found[:, None], keys, values


def _keep_by_head(
    cache: Float[Array, "K P S H"],
    new: Float[Array, "B 1 K H"],
    places: Int[Array, "B 1"],
) -> Float[Array, "K P S H"]:
    """`paged.keep`, written head by head. A TPU writes all heads of a place at once
    only into a cache of another order than the kernel reads, and copies the whole cache
    from one to the other, in every layer and step."""
    (K, P, S, _), at = cache.shape, places.reshape(-1)
    at = jnp.where(at < 0, P * S + jnp.arange(len(at)), at)[None]
    return cache.at[jnp.arange(K)[:, None], at // S, at % S].set(
        new[:, 0].swapaxes(0, 1), mode="drop", unique_indices=True
    )
