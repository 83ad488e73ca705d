"""YAML text to values, and the line that each of them stands in."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from jaxrl_llm.config.names import ConfigError

Keys = tuple[str, ...]
"""The way to a value: keys of mappings, and numbers of entries of lists."""


@dataclass(frozen=True)
class Document:
    """What a text says, and where."""

    values: Any
    lines: Mapping[Keys, int]
    """By the way to each value, the line of its key, or of the entry of a list; the
    first line is 1."""


def read(path: str | Path) -> Document:
    """The YAML mapping in a file, not yet checked.

    Raises:
      ConfigError: no such file, or not a YAML mapping.
    """
    path = Path(path)
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("*.yaml"))
        raise ConfigError(f"{path}: no such file; {path.parent} has {near}")
    found = load(path.read_bytes(), str(path))
    if not isinstance(found.values, Mapping):
        raise ConfigError(
            f"{path}: expected a mapping of sections, got {found.values!r}"
        )
    return found


def load(text: str | bytes, source: str, *, is_file: bool = True) -> Document:
    """What a YAML text says; numbers are read as YAML 1.2 has them.

    Args:
      source: names the text in errors.
      is_file: errors go on with the line, as in run.yaml:12.

    Raises:
      ConfigError: not YAML, a key given twice, or a value that holds itself.
    """

    def at(line: int) -> str:
        return f"{source}:{line}" if is_file else source

    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return Document(None, {})
            for line, problem in _twice(node, (), ()):
                raise ConfigError(f"{at(line)}: {problem}")
            values = loader.construct_document(node)
            return Document(values, dict(_lines(node, ())))
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = ", ".join(filter(None, (error.context, error.problem)))
        where = at(mark.line + 1) if mark else source
        raise ConfigError(f"{where}: not YAML: {said}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{source}: not YAML: {error}") from None


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers. Unlike in YAML 1.1, 1e-6 is one and 0.5_2 is text."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """PyYAML's constructor, but what is no value, such as month 13, has a line."""
        try:
            return super().construct_object(node, deep)
        except ValueError as error:
            problem = str(error)
            raise yaml.MarkedYAMLError(
                problem=problem, problem_mark=node.start_mark
            ) from None


_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"


_Loader.yaml_implicit_resolvers = {
    first: [found for found in resolvers if found[0] not in (_INT, _FLOAT)]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


_Loader.add_implicit_resolver(_INT, re.compile(r"[-+]?[0-9]+$"), list("-+0123456789"))


_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$"
        r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)


def _decimal(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))  # 010 is ten, and no octal number


_Loader.add_constructor(_INT, _decimal)


def _twice(
    node: yaml.Node, path: Keys, above: tuple[int, ...]
) -> Iterator[tuple[int, str]]:
    """Line and name of what has no one meaning: keys given twice, and what holds
    itself."""
    line = node.start_mark.line + 1
    if id(node) in above:
        yield line, f"{'.'.join(path)} holds itself"
        return
    above = (*above, id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, entry in enumerate(node.value):
            yield from _twice(entry, (*path, str(index)), above)
    if not isinstance(node, yaml.MappingNode):
        return
    first: dict[tuple[str, str], int] = {}
    for key, value in node.value:
        here = (*path, str(key.value))
        line = key.start_mark.line + 1
        same = key.tag, str(key.value)
        if same in first:
            yield (
                line,
                f"{'.'.join(here)} is given twice, first in line {first[same]}; join "
                "the two",
            )
        first[same] = line
        yield from _twice(value, here, above)


def _lines(node: yaml.Node, path: Keys) -> Iterator[tuple[Keys, int]]:
    """Where each value stands, once merged mappings (`<<`) are put in."""
    entries = []
    if isinstance(node, yaml.SequenceNode):
        entries = [(str(i), entry, entry) for i, entry in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        entries = [(str(key.value), key, value) for key, value in node.value]
    for name, key, value in entries:
        yield (*path, name), key.start_mark.line + 1
        yield from _lines(value, (*path, name))
