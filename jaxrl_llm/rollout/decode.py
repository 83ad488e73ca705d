"""The JAX engine: prefill each prompt once, then decode all its samples together.

Requests run in waves of at most `max_num_seqs` sequences. Within a wave a jitted loop
decodes up to `decode_chunk` tokens per dispatch and stops early when every row is done;
between dispatches the host hands out what has finished and looks for stop strings.
Shapes come from a few buckets, so that nothing compiles after the first waves.
"""

import functools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Key

from jaxrl_llm import models
from jaxrl_llm.batch import Completion
from jaxrl_llm.models import Architecture, Cache
from jaxrl_llm.rollout.engine import Request
from jaxrl_llm.rollout.sampling import Sampled, row_keys, sample
from sharding import checksum, plan, processes, reshard, rules


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Rows:
    """What stays the same while the rows of a wave are decoded. Padding rows are done
    from the start."""

    keys: Key[Array, " B"]
    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    max_tokens: Int[Array, " B"]
    stop_ids: Int[Array, "B n"]
    """Token ids that end a row; -1 fills up."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Decoding:
    """What changes with every token."""

    tokens: Int[Array, " B"]
    """The newest token of each row; not in the cache yet."""
    positions: Int[Array, " B"]
    """Where it stands."""
    counts: Int[Array, " B"]
    """Tokens sampled so far."""
    done: Bool[Array, " B"]
    cache: Cache


@dataclass
class _Row:
    """A response in the making, on the host."""

    request: Request
    sample: int
    tokens: list[int]
    logprobs: list[float]
    raw_logprobs: list[float]
    done: bool = False


class JaxEngine:
    """Generation by compiled JAX. Implements `rollout.engine.Engine`.

    Args:
      tokenizer: decodes text, for stop strings and `Completion.text`.
      mesh: axes "data" and "tensor"; rows are split over the first, weights over the
        second. Of many processes, each generates what it is asked on its own devices,
        without the others; `load` is what they do together.
      dtype: of weights, activations and cache.
      max_num_seqs: sequences decoded together.
      decode_chunk: tokens per dispatch.
      checksum_freq: verify the weights at the first load and whenever their version is
        a multiple of this; 0: never.
    """

    def __init__(
        self,
        arch: Architecture,
        tokenizer: Any,
        *,
        mesh: Mesh,
        dtype: Any,
        max_num_seqs: int,
        decode_chunk: int,
        checksum_freq: int = 100,
    ):
        self.arch, self.tokenizer = arch, tokenizer
        self._max_num_seqs, self._chunk = max_num_seqs, decode_chunk
        self._devices, self.mesh = set(mesh.devices.flat), mesh.local_mesh
        self._rows_sharding = NamedSharding(self.mesh, P("data"))
        self._version = -1
        self._params: Any = None
        self._waiting: deque[tuple[Request, int]] = deque()
        self._param_shardings = rules.to_shardings(
            models.logical_axes(arch, stacked=False), mesh, rules.GENERATE
        )
        self._checksum_freq, self._way = checksum_freq, None
        self._cast = jax.jit(
            functools.partial(models.unstack, dtype=dtype),
            out_shardings=self._param_shardings,
        )
        self._cache_sharding = NamedSharding(self.mesh, P("data", None, "tensor"))
        self._shape = {"arch": arch, "dtype": jnp.dtype(dtype)}

    def load(self, params: Any, version: int) -> dict[str, float]:
        """Takes weights in the training layout. Completions will carry `version`.

        Raises:
          checksum.TransferError: it was verified, and other weights arrived.
        """
        freq, first = self._checksum_freq, self._version == -1
        self._params = None  # free the old copy before the new one is made
        devices = {d for x in jax.tree.leaves(params) for d in x.sharding.device_set}
        if devices == self._devices:
            moved = self._cast(params)  # one program, XLA's own collectives
        else:
            moved = reshard.reshard(params, self._way_of(params))
        if len(devices) > 1 and freq and (first or version % freq == 0):
            way = self._way_of(params)
            checksum.verify(moved, way, checksum.expected(params, way))
        self._params = processes.here(moved, self.mesh)
        self._version = version
        return {}

    def _way_of(self, params: Any) -> plan.Plan:
        """How weights in this layout come here.

        Planning takes a second or two, so the last plan is kept.
        """
        layout = jax.tree.map(lambda x: (x.dtype, x.sharding), params)
        if self._way is None or self._way[0] != layout:
            self._way = layout, plan.plan(params, self.abstract_params())
        return self._way[1]

    def abstract_params(self) -> Any:
        """Shapes, dtypes and shardings of the weights all processes hold."""
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            models.abstract_params(
                self.arch, dtype=self._shape["dtype"], stacked=False
            ),
            self._param_shardings,
        )

    def memory(self, num_rows: int, num_tokens: int) -> dict[str, int]:
        """Bytes of weights and cache on each device, while `num_rows` responses wait,
        each with its prompt at most `num_tokens` long."""
        weights = sum(
            math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x in jax.tree.leaves(self.abstract_params())
        )
        rows = self._row_count(min(num_rows, self._max_num_seqs))
        shape = rows, _length(num_tokens), self.arch.num_kv_heads, self.arch.head_dim
        shard = self._cache_sharding.shard_shape(shape)
        numbers = 2 * self.arch.num_layers * math.prod(shard)
        cache = numbers * self._shape["dtype"].itemsize
        return {"generation weights": weights, "generation cache": cache}

    def close(self) -> None:
        """Nothing: it runs in this process only."""

    def compile(
        self, num_prompts: int, num_rows: int, prompt_length: int, total: int
    ) -> tuple[jax.stages.Compiled, jax.stages.Compiled]:
        """Prefill and one dispatch of decoding of a wave, from shapes alone.

        Args:
          num_rows: responses of all prompts together.
          total: tokens of the longest prompt with its response.
        """
        B = self._row_count(min(num_rows, self._max_num_seqs))
        prompts = _power_of_two(min(num_prompts, B))
        length = _length(prompt_length)
        params, plain = self.abstract_params(), {"truncated": False, **self._shape}
        stop_ids = _power_of_two(max(1, len(self.arch.eos_token_ids)))
        tokens = jax.ShapeDtypeStruct((prompts, length), jnp.int32)
        lengths = jax.ShapeDtypeStruct((prompts,), jnp.int32)
        of_row = jax.ShapeDtypeStruct((B,), jnp.int32)

        def wave(params, tokens, lengths, of_row):
            zeros = jnp.zeros(B, jnp.int32)
            rows = Rows(
                keys=jax.random.split(jax.random.key(0), B),
                temperature=jnp.zeros(B),
                top_k=zeros,
                top_p=jnp.zeros(B),
                min_p=jnp.zeros(B),
                max_tokens=zeros,
                stop_ids=jnp.zeros((B, stop_ids), jnp.int32),
            )
            sampled, cache, positions, done = _prefill(
                params, tokens, lengths, of_row, B, rows, **plain
            )
            size, sharding = max(_length(total), length), self._cache_sharding
            cache = _expand(cache, of_row, size=size, sharding=sharding)
            return vars(rows), {
                "tokens": sampled.tokens,
                "positions": positions,
                "counts": positions,
                "done": done,
                "cache": (cache.keys, cache.values),
            }

        def laid_out(x):
            cached = x.ndim == len(self._cache_sharding.spec) + 1
            sharding = self._cache_sharding if cached else self._rows_sharding
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        shapes = jax.eval_shape(wave, params, tokens, lengths, of_row)
        rows, state = jax.tree.map(laid_out, shapes)
        prefill = jax.jit(
            lambda params, *inputs, rows: _prefill(
                params, *inputs, B, Rows(**rows), **plain
            )
        ).lower(params, tokens, lengths, of_row, rows=rows)
        decode = jax.jit(
            lambda params, state, rows: _decode(
                params,
                Decoding(**state | {"cache": Cache(*state["cache"])}),
                Rows(**rows),
                chunk=self._chunk,
                **plain,
            ),
            donate_argnums=1,
        ).lower(params, state, rows)
        return prefill.compile(), decode.compile()

    def submit(self, requests: Sequence[Request]) -> None:
        """Queues requests.

        Raises:
          ValueError: a prompt is empty, or prompt and response cannot fit the model.
        """
        for request in requests:
            longest = len(request.tokens) + request.sampling.max_tokens
            if not request.tokens:
                raise ValueError(f"prompt {request.prompt_id} is empty")
            if longest > self.arch.max_positions:
                raise ValueError(
                    f"prompt {request.prompt_id} has {len(request.tokens)} tokens and "
                    f"asks for up to {request.sampling.max_tokens} more, but the model "
                    f"has {self.arch.max_positions} positions"
                )
        for request in requests:
            self._waiting.extend((request, i) for i in range(request.num_samples))

    def completions(self) -> Iterator[Completion]:
        """Yields completions as they finish, until nothing submitted is outstanding."""
        if self._params is None:
            raise ValueError("no weights are loaded; call load(params) first")
        while self._waiting:
            size = min(self._max_num_seqs, len(self._waiting))
            yield from self._run([self._waiting.popleft() for _ in range(size)])

    def _run(self, wave: Sequence[tuple[Request, int]]) -> Iterator[Completion]:
        rows = [_Row(request, i, [], [], []) for request, i in wave]
        requests = list({id(row.request): row.request for row in rows}.values())
        prompts = list({r.tokens: r for r in requests}.values())
        longest = max(len(request.tokens) for request in prompts)
        total = max(len(r.tokens) + r.sampling.max_tokens for r in requests)
        truncated = any(
            r.sampling.top_k != -1 or r.sampling.top_p < 1 or r.sampling.min_p > 0
            for r in requests
        )
        static = self._put(_rows(rows, self._row_count(len(rows)), self._stops))
        state, sampled = self._start(prompts, rows, longest, total, static, truncated)
        outputs = jax.tree.map(lambda x: np.asarray(x)[None], sampled)
        while True:
            done = np.asarray(state.done).copy()
            yield from self._collect(rows, outputs, done)
            if all(row.done for row in rows):
                return
            done[: len(rows)] |= [row.done for row in rows]
            state = replace(state, done=self._put(done))
            state, outputs = _decode(
                self._params,
                state,
                static,
                chunk=self._chunk,
                truncated=truncated,
                **self._shape,
            )
            outputs = jax.tree.map(np.asarray, outputs)

    def _start(self, prompts, rows, longest, total, static, truncated):
        """Prefills the prompts and samples the first token of every row."""
        tokens = np.zeros((_power_of_two(len(prompts)), _length(longest)), np.int32)
        lengths = np.ones(len(tokens), np.int32)
        for i, request in enumerate(prompts):
            tokens[i, : len(request.tokens)] = request.tokens
            lengths[i] = len(request.tokens)
        place = {request.tokens: i for i, request in enumerate(prompts)}
        of_row = np.zeros(static.temperature.shape[0], np.int32)
        of_row[: len(rows)] = [place[row.request.tokens] for row in rows]

        sampled, cache, positions, done = _prefill(
            self._params,
            tokens,
            lengths,
            of_row,
            len(rows),
            static,
            truncated=truncated,
            **self._shape,
        )
        size = max(_length(total), tokens.shape[1])
        cache = _expand(cache, of_row, size=size, sharding=self._cache_sharding)
        state = Decoding(
            tokens=sampled.tokens,
            positions=positions,
            counts=jnp.ones_like(positions),
            done=done,
            cache=cache,
        )
        return state, sampled

    def _collect(
        self, rows: Sequence[_Row], outputs: Sampled, done: np.ndarray
    ) -> Iterator[Completion]:
        """Appends new tokens [k, B] to their rows and yields the rows that finished.

        A row that stopped within the chunk has tokens -1 from then on.
        """
        for i, row in enumerate(rows):
            if row.done:
                continue
            before = len(row.tokens)
            count = int(np.sum(outputs.tokens[:, i] >= 0))
            row.tokens.extend(outputs.tokens[:count, i].tolist())
            row.logprobs.extend(outputs.logprobs[:count, i].tolist())
            row.raw_logprobs.extend(outputs.raw_logprobs[:count, i].tolist())
            text, stopped = self._stop_string(row, before)
            if stopped or done[i]:
                row.done = True
                yield self._completion(row, text, stopped)

    def _stop_string(self, row: _Row, before: int) -> tuple[str | None, bool]:
        """Cuts the row after the first token that completes a stop string.

        Returns the text before the stop string, and whether there was one.
        """
        stops = row.request.sampling.stop
        if not stops:
            return None, False
        whole = self._text(row.tokens)
        if not any(stop in whole for stop in stops):
            return None, False
        for end in range(before + 1, len(row.tokens) + 1):
            text = self._text(row.tokens[:end])
            found = [text.index(stop) for stop in stops if stop in text]
            if found:
                for values in (row.tokens, row.logprobs, row.raw_logprobs):
                    del values[end:]
                return text[: min(found)], True
        return None, False

    def _completion(self, row: _Row, text: str | None, stopped: bool) -> Completion:
        sampling = row.request.sampling
        by_token = row.tokens[-1] in self._stops(row.request)
        if text is None:
            text = self._text(row.tokens[:-1] if by_token else row.tokens)
        ended = stopped or by_token
        assert ended or len(row.tokens) == sampling.max_tokens
        return Completion(
            prompt_id=row.request.prompt_id,
            sample=row.sample,
            tokens=np.asarray(row.tokens, np.int32),
            logprobs=np.asarray(row.logprobs, np.float32),
            raw_logprobs=np.asarray(row.raw_logprobs, np.float32),
            finish_reason="stop" if ended else "length",
            weight_version=self._version,
            text=text,
        )

    def _text(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def _stops(self, request: Request) -> tuple[int, ...]:
        return self.arch.eos_token_ids + request.sampling.stop_token_ids

    def _row_count(self, rows: int) -> int:
        """Rows including padding: a power of two that "data" divides."""
        data = self.mesh.shape["data"]
        return -(-_power_of_two(rows) // data) * data

    def _put(self, tree: Any) -> Any:
        return jax.device_put(tree, self._rows_sharding)


@functools.partial(jax.jit, static_argnames=("arch", "dtype", "truncated"))
def _prefill(
    params: Any,
    tokens: Int[Array, "P T"],
    lengths: Int[Array, " P"],
    of_row: Int[Array, " B"],
    num_rows: Int[Array, ""],
    rows: Rows,
    *,
    arch: Architecture,
    dtype: Any,
    truncated: bool,
) -> tuple[Sampled, Cache, Int[Array, " B"], Bool[Array, " B"]]:
    """The first token of every row, the prompts' cache, next positions, who is done."""
    hidden, cache = models.prefill(arch, params, tokens, lengths, dtype=dtype)
    counts = jnp.zeros_like(of_row)
    sampled = _sample(arch, params, hidden[of_row], rows, counts, truncated)
    padding = jnp.arange(of_row.shape[0]) >= num_rows
    done = padding | _ended(rows, sampled.tokens, counts + 1)
    return sampled, cache, lengths[of_row], done


