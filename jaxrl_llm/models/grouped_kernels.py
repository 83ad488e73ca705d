"""Grouped products on GPUs by Pallas kernels (Triton): see `grouped`.

Rows of a group lie together, so a program takes some rows of one group from where they
are and writes what it makes of them there: nothing is gathered, and no weight is read
for rows that are not. A program for which no rows are left ends at once.

M = rows, E = groups, D = inner and F = outer width.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

_ROWS, _WIDE, _DEEP = 128, 128, 64
"""Sizes of what a program multiplies at a time, at most."""
_FEWEST = 16  # tensor cores take no fewer


def product(
    x: Float[Array, "M _"],
    w: Float[Array, "E D F"],
    sizes: Int[Array, " E"],
    *,
    transposed: bool,
    interpret: bool = False,
) -> Float[Array, "M _"]:
    """Every row times the matrix of its group. Rows of no group hold anything.

    Args:
      transposed: multiply by the transposed matrices.
      interpret: run the kernel without a GPU, slowly.

    Raises:
      ValueError: a width is no multiple of 16.
    """
    (M, inner), (E, *_), outer = x.shape, w.shape, w.shape[1 if transposed else 2]
    rows, wide, deep = _tile(M, _ROWS), _divisor(outer, _WIDE), _divisor(inner, _DEEP)
    used, ends = -(-sizes // rows), jnp.cumsum(sizes)
    last = jnp.cumsum(used)
    block = jnp.arange(M // rows + E)
    group = jnp.minimum(jnp.searchsorted(last, block, side="right"), E - 1)
    start = ends[group] - sizes[group] + (block - last[group] + used[group]) * rows
    count = jnp.where(block < last[-1], jnp.clip(ends[group] - start, 0, rows), 0)
    of_block = pl.BlockSpec((1,), lambda n, i: (i,))
    return pl.pallas_call(
        functools.partial(_rows_times, rows=rows, deep=deep, transposed=transposed),
        grid=(outer // wide, len(block)),
        in_specs=[
            *[of_block] * 3,
            pl.BlockSpec(x.shape, lambda n, i: (0, 0)),
            pl.BlockSpec(
                (E, wide, inner) if transposed else (E, inner, wide),
                lambda n, i: (0, n, 0) if transposed else (0, 0, n),
            ),
        ],
        out_specs=pl.BlockSpec((M, wide), lambda n, i: (0, n)),
        out_shape=jax.ShapeDtypeStruct((M, outer), x.dtype),
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=3),
        interpret=interpret,
        name="grouped_product",
    )(*(a.astype(jnp.int32) for a in (group, start, count)), x, w)


def outer(
    x: Float[Array, "M D"],
    g: Float[Array, "M F"],
    sizes: Int[Array, " E"],
    *,
    interpret: bool = False,
) -> Float[Array, "E D F"]:
    """float32 x^T g of each group; arguments as of `product`."""
    (M, D), F, E = x.shape, g.shape[1], len(sizes)
    rows, deep, wide = _tile(M, _DEEP), _divisor(D, _ROWS), _divisor(F, _WIDE)
    start = jnp.cumsum(sizes) - sizes
    of_group = pl.BlockSpec((1,), lambda n, d, e: (e,))
    return pl.pallas_call(
        functools.partial(_columns_times, rows=rows),
        grid=(F // wide, D // deep, E),
        in_specs=[
            *[of_group] * 2,
            pl.BlockSpec((M, deep), lambda n, d, e: (0, d)),
            pl.BlockSpec((M, wide), lambda n, d, e: (0, n)),
        ],
        out_specs=pl.BlockSpec((None, deep, wide), lambda n, d, e: (e, d, n)),
        out_shape=jax.ShapeDtypeStruct((E, D, F), jnp.float32),
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=3),
        interpret=interpret,
        name="grouped_outer",
    )(start.astype(jnp.int32), sizes.astype(jnp.int32), x, g)


def _rows_times(group, start, count, x, w, out, *, rows, deep, transposed):
    # x [M, inner] and out [M, wide] are whole; w [E, inner, wide], or transposed.
    own, first, there = group[0], start[0], count[0]
    inner, wide = x.shape[1], out.shape[1]

    def add(k, total):
        some = pl.ds(k * deep, deep)
        here = _some(x, first, there, rows, deep, k * deep)
        if transposed:
            return total + triton.dot(here, w[own, :, some].T, allow_tf32=False)
        return total + triton.dot(here, w[own, some, :], allow_tf32=False)

    steps = jnp.where(there > 0, inner // deep, 0)
    zero = jnp.zeros((rows, wide), jnp.float32)
    total = jax.lax.fori_loop(0, steps, add, zero)
    row, column, mine = _places(first, there, rows, wide)
    triton.store(out.at[row, column], total.astype(out.dtype), mask=mine)


def _columns_times(start, size, x, g, out, *, rows):
    first, count = start[0], size[0]

    def add(i, total):
        at, left = first + i * rows, count - i * rows
        one = _some(x, at, left, rows, x.shape[1], 0)
        other = _some(g, at, left, rows, g.shape[1], 0)
        return total + triton.dot(one.T, other, allow_tf32=False)

    zero = jnp.zeros(out.shape, jnp.float32)
    out[...] = jax.lax.fori_loop(0, pl.cdiv(count, rows), add, zero)


def _some(x, first, there, rows: int, columns: int, start):
    """Rows from the first on and columns from `start` on; 0 in rows that are not."""
    row, column, mine = _places(first, there, rows, columns)
    return triton.load(x.at[row, start + column], mask=mine, other=0.0)


def _places(first, there, rows: int, columns: int):
    row, column = (
        jnp.broadcast_to(x, (rows, columns))
        for x in (jnp.arange(rows)[:, None], jnp.arange(columns)[None])
    )
    return first + row, column, row < there


def _tile(size: int, most: int) -> int:
    """A power of two, no more than that of `size`."""
    return min(most, max(_FEWEST, 1 << (size - 1).bit_length()))


def _divisor(size: int, most: int) -> int:
    """The largest power of two up to `most` that divides a width."""
    found = min(most, size & -size)
    if found < _FEWEST:
        raise ValueError(f"a width of {size} is no multiple of {_FEWEST}")
    return found
