"""Functions that a configuration names: found, checked, called with what they ask for.

Built-in ones and those of a user (`module:function`, importable from the current
directory too) go through this one door. A function says by the names of its parameters
what it wants. A name that is not on offer, has no default and stands in no `params` is
an error that lists what is on offer.
"""

import functools
import hashlib
import importlib
import inspect
import sys
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxrl_llm.config.algorithm import (
    ESTIMATOR_ARRAYS,
    ESTIMATOR_NUMBERS,
    ESTIMATORS,
    LOSS_ARRAYS,
    LOSS_NUMBERS,
    LOSSES,
    OPTIMIZER_NUMBERS,
    OPTIMIZERS,
    PREFERENCE_ARRAYS,
    PREFERENCE_LOSSES,
    PREFERENCE_NUMBERS,
    Estimator,
    Loss,
    choice,
)
from jaxrl_llm.config.names import ConfigError, near

Function = Callable[..., Any]

_LOSS, _ESTIMATOR = "actor.policy_loss.loss_mode", "algorithm.adv_estimator"
_NOTHING: Mapping[str, Any] = types.MappingProxyType({})

# Functions of this process by the names that its configurations call them.
_OFFERED: dict[str, Function] = {}


def offer(function: Function) -> str:
    """The name, module:qualname, by which configurations of this process can call a
    function, be it a closure or one of a notebook.

    A later function of that name takes its place.
    """
    inner = function.func if isinstance(function, functools.partial) else function
    qualname = getattr(inner, "__qualname__", type(inner).__qualname__)
    name = f"{inner.__module__}:{qualname}"
    _OFFERED[name] = function
    return name


def find(key: str, name: str) -> Function:
    """The function that `name`, module:function, stands for.

    Args:
      key: of the configuration; errors begin with it.

    Raises:
      ConfigError: there is no such module, or no such function in it.
    """
    if name in _OFFERED:
        return _OFFERED[name]
    module_name, _, attribute = name.rpartition(":")
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"{key}: {name!r}: {error}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        public = [n for n in vars(module) if callable(getattr(module, n))]
        raise ConfigError(
            f"{key}: {module_name} has no function {attribute!r}"
            f"{near(attribute, public)}"
        )
    return function


def call(
    function: str | Function,
    given: Mapping[str, Any],
    params: Mapping[str, Any] = _NOTHING,
) -> Any:
    """`function` of what it asks for by name out of `given`, and of all of `params`."""
    if isinstance(function, str):
        function = find("function", function)
    asked = [k for k in named_parameters(function) if k in given and k not in params]
    return function(**{k: given[k] for k in asked}, **params)


def loss(mode: str | Function, params: Mapping[str, Any] = _NOTHING) -> Loss:
    """The record of a policy loss: of the table, or made from a function's signature.

    Args:
      mode: a name of the table, module:function, or a function.
      params: keyword arguments besides what it is given by name.

    Raises:
      ConfigError: there is no such loss, or it asks for what it cannot get.
    """
    where = _LOSS, "actor.policy_loss.params"
    if mode in LOSSES:
        known = LOSSES[mode]
        return _with_params(known, (*known.needs, *known.parameters), params, where)
    name, function = _named(_LOSS, mode, LOSSES)
    asked = _check(name, function, LOSS_ARRAYS, LOSS_NUMBERS, params, where)
    return Loss(
        name=name,
        function=function,
        needs=tuple(k for k in LOSS_ARRAYS if k in asked),
        parameters={k: k for k in LOSS_NUMBERS if k in asked},
        params=params,
    )


def estimator(mode: str | Function, params: Mapping[str, Any] = _NOTHING) -> Estimator:
    """The record of an estimator of advantages; arguments and errors as of `loss`."""
    where = _ESTIMATOR, "algorithm.adv_params"
    if mode in ESTIMATORS:
        known = ESTIMATORS[mode]
        return _with_params(known, (*known.needs, *known.parameters), params, where)
    name, function = _named(_ESTIMATOR, mode, ESTIMATORS)
    asked = _check(name, function, ESTIMATOR_ARRAYS, ESTIMATOR_NUMBERS, params, where)
    return Estimator(
        name=name,
        function=function,
        needs=tuple(k for k in ESTIMATOR_ARRAYS if k in asked),
        parameters=tuple(k for k in ESTIMATOR_NUMBERS if k in asked),
        params=params,
    )


def estimator_of(algorithm: Any) -> Estimator:
    """The record of the estimator that a configuration's section `algorithm` names."""
    return estimator(algorithm.adv_estimator, algorithm.adv_params)


