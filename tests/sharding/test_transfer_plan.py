"""Every way is checked by marking array elements one device at a time."""

import itertools

import jax
import layouts
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from layouts import JOIN, SHAPE, abstract, seven_layers

from jaxrl_llm.sharding import mesh
from jaxrl_llm.sharding import transfer_plan as plans

PAIRS = [
    *itertools.permutations(layouts.same_devices().items(), 2),
    *itertools.permutations(layouts.other_devices().items(), 2),
]


def marks(sharding, shape=SHAPE):
    """For each device id, which elements it holds."""
    found = {}
    for device, index in sharding.devices_indices_map(shape).items():
        found[device.id] = np.zeros(shape, bool)
        found[device.id][index] = True
    return found


@pytest.mark.parametrize(
    "pair", PAIRS, ids=lambda pair: " -> ".join(name for name, _ in pair)
)
def test_every_device_gets_what_it_lacks_once_from_one_that_has_it(pair):
    (_, source), (_, target) = pair
    held, wanted = marks(source), marks(target)
    route = plans.route(SHAPE, source, target)
    nothing = np.zeros(SHAPE, bool)
    for device, mask in wanted.items():
        lacking = mask & ~held.get(device, nothing)
        times = np.zeros(SHAPE, int)
        for transfer in route.moved:
            if transfer.target == device:
                part = tuple(slice(*ends) for ends in transfer.box)
                assert held[transfer.source][part].all()
                times[part] += 1
        np.testing.assert_array_equal(times, lacking)
        assert route.received.get(device, 0) == lacking.sum()
    made = plans.plan({"w": abstract(source)}, {"w": abstract(target)})
    assert made.received == made.minimum
    assert sum(made.sent.values()) == sum(made.received.values())
    for device, count in made.minimum.items():
        lacking = wanted.get(device, nothing) & ~held.get(device, nothing)
        assert count == 4 * lacking.sum()


@pytest.mark.parametrize(
    "names",
    [("data2 fsdp4", "replicas"), ("data4 tensor2", "fsdp2 tensor4")],
    ids=" -> ".join,
)
def test_copies_share_the_sending(names):
    source, target = (layouts.same_devices()[name] for name in names)
    made = plans.plan({"w": abstract(source)}, {"w": abstract(target)})
    assert max(made.sent.values()) <= max(made.received.values())


