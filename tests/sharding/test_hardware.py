"""What is said of the devices that a run has, and of those that it leaves alone."""

import json
import os
import re
import subprocess
import sys

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


def test_a_child_process_sees_the_part_of_a_gpu_that_is_free_for_jax():
    program = """
import json, os, sys
from jaxrl_llm.sharding import hardware
for server, said in json.loads(sys.argv[1]):
    for name in hardware._USERS:
        os.environ.pop(name, None)
    os.environ.update(said)
    hardware.use_memory(server)
    print(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION"))
import jax
jax.devices()
os.environ.pop("XLA_PYTHON_CLIENT_MEM_FRACTION", None)
hardware.use_memory()
print(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION"))
"""
    own, others = "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_"
    cases = [
        ((0.0, {}), "0.92"),
        ((0.4, {}), "0.48"),  # the server's graphs have 4 % beside
        ((0.9, {}), "None"),  # nothing is left: JAX and the server will say so
        ((None, {}), "None"),
        ((0.0, {own: "0.3"}), "0.3"),
        ((0.0, {"XLA_CLIENT_MEM_FRACTION": "0.3"}), "None"),  # JAX takes one of them
        ((0.0, {f"{others}PREALLOCATE": "false"}), "None"),
        ((0.0, {f"{others}ALLOCATOR": "platform"}), "None"),
    ]
    asked = json.dumps([case for case, _ in cases])
    found = subprocess.run(
        [sys.executable, "-c", program, asked],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        check=True,
    )
    # Once devices have been asked for, what they share out is settled.
    assert found.stdout.split() == [*(expected for _, expected in cases), "None"]
