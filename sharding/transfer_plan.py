"""What has to move for a parameter tree to change its layout, before anything moves.

On each device an array is a box: the ranges of indices that the device holds. What a
device must receive is the box it wants less the box it holds, and nothing else:

    minimum[d] = |wanted[d]| - |wanted[d] & held[d]|

`plan` finds who sends which box to whom so that every device receives exactly that.
Nothing here touches a device's memory.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

Box = tuple[tuple[int, int], ...]
"""A (start, stop) for every dimension."""
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Transfer:
    """A box that goes from one device to another, or stays where it is."""

    source: int
    """Device id, as `target`."""
    target: int
    box: Box
    """In the indices of the whole array."""


@dataclass(frozen=True)
class Route:
    """One array's way from one layout to another."""

    held: Mapping[int, Box]
    """By device id: what it holds before."""
    wanted: Mapping[int, Box]
    """By device id: what it is to hold afterwards."""
    kept: tuple[Transfer, ...]
    """What devices hold already."""
    moved: tuple[Transfer, ...]
    """Everything else, each index once."""

    @functools.cached_property
    def sent(self) -> Mapping[int, int]:
        """Elements that each device sends."""
        return _sizes((t.source, t.box) for t in self.moved)

    @functools.cached_property
    def received(self) -> Mapping[int, int]:
        """Elements that each device receives."""
        return _sizes((t.target, t.box) for t in self.moved)

    @property
    def copies(self) -> bool:
        """Whether each device gets, as it is, all that some device holds."""
        return all(
            self.held[t.source] == t.box == self.wanted[t.target]
            for t in (*self.kept, *self.moved)
        )

    @functools.cached_property
    def cut(self) -> Mapping[int, int]:
        """Elements that each device cuts out of what it holds in order to send them."""
        return _sizes(
            (t.source, t.box) for t in self.moved if t.box != self.held[t.source]
        )


def volume(box: Box) -> int:
    """Elements in a box."""
    return math.prod(stop - start for start, stop in box)


def overlap(a: Box, b: Box) -> Box | None:
    """What two boxes share; None if that is nothing."""
    both = tuple((max(x, u), min(y, v)) for (x, y), (u, v) in zip(a, b, strict=True))
    return both if all(start < stop for start, stop in both) else None


def boxes(shape: Shape, sharding: Sharding) -> dict[int, Box]:
    """What each device, by id, holds of an array."""
    return {
        device.id: tuple(
            part.indices(size)[:2] for part, size in zip(index, shape, strict=True)
        )
        for device, index in sharding.devices_indices_map(shape).items()
    }


@functools.cache
def route(shape: Shape, source: Sharding, target: Sharding) -> Route:
    """Who sends what to whom. Every device receives the minimum.

    Where several devices hold a copy, the first copy serves the devices that hold first
    copies themselves, the second copy those with second copies, and so on, so that
    equal devices send equally much.
    """
    held, wanted = boxes(shape, source), boxes(shape, target)
    holders: dict[Box, list[int]] = {}
    for device in sorted(held):
        holders.setdefault(held[device], []).append(device)
    copy = {d: i for ids in holders.values() for i, d in enumerate(ids)}
    newcomers = sorted(wanted.keys() - held.keys())
    copy |= {d: i for i, d in enumerate(newcomers)}
    kept, moved = [], []
    for device in sorted(wanted):
        for box, ids in holders.items():
            shared = overlap(box, wanted[device])
            if shared is None:
                continue
            if held.get(device) == box:
                kept.append(Transfer(device, device, shared))
            else:
                sender = ids[copy[device] % len(ids)]
                moved.append(Transfer(sender, device, shared))
    return Route(held, wanted, tuple(kept), tuple(moved))


@dataclass(frozen=True)
class Part:
    """A source array, or consecutive layers of one, on its way into a target array."""

    name: str = field(compare=False)
    """The source array's path."""
    whole: Shape
    """The source array's shape."""
    shape: Shape
    """Shape of what moves."""
    dtype: np.dtype
    """The source's dtype."""
    source: Sharding
    target: Sharding
    """Layouts of what moves."""

    @property
    def route(self) -> Route:
        """Which box goes where."""
        return route(self.shape, self.source, self.target)


