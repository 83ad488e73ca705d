"""One array's change of layout, as collectives that move no byte too many.

XLA's partitioner, given two shardings, gathers whole arrays for many pairs of meshes: a
data axis that comes or goes is enough. So the collectives are chosen here. A regular
pattern is one all-to-all or one all-gather; any other is rounds of sends, in each of
which a device sends at most one box and receives at most one. Two devices that swap
halves send them too: an all-to-all would pack and unpack what stays as well.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxrl_llm.sharding.transfer_plan import Box, Part, Route, Transfer

AXIS = "devices"
"""The one axis of the mesh that `exchange` runs on: all devices in a row."""

Groups = tuple[tuple[int, ...], ...]
Sizes = tuple[int, ...]


@dataclass(frozen=True)
class AllToAll:
    """Within each group, device i's j-th slice goes to device j as its i-th."""

    groups: Groups
    """Positions in the row of devices."""
    split: int
    concat: int


@dataclass(frozen=True)
class AllGather:
    """Within each group every device gets everything, in the group's order."""

    groups: Groups
    concat: int


@dataclass(frozen=True)
class Sends:
    """Boxes of one shape per round; what stays is copied first."""

    kept: tuple[tuple[Transfer, ...], ...]
    rounds: tuple[tuple[Transfer, ...], ...]


def exchange(x: jax.Array, part: Part, order: tuple[int, ...]) -> jax.Array:
    """What this device is to hold of an array, from what each device holds of it.

    Call inside `jax.shard_map` over a mesh with the one axis `AXIS`.

    Args:
      x: this device's part; of any value where the device held none.
      order: ids of the mesh's devices.
    """
    match pattern(part, order):
        case AllToAll(groups, split, concat):
            return lax.all_to_all(
                x, AXIS, split, concat, tiled=True, axis_index_groups=groups
            )
        case AllGather(groups, concat):
            return lax.all_gather(
                x, AXIS, axis=concat, tiled=True, axis_index_groups=groups
            )
        case Sends(kept, rounds):
            return _send(x, part, kept, rounds, order)


@functools.cache
def pattern(part: Part, order: tuple[int, ...]) -> AllToAll | AllGather | Sends:
    """The collectives that take an array its way."""
    way = part.route
    return _regular(way, order) or _sends(way, order)


def _regular(way: Route, order: tuple[int, ...]) -> AllToAll | AllGather | None:
    """One collective within groups of equally many devices, if that is what it is and
    no swap between two."""
    if not way.moved or not (way.held.keys() == way.wanted.keys() == set(order)):
        return None
    pairs = {(t.source, t.target): t.box for t in (*way.kept, *way.moved)}
    partners = {d: frozenset(j for i, j in pairs if i == d) for d in order}
    groups = {
        tuple(sorted(partners[d], key=lambda i: _starts(pairs.get((i, d), ()))))
        for d in order
    }
    sizes = {_extents(box) for box in pairs.values()}
    dims = {_dims(way, i, j, box) for (i, j), box in pairs.items()}
    whole = all(partners[i] == set(group) for group in groups for i in group)
    if (
        not whole
        or len({len(g) for g in groups}) > 1
        or max(map(len, (sizes, dims))) > 1
    ):
        return None
    [size], [(split, concat)] = sizes, dims
    for group in groups:
        for (a, i), (b, j) in (
            (x, y) for x in enumerate(group) for y in enumerate(group)
        ):
            box = pairs[i, j]
            if len(concat) != 1 or len(split) > 1:
                return None
            if _offsets(box, way.wanted[j]) != _along(concat, a, size):
                return None
            if _offsets(box, way.held[i]) != _along(split, b, size):
                return None
    rows = tuple(tuple(map(order.index, group)) for group in sorted(groups))
    if not split:
        return AllGather(rows, concat[0])
    return AllToAll(rows, split[0], concat[0]) if len(rows[0]) > 2 else None


