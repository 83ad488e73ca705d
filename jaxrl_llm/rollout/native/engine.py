"""The JAX engine: continuous batching in compiled programs, over a cache of pages.

`scheduler` decides, `decode` computes, this file carries between them: while the device
decodes one chunk of steps, the host hands out what the chunk before gave and prepares
the next. Shapes come from a few sizes, so that nothing compiles after the first calls.
"""

import dataclasses
import functools
import math
import weakref
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxrl_llm import models
from jaxrl_llm.data.types import Completion
from jaxrl_llm.models import Architecture
from jaxrl_llm.rollout.engine import More, Request, Use, no_more
from jaxrl_llm.rollout.native import programs as decode
from jaxrl_llm.rollout.native.sampling import Mode
from jaxrl_llm.rollout.native.scheduler import Response
from jaxrl_llm.rollout.native.session import (
    FEWEST_CONTINUED,
    MODES,
    PAGE_SIZE,
    SEQUENCES_PER_ROW,
    Session,
    Sizes,
    abstract,
    abstract_ints,
    abstract_tables,
    mode_of,
    row_length,
    stop_ids,
)
from jaxrl_llm.sharding import checksum, processes, reshard, rules
from jaxrl_llm.sharding import transfer_plan as plan
from jaxrl_llm.sharding.ahead import Ahead

