"""What devices can do at most, besides arithmetic (`metrics.peak_flops`)."""

import re

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
