"""One Transformer decoder in Flax NNX. Families differ by `Architecture` fields.

Weights are [in, out]-ordered and carry logical axis names in their `axes` metadata.
Training keeps the layers of a model stacked in one array per weight and scans over
them; generation keeps one array per layer (`stacked=False`), with the matrices that
multiply the same input joined (`fused=True`): fewer and larger products.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxrl_llm.models.architecture import Architecture
from jaxrl_llm.models.moe import PRODUCT, Experts, Routed, Router, alone, route
from jaxrl_llm.models.quantised import product

# (queries, keys, values) -> (attended, whatever is to be kept of keys and values)
Attend = Callable[..., tuple[Array, Any]]
# (activation, *names of its axes) -> the same, laid out by them
Shard = Callable[..., Array]
# (table [V, D], tokens [R, T], dtype) -> [R, T, D] of that dtype
Lookup = Callable[[Array, Array, Any], Array]
RotaryTable = tuple[Float[Array, "B T h"], Float[Array, "B T h"]] | None
# {"q": {"a": ..., "b": ...}, ...} of one layer, see `lora.scaled`
Adapters = Mapping[str, Mapping[str, Array]]
Thin = tuple[Array | None, Array | None]


def anywhere(x: Array, *axes: str | None) -> Array:
    """The `Shard` that leaves the layout to the compiler."""
    return x


def take(
    table: Float[Array, "V D"], tokens: Int[Array, "R T"], dtype
) -> Float[Array, "R T D"]:
    """The `Lookup` whose gradient adds in whichever order the compiler chooses."""
    return jnp.take(table, tokens, axis=0).astype(dtype)


class Decoder(nnx.Module):
    """Embedding, L layers, final norm, output matrix."""

    def __init__(
        self,
        arch: Architecture,
        init: "Init",
        *,
        stacked: bool,
        fused: bool = False,
        scaled: bool = False,
    ):
        self.arch = arch
        D, V = arch.hidden_size, arch.vocab_size
        self.embedding = init((V, D), ("vocab", "embed"), 0.02)
        routed = [arch.has_experts(i) for i in range(arch.num_layers)]
        if stacked:
            dense = len(routed) - sum(routed)
            self.layers = Layer(
                arch,
                init.stack(len(routed)),
                fused,
                scaled,
                dense=init.stack(dense) if dense else None,
                routed=init.stack(sum(routed)) if any(routed) else None,
            )
        else:
            self.layers = nnx.List(
                Layer.one(arch, init, fused, scaled, i) for i in routed
            )
        self.norm = Norm(arch, init, D)
        self.output = (
            None if arch.tie_embeddings else init((V, D), ("vocab", "embed"), D**-0.5)
        )

    def embed(
        self,
        tokens: Int[Array, "B T"],
        dtype,
        shard: Shard = anywhere,
        lookup: Lookup = take,
    ) -> Float[Array, "B T D"]:
        """Token embeddings in the compute dtype."""
        x = lookup(self.embedding[...], tokens, dtype)
        # Each device looks up its part of the width, of all rows, and then exchanges
        # tokens for the rest: they are fewer bytes than the table.
        x = shard(shard(x, "looked_up", None, "embed"), "rows", "tokens", None)
        if self.arch.embed_scale:
            x = x * jnp.asarray(self.arch.hidden_size**0.5, dtype)
        return x

    def output_matrix(self) -> Float[Array, "V D"]:
        """Rows are what hidden states are multiplied with to give logits."""
        return (self.embedding if self.output is None else self.output)[...]

    def rotary_tables(self, positions: Int[Array, "B T"]) -> list[RotaryTable]:
        """Cosines and sines for each kind of position embedding in the model."""
        tables: list[RotaryTable] = []
        for rope in self.arch.rope:
            if rope is None:
                tables.append(None)
                continue
            frequencies = jnp.asarray(rope.frequencies(self.arch.head_dim))
            angles = positions[..., None].astype(jnp.float32) * frequencies[None, None]
            cos, sin = jnp.cos(angles), jnp.sin(angles)
            tables.append((cos * rope.attention_factor, sin * rope.attention_factor))
        return tables


class Layer(nnx.Module):
    """Attention, then a gated feed-forward, each around a residual.

    Fused, `qkv` holds for every key/value head its queries, then its key and value, so
    that heads can still be split over devices, and `gate_up` both of its halves.

    Every matrix begins with its axis "embed", also those that write to the residual:
    what is split along another axis would be transposed to be gathered.

    Args:
      scaled: matrices are `quantised.matrices`. Fused ones are multiplied as they are,
        the others as the numbers that they stand for.
    """

    def __init__(
        self,
        arch: Architecture,
        init: "Init",
        fused: bool,
        scaled: bool,
        *,
        dense: "Init | None",
        routed: "Init | None",
    ):
        """A layer, or a stack of some with a plain feed-forward and some with experts.

        Args:
          dense: makes the parameters of the feed-forward, if there is one.
          routed: makes those of the experts.
        """
        self.arch, self.fused = arch, fused
        D, F, H = arch.hidden_size, arch.intermediate_size, arch.head_dim
        N, K = arch.num_heads, arch.num_kv_heads
        std = D**-0.5

        def bias(shape, axes, wanted):
            return init(shape, axes, 0.0) if wanted else None

        def scale(shape, axes):
            return init(shape, axes, None) if scaled else None

        self.attention_norm = Norm(arch, init, D)
        if fused:
            group, axes = (K, N // K + 2, H), ("kv_heads", None, "head")
            self.qkv = init((D, *group), ("embed", *axes), std)
            self.qkv_scale = scale(group, axes)
            self.qkv_bias = bias(group, axes, arch.qkv_bias)
        else:
            self.q = init((D, N, H), ("embed", "heads", "head"), std)
            self.k = init((D, K, H), ("embed", "kv_heads", "head"), std)
            self.v = init((D, K, H), ("embed", "kv_heads", "head"), std)
            self.q_scale = scale((N, H), ("heads", "head"))
            self.k_scale = scale((K, H), ("kv_heads", "head"))
            self.v_scale = scale((K, H), ("kv_heads", "head"))
            self.q_bias = bias((N, H), ("heads", "head"), arch.qkv_bias)
            self.k_bias = bias((K, H), ("kv_heads", "head"), arch.qkv_bias)
            self.v_bias = bias((K, H), ("kv_heads", "head"), arch.qkv_bias)
        self.o = init((D, N, H), ("embed", "heads", "head"), (N * H) ** -0.5)
        self.o_scale = scale((D,), ("norm",))
        self.o_bias = bias((D,), ("norm",), arch.output_bias)
        together = arch.qk_norm_together
        q_size, k_size = ((N, H), (K, H)) if together else ((H,), (H,))
        self.q_norm = Norm(arch, init, *q_size) if arch.qk_norm else None
        self.k_norm = Norm(arch, init, *k_size) if arch.qk_norm else None
        self.post_attention_norm = Norm(arch, init, D) if arch.post_norms else None
        self.mlp_norm = Norm(arch, init, D)
        self.post_mlp_norm = Norm(arch, init, D) if arch.post_norms else None
        self.moe = None if routed is None else Routed(arch, routed, scaled)
        if dense is None:
            return
        init = dense
        if fused:
            self.gate_up = init((D, 2, F), ("embed", None, "mlp"), std)
            self.gate_up_scale = scale((2, F), (None, "mlp"))
            self.gate_up_bias = bias((2, F), (None, "mlp"), arch.mlp_bias)
        else:
            self.gate = init((D, F), ("embed", "mlp"), std)
            self.up = init((D, F), ("embed", "mlp"), std)
            self.gate_scale = scale((F,), ("mlp",))
            self.up_scale = scale((F,), ("mlp",))
            self.gate_bias = bias((F,), ("mlp",), arch.mlp_bias)
            self.up_bias = bias((F,), ("mlp",), arch.mlp_bias)
        self.down = init((D, F), ("embed", "mlp"), F**-0.5)
        self.down_scale = scale((D,), ("norm",))
        self.down_bias = bias((D,), ("norm",), arch.mlp_bias)

    @classmethod
    def one(
        cls, arch: Architecture, init: "Init", fused: bool, scaled: bool, routed: bool
    ) -> "Layer":
        """A single layer."""
        kind = (
            {"dense": None, "routed": init}
            if routed
            else {"dense": init, "routed": None}
        )
        return cls(arch, init, fused, scaled, **kind)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rotary: RotaryTable,
        attend: Attend,
        shard: Shard = anywhere,
        adapters: Adapters | None = None,
        experts: Experts = alone,
        router: Router = route,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """The layer's output, and what `attend` keeps.

        Args:
          experts: how they are computed, if the layer has any.
          router: which of them tokens go to.
          adapters: of some matrices; for a fused layer those of `fuse_adapters`.
        """
        inner, outer = ("rows", "tokens", None), ("rows", "residual", None)
        normed = shard(self.attention_norm(x), *inner)
        attended, kept = self._attention(normed, rotary, attend, shard, adapters)
        x = x + shard(_maybe(self.post_attention_norm, attended), *outer)
        normed = shard(self.mlp_norm(x), *inner)
        if self.moe is None:
            computed = self._mlp(normed, shard, adapters)
        else:
            computed = self.moe(normed, self._activated, experts, shard, router)
        x = x + shard(_maybe(self.post_mlp_norm, computed), *outer)
        return x, kept

    def _attention(self, x, rotary, attend, shard, adapters):
        heads, kv_heads = (
            ("rows", "tokens", name, "head") for name in ("heads", "kv_heads")
        )
        q, k, v = self._heads(x, adapters)
        q, k, v = shard(q, *heads), shard(k, *kv_heads), shard(v, *kv_heads)
        q, k = _maybe(self.q_norm, q), _maybe(self.k_norm, k)
        if (most := self.arch.qkv_clip) is not None:
            q, k, v = (jnp.clip(x, -most, most) for x in (q, k, v))
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        out, kept = attend(q, k, v)
        out = shard(out, *heads)
        (adapter,) = _thin("btnh,dnh->btd", out, adapters, "o")
        return self._linear("btnh,dnh->btd", out, "o", adapter), kept

    def _linear(self, equation, x, name, adapter, wide=False):
        """`_linear` with the matrix of that name."""
        weight, scale = getattr(self, name), getattr(self, f"{name}_scale")
        whole = scale is not None and not self.fused
        return _linear(
            equation,
            x,
            weight,
            getattr(self, f"{name}_bias"),
            scale,
            adapter=adapter,
            wide=wide,
            whole=whole,
        )

    def _heads(self, x, adapters):
        """Queries, keys and values."""
        if not self.fused:
            equation = "btd,dnh->btnh"
            thin = _thin(equation, x, adapters, "q", "k", "v")
            q, k, v = (
                self._linear(equation, x, name, adapter)
                for name, adapter in zip("qkv", thin, strict=True)
            )
            return q, k, v
        equation = "btd,dkgh->btkgh"
        (adapter,) = _thin(equation, x, adapters, "qkv")
        qkv = self._linear(equation, x, "qkv", adapter)
        q = qkv[..., :-2, :].reshape(*x.shape[:2], -1, self.arch.head_dim)
        return q, qkv[..., -2, :], qkv[..., -1, :]

    def _mlp(self, x, shard, adapters):
        if self.fused:
            equation = "btd,dcf->btcf"
            (adapter,) = _thin(equation, x, adapters, "gate_up")
            both = self._linear(equation, x, "gate_up", adapter)
            gate, up = both[:, :, 0], both[:, :, 1]
        else:
            equation = "btd,df->btf"
            thin = _thin(equation, x, adapters, "gate", "up")
            gate = self._linear(equation, x, "gate", thin[0], wide=True)
            up = self._linear(equation, x, "up", thin[1], wide=True)
        hidden = shard(self._activated(gate) * up, "rows", "tokens", "mlp")
        equation = "btf,df->btd"
        (adapter,) = _thin(equation, hidden, adapters, "down")
        return self._linear(equation, hidden, "down", adapter)

    def _activated(self, x):
        match self.arch.activation:
            case "silu":
                return jax.nn.silu(x)
            case "gelu_tanh":
                return jax.nn.gelu(x, approximate=True)


class Norm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32.

    Source: Zhang and Sennrich 2019 (arXiv:1910.07467).
    """

    def __init__(self, arch: Architecture, init: "Init", *size: int):
        self.eps, self.offset = arch.norm_eps, arch.norm_offset
        self.scale = init(size, ("norm",) * len(size), None)

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        """Normalises the last axis, or as many as there are sizes."""
        x32 = x.astype(jnp.float32)
        scale = self.scale[...].astype(jnp.float32)
        last = tuple(range(-scale.ndim, 0))
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32**2, axis=last, keepdims=True) + self.eps)
        scale = jnp.expand_dims(scale, tuple(range(x.ndim - scale.ndim)))
        if self.offset:
            return (x32 * (1.0 + scale)).astype(x.dtype)
        return x32.astype(x.dtype) * scale.astype(x.dtype)


