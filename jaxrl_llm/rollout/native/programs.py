"""The programs of generation: prefill, decode steps, and copies of pages.

The host sends tables of sequences and the order in which they begin; the device decodes
a chunk of steps by itself. Where a sequence ends, the next one takes its row at once.

B = rows, N = slots of the tables, n = pages of the longest sequence; of one replica.
With many replicas (mesh axis "data") each runs the program on its own rows, slots and
pages, and arrays hold those of all of them, one after the other.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Key, UInt

from jaxrl_llm import models
from jaxrl_llm.algorithms import logprobs
from jaxrl_llm.models import Architecture, Pages, grouped, moe
from jaxrl_llm.models.attention import paged
from jaxrl_llm.models.attention.packed import PackedAttention
from jaxrl_llm.rollout.native.sampling import Mode, Sampled, row_keys, sample
from jaxrl_llm.sharding.mesh import platform_of

_UNWATCHED = 8
"""Steps between two looks at whether any row still runs: a GPU's host waits for the
answer."""


@no_type_check  # JAX also builds such trees of NumPy arrays, shapes or specs
@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Tables:
    """What the host says of the sequence in every slot."""

    pages: Int[Array, "N n"]
    room: Int[Array, " N"]
    """Positions in its pages. A row that has filled them waits."""
    released: Bool[Array, " N"]
    """The host has released its slot: the row is to leave it."""
    first_token: Int[Array, " N"]
    """The newest when the sequence was laid out: its key and value are in no page."""
    first_position: Int[Array, " N"]
    first_count: Int[Array, " N"]
    """Tokens sampled until then."""
    max_tokens: Int[Array, " N"]
    stop_ids: Int[Array, "N s"]
    """Token ids that end it; -1 fills up."""
    seeds: UInt[Array, " N"]
    prompt_ids: Int[Array, " N"]
    samples: Int[Array, " N"]
    turns: Int[Array, " N"]
    temperature: Float[Array, " N"]
    top_k: Int[Array, " N"]
    top_p: Float[Array, " N"]
    min_p: Float[Array, " N"]
    queue: Int[Array, " N"]
    """Slots in the order in which they begin, a ring."""
    tail: Int[Array, " 1"]
    """How many were ever put there."""


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Rows:
    """What the device knows of the sequences that it decodes."""

    slots: Int[Array, " B"]
    """-1: the row has none."""
    tokens: Int[Array, " B"]
    """The newest; not in the cache yet."""
    positions: Int[Array, " B"]
    counts: Int[Array, " B"]
    """Tokens sampled so far."""
    head: Int[Array, " 1"]
    """How many have left the queue."""


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Steps:
    """The tokens of a chunk of decode steps. Where a row stood still, its slot is
    -1."""

    slots: Int[Array, "k B"]
    tokens: Int[Array, "k B"]
    logprobs: Float[Array, "k B"]
    full_logprobs: Float[Array, "k B"]
    raw_logprobs: Float[Array, "k B"]
    top_tokens: Int[Array, "k B N"]
    top_logprobs: Float[Array, "k B N"]


@dataclass(frozen=True)
class Run:
    """What is compiled into the programs."""

    arch: Architecture
    dtype: Any
    cache_dtype: Any
    """Dtype of keys and values; one of 8 bits: quantised."""
    mesh: Mesh
    """Axes "data" and "tensor"."""
    attend: paged.PagedAttention
    attend_rows: PackedAttention

    @property
    def experts(self) -> moe.Experts:
        """How experts are computed."""
        kernel = grouped.choose(platform_of(self.mesh))
        return functools.partial(moe.alone, kernel=kernel)

    @property
    def inline(self) -> bool:
        """Whether every layer is lowered by itself, as where layers are split."""
        return self.mesh.shape["tensor"] > 1


def no_rows(count: int, replicas: int = 1) -> Rows:
    """Rows without sequences, on the host."""

    def zeros() -> np.ndarray:
        return np.zeros(replicas * count, np.int32)

    return Rows(
        slots=zeros() - 1,
        tokens=zeros(),
        positions=zeros(),
        counts=zeros(),
        head=np.zeros(replicas, np.int32),
    )


@functools.partial(
    jax.jit,
    static_argnames=("run", "chunk", "mode", "top"),
    donate_argnames=("rows", "pages"),
    compiler_options=models.COMPILER_OPTIONS,
)
def decode(
    params: Any,
    tables: Tables,
    rows: Rows,
    pages: Pages,
    enough: Int[Array, " 1"],
    *,
    run: Run,
    chunk: int,
    mode: Mode,
    top: int = 0,
) -> tuple[Rows, Pages, Steps]:
    """Up to `chunk` tokens for every row; fewer if all rows stand still, or so many
    sequences have ended that `enough` rows would do."""

    def replica(params, tables, rows, pages, enough):
        B = rows.slots.shape[0]
        keys = row_keys(tables.seeds, tables.prompt_ids, tables.samples, tables.turns)
        nothing = Steps(
            slots=jnp.full((chunk, B), -1, jnp.int32),
            tokens=jnp.zeros((chunk, B), jnp.int32),
            logprobs=jnp.zeros((chunk, B)),
            full_logprobs=jnp.zeros((chunk, B)),
            raw_logprobs=jnp.zeros((chunk, B)),
            top_tokens=jnp.zeros((chunk, B, top), jnp.int32),
            top_logprobs=jnp.zeros((chunk, B, top)),
        )

        # Counted by rounds of a few steps, as collectives are counted by their loops.
        few = math.gcd(_UNWATCHED, chunk)

        def goes_on(carry):
            i, rows, _, _ = carry
            left = jnp.sum(rows.slots >= 0) + tables.tail[0] - rows.head[0]
            go_on = jnp.any(_runs(tables, rows)) & (left > enough[0])
            return (i < chunk // few) & go_on

        def step(j, carry):
            i, rows, pages, steps = carry
            rows, pages, shown = _step(
                run, mode, top, params, tables, keys, rows, pages
            )
            at = i * few + j
            steps = jax.tree.map(lambda all, new: all.at[at].set(new), steps, shown)
            return i, _refill(tables, rows), pages, steps

        def unwatched(carry):
            i, *others = jax.lax.fori_loop(0, few, step, carry)
            return (i + 1, *others)

        start = (0, _refill(tables, rows), pages, nothing)
        _, rows, pages, steps = jax.lax.while_loop(goes_on, unwatched, start)
        return rows, pages, steps

    of_rows, of_pages = P("data"), P(None, "data")
    return _on_replicas(
        replica,
        run.mesh,
        (P(), of_rows, of_rows, of_pages, P()),
        (of_rows, of_pages, P(None, "data")),
    )(params, tables, rows, pages, enough)


@functools.partial(
    jax.jit,
    static_argnames="run",
    donate_argnames="pages",
    compiler_options=models.COMPILER_OPTIONS,
)
def prefill(
    params: Any,
    tokens: Int[Array, "R T"],
    positions: Int[Array, "R T"],
    sequence_ids: Int[Array, "R T"],
    places: Int[Array, "R T"],
    pages: Pages,
    *,
    run: Run,
) -> Pages:
    """Prefills beginnings of sequences, see `paged.prefill`."""

    def replica(params, tokens, positions, sequence_ids, places, pages):
        return paged.prefill(
            run.arch,
            params,
            tokens,
            positions,
            sequence_ids,
            places,
            pages,
            dtype=run.dtype,
            attention=run.attend_rows,
            experts=run.experts,
            inline=run.inline,
        )[1]

    return _on_replicas(
        replica, run.mesh, (P(), *[P("data")] * 4, P(None, "data")), P(None, "data")
    )(params, tokens, positions, sequence_ids, places, pages)


@functools.partial(
    jax.jit,
    static_argnames="run",
    donate_argnames="pages",
    compiler_options=models.COMPILER_OPTIONS,
)
def extend(
    params: Any,
    tokens: Int[Array, "R T"],
    positions: Int[Array, "R T"],
    tables: Int[Array, "R n"],
    pages: Pages,
    *,
    run: Run,
) -> Pages:
    """Prefills what comes behind a beginning that pages hold, see `paged.extend`."""

    def replica(params, tokens, positions, tables, pages):
        return paged.extend(
            run.arch,
            params,
            tokens,
            positions,
            tables,
            pages,
            dtype=run.dtype,
            attention=run.attend,
            experts=run.experts,
            inline=run.inline,
        )[1]

    return _on_replicas(
        replica, run.mesh, (P(), *[P("data")] * 3, P(None, "data")), P(None, "data")
    )(params, tokens, positions, tables, pages)


@functools.partial(
    jax.jit, static_argnames="run", compiler_options=models.COMPILER_OPTIONS
)
def score(
    params: Any, tokens: Int[Array, "R T"], length: Int[Array, " R"], *, run: Run
) -> Float[Array, "R T"]:
    """Log-probability of each of the first `length` tokens but the first, nats."""

    def replica(params, tokens, length):
        place = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        there = place < length[:, None]
        hidden, _ = paged.prefill(
            run.arch,
            params,
            tokens,
            place,
            jnp.where(there, 0, 1),
            jnp.full_like(place, -1),
            paged.empty(run.arch, 1, 1, run.cache_dtype),  # nothing is kept
            dtype=run.dtype,
            attention=run.attend_rows,
            experts=run.experts,
            inline=run.inline,
        )
        return logprobs.of_tokens(
            hidden,
            models.output_matrix(params),
            tokens,
            place,
            there,
            logit_softcap=run.arch.logit_softcap,
        ).logprobs

    of_rows = P("data")
    return _on_replicas(replica, run.mesh, (P(), of_rows, of_rows), of_rows)(
        params, tokens, length
    )


@functools.partial(jax.jit, static_argnames="run", donate_argnames="pages")
def copy(
    pages: Pages, source: Int[Array, " c"], target: Int[Array, " c"], *, run: Run
) -> Pages:
    """Copies pages, see `paged.copy`."""
    of_pages = P(None, "data")
    return _on_replicas(
        paged.copy, run.mesh, (of_pages, P("data"), P("data")), of_pages
    )(pages, source, target)


def resize(rows: Rows, count: int, replicas: int = 1) -> Rows:
    """`count` rows for each replica, on the host; those with sequences come first
    and must fit."""
    slots = rows.slots.reshape(replicas, -1)
    order = np.argsort(slots < 0, axis=1, kind="stable")[:, :count]
    room = ((0, 0), (0, count - order.shape[1]))

    def moved(x: np.ndarray, empty: int = 0) -> np.ndarray:
        kept = np.take_along_axis(x.reshape(replicas, -1), order, axis=1)
        return np.pad(kept, room, constant_values=empty).ravel()

    return replace(
        rows,
        slots=moved(rows.slots, empty=-1),
        tokens=moved(rows.tokens),
        positions=moved(rows.positions),
        counts=moved(rows.counts),
    )


def _step(
    run: Run,
    mode: Mode,
    top: int,
    params: Any,
    tables: Tables,
    keys: Key[Array, " N"],
    rows: Rows,
    pages: Pages,
) -> tuple[Rows, Pages, Steps]:
    """One more token for every row that runs."""
    runs, at = _runs(tables, rows), jnp.maximum(rows.slots, 0)
    hidden, pages = paged.extend(
        run.arch,
        params,
        rows.tokens[:, None],
        jnp.where(runs, rows.positions, -1)[:, None],
        tables.pages[at],
        pages,
        dtype=run.dtype,
        attention=run.attend,
        experts=run.experts,
        inline=run.inline,
    )
    new = _by_rows(
        functools.partial(sample, mode=mode, top=top),
        run.mesh,
        models.logits(run.arch, params, hidden[:, 0]),
        keys[at],
        rows.counts,
        tables.temperature[at],
        tables.top_k[at],
        tables.top_p[at],
        tables.min_p[at],
    )
    shown = Steps(
        slots=jnp.where(runs, rows.slots, -1),
        tokens=new.tokens,
        logprobs=new.logprobs,
        full_logprobs=new.full_logprobs,
        raw_logprobs=new.raw_logprobs,
        top_tokens=new.top_tokens,
        top_logprobs=new.top_logprobs,
    )
    counts = rows.counts + runs
    stopped = jnp.any(new.tokens[:, None] == tables.stop_ids[at], axis=1)
    done = runs & (stopped | (counts >= tables.max_tokens[at]))
    rows = replace(
        rows,
        slots=jnp.where(done, -1, rows.slots),
        tokens=jnp.where(runs, new.tokens, rows.tokens),
        positions=rows.positions + runs,
        counts=counts,
    )
    return rows, pages, shown


def _by_rows(
    draw: Callable[..., Sampled], mesh: Mesh, logits: Float[Array, "B V"], *of_rows: Any
) -> Sampled:
    """draw(logits, *of_rows), each device of "tensor" for its share of the rows. It
    receives their logits only, instead of all rows' from the rest of the vocabulary."""
    tensor = mesh.shape["tensor"]
    if tensor == 1 or len(logits) % tensor:
        return draw(logits, *of_rows)
    within = jax.sharding.get_abstract_mesh()  # of the replicas, if there are many
    if within.empty:
        within = mesh

    def lay(x: Array, *axes: str | None) -> Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(within, P(*axes)))

    # Whole before and afterwards, or the compiler would split by rows there as well.
    logits = lay(lay(logits, None, "tensor"), "tensor")
    return jax.tree.map(lay, draw(logits, *map(lay, of_rows)))


