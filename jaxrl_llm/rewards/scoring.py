"""What responses are worth: reward functions run side by side, checked, and added up.

P = prompts, G = responses per prompt. A reward function has TRL's signature

    f(prompts=..., completions=..., completion_ids=..., **columns) -> list[float | None]

with one entry per response everywhere: the G responses to the first prompt, then those
to the second; or veRL's, see `per_response`. It may be `async`, and gets only the
arguments its signature names, unless that ends in **kwargs. For a prompt that is text
in the data set, be a chat template put around it or not, a completion is text, of an
episode that of its last turn; for chat messages it is `[{"role": "assistant",
"content": text}]`, with a message for each turn. `completion_ids` are all tokens behind
the prompt. A function that names `finish_reason` is told why each response ended:
"stop", or "length" for one that was cut off; one that names `environments`, what each
episode was played against; unless those are columns.

An entry may be a dictionary: its "score" is the score, and other numbers in it are
`details`, which are logged. They keep their names; beside other functions that may have
such, or if a name is a function's, it is FUNCTION.NAME.

Source: TRL 1.16, `GRPOTrainer._calculate_rewards`.
"""

import math
import numbers
import pickle
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from jaxrl_llm.data.types import Episode, Prompt, Scores
from jaxrl_llm.rewards import isolation as homes
from jaxrl_llm.rewards.function import RewardError, RewardFunction, accepted
from jaxrl_llm.rewards.isolation import Isolation
from jaxrl_llm.workers.messages import Opaque, Unjudged
from jaxrl_llm.workers.pool import call
from jaxrl_llm.workers.process import Failed, Outcome, Process, Returned, WorkerError

_LARGEST = 1e16
"""Deviations of rewards are computed in float32, where squares end at 3e38."""


def join(parts: Sequence[Scores]) -> Scores:
    """Scores by the same functions of one batch of prompts after the other."""
    names = parts[0].by_function
    details = {name: None for part in parts for name in part.details}
    return Scores(
        total=np.concatenate([part.total for part in parts]),
        by_function={
            name: np.concatenate([part.by_function[name] for part in parts])
            for name in names
        },
        errors={name: sum(part.errors[name] for part in parts) for name in names},
        details={
            name: np.concatenate(
                [
                    part.details.get(name, np.full_like(part.total, np.nan))
                    for part in parts
                ]
            )
            for name in details
        },
    )


def score(
    functions: Sequence[RewardFunction],
    prompts: Sequence[Prompt],
    episodes: Sequence[Sequence[Episode]],
    *,
    timeout_s: float,
    on_error: Literal["raise", "zero"],
    isolation: Isolation | None = None,
) -> Scores:
    """Scores G responses to each prompt with every function, side by side.

    A function stays in its worker from call to call, and what it keeps stays there with
    it, until `isolation.release` or until the function is gone. A worker whose function
    hangs, or ends its process, is killed and started anew. Each function gets copies of
    its own of everything.

    Args:
      functions: at least one.
      prompts: P of them.
      episodes: for each prompt, the G that begin with it.
      timeout_s: seconds that all functions have together, as they run side by side.
      on_error: raise, or score 0 and count: one response whose score is not a number
        to train on; all of them for a function that raises, hangs or miscounts. What a
        built-in verifier had no time to judge scores 0 and is counted, either way.
      isolation: where functions run; `Isolation()` if not given.

    Raises:
      RewardError: a function failed and on_error is "raise".
      ValueError: no function, two of one name, or episodes that do not fit prompts.
    """
    _check(functions, prompts, episodes)
    samples = [
        (prompt, episode)
        for prompt, group in zip(prompts, episodes, strict=True)
        for episode in group
    ]
    offered, calls = _arguments(samples), []
    by_name = {"finish_reason": [episode.finish_reason for _, episode in samples]}
    if samples[0][1].played:
        by_name["environments"] = [one.played.environment for _, one in samples]
    for function, worker in zip(
        functions, homes.ready(functions, isolation or Isolation()), strict=True
    ):
        arguments = accepted(function.function, offered, by_name)
        if not (function.trusted or isinstance(worker, Process)):
            seen = {k: arguments.pop(k) for k in ("environments",) if k in arguments}
            arguments = pickle.loads(pickle.dumps(arguments)) | seen  # own copies
        calls.append((worker, arguments))
    try:
        outcomes = call(calls, timeout_s)
    except WorkerError as error:  # it once did: it was killed, and started again
        raise RewardError(f"a reward function cannot be started: {error}") from error

    shape = len(prompts), len(episodes[0])
    several = sum(not function.trusted for function in functions) > 1
    terms, by_function, errors, details = [], {}, {}, {}
    for function, outcome in zip(functions, outcomes, strict=True):
        outcome, more = _split(outcome)
        for name, values_ in more.items():
            if several or any(name == one.name for one in functions):
                name = f"{function.name}.{name}"
            details[name] = np.array(values_, np.float32).reshape(shape)
        values, failures, unjudged = _read(function, outcome, len(samples))
        if failures and on_error == "raise":
            index, cause = min(failures.items())
            raise RewardError(
                f"reward function {function.name!r} {cause}\n{_show(*samples[index])}"
            ) from _origin(outcome)
        terms.append([function.weight * value for value in values])
        by_function[function.name] = np.array(values, np.float32).reshape(shape)
        errors[function.name] = len(failures) + unjudged
    # The exact sum, rounded once: weights that add up to 1 give a perfect response 1.
    total = [math.fsum(x for x in each if x == x) for each in zip(*terms, strict=True)]
    return Scores(
        total=np.array(total, np.float32).reshape(shape),
        by_function=by_function,
        errors=errors,
        details=details,
    )


