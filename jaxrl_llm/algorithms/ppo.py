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
from typing import no_type_check

import jax
import optax
from jaxtyping import Array, Float

from jaxrl_llm.algorithms import advantages, grpo, losses, masked
from jaxrl_llm.algorithms.grpo import LogprobFn, Metrics, Params
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

    actor: grpo.TrainState
    critic: grpo.TrainState | None
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
    state: grpo.TrainState,
    batch: TrainBatch,
    *,
    value_fn: ValueFn,
    optimizer: optax.GradientTransformation,
    settings: CriticSettings,
) -> tuple[grpo.TrainState, Metrics]:
    """One optimizer step of the critic on one mini-batch.

    If the gradient is not finite, parameters and optimizer stay as they are and
    `critic/update_skipped` is 1.

    Args:
      state: donated by most callers.
      batch: the mini-batch, with `values` and `returns`.
      value_fn: `(params, rows) -> values`, differentiable in params: the value before
        each response token. `rows` are some of the rows of `batch`.
      settings: static.

    Returns:
      The next state, and scalars: the loss, the fraction of tokens the bound decides,
      the mean prediction and how much of the returns' variance the predictions explain
      (all before the step), and the global norm of the gradient.

    Raises:
      ValueError: `batch` has no values or no returns.
    """
    for name in ("values", "returns"):
        if getattr(batch, name) is None:
            raise ValueError(f"a critic needs batch.{name}; see ppo.credit")
    mask = batch.response_mask
    weights = masked.weights(
        settings.loss_agg_mode, mask, batch.sequence_ids, batch.num_sequences
    )
    clip = {"cliprange_value": settings.cliprange_value}

    def loss_fn(params, rows, weights):
        values = value_fn(params, rows)
        loss = losses.value_loss(values, rows.values, rows.returns, **clip)
        return masked.weighted_sum(loss, weights), values

    grads, values = grpo.accumulate(
        jax.grad(loss_fn, has_aux=True),
        state.params,
        batch,
        weights,
        settings.micro_batch_size,
    )
    state, grad_norm, skipped = grpo.apply(state, grads, optimizer)
    compared = (values, batch.values, batch.returns)
    loss = losses.value_loss(*compared, **clip)
    clipped = losses.is_value_clipped(*compared, **clip)
    return state, {
        "critic/vf_loss": masked.weighted_sum(loss, weights),
        "critic/vf_clipfrac": masked.token_mean(clipped.astype(loss.dtype), mask),
        "critic/vpred_mean": masked.token_mean(values, mask),
        "critic/vf_explained_var": masked.explained_variance(
            values, batch.returns, mask
        ),
        "critic/grad_norm": grad_norm,
        "critic/update_skipped": skipped,
    }