@pytest.mark.parametrize("tp, tg", [(8, 2), (8, 4), (4, 2), (8, 1)])
def test_gathering_within_generation_groups_moves_hybridflows_bytes(tp, tg):
    # Training splits a model of M bytes over tp devices; generation over tg, and each
    # generation rank holds a part of what it wants: M (tp - tg) / (tg tp) to receive.
    # HybridFlow, table 2 (arXiv:2409.19256), with no pipeline.
    over = jax.devices()[:tp]
    train = mesh.make({"tg": tg, "micro": tp // tg}, over)
    source = NamedSharding(train, P(None, ("tg", "micro")))
    target = NamedSharding(train, P(None, "tg"))
    made = plans.plan({"w": abstract(source)}, {"w": abstract(target)})
    size = 4 * 24 * 48
    assert set(made.received.values()) == {size * (tp - tg) // (tg * tp)}


def test_layers_and_parts_find_their_source():
    source, target = seven_layers()
    made = plans.plan(source, target, join=JOIN)
    found = {move.targets: [part.name for part in move.parts] for move in made.moves}
    assert found == {
        ("embedding",): ["embedding"],
        tuple(f"layers.{i}.gate_up" for i in range(7)): ["layers.gate", "layers.up"],
        tuple(f"layers.{i}.down" for i in range(7)): ["layers.down"],
    }
    # Every device wants a quarter of the columns, as bf16. Devices 0, 3, 4 and 7 hold
    # a quarter of the rows of theirs; the columns that the others hold are not theirs.
    wanted = 2 * (32 * 16 + 3 * 7 * 16 * 8) // 4
    lucky, other = wanted * 3 // 4, wanted
    assert list(made.minimum.values()) == [lucky, other, other, lucky] * 2


@pytest.mark.parametrize("bound", [1, 300, 1000, 10**9])
def test_chunks_stay_within_their_bound_unless_one_layer_is_more(bound):
    source, target = seven_layers()
    made = plans.plan(source, target, join=JOIN, chunk_bytes=bound)
    for chunk in made.chunks:
        shares = [move.share for move in chunk]
        single = len(chunk) == 1 and len(chunk[0].targets) == 1
        assert sum(shares) <= bound or single
    targets = [name for move in made.moves for name in move.targets]
    assert sorted(targets) == sorted(plans.named(target))
    whole = plans.plan(source, target, join=JOIN)
    assert made.received == whole.received and len(whole.chunks) == 1


def test_equal_layers_share_a_program():
    source, target = seven_layers()
    made = plans.plan(source, target, join=JOIN, chunk_bytes=1)
    assert len(made.chunks) == 1 + 7 + 7 and len(set(made.chunks)) == 3


def test_a_donated_source_needs_less_room():
    source = {f"w{i}": abstract(layouts.same_devices()["fsdp8"]) for i in range(6)}
    target = {f"w{i}": abstract(layouts.same_devices()["tensor8"]) for i in range(6)}
    shard = 4 * 24 * 48 // 8
    made = plans.plan(source, target, chunk_bytes=shard)
    # Six results, or one; and in the chunk that runs 7/8 to send and 7/8 to receive.
    assert made.peak_extra_bytes() == 6 * shard + 2 * shard * 7 // 8
    assert made.peak_extra_bytes(donate=True) == shard + 2 * shard * 7 // 8


def test_the_table_names_every_array_and_device():
    source, target = seven_layers()
    text = str(plans.plan(source, target, join=JOIN))
    for name in ("embedding", "layers.gate", "layers.up", "layers.down"):
        [line] = [line for line in text.splitlines() if line.startswith(name)]
        assert "kB" in line or " B" in line
    assert [line.split()[0] for line in text.splitlines()[7:15]] == list("01234567")
    assert "7x16x8" in text and "fsdp" in text and "programs" in text


def change(tree, path, **fields):
    *parents, last = path
    at = tree
    for key in parents:
        at[key] = dict(at[key])
        at = at[key]
    if fields:
        values = {k: getattr(at[last], k) for k in ("shape", "dtype", "sharding")}
        values |= fields
        at[last] = jax.ShapeDtypeStruct(**values)
    else:
        del at[last]


@pytest.mark.parametrize(
    "which, path, fields, message",
    [
        (0, ("embedding",), {}, "target embedding: no such source array"),
        (0, ("layers", "up"), {}, "target layers.0.gate_up: no such source array"),
        (1, ("layers", 6), {}, "layers.down has 7 layers, the target has layers"),
        (1, ("embedding",), {"shape": (32, 8)}, "target embedding: shape .32, 8."),
        (0, ("embedding",), {"shape": (30, 18)}, "source embedding: .*size is 18"),
        (0, ("embedding",), {"sharding": None}, "source embedding: .*on no device"),
        (0, ("layers", "up"), {"dtype": "int8"}, "parts have different dtypes"),
        (1, ("layers", 3, "down"), {"dtype": "int8"}, "target layers.3.down: .*int8"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(which, path, fields, message):
    trees = seven_layers()
    change(trees[which], path, **fields)
    with pytest.raises(ValueError, match=message):
        plans.plan(*trees, join=JOIN)


def test_a_part_that_the_target_cannot_split_is_refused_by_name():
    source, target = seven_layers()
    # 8 + 8 divides by 4, and so does 10 + 6, but its parts do not.
    source["layers"]["gate"] = abstract(source["layers"]["gate"].sharding, (7, 16, 10))
    source["layers"]["up"] = abstract(source["layers"]["up"].sharding, (7, 16, 6))
    with pytest.raises(ValueError, match="target layers.0.gate_up of layers.gate"):
        plans.plan(source, target, join=JOIN)


def test_a_bound_below_one_byte_is_refused():
    with pytest.raises(ValueError, match="chunk_bytes must be at least 1, got 0"):
        plans.plan({}, {}, chunk_bytes=0)
