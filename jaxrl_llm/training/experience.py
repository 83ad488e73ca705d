"""The responses that one step trains on: generated, scored, filtered."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32

from jaxrl_llm.config import plugins
from jaxrl_llm.config.names import ConfigError
from jaxrl_llm.config.schema import Config, EngineConfig, SamplingConfig
from jaxrl_llm.data.stream import PromptBatches
from jaxrl_llm.data.types import Episode, Generated, Prompt, Scores
from jaxrl_llm.rewards import Isolation, RewardFunction, score
from jaxrl_llm.rewards.scoring import join
from jaxrl_llm.roles.reward_model import RewardModel
from jaxrl_llm.rollout.engine import Engine, Request, Sampling
from jaxrl_llm.sharding import processes
from jaxrl_llm.training.playing import (
    Agent,
    episodes_of,
    mask_unjudged,
    reward_term,
    without_masked,
)
from jaxrl_llm.training.randomness import Purpose, seed

Score = Callable[[Sequence[Prompt], Sequence[Sequence[Episode]]], Scores]
Observe = Callable[[str], AbstractContextManager[None]]
"""Is told that a phase of the step, by its name, lasts as long as the block does."""


@dataclass(frozen=True, kw_only=True)
class Groups:
    """P prompts, G episodes that begin with each, and what they are worth."""

    asked: Sequence[Prompt]
    rollouts: Sequence[Sequence[Episode]]
    scores: Scores
    baselines: Float32[np.ndarray, " P"] | None = None
    """The reward of a greedy response to each prompt, if the estimator compares with
    it; where nothing judged that, the mean reward of the others."""
    generated: Generated
    """What was generated for them; with `algorithm.filter_groups` there may be more."""
    epoch: float
    """Passes over the training data up to and with these prompts."""
    position: Mapping[str, Any]
    """Where the training data stands behind these prompts (`PromptBatches.state`)."""


def collect(
    config: Config,
    engine: Engine,
    score: Score,
    stream: PromptBatches,
    observe: Observe,
    step: int,
    *,
    agent: Agent | None = None,
) -> Groups:
    """The groups of one step, in all processes the same.

    With `algorithm.filter_groups` (dynamic sampling), batches are generated until there
    are enough groups whose responses differ in worth; what is more than enough is not
    trained on.

    Args:
      agent: what the policy plays against; it answers prompts if not given.

    Raises:
      ConfigError: what must differ is nothing that reward functions return.
      ValueError: `max_num_gen_batches` were not enough.

    Source: Yu et al. 2025, section 3.2 (arXiv:2503.14476).
    """
    wanted, how = config.data.train_batch_size, config.algorithm.filter_groups
    parts: list[Generated] = []
    kept: list[Generated] = []
    for attempt in itertools.count():
        with observe("gen"):
            asked = next(stream)
            of_step = requests(config, asked, step, attempt)
            rollouts = episodes_of(engine, agent, asked, of_step)
        with observe("reward"):
            scores = score(asked, rollouts)
            rollouts = mask_unjudged(rollouts, scores)
            scores = without_masked(scores, rollouts)
        made = Generated(asked=asked, rollouts=rollouts, scores=scores)
        parts.append(made)
        kept.append(_take(made, differing(made.scores, how.metric)) if how else made)
        found = sum(len(part.asked) for part in kept)
        if how is None or found >= wanted:
            break
        if attempt + 1 == how.max_num_gen_batches:
            raise ValueError(
                f"step {step}: in {attempt + 1} batches of {wanted} prompts only "
                f"{found} groups have responses that differ in {how.metric}, "
                f"{wanted} are needed; raise algorithm.filter_groups."
                "max_num_gen_batches (0: no limit) or rollout.n, or give questions "
                "that are neither always nor never answered well"
            )
    used = _take(_join(kept), range(wanted)) if how else kept[0]
    groups = Groups(
        asked=used.asked,
        rollouts=used.rollouts,
        scores=used.scores,
        generated=_join(parts),
        epoch=stream.epoch,
        position=stream.state(),
    )
    if not plugins.estimator_of(config.algorithm).asks_greedily:
        return groups
    # A filter may keep two groups of a prompt that came back within the step.
    asked = list({prompt.id: prompt for prompt in groups.asked}.values())
    with observe("gen"):
        of_step = greedily(requests(config, asked, step))
        greedy = episodes_of(engine, agent, asked, of_step)
    with observe("reward"):
        scores = score(asked, greedy)
        masked = [one.masked for (one,) in mask_unjudged(greedy, scores)]
    of_prompt = {
        prompt.id: None if unknown else total
        for prompt, total, unknown in zip(
            asked, scores.total[:, 0], masked, strict=True
        )
    }
    # What is not known is no 0: the responses are compared with one another instead.
    found = [
        of_prompt[prompt.id] if of_prompt[prompt.id] is not None else total.mean()
        for prompt, total in zip(groups.asked, groups.scores.total, strict=True)
    ]
    baselines = np.array(found, np.float32)
    generated = replace(groups.generated, greedy=greedy)
    return replace(groups, baselines=baselines, generated=generated)


def score_together(
    functions: Sequence[RewardFunction],
    model: RewardModel | None,
    prompts: Sequence[Prompt],
    episodes: Sequence[Sequence[Episode]],
    *,
    timeout_s: float,
    on_error: Literal["raise", "zero"],
    isolation: Isolation | None = None,
    environment: bool = False,
) -> Scores:
    """What responses are worth. Of many processes, each runs the functions on its share
    of the prompts; all call it with the same ones and get all scores.

    The model is on the devices of all, so all ask it together. Its scores are then what
    one more function returns.

    Args:
      timeout_s: as of `rewards.score`, of the functions.
      on_error: as of `rewards.score`.
      isolation: where the functions run.
      environment: whether what the policy plays against gives rewards.

    Raises:
      RewardError: a function or the model failed and on_error is "raise".
      ConfigError: nothing else judges, and environments give no rewards.
    """
    terms = list(functions)
    mine, answers = processes.share(prompts), processes.share(episodes)
    if model is not None:
        known = processes.share(model.score(prompts, episodes).tolist())
        scores = [x for group in known for x in group]
        terms.append(
            RewardFunction(
                name=model.name,
                weight=model.weight,
                function=lambda completion_ids: scores,
                trusted=True,
            )
        )
    if environment:
        terms.append(reward_term(answers, bool(terms)))
    made = None
    if mine and not terms:  # nothing is judged, and nothing learns from it
        zeros = np.zeros((len(mine), len(answers[0])), np.float32)
        made = Scores(total=zeros, by_function={}, errors={}, details={})
    elif mine:
        made = score(
            terms,
            mine,
            answers,
            timeout_s=timeout_s,
            on_error=on_error,
            isolation=isolation,
        )
    found = join([part for part in processes.gather(made) if part])
    return without_masked(found, episodes)


def differing(scores: Scores, metric: str) -> list[int]:
    """Prompts whose responses do not all have the same worth, as far as they are
    judged.

    Args:
      metric: "reward", or the name of a reward function or of one of `details`, which
        may be missing where a function failed.

    Raises:
      ConfigError: no response has such a number.
    """
    known = scores.by_function | scores.details
    if metric == "reward":
        values, judged = scores.total, scores.judged
    elif metric in known or any(scores.errors.values()):
        values = known.get(metric, np.full_like(scores.total, np.nan))
        judged = ~np.isnan(values)
    else:
        raise ConfigError(
            f"algorithm.filter_groups.metric is {metric}, which no response has; use "
            f"one of {', '.join(['reward', *known])}"
        )
    most = np.max(values, axis=1, where=judged, initial=-np.inf)
    least = np.min(values, axis=1, where=judged, initial=np.inf)
    return np.flatnonzero(most > least).tolist()


def requests(
    config: Config, asked: Sequence[Prompt], step: int, attempt: int = 0
) -> list[Request]:
    """What is asked of the engine in one training step.

    Args:
      attempt: a prompt that comes back within the step gets other responses.
    """
    return [
        Request(
            prompt_id=prompt.id,
            tokens=prompt.tokens,
            num_samples=config.rollout.n,
            seed=seed(config.seed, Purpose.ROLLOUT, step, attempt),
            sampling=sampling(config.rollout, config.rollout),
        )
        for prompt in asked
    ]


def greedily(requests: Sequence[Request]) -> list[Request]:
    """Requests for these prompts to be answered once each with the likeliest tokens."""
    return [
        replace(r, num_samples=1, sampling=replace(r.sampling, temperature=0.0))
        for r in requests
    ]


def sampling(rollout: EngineConfig, section: SamplingConfig) -> Sampling:
    """How `section` (rollout or val) wants tokens drawn, with rollout's limits."""
    return Sampling(
        max_tokens=rollout.max_response_length,
        temperature=section.temperature,
        top_k=section.top_k,
        top_p=section.top_p,
        min_p=section.min_p,
        stop=rollout.stop,
        stop_token_ids=rollout.stop_token_ids,
    )


def _take(made: Generated, prompts: Sequence[int]) -> Generated:
    return Generated(
        asked=[made.asked[p] for p in prompts],
        rollouts=[made.rollouts[p] for p in prompts],
        scores=made.scores.take(prompts),
    )


def _join(parts: Sequence[Generated]) -> Generated:
    return Generated(
        asked=[prompt for part in parts for prompt in part.asked],
        rollouts=[group for part in parts for group in part.rollouts],
        scores=join([part.scores for part in parts]),
    )
