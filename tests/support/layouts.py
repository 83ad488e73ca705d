"""Layouts of arrays on the eight simulated devices, for tests of resharding."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jaxrl_llm.sharding import mesh

SHAPE = (24, 48)


def _named(axes, *spec, devices=slice(None)):
    return NamedSharding(mesh.make(axes, jax.devices()[devices]), P(*spec))


def same_devices():
    """All over eight devices: FSDP, tensor, replicas, and orders turned around."""
    reverse = slice(None, None, -1)
    return {
        "fsdp8": _named({"f": 8}, "f"),
        "fsdp4 tensor2": _named({"f": 4, "t": 2}, "f", "t"),
        "fsdp2 tensor4": _named({"f": 2, "t": 4}, "f", "t"),
        "data2 fsdp2 tensor2": _named({"d": 2, "f": 2, "t": 2}, "f", "t"),
        "data2 fsdp4": _named({"d": 2, "f": 4}, "f"),
        "data4 fsdp2": _named({"d": 4, "f": 2}, "f"),
        "tensor8": _named({"t": 8}, None, "t"),
        "data2 tensor4": _named({"d": 2, "t": 4}, None, "t"),
        "data4 tensor2": _named({"d": 4, "t": 2}, None, "t"),
        "replicas": _named({"d": 8}),
        "two axes on one dimension": _named({"f": 2, "t": 4}, None, ("t", "f")),
        "transposed": _named({"f": 2, "t": 4}, "t", "f"),
        "three axes": _named({"a": 2, "b": 2, "c": 2}, ("c", "a"), "b"),
        "reversed devices": _named({"f": 8}, "f", devices=reverse),
    }


def other_devices():
    """Over some of the devices, so that pairs overlap, contain or avoid each other, in
    parts of unequal size: halves, thirds, quarters."""
    return {
        "first two": _named({"t": 2}, None, "t", devices=slice(0, 2)),
        "first four": _named({"f": 2, "t": 2}, "f", "t", devices=slice(0, 4)),
        "last four": _named({"f": 4}, "f", devices=slice(4, 8)),
        "middle three": _named({"t": 3}, None, "t", devices=slice(3, 6)),
        "first six": _named({"f": 2, "t": 3}, "f", "t", devices=slice(0, 6)),
        "last six": _named({"d": 2, "t": 3}, ("t"), devices=slice(2, 8)),
        "one": SingleDeviceSharding(jax.devices()[5]),
        "all": _named({"f": 8}, "f"),
    }


def abstract(sharding, shape=SHAPE, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


# The target joins these of the source, along the axis.
JOIN = {"gate_up": (("gate", "up"), 1)}


def seven_layers():
    train = mesh.make({"fsdp": 4, "tensor": 2})
    generate = mesh.make({"data": 2, "tensor": 4})

    def leaf(on, spec, shape, dtype):
        return abstract(NamedSharding(on, P(*spec)), shape, dtype)

    f32, bf16 = jnp.float32, jnp.bfloat16
    source = {
        "embedding": leaf(train, ("tensor", "fsdp"), (32, 16), f32),
        "layers": {
            name: leaf(train, (None, "fsdp", "tensor"), (7, 16, 8), f32)
            for name in ("gate", "up", "down")
        },
    }
    layer = {
        "gate_up": leaf(generate, (None, "tensor"), (16, 16), bf16),
        "down": leaf(generate, (None, "tensor"), (16, 8), bf16),
    }
    target = {
        "embedding": leaf(generate, ("tensor",), (32, 16), bf16),
        "layers": {i: layer for i in range(7)},
    }
    return source, target


def filled(tree):
    """Arrays of distinct numbers, laid out as `tree`."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: jax.device_put(rng.normal(size=x.shape).astype(x.dtype), x.sharding),
        tree,
    )
