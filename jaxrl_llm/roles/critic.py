"""The value model that learns: its state on the mesh, its values and its update.

critic = Critic(model, source, settings, optimizer=..., schedule=...)
state = critic.start()
values = critic.judge(state.params, rows)
state, metrics = critic.update(state, rows with values and returns, seed)
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.stages import Lowered
from jaxtyping import Array, Float

from jaxrl_llm import models
from jaxrl_llm.algorithms import grpo, logprobs, ppo
from jaxrl_llm.data.rows import TrainBatch, bare, previous_tokens
from jaxrl_llm.models import Architecture, WeightSource
from jaxrl_llm.models.apply import Params
from jaxrl_llm.roles import merging
from jaxrl_llm.roles.sharded_model import ShardedModel, named
from jaxrl_llm.roles.trained_model import Meanwhile, MiniBatches, TrainedModel, nothing
from jaxrl_llm.sharding import processes


@dataclass(frozen=True, kw_only=True)
class CriticSettings:
    """How a value model learns."""

    update: ppo.CriticSettings
    mini_batches: MiniBatches


class Critic:
    """Everything about the value model but the state that changes.

    Args:
      model: with a value head.
      source: of the decoder's weights to start from; the head starts at 0.
      schedule: the learning rate as a function of updates, which is logged.
      adapters: source of those to start from, which alone are trained, with the head;
        needed if and only if the model's settings have any.
    """

    def __init__(
        self,
        model: ShardedModel,
        source: WeightSource,
        settings: CriticSettings,
        *,
        optimizer: optax.GradientTransformation,
        schedule: optax.Schedule,
        adapters: WeightSource | None = None,
    ):
        self.model, self.settings, self.schedule = model, settings, schedule
        self.source, self._adapters = source, adapters

        how = dataclasses.replace(
            settings.update, micro_batch_size=model.layout.micro_batch_size
        )

        def update_critic(state, rows, frozen):
            return ppo.update_critic(
                state,
                rows,
                value_fn=functools.partial(self.values, frozen=frozen),
                optimizer=optimizer,
                settings=how,
                joinable=True,
            )

        self._trained = TrainedModel(
            model,
            update_critic,
            optimizer=optimizer,
            mini_batches=settings.mini_batches,
            is_trained=merging.is_trained if model.settings.lora else None,
        )
        self._judge = model.in_micro_batches(self.values)

    @property
    def arch(self) -> Architecture:
        """The model's."""
        return self.model.arch

    @property
    def mesh(self) -> Mesh:
        """The model's."""
        return self.model.mesh

    def start(self) -> grpo.TrainState:
        """The state before the first update. Reads the weights that are trained."""
        if self._adapters is not None:
            params = merging.before_training(self.model, self._adapters)
            return self._trained.first_state(params)
        params = jax.tree.map(
            lambda x, s: x if x.sharding == s else processes.place(x, s),
            models.init_critic(self.arch, self._read("float32")),
            self.model.param_shardings(),
        )
        return self._trained.first_state(params)

    @functools.cached_property
    def frozen(self) -> Params:
        """The weights that are not trained; None if all are. Reads them."""
        if self._adapters is None:
            return None
        whole = models.init_critic(self.arch, self._read(self.model.settings.dtype))
        return {"decoder": whole["decoder"]}

    def abstract_frozen(self) -> Params:
        """Shapes, dtypes and shardings of `frozen`."""
        return self._trained.split(self.model.abstract_params())[1]

    def _read(self, dtype: Any) -> Params:
        """The decoder's weights before training."""
        return self.source.load(
            dtype=jnp.dtype(dtype), shardings=self.model.decoder_shardings()
        )

    def values(
        self, params: Params, rows: TrainBatch, frozen: Params = None
    ) -> Float[Array, "R T"]:
        """The value of the state before every response token, 0 elsewhere.

        Args:
          frozen: weights that `params` lacks, which are not differentiated.
        """
        after = self.model.values(self.model.laid_out(params, frozen), rows)
        return logprobs.before(
            after, rows.positions, rows.response_mask, previous_tokens(rows)
        )

    def judge(self, params: Params, batch: TrainBatch) -> Float[np.ndarray, "R T"]:
        """`values` of all rows, on the host.

        Args:
          params: those of the state.
          batch: of `Actor.make_rows`, on the host.
        """
        rows = self.model.on_devices(bare(batch))
        weights = models.merge(params, self.frozen)
        return self.model.fetch(self._judge(weights, rows), batch)

    def update(
        self,
        state: grpo.TrainState,
        batch: TrainBatch,
        seed: int,
        meanwhile: Meanwhile = nothing,
    ) -> tuple[grpo.TrainState, dict[str, float]]:
        """All optimizer steps of one training step. Donates `state`.

        Args:
          batch: with values and returns, such as of `ppo.credit`; on the host.
          seed: of the order of the prompts in each pass.
          meanwhile: called when all is dispatched, before it is waited for.

        Returns:
          The next state, and metrics of all optimizer steps (`statistics.join`).
        """
        known = {"values": batch.values, "returns": batch.returns}
        batch = dataclasses.replace(bare(batch), **known)
        state, means = self._trained.update(
            state, batch, seed, frozen=self.frozen, meanwhile=meanwhile
        )
        means["critic/lr"] = float(self.schedule(int(state.step) - 1))
        return jax.block_until_ready(state), means

    def lower_update(self, batch: TrainBatch) -> Lowered:
        """An update with (a part of) `batch`, from shapes alone."""
        return self._trained.lower(self._mini_batch(batch), self.abstract_frozen())

    def lower_judging(self, batch: TrainBatch) -> Lowered:
        """The values of rows of these shapes, from shapes alone."""
        return self._lower_judge(self.model.abstract_rows(bare(batch)))

    def programs(self, batch: TrainBatch) -> dict[str, Callable[[], Lowered]]:
        """Every program that the steps of a run need of the critic, whatever lengths
        there are, each from shapes alone: its name, and what lowers it.

        Args:
          batch: of a step, on the host.
        """
        updates = self.model.shapes_of_rows(self._mini_batch(batch))
        judged = self.model.shapes_of_rows(bare(batch))
        return {
            f"critic's update {named(rows)}": functools.partial(
                self._trained.lower_step, rows, self.abstract_frozen()
            )
            for rows in updates
        } | {
            f"values {named(rows)}": functools.partial(self._lower_judge, rows)
            for rows in judged
        }

    def _mini_batch(self, batch: TrainBatch) -> TrainBatch:
        known = dict.fromkeys(("values", "returns"), batch.sampler_logprobs)
        batch = dataclasses.replace(bare(batch), **known)
        return self._trained.split_rows(batch, 0, 0)[0]

    def _lower_judge(self, rows: TrainBatch) -> Lowered:
        trained, frozen = self.abstract_state().params, self.abstract_frozen()
        return self._judge.lower(models.merge(trained, frozen), rows)

    def is_finite(self, state: grpo.TrainState) -> bool:
        """Whether all weights that are trained are finite."""
        return self._trained.is_finite(state)

    def state_shardings(self) -> grpo.TrainState:
        """The sharding of every array of the state."""
        return self._trained.state_shardings()

    def abstract_state(self) -> grpo.TrainState:
        """Shapes, dtypes and shardings of the state."""
        return self._trained.abstract_state()