class Init:
    """Makes parameters: normal with a given deviation, or ones where it is None.

    `stack(n)` makes every parameter n-fold, with a leading "layers" axis.
    """

    def __init__(self, rngs: nnx.Rngs, dtype, leading: tuple[int, ...] = ()):
        self.rngs, self.dtype, self.leading = rngs, dtype, leading

    def stack(self, n: int) -> "Init":
        """This initialiser for n layers at once."""
        return Init(self.rngs, self.dtype, (n,))

    def __call__(self, shape, axes, std: float | None, dtype=None) -> nnx.Param:
        """A parameter of `shape` whose axes have these logical names.

        Args:
          dtype: where it is not that of the other parameters.
        """
        shape = self.leading + shape
        axes = ("layers",) * len(self.leading) + axes
        if std is None:
            value = jnp.ones(shape, self.dtype)
        elif std == 0.0:
            value = jnp.zeros(shape, dtype or self.dtype)
        else:
            value = std * jax.random.normal(self.rngs.params(), shape, self.dtype)
        return nnx.Param(value, axes=axes)


def rotate(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T h"], sin: Float[Array, "B T h"]
) -> Float[Array, "B T N H"]:
    """Rotates pair (x[i], x[i + h]) by the angle of its position, in float32. What lies
    behind the h = H/2 pairs, where there are fewer, stays."""
    x, still = x[..., : 2 * cos.shape[-1]], x[..., 2 * cos.shape[-1] :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    out = jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )
    out = out.astype(x.dtype)
    return jnp.concatenate([out, still], axis=-1) if still.shape[-1] else out


