"""Products of rows with the matrix of their group: what a mixture of experts computes.

    out[m] = x[m] @ w[g(m)]        rows are sorted by group; `sizes` counts them

Rows behind those of the last group belong to none: they give 0 and have no gradient.
Nothing is dropped, whatever the sizes, and every sum is float32.

M = rows, E = groups, D = inner and F = outer width, B = rows of a block.

Source: grouped products of Gale et al. 2022 (MegaBlocks, arXiv:2211.15841).
"""

import functools
import importlib
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxrl_llm.models import grouped_kernels

Kernel = Literal["blocked", "ragged", "triton", "triton_interpreted", "mosaic"]
"""blocked: blocks of rows of one group, plain XLA. ragged: XLA's ragged product.
triton: `grouped_kernels`; interpreted, for its tests. mosaic: JAX's, for Hopper."""


class Products(NamedTuple):
    """The three products of a kernel: of the result, and of the two gradients."""

    forward: Callable[[Array, Array, Array], Array]
    """x [M, D], w [E, D, F], sizes [E] -> x w [M, F]."""
    transposed: Callable[[Array, Array, Array], Array]
    """g [M, F], w [E, D, F], sizes [E] -> g w^T [M, D]."""
    outer: Callable[[Array, Array, Array], Array]
    """x [M, D], g [M, F], sizes [E] -> x^T g [E, D, F], float32."""


def choose(platform: str) -> Kernel:
    """The kernel for a platform, of "cpu", "gpu" and "tpu".

    XLA has a grouped product of its own for TPUs. On others that one multiplies every
    row with every group's matrix, so rows go in blocks of one group each. `jaxrl bench
    moe` measures the kernels that a machine has.
    """
    return "ragged" if platform == "tpu" else "blocked"


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def product(
    x: Float[Array, "M _"],
    w: Float[Array, "E D F"],
    sizes: Int[Array, " E"],
    kernel: Kernel,
    transposed: bool = False,
) -> Float[Array, "M _"]:
    """Every row times the matrix of its group, in the dtype of x.

    Args:
      x: [M, D], or [M, F] if it is multiplied by the transposed matrices.
      sizes: rows of each group, in order; at most M together.
      kernel: see `choose`.
    """
    kernels = _kernels(kernel)
    multiply = kernels.transposed if transposed else kernels.forward
    return multiply(x, w, sizes).astype(x.dtype)


def _forward(x, w, sizes, kernel, transposed):
    return product(x, w, sizes, kernel, transposed), (x, w, sizes)


def _backward(kernel, transposed, kept, gradient):
    x, w, sizes = kept
    of_x = product(gradient, w, sizes, kernel, not transposed)
    inner, outer = (gradient, x) if transposed else (x, gradient)
    of_w = _kernels(kernel).outer(inner, outer, sizes).astype(w.dtype)
    return of_x, of_w, np.zeros(sizes.shape, jax.dtypes.float0)


product.defvjp(_forward, _backward)


def _kernels(kernel: Kernel) -> Products:
    match kernel:
        case "blocked":
            return Products(
                functools.partial(_blocked, "bmd,bdf->bmf"),
                functools.partial(_blocked, "bmf,bdf->bmd"),
                _blocked_outer,
            )
        case "ragged":
            return Products(
                functools.partial(_ragged, 1), functools.partial(_ragged, 2), _outer
            )
        case "triton" | "triton_interpreted":
            how = {"interpret": kernel == "triton_interpreted"}
            return Products(
                functools.partial(_triton, transposed=False, **how),
                functools.partial(_triton, transposed=True, **how),
                functools.partial(grouped_kernels.outer, **how),
            )
        case "mosaic":
            return Products(
                functools.partial(_mosaic, False),
                functools.partial(_mosaic, True),
                _mosaic_outer,
            )


