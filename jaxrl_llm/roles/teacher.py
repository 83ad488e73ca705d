"""A frozen policy of any size that a student learns from.

teacher = Teacher(policy, source, topk=32)
rows = dataclasses.replace(rows, taught=teacher.score(rows))
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Lowered

from jaxrl_llm.data import rows as batches
from jaxrl_llm.data.rows import Taught, TrainBatch
from jaxrl_llm.models import WeightSource
from jaxrl_llm.models.apply import Params
from jaxrl_llm.roles.policy import Policy
from jaxrl_llm.roles.sharded_model import named, to_devices, to_host


class Teacher:
    """What a larger or better model says about the tokens that a student wrote.

    Its vocabulary is the student's. Its weights have the compute dtype.

    Args:
      policy: on the teacher's mesh, with the teacher's architecture.
      source: of its weights.
      topk: how many of the likeliest tokens it tells; none if not given.
      offload: weights wait in the host's memory while nothing is asked.
    """

    def __init__(
        self,
        policy: Policy,
        source: WeightSource,
        *,
        topk: int | None = None,
        offload: bool = False,
    ):
        self.policy, self.offload = policy, offload
        self._source, self._topk = source, topk
        self._score = policy.in_micro_batches(
            functools.partial(policy.taught, topk=topk)
        )

    def score(self, batch: TrainBatch) -> Taught:
        """What it says about all response tokens, on the host.

        Args:
          batch: on the host; laid out for this mesh or for another.
        """
        rows = self.policy.on_devices(batches.bare(batch))
        found = self._score(self.weights(), rows)
        return jax.tree.map(lambda x: self.policy.fetch(x, batch), found)

    def nothing(self, batch: TrainBatch) -> Taught:
        """What `score` returns but for the numbers, which are 0."""
        shape = batch.tokens.shape
        zeros, top = np.zeros(shape, np.float32), (None, None)
        if self._topk is not None:
            shape = (*shape, self._topk)
            top = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        return Taught(zeros, zeros, *top)

    def weights(self) -> Params:
        """The weights, on the devices."""
        return to_devices(self._kept) if self.offload else self._kept

    def abstract_params(self) -> Params:
        """Shapes, dtypes and shardings of the weights on the devices."""
        return self.policy.abstract_params()

    def lower_scoring(self, batch: TrainBatch) -> Lowered:
        """The program of `score` for rows of these shapes.

        Args:
          batch: on the host; laid out for this mesh or for another.
        """
        return self._lower(self.policy.abstract_rows(batches.bare(batch)))

    def programs(self, batch: TrainBatch) -> dict[str, Callable[[], Lowered]]:
        """Every program that scoring needs, whatever lengths there are, each from
        shapes alone: its name, and what lowers it.

        Args:
          batch: of a step, on the host; laid out for this mesh or for another.
        """
        return {
            f"teacher {named(rows)}": functools.partial(self._lower, rows)
            for rows in self.policy.shapes_of_rows(batches.bare(batch))
        }

    def _lower(self, rows: TrainBatch) -> Lowered:
        return self._score.lower(self.abstract_params(), rows)

    @functools.cached_property
    def _kept(self) -> Params:
        """The weights, where they wait."""
        params: Any = self._source.load(
            dtype=jnp.dtype(self.policy.settings.dtype),
            shardings=self.policy.param_shardings(),
        )
        return to_host(params) if self.offload else params