def preference_loss(name: str | Function) -> tuple[str, Function]:
    """Name and function of a loss of DPO.

    Args:
      name: one of `PREFERENCE_LOSSES`, module:function, or a function.

    Raises:
      ConfigError: there is no such loss, or it asks for what it cannot get.
    """
    key = "loss_type"
    if name in PREFERENCE_LOSSES:
        return name, find(key, PREFERENCE_LOSSES[name])
    name, function = _named(key, name, PREFERENCE_LOSSES)
    where = key, "params"
    _check(name, function, PREFERENCE_ARRAYS, PREFERENCE_NUMBERS, {}, where)
    return name, function


def optimizer(
    key: str, name: str | Function, params: Mapping[str, Any] = _NOTHING
) -> Function:
    """The function that makes an optimizer, such as optax.adamw.

    Args:
      key: of the section, such as actor.optim.
      name: one of `OPTIMIZERS`, module:function, or a function.

    Raises:
      ConfigError: there is no such function, or it asks for what it cannot get.
    """
    where = f"{key}.name", f"{key}.params"
    if name in OPTIMIZERS:
        function = find(where[0], OPTIMIZERS[name])
    else:
        name, function = _named(where[0], name, OPTIMIZERS)
    _check(name, function, (), OPTIMIZER_NUMBERS, params, where)
    return function


def fingerprint(function: Function) -> str:
    """The first 16 digits of a sha256 of a function's source (its code, if there is no
    source), and of numbers and text that it closes over or is bound to.

    Functions that it calls do not count.
    """
    return hashlib.sha256("\n".join(_texts(function)).encode()).hexdigest()[:16]


def _texts(function: Any) -> Iterator[str]:
    if isinstance(function, functools.partial):
        yield repr((function.args, sorted(function.keywords.items())))
        function = function.func
    function = inspect.unwrap(function)
    if not (inspect.isroutine(function) or inspect.isclass(function)):
        function = type(function)
    try:
        yield inspect.getsource(function)
    except (OSError, TypeError):
        yield from _code(getattr(function, "__code__", None))
    for cell in getattr(function, "__closure__", None) or ():
        if isinstance(cell.cell_contents, int | float | str | tuple | None):
            yield repr(cell.cell_contents)


def _code(code: types.CodeType | None) -> Iterator[str]:
    if code is None:
        return
    yield code.co_code.hex() + repr(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _code(constant)
        else:
            yield repr(constant)


def _named(
    key: str, mode: str | Function, table: Mapping[str, Any]
) -> tuple[str, Function]:
    if not isinstance(mode, str):
        return offer(mode), mode
    choice(key.rpartition(".")[2], mode, table)
    return mode, find(key, mode)


def _with_params(record: Any, offered, params, where) -> Any:
    if not params:
        return record
    _check(record.name, find(where[0], record.function), offered, (), params, where)
    return replace(record, params=params)


def named_parameters(function: Function) -> dict[str, inspect.Parameter]:
    """What a function can be given by name; what a partial has bound, it has."""
    named = (
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    )
    bound = function.keywords if isinstance(function, functools.partial) else ()
    return {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind in named and name not in bound
    }


def _check(
    name: str,
    function: Function,
    arrays: Collection[str],
    numbers: Collection[str],
    params: Mapping[str, Any],
    where: tuple[str, str],
) -> list[str]:
    """Which of `arrays` and `numbers` a function asks for.

    Args:
      where: the keys of its name and of its params.

    Raises:
      ConfigError: it asks for something else, or does not take one of `params`.
    """
    key, params_key = where
    try:
        all_parameters = inspect.signature(function).parameters.values()
    except ValueError as error:
        raise ConfigError(f"{key}: {name} has no signature to read: {error}") from None
    parameters = named_parameters(function)
    if not any(p.kind is p.VAR_KEYWORD for p in all_parameters):
        for param in params:
            if param not in parameters:
                raise ConfigError(
                    f"{params_key}: {name} has no parameter {param!r}"
                    f"{near(param, parameters)}; it has {', '.join(parameters)}"
                )
    for param in params:
        if param in arrays:
            raise ConfigError(f"{params_key}: {param} is an array that the run gives")
    offered = ", ".join(arrays)
    if numbers:
        offered += f"{'; ' if arrays else ''}the numbers {', '.join(numbers)}"
    for parameter in all_parameters:
        kinds = parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD
        if parameter.default is not parameter.empty or parameter.kind in kinds:
            continue
        asked = parameter.name
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise ConfigError(f"{key}: {name} takes {asked} by position, not by name")
        if asked not in (*arrays, *numbers, *params):
            raise ConfigError(
                f"{key}: {name} asks for {asked!r}{near(asked, [*arrays, *numbers])}; "
                f"it may ask for {offered}; for anything else give a default or "
                f"{params_key}.{asked}"
            )
    return [k for k in parameters if k in (*arrays, *numbers) and k not in params]
