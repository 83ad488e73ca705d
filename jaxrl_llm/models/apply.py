"""The decoder as pure functions: training forward pass, prefill, one decode step.

`params` is a nested dict of arrays. Two layouts hold the same numbers: *stacked*
(training; every weight of a layer is one array [L, ...]) and *unstacked* (generation;
`params["layers"][i]`). `unstack` goes from the first to the second.
"""

import functools
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxrl_llm.models.architecture import Architecture
from jaxrl_llm.models.attention import (
    PackedAttention,
    attend,
    cached_mask,
    packed,
    packed_mask,
)
from jaxrl_llm.models.decoder import Decoder, Init, RotaryTable

Params = Any
Remat = Literal["none", "dots", "full", "offload"]
"""What the backward pass of a layer computes again. none: nothing. dots: all but matrix
products and attention. full: everything. offload: as dots, with what is kept in the
host's memory meanwhile."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of every layer, each [B, S, K, H]; slot s holds position s."""

    keys: tuple[Float[Array, "B S K H"], ...]
    values: tuple[Float[Array, "B S K H"], ...]

    @property
    def size(self) -> int:
        """S, positions that fit."""
        return self.keys[0].shape[1]


def init(
    arch: Architecture, key: PRNGKeyArray, *, dtype=jnp.float32, stacked: bool = True
) -> Params:
    """Random weights: normal, deviation 1 / sqrt(fan in)."""
    model = Decoder(arch, Init(nnx.Rngs(key), dtype), stacked=stacked)
    return nnx.to_pure_dict(nnx.state(model))


def abstract_params(
    arch: Architecture, *, dtype=jnp.float32, stacked: bool = True
) -> Params:
    """Shapes and dtypes of `init`, without computing anything."""
    return jax.eval_shape(
        lambda: init(arch, jax.random.key(0), dtype=dtype, stacked=stacked)
    )


def logical_axes(arch: Architecture, *, stacked: bool = True) -> Params:
    """A tuple of axis names for every parameter, in a tree of the same structure."""
    model = _abstract(arch, stacked)
    state = nnx.state(model)
    return nnx.to_pure_dict(
        jax.tree.map(
            lambda variable: variable.get_metadata("axes"),
            state,
            is_leaf=lambda x: isinstance(x, nnx.Variable),
        )
    )


