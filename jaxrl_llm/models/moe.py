"""A mixture of experts: the router, the experts of a layer, and how devices share them.

    y[t] = sum over the k experts e chosen for token t of gate[t, e] * mlp_e(x[t])

Dropless: no expert has a capacity. Rows of tokens are sorted by expert, stably, so that
sums do not depend on how tokens are spread over devices.

R = rows, T = tokens of a row, D = model width, E = experts, k = experts of a token,
F = width of an expert, S = width of the shared experts.

Source: Shazeer et al. 2017 (arXiv:1701.06538); groups and the selection bias: DeepSeek
V3 (arXiv:2412.19437), sections 2.1.2.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, UInt

from jaxrl_llm.data.types import RouterUse
from jaxrl_llm.models import grouped
from jaxrl_llm.models.architecture import Architecture, Moe
from jaxrl_llm.models.quantised import product

PRODUCT = "product"
"""What a product is called that a backward pass may keep, see `apply.Remat`."""
SELECTION_BIAS = "selection_bias"
"""The name of what chooses experts and is neither trained nor rounded."""


def is_fixed(name: str) -> bool:
    """Whether a parameter is never trained, by its name: "layers.moe.router"."""
    return name.split(".")[-1] == SELECTION_BIAS


class Routes(NamedTuple):
    """Which experts tokens go to."""

    chosen: Int[Array, "R T k"]
    """The best first."""
    gates: Float[Array, "R T k"]
    """float32; what each expert's result is multiplied by."""


class Weights(NamedTuple):
    """The matrices of a layer's experts; quantised, with a scale for each output."""

    gate: Array
    """[E, D, F]"""
    up: Array
    """[E, D, F]"""
    down: Array
    """[E, D, F]"""
    scales: tuple[Array, Array, Array] | None = None
    """[E, F], [E, F] and [E, D]."""


# (moe, logits [R, T, E], selection bias) -> the routes, as `route`
Router = Callable[[Moe, Array, Array | None], Routes]
# (x [R, T, D], routes, weights, activation) -> [R, T, D]
Experts = Callable[[Array, Routes, Weights, Callable[[Array], Array]], Array]


class Routed(nnx.Module):
    """The experts of a layer, in place of its feed-forward."""

    def __init__(self, arch: Architecture, init: Any, scaled: bool):
        assert arch.moe is not None
        self.moe = moe = arch.moe
        D, E, F, S = arch.hidden_size, moe.num_experts, moe.expert_size, moe.shared_size
        wide, back = ("experts", "expert_embed", "expert_mlp"), ("experts", "norm")

        def scale(shape, axes):
            return init(shape, axes, None) if scaled else None

        self.router = init((D, E), ("embed", "router"), D**-0.5)
        self.selection_bias = (
            init((E,), ("router",), 0.0, jnp.float32) if moe.selection_bias else None
        )
        self.gate = init((E, D, F), wide, D**-0.5)
        self.up = init((E, D, F), wide, D**-0.5)
        self.down = init((E, D, F), wide, F**-0.5)
        self.gate_scale = scale((E, F), ("experts", "expert_mlp"))
        self.up_scale = scale((E, F), ("experts", "expert_mlp"))
        self.down_scale = scale((E, D), back)
        self.shared = Shared(arch, init, S, scaled) if S else None
        self.shared_gate = init((D,), ("embed",), D**-0.5) if moe.shared_gate else None

    def __call__(
        self,
        x: Float[Array, "R T D"],
        activation: Callable[[Array], Array],
        experts: Experts,
        shard: Callable[..., Array],
        router: Router,
    ) -> Float[Array, "R T D"]:
        """What the experts make of x."""
        bias = None if self.selection_bias is None else self.selection_bias[...]
        logits = router_logits(x, self.router[...])
        scales = None
        if self.gate_scale is not None:
            scales = self.gate_scale[...], self.up_scale[...], self.down_scale[...]
        weights = Weights(self.gate[...], self.up[...], self.down[...], scales)
        found = experts(x, router(self.moe, logits, bias), weights, activation)
        if self.shared is None:
            return found
        shared = self.shared(x, activation, shard)
        if self.shared_gate is not None:
            of_token = jnp.einsum("rtd,d->rt", x, self.shared_gate[...].astype(x.dtype))
            shared = shared * jax.nn.sigmoid(of_token)[..., None]
        return found + shared


