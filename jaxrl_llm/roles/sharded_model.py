"""A model on a mesh: how its weights and rows lie there, and how they are computed.

    model = ShardedModel(arch, mesh, ModelSettings(remat="full"), head="value")
    values = model.in_micro_batches(model.values)(params, model.on_devices(rows))

Every role is one of these and a little more. Nothing here holds weights.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Num

from jaxrl_llm import models
from jaxrl_llm.algorithms import update as updates
from jaxrl_llm.data import packing
from jaxrl_llm.data import rows as batches
from jaxrl_llm.data.packing import Layout
from jaxrl_llm.data.rows import TrainBatch
from jaxrl_llm.data.types import RouterUse
from jaxrl_llm.models import Architecture
from jaxrl_llm.models.apply import Params, Remat
from jaxrl_llm.models.layer_loop import unrolled
from jaxrl_llm.sharding import processes
from jaxrl_llm.sharding.mesh import platform_of
from jaxrl_llm.sharding.rules import Partition, Rules

COMPILER_OPTIONS = models.COMPILER_OPTIONS | {
    "xla_gpu_all_gather_combine_threshold_bytes": 2**28,
    "xla_gpu_reduce_scatter_combine_threshold_bytes": 2**28,
}
"""Options for updates and for scoring. A layer's weights come together at once, and so
do its gradients: 1 % faster on two H100 than in parts of 30 MB. Other platforms take no
notice."""


_ADAPTERS_APART = {"xla_gpu_dot_merger_threshold_mb": 0}
"""XLA would join the thin products with adapters to those with the weights of the same
input, and copy the latter out of what both give."""


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """How a model is computed."""

    dtype: str = "bfloat16"
    """Dtype of activations, and of weights inside matrix products."""
    remat: Remat = "none"
    """What the backward pass computes again."""
    attention: Literal["auto", "xla"] = "auto"
    """auto: flash attention where there is any. xla: the reference."""
    unroll: Literal["auto", "never", "always"] = "auto"
    """Compile each layer by itself: see `layer_loop.choose`."""
    rules: Rules = dataclasses.field(default_factory=dict)
    """In place of those of `rules.TRAIN`."""
    rows: Layout = Layout()
    """How sequences are laid out, but for the multiples, which are the mesh's."""
    lora: models.Lora | None = None
    """The adapters that the weights have."""
    quantization: models.Bits | None = None
    """How the matrices in the layers are kept, which are then not trained."""


_FEWEST_TOKENS = 256
"""Tokens of a device's rows in a micro-batch, where nobody says how many rows that
has."""
_ORDERED = 2048
"""The gradient of cuDNN's attention over a longer row is not asked to be summed in a
fixed order: that needs memory in proportion to the square of the length; for packed
rows, to that of all tokens (cuDNN 9.2 to 9.24 on H100)."""
_SHORT = 64
"""Rows that are shorter are not worth another program."""