def num_params(arch: Architecture) -> int:
    """How many numbers the model has; a tied output matrix counts once."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(arch)))


def num_matmul_params(arch: Architecture) -> int:
    """Of them, those that a token is multiplied with: all but an embedding that is not
    also the output matrix. Norms and biases, a few thousand, are counted too."""
    looked_up = 0 if arch.tie_embeddings else arch.vocab_size * arch.hidden_size
    return num_params(arch) - looked_up


def for_products(arch: Architecture, params: Params, dtype) -> Params:
    """Stacked weights as matrix products take them: cast once rather than at each use.

    Norms, and the embedding, whose gradient is a sum over all tokens, stay as they are.
    """

    def cast(x, axes):
        kept = "norm" in axes or "vocab" in axes
        return x if kept else x.astype(dtype)

    return jax.tree.map(cast, params, logical_axes(arch))


def unstack(params: Params, dtype) -> Params:
    """Stacked to unstacked, cast to `dtype`."""
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    layers = params["layers"]
    count = jax.tree.leaves(layers)[0].shape[0]
    return params | {
        "layers": {i: jax.tree.map(lambda x, i=i: x[i], layers) for i in range(count)}
    }


def output_matrix(params: Params) -> Float[Array, "V D"]:
    """What hidden states are multiplied with to give logits: [V, D]."""
    return params["output" if "output" in params else "embedding"]


def logits(
    arch: Architecture, params: Params, hidden: Float[Array, "*B D"]
) -> Float[Array, "*B V"]:
    """float32 scores of the next token, before any temperature."""
    matrix = output_matrix(params).astype(hidden.dtype)
    scores = jnp.einsum(
        "...d,vd->...v", hidden, matrix, preferred_element_type=jnp.float32
    )
    if arch.logit_softcap is not None:
        scores = arch.logit_softcap * jnp.tanh(scores / arch.logit_softcap)
    return scores


def forward(
    arch: Architecture,
    params: Params,
    tokens: Int[Array, "R T"],
    positions: Int[Array, "R T"],
    sequence_ids: Int[Array, "R T"],
    *,
    dtype,
    remat: Remat = "none",
    attention: PackedAttention = packed,
    unroll: bool | int = 1,
) -> Float[Array, "R T D"]:
    """Final hidden states (after the last norm) of packed rows.

    Args:
      params: stacked.
      positions: of each token within its sequence, from 0.
      sequence_ids: tokens see only their own sequence; padding has an id of its own.
      dtype: of activations, and of weights inside matrix products.
      remat: what the backward pass computes again, see `Remat`.
      attention: see `flash.choose`.
      unroll: layers per turn of the compiled loop; True: all, without a loop.
    """
    model = _model(arch, params, stacked=True)
    tables = model.rotary_tables(positions)
    graphdef, stacked = nnx.split(model.layers)
    scale = arch.head_dim**-0.5 if arch.query_scale is None else arch.query_scale
    windows = sorted(set(arch.window_of_layer), key=str)

    def looking_back(window):
        def attend_rows(q, k, v):
            return attention(
                q,
                k,
                v,
                sequence_ids,
                positions,
                window=window,
                scale=scale,
                softcap=arch.attention_softcap,
            )

        return attend_rows

    def layer(x, state, rope_index, window_index):
        @jax.named_scope("attention")
        def attend_rows(q, k, v):
            kinds = [looking_back(window) for window in windows]
            if len(kinds) == 1:
                return kinds[0](q, k, v), None
            return jax.lax.switch(window_index, kinds, q, k, v), None

        with jax.named_scope("layer"):
            x, _ = nnx.merge(graphdef, state)(x, _pick(tables, rope_index), attend_rows)
        return x

    if remat != "none":
        layer = jax.checkpoint(layer, policy=_POLICIES[remat])

    def body(x, scanned):
        return layer(x, *scanned), ()

    ropes = jnp.array(arch.rope_of_layer, jnp.int32)
    kinds = jnp.array([windows.index(w) for w in arch.window_of_layer], jnp.int32)
    x = model.embed(tokens, dtype)
    x, _ = jax.lax.scan(body, x, (stacked, ropes, kinds), unroll=unroll)
    return model.norm(x)


def prefill(
    arch: Architecture,
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    *,
    dtype,
) -> tuple[Float[Array, "B D"], Cache]:
    """Reads right-padded prompts.

    Args:
      params: unstacked.
      lengths: tokens in each prompt, at least 1.

    Returns:
      The hidden state of each prompt's last token, and a cache of T positions. What the
      cache holds past a prompt's length is never read: `decode` writes a position
      before it looks at it.
    """
    model = _model(arch, params, stacked=False)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    tables = model.rotary_tables(positions)
    whole = jnp.zeros_like(tokens)
    x, keys, values = model.embed(tokens, dtype), [], []
    for i, layer in enumerate(model.layers):
        mask = packed_mask(whole, positions, arch.window_of_layer[i])
        x, (k, v) = layer(
            x,
            tables[arch.rope_of_layer[i]],
            lambda q, k, v, mask=mask: (_attend(arch, q, k, v, mask), (k, v)),
        )
        keys.append(k)
        values.append(v)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return model.norm(last), Cache(tuple(keys), tuple(values))


def decode(
    arch: Architecture,
    params: Params,
    tokens: Int[Array, " B"],
    positions: Int[Array, " B"],
    cache: Cache,
    *,
    dtype,
) -> tuple[Float[Array, "B D"], Cache]:
    """One more token for every row: its hidden state, and the cache that holds it.

    Args:
      params: unstacked.
      positions: where each token stands, below `cache.size`.
    """
    model = _model(arch, params, stacked=False)
    tables = model.rotary_tables(positions[:, None])
    rows = jnp.arange(tokens.shape[0])
    x, keys, values = model.embed(tokens[:, None], dtype), [], []
    for i, layer in enumerate(model.layers):
        mask = cached_mask(positions, cache.size, arch.window_of_layer[i])

        def attend_cache(q, k, v, i=i, mask=mask):
            k = cache.keys[i].at[rows, positions].set(k[:, 0])
            v = cache.values[i].at[rows, positions].set(v[:, 0])
            return _attend(arch, q, k, v, mask), (k, v)

        x, (k, v) = layer(x, tables[arch.rope_of_layer[i]], attend_cache)
        keys.append(k)
        values.append(v)
    return model.norm(x[:, 0]), Cache(tuple(keys), tuple(values))


def _is_dot(primitive, *_, **params) -> bool:
    """Whether `dots` keeps the result: a product with weights, or flash attention."""
    if primitive.name == "dot_general":
        _, (batch, _) = params["dimension_numbers"]
        return not batch
    return "attention" in f"{primitive.name} {params.get('name')}"


def _to_host(primitive, *inputs, **params):
    """`_is_dot`, with the products in the host's memory."""
    if primitive.name == "dot_general":
        return _OFFLOAD_DOTS(primitive, *inputs, **params)
    return _is_dot(primitive, *inputs, **params)


_OFFLOAD_DOTS = jax.checkpoint_policies.offload_dot_with_no_batch_dims(
    "device", "pinned_host"
)
_POLICIES = {"dots": _is_dot, "full": None, "offload": _to_host}


def _attend(arch: Architecture, q, k, v, mask):
    scale = arch.head_dim**-0.5 if arch.query_scale is None else arch.query_scale
    return attend(q, k, v, mask, scale=scale, softcap=arch.attention_softcap)


def _pick(tables: list[RotaryTable], index) -> RotaryTable:
    """The table of a scanned layer; one that rotates by nothing stands for None."""
    if len(tables) == 1:
        return tables[0]
    given = next(table for table in tables if table is not None)
    still = (jnp.ones_like(given[0]), jnp.zeros_like(given[1]))
    filled = [still if table is None else table for table in tables]
    return jax.tree.map(lambda *parts: jnp.stack(parts)[index], *filled)


@functools.cache
def _abstract(arch: Architecture, stacked: bool) -> Decoder:
    return nnx.eval_shape(
        lambda: Decoder(arch, Init(nnx.Rngs(0), jnp.float32), stacked=stacked)
    )


def _model(arch: Architecture, params: Params, stacked: bool) -> Decoder:
    return nnx.merge(nnx.graphdef(_abstract(arch, stacked)), nnx.State(params))
