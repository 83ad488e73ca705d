"""Where the time of devices goes: a trace that xprof and Perfetto read, and a table.

with recorded(directory) as trace: ...
print(table(trace))
"""

import collections
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from rich.table import Table
from rich.text import Text


@contextmanager
def recorded(directory: str | Path | None = None) -> Iterator[Path]:
    """Records what devices and host do in the block.

    Args:
      directory: where the trace goes; a temporary one if not given.
    """
    path = Path(directory or tempfile.mkdtemp(prefix="jaxrl-trace-"))
    with jax.profiler.trace(str(path), create_perfetto_trace=directory is not None):
        yield path


def seconds_by_kernel(trace: Path) -> dict[str, tuple[float, int]]:
    """Seconds and launches of every kernel, over all devices; the longest first.

    Kernels whose names differ in numbers only are one. Empty on a CPU, whose work the
    profiler does not see as kernels.
    """
    (newest,) = sorted(trace.glob("**/*.xplane.pb"))[-1:]
    data = jax.profiler.ProfileData.from_file(str(newest))
    found: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0])
    for plane in data.planes:
        if not plane.name.startswith("/device:"):
            continue
        for line in plane.lines:
            if not (line.name.startswith("Stream") or line.name == "XLA Ops"):
                continue
            for event in line.events:
                total = found[re.sub(r"[._]?\d+", "", event.name)]
                total[0] += event.duration_ns * 1e-9
                total[1] += 1
    ordered = sorted(found.items(), key=lambda item: -item[1][0])
    return {name: (seconds, int(count)) for name, (seconds, count) in ordered}


def table(trace: Path, most: int = 30) -> Table:
    """`seconds_by_kernel`, the first `most` of them."""
    kernels = seconds_by_kernel(trace)
    shown = Table("ms", "share", "launches", "kernel", title="time of devices")
    whole = sum(seconds for seconds, _ in kernels.values())
    for name, (seconds, count) in list(kernels.items())[:most]:
        shown.add_row(
            f"{1e3 * seconds:.2f}",
            f"{100 * seconds / whole:.1f} %",
            str(count),
            Text(name[:70]),
        )
    return shown