def _sends(way: Route, order: tuple[int, ...]) -> Sends:
    """Each box into the first round that has its shape, its sender and its receiver
    free; partners at equal distance come together."""
    place = {device: i for i, device in enumerate(order)}

    def distance(t: Transfer) -> int:
        return (place[t.target] - place[t.source]) % len(order)

    rounds: list[list[Transfer]] = []
    for one in sorted(way.moved, key=lambda t: (_extents(t.box), distance(t))):
        for others in rounds:
            if _extents(others[0].box) == _extents(one.box) and not any(
                t.source == one.source or t.target == one.target for t in others
            ):
                others.append(one)
                break
        else:
            rounds.append([one])
    kept: dict[Sizes, list[Transfer]] = {}
    for one in way.kept:
        kept.setdefault(_extents(one.box), []).append(one)
    return Sends(tuple(map(tuple, kept.values())), tuple(map(tuple, rounds)))


def _send(x, part: Part, kept, rounds, order: tuple[int, ...]) -> jax.Array:
    way, place = part.route, {device: i for i, device in enumerate(order)}
    shape = part.target.shard_shape(part.shape)
    out = None
    for same in kept:
        piece = _cut(x, same, way, order)
        if len(same) == len(order) and piece.shape == shape:
            return piece  # every device holds all it wants
        out = jnp.zeros(shape, x.dtype) if out is None else out
        out = _put(out, piece, same, way, order)
    for together in rounds:
        piece = lax.ppermute(
            _cut(x, together, way, order),
            AXIS,
            [(place[t.source], place[t.target]) for t in together],
        )
        if out is None and {t.target for t in together} == way.wanted.keys():
            if piece.shape == shape:
                return piece  # each device that wants something has it all
        out = jnp.zeros(shape, x.dtype) if out is None else out
        out = _put(out, piece, together, way, order)
    return jnp.zeros(shape, x.dtype) if out is None else out


def _cut(x, together: Sequence[Transfer], way: Route, order) -> jax.Array:
    """The box that this device sends; any box of that shape if it sends none."""
    offsets = {t.source: _offsets(t.box, way.held[t.source]) for t in together}
    return lax.dynamic_slice(x, _mine(offsets, order), _extents(together[0].box))


def _put(out, piece, together: Sequence[Transfer], way: Route, order) -> jax.Array:
    """`out` with the received box in its place; unchanged if none was received."""
    offsets = {t.target: _offsets(t.box, way.wanted[t.target]) for t in together}
    start = _mine(offsets, order)
    if len(offsets) < len(order):
        receives = jnp.asarray([d in offsets for d in order])[lax.axis_index(AXIS)]
        there = lax.dynamic_slice(out, start, piece.shape)
        piece = lax.select(receives, piece, there)
    return lax.dynamic_update_slice(out, piece, start)


def _mine(offsets: dict[int, Sizes], order: tuple[int, ...]) -> list:
    """This device's entry, one index per dimension; zeros if it has none."""
    rank = len(next(iter(offsets.values())))
    table = np.array([offsets.get(d, (0,) * rank) for d in order], np.int32)
    if rank and (table == table[0]).all():
        return table[0].tolist()
    row = jnp.asarray(table.reshape(len(order), rank))[lax.axis_index(AXIS)]
    return [row[i] for i in range(rank)]


def _dims(way: Route, i: int, j: int, box: Box) -> tuple[Sizes, Sizes]:
    """Dimensions in which a box is less than what its sender holds, and less than what
    its receiver wants."""
    extents = _extents(box)

    def cut(whole: Box) -> Sizes:
        return tuple(d for d, n in enumerate(_extents(whole)) if n != extents[d])

    return cut(way.held[i]), cut(way.wanted[j])


def _along(dims: Sizes, steps: int, size: Sizes) -> Sizes:
    """Offsets of the `steps`-th slice along the dimension in `dims`."""
    return tuple(steps * n if dim in dims else 0 for dim, n in enumerate(size))


def _starts(box: Box) -> Sizes:
    return tuple(start for start, _ in box)


def _extents(box: Box) -> Sizes:
    return tuple(stop - start for start, stop in box)


def _offsets(box: Box, within: Box) -> Sizes:
    return tuple(a - b for a, b in zip(_starts(box), _starts(within), strict=True))
