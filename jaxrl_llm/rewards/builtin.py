"""The built-in reward functions, and how they are named.

All have TRL's signature (see `scoring`): one score per response, 1.0 for a right answer
and 0.0 for a wrong one. `answer` is the data set's answer column. Arguments after the
`*` are the `params` of a `Term`.
"""

import decimal
import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

from jaxrl_llm.config import plugins
from jaxrl_llm.config.names import near
from jaxrl_llm.rewards import served
from jaxrl_llm.rewards.code import code
from jaxrl_llm.rewards.function import RewardFunction
from jaxrl_llm.rewards.per_response import PerResponse, last_said
from jaxrl_llm.workers.judge import judge
from jaxrl_llm.workers.sandbox.levels import Sandbox

Completions = Sequence[str | list]
"""Text, or the chat messages of a reply."""

# A sign counts only where it is no dash or minus: not after a word, digit or ")".
_NUMBER = re.compile(
    r"(?:(?<![\w)])[-+\u2212])?\$?"
    r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+|(?=\.[0-9]))"
    r"(?:\.[0-9]+)?(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?"
)


def exact(
    completions: Completions, answer: Sequence, *, ignore_case: bool = False
) -> list[float]:
    """The reply, without the white space around it, is the answer, likewise.

    Args:
      completions: the replies.
      answer: text or number.
      ignore_case: compare case-folded.
    """

    def normal(text: str) -> str:
        return text.strip().casefold() if ignore_case else text.strip()

    return [
        float(normal(reply) == normal(gold))
        for reply, gold in zip(_texts(completions), _golds(answer), strict=True)
    ]


def numeric(
    completions: Completions, answer: Sequence, *, tolerance: float | int = 0.0
) -> list[float]:
    """|last number in the reply - last number in the answer| <= tolerance.

    Numbers may have a sign, a dollar sign, groups of thousands (1,234), decimals and an
    exponent (2.5e3). They are compared as decimals, not as floats: 0.1 is 0.10.

    Args:
      completions: the replies.
      answer: a number, or text whose last number is the answer.
      tolerance: largest difference, in the answer's own unit.

    Raises:
      ValueError: an answer without a number, or a negative tolerance.
    """
    if not tolerance >= 0:
        raise ValueError(f"numeric: tolerance must be at least 0, got {tolerance}")
    scores = []
    for reply, gold in zip(_texts(completions), _golds(answer), strict=True):
        wanted, found = _last_number(gold), _last_number(reply)
        if wanted is None:
            raise ValueError(f"answer {gold!r} has no number in it")
        scores.append(float(found is not None and _close(found, wanted, tolerance)))
    return scores


def _last_number(text: str) -> Decimal | None:
    numbers = _NUMBER.findall(text)
    if not numbers:
        return None
    plain = numbers[-1].replace(",", "").replace("$", "").replace("\u2212", "-")
    return Decimal(plain)


def _close(a: Decimal, b: Decimal, tolerance: float | int) -> bool:
    if a == b:  # exact, where a difference would be rounded
        return True
    with decimal.localcontext(decimal.ExtendedContext):
        return abs(a - b) <= Decimal(str(tolerance))


def gsm8k(
    completions: Completions,
    answer: Sequence,
    *,
    method: str = "strict",
) -> list[float]:
    """GSM8K's own rule: the number after the last `#### ` is, as text, the answer's.

    Only the last 300 characters of the reply are searched. Commas in the number do not
    count, everything else does: `72.0` and `$72` are not `72`.

    Args:
      completions: the replies.
      answer: the number, or a worked solution that ends with `#### ` and the number.
      method: strict asks for the `#### `. flexible takes the last run of digits, dots
        and commas as it stands, so that `72.` and `1,234` are not `72` and `1234`.

    Source: veRL 0.9.1, verl/utils/reward_score/gsm8k.py.
    """
    if method not in ("strict", "flexible"):
        raise ValueError(f"gsm8k: method is {method!r}; use 'strict' or 'flexible'")
    scores = []
    for reply, gold in zip(_texts(completions), _golds(answer), strict=True):
        if method == "strict":
            found = re.findall(r"#### (-?[0-9.,]+)", reply[-300:])
            found = [number.replace(",", "") for number in found]
        else:
            found = re.findall(r"-?[0-9.,]+", reply[-300:])
            found = [number for number in found if number != "."]
        wanted = gold.rpartition("####")[2].strip().replace(",", "")
        scores.append(float(bool(found) and found[-1] == wanted))
    return scores


def math(
    completions: Completions, answer: Sequence, *, limit_s: float | int = 5.0
) -> list[float]:
    r"""The reply's last `\boxed{}`, or else its last expression, equals the answer.

    Equality is math-verify's: 0.5 is \frac{1}{2}, and {1, 2} is {2, 1}. Each reply is
    checked in another process; one that takes longer than limit_s scores 0.

    Args:
      completions: the replies.
      answer: LaTeX or a number, in `\boxed{}` or not; of a text with `####`, what
        follows.
      limit_s: seconds for one reply.

    Raises:
      ValueError: an answer that math-verify cannot read, or math-verify not installed.

    Source: math-verify 0.8, with its default extraction.
    """
    jobs = []
    for reply, gold in zip(_texts(completions), _golds(answer), strict=True):
        gold = gold.rpartition("####")[2].strip()
        boxed = gold if r"\boxed" in gold else rf"\boxed{{{gold}}}"
        jobs.append((_from_last(r"\boxed", reply), _from_last(r"\boxed", boxed)))
    return judge("math", jobs, limit_s)


def _from_last(mark: str, text: str) -> str:
    return text[max(0, text.rfind(mark)) :]


