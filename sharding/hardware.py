"""What devices can do at most: memory, its rate, links, arithmetic."""

import glob
import importlib.util
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import jax

from jaxrl_llm.sharding import private_jax

# Device kind: memory that programs can use in GiB, bytes per second of that memory, and
# bytes per second received from other devices (of a TPU: around one axis of its torus).
# Source: data sheets; How to Scale Your Model (Austin et al. 2025), part 2.
_DEVICES = (
    (r"^TPU v5 ?(lite|e)$", 15.75, 8.2e11, 9e10),
    (r"^TPU v5p?$", 95.0, 2.8e12, 1.8e11),
    (r"^TPU v6 ?(lite|e)$", 31.25, 1.6e12, 1.8e11),
    (r"\bH100\b", 79.0, 3.35e12, 4.5e11),
    (r"\bH200\b", 139.0, 4.8e12, 4.5e11),
)


def facts(device_kind: str) -> tuple[float, float, float] | None:
    """Memory in GiB, its rate and the link's in bytes per second; None if not known."""
    for pattern, *numbers in _DEVICES:
        if re.search(pattern, device_kind):
            return tuple(numbers)
    return None


# Dense bfloat16, per JAX device; vendors' data sheets. The PCIe and NVL boards of the
# H100 and H200 are slower than the SXM modules, a MIG slice is less than its board.
_PEAK_FLOPS = (
    (r"\bH[12]00\b(?!.*\b(PCIe|NVL|MIG)\b)", 989e12),
    (r"\bA100\b(?!.*\bMIG\b)", 312e12),
    (r"\bB200\b(?!.*\bMIG\b)", 2250e12),
    (r"\bL4\b", 121e12),
    (r"^TPU v4$", 275e12),
    (r"^TPU v5 ?(lite|e)$", 197e12),
    (r"^TPU v5p?$", 459e12),
    (r"^TPU v6 ?(lite|e)$", 918e12),
)


def peak_flops(device_kind: str) -> float | None:
    """Operations per second of `jax.Device.device_kind`; None if not known."""
    for pattern, peak in _PEAK_FLOPS:
        if re.search(pattern, device_kind):
            return peak
    return None


# Of a GPU's memory, what a process needs outside of JAX's pool: its context, cuBLAS,
# cuDNN, NCCL, CUDA graphs. A server has graphs beside what it is given.
_OUTSIDE, _OUTSIDE_OF_SERVER = 0.08, 0.04
_LEAST = 0.05
_USERS = (
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_ALLOCATOR",
)


def use_memory(server: float | None = 0.0) -> None:
    """Gives JAX's pool what it can have of a GPU's memory, and not only the 75 % that
    are JAX's default.

    Nothing changes if a variable of the environment already says something about the
    pool, or if JAX's backend has started, whose pool there is then.

    Args:
      server: the share of each GPU that a server takes; None if it is not known, which
        leaves JAX's default, and so does a server that takes nearly all.
    """
    if any(map(os.environ.get, _USERS)) or private_jax.backend_has_started():
        return
    if server is not None and (share := pool_share(server)) >= _LEAST:
        os.environ[_USERS[0]] = f"{share:.2f}"


def pool_share(server: float = 0.0) -> float:
    """The share of a GPU's memory that JAX's pool gets, beside a server's share."""
    return 1 - _OUTSIDE - (server and server + _OUTSIDE_OF_SERVER)


def described() -> str:
    """The devices of all processes and the memory of one, the processors and memory of
    this host, in a line.

    Raises:
      RuntimeError: JAX's backend does not start.
    """
    devices = jax.devices()
    kinds = Counter(device.device_kind for device in devices)
    here = jax.local_devices()[0]
    known = facts(here.device_kind)
    limit = (here.memory_stats() or {}).get("bytes_limit")
    gib = limit / 2**30 if limit else known[0] if known else None
    each = f" with {gib:.0f} GiB" + " each" * (len(devices) > 1) if gib else ""
    named = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    hosts = f" in {n} processes" if (n := jax.process_count()) > 1 else ""
    return (
        f"devices: {named}{each}{hosts}; host: {os.cpu_count()} processors, "
        f"{host_memory() / 2**30:.0f} GiB"
    )


def memory_limit() -> int | None:
    """Bytes that programs may use of every device of this process; None where devices
    do not count them, as CPUs."""
    counted = [device.memory_stats() or {} for device in jax.local_devices()]
    limits = [said.get("bytes_limit") for said in counted]
    return None if None in limits else min(limits)


def host_memory() -> int:
    """Bytes of memory that this process may use at most."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else ""
    return min(total, int(text)) if text.isdecimal() else total


def unused_gpus() -> str | None:
    """What keeps JAX from NVIDIA GPUs that this host has; None if it uses them, or if
    there are none."""
    seen = sorted(glob.glob("/dev/nvidia[0-9]*")) or [shutil.which("nvidia-smi")]
    if jax.default_backend() != "cpu" or not seen[0]:
        return None
    if importlib.util.find_spec("jax_plugins") is None:
        remedy = "JAX is installed without CUDA: pip install 'jaxrl-llm[cuda]'"
    elif platforms := os.environ.get("JAX_PLATFORMS"):
        remedy = f"JAX_PLATFORMS is {platforms}: unset it"
    else:
        remedy = "JAX could not start CUDA: see its warning, and what nvidia-smi says"
    return f"this host has an NVIDIA GPU ({seen[0]}) that JAX leaves alone; {remedy}"
