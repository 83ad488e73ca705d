"""`jaxrl bench sandbox`: programs run and tested per second, at each level."""

import json
import os
import time
from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
from rich.console import Console
from rich.table import Table

from jaxrl_llm.workers.sandbox import levels, programs
from jaxrl_llm.workers.sandbox.levels import Sandbox, SandboxError
from jaxrl_llm.workers.sandbox.programs import Calling, Printing

Here = Literal["bwrap", "landlock", "none"]

_PRINTS = "n = int(input())\nprint(sum(k * k for k in range(n)))\n"
_CALLED = "def squares(n):\n    return [k * k for k in range(n)]\n"
_PRINTING = Printing(inputs=("10",), outputs=("285",))
_CALLING = Calling(
    tests=tuple(f"assert squares({n})[-1] == {n - 1}**2" for n in (3, 9))
)


def main(
    at: tuple[Here, ...] = get_args(Here),
    jobs: int | None = None,
    programs_per_round: int = 200,
    rounds: int = 3,
) -> None:
    """Times short programs in jails that are there already, as in a step of a run that
    is not its first: those that read and print, and those whose function two assertions
    call from another process.

    Args:
      at: levels; those that do not hold here are named and left out.
      jobs: programs at a time; as many as there are processors if not given.
      programs_per_round: how many are timed together.
      rounds: how often, after one round that is not; their median counts.

    Raises:
      ValueError: none of the levels holds here.
    """
    jobs = jobs or os.cpu_count() or 1
    table = Table(
        "level", "programs that print / s", "that are called / s", "first / s"
    )
    table.title = f"programs, {jobs} at a time"
    missing = []
    for level in at:
        sandbox = Sandbox(level=level, jobs=jobs)
        try:
            where = levels.describe(sandbox)
        except SandboxError as error:
            missing.append(str(error))
            continue
        found: dict[str, Any] = {"level": level, "jobs": jobs, "where": where}
        for name, job in (
            ("printing", (_PRINTS, _PRINTING)),
            ("called", (_CALLED, _CALLING)),
        ):
            first, rate = _rate(job, sandbox, programs_per_round, rounds)
            found |= {f"{name}_per_second": rate, f"{name}_first_per_second": first}
        programs.release()
        print(json.dumps(found), flush=True)
        rates = (found[f"{name}_per_second"] for name in ("printing", "called"))
        shown = (f"{rate:.0f}" for rate in rates)
        table.add_row(level, *shown, f"{found['printing_first_per_second']:.0f}")
    if len(missing) == len(at):
        raise ValueError("; ".join(missing))
    console = Console()
    for line in missing:
        console.print(line, markup=False, highlight=False)
    console.print(table)


def remedies(**_: Any) -> list[str]:
    """Nothing here needs a device's memory."""
    return []


def _rate(
    job: tuple[str, programs.Tests], sandbox: Sandbox, count: int, rounds: int
) -> tuple[float, float]:
    """Programs per second of the first round, with which jails start, and the median of
    the others."""
    rates = [
        count / _seconds(lambda: _judge(job, sandbox, count)) for _ in range(rounds + 1)
    ]
    return rates[0], float(np.median(rates[1:]))


def _judge(job: tuple[str, programs.Tests], sandbox: Sandbox, count: int) -> None:
    for verdict in programs.verdicts([job] * count, sandbox):
        if verdict is None or verdict.passed != verdict.of:
            raise ValueError(f"a program that is right was found wrong: {verdict}")


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