@dataclass(frozen=True)
class Move:
    """What makes one target array, or the target arrays of consecutive layers.

    Moves are equal if one program does for both; names and first layers may differ.
    """

    parts: tuple[Part, ...]
    """Several are joined into one array."""
    dim: int | None
    """Along which they are joined, in the target's dimensions."""
    stacked: bool
    """Each index of the first dimension becomes an array of its own."""
    dtype: np.dtype
    """The target's."""
    first: int = field(compare=False)
    """Index of the first layer that moves."""
    targets: tuple[str, ...] = field(compare=False)
    """Paths of the target arrays."""

    @property
    def copies(self) -> bool:
        """Whether it takes no more than copies of what devices hold."""
        return (
            not self.stacked
            and len(self.parts) == 1
            and self.parts[0].dtype == self.dtype
            and self.parts[0].route.copies
        )

    @property
    def wire_bytes(self) -> int:
        """Bytes per element while moving: casts to less come before, others after."""
        return min(self.dtype.itemsize, self.parts[0].dtype.itemsize)

    @property
    def held_bytes(self) -> int:
        """Bytes of what moves, on one device of the source, as it moves."""
        return self.wire_bytes * sum(
            math.prod(part.source.shard_shape(part.shape)) for part in self.parts
        )

    @property
    def wanted_bytes(self) -> int:
        """Bytes of what moves, on one device of the target, as it moves."""
        return self.wire_bytes * sum(
            math.prod(part.target.shard_shape(part.shape)) for part in self.parts
        )

    @property
    def share(self) -> int:
        """Bytes that count towards a chunk's bound."""
        return max(self.held_bytes, self.wanted_bytes)


Chunk = tuple[Move, ...]


@dataclass(frozen=True)
class Plan:
    """Everything `reshard` is going to do. `print` shows it as a table."""

    chunks: tuple[Chunk, ...]
    """Each is one compiled program, and copies; equal chunks share their program."""
    source: Any
    target: Any
    """Trees of `jax.ShapeDtypeStruct` with a sharding."""

    @functools.cached_property
    def devices(self) -> tuple[jax.Device, ...]:
        """All that hold something before or afterwards, by id."""
        found = {
            device
            for leaf in jax.tree.leaves((self.source, self.target))
            for device in leaf.sharding.device_set
        }
        return tuple(sorted(found, key=lambda device: device.id))

    @property
    def moves(self) -> tuple[Move, ...]:
        """Moves of all chunks."""
        return tuple(itertools.chain(*self.chunks))

    @functools.cached_property
    def sent(self) -> Mapping[int, int]:
        """Bytes each device sends."""
        return self._total(lambda part: part.route.sent)

    @functools.cached_property
    def received(self) -> Mapping[int, int]:
        """Bytes each device receives."""
        return self._total(lambda part: part.route.received)

    @functools.cached_property
    def minimum(self) -> Mapping[int, int]:
        """Bytes each device has to receive, whatever the way: what it wants less what
        it holds of that.

        Where the generation group holds the training group's parts this is
        HybridFlow's M (tp - tg pg) / (tg pg tp), section 5.3 (arXiv:2409.19256).
        """
        return self._total(lambda part: missing(part.route))

    def peak_extra_bytes(self, donate: bool = False) -> int:
        """On the fullest device, at the worst moment, bytes above the source's.

        While a chunk runs it needs `working_bytes` besides the target arrays so far.
        """
        size = {d.id: 0 for d in self.devices}
        worst, last = 0, last_chunks(self)
        sources = named(self.source)
        targets = named(self.target)
        for i, chunk in enumerate(self.chunks):
            for move in chunk:
                for name in move.targets:
                    _add(size, targets[name], 1)
            worst = max(worst, max(size.values()) + working_bytes(chunk))
            for name in (name for name, at in last.items() if donate and at == i):
                _add(size, sources[name], -1)
        return worst

    def _total(self, elements) -> Mapping[int, int]:
        total = {device.id: 0 for device in self.devices}
        for move in self.moves:
            for part in move.parts:
                for device, count in elements(part).items():
                    total[device] += count * move.wire_bytes
        return total

    def __str__(self) -> str:
        return table(self)


def working_bytes(chunk: Chunk) -> int:
    """What a chunk's program needs on a device besides its arguments and results: room
    for what it receives, and for what it sends that is not all of what it holds."""
    needed: dict[int, int] = {}
    for move in (move for move in chunk if not move.copies):
        for part in move.parts:
            for of in (part.route.received, part.route.cut):
                for device, count in of.items():
                    needed[device] = needed.get(device, 0) + count * move.wire_bytes
    return max(needed.values(), default=0)


def missing(way: Route) -> dict[int, int]:
    """Elements that each device wants and does not hold."""
    found = {}
    for device, box in way.wanted.items():
        shared = overlap(box, way.held[device]) if device in way.held else None
        found[device] = volume(box) - (volume(shared) if shared else 0)
    return found


def last_chunks(made: Plan) -> dict[str, int]:
    """For each source array the last chunk that reads it."""
    return {
        part.name: i
        for i, chunk in enumerate(made.chunks)
        for move in chunk
        for part in move.parts
    }


