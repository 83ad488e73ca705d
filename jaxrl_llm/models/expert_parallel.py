"""Experts on the devices of a mesh.

Each device of the axes of "experts" holds some experts, whole but for what "expert_mlp"
splits of their width.
"""

import functools

from jax import lax
from jax.sharding import PartitionSpec as P

from jaxrl_llm.models import grouped
from jaxrl_llm.models.moe import Experts, Routes, Weights, alone
from jaxrl_llm.models.partitioning import on_each_device, split_already
from jaxrl_llm.sharding.mesh import platform_of
from jaxrl_llm.sharding.rules import Partition


def choose(partition: Partition) -> Experts:
    """How the devices of a mesh compute experts."""
    kernel = grouped.choose(platform_of(partition.mesh))
    if partition.mesh.size == 1:
        return functools.partial(alone, kernel=kernel)
    return functools.partial(across, partition, kernel)


def across(
    partition: Partition, kernel: grouped.Kernel, x, routes, weights, activation
):
    """`moe.alone` by all devices together.

    Every device gathers the tokens of those that it shares experts with, computes what
    its own experts add to them, and sums with the others what belongs to each one's
    tokens. No token is left out, however unevenly they are spread.
    """
    already = split_already()
    rows, tokens, experts, width = (
        tuple(axis for axis in partition.axes(name) if axis not in already)
        for name in ("rows", "tokens", "experts", "expert_mlp")
    )
    exchanged = tuple(axis for axis in experts if axis in rows)
    summed = (*width, *(axis for axis in experts if axis not in rows))

    def local(x, chosen, gates, *matrices):
        first = lax.axis_index(experts) * len(matrices[0]) if experts else 0
        if exchanged:
            x, chosen, gates = (
                lax.all_gather(part, exchanged, axis=0, tiled=True)
                for part in (x, chosen, gates)
            )
        found = alone(
            x,
            Routes(chosen, gates),
            Weights(*matrices),
            activation,
            kernel=kernel,
            first=first,
        )
        if summed:
            found = lax.psum(found, summed)
        if exchanged:
            found = lax.psum_scatter(found, exchanged, scatter_dimension=0, tiled=True)
        return found

    of_tokens, of_experts = P(rows, tokens), P(experts, None, width)
    return on_each_device(
        local, partition.mesh, (of_tokens,) * 3 + (of_experts,) * 3, of_tokens
    )(x, *routes, *weights[:3])