class Shared(nnx.Module):
    """The experts that every token goes through: one feed-forward."""

    def __init__(self, arch: Architecture, init: Any, S: int, scaled: bool):
        D = arch.hidden_size

        def scale(shape, axes):
            return init(shape, axes, None) if scaled else None

        self.gate = init((D, S), ("embed", "mlp"), D**-0.5)
        self.up = init((D, S), ("embed", "mlp"), D**-0.5)
        self.down = init((D, S), ("embed", "mlp"), S**-0.5)
        self.gate_scale = scale((S,), ("mlp",))
        self.up_scale = scale((S,), ("mlp",))
        self.down_scale = scale((D,), ("norm",))

    def __call__(self, x, activation, shard):
        """The feed-forward of x [R, T, D]."""
        gate = _product("rtd,df->rtf", x, self.gate, self.gate_scale)
        up = _product("rtd,df->rtf", x, self.up, self.up_scale)
        hidden = shard(activation(gate) * up, "rows", "tokens", "mlp")
        return _product("rtf,df->rtd", hidden, self.down, self.down_scale)


def _product(equation: str, x: Array, weight: nnx.Param, scale: nnx.Param | None):
    if scale is not None:
        return product(equation, x, weight[...], scale[...])
    return jnp.einsum(equation, x, weight[...].astype(x.dtype))


def use_of(
    logits: Float[Array, "R T E"],
    routes: Routes,
    own: Int[Array, "R T k"],
    counted: Bool[Array, "R T"],
) -> RouterUse:
    """What a layer does with the tokens that are counted.

    Args:
      own: what the router chooses by itself.
    """
    there = counted.astype(jnp.float32)
    chosen = jnp.sum(jax.nn.one_hot(routes.chosen, logits.shape[-1]), axis=-2)
    alike = jnp.all(jnp.sort(own) == jnp.sort(routes.chosen), axis=-1)
    return RouterUse(
        chosen=jnp.einsum("rte,rt->re", chosen, there),
        probabilities=jnp.einsum("rte,rt->re", jax.nn.softmax(logits), there),
        count=jnp.sum(there, axis=1),
        agreeing=jnp.sum(alike * there, axis=1),
    )


def recorded(chosen: Int[Array, "R T k"], moe: Moe) -> UInt[Array, "R T k"]:
    """Chosen experts as `TrainBatch.routes` has them, in as few bytes as will do."""
    return (chosen + 1).astype(routes_dtype(moe))


def routes_dtype(moe: Moe) -> Any:
    """The dtype of routes."""
    return jnp.uint8 if moe.num_experts < 255 else jnp.uint16


def replayed(
    moe: Moe, logits: Float[Array, "R T E"], own: Routes, given: UInt[Array, "R T k"]
) -> Routes:
    """The experts that are given, weighted by what the router says now; the router's
    own where none are.

    Source: Zheng et al. 2025 (arXiv:2507.18071), section 5.3, "routing replay".
    """
    chosen = jnp.where(given > 0, given.astype(jnp.int32) - 1, own.chosen)
    return Routes(chosen, _gates(moe, _scores(moe, logits), chosen))


def router_logits(
    x: Float[Array, "R T D"], router: Float[Array, "D E"]
) -> Float[Array, "R T E"]:
    """float32 x router, of the numbers as they are in the dtype of x."""
    return jnp.einsum(
        "rtd,de->rte",
        x,
        router.astype(x.dtype),
        preferred_element_type=jnp.float32,
        precision=lax.Precision.HIGHEST,
    )


def route(
    moe: Moe, logits: Float[Array, "R T E"], bias: Float[Array, " E"] | None = None
) -> Routes:
    """The experts of every token and their weights, in float32.

    Args:
      bias: of the selection.
    """
    scores = _scores(moe, logits)
    chosen = _choose(moe, lax.stop_gradient(scores), bias)
    return Routes(chosen, _gates(moe, scores, chosen))


def _scores(moe: Moe, logits: Array) -> Float[Array, "R T E"]:
    match moe.score:
        case "softmax":
            return jax.nn.softmax(logits)
        case "sigmoid":
            return jax.nn.sigmoid(logits)
        case "softmax_of_chosen":
            return logits


def _gates(moe: Moe, scores: Array, chosen: Array) -> Float[Array, "R T k"]:
    gates = jnp.take_along_axis(scores, chosen, axis=-1)
    if moe.score == "softmax_of_chosen":
        gates = jax.nn.softmax(gates)
    if moe.renormalise:
        gates = gates / (jnp.sum(gates, axis=-1, keepdims=True) + 1e-20)
    return moe.scale * gates


