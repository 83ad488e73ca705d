"""What JAX has and gives no public name to: every use of `jax._src` and `jaxlib._jax`.

`tests/sharding/test_private_jax.py` says what of it a new JAX must still offer.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock


def backend_has_started() -> bool:
    """Whether devices have been asked for: what the environment says comes too late."""
    from jax._src import xla_bridge

    return xla_bridge.backends_are_initialized()


def coordination_client() -> Any:
    """The client of the coordination service that this process has joined: a key-value
    store and barriers that need no device. None before it has joined one."""
    from jax._src import distributed

    return distributed.global_state.client


def coordination_service(
    address: str, num_processes: int, heartbeat_timeout_s: int
) -> Any:
    """JAX's coordination service, running in this process until its `shutdown`.

    Args:
      address: where it listens, HOST:PORT.
      heartbeat_timeout_s: seconds without a sign of a process that end the others.
    """
    from jaxlib import _jax

    return _jax.get_distributed_runtime_service(
        address, num_processes, heartbeat_timeout=heartbeat_timeout_s
    )


def detect_cluster(
    address: str | None, count: int | None, index: int | None, timeout_s: int
) -> tuple[str | None, int | None, int | None, Sequence[int] | None]:
    """Address, number of processes, index and local devices, from the first cluster
    (Slurm, Open MPI, Kubernetes, TPU pods) that this process finds itself in.

    Args:
      address, count, index: kept, if given.
    """
    from jax._src import clusters

    detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
    return detect(address, count, index, None, None, timeout_s)


def cudnn_attention() -> Any:
    """The module with cuDNN's attention over packed rows: `dot_product_attention` with
    offsets and lengths of sequences, and `MaskType`."""
    from jax._src.cudnn import fused_attention_stablehlo

    return fused_attention_stablehlo


@contextmanager
def cudnn_capability(capability: tuple[int, int]) -> Iterator[None]:
    """Within, cuDNN's attention takes this for the compute capability of the GPU. It
    would ask the one that is here, also where another is compiled for."""

    def parsed(text: str) -> tuple[int, ...]:
        return tuple(map(int, text.split(".")))

    with mock.patch.multiple(
        cudnn_attention(),
        check_compute_capability=lambda least: capability >= parsed(least),
        is_cuda_compute_capability_equal=lambda this: capability == parsed(this),
    ):
        yield