@functools.partial(jax.jit, static_argnames=("size", "sharding"))
def _expand(
    cache: Cache, of_row: Int[Array, " B"], *, size: int, sharding: NamedSharding
) -> Cache:
    """Each row's copy of its prompt's cache, with room for `size` positions."""
    room = ((0, 0), (0, size - cache.size), (0, 0), (0, 0))
    cache = jax.tree.map(lambda x: jnp.pad(x, room)[of_row], cache)
    return jax.lax.with_sharding_constraint(cache, sharding)


@functools.partial(
    jax.jit,
    static_argnames=("arch", "dtype", "chunk", "truncated"),
    donate_argnames="state",
)
def _decode(
    params: Any,
    state: Decoding,
    rows: Rows,
    *,
    arch: Architecture,
    dtype: Any,
    chunk: int,
    truncated: bool,
) -> tuple[Decoding, Sampled]:
    """Up to `chunk` more tokens for every row that is not done.

    Returns the state, and tokens with log-probabilities [chunk, B]; a row that is done
    has tokens -1 and zeros.
    """
    B = state.tokens.shape[0]
    nothing = Sampled(
        jnp.full((chunk, B), -1), jnp.zeros((chunk, B)), jnp.zeros((chunk, B))
    )

    def goes_on(carry):
        i, state, _ = carry
        return (i < chunk) & ~jnp.all(state.done)

    def step(carry):
        i, state, outputs = carry
        hidden, cache = models.decode(
            arch, params, state.tokens, state.positions, state.cache, dtype=dtype
        )
        new = _sample(arch, params, hidden, rows, state.counts, truncated)
        shown = Sampled(
            jnp.where(state.done, -1, new.tokens),
            jnp.where(state.done, 0.0, new.logprobs),
            jnp.where(state.done, 0.0, new.raw_logprobs),
        )
        outputs = jax.tree.map(lambda out, x: out.at[i].set(x), outputs, shown)
        advance = jnp.where(state.done, 0, 1)
        state = Decoding(
            tokens=jnp.where(state.done, state.tokens, new.tokens),
            positions=state.positions + advance,
            counts=state.counts + advance,
            done=state.done | _ended(rows, new.tokens, state.counts + 1),
            cache=cache,
        )
        return i + 1, state, outputs

    _, state, outputs = jax.lax.while_loop(goes_on, step, (0, state, nothing))
    return state, outputs


