"""From the rewards of a step to the advantages it trains on, by the run's estimator."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

from jaxrl_llm.algorithms import advantages, kl, masked, ppo
from jaxrl_llm.config import checks, plugins
from jaxrl_llm.config.algorithm import Estimator
from jaxrl_llm.config.schema import Config
from jaxrl_llm.config.schema_algorithm import AlgorithmConfig
from jaxrl_llm.data.rows import TrainBatch, places
from jaxrl_llm.data.types import Episode
from jaxrl_llm.sharding import processes
from jaxrl_llm.tracking import token_details
from jaxrl_llm.training.build import Job
from jaxrl_llm.training.experience import Groups, Observe
from jaxrl_llm.training.playing import turn_rewards
from jaxrl_llm.training.randomness import Purpose, seed


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
    """The scores that the rewards are the weighted sum of; NaN where a function does
    not judge."""
    weights: Float[Array, " K"]
    baselines: Float[Array, " P"] | None = None
    """The reward of a greedy response to each prompt."""
    values: Float[Array, "R T"] | None = None
    """The critic's value of the state before each token."""
    sum_pi_squared: Float[Array, "R T"] | None = None
    """Sum of the squares of the distribution each token is from."""
    kl_coef: Num[Array, ""] | None = None
    """Weight of the KL penalty in the reward; None for none."""
    turn_rewards: Float[Array, "P G K"] | None = None
    """The rewards of the policy's turns, which add up to `rewards`; 0 where there is no
    turn. None where episodes have one."""
    num_turns: Int[Array, "P G"] | None = None
    """Turns of the policy; None where there is one."""


def advantages_of(
    batch: TrainBatch, judged: Judged, *, algorithm: AlgorithmConfig
) -> tuple[TrainBatch, dict[str, Float[Array, ""]]]:
    """`batch` with its advantages (with a critic: values and returns too), and metrics.

    Args:
      batch: with `old_logprobs` and `ref_logprobs` if there is a KL penalty, and the
        former for estimators that take `logprobs`.

    Raises:
      ConfigError: there is no such estimator, or it asks for what it cannot get.
      ValueError: it returns something else than it should.
    """
    estimator = plugins.estimator(algorithm.adv_estimator, algorithm.adv_params)
    numbers = (
        ("gamma", algorithm.gamma),
        ("lam", algorithm.lam),
        ("normalize_by_std", algorithm.norm_adv_by_std_in_grpo),
    )
    # How many sequences a row has room for makes no difference here, only a program.
    capacity = batch.sequence_capacity
    found, metrics = _credited(
        dataclasses.replace(batch, sequence_capacity=0),
        judged,
        estimator=estimator,
        numbers=numbers,
        kl_penalty=algorithm.kl_penalty,
    )
    return dataclasses.replace(found, sequence_capacity=capacity), metrics


@functools.partial(jax.jit, static_argnames=("estimator", "numbers", "kl_penalty"))
def _credited(
    batch: TrainBatch,
    judged: Judged,
    *,
    estimator: Estimator,
    numbers: tuple[tuple[str, Any], ...],
    kl_penalty: str,
) -> tuple[TrainBatch, dict[str, Float[Array, ""]]]:
    mask = batch.response_mask
    rewards, metrics = _token_rewards(batch, judged, kl_penalty)
    offered = _offered(batch, rewards, judged)
    given = {name: offered[name]() for name in estimator.needs} | dict(numbers)
    found = plugins.call(estimator.function, given, estimator.params)
    returns = None
    if estimator.has_critic:
        found, returns = _and_returns(estimator.name, found)
    found = _over_tokens(estimator.name, found, batch, judged)
    batch = dataclasses.replace(batch, advantages=found)
    if returns is not None:
        batch = dataclasses.replace(batch, values=judged.values, returns=returns)
        metrics["critic/values/mean"] = masked.token_mean(batch.values, mask)
        metrics["critic/returns/mean"] = masked.token_mean(batch.returns, mask)
    return batch, metrics


