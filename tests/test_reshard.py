import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sharding import mesh, reshard, rules

AXES = ("data", "fsdp", "tensor")
LOGICAL = {"wi": ("embed", "mlp"), "embedding": ("vocab", "embed"), "scale": (None,)}


def make_params(on, table):
    params = {
        "wi": jnp.arange(8.0 * 16).reshape(8, 16),
        "embedding": jnp.arange(32.0 * 8).reshape(32, 8),
        "scale": jnp.arange(8.0),
    }
    return jax.device_put(params, rules.to_shardings(LOGICAL, on, table))


def keep(tree):
    return tree


@pytest.mark.parametrize("train", [(1, 8, 1), (1, 4, 2), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("generate", [(1, 1, 8), (8, 1, 1), (4, 1, 2)], ids=str)
def test_a_round_trip_is_exact(train, generate):
    train_mesh = mesh.make(dict(zip(AXES, train, strict=True)))
    generate_mesh = mesh.make(dict(zip(AXES, generate, strict=True)))
    params = make_params(train_mesh, rules.TRAIN)
    shardings = rules.to_shardings(LOGICAL, generate_mesh, rules.GENERATE)
    there = reshard.program(keep, shardings)(params)
    back = reshard.program(keep, rules.to_shardings(LOGICAL, train_mesh, rules.TRAIN))(
        there
    )
    assert there["wi"].sharding.spec == P(None, "tensor")
    for name in params:
        np.testing.assert_array_equal(there[name], params[name])
        assert there[name].sharding == shardings[name]
        assert back[name].sharding == params[name].sharding


def test_the_transform_is_part_of_the_program():
    on = mesh.make({"data": 1, "fsdp": 8, "tensor": 1})
    to = mesh.make({"data": 1, "fsdp": 1, "tensor": 8})
    params = make_params(on, rules.TRAIN)
    shardings = rules.to_shardings(LOGICAL, to, rules.GENERATE)
    halve = reshard.program(
        lambda tree: {"half": tree["wi"].astype(jnp.bfloat16)},
        {"half": shardings["wi"]},
    )
    half = halve(params)["half"]
    assert half.dtype == jnp.bfloat16 and half.sharding == shardings["wi"]
    np.testing.assert_array_equal(half, params["wi"])  # integers below 256: exact
    program = halve.lower(params).compile().as_text()
    assert "all-to-all" in program and "all-gather" not in program


def test_a_mesh_axis_is_used_once_per_array():
    with pytest.raises(ValueError, match="twice"):
        rules.to_spec(("mlp", "heads"), rules.TRAIN)


def test_a_name_without_a_rule_is_refused():
    with pytest.raises(KeyError, match="depth"):
        rules.to_spec(("depth",), rules.TRAIN)


def test_a_layout_that_cannot_split_evenly_is_refused_by_name():
    shardings = rules.to_shardings(
        LOGICAL, mesh.make({"data": 1, "fsdp": 4, "tensor": 2}), rules.TRAIN
    )
    shapes = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32)
        for name, shape in {"wi": (6, 16), "embedding": (32, 8), "scale": (7,)}.items()
    }
    with pytest.raises(ValueError, match=r"wi: dimension 0 of shape \(6, 16\) .*fsdp"):
        rules.check_divides(shapes, shardings)
