"""A policy on a mesh: how weights and rows lie there, and log-probabilities of rows."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxrl_llm import models
from jaxrl_llm.algorithms import logprobs
from jaxrl_llm.algorithms import update as updates
from jaxrl_llm.config.parsing import ConfigError
from jaxrl_llm.config.schema import Config
from jaxrl_llm.data import rows as batches
from jaxrl_llm.data.packing import Layout
from jaxrl_llm.data.rows import TrainBatch
from jaxrl_llm.models import Architecture
from jaxrl_llm.sharding import processes, rules
from jaxrl_llm.sharding.mesh import platform_of

COMPILER_OPTIONS = models.COMPILER_OPTIONS | {
    f"xla_gpu_{which}_combine_threshold_bytes": 2**28
    for which in ("all_gather", "reduce_scatter")
}
"""Of updates and of scoring. A layer's weights come together at once, and so do its
gradients: 1 % faster on two H100 than in parts of 30 MB. Other platforms take no
notice."""


class Policy:
    """Everything about a policy but its weights.

    Args:
      mesh: axes of `mesh.AXES`, such as "data", "fsdp" and "tensor".
      name: the setting that `mesh` comes from.

    Raises:
      ConfigError: the model or its rows cannot be split evenly over `mesh`, or
        `actor.keep_probabilities` is not for this model.
    """

    def __init__(
        self, config: Config, arch: Architecture, mesh: Mesh, name: str = "actor.mesh"
    ):
        self.config, self.arch, self.mesh = config, arch, mesh
        actor = config.actor
        if actor.keep_probabilities and arch.logit_softcap is not None:
            raise ConfigError(
                f"actor.keep_probabilities is true, but a {arch.model_type} model caps "
                "its logits, whose gradient needs them; set it to false"
            )
        self.partition = partition(
            config,
            name,
            arch,
            models.abstract_params(arch),
            models.logical_axes(arch),
            mesh,
            actor.rules,
        )
        self.rows = self.partition.sharding("rows", "tokens")
        self.layout = layout(config, self.partition, actor.micro_batch_size)
        self._score = self._in_micro_batches(self.logprobs)
        self._concentration = self._in_micro_batches(self._sum_pi_squared)

    def param_shardings(self) -> Any:
        """Of every parameter."""
        return self.partition.shardings(models.logical_axes(self.arch))

    def abstract_params(self, dtype: Any) -> Any:
        """Shapes, dtypes and shardings of its weights."""
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            models.abstract_params(self.arch, dtype=jnp.dtype(dtype)),
            self.param_shardings(),
        )

    def score(self, params: Any, batch: TrainBatch) -> Float[np.ndarray, "R T"]:
        """Log-probabilities of all response tokens.

        Args:
          batch: on the host; laid out for this mesh or for another.
        """
        return self._fetch(self._score(params, self.on_devices(batch)).logprobs, batch)

    def sum_pi_squared(
        self, params: Any, batch: TrainBatch
    ) -> Float[np.ndarray, "R T"]:
        """`logprobs.sum_pi_squared` of all response tokens."""
        return self._fetch(self._concentration(params, self.on_devices(batch)), batch)

    def lower_scoring(self, batch: TrainBatch, dtype: Any) -> jax.stages.Lowered:
        """The program of `score` for weights of `dtype` and rows of these shapes."""
        rows = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.rows),
            jax.eval_shape(lambda: self._padded(batch)),
        )
        return self._score.lower(self.abstract_params(dtype), rows)

    def on_devices(self, batch: TrainBatch) -> TrainBatch:
        """Rows split over the mesh, with empty ones so that they can be."""
        return processes.place(self._padded(batch), self.rows)

    def _padded(self, batch: TrainBatch) -> TrainBatch:
        num_rows, length = batch.tokens.shape
        rows, tokens = self.layout.rows_multiple, self.layout.length_multiple
        size = -(-num_rows // rows) * rows, -(-length // tokens) * tokens
        return batch if size == (num_rows, length) else batches.pad_rows(batch, *size)

    def _fetch(self, found: Float[Array, "R2 T2"], batch: TrainBatch) -> np.ndarray:
        num_rows, length = batch.tokens.shape
        return processes.fetch(found)[:num_rows, :length]

    def logprobs(self, params: Any, rows: TrainBatch) -> logprobs.Logprobs:
        """Log-probability and entropy of every response token, at the temperature it
        was sampled at."""

        def of_rows(hidden, matrix, asked, **how):
            return logprobs.of_tokens(
                hidden,
                matrix,
                asked.tokens,
                asked.positions,
                asked.response_mask,
                entropy_gradient=self.config.actor.entropy_coeff != 0,
                keep=self.config.actor.keep_probabilities,
                **how,
            )

        found = self._by_rows(of_rows, *self._asked(params, rows))
        return logprobs.Logprobs(*(self._join(x, rows.tokens.shape) for x in found))

    def _sum_pi_squared(self, params: Any, rows: TrainBatch) -> Float[Array, "R T"]:
        def of_rows(hidden, matrix, asked, **how):
            return logprobs.sum_pi_squared(
                hidden, matrix, asked.positions, asked.response_mask, **how
            )

        found = self._by_rows(of_rows, *self._asked(params, rows))
        return self._join(found, rows.tokens.shape)

    def _by_rows(self, function: Callable, hidden, matrix, rows: TrainBatch):
        """`function` of these, and of what `logprobs.of_tokens` has to know besides;
        the logits of 4,096 tokens a device may exist at once.

        On GPUs each device does so with rows of its own: what is summed over tokens, as
        the matrix' gradient, meets once, not after each chunk of them. A TPU's compiler
        splits such sums so that no chip holds all of them, which here is worth more;
        and rows that are too few for all devices are the compiler's too.
        """

        def of_rows(hidden, matrix, rows, **how):
            return function(
                hidden,
                matrix,
                rows,
                previous=batches.previous_tokens(rows),
                temperature=self.config.rollout.temperature,
                logit_softcap=self.arch.logit_softcap,
                **how,
            )

        names = self.partition.axes("rows") + self.partition.axes("tokens")
        axes = tuple(axis for axis in names if self.mesh.shape[axis] > 1)
        parts = math.prod(self.mesh.shape[axis] for axis in axes)
        if not axes or platform_of(self.mesh) == "tpu" or len(hidden) % parts:
            matrix = self.partition.constrain(matrix, "vocab", None)
            return of_rows(hidden, matrix, rows, chunk=4096 * parts)
        split = tuple(a for a in self.partition.axes("embed") if a in axes)
        return jax.shard_map(
            functools.partial(of_rows, split=split, chunk=4096),
            mesh=self.mesh,
            axis_names=set(axes),
            in_specs=(P(axes), P(None, split), P(axes)),
            out_specs=P(axes),
            check_vma=False,
        )(hidden, matrix, rows)

    def _asked(self, params: Any, rows: TrainBatch):
        """Hidden states, output matrix, and rows, taken apart where devices share
        them."""
        actor, partition = self.config.actor, self.partition
        # Gradients lie where their parameters lie.
        params = jax.lax.with_sharding_constraint(params, self.param_shardings())
        hidden = models.forward(
            self.arch,
            params,
            rows.tokens,
            rows.positions,
            rows.sequence_ids,
            dtype=jnp.dtype(actor.dtype),
            remat=actor.remat,
            attention=attention(partition, actor.dtype, actor.attention, rows),
            loop=models.choose_loop(self.mesh, actor.unroll, actor.remat),
            shard=partition.constrain,
        )
        matrix = models.output_matrix(params)
        if partition.parts("tokens") == 1:
            return hidden, matrix, rows
        hidden, rows = jax.tree.map(self._take_apart, (hidden, rows))
        mask = rows.response_mask.at[:, 0].set(False)
        return hidden, matrix, dataclasses.replace(rows, response_mask=mask)

    def _take_apart(self, x: Array) -> Array:
        """[R, T, ...] -> [R * parts, 1 + T / parts, ...]: each device's part of a row,
        behind the token that comes before it."""
        axes = self.partition.axes("rows") + self.partition.axes("tokens")
        length = x.shape[1] // self.partition.parts("tokens")

        def parts(x):
            x = x.reshape(-1, length, *x.shape[2:])
            return jax.lax.with_sharding_constraint(
                x, NamedSharding(self.mesh, P(axes))
            )

        return jnp.concatenate([parts(jnp.roll(x, 1, axis=1))[:, :1], parts(x)], axis=1)

    def _join(self, x: Array, shape: tuple[int, int]) -> Array:
        """What was found of rows that were taken apart, [R, T]."""
        return x[:, -(shape[1] // self.partition.parts("tokens")) :].reshape(shape)

    def _in_micro_batches(self, function: Callable) -> Callable:
        """`function` of all rows, as many at a time as in the update; compiled."""

        def whole(params, batch):
            _, found = updates.accumulate(
                lambda params, rows, _: ((), function(params, rows)),
                params,
                batch,
                (),
                self.config.actor.micro_batch_size,
            )
            return found

        return jax.jit(whole, compiler_options=COMPILER_OPTIONS)


def partition(
    config: Config,
    name: str,
    arch: Architecture,
    shapes: Any,
    logical_axes: Any,
    mesh: Mesh,
    changed: rules.Rules,
) -> rules.Partition:
    """The training layout of the actor or the critic: see `models.partition`.

    Raises:
      ConfigError: the model or its rows cannot be split evenly over `mesh`.
    """
    where, actor = f"{name} {dict(mesh.shape)}", config.actor
    try:
        made = models.partition(arch, shapes, logical_axes, mesh, changed)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
    length, multiple = actor.pack_length, _length_multiple(made)
    if length is not None and length % multiple:
        raise ConfigError(
            f"{where} splits a row over {multiple} devices, which do not divide "
            f"actor.pack_length {length}"
        )
    if actor.share_prompts and made.parts("tokens") > 1:
        raise ConfigError(
            f"{where}: actor.share_prompts needs whole rows; use context 1"
        )
    return made


def _length_multiple(partition: rules.Partition) -> int:
    return math.lcm(partition.parts("tokens"), partition.parts("residual"))


def attention(
    partition: rules.Partition, dtype: str, implementation: str, rows: TrainBatch
):
    """What `models.forward` attends with: shared prompts or whole rows."""
    if rows.prompt_ids is not None:
        return functools.partial(
            models.shared_prompts,
            prompt_ids=rows.prompt_ids,
            response_mask=rows.response_mask,
        )
    capacity = rows.sequence_capacity
    return models.choose_attention(partition, dtype, capacity, implementation)


def layout(
    config: Config, partition: rules.Partition, micro_batch_size: int | None
) -> Layout:
    """The rows of a training step."""
    return Layout(
        pack_length=config.actor.pack_length,
        rows_multiple=partition.parts("rows"),
        length_multiple=_length_multiple(partition),
        micro_batch_size=micro_batch_size,
        share_prompts=config.actor.share_prompts,
        longest=config.data.max_prompt_length + config.rollout.max_response_length,
    )
