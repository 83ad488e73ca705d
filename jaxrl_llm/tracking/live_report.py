"""The report of a run that goes on, written beside it."""

import threading
import time
from collections.abc import Callable
from types import TracebackType

REFRESH_S = 60.0
"""Without a validation, the report is written again after so long."""


class LiveReport:
    """Writes the report in a thread of its own, so that no step waits for it.

    What is asked for while it is written is written once more when that is done. That
    it cannot be written, for want of room say, is told once and stops nothing.

    Args:
      write: writes it.
      say: is told, by the thread that asks, why it could not be written.
    """

    def __init__(self, write: Callable[[], object], say: Callable[[str], None]):
        self._write, self._say = write, say
        self._wanted = threading.Event()
        self._closing = False
        self._failed: Exception | None = None
        self._told = False
        self._last = -float("inf")
        self._thread = threading.Thread(
            target=self._run, name="live report", daemon=True
        )

    def __enter__(self) -> "LiveReport":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Waits for what is being written."""
        self._closing = True
        self._wanted.set()
        self._thread.join()

    def ask(self) -> None:
        """Has the report written, and returns at once."""
        self._last = time.monotonic()
        if self._failed and not self._told:
            self._told = True
            self._say(f"note: the report is not written: {self._failed}")
        self._wanted.set()

    def ask_if_old(self) -> None:
        """Asks if nobody has for `REFRESH_S`."""
        if time.monotonic() - self._last >= REFRESH_S:
            self.ask()

    def _run(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            if self._closing:
                return
            try:
                self._write()
            except (OSError, ValueError) as error:
                self._failed = error
