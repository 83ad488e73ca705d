"""The state of generation on the device while there is something to generate.

Each replica (mesh axis "data") has its scheduler, rows and pages; one dispatch runs all
of them.
"""

import dataclasses
import itertools
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl_llm.models import Architecture, Pages
from jaxrl_llm.models.attention import paged
from jaxrl_llm.rollout.engine import Request, Sampling
from jaxrl_llm.rollout.native import programs as decode
from jaxrl_llm.rollout.native.page_pool import PagePool
from jaxrl_llm.rollout.native.sampling import Mode
from jaxrl_llm.rollout.native.scheduler import (
    PLANNED_TOGETHER,
    Plan,
    PrefillPiece,
    Response,
    Scheduler,
)

PAGE_SIZE = 64
SEQUENCES_PER_ROW = 16
"""At most, of prompts that are prefilled together."""
FEWEST_CONTINUED = 16
"""Rows of continued prefill that are computed together: they are rare."""
_FEWEST_TOKENS = 64
"""Length of the shortest rows of prefill."""
MODES: tuple[Mode, ...] = ("plain", "tempered", "truncated")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The shapes that programs are compiled for: few, whatever lengths there are.

    Their price is padding. Of the tokens that a dispatch prefills, up to three
    quarters are padding where there is little to prefill; of the rows that it decodes,
    up to a third from 128 on, up to a half from 32 on, and more of fewer.
    """

    num_rows: int
    """Sequences that a replica decodes together, at most."""
    prefill_tokens: int
    """Prefilled per dispatch and replica, at most, if not a single sequence has
    more."""
    longest_prompt: int
    """Tokens of the longest prompt."""
    longest: int
    """Tokens of the longest prompt with its response."""

    @property
    def row_counts(self) -> list[int]:
        """How many rows are decoded together: 8, powers of two from 32 on, and from 128
        on, where many rows make steps long, the numbers halfway between them."""
        powers = [1 << i for i in range(5, self.num_rows.bit_length())]
        between = [power * 3 // 2 for power in powers if power >= 128]
        found = {x for x in (8, *powers, *between) if x < self.num_rows}
        return [*sorted(found), self.num_rows]

    def fit(self, needed: int) -> int:
        """Rows for so many sequences: one of `row_counts`."""
        return next(n for n in self.row_counts if n >= min(needed, self.num_rows))

    @property
    def num_slots(self) -> int:
        """Sequences in a replica's tables: those that are decoded, and as many that are
        ready to follow them."""
        return 2 * self.num_rows

    def prefill_length(self, tokens: int = 1) -> int:
        """The length of rows that hold beginnings of sequences of up to so many tokens:
        of prompts, or of all that there can be."""
        length = row_length(min(self.longest_prompt, self.prefill_tokens))
        if min(tokens, self.prefill_tokens) <= length:
            return length
        return row_length(min(self.longest, self.prefill_tokens))

    def continued_lengths(self, tokens: int) -> list[int]:
        """The lengths of rows that hold up to so many tokens behind what is known: 64,
        and that times powers of four."""
        found = [_FEWEST_TOKENS]
        while found[-1] < tokens:
            found.append(4 * found[-1])
        return found

    def prefill_counts(self, length: int, fewest: int = 1) -> list[int]:
        """How many such rows are prefilled together: as many as there may be, and that
        divided by powers of four.

        Args:
          fewest: not worth another program.
        """
        most = max(1, min(self.prefill_tokens // length, PLANNED_TOGETHER))
        most = 1 << most.bit_length() - 1
        found = [most]
        while found[0] >= 4 * fewest:
            found.insert(0, found[0] // 4)
        return found

    @property
    def copies(self) -> list[int]:
        """How many pages are copied together: one at most for each of a plan."""
        most = min(_power_of_two(self.num_slots), PLANNED_TOGETHER)
        return sorted({max(1, most // 8), most})


class Session:
    """Responses that are being generated.

    Args:
      run: what is compiled.
      sizes: shapes that it is compiled for.
      num_rows: sequences that a replica decodes together at first.
      num_pages: of a replica.
      width: pages of the longest sequence.
      chunk: steps per dispatch.
      greedy: see `mode_of`.
    """

    def __init__(
        self,
        run: decode.Run,
        params: Any,
        *,
        sizes: Sizes,
        num_rows: int,
        num_pages: int,
        width: int,
        chunk: int,
        greedy: Mode = "plain",
    ):
        self._run, self._params = run, params
        self._chunk, self._sizes = chunk, sizes
        self._replicas = run.mesh.shape["data"]
        self._of_rows = NamedSharding(run.mesh, P("data"))
        self._schedulers = [
            Scheduler(
                PagePool(num_pages, PAGE_SIZE),
                num_rows=num_rows,
                num_slots=sizes.num_slots,
                width=width,
                chunk=chunk,
                max_prefill=sizes.prefill_tokens,
            )
            for _ in range(self._replicas)
        ]
        eos = len(run.arch.eos_token_ids)
        self._slot_tables = [
            SlotTables(sizes.num_slots, eos) for _ in range(self._replicas)
        ]
        self._mode: Mode = "plain"
        self._greedy = greedy
        self._top = 0
        self._longest = 0  # of all responses asked for, at most
        self._num_rows = num_rows
        pages, _ = abstract(run, num_rows, num_pages)
        self._pages = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), pages
        )
        self._rows = jax.device_put(
            decode.no_rows(num_rows, self._replicas), self._of_rows
        )
        # A loop on a GPU returns when it has ended, so a thread of its own waits for it
        # and sends what was planned meanwhile: the device does not wait for the host.
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._sent: list[Future] = []

    @property
    def outstanding(self) -> int:
        """Responses that wait or are being generated."""
        return sum(scheduler.outstanding for scheduler in self._schedulers)

    def add(self, responses: Sequence[Response]) -> None:
        """Adds responses. Those to one prompt come to one replica: it is prefilled
        once. A later turn comes to the replica that holds most of those before it."""

        def least(scheduler: Scheduler, first: Response) -> tuple[int, int]:
            known = first.request.tokens if first.request.turn else ()
            return -len(scheduler.pool.match_prefix(known)), scheduler.outstanding

        for _, each in itertools.groupby(responses, lambda r: id(r.request)):
            group = list(each)
            chosen = min(self._schedulers, key=lambda s: least(s, group[0]))
            chosen.waiting.extend(group)
        asked = {r.request.sampling for r in responses}
        modes = (mode_of(sampling, self._greedy) for sampling in asked)
        self._mode = max({self._mode, *modes}, key=MODES.index)
        self._top = max(self._top, *(sampling.logprobs for sampling in asked))
        # All replicas' tables have one shape, whichever of them has something to do.
        ends = max(len(s.stop_token_ids) for s in asked)
        for lines in self._slot_tables:
            lines.make_room(len(self._run.arch.eos_token_ids) + ends)
        self._longest = max(self._longest, *(s.max_tokens for s in asked))
        # What comes before a later turn is known, and not read as a prompt is.
        first = [len(r.request.tokens) for r in responses if not r.request.turn]
        longest = max(first, default=0)
        if longest > self._sizes.longest_prompt:
            self._sizes = dataclasses.replace(self._sizes, longest_prompt=longest)

    def advance(self) -> list[tuple[Response, int]]:
        """Dispatches another chunk, then takes the tokens of the last one.

        Returns:
          Responses with new tokens, and how many they had before.
        """
        plans = (scheduler.plan() for scheduler in self._schedulers)
        sent = []
        for parts in itertools.zip_longest(*plans, fillvalue=Plan([[]], [], [])):
            self._lay_out(parts)
            sent.append(self._thread.submit(self._prefill, parts))
        tables = [
            lines.tables(scheduler)
            for lines, scheduler in zip(
                self._slot_tables, self._schedulers, strict=True
            )
        ]
        tables = jax.device_put(
            jax.tree.map(lambda *x: np.concatenate(x), *tables), self._of_rows
        )
        sent.append(self._thread.submit(self._decode, tables))
        last, self._sent = self._sent, sent
        results = [future.result() for future in last]
        return self._look(results[-1]) if results else []

    def withdraw(self) -> list[Response]:
        """Ends it, and returns what is outstanding, to be added to another. What the
        device computes meanwhile is not looked at."""
        self.close()
        return [r for scheduler in self._schedulers for r in scheduler.withdraw()]

    def close(self) -> None:
        """Waits for the device."""
        for sent in self._sent:
            sent.result()
        self._thread.shutdown()

    def _lay_out(self, plans: Sequence[Plan]) -> None:
        for lines, made, scheduler in zip(
            self._slot_tables, plans, self._schedulers, strict=True
        ):
            for slot in made.queue:
                response = scheduler.slots[slot]
                lines.write(slot, response, stop_ids(self._run.arch, response.request))

    def _decode(self, tables: decode.Tables) -> decode.Steps:
        """A chunk."""
        fewer = self._fit_rows(tables)
        self._rows, self._pages, steps = decode.decode(
            self._params,
            tables,
            self._rows,
            self._pages,
            fewer,
            run=self._run,
            chunk=self._chunk,
            mode=self._mode,
            top=self._top,
        )
        return steps

    def _fit_rows(self, tables: decode.Tables) -> np.ndarray:
        """Resizes to as few rows as hold all sequences: each costs, also where it is
        idle. More are needed where turns come up one by one.

        Returns:
          When to ask again: how many sequences would do with fewer rows.
        """
        slots, head, tail = jax.device_get(
            (self._rows.slots, self._rows.head, tables.tail)
        )
        running = (slots.reshape(self._replicas, -1) >= 0).sum(axis=1)
        count = self._sizes.fit(int((running + tail - head).max()))
        short = self._longest <= self._chunk
        if short:
            # Fewer would save a few steps, and another program takes longer to compile.
            count = max(count, self._num_rows)
        if count != self._num_rows:
            self._num_rows = count
            rows = decode.resize(jax.device_get(self._rows), count, self._replicas)
            self._rows = jax.device_put(rows, self._of_rows)
        # Replicas do not wait for one another within a chunk: it is not cut short.
        fewer = [x for x in self._sizes.row_counts if x < count]
        cut = fewer and self._replicas == 1 and not short
        return np.array([fewer[-1] if cut else 0], np.int32)

    def finish(self, response: Response, *, device_knows: bool) -> None:
        """See `Scheduler.finish`."""
        self._of(response).finish(response, device_knows=device_knows)

    def abort(self, prompt_ids: Container[int]) -> list[Response]:
        """See `Scheduler.abort`."""
        return [r for s in self._schedulers for r in s.abort(prompt_ids)]

    def _of(self, response: Response) -> Scheduler:
        return next(
            s
            for s in self._schedulers
            if s.slots[response.slot] is response  # of two replicas' slots, one's
        )

    def _look(self, steps: decode.Steps) -> list[tuple[Response, int]]:
        found = jax.device_get(steps)
        parts = [
            [np.split(x, self._replicas, axis=1)[i] for x in jax.tree.leaves(found)]
            for i in range(self._replicas)
        ]
        return [
            new
            for scheduler, part in zip(self._schedulers, parts, strict=True)
            for new in scheduler.append(*part)
        ]

    def _prefill(self, plans: Sequence[Plan]) -> None:
        """Prefills and copies what was planned."""
        most = max((len(p.tokens) for made in plans for p in made.rounds[0]), default=1)
        length = self._sizes.prefill_length(most)
        first = [pack(made.rounds[0], length) for made in plans]
        for batch in self._batches(first, self._sizes.prefill_counts(length)):
            self._pages = decode.prefill(
                self._params,
                *self._put([prefill_rows(rows, length) for rows in batch]),
                self._pages,
                run=self._run,
            )
        for rounds in itertools.zip_longest(
            *(made.rounds[1:] for made in plans), fillvalue=[]
        ):
            alone = [[[piece] for piece in pieces] for pieces in rounds]
            most = max(len(piece.tokens) for pieces in rounds for piece in pieces)
            length = self._sizes.continued_lengths(most)[-1]
            counts = self._sizes.prefill_counts(length, FEWEST_CONTINUED)
            for batch in self._batches(alone, counts):
                width = self._schedulers[0].tables.shape[1]
                self._pages = decode.extend(
                    self._params,
                    *self._put([extend_rows(rows, length, width) for rows in batch]),
                    self._pages,
                    run=self._run,
                )
        most = max(len(made.copies) for made in plans)
        if most:
            size = next(n for n in self._sizes.copies if n >= most)
            pairs = np.full((self._replicas, size, 2), -1, np.int32)
            for i, made in enumerate(plans):
                if made.copies:
                    pairs[i, : len(made.copies)] = made.copies
            source, target = pairs.reshape(-1, 2).T
            self._pages = decode.copy(
                self._pages, *self._put([(source, target)]), run=self._run
            )

    def _batches(
        self, rows: Sequence[list[list[PrefillPiece]]], counts: Sequence[int]
    ) -> Iterator[list[list[list[PrefillPiece]]]]:
        """Rows of every replica in batches of one of these sizes. Missing rows are
        empty."""
        for start in range(0, max(map(len, rows)), counts[-1]):
            parts = [part[start : start + counts[-1]] for part in rows]
            count = next(n for n in counts if n >= max(map(len, parts)))
            yield [part + [[]] * (count - len(part)) for part in parts]

    def _put(self, parts: Sequence[tuple[np.ndarray, ...]]) -> list[jax.Array]:
        joined = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
        return jax.device_put(joined, self._of_rows)


class SlotTables:
    """What the device's tables of one replica hold for each slot, besides its pages."""

    def __init__(self, num_slots: int, stop_ids: int):
        def of_slots(dtype, *shape) -> np.ndarray:
            return np.zeros((num_slots, *shape), dtype)

        self._ints = {name: of_slots(np.int32) for name in _INTS}
        self._floats = {name: of_slots(np.float32) for name in _FLOATS}
        self._seeds = of_slots(np.uint32)
        self._stop_ids = of_slots(np.int32, _power_of_two(stop_ids)) - 1
        self._queue, self._tail = of_slots(np.int32), 0

    def write(self, slot: int, response: Response, stop_ids: Sequence[int]) -> None:
        """Fills the slot of a sequence, and queues it behind those that wait to
        begin."""
        request, sampling = response.request, response.request.sampling
        line = {
            "first_token": response.sequence[-1],
            "first_position": response.position,
            "first_count": len(response.tokens),
            "max_tokens": sampling.max_tokens,
            "prompt_ids": request.keyed_by,
            "samples": response.sample,
            "turns": request.turn,
            "top_k": sampling.top_k,
        }
        for name, value in line.items():
            self._ints[name][slot] = value
        for name in _FLOATS:
            self._floats[name][slot] = getattr(sampling, name)
        self._seeds[slot] = request.seed
        self._stop_ids[slot] = -1
        self._stop_ids[slot, : len(stop_ids)] = stop_ids
        self._queue[self._tail % len(self._queue)] = slot
        self._tail += 1

    def make_room(self, stop_ids: int) -> None:
        """For sequences that so many tokens end."""
        room = _power_of_two(stop_ids) - self._stop_ids.shape[1]
        if room > 0:
            pad = ((0, 0), (0, room))
            self._stop_ids = np.pad(self._stop_ids, pad, constant_values=-1)

    def tables(self, scheduler: Scheduler) -> decode.Tables:
        """A copy: the device may read it while the next is written."""
        released = np.zeros(len(self._queue), bool)
        released[scheduler.released] = True
        return jax.tree.map(
            np.array,
            decode.Tables(
                pages=scheduler.tables,
                room=scheduler.room,
                released=released,
                seeds=self._seeds,
                stop_ids=self._stop_ids,
                queue=self._queue,
                tail=np.array([self._tail], np.int32),
                **self._ints,
                **self._floats,
            ),
        )


