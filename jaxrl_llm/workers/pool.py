"""Calls of functions in workers that last, many side by side.

    worker = Process(dump_function(f), "f", Limits())
    outcomes = call([(worker, {"x": 1})], limit_s=10.0)

A worker keeps what its function keeps: a cache, a client, a lock. One whose call takes
too long, or whose process ends, is started anew and has lost it. Nothing here waits in
a way that a signal's handler cannot end by raising; workers that were busy then are
killed.
"""

import asyncio
import inspect
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

from jaxrl_llm.workers import child
from jaxrl_llm.workers.messages import plain, show_error
from jaxrl_llm.workers.process import Arguments, Failed, Outcome, Process, Returned


class Thread:
    """A function in a thread of this process, which lasts.

    A call that takes too long cannot be ended, only left behind. While it goes on, the
    function is not called again.
    """

    def __init__(self, function: Callable[..., Any], name: str):
        self._name = name
        self._calls: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._done, self._signal = Pipe(duplex=False)
        self._outcome: Outcome | None = None
        self._left = self._closed = False
        threading.Thread(
            target=self._run, args=(function,), name=name, daemon=True
        ).start()

    def begin(self, arguments: Arguments, limit_s: float) -> None:
        """Begins a call, unless an earlier one is still going on."""
        if self._left and self._done.poll():
            self._done.recv_bytes()
            self._left = False
        if not self._left:
            self._calls.put((arguments, limit_s))

    @property
    def connections(self) -> list[Connection]:
        """What becomes readable when the call ends."""
        return [] if self._left else [self._done]

    def poll(self) -> Outcome | None:
        """What came of the call, if it is over."""
        if self._left:
            return Failed("is still in a call that was left behind")
        if not self._done.poll():
            return None
        self._done.recv_bytes()
        return self._outcome

    def abandon(self, *, restart: bool) -> None:
        """Leaves the call behind."""
        self._left = True

    def close(self) -> None:
        """Ends the thread, after the call that it is in."""
        if not self._closed:
            self._closed = True
            self._calls.put(None)

    def _run(self, function: Callable[..., Any]) -> None:
        loop = None
        while (job := self._calls.get()) is not None:
            arguments, limit_s = job
            try:
                result = function(**arguments)
                if inspect.isawaitable(result):
                    loop = loop or asyncio.new_event_loop()
                    # A second more than the caller waits, who so is the one to say
                    # that it took too long; this only ends the coroutine.
                    waiting = asyncio.wait_for(result, limit_s + 1.0)
                    result = loop.run_until_complete(waiting)
                self._outcome = Returned(plain(result))
            except BaseException as error:  # noqa: BLE001 - it may raise anything
                self._outcome = Failed(
                    f"raised {show_error(error)}", child.trace(error)
                )
            self._signal.send_bytes(b"")
        if loop:
            loop.close()


class Inline:
    """A function that is known to come to an end, called at once."""

    def __init__(self, function: Callable[..., Any]):
        self._function = function
        self._outcome: Outcome | None = None

    def begin(self, arguments: Arguments, limit_s: float) -> None:
        """The call, from beginning to end; `deadline` is when it should be over."""
        before = deadline()
        _time.deadline = min(before, time.monotonic() + limit_s)
        try:
            self._outcome = Returned(plain(self._function(**arguments)))
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller must know
            self._outcome = Failed(f"raised {show_error(error)}", child.trace(error))
        finally:
            _time.deadline = before

    @property
    def connections(self) -> list[Connection]:
        """Nothing has to be waited for."""
        return []

    def poll(self) -> Outcome | None:
        """What came of the call."""
        return self._outcome

    def abandon(self, *, restart: bool) -> None:
        """It is over."""

    def close(self) -> None:
        """Nothing is left to end."""


_time = threading.local()


def deadline() -> float:
    """When the call that this code is part of should be over, on the clock of
    `time.monotonic`; infinite if nobody waits."""
    return getattr(_time, "deadline", float("inf"))