def reasoning_gym(
    completions: Completions,
    question: Sequence[str],
    answer: Sequence,
    metadata: Sequence[Mapping[str, Any]],
    dataset_params: Sequence[Mapping[str, Any] | None] | None = None,
    *,
    task: str | None = None,
    limit_s: float | int = 5.0,
) -> list[float]:
    """The task's own score, between 0 and 1, of what stands in the last <answer> tag.

    Without such a tag the whole reply, stripped, is scored. Each reply is scored in
    another process, as some scorers evaluate it; one that takes longer than limit_s, or
    that the scorer cannot read, scores 0.

    Args:
      completions: the replies.
      question: as drawn.
      answer: the reference; None where the task has none.
      metadata: as drawn.
      dataset_params: the task's parameters, on which some scorers depend.
      task: its name; metadata["source_dataset"] if not given.
      limit_s: seconds for one reply.

    Raises:
      ValueError: an entry that its scorer cannot read, or reasoning-gym not installed.

    Source: reasoning-gym 0.1, `ProceduralDataset.score_answer`.
    """
    jobs = []
    for i, reply in enumerate(_texts(completions)):
        tagged = re.findall(r"<answer>(.*?)</answer>", reply, re.DOTALL)
        entry = dict(question=question[i], answer=answer[i], metadata=metadata[i])
        name = task or metadata[i]["source_dataset"]
        params = (dataset_params[i] if dataset_params else None) or {}
        text = (tagged[-1] if tagged else reply).strip()
        jobs.append((text, entry, name, params))
    return judge("reasoning_gym", jobs, limit_s)


def _texts(completions: Completions) -> list[str]:
    return [c if isinstance(c, str) else last_said(c) for c in completions]


def _golds(answer: Sequence) -> list[str]:
    if None in answer:
        raise ValueError("a row has no answer to compare with")
    return [str(gold) for gold in answer]


def overlong_penalty(
    completion_ids: list[list[int]], *, max_length: int, buffer: int, factor: float
) -> list[float]:
    """0 up to max_length - buffer tokens, from there down to -factor at max_length.

        min(0, factor * (max_length - buffer - length) / buffer)

    Source: Yu et al. 2025, eq. 13 (arXiv:2503.14476).
    """
    start = max_length - buffer
    return [min(0.0, factor * (start - len(ids)) / buffer) for ids in completion_ids]


BUILTIN: dict[str, Callable[..., list[float]]] = {
    function.__name__: function
    for function in (exact, numeric, gsm8k, math, reasoning_gym, code, served.judge)
}


@dataclass(frozen=True, kw_only=True)
class Term:
    """One term of the reward, by name."""

    name: str
    """A built-in function's, or module:function."""
    weight: float = 1.0
    """Its scores are multiplied by it."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments passed to the function."""


def resolve(
    terms: Sequence[Term], sandbox: Sandbox | None = None
) -> list[RewardFunction]:
    """The functions that `terms` name, with their params bound.

    `module:function` is imported, also from the current directory. A name used twice
    gets a number: gsm8k, gsm8k_2.

    Args:
      sandbox: where built-in functions run programs that a model wrote.

    Raises:
      ValueError: an unknown name or parameter, a parameter's value that does not fit a
        built-in, or a function that cannot be imported.
    """
    functions: list[RewardFunction] = []
    counts: dict[str, int] = {}
    for term in terms:
        function = _find(term.name)
        name = term.name.rpartition(":")[2]
        counts[name] = counts.get(name, 0) + 1
        functions.append(
            RewardFunction(
                name=name if counts[name] == 1 else f"{name}_{counts[name]}",
                function=_bind(term.name, function, term.params, sandbox),
                weight=term.weight,
                trusted=function in BUILTIN.values(),
            )
        )
    return functions


def with_term(function: RewardFunction, term: Term) -> RewardFunction:
    """A function with the weight and the params of a term.

    Raises:
      ValueError: the function has no such parameter.
    """
    called = function.function
    if term.params:
        called = _bind(term.name, called, term.params)
    return replace(function, function=called, weight=term.weight)


def _find(name: str) -> Callable[..., Any]:
    if ":" not in name:
        if name not in BUILTIN:
            raise ValueError(
                f"reward.functions: {name!r} is not built in{near(name, BUILTIN)}; "
                f"use one of {sorted(BUILTIN)} or module:function"
            )
        return BUILTIN[name]
    return plugins.find("reward.functions", name)


def _bind(
    name: str,
    function: Callable[..., Any],
    params: Mapping[str, Any],
    sandbox: Sandbox | None = None,
) -> Callable[..., Any]:
    """`function` with its params; a built-in's defaults too, and the sandbox if it has
    one.

    Bound arguments are never filled from a column that happens to have their name.
    """
    if isinstance(function, PerResponse):
        function = function.function  # which has the parameters
    parameters = inspect.signature(function).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for key in params:
            if key not in parameters:
                raise ValueError(
                    f"reward.functions: {name!r} has no parameter {key!r}"
                    f"{near(key, parameters)}; it has {list(parameters)}"
                )
    defaults = {
        key: p.default
        for key, p in parameters.items()
        if name in BUILTIN and p.kind is p.KEYWORD_ONLY
    }
    if "sandbox" in defaults:
        if "sandbox" in params:
            raise ValueError(
                f"reward.functions: {name!r} takes its sandbox from the section sandbox"
            )
        defaults["sandbox"] = sandbox
    bound = functools.partial(function, **{**defaults, **params})
    if name in BUILTIN:
        # No responses: it only checks its params and that what it needs is installed.
        bound(**{key: [] for key, p in parameters.items() if p.default is p.empty})
    return bound
