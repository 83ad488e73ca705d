"""The critic of a run: sharded state of the value model, its values and its update.

critic = Critic(config, source, mesh)
state = critic.start()
values = critic.judge(state.params, rows)
state, metrics = critic.update(state, rows with values and returns, seed)
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxrl_llm import models
from jaxrl_llm.algorithms import grpo, logprobs, ppo
from jaxrl_llm.algorithms import update as updates
from jaxrl_llm.config.parsing import ConfigError
from jaxrl_llm.config.schema import Config
from jaxrl_llm.data.rows import TrainBatch, pad_rows, previous_tokens
from jaxrl_llm.models import WeightSource
from jaxrl_llm.roles import optimizer
from jaxrl_llm.roles.actor import abstract_state, first_state, split, state_shardings
from jaxrl_llm.roles.policy import COMPILER_OPTIONS, attention, layout, partition
from jaxrl_llm.sharding import processes


class Critic:
    """Everything about the value model but the state that changes.

    Args:
      source: of the policy's initial weights, where the critic starts too unless
        `critic.model.path` says otherwise.
      mesh: axes of `mesh.AXES`, such as "data", "fsdp" and "tensor".

    Raises:
      ConfigError: the critic's model does not fit the policy's, or `mesh`.
      ValueError: there is no such model.
    """

    def __init__(self, config: Config, source: WeightSource, mesh: Mesh):
        self.config, self.mesh = config, mesh
        self._source = _open(config, source)
        self.arch = self._source.arch
        critic, total_steps = config.critic, config.trainer.total_training_steps
        self._mini_batch = (
            critic.ppo_mini_batch_size or config.actor.ppo_mini_batch_size
        )
        self.epochs = critic.ppo_epochs or config.actor.ppo_epochs
        prompts = config.data.train_batch_size
        count = self.epochs * -(-prompts // (self._mini_batch or prompts))
        self.updates_per_step = count
        optim = optimizer.Settings(**critic.optim.model_dump())
        self.optimizer = optimizer.make(optim, total_steps, count)
        self.schedule = optimizer.schedule(optim, total_steps, count)
        self._partition = partition(
            config,
            "critic.mesh",
            self.arch,
            models.abstract_critic(self.arch),
            models.critic_axes(self.arch),
            mesh,
            critic.rules,
        )
        self._rows = self._partition.sharding("rows", "tokens")
        micro_batch_size = critic.micro_batch_size or config.actor.micro_batch_size
        self._layout = layout(config, self._partition, micro_batch_size)
        settings = ppo.CriticSettings(
            cliprange_value=critic.cliprange_value,
            loss_agg_mode=critic.loss_agg_mode,
            micro_batch_size=micro_batch_size,
        )
        self._update = jax.jit(
            functools.partial(
                ppo.update_critic,
                value_fn=self.values,
                optimizer=self.optimizer,
                settings=settings,
            ),
            donate_argnums=0,
            out_shardings=(self.state_shardings(), None),
            compiler_options=COMPILER_OPTIONS,
        )
        self._judge = jax.jit(
            self._values_in_micro_batches, compiler_options=COMPILER_OPTIONS
        )

    def start(self) -> grpo.TrainState:
        """The state before the first update. Reads the weights."""
        axes = models.logical_axes(self.arch)
        decoder = self._source.load(
            dtype=jnp.float32,
            shardings=self._partition.shardings(axes),
        )
        shardings = self.state_shardings()
        params = jax.tree.map(
            lambda x, s: x if x.sharding == s else processes.place(x, s),
            models.init_critic(self.arch, decoder),
            shardings.params,
        )
        return first_state(params, self.optimizer, shardings)

    def values(self, params: Any, rows: TrainBatch) -> Float[Array, "R T"]:
        """The value of the state before every response token, 0 elsewhere."""
        critic = self.config.critic
        # Gradients lie where their parameters lie.
        shardings = self._partition.shardings(models.critic_axes(self.arch))
        params = jax.lax.with_sharding_constraint(params, shardings)
        after = models.values(
            self.arch,
            params,
            rows.tokens,
            rows.positions,
            rows.sequence_ids,
            dtype=jnp.dtype(critic.dtype),
            remat=critic.remat,
            attention=attention(self._partition, critic.dtype, critic.attention, rows),
            loop=models.choose_loop(self.mesh, critic.unroll, critic.remat),
            shard=self._partition.constrain,
        )
        return logprobs.before(
            after, rows.positions, rows.response_mask, previous_tokens(rows)
        )

    def judge(self, params: Any, batch: TrainBatch) -> Float[np.ndarray, "R T"]:
        """`values` of all rows, on the host.

        Args:
          batch: of `Learner.make_rows`, on the host.
        """
        found = self._judge(params, self._on_devices(batch))
        num_rows, length = batch.tokens.shape
        return processes.fetch(found)[:num_rows, :length]

    def update(
        self, state: grpo.TrainState, batch: TrainBatch, seed: int
    ) -> tuple[grpo.TrainState, dict[str, float]]:
        """All optimizer steps of one training step. Donates `state`.

        Args:
          batch: with values and returns, such as of `ppo.credit`; on the host.
          seed: of the order of the prompts in each pass.

        Returns:
          The next state, and metrics averaged over the optimizer steps.
        """
        collected = []
        for epoch in range(self.epochs):
            for part in self._parts(batch, epoch, seed):
                state, metrics = self._update(state, self._on_devices(part))
                collected.append(metrics)
        means = jax.tree.map(lambda *x: float(np.mean(x)), *jax.device_get(collected))
        means["critic/lr"] = float(self.schedule(int(state.step) - 1))
        return jax.block_until_ready(state), means

    def lower_update(self, batch: TrainBatch) -> jax.stages.Lowered:
        """An update with (a part of) `batch`, from shapes alone."""
        known = dict.fromkeys(("values", "returns"), batch.sampler_logprobs)
        part = self._parts(dataclasses.replace(batch, **known), 0, 0)[0]
        return self._update.lower(self.abstract_state(), self._abstract(part))

    def lower_judging(self, batch: TrainBatch) -> jax.stages.Lowered:
        """The values of rows of these shapes, from shapes alone."""
        return self._judge.lower(self.abstract_state().params, self._abstract(batch))

    def state_shardings(self) -> grpo.TrainState:
        """Of every array of the state."""
        axes = models.critic_axes(self.arch)
        return state_shardings(
            models.abstract_critic(self.arch),
            self._partition.shardings(axes),
            self.optimizer,
            self.mesh,
        )

    def abstract_state(self) -> grpo.TrainState:
        """Shapes, dtypes and shardings of the state."""
        params = models.abstract_critic(self.arch)
        return abstract_state(params, self.optimizer, self.state_shardings())

    def _values_in_micro_batches(self, params, batch: TrainBatch):
        _, values = updates.accumulate(
            lambda params, rows, _: ((), self.values(params, rows)),
            params,
            batch,
            (),
            self._layout.micro_batch_size,
        )
        return values

    def _parts(self, batch: TrainBatch, epoch: int, seed: int) -> list[TrainBatch]:
        return split(self.config, batch, self._mini_batch, (seed, epoch), self._layout)

    def _padded(self, batch: TrainBatch) -> TrainBatch:
        """Rows that can be split over this mesh, which need not be the policy's."""
        num_rows, length = batch.tokens.shape
        rows, tokens = self._layout.rows_multiple, self._layout.length_multiple
        return pad_rows(
            batch, -(-num_rows // rows) * rows, -(-length // tokens) * tokens
        )

    def _abstract(self, batch: TrainBatch) -> TrainBatch:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._rows),
            jax.eval_shape(lambda: self._padded(batch)),
        )

    def _on_devices(self, batch: TrainBatch) -> TrainBatch:
        return processes.place(self._padded(batch), self._rows)


def _open(config: Config, source: WeightSource) -> WeightSource:
    """The checkpoint the critic starts from."""
    model = config.critic.model
    if model.path is None:
        return source
    found = models.open(model.path, revision=model.revision, tokenizer=source.tokenizer)
    wanted, longest = source.arch.vocab_size, found.arch.max_positions
    if found.arch.vocab_size != wanted:
        raise ConfigError(
            f"critic.model.path {model.path} has {found.arch.vocab_size} tokens in its "
            f"vocabulary, the policy {wanted}; they must read the same tokens"
        )
    needed = config.data.max_prompt_length + config.rollout.max_response_length
    if needed > longest:
        raise ConfigError(
            f"critic.model.path {model.path} has {longest} positions, but "
            f"data.max_prompt_length + rollout.max_response_length is {needed}"
        )
    return found
