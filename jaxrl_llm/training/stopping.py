"""Whether a run was asked to end early, by SIGTERM or Ctrl-C."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jaxrl_llm.sharding import processes


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether a signal has come, to any process of the run;
    all of them call it at the same point, and stop together.

    A second Ctrl-C interrupts at once. Outside the main thread (some notebooks) signals
    are left alone.
    """
    asked = threading.Event()

    def ask(number: int, _frame: Any) -> None:
        if asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()

    numbers = (signal.SIGTERM, signal.SIGINT)
    if threading.current_thread() is not threading.main_thread():
        numbers = ()
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield lambda: any(processes.gather(asked.is_set()))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
