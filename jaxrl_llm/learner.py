"""The learning half of a run: sharded training state and its jitted update.

learner = Learner(config, arch, mesh, params)
state = learner.start(params)
state, metrics = learner.update(state, learner.make_rows(...), seed)
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxrl_llm import batch as batches
from jaxrl_llm import grpo, logprobs, models, optimizer
from jaxrl_llm.batch import Completion, Layout, Prompt, TrainBatch
from jaxrl_llm.config import Config, ConfigError
from jaxrl_llm.config_algorithm import RolloutCorrectionConfig, uses_kl
from jaxrl_llm.correction import Correction
from jaxrl_llm.models import Architecture, WeightSource
from sharding import processes, rules


class Learner:
    """Everything about the update but the state that it changes.

    Args:
      source: of the weights to start from, which a KL term keeps as the reference.
      mesh: axes of `mesh.AXES`, such as "data", "fsdp" and "tensor".

    Raises:
      ConfigError: the model or its rows cannot be split evenly over `mesh`.
    """

    def __init__(self, config: Config, source: WeightSource, mesh: Mesh):
        self.config, self.arch, self.mesh = config, source.arch, mesh
        self._source = source
        actor, trainer = config.actor, config.trainer
        steps = trainer.total_training_steps - trainer.critic_warmup
        count = updates_per_step(config)
        self.optimizer = optimizer.make(actor.optim, steps, count)
        self.schedule = optimizer.schedule(actor.optim, steps, count)
        self._partition = partition(
            config,
            "actor",
            self.arch,
            models.abstract_params(self.arch),
            models.logical_axes(self.arch),
            mesh,
            actor.rules,
        )
        self._rows = self._partition.sharding("rows", "tokens")
        self._layout = layout(config, self._partition, actor.micro_batch_size)
        # Tokens whose logits exist at once, 4,096 a device: every chunk ends in a sum
        # of the output matrix' gradient over devices.
        rows, parts = self._layout.rows_multiple, self._partition.parts("tokens")
        self._chunk = 4096 * rows * parts
        self._update = jax.jit(
            functools.partial(
                grpo.update,
                logprob_fn=self.logprobs,
                optimizer=self.optimizer,
                settings=update_settings(config),
                prepare=lambda params: models.for_products(
                    self.arch, params, actor.dtype
                ),
            ),
            donate_argnums=0,
            out_shardings=(self.state_shardings(), None),
        )
        self._copy = jax.jit(
            lambda params: jax.tree.map(
                lambda x: jnp.copy(x.astype(actor.dtype)), params
            ),
            out_shardings=self.param_shardings(),
        )
        self._score = self._in_micro_batches(self.logprobs)
        self._concentration = self._in_micro_batches(self._sum_pi_squared)

    @functools.cached_property
    def reference(self) -> Any:
        """The weights before training in the compute dtype, which is all that they are
        multiplied in; None if no KL term asks for them."""
        if not uses_kl(self.config):
            return None
        return self._put_away("reference", self.read_weights(self.config.actor.dtype))

    def read_weights(self, dtype: str) -> Any:
        """The weights before training, laid out for training."""
        return self._source.load(
            dtype=jnp.dtype(dtype), shardings=self.param_shardings()
        )

    def as_reference(self, params: Any) -> Any:
        """A copy of the weights in the compute dtype."""
        return self._put_away("reference", self._copy(params))

    def abstract_reference(self) -> Any:
        """Shapes, dtypes and shardings of `as_reference`."""
        dtype = jnp.dtype(self.config.actor.dtype)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding),
            self.abstract_state().params,
        )

    def start(self) -> grpo.TrainState:
        """The state before the first update. Reads the weights."""
        params = self.read_weights("float32")
        return first_state(params, self.optimizer, self.state_shardings())

    def make_rows(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Completion]],
        advantages: Float[np.ndarray, "P G"],
    ) -> TrainBatch:
        """The training batch of one step, on the host."""
        return batches.make_rows(prompts, completions, advantages, layout=self._layout)

    def largest_rows(self) -> TrainBatch:
        """Rows in which every prompt and response is as long as it may be."""
        config = self.config
        size = config.data.max_prompt_length, config.rollout.max_response_length
        prompt = Prompt(id=0, content="", tokens=(0,) * size[0], columns={})
        zeros = np.zeros(size[1], np.float32)
        completion = Completion(
            prompt_id=0,
            sample=0,
            tokens=zeros.astype(np.int32),
            logprobs=zeros,
            raw_logprobs=zeros,
            finish_reason="length",
            weight_version=0,
            text="",
        )
        P, G = config.data.train_batch_size, config.rollout.n
        return self.make_rows(
            [prompt] * P, [[completion] * G] * P, np.zeros((P, G), np.float32)
        )

    def compile_update(self, batch: TrainBatch) -> jax.stages.Compiled:
        """The update of the state with rows of these shapes, compiled."""
        rows = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._rows), batch
        )
        return self._update.lower(self.abstract_state(), rows).compile()

    def update_memory(self) -> Any:
        """The compiler's memory analysis of the largest update that can occur."""
        return self.compile_largest_update().memory_analysis()

    def compile_largest_update(self) -> jax.stages.Compiled:
        """The update with rows in which everything is as long as it may be."""
        batch = self.largest_rows()
        if uses_kl(self.config):
            batch = dataclasses.replace(batch, ref_logprobs=batch.sampler_logprobs)
        if needs_old_logprobs(self.config):
            batch = dataclasses.replace(batch, old_logprobs=batch.sampler_logprobs)
        return self.compile_update(self._parts(batch, 0, 0)[0])

    def compile_largest_scoring(self) -> jax.stages.Compiled:
        """The log-probabilities of all rows under one policy."""
        rows = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._rows),
            self.largest_rows(),
        )
        return self._score.lower(self.abstract_state().params, rows).compile()

    def update(
        self, state: grpo.TrainState, batch: TrainBatch, seed: int
    ) -> tuple[grpo.TrainState, dict[str, float]]:
        """All optimizer steps of one training step. Donates `state`.

        Args:
          batch: of `make_rows`, or of `with_logprobs`, which is called if needed.
          seed: of the order of the prompts in each pass.

        Returns:
          The next state, and metrics averaged over the optimizer steps.
        """
        actor = self.config.actor
        batch = self.with_logprobs(state.params, batch)
        opt_state = self._bring("optimizer", state.opt_state)
        state = dataclasses.replace(state, opt_state=opt_state)
        collected, efficiencies = [], []
        for epoch in range(actor.ppo_epochs):
            for part in self._parts(batch, epoch, seed):
                efficiencies.append(
                    batches.token_efficiency(part, actor.micro_batch_size)
                )
                state, metrics = self._update(state, self.on_devices(part))
                collected.append(metrics)
        means = jax.tree.map(lambda *x: float(np.mean(x)), *jax.device_get(collected))
        means["actor/lr"] = float(self.schedule(int(state.step) - 1))
        means["perf/token_efficiency"] = float(np.mean(efficiencies))
        opt_state = self._put_away("optimizer", state.opt_state)
        state = dataclasses.replace(state, opt_state=opt_state)
        return jax.block_until_ready(state), means

    def logprobs(self, params: Any, rows: TrainBatch) -> logprobs.Logprobs:
        """Log-probability and entropy of every response token, at the temperature it
        was sampled at."""
        hidden, matrix, asked = self._asked(params, rows)
        found = logprobs.of_tokens(
            hidden,
            matrix,
            asked.tokens,
            asked.positions,
            asked.response_mask,
            previous=batches.previous_tokens(asked),
            temperature=self.config.rollout.temperature,
            logit_softcap=self.arch.logit_softcap,
            entropy_gradient=self.config.actor.entropy_coeff != 0,
            chunk=self._chunk,
        )
        return logprobs.Logprobs(*(self._join(x, rows.tokens.shape) for x in found))

    def _sum_pi_squared(self, params: Any, rows: TrainBatch) -> Float[Array, "R T"]:
        hidden, matrix, asked = self._asked(params, rows)
        found = logprobs.sum_pi_squared(
            hidden,
            matrix,
            asked.positions,
            asked.response_mask,
            previous=batches.previous_tokens(asked),
            temperature=self.config.rollout.temperature,
            logit_softcap=self.arch.logit_softcap,
            chunk=self._chunk,
        )
        return self._join(found, rows.tokens.shape)

    def _asked(self, params: Any, rows: TrainBatch):
        """Hidden states, output matrix, and rows, taken apart where devices share
        them."""
        actor, partition = self.config.actor, self._partition
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
            unroll=models.choose_unroll(self.mesh, actor.unroll),
            shard=partition.constrain,
        )
        matrix = partition.constrain(models.output_matrix(params), "vocab", None)
        if partition.parts("tokens") == 1:
            return hidden, matrix, rows
        hidden, rows = jax.tree.map(self._take_apart, (hidden, rows))
        mask = rows.response_mask.at[:, 0].set(False)
        return hidden, matrix, dataclasses.replace(rows, response_mask=mask)

    def _take_apart(self, x: Array) -> Array:
        """[R, T, ...] -> [R * parts, 1 + T / parts, ...]: each device's part of a row,
        behind the token that comes before it."""
        axes = self._partition.axes("rows") + self._partition.axes("tokens")
        length = x.shape[1] // self._partition.parts("tokens")

        def parts(x):
            x = x.reshape(-1, length, *x.shape[2:])
            return jax.lax.with_sharding_constraint(
                x, NamedSharding(self.mesh, P(axes))
            )

        return jnp.concatenate([parts(jnp.roll(x, 1, axis=1))[:, :1], parts(x)], axis=1)

    def _join(self, x: Array, shape: tuple[int, int]) -> Array:
        """What was found of rows that were taken apart, [R, T]."""
        return x[:, -(shape[1] // self._partition.parts("tokens")) :].reshape(shape)

    def param_shardings(self) -> Any:
        """Of every parameter."""
        return self._partition.shardings(models.logical_axes(self.arch))

    def state_shardings(self) -> grpo.TrainState:
        """Of every array of the state."""
        return state_shardings(
            models.abstract_params(self.arch),
            self.param_shardings(),
            self.optimizer,
            self.mesh,
        )

    def abstract_state(self) -> grpo.TrainState:
        """Shapes, dtypes and shardings of the state."""
        return abstract_state(
            models.abstract_params(self.arch), self.optimizer, self.state_shardings()
        )

    @property
    def asks_other_policies(self) -> bool:
        """Whether `with_logprobs` has something to add."""
        return uses_kl(self.config) or needs_old_logprobs(self.config)

    def with_logprobs(
        self, params: Any, batch: TrainBatch, reference: Any = None
    ) -> TrainBatch:
        """Adds what is needed of other policies, if it is not there: the reference, and
        the policy before the first update.

        Args:
          reference: weights of the reference policy; the initial ones if not given.
        """
        found = {}
        if uses_kl(self.config) and batch.ref_logprobs is None:
            reference = self.reference if reference is None else reference
            reference = self._bring("reference", reference)
            found["ref_logprobs"] = self._scored(reference, batch)
        if needs_old_logprobs(self.config) and batch.old_logprobs is None:
            found["old_logprobs"] = self._scored(params, batch)
        return dataclasses.replace(batch, **found)

    def take(self, batch: TrainBatch, sequences: Sequence[int]) -> TrainBatch:
        """Some sequences of a batch of `make_rows`, laid out anew."""
        return batches.take(batch, sequences, layout=self._layout)

    def sum_pi_squared(self, params: Any, batch: TrainBatch) -> np.ndarray:
        """`logprobs.sum_pi_squared` of all response tokens, [R, T] on the host."""
        return processes.fetch(self._concentration(params, self.on_devices(batch)))

    def _put_away(self, what: str, tree: Any) -> Any:
        """To the host's memory, if `actor.offload` says so."""
        return self._moved(what, tree, "pinned_host")

    def _bring(self, what: str, tree: Any) -> Any:
        """Back to the devices."""
        return self._moved(what, tree, "device")

    def _moved(self, what: str, tree: Any, memory: str) -> Any:
        if what not in self.config.actor.offload:
            return tree
        return jax.tree.map(
            lambda x: jax.device_put(x, x.sharding.with_memory_kind(memory)), tree
        )

    def _scored(self, params: Any, batch: TrainBatch) -> np.ndarray:
        return processes.fetch(self._score(params, self.on_devices(batch)).logprobs)

    def _in_micro_batches(self, function: Callable) -> Callable:
        """`function` of all rows, as many at a time as in the update; compiled."""

        def whole(params, batch):
            _, found = grpo.accumulate(
                lambda params, rows, _: ((), function(params, rows)),
                params,
                batch,
                (),
                self.config.actor.micro_batch_size,
            )
            return found

        return jax.jit(whole)

    def _parts(self, batch: TrainBatch, epoch: int, seed: int) -> list[TrainBatch]:
        mini = self.config.actor.ppo_mini_batch_size
        return split(self.config, batch, mini, (seed, epoch), layout=self._layout)

    def on_devices(self, batch: TrainBatch) -> TrainBatch:
        """The rows of `make_rows`, split over the mesh."""
        return processes.place(batch, self._rows)


def partition(
    config: Config,
    role: str,
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
    where, actor = f"{role}.mesh {dict(mesh.shape)}", config.actor
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


def split(
    config: Config,
    batch: TrainBatch,
    num_prompts: int | None,
    seed: tuple[int, int],
    layout: Layout,
) -> list[TrainBatch]:
    """The mini-batches of one pass, in an order of the prompts drawn with `seed`.

    Args:
      num_prompts: in a mini-batch; the whole batch if not given.
    """
    if num_prompts is None or num_prompts >= config.data.train_batch_size:
        return [batch]
    order = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return batches.mini_batches(
        batch, num_prompts, config.rollout.n, seed=order, layout=layout
    )


def state_shardings(
    params: Any, shardings: Any, optimizer: optax.GradientTransformation, mesh: Mesh
) -> grpo.TrainState:
    """Moments lie where their parameters lie; scalars everywhere.

    Args:
      params: shapes of the parameters.
      shardings: of the parameters.
    """
    everywhere = NamedSharding(mesh, P())
    opt_state = optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, params),
        shardings,
        transform_non_params=lambda _: everywhere,
    )
    return grpo.TrainState(shardings, opt_state, everywhere)


def abstract_state(
    params: Any, optimizer: optax.GradientTransformation, shardings: grpo.TrainState
) -> grpo.TrainState:
    """Shapes, dtypes and shardings of a state, from the shapes of its parameters."""
    step = jax.ShapeDtypeStruct((), jnp.int32)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        grpo.TrainState(params, jax.eval_shape(optimizer.init, params), step),
        shardings,
    )


