"""A configuration in the making: values with where they come from, and what is left."""

import json
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxrl_llm.config import parsing
from jaxrl_llm.config.names import ConfigError
from jaxrl_llm.config.peers.key import Peer
from jaxrl_llm.config.schema import Config

_WIDTH = 88
_OFF = (None, False, "", [], {}, -1)
_SPECIAL = {"true", "false", "null", "yes", "no", "on", "off", "y", "n", "none", "~"}


@dataclass
class Draft:
    """What has become of another trainer's settings so far."""

    peer: Peer
    given: Mapping[str, Any]
    """By dotted key there."""
    values: dict[str, Any] = field(default_factory=dict)
    """By dotted key here."""
    notes: dict[str, str] = field(default_factory=dict)
    """What stands behind a value, by its key."""
    left: dict[str, str] = field(default_factory=dict)
    """Why a key there is not here."""
    todo: list[str] = field(default_factory=list)
    """What somebody has to decide."""
    seen: set[str] = field(default_factory=set)
    """Keys there that are done."""

    def get(self, name: str, default: Any = None) -> Any:
        """A value there, `default` if it is null or not given; the key is done."""
        self.seen.add(name)
        value = self.given.get(name)
        if isinstance(value, str) and "$" in value:
            self.leave(name, "it cannot be resolved without being executed")
            self.todo.append(f"{name} is {value}: say what it stands for")
            return default
        return default if value is None else value

    def number(self, name: str, default: int | float) -> int | float:
        """A number there, `default` if it is null, not given or no number."""
        value = self.get(name, default)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return value
        self.leave(name, "it is no number")
        self.todo.append(f"{name} is {value!r}, which is no number")
        return default

    def count(self, name: str, default: int) -> int:
        """A number over 0 there; `default` as for `number`."""
        value = self.number(name, default)
        if value >= 1:
            return int(value)
        self.todo.append(f"{name} is {value}, which is no number over 0")
        return default

    def word(self, name: str, default: str) -> str:
        """One word there, `default` if it is null, not given or no word."""
        value = self.get(name, default)
        if isinstance(value, str | bool):
            return str(value)
        self.leave(name, "it is no word")
        self.todo.append(f"{name} is {value!r}, which is no word")
        return default

    def words(self, name: str) -> list[str]:
        """Words there: none, one or a list of them."""
        value = self.get(name, [])
        found = value if isinstance(value, list) else [value]
        if all(isinstance(word, str) for word in found):
            return found
        self.leave(name, "it is no list of words")
        self.todo.append(f"{name} is {value!r}, which is no list of words")
        return []

    def section(self, name: str) -> dict[str, Any]:
        """The keys and values below a name there, which are done."""
        below = [key for key in self.given if key.startswith(f"{name}.")]
        self.seen |= {name, *below}
        return {key.removeprefix(f"{name}."): self.given[key] for key in below}

    def put(self, key: str, value: Any, note: str) -> None:
        """Sets a key here; `note` says what it comes from."""
        self.values[key], self.notes[key] = value, note

    def leave(self, name: str, why: str) -> None:
        """Says why a key there has become nothing."""
        self.seen.add(name)
        self.left[name] = why

    def take_over(self) -> None:
        """Sets what is not done yet: keys whose value means the same here. Of the rest
        it is kept why they are left."""
        for name in self.given:
            if name in self.seen or self._is_machinery(name):
                continue
            key = self.peer.keys.get(name)
            if key is None:
                self.leave(name, "no such key is known here")
            elif key.here is None:
                self.leave(name, key.note)
            elif key.note:
                self.leave(name, f"{key.here}: {key.note}")
            elif (found := self.get(name)) is not None:
                for target in key.targets:
                    self.put(target, found, name)

    def _is_machinery(self, name: str) -> bool:
        """Whether a key only says how the other trainer makes its own objects."""
        return name.endswith("_target_") or name.startswith(("hydra.", "defaults"))

    def problems(self) -> list[str]:
        """What is wrong with the configuration as it is."""
        try:
            parsing.parse(self.tree(), "")
        except ConfigError as error:
            lines = str(error).splitlines()
            return [line.removeprefix(": ") for line in lines]
        return []

    def open_points(self) -> list[str]:
        """What somebody has to decide, each once."""
        more = [
            problem
            for problem in self.problems()
            if not any(todo.startswith(problem.partition(":")[0]) for todo in self.todo)
        ]
        return [*self.todo, *more]

    def tree(self) -> dict[str, Any]:
        """The configuration as nested mappings."""
        result: dict[str, Any] = {}
        for key in sorted(self.values, key=_place):
            parsing.put(result, key.split("."), self.values[key])
        return result

    def text(self, source: str) -> str:
        """The configuration as YAML, each value with what it comes from, and comments
        on what has no counterpart."""
        lines = [f"# Made from {source} ({self.peer.title}) by `jaxrl convert-config`."]
        for point in self.open_points():
            lines += _comment(f"TO DO: {point}")
        lines += self._section(self.tree(), "")
        off = {
            name
            for name, why in self.left.items()
            if any(self.given.get(name) is x or self.given.get(name) == x for x in _OFF)
        }
        rest = {name: why for name, why in self.left.items() if name not in off}
        unknown = [name for name in rest if name not in self.peer.keys]
        if len(rest) > len(unknown):
            lines += ["", f"# Not in here, with what {self.peer.title} had:"]
        for name in (name for name in rest if name in self.peer.keys):
            lines += _comment(f"{name}: {self._there(name)} - {rest[name]}")
        if unknown:
            text = ", ".join(f"{name}: {self._there(name)}" for name in unknown)
            lines += ["", *_comment(f"Keys that are not known here: {text}")]
        if off:
            text = f"Not in here either, and off there: {', '.join(sorted(off))}"
            lines += ["", *_comment(text)]
        return "\n".join(lines) + "\n"

    def _there(self, name: str) -> str:
        return _inline(self.given.get(name))

    def _section(self, tree: Mapping[str, Any], path: str) -> list[str]:
        lines, indent = [], "  " * path.count(".")
        for name, value in tree.items():
            key = f"{path}{name}"
            if key in self.values:
                note = self.notes[key]
                if note in self.peer.keys and note not in self.given:
                    note += f", {self.peer.title}'s default"
                lines.append(f"{indent}{name}: {_inline(value)}  # {note}")
            else:
                lines.append(f"{indent}{name}:")
                lines += self._section(value, f"{key}.")
        return lines


def _place(key: str) -> int:
    """Sorts keys by where their sections stand in a configuration."""
    order = list(Config.model_fields)
    first = key.partition(".")[0]
    return order.index(first) if first in order else len(order)


def _comment(text: str) -> list[str]:
    return textwrap.wrap(
        " ".join(text.split()),
        _WIDTH,
        initial_indent="# ",
        subsequent_indent="#   ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _inline(value: Any) -> str:
    """A value as YAML on one line."""
    if isinstance(value, str):
        plain = re.fullmatch(r"[A-Za-z_./][\w./~-]*(?:[:+@][\w./~-]+)*", value)
        if plain and value.lower() not in _SPECIAL:
            return value
    return json.dumps(value, ensure_ascii=False, default=str)
