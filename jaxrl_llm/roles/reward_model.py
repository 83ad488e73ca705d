"""A frozen model that judges: its weights on a mesh, and what it says of responses.

judge = RewardModel(model, source, most_responses=256)
scores = judge.score(prompts, episodes)
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.stages import Lowered
from jaxtyping import Array, Float, Float32

from jaxrl_llm.algorithms import masked
from jaxrl_llm.algorithms import update as updates
from jaxrl_llm.data import packing
from jaxrl_llm.data.rows import TrainBatch, bare
from jaxrl_llm.data.types import Episode, Prompt
from jaxrl_llm.models import WeightSource
from jaxrl_llm.models.apply import Params
from jaxrl_llm.roles.sharded_model import (
    COMPILER_OPTIONS,
    ShardedModel,
    named,
    to_devices,
    to_host,
)
from jaxrl_llm.sharding import processes


class RewardModel:
    """What a response is worth by a decoder with a head of one number: its value after
    the last token of prompt and response, a stop token included.

    The model reads the very tokens that the policy read and wrote. It has to have the
    policy's vocabulary, and to understand the policy's chat template: prompts are not
    rendered again with one of its own.

    Args:
      model: with a value head.
      source: of decoder and head, such as `models.Classifier`.
      most_responses: to score at a time.
      weight: of its scores in the reward.
      offload: weights wait in the host's memory while nothing is scored.
    """

    name = "reward_model"
    """In metrics and errors."""

    def __init__(
        self,
        model: ShardedModel,
        source: WeightSource,
        *,
        most_responses: int,
        weight: float = 1.0,
        offload: bool = False,
    ):
        self.model, self.weight, self.offload = model, weight, offload
        self._source, self._most_responses = source, most_responses
        self._score = jax.jit(
            self._scores,
            out_shardings=NamedSharding(model.mesh, P()),
            compiler_options=COMPILER_OPTIONS,
        )

    def score(
        self, prompts: Sequence[Prompt], episodes: Sequence[Sequence[Episode]]
    ) -> Float32[np.ndarray, "P G"]:
        """One number per episode. All processes call it with the same ones.

        Never more than `most_responses` at a time, if that is a group or more, so that
        held-out questions, which may be many, need no more memory than a step.

        Args:
          episodes: G of them for every prompt, by sample.
        """
        params = self._kept
        if self.offload:
            params = to_devices(params)
        size = len(episodes[0])
        most = max(self._most_responses, size)
        together = most // size
        layout = dataclasses.replace(self.model.layout, most_sequences=most)
        found = []
        for i in range(0, len(prompts), together):
            groups = episodes[i : i + together]
            unknown = np.zeros((len(groups), size), np.float32)
            rows = packing.make_rows(
                prompts[i : i + together], groups, unknown, layout=layout
            )
            scores = self._score(params, self.model.on_devices(rows))
            scores = processes.fetch(scores)[: unknown.size]
            found.append(scores.reshape(unknown.shape))
        return np.concatenate(found)

    def abstract_params(self) -> Params:
        """Shapes, dtypes and shardings of the weights on the devices."""
        return self.model.abstract_params()

    def lower_scoring(self, batch: TrainBatch) -> Lowered:
        """The program that scores these sequences.

        Args:
          batch: on the host; laid out for this mesh or for another.
        """
        return self._lower(self.model.abstract_rows(self._laid_out(batch)))

    def programs(self, batch: TrainBatch) -> dict[str, Callable[[], Lowered]]:
        """Every program that scoring needs, whatever lengths there are, each from
        shapes alone: its name, and what lowers it.

        Args:
          batch: of a step, on the host; laid out for this mesh or for another.
        """
        return {
            f"reward model {named(rows)}": functools.partial(self._lower, rows)
            for rows in self.model.shapes_of_rows(self._laid_out(batch))
        }

    def _laid_out(self, batch: TrainBatch) -> TrainBatch:
        every, most = range(batch.num_sequences), self._most_responses
        layout = dataclasses.replace(self.model.layout, most_sequences=most)
        return packing.take(bare(batch), every, layout=layout)

    def _lower(self, rows: TrainBatch) -> Lowered:
        return self._score.lower(self.abstract_params(), rows)

    def _scores(self, params: Params, rows: TrainBatch) -> Float[Array, " S"]:
        """The value after the last token of every sequence, in micro-batches."""

        def part(params, rows, _):
            ids = rows.sequence_ids
            where = masked.is_last(ids), ids, rows.num_sequences
            return masked.sequence_sum(self.model.values(params, rows), *where), ()

        found, _ = updates.accumulate(
            part, params, rows, (), self.model.layout.micro_batch_size
        )
        return found

    @functools.cached_property
    def _kept(self) -> Params:
        """The weights, where they wait."""
        params: Any = self._source.load(
            dtype=jnp.dtype(self.model.settings.dtype),
            shardings=self.model.param_shardings(),
        )
        return to_host(params) if self.offload else params