def plan(
    source: Any,
    target: Any,
    *,
    join: Mapping[str, tuple[Sequence[str], int]] | None = None,
    chunk_bytes: int = 2**30,
) -> Plan:
    """How to make the arrays of `target` of those of `source`.

    A target array is made of the source array with the same path. One whose path has an
    integer that no source path has is that layer of a stacked source array:
    layers.3.q is layers.q[3]. Where only some layers have such an array, the stack has
    a row for each of those, in their order. Dtypes may differ; arrays are cast before
    they move if that makes them smaller.

    Args:
      source: tree of arrays, or of `jax.ShapeDtypeStruct` with shardings.
      target: tree of `jax.ShapeDtypeStruct` with shardings.
      join: {"qkv": (("q", "k", "v"), 1)} makes target arrays whose last key is "qkv" of
        the three source arrays beside it, along dimension 1. Where that dimension is
        split, each device's shard is the join of its shards of the parts, as fused
        projections under tensor parallelism want it.
      chunk_bytes: most bytes per device, held or wanted, that one program moves. A
        single layer, or an array without layers, that has more is a chunk by itself.

    Raises:
      ValueError: a target array has no source, shapes do not fit, or a dimension does
        not divide; the message names the array.
    """
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be at least 1, got {chunk_bytes}")
    sources, targets = abstract(source, "source"), abstract(target, "target")
    before, after = named(sources), named(targets)
    groups: dict[tuple[str, ...], list[tuple[str, int | None]]] = {}
    for path, _ in jax.tree_util.tree_leaves_with_path(targets):
        names, layer = _origin(path, before, join or {})
        groups.setdefault(names, []).append((_name(path), layer))
    moves = []
    for names, made in groups.items():
        dim = join[_last(made[0][0])][1] if join and len(names) > 1 else None
        moves += _moves(names, made, dim, before, after, chunk_bytes)
    return Plan(tuple(_chunks(moves, chunk_bytes)), sources, targets)


def abstract(tree: Any, which: str) -> Any:
    """Shapes, dtypes and shardings of a tree.

    Raises:
      ValueError: a leaf has no sharding, or one that does not divide it.
    """

    def one(path, leaf):
        sharding = getattr(leaf, "sharding", None)
        if sharding is None:
            raise ValueError(f"{which} {_name(path)}: {type(leaf)} is on no device")
        try:
            sharding.shard_shape(leaf.shape)
        except ValueError as error:
            raise ValueError(f"{which} {_name(path)}: {error}") from None
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(one, tree)


