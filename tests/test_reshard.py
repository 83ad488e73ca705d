import collective_bytes
import jax
import layouts
import numpy as np
import pytest
from test_plan import SHAPE

from sharding import plan, reshard

BITS = np.random.default_rng(0).integers(0, 2**32, SHAPE, np.uint32)
SAME, OTHER = layouts.same_devices(), layouts.other_devices()


def abstract(tree, shardings):
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def bits(x):
    return np.asarray(x).view(np.uint32)


@pytest.mark.parametrize(
    "of, name",
    [*((SAME, name) for name in SAME), *((OTHER, name) for name in OTHER)],
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
    [program] = reshard.programs(made)
    count = collective_bytes.received(program.as_text(), 8)
    assert count == list(made.minimum.values())
