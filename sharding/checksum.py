"""A checksum per parameter, computed where the parameter lies, to verify a transfer.

    before = checksum.expected(params, plan)
    moved = reshard.reshard(params, plan)
    checksum.verify(moved, plan, before)

Two sums modulo 2^32 over the elements, each element's bits mixed with its index, so
that values that are lost, changed or put in another place all show. Layout does not
matter: sums are the same over one device or many.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, UInt32

from jaxrl_llm.sharding import reshard
from jaxrl_llm.sharding.transfer_plan import Move, Plan, named, plan

_SEEDS = (0x9E3779B9, 0x7F4A7C15)


class TransferError(RuntimeError):
    """Parameters arrived with other values than they left with."""


def expected(params: Any, made: Plan) -> dict[str, Array]:
    """By source array: the checksum [2] of each array that is made of it, in the
    target's dtype; [L, 2] of a stack of L layers."""
    arrays, found = named(params), {}
    for move in made.moves:
        for part in move.parts:
            if part.name not in found:
                x = arrays[part.name]
                sums = _of_source(move.stacked, move.dtype, x.sharding)
                found[part.name] = sums(x)
    return found


def verify(moved: Any, made: Plan, before: Mapping[str, Array]) -> None:
    """Compares what arrived with `expected` of what was sent.

    Raises:
      TransferError: names the arrays that differ.
    """
    arrays, targets = named(moved), named(made.target)
    sharding = {
        part.name: _replicated(targets[move.targets[0]].sharding)
        for move in made.moves
        for part in move.parts
    }
    wanted = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding[name])
        for name, x in before.items()
    }
    sent = reshard.reshard(before, plan(before, wanted))
    differ = set()
    for move in made.moves:
        for i, name in enumerate(move.targets):
            arrived = _of_target(move, arrays[name].sharding)(arrays[name])
            for part, sums in zip(move.parts, arrived, strict=True):
                if not sums.addressable_shards:
                    continue  # other processes hold this array and compare it
                want = np.asarray(sent[part.name].addressable_data(0))
                want = want[move.first + i] if move.stacked else want
                if not np.array_equal(np.asarray(sums.addressable_data(0)), want):
                    differ.add(name)
    if differ:
        raise TransferError(f"checksums differ after the transfer: {sorted(differ)}")


def lower_largest(made: Plan) -> tuple[jax.stages.Lowered, jax.stages.Lowered]:
    """The programs of `expected` and of `verify` that take the most memory, which they
    do one after the other, from shapes alone."""
    arrays, targets = named(made.source), named(made.target)
    move = max(made.moves, key=lambda move: arrays[move.parts[0].name].size)
    x = arrays[move.parts[0].name]
    sent = _of_source(move.stacked, move.dtype, x.sharding).lower(x)
    move = max(made.moves, key=lambda move: targets[move.targets[0]].size)
    x = targets[move.targets[0]]
    return sent, _of_target(move, x.sharding).lower(x)


def of(
    x: Array, *, batch_dims: int = 0, seeds: Sequence[int] = _SEEDS
) -> UInt32[Array, "*batch sums"]:
    """The checksum of an array, or of each entry of its first dimensions.

    Args:
      seeds: each makes one sum. One shows every change of a single element, and misses
        one in 2^32 others.
    """
    x, shape = _bits(x), x.shape[batch_dims:]
    index = jnp.zeros((1,) * len(shape), jnp.uint32)
    for dim, n in enumerate(shape):
        ones = tuple(n if d == dim else 1 for d in range(len(shape)))
        index = index * np.uint32(n) + lax.broadcasted_iota(jnp.uint32, ones, dim)
    index = index.reshape((1,) * batch_dims + index.shape)
    dims = tuple(range(batch_dims, x.ndim))
    sums = [
        jnp.sum(_mix(x ^ _mix(index + np.uint32(seed))), axis=dims, dtype=jnp.uint32)
        for seed in seeds
    ]
    return jnp.stack(sums, axis=-1)


def of_placed(x: Array) -> UInt32[Array, "1"]:
    """The first sum of an array's checksum, computed where the array lies and then on
    all its devices."""
    if x.sharding.memory_kind == "pinned_host":
        x = jax.device_put(x, x.sharding.with_memory_kind("device"))
    return _first_sum(_shortest(x.sharding))(x)


def lower_of_placed(x: jax.ShapeDtypeStruct) -> jax.stages.Lowered:
    """The program of `of_placed`, from a shape, a dtype and a sharding."""
    return _first_sum(_shortest(x.sharding)).lower(x)


def _mix(x: Array) -> Array:
    """A bijection of 32-bit words in which every input bit reaches every output bit.

    Source: MurmurHash3's finalizer (Appleby 2011, public domain).
    """
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _bits(x: Array) -> UInt32[Array, "..."]:
    """Elements as 32-bit words; wider ones are folded to 32 bits."""
    if x.dtype == bool:
        return x.astype(jnp.uint32)
    bits = lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    if x.dtype.itemsize == 8:
        bits = _mix((bits >> 32).astype(jnp.uint32)) ^ bits.astype(jnp.uint32)
    return bits.astype(jnp.uint32)


@functools.cache
def _of_source(stacked: bool, dtype: Any, sharding: Sharding) -> Any:
    return jax.jit(
        lambda x: of(x.astype(dtype), batch_dims=int(stacked)),
        out_shardings=_replicated(sharding),
    )


@functools.cache
def _first_sum(sharding: Sharding) -> Any:
    sums = functools.partial(of, seeds=_SEEDS[:1])
    everywhere = _replicated(sharding)
    return jax.jit(sums, in_shardings=sharding, out_shardings=everywhere)


def _shortest(sharding: Sharding) -> Sharding:
    """What programs return says in fewer words where it lies than what they were told:
    without axes of one device, and without dimensions at the end that are whole. To
    `jax.jit`, that would be another program."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    shape, found = sharding.mesh.shape, []
    for entry in sharding.spec:
        names = entry if isinstance(entry, tuple) else (entry,)
        names = tuple(n for n in names if n is not None and shape[n] > 1)
        found.append(names if len(names) > 1 else names[0] if names else None)
    while found and found[-1] is None:
        found.pop()
    return NamedSharding(sharding.mesh, P(*found))


@functools.cache
def _of_target(move: Move, sharding: Sharding) -> Any:
    """An array -> the checksum of each part that it was joined from."""
    return jax.jit(
        lambda x: [of(part) for part in _parts(x, move, sharding)],
        out_shardings=_replicated(sharding),
    )


def _parts(x: Array, move: Move, sharding: Sharding) -> list[Array]:
    """Undoes the join, which was made shard by shard."""
    if move.dim is None:
        return [x]
    dim, n = move.dim, x.shape[move.dim]
    shards = n // sharding.shard_shape(x.shape)[dim]
    split = x.reshape(*x.shape[:dim], shards, n // shards, *x.shape[dim + 1 :])
    parts, start = [], 0
    for part in move.parts:
        size = part.shape[dim + move.stacked]
        stop = start + size // shards
        block = lax.slice_in_dim(split, start, stop, axis=dim + 1)
        parts.append(block.reshape(*x.shape[:dim], size, *x.shape[dim + 1 :]))
        start = stop
    return parts


def _replicated(sharding: Sharding) -> Sharding:
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, P())
    return sharding