def _linear(
    equation: str,
    x,
    weight: nnx.Param,
    bias: nnx.Param | None,
    scale: nnx.Param | None = None,
    adapter: Thin | None = None,
    wide: bool = False,
    whole: bool = False,
):
    """The product with a weight and what its adapter adds.

    With adapters it has a name, as has (x a): what a backward pass that keeps products
    keeps. The two terms of the sum have none.

    Args:
      wide: the result is much wider than x, see `_wide`.
      whole: the weight has a scale and stays as it is: see `_frozen`.
    """
    more, b = adapter or (None, None)
    if more is not None and wide:
        matrix = (weight[...], scale[...]) if whole else weight[...].astype(x.dtype)
        out = _wide(equation, x, matrix, more, b)
    elif whole:
        out = _frozen(equation, x, weight[...], scale[...])
    elif scale is None:
        out = jnp.einsum(equation, x, weight[...].astype(x.dtype))
    else:
        out = product(equation, x, weight[...], scale[...])
    if more is not None and not wide:
        out = out + jnp.einsum(_of_thin(equation), more, b)
    if adapter is not None:
        out = checkpoint_name(out, PRODUCT)
    if bias is None:
        return out
    value = bias[...].astype(x.dtype)
    return out + jnp.expand_dims(value, tuple(range(out.ndim - value.ndim)))


