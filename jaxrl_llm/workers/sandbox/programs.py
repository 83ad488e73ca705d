"""Programs run and tested, as many side by side as there are processors.

What a program prints is compared outside of its jail. Tests that call it run in a
process of their own, to which it has no way but the answers to these calls, see
`remote`; their verdict carries a word that the program was not told.
"""

import contextlib
import decimal
import itertools
import json
import os
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

from jaxrl_llm.workers.sandbox import levels, service
from jaxrl_llm.workers.sandbox.jail import (
    Bounds,
    Enclosure,
    Jail,
    JailError,
    JailLost,
    Part,
    Ran,
)
from jaxrl_llm.workers.sandbox.levels import Sandbox, SandboxError

Item, Result = TypeVar("Item"), TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Printing:
    """Tests of what a program prints for what it reads."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Calling:
    """Tests that call what a program defines. Names that they do not define themselves
    are the program's."""

    tests: tuple[str, ...]
    """Pieces of Python, each of which passes if it raises nothing."""
    setup: str = ""
    """Python before the first of them."""
    programs: Mapping[str, str] = field(default_factory=dict)
    """What the program calls some of the names, also where `setup` defines them."""


Tests = Printing | Calling


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What tests say of a program."""

    passed: int
    of: int
    why: str | None = None
    """Why the first that failed did."""


class BrokenTests(ValueError):
    """Tests fail that ask nothing of the program, or cannot be read."""


@runtime_checkable
class Runner(Protocol):
    """What runs one program at a time."""

    def run(self, source: str, stdin: str, until: float) -> Ran:
        """Runs a program that reads and prints, until then at most."""

    def test(self, source: str, tests: Mapping[str, Any], until: float) -> bytes:
        """What tests in a process of their own say of a program; nothing if they did
        not come to an end."""

    def close(self) -> None:
        """Ends its processes."""


class InJail:
    """Runs programs in a jail of its own."""

    def __init__(self, enclosure: Enclosure, bounds: Bounds):
        self._jail, self._bounds = Jail(enclosure), bounds

    def run(self, source: str, stdin: str, until: float) -> Ran:
        """Runs a program that reads and prints.

        Raises:
          SandboxError: the jail does not come up.
        """
        part = {"mode": "run", "source": source}
        (ran,) = self._run(lambda: [Part(payload=part, stdin=stdin)], until)
        return ran

    def test(self, source: str, tests: Mapping[str, Any], until: float) -> bytes:
        """What tests say of a program.

        Raises:
          SandboxError: the jail does not come up.
        """

        def parts() -> list[Part]:
            ours, theirs = socket.socketpair()
            program = {"mode": "serve", "source": source}
            return [
                Part(payload=program, channel=theirs),
                Part(payload={"mode": "test", **tests}, channel=ours, verdict=True),
            ]

        return self._run(parts, until)[1].verdict

    def close(self) -> None:
        """Ends the jail."""
        self._jail.close()

    def _run(self, parts: Callable[[], Sequence[Part]], until: float) -> list[Ran]:
        for _ in range(2):
            try:
                return self._jail.run(made := parts(), self._bounds, until)
            except JailLost as error:  # by the system, for want of memory
                why = str(error)
            except JailError as error:
                raise SandboxError(f"a sandbox does not start: {error}") from error
        return [Ran(why=why) for _ in made]


def run(source: str, stdin: str, sandbox: Sandbox, until: float = float("inf")) -> Ran:
    """Runs one program.

    Raises:
      SandboxError: programs cannot be run as they are to be.
    """
    (ran,) = each(
        lambda runner, text: runner.run(text, stdin, until), (source,), sandbox
    )
    return ran


def verdicts(
    programs: Sequence[tuple[str, Tests]],
    sandbox: Sandbox,
    *,
    all_tests: bool = False,
    until: float = float("inf"),
) -> list[Verdict | None]:
    """What tests say of each program.

    Args:
      programs: sources and their tests.
      all_tests: also run those behind the first that fails. A program that takes too
        long is not run again either way.
      until: when to leave it at that, on the clock of `time.monotonic`.

    Returns:
      For each program its verdict; None if there was no time for one, or a service was
      too slow to give it.

    Raises:
      SandboxError: programs cannot be run as they are to be.
      BrokenTests: tests that fail without the program.
    """

    def judged(runner: Runner, job: tuple[str, Tests]) -> Verdict | None:
        source, tests = job
        kind = _printing if isinstance(tests, Printing) else _calling
        return kind(runner, source, tests, all_tests, until)

    return each(judged, programs, sandbox, until)


def each(
    work: Callable[[Runner, Item], Result],
    items: Sequence[Item],
    sandbox: Sandbox,
    until: float = float("inf"),
) -> list[Result | None]:
    """What `work(runner, item)` returns for each item, several at a time; None for
    those that there was no time to begin.

    Raises:
      SandboxError: programs cannot be run as they are to be.
    """
    if not items:
        return []
    count = min(len(items), sandbox.jobs or os.cpu_count() or 1)
    free: queue.SimpleQueue[Runner] = queue.SimpleQueue()
    runners = _take(sandbox, count)
    for runner in runners:
        free.put(runner)
    stopped = threading.Event()

    def job(item: Item) -> Result | None:
        if stopped.is_set() or time.monotonic() >= until:
            return None
        runner = free.get()
        try:
            return work(runner, item)
        finally:
            free.put(runner)

    with ThreadPoolExecutor(count, "sandbox") as threads:
        try:
            found = list(threads.map(job, items))
        except BaseException:
            stopped.set()
            for runner in runners:
                runner.close()  # what they run ends, and the threads with it
            raise
    with _lock:
        _idle.setdefault(sandbox, []).extend(runners)
    return found


def release() -> None:
    """Ends the jails that wait for the next program."""
    with _lock:
        runners = list(itertools.chain(*_idle.values()))
        _idle.clear()
    for runner in runners:
        runner.close()


_idle: dict[Sandbox, list[Runner]] = {}
_lock = threading.Lock()


def _take(sandbox: Sandbox, count: int) -> list[Runner]:
    """`count` runners: those that wait since the last call, then new ones."""
    if sandbox.level == "url":
        service.check(sandbox.url)
    else:
        inside = levels.enclosure(sandbox)
    with _lock:
        idle = _idle.pop(sandbox, [])
        taken, _idle[sandbox] = idle[:count], idle[count:]
    for _ in range(count - len(taken)):
        if sandbox.level == "url":
            taken.append(service.AtService(sandbox.url, sandbox.bounds))
        else:
            taken.append(InJail(inside, sandbox.bounds))
    return taken


def _printing(
    runner: Runner, source: str, tests: Printing, all_tests: bool, until: float
) -> Verdict | None:
    passed, why, of = 0, None, len(tests.inputs)
    for number, (given, wanted) in enumerate(
        zip(tests.inputs, tests.outputs, strict=True)
    ):
        ran = runner.run(source, given, until)
        if ran.why and time.monotonic() >= until:
            return None
        failed = _difference(ran, wanted)
        passed += failed is None
        if failed:
            why = why or f"test {number}: {failed}"
            if not all_tests or ran.why:
                break
    return Verdict(passed=passed, of=of, why=why)


def _difference(ran: Ran, wanted: str) -> str | None:
    """What is wrong with what a program printed."""
    if ran.why:
        return ran.why
    if ran.status:
        lines = ran.stderr.decode(errors="replace").splitlines()
        return f"ended with {ran.status}" + (f", {lines[-1][:300]}" if lines else "")
    found = ran.stdout.decode(errors="replace")
    if same_output(found, wanted):
        return None
    return f"printed {found[:200]!r}, not {wanted[:200]!r}"


def same_output(found: str, wanted: str) -> bool:
    """Whether two texts are the same word by word; words that are numbers may be
    written in other ways, such as 1.0 for 1."""
    ours, theirs = found.split(), wanted.split()
    return len(ours) == len(theirs) and all(
        a == b or _number(a) == _number(b) is not None
        for a, b in zip(ours, theirs, strict=True)
    )


def _number(word: str) -> decimal.Decimal | None:
    try:
        number = decimal.Decimal(word)
    except decimal.InvalidOperation:
        return None
    return number if number.is_finite() else None


def _calling(
    runner: Runner, source: str, tests: Calling, all_tests: bool, until: float
) -> Verdict | None:
    word, of = secrets.token_hex(16), len(tests.tests)
    payload = {
        "setup": tests.setup,
        "tests": tests.tests,
        "programs": dict(tests.programs),
        "first_only": not all_tests,
        "word": {"word": word},
    }
    try:
        data = runner.test(source, payload, until)
    except service.TooSlow:
        return None
    said: dict[str, Any] = {}
    with contextlib.suppress(ValueError):
        said = json.loads(data)
    if said.get("word") != word:
        if time.monotonic() >= until:
            return None
        return Verdict(passed=0, of=of, why="took too long, or ended its process")
    if said["broken"]:
        raise BrokenTests(
            f"tests fail that ask nothing of the program ({said['broken']}); the first "
            f"is {tests.tests[0][:200]!r}"
        )
    return Verdict(passed=sum(said["passed"]), of=of, why=said["why"])


def calls(
    name: str, arguments: Sequence[Sequence[Any]], results: Sequence[Any]
) -> Calling:
    """Tests that call one function, or a method of the class Solution, with arguments
    and compare results, plain data of JSON. Tuples count as lists."""
    cases = json.dumps([list(arguments), list(results)])
    return Calling(
        setup=_CALLS.format(name=name, cases=cases),
        programs={"_asked": name},
        tests=tuple(f"_check({number})" for number in range(len(results))),
    )


_CALLS = """
import json
_arguments, _results = json.loads({cases!r})

def _function():
    try:
        solution = Solution
    except NameError:
        return _asked
    return solution().{name}

def _lists(value):
    if isinstance(value, (list, tuple)):
        return [_lists(item) for item in value]
    if isinstance(value, dict):
        return {{str(key): _lists(item) for key, item in value.items()}}
    return value

def _check(number):
    found, wanted = _lists(_function()(*_arguments[number])), _results[number]
    if found != wanted and [found] != wanted:
        raise AssertionError(f"{{str(found):.200}}, not {{str(wanted):.200}}")
"""
