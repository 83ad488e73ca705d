"""Another trainer's settings as dotted keys and values, read and never executed.

A YAML file may refer to its own keys as OmegaConf lets it: ${a.b}, ${.b} beside the
key, and ${oc.select:a.b,DEFAULT}. A shell script is read for its words KEY=VALUE, in
which variables stand for what the script assigns to them as text.
"""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxrl_llm.config import reader
from jaxrl_llm.config.names import ConfigError

_REFERENCE = re.compile(r"\$\{(?:oc\.select:)?\s*(\.*)([\w.]+)\s*(?:,\s*([^${}]*))?\}")
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?::?-([^${}]*))?\})")
_ASSIGNMENT = re.compile(r"(?:export\s+|local\s+)?([A-Za-z_]\w*)=(.*)", re.DOTALL)
_OVERRIDE = re.compile(r"\+{0,2}([A-Za-z_][\w]*(?:\.[\w@]+)+)=(.*)", re.DOTALL)
_DEEPEST = 20
"""References to references; more are a circle."""


def read(path: Path) -> dict[str, Any]:
    """The settings in a YAML file or a shell script, by dotted key.

    What cannot be resolved stays as the text that it is, with its `$`.

    Raises:
      ConfigError: no such file, or there are no settings in it.
    """
    if path.suffix in (".sh", ".bash"):
        if not path.is_file():
            raise ConfigError(f"{path}: no such file")
        found = _of_script(path.read_text(encoding="utf-8"), str(path))
    else:
        found = flat(reader.read(path).values)
    return {key: _resolved(key, value, found, _DEEPEST) for key, value in found.items()}


def flat(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys; an empty one is a value."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        here = f"{path}.{key}" if path else str(key)
        inside = isinstance(value, Mapping) and value
        found |= flat(value, here) if inside else {here: value}
    return found


def _of_script(text: str, source: str) -> dict[str, Any]:
    """The words KEY=VALUE of a shell script that have a dot in the key.

    Raises:
      ConfigError: quotes that do not close, or no such word.
    """
    variables: dict[str, str] = {}
    found: dict[str, Any] = {}
    lexer = shlex.shlex(text.replace("\\\n", " "), posix=True, punctuation_chars=";&|")
    lexer.whitespace_split = True
    try:
        words = list(lexer)
    except ValueError as error:
        raise ConfigError(f"{source}: not a script that can be read: {error}") from None
    for word in words:
        if override := _OVERRIDE.fullmatch(word):
            value = _substituted(override[2], variables)
            found[override[1]] = _value(value)
        elif assignment := _ASSIGNMENT.fullmatch(word):
            variables[assignment[1]] = _substituted(assignment[2], variables)
    if not found:
        raise ConfigError(f"{source}: no words such as algorithm.adv_estimator=grpo")
    return found


def _substituted(text: str, variables: Mapping[str, str]) -> str:
    def value(match: re.Match) -> str:
        known = variables.get(match[1] or match[2], match[3])
        return match[0] if known is None else known

    return _VARIABLE.sub(value, text)


def _value(text: str) -> Any:
    """What a word's text stands for, as Hydra reads it."""
    try:
        return reader.load(text, text, is_file=False).values
    except ConfigError:
        return text


def _resolved(key: str, value: Any, all_: Mapping[str, Any], depth: int) -> Any:
    """A value with what it refers to put in."""
    if isinstance(value, list):
        return [_resolved(key, one, all_, depth) for one in value]
    if not isinstance(value, str) or "${" not in value or not depth:
        return value

    def target(match: re.Match) -> Any:
        dots, name, default = match[1], match[2], match[3]
        if dots:
            parts = key.split(".")[: -len(dots)]
            name = ".".join([*parts, name])
        if name in all_:
            return _resolved(name, all_[name], all_, depth - 1)
        return match[0] if default is None else _value(default)

    if whole := _REFERENCE.fullmatch(value):
        return target(whole)
    return _REFERENCE.sub(lambda match: str(target(match)), value)
