"""Tests wait for what they need, never for a time."""

import os
import pathlib
import time
from collections.abc import Callable


def until(holds: Callable[[], bool], bound_s: float = 300.0) -> None:
    """Returns once the condition holds. The bound is there to fail in the end."""
    end = time.monotonic() + bound_s
    while not holds():
        assert time.monotonic() < end, f"not within {bound_s:g} s"
        time.sleep(0.01)


def at_the_gate() -> None:
    """With the environment variable GATE="N:directory", the N-th call in a process
    makes the file directory/PID, and returns when that is gone."""
    global _calls
    number, _, directory = os.environ.get("GATE", "").partition(":")
    _calls += 1
    if str(_calls) == number:
        mine = pathlib.Path(directory) / str(os.getpid())
        mine.touch()
        until(lambda: not mine.exists())


_calls = 0