_SHARE_OF_REST = 0.95
"""Share for the cache of the memory that is free when generation begins and that
programs do not need: the rest is lost between arrays."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """Tokens that a response got since it was last told of, while it goes on."""

    prompt_id: int
    sample: int
    tokens: list[int]
    logprobs: list[float]
    """See `Completion`, as of the other three."""
    raw_logprobs: list[float]
    top_tokens: list[np.ndarray]
    top_logprobs: list[np.ndarray]


class JaxEngine:
    """Generation by compiled JAX. Implements `rollout.engine.Engine`.

    Args:
      tokenizer: decodes text, for stop strings and `Completion.text`.
      mesh: axes "data" and "tensor"; sequences are split over the first, weights over
        the second, where key/value heads that are too few are copied. Of many
        processes, each generates what it is asked on its own devices, without the
        others; `load` is what they do together.
      dtype: of weights, activations and cache.
      quantization: of the matrices in the layers; fp8 also of what they multiply.
      kv_cache_dtype: of the cache, if not `dtype`.
      max_model_len: tokens of the longest prompt with its response.
      max_num_seqs: sequences decoded together, on all devices; more wait.
      decode_chunk: steps per dispatch.
      prefill_tokens: of prompts, prefilled per dispatch and replica.
      cache_gib: memory for keys and values on each device. Not given: what the longest
        sequences need, or what is free and programs do not need, if that is less.
      checksum_freq: verify the weights at the first load and whenever their version is
        a multiple of this; 0: never.
      skip_special_tokens: leave special tokens out of texts, and of where stop strings
        are looked for. The token that ends a response is in no text.
      lora: the adapters of the weights, which stay beside them: the rest is taken once,
        and again only if it is another. None: weights have none.
      base: how matrices come that have adapters beside them, if they come quantised.
        They stay so if `quantization` is the same.

    Raises:
      ValueError: `max_model_len` is more than the model has positions, or its weights
        cannot be split over "tensor".
    """

    def __init__(
        self,
        arch: Architecture,
        tokenizer: Any,
        *,
        mesh: Mesh,
        dtype: Any,
        max_model_len: int,
        max_num_seqs: int,
        decode_chunk: int,
        prefill_tokens: int = 8192,
        cache_gib: float | int | None = None,
        quantization: models.Bits | None = None,
        kv_cache_dtype: models.Bits | None = None,
        checksum_freq: int = 100,
        skip_special_tokens: bool = True,
        lora: models.Lora | None = None,
        base: models.Bits | None = None,
    ):
        if max_model_len > arch.max_positions:
            raise ValueError(
                f"max_model_len {max_model_len}: the model has {arch.max_positions} "
                "positions"
            )
        self.arch, self.tokenizer = arch, tokenizer
        self._skips = {"skip_special_tokens": skip_special_tokens}
        self.mesh = mesh.local_mesh
        self.replicas = self.mesh.shape["data"]
        self._rows = -(-max_num_seqs // self.replicas)
        self._max_model_len, self._chunk = max_model_len, decode_chunk
        self._width = -(-max_model_len // PAGE_SIZE)
        self._cache_gib = cache_gib
        self._checksum_freq = checksum_freq
        self._ways: dict[str, tuple[Any, plan.Plan]] = {}
        self._version, self._params = -1, None
        self.lora = lora
        self._taken: list[weakref.ref[jax.Array]] = []  # the weights without adapters
        # Keys, values and caches have as many heads as there are devices to hold them.
        copies = models.kv_copies(arch, self.mesh.shape["tensor"])
        held = dataclasses.replace(arch, num_kv_heads=copies * arch.num_kv_heads)
        self._run = decode.Run(
            arch=held,
            dtype=jnp.dtype(dtype),
            cache_dtype=models.DTYPES.get(kv_cache_dtype, jnp.dtype(dtype)),
            mesh=self.mesh,
            attend=models.choose_paged_attention(self.mesh, arch.head_dim),
            attend_rows=models.choose_attention(
                rules.Partition(self.mesh, rules.GENERATE),
                dtype,
                max_sequences=SEQUENCES_PER_ROW + 1,
            ),
        )
        shapes = models.abstract_params(
            arch, dtype=self._run.dtype, stacked=False, quantised=base
        )
        axes = models.logical_axes(arch, stacked=False, scaled=base is not None)
        layout = rules.fit(
            rules.GENERATE, shapes, axes, mesh, optional=("vocab", "kv_heads")
        )
        self._param_shardings = rules.to_shardings(axes, mesh, layout)
        rules.check_divides(shapes, self._param_shardings)
        self._shapes = shapes
        fused = models.logical_axes(
            held, stacked=False, fused=True, scaled=quantization is not None
        )
        self._fused_shardings = rules.to_shardings(
            fused, self.mesh, layout | {"kv_heads": rules.GENERATE["kv_heads"]}
        )
        fused_as = functools.partial(
            models.fuse, bits=quantization, kv_copies=copies, dtype=self._run.dtype
        )
        self._fuses = {
            arch.has_experts(run.start): jax.jit(
                fused_as, out_shardings=self._fused_shardings["layers"][run.start]
            )
            for run in arch.runs
        }
        if lora is not None:
            self._lay_out_adapters(lora, mesh, layout, copies)
        self._waiting: list[Response] = []
        self._session: Session | None = None
        self._finished: deque[Completion] = deque()
        self._sizes = Sizes(
            num_rows=1,
            prefill_tokens=prefill_tokens,
            longest_prompt=1,
            longest=max_model_len,
        )
        self._greedy: Mode = "plain"
        self._num_pages: dict[int, int] = {}
        self._compiled_later: Callable[[int], dict[str, Any]] | None = None
        self._scored: tuple[Request, np.ndarray] | None = None  # the newest prompt

    def _lay_out_adapters(
        self, lora: models.Lora, mesh: Mesh, layout: rules.Rules, kv_copies: int
    ) -> None:
        """How adapters lie on the mesh: as they come, a layer each, and joined.

        They come in float32, so that they are scaled and rounded as in training.
        """

        def of_every_layer(one: Any) -> Any:
            return {"layers": {i: {"lora": one} for i in range(self.arch.num_layers)}}

        def of_one(tree: Any, cut: Callable[[Any], Any]) -> Any:
            one = tree["layers"]["lora"]
            return of_every_layer(
                jax.tree.map(cut, one, is_leaf=lambda x: isinstance(x, tuple))
            )

        axes = of_one(models.adapter_axes(lora), lambda names: names[1:])
        shapes = of_one(
            models.abstract_adapters(self.arch, lora),
            lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype),
        )
        shardings = rules.to_shardings(axes, mesh, layout)
        self._adapters = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            shapes,
            shardings,
        )
        joined = rules.to_shardings(
            models.fused_adapter_axes(lora),
            self.mesh,
            layout | {"kv_heads": rules.GENERATE["kv_heads"]},
        )
        self._fuse_adapters = jax.jit(
            functools.partial(
                models.fuse_adapters,
                self.arch,
                lora=lora,
                dtype=self._run.dtype,
                kv_copies=kv_copies,
            ),
            out_shardings=joined,
        )
        self._fused_shardings = self._fused_shardings | {
            "layers": {
                i: layer | {"lora": joined}
                for i, layer in self._fused_shardings["layers"].items()
            }
        }

    def load(self, params: Any, version: int) -> dict[str, float]:
        """Takes weights in the training layout, with adapters if there is a `lora`.
        Completions will carry `version`.

        Returns:
          With `lora` rollout/adapters_mib: of what is sent when only they are.

        Raises:
          ValueError: responses are being made, which began with other weights.
          checksum.TransferError: it was verified, and other weights arrived.
        """
        if self._session:
            left = self._session.outstanding + len(self._finished)
            raise ValueError(
                f"{left} responses are being made with weights "
                f"{self._version}; take all completions before weights {version}"
            )
        adapters, metrics = None, {}
        if self.lora is not None:
            adapters, params = models.split_params(params, models.is_adapter)
            metrics = {"rollout/adapters_mib": _mib(self._adapters)}
        if self.lora is None or not self._holds(params):
            self._params = None  # free the old copy before the new one is made
            moved = self._moved("weights", params, self.abstract_params(), version)
            layers = moved["layers"]  # one at a time: two copies of all would not fit
            self._params = moved | {
                "layers": {i: self._fuse(i, layers.pop(i)) for i in list(layers)}
            }
            if self.lora is not None:
                self._taken = [weakref.ref(array) for array in jax.tree.leaves(params)]
        if adapters is not None:
            moved = self._moved("adapters", adapters, self._adapters, version)["layers"]
            layers = {
                i: layer | {"lora": self._fuse_adapters(moved[i]["lora"])}
                for i, layer in self._params["layers"].items()
            }
            self._params = self._params | {"layers": layers}
        self._version = version
        return metrics

    def _fuse(self, i: int, layer: Any) -> Any:
        """The weights of layer i, fused."""
        return self._fuses[self.arch.has_experts(i)](layer)

    def _holds(self, params: Any) -> bool:
        """Whether these are the very arrays that the weights here were made of."""
        leaves = jax.tree.leaves(params)
        there = [reference() for reference in self._taken]
        return len(there) == len(leaves) and all(
            one is other for one, other in zip(there, leaves, strict=True)
        )

    def _moved(self, what: str, params: Any, target: Any, version: int) -> Any:
        """Weights in the layout of `target`, as this process holds them.

        Planning takes a second or two, so the last plan for each kind is kept.
        """
        layout = jax.tree.map(lambda x: (x.dtype, x.sharding), params)
        if what not in self._ways or self._ways[what][0] != layout:
            self._ways[what] = layout, plan.plan(params, target)
        way, freq = self._ways[what][1], self._checksum_freq
        moved = reshard.reshard(params, way)
        first = self._version == -1
        if len(way.devices) > 1 and freq and (first or version % freq == 0):
            checksum.verify(moved, way, checksum.expected(params, way))
        return processes.here(moved, self.mesh)

    def abstract_params(self) -> Any:
        """Shapes, dtypes and shardings of the weights all processes hold, before
        matrices are joined."""
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            self._shapes,
            self._param_shardings,
        )

    def abstract_adapters(self) -> Any:
        """Shapes, dtypes and shardings of the adapters all processes hold, as they
        come; None without `lora`."""
        return None if self.lora is None else self._adapters

    def _abstract_fused(self) -> Any:
        """Shapes, dtypes and shardings of the weights as they are used."""
        params = self.abstract_params()
        kinds = {self.arch.has_experts(run.start): run.start for run in self.arch.runs}
        one = {
            kind: jax.eval_shape(functools.partial(self._fuse, i), params["layers"][i])
            for kind, i in kinds.items()
        }
        if self.lora is not None:
            adapters = self._adapters["layers"][0]["lora"]
            beside = {"lora": jax.eval_shape(self._fuse_adapters, adapters)}
            one = {kind: layer | beside for kind, layer in one.items()}
        layers = {i: one[self.arch.has_experts(i)] for i in params["layers"]}
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            params | {"layers": layers},
            self._fused_shardings,
        )

    def memory(
        self, num_rows: int, num_tokens: int, free: float | int | None = None
    ) -> dict[str, int]:
        """Bytes of weights and cache on each device, while `num_rows` responses wait,
        each with its prompt at most `num_tokens` long.

        Args:
          free: bytes on each device when generation begins; None: enough.
        """
        rows = self._sized(num_rows).num_rows
        pages, _ = abstract(self._run, rows, self._affordable_pages(rows, free))
        return {
            "generation weights": _bytes(self._abstract_fused()),
            "generation cache": _bytes(pages),
        }

    def close(self) -> None:
        """Nothing: it runs in this process only."""

    def lower(
        self,
        num_responses: int,
        num_prompts: int,
        prompt_length: int,
        free: float | int | None = None,
    ) -> dict[str, jax.stages.Lowered]:
        """Prefill, and a chunk of decode steps, from shapes alone.

        Args:
          num_responses: that are decoded together, to `num_prompts` in all.
          free: as of `memory`.
        """
        sizes = self._sized(num_responses, prompt_length)
        pages = self._affordable_pages(sizes.num_rows, free)
        length = sizes.prefill_length()
        counts = sizes.prefill_counts(length)
        count = next(
            (n for n in counts if n * self.replicas >= num_prompts), counts[-1]
        )
        return {
            "prefill": self._lower_prefill(pages, count, length),
            "decode": self._lower_decode(sizes, pages, sizes.num_rows, "plain"),
        }

    def programs(
        self,
        uses: Sequence[Use],
        prompts: Iterable[Sequence[int]],
        resident: Callable[[jax.Device], int] | None = None,
    ) -> dict[str, Callable[[], jax.stages.Lowered]]:
        """See `Engine.programs`. From here on, shapes are those of the largest use.

        Where memory is short, the pages that there is room for are counted when the
        first responses are made, and the programs compiled then.
        """
        longest, beginnings, shared = 1, set(), False
        for tokens in prompts:
            longest = max(longest, len(tokens))
            if len(tokens) > PAGE_SIZE:
                first = tuple(tokens[:PAGE_SIZE])
                shared |= first in beginnings
                beginnings.add(first)
        drawn = {mode_of(u.sampling) for u in uses if u.sampling.temperature > 0}
        # Greedy rows need no programs of their own beside those of others.
        self._greedy = min(drawn, key=MODES.index, default="plain")
        most = max(use.num_responses for use in uses)
        sizes = self._sizes = self._sized(most, longest)
        made = functools.partial(self._programs, uses, sizes, shared)
        device = self.mesh.devices.flat[0]
        limit = _limit_bytes(device)
        if self._cache_gib is None and limit is not None:
            wanted = self._wanted_pages(sizes.num_rows) * self._page_bytes()
            others = limit if resident is None else resident(device)
            free = limit - others - _bytes(self._abstract_fused())
            if wanted > free / 2:
                self._compiled_later = made
                return {}
        pages = self._affordable_pages(sizes.num_rows, None)
        self._num_pages[sizes.num_rows] = pages
        return made(pages)

    def _programs(
        self, uses: Sequence[Use], sizes: Sizes, shared: bool, pages: int
    ) -> dict[str, Callable[[], jax.stages.Lowered]]:
        """What is compiled for these uses.

        Args:
          shared: whether two prompts begin with the same page.
          pages: of a replica.
        """
        found: dict[str, Callable[[], jax.stages.Lowered]] = {}
        ends = max(len(use.sampling.stop_token_ids) for use in uses)
        for mode, top, rows in sorted(self._decoded(uses, sizes), reverse=True):
            name = f"decode {rows} rows{'' if mode == 'plain' else f', {mode}'}"
            found[name] = functools.partial(
                self._lower_decode, sizes, pages, rows, mode, top, ends
            )
        count = -(-max(use.num_prompts for use in uses) // self.replicas)
        each = -(-max(use.num_responses for use in uses) // self.replicas)
        longest, lengths = sizes.longest_prompt, [sizes.prefill_length()]
        scarce = pages < self._wanted_pages(sizes.num_rows)
        if scarce:  # preempted ones are prefilled again, with their response so far
            lengths.append(sizes.prefill_length(self._max_model_len))
            count = sizes.num_rows
        for length in dict.fromkeys(lengths):
            for rows in _up_to(sizes.prefill_counts(length), count):
                found[f"prefill {rows} x {length}"] = functools.partial(
                    self._lower_prefill, pages, rows, length
                )
        between = max(use.continued for use in uses)
        # Whole pages of it may be known, and its last one not.
        if longest > PAGE_SIZE or between:
            behind = PAGE_SIZE + between
            if scarce:
                behind = self._max_model_len
            elif shared or longest > sizes.prefill_tokens:
                behind = max(behind, longest)
            for length in sizes.continued_lengths(min(behind, sizes.prefill_tokens)):
                for rows in _up_to(
                    sizes.prefill_counts(length, FEWEST_CONTINUED),
                    max(count, each) if between else count,
                ):
                    found[f"continued prefill {rows} x {length}"] = functools.partial(
                        self._lower_extend, pages, rows, length
                    )
        for rows in sizes.copies:
            found[f"copy {rows} pages"] = functools.partial(
                self._lower_copy, pages, rows
            )
        return found

    def _decoded(self, uses: Sequence[Use], sizes: Sizes) -> set[tuple[Mode, int, int]]:
        """Mode, likeliest tokens asked for, and rows of all chunks of these uses."""
        found = set()
        for use in uses:
            first = sizes.fit(-(-use.num_responses // self.replicas))
            # Later turns come up one by one.
            varies = use.sampling.max_tokens > self._chunk or use.continued
            for rows in sizes.row_counts:
                if rows == first or (varies and rows < first):
                    mode = mode_of(use.sampling, self._greedy)
                    found.add((mode, use.sampling.logprobs, rows))
        return found

    def _lower_decode(
        self,
        sizes: Sizes,
        pages: int,
        rows: int,
        mode: Mode,
        top: int = 0,
        more_stop_ids: int = 0,
    ) -> jax.stages.Lowered:
        """A chunk of steps, with so many pages and rows a replica."""
        cache, state = abstract(self._run, rows, pages)
        ends = len(self.arch.eos_token_ids) + more_stop_ids
        return decode.decode.lower(
            self._abstract_fused(),
            abstract_tables(self._run, sizes, self._width, ends),
            state,
            cache,
            jax.ShapeDtypeStruct((1,), jnp.int32),
            run=self._run,
            chunk=self._chunk,
            mode=mode,
            top=top,
        )

    def _lower_prefill(self, pages: int, count: int, length: int) -> jax.stages.Lowered:
        cache, _ = abstract(self._run, 1, pages)
        rows = abstract_ints(self._run, *[(count, length)] * 4)
        params = self._abstract_fused()
        return decode.prefill.lower(params, *rows, cache, run=self._run)

    def _lower_extend(self, pages: int, count: int, length: int) -> jax.stages.Lowered:
        cache, _ = abstract(self._run, 1, pages)
        shapes = [(count, length)] * 2 + [(count, self._width)]
        rows = abstract_ints(self._run, *shapes)
        params = self._abstract_fused()
        return decode.extend.lower(params, *rows, cache, run=self._run)

    def _lower_copy(self, pages: int, count: int) -> jax.stages.Lowered:
        cache, _ = abstract(self._run, 1, pages)
        pairs = abstract_ints(self._run, (count,), (count,))
        return decode.copy.lower(cache, *pairs, run=self._run)

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values on each device, the most that generation has
        chosen."""
        return self._page_bytes() * max(self._num_pages.values(), default=0)

    @property
    def layer_bytes(self) -> int:
        """Bytes of the largest layer's weights on each device, as they are used."""
        return max(map(_bytes, self._abstract_fused()["layers"].values()))

    def submit(self, requests: Sequence[Request]) -> None:
        """Queues requests.

        Raises:
          ValueError: a request can never be answered; see `Request.check`.
        """
        for request in requests:
            request.check(self.arch.vocab_size, self._max_model_len)
        made = [Response(r, i) for r in requests for i in r.samples]
        if made:
            (self._session.add if self._session else self._waiting.extend)(made)

    def completions(
        self,
        more: More = no_more,
        progress: Callable[[Progress], None] | None = None,
    ) -> Iterator[Completion]:
        """Yields completions as they finish, until nothing submitted is outstanding.

        More may be submitted meanwhile: what begins like a sequence before it, as the
        next turn of a conversation does, is prefilled only from where it differs. Pages
        are kept until the last completion is taken.

        Args:
          more: asked once a chunk for what is to be submitted besides.
          progress: told once a chunk of every response that goes on.
        """
        if self._params is None:
            raise ValueError("no weights are loaded; call load(params) first")
        while True:
            while self._finished:
                yield self._finished.popleft()
            busy = self._session.outstanding if self._session else self._waiting
            self.submit(more(not busy))
            if self._session and self._outgrown(self._session):
                self._waiting = self._session.withdraw()
                self._session = None  # and its pages, before there are others
            if self._waiting:
                self._session = self._start(len(self._waiting))
                self._session.add(self._waiting)
                self._waiting = []
            if not (self._session and self._session.outstanding):
                break
            self._finished.extend(self._advance(self._session, progress))
        if self._session:
            self._session.close()
        self._session = None

    def _advance(
        self, session: Session, progress: Callable[[Progress], None] | None
    ) -> list[Completion]:
        ended = []
        for response, before in session.advance():
            cut = self._cut(response, before)
            by_token = response.tokens[-1] in stop_ids(self.arch, response.request)
            full = len(response.tokens) == response.request.sampling.max_tokens
            if cut is not None or by_token or full:
                session.finish(response, device_knows=cut is None)
                ended.append((response, cut, by_token))
            elif progress:
                progress(_since(response, before))
        return self._completions(ended)

    def abort(self, prompt_ids: Container[int]) -> int:
        """Aborts the responses to these prompts; returns how many there were."""
        if self._session:
            kept = [c for c in self._finished if c.prompt_id not in prompt_ids]
            count = len(self._finished) - len(kept)
            self._finished = deque(kept)
            return count + len(self._session.abort(prompt_ids))
        kept = [r for r in self._waiting if r.request.prompt_id not in prompt_ids]
        count = len(self._waiting) - len(kept)
        self._waiting = kept
        return count

    def _start(self, num_responses: int) -> Session:
        longest = max(len(response.request.tokens) for response in self._waiting)
        sizes = self._sizes = self._sized(num_responses, longest)
        if sizes.num_rows not in self._num_pages:
            pages = self._num_pages[sizes.num_rows] = self._num_pages_for(sizes)
            if self._compiled_later is not None:
                with Ahead(self._compiled_later(pages)) as ahead:
                    ahead.wait()
                self._compiled_later = None
        return Session(
            self._run,
            self._params,
            sizes=sizes,
            num_rows=sizes.fit(-(-num_responses // self.replicas)),
            num_pages=self._num_pages[sizes.num_rows],
            width=self._width,
            chunk=self._chunk,
            greedy=self._greedy,
        )

    def _outgrown(self, session: Session) -> bool:
        """Whether more is asked for than when it began, and there may be more rows.
        What is under way is then begun again from the tokens that it has."""
        return self._sized(session.outstanding).num_rows > self._sizes.num_rows

    def _sized(self, num_responses: int, longest_prompt: int = 1) -> Sizes:
        """Shapes for so many responses on all replicas, and for all before: they only
        grow, so that little is compiled."""
        known, most = self._sizes, dataclasses.replace(self._sizes, num_rows=self._rows)
        rows = most.fit(-(-num_responses // self.replicas))
        return dataclasses.replace(
            known,
            num_rows=max(known.num_rows, rows),
            longest_prompt=max(known.longest_prompt, longest_prompt),
        )

    def _wanted_pages(self, rows: int) -> int:
        """For as many of the longest sequences as there are rows, and half as much for
        those that wait to begin."""
        return 1 + self._width * rows * 3 // 2

    def _affordable_pages(
        self, rows: int, free: float | int | None, needed: int | None = None
    ) -> int:
        """The wanted pages if there is memory for them, and at least the fewest.

        Args:
          needed: bytes that programs work in; a tenth of `free` if not given.
        """
        wanted, room = self._wanted_pages(rows), self._room(free, needed)
        if room is None:
            return wanted
        return max(self._width + 1, min(wanted, int(room / self._page_bytes())))

    def _room(self, free: float | int | None, needed: int | None) -> float | int | None:
        """Bytes for the cache; None if there are enough."""
        if self._cache_gib is not None:
            return self._cache_gib * 2**30
        if free is None:
            return None
        return 0.9 * free if needed is None else _SHARE_OF_REST * (free - needed)

    def _page_bytes(self) -> int:
        """Bytes of one page in every layer, on each device."""
        return _bytes(abstract(self._run, 1, 1)[0])

    def _num_pages_for(self, sizes: Sizes) -> int:
        """`_affordable_pages` with the memory that is free now.

        Raises:
          ValueError: there is not enough for one sequence.
        """
        rows, page, needed = sizes.num_rows, self._page_bytes(), None
        free = _free_bytes(self.mesh.devices.flat[0])
        if self._cache_gib is None and free is not None:
            if self._wanted_pages(rows) * page > free / 2:
                needed = self._most_working_bytes(sizes)
        room = self._room(free, needed)
        if room is not None and room < (self._width + 1) * page:
            name = (
                "are free:" if self._cache_gib is None else "rollout.cache_gib allows"
            )
            raise ValueError(
                f"one sequence of {self._max_model_len} tokens needs "
                f"{(self._width + 1) * page / 2**30:.3g} GiB of cache on each device, "
                f"{name} {room / 2**30:.3g} GiB"
            )
        return self._affordable_pages(rows, free, needed)

    def _most_working_bytes(self, sizes: Sizes) -> int:
        """What programs need on a device besides weights and cache."""
        pages = self._affordable_pages(sizes.num_rows, None)
        length = sizes.prefill_length(self._max_model_len)
        count = sizes.prefill_counts(length)[-1]
        programs = (
            self._lower_decode(sizes, pages, sizes.num_rows, "plain"),
            self._lower_prefill(pages, count, length),
        )
        found = [program.compile().memory_analysis() for program in programs]
        return max(size.temp_size_in_bytes for size in found)

    def _cut(self, response: Response, before: int) -> str | None:
        """Cuts a response after the first token that completes a stop string, and
        returns the text before that; None if there is none."""
        stops = response.request.sampling.stop
        if not stops or not any(s in self._text(response.tokens) for s in stops):
            return None
        for end in range(before + 1, len(response.tokens) + 1):
            text = self._text(response.tokens[:end])
            found = [text.index(stop) for stop in stops if stop in text]
            if found:
                for values in (
                    response.tokens,
                    response.logprobs,
                    response.full_logprobs,
                    response.raw_logprobs,
                    response.top_tokens,
                    response.top_logprobs,
                ):
                    del values[end:]
                return text[: min(found)]
        return None

    def _completions(
        self, ended: Sequence[tuple[Response, str | None, bool]]
    ) -> list[Completion]:
        """Completions from responses, each with its text if a stop string ended it, and
        whether a stop token did."""
        whole = self._texts([r.tokens[: len(r.tokens) - by] for r, _, by in ended])
        return [
            Completion(
                prompt_id=response.request.prompt_id,
                sample=response.sample,
                tokens=np.asarray(response.tokens, np.int32),
                logprobs=np.asarray(response.logprobs, np.float32),
                full_logprobs=np.asarray(response.full_logprobs, np.float32)
                if response.request.sampling.truncates
                else None,
                raw_logprobs=np.asarray(response.raw_logprobs, np.float32),
                finish_reason="length" if cut is None and not by_token else "stop",
                weight_version=self._version,
                text=text if cut is None else cut,
                **_most_likely(response),
                prompt_logprobs=self._of_prompt(response.request),
                prefilled=response.prefilled,
            )
            for (response, cut, by_token), text in zip(ended, whole, strict=True)
        ]

    def _of_prompt(self, request: Request) -> np.ndarray | None:
        """Its log-probabilities, if asked for. Computed apart: the prefill of
        generation may find it in the cache."""
        if not request.sampling.prompt_logprobs:
            return None
        if self._scored is None or self._scored[0] is not request:
            length = len(request.tokens)
            tokens = np.zeros((self.replicas, row_length(length)), np.int32)
            tokens[:, :length] = request.tokens
            lengths = np.full(self.replicas, length, np.int32)
            found = decode.score(self._params, tokens, lengths, run=self._run)
            self._scored = request, np.asarray(found[0, 1:length])
        return self._scored[1]

    def _text(self, tokens: Sequence[int]) -> str:
        return self._texts([tokens])[0]

    def _texts(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        tokenizer = self.tokenizer
        if getattr(tokenizer, "clean_up_tokenization_spaces", True):
            return tokenizer.batch_decode(sequences, **self._skips)
        # All at once, on all processors.
        return tokenizer.backend_tokenizer.decode_batch(sequences, **self._skips)


def _since(response: Response, before: int) -> Progress:
    """What it got since it had `before` tokens."""
    count = response.request.sampling.logprobs
    return Progress(
        prompt_id=response.request.prompt_id,
        sample=response.sample,
        tokens=response.tokens[before:],
        logprobs=response.logprobs[before:],
        raw_logprobs=response.raw_logprobs[before:],
        top_tokens=[top[:count] for top in response.top_tokens[before:]],
        top_logprobs=[top[:count] for top in response.top_logprobs[before:]],
    )


def _most_likely(response: Response) -> dict[str, np.ndarray]:
    count = response.request.sampling.logprobs  # others may have asked for more
    if not count:
        return {}
    return {
        "top_tokens": np.stack(response.top_tokens)[:, :count],
        "top_logprobs": np.stack(response.top_logprobs)[:, :count],
    }


def _up_to(sizes: Sequence[int], most: int) -> list[int]:
    """Those that are needed for anything from one to `most`."""
    return [n for i, n in enumerate(sizes) if not i or sizes[i - 1] < most]


def _limit_bytes(device: jax.Device) -> int | None:
    """Memory that there is; None where that is not counted."""
    return (device.memory_stats() or {}).get("bytes_limit")


def _free_bytes(device: jax.Device) -> int | None:
    """Memory that nothing uses; None where that is not counted."""
    said = device.memory_stats()
    if not said or "bytes_limit" not in said:
        return None
    return said["bytes_limit"] - said["bytes_in_use"]


def _mib(tree: Any) -> float:
    """The size of whole arrays, on however many devices."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) / 2**20


def _bytes(tree: Any) -> int:
    """On one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )
