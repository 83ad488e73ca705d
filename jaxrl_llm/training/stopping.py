"""Ending a run early: SIGTERM, from Slurm, Kubernetes or a spot instance, and Ctrl-C.

The first of them lets the step under way end and saves. A step may take long, and who
sends SIGTERM sends SIGKILL soon after: what has not ended within the time of grace is
given up, and the run goes on from its newest checkpoint. A second Ctrl-C ends at once.

Python runs a signal's handler in the main thread and only between two of its own
operations: not while that waits for a compiler. So signals are read by a thread, which
answers at once; it interrupts the main thread, which works wherever that runs Python or
waits for a lock, and ends the process if it does not come back.
"""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jaxrl_llm.sharding import processes

STOPPED = 75
"""Exit status of a run that was asked to stop and can go on: EX_TEMPFAIL of sysexits.h,
which batch systems can be told to requeue."""
INTERRUPTED = 130
"""Exit status after a second Ctrl-C, as shells have it."""
_ANSWER_S = 3.0
"""Seconds that the main thread has to answer an interruption."""


class Stopped(SystemExit):
    """A run was asked to stop, and gave up what did not end in time; it can go on from
    its newest checkpoint. A program that does not catch it exits with status 75."""

    def __init__(self, text: str):
        super().__init__(STOPPED)
        self.text = text

    def __str__(self) -> str:
        return self.text


@contextmanager
def asked_to_stop(
    say: Callable[[str], None] = print,
    grace_s: float | int = 0.0,
    max_hours: float | int | None = None,
) -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether a signal has come, to any process of the run;
    all of them call it at the same point, and stop together. Once it has said so,
    nothing is given up any more: what follows is saving.

    Outside the main thread (some notebooks) signals are left alone.

    Args:
      say: is told at once that a signal has come, and what happens.
      grace_s: seconds after SIGTERM after which the block is interrupted. With 0, also
        the first Ctrl-C interrupts at once.
      max_hours: after so many the function says so too.

    Raises:
      Stopped: the block did not end in time.
      KeyboardInterrupt: at the second Ctrl-C.
    """
    watch = _Watch(say, grace_s, max_hours)
    if threading.current_thread() is not threading.main_thread():
        yield watch.stops
        return
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    numbers = (signal.SIGTERM, signal.SIGINT, _POKE)
    handlers = {number: signal.signal(number, watch.handle) for number in numbers}
    wakeup = signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
    thread = threading.Thread(target=watch.run, args=(reads,), daemon=True)
    thread.start()
    try:
        yield watch.stops
    finally:
        watch.end()
        signal.set_wakeup_fd(wakeup)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.write(writes, _END)
        thread.join()
        os.close(writes)
        os.close(reads)


_END = b"\0"
_POKE = signal.SIGURG
"""Has the main thread look at what it is to raise. Ignored by who does not listen, so
one that comes late does no harm."""


class _Watch:
    """What has been asked for, and what is done about it."""

    def __init__(
        self,
        say: Callable[[str], None],
        grace_s: float | int,
        max_hours: float | int | None,
    ):
        self._say, self._grace_s = say, grace_s
        self._max_hours, self._began = max_hours, time.monotonic()
        self._asked, self._saving, self._over = threading.Event(), False, False
        self._lock = threading.Lock()
        self._main = threading.main_thread().ident
        self._error: BaseException | None = None
        self._tries: list[float] = []
        self._next: float | None = None

    def stops(self) -> bool:
        """Whether the run is to stop."""
        hours = (time.monotonic() - self._began) / 3600
        late = self._max_hours is not None and hours >= self._max_hours
        if late and not self._asked.is_set():
            self._say(f"stopping: trainer.max_hours {self._max_hours:g} are over")
            self._asked.set()
        self._saving |= any(processes.gather(self._asked.is_set()))
        return self._saving

    def end(self) -> None:
        """The block is over: nothing is interrupted any more."""
        with self._lock:
            self._over, self._error = True, None

    def handle(self, _number: int, _frame: Any) -> None:
        """Runs in the main thread: raises what the other thread wants raised there."""
        error = self._error
        if error is not None:
            self._error = None
            raise error

    def run(self, reads: int) -> None:
        """Reads signals until the block is over."""
        wanted: BaseException | None = None
        while True:
            timeout = None if self._next is None else self._next - time.monotonic()
            ready, _, _ = select.select([reads], [], [], timeout and max(timeout, 0.0))
            numbers = os.read(reads, 64) if ready else b""
            if _END[0] in numbers:
                return
            for number in numbers:
                if wanted is None and number != _POKE:
                    wanted = self._hear(number)
                    self._interrupt(wanted)
            if not ready:  # the time that was given is over
                if wanted is None and not self._saving:
                    wanted = Stopped(
                        f"stopped: the step did not end within {self._grace_s:g} s of "
                        "SIGTERM and is given up"
                    )
                if wanted is None:
                    self._next = None
                else:
                    self._interrupt(wanted)

    def _hear(self, number: int) -> BaseException | None:
        """What to raise because of a signal."""
        term = number == signal.SIGTERM
        again = self._asked.is_set()
        self._asked.set()
        if again and not term:
            self._say("stopping now")
            return KeyboardInterrupt("stopped by a second Ctrl-C")
        if self._grace_s == 0:
            return Stopped("stopped; the same command goes on")
        if term and self._next is None:
            self._next = time.monotonic() + self._grace_s
        if not again:
            how = "SIGTERM: " if term else ""
            now = "" if term else "; Ctrl-C again to stop now"
            self._say(f"{how}stopping after this step{now}")
        return None

    def _interrupt(self, error: BaseException | None) -> None:
        """Has the main thread raise `error`; if that does not answer, ends all."""
        if error is None:
            return
        with self._lock:
            now = time.monotonic()
            if self._over:
                return
            if not self._tries:
                self._tries, self._last = [now, now + _ANSWER_S / 2], now + _ANSWER_S
            if self._tries[0] <= now:
                self._error = error
                self._tries = [*self._tries[1:], self._last + 1]
            if now < self._last:
                # A signal that comes just before the thread begins to wait for
                # something is seen when it wakes up, so one is not enough.
                if self._error is not None:
                    signal.pthread_kill(self._main, _POKE)
                self._next = now + 0.1
                return
        if isinstance(error, Stopped):
            status = STOPPED
        elif _interactive():
            signal.pthread_kill(self._main, _POKE)
            self._next = now + 0.1
            return  # a notebook's kernel lives on
        else:
            status = INTERRUPTED
        self._say(f"{error}: the process does not answer and is ended")
        sys.stdout.flush()
        os._exit(status)


def _interactive() -> bool:
    return hasattr(sys, "ps1") or "ipykernel" in sys.modules