class ShardedModel:
    """Everything about a model on a mesh but its weights.

    Args:
      mesh: axes of `mesh.AXES`, such as "data", "fsdp" and "tensor".
      head: tokens: a language model. value: a decoder with one number per token, see
        `models.values`.
      keys: what errors call a setting, such as {"mesh": "critic.mesh"}; its own name
        if it is not in there.

    Raises:
      ValueError: the model or its rows cannot be split evenly over `mesh`.
    """

    def __init__(
        self,
        arch: Architecture,
        mesh: Mesh,
        settings: ModelSettings,
        *,
        head: Literal["tokens", "value"] = "tokens",
        keys: Mapping[str, str] | None = None,
    ):
        self.arch, self.mesh, self.settings, self.head = arch, mesh, settings, head
        if settings.quantization is not None and arch.moe is not None:
            raise ValueError(
                f"lora.quantization is {settings.quantization}, but this "
                f"{arch.model_type} model has experts, which are not quantised; leave "
                "it out"
            )
        self.axes = self._with_adapters(self.base_axes(), models.adapter_axes)
        self.partition = _partition(
            arch, self.shapes("float32"), self.axes, mesh, settings, keys or {}
        )
        self.rows = self.partition.sharding("rows", "tokens")
        parts, rows = self.partition.parts("rows"), settings.rows
        together = rows.micro_batch_size
        if together is None and rows.pack_length and rows.longest:
            # Most of the rows that there could be are empty, which only micro-batches
            # leave out.
            together = parts * max(1, _FEWEST_TOKENS // rows.pack_length)
        self.layout = dataclasses.replace(
            rows,
            micro_batch_size=together,
            rows_multiple=parts,
            length_multiple=_length_multiple(self.partition),
        )

    def shapes(self, dtype: Any) -> Params:
        """Shapes and dtypes of all weights; adapters, if there are any, are float32."""
        return self._with_adapters(
            self._base(dtype, self.settings.quantization),
            functools.partial(models.abstract_adapters, self.arch),
        )

    def base_axes(self) -> Params:
        """A tuple of axis names for every weight that is no adapter's."""
        make = models.critic_axes if self.head == "value" else models.logical_axes
        return make(self.arch, scaled=self.settings.quantization is not None)

    def decoder_shardings(self) -> Params:
        """The sharding of every weight of a whole decoder, with its output matrix."""
        scaled = self.settings.quantization is not None
        return self.partition.shardings(models.logical_axes(self.arch, scaled=scaled))

    def _base(self, dtype: Any, quantised: models.Bits | None) -> Params:
        has_values = self.head == "value"
        make = models.abstract_critic if has_values else models.abstract_params
        return make(self.arch, dtype=jnp.dtype(dtype), quantised=quantised)

    def _with_adapters(
        self, of_base: Params, of_lora: Callable[[models.Lora], Params]
    ) -> Params:
        """A tree like the weights, made of its two parts."""
        if self.settings.lora is None:
            return of_base
        adapters = of_lora(self.settings.lora)
        if self.head == "value":
            adapters = {"decoder": adapters}
        return models.merge(adapters, of_base)

    def param_shardings(self) -> Params:
        """The sharding of every weight."""
        return self.partition.shardings(self.axes)

    def base_shardings(self) -> Params:
        """The sharding of every weight that is no adapter's."""
        return models.split_params(self.param_shardings(), models.is_adapter)[1]

    def abstract_params(self, dtype: Any = None) -> Params:
        """Shapes, dtypes and shardings of all weights.

        Args:
          dtype: that of `settings` if not given.
        """
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            self.shapes(self.settings.dtype if dtype is None else dtype),
            self.param_shardings(),
        )

    def abstract_plain(self) -> Params:
        """Shapes, dtypes and shardings of all weights but adapters, with no matrix
        quantised."""
        has_values = self.head == "value"
        axes = (models.critic_axes if has_values else models.logical_axes)(self.arch)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            self._base(self.settings.dtype, None),
            self.partition.shardings(axes),
        )

    def abstract_rows(self, batch: TrainBatch) -> TrainBatch:
        """Shapes, dtypes and shardings of `on_devices(batch)`."""
        return self._abstract(self.fitted(batch))

    def shapes_of_rows(self, batch: TrainBatch) -> list[TrainBatch]:
        """Shapes, dtypes and shardings of `on_devices` of every batch with as many rows
        and sequences as this one, the largest first."""
        largest = self.fitted(batch)
        room = [largest.sequence_capacity]
        if room[0] > 0 and self.layout.pack_length:
            room = packing.capacities(self.layout)
        found = [
            dataclasses.replace(
                jax.tree.map(lambda x, n=n: x[:, :n], largest), sequence_capacity=size
            )
            for n in self._lengths(largest.tokens.shape[1])
            for size in room
        ]
        return [self._abstract(rows) for rows in reversed(found)]

    def _abstract(self, rows: TrainBatch) -> TrainBatch:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.rows), rows
        )

    def on_devices(self, batch: TrainBatch) -> TrainBatch:
        """`fitted` rows, split over the mesh.

        Args:
          batch: on the host; laid out for this mesh or for another.
        """
        return self.place(self.fitted(batch))

    def place(self, rows: TrainBatch) -> TrainBatch:
        """Rows of `fitted`, split over the mesh."""
        return processes.place(rows, self.rows)

    def fitted(self, batch: TrainBatch) -> TrainBatch:
        """A batch in one of the few shapes that programs are compiled for, on the host:
        with empty rows so that it can be split over the mesh, and without columns that
        no row uses, as far as shorter rows are compiled for."""
        num_rows, length = batch.tokens.shape
        rows, tokens = self.layout.rows_multiple, self.layout.length_multiple
        size = -(-num_rows // rows) * rows, -(-length // tokens) * tokens
        if size != (num_rows, length):
            batch = batches.pad_rows(batch, *size)
        in_use = np.flatnonzero((np.asarray(batch.sequence_ids) >= 0).any(axis=0))
        used = in_use[-1] + 1 if len(in_use) else 1
        length = next(n for n in self._lengths(size[1]) if n >= used)
        if length < size[1]:
            batch = jax.tree.map(lambda x: x[:, :length], batch)
        if batch.prompt_ids is not None or not self._counts_sequences:
            batch = dataclasses.replace(batch, sequence_capacity=0)
        return batch

    def _lengths(self, longest: int) -> list[int]:
        """The lengths of rows that programs are compiled for. Packed rows have one;
        others the longest, and a quarter, a half and three quarters of it; on a CPU,
        which takes long to compile, the half. So much is padding at most."""
        multiple = math.lcm(16, self.layout.length_multiple)
        if self.layout.pack_length or longest % multiple:
            return [longest]
        quarters = (2,) if platform_of(self.mesh) == "cpu" else (1, 2, 3)
        parts = {-(-longest * i // (4 * multiple)) * multiple for i in quarters}
        return sorted({n for n in parts if n >= _SHORT} | {longest})

    def fetch(self, found: Num[Array, "R2 T2 *K"], batch: TrainBatch) -> np.ndarray:
        """What was found per token of `on_devices(batch)`, [R, T, *K] on the host."""
        num_rows, length = batch.tokens.shape
        values = processes.fetch(found)[:num_rows, :length]
        beyond = ((0, 0),) * (values.ndim - 2)
        return np.pad(values, ((0, 0), (0, length - values.shape[1]), *beyond))

    def laid_out(self, params: Params, frozen: Params = None) -> Params:
        """All weights where they lie; for use in a function that is differentiated in
        `params`, whose gradients then lie there too.

        Args:
          frozen: weights that `params` lacks, see `models.split_params`.
        """
        params = models.merge(params, frozen)
        return jax.lax.with_sharding_constraint(params, self.param_shardings())

    def hidden(self, params: Params, rows: TrainBatch) -> Float[Array, "R T D"]:
        """`models.forward` of rows."""
        return self._computed(models.forward, params, rows, replay=rows.routes)

    def hidden_and_use(
        self, params: Params, rows: TrainBatch, record: bool
    ) -> tuple[Float[Array, "R T D"], RouterUse]:
        """`hidden`, and how the routers spread the rows' tokens over experts.

        Args:
          record: which experts each token went to, too.
        """
        counted = rows.sequence_ids >= 0
        how = {"replay": rows.routes, "counted": counted, "record": record}
        return self._computed(models.forward, params, rows, **how)

    def values(self, params: Params, rows: TrainBatch) -> Float[Array, "R T"]:
        """`models.values` of rows: the value after each token."""
        return self._computed(models.values, params, rows)

    def in_micro_batches(
        self, function: Callable[[Params, TrainBatch], Any]
    ) -> Callable[[Params, TrainBatch], Any]:
        """`function` of all rows, as many at a time as in the update; compiled.

        Args:
          function: its result is a tree of [R, T].
        """

        def whole(params, batch):
            _, found = updates.accumulate(
                lambda params, rows, _: ((), function(params, rows)),
                params,
                batch,
                (),
                self.layout.micro_batch_size,
            )
            return found

        return jax.jit(whole, compiler_options=COMPILER_OPTIONS)

    def _computed(
        self, function: Callable, params: Params, rows: TrainBatch, **more: Any
    ) -> Any:
        how = self.settings
        return function(
            self.arch,
            params,
            rows.tokens,
            rows.positions,
            batches.attention_ids(rows),
            dtype=jnp.dtype(how.dtype),
            remat=how.remat,
            attention=self._attention(rows),
            loop=models.choose_loop(self.mesh, how.unroll, how.remat),
            lookup=models.choose_lookup(self.partition),
            experts=models.choose_experts(self.partition),
            shard=self.partition.constrain,
            lora=how.lora,
            **more,
        )

    def _attention(self, rows: TrainBatch):
        """Over shared prompts or whole rows."""
        if rows.prompt_ids is not None:
            return functools.partial(
                models.shared_prompts,
                prompt_ids=rows.prompt_ids,
                is_prompt=rows.is_prompt,
            )
        how, capacity = self.settings, rows.sequence_capacity
        return models.choose_attention(
            self.partition, how.dtype, capacity, how.attention
        )

    @property
    def update_options(self) -> dict[str, Any]:
        """What updates ask of XLA: `COMPILER_OPTIONS`, and on GPUs the same sums in the
        same order every time, so that a run that goes on gives the same numbers. Flash
        attention over packed rows and over long ones is left out, and so is where
        layers are unrolled, as on several GPUs: XLA orders the first of several equal
        backward passes of cuDNN only, and then does not find the others."""
        how, rows = self.settings, self.settings.rows
        whole = rows.pack_length is None and rows.contexts == 1
        whole &= (rows.longest or _ORDERED) <= _ORDERED
        alone = models.choose_loop(self.mesh, how.unroll, how.remat) is not unrolled
        flash = self._counts_sequences and not rows.share_prompts
        ordered = (whole and alone) or not flash
        own = {} if self.settings.lora is None else _ADAPTERS_APART
        return (
            COMPILER_OPTIONS | own | {"xla_gpu_exclude_nondeterministic_ops": ordered}
        )

    @property
    def _counts_sequences(self) -> bool:
        """Whether attention is compiled for so many sequences in a row."""
        how = self.settings
        return models.attention_counts_sequences(
            self.partition, how.dtype, how.attention
        )


def named(rows: TrainBatch) -> str:
    """The shape of rows in words: "[128, 4096], 32 sequences a row"."""
    room = rows.sequence_capacity
    shape = f"[{', '.join(map(str, rows.tokens.shape))}]"
    return f"{shape}, {room} sequences a row" if room > 2 else shape


def to_host(tree: Any) -> Any:
    """Arrays in the host's memory, where they wait without taking a device's."""
    return _moved(tree, "pinned_host")


def to_devices(tree: Any) -> Any:
    """Arrays back from the host's memory; no copies of those that are there."""
    return _moved(tree, "device")


def _moved(tree: Any, memory: str) -> Any:
    return jax.tree.map(
        lambda x: jax.device_put(x, x.sharding.with_memory_kind(memory)), tree
    )


def _partition(
    arch: Architecture,
    shapes: Params,
    axes: Params,
    mesh: Mesh,
    settings: ModelSettings,
    keys: Mapping[str, str],
) -> Partition:
    """`models.partition`, which rows fit too."""
    names = {name: name for name in ("mesh", "pack_length", "share_prompts")} | keys
    where, rows = f"{names['mesh']} {dict(mesh.shape)}", settings.rows
    try:
        made = models.partition(arch, shapes, axes, mesh, settings.rules)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    length, multiple = rows.pack_length, _length_multiple(made)
    if length is not None and length % multiple:
        raise ValueError(
            f"{where} splits a row over {multiple} devices, which do not divide "
            f"{names['pack_length']} {length}"
        )
    if rows.share_prompts and made.parts("tokens") > 1:
        raise ValueError(
            f"{where}: {names['share_prompts']} needs whole rows; use context 1"
        )
    return made


def _length_multiple(partition: Partition) -> int:
    return math.lcm(partition.parts("tokens"), partition.parts("residual"))