def _offered(
    batch: TrainBatch, token_rewards: Float[Array, "R T"], judged: Judged
) -> dict[str, Callable[[], Any]]:
    """What makes each of `config.algorithm.ESTIMATOR_ARRAYS`."""
    P, G = judged.rewards.shape
    mask, ids, count = batch.response_mask, batch.sequence_ids, batch.num_sequences

    def of_responses(x):
        return masked.sequence_sum(x, mask, ids, count).reshape(P, G)

    lengths = of_responses(mask.astype(jnp.int32))
    return {
        "rewards": lambda: advantages.of_others(of_responses(token_rewards), lengths),
        "lengths": lambda: lengths,
        "baselines": lambda: judged.baselines,
        "rewards_by_function": lambda: jnp.nan_to_num(judged.by_function),
        "judged": lambda: ~jnp.isnan(judged.by_function),
        "reward_weights": lambda: judged.weights,
        "token_rewards": lambda: token_rewards,
        "mask": lambda: mask,
        "sequence_ids": lambda: ids,
        "positions": lambda: places(batch),
        "is_prompt": lambda: batch.is_prompt,
        "logprobs": lambda: batch.old_logprobs,
        "values": lambda: judged.values,
        "sum_pi_squared": lambda: judged.sum_pi_squared,
        "group_ids": lambda: jnp.repeat(jnp.arange(P), G),
        "sequence_baselines": lambda: jnp.repeat(judged.baselines, G),
        "num_sequences": lambda: count,
        "turn_rewards": lambda: judged.turn_rewards,
        "num_turns": lambda: judged.num_turns,
    }


def _and_returns(name: str, found: Any) -> tuple[Any, Any]:
    """Raises ValueError unless an estimator with values gave a critic its target."""
    if isinstance(found, tuple) and len(found) == 2:
        return found
    raise ValueError(
        f"algorithm.adv_estimator: {name} takes values, so it returns (advantages, "
        f"returns), which the critic learns; got {type(found).__name__}"
    )


def _over_tokens(
    name: str, found: Any, batch: TrainBatch, judged: Judged
) -> Float[Array, "R T"]:
    """Every response token gets the advantage of its response or turn, or its own."""
    mask, shape = batch.response_mask, jnp.shape(found)
    if judged.turn_rewards is not None and shape == judged.turn_rewards.shape:
        ids = batch.sequence_ids
        of_turns = found.reshape(-1, shape[-1])[ids, advantages.turns(mask, ids)]
        return jnp.where(mask, of_turns, 0.0)
    if shape == judged.rewards.shape:
        return jnp.where(mask, found.ravel()[batch.sequence_ids], 0.0)
    if shape == mask.shape:
        return jnp.where(mask, found, 0.0)
    raise ValueError(
        f"algorithm.adv_estimator: {name} returned an array of shape {shape}; use "
        f"{judged.rewards.shape}, one advantage for each response, or {mask.shape}, "
        "one for each token"
    )


def _token_rewards(batch: TrainBatch, judged: Judged, kl_penalty: str):
    mask, ids = batch.response_mask, batch.sequence_ids
    if judged.turn_rewards is None:
        worth = judged.rewards.ravel()
        rewards = advantages.at_last_token(worth, mask, ids, places(batch))
    else:
        of_turns = judged.turn_rewards.reshape(batch.num_sequences, -1)
        rewards = advantages.at_turn_ends(of_turns, mask, ids)
    if judged.kl_coef is None:
        return rewards, {}
    compared = batch.old_logprobs, batch.ref_logprobs
    penalty = kl.estimate(kl_penalty, *compared)
    mean = masked.sequence_mean(penalty, mask, ids, batch.num_sequences)
    how = {"kind": kl_penalty, "coef": judged.kl_coef}
    return kl.in_reward(rewards, *compared, mask, **how), {
        "actor/reward_kl_penalty": mean,
        "actor/reward_kl_penalty_coeff": judged.kl_coef,
    }