def first_state(
    params: Any, optimizer: optax.GradientTransformation, shardings: grpo.TrainState
) -> grpo.TrainState:
    """The state before the first update of `params`."""
    make = jax.jit(optimizer.init, out_shardings=shardings.opt_state)
    step = processes.place(np.int32(0), shardings.step)
    return grpo.TrainState(params, make(params), step)


def update_settings(config: Config) -> grpo.Settings:
    """The numbers of one update."""
    actor = config.actor
    return grpo.Settings(
        clip_ratio_low=actor.clip_ratio_low,
        clip_ratio_high=actor.clip_ratio_high,
        clip_ratio_c=actor.clip_ratio_c,
        tau_pos=actor.tau_pos,
        tau_neg=actor.tau_neg,
        loss_agg_mode=actor.loss_agg_mode,
        loss_scale_factor=actor.loss_scale_factor
        or float(config.rollout.max_response_length),
        entropy_coeff=actor.entropy_coeff,
        kl_loss_coef=actor.kl_loss_coef if actor.use_kl_loss else 0.0,
        kl_loss_type=actor.kl_loss_type,
        micro_batch_size=actor.micro_batch_size,
        correction=_correction(config.algorithm.rollout_correction),
        **actor.policy_loss.model_dump(),
    )


def _correction(section: RolloutCorrectionConfig | None) -> Correction | None:
    if section is None:
        return None
    return Correction(
        rollout_is=section.rollout_is,
        is_bounds=section.is_bounds,
        rollout_is_batch_normalize=section.rollout_is_batch_normalize,
        rejections=section.rejections,
        bypass_mode=section.bypass_mode,
        loss_type=section.loss_type,
    )


def needs_old_logprobs(config: Config) -> bool:
    """Whether the policy before the first update must be asked: for a penalty or a
    baseline, or because the trust region is centred on it in several updates."""
    algorithm = config.algorithm
    token_baseline = algorithm.adv_estimator.endswith("optimal_token_baseline")
    if algorithm.use_kl_in_reward or token_baseline:
        return True
    correction = algorithm.rollout_correction
    bypass = correction is not None and correction.bypass_mode
    return updates_per_step(config) > 1 and not bypass


def updates_per_step(config: Config) -> int:
    """Optimizer steps of the policy per training step."""
    actor, prompts = config.actor, config.data.train_batch_size
    return actor.ppo_epochs * -(-prompts // (actor.ppo_mini_batch_size or prompts))
