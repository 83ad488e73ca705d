"""NVIDIA GPUs that need not be here, as XLA's compiler for them wants them described.

The compiler is the plugin that jaxrl-llm[cuda] installs; it needs neither a GPU nor a
driver. Which kernel of several is fastest XLA would try on a GPU; here it goes by its
own estimate, so what a program needs besides its arrays may differ a little.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import jax

from jaxrl_llm.config.names import ConfigError
from jaxrl_llm.sharding import hardware, private_jax

KINDS = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200"}
"""Their names as `jax.Device.device_kind` has them."""

_CAPABILITY = (9, 0)
# Both kinds have the same multiprocessors. Source: NVIDIA, H100 Tensor Core GPU
# Architecture; CUDA C++ Programming Guide, table of compute capability 9.0.
_DESCRIBED = """
    platform_name: "CUDA"
    device_description_str: "{name}"
    dnn_version_info {{ major: 9 minor: 10 }}
    gpu_device_info {{
      cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
      device_memory_size: {memory}
      memory_bandwidth: {rate}
      l2_cache_size: 52428800
      clock_rate_ghz: 1.98
      core_count: 132
      fpus_per_core: 128
      threads_per_warp: 32
      threads_per_block_limit: 1024
      threads_per_core_limit: 2048
      registers_per_block_limit: 65536
      registers_per_core_limit: 65536
      shared_memory_per_block: 49152
      shared_memory_per_block_optin: 232448
      shared_memory_per_core: 233472
      block_dim_limit_x: 2147483647
      block_dim_limit_y: 65535
      block_dim_limit_z: 65535
    }}
"""


def described(kind: str) -> str:
    """A GPU as XLA's GpuTargetConfigProto, in text."""
    gib, rate, _ = hardware.facts(KINDS[kind])
    return _DESCRIBED.format(name=KINDS[kind], memory=int(gib * 2**30), rate=int(rate))


def is_gpu(topology: str) -> bool:
    """Whether this names GPUs, such as h100:8; else it is a TPU slice."""
    return topology.partition(":")[0] in KINDS


def devices(topology: str) -> Sequence[jax.Device]:
    """GPUs that programs can be compiled for.

    Args:
      topology: KIND:COUNT on one host, or KIND:HOSTSxCOUNT, COUNT on each of them.

    Raises:
      ConfigError: not of this form, or the compiler is not installed.
    """
    from jax.experimental import topologies

    kind, hosts, count = _parsed(topology)
    try:
        found = topologies.get_topology_desc(
            topology,
            "cuda",
            topology=f"1x{hosts}x{count}",
            target_config=described(kind),
        )
    except NotImplementedError:
        raise ConfigError(
            f"--topology {topology}: XLA's compiler for NVIDIA GPUs is not installed "
            "(it needs no GPU): pip install 'jaxrl-llm[cuda]'"
        ) from None
    return found.devices


def host_of(topology: str) -> str:
    """The topology of one of its hosts."""
    kind, _, count = _parsed(topology)
    return f"{kind}:{count}"


def usable_bytes(topology: str) -> int:
    """The memory of one GPU that a run's programs would have."""
    gib, _, _ = hardware.facts(KINDS[_parsed(topology)[0]])
    return int(gib * 2**30 * hardware.pool_share())


@contextmanager
def asked_about(devices: Sequence[jax.Device]) -> Iterator[None]:
    """Within, cuDNN's attention is built for these GPUs, not for one that is here."""
    if devices[0].device_kind not in KINDS.values():
        yield
        return
    with private_jax.cudnn_capability(_CAPABILITY):
        yield


def _parsed(topology: str) -> tuple[str, int, int]:
    """Kind, hosts, GPUs of each."""
    match = re.fullmatch(r"(\w+):(?:([1-9]\d*)x)?([1-9]\d*)", topology)
    if not match or match[1] not in KINDS:
        raise ConfigError(
            f"--topology {topology}: GPUs are KIND:COUNT or KIND:HOSTSxCOUNT, such as "
            f"h100:8 or h100:2x8; kinds: {', '.join(KINDS)}"
        )
    return match[1], int(match[2] or 1), int(match[3])