def _runs(tables: Tables, rows: Rows) -> Bool[Array, " B"]:
    """Rows that have a sequence, and pages for its next token."""
    at = jnp.maximum(rows.slots, 0)
    return (rows.slots >= 0) & (rows.positions < tables.room[at])


def _refill(tables: Tables, rows: Rows) -> Rows:
    """Rows without a sequence, or with a released slot, get the next of the queue."""
    empty = (rows.slots < 0) | tables.released[jnp.maximum(rows.slots, 0)]
    next = rows.head + jnp.cumsum(empty) - 1
    gets = empty & (next < tables.tail)
    slots = tables.queue[next % len(tables.queue)]
    return replace(
        rows,
        slots=jnp.where(gets, slots, jnp.where(empty, -1, rows.slots)),
        tokens=jnp.where(gets, tables.first_token[slots], rows.tokens),
        positions=jnp.where(gets, tables.first_position[slots], rows.positions),
        counts=jnp.where(gets, tables.first_count[slots], rows.counts),
        head=rows.head + jnp.sum(gets),
    )


def _on_replicas(function: Callable, mesh: Mesh, inputs: Any, outputs: Any) -> Callable:
    """The function, run by each replica on its part of the arguments."""
    if mesh.shape["data"] == 1:
        return function
    return jax.shard_map(
        function,
        mesh=mesh,
        axis_names={"data"},
        in_specs=inputs,
        out_specs=outputs,
        check_vma=False,
    )