def _choose(moe: Moe, scores: Array, bias: Array | None) -> Int[Array, "R T k"]:
    if bias is not None:
        bias = lax.stop_gradient(bias.astype(jnp.float32))
        scores = scores + jnp.expand_dims(bias, tuple(range(scores.ndim - 1)))
    if moe.groups > 1:
        of_group = scores.reshape(*scores.shape[:-1], moe.groups, -1)
        best = lax.top_k(of_group, 2)[0].sum(axis=-1)
        groups = lax.top_k(best, moe.chosen_groups)[1]
        there = jnp.any(jax.nn.one_hot(groups, moe.groups, dtype=bool), axis=-2)
        of_group = jnp.where(there[..., None], of_group, -jnp.inf)
        scores = of_group.reshape(scores.shape)
    return lax.top_k(scores, moe.top_k)[1]


def alone(
    x: Float[Array, "R T D"],
    routes: Routes,
    weights: Weights,
    activation: Callable[[Array], Array],
    *,
    kernel: grouped.Kernel = "blocked",
    first: int | Int[Array, ""] = 0,
) -> Float[Array, "R T D"]:
    """What one device computes of its tokens with its experts.

    Args:
      first: the number of the first expert of `weights`; what others are chosen for
        counts as 0.
    """
    k, count = routes.chosen.shape[-1], weights.gate.shape[0]
    tokens, chosen = x.reshape(-1, x.shape[-1]), routes.chosen.reshape(-1) - first
    gates = routes.gates.reshape(-1, 1)
    if len(chosen) <= count:
        found = _few(tokens, chosen, gates, weights, activation)
        return found.reshape(x.shape)
    chosen = jnp.where((chosen >= 0) & (chosen < count), chosen, count)
    order = jnp.argsort(chosen)
    back = jnp.argsort(order)
    sizes = jnp.bincount(chosen, length=count + 1)[:count].astype(jnp.int32)
    spread = _spread(tokens, order, back, k)

    def multiplied(x, name):
        return _grouped(x, weights, name, sizes, kernel)

    gate = checkpoint_name(multiplied(spread, "gate"), PRODUCT)
    up = checkpoint_name(multiplied(spread, "up"), PRODUCT)
    hidden = activation(gate) * up * gates[order].astype(x.dtype)
    found = multiplied(hidden, "down")
    return _collect(found, order, back, k).reshape(x.shape)


def _grouped(x, weights: Weights, name: str, sizes, kernel: grouped.Kernel):
    """Rows sorted by expert times a matrix of theirs."""
    w = getattr(weights, name).astype(x.dtype)
    found = grouped.product(x, w, sizes, kernel, name == "down")
    if weights.scales is None:
        return found
    scale = weights.scales[Weights._fields.index(name)]
    own = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(x)), side="right")
    scale = scale.at[own].get(mode="fill", fill_value=0)
    return (found.astype(jnp.float32) * scale).astype(x.dtype)


def _few(tokens, chosen, gates, weights: Weights, activation):
    """Fewer rows than experts, as in a decode step: each takes the matrices that it
    needs, and no others are read."""
    k = len(chosen) // len(tokens)
    mine = (chosen >= 0) & (chosen < len(weights.gate))
    at = jnp.where(mine, chosen, 0)

    def of_row(x, name, equation):
        found = jnp.einsum(
            equation,
            x,
            getattr(weights, name)[at].astype(x.dtype),
            preferred_element_type=jnp.float32,
        )
        if weights.scales is not None:
            found = found * weights.scales[Weights._fields.index(name)][at]
        return found.astype(x.dtype)

    rows = jnp.repeat(tokens, k, axis=0)
    hidden = activation(of_row(rows, "gate", "md,mdf->mf"))
    hidden = hidden * of_row(rows, "up", "md,mdf->mf")
    hidden = hidden * jnp.where(mine[:, None], gates, 0).astype(rows.dtype)
    found = of_row(hidden, "down", "mf,mdf->md").astype(jnp.float32)
    return found.reshape(-1, k, found.shape[-1]).sum(axis=1).astype(tokens.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _spread(x: Array, order: Array, back: Array, k: int) -> Float[Array, "M D"]:
    """The token of every sorted row."""
    return x[order // k]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _collect(rows: Array, order: Array, back: Array, k: int) -> Float[Array, "N D"]:
    """The float32 sum of every token's rows. It and `_spread` are the gradients of one
    another, so that nothing is added in an order that changes."""
    rows = rows[back].reshape(-1, k, rows.shape[-1])
    return jnp.sum(rows.astype(jnp.float32), axis=1).astype(rows.dtype)


def _moved_by(function: Callable, inverse: Callable) -> None:
    def forward(x, order, back, k):
        return function(x, order, back, k), (order, back)

    def backward(k, kept, gradient):
        none = [np.zeros(x.shape, jax.dtypes.float0) for x in kept]
        return inverse(gradient, *kept, k), *none

    function.defvjp(forward, backward)


_moved_by(_spread, _collect)
_moved_by(_collect, _spread)