def _sample(arch, params, hidden, rows: Rows, counts, truncated: bool) -> Sampled:
    logits = models.logits(arch, params, hidden)
    return sample(
        logits,
        rows.keys,
        counts,
        rows.temperature,
        rows.top_k,
        rows.top_p,
        rows.min_p,
        truncated=truncated,
    )


def _ended(rows: Rows, tokens: Int[Array, " B"], counts: Int[Array, " B"]):
    stopped = jnp.any(tokens[:, None] == rows.stop_ids, axis=1)
    return stopped | (counts >= rows.max_tokens)


def _rows(
    rows: Sequence[_Row], size: int, stops: Callable[[Request], tuple[int, ...]]
) -> Rows:
    """The sampling parameters of `rows`, padded to `size` rows."""
    padded = [*rows, *[rows[0]] * (size - len(rows))]
    samplings = [row.request.sampling for row in padded]
    stop_ids = [stops(row.request) for row in padded]
    width = _power_of_two(max(1, *map(len, stop_ids)))

    def ints(values) -> jax.Array:
        return jnp.asarray(list(values), jnp.int32)

    def floats(values) -> jax.Array:
        return jnp.asarray(list(values), jnp.float32)

    return Rows(
        keys=row_keys(
            jnp.asarray([row.request.seed for row in padded], jnp.uint32),
            ints(row.request.prompt_id for row in padded),
            ints(row.sample for row in padded),
        ),
        temperature=floats(s.temperature for s in samplings),
        top_k=ints(s.top_k for s in samplings),
        top_p=floats(s.top_p for s in samplings),
        min_p=floats(s.min_p for s in samplings),
        max_tokens=ints(s.max_tokens for s in samplings),
        stop_ids=ints([*ids, *[-1] * (width - len(ids))] for ids in stop_ids),
    )


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _length(n: int) -> int:
    """The next multiple of 16 up to 128, then of an eighth of the power of two above.

    At most an eighth is wasted, and there are few different lengths to compile.
    """
    step = max(16, _power_of_two(n) // 8)
    return -(-n // step) * step
