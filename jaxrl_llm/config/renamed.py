"""Keys that configurations of earlier versions have: what became of them.

A key of this table in a configuration file is an error that names the new one. In the
settings a run wrote down when it began, it is read as what it stands for now, so that
runs go on across versions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxrl_llm.config.names import ConfigError


@dataclass(frozen=True)
class Removed:
    """A key that no other key replaces."""

    instead: str
    """What to do now, as in "use actor.optim.lr" or "leave it out"."""
    idle: Any
    """The value at which it changed nothing: with this one, and with no other, a run
    goes on without it."""


FORMER: dict[str, str | Removed] = {}
"""By dotted key: the dotted key that its value (a section, too) stands under now."""


def advice(key: str) -> str | None:
    """What to write instead of a former key; None for any other."""
    match FORMER.get(key):
        case None:
            return None
        case Removed(instead=instead):
            return f"this key is gone; {instead}"
        case new:
            return f"this key is now {new}"


def translated(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Stored settings under the keys of this version.

    Args:
      values: nested, as in a file; not changed.
      source: names them in errors.

    Raises:
      ConfigError: a key that is gone had a value that changed something.
    """
    result = _copy(values)
    for key, now in FORMER.items():
        section, name = _section(result, key.split("."))
        if section is None or name not in section:
            continue
        value = section.pop(name)
        if isinstance(now, str):
            *path, last = now.split(".")
            target = result
            for part in path:
                target = target.setdefault(part, {})
            target[last] = value
        elif value != now.idle:
            raise ConfigError(
                f"{source}: {key} is {value!r}, but this key is gone; {now.instead}"
            )
    return result


def _section(
    tree: Mapping[str, Any], keys: list[str]
) -> tuple[dict[str, Any] | None, str]:
    """The mapping that the last of `keys` stands in, if there is one."""
    section: Any = tree
    for key in keys[:-1]:
        section = section.get(key) if isinstance(section, dict) else None
    return (section if isinstance(section, dict) else None), keys[-1]


def _copy(tree: Any) -> Any:
    """Nested mappings, copied so that changing one leaves the other as it is."""
    if not isinstance(tree, Mapping):
        return tree
    return {key: _copy(value) for key, value in tree.items()}
