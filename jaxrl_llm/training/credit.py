"""From the rewards of a step to the advantages it trains on, by the run's estimator."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from jaxrl_llm.algorithms import advantages, kl, masked, ppo
from jaxrl_llm.config.schema_algorithm import AlgorithmConfig
from jaxrl_llm.data.rows import TrainBatch


@no_type_check  # JAX also builds such trees of shapes or shardings
@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Judged:
    """Everything an estimator may look at besides the rows; None if it does not.

    K = reward functions, P = prompts, G = responses to each, R = rows, T = tokens.
    """

    rewards: Float[Array, "P G"]
    """Sequence p * G + g of the rows has rewards[p, g]."""
    by_function: Float[Array, "K P G"]
    """The scores that the rewards are the weighted sum of; 0 where a function does not
    judge."""
    weights: Float[Array, " K"]
    baselines: Float[Array, " P"] | None = None
    """remax: the reward of a greedy response to each prompt."""
    values: Float[Array, "R T"] | None = None
    """gae: of the critic."""
    sum_pi_squared: Float[Array, "R T"] | None = None
    """Token baselines: sum of the squares of the distribution each token is from."""
    kl_coef: Num[Array, ""] | None = None
    """Weight of the KL penalty in the reward; None for none."""


@functools.partial(jax.jit, static_argnames="algorithm")
def advantages_of(
    batch: TrainBatch, judged: Judged, *, algorithm: AlgorithmConfig
) -> tuple[TrainBatch, dict[str, Float[Array, ""]]]:
    """`batch` with its advantages (gae: values and returns too), and metrics.

    Args:
      batch: with `old_logprobs` and `ref_logprobs` if there is a KL penalty, and the
        former for token baselines.
    """
    where = batch.response_mask, batch.sequence_ids
    rewards, metrics = _token_rewards(batch, judged, algorithm)
    name = algorithm.adv_estimator
    if name == "gae":
        numbers = {"gamma": algorithm.gamma, "lam": algorithm.lam}
        batch = ppo.credit(batch, rewards, judged.values, **numbers)
        metrics["critic/values/mean"] = masked.token_mean(batch.values, where[0])
        metrics["critic/returns/mean"] = masked.token_mean(batch.returns, where[0])
        return batch, metrics
    if name == "reinforce_plus_plus":
        found = advantages.reinforce_plus_plus(rewards, *where, gamma=algorithm.gamma)
    elif name == "remax":
        baselines = jnp.repeat(judged.baselines, judged.rewards.shape[1])
        found = advantages.remax(rewards, baselines, *where)
    elif name.endswith("optimal_token_baseline"):
        found = _minus_token_baseline(name, batch, rewards, judged)
    else:
        totals = masked.sequence_sum(rewards, *where, batch.num_sequences)
        of_response = _of_responses(
            totals.reshape(judged.rewards.shape), batch, judged, algorithm
        ).ravel()
        found = jnp.where(where[0], of_response[where[1]], 0.0)
    return dataclasses.replace(batch, advantages=found), metrics


def _token_rewards(batch: TrainBatch, judged: Judged, algorithm: AlgorithmConfig):
    mask, ids = batch.response_mask, batch.sequence_ids
    rewards = advantages.at_last_token(
        judged.rewards.ravel(), mask, ids, batch.positions
    )
    if judged.kl_coef is None:
        return rewards, {}
    compared = batch.old_logprobs, batch.ref_logprobs
    penalty = kl.estimate(algorithm.kl_penalty, *compared)
    mean = masked.sequence_mean(penalty, mask, ids, batch.num_sequences)
    how = {"kind": algorithm.kl_penalty, "coef": judged.kl_coef}
    return kl.in_reward(rewards, *compared, mask, **how), {
        "actor/reward_kl_penalty": mean,
        "actor/reward_kl_penalty_coeff": judged.kl_coef,
    }


def _minus_token_baseline(name, batch: TrainBatch, rewards, judged: Judged):
    P, G = judged.rewards.shape
    group_ids = jnp.repeat(jnp.arange(P), G)
    where = batch.response_mask, batch.sequence_ids
    given = rewards, batch.old_logprobs, judged.sum_pi_squared, *where
    if name == "optimal_token_baseline":
        return advantages.optimal_token_baseline(*given, batch.positions, group_ids)
    return advantages.tir_optimal_token_baseline(*given, group_ids)


def _of_responses(
    rewards: Float[Array, "P G"],
    batch: TrainBatch,
    judged: Judged,
    algorithm: AlgorithmConfig,
) -> Float[Array, "P G"]:
    """Of estimators that judge a response by one number."""
    sampled = batch.response_mask.astype(jnp.int32)
    lengths = masked.sequence_sum(
        sampled, batch.response_mask, batch.sequence_ids, batch.num_sequences
    ).reshape(rewards.shape)
    how = {"normalize_by_std": algorithm.norm_adv_by_std_in_grpo}
    match algorithm.adv_estimator:
        case "grpo":
            return advantages.grpo(rewards, **how)
        case "grpo_passk":
            return advantages.grpo_passk(rewards, **how)
        case "gdpo":
            return advantages.gdpo(judged.by_function, judged.weights, lengths, **how)
        case "rloo":
            return advantages.rloo(rewards)
        case "opo":
            return advantages.opo(rewards, lengths)
        case "gpg":
            return advantages.gpg(rewards)
        case "reinforce_plus_plus_baseline":
            return advantages.reinforce_plus_plus_baseline(rewards, lengths)
