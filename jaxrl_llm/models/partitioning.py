"""A decoder on a mesh: its layout, and attention where no device has a whole row.

Tensor and sequence parallelism, FSDP and replicas are layouts alone: the compiler moves
what a layout asks for. Attention over rows that are split is exchanged here.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxrl_llm.models.apply import Params
from jaxrl_llm.models.architecture import Architecture
from jaxrl_llm.models.attention.packed import PackedAttention, Window
from jaxrl_llm.sharding import rules
from jaxrl_llm.sharding.rules import Partition, Rules


def partition(
    arch: Architecture, shapes: Params, logical_axes: Params, mesh: Mesh, changed: Rules
) -> Partition:
    """The training layout of a model. Vocabularies, key/value heads and ranks of
    adapters that do not divide stay whole, unless `changed` says otherwise.

    Args:
      shapes: of the parameters.
      logical_axes: of the parameters.
      changed: rules in place of those of `rules.TRAIN`.

    Raises:
      ValueError: something cannot be split evenly; names it.
    """
    optional = ("vocab", "kv_heads", "split_rank")
    fitted = rules.fit(rules.TRAIN, shapes, logical_axes, mesh, optional)
    made = Partition(mesh, {**fitted, **changed})
    rules.check_divides(shapes, made.shardings(logical_axes))
    heads, tensor, context = arch.num_heads, made.parts("heads"), made.parts("tokens")
    if heads % (tensor * context):
        raise ValueError(
            f"{heads} attention heads cannot be split over {tensor} x {context} "
            "devices: those that heads are split over x those that a row is"
        )
    return made


def kv_copies(arch: Architecture, devices: int) -> int:
    """How often every key/value head must be there for `devices` to have as many each.

    A device has the heads of its own queries: with fewer key/value heads than devices,
    several devices hold the same one.

    Raises:
      ValueError: the query heads cannot be split so.
    """
    copies = devices // math.gcd(arch.num_kv_heads, devices)
    if arch.num_heads % devices or arch.num_heads % (arch.num_kv_heads * copies):
        raise ValueError(
            f"{arch.num_heads} attention heads with {arch.num_kv_heads} key/value "
            f"heads cannot be split over {devices} devices"
        )
    return copies


def across(partition: Partition, attention: PackedAttention) -> PackedAttention:
    """`attention` by every device on rows and heads of its own.

    Where rows are split, devices first exchange tokens for heads, so that each has all
    tokens of fewer heads, and then back. Where key/value heads are too few for that,
    each is copied.

    Source: Jacobs et al. 2023 (DeepSpeed Ulysses, arXiv:2309.14509).
    """
    devices = partition.parts("heads") * partition.parts("tokens")

    def attend(
        q: Float[Array, "R T N H"],
        k: Float[Array, "R T K H"],
        v: Float[Array, "R T K H"],
        sequence_ids: Int[Array, "R T"],
        positions: Int[Array, "R T"],
        *,
        window: Window,
        scale: float,
        softcap: float | None = None,
    ) -> Float[Array, "R T N H"]:
        already = split_already()
        rows, tokens, heads = (
            tuple(axis for axis in partition.axes(name) if axis not in already)
            for name in ("rows", "tokens", "heads")
        )
        split, whole = P(rows, tokens, heads), P(rows, tokens)

        def local(q, k, v, *of_tokens):
            if partition.parts("tokens") > 1:
                q, k, v = (
                    lax.all_to_all(x, tokens, split_axis=2, concat_axis=1, tiled=True)
                    for x in (q, k, v)
                )
                of_tokens = (
                    lax.all_gather(x, tokens, axis=1, tiled=True) for x in of_tokens
                )
            out = attention(
                q, k, v, *of_tokens, window=window, scale=scale, softcap=softcap
            )
            if partition.parts("tokens") > 1:
                out = lax.all_to_all(
                    out, tokens, split_axis=1, concat_axis=2, tiled=True
                )
            return out

        copies = devices // math.gcd(k.shape[2], devices)  # see `kv_copies`
        k, v = (jnp.repeat(x, copies, axis=2) for x in (k, v))
        return on_each_device(
            local, partition.mesh, (split, split, split, whole, whole), split
        )(q, k, v, sequence_ids, positions)

    return attend


def split_already() -> frozenset[str]:
    """Axes of the mesh over which a caller has split the program."""
    return frozenset(jax.sharding.get_abstract_mesh().manual_axes)


def on_each_device(
    function: Callable, mesh: Mesh, inputs: Any, outputs: Any
) -> Callable:
    """The function, run by each device of `mesh` on its part of the arguments: kernels
    are not split by the compiler. Axes that a caller has split stay as they are."""
    already = split_already()
    return jax.shard_map(
        function,
        mesh=None if already else mesh,
        axis_names=set(mesh.axis_names) - already,
        in_specs=inputs,
        out_specs=outputs,
        check_vma=False,
    )
