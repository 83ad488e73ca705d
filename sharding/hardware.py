"""What devices can do at most: memory, its rate, links, arithmetic."""

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