def _of_thin(equation: str) -> str:
    """How x a and b are multiplied, where x and the matrix are as in `equation`."""
    inputs, result = equation.split("->")
    made = "".join(axis for axis in result if axis not in inputs.split(",")[0])
    return f"btr,r{made}->{result}"


def _thin(
    equation: str, x: Array, adapters: Adapters | None, *names: str
) -> list[Thin | None]:
    """x a and b of matrices that x is multiplied with as `equation` has it; one product
    for all of them. Each is None if the layer has no adapters, and (None, None) if it
    has none for that matrix."""
    if adapters is None:
        return [None] * len(names)
    inputs, result = equation.split("->")
    given, _ = inputs.split(",")
    summed = "".join(axis for axis in given if axis not in result)
    there = [name for name in names if name in adapters]
    found: dict[str, Thin] = {}
    if there:
        a = jnp.concatenate([adapters[name]["a"] for name in there], axis=-1)
        inner = jnp.einsum(f"{given},{summed}r->btr", x, a)
        parts = jnp.split(checkpoint_name(inner, PRODUCT), len(there), axis=-1)
        for name, part in zip(there, parts, strict=True):
            found[name] = part, adapters[name]["b"]
    return [found.get(name, (None, None)) for name in names]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _frozen(equation: str, x: Array, values: Array, scales: Array) -> Array:
    """x W, where W = values * scales is never learned. The backward pass is handed the
    values, and makes W of them again: a layer's at a time."""
    return jnp.einsum(equation, x, _dequantised(equation, values, scales, x.dtype))


