"""Time, throughput and memory of a step."""

import gc
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import jax


@dataclass(frozen=True, kw_only=True)
class Devices:
    """What speeds are relative to."""

    count: int
    """All that the run has."""
    updating: int
    """Those that the policy is updated on."""
    peak_flops: float | None
    """Operations per second of one of them; None if not known."""
    description: str = ""
    """What they are, in a line."""
    advice: str | None = None
    """What to change to use others that are here."""


BACKGROUND = "compile-ahead"
"""What the names of threads begin with that compile while others work: those of
`sharding.ahead`."""
_compiled: list[tuple[float, float, bool]] = []
"""Begin and end of every compilation in this process, in seconds of `perf_counter`, and
whether it went on in the background."""


def _on_duration(event: str, seconds: float, **_: object) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        now = time.perf_counter()
        behind = threading.current_thread().name.startswith(BACKGROUND)
        _compiled.append((now - seconds, now, behind))


jax.monitoring.register_event_duration_secs_listener(_on_duration)


def compile_seconds(start: float, end: float) -> float:
    """Seconds between two times of `perf_counter` in which XLA compiled a program or
    read it from its cache, and somebody waited. Programs may be compiled side by
    side."""
    total, reached = 0.0, start
    waited_for = ((begin, done) for begin, done, behind in _compiled if not behind)
    for begin, done in sorted(waited_for):
        begin, done = max(begin, reached), min(done, end)
        if done > begin:
            total += done - begin
            reached = done
    return total


class Timer:
    """Seconds per phase within one step, which starts when the Timer is made.

    timer = Timer()
    with timer("gen"): ...
    timer.metrics()         # {"timing_s/gen": 3.1, "timing_s/step": 4.0}

    Compilation is a phase of its own, `timing_s/compile`, wherever it happens: the
    others are without it.
    """

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Adds the time of the block to `phase`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            end = time.perf_counter()
            passed = end - start - compile_seconds(start, end)
            self._seconds[phase] = self._seconds.get(phase, 0.0) + passed

    def metrics(self) -> dict[str, float]:
        """`timing_s/<phase>`; `timing_s/step`: all the time since the start; and
        `perf/compilations`: programs compiled since then, or read from XLA's cache."""
        now = time.perf_counter()
        seconds = {**self._seconds, "step": now - self._start}
        if compiling := compile_seconds(self._start, now):
            seconds["compile"] = seconds.get("compile", 0.0) + compiling
        count = sum(self._start <= done <= now for _, done, _ in list(_compiled))
        return {
            **{f"timing_s/{phase}": value for phase, value in seconds.items()},
            "perf/compilations": float(count),
        }


@contextmanager
def long_lived_objects_set_aside() -> Iterator[Callable[[], None]]:
    """Keeps the garbage collector from walking what stays anyway.

    Modules and traced programs are about a million objects, and a full collection that
    walks them holds the interpreter for some 150 ms, in the middle of a generation.

    Yields:
      What sets aside all objects that there are at its first call, to be made when the
      first step has traced its programs; later calls do nothing. At the end of the
      block they are the collector's again.
    """
    done = False

    def set_aside() -> None:
        nonlocal done
        if not done:
            done = True
            gc.collect()
            gc.freeze()

    try:
        yield set_aside
    finally:
        if done:
            gc.unfreeze()


def throughput(num_tokens: int, seconds: float, num_devices: int) -> dict[str, float]:
    """Tokens (prompts and responses) per second and device."""
    return {
        "perf/total_num_tokens": float(num_tokens),
        "perf/time_per_step": seconds,
        "perf/throughput": num_tokens / seconds / num_devices,
    }


def memory() -> dict[str, float]:
    """The most memory in use so far, in GiB: of this process on the host, and of the
    device that used most, where devices count it (a CPU does not)."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    host *= 1 if sys.platform == "darwin" else 1024
    found = {"perf/max_cpu_memory_gb": host / 2**30}
    peaks = [
        statistics["peak_bytes_in_use"]
        for device in jax.local_devices()
        if (statistics := device.memory_stats())
    ]
    if peaks:
        found["perf/max_memory_allocated_gb"] = max(peaks) / 2**30
    return found


def train_flops(
    num_params_matmul: int,
    num_tokens: int,
    sum_of_squared_lengths: int,
    layers: int,
    heads: int,
    head_dim: int,
    *,
    adapters: bool = False,
) -> float:
    """Floating-point operations of one forward and backward pass over a batch.

        6 * num_params_matmul * num_tokens
          + 6 * sum_of_squared_lengths * head_dim * heads * layers

    Args:
      adapters: only they are trained: 4 instead of the first 6, as the gradient of the
        weights themselves is not needed. Their own operations are not counted.
      num_params_matmul: weights of matrix products. veRL counts an embedding, which is
        only looked up, as well.
      sum_of_squared_lengths: over the sequences of the batch, tokens squared. Only the
        causal half of the attention scores counts.

    Source: veRL 0.9.1, utils/flops_counter.py.
    """
    attention = 6.0 * sum_of_squared_lengths * head_dim * heads * layers
    each = 4.0 if adapters else 6.0
    return each * num_params_matmul * num_tokens + attention


def mfu(
    flops: float, seconds: float, peak: float | None, num_devices: int
) -> dict[str, float]:
    """`perf/mfu/actor`, the share of the devices' peak that `flops` in `seconds` is.

    Args:
      peak: operations per second of one device (`sharding.hardware.peak_flops`); with
        None, for a device whose peak is not known, there is no metric.
    """
    if peak is None:
        return {}
    return {"perf/mfu/actor": flops / seconds / num_devices / peak}
