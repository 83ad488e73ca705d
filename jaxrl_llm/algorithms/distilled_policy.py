"""The objective of a policy that learns from a teacher, alone or besides rewards."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.algorithms import distillation, grpo, masked
from jaxrl_llm.algorithms.distillation import Distilled
from jaxrl_llm.algorithms.logprobs import Logprobs
from jaxrl_llm.algorithms.objectives import Objective, Segments
from jaxrl_llm.algorithms.statistics import Mean, Statistics
from jaxrl_llm.data.rows import TrainBatch

Mode = Literal["reverse_kl", "forward_kl_topk", "jsd"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is learned from a teacher."""

    mode: Mode = "reverse_kl"
    """See `distillation`."""
    coef: float = 1.0
    """Weight of the divergence beside the other terms of the loss."""
    with_rewards: bool = False
    """Whether the policy loss of the rewards is part of the loss."""
    topk: int = 32
    """forward_kl_topk: K."""
    beta: float = 0.5
    """jsd."""

    @property
    def asks_within(self) -> bool:
        """Whether the update itself asks the teacher; else the rows have its words."""
        return self.mode == "jsd"


@dataclass(frozen=True)
class DistilledPolicy(Objective):
    """The loss of `grpo.Policy` with a teacher's divergence.

        reverse_kl:  the policy loss of the advantages A (if with_rewards) + coef *
                     (log p(y) - log q_old(y)), in one trust region
        else:        the policy loss of the advantages (if with_rewards) + coef *
                     sum(weights * divergence)

    and the entropy bonus and KL term as there. Tokens weigh as in the policy loss.
    Outputs are `Logprobs` in the first case, else `Distilled`.
    """

    policy: grpo.Settings
    settings: Settings
    name: str = "actor"
    segments: Segments = "sequences"

    @property
    def _is_advantage(self) -> bool:
        return self.settings.mode == "reverse_kl"

    @property
    def _rewarded(self) -> bool:
        return self._is_advantage or self.settings.with_rewards

    def read(self, batch: TrainBatch) -> TrainBatch:
        """See `grpo.Policy`.

        Raises:
          ValueError: besides, the batch lacks what the teacher says.
        """
        if not self.settings.asks_within and batch.taught is None:
            raise ValueError(
                f"distillation.mode is {self.settings.mode} but the batch has nothing "
                "that a teacher said (taught)"
            )
        return grpo.Policy(self.policy).read(batch)

    def looks_ahead(self, batch: TrainBatch) -> bool:
        """See `grpo.looks_ahead`."""
        return grpo.looks_ahead(self.policy, batch)

    def look(self, rows: TrainBatch, outputs: Any) -> Logprobs:
        """The policy's log-probabilities."""
        return _scored(outputs)

    def plan(self, batch: TrainBatch, seen: Any, step: Int[Array, ""]) -> grpo.Plan:
        """See `grpo.plan`."""
        if seen is not None:
            batch = self._credited(batch, seen)
        return grpo.plan(batch, seen, step, self.policy)

    def loss(
        self, rows: TrainBatch, outputs: Any, planned: grpo.Plan
    ) -> tuple[Float[Array, ""], Any]:
        """See the class; what is kept are the outputs."""
        scored = _scored(outputs)
        rows = self._credited(rows, scored)
        terms = grpo.objective(
            rows, scored, planned, self.policy, rewarded=self._rewarded
        )
        loss = terms["actor/loss"]
        if not self._is_advantage:
            far = masked.weighted_sum(outputs.divergence, planned.weights)
            loss = loss + self.settings.coef * far
        return loss, outputs

    def metrics(self, batch: TrainBatch, kept: Any, planned: grpo.Plan) -> Statistics:
        """Those of `grpo.Policy`, and distillation/*: the divergence as it is added to
        the loss before `coef` (loss), the mean over tokens of log q(y) - log p(y)
        (reverse_kl) and of log p(y) (teacher_logprob), the teacher's entropy; with
        top-k, the probability of these tokens."""
        seen, scored = self.read(batch), _scored(kept)
        found = grpo.metrics(
            self._credited(seen, scored),
            scored,
            planned,
            self.policy,
            rewarded=self._rewarded,
        ) | grpo.mismatch(batch, scored)
        if self.policy.correction is not None:
            found |= grpo.correct(seen, scored, self.policy).metrics
        said = _said(seen, kept)
        known = planned.mask & jnp.isfinite(said["teacher_logprob"])
        own = grpo.old_logprobs_of(seen, scored) if self._is_advantage else scored[0]
        reverse = distillation.reverse_kl(own, said["teacher_logprob"])
        far = jnp.where(known, reverse, 0.0)
        if not self._is_advantage:
            far = kept.divergence
        loss = masked.weighted_sum(far, planned.weights)
        terms = said | {"reverse_kl": reverse}
        found["actor/loss"] = self._whole(found, loss)
        found["distillation/loss"] = Mean(
            loss, grpo.num_counted(seen, planned, self.policy)
        )
        return found | {
            f"distillation/{name}": Mean(masked.token_mean(x, known), jnp.sum(known))
            for name, x in terms.items()
        }

    def _whole(self, found: Statistics, loss: Float[Array, ""]) -> Mean:
        """The whole loss, in which the divergence may be a term of its own."""
        whole = found["actor/loss"]
        if self._is_advantage:
            return whole
        return Mean(whole.value + self.settings.coef * loss, whole.over)

    def _credited(self, rows: TrainBatch, scored: Logprobs) -> TrainBatch:
        """The rows with the teacher's advantages, if they are such."""
        if not self._is_advantage:
            return rows
        old, teacher = grpo.old_logprobs_of(rows, scored), rows.taught.logprobs
        known = rows.response_mask & jnp.isfinite(teacher)
        reverse = jnp.where(known, distillation.reverse_kl(old, teacher), 0.0)
        advantages = -self.settings.coef * reverse
        if self.settings.with_rewards:
            advantages = rows.advantages + advantages
        return dataclasses.replace(rows, advantages=advantages)


def _scored(outputs: Logprobs | Distilled) -> Logprobs:
    return Logprobs(outputs.logprobs, outputs.entropy)


def _said(rows: TrainBatch, outputs: Any) -> dict[str, Float[Array, "R T"]]:
    """What is known of the teacher's words, by the names of metrics."""
    if isinstance(outputs, Logprobs):
        of_rows = rows.taught
        return {"teacher_logprob": of_rows.logprobs, "teacher_entropy": of_rows.entropy}
    found = {
        "teacher_logprob": outputs.teacher_logprobs,
        "teacher_entropy": outputs.teacher_entropy,
    }
    if rows.taught is not None:
        found["student_mass"] = outputs.student_mass
        found["teacher_mass"] = outputs.teacher_mass
    return found
