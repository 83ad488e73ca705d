"""The thread that has the engine to itself, and what the server's loop asks of it.

Handlers run in one asyncio loop; the engine runs here. They meet at a lock: requests
and aborts wait for the next chunk of decoding, new weights until nothing is generated.
"""

import asyncio
import itertools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from jaxrl_llm.data.types import Completion
from jaxrl_llm.rollout.engine import Request
from jaxrl_llm.rollout.native.engine import JaxEngine, Progress


class Full(Exception):
    """There is no room: enough responses wait or are being generated."""


class Paused(Exception):
    """Nothing new is begun at present."""


class Dropped(Exception):
    """A response will not be completed; the message says why."""


Event = Progress | Completion | Dropped


@dataclass(eq=False)
class Ticket:
    """A request that was taken, and what has become of it."""

    request: Request
    streams: bool
    """Whether somebody wants to know of tokens before a response is complete."""
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    left: int = 0
    """Responses that are not complete."""

    def tell(self, event: Event) -> None:
        """Called by any thread."""
        try:
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:
            pass  # the server has ended, and nobody waits any more


@dataclass(frozen=True, kw_only=True)
class State:
    """What there is to do, at one moment."""

    queued: int
    """Responses that wait or are being generated."""
    paused: bool
    weight_version: int


class Worker:
    """Runs an engine that holds weights. Its methods may be called by any thread.

    Args:
      version: of these weights.
      max_queued: responses that wait or are generated at a time, at most.
      on_failure: called if the engine fails, after which nothing is generated.
    """

    def __init__(
        self,
        engine: JaxEngine,
        version: int,
        max_queued: int,
        on_failure: Callable[[], None] = lambda: None,
    ):
        self._engine, self.max_queued = engine, max_queued
        self._on_failure = on_failure
        self._changed = threading.Condition()
        self._numbers = itertools.count()
        self._new: deque[Ticket] = deque()
        self._tickets: dict[int, Ticket] = {}
        self._gone: set[int] = set()
        self._weights: tuple[Any, int, Future] | None = None
        self._queued, self._version = 0, version
        self._paused = self._closing = False
        self.failure: BaseException | None = None
        """Why nothing is generated any more; None while all is well."""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def state(self) -> State:
        """What there is to do now."""
        with self._changed:
            return State(
                queued=self._queued, paused=self._paused, weight_version=self._version
            )

    def submit(
        self,
        requests: Sequence[Request],
        *,
        streams: bool,
        loop: asyncio.AbstractEventLoop,
    ) -> list[Ticket]:
        """Takes all of the requests, or none. Their prompt ids are replaced.

        Raises:
          Full: there is no room for them now.
          Paused: nothing is begun now.
          Dropped: the engine has failed.
        """
        with self._changed:
            self._check_works()
            if self._paused:
                raise Paused("the server is paused; resume it, or ask again later")
            asked = sum(request.num_samples for request in requests)
            if self._queued + asked > self.max_queued:
                raise Full(
                    f"{self._queued} responses wait or are generated, and {asked} more "
                    f"would be over {self.max_queued}; ask again later"
                )
            tickets = []
            for request in requests:
                named = replace(request, prompt_id=next(self._numbers))
                ticket = Ticket(named, streams, loop, left=request.num_samples)
                self._tickets[named.prompt_id] = ticket
                tickets.append(ticket)
            self._new.extend(tickets)
            self._queued += asked
            self._changed.notify_all()
        return tickets

    def abort(self, tickets: Sequence[Ticket], why: str = "aborted") -> int:
        """Ends what is not complete; returns how many responses that were."""
        with self._changed:
            ended = 0
            for ticket in tickets:
                if self._tickets.pop(ticket.request.prompt_id, None):
                    self._gone.add(ticket.request.prompt_id)
                    ended += ticket.left
                    ticket.tell(Dropped(why))
            self._new = deque(t for t in self._new if t not in tickets)
            self._queued -= ended
            self._changed.notify_all()
        return ended

    async def pause(self, mode: Literal["wait", "abort"]) -> None:
        """Begins nothing more; returns when nothing is being generated.

        Args:
          mode: wait for what is being generated, or abort it.
        """
        with self._changed:
            self._check_works()
            self._paused = True
            running = list(self._tickets.values())
        if mode == "abort":
            self.abort(running, "aborted: the server was paused")
        await asyncio.to_thread(self._until_idle)

    def resume(self) -> None:
        """Begins requests again."""
        with self._changed:
            self._paused = False

    async def load(self, params: Any, version: int | None = None) -> int:
        """Takes new weights, which requests from now on get; returns their version.

        Args:
          params: in the training layout.
          version: one more than the last if not given.
        """
        done: Future = Future()
        with self._changed:
            self._check_works()
            if self._weights:
                raise ValueError("other weights are being taken; ask again later")
            self._weights = params, version, done
            self._changed.notify_all()
        return await asyncio.wrap_future(done)

    def close(self) -> None:
        """Aborts everything, and waits for the engine to stop."""
        with self._changed:
            self._closing = True
            running = list(self._tickets.values())
            self._changed.notify_all()
        self.abort(running, "aborted: the server ends")
        self._thread.join()

    def _check_works(self) -> None:
        if self.failure or self._closing:
            raise Dropped(f"the server ends: {self.failure or 'it was told to'}")

    def _until_idle(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._queued or self.failure)

    def _run(self) -> None:
        try:
            while self._wait():
                for completion in self._engine.completions(self._more, self._told):
                    self._finish(completion)
        except BaseException as error:
            self._fail(error)

    def _wait(self) -> bool:
        """Returns when there is something to generate, or False in the end."""
        while True:
            with self._changed:
                self._gone.clear()  # the engine is idle
                self._changed.wait_for(
                    lambda: self._new or self._weights or self._closing
                )
                if self._closing:
                    return False
                weights = self._weights
            if not weights:
                return True
            self._take(*weights)

    def _take(self, params: Any, version: int | None, done: Future) -> None:
        with self._changed:
            version = self._version + 1 if version is None else version
        try:
            self._engine.load(params, version)
        except BaseException as error:
            done.set_exception(error)
            if not isinstance(error, ValueError):
                raise
        else:
            with self._changed:
                self._version = version
            done.set_result(version)
        finally:
            with self._changed:
                self._weights = None

    def _more(self, idle: bool) -> list[Request]:
        with self._changed:
            gone, self._gone = self._gone, set()
            held = self._weights or self._closing
            new = [] if held else [ticket.request for ticket in self._new]
            if not held:
                self._new.clear()
        if gone:
            self._engine.abort(gone)
        return new

    def _told(self, progress: Progress) -> None:
        with self._changed:
            ticket = self._tickets.get(progress.prompt_id)
        if ticket and ticket.streams:
            ticket.tell(progress)

    def _finish(self, completion: Completion) -> None:
        with self._changed:
            ticket = self._tickets.get(completion.prompt_id)
            if ticket is None:
                return  # aborted while it was completed
            ticket.left -= 1
            self._queued -= 1
            if not ticket.left:
                del self._tickets[completion.prompt_id]
            self._changed.notify_all()
        ticket.tell(completion)

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self.failure = error
            running, self._tickets = list(self._tickets.values()), {}
            self._new.clear()
            self._queued, weights = 0, self._weights
            self._changed.notify_all()
        for ticket in running:
            ticket.tell(Dropped(f"the engine failed: {error}"))
        if weights and not weights[2].done():
            weights[2].set_exception(error)
        self._on_failure()
