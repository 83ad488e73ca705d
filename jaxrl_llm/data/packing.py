"""How sequences are laid out in rows: packing, mini-batches, shared prompts."""

import bisect
import dataclasses
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Float

from jaxrl_llm.data.rows import TrainBatch
from jaxrl_llm.data.types import Completion, Prompt


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How sequences are laid out in rows."""

    pack_length: int | None = None
    """Tokens in a row, which several sequences share. One sequence per row if not
    given; rows are then as long as the longest, rounded up to a `bucket`."""
    rows_multiple: int = 1
    """Devices that rows are split over: the number of rows is a multiple of it."""
    micro_batch_size: int | None = None
    """Rows that are computed together. Each such part gets rows of about the same cost
    for all devices, and rows of padding come in parts of their own, which
    `update.accumulate` skips."""
    share_prompts: bool = False
    """The responses to a prompt share one copy of it, as many as fit a row. Needs
    `pack_length`, and attention that knows of it: `attention.shared_prompts`."""
    length_multiple: int = 1
    """Devices that a row is split over; `pack_length` is a multiple of it."""
    longest: int | None = None
    """No sequence can be longer. With it and `micro_batch_size`, the number of packed
    rows does not depend on how long the sequences are, so that an update is compiled
    once; it is rounded up to a `bucket` without them."""


def make_rows(
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Completion]],
    advantages: Float[np.ndarray, "P G"],
    *,
    layout: Layout = Layout(),
) -> TrainBatch:
    """Lays out prompts and their completions as NumPy rows.

    Sequence p * G + g is response g to prompt p.

    Args:
      completions: G of them for every prompt, by sample.

    Raises:
      ValueError: the arguments do not belong together, a prompt is empty, or a sequence
        is longer than `pack_length`.
    """
    P, G = advantages.shape
    groups = [len(group) for group in completions]
    if len(prompts) != P or groups != [G] * P:
        raise ValueError(
            f"advantages are {P} x {G}, but there are {len(prompts)} prompts with "
            f"{groups} completions"
        )
    values = advantages.tolist()
    sequences = [
        _sequence(p * G + g, P * G, prompts[p], completions[p][g], values[p][g])
        for p in range(P)
        for g in range(G)
    ]
    one_row = jax.tree.map(lambda *x: np.concatenate(x, axis=1), *sequences)
    return _arrange(one_row, [range(P * G)], layout)[0]


def mini_batches(
    batch: TrainBatch,
    num_prompts: int,
    group_size: int,
    *,
    layout: Layout = Layout(),
    seed: int | None = None,
) -> list[TrainBatch]:
    """Splits `batch` into parts of `num_prompts` prompts, all of the same shape.

    The last part may hold fewer; rows of padding make up for them. Sequence ids are
    counted anew in each part.

    Args:
      batch: NumPy arrays. Sequence p * group_size + g is response g to prompt p.
      seed: of a random order of the prompts; their own order if not given.

    Raises:
      ValueError: `group_size` does not divide the number of sequences.
    """
    if batch.num_sequences % group_size:
        raise ValueError(
            f"{batch.num_sequences} sequences are no whole number of groups of "
            f"{group_size}"
        )
    groups = np.arange(batch.num_sequences).reshape(-1, group_size)
    if seed is not None:
        groups = np.random.default_rng(seed).permutation(groups)
    starts = range(0, len(groups), num_prompts)
    parts = [groups[start : start + num_prompts].ravel().tolist() for start in starts]
    return _arrange(batch, parts, layout)


def take(
    batch: TrainBatch, sequences: Sequence[int], *, layout: Layout = Layout()
) -> TrainBatch:
    """The given sequences of `batch`, perhaps some of them several times.

    Sequence i of the result is sequence `sequences[i]` of `batch`.

    Args:
      batch: NumPy arrays.
    """
    return _arrange(batch, [sequences], layout)[0]


def token_efficiency(batch: TrainBatch, micro_batch_size: int | None) -> float:
    """Real tokens over those that `update.accumulate` computes, padding included."""
    num_rows, length = batch.tokens.shape
    together = min(micro_batch_size or num_rows, num_rows)
    count = -(-num_rows // together)
    in_use = (batch.sequence_ids >= 0).any(axis=1)
    in_use = np.pad(in_use, (0, count * together - num_rows))
    last = in_use.reshape(together, count).any(axis=0).nonzero()[0].max() + 1
    return float((batch.sequence_ids >= 0).sum() / (last * together * length))


def lay_out(lengths: Sequence[int], row_length: int | None) -> list[list[int]]:
    """Which sequences share a row: in few rows, of about as many tokens each.

    At most 3 % more rows than best-fit decreasing needs (the longest goes first, each
    into the fullest row that has room). Where they can be, they are balanced (the
    longest goes first, each into the emptiest row). One sequence per row without a
    length.

    Returns:
      Indices into `lengths`, row by row.

    Raises:
      ValueError: a sequence is longer than a row.

    Source: Johnson et al. 1974 (doi:10.1137/0203025), best fit; Graham 1969
    (doi:10.1137/0117039), balance.
    """
    if row_length is None:
        return [[i] for i in range(len(lengths))]
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if lengths and lengths[order[0]] > row_length:
        raise ValueError(
            f"sequence {order[0]} has {lengths[order[0]]} tokens, more than "
            f"pack_length {row_length}"
        )
    fitting = _best_fit(lengths, order, row_length)
    most = len(fitting) + len(fitting) // 32
    for num_rows in range(-(-sum(lengths) // row_length), most + 1):
        if rows := _balanced(lengths, order, num_rows, row_length):
            return rows
    return fitting


def _best_fit(
    lengths: Sequence[int], order: Sequence[int], row_length: int
) -> list[list[int]]:
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens that still fit, row), sorted
    for i in order:
        fit = bisect.bisect_left(rooms, (lengths[i], 0))
        if fit == len(rooms):
            rows.append([])
            rooms.append((row_length, len(rows) - 1))
        room, row = rooms.pop(fit)
        rows[row].append(i)
        bisect.insort(rooms, (room - lengths[i], row))
    return rows


def _balanced(
    lengths: Sequence[int], order: Sequence[int], num_rows: int, row_length: int
) -> list[list[int]] | None:
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    emptiest = [(0, r) for r in range(num_rows)]  # (tokens, row), a heap
    for i in order:
        used, r = emptiest[0]
        if used + lengths[i] > row_length:
            return None
        heapq.heapreplace(emptiest, (used + lengths[i], r))
        rows[r].append(i)
    return rows


def bucket(n: int, step: int = 1) -> int:
    """n rounded up to a multiple of `step`, or of 2^k / 8 if that is more, where
    2^k < n <= 2^(k + 1).

    Adds less than `step` or an eighth of n; every doubling has at most eight sizes.
    """
    step = max(step, 1 << (n - 1).bit_length() >> 4)
    return -(-n // step) * step


def _sequence(
    index: int,
    num_sequences: int,
    prompt: Prompt,
    completion: Completion,
    advantage: float,
) -> TrainBatch:
    """One row, one sequence, no padding."""
    if completion.prompt_id != prompt.id:
        raise ValueError(
            f"a completion of prompt {completion.prompt_id} stands with prompt "
            f"{prompt.id}"
        )
    if len(completion.logprobs) != len(completion.tokens):
        raise ValueError(
            f"completion {completion.sample} of prompt {prompt.id} has "
            f"{len(completion.tokens)} tokens but {len(completion.logprobs)} logprobs"
        )
    if not prompt.tokens:
        raise ValueError(f"prompt {prompt.id} has no tokens; nothing to condition on")
    start, length = len(prompt.tokens), len(prompt.tokens) + len(completion.tokens)
    mask = np.arange(length) >= start
    logprobs = np.concatenate([np.zeros(start), completion.logprobs])
    return TrainBatch(
        tokens=np.concatenate([prompt.tokens, completion.tokens])[None].astype(
            np.int32
        ),
        sequence_ids=np.full((1, length), index, np.int32),
        positions=np.arange(length, dtype=np.int32)[None],
        response_mask=mask[None],
        sampler_logprobs=logprobs[None].astype(np.float32),
        advantages=np.where(mask, advantage, 0.0)[None].astype(np.float32),
        num_sequences=num_sequences,
        sequence_capacity=0,  # decided with the layout
    )


def _arrange(
    batch: TrainBatch, parts: Sequence[Sequence[int]], layout: Layout
) -> list[TrainBatch]:
    """The sequences of each part in rows of their own; all parts have one shape."""
    laid_out = [_rows(batch, part, layout) for part in parts]
    most = max(map(len, parts))
    longest = max(len(span) for rows in laid_out for row in rows for _, _, span in row)
    multiple = layout.length_multiple
    length = layout.pack_length or bucket(longest, step=16)
    length = -(-length // multiple) * multiple
    num_rows = _num_rows(max(map(len, laid_out)), most, layout)
    per_row = 1 + max(len(row) for rows in laid_out for row in rows)
    static = {
        "num_sequences": most,
        "sequence_capacity": bucket(per_row, step=2),
    }
    together = min(layout.micro_batch_size or num_rows, num_rows)

    def fill(rows: list["_Row"]) -> TrainBatch:
        shape = num_rows, length
        source, ids = np.full(shape, -1), np.full(shape, -1, np.int32)
        copies = np.full(shape, -1, np.int32)
        for i, row in enumerate(rows):
            # Micro-batch m has the rows m, m + M, ...: see `update.accumulate`.
            r = i
            if layout.pack_length is not None:
                r = i % together * (num_rows // together) + i // together
            sizes = [len(span) for _, _, span in row]
            source[r, : sum(sizes)] = np.concatenate([span for _, _, span in row])
            ids[r, : sum(sizes)] = np.repeat([i for i, _, _ in row], sizes)
            copies[r, : sum(sizes)] = np.repeat([copy for _, copy, _ in row], sizes)
        moved = jax.tree.map(
            lambda x: np.where(source < 0, x.dtype.type(0), x.ravel()[source]),
            dataclasses.replace(batch, prompt_ids=None),
        )
        return dataclasses.replace(
            moved,
            sequence_ids=ids,
            prompt_ids=copies if layout.share_prompts else None,
            **static,
        )

    return [fill(rows) for rows in laid_out]


# Index in its part, copy of its prompt, and which tokens of the batch to take.
_Row = list[tuple[int, int, np.ndarray]]


def _rows(batch: TrainBatch, part: Sequence[int], layout: Layout) -> list[_Row]:
    """The rows of the sequences `part`; packed ones by falling cost of attention."""
    prompts, responses = _spans(batch)
    if not layout.share_prompts:
        units = [[i] for i in range(len(part))]
    else:
        tokens = batch.tokens.ravel()
        units = _sharing(
            [tokens[prompts[s]].tolist() for s in part],
            [len(responses[s]) for s in part],
            layout.pack_length,
        )

    def pieces(copy: int) -> _Row:
        first, *others = units[copy]
        whole = np.concatenate([prompts[part[first]], responses[part[first]]])
        rest = [(i, copy, responses[part[i]]) for i in others]
        return [(first, copy, whole), *rest]

    held = [pieces(copy) for copy in range(len(units))]
    sizes = [sum(len(span) for _, _, span in pieces) for pieces in held]
    rows = lay_out(sizes, layout.pack_length)
    if layout.pack_length is not None:
        rows.sort(key=lambda row: -sum(sizes[copy] ** 2 for copy in row))
    return [[piece for copy in row for piece in held[copy]] for row in rows]


def _spans(batch: TrainBatch) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """For each sequence, where its prompt and where its response stand in the batch."""
    ids, response = batch.sequence_ids.ravel(), batch.response_mask.ravel()

    def by_id(chosen: np.ndarray) -> list[np.ndarray]:
        order = np.flatnonzero(chosen)
        order = order[np.argsort(ids[order], kind="stable")]
        bounds = np.searchsorted(ids[order], np.arange(batch.num_sequences + 1))
        return [order[a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]

    prompts, responses = by_id(~response & (ids >= 0)), by_id(response)
    if batch.prompt_ids is not None:
        copies = batch.prompt_ids.ravel()
        held = {copies[prompt[0]]: prompt for prompt in prompts if len(prompt)}
        prompts = [
            held[copies[response[0]]] if len(response) else response
            for response in responses
        ]
    return prompts, responses


def _sharing(
    prompts: Sequence[list[int]], sizes: Sequence[int], row_length: int
) -> list[list[int]]:
    """Which responses stand behind one copy of their prompt: neighbours with the same
    prompt, as many as a row has room for.

    Args:
      prompts: their tokens.
      sizes: tokens of each response.
    """
    units: list[list[int]] = []
    room = 0
    for i, (prompt, size) in enumerate(zip(prompts, sizes, strict=True)):
        if i == 0 or size > room or prompt != prompts[i - 1]:
            units.append([])
            room = row_length - len(prompt)
        units[-1].append(i)
        room -= size
    return units


def _num_rows(needed: int, num_sequences: int, layout: Layout) -> int:
    """Rows of one part, of which `needed` are in use."""
    multiple, together = layout.rows_multiple, layout.micro_batch_size
    if layout.pack_length is not None:  # what is needed differs from step to step
        if together and layout.longest:
            needed = max(
                needed,
                -(-num_sequences // max(layout.pack_length // layout.longest, 1)),
            )
        else:
            needed = bucket(needed)
    if together and needed > together:
        multiple = math.lcm(multiple, together)
    return -(-needed // multiple) * multiple