_FLOATS = ("temperature", "top_p", "min_p")
_INTS = (
    "first_token",
    "first_position",
    "first_count",
    "max_tokens",
    "prompt_ids",
    "samples",
    "turns",
    "top_k",
)


def pack(pieces: Sequence[PrefillPiece], length: int) -> list[list[PrefillPiece]]:
    """Pieces in rows of this length: first fit among the newest rows, the longest
    first."""
    rows: list[list[PrefillPiece]] = []
    room: list[int] = []
    for piece in sorted(pieces, key=lambda piece: -len(piece.tokens)):
        size = len(piece.tokens)
        for i in range(len(rows))[-_LOOK_BACK:]:
            if room[i] >= size and len(rows[i]) < SEQUENCES_PER_ROW:
                break
        else:
            i = len(rows)
            rows.append([])
            room.append(length)
        rows[i].append(piece)
        room[i] -= size
    return rows


_LOOK_BACK = 8


def prefill_rows(
    rows: Sequence[Sequence[PrefillPiece]], length: int
) -> tuple[np.ndarray, ...]:
    """Tokens, positions, sequence ids and places [R, T] of `decode.prefill`."""
    tokens, positions, ids, places = np.zeros((4, len(rows), length), np.int32)
    ids += SEQUENCES_PER_ROW
    places -= 1
    for r, row in enumerate(rows):
        start = 0
        for number, piece in enumerate(row):
            end = start + len(piece.tokens)
            at = np.arange(end - start)
            tokens[r, start:end], positions[r, start:end] = piece.tokens, at
            ids[r, start:end] = number
            pages = np.asarray(piece.pages)
            places[r, start:end] = pages[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE
            start = end
    return tokens, positions, ids, places


def extend_rows(
    rows: Sequence[Sequence[PrefillPiece]], length: int, width: int
) -> tuple[np.ndarray, ...]:
    """Tokens and positions [R, T], and tables [R, n], of `decode.extend`."""
    tokens, positions = np.zeros((2, len(rows), length), np.int32)
    positions -= 1
    tables = np.zeros((len(rows), width), np.int32)
    for r, row in enumerate(rows):
        for piece in row:
            size = len(piece.tokens)
            tokens[r, :size] = piece.tokens
            positions[r, :size] = piece.start + np.arange(size)
            tables[r, : len(piece.pages)] = piece.pages
    return tokens, positions, tables


def abstract(
    run: decode.Run, num_rows: int, num_pages: int
) -> tuple[Pages, decode.Rows]:
    """Shapes, dtypes and shardings of what the device holds.

    Args:
      num_rows, num_pages: of a replica.
    """
    replicas = run.mesh.shape["data"]
    pages = jax.eval_shape(
        lambda: paged.empty(run.arch, replicas * num_pages, PAGE_SIZE, run.cache_dtype)
    )
    rows = jax.eval_shape(lambda: decode.no_rows(num_rows, replicas))
    return _laid_out(run, pages, P("tensor", "data")), _laid_out(run, rows, P("data"))


def abstract_tables(
    run: decode.Run, sizes: Sizes, width: int, num_stop_ids: int
) -> decode.Tables:
    """Shapes, dtypes and shardings of the tables that the host sends to
    `decode.decode`.

    Args:
      num_stop_ids: tokens that end a response.
    """
    scheduler = Scheduler(
        PagePool(1, PAGE_SIZE),
        num_rows=sizes.num_rows,
        num_slots=sizes.num_slots,
        width=width,
        chunk=1,
        max_prefill=1,
    )
    tables = SlotTables(sizes.num_slots, num_stop_ids).tables(scheduler)
    return _laid_out(run, _of_replicas(run, tables), P("data"))


def abstract_ints(run: decode.Run, *shapes: tuple[int, ...]) -> list[Any]:
    """Arrays of int32 that the host sends, of these shapes for each replica."""
    found = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes]
    return _laid_out(run, _of_replicas(run, found), P("data"))


def _of_replicas(run: decode.Run, tree: Any) -> Any:
    count = run.mesh.shape["data"]
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((count * x.shape[0], *x.shape[1:]), x.dtype),
        tree,
    )


def _laid_out(run: decode.Run, tree: Any, spec: P) -> Any:
    sharding = NamedSharding(run.mesh, spec)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
    )


def stop_ids(arch: Architecture, request: Request) -> tuple[int, ...]:
    """Tokens that end a response to it."""
    return arch.eos_token_ids + request.sampling.stop_token_ids


def mode_of(sampling: Sampling, greedy: Mode = "plain") -> Mode:
    """How tokens are drawn, as far as it is compiled.

    Args:
      greedy: where the most likely one is taken, which is the same in every mode.
    """
    if sampling.temperature == 0:
        return greedy
    if sampling.top_k != -1 or sampling.top_p < 1 or sampling.min_p > 0:
        return "truncated"
    return "plain" if sampling.temperature == 1 else "tempered"


def row_length(*tokens: int) -> int:
    """The length of rows that hold so many tokens: a power of two."""
    return max(_FEWEST_TOKENS, *map(_power_of_two, tokens))


def _power_of_two(n: int) -> int:
    return 1 << (max(n, 1) - 1).bit_length()