@dataclass(frozen=True, kw_only=True)
class Credited:
    """What a step trains on. Lives on the host."""

    rows: TrainBatch
    """With advantages (gae: values and returns too)."""
    advantages: Float[np.ndarray, "P G"]
    """The mean advantage of the tokens of every response that was generated."""
    metrics: dict[str, float]
    token_details: Callable[[], dict[int, dict[str, Any]]]
    """Finds what is known of each token of a few responses, by p * G + g. Takes long:
    the text of each token is told by decoding the tokens before it with and without
    it."""


def assign_credit(
    job: Job, state: ppo.TrainState, groups: Groups, step: int, observe: Observe
) -> tuple[ppo.TrainState, Credited]:
    """The stage of a step from rewards to advantages.

    The state is the same but for the weight of the KL penalty, if that is adaptive.
    """
    config, actor, scores = job.config, job.actor, groups.scores
    algorithm, params = config.algorithm, state.actor.params
    unknown = np.zeros_like(scores.total)
    rows = actor.make_rows(groups.asked, groups.rollouts, unknown)
    rows = without(rows, [one.masked for group in groups.rollouts for one in group])
    num_counted = int(counted(rows).sum())  # those that a mean KL is of
    values = squares = None
    if actor.asks_other_policies:
        with observe("old_log_prob"):
            rows = actor.with_logprobs(params, rows, state.reference)
    if actor.teacher_before is not None:
        with observe("teacher"):
            rows = actor.with_teacher(rows)
    if "sum_pi_squared" in plugins.estimator_of(algorithm).needs:
        with observe("old_log_prob"):
            squares = actor.sum_pi_squared(params, rows)
    if job.critic:
        with observe("values"):
            values = job.critic.judge(state.critic.params, rows)
    with observe("adv"):
        found: dict[str, Any] = {}
        if checks.learns_from_rewards(config):
            of_turns = None, None
            if config.agent:
                most = config.agent.max_turns
                of_turns = turn_rewards(groups.rollouts, scores.total, most)
            judged = Judged(
                rewards=scores.total,
                by_function=np.stack([*scores.by_function.values()]),
                weights=np.array(job.weights, np.float32),
                baselines=groups.baselines,
                values=values,
                sum_pi_squared=squares,
                kl_coef=jax.device_get(state.kl_coef),
                turn_rewards=of_turns[0],
                num_turns=of_turns[1],
            )
            said, rows = rows.taught, dataclasses.replace(rows, taught=None)
            rows, found = jax.device_get(
                advantages_of(rows, judged, algorithm=algorithm)
            )
            rows = dataclasses.replace(rows, taught=said)
        shown = with_teachers_worth(config, rows)
        means = per_response(shown, scores.total.shape)
        if algorithm.mask_truncated_completions:
            rows, masked_out = without_truncated(rows, groups.rollouts)
            found["training/truncated_completions_masked"] = masked_out
            shown = dataclasses.replace(shown, response_mask=rows.response_mask)
        details = functools.partial(
            token_details.of_step,
            shown,
            [len(one.tokens) for group in groups.rollouts for one in group],
            functools.partial(
                job.source.tokenizer.decode, clean_up_tokenization_spaces=False
            ),
        )
        if algorithm.pf_ppo:
            rows = draw_again(job, rows, scores.total, step)
    if state.kl_coef is not None:
        coef = kl.next_coef(
            algorithm.kl_ctrl.type,
            jnp.asarray(jax.device_get(state.kl_coef)),
            float(found["actor/reward_kl_penalty"]),
            num_counted,
            target_kl=algorithm.kl_ctrl.target_kl,
            horizon=algorithm.kl_ctrl.horizon,
        )
        coef = processes.place(coef, state.kl_coef.sharding)
        state = dataclasses.replace(state, kl_coef=coef)
    metrics = {name: float(value) for name, value in found.items()}
    if algorithm.filter_groups:
        kept = scores.total
        metrics |= {
            "training/groups_generated": float(len(groups.generated.asked)),
            "training/groups_kept": float(len(groups.asked)),
            "critic/rewards_kept/mean": float(kept.mean()),
            "critic/rewards_kept/max": float(kept.max()),
            "critic/rewards_kept/min": float(kept.min()),
        }
    return state, Credited(
        rows=rows, advantages=means, metrics=metrics, token_details=details
    )


