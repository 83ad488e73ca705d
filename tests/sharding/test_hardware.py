"""What is said of the devices that a run has, and of those that it leaves alone."""

import re

import jax
import pytest

from jaxrl_llm.sharding import hardware


def test_devices_and_memory_are_named_in_a_line():
    said = hardware.described()
    assert f"devices: {jax.device_count()} x cpu; host: " in said
    assert said.endswith(f"processors, {hardware.host_memory() / 2**30:.0f} GiB")


@pytest.mark.parametrize(
    "files, tool, plugin, platforms, expected",
    [
        ([], None, None, "", None),
        (
            ["/dev/nvidia0"],
            None,
            None,
            "",
            "(/dev/nvidia0).*pip install 'jaxrl-llm.cuda",
        ),
        ([], "/bin/nvidia-smi", None, "", "(/bin/nvidia-smi).*pip install"),
        (["/dev/nvidia0"], None, object(), "cpu", "JAX_PLATFORMS is cpu: unset it"),
        (["/dev/nvidia0"], None, object(), "", "JAX could not start CUDA"),
    ],
)
def test_gpus_that_are_left_alone_are_named(
    monkeypatch, files, tool, plugin, platforms, expected
):
    monkeypatch.setattr(hardware.glob, "glob", lambda pattern: files)
    monkeypatch.setattr(hardware.shutil, "which", lambda name: tool)
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: plugin)
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    said = hardware.unused_gpus()
    if expected is None:
        assert said is None
    else:
        assert re.search(expected, said)
    monkeypatch.setattr(hardware.jax, "default_backend", lambda: "gpu")
    assert hardware.unused_gpus() is None
