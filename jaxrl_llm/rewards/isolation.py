"""Where reward functions run: in processes of their own, or in threads of this one."""

import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jaxrl_llm.rewards.function import (
    RewardError,
    RewardFunction,
    takes_environments,
)
from jaxrl_llm.workers import judge
from jaxrl_llm.workers.messages import NotPortable, dump_function
from jaxrl_llm.workers.pool import Inline, Thread, Worker
from jaxrl_llm.workers.process import GIB, Limits, Process, WorkerError, close_idle
from jaxrl_llm.workers.sandbox import levels, programs


@dataclass(frozen=True, kw_only=True)
class Isolation:
    """Where reward functions run, but for those that are `trusted`."""

    kind: Literal["auto", "process", "thread"] = "auto"
    """process: each in a process of its own, which is killed when it hangs; an error
    for one that cannot be sent there. auto: that one in a thread. thread: all."""
    memory_gib: float | None = 8.0
    """Address space of each process; None for all there is."""
    played: bool = False
    """Whether there are environments. A function that takes them has a thread of this
    process, where they are; process is an error for it."""


@dataclass
class _Home:
    """Where a function lives, from its first call to its release."""

    worker: Worker | None
    note: str | None = None


_Key = tuple[int, str, Isolation]
_homes: dict[_Key, _Home] = {}


def start(functions: Sequence[RewardFunction], how: Isolation) -> None:
    """Starts the workers of functions that have none yet; does not wait for them.

    Raises:
      RewardError: `how.kind` is process and a function cannot be sent to one.
    """
    for function in functions:
        key = id(function.function), function.name, how
        if key in _homes:
            continue
        _homes[key] = _made(function, how)
        if not isinstance(_homes[key].worker, Process):
            continue  # the worker holds the function until it is released
        try:
            weakref.finalize(function.function, _forget, key)
        except TypeError:  # no weak references: the function must not go before
            _homes[key].worker.function = function.function


def ready(functions: Sequence[RewardFunction], how: Isolation) -> list[Worker]:
    """The workers of functions, each ready to be called.

    Raises:
      RewardError: a function cannot be loaded in a process, or be sent there, and
        `how.kind` is process.
    """
    start(functions, how)
    found = []
    for function in functions:
        home = _homes[id(function.function), function.name, how]
        if isinstance(home.worker, Process):
            try:
                home.worker.wait_until_ready()
            except WorkerError as error:
                _in_thread(home, function, how, f"it cannot be loaded there ({error})")
        found.append(home.worker)
    return found


def notes(functions: Sequence[RewardFunction], how: Isolation) -> list[str]:
    """A line for each function that runs in a thread though it was to have a process:
    why, and what that means; and where functions run programs that a model wrote."""
    homes = [_homes.get((id(f.function), f.name, how)) for f in functions]
    inner = [f.function for f in functions if isinstance(f.function, functools.partial)]
    boxes = {f.keywords["sandbox"] for f in inner if "sandbox" in f.keywords}
    return [
        *(home.note for home in homes if home and home.note),
        *(levels.describe(box or levels.Sandbox()) for box in boxes),
    ]


def release(functions: Sequence[RewardFunction]) -> None:
    """Ends the workers of functions. What the functions kept there is gone."""
    mine = {id(function.function) for function in functions}
    for key in [key for key in _homes if key[0] in mine]:
        _homes.pop(key).worker.close()
    judge.release()
    programs.release()
    close_idle()


def _made(function: RewardFunction, how: Isolation) -> _Home:
    if function.trusted:
        return _Home(Inline(function.function))
    looks = how.played and takes_environments(function.function)
    if looks and how.kind == "process":
        raise RewardError(
            f"reward function {function.name!r} takes environments, which are in this "
            "process; set reward.isolation to auto or thread"
        )
    if looks or how.kind == "thread":
        return _Home(Thread(function.function, function.name))
    memory = None if how.memory_gib is None else int(how.memory_gib * GIB)
    try:
        worker = Process(
            dump_function(function.function),
            f"reward function {function.name!r}",
            Limits(memory_bytes=memory),
        )
        worker.start()
        return _Home(worker)
    except (NotPortable, WorkerError) as error:
        home = _Home(None)
        _in_thread(home, function, how, str(error))
        return home


def _in_thread(home: _Home, function: RewardFunction, how: Isolation, why: str) -> None:
    """Gives a function a thread instead.

    Raises:
      RewardError: `how.kind` does not allow it.
    """
    if how.kind == "process":
        raise RewardError(
            f"reward function {function.name!r} cannot run in a process of its own: "
            f"{why}; set reward.isolation to auto or thread"
        )
    home.worker = Thread(function.function, function.name)
    home.note = (
        f"reward function {function.name!r} runs in a thread of this process, not in "
        f"one of its own: {why}. There, a call that hangs is left behind and goes on, "
        "one that never lets go of the interpreter stops the run, limits by signals do "
        "not work, and nothing bounds its memory"
    )


def _forget(key: _Key) -> None:
    home = _homes.pop(key, None)
    if home and isinstance(home.worker, Process):
        home.worker.release()
