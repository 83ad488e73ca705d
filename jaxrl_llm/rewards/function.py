"""What a reward function is, and which arguments it gets."""

import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxrl_llm.config.names import near
from jaxrl_llm.rewards.per_response import adapted

GIVEN = ("prompts", "completions", "completion_ids")
"""What every function is offered besides the columns of the data."""
BY_NAME = ("finish_reason", "environments")
"""What a function gets only if its signature names it and no column is called so."""


@dataclass(frozen=True, kw_only=True)
class RewardFunction:
    """One term of the reward."""

    name: str
    """In metrics and errors; no two of a run share it."""
    function: Callable[..., Any]
    """With TRL's signature, see `scoring`; one with veRL's becomes a `PerResponse`."""
    weight: float = 1.0
    """Its scores are multiplied by it."""
    trusted: bool = False
    """It is known to end, to need little memory and to leave what it is given as it
    is: it needs no process of its own."""

    def __post_init__(self) -> None:
        """Makes one function of one that scores response by response."""
        object.__setattr__(self, "function", adapted(self.function))


class RewardError(ValueError):
    """A reward function failed; the message names it, the cause and one response."""


def accepted(
    function: Callable[..., Any],
    offered: Mapping[str, Any],
    by_name: Mapping[str, Any],
) -> dict[str, Any]:
    """Those of the arguments on offer that a function takes.

    What a partial object has bound is a setting, and never taken from a column.

    Args:
      by_name: what it gets only if its signature names it, see `BY_NAME`.
    """
    parameters = inspect.signature(function).parameters.values()
    taken = {p.name for p in parameters if p.kind not in _BY_POSITION}
    given = {k: v for k, v in by_name.items() if k in taken} | offered
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        taken |= given.keys()
    return {k: v for k, v in given.items() if k in taken - bound(function)}


def takes_environments(function: Callable[..., Any]) -> bool:
    """Whether it looks at what episodes were played against."""
    try:
        names = inspect.signature(function).parameters
    except ValueError:  # none to read
        return False
    return "environments" in names and "environments" not in bound(function)


def bound(function: Callable[..., Any]) -> set[str]:
    """The parameters that partial objects have bound."""
    names: set[str] = set()
    while isinstance(function, functools.partial):
        names |= function.keywords.keys()
        function = function.func
    return names


def check_signatures(
    functions: Sequence[RewardFunction], columns: Collection[str], where: str
) -> None:
    """Raises ValueError if a function asks for what it will not get.

    Args:
      columns: of the first row.
      where: the key of the configuration that names the row's source.
    """
    given = (*GIVEN, *BY_NAME)
    offered = [*given, *(name for name in columns if name not in given)]
    for term in functions:
        called = f"reward function {term.name!r}"
        try:
            parameters = inspect.signature(term.function).parameters.values()
        except ValueError as error:
            raise ValueError(f"{called} has no signature to read: {error}") from None
        for parameter in parameters:
            if parameter.kind is parameter.POSITIONAL_ONLY:
                raise ValueError(
                    f"{called} takes {parameter.name!r} by position; arguments are "
                    "given by name"
                )
            optional = parameter.default is not parameter.empty
            if optional or parameter.kind in _BY_POSITION + (parameter.VAR_KEYWORD,):
                continue
            if parameter.name not in {*offered} - bound(term.function):
                raise ValueError(
                    f"{called} asks for {parameter.name!r}"
                    f"{near(parameter.name, offered)}; row 0 of {where} offers "
                    f"{', '.join(offered)}. Rename the parameter, or give it a default"
                )


_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)
