"""The learning half of a run: sharded training state and its jitted update.

learner = Learner(config, arch, mesh, params)
state = learner.start(params)
state, metrics = learner.update(state, learner.make_rows(...), seed)
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from jaxrl_llm import models
from jaxrl_llm.algorithms import grpo
from jaxrl_llm.algorithms.rollout_correction import Correction
from jaxrl_llm.config import plugins
from jaxrl_llm.config.checks import uses_kl
from jaxrl_llm.config.schema import Config
from jaxrl_llm.config.schema_algorithm import RolloutCorrectionConfig
from jaxrl_llm.data import packing
from jaxrl_llm.data.packing import Layout
from jaxrl_llm.data.rows import TrainBatch
from jaxrl_llm.data.types import Completion, Prompt
from jaxrl_llm.models import WeightSource
from jaxrl_llm.roles import optimizer
from jaxrl_llm.roles.policy import COMPILER_OPTIONS, Policy
from jaxrl_llm.sharding import processes, reshard
from jaxrl_llm.sharding import transfer_plan as plan


class Learner:
    """Everything about the update but the state that it changes.

    Args:
      source: of the weights to start from, which a KL term keeps as the reference.
      mesh: axes of `mesh.AXES`, such as "data", "fsdp" and "tensor".
      reference_mesh: where the reference lies; `mesh` if not given.

    Raises:
      ConfigError: the model or its rows cannot be split evenly over a mesh.
    """

    def __init__(
        self,
        config: Config,
        source: WeightSource,
        mesh: Mesh,
        reference_mesh: Mesh | None = None,
    ):
        self.config, self.arch, self.mesh = config, source.arch, mesh
        self._source = source
        actor, trainer = config.actor, config.trainer
        steps = trainer.total_training_steps - trainer.critic_warmup
        count = updates_per_step(config)
        optim = optimizer.Settings(**actor.optim.model_dump())
        self.optimizer = optimizer.make(optim, steps, count)
        self.schedule = optimizer.schedule(optim, steps, count)
        self.policy = Policy(config, source.arch, mesh)
        self.reference_policy = self.policy
        if reference_mesh is not None and reference_mesh != mesh:
            self.reference_policy = Policy(
                config, source.arch, reference_mesh, "actor.ref_mesh"
            )
        self._update = jax.jit(
            functools.partial(
                grpo.update,
                logprob_fn=self.policy.logprobs,
                optimizer=self.optimizer,
                settings=update_settings(config),
                prepare=lambda params: models.for_products(
                    self.arch, params, actor.dtype
                ),
            ),
            donate_argnums=0,
            out_shardings=(self.state_shardings(), None),
            compiler_options=COMPILER_OPTIONS,
        )
        self._copy = jax.jit(
            lambda params: jax.tree.map(
                lambda x: jnp.copy(x.astype(actor.dtype)), params
            ),
            out_shardings=self.policy.param_shardings(),
        )

    @functools.cached_property
    def reference(self) -> Any:
        """The weights before training in the compute dtype, which is all that they are
        multiplied in; None if no KL term asks for them."""
        if not uses_kl(self.config):
            return None
        return self._put_away("reference", self.read_reference())

    def read_weights(self, dtype: str) -> Any:
        """The weights before training, laid out for training."""
        return self._source.load(
            dtype=jnp.dtype(dtype), shardings=self.policy.param_shardings()
        )

    def read_reference(self) -> Any:
        """The weights before training in the compute dtype, laid out to be scored."""
        return self._source.load(
            dtype=jnp.dtype(self.config.actor.dtype),
            shardings=self.reference_policy.param_shardings(),
        )

    def as_reference(self, params: Any) -> Any:
        """A copy of the weights in the compute dtype, where the reference lies."""
        if self.reference_policy is self.policy:
            return self._put_away("reference", self._copy(params))
        way = plan.plan(params, self.abstract_reference())
        return self._put_away("reference", reshard.reshard(params, way))

    def abstract_reference(self) -> Any:
        """Shapes, dtypes and shardings of `as_reference`."""
        return self.reference_policy.abstract_params(self.config.actor.dtype)

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
        return packing.make_rows(
            prompts, completions, advantages, layout=self.policy.layout
        )

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
        return self.lower_update(batch).compile()

    def lower_update(self, batch: TrainBatch) -> jax.stages.Lowered:
        """The update of the state with rows of these shapes."""
        rows = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.policy.rows),
            batch,
        )
        return self._update.lower(self.abstract_state(), rows)

    def compile_largest_update(self) -> jax.stages.Compiled:
        """The largest update that can occur, compiled."""
        return self.lower_largest_update().compile()

    def lower_largest_update(self) -> jax.stages.Lowered:
        """The update with rows in which everything is as long as it may be."""
        batch = self.largest_rows()
        if uses_kl(self.config):
            batch = dataclasses.replace(batch, ref_logprobs=batch.sampler_logprobs)
        if needs_old_logprobs(self.config):
            batch = dataclasses.replace(batch, old_logprobs=batch.sampler_logprobs)
        return self.lower_update(self._parts(batch, 0, 0)[0])

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
                    packing.token_efficiency(part, actor.micro_batch_size)
                )
                state, metrics = self._update(state, self.policy.on_devices(part))
                collected.append(metrics)
        means = jax.tree.map(lambda *x: float(np.mean(x)), *jax.device_get(collected))
        means["actor/lr"] = float(self.schedule(int(state.step) - 1))
        means["perf/token_efficiency"] = float(np.mean(efficiencies))
        opt_state = self._put_away("optimizer", state.opt_state)
        state = dataclasses.replace(state, opt_state=opt_state)
        return jax.block_until_ready(state), means

    def state_shardings(self) -> grpo.TrainState:
        """Of every array of the state."""
        return state_shardings(
            models.abstract_params(self.arch),
            self.policy.param_shardings(),
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
            found["ref_logprobs"] = self.reference_policy.score(reference, batch)
        if needs_old_logprobs(self.config) and batch.old_logprobs is None:
            found["old_logprobs"] = self.policy.score(params, batch)
        return dataclasses.replace(batch, **found)

    def take(self, batch: TrainBatch, sequences: Sequence[int]) -> TrainBatch:
        """Some sequences of a batch of `make_rows`, laid out anew."""
        return packing.take(batch, sequences, layout=self.policy.layout)

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

    def _parts(self, batch: TrainBatch, epoch: int, seed: int) -> list[TrainBatch]:
        mini = self.config.actor.ppo_mini_batch_size
        return split(self.config, batch, mini, (seed, epoch), layout=self.policy.layout)


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
    return packing.mini_batches(
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
    needs = plugins.estimator_of(algorithm).needs
    if algorithm.use_kl_in_reward or "logprobs" in needs:
        return True
    correction = algorithm.rollout_correction
    bypass = correction is not None and correction.bypass_mode
    return updates_per_step(config) > 1 and not bypass


def updates_per_step(config: Config) -> int:
    """Optimizer steps of the policy per training step."""
    actor, prompts = config.actor, config.data.train_batch_size
    return actor.ppo_epochs * -(-prompts // (actor.ppo_mini_batch_size or prompts))
