"""What a run's policy plays against, and the episodes that come of it."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32, Int32

from jaxrl_llm.agents import hosting, tools
from jaxrl_llm.agents.environments import Environments
from jaxrl_llm.agents.loop import Limits, Template, play
from jaxrl_llm.agents.template import Splicer
from jaxrl_llm.config.names import ConfigError
from jaxrl_llm.config.schema import Config
from jaxrl_llm.config.schema_agent import AgentConfig
from jaxrl_llm.data.chat_template import Encoder
from jaxrl_llm.data.types import Episode, Prompt, Scores, single_turn
from jaxrl_llm.rewards import RewardFunction
from jaxrl_llm.rollout.engine import Engine, Request, generate_together
from jaxrl_llm.sharding import processes
from jaxrl_llm.workers.sandbox import levels
from jaxrl_llm.workers.sandbox.levels import Sandbox
from jaxrl_llm.workers.sandbox.tool import python, python_tool

ENVIRONMENT = "environment"
"""The term of the reward that environments give."""


@dataclass(frozen=True, kw_only=True)
class Agent:
    """What the policy plays against."""

    environments: Environments
    template: Template
    limits: Limits
    notes: tuple[str, ...] = ()
    """What the run's log says of them."""

    def close(self) -> None:
        """Ends what environments run in."""
        self.environments.shutdown()


def agent_of(config: Config, encoder: Encoder, *, seen: bool) -> Agent:
    """What section `agent` names.

    Args:
      encoder: of what is said.
      seen: whether reward functions look at environments, which must be in this
        process then.

    Raises:
      ConfigError: there is no such tool or environment.
      ValueError: one cannot be used, or the chat template cannot hold several turns.
    """
    agent = config.agent
    if seen and agent.isolation == "process":
        raise ConfigError(
            "agent.isolation is process, but a reward function takes environments, "
            "which must be in this process for that; set it to thread or auto"
        )

    functions, apart = named(agent.tools), {}
    if python in functions:
        sandbox = Sandbox(**config.sandbox.model_dump())
        levels.describe(sandbox)  # says now if there is none
        boxed = python_tool(sandbox)
        functions = [boxed if one is python else one for one in functions]
        # A worker has one call at a time, and its jail.
        most = sandbox.jobs or os.cpu_count() or 1
        apart = {python.__name__: min(agent.workers, most)}
    form, taught = tools.choose(agent.parser, encoder.tokenizer.chat_template or "")
    settings = hosting.Settings(
        tools=functions,
        environment=named(agent.environment),
        params=agent.params,
        max_tool_calls=agent.max_tool_calls,
        turn_timeout_s=agent.turn_timeout_s,
        apart=apart,
        workers=agent.workers,
        isolation="thread" if seen else agent.isolation,
        memory_gib=agent.memory_gib,
    )
    environments = hosting.Hosted(settings, form)
    template = Splicer(encoder, None if taught else form.describe)
    notes = environments.notes
    if agent.on_rewrite == "fork":
        for role in environments.roles:
            template.check_written_anew(role)
    elif template.rewrites_history and agent.max_turns > 1:
        notes = [*notes, _REWRITTEN]
    return Agent(
        environments=environments,
        template=template,
        limits=limits_of(config),
        notes=tuple(notes),
    )


_REWRITTEN = (
    "the chat template leaves out of earlier turns what was thought within <think>; "
    "in an episode all turns stay as they were sampled, so that the policy learns with "
    "more before it than a server shows it that renders each conversation anew; "
    "agent.on_rewrite=fork shows it the same"
)


def named(given: Any) -> Any:
    """What stands behind names of section `agent`: one, several in a row or by their
    keys, or none.

    Raises:
      ConfigError: there is no such tool or environment.
    """
    if isinstance(given, Mapping):
        return {name: named(one) for name, one in given.items()}
    if isinstance(given, tuple):
        return [named(one) for one in given]
    return given and hosting.find("agent", given)


def agent_names(section: AgentConfig | None) -> list[str]:
    """All tools and environments that it names."""
    given = section and section.environment
    several = given.values() if isinstance(given, Mapping) else [given] * bool(given)
    return [*(section.tools if section else ()), *several]


def tool_notes(config: Config) -> list[str]:
    """Where programs run that the policy writes as calls of a tool."""
    if "python" not in agent_names(config.agent):
        return []
    return [levels.describe(Sandbox(**config.sandbox.model_dump()))]


