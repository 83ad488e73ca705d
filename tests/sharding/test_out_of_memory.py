"""XLA's words about a lack of memory become what a person can act on."""

import jax
import jax.numpy as jnp
import pytest

from jaxrl_llm.sharding import out_of_memory
from jaxrl_llm.sharding.out_of_memory import OutOfMemory, explained, shortage

GIB = 2**30
SAID = (
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 39.15GiB with "
    "allocator GPU_0_bfc on device 0. [executable_name='jit_update'] "
    "[tf-allocator-allocation-error='']"
)


@pytest.mark.parametrize(
    "text, wanted, program",
    [
        (SAID, round(39.15 * GIB), "update"),
        ("RESOURCE_EXHAUSTED: Out of memory allocating 12345 bytes.", 12345, ""),
        (
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4294967296 "
            "bytes",
            4 * GIB,
            "",
        ),
        (
            "RESOURCE_EXHAUSTED: Failed to allocate request for 2.25GiB (2415919104B) "
            "on device ordinal 0",
            round(2.25 * GIB),
            "",
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in "
            "memory space hbm. Used 20.50G of 15.48G hbm.",
            round(20.5 * GIB),
            "",
        ),
        ("INTERNAL: NCCL failed: CUDA_ERROR_OUT_OF_MEMORY: out of memory", None, ""),
        (
            "RESOURCE_EXHAUSTED: Underlying backend ran out of memory trying to "
            "instantiate graph",
            None,
            "",
        ),
    ],
)
def test_what_was_wanted_is_read_from_what_xla_says(text, wanted, program):
    found = shortage(jax.errors.JaxRuntimeError(text))
    assert (found.wanted, found.program) == (wanted, program)
    assert (
        found.device == jax.devices()[0].id and found.free is None
    )  # a CPU counts none


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("INTERNAL: the device is lost"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Received message is too long"),
        ValueError(SAID),
    ],
)
def test_other_errors_stay_what_they_are(error):
    assert shortage(error) is None
    with pytest.raises(type(error)) as raised:
        with explained(lambda _: "it", lambda _: {}, lambda _: []):
            raise error
    assert raised.value is error


def test_a_real_array_that_is_too_large_is_explained():
    with pytest.raises(OutOfMemory) as raised:
        with explained(lambda _: "the update", lambda _: {}, lambda _: ["less: 1"]):
            jnp.zeros(2**47, jnp.uint8).block_until_ready()
    assert str(raised.value) == (
        "out of memory: the update wanted 131072.00 GiB in one piece on device 0 "
        "(cpu)\n"
        "change one or more of\n  less: 1"
    )
    assert isinstance(raised.value.__cause__, jax.errors.JaxRuntimeError)


class Counting:
    """A device whose allocator counts."""

    device_kind, id = "NVIDIA H100", 0

    def memory_stats(self):
        return {"bytes_in_use": 30 * GIB, "bytes_limit": 72 * GIB}


def test_what_is_in_use_is_told_by_purpose(monkeypatch):
    monkeypatch.setattr(out_of_memory.jax, "local_devices", lambda: [Counting()])
    held = {"weights": 20 * GIB, "critic": 0, "reference": GIB // 20}
    with pytest.raises(OutOfMemory) as raised:
        with explained(
            lambda found: found.program,
            lambda _: held,
            lambda found: [f"free: {found.free // GIB}"],
            lambda: "the rest is safe",
        ):
            raise jax.errors.JaxRuntimeError(SAID)
    assert str(raised.value).splitlines() == [
        "out of memory: update wanted 39.15 GiB in one piece on device 0 "
        "(NVIDIA H100), where 30.00 GiB of 72.00 GiB were in use",
        "it holds: weights 20.00 GiB, reference 51.2 MiB, other arrays 9.95 GiB",
        "change one or more of",
        "  free: 42",
        "the rest is safe",
    ]


def test_beside_the_pool_a_smaller_pool_helps(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    with pytest.raises(OutOfMemory, match="_FRACTION=0.85 in the environment\n  a: 1"):
        with explained(lambda _: "it", lambda _: {}, lambda _: ["a: 1"]):
            raise jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY")
