"""What flows through a step: prompts, rollouts, rows to train on. One alignment.

P = prompts, G = responses per prompt, B = P * G sequences; R = rows, T = tokens in a
row. Index t of every token array talks about token t. In particular `logprobs[r, t]`
is the log-probability of `tokens[r, t]` given the tokens before it in its sequence, so
no caller ever shifts. Positions where `response_mask` is False hold 0, never garbage.
"""

import bisect
import dataclasses
import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Message = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One question, tokenized. Lives on the host."""

    id: int
    """Index in the data set before shuffling; part of the key of its random numbers."""
    content: str | list[Message]
    """What the data set says: plain text, or chat messages. Reward functions get it."""
    tokens: tuple[int, ...]
    """After the chat template and, where allowed, truncation."""
    columns: Mapping[str, Any]
    """Every other column of the row ("answer", ...), for the reward functions."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One response, as an engine returns it. Lives on the host.

    The three arrays have one entry per sampled token, the stop token included.
    """

    prompt_id: int
    sample: int
    """0 .. G-1: which of the responses to this prompt."""
    tokens: np.ndarray
    """int32 [t]."""
    logprobs: np.ndarray
    """float32 [t], nats: under the distribution that was sampled from (after
    temperature, top-k, top-p and min-p)."""
    raw_logprobs: np.ndarray | None
    """float32 [t], nats: under the model's own distribution (temperature 1, nothing
    cut off); None where an engine does not tell."""
    finish_reason: str
    """"stop": a stop token or string ended it. "length": it reached its limit."""
    weight_version: int
    """The training step that made the weights it was sampled with."""
    text: str
    """Decoded, without special tokens and without the stop string."""
    top_tokens: np.ndarray | None = None
    """int32 [t, N]: the most likely ones at every position, the first first; None where
    none were asked for."""
    top_logprobs: np.ndarray | None = None
    """float32 [t, N], nats: theirs, under the distribution that was sampled from; at
    temperature 0, where that is a single token, under softmax(logits)."""
    prompt_logprobs: np.ndarray | None = None
    """float32 [p - 1], nats: of the prompt's tokens but the first, under the model's
    own distribution; None where they were not asked for."""


@no_type_check  # JAX also builds such trees of NumPy arrays, shapes or shardings
@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TrainBatch:
    """Sequences (prompt, then response) in rows, scored and ready for an update.

    A row holds one or more whole sequences one after the other, then padding. With
    shared prompts it holds a prompt once, then several responses to it, each of which
    goes on from the prompt. NumPy arrays on the host, JAX arrays on devices.
    """

    tokens: Int[Array, "R T"]
    sequence_ids: Int[Array, "R T"]
    """Which sequence of the batch a token belongs to, 0 .. num_sequences - 1; -1 on
    padding. A shared prompt belongs to the first response behind it."""
    positions: Int[Array, "R T"]
    """Index of a token within its sequence, from 0."""
    response_mask: Bool[Array, "R T"]
    """True on tokens the policy sampled, the stop token included."""
    sampler_logprobs: Float[Array, "R T"]
    """Under the distribution that was sampled from, nats."""
    advantages: Float[Array, "R T"]
    ref_logprobs: Float[Array, "R T"] | None = None
    """Under the reference policy, nats; None without one."""
    old_logprobs: Float[Array, "R T"] | None = None
    """Under the policy that the trust region is centred on, nats.

    None: that is the policy before this very update, so the update takes its own
    log-probabilities, not differentiated: ratio = exp(logprobs - sg(logprobs)), whose
    value is 1 and whose gradient is that of logprobs. Exact for the first update after
    generation, without another forward pass."""
    values: Float[Array, "R T"] | None = None
    """Of the state before the token, by the critic before the update; None without
    one."""
    returns: Float[Array, "R T"] | None = None
    """What `values` should have been; None without a critic."""
    prompt_ids: Int[Array, "R T"] | None = None
    """Which copy of a prompt a token belongs to or goes on from; -1 on padding. None:
    every sequence has its own prompt."""
    num_sequences: int = dataclasses.field(metadata={"static": True})
    """Sequence ids are below it. An id that no token has is a sequence without tokens,
    which counts nowhere."""
    sequence_capacity: int = dataclasses.field(metadata={"static": True})
    """No row holds more sequences, with padding at its end counted as one: what flash
    attention must make room for."""


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
    `grpo.accumulate` skips."""
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
    """Real tokens over those that `grpo.accumulate` computes, padding included."""
    num_rows, length = batch.tokens.shape
    together = min(micro_batch_size or num_rows, num_rows)
    count = -(-num_rows // together)
    in_use = (batch.sequence_ids >= 0).any(axis=1)
    in_use = np.pad(in_use, (0, count * together - num_rows))
    last = in_use.reshape(together, count).any(axis=0).nonzero()[0].max() + 1
    return float((batch.sequence_ids >= 0).sum() / (last * together * length))


def pad_rows(batch: TrainBatch, num_rows: int, length: int | None = None) -> TrainBatch:
    """`batch` with rows of padding added up to `num_rows`, and padding at the end of
    rows up to `length`, if given; JAX arrays."""
    rows, tokens = batch.tokens.shape
    extra = ((0, num_rows - rows), (0, (length or tokens) - tokens))
    padded = jax.tree.map(lambda x: jnp.pad(x, extra), batch)
    ids = jnp.pad(batch.sequence_ids, extra, constant_values=-1)
    return dataclasses.replace(padded, sequence_ids=ids)


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


def previous_tokens(batch: TrainBatch) -> Int[Array, "R T"] | None:
    """Where in its row the token before each response token stands, if that is not
    always to its left: before the first token of a response is the end of its prompt.
    """
    if batch.prompt_ids is None:
        return None
    place = jnp.broadcast_to(
        jnp.arange(batch.tokens.shape[1])[None], batch.tokens.shape
    )
    is_prompt = ~batch.response_mask & (batch.sequence_ids >= 0)
    end_of_prompt = jax.lax.cummax(jnp.where(is_prompt, place, 0), axis=1)
    left = jnp.maximum(place - 1, 0)

    def of_left(x):
        return jnp.take_along_axis(x, left, axis=1)

    goes_on = of_left(batch.response_mask) & (
        of_left(batch.sequence_ids) == batch.sequence_ids
    )
    return jnp.where(goes_on, left, end_of_prompt)


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
            # Micro-batch m has the rows m, m + M, ...: see `grpo.accumulate`.
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
