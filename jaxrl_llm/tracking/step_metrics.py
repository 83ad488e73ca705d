"""What one batch of responses looked like, as records and as numbers."""

import json
import re
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxrl_llm.data.types import Episode, Prompt, Scores
from jaxrl_llm.tracking.run_directory import _finite


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What came of the held-out questions."""

    metrics: dict[str, float]
    """By name; see `training.evaluate.validate`."""
    records: list[dict[str, Any]]
    """One per answer, for `MetricsWriter.write_rollouts`; greedy ones after sampled
    ones. They have "correct" besides the fields of the records of training."""


def rollout_records(
    step: int,
    split: str,
    kind: str,
    prompts: Sequence[Prompt],
    episodes: Sequence[Sequence[Episode]],
    scores: Scores,
    **per_response: np.ndarray,
) -> list[dict[str, Any]]:
    """One record per episode, for `MetricsWriter.write_rollouts`.

    A function that does not judge a response has null among its "scores", which hold
    the numbers beside a score (`Scores.details`), too.

    Args:
      kind: "train", "sampled" or "greedy".
      per_response: further [P, G] arrays by name, such as `advantage`.
    """
    return [
        {
            "step": step,
            "split": split,
            "kind": kind,
            "prompt_id": prompt.id,
            "sample": episode.sample,
            "prompt": last_user_message(prompt),
            "content": prompt.content,
            "completion": episode.text,
            "answer": _plain(prompt.columns.get("answer")),
            "reward": float(scores.total[p, g]),
            "scores": _finite(
                {n: float(value[p, g]) for n, value in _numbers(scores).items()}
            ),
            **{name: value[p, g].item() for name, value in per_response.items()},
            "finish_reason": episode.finish_reason,
            "num_tokens": len(episode.tokens),
            "tokens": episode.tokens.tolist(),
            "weight_version": episode.weight_version,
            **_played(episode),
        }
        for p, prompt in enumerate(prompts)
        for g, episode in enumerate(episodes[p])
    ]


def _played(episode: Episode) -> dict[str, Any]:
    """What a record has of an episode with an environment besides."""
    did = episode.played
    if did is None:
        return {}
    turns = [
        {
            "role": turn.role,
            "text": turn.text,
            "num_tokens": len(turn.tokens),
            "sampled": turn.finish_reason is not None,
            "reward": turn.reward,
            "new_context": turn.new_context,
        }
        for turn in episode.turns
    ]
    return {
        "status": episode.status,
        "masked": episode.masked,
        "opening": [dict(message) for message in episode.opening],
        "turns": turns,
        "tool_calls": did.calls,
        "failures": dict(did.failures),
        "why": did.why,
        "attempt": did.attempt,
    }


def last_user_message(prompt: Prompt) -> str:
    """The text of the question, without system prompt and earlier turns."""
    if isinstance(prompt.content, str):
        return prompt.content
    users = [m for m in prompt.content if m.get("role") == "user"] or prompt.content
    content = users[-1].get("content", "")
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


def batch_metrics(
    prompts: Sequence[Prompt],
    episodes: Sequence[Sequence[Episode]],
    scores: Scores,
    advantages: Float[np.ndarray, "P G"],
) -> dict[str, float]:
    """What one batch of responses looked like.

    Args:
      prompts, episodes, scores: of all that was generated.
      advantages: of what is trained on.

    `response_length` counts what the policy sampled (veRL adds what tools answered);
    `clip_ratio` is the share of responses cut off at their limit;
    `training/groups_all_equal` the share of prompts whose responses all got the same
    reward, so that they teach GRPO nothing; `reward/NAME/mean` the mean of one
    function, or of a number that one returns beside its score, over the responses that
    have it; `rollout/kept_mass` the probability, before
    top-k, top-p and min-p cut anything off, of the tokens that they left to draw from.
    """
    flat = [episode for group in episodes for episode in group]
    begun = zip(prompts, episodes, strict=True)
    total = scores.total
    metrics = {
        **_spread("critic/advantages", advantages),
        **_spread("response_length", [episode.num_sampled for episode in flat]),
        "response_length/clip_ratio": cut_off(flat),
        **_spread(
            "prompt_length", [len(group[0].first_tokens(p)) for p, group in begun]
        ),
    }
    if scores.by_function:  # else nothing is judged
        metrics |= {
            **_spread("critic/rewards", total),
            "critic/score/mean": float(total.mean()),
            "training/groups_all_equal": float((np.ptp(total, axis=1) == 0).mean()),
        }
    if flat[0].played:
        metrics |= agent_metrics(flat)
    masses = np.concatenate([episode.kept_mass for episode in flat])
    if np.isfinite(masses).any():
        metrics["rollout/kept_mass_mean"] = float(np.nanmean(masses))
        metrics["rollout/kept_mass_min"] = float(np.nanmin(masses))
    for name, value in _numbers(scores).items():
        if not np.isnan(value).all():
            metrics[f"reward/{name}/mean"] = float(np.nanmean(value))
    for name, count in scores.errors.items():
        if count:
            metrics[f"reward_errors/{name}"] = float(count)
    return metrics


def agent_metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    """What became of episodes with an environment.

    agent/turns/{mean,max,min}       turns of the policy
    agent/tool_calls                 of an episode, on average
    agent/forks                      contexts of an episode but its first, on average
    agent/observation_tokens         read between turns
    agent/prefilled_tokens           computed besides what was sampled, where an
                                     engine tells
    agent/environment_s/{mean,max}   seconds of an episode that went to answers
    agent/status/NAME                share of episodes that ended so, if some did
    agent/failures/KIND              how often, over all episodes
    agent/retries, agent/masked      episodes begun anew; share that is not learned
                                     from
    """
    played = [episode.played for episode in episodes]
    seconds = [one.seconds for one in played]
    read = [len(one.tokens) - one.num_sampled for one in episodes]
    found = {
        **_spread("agent/turns", [len(one.policy_turns) for one in episodes]),
        "agent/forks": float(np.mean([one.num_contexts - 1 for one in episodes])),
        "agent/tool_calls": float(np.mean([one.calls for one in played])),
        "agent/observation_tokens": float(np.mean(read)),
        "agent/environment_s/mean": float(np.mean(seconds)),
        "agent/environment_s/max": float(np.max(seconds)),
        "agent/retries": float(sum(one.attempt for one in played)),
        "agent/masked": float(np.mean([one.masked for one in episodes])),
    }
    prefilled = [one.prefilled for one in played if one.prefilled is not None]
    if prefilled:
        found["agent/prefilled_tokens"] = float(np.mean(prefilled))
    ends = Counter(one.status for one in episodes)
    for status in dict.fromkeys(["completed", *sorted(ends)]):
        found[f"agent/status/{status}"] = ends[status] / len(episodes)
    failures = sum((Counter(one.failures) for one in played), Counter())
    return found | {f"agent/failures/{k}": float(n) for k, n in failures.items()}


def num_tokens(
    prompts: Sequence[Prompt], episodes: Sequence[Sequence[Episode]]
) -> tuple[int, int]:
    """Tokens that were read, each prompt once for every episode that begins with it,
    and tokens that were sampled."""
    each = zip(prompts, episodes, strict=True)
    whole = sum(
        len(one.first_tokens(prompt)) + len(one.tokens)
        for prompt, group in each
        for one in group
    )
    new = sum(one.num_sampled for group in episodes for one in group)
    return whole - new, new


def cut_off(episodes: Sequence[Episode]) -> float:
    """The share of episodes that end because a response reached its length limit."""
    return float(np.mean([e.finish_reason == "length" for e in episodes]))


OFFLINE = ("sft", "rm", "dpo")
"""What the metrics of runs begin with that learn from rows that are there."""


def loss_name(names: Container[str]) -> str:
    """The loss of such a run; "" of others."""
    found = (f"{task}/loss" for task in OFFLINE if f"{task}/loss" in names)
    return next(found, "")


def accuracy_name(names: Sequence[str]) -> str | None:
    """The validation accuracy to show when there is room for one: the first data
    source's, greedy if it was measured. None without a validation."""
    for pattern in (r"val-core/.+/acc/greedy", r"val-core/.+/acc/mean@\d+"):
        for name in names:
            if re.fullmatch(pattern, name):
                return name
    return None


def _numbers(scores: Scores) -> dict[str, np.ndarray]:
    """What functions say about each response, [P, G] by name."""
    return {**scores.by_function, **scores.details}


def _plain(value: Any) -> Any:
    """`value` if JSON can hold it, else its text."""
    try:
        json.dumps(value)
    except TypeError:
        return str(value)
    return value


def _spread(name: str, values: Any) -> dict[str, float]:
    values = np.asarray(values)
    return {
        f"{name}/mean": float(values.mean()),
        f"{name}/max": float(values.max()),
        f"{name}/min": float(values.min()),
    }
