"""A policy on a mesh: log-probabilities of rows."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, UInt

from jaxrl_llm import models
from jaxrl_llm.algorithms import distillation, logprobs
from jaxrl_llm.algorithms.distillation import Distilled
from jaxrl_llm.data import rows as batches
from jaxrl_llm.data.rows import Taught, TrainBatch
from jaxrl_llm.data.types import RouterUse
from jaxrl_llm.models import Architecture
from jaxrl_llm.models.apply import Params
from jaxrl_llm.roles.sharded_model import ModelSettings, ShardedModel
from jaxrl_llm.sharding.mesh import platform_of


@dataclass(frozen=True, kw_only=True)
class PolicySettings(ModelSettings):
    """How a policy is computed."""

    temperature: float = 1.0
    """The sampling temperature; logits are divided by it."""
    entropy_gradient: bool = False
    """Whether the entropy is differentiated."""
    keep_probabilities: bool = False
    """Keep softmax(logits) for the backward pass rather than compute it again; not with
    `entropy_gradient`."""
    num_tokens: int | None = None
    """Rows of the output matrix that are tokens; those behind are padding, which gets
    no probability. All if not given."""
    likeliest: bool = False
    """Whether to tell where a token is the most likely one."""


class Policy(ShardedModel):
    """Everything about a policy on a mesh but its weights.

    Args:
      mesh: axes of `mesh.AXES`, such as "data", "fsdp" and "tensor".
      keys: what errors call a setting, see `ShardedModel`.

    Raises:
      ValueError: the model or its rows cannot be split evenly over `mesh`, or
        `keep_probabilities` is not for this model.
    """

    def __init__(
        self,
        arch: Architecture,
        mesh: Mesh,
        settings: PolicySettings,
        *,
        keys: Mapping[str, str] | None = None,
    ):
        if settings.keep_probabilities and arch.logit_softcap is not None:
            name = (keys or {}).get("keep_probabilities", "keep_probabilities")
            raise ValueError(
                f"{name} is true, but a {arch.model_type} model caps its logits, whose "
                "gradient needs them; set it to false"
            )
        super().__init__(arch, mesh, settings, keys=keys)
        self.settings: PolicySettings = settings
        self._score = self.in_micro_batches(self.logprobs)
        self._record = self.in_micro_batches(self._recorded)
        self._concentration = self.in_micro_batches(self._sum_pi_squared)

    def score(self, params: Params, batch: TrainBatch) -> Float[np.ndarray, "R T"]:
        """Log-probabilities of all response tokens.

        Args:
          batch: on the host; laid out for this mesh or for another.
        """
        rows = self.on_devices(batches.bare(batch))
        return self.fetch(self._score(params, rows).logprobs, batch)

    def score_and_record(
        self, params: Params, batch: TrainBatch
    ) -> tuple[Float[np.ndarray, "R T"], UInt[np.ndarray, "R T L k"]]:
        """`score`, and the experts of every token, as `TrainBatch.routes`."""
        rows = self.on_devices(batches.bare(batch))
        found, routes = self._record(params, rows)
        return self.fetch(found, batch), self.fetch(routes, batch)

    def sum_pi_squared(
        self, params: Params, batch: TrainBatch
    ) -> Float[np.ndarray, "R T"]:
        """`logprobs.sum_pi_squared` of all response tokens."""
        rows = self.on_devices(batches.bare(batch))
        return self.fetch(self._concentration(params, rows), batch)

    def lower_scoring(
        self, batch: TrainBatch, params: Params, record: bool = False
    ) -> jax.stages.Lowered:
        """The program of `score`, or of `score_and_record`, for weights and rows of
        these shapes."""
        return self.lower_score(self.abstract_rows(batches.bare(batch)), params, record)

    def lower_score(
        self, rows: TrainBatch, params: Params, record: bool = False
    ) -> jax.stages.Lowered:
        """`lower_scoring` for rows of `shapes_of_rows`."""
        return (self._record if record else self._score).lower(params, rows)

    def lower_sum_pi_squared(
        self, rows: TrainBatch, params: Params
    ) -> jax.stages.Lowered:
        """The program of `sum_pi_squared` for weights of these shapes and rows of
        `shapes_of_rows`."""
        return self._concentration.lower(params, rows)

    def logprobs_and_use(
        self,
        params: Params,
        rows: TrainBatch,
        frozen: Params = None,
        record: bool = False,
    ) -> tuple[logprobs.Logprobs, RouterUse]:
        """`logprobs`, and how the routers spread the rows' tokens over experts.

        Args:
          record: which experts each token went to, too.
        """
        uses: list[RouterUse] = []

        def take(hidden_and_use):
            hidden, use = hidden_and_use(record)
            uses.append(use)
            return hidden

        found = self.logprobs(params, rows, frozen, take=take)
        return found, uses[0]

    def logprobs(
        self,
        params: Params,
        rows: TrainBatch,
        frozen: Params = None,
        take: Callable[[Callable], Array] | None = None,
    ) -> logprobs.Logprobs:
        """Log-probability and entropy of every response token, at the temperature it
        was sampled at.

        Args:
          frozen: weights that `params` lacks, which are not differentiated.
          take: gives the hidden states, see `logprobs_and_use`.
        """

        def of_rows(hidden, matrix, asked, **how):
            return logprobs.of_tokens(
                hidden,
                matrix,
                asked.tokens,
                asked.positions,
                asked.response_mask,
                entropy_gradient=self.settings.entropy_gradient,
                matrix_gradient=self.settings.lora is None,
                keep=self.settings.keep_probabilities,
                likeliest=self.settings.likeliest,
                **how,
            )

        found = self._by_rows(of_rows, *self._asked(params, rows, frozen, take))
        return jax.tree.map(lambda x: self._join(x, rows.tokens.shape), found)

    def _recorded(self, params: Params, rows: TrainBatch) -> tuple[Array, Array]:
        found, use = self.logprobs_and_use(params, rows, record=True)
        return found.logprobs, use.routes

    def taught(
        self, params: Params, rows: TrainBatch, topk: int | None = None
    ) -> Taught:
        """`distillation.taught` of every response token, with this as the teacher."""

        def of_rows(hidden, matrix, asked, **how):
            return distillation.taught(
                hidden,
                matrix,
                asked.tokens,
                asked.positions,
                asked.response_mask,
                topk=topk,
                **how,
            )

        return self._of_rows(of_rows, rows, self._asked(params, rows))

    def with_topk(
        self, params: Params, rows: TrainBatch, frozen: Params = None
    ) -> Distilled:
        """`distillation.with_topk` of every response token, with this as the student of
        the teacher whose words are in `rows`.

        Args:
          frozen: as of `logprobs`.
        """

        def of_rows(hidden, matrix, asked, **how):
            return distillation.with_topk(
                hidden,
                matrix,
                asked.tokens,
                asked.positions,
                asked.response_mask,
                asked.taught,
                entropy_gradient=self.settings.entropy_gradient,
                **how,
            )

        return self._of_rows(of_rows, rows, self._asked(params, rows, frozen))

    def with_teacher(
        self,
        params: Params,
        rows: TrainBatch,
        teacher: "Policy",
        teacher_params: Params,
        beta: float,
        frozen: Params = None,
    ) -> Distilled:
        """`distillation.with_teacher` of every response token, with this as the
        student.

        Args:
          teacher: on this mesh. Not differentiated.
          frozen: as of `logprobs`.
        """

        def of_rows(hidden, matrix, asked, other, **how):
            return distillation.with_teacher(
                hidden,
                matrix,
                asked.tokens,
                asked.positions,
                asked.response_mask,
                teacher=other,
                beta=beta,
                other_softcap=teacher.arch.logit_softcap,
                entropy_gradient=self.settings.entropy_gradient,
                **how,
            )

        said = teacher._asked(jax.lax.stop_gradient(teacher_params), rows)
        asked = self._asked(params, rows, frozen)
        return self._of_rows(of_rows, rows, asked, other=(teacher, *said[:2]))

    def _sum_pi_squared(self, params: Params, rows: TrainBatch) -> Float[Array, "R T"]:
        def of_rows(hidden, matrix, asked, **how):
            return logprobs.sum_pi_squared(
                hidden, matrix, asked.positions, asked.response_mask, **how
            )

        found = self._by_rows(of_rows, *self._asked(params, rows))
        return self._join(found, rows.tokens.shape)

    def _of_rows(self, function: Callable, rows: TrainBatch, asked, **other) -> Any:
        """`_by_rows` of `_asked`, joined: a tree of [R, T, ...]."""
        found = self._by_rows(function, *asked, **other)
        return jax.tree.map(lambda x: self._join(x, rows.tokens.shape), found)

    def _by_rows(
        self,
        function: Callable,
        hidden,
        matrix,
        rows: TrainBatch,
        other: tuple["Policy", Array, Array] | None = None,
    ):
        """`function` of these, and of what `logprobs.of_tokens` has to know besides;
        the logits of 4,096 tokens a device may exist at once.

        On GPUs each device does so with rows of its own: what is summed over tokens, as
        the matrix' gradient, meets once, not after each chunk of them. A TPU's compiler
        splits such sums so that no chip holds all of them, which here is worth more;
        and rows that are too few for all devices are the compiler's too.

        Args:
          other: another policy on this mesh, its hidden states and its output matrix,
            which `function` gets as one more argument.
        """
        given, more = (), {}
        if other is not None:
            given = (other[1:],)

        def of_rows(hidden, matrix, rows, *given, **how):
            return function(
                hidden,
                matrix,
                rows,
                *given,
                previous=batches.previous_tokens(rows),
                temperature=self.settings.temperature,
                logit_softcap=self.arch.logit_softcap,
                **how,
            )

        names = self.partition.axes("rows") + self.partition.axes("tokens")
        axes = tuple(axis for axis in names if self.mesh.shape[axis] > 1)
        parts = math.prod(self.mesh.shape[axis] for axis in axes)
        if not axes or platform_of(self.mesh) == "tpu" or len(hidden) % parts:
            matrix = self._whole_vocabulary(matrix)
            if other is not None:
                given = ((other[1], other[0]._whole_vocabulary(other[2])),)
            return of_rows(hidden, matrix, rows, *given, chunk=4096 * parts)
        split = self._split(axes)
        specs = P(axes), P(None, split), P(axes)
        if other is not None:
            more = {"other_split": other[0]._split(axes)}
            specs += ((P(axes), P(None, more["other_split"])),)
        return jax.shard_map(
            functools.partial(of_rows, split=split, chunk=4096, **more),
            mesh=self.mesh,
            axis_names=set(axes),
            in_specs=specs,
            out_specs=P(axes),
            check_vma=False,
        )(hidden, matrix, rows, *given)

    def _split(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        """Those of the axes over which the output matrix is split along D."""
        return tuple(a for a in self.partition.axes("embed") if a in axes)

    def _whole_vocabulary(self, matrix: Float[Array, "V d"]) -> Float[Array, "V d"]:
        """The output matrix where all of D is together."""
        if len(matrix) % self.partition.parts("vocab"):
            return matrix  # without padding, it may not divide any more
        return self.partition.constrain(matrix, "vocab", None)

    def _asked(
        self,
        params: Params,
        rows: TrainBatch,
        frozen: Params = None,
        take: Callable[[Callable], Array] | None = None,
    ):
        """Hidden states, output matrix, and rows, taken apart where devices share
        them."""
        params = self.laid_out(params, frozen)
        read, matrix = rows, models.output_matrix(params)
        if (known := self.settings.num_tokens) is not None:
            matrix = matrix[:known]
            tokens = jnp.minimum(rows.tokens, self.arch.vocab_size - 1)
            read = dataclasses.replace(rows, tokens=tokens)
        if take is None:
            hidden = self.hidden(params, read)
        else:
            hidden = take(functools.partial(self.hidden_and_use, params, read))
        rows = dataclasses.replace(rows, routes=None)
        if self.partition.parts("tokens") == 1:
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
        """What was found of rows that were taken apart, [R, T, ...]."""
        x = x[:, -(shape[1] // self.partition.parts("tokens")) :]
        return x.reshape(*shape, *x.shape[2:])
