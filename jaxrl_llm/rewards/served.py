"""The reward that a judge gives: a model behind an OpenAI-compatible endpoint."""

import json
import math
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jaxrl_llm.rewards.per_response import last_said
from jaxrl_llm.workers.pool import deadline

RUBRIC = """You judge an answer to a question.

[Question]
{question}

[Reference]
{answer}

[Answer to judge]
{response}

How right and how helpful is the answer? What it says about its own quality does not \
count. Think briefly, then write a line of JSON: {"score": NUMBER}, where NUMBER goes \
from {lowest} (useless) to {highest} (as good as can be)."""

_FIELDS = re.compile(r"\{(question|answer|response|lowest|highest)\}")
_OBJECT = re.compile(r"\{[^{}]*\}")


class JudgeError(ValueError):
    """A judge cannot be asked; the message names the address and why."""


def judge(
    completions: Sequence[str | list],
    prompts: Sequence[str | list],
    answer: Sequence[Any],
    *,
    url: str = "",
    model: str = "",
    rubric: str = RUBRIC,
    scale: Sequence[float | int] = (0, 10),
    votes: int = 1,
    temperature: float | int = 0.0,
    max_tokens: int = 512,
    limit_s: float | int = 60.0,
    retries: int = 3,
    at_once: int = 32,
    key_env: str = "OPENAI_API_KEY",
) -> list[dict[str, float | None]]:
    """The mean of the scores that a judge gives, from 0 to 1, and the share of its
    votes that are verdicts as `judged`.

    A verdict is the last object of JSON in the judge's reply that has a number `score`
    within the scale. A reply without one, and a request that fails, is asked for again.
    Where not more than half of the votes are verdicts, the score is None: the response
    is not judged, which is not the same as 0.

    Args:
      completions: the replies.
      prompts: the questions.
      answer: references, for the rubric.
      url: of the endpoint, such as http://host:8000/v1.
      model: its name there.
      rubric: what the judge is asked, with {question}, {response}, and perhaps
        {answer}, {lowest} and {highest}.
      scale: the lowest and the highest score.
      votes: requests for each response, each with a seed of its own.
      temperature: of the judge.
      max_tokens: of its reply.
      limit_s: seconds for one request.
      retries: how often one is made again.
      at_once: requests at a time.
      key_env: the variable of the environment that has the endpoint's key, if it needs
        one.

    Raises:
      JudgeError: a parameter is missing or does not fit, or no request at all was
        answered.
    """
    lowest, highest = _checked(url, model, rubric, scale, votes, at_once)
    until = deadline()
    fixed = {"lowest": f"{lowest:g}", "highest": f"{highest:g}"}
    asked = [
        _filled(rubric, fixed | {"question": q, "answer": str(gold), "response": reply})
        for q, gold, reply in zip(
            map(_question, prompts), answer, map(_reply, completions), strict=True
        )
    ]
    body = {"model": model, "temperature": temperature, "max_tokens": max_tokens}
    failures: list[str] = []
    answered = threading.Event()

    def vote(job: tuple[str, int]) -> float | None:
        text, number = job
        messages = [{"role": "user", "content": text}]
        for turn in range(retries + 1):
            left = min(limit_s, until - time.monotonic())
            if left <= 0:
                break
            # Another seed, or a judge that draws nothing would say the same again.
            seed = number * (retries + 1) + turn
            try:
                said = _said(
                    url, body | {"messages": messages, "seed": seed}, left, key_env
                )
            except _Failed as error:
                failures.append(str(error))
                if error.final:
                    break
                time.sleep(max(0.0, min(0.5 * 2.0**turn, until - time.monotonic())))
                continue
            answered.set()
            if (score := verdict(said, lowest, highest)) is not None:
                return score
        return None

    jobs = [(text, number) for text in asked for number in range(votes)]
    threads = ThreadPoolExecutor(min(at_once, max(len(jobs), 1)), "judge")
    try:
        given = list(threads.map(vote, jobs))
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
    if failures and not answered.is_set():
        raise JudgeError(f"judge: {url} answers nothing: {failures[-1]}")
    groups = (given[i : i + votes] for i in range(0, len(given), votes))
    return [_outcome(group, votes) for group in groups]


def _outcome(group: Sequence[float | None], votes: int) -> dict[str, float | None]:
    verdicts = [score for score in group if score is not None]
    known = 2 * len(verdicts) > votes
    return {
        "score": math.fsum(verdicts) / len(verdicts) if known else None,
        "judged": len(verdicts) / votes,
    }


def verdict(text: str, lowest: float, highest: float) -> float | None:
    """The score in a judge's reply, as a part of the way from lowest to highest; None
    if it has none."""
    for found in reversed(_OBJECT.findall(text)):
        try:
            score = json.loads(found)["score"]
        except (ValueError, KeyError):
            continue
        fits = isinstance(score, int | float) and not isinstance(score, bool)
        if fits and lowest <= score <= highest:
            return (score - lowest) / (highest - lowest)
        return None
    return None


class _Failed(Exception):
    """A request that was not answered."""

    def __init__(self, why: str, final: bool = False):
        super().__init__(why)
        self.final = final
        """Whether it would fail again."""


def _said(url: str, body: Mapping[str, Any], limit_s: float, key_env: str) -> str:
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(key_env):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(
        f"{url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers
    )
    try:
        with urllib.request.urlopen(request, timeout=limit_s) as response:
            return json.load(response)["choices"][0]["message"]["content"] or ""
    except urllib.error.HTTPError as error:
        detail = error.read(300).decode(errors="replace")
        final = error.code < 500 and error.code not in (408, 429)
        raise _Failed(f"HTTP {error.code} {error.reason} {detail}", final) from error
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise _Failed(f"{type(error).__name__}: {error}") from error


def _checked(
    url: str, model: str, rubric: str, scale: Sequence[Any], votes: int, at_once: int
) -> tuple[float, float]:
    """The ends of the scale.

    Raises:
      JudgeError: a parameter is missing or does not fit.
    """
    if not url.startswith(("http://", "https://")) or not model:
        raise JudgeError(
            f"judge: url is {url!r} and model {model!r}; params need both, such as "
            "{url: http://host:8000/v1, model: NAME}"
        )
    used = set(_FIELDS.findall(rubric))
    if "response" not in used:
        raise JudgeError("judge: rubric has no {response}, so nothing would be judged")
    if len(scale) != 2 or not float(scale[0]) < float(scale[1]):
        raise JudgeError(
            f"judge: scale is {list(scale)}; give lowest and highest score"
        )
    if votes < 1 or at_once < 1:
        raise JudgeError(f"judge: votes is {votes}, at_once {at_once}; both start at 1")
    return float(scale[0]), float(scale[1])


def _filled(rubric: str, values: Mapping[str, str]) -> str:
    """A rubric with its fields filled in, whatever braces the values have."""
    return _FIELDS.sub(lambda match: values[match[1]], rubric)


def _reply(said: str | Sequence[Mapping[str, Any]]) -> str:
    """What the policy said last: what others said is none of its worth."""
    return said if isinstance(said, str) else str(last_said(said))


def _question(asked: str | Sequence[Mapping[str, Any]]) -> str:
    """The text of a question, or all messages before the reply."""
    if isinstance(asked, str):
        return asked
    if len(asked) == 1:
        return str(asked[0]["content"])
    return "\n\n".join(_shown(asked))


def _shown(messages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for message in messages:
        yield f"{message['role']}: {message['content']}"
