"""Token embeddings with a gradient that is summed in an order that does not change.

The gradient of a row of the table is a sum over all tokens that looked it up. GPUs make
it with atomic additions, in whichever order they come, so that two runs of one program
differ in their last bits.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxrl_llm.models.decoder import Lookup, take
from jaxrl_llm.models.partitioning import on_each_device, split_already
from jaxrl_llm.sharding.mesh import platform_of
from jaxrl_llm.sharding.rules import Partition


def choose(partition: Partition) -> Lookup:
    """The lookup whose gradient is the same in every run on the devices."""
    if platform_of(partition.mesh) != "gpu":
        return take
    return functools.partial(in_order, partition)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def in_order(
    partition: Partition, table: Float[Array, "V D"], tokens: Int[Array, "R T"], dtype
) -> Float[Array, "R T D"]:
    """`decoder.take`, with a gradient by `ordered_sum`: on several devices, each sums
    for its part of the table what it looked up, and then replicas are summed."""
    return take(table, tokens, dtype)


def _forward(partition, table, tokens, dtype):
    return take(table, tokens, dtype), (tokens, table)


def _backward(partition, dtype, kept, of_rows):
    tokens, table = kept
    already = split_already()
    rows, vocabulary, width = (
        tuple(axis for axis in partition.axes(name) if axis not in already)
        for name in ("looked_up", "vocab", "embed")
    )

    def local(tokens, of_rows):
        size = len(table) // partition.parts("vocab")
        first = lax.axis_index(vocabulary) * size if vocabulary else 0
        found = ordered_sum(
            of_rows.reshape(-1, of_rows.shape[-1]), tokens.ravel() - first, size
        )
        return lax.psum(found, rows) if rows else found

    of_table = on_each_device(
        local, partition.mesh, (P(rows), P(rows, None, width)), P(vocabulary, width)
    )(tokens, of_rows)
    return of_table.astype(table.dtype), None


in_order.defvjp(_forward, _backward)


def ordered_sum(
    x: Float[Array, "N D"], ids: Int[Array, " N"], size: int
) -> Float[Array, "S D"]:
    """float32 sums of the rows of `x` with the same id, always added in the same order.

        out[s] = sum(x[n] where ids[n] == s)

    Rows are sorted by id and summed within each by a scan, the sums of which are then
    written, each to a place of its own: no addition waits for the memory.

    Args:
      ids: those outside 0 to S - 1 count nowhere.
      size: S.
    """
    ids = jnp.where((ids >= 0) & (ids < size), ids, size)
    order = jnp.argsort(ids)
    ids = ids[order]
    changes = ids[1:] != ids[:-1]
    edge = jnp.ones(1, bool)
    first, last = jnp.append(edge, changes), jnp.append(changes, edge)

    def add(before, after):
        (_, sum_before), (starts, sum_after) = before, after
        started = before[0] | starts
        return started, sum_after + jnp.where(starts[:, None], 0.0, sum_before)

    _, sums = lax.associative_scan(add, (first, x[order].astype(jnp.float32)))
    # A place of its own outside for what is not written, as the places are all unique.
    places = jnp.where(last & (ids < size), ids, size + jnp.arange(len(ids)))
    out = jnp.zeros((size, x.shape[1]), jnp.float32)
    return out.at[places].set(sums, mode="drop", unique_indices=True)
