"""The value model: a decoder without output matrix, and one number per token.

`params` is a nested dict: "decoder", stacked as in `apply`, "weight" [D] and "bias" [].
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxrl_llm.models.apply import Params, Remat, forward, typed
from jaxrl_llm.models.architecture import Architecture
from jaxrl_llm.models.attention.packed import PackedAttention, packed
from jaxrl_llm.models.decoder import (
    Decoder,
    Init,
    Lookup,
    Shard,
    anywhere,
    take,
)
from jaxrl_llm.models.layer_loop import Loop, scan
from jaxrl_llm.models.lora import Lora
from jaxrl_llm.models.moe import Experts, alone
from jaxrl_llm.models.quantised import Bits


class Critic(nnx.Module):
    """Final hidden state -> value, which starts at 0 for every state."""

    def __init__(self, arch: Architecture, init: Init, scaled: bool = False):
        self.decoder = Decoder(headless(arch), init, stacked=True, scaled=scaled)
        self.weight = init((arch.hidden_size,), ("embed",), 0.0)
        self.bias = init((), (), 0.0)


def init_critic(arch: Architecture, params: Params) -> Params:
    """A critic that starts as a language model with the head at 0: it predicts 0.

    Args:
      params: of a decoder of `arch`, stacked. The critic shares its arrays; the output
        matrix is left out.
    """
    return {
        "decoder": {name: x for name, x in params.items() if name != "output"},
        "weight": jnp.zeros(arch.hidden_size, params["embedding"].dtype),
        "bias": jnp.zeros((), params["embedding"].dtype),
    }


def abstract_critic(
    arch: Architecture, *, dtype=jnp.float32, quantised: Bits | None = None
) -> Params:
    """Shapes and dtypes of `init_critic`, without computing anything.

    Args:
      quantised: as of `apply.abstract_params`.
    """
    state = _state(arch, dtype, quantised is not None)
    return typed(nnx.to_pure_dict(state), quantised)


def critic_axes(arch: Architecture, *, scaled: bool = False) -> Params:
    """A tuple of axis names for every parameter, in a tree of the same structure."""
    return nnx.to_pure_dict(
        jax.tree.map(
            lambda variable: variable.get_metadata("axes"),
            _state(arch, jnp.float32, scaled),
            is_leaf=lambda x: isinstance(x, nnx.Variable),
        )
    )


def values(
    arch: Architecture,
    params: Params,
    tokens: Int[Array, "R T"],
    positions: Int[Array, "R T"],
    sequence_ids: Int[Array, "R T"],
    *,
    dtype,
    remat: Remat = "none",
    attention: PackedAttention = packed,
    loop: Loop = scan,
    lookup: Lookup = take,
    experts: Experts = alone,
    shard: Shard = anywhere,
    lora: Lora | None = None,
) -> Float[Array, "R T"]:
    """The value of the state after each token of packed rows, float32.

        values = hidden @ weight + bias

    Arguments as in `forward`.
    """
    hidden = forward(
        headless(arch),
        params["decoder"],
        tokens,
        positions,
        sequence_ids,
        dtype=dtype,
        remat=remat,
        attention=attention,
        loop=loop,
        lookup=lookup,
        experts=experts,
        shard=shard,
        lora=lora,
    )
    weight = params["weight"].astype(jnp.float32)
    return jnp.einsum("rtd,d->rt", hidden.astype(jnp.float32), weight) + params["bias"]


def headless(arch: Architecture) -> Architecture:
    """A decoder without output matrix."""
    return dataclasses.replace(arch, tie_embeddings=True)


@functools.cache
def _state(arch: Architecture, dtype, scaled: bool):
    return nnx.state(
        nnx.eval_shape(lambda: Critic(arch, Init(nnx.Rngs(0), dtype), scaled))
    )