def draw_again(
    job: Job, rows: TrainBatch, rewards: Float[np.ndarray, "P G"], step: int
) -> TrainBatch:
    """Draws as many responses as before with PF-PPO's weights, of those that are
    learned from."""
    how = job.config.algorithm.pf_ppo
    weights = advantages.pf_ppo_weights(
        jnp.asarray(rewards.ravel()),
        how.reweight_method,
        weight_pow=how.weight_pow,
        counted=jnp.asarray(counted(rows)),
    )
    key = jax.random.key(seed(job.config.seed, Purpose.RESAMPLE, step))
    return job.actor.take(rows, advantages.resample(key, weights).tolist())


def with_teachers_worth(config: Config, rows: TrainBatch) -> TrainBatch:
    """`rows` with the advantages of distillation.mode=reverse_kl for a person to see.
    The update finds them by its own log-probabilities, which are not known yet where
    there is one update; those of the sampler take their place.

    Args:
      rows: NumPy arrays.
    """
    how = config.distillation
    if how is None or how.mode != "reverse_kl":
        return rows
    own = rows.sampler_logprobs if rows.old_logprobs is None else rows.old_logprobs
    worth = np.float32(how.coef) * (rows.taught.logprobs - own)
    worth = np.where(rows.response_mask & np.isfinite(worth), worth, np.float32(0))
    return dataclasses.replace(rows, advantages=rows.advantages + worth)


def without_truncated(
    rows: TrainBatch, rollouts: Sequence[Sequence[Episode]]
) -> tuple[TrainBatch, float]:
    """`rows` in which no token of an episode that was cut off counts as a response, and
    the share of the episodes that were.

    Args:
      rows: NumPy arrays. Sequence p * G + g is episode g of prompt p.

    Source: DAPO (arXiv:2503.14476), section 3.4, overlong filtering.
    """
    cut = [e.finish_reason == "length" for group in rollouts for e in group]
    return without(rows, cut), float(np.mean(cut))


def without(rows: TrainBatch, left_out: Sequence[bool]) -> TrainBatch:
    """`rows` in which no token of some sequences counts as a response.

    Args:
      rows: NumPy arrays.
      left_out: which, for each sequence.
    """
    if not any(left_out):
        return rows
    out = np.array(left_out)[rows.sequence_ids] & (rows.sequence_ids >= 0)
    mask = rows.response_mask & ~out
    worth = np.where(mask, rows.advantages, np.float32(0))
    return dataclasses.replace(rows, response_mask=mask, advantages=worth)


def counted(rows: TrainBatch) -> Bool[np.ndarray, " S"]:
    """Which sequences have a token that counts as a response.

    Args:
      rows: NumPy arrays.
    """
    ids = rows.sequence_ids[rows.response_mask]
    return np.bincount(ids, minlength=rows.num_sequences) > 0


def per_response(rows: TrainBatch, shape: tuple[int, int]) -> np.ndarray:
    """The mean advantage of the tokens of every response, float32 [P, G]."""
    ids = rows.sequence_ids[rows.response_mask]
    total = np.bincount(ids, rows.advantages[rows.response_mask], rows.num_sequences)
    count = np.maximum(np.bincount(ids, minlength=rows.num_sequences), 1)
    return (total / count).reshape(shape).astype(np.float32)
