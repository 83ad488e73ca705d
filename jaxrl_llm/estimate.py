"""From the rewards of a step to the rows it trains on: which estimator a run wants."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm import advantages, masked
from jaxrl_llm.batch import Completion, Prompt, TrainBatch
from jaxrl_llm.config import Config, ConfigError
from jaxrl_llm.learner import Learner
from jaxrl_llm.rewards import Scores


def make_rows(
    learner: Learner,
    asked: Sequence[Prompt],
    rollouts: Sequence[Sequence[Completion]],
    scores: Scores,
) -> tuple[TrainBatch, np.ndarray]:
    """The batch to train on, and each response's mean advantage, float32 [P, G]."""
    config = learner.config
    if config.algorithm.adv_estimator != "reinforce_plus_plus":
        found = estimate_advantages(config, scores, rollouts)
        return learner.make_rows(asked, rollouts, found), found
    rows = learner.make_rows(asked, rollouts, scores.total)
    where = jax.device_put((rows.response_mask, rows.sequence_ids))
    found = advantages.reinforce_plus_plus(
        advantages.at_last_token(
            jnp.asarray(scores.total.ravel()), *where, jnp.asarray(rows.positions)
        ),
        *where,
        gamma=config.algorithm.gamma,
    )
    means = masked.sequence_means(found, *where, scores.total.size)
    rows = dataclasses.replace(rows, advantages=np.asarray(found))
    return rows, np.asarray(means).reshape(scores.total.shape)


def estimate_advantages(
    config: Config, scores: Scores, rollouts: Sequence[Sequence[Completion]]
) -> np.ndarray:
    """Of estimators that judge a response by one number: float32 [P, G]."""
    rewards = jnp.asarray(scores.total)
    lengths = jnp.array([[len(c.tokens) for c in group] for group in rollouts])
    how = {"normalize_by_std": config.algorithm.norm_adv_by_std_in_grpo}
    match config.algorithm.adv_estimator:
        case "grpo":
            found = advantages.grpo(rewards, **how)
        case "grpo_passk":
            found = advantages.grpo_passk(rewards, **how)
        case "gdpo":
            # As in the sum, a function adds nothing to a response it does not judge.
            each = [np.nan_to_num(x) for x in scores.by_function.values()]
            weights = [float(f.weight) for f in config.reward.functions]
            found = advantages.gdpo(jnp.stack(each), jnp.array(weights), lengths, **how)
        case "rloo":
            found = advantages.rloo(rewards)
        case "opo":
            found = advantages.opo(rewards, lengths)
        case "gpg":
            found = advantages.gpg(rewards)
        case "reinforce_plus_plus_baseline":
            found = advantages.reinforce_plus_plus_baseline(rewards, lengths)
        case estimator:
            raise ConfigError(
                f"algorithm.adv_estimator {estimator} needs more than this"
            )
    return np.asarray(found)
