"""PPO with a critic as pure functions from training state to training state.

    values = value_fn(state.critic.params, batch)
    batch = ppo.credit(batch, rewards, values, gamma=1.0, lam=0.95)
    state, metrics = ppo.update(state, batch, ...)

The policy's half is `grpo.update`: it does not care where advantages come from. Like
it, nothing here is jitted, closes over anything or knows a model.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxrl_llm.algorithms import advantages, grpo, losses, masked, statistics
from jaxrl_llm.algorithms import update as updates
from jaxrl_llm.algorithms.grpo import LogprobFn
from jaxrl_llm.algorithms.objectives import Objective
from jaxrl_llm.algorithms.statistics import Derived, Mean, Metrics, Moments, Statistics
from jaxrl_llm.algorithms.update import Params
from jaxrl_llm.data.rows import TrainBatch

ValueFn = Callable[[Params, TrainBatch], Float[Array, "R T"]]


@dataclass(frozen=True, kw_only=True)
class CriticSettings:
    """The numbers of a critic's update, by veRL's names."""

    cliprange_value: float = 0.5
    loss_agg_mode: masked.Aggregation = "token-mean"
    micro_batch_size: int | None = None
    """Rows per forward and backward pass; all if not given. Changes memory and speed,
    never the result."""


@no_type_check  # JAX also builds such trees of shapes or shardings
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything an update changes."""

    actor: updates.TrainState
    critic: updates.TrainState | None
    """None for estimators without a critic."""
    kl_coef: Float[Array, ""] | None = None
    """Weight of the KL penalty in the reward; None without one."""
    reference: Params | None = None
    """Weights of a reference policy that changes; None without one, or if it stays what
    it was before the first step."""


def credit(
    batch: TrainBatch,
    rewards: Float[Array, "R T"],
    values: Float[Array, "R T"],
    *,
    gamma: float,
    lam: float,
) -> TrainBatch:
    """`batch` with values, returns and whitened advantages.

    Whitening is over all of `batch`: give it the whole batch of a step, as veRL does,
    before it is split into mini-batches.

    Args:
      rewards, values: of each token, as in `advantages.gae`.
    """
    mask = batch.response_mask
    found, returns = advantages.gae(
        rewards, values, mask, batch.sequence_ids, gamma=gamma, lam=lam
    )
    return dataclasses.replace(batch, values=values, returns=returns, advantages=found)


def update(
    state: TrainState,
    batch: TrainBatch,
    *,
    logprob_fn: LogprobFn,
    value_fn: ValueFn,
    actor_optimizer: optax.GradientTransformation,
    critic_optimizer: optax.GradientTransformation,
    actor_settings: grpo.Settings,
    critic_settings: CriticSettings,
) -> tuple[TrainState, Metrics]:
    """One optimizer step of the critic and one of the policy on one mini-batch.

    Neither reads what the other changes, so their order has no meaning.

    Args:
      batch: of `credit`.
      others: of `update_critic` and of `grpo.update`.
    """
    critic, judged = update_critic(
        state.critic,
        batch,
        value_fn=value_fn,
        optimizer=critic_optimizer,
        settings=critic_settings,
    )
    actor, learned = grpo.update(
        state.actor,
        batch,
        logprob_fn=logprob_fn,
        optimizer=actor_optimizer,
        settings=actor_settings,
    )
    return dataclasses.replace(state, actor=actor, critic=critic), judged | learned


def update_critic(
    state: updates.TrainState,
    batch: TrainBatch,
    *,
    value_fn: ValueFn,
    optimizer: optax.GradientTransformation,
    settings: CriticSettings,
    joinable: bool = False,
) -> tuple[updates.TrainState, Metrics | Statistics]:
    """One optimizer step of the critic on one mini-batch: `update.update` of `Critic`.

    Args:
      state: donated by most callers.
      batch: the mini-batch, with `values` and `returns`.
      value_fn: `(params, rows) -> values`, differentiable in params: the value before
        each response token. `rows` are some of the rows of `batch`.
      settings, joinable: static; the latter as of `update.update`.

    Returns:
      The next state, and scalars: those of `Critic`, the global norm of the gradient,
      and whether the update was skipped.

    Raises:
      ValueError: `batch` has no values or no returns.
    """
    return updates.update(
        state,
        batch,
        Critic(settings),
        optimizer,
        outputs_fn=value_fn,
        micro_batch_size=settings.micro_batch_size,
        joinable=joinable,
    )


@dataclass(frozen=True)
class Critic(Objective):
    """The clipped value loss; outputs are values before each response token."""

    settings: CriticSettings
    name: str = "critic"

    def read(self, batch: TrainBatch) -> TrainBatch:
        """`batch`. Raises ValueError if it has no values or no returns."""
        for name in ("values", "returns"):
            if getattr(batch, name) is None:
                raise ValueError(f"a critic needs batch.{name}; see ppo.credit")
        return batch

    def plan(
        self, batch: TrainBatch, seen: Any, step: Int[Array, ""]
    ) -> Float[Array, "R T"]:
        """What each token counts."""
        return masked.weights(
            self.settings.loss_agg_mode,
            batch.response_mask,
            batch.sequence_ids,
            batch.num_sequences,
        )

    def loss(
        self,
        rows: TrainBatch,
        outputs: Float[Array, "R T"],
        planned: Float[Array, "R T"],
    ) -> tuple[Float[Array, ""], Float[Array, "R T"]]:
        """`losses.value_loss`; the values are kept."""
        compared = outputs, rows.values, rows.returns
        bound = self.settings.cliprange_value
        loss = losses.value_loss(*compared, cliprange_value=bound)
        return masked.weighted_sum(loss, planned), outputs

    def metrics(
        self,
        batch: TrainBatch,
        kept: Float[Array, "R T"],
        planned: Float[Array, "R T"],
    ) -> Statistics:
        """The loss, the fraction of tokens the bound decides, the mean prediction and
        how much of the returns' variance the predictions explain."""
        mask, compared = batch.response_mask, (kept, batch.values, batch.returns)
        clip = {"cliprange_value": self.settings.cliprange_value}
        loss = losses.value_loss(*compared, **clip)
        clipped = losses.is_value_clipped(*compared, **clip)
        tokens = jnp.sum(mask)
        where = mask, batch.sequence_ids, batch.num_sequences
        counted = masked.num_counted(self.settings.loss_agg_mode, *where)

        def moments(x):
            return Moments(masked.token_mean(x, mask), masked.variance(x, mask), tokens)

        return {
            "critic/vf_loss": Mean(masked.weighted_sum(loss, planned), counted),
            "critic/vf_clipfrac": Mean(
                masked.token_mean(clipped.astype(loss.dtype), mask), tokens
            ),
            "critic/vpred_mean": Mean(masked.token_mean(kept, mask), tokens),
            "critic/vf_explained_var": Derived(
                masked.explained_variance(kept, batch.returns, mask),
                (moments(batch.returns - kept), moments(batch.returns)),
                statistics.explained_variance,
            ),
        }