Worker = Process | Thread | Inline
"""Calls one function, one call after the other: `begin`, then `poll` until there is an
outcome, or `abandon`."""


def call(calls: Sequence[tuple[Worker, Arguments]], limit_s: float) -> list[Outcome]:
    """Calls each worker's function, all side by side, and waits for all.

    Args:
      calls: of different workers.
      limit_s: seconds for each call.

    Raises:
      WorkerError: a worker could not be started.
    """
    outcomes: list[Outcome | None] = [None] * len(calls)
    with _Busy() as busy:
        for at_once in (False, True):  # the others go on beside these
            for index, (worker, arguments) in enumerate(calls):
                if isinstance(worker, Inline) == at_once:
                    busy.begin(index, worker, arguments, limit_s)
        while busy:
            for index, _, outcome in busy.finished():
                outcomes[index] = outcome or Failed(_too_long(limit_s))
    return [outcome for outcome in outcomes if outcome]


def call_each(
    workers: Sequence[Worker],
    jobs: Sequence[Arguments],
    limit_s: float,
    until: float = float("inf"),
) -> list[Outcome | None]:
    """Calls one function with each of many arguments, on several workers at a time.

    What takes long is put off until all others have had a turn, so that few slow jobs
    do not take the time of many quick ones.

    Args:
      limit_s: seconds for each job.
      until: when to leave it at that, on the clock of `time.monotonic`.

    Returns:
      For each job what came of it, None where there was no time to begin or to finish.

    Raises:
      WorkerError: a worker could not be started.
    """
    outcomes: list[Outcome | None] = [None] * len(jobs)
    free, todo = list(workers), list(range(len(jobs)))
    turns = [limit_s] if limit_s <= 2 * _SHORT_S else [_SHORT_S, limit_s]
    with _Busy() as busy:
        for turn in turns:
            put_off = []
            while busy or (todo and time.monotonic() < until):
                while todo and free and time.monotonic() < until:
                    index = todo.pop(0)
                    allowed = min(turn, until - time.monotonic())
                    busy.begin(index, free.pop(), jobs[index], allowed)
                for index, worker, outcome in busy.finished():
                    free.append(worker)
                    if outcome is None and turn < limit_s:
                        put_off.append(index)
                    elif outcome is None and time.monotonic() < until:
                        outcome = Failed(_too_long(limit_s))
                    outcomes[index] = outcome
            todo += put_off
    return outcomes


_SHORT_S = 1.0


def _too_long(limit_s: float) -> str:
    return f"did not finish within {limit_s:g} s"


class _Busy:
    """Workers in the middle of a call. Whoever leaves early, leaves none of them."""

    def __init__(self) -> None:
        self._calls: dict[int, tuple[Worker, float]] = {}

    def __enter__(self) -> "_Busy":
        return self

    def __exit__(self, *error: Any) -> None:
        for worker, _ in self._calls.values():
            worker.abandon(restart=False)

    def __bool__(self) -> bool:
        return bool(self._calls)

    def begin(
        self, index: int, worker: Worker, arguments: Arguments, limit_s: float
    ) -> None:
        self._calls[index] = worker, float("inf")
        worker.begin(arguments, limit_s)
        self._calls[index] = worker, time.monotonic() + limit_s

    def finished(self) -> Iterator[tuple[int, Worker, Outcome | None]]:
        """Waits for some; those that ran out of time have no outcome."""
        before = len(self._calls)
        while len(self._calls) == before:
            for index, (worker, end) in list(self._calls.items()):
                outcome = worker.poll()
                if outcome is None:
                    if time.monotonic() < end:
                        continue
                    worker.abandon(restart=True)
                del self._calls[index]
                yield index, worker, outcome
            if len(self._calls) == before:
                self._wait()

    def _wait(self) -> None:
        nearest = min(end for _, end in self._calls.values())
        waited = [c for worker, _ in self._calls.values() for c in worker.connections]
        wait(waited, max(0.0, nearest - time.monotonic()))
