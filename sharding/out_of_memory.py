"""What XLA says when a device's memory does not suffice, in words that help.

with explained(held=..., remedies=..., after="nothing is lost"):
    ...                                    # JaxRuntimeError -> OutOfMemory
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import jax

_GIB = 2**30
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"(\d+(?:\.\d+)?) ?([KMGT]?)(?:i?B|bytes)?\b"
# As XLA's allocators write it, newer and older ones, and the compiler for TPUs.
_WANTED = (
    rf"(?:allocat(?:e|ing)|allocation of|allocate request for) {_SIZE}",
    rf"Used {_SIZE} of ",
)


class OutOfMemory(ValueError):
    """A device's memory did not suffice; the message says for what, and what to do."""


@dataclass(frozen=True, kw_only=True)
class Shortage:
    """What XLA said, and how the device's pool was filled then."""

    program: str
    """The name of the function that was compiled; "" if XLA does not name it."""
    wanted: int | None
    """Bytes, in one piece. None: not of JAX's pool, but beside it."""
    device: int
    """Its id."""
    device_kind: str
    in_use: int | None
    """Bytes of the pool; None where that is not counted."""
    limit: int | None
    """Bytes of the pool; None where that is not counted."""

    @property
    def free(self) -> int | None:
        """Bytes of the pool that nothing used; None where that is not counted."""
        return None if self.limit is None else self.limit - self.in_use


def shortage(error: BaseException) -> Shortage | None:
    """What an error says of memory; None if it is about something else."""
    said = str(error)
    if not isinstance(error, jax.errors.JaxRuntimeError):
        return None
    if not re.search(r"RESOURCE_EXHAUSTED|ERROR_OUT_OF_MEMORY", said):
        return None
    if not re.search("memory|allocat", said, re.IGNORECASE):
        return None  # a message that was too long, say
    sizes = [match for pattern in _WANTED if (match := re.search(pattern, said))]
    number = re.search(r"on device (?:ordinal )?(\d+)", said)
    name = re.search(r"executable_name='?(?:jit_)?(\w+)", said)
    devices = jax.local_devices()
    device = devices[min(int(number[1]) if number else 0, len(devices) - 1)]
    counted = device.memory_stats() or {}
    return Shortage(
        program=name[1] if name else "",
        wanted=round(float(sizes[0][1]) * _UNITS[sizes[0][2]]) if sizes else None,
        device=device.id,
        device_kind=device.device_kind,
        in_use=counted.get("bytes_in_use") if "bytes_limit" in counted else None,
        limit=counted.get("bytes_limit"),
    )


@contextmanager
def explained(
    doing: Callable[[Shortage], str],
    held: Callable[[Shortage], Mapping[str, int]],
    remedies: Callable[[Shortage], Sequence[str]],
    after: Callable[[], str] = lambda: "",
) -> Iterator[None]:
    """Says what to do about a lack of memory in the block.

    Args:
      doing: what wanted the memory, such as "the update".
      held: bytes of what was on the device, by purpose.
      remedies: settings with values, one a line.
      after: what becomes of the work so far.

    Raises:
      OutOfMemory: in the place of XLA's error.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        found = shortage(error)
        if found is None:
            raise
        lines = [_first(found, doing(found)), _rest(found, held(found))]
        said = remedies(found)
        if found.wanted is None:
            said = [_smaller_pool(), *said]
        if said:
            lines.append("change one or more of")
            lines += [f"  {line}" for line in said]
        lines.append(after())
        raise OutOfMemory("\n".join(filter(None, lines))) from error


def _first(found: Shortage, doing: str) -> str:
    wanted = "memory outside of JAX's pool"
    if found.wanted is not None:
        wanted = f"{gib(found.wanted)} in one piece"
    name, used = f"{found.device} ({found.device_kind})", ""
    if found.limit is not None:
        used = f", where {gib(found.in_use)} of {gib(found.limit)} were in use"
    return f"out of memory: {doing} wanted {wanted} on device {name}{used}"


def _rest(found: Shortage, held: Mapping[str, int]) -> str:
    parts = {name: size for name, size in held.items() if size}
    if found.in_use is not None and (others := found.in_use - sum(parts.values())) > 0:
        parts["other arrays"] = others
    said = ", ".join(f"{name} {gib(size)}" for name, size in parts.items())
    return said and f"it holds: {said}"


def _smaller_pool() -> str:
    name = "XLA_PYTHON_CLIENT_MEM_FRACTION"
    share = float(os.environ.get(name) or 0.75)  # JAX's default
    return f"{name}={max(share - 0.07, 0.05):.2f} in the environment"


def gib(size: float | int) -> str:
    """In GiB, or MiB for what is small."""
    if size < _GIB / 10:
        return f"{size / 2**20:.3g} MiB"
    return f"{size / _GIB:.2f} GiB"
