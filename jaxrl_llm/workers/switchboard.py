"""Calls of many workers at a time, which one thread watches.

    board = Switchboard()
    future = board.call(worker, {"x": 1}, limit_s=10.0)   # returns at once

Where `pool.call` waits until all of its calls are over, here each call is a future of
its own, so that whoever waits for one answer does not wait for the slowest.
"""

import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Pipe, wait
from typing import Any

from jaxrl_llm.workers.pool import Inline, Worker
from jaxrl_llm.workers.process import (
    Arguments,
    Failed,
    Outcome,
    Process,
    WorkerError,
)


class TimedOut(Failed):
    """A call took too long. Its worker was abandoned, and is of no more use."""


@dataclass(eq=False)
class _Call:
    worker: Worker
    arguments: Arguments
    limit_s: float
    future: Future[Outcome]
    end: float
    """When it should be over, or, before it has begun, when its worker should be
    ready."""
    begun: bool = False


class Switchboard:
    """Calls workers and waits for what they answer, in a thread of its own."""

    def __init__(self) -> None:
        self._new: deque[_Call] = deque()
        self._calls: list[_Call] = []
        self._woken, self._wake = Pipe(duplex=False)
        self._lock = threading.Lock()
        self._closed = False
        self._thread: threading.Thread | None = None

    def call(
        self, worker: Worker, arguments: Arguments, limit_s: float
    ) -> Future[Outcome]:
        """Begins a call of a worker that is in none; it may not have started yet.

        The future raises `WorkerError` if the worker does not get ready, and whatever
        is raised where the call cannot be begun.
        """
        future: Future[Outcome] = Future()
        if isinstance(worker, Inline):
            worker.begin(arguments, limit_s)
            future.set_result(worker.poll())
            return future
        with self._lock:
            if self._closed:
                raise RuntimeError("the switchboard is closed")
            self._new.append(_Call(worker, arguments, limit_s, future, float("inf")))
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="switchboard", daemon=True
                )
                self._thread.start()
        self._wake.send_bytes(b"")
        return future

    def close(self) -> None:
        """Abandons the workers that are in a call, whose futures are cancelled."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._wake.send_bytes(b"")
        if self._thread:
            self._thread.join()
        self._wake.close()
        self._woken.close()

    def _run(self) -> None:
        try:
            self._watch()
        except BaseException as error:  # noqa: BLE001 - nobody may wait for ever
            with self._lock:
                self._closed = True
            for call in [*self._calls, *self._new]:
                if not call.future.done():
                    call.future.set_exception(error)

    def _watch(self) -> None:
        ready: list[Any] = []
        while not self._closed:
            if self._woken in ready:
                self._woken.recv_bytes()
            while self._new:
                self._calls.append(self._new.popleft())
            self._calls = [call for call in self._calls if not self._over(call, ready)]
            ready = self._wait()
        for call in [*self._calls, *self._new]:
            call.worker.abandon(restart=False)
            call.future.cancel()

    def _over(self, call: _Call, ready: list[Any]) -> bool:
        """Goes on with a call as far as it can; whether it is over."""
        try:
            outcome = self._step(call, ready)
        except Exception as error:  # noqa: BLE001 - of this call, and of no other
            call.future.set_exception(error)
            return True
        if outcome is None:
            return False
        call.future.set_result(outcome)
        return True

    def _step(self, call: _Call, ready: list[Any]) -> Outcome | None:
        worker = call.worker
        if not call.begun:
            if isinstance(worker, Process) and not worker.ready:
                return self._get_ready(call, worker)
            call.begun, call.end = True, time.monotonic() + call.limit_s
            worker.begin(call.arguments, call.limit_s)
        elif not any(connection in ready for connection in worker.connections):
            if time.monotonic() < call.end:
                return None
        outcome = worker.poll()
        if outcome is None and time.monotonic() >= call.end:
            worker.abandon(restart=False)
            return TimedOut(f"did not finish within {call.limit_s:g} s")
        return outcome

    def _get_ready(self, call: _Call, worker: Process) -> Outcome | None:
        """Starts a process, and begins the call once that has its function."""
        if not worker.connections:
            worker.start()
            call.end = time.monotonic() + worker.limits.start_s
        found = worker.poll()
        if isinstance(found, Failed):
            worker.close()
            raise WorkerError(found.cause)
        if worker.ready:
            return self._step(call, [])
        if time.monotonic() >= call.end:
            worker.abandon(restart=False)
            raise WorkerError(
                f"its imports took longer than {worker.limits.start_s:g} s"
            )
        return None

    def _wait(self) -> list[Any]:
        """What can be read by now; waits until something can, or a call runs out of
        time."""
        watched = [c for call in self._calls for c in call.worker.connections]
        end = min((call.end for call in self._calls), default=float("inf"))
        limit = None if end == float("inf") else max(0.0, end - time.monotonic())
        return wait([self._woken, *watched], limit)
