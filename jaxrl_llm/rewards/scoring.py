"""What responses are worth: reward functions run side by side, checked, and added up.

P = prompts, G = responses per prompt. A reward function has TRL's signature

    f(prompts=..., completions=..., completion_ids=..., **columns) -> list[float | None]

with one entry per response everywhere: the G responses to the first prompt, then those
to the second. It may be `async`, and gets only the arguments its signature names,
unless that ends in **kwargs. For a prompt that is text a completion is text; for a
prompt that is chat messages it is `[{"role": "assistant", "content": text}]`, with a
message for each turn. `completion_ids` are all tokens behind the prompt.

Source: TRL 1.16, `GRPOTrainer._calculate_rewards`.
"""

import asyncio
import functools
import inspect
import numbers
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jaxrl_llm.data.types import Episode, Prompt, Scores

_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, kw_only=True)
class RewardFunction:
    """One term of the reward."""

    name: str
    """In metrics and errors; no two of a run share it."""
    function: Callable[..., Any]
    """With TRL's signature; see the module docstring."""
    weight: float = 1.0
    """Its scores are multiplied by it."""


def join(parts: Sequence[Scores]) -> Scores:
    """Scores by the same functions of one batch of prompts after the other."""
    names = parts[0].by_function
    return Scores(
        total=np.concatenate([part.total for part in parts]),
        by_function={
            name: np.concatenate([part.by_function[name] for part in parts])
            for name in names
        },
        errors={name: sum(part.errors[name] for part in parts) for name in names},
    )


class RewardError(ValueError):
    """A reward function failed; the message names it, the cause and one response."""


def score(
    functions: Sequence[RewardFunction],
    prompts: Sequence[Prompt],
    episodes: Sequence[Sequence[Episode]],
    *,
    timeout_s: float,
    on_error: Literal["raise", "zero"],
) -> Scores:
    """Scores G responses to each prompt with every function, side by side.

    Args:
      functions: at least one.
      prompts: P of them.
      episodes: for each prompt, the G that begin with it.
      timeout_s: seconds that all functions have together, as they run side by side. One
        that hangs is left behind; it holds up neither this call nor the program's end.
        Only code that never lets go of the interpreter's lock, such as a runaway
        regular expression, cannot be left: give it a process, as `judge` does.
      on_error: raise, or score 0 and count: one response whose score is not a finite
        number; all of them for a function that raises, hangs or miscounts.

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
    arguments = _arguments(samples)
    calls = [_start(f.function, arguments, timeout_s) for f in functions]
    done, _ = wait(calls, timeout_s)

    shape = len(prompts), len(episodes[0])
    total = np.zeros(shape, np.float32)
    by_function, errors = {}, {}
    for function, call in zip(functions, calls, strict=True):
        if call in done:
            values, failures = _read(call, len(samples))
        else:
            cause = f"did not finish within {timeout_s:g} s"
            values, failures = _all_failed(cause, len(samples))
        if failures and on_error == "raise":
            index, cause = min(failures.items())
            raise RewardError(
                f"reward function {function.name!r} {cause}\n{_show(*samples[index])}"
            ) from (call.exception() if call in done else None)
        scores = np.array(values, np.float32).reshape(shape)
        total += np.float32(function.weight) * np.nan_to_num(scores, nan=0.0)
        by_function[function.name] = scores
        errors[function.name] = len(failures)
    return Scores(total=total, by_function=by_function, errors=errors)


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
        prompts=[prompt.content for prompt, _ in samples],
        completions=[
            episode.text
            if isinstance(prompt.content, str)
            else [{"role": turn.role, "content": turn.text} for turn in episode.turns]
            for prompt, episode in samples
        ],
        completion_ids=[episode.tokens.tolist() for _, episode in samples],
        **{name: [p.columns.get(name) for p, _ in samples] for name in columns},
    )


def _start(
    function: Callable[..., Any], arguments: dict[str, list[Any]], timeout_s: float
) -> Future:
    """Calls `function` in a thread of its own, with the arguments it accepts.

    A daemon thread: an executor's would be waited for when the program ends.
    """
    parameters = inspect.signature(function).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        arguments = {k: v for k, v in arguments.items() if k in parameters}
    if isinstance(function, functools.partial):  # a term's params, not columns
        bound = function.keywords
        arguments = {k: v for k, v in arguments.items() if k not in bound}
    call: Future = Future()

    def run() -> None:
        try:
            result = function(**arguments)
            if inspect.isawaitable(result):
                # A second more than the caller waits, who so is the one to say that it
                # took too long; this only ends the coroutine.
                result = asyncio.run(_await(result, timeout_s + 1.0))
            call.set_result(result)
        except BaseException as error:  # noqa: BLE001 - users' code raises anything;
            call.set_exception(error)  # `_read` sorts it out in the calling thread.

    threading.Thread(target=run, daemon=True).start()
    return call


async def _await(awaitable: Any, timeout_s: float) -> Any:
    return await asyncio.wait_for(awaitable, timeout_s)


def _read(call: Future, count: int) -> tuple[list[float], dict[int, str]]:
    """The scores of a call that is over, and what is wrong with which of them.

    Raises:
      KeyboardInterrupt, SystemExit: what the function raised to end the program.
    """
    error = call.exception()
    if error is not None and not isinstance(error, KeyboardInterrupt | SystemExit):
        cause = f"raised {type(error).__name__}: {error}"
        return _all_failed(cause, count)
    result = call.result()
    if isinstance(result, str | bytes | dict) or not hasattr(result, "__len__"):
        cause = f"returned a {type(result).__name__}, not a list of numbers"
        return _all_failed(cause, count)
    if len(result) != count:
        cause = f"returned {len(result)} scores for {count} responses"
        return _all_failed(cause, count)
    if hasattr(result, "__array__"):
        result = np.asarray(result).tolist()
    values, failures = [], {}
    for index, value in enumerate(result):
        if value is None:
            values.append(float("nan"))
        elif isinstance(value, numbers.Real | np.bool_) and abs(value) <= _LARGEST:
            values.append(float(value))
        else:
            values.append(0.0)
            failures[index] = f"returned {value!r}, not a finite number"
    return values, failures


def _all_failed(cause: str, count: int) -> tuple[list[float], dict[int, str]]:
    return [0.0] * count, dict.fromkeys(range(count), cause)


def _show(prompt: Prompt, episode: Episode) -> str:
    """One response, short enough for an error message."""
    text = episode.text
    if len(text) > 600:
        text = f"{text[:300]} ... {text[-300:]}"
    lines = [
        f"  prompt {prompt.id} ends: {str(prompt.content)[-200:]!r}",
        f"  response {episode.sample}: {text!r}",
    ]
    if "answer" in prompt.columns:
        lines.append(f"  answer: {prompt.columns['answer']!r}")
    return "\n".join(lines)
