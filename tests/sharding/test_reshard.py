import pathlib
import re

import collective_bytes
import jax
import jax.numpy as jnp
import layouts
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from layouts import JOIN, SHAPE, filled, seven_layers

from jaxrl_llm.sharding import reshard
from jaxrl_llm.sharding import transfer_plan as plan
from jaxrl_llm.sharding.transfer_collectives import AllGather, AllToAll, Sends, pattern

BITS = np.random.default_rng(0).integers(0, 2**32, SHAPE, np.uint32)
SAME, OTHER = layouts.same_devices(), layouts.other_devices()
# Every layout is a target of each of these; as a source these stand for the others.
QUICK = {
    *("fsdp8", "data2 fsdp2 tensor2", "two axes on one dimension", "replicas"),
    *("middle three", "last six"),
}


def abstract(tree, shardings):
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def bits(x):
    return np.asarray(x).view(np.uint32)


@pytest.mark.parametrize(
    "of, name",
    [
        pytest.param(of, name, marks=() if name in QUICK else pytest.mark.slow)
        for of in (SAME, OTHER)
        for name in of
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_every_bit_arrives_by_the_fewest_bytes(of, name):
    # No pair can do with less than its minimum, so if the sum over all targets is
    # minimal each of them is. Any bits will do, not-a-numbers included.
    with jax.debug_nans(False):
        source = {
            other: jax.device_put(BITS.view(np.float32), of[name]) for other in of
        }
        made = plan.plan(source, abstract(source, of))
        moved = reshard.reshard(source, made)
    for other in of:
        assert moved[other].sharding == of[other]
        np.testing.assert_array_equal(bits(moved[other]), BITS)
    # What moves as it lies is copied, by no program.
    [program] = reshard.programs(made)
    count = collective_bytes.received(program.as_text(), 8)
    for device in range(8):
        copied = [m for m in made.moves if m.copies]
        count[device] += sum(
            4 * m.parts[0].route.received.get(device, 0) for m in copied
        )
    assert count == list(made.minimum.values())


def test_whole_blocks_are_copied_by_no_program():
    source = {
        "w": jax.device_put(BITS, SAME["fsdp8"]),
        "kept": jax.device_put(BITS, SAME["tensor8"]),
    }
    to = {"w": SAME["reversed devices"], "kept": SAME["tensor8"]}
    made = plan.plan(source, abstract(source, to))
    assert set(reshard.programs(made)) == {None}
    moved = reshard.reshard(source, made, donate=True)
    assert {name: x.sharding for name, x in moved.items()} == to
    assert all(x.is_deleted() for x in source.values())
    for x in moved.values():
        np.testing.assert_array_equal(x, BITS)
    assert set(made.received.values()) == {4 * BITS.size // 8}


@pytest.mark.parametrize("bound", [1, 800, 10**9])
def test_cast_unstack_and_join_are_part_of_the_program(bound):
    source, target = seven_layers()
    params = filled(source)
    made = plan.plan(source, target, join=JOIN, chunk_bytes=bound)
    moved = reshard.reshard(params, made)
    assert jax.tree.map(lambda x: x.sharding, moved) == jax.tree.map(
        lambda x: x.sharding, target
    )
    layers = jax.tree.map(
        lambda x: np.asarray(x).astype(jnp.bfloat16), params["layers"]
    )
    for i in range(7):
        got = moved["layers"][i]
        np.testing.assert_array_equal(got["down"], layers["down"][i])
        # Four tensor ranks, each with its two columns of gate beside its two of up.
        for shard in got["gate_up"].addressable_shards:
            rank = shard.index[1].start // 4
            columns = slice(2 * rank, 2 * rank + 2)
            both = [layers[name][i][:, columns] for name in ("gate", "up")]
            np.testing.assert_array_equal(shard.data, np.concatenate(both, 1))
    np.testing.assert_array_equal(
        moved["embedding"], np.asarray(params["embedding"]).astype(jnp.bfloat16)
    )
    texts = [program.as_text() for program in reshard.programs(made)]
    counts = [collective_bytes.received(text, 8) for text in texts]
    assert np.sum(counts, axis=0).tolist() == list(made.minimum.values())


def test_a_wider_dtype_is_cast_after_it_has_moved():
    x = jax.device_put(np.arange(64).astype(jnp.bfloat16), SAME["fsdp8"])
    everywhere = NamedSharding(SAME["replicas"].mesh, P())
    wide = jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=everywhere)
    made = plan.plan({"w": x}, {"w": wide})
    np.testing.assert_array_equal(reshard.reshard({"w": x}, made)["w"], np.arange(64))
    assert set(made.received.values()) == {2 * 56}
    [program] = reshard.programs(made)
    assert collective_bytes.received(program.as_text(), 8) == [2 * 56] * 8


def test_scalars_integers_and_booleans_move():
    source = {
        "count": jax.device_put(jnp.int32(7), NamedSharding(SAME["fsdp8"].mesh, P())),
        "ids": jax.device_put(np.arange(16, dtype=np.int8), SAME["fsdp8"]),
        "mask": jax.device_put(np.arange(16) % 3 == 0, SAME["fsdp8"]),
    }
    target = abstract(
        source,
        {"count": OTHER["one"], "ids": OTHER["one"], "mask": OTHER["one"]},
    )
    moved = reshard.reshard(source, plan.plan(source, target))
    for name, x in source.items():
        assert moved[name].sharding == OTHER["one"] and moved[name].dtype == x.dtype
        np.testing.assert_array_equal(moved[name], np.asarray(x))


def test_layers_may_lie_on_different_devices_before():
    # Eight layers split over as many devices, as in a pipeline.
    source = {"layers": jax.device_put(np.arange(64.0).reshape(8, 8), SAME["fsdp8"])}
    sharding = NamedSharding(SAME["tensor8"].mesh, P("t"))
    one = jax.ShapeDtypeStruct((8,), source["layers"].dtype, sharding=sharding)
    made = plan.plan(source, {"layers": dict.fromkeys(range(8), one)}, chunk_bytes=1)
    moved = reshard.reshard(source, made)
    for i in range(8):
        np.testing.assert_array_equal(moved["layers"][i], np.arange(8 * i, 8 * i + 8))


def test_regular_patterns_are_one_collective():
    def found(source, target):
        made = plan.plan(
            {"w": jax.ShapeDtypeStruct(SHAPE, np.float32, sharding=SAME[source])},
            {"w": jax.ShapeDtypeStruct(SHAPE, np.float32, sharding=SAME[target])},
        )
        return type(pattern(made.moves[0].parts[0], tuple(range(8))))

    assert found("fsdp8", "tensor8") is AllToAll
    assert found("fsdp4 tensor2", "data4 tensor2") is AllGather
    assert found("data2 fsdp4", "data2 tensor4") is AllToAll
    assert found("fsdp8", "reversed devices") is Sends
    assert found("data4 fsdp2", "data4 tensor2") is Sends


@pytest.mark.parametrize("target", ["tensor8", "fsdp8"], ids=str)
def test_a_kept_source_shares_no_memory_with_the_result(target):
    source = {"w": jax.device_put(BITS, SAME["fsdp8"])}
    made = plan.plan(source, abstract(source, {"w": SAME[target]}))
    moved = reshard.reshard(source, made)
    source["w"].delete()
    np.testing.assert_array_equal(moved["w"], BITS)


def test_a_donated_source_is_gone():
    source = {"w": jax.device_put(BITS, SAME["fsdp8"])}
    made = plan.plan(source, abstract(source, {"w": SAME["tensor8"]}))
    moved = reshard.reshard(source, made, donate=True)
    assert source["w"].is_deleted()
    np.testing.assert_array_equal(moved["w"], BITS)


@pytest.mark.parametrize(
    "target", ["tensor8", "data4 tensor2", "replicas", "data2 tensor4"]
)
def test_the_compilers_peak_is_within_a_chunk_of_the_plans(target):
    # One device's share of each array is 96 kB or more, so that nothing else counts.
    shape = (512, 384)
    source = {
        f"w{i}": jax.ShapeDtypeStruct(shape, np.float32, sharding=SAME["fsdp8"])
        for i in range(6)
    }
    wanted = abstract(source, dict.fromkeys(source, SAME[target]))
    share = 4 * 512 * 384 // 8
    made = plan.plan(source, wanted, chunk_bytes=2 * share)
    done, peak = 0, 0
    for program, chunk in zip(reshard.programs(made), made.chunks, strict=True):
        memory = program.memory_analysis()
        done += sum(move.wanted_bytes for move in chunk)
        peak = max(peak, done + memory.temp_size_in_bytes)
    chunk_bytes = max(sum(move.share for move in chunk) for chunk in made.chunks)
    assert abs(made.peak_extra_bytes() - peak) <= chunk_bytes


def test_parameters_that_the_plan_is_not_for_are_refused_by_name():
    source = {"w": jax.device_put(BITS, SAME["fsdp8"])}
    made = plan.plan(source, abstract(source, {"w": SAME["tensor8"]}))
    moved = jax.device_put(source, SAME["tensor8"])
    with pytest.raises(ValueError, match="w: the plan is for .24, 48. uint32"):
        reshard.reshard(moved, made)
    with pytest.raises(ValueError, match="only one of params and plan has .'v'"):
        reshard.reshard(source | {"v": source["w"]}, made)


def test_the_readmes_example_prints_what_it_says(capsys):
    text = (pathlib.Path(plan.__file__).parent / "README.md").read_text()
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(code, names := {})
    table = capsys.readouterr().out.splitlines()[:3]
    assert "\n".join(f"    {line}" for line in table) in text
    moved, one = names["moved"]["layers"], names["fused"]
    assert all(moved[i]["gate_up"].sharding == one.sharding for i in range(2))
