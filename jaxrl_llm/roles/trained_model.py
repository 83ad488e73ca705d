"""A sharded model that learns: its state on the mesh, and the optimizer steps of one
training step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool

from jaxrl_llm import models
from jaxrl_llm.algorithms import statistics
from jaxrl_llm.algorithms.grpo import TrainState
from jaxrl_llm.algorithms.statistics import Mean, Statistic
from jaxrl_llm.data import packing
from jaxrl_llm.data.packing import Layout
from jaxrl_llm.data.rows import TrainBatch
from jaxrl_llm.models.apply import Params
from jaxrl_llm.roles.sharded_model import ShardedModel
from jaxrl_llm.sharding import processes

Meanwhile = Callable[[], object]
"""What the host has to do while devices compute."""


def nothing() -> None:
    """Leaves the host idle."""


Step = Callable[[TrainState, TrainBatch, Params], tuple[TrainState, Any]]
"""(state, rows, frozen parameters) -> (state, `Statistics`), one optimizer step."""


@dataclass(frozen=True, kw_only=True)
class MiniBatches:
    """How the rows of a training step are shared out to optimizer steps."""

    epochs: int = 1
    """Passes over the rows."""
    num_prompts: int | None = None
    """Prompts of a mini-batch, with all responses to them; all if not given."""
    group_size: int = 1
    """Responses to a prompt."""

    def split(
        self, batch: TrainBatch, seed: tuple[int, int], layout: Layout
    ) -> list[TrainBatch]:
        """The mini-batches of one pass, in an order of the prompts drawn with `seed`.

        Args:
          batch: sequence p * group_size + g is response g to prompt p.
        """
        prompts = batch.num_sequences // self.group_size
        if self.num_prompts is None or self.num_prompts >= prompts:
            return [batch]
        order = int(np.random.SeedSequence(seed).generate_state(1)[0])
        return packing.mini_batches(
            batch, self.num_prompts, self.group_size, seed=order, layout=layout
        )


@jax.jit
def _is_finite(params: Params) -> Bool[Array, ""]:
    return jnp.all(jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(params)]))


class TrainedModel:
    """Everything about a model that learns but the state that changes.

    The state's parameters are those that are trained. Others, if there are any, are a
    tree of their own that every update is handed and that stays as it is.

    Args:
      is_trained: whether a parameter is trained, by its name: see
        `models.split_params`. All are if not given.
    """

    def __init__(
        self,
        model: ShardedModel,
        step: Step,
        *,
        optimizer: optax.GradientTransformation,
        mini_batches: MiniBatches,
        is_trained: Callable[[str], bool] | None = None,
    ):
        self.model, self.optimizer, self.mini_batches = model, optimizer, mini_batches
        self.is_trained = is_trained
        self._step = jax.jit(
            step,
            donate_argnums=0,
            out_shardings=(self.state_shardings(), None),
            compiler_options=model.update_options,
        )

    def split(self, params: Any) -> tuple[Params, Params]:
        """Trained and frozen ones of a tree like the parameters; the latter None if all
        are trained."""
        if self.is_trained is None:
            return params, None
        return models.split_params(params, self.is_trained)

    def state_shardings(self) -> TrainState:
        """The sharding of every array of the state: moments lie where their parameters
        lie, scalars everywhere."""
        shapes, _ = self.split(self.model.shapes("float32"))
        shardings, _ = self.split(self.model.param_shardings())
        everywhere = NamedSharding(self.model.mesh, P())
        opt_state = optax.tree_map_params(
            self.optimizer,
            lambda _, sharding: sharding,
            jax.eval_shape(self.optimizer.init, shapes),
            shardings,
            transform_non_params=lambda _: everywhere,
        )
        return TrainState(shardings, opt_state, everywhere)

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state."""
        params, _ = self.split(self.model.shapes("float32"))
        step = jax.ShapeDtypeStruct((), jnp.int32)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            TrainState(params, jax.eval_shape(self.optimizer.init, params), step),
            self.state_shardings(),
        )

    def first_state(self, params: Params) -> TrainState:
        """The state before the first update.

        Args:
          params: those that are trained, where they lie.
        """
        shardings = self.state_shardings()
        make = jax.jit(self.optimizer.init, out_shardings=shardings.opt_state)
        step = processes.place(np.int32(0), shardings.step)
        return TrainState(params, make(params), step)

    def is_finite(self, state: TrainState) -> bool:
        """Whether all weights that are trained are finite."""
        return bool(_is_finite(state.params))

    def split_rows(self, batch: TrainBatch, epoch: int, seed: int) -> list[TrainBatch]:
        """The mini-batches of one pass."""
        return self.mini_batches.split(batch, (seed, epoch), self.model.layout)

    def efficiency(self, rows: TrainBatch) -> dict[str, Statistic]:
        """How many of the tokens are real that an update with these rows computes."""
        used = packing.token_efficiency(rows, self.model.layout.micro_batch_size)
        computed = (rows.sequence_ids >= 0).sum() / used
        return {"perf/token_efficiency": Mean(used, computed)}

    def lower(self, rows: TrainBatch, frozen: Params = None) -> jax.stages.Lowered:
        """One optimizer step with rows of these shapes.

        Args:
          frozen: shapes, dtypes and shardings of the parameters that are not trained.
        """
        return self.lower_step(self.model.abstract_rows(rows), frozen)

    def lower_step(self, rows: TrainBatch, frozen: Params = None) -> jax.stages.Lowered:
        """`lower` for rows of `shapes_of_rows`."""
        return self._step.lower(self.abstract_state(), rows, frozen)

    def update(
        self,
        state: TrainState,
        batch: TrainBatch,
        seed: int,
        *,
        frozen: Params = None,
        measure: Callable[[TrainBatch], Mapping[str, Statistic]] = lambda rows: {},
        meanwhile: Meanwhile = nothing,
    ) -> tuple[TrainState, dict[str, float]]:
        """All optimizer steps of one training step. Donates `state`.

        Args:
          batch: on the host.
          seed: of the order of the prompts in each pass.
          frozen: the parameters that are not trained.
          measure: metrics of a mini-batch on the host, as it is computed.
          meanwhile: called when all is dispatched, before it is waited for.

        Returns:
          The next state, and metrics of all optimizer steps (`statistics.join`).
        """
        collected = []
        for epoch in range(self.mini_batches.epochs):
            for rows in self.split_rows(batch, epoch, seed):
                rows = self.model.fitted(rows)
                measured = dict(measure(rows))
                state, metrics = self._step(state, self.model.place(rows), frozen)
                collected.append(metrics | measured)
        meanwhile()
        return state, statistics.join(jax.device_get(collected))
