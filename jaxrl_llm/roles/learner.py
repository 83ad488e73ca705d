"""A model that learns from rows that are there: its state on the mesh, its update, and
what an objective says of held-out rows.

learner = Learner(model, objective, outputs, read=..., optimizer=..., ...)
state = learner.start()
state, metrics = learner.update(state, rows)
metrics = learner.measure(state.params, [rows, ...])
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from jax.stages import Lowered

from jaxrl_llm import models
from jaxrl_llm.algorithms import statistics
from jaxrl_llm.algorithms import update as updates
from jaxrl_llm.algorithms.objectives import Objective, Outputs
from jaxrl_llm.algorithms.update import TrainState
from jaxrl_llm.data.rows import TrainBatch
from jaxrl_llm.models import Architecture, WeightSource
from jaxrl_llm.models.apply import Params
from jaxrl_llm.roles import merging
from jaxrl_llm.roles.sharded_model import COMPILER_OPTIONS, ShardedModel, named
from jaxrl_llm.roles.trained_model import Meanwhile, MiniBatches, TrainedModel, nothing

OutputsOf = Callable[[Params, TrainBatch, Params], Outputs]
"""(parameters that are trained, rows, frozen ones or None) -> what an objective is
handed."""


class Learner:
    """Everything about a model that learns from rows but the state that changes.

    Args:
      objective: what it learns. Rows are one mini-batch.
      outputs: differentiable in its first argument.
      read: gives all weights before training in a dtype, where they lie.
      schedule: the learning rate as a function of updates, which is logged.
      largest: rows of a step in which everything is as long as it may be.
      is_trained: whether a parameter is trained, by its name: see
        `models.split_params`. All are if not given; the others stay as they are read,
        in the compute dtype.
      adapters: source of those to start from, which are trained with a value head if
        there is one, and nothing else; needed if and only if the model's settings have
        any.
    """

    def __init__(
        self,
        model: ShardedModel,
        objective: Objective,
        outputs: OutputsOf,
        *,
        read: Callable[[Any], Params],
        optimizer: optax.GradientTransformation,
        schedule: optax.Schedule,
        largest: TrainBatch,
        is_trained: Callable[[str], bool] | None = None,
        adapters: WeightSource | None = None,
    ):
        self.model, self.objective, self.schedule = model, objective, schedule
        self.largest_rows, self._adapters = largest, adapters
        self._read = read
        if adapters is not None:
            is_trained = merging.is_trained
            self._merge = merging.Merging(model)
        rows = model.layout.micro_batch_size

        def prepare(params):
            if model.head == "tokens":
                return models.for_products(self.arch, params, model.settings.dtype)
            return params

        def how(frozen):
            return {
                "outputs_fn": lambda params, rows: outputs(params, rows, frozen),
                "micro_batch_size": rows,
                "prepare": prepare,
            }

        def update(state, batch, frozen):
            return updates.update(
                state, batch, objective, optimizer, joinable=True, **how(frozen)
            )

        def measure_held_out(params, batch, frozen):
            return updates.measure(params, batch, objective, **how(frozen))

        self._trained = TrainedModel(
            model,
            update,
            optimizer=optimizer,
            mini_batches=MiniBatches(),
            is_trained=is_trained,
        )
        self._measure = jax.jit(measure_held_out, compiler_options=COMPILER_OPTIONS)

    @property
    def name(self) -> str:
        """What its metrics begin with."""
        return self.objective.name

    @property
    def arch(self) -> Architecture:
        """The model's."""
        return self.model.arch

    @property
    def mesh(self) -> Mesh:
        """The model's."""
        return self.model.mesh

    def start(self) -> TrainState:
        """The state before the first update. Reads the weights that are trained."""
        return self._trained.first_state(self._before())

    def _before(self) -> Params:
        if self._adapters is not None:
            return merging.before_training(self.model, self._adapters)
        return self._trained.split(self._read("float32"))[0]

    def first_weights(self) -> Params:
        """All weights before training, as the model is computed with. Reads them."""
        return models.merge(self._before(), self.frozen)

    @functools.cached_property
    def frozen(self) -> Params:
        """The weights that are not trained; None if all are. Reads them."""
        if self._trained.is_trained is None:
            return None
        return self._trained.split(self._read(self.model.settings.dtype))[1]

    def weights(self, state: TrainState) -> Params:
        """All weights of the model, as others may read them: adapters are added to
        their matrices."""
        if self._adapters is None:
            return models.merge(state.params, self.frozen)
        if self.model.head == "tokens":
            return self._merge(self.frozen, state.params)
        base, adapters = self.frozen["decoder"], state.params["decoder"]
        return state.params | {"decoder": self._merge(base, adapters)}

    def is_finite(self, state: TrainState) -> bool:
        """Whether all weights that are trained are finite."""
        return self._trained.is_finite(state)

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state."""
        return self._trained.abstract_state()

    def update(
        self, state: TrainState, batch: TrainBatch, meanwhile: Meanwhile = nothing
    ) -> tuple[TrainState, dict[str, float]]:
        """One optimizer step. Donates `state`.

        Args:
          batch: on the host.
          meanwhile: called when all is dispatched, before it is waited for.

        Returns:
          The next state, and metrics.
        """
        state, found = self._trained.update(
            state,
            batch,
            0,
            frozen=self.frozen,
            measure=self._trained.efficiency,
            meanwhile=meanwhile,
        )
        found[f"{self.name}/lr"] = float(self.schedule(int(state.step) - 1))
        return jax.block_until_ready(state), found

    def measure(self, params: Params, parts: Iterable[TrainBatch]) -> dict[str, float]:
        """The objective's metrics of all rows, from which nothing is learned.

        Args:
          params: those of the state.
          parts: on the host, each as large as a step's at most.
        """
        found = [
            jax.device_get(
                self._measure(params, self.model.on_devices(rows), self.frozen)
            )
            for rows in parts
        ]
        return statistics.join(found)

    def lower_largest_update(self) -> Lowered:
        """The update with rows in which everything is as long as it may be."""
        return self._trained.lower(self.largest_rows, self.abstract_frozen())

    def programs(self, measures: bool) -> dict[str, Callable[[], Lowered]]:
        """Every program that the steps of a run need, whatever lengths there are, each
        from shapes alone: its name, and what lowers it.

        Args:
          measures: whether there are held-out rows.
        """
        found: dict[str, Callable[[], Lowered]] = {}
        params, frozen = self.abstract_state().params, self.abstract_frozen()
        for rows in self.model.shapes_of_rows(self.largest_rows):
            found[f"update {named(rows)}"] = functools.partial(
                self._trained.lower_step, rows, frozen
            )
            if measures:
                found[f"held-out rows {named(rows)}"] = functools.partial(
                    self._measure.lower, params, rows, frozen
                )
        return found

    def abstract_frozen(self) -> Params:
        """Shapes, dtypes and shardings of `frozen`."""
        return self._trained.split(self.model.abstract_params())[1]
