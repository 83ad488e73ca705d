"""Which responses are decoded next, and where their keys and values lie. On the host.

The device decodes a chunk of steps at a time. While it does, the host looks at what the
chunk before gave and prepares the next: what it knows is a chunk old. So every sequence
is given pages for two chunks beyond what is known of it, and the device itself puts the
next waiting sequence into a row whose sequence has ended.

A *slot* is a line of the tables that the device sees: of a sequence that is decoded or
could be at any step. N = slots, n = pages of the longest sequence.
"""

from collections import deque
from collections.abc import Container, Iterator
from dataclasses import dataclass, field

import numpy as np

from jaxrl_llm.rollout.engine import Request
from jaxrl_llm.rollout.native.page_pool import Pool

PLANNED_TOGETHER = 128
"""Sequences of a plan, at most."""


@dataclass(eq=False)
class Response:
    """One in the making."""

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
class Piece:
    """Tokens of one sequence that are not in the cache, and where they go."""

    tokens: tuple[int, ...]
    start: int
    """Position of the first; what comes before is in the cache."""
    pages: tuple[int, ...]
    """The sequence's pages, from its beginning."""


@dataclass(frozen=True)
class Plan:
    """What the device does before the next chunk."""

    rounds: list[list[Piece]]
    """Pieces to read. The first round's are beginnings of sequences; a later round's
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
      most_read: tokens of the longest piece.
    """

    def __init__(
        self,
        pool: Pool,
        *,
        num_rows: int,
        num_slots: int,
        width: int,
        chunk: int,
        most_read: int,
    ):
        self.pool, self._chunk, self._most_read = pool, chunk, most_read
        self._num_rows = num_rows
        self.waiting: deque[Response] = deque()
        self.slots: list[Response | None] = [None] * num_slots
        """Whose tokens the device's are."""
        self.tables = np.zeros((num_slots, width), np.int32)
        self.room = np.zeros(num_slots, np.int32)
        """Positions that the pages of a slot's sequence hold."""
        self.gone: list[int] = []
        """Slots whose sequences the device is to let go."""
        self._unwanted: list[int] = []  # the next plan's `gone`
        self._free = list(range(num_slots))[::-1]
        self._admitted: dict[int, Response] = {}  # by slot, oldest first
        self._again: list[Response] = []  # may get tokens of the chunk that runs
        self._ended, self._ended_tokens = 0, 0

    @property
    def outstanding(self) -> int:
        """Responses that wait or are being made."""
        return len(self.waiting) + len(self._admitted) + len(self._again)

    def plan(self) -> Iterator[Plan]:
        """Pages for all that go on, and slots for those who wait, as there are.

        Yields:
          Plans to be carried out one after the other: the device can begin to read
          while there is more to plan.
        """
        for slot in self.gone:
            self.slots[slot] = None
            self._free.append(slot)
        self.gone, self._unwanted = self._unwanted, []
        self.waiting.extendleft(self._again)  # the oldest was let go last
        self._again = []
        for slot, response in list(self._admitted.items()):
            if slot in self._admitted:
                self._extend(response)
        growing = sum(self._grows(r) for r in self._admitted.values())
        likely = sum(self._likely_growth(r) for r in self._admitted.values())
        made, round_of = Plan([[]], [], []), {}
        while self.waiting and self._free:
            response = self.waiting[0]
            # Who gets no row yet takes only what others are not likely to need: to read
            # what must be given up again would be in vain.
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
        assert self._admitted or self.gone or not self.waiting, "nobody can go on"
        yield self._made(made)

    def _made(self, plan: Plan) -> Plan:
        for source, _ in plan.copies:
            self.pool.drop(source)
        return plan

    def took(
        self,
        slots: np.ndarray,
        tokens: np.ndarray,
        logprobs: np.ndarray,
        full_logprobs: np.ndarray,
        raw_logprobs: np.ndarray,
        top_tokens: np.ndarray,
        top_logprobs: np.ndarray,
    ) -> Iterator[tuple[Response, int]]:
        """Adds what a chunk gave to its responses.

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

    def finish(self, response: Response, *, told: bool) -> None:
        """A response is complete.

        Args:
          told: the device knows.
        """
        self._ended += 1
        self._ended_tokens += len(response.tokens)
        self._let_go(response, told)

    def _let_go(self, response: Response, told: bool) -> None:
        slot = response.slot
        self.slots[slot] = None
        if response in self._again:
            self._again.remove(response)
            return
        filled = response.position // self.pool.size * self.pool.size
        self.pool.keep(response.sequence[:filled], response.pages)
        self._release(response)
        (self._free if told else self._unwanted).append(slot)

    def abort(self, prompt_ids: Container[int]) -> list[Response]:
        """Forgets the responses to these prompts, and returns what there was."""

        def meant(responses):
            return [r for r in responses if r.request.prompt_id in prompt_ids]

        waiting, running = (
            meant(self.waiting),
            meant([*self._admitted.values(), *self._again]),
        )
        for response in running:
            self._let_go(response, told=False)
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
        what must be read or copied."""
        size, known = self.pool.size, response.position
        beginning = response.sequence[:known]
        whole = known // size
        found = self.pool.find(beginning)
        shared, source = found[:whole], found[whole:]
        for page in found:
            self.pool.hold(page)
        count = self._pages_soon(response) - len(shared)
        if source and len(self.pool) < count + spare:
            self.pool.drop(source.pop())  # it may be the very page that is missing
        if len(self.pool) < count + spare:
            for page in shared:
                self.pool.drop(page)
            return False
        response.pages = [*shared, *(self.pool.take() for _ in range(count))]
        if source:
            made.copies.append((source[0], response.pages[whole]))
        else:
            start = len(shared) * size
            number = 1 + max((round_of.get(page, 0) for page in shared), default=-1)
            while start < known:
                piece = beginning[start : start + self._most_read]
                if number == len(made.rounds):
                    made.rounds.append([])
                made.rounds[number].append(Piece(piece, start, tuple(response.pages)))
                start, number = start + len(piece), number + 1
            round_of.update(dict.fromkeys(response.pages[len(shared) :], number - 1))
            self.pool.keep(beginning, response.pages)
        slot = response.slot = self._free.pop()
        self.slots[slot] = self._admitted[slot] = response
        self._lay_out(response)
        made.queue.append(slot)
        return True

    def _extend(self, response: Response) -> None:
        """Pages for the next chunks, from the youngest where there are none."""
        while len(response.pages) < self._pages_soon(response):
            if len(self.pool):
                response.pages.append(self.pool.take())
                continue
            youngest = next(reversed(self._admitted.values()))
            self._release(youngest)
            self._again.append(youngest)
            self.gone.append(youngest.slot)
            if youngest is response:
                return
        self._lay_out(response)

    def _release(self, response: Response) -> None:
        for page in response.pages:
            self.pool.drop(page)
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
