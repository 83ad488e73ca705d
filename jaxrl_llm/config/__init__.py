"""Typed, frozen configuration: `load` a file, or `parse` values, to a `Config`.

Nothing in here imports JAX, and names are imported when they are first used: a table of
names does not need the library that checks sections.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxrl_llm.config.names import ConfigError
    from jaxrl_llm.config.parsing import load, parse
    from jaxrl_llm.config.schema import Config

__all__ = ["Config", "ConfigError", "load", "parse"]

_HOMES = {
    "Config": "schema",
    "ConfigError": "names",
    "load": "parsing",
    "parse": "parsing",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    globals()[name] = found = getattr(home, name)
    return found


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted({*globals(), *__all__})
