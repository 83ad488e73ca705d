"""Checks of every annotation in a part of the time that jaxtyping's import hook takes.

The hook decorates each function, also one that is defined anew at each call, as the
body of a loop is: it writes and compiles two checkers for each, and checks arguments
before and after the call. Here a function without annotations stays as it is, one
without shapes is checked by beartype alone, and one with shapes once a call.
"""

import dataclasses
import functools
import inspect
from typing import get_args

import jaxtyping


def lighten() -> None:
    """From here on the hook decorates as above; to be called before its imports."""
    jaxtyping.jaxtyped = functools.partial(_jaxtyped, jaxtyping.jaxtyped)


def _jaxtyped(original, *, typechecker):
    return functools.partial(_checked, original, typechecker)


def _checked(original, typechecker, made):
    if inspect.isclass(made):
        # A dataclass that defines or inherits no __init__ of its own is checked once.
        if dataclasses.is_dataclass(made) and "__init__" in vars(made):
            made.__init__ = _checked(original, typechecker, made.__init__)
        return made
    hints = inspect.get_annotations(made)
    if not hints:
        return made
    checked = typechecker(made)
    # Within one call a dimension has one size: jaxtyping holds what was seen.
    return original(checked, typechecker=None) if _shapes(*hints.values()) else checked


def _shapes(*hints) -> bool:
    """Whether dimensions may be named within: so may they in what is quoted."""
    return any(
        isinstance(hint, (str, list))
        or (inspect.isclass(hint) and hint.__module__.startswith("jaxtyping"))
        or _shapes(*get_args(hint))
        for hint in hints
    )
