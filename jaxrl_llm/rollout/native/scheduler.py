"""Which responses are decoded next, and where their keys and values lie. On the host.

The device decodes a chunk of steps at a time. While it does, the host looks at what the
chunk before gave and prepares the next: what it knows is a chunk old. So every sequence
is given pages for two chunks beyond what is known of it, and the device itself puts the
next waiting sequence into a row whose sequence has ended.

A *slot* is a row of the tables that the device sees: it belongs to a sequence that is
decoded or could be at any step. N = slots, n = pages of the longest sequence.
"""

from collections import deque
from collections.abc import Container, Iterator
from dataclasses import dataclass, field

import numpy as np

from jaxrl_llm.rollout.engine import Request
from jaxrl_llm.rollout.native.page_pool import PagePool

PLANNED_TOGETHER = 128
"""Sequences of a plan, at most."""


@dataclass(eq=False)
class Response:
    """A response that is being generated."""

    request: Request
    sample: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    full_logprobs: list[float] = field(default_factory=list)
    raw_logprobs: list[float] = field(default_factory=list)
    top_tokens: list[np.ndarray] = field(default_factory=list)
    """[N] each."""
    top_logprobs: list[np.ndarray] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    prefilled: int = 0
    """Tokens that were computed besides those that were sampled."""
    slot: int = -1
    """-1: it waits."""

    @property
    def sequence(self) -> tuple[int, ...]:
        """Prompt and response so far."""
        return self.request.tokens + tuple(self.tokens)

    @property
    def position(self) -> int:
        """Position of its newest token, which is not in the cache yet."""
        return len(self.request.tokens) + len(self.tokens) - 1

    @property
    def end(self) -> int:
        """Positions it can fill: all but that of the last token it may have."""
        return len(self.request.tokens) + self.request.sampling.max_tokens - 1


@dataclass(frozen=True, eq=False)
class PrefillPiece:
    """Tokens of one sequence that are not in the cache, and where they go."""

    tokens: tuple[int, ...]
    start: int
    """Position of the first; what comes before is in the cache."""
    pages: tuple[int, ...]
    """The sequence's pages, from its beginning."""


@dataclass(frozen=True)
class Plan:
    """What the device does before the next chunk."""

    rounds: list[list[PrefillPiece]]
    """What to prefill. The first round's are beginnings of sequences; a later round's
    may need what those before it wrote."""
    copies: list[tuple[int, int]]
    """Then, pages to copy: (source, target)."""
    queue: list[int]
    """Slots whose sequences are ready to be decoded, in order: behind those of earlier
    plans."""


