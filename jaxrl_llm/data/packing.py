"""How sequences are laid out in rows: packing, mini-batches, shared prompts."""

import bisect
import dataclasses
import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Float

from jaxrl_llm.data.rows import TrainBatch
from jaxrl_llm.data.types import Episode, Prompt


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How sequences are laid out in rows."""

    pack_length: int | None = None
    """Tokens in a row, which several sequences share. Rows of `sequences_together` if
    not given."""
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
    """No sequence can be longer. With it, the shape of the rows does not depend on how
    long the sequences are, so that what takes them is compiled once; without it, number
    and length of rows are those needed, rounded up to a `bucket`."""
    most_sequences: int | None = None
    """Rows are laid out as for so many sequences, if there are fewer."""
    sequences_together: int = 1
    """So many neighbouring sequences always share a row, packed or not, and with it a
    micro-batch: 2 for pairs that a loss compares."""
    contexts: int = 1
    """Contexts of a sequence, at most. Rows have `TrainBatch.contexts` if there can be
    several."""

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value is not None and not isinstance(value, bool) and value < 1:
                raise ValueError(f"{name} is {value}; it must be positive")


def make_rows(
    prompts: Sequence[Prompt],
    episodes: Sequence[Sequence[Episode]],
    advantages: Float[np.ndarray, "P G"],
    *,
    layout: Layout = Layout(),
) -> TrainBatch:
    """Lays out prompts and the episodes that begin with them as NumPy rows.

    Sequence p * G + g is episode g of prompt p.

    Args:
      episodes: G of them for every prompt, by sample.

    Raises:
      ValueError: the arguments do not belong together, a prompt is empty, an episode
        has more contexts than `layout.contexts`, or what must share a row is longer
        than `pack_length`.
    """
    P, G = advantages.shape
    groups = [len(group) for group in episodes]
    if len(prompts) != P or groups != [G] * P:
        raise ValueError(
            f"advantages are {P} x {G}, but there are {len(prompts)} prompts with "
            f"{groups} episodes"
        )
    for prompt, group in zip(prompts, episodes, strict=True):
        for episode in group:
            if not episode.first_tokens(prompt):
                raise ValueError(
                    f"prompt {prompt.id} has no tokens; nothing to condition on"
                )
            if episode.prompt_id != prompt.id:
                raise ValueError(
                    f"an episode of prompt {episode.prompt_id} stands with prompt "
                    f"{prompt.id}"
                )
            if episode.num_contexts > layout.contexts:
                raise ValueError(
                    f"episode {episode.sample} of prompt {prompt.id} has "
                    f"{episode.num_contexts} contexts, the layout has room for "
                    f"{layout.contexts}"
                )
    one_row = _one_row(prompts, episodes, advantages, layout.contexts > 1)
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
      ValueError: `group_size` does not divide the number of sequences, or a group would
        part what `layout.sequences_together` keeps together.
    """
    if batch.num_sequences % group_size:
        raise ValueError(
            f"{batch.num_sequences} sequences are no whole number of groups of "
            f"{group_size}"
        )
    if group_size % layout.sequences_together:
        raise ValueError(
            f"groups of {group_size} are no whole number of sequences_together "
            f"{layout.sequences_together}, which a shuffle would part"
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


def lay_out(
    lengths: Sequence[int],
    row_length: int | None,
    most: int | None = None,
    counts: Sequence[int] | None = None,
) -> list[list[int]]:
    """Which sequences share a row: in few rows, of about as many tokens each.

    At most 3 % more rows than best-fit decreasing needs (the longest goes first, each
    into the fullest row that has room). Where they can be, they are balanced (the
    longest goes first, each into the emptiest row). One sequence per row without a
    length.

    Args:
      most: sequences in a row.
      counts: as how many each counts there; as one if not given.

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
    counts = [1] * len(lengths) if counts is None else counts
    most = most or sum(counts)
    fitting = _best_fit(lengths, counts, order, row_length, most)
    fewest = max(-(-sum(lengths) // row_length), -(-sum(counts) // max(most, 1)))
    for num_rows in range(fewest, len(fitting) + len(fitting) // 32 + 1):
        if rows := _balanced(lengths, counts, order, num_rows, row_length, most):
            return rows
    return fitting


def _best_fit(
    lengths: Sequence[int],
    counts: Sequence[int],
    order: Sequence[int],
    row_length: int,
    most: int,
) -> list[list[int]]:
    rows: list[list[int]] = []
    held: list[int] = []
    rooms: list[tuple[int, int]] = []  # (tokens that still fit, row), sorted
    for i in order:
        fit = bisect.bisect_left(rooms, (lengths[i], 0))
        while fit < len(rooms) and held[rooms[fit][1]] + counts[i] > most:
            fit += 1
        if fit == len(rooms):
            rows.append([])
            held.append(0)
            rooms.append((row_length, len(rows) - 1))
        room, row = rooms.pop(fit)
        rows[row].append(i)
        held[row] += counts[i]
        if held[row] < most:
            bisect.insort(rooms, (room - lengths[i], row))
    return rows


def _balanced(
    lengths: Sequence[int],
    counts: Sequence[int],
    order: Sequence[int],
    num_rows: int,
    row_length: int,
    most: int,
) -> list[list[int]] | None:
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    held = [0] * num_rows
    emptiest = [(0, r) for r in range(num_rows)]  # (tokens, row), a heap
    for i in order:
        full = []
        while emptiest and held[emptiest[0][1]] + counts[i] > most:
            full.append(heapq.heappop(emptiest))
        if not emptiest or emptiest[0][0] + lengths[i] > row_length:
            return None
        used, r = heapq.heappop(emptiest)
        rows[r].append(i)
        held[r] += counts[i]
        for other in full:
            heapq.heappush(emptiest, other)
        if held[r] < most:
            heapq.heappush(emptiest, (used + lengths[i], r))
    return rows


def bucket(n: int, step: int = 1) -> int:
    """n rounded up to a multiple of `step`, or of 2^k / 8 if that is more, where
    2^k < n <= 2^(k + 1).

    Adds less than `step` or an eighth of n; every doubling has at most eight sizes.
    """
    step = max(step, 1 << (n - 1).bit_length() >> 4)
    return -(-n // step) * step


def capacity(sequences: int) -> int:
    """Room for so many sequences in a row and padding behind them, which counts as one:
    2, or a power of two that is at least 8. What is compiled for more room than there
    are sequences takes longer on a GPU: of rows of 4,096 tokens on an H100 by about 0.4
    % for each."""
    return 2 if sequences == 1 else max(8, 1 << sequences.bit_length())


def most_in_row(layout: Layout) -> int:
    """Contexts in a row, at most: in a packed one about as many as there are 64 tokens
    in it, from 15 to 63, and never fewer than what fits of the longest sequences."""
    together = layout.sequences_together * layout.contexts
    if layout.pack_length is None:
        return together
    fit = layout.pack_length // (layout.longest or layout.pack_length)
    room = min(max(layout.pack_length // 64 - 1, 15), 63)
    return max(fit * layout.contexts, room, together)


def capacities(layout: Layout) -> list[int]:
    """Every `capacity` that rows of this layout can have."""
    if layout.pack_length is None:
        return [capacity(most_in_row(layout))]
    last = capacity(most_in_row(layout))
    return [1 << i for i in range(3, last.bit_length())]


def _one_row(
    prompts: Sequence[Prompt],
    episodes: Sequence[Sequence[Episode]],
    advantages: Float[np.ndarray, "P G"],
    with_contexts: bool,
) -> TrainBatch:
    """All sequences one after the other, without padding."""
    flat = [episode for group in episodes for episode in group]
    begun = []
    for prompt, group in zip(prompts, episodes, strict=True):
        own = np.asarray(prompt.tokens, np.int32)
        begun += [
            own if e.opening_tokens is None else np.asarray(e.opening_tokens, np.int32)
            for e in group
        ]
    before = np.array([len(tokens) for tokens in begun])
    lengths = before + [len(episode.tokens) for episode in flat]
    ids = np.repeat(np.arange(len(flat), dtype=np.int32), lengths)
    positions = np.arange(len(ids)) - np.repeat(lengths.cumsum() - lengths, lengths)
    is_prompt = positions < np.repeat(before, lengths)
    whole = [x for b, e in zip(begun, flat, strict=True) for x in (b, e.tokens)]
    mask, logprobs = np.zeros(len(ids), bool), np.zeros(len(ids), np.float32)
    mask[~is_prompt] = np.concatenate([episode.response_mask for episode in flat])
    logprobs[~is_prompt] = np.concatenate([episode.logprobs for episode in flat])
    worth = advantages.ravel().astype(np.float32)[ids]
    contexts = np.zeros(len(ids), np.int32)
    contexts[~is_prompt] = np.concatenate([episode.contexts for episode in flat])
    index = np.arange(len(ids))
    begins = (np.diff(ids, prepend=0) != 0) | (np.diff(contexts, prepend=0) != 0)
    start = np.maximum.accumulate(np.where(begins, index, 0))
    fields = {
        "tokens": np.concatenate(whole).astype(np.int32),
        "sequence_ids": ids,
        "positions": (index - start).astype(np.int32),
        "is_prompt": is_prompt,
        "response_mask": mask,
        "sampler_logprobs": np.where(mask, logprobs, np.float32(0)),
        "advantages": np.where(mask, worth, np.float32(0)),
    }
    if with_contexts:
        fields["contexts"] = contexts
    return TrainBatch(
        **{name: x[None] for name, x in fields.items()},
        num_sequences=len(flat),
        sequence_capacity=0,  # decided with the layout
    )


def _arrange(
    batch: TrainBatch, parts: Sequence[Sequence[int]], layout: Layout
) -> list[TrainBatch]:
    """The sequences of each part in rows of their own; all parts have one shape."""
    counts = _num_contexts(batch)
    contexts = max(layout.contexts, *counts)
    layout = dataclasses.replace(layout, contexts=contexts)
    laid_out = [_rows(batch, part, counts, layout) for part in parts]
    most = max(layout.most_sequences or 0, *map(len, parts))
    longest = max(
        sum(len(span) for _, _, span in row) for rows in laid_out for row in rows
    )
    known = (layout.longest or 0) * layout.sequences_together
    multiple = layout.length_multiple
    length = layout.pack_length or bucket(max(longest, known), step=16)
    length = -(-length // multiple) * multiple
    num_rows = _num_rows(max(map(len, laid_out)), most, layout)
    static = {
        "num_sequences": most,
        "sequence_capacity": capacity(
            most_in_row(layout)
            if layout.pack_length is None
            else max(
                sum(counts[part[i]] for i, _, _ in row)
                for part, rows in zip(parts, laid_out, strict=True)
                for row in rows
            )
        ),
    }
    together = min(layout.micro_batch_size or num_rows, num_rows)
    in_order = layout.pack_length is None and layout.most_sequences is None

    def fill(rows: list["_Row"]) -> TrainBatch:
        shape = num_rows, length
        source, ids = np.full(shape, -1), np.full(shape, -1, np.int32)
        copies = np.full(shape, -1, np.int32)
        for i, row in enumerate(rows):
            # Micro-batch m has the rows m, m + M, ...: see `update.accumulate`.
            r = i
            if not in_order:
                r = i % together * (num_rows // together) + i // together
            sizes = [len(span) for _, _, span in row]
            source[r, : sum(sizes)] = np.concatenate([span for _, _, span in row])
            ids[r, : sum(sizes)] = np.repeat([i for i, _, _ in row], sizes)
            copies[r, : sum(sizes)] = np.repeat([copy for _, copy, _ in row], sizes)

        def move(x: np.ndarray) -> np.ndarray:
            empty = (source < 0).reshape(shape + (1,) * (x.ndim - 2))
            found = x.reshape(-1, *x.shape[2:])[source]
            return np.where(empty, x.dtype.type(0), found)

        moved = jax.tree.map(move, dataclasses.replace(batch, prompt_ids=None))
        return dataclasses.replace(
            moved,
            sequence_ids=ids,
            prompt_ids=copies if layout.share_prompts else None,
            **static,
        )

    return [fill(rows) for rows in laid_out]


# Index in its part, copy of its prompt, and which tokens of the batch to take.
_Row = list[tuple[int, int, np.ndarray]]


def _num_contexts(batch: TrainBatch) -> list[int]:
    """How many contexts each sequence has."""
    found = np.ones(batch.num_sequences, np.int64)
    if batch.contexts is not None:
        there = batch.sequence_ids >= 0
        np.maximum.at(found, batch.sequence_ids[there], batch.contexts[there] + 1)
    return found.tolist()


def _rows(
    batch: TrainBatch, part: Sequence[int], counts: Sequence[int], layout: Layout
) -> list[_Row]:
    """The rows of the sequences `part`; packed ones by falling cost of attention."""
    prompts, responses = _spans(batch)
    together, row_length = layout.sequences_together, layout.pack_length
    if len(part) % together:
        raise ValueError(
            f"{len(part)} sequences are no whole number of sequences_together "
            f"{together}, which share a row"
        )
    if layout.share_prompts:
        tokens = batch.tokens.ravel()
        blocks = _sharing(
            [tokens[prompts[s]].tolist() for s in part],
            [len(responses[s]) for s in part],
            row_length,
            together,
        )
    else:
        starts = range(0, len(part), together)
        blocks = [[[i] for i in range(start, start + together)] for start in starts]
    number = itertools.count()

    def pieces(copy: Sequence[int]) -> _Row:
        (first, *others), of = copy, next(number)
        whole = np.concatenate([prompts[part[first]], responses[part[first]]])
        rest = [(i, of, responses[part[i]]) for i in others]
        return [(first, of, whole), *rest]

    held, sizes, costs, contexts = [], [], [], []
    for block in blocks:
        copies = [pieces(copy) for copy in block]
        lengths = [sum(len(span) for _, _, span in copy) for copy in copies]
        held.append([piece for copy in copies for piece in copy])
        sizes.append(sum(lengths))
        contexts.append(sum(counts[part[i]] for copy in block for i in copy))
        costs.append(sum(length**2 for length in lengths))
        if together > 1 and row_length is not None and sizes[-1] > row_length:
            raise ValueError(
                f"sequences {block[0][0]} to {block[-1][-1]} have {sizes[-1]} tokens, "
                f"more than pack_length {row_length}, and must share a row"
            )
    limits: list[int | None] = [None]
    if not layout.share_prompts:
        rooms = [min(n - 1, most_in_row(layout)) for n in capacities(layout)]
        limits = [room for room in rooms if room >= max(contexts)]
    rows = _lay_out_evenly(sizes, contexts, row_length, limits)
    if row_length is not None:
        rows.sort(key=lambda row: -sum(costs[block] for block in row))
    return [[piece for block in row for piece in held[block]] for row in rows]


def _lay_out_evenly(
    lengths: Sequence[int],
    counts: Sequence[int],
    row_length: int | None,
    limits: Sequence[int | None],
) -> list[list[int]]:
    """`lay_out` with the first limit of contexts in a row that makes no more rows than
    the last one, which is the widest: less room takes less time, see `capacity`."""
    *others, widest = limits
    rows = lay_out(lengths, row_length, widest, counts)
    for most in others:
        if sum(counts) <= most * len(rows):
            found = lay_out(lengths, row_length, most, counts)
            if len(found) <= len(rows):
                return found
    return rows


def _spans(batch: TrainBatch) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """For each sequence, where its prompt and what follows it stand in the batch."""
    ids, is_prompt = batch.sequence_ids.ravel(), batch.is_prompt.ravel()

    def by_id(chosen: np.ndarray) -> list[np.ndarray]:
        order = np.flatnonzero(chosen)
        order = order[np.argsort(ids[order], kind="stable")]
        bounds = np.searchsorted(ids[order], np.arange(batch.num_sequences + 1))
        return [order[a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]

    prompts, responses = by_id(is_prompt), by_id(~is_prompt & (ids >= 0))
    if batch.prompt_ids is not None:
        copies = batch.prompt_ids.ravel()
        held = {copies[prompt[0]]: prompt for prompt in prompts if len(prompt)}
        prompts = [
            held[copies[response[0]]] if len(response) else prompt
            for prompt, response in zip(prompts, responses, strict=True)
        ]
    return prompts, responses


def _sharing(
    prompts: Sequence[list[int]],
    sizes: Sequence[int],
    row_length: int,
    together: int,
) -> list[list[list[int]]]:
    """Which responses stand behind one copy of their prompt: neighbours with the same
    prompt, as many as a row has room for.

    Args:
      prompts: their tokens.
      sizes: tokens of each response.
      together: so many neighbours may not be parted.

    Returns:
      Blocks of copies of responses; a block is in one row.
    """
    other = [i == 0 or prompt != prompts[i - 1] for i, prompt in enumerate(prompts)]
    blocks: list[list[list[int]]] = []
    room = 0
    for start in range(0, len(prompts), together):
        added = range(start, start + together)
        needed = sum(sizes[i] + other[i] * len(prompts[i]) for i in added)
        opens = other[start] or needed > room
        if opens:
            blocks.append([])
            room = row_length
            needed += len(prompts[start]) * (not other[start])
        for i in added:
            if other[i] or (opens and i == start):
                blocks[-1].append([])
            blocks[-1][-1].append(i)
        room -= needed
    return blocks


def _num_rows(needed: int, num_sequences: int, layout: Layout) -> int:
    """Rows of one part, of which `needed` are in use."""
    multiple, together = layout.rows_multiple, layout.micro_batch_size
    if layout.pack_length is None:
        needed = num_sequences // layout.sequences_together
    else:  # what is needed differs from step to step
        if layout.longest:
            size = layout.sequences_together * layout.longest
            blocks = num_sequences // layout.sequences_together
            needed = max(needed, -(-blocks // max(layout.pack_length // size, 1)))
        else:
            needed = bucket(needed)
    if together and needed > together:
        multiple = math.lcm(multiple, together)
    return -(-needed // multiple) * multiple
