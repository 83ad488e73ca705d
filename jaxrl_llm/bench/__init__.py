"""Measurements, one module each: `jaxrl bench NAME` calls `jaxrl_llm.bench.NAME.main`.

A measurement times the programs that a run uses, on shapes given by name and random
weights, after warm-up, and prints one table and one line of JSON per variant.
"""

import functools
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

NAMES = sorted(
    path.stem
    for path in Path(__file__).parent.glob("*.py")
    if path.stem not in ("__init__", "hardware", "shapes")
)


def main(rest: Sequence[str]) -> None:
    """Runs the measurement that the first argument names with the others.

    Raises:
      ValueError: no such measurement.
      OutOfMemory: a device's memory does not suffice.
    """
    if not rest or rest[0] not in NAMES:
        given = repr(rest[0]) if rest else "nothing"
        raise ValueError(f"jaxrl bench takes one of {', '.join(NAMES)}; got {given}")
    measurement = importlib.import_module(f"{__name__}.{rest[0]}")
    from jaxrl_llm.sharding import out_of_memory
    from jaxrl_llm.training import memory

    @functools.wraps(measurement.main)
    def measure(**options: Any) -> None:
        with out_of_memory.explained(
            lambda found: memory.PROGRAMS.get(found.program, "the measurement"),
            lambda _: {},
            lambda _: measurement.remedies(**options),
        ):
            measurement.main(**options)

    tyro.cli(measure, prog=f"jaxrl bench {rest[0]}", args=list(rest[1:]))
