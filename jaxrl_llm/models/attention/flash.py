"""Attention over packed rows in memory linear in their length, chosen by platform.

    GPU   cuDNN's flash attention in its packed layout, bfloat16
    TPU   splash attention, a Pallas kernel
    else  the reference in plain XLA, which holds the scores of a whole row

Shapes as in `attention`; a row of T tokens holds whole sequences one after the other.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.models.attention import packed as attention
from jaxrl_llm.models.attention.packed import PackedAttention, Window
from jaxrl_llm.models.partitioning import across
from jaxrl_llm.sharding import private_jax
from jaxrl_llm.sharding.mesh import platform_of
from jaxrl_llm.sharding.rules import Partition


def choose(
    partition: Partition,
    dtype: Any,
    max_sequences: int,
    wanted: Literal["auto", "xla"] = "auto",
) -> PackedAttention:
    """The fastest attention of the devices of `partition`, or the reference if wanted.

    Args:
      dtype: of queries, keys and values. cuDNN has no float32.
      max_sequences: no row holds more; padding at its end counts as one.
    """
    found, platform = attention.packed, platform_of(partition.mesh)
    if counts_sequences(partition, dtype, wanted):
        return across(partition, functools.partial(cudnn, max_sequences=max_sequences))
    if wanted == "auto" and platform == "tpu":
        return across(partition, splash)
    return across(partition, found) if partition.parts("tokens") > 1 else found


def counts_sequences(
    partition: Partition, dtype: Any, wanted: Literal["auto", "xla"] = "auto"
) -> bool:
    """Whether `choose` gives an attention that is compiled for `max_sequences`."""
    of_gpu = wanted == "auto" and platform_of(partition.mesh) == "gpu"
    return of_gpu and jnp.dtype(dtype).itemsize == 2


def cudnn(
    q: Float[Array, "R T N H"],
    k: Float[Array, "R T K H"],
    v: Float[Array, "R T K H"],
    sequence_ids: Int[Array, "R T"],
    positions: Int[Array, "R T"],
    *,
    window: Window,
    scale: float,
    softcap: float | None = None,
    max_sequences: int,
) -> Float[Array, "R T N H"]:
    """`attention.packed` by cuDNN. A score cap, which it lacks, goes to the reference.

    Args:
      window: static.
      max_sequences: no row holds more; padding at its end counts as one.
    """
    fused = private_jax.cudnn_attention()
    if softcap is not None:
        return attention.packed(
            q, k, v, sequence_ids, positions,
            window=window, scale=scale, softcap=softcap,
        )  # fmt: skip
    if max_sequences <= 2:  # padding comes last, where a causal mask hides it
        return fused.dot_product_attention(
            q,
            k,
            v,
            scale=scale,
            mask_type=fused.MaskType.CAUSAL,
            sliding_window_length=window,
        )
    starts, lengths = _segments(sequence_ids, max_sequences)
    offsets = jnp.pad(starts, ((0, 0), (0, 1)), constant_values=-1)
    return fused.dot_product_attention(
        q,
        k,
        v,
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=offsets,
        kv_offsets=offsets,
        scale=scale,
        mask_type=fused.MaskType.PADDING_CAUSAL,
        sliding_window_length=window,
    )


def splash(
    q: Float[Array, "R T N H"],
    k: Float[Array, "R T K H"],
    v: Float[Array, "R T K H"],
    sequence_ids: Int[Array, "R T"],
    positions: Int[Array, "R T"],
    *,
    window: Window,
    scale: float,
    softcap: float | None = None,
    interpret: bool = False,
) -> Float[Array, "R T N H"]:
    """`attention.packed` by splash attention, on one device: see `parallel.across`.

    Args:
      window: static.
      interpret: run the kernel without a TPU, slowly.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    T, N = q.shape[1:3]
    padded = -(-T // _BLOCK) * _BLOCK
    block = next(b for b in (1024, 512, 256, _BLOCK) if padded % b == 0)
    if window is None:
        mask = kernels.CausalMask((padded, padded))
    else:
        mask = kernels.LocalMask((padded, padded), (window - 1, 0), 0)
    kernel = kernels.make_splash_mha(
        kernels.MultiHeadMask([mask] * N),
        block_sizes=kernels.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            use_fused_bwd_kernel=True,
        ),
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name="attention",
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def row(q, k, v, ids):
        return kernel(q, k, v, kernels.SegmentIds(ids, ids))

    q = q * jnp.asarray(scale, q.dtype)
    q, k, v = (_lengthen(x, padded, 0).swapaxes(1, 2) for x in (q, k, v))
    out = jax.vmap(row)(q, k, v, _lengthen(sequence_ids, padded, -2))
    return out.swapaxes(1, 2)[:, :T]


_BLOCK = 128
"""Rows are padded to a multiple of it, the width of a TPU's vector register."""


def _lengthen(x: Array, length: int, value: int) -> Array:
    pad = [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, pad, constant_values=value)


def _segments(
    sequence_ids: Int[Array, "R T"], most: int
) -> tuple[Int[Array, "R S"], Int[Array, "R S"]]:
    """Where each sequence of a row starts, and how long it is; -1 past the last.

    Padding, which has an id of its own, is a sequence too: kernels leave the output of
    tokens outside of every sequence undefined.
    """
    T = sequence_ids.shape[1]
    before = jnp.pad(sequence_ids[:, :-1], ((0, 0), (1, 0)), constant_values=-2)
    first = sequence_ids != before

    def of_row(first):
        return jnp.nonzero(first, size=most, fill_value=T)[0].astype(jnp.int32)

    starts = jax.vmap(of_row)(first)
    ends = jnp.pad(starts[:, 1:], ((0, 0), (0, 1)), constant_values=T)
    there = starts < T
    return jnp.where(there, starts, -1), jnp.where(there, ends - starts, -1)