class Scheduler:
    """Shares the rows and pages of one replica among the responses asked for.

    Args:
      pool: holds at least the longest sequence.
      num_rows: sequences that the device decodes together.
      num_slots: sequences in the device's tables.
      width: n, pages of the longest sequence.
      chunk: steps of a chunk.
      max_prefill: tokens of one sequence that are prefilled at a time.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        num_rows: int,
        num_slots: int,
        width: int,
        chunk: int,
        max_prefill: int,
    ):
        self.pool, self._chunk, self._max_prefill = pool, chunk, max_prefill
        self._num_rows = num_rows
        self.waiting: deque[Response] = deque()
        self.slots: list[Response | None] = [None] * num_slots
        """The response in each slot."""
        self.tables = np.zeros((num_slots, width), np.int32)
        self.room = np.zeros(num_slots, np.int32)
        """Positions that the pages of a slot's sequence hold."""
        self.released: list[int] = []
        """Slots of preempted or aborted sequences, which the device is to leave."""
        self._to_release: list[int] = []  # the next plan's `released`
        self._free = list(range(num_slots))[::-1]
        self._admitted: dict[int, Response] = {}  # by slot, oldest first
        self._preempted: list[Response] = []  # may get tokens of the chunk that runs
        self._ended, self._ended_tokens = 0, 0

    @property
    def outstanding(self) -> int:
        """Responses that wait or are being generated."""
        return len(self.waiting) + len(self._admitted) + len(self._preempted)

    def plan(self) -> Iterator[Plan]:
        """Pages for all that go on, and slots for those who wait, as there are.

        Yields:
          Plans to be carried out one after the other: the device can begin to prefill
          while there is more to plan.
        """
        for slot in self.released:
            self.slots[slot] = None
            self._free.append(slot)
        self.released, self._to_release = self._to_release, []
        self.waiting.extendleft(self._preempted)  # the oldest was preempted last
        self._preempted = []
        for slot, response in list(self._admitted.items()):
            if slot in self._admitted:
                self._extend(response)
        growing = sum(self._grows(r) for r in self._admitted.values())
        likely = sum(self._likely_growth(r) for r in self._admitted.values())
        made, round_of = Plan([[]], [], []), {}
        while self.waiting and self._free:
            response = self.waiting[0]
            # Who gets no row yet takes only what others are not likely to need: the
            # prefill of what is preempted would be in vain.
            ahead = len(self._admitted) >= self._num_rows
            spare = max(growing, likely) if ahead else growing
            if not self._admit(response, spare, made, round_of):
                break
            self.waiting.popleft()
            growing += self._grows(response)
            likely += self._likely_growth(response)
            if len(made.queue) == PLANNED_TOGETHER:
                yield self._made(made)
                made, round_of = Plan([[]], [], []), {}
        assert self._admitted or self.released or not self.waiting, "none can go on"
        yield self._made(made)

    def _made(self, plan: Plan) -> Plan:
        for source, _ in plan.copies:
            self.pool.release(source)
        return plan

    def append(
        self,
        slots: np.ndarray,
        tokens: np.ndarray,
        logprobs: np.ndarray,
        full_logprobs: np.ndarray,
        raw_logprobs: np.ndarray,
        top_tokens: np.ndarray,
        top_logprobs: np.ndarray,
    ) -> Iterator[tuple[Response, int]]:
        """Appends the tokens of a chunk to their responses.

        Args:
          slots: int [steps, rows]: whose token it is; -1: nobody's.
          tokens, logprobs, full_logprobs, raw_logprobs: [steps, rows].
          top_tokens, top_logprobs: [steps, rows, N].

        Yields:
          Every response that has new tokens, and how many it had before.
        """
        of = slots.T.ravel()
        there = np.flatnonzero(of >= 0)
        there = there[np.argsort(of[there], kind="stable")]
        parts = np.split(there, np.flatnonzero(np.diff(of[there])) + 1)
        new, logs, full, raw = (
            x.T.ravel() for x in (tokens, logprobs, full_logprobs, raw_logprobs)
        )
        top, top_logs = (
            x.swapaxes(0, 1).reshape(len(of), x.shape[-1])
            for x in (top_tokens, top_logprobs)
        )
        for part in parts if len(there) else ():
            response = self.slots[of[part[0]]]
            if response is None:
                continue  # it was stopped meanwhile
            before = len(response.tokens)
            response.tokens.extend(new[part].tolist())
            response.logprobs.extend(logs[part].tolist())
            response.full_logprobs.extend(full[part].tolist())
            response.raw_logprobs.extend(raw[part].tolist())
            if response.request.sampling.logprobs:
                response.top_tokens.extend(top[part])
                response.top_logprobs.extend(top_logs[part])
            yield response, before

    def finish(self, response: Response, *, device_knows: bool) -> None:
        """A response is complete.

        Args:
          device_knows: the device has ended it itself.
        """
        self._ended += 1
        self._ended_tokens += len(response.tokens)
        self._remove(response, device_knows)

    def _remove(self, response: Response, device_knows: bool) -> None:
        slot = response.slot
        self.slots[slot] = None
        if response in self._preempted:
            self._preempted.remove(response)
            return
        filled = response.position // self.pool.size * self.pool.size
        self.pool.cache_prefix(response.sequence[:filled], response.pages)
        self._release_pages(response)
        (self._free if device_knows else self._to_release).append(slot)

    def withdraw(self) -> list[Response]:
        """Removes all responses, and returns them in the order that they were asked
        for, each with the tokens that it has."""
        running = [*self._admitted.values()]
        for response in running:
            self._release_pages(response)
        found = [*running, *self._preempted[::-1], *self.waiting]
        self._preempted, self.waiting = [], deque()
        for response in found:
            response.slot = -1
        return found

    def abort(self, prompt_ids: Container[int]) -> list[Response]:
        """Removes the responses to these prompts, and returns them."""

        def meant(responses):
            return [r for r in responses if r.request.prompt_id in prompt_ids]

        waiting, running = (
            meant(self.waiting),
            meant([*self._admitted.values(), *self._preempted]),
        )
        for response in running:
            self._remove(response, device_knows=False)
        for response in waiting:
            self.waiting.remove(response)
        return running + waiting

    def _admit(
        self,
        response: Response,
        spare: int,
        made: Plan,
        round_of: dict[int, int],
    ) -> bool:
        """Gives a response a slot and pages, if so many are left for others, and plans
        what must be prefilled or copied."""
        size, known = self.pool.size, response.position
        beginning = response.sequence[:known]
        whole = known // size
        found = self.pool.match_prefix(beginning)
        shared, source = found[:whole], found[whole:]
        for page in found:
            self.pool.retain(page)
        count = self._pages_soon(response) - len(shared)
        if source and len(self.pool) < count + spare:
            self.pool.release(source.pop())  # it may be the very page that is missing
        if len(self.pool) < count + spare:
            for page in shared:
                self.pool.release(page)
            return False
        response.pages = [*shared, *(self.pool.allocate() for _ in range(count))]
        if source:
            made.copies.append((source[0], response.pages[whole]))
        else:
            start = len(shared) * size
            response.prefilled += known - start
            number = 1 + max((round_of.get(page, 0) for page in shared), default=-1)
            while start < known:
                piece = beginning[start : start + self._max_prefill]
                if number == len(made.rounds):
                    made.rounds.append([])
                made.rounds[number].append(
                    PrefillPiece(piece, start, tuple(response.pages))
                )
                start, number = start + len(piece), number + 1
            round_of.update(dict.fromkeys(response.pages[len(shared) :], number - 1))
            self.pool.cache_prefix(beginning, response.pages)
        slot = response.slot = self._free.pop()
        self.slots[slot] = self._admitted[slot] = response
        self._lay_out(response)
        made.queue.append(slot)
        return True

    def _extend(self, response: Response) -> None:
        """Allocates pages for the next chunks; where there are none, the youngest is
        preempted."""
        while len(response.pages) < self._pages_soon(response):
            if len(self.pool):
                response.pages.append(self.pool.allocate())
                continue
            youngest = next(reversed(self._admitted.values()))
            self._release_pages(youngest)
            self._preempted.append(youngest)
            self.released.append(youngest.slot)
            if youngest is response:
                return
        self._lay_out(response)

    def _release_pages(self, response: Response) -> None:
        for page in response.pages:
            self.pool.release(page)
        response.pages = []
        del self._admitted[response.slot]

    def _lay_out(self, response: Response) -> None:
        slot, pages = response.slot, response.pages
        self.tables[slot, : len(pages)] = pages
        self.room[slot] = len(pages) * self.pool.size

    def _pages_soon(self, response: Response) -> int:
        """Pages it holds at most when the chunk that is planned has run."""
        return self._pages(min(response.position + 2 * self._chunk, response.end))

    def _grows(self, response: Response) -> bool:
        return len(response.pages) < self._pages(response.end)

    def _likely_growth(self, response: Response) -> int:
        """Pages it lacks to become as long as others were, or as long as it may."""
        end = response.end
        if self._ended:
            mean = self._ended_tokens // self._ended
            end = min(end, max(response.position, len(response.request.tokens) + mean))
        return max(0, self._pages(end) - len(response.pages))

    def _pages(self, positions: int) -> int:
        return -(-positions // self.pool.size)
