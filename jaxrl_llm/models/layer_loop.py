"""How the layers of a training pass follow one another, chosen by platform.

    one GPU        in_place: a loop that copies nothing; unrolled without remat
    several GPUs   unrolled: one layer's weights travel while another is computed
    else           scan: JAX's loop

All compute x <- layer(x, weights[i], i) for i = 0, 1, ... and are differentiable in x
and weights. Weights that are not differentiated, such as a frozen base beside trained
adapters, are constants: no gradient of theirs is computed or takes room. What `layer`
closes over is not differentiated.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend import core
from jax.sharding import Mesh
from jaxtyping import Array, Int

from jaxrl_llm.sharding.mesh import platform_of

Weights = Any
"""A tree of arrays [L, ...], or of one layer's [...]."""
Leaves = list[Any]
"""Leaves of weights; None where they are of the other half, trained or frozen."""
Carried = Any
"""What goes from layer to layer: an array, for `in_place`; or a tree of such."""
Layer = Callable[[Carried, Weights, Int[Array, ""]], Carried]
Loop = Callable[[Layer, Carried, Weights], Carried]

COMPILER_OPTIONS = {
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_autotune_level": 0,
    "xla_gpu_enable_dus_accumulator_zero_init_elimination": True,
}
"""What is asked of XLA wherever a model is computed. cuBLAS multiplies, by the
algorithm that it chooses itself: XLA would time several of them, and Triton's, which
takes more than half of the time to compile, gains nothing, and ends differently from
one cold cache to the next, and so do the numbers. Only products by cuBLAS read and
write slices of larger arrays, as `in_place` does; and it writes places before it reads
them, so their zeros need not be. Other platforms take no notice."""


def choose(
    mesh: Mesh, wanted: Literal["auto", "never", "always"], remat: str = "none"
) -> Loop:
    """The fastest loop on the devices of `mesh`.

    Args:
      wanted: never: compile one layer for all. always: compile each by itself.
      remat: see `apply.Remat`. Where it does not say what to keep, XLA keeps less if it
        sees all layers; what is kept on the host cannot be computed in place.
    """
    if platform_of(mesh) != "gpu":
        return unrolled if wanted == "always" else scan
    best_unrolled = mesh.size > 1 or remat in ("none", "offload")
    if wanted == "always" or (wanted == "auto" and best_unrolled):
        return unrolled
    return scan if remat == "offload" else in_place


def scan(layer: Layer, x: Carried, weights: Weights) -> Carried:
    """One compiled layer for all; compiles in the same time for any number of them.

    On a GPU, what the backward pass needs is copied to where it is kept and back.
    """

    def body(x, here):
        return layer(x, *here), None

    return jax.lax.scan(body, x, (weights, jnp.arange(_count(weights))))[0]


def unrolled(layer: Layer, x: Carried, weights: Weights) -> Carried:
    """Every layer by itself; compiles in a time that grows with their number."""

    def body(x, here):
        # Behind the barrier all layers look alike, and share their kernels.
        weights, i = here
        leaves, form = jax.tree.flatten(weights)
        return layer(x, jax.tree.unflatten(form, _barrier(leaves)), i), None

    here = weights, jnp.arange(_count(weights))
    return jax.lax.scan(body, x, here, unroll=True)[0]


def in_place(layer: Layer, x: Array, weights: Weights) -> Array:
    """Like `scan`, but what the backward pass needs is computed where it is kept.

    `scan` computes a value for the layer's next operation and copies it to its place.
    Here the next operation, too, reads the value from its place, so that XLA lets a
    product write there and nowhere else; and the backward pass reads it there. Needs
    `COMPILER_OPTIONS`, without which it is right, but no faster than `scan`.
    """
    count = _count(weights)
    leaves, form = jax.tree.flatten(weights)

    @functools.cache
    def forward_pass(is_trained: tuple[bool, ...]) -> _ForwardPass:
        ones = [jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for leaf in leaves]
        return _ForwardPass(
            lambda x, leaves, i: layer(x, jax.tree.unflatten(form, leaves), i),
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            *_part(ones, is_trained),
        )

    @jax.custom_vjp
    def loop(x, leaves):
        return scan(layer, x, jax.tree.unflatten(form, leaves))

    def forward(x, leaves):
        is_trained = tuple(leaf.perturbed for leaf in leaves)
        halves = _part([leaf.value for leaf in leaves], is_trained)
        run = forward_pass(is_trained).run

        def body(i, carry):
            here = jax.tree.map(lambda leaf: _read(leaf, i), halves)
            return run(*carry, *here, i)

        places = forward_pass(is_trained).places(count)
        x, places = jax.lax.fori_loop(0, count, body, (x.value, places))
        return x, (places, *halves)

    def backward(kept, gradient):
        _, trained, _ = kept
        pullback = forward_pass(tuple(leaf is not None for leaf in trained)).pullback

        def body(step, carry):
            gradient, gradients = carry
            i = count - 1 - step
            here = jax.tree.map(lambda leaf: _read(leaf, i), kept)
            gradient, found = pullback(*here, i)(gradient)
            put = functools.partial(_write, i=i)
            return gradient, jax.tree.map(put, gradients, found)

        gradients = jax.tree.map(jnp.zeros_like, trained)
        return jax.lax.fori_loop(0, count, body, (gradient, gradients))

    loop.defvjp(forward, backward, symbolic_zeros=True)
    return loop(x, leaves)


