"""Softmax attention with grouped heads: the reference in plain XLA, and its masks.

B = rows, T = query tokens, S = key tokens, N = query heads, K = key/value heads (each
serves N / K query heads), H = head size. Scores and softmax are float32.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

Window = int | Int[Array, ""] | None
PackedAttention = Callable[..., Float[Array, "R T N H"]]
"""`packed`, or something of the same arguments and result."""


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
    *,
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(cap(scale * q k^T)) v over the keys that `mask` allows.

    A query that may see no key (padding) gets the mean of all values: finite, unused.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    q = (q * scale).reshape(B, T, K, N // K, H)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask[:, None, None], scores, -1e30)
    probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", probs, v).reshape(B, T, N, H)


def packed(
    q: Float[Array, "R T N H"],
    k: Float[Array, "R T K H"],
    v: Float[Array, "R T K H"],
    sequence_ids: Int[Array, "R T"],
    positions: Int[Array, "R T"],
    *,
    window: Window,
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "R T N H"]:
    """`attend` within the sequences of packed rows: what every faster one must equal.

    Args:
      sequence_ids: padding has an id of its own.
      positions: of each token in its sequence, from 0.
      window: how many tokens back, itself included, a token sees; None: all.
    """
    mask = packed_mask(sequence_ids, positions, window)
    return attend(q, k, v, mask, scale=scale, softcap=softcap)


def shared_prompts(
    q: Float[Array, "R T N H"],
    k: Float[Array, "R T K H"],
    v: Float[Array, "R T K H"],
    sequence_ids: Int[Array, "R T"],
    positions: Int[Array, "R T"],
    *,
    window: Window,
    scale: float,
    softcap: float | None = None,
    prompt_ids: Int[Array, "R T"],
    is_prompt: Bool[Array, "R T"],
) -> Float[Array, "R T N H"]:
    """`packed` for rows in which several responses go on from one copy of their prompt:
    a token sees its own sequence and the prompt it goes on from.

    Args:
      prompt_ids: see `TrainBatch`, as well as `is_prompt`.
    """
    its_prompt = prompt_ids[:, :, None] == prompt_ids[:, None, :]
    its_prompt &= is_prompt[:, None, :]
    distance = positions[:, :, None] - positions[:, None, :]
    mask = its_prompt & (distance >= 0) & _near(distance, window)
    mask |= packed_mask(sequence_ids, positions, window)
    return attend(q, k, v, mask, scale=scale, softcap=softcap)


def packed_mask(
    sequence_ids: Int[Array, "B T"], positions: Int[Array, "B T"], window: Window
) -> Bool[Array, "B T T"]:
    """A token sees its own sequence up to itself, at most `window` tokens back."""
    same = sequence_ids[:, :, None] == sequence_ids[:, None, :]
    distance = positions[:, :, None] - positions[:, None, :]
    return same & (distance >= 0) & _near(distance, window)


def _near(distance: Shaped[Array, "..."], window: Window) -> Bool[Array, "..."]:
    return jnp.full((), True) if window is None else distance < window