def limits_of(config: Config) -> Limits:
    """How long episodes may be."""
    agent = config.agent
    policy = agent.on_status.model_dump()
    return Limits(
        max_turns=agent.max_turns,
        max_tokens=config.longest_response,
        max_prompt_length=config.data.max_prompt_length,
        forks=agent.on_rewrite == "fork",
        together=agent.reproducible,
        # All openings are waited for, and one without a worker would never come.
        at_once=agent.workers if agent.reproducible else None,
        masked=frozenset(name for name, how in policy.items() if how == "mask"),
        retried=frozenset(name for name, how in policy.items() if how == "retry"),
        max_retries=agent.max_retries,
    )


def episodes_of(
    engine: Engine,
    agent: Agent | None,
    prompts: Sequence[Prompt],
    requests: Sequence[Request],
) -> list[list[Episode]]:
    """The episodes that requests ask for: one list per prompt, by sample. Of many
    processes, each plays its share; all call it and get all of them, but only their own
    with the environments."""
    if agent is None:
        return single_turn(generate_together(engine, requests))
    mine = play(
        engine,
        agent.environments,
        agent.template,
        processes.share(prompts),
        processes.share(requests),
        agent.limits,
    )
    if jax.process_count() == 1:
        return mine
    told = [[_without_environment(one) for one in group] for group in mine]
    parts = processes.gather(told)
    parts[jax.process_index()] = mine
    return [group for part in parts for group in part]


def _without_environment(episode: Episode) -> Episode:
    return replace(episode, played=replace(episode.played, environment=None))


def reward_term(episodes: Sequence[Sequence[Episode]], others: bool) -> RewardFunction:
    """What environments gave for these episodes, as a term of the reward.

    Args:
      others: whether anything else judges episodes.

    Raises:
      ConfigError: nothing does, and no environment gives a reward.
    """
    flat = [one for group in episodes for one in group]
    given = [one.played.reward for one in flat]
    silent = [one.played.reward is None for one in flat if not one.masked]
    if silent and all(silent) and not others:
        raise ConfigError(
            "reward.functions is empty and agent.environment gives no reward, so that "
            "nothing judges episodes; give a reward function, or the class a get_reward"
        )
    return RewardFunction(
        name=ENVIRONMENT, function=lambda completion_ids: given, trusted=True
    )


def mask_unjudged(
    episodes: Sequence[Sequence[Episode]], scores: Scores
) -> list[list[Episode]]:
    """Episodes of which those are masked that nothing judges, as when a judge gave no
    verdict. A penalty of their length judges none."""
    terms = [v for n, v in scores.by_function.items() if n != "overlong_penalty"]
    if not terms:
        return [list(group) for group in episodes]
    unjudged = np.all(np.isnan(np.stack(terms)), axis=0)
    return [
        [
            replace(one, masked=True) if nothing else one
            for one, nothing in zip(group, of_group, strict=True)
        ]
        for group, of_group in zip(episodes, unjudged, strict=True)
    ]


def without_masked(scores: Scores, episodes: Sequence[Sequence[Episode]]) -> Scores:
    """Scores in which an episode that is masked is judged by nothing and stands where
    the others of its group are on average, so that they are compared with one another
    alone."""
    masked = np.array([[one.masked for one in group] for group in episodes])
    if not masked.any():
        return scores
    counted = np.where(masked, 0.0, scores.total).sum(axis=1, keepdims=True)
    others = np.maximum((~masked).sum(axis=1, keepdims=True), 1)
    nothing = np.float32(np.nan)
    return replace(
        scores,
        total=np.where(masked, counted / others, scores.total).astype(np.float32),
        by_function={
            name: np.where(masked, nothing, value)
            for name, value in scores.by_function.items()
        },
        details={
            name: np.where(masked, nothing, value)
            for name, value in scores.details.items()
        },
    )


def turn_rewards(
    episodes: Sequence[Sequence[Episode]], totals: Float32[np.ndarray, "P G"], most: int
) -> tuple[Float32[np.ndarray, "P G K"], Int32[np.ndarray, "P G"]]:
    """The reward of every turn of the policy, and how many turns there are: none of an
    episode that is masked.

    What an episode's reward is more than the sum of its turns' stands on the last.

    Args:
      totals: rewards of whole episodes.
      most: K, turns of an episode at most.
    """
    found = np.zeros((*totals.shape, most), np.float32)
    counts = np.zeros(totals.shape, np.int32)
    for p, group in enumerate(episodes):
        for g, episode in enumerate(group):
            if not episode.masked:
                given = [turn.reward or 0.0 for turn in episode.policy_turns]
                given[-1] += float(totals[p, g]) - sum(given)
                found[p, g, : len(given)], counts[p, g] = given, len(given)
    return found, counts
