"""Programs that are compiled before they are called, side by side in threads.

    with Ahead(programs) as ahead:
        ...                             # read the weights meanwhile
        ahead.wait(lambda done, count: print(f"compiling {done} of {count}"))

XLA compiles outside of Python's lock, but to lower is Python: one program is lowered at
a time, and gives up the lock soon, so that whoever does something else meanwhile waits
for one thread and not for many, and not long. A jitted function that was lowered and
compiled for shapes and shardings neither traces nor compiles when it is called with
arrays of these.
"""

import contextlib
import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from types import TracebackType

from jax.stages import Compiled, Lowered

THREADS = "compile-ahead"
"""What the names of its threads begin with."""


class Ahead:
    """Lowers and compiles in the background, from the beginning of the block on.

    Args:
      programs: what lowers each program, by its name. Those that come first are begun
        first.
      most: threads, at most; as many as there are processors if not given.
    """

    def __init__(
        self, programs: Mapping[str, Callable[[], Lowered]], most: int | None = None
    ):
        self._programs = programs
        count = min(len(programs), most or os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(max(1, count), thread_name_prefix=THREADS)
        self._futures: dict[Future[Compiled], str] = {}
        self._stopped = threading.Event()
        self._lowering = threading.Lock()

    def __enter__(self) -> "Ahead":
        self._futures = {
            self._pool.submit(self._compiled, lower): name
            for name, lower in self._programs.items()
        }
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopped.set()
        # Whoever is interrupted does not wait for a compiler, which nothing interrupts.
        patient = error is None or isinstance(error, Exception)
        self._pool.shutdown(wait=patient, cancel_futures=True)

    @property
    def count(self) -> int:
        """All programs."""
        return len(self._programs)

    def wait(
        self, tell: Callable[[int, int], None] = lambda done, count: None
    ) -> dict[str, Compiled]:
        """Waits until all are compiled. Nothing else should run on a GPU meanwhile: to
        compile for one, and to begin to run a program, both capture what is sent to it,
        and fail where they meet.

        Args:
          tell: is told how many are, and how many there are.

        Returns:
          The programs by name, for their memory; they are kept while this is.

        Raises:
          Exception: whatever the lowering or compilation of one raised.
        """
        tell(sum(future.done() for future in self._futures), self.count)
        found = {}
        for future in as_completed(self._futures):
            found[self._futures[future]] = future.result()
            tell(len(found), self.count)
        return {name: found[name] for name in self._programs}

    def _compiled(self, lower: Callable[[], Lowered]) -> Compiled | None:
        # Once another has failed, nobody waits for this one.
        if self._stopped.is_set():
            return None
        _under_way.append(lower)
        try:
            with self._lowering, _in_short_turns():
                lowered = lower()
            return lowered.compile()
        finally:
            _under_way.remove(lower)


@contextlib.contextmanager
def _in_short_turns() -> Iterator[None]:
    """A thread that computes in Python gives up its lock after 0.1 ms, if others wait
    for it: of 5 ms each, those who read weights and come back from NumPy thousands of
    times would wait for minutes. And nothing is looked through for garbage, which takes
    a fifth of the time to lower a program and finds none."""
    before, collects = sys.getswitchinterval(), gc.isenabled()
    sys.setswitchinterval(min(before, 1e-4))
    gc.disable()
    try:
        yield
    finally:
        sys.setswitchinterval(before)
        if collects:
            gc.enable()


_under_way: list[Callable[[], Lowered]] = []


def leave_if_compiling(status: int) -> None:
    """Ends the process with this status, if programs are still being compiled that
    nobody waits for any more: the interpreter would wait for their threads."""
    if _under_way:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