def named(tree: Any) -> dict[str, Any]:
    """The leaves by path."""
    return {_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def _origin(
    path: tuple,
    before: Mapping[str, Any],
    join: Mapping[str, tuple[Sequence[str], int]],
) -> tuple[tuple[str, ...], int | None]:
    """The source arrays of the target array at `path`, and which layer of them."""
    keys = _name(path).split(".")
    for drop in (None, *range(len(keys))):
        if drop is not None and not keys[drop].isdecimal():
            continue
        *rest, last = [key for i, key in enumerate(keys) if i != drop] or [""]
        lasts = join[last][0] if last in join else (last,)
        names = tuple(".".join([*rest, key]) for key in lasts)
        if all(name in before for name in names):
            return names, None if drop is None else int(keys[drop])
    raise ValueError(
        f"target {_name(path)}: no such source array, and none that it could be a "
        f"layer of; the source has {sorted(before)}"
    )


def _moves(names, made, dim, before, after, chunk_bytes) -> Iterator[Move]:
    """The moves that make the target arrays `made` of the source arrays `names`."""
    if made[0][1] is None:
        [(target, _)] = made
        yield _move(names, (target,), dim, before, after, None)
        return
    made = sorted(made, key=lambda pair: pair[1])
    count = before[names[0]].shape[0]
    if len(made) != count:
        raise ValueError(
            f"target {made[0][0]}: {names[0]} has {count} layers, the target has "
            f"layers {[layer for _, layer in made]}"
        )
    targets = tuple(target for target, _ in made)
    whole = _move(names, targets, dim, before, after, (0, count))
    most = max(1, chunk_bytes * count // max(1, whole.share))
    if any(_splits_layers(before[name]) for name in names):
        most = count  # a slice of some layers would not be on every device
    step = -(-count // -(-count // most))  # equal chunks share a program
    for start in range(0, count, step):
        stop = min(start + step, count)
        yield _move(names, targets[start:stop], dim, before, after, (start, stop))


def _move(names, targets, dim, before, after, layers: tuple[int, int] | None) -> Move:
    target = after[targets[0]]
    for other in targets[1:]:
        if _form(after[other]) != _form(target):
            raise ValueError(
                f"target {other}: {_form(after[other])}, but {targets[0]} of the same "
                f"source has {_form(target)}"
            )
    parts, stack = [], () if layers is None else (layers[1] - layers[0],)
    laid_out = target.sharding if layers is None else _stacked(target.sharding)
    for name in names:
        x = before[name]
        one = x.shape if layers is None else x.shape[1:]
        try:
            laid_out.shard_shape((*stack, *one))
        except ValueError as error:
            raise ValueError(f"target {targets[0]} of {name}: {error}") from None
        parts.append(Part(name, x.shape, (*stack, *one), x.dtype, x.sharding, laid_out))
    wanted = _joined([part.shape[len(stack) :] for part in parts], dim)
    if wanted != target.shape:
        raise ValueError(
            f"target {targets[0]}: shape {target.shape}, but {', '.join(names)} make "
            f"{wanted}"
        )
    if len({part.dtype for part in parts}) > 1:
        raise ValueError(f"target {targets[0]}: its parts have different dtypes")
    return Move(
        parts=tuple(parts),
        dim=dim,
        stacked=layers is not None,
        dtype=jnp.dtype(target.dtype),
        first=layers[0] if layers else 0,
        targets=tuple(targets),
    )


def _joined(shapes: Sequence[Shape], dim: int | None) -> Shape:
    """The shape of arrays joined along `dim`; ValueError if they do not fit."""
    if dim is None:
        return shapes[0]
    rests = {(*shape[:dim], *shape[dim + 1 :]) for shape in shapes}
    if len(rests) > 1 or dim >= len(shapes[0]):
        raise ValueError(f"shapes {list(shapes)} cannot be joined along {dim}")
    total = sum(shape[dim] for shape in shapes)
    return (*shapes[0][:dim], total, *shapes[0][dim + 1 :])


def _form(leaf) -> tuple:
    return leaf.shape, leaf.dtype, leaf.sharding


def _splits_layers(leaf) -> bool:
    return leaf.sharding.shard_shape(leaf.shape)[0] != leaf.shape[0]


def _stacked(sharding: Sharding) -> Sharding:
    """The layout of a stack of arrays of which each is laid out as `sharding`."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, P(None, *sharding.spec))
    return sharding


def _chunks(moves: Sequence[Move], chunk_bytes: int) -> Iterator[Chunk]:
    chunk: list[Move] = []
    for move in moves:
        if chunk and sum(m.share for m in [*chunk, move]) > chunk_bytes:
            yield tuple(chunk)
            chunk = []
        chunk.append(move)
    if chunk:
        yield tuple(chunk)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _sizes(pairs) -> dict[int, int]:
    found: dict[int, int] = {}
    for device, box in pairs:
        found[device] = found.get(device, 0) + volume(box)
    return found


def _add(size: dict[int, int], leaf, sign: int) -> None:
    shard = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for device in leaf.sharding.device_set:
        size[device.id] += sign * shard


def table(made: Plan) -> str:
    """One line per source array, then one per device."""
    rows = [("array", "shape", "from", "to", "moved", "most received", "minimum")]
    by_name: dict[str, list[tuple[Part, int]]] = {}
    for move in made.moves:
        for part in move.parts:
            by_name.setdefault(part.name, []).append((part, move.wire_bytes))
    for name, parts in by_name.items():
        first = parts[0][0]
        moved = sum(sum(p.route.received.values()) * b for p, b in parts)
        received = sum(max(p.route.received.values(), default=0) * b for p, b in parts)
        minimum = sum(max(missing(p.route).values()) * b for p, b in parts)
        rows.append(
            (name, "x".join(map(str, first.whole)) or "scalar", _spec(first.source),
             _spec(first.target), size(moved), size(received), size(minimum))
        )  # fmt: skip
    devices = [("device", "sends", "receives", "minimum")] + [
        (
            str(d.id),
            *(size(of[d.id]) for of in (made.sent, made.received, made.minimum)),
        )
        for d in made.devices
    ]
    extra = size(made.peak_extra_bytes()), size(made.peak_extra_bytes(donate=True))
    return "\n".join(
        [*_aligned(rows), "", *_aligned(devices), "",
         f"{len(made.chunks)} chunks, {len(set(made.chunks))} programs; at most "
         f"{extra[0]} more than the source on a device, {extra[1]} if it is donated"]
    )  # fmt: skip


def size(count: int) -> str:
    """Bytes for a person: 1.5 MB; powers of 1000."""
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if abs(count) >= 1000**power:
            return f"{count / 1000**power:.3g} {unit}"
    return f"{count} B"


def _spec(sharding: Sharding) -> str:
    if not isinstance(sharding, NamedSharding):
        return type(sharding).__name__
    dims = ["+".join((d,) if isinstance(d, str) else d or "-") for d in sharding.spec]
    return ",".join(dims) or "everywhere"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
