import jax
import pytest
from jax.sharding import AxisType

from jaxrl_llm.sharding import mesh


def test_a_mesh_has_the_named_axes_over_every_device():
    made = mesh.make({"data": 2, "fsdp": 4})
    assert dict(made.shape) == {"data": 2, "fsdp": 4}
    assert set(made.devices.flat) == set(jax.devices())
    assert made.axis_types == (AxisType.Auto, AxisType.Auto)


def test_a_mesh_may_be_over_some_devices():
    made = mesh.make({"data": 1, "tensor": 2}, jax.devices()[6:])
    assert set(made.devices.flat) == set(jax.devices()[6:])


def test_a_mesh_leaves_no_device_idle():
    with pytest.raises(ValueError, match="mesh {'data': 3} does not fit 8 devices"):
        mesh.make({"data": 3})


@pytest.mark.parametrize(
    "axes, filled",
    [
        ({"data": 1, "fsdp": -1, "tensor": 2}, {"data": 1, "fsdp": 4, "tensor": 2}),
        ({"data": -1, "tensor": 8}, {"data": 1, "tensor": 8}),
        ({"data": -1}, {"data": 8}),
        ({"data": 2, "fsdp": 4}, {"data": 2, "fsdp": 4}),
    ],
    ids=str,
)
def test_the_open_axis_gets_what_is_left(axes, filled):
    assert mesh.fill(axes, 8) == filled


@pytest.mark.parametrize(
    "axes, message",
    [
        ({"data": -1, "fsdp": -1}, "only one axis of a mesh may be -1"),
        ({"data": 3, "fsdp": -1}, "'data': 3, 'fsdp': -1} does not fit 8 devices"),
        ({"data": 16, "fsdp": -1}, "does not fit 8 devices"),
        ({"data": 2, "fsdp": 2}, "does not fit 8 devices"),
        ({"data": 0, "fsdp": -1}, "must be positive or -1, got {'data': 0"),
        ({"data": -2, "fsdp": -1}, "must be positive or -1, got {'data': -2"),
    ],
    ids=str,
)
def test_axes_that_cannot_use_every_device_are_refused(axes, message):
    with pytest.raises(ValueError, match=message):
        mesh.fill(axes, 8)