def _block(rows: int, groups: int) -> int:
    """B: a power of two, at most what a group has on average: less than half of the
    rows that blocks have room for are then empty."""
    average = max(1, rows // groups)
    return min(512, 1 << (average.bit_length() - 1))


class _Blocks(NamedTuple):
    """Blocks of B rows of one group each; as many as any sizes need, so that some are
    empty."""

    group: Int[Array, " b"]
    rows: Int[Array, "b B"]
    """M where a place is empty."""
    places: Int[Array, " M"]
    """Where among all places of the blocks a row is; behind them for rows of none."""


def _blocks(sizes: Int[Array, " E"], num_rows: int) -> _Blocks:
    size = _block(num_rows, len(sizes))
    count = num_rows // size + len(sizes)
    ends, used = jnp.cumsum(sizes), -(-sizes // size)
    starts, last = ends - sizes, jnp.cumsum(used)
    first = last - used
    block, row = jnp.arange(count), jnp.arange(num_rows)
    group = jnp.minimum(jnp.searchsorted(last, block, side="right"), len(sizes) - 1)
    within = (block - first[group])[:, None] * size + jnp.arange(size)[None]
    there = within < sizes[group][:, None]
    rows = jnp.where(there, starts[group][:, None] + within, num_rows)
    own = jnp.searchsorted(ends, row, side="right")
    at = jnp.minimum(own, len(sizes) - 1)
    places = jnp.where(
        own < len(sizes), first[at] * size + row - starts[at], count * size
    )
    return _Blocks(group, rows, places)


def _in_blocks(x: Float[Array, "M D"], blocks: _Blocks) -> Float[Array, "b B D"]:
    return x.at[blocks.rows].get(mode="fill", fill_value=0)


def _blocked(equation: str, x: Array, w: Array, sizes: Array) -> Array:
    blocks = _blocks(sizes, len(x))
    found = jnp.einsum(
        equation,
        _in_blocks(x, blocks),
        w[blocks.group],
        preferred_element_type=jnp.float32,
    ).astype(x.dtype)
    found = found.reshape(-1, found.shape[-1])
    return found.at[blocks.places].get(mode="fill", fill_value=0)


def _blocked_outer(x: Array, g: Array, sizes: Array) -> Array:
    blocks = _blocks(sizes, len(x))

    def add(total, here):
        group, x, g = here
        found = jnp.einsum("md,mf->df", x, g, preferred_element_type=jnp.float32)
        return total.at[group].add(found), None

    start = jnp.zeros((len(sizes), x.shape[-1], g.shape[-1]), jnp.float32)
    inner, outer = _in_blocks(x, blocks), _in_blocks(g, blocks)
    return jax.lax.scan(add, start, (blocks.group, inner, outer))[0]


def _within(x: Array, sizes: Array) -> Array:
    """x, with 0 for what kernels leave in rows of no group."""
    return jnp.where((jnp.arange(len(x)) < jnp.sum(sizes))[:, None], x, 0)


def _ragged(axis: int, x: Array, w: Array, sizes: Array) -> Array:
    """Sums over an axis of w."""
    found = jax.lax.ragged_dot_general(
        _within(x, sizes),
        w,
        sizes,
        jax.lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(((1,), (axis,)), ((), ())),
            lhs_ragged_dimensions=[0],
            rhs_group_dimensions=[0],
        ),
        preferred_element_type=jnp.float32,
    )
    return _within(found, sizes)


def _outer(x: Array, g: Array, sizes: Array) -> Array:
    return jax.lax.ragged_dot_general(
        _within(x, sizes),
        _within(g, sizes),
        sizes,
        jax.lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(((0,), (0,)), ((), ())),
            lhs_ragged_dimensions=[0],
            rhs_group_dimensions=[],
        ),
        preferred_element_type=jnp.float32,
    )


def _triton(x: Array, w: Array, sizes: Array, **how: bool) -> Array:
    return _within(grouped_kernels.product(x, w, sizes, **how), sizes)


_TILES = {"block_m": 128, "block_n": 128, "block_k": 64, "max_concurrent_steps": 4}
_HOPPER = "jax.experimental.pallas.ops.gpu"


def _mosaic(transpose: bool, x: Array, w: Array, sizes: Array) -> Array:
    """JAX's kernel for Hopper GPUs. It unrolls over groups."""
    kernel = importlib.import_module(f"{_HOPPER}.ragged_dot_mgpu").ragged_dot
    how = {"grid_block_n": 8, "transpose_rhs": transpose, **_TILES}
    return _within(kernel(x, w, group_sizes=sizes, **how), sizes)


def _mosaic_outer(x: Array, g: Array, sizes: Array) -> Array:
    module = importlib.import_module(f"{_HOPPER}.transposed_ragged_dot_mgpu")
    kernel = module.transposed_ragged_dot
    found = kernel(x, g, group_sizes=sizes, grid_block_n=8, **_TILES)
    return jnp.where((sizes > 0)[:, None, None], found, 0).astype(jnp.float32)
