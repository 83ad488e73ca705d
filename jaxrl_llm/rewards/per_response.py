"""Functions that score one response a call, with the signature that veRL calls."""

import asyncio
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_RESPONSE, _ANSWER, _MORE = "solution_str", "ground_truth", "extra_info"


class PerResponse:
    """A function f(data_source, solution_str, ground_truth, extra_info) that gives one
    number, or a dictionary with `score`, as a function of all responses of a step.

    `solution_str` is the response's text and `ground_truth` the column `answer`. Any
    other parameter without a default is the column of that name; `data_source` and
    `extra_info` are filled from their columns where there are such, and `extra_info` is
    {} where a row has none. It may be `async`.

    Source: veRL 0.9.1, the reward manager `naive`.
    """

    def __init__(self, function: Callable[..., Any]):
        inner = function
        while isinstance(inner, functools.partial):
            inner = inner.func
        functools.update_wrapper(self, inner)
        self.function = function
        self.__signature__ = _signature(function)

    def __call__(
        self, completions: Sequence[str | list], answer: Sequence[Any], **columns: Any
    ) -> Any:
        """One score per response; something to await if the function is `async`."""
        named = {_RESPONSE: completions, _ANSWER: answer, **columns}
        found = [
            self.function(**dict(zip(named, map(_given, named, row), strict=True)))
            for row in zip(*named.values(), strict=True)
        ]
        return _gathered(found) if any(map(inspect.isawaitable, found)) else found


def adapted(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function as it is, or as `PerResponse` if it has veRL's signature."""
    try:
        names = inspect.signature(function).parameters.keys()
    except ValueError:  # none to read
        return function
    return PerResponse(function) if {_RESPONSE, _ANSWER} <= names else function


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    """What a function is to be given of all responses."""
    bound = function.keywords if isinstance(function, functools.partial) else {}
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in bound
        and (parameter.default is parameter.empty or name in ("data_source", _MORE))
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and name not in (_RESPONSE, _ANSWER)
    }
    optional = {_MORE: None} | {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.default is not parameter.empty
    }
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Signature(
        [
            *(inspect.Parameter(name, kind) for name in ("completions", "answer")),
            *(
                inspect.Parameter(
                    name, kind, default=optional.get(name, inspect.Parameter.empty)
                )
                for name in parameters
            ),
        ]
    )


def _given(name: str, value: Any) -> Any:
    """One argument of one call."""
    if name == _RESPONSE and not isinstance(value, str):
        return last_said(value)
    return {} if name == _MORE and value is None else value


def last_said(messages: Sequence[Mapping[str, Any]]) -> str:
    """The text of the policy's last message."""
    return next(m["content"] for m in reversed(messages) if m["role"] == "assistant")


async def _gathered(results: Sequence[Any]) -> list[Any]:
    return list(await asyncio.gather(*results))
