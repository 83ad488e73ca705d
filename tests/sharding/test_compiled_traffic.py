import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl_llm.sharding import compiled_traffic as collectives
from jaxrl_llm.sharding import mesh

SIZE = 4 * 16 * 24  # bytes of a float32 [16, 24]


def compiled(function, *shapes, specs, out=None):
    on = mesh.make({"x": 8})
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(on, P(*spec)))
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    out = None if out is None else NamedSharding(on, P(*out))
    lowered = jax.jit(function, out_shardings=out).lower(*arguments)
    return lowered.compile().as_text()


@pytest.mark.parametrize(
    "spec, out, received",
    [
        (("x",), (), SIZE * 7 // 8),  # all-gather
        (("x",), (None, "x"), SIZE // 8 * 7 // 8),  # all-to-all
        (("x",), ("x",), 0),
    ],
)
def test_a_change_of_layout_receives_what_is_lacking(spec, out, received):
    text = compiled(lambda x: x, (16, 24), specs=[spec], out=out)
    assert collectives.received(text, 8) == received


def test_a_sum_over_devices_goes_around_the_ring_twice():
    text = compiled(lambda x: x.sum(0), (16, 24), specs=[("x",)], out=())
    assert collectives.received(text, 8) == 2 * 4 * 24 * 7 // 8


def test_what_is_in_a_loop_counts_as_often_as_the_loop_runs():
    def loop(x):
        def body(x, _):
            return 0.5 * jax.lax.psum(x, "x"), None

        return jax.lax.scan(body, x, None, length=5)[0]

    split = P("x")
    mapped = jax.shard_map(
        loop, mesh=mesh.make({"x": 8}), in_specs=split, out_specs=split, check_vma=False
    )
    text = compiled(mapped, (16, 24), specs=[split])
    assert collectives.received(text, 8) == 5 * 2 * 4 * 2 * 24 * 7 // 8


ASYNC = """HloModule m

%fused (p: f32[2,8]) -> f32[16,8] {
  %ag.1 = f32[16,8]{1,0} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3,4,5,6,7}}
}

%body (t: (s32[])) -> (s32[]) {
  %s = f32[16,8]{1,0} fusion(%x), kind=kCustom, calls=%fused
  %ag.2 = f32[16,8]{1,0} all-gather(%x), channel_id=7, replica_groups=[1,8]<=[8]
}

%condition (t: (s32[])) -> pred[] {
  %limit = s32[]{:T(128)} constant(3)
}

ENTRY %main (a: f32[2,8]) -> f32[16,8] {
  %w = (s32[]) while(%init), condition=%condition, body=%body
  %r = bf16[4,8]{1,0} reduce-scatter(%a), channel_id=8, replica_groups=mesh['a'=2,'b'=4] {'b'}
}
"""  # noqa: E501


def test_one_collective_written_twice_counts_once():
    gathered, scattered = 4 * 16 * 8 * 7 // 8, 2 * 4 * 8 * 3
    assert collectives.received(ASYNC, 8) == 3 * gathered + scattered
