"""What one batch of responses looked like, as records and as numbers."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxrl_llm.data.types import Completion, Prompt, Scores
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
    completions: Sequence[Sequence[Completion]],
    scores: Scores,
    **per_response: np.ndarray,
) -> list[dict[str, Any]]:
    """One record per completion, for `MetricsWriter.write_rollouts`.

    A function that does not judge a response has null among its "scores".

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
            "sample": completion.sample,
            "prompt": last_user_message(prompt),
            "content": prompt.content,
            "completion": completion.text,
            "answer": _plain(prompt.columns.get("answer")),
            "reward": float(scores.total[p, g]),
            "scores": _finite(
                {n: float(value[p, g]) for n, value in scores.by_function.items()}
            ),
            **{name: value[p, g].item() for name, value in per_response.items()},
            "finish_reason": completion.finish_reason,
            "num_tokens": len(completion.tokens),
            "tokens": completion.tokens.tolist(),
            "weight_version": completion.weight_version,
        }
        for p, prompt in enumerate(prompts)
        for g, completion in enumerate(completions[p])
    ]


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
    completions: Sequence[Sequence[Completion]],
    scores: Scores,
    advantages: Float[np.ndarray, "P G"],
) -> dict[str, float]:
    """What one batch of responses looked like.

    `clip_ratio` is the share of responses cut off at their limit;
    `training/groups_all_equal` the share of prompts whose responses all got the same
    reward, so that they teach GRPO nothing; `reward/NAME/mean` the mean of one
    function over the responses it judges.
    """
    flat = [completion for group in completions for completion in group]
    lengths = [len(completion.tokens) for completion in flat]
    total = scores.total
    metrics = {
        **_spread("critic/rewards", total),
        "critic/score/mean": float(total.mean()),
        **_spread("critic/advantages", advantages),
        **_spread("response_length", lengths),
        "response_length/clip_ratio": cut_off(flat),
        **_spread("prompt_length", [len(prompt.tokens) for prompt in prompts]),
        "training/groups_all_equal": float((np.ptp(total, axis=1) == 0).mean()),
    }
    for name, value in scores.by_function.items():
        if not np.isnan(value).all():
            metrics[f"reward/{name}/mean"] = float(np.nanmean(value))
    for name, count in scores.errors.items():
        if count:
            metrics[f"reward_errors/{name}"] = float(count)
    return metrics


def cut_off(completions: Sequence[Completion]) -> float:
    """The share of completions that reached their length limit."""
    return float(np.mean([c.finish_reason == "length" for c in completions]))


def accuracy_name(names: Sequence[str]) -> str | None:
    """The validation accuracy to show when there is room for one: the first data
    source's, greedy if it was measured. None without a validation."""
    for pattern in (r"val-core/.+/acc/greedy", r"val-core/.+/acc/mean@\d+"):
        for name in names:
            if re.fullmatch(pattern, name):
                return name
    return None


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