def _check(
    functions: Sequence[RewardFunction],
    prompts: Sequence[Prompt],
    episodes: Sequence[Sequence[Episode]],
) -> None:
    names = [function.name for function in functions]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"reward functions need different names, got {names}")
    sizes = [len(group) for group in episodes]
    if len(sizes) != len(prompts) or len(set(sizes)) != 1 or not sizes[0]:
        raise ValueError(
            f"each of the {len(prompts)} prompts needs the same number of responses, "
            f"got groups of {sizes}"
        )
    for prompt, group in zip(prompts, episodes, strict=True):
        if any(episode.prompt_id != prompt.id for episode in group):
            ids = [episode.prompt_id for episode in group]
            raise ValueError(f"responses to prompts {ids} stand at prompt {prompt.id}")


def _arguments(samples: Sequence[tuple[Prompt, Episode]]) -> dict[str, list[Any]]:
    """What every function is offered, one entry per response.

    A column that only some prompts have is None for the others.
    """
    columns = {name: None for prompt, _ in samples for name in prompt.columns}
    return dict(
        prompts=[prompt.for_rewards for prompt, _ in samples],
        completions=[
            _said(episode)
            if isinstance(prompt.for_rewards, str)
            else [{"role": turn.role, "content": turn.text} for turn in episode.turns]
            for prompt, episode in samples
        ],
        completion_ids=[episode.tokens.tolist() for _, episode in samples],
        **{name: [p.columns.get(name) for p, _ in samples] for name in columns},
    )


def _said(episode: Episode) -> str:
    """What the policy said last, of an episode with an environment; else all text."""
    return episode.policy_turns[-1].text if episode.played else episode.text


def _read(
    term: RewardFunction, outcome: Outcome, count: int
) -> tuple[list[float], dict[int, str], int]:
    """The scores of a call that is over, NaN for None; what is wrong with which of
    them; how many there was no time for."""
    if isinstance(outcome, Failed):
        return _all_failed(outcome.cause, count)
    result = outcome.value
    if not isinstance(result, list):
        kind = result.kind if isinstance(result, Opaque) else type(result).__name__
        return _all_failed(f"returned a {kind}, not a list of numbers", count)
    if len(result) != count:
        cause = f"returned {len(result)} scores for {count} responses"
        return _all_failed(cause, count)
    values, failures = [], {}
    for index, value in enumerate(result):
        cause = None if value is None else _misfit(value, term.weight)
        if cause:
            failures[index] = cause
        values.append(math.nan if value is None else 0.0 if cause else float(value))
    return values, failures, sum(isinstance(value, Unjudged) for value in result)


def _split(outcome: Outcome) -> tuple[Outcome, dict[str, list[float]]]:
    """What a function returned with the scores out of its dictionaries, and the other
    numbers in these, NaN where one has none. A dictionary without a score stays."""
    result = outcome.value if isinstance(outcome, Returned) else None
    if not isinstance(result, list):
        return outcome, {}
    found: dict[str, list[float]] = {}
    for index, value in enumerate(result):
        if isinstance(value, dict) and "score" in value:
            for name, number in value.items():
                fits = isinstance(number, numbers.Real) and abs(number) <= _LARGEST
                if name != "score" and fits:
                    found.setdefault(str(name), [math.nan] * len(result))
                    found[str(name)][index] = float(number)
    scores = [v.get("score", v) if isinstance(v, dict) else v for v in result]
    return Returned(scores), found


def _misfit(value: Any, weight: float) -> str | None:
    """Why a value is no score; None for one that is."""
    if isinstance(value, dict):
        return f"returned {value!r:.200}, a dictionary without 'score'"
    if not isinstance(value, numbers.Real) or value != value:
        return f"returned {value!r:.200}, not a finite number"
    size = abs(value)
    if size <= _LARGEST and size * abs(weight) <= _LARGEST:
        return None
    if size == math.inf:
        return f"returned {value!r}, not a finite number"
    shown = f"{value:.6g}" if size <= 1e300 else "a number over 1e300"
    if size <= _LARGEST:
        shown += f", with its weight {weight:g} {value * weight:g}"
    return (
        f"returned {shown}, not a finite number when advantages square it in float32; "
        f"use rewards of at most {_LARGEST:g}"
    )


def _all_failed(cause: str, count: int) -> tuple[list[float], dict[int, str], int]:
    return [0.0] * count, dict.fromkeys(range(count), cause), 0


class _InFunction(Exception):
    """Where a function raised."""


def _origin(outcome: Outcome) -> Exception | None:
    if isinstance(outcome, Failed) and outcome.trace:
        return _InFunction(f"\n{outcome.trace}{outcome.cause}")
    return None


def _show(prompt: Prompt, episode: Episode) -> str:
    """One response, short enough for an error message."""
    text = episode.text
    if len(text) > 600:
        text = f"{text[:300]} ... {text[-300:]}"
    lines = [
        f"  prompt {prompt.id} ends: {str(prompt.for_rewards)[-200:]!r}",
        f"  response {episode.sample}: {text!r}",
    ]
    if "answer" in prompt.columns:
        lines.append(f"  answer: {prompt.columns['answer']!r}")
    return "\n".join(lines)