class _ForwardPass:
    """What JAX computes of a layer that is to be differentiated, by operations, and
    which of their results the backward pass asks for."""

    def __init__(self, layer: Layer, x: Any, trained: Leaves, frozen: Leaves):
        def forward(x, trained, frozen, i):
            def of_trained(x, trained):
                return layer(x, _join(trained, frozen), i)

            return jax.vjp(of_trained, x, trained)

        closed, (_, pullback) = jax.make_jaxpr(forward, return_shape=True)(
            x, trained, frozen, jax.ShapeDtypeStruct((), jnp.int32)
        )
        self._jaxpr, self._consts = closed.jaxpr, closed.consts
        self._pullback = jax.tree.structure(pullback)
        self._result, *self._asked = self._jaxpr.outvars
        found = [v for v in self._asked if not isinstance(v, core.Literal)]
        given = {*self._jaxpr.constvars, *self._jaxpr.invars[1:]}
        self._kept = [v for v in dict.fromkeys(found) if v not in given]

    def places(self, count: int) -> list[Array]:
        """Where `count` layers keep what is asked for: one [L, ...] for each."""
        return [jnp.zeros((count, *v.aval.shape), v.aval.dtype) for v in self._kept]

    def run(
        self,
        x: Array,
        places: list[Array],
        trained: Leaves,
        frozen: Leaves,
        i: Array,
    ) -> tuple[Array, list[Array]]:
        """Layer i's result, and the places with what it keeps."""
        start, *_ = self._jaxpr.invars
        values = self._given(trained, frozen, i) | {start: x}
        places = dict(zip(self._kept, places, strict=True))
        if start in places:
            places[start] = _write(places[start], x, i)
        for operation in self._jaxpr.eqns:
            results = self._apply(operation, values)
            for variable, value in zip(operation.outvars, results, strict=True):
                if variable in places:
                    places[variable] = _write(places[variable], value, i)
                    # Without the barrier XLA would pass on the value itself.
                    value = _read(jax.lax.optimization_barrier(places[variable]), i)
                values[variable] = value
        return values[self._result], list(places.values())

    def pullback(
        self, kept: list[Array], trained: Leaves, frozen: Leaves, i: Array
    ) -> Callable:
        """Layer i's backward pass: its result's gradient to those of x and of trained
        weights."""
        values = self._given(trained, frozen, i)
        values |= dict(zip(self._kept, kept, strict=True))
        asked = [
            v.val if isinstance(v, core.Literal) else values[v] for v in self._asked
        ]
        return jax.tree.unflatten(self._pullback, asked)

    def _given(
        self, trained: Leaves, frozen: Leaves, i: Array
    ) -> dict[core.Var, Array]:
        """What is there before and need not be kept."""
        variables = [*self._jaxpr.constvars, *self._jaxpr.invars[1:]]
        values = [*self._consts, *jax.tree.leaves((trained, frozen)), i]
        return dict(zip(variables, values, strict=True))

    def _apply(
        self, operation: core.JaxprEqn, values: dict[core.Var, Array]
    ) -> list[Array]:
        inputs = [v for v in operation.invars if not isinstance(v, core.Literal)]
        inputs = list(dict.fromkeys(inputs))
        alone = self._jaxpr.replace(
            constvars=[],
            invars=inputs,
            outvars=operation.outvars,
            eqns=[operation],
            debug_info=self._jaxpr.debug_info.with_unknown_names(),
        )
        function = core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))
        return function(*(values[v] for v in inputs))


@jax.custom_jvp
def _barrier(leaves: list[Array]) -> list[Array]:
    """`jax.lax.optimization_barrier`, which by itself gives a gradient to every weight
    behind it if one of them has any."""
    return jax.lax.optimization_barrier(leaves)


def _barrier_jvp(primals, tangents):
    (leaves,), (tangents,) = primals, tangents
    moving = [t for t in tangents if type(t) is not SymbolicZero]
    moved = iter(jax.lax.optimization_barrier(moving))
    return _barrier(leaves), [
        t if type(t) is SymbolicZero else next(moved) for t in tangents
    ]


_barrier.defjvp(_barrier_jvp, symbolic_zeros=True)


def _part(leaves: list[Any], is_trained: tuple[bool, ...]) -> tuple[Leaves, Leaves]:
    """Trained and frozen ones, each with None where the other has a leaf."""
    pairs = list(zip(leaves, is_trained, strict=True))
    trained = [leaf if yes else None for leaf, yes in pairs]
    return trained, [None if yes else leaf for leaf, yes in pairs]


def _join(trained: Leaves, frozen: Leaves) -> list[Array]:
    return [b if a is None else a for a, b in zip(trained, frozen, strict=True)]


def _count(weights: Weights) -> int:
    return jax.tree.leaves(weights)[0].shape[0]


def _read(place: Array, i: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(place, i, axis=0, keepdims=False)


def _write(place: Array, value: Array, i: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(place, value, i, axis=0)
