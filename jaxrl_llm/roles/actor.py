"""The policy that learns: its state on the mesh and its update.

actor = Actor(policy, source, settings, optimizer=..., schedule=...)
state = actor.start()
state, metrics = actor.update(state, actor.make_rows(...), seed)
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Float

from jaxrl_llm import models
from jaxrl_llm.algorithms import distilled_policy, grpo
from jaxrl_llm.algorithms import update as updates
from jaxrl_llm.algorithms.distilled_policy import DistilledPolicy
from jaxrl_llm.algorithms.objectives import Objective
from jaxrl_llm.algorithms.router_balance import Routed
from jaxrl_llm.data import packing
from jaxrl_llm.data.rows import TrainBatch
from jaxrl_llm.data.types import Completion, Episode, Prompt
from jaxrl_llm.models import Architecture, WeightSource
from jaxrl_llm.models.apply import Params
from jaxrl_llm.roles import merging
from jaxrl_llm.roles.policy import Policy
from jaxrl_llm.roles.reference import Reference
from jaxrl_llm.roles.sharded_model import (
    named,
    to_devices,
    to_host,
)
from jaxrl_llm.roles.teacher import Teacher
from jaxrl_llm.roles.trained_model import Meanwhile, MiniBatches, TrainedModel, nothing


@dataclass(frozen=True, kw_only=True)
class StepSize:
    """How much one training step has at most."""

    num_prompts: int
    group_size: int
    """Responses to a prompt."""
    prompt_length: int
    """Tokens of the longest prompt."""
    response_length: int
    """Tokens of the longest response."""


@dataclass(frozen=True, kw_only=True)
class ActorSettings:
    """How a policy learns."""

    update: grpo.Settings
    mini_batches: MiniBatches
    step_size: StepSize
    needs_old_logprobs: bool = False
    """Whether the policy before the first update must be asked."""
    router_aux_loss_coef: float = 0.0
    """Weight of the loss that spreads tokens over experts, see `router_balance`."""
    replays: bool = False
    """Tokens go to the experts that they went to before the first update, which needs
    `needs_old_logprobs`."""
    offload: bool = False
    """The optimizer's moments wait in the host's memory outside of updates."""
    distillation: distilled_policy.Settings | None = None
    """What is learned from the teacher."""


class Actor:
    """Everything about the update of a policy but the state that it changes.

    Args:
      source: of the weights to start from.
      schedule: the learning rate as a function of updates, which is logged.
      reference: what KL terms compare with; None without any.
      teacher: what `settings.distillation` learns from.
      is_trained: whether a parameter is trained, by its name: see
        `models.split_params`. All are if not given; the others stay as they are read,
        in the compute dtype.
      adapters: source of those to start from, which alone are trained; needed if and
        only if the policy's settings have any.
    """

    def __init__(
        self,
        policy: Policy,
        source: WeightSource,
        settings: ActorSettings,
        *,
        optimizer: optax.GradientTransformation,
        schedule: optax.Schedule,
        reference: Reference | None = None,
        teacher: Teacher | None = None,
        is_trained: Callable[[str], bool] | None = None,
        adapters: WeightSource | None = None,
    ):
        self.policy, self.reference, self.settings = policy, reference, settings
        self.schedule, self.source, self.teacher = schedule, source, teacher
        self._adapters, self._lora = adapters, policy.settings.lora
        if self._lora is not None:
            is_trained = merging.is_trained
            self._merge = merging.Merging(policy)

        how = dataclasses.replace(
            settings.update, micro_batch_size=policy.layout.micro_batch_size
        )

        def update(state, rows, frozen):
            objective, outputs_fn = self._objective(how, frozen)
            return updates.update(
                state,
                rows,
                objective,
                optimizer,
                outputs_fn=outputs_fn,
                micro_batch_size=how.micro_batch_size,
                prepare=lambda params: models.for_products(
                    self.arch, params, policy.settings.dtype
                ),
                joinable=True,
            )

        self._trained = TrainedModel(
            policy,
            update,
            optimizer=optimizer,
            mini_batches=settings.mini_batches,
            is_trained=is_trained,
        )

    def _objective(
        self, update: grpo.Settings, frozen: Any
    ) -> tuple[Objective, updates.OutputsFn]:
        """What is made small, and what it is handed.

        Args:
          frozen: of `_handed`.
        """
        how, policy = self.settings.distillation, self.policy
        if how is None:
            objective: Objective = grpo.Policy(update)
            outputs_fn = functools.partial(policy.logprobs, frozen=frozen)
            coef, replays = self.settings.router_aux_loss_coef, self.settings.replays
            if coef or replays:
                objective = Routed(objective, coef, replays)
                outputs_fn = functools.partial(policy.logprobs_and_use, frozen=frozen)
            return objective, outputs_fn
        objective = DistilledPolicy(update, how)
        match how.mode:
            case "reverse_kl":
                return objective, functools.partial(policy.logprobs, frozen=frozen)
            case "forward_kl_topk":
                return objective, functools.partial(policy.with_topk, frozen=frozen)
            case "jsd":
                return objective, functools.partial(
                    policy.with_teacher,
                    teacher=self.teacher.policy,
                    teacher_params=frozen["teacher"],
                    beta=how.beta,
                    frozen=frozen["policy"],
                )

    def _handed(self, policy: Params, teacher: Callable[[], Params]) -> Any:
        """What every update is handed and leaves as it is: the policy's parameters that
        are not trained and, if the update asks it, the teacher's."""
        if self.teacher_within is None:
            return policy
        return {"policy": policy, "teacher": teacher()}

    @property
    def teacher_within(self) -> Teacher | None:
        """The teacher, if the update itself asks it."""
        how = self.settings.distillation
        return self.teacher if how and how.asks_within else None

    @property
    def teacher_before(self) -> Teacher | None:
        """The teacher, if it is asked before the update."""
        return None if self.teacher_within else self.teacher

    @property
    def arch(self) -> Architecture:
        """The policy's."""
        return self.policy.arch

    @property
    def mesh(self) -> Mesh:
        """The policy's."""
        return self.policy.mesh

    def read_weights(self, dtype: Any) -> Params:
        """The weights before training, laid out for training."""
        params = self.source.load(
            dtype=jnp.dtype(dtype), shardings=self.policy.base_shardings()
        )
        if self._lora is None:
            return params
        return self._merge(params, self._read_adapters())

    def start(self) -> grpo.TrainState:
        """The state before the first update. Reads the weights that are trained."""
        if self._lora is not None:
            return self._trained.first_state(self._read_adapters())
        params, _ = self._trained.split(self.read_weights("float32"))
        return self._trained.first_state(params)

    @functools.cached_property
    def frozen(self) -> Params:
        """The weights that are not trained; None if all are. Reads them."""
        if self._trained.is_trained is None:
            return None
        dtype = jnp.dtype(self.policy.settings.dtype)
        params = self.source.load(dtype=dtype, shardings=self.policy.base_shardings())
        return params if self._lora else self._trained.split(params)[1]

    def abstract_frozen(self) -> Params:
        """Shapes, dtypes and shardings of `frozen`."""
        return self._trained.split(self.policy.abstract_params())[1]

    def weights(self, params: Params) -> Params:
        """All weights of the policy, as others may read them: what is trained with what
        is not, adapters added to their matrices, none of which is quantised.

        Args:
          params: those of the state.
        """
        if self._lora is None:
            return models.merge(params, self.frozen)
        return self._merge(self.frozen, params)

    def computed(self, params: Params) -> Params:
        """The weights that the policy is computed with: as `weights`, but adapters
        beside their matrices."""
        return models.merge(params, self.frozen)

    def abstract_weights(self) -> Params:
        """Shapes, dtypes and shardings of `weights`."""
        if self._lora is None:
            return self._abstract_computed()
        return self.policy.abstract_plain()

    def abstract_merged(self) -> Params:
        """Shapes, dtypes and shardings of what of `weights` is made anew each time."""
        if self._lora is None:
            return {}
        return self._merge.made

    def _abstract_computed(self) -> Params:
        """Shapes, dtypes and shardings of the weights that the policy is computed
        with."""
        return models.merge(self.abstract_state().params, self.abstract_frozen())

    def _read_adapters(self) -> Params:
        return merging.before_training(self.policy, self._adapters)

    def is_finite(self, state: grpo.TrainState) -> bool:
        """Whether all weights that are trained are finite."""
        return self._trained.is_finite(state)

    def state_shardings(self) -> grpo.TrainState:
        """The sharding of every array of the state."""
        return self._trained.state_shardings()

    def abstract_state(self) -> grpo.TrainState:
        """Shapes, dtypes and shardings of the state."""
        return self._trained.abstract_state()

    def make_rows(
        self,
        prompts: Sequence[Prompt],
        episodes: Sequence[Sequence[Episode]],
        advantages: Float[np.ndarray, "P G"],
    ) -> TrainBatch:
        """The training batch of one step, on the host."""
        return packing.make_rows(
            prompts, episodes, advantages, layout=self.policy.layout
        )

    def take(self, batch: TrainBatch, sequences: Sequence[int]) -> TrainBatch:
        """Some sequences of a batch of `make_rows`, laid out anew."""
        return packing.take(batch, sequences, layout=self.policy.layout)

    def largest_rows(self) -> TrainBatch:
        """Rows in which every prompt and response is as long as it may be."""
        step = self.settings.step_size
        prompt = Prompt(id=0, content="", tokens=(0,) * step.prompt_length, columns={})
        zeros = np.zeros(step.response_length, np.float32)
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
        P, G = step.num_prompts, step.group_size
        return self.make_rows(
            [prompt] * P,
            [[Episode.of(completion)] * G] * P,
            np.zeros((P, G), np.float32),
        )

    @property
    def asks_other_policies(self) -> bool:
        """Whether `with_logprobs` has something to add."""
        return self.reference is not None or self.settings.needs_old_logprobs

    def with_logprobs(
        self, params: Params, batch: TrainBatch, reference: Params | None = None
    ) -> TrainBatch:
        """Adds what is needed of other policies, if it is not there: the reference, and
        the policy before the first update.

        Args:
          params: those of the state.
          reference: weights of the reference policy; the initial ones if not given.
        """
        found = {}
        if self.reference is not None and batch.ref_logprobs is None:
            found["ref_logprobs"] = self.reference.score(batch, reference)
        if self.settings.needs_old_logprobs and batch.old_logprobs is None:
            weights = models.merge(params, self.frozen)
            if self.settings.replays:
                old, routes = self.policy.score_and_record(weights, batch)
                found |= {"old_logprobs": old, "routes": routes}
            else:
                found["old_logprobs"] = self.policy.score(weights, batch)
        return dataclasses.replace(batch, **found)

    def with_teacher(self, batch: TrainBatch) -> TrainBatch:
        """Adds what the teacher says, if it is asked before the update and it is not
        there."""
        teacher = self.teacher_before
        if teacher is None or batch.taught is not None:
            return batch
        return dataclasses.replace(batch, taught=teacher.score(batch))

    def update(
        self,
        state: grpo.TrainState,
        batch: TrainBatch,
        seed: int,
        meanwhile: Meanwhile = nothing,
    ) -> tuple[grpo.TrainState, dict[str, float]]:
        """All optimizer steps of one training step. Donates `state`.

        Args:
          batch: of `make_rows`, or of `with_logprobs` and `with_teacher`, which are
            called if needed.
          seed: of the order of the prompts in each pass.
          meanwhile: called when all is dispatched, before it is waited for.

        Returns:
          The next state, and metrics of all optimizer steps (`statistics.join`).
        """
        batch = self.with_teacher(self.with_logprobs(state.params, batch))
        batch = dataclasses.replace(batch, values=None, returns=None)
        if self.settings.offload:
            opt_state = to_devices(state.opt_state)
            state = dataclasses.replace(state, opt_state=opt_state)
        state, means = self._trained.update(
            state,
            batch,
            seed,
            frozen=self._handed(self.frozen, lambda: self.teacher.weights()),
            measure=self._trained.efficiency,
            meanwhile=meanwhile,
        )
        means["actor/lr"] = float(self.schedule(int(state.step) - 1))
        if self.settings.offload:
            opt_state = to_host(state.opt_state)
            state = dataclasses.replace(state, opt_state=opt_state)
        return jax.block_until_ready(state), means

    def compile_update(self, batch: TrainBatch) -> jax.stages.Compiled:
        """The update of the state with rows of these shapes, compiled."""
        return self.lower_update(batch).compile()

    def lower_update(self, batch: TrainBatch) -> jax.stages.Lowered:
        """The update of the state with rows of these shapes."""
        return self._trained.lower(batch, self._abstract_handed())

    def _abstract_handed(self) -> Any:
        """Shapes, dtypes and shardings of what updates leave as it is."""
        return self._handed(
            self.abstract_frozen(), lambda: self.teacher.abstract_params()
        )

    def compile_largest_update(self) -> jax.stages.Compiled:
        """The largest update that can occur, compiled."""
        return self.lower_largest_update().compile()

    def lower_largest_update(self) -> jax.stages.Lowered:
        """The update with rows in which everything is as long as it may be."""
        return self.lower_update(self.largest_mini_batch())

    def largest_mini_batch(self) -> TrainBatch:
        """The rows of an optimizer step in which everything is as long as it may be."""
        batch = self.largest_rows()
        if self.reference is not None:
            batch = dataclasses.replace(batch, ref_logprobs=batch.sampler_logprobs)
        if self.settings.needs_old_logprobs:
            batch = dataclasses.replace(batch, old_logprobs=batch.sampler_logprobs)
        if self.settings.replays:
            moe, layers = self.arch.moe, range(self.arch.num_layers)
            shape = sum(map(self.arch.has_experts, layers)), moe.top_k
            none = np.zeros((*batch.tokens.shape, *shape), models.routes_dtype(moe))
            batch = dataclasses.replace(batch, routes=none)
        if self.teacher_before is not None:
            said = self.teacher_before.nothing(batch)
            batch = dataclasses.replace(batch, taught=said)
        return self._trained.split_rows(batch, 0, 0)[0]

    def programs(self) -> dict[str, Callable[[], jax.stages.Lowered]]:
        """Every program that the steps of a run need of the policy, whatever lengths
        there are, each from shapes alone: its name, and what lowers it."""
        found: dict[str, Callable[[], jax.stages.Lowered]] = {}
        frozen, computed = self._abstract_handed(), self._abstract_computed()
        for rows in self.policy.shapes_of_rows(self.largest_mini_batch()):
            found[f"update {named(rows)}"] = functools.partial(
                self._trained.lower_step, rows, frozen
            )
        batch = self.largest_rows()
        if self.settings.needs_old_logprobs:
            for rows in self.policy.shapes_of_rows(batch):
                found[f"old log-probabilities {named(rows)}"] = functools.partial(
                    self.policy.lower_score, rows, computed, self.settings.replays
                )
        if self.reference is not None:
            judge = self.reference.policy
            for rows in judge.shapes_of_rows(batch):
                found[f"reference {named(rows)}"] = functools.partial(
                    judge.lower_score, rows, self.reference.abstract_weights()
                )
        if self._lora is not None:
            found["adapters added to the weights"] = self.lower_merging
        if self.teacher_before is not None:
            found |= self.teacher_before.programs(batch)
        return found

    def lower_merging(self) -> jax.stages.Lowered:
        """What adds adapters to their matrices."""
        adapters = self.abstract_state().params
        return self._merge.lower(self.abstract_frozen(), adapters)

    def lower_scoring(self, batch: TrainBatch) -> jax.stages.Lowered:
        """Log-probabilities of the policy itself of rows of these shapes."""
        return self.policy.lower_scoring(
            batch, self._abstract_computed(), self.settings.replays
        )

    def lower_sum_pi_squared(self, rows: TrainBatch) -> jax.stages.Lowered:
        """The program of `sum_pi_squared` for rows of `shapes_of_rows`."""
        return self.policy.lower_sum_pi_squared(rows, self._abstract_computed())

    def sum_pi_squared(
        self, params: Params, batch: TrainBatch
    ) -> Float[np.ndarray, "R T"]:
        """`Policy.sum_pi_squared` of all response tokens.

        Args:
          params: those of the state.
        """
        return self.policy.sum_pi_squared(models.merge(params, self.frozen), batch)
