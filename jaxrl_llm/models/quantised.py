"""Numbers of 8 bits: vectors that have a scale each, x = values * scale.

Source: "vector-wise quantization" of Dettmers et al. 2022 (arXiv:2208.07339).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

Bits = Literal["int8", "fp8"]
DTYPES = {"int8": jnp.dtype(jnp.int8), "fp8": jnp.dtype(jnp.float8_e4m3fn)}
SUMMED = {
    **dict.fromkeys(("q", "k", "v", "qkv", "gate", "up", "gate_up"), (0,)),
    "o": (1, 2),
    "down": (1,),
}
"""The matrices of a layer, with the axes that products sum over. Their scales, called
NAME_scale, have the other axes."""


@no_type_check  # JAX also builds such trees of shapes or shardings
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantised:
    """Vectors along the last axis."""

    values: Shaped[Array, "*B H"]
    scales: Float[Array, "*B"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the values."""
        return self.values.shape

    @property
    def dtype(self) -> Any:
        """Dtype of the values."""
        return self.values.dtype


def quantise(
    x: Float[Array, "..."], dtype: Any, axes: Sequence[int] = (-1,)
) -> tuple[Shaped[Array, "..."], Float[Array, "..."]]:
    """Values, and float32 scales: max|x| over `axes` / the largest number of `dtype`.

    `axes` are gone from the scales.
    """
    whole = jnp.issubdtype(dtype, jnp.integer)
    largest = float(jnp.iinfo(dtype).max if whole else jnp.finfo(dtype).max)
    x = x.astype(jnp.float32)
    scales = jnp.max(jnp.abs(x), axis=tuple(axes), keepdims=True) / largest
    values = x / jnp.maximum(scales, 1e-30)
    if whole:
        values = jnp.floor(values + 0.5)
    return values.astype(dtype), jnp.squeeze(scales, tuple(axes))


def matrices(layer: Mapping[str, Any], bits: Bits) -> dict[str, Any]:
    """One layer, unstacked, with its matrices quantised; the rest stays as it is."""
    found = dict(layer)
    for name in SUMMED.keys() & layer.keys():
        values, scales = quantise(layer[name], DTYPES[bits], SUMMED[name])
        found |= {name: values, f"{name}_scale": scales}
    return found


def plain_matrices(layer: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """The inverse of `matrices`: the numbers that a layer's matrices stand for, rounded
    to `dtype` once. What has no scales stays as it is."""
    found = {name: x for name, x in layer.items() if not name.endswith("_scale")}
    for name in SUMMED.keys() & layer.keys():
        if f"{name}_scale" in layer:
            scales = jnp.expand_dims(layer[f"{name}_scale"], SUMMED[name])
            found[name] = (layer[name].astype(jnp.float32) * scales).astype(dtype)
    return found


def are_quantised(layer: Mapping[str, Any]) -> bool:
    """Whether a layer's matrices, or their shapes or axes, have scales."""
    return "o_scale" in layer


def product(
    equation: str,
    x: Float[Array, "..."],
    weights: Shaped[Array, "..."],
    scales: Float[Array, "..."],
) -> Float[Array, "..."]:
    """`jnp.einsum(equation, x, weights * scales)`, in the dtype of x.

    With weights of fp8, x is quantised likewise, a scale for each vector that is summed
    over: processors multiply such numbers faster. With int8, x stays as it is, which
    costs less precision.

    Args:
      scales: of the weights, as the result without the axes that are those of x.
    """
    if jnp.issubdtype(weights.dtype, jnp.integer):
        sums, own = jnp.einsum(equation, x, weights.astype(x.dtype)), 1.0
    else:
        inputs, result = equation.split("->")
        inner = [i for i, name in enumerate(inputs.split(",")[0]) if name not in result]
        values, own = quantise(x, weights.dtype, inner)
        sums = jnp.einsum(equation, values, weights, preferred_element_type=jnp.float32)
        own = own.reshape(*own.shape, *(1,) * (sums.ndim - own.ndim))
    scales = jnp.expand_dims(scales, tuple(range(sums.ndim - scales.ndim)))
    return (sums.astype(jnp.float32) * own * scales).astype(x.dtype)


def like(x: Float[Array, "*B H"], cache: Any) -> Any:
    """x in the form of a cache: cast, or quantised."""
    if isinstance(cache, Quantised):
        return Quantised(*quantise(x, cache.dtype))
    return x.astype(cache.dtype)


def plain(x: Any, dtype: Any) -> Float[Array, "*B H"]:
    """The numbers that x, an array or quantised, stands for."""
    if isinstance(x, Quantised):
        return (x.values.astype(jnp.float32) * x.scales[..., None]).astype(dtype)
    return x.astype(dtype)