def _frozen_forward(equation, x, values, scales):
    return _frozen(equation, x, values, scales), (values, scales)


def _frozen_backward(equation, kept, gradient):
    inputs, result = equation.split("->")
    given, matrix = inputs.split(",")
    weight = _dequantised(equation, *kept, gradient.dtype)
    return jnp.einsum(f"{result},{matrix}->{given}", gradient, weight), None, None


_frozen.defvjp(_frozen_forward, _frozen_backward)


def _dequantised(equation: str, values: Array, scales: Array, dtype) -> Array:
    """The matrix of a product; its scales have the axes that are the result's."""
    inputs, result = equation.split("->")
    matrix = inputs.split(",")[1]
    summed = [i for i, axis in enumerate(matrix) if axis not in result]
    scales = jnp.expand_dims(scales, summed)
    return (values.astype(jnp.float32) * scales).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _wide(
    equation: str, x: Array, weight: Array | tuple[Array, Array], more: Array, b: Array
) -> Array:
    """x weight + more b, without a second result as wide as the first.

    On a GPU the sum is one product, of [x, more] and [weight, b]: to write a wide
    result twice would take as long as a third of that product.

    Args:
      weight: in the dtype of x; or values and scales, as of `_frozen`.
    """
    if isinstance(weight, tuple):
        weight = _dequantised(equation, *weight, x.dtype)

    def apart(x, weight, more, b):
        return jnp.einsum(equation, x, weight) + jnp.einsum(_of_thin(equation), more, b)

    def joined(x, weight, more, b):
        x, weight = jnp.concatenate([x, more], -1), jnp.concatenate([weight, b])
        return jnp.einsum(equation, x, weight)

    return jax.lax.platform_dependent(x, weight, more, b, cuda=joined, default=apart)


def _wide_forward(equation, x, weight, more, b):
    return _wide(equation, x, weight, more, b), (x, weight, more, b)


def _wide_backward(equation, kept, gradient):
    x, weight, more, b = kept
    inputs, result = equation.split("->")
    given, matrix = inputs.split(",")
    is_frozen = isinstance(weight, tuple)
    if is_frozen:
        weight = _dequantised(equation, *weight, x.dtype)
    thin = _of_thin(equation).split(",")[1].split("->")[0]

    def apart(gradient, weight, b):
        return (
            jnp.einsum(f"{result},{matrix}->{given}", gradient, weight),
            jnp.einsum(f"{result},{thin}->btr", gradient, b),
        )

    def joined(gradient, weight, b):
        whole = jnp.concatenate([weight, b])
        both = jnp.einsum(f"{result},{matrix}->{given}", gradient, whole)
        return tuple(jnp.split(both, [len(weight)], axis=-1))

    of_x, of_more = jax.lax.platform_dependent(
        gradient, weight, b, cuda=joined, default=apart
    )
    of_weight = None
    if not is_frozen:
        of_weight = jnp.einsum(f"{given},{result}->{matrix}", x, gradient)
    of_b = jnp.einsum(f"btr,{result}->{thin}", more, gradient)
    return of_x, of_weight, of_more, of_b


_wide.defvjp(_wide_forward, _wide_backward)


def _maybe(norm: Norm | None, x):
    return x if norm is None else norm(x)
