"""YAML files and command lines to a `Config`, and what is wrong with them."""

import builtins
import copy
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pydantic
import yaml
from pydantic import BaseModel

from jaxrl_llm.config import bundled, renamed
from jaxrl_llm.config.names import ConfigError
from jaxrl_llm.config.schema import Config


def parse(values: Mapping[str, Any], source: str) -> Config:
    """The config that `values` describe; `source` names them in errors.

    Raises:
      ConfigError: one line per problem: the path of the key, what is wrong, what fits.
    """
    try:
        return Config.model_validate(values)
    except pydantic.ValidationError as error:
        raise ConfigError(explain(error, source)) from None


def load(
    path: str | Path, overrides: Sequence[str] = (), *, trains: bool = True
) -> Config:
    """Reads a YAML file and applies command-line overrides.

    Args:
      path: of the file, or a bundled name such as "quickstart"; see `bundled`.
      overrides: `--section.key value` pairs; see `override`.
      trains: False if `data.val` is only answered: the training data and the number of
        steps need not be given.

    Raises:
      ConfigError: no such file, not YAML, or not a valid config.
    """
    path = bundled.find(path)
    values = override(read(path), overrides)
    return parse(values if trains else _answering(values, path), str(path))


def _answering(values: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """`values` with something in the place of what only training needs."""
    data = values.get("data")
    if not isinstance(data, dict) or not data.get("val"):
        raise ConfigError(f"{path}: data.val is needed: which questions to answer")
    return {
        **values,
        "data": {"train": data["val"], **data},
        "trainer": {"total_training_steps": 1, **(values.get("trainer") or {})},
    }


def override(values: Mapping[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
    """`values` with `--section.key value` or `--section.key=value` put in.

    Where a field is text, the value is that text, or null where it need not be given;
    other values are YAML. Hyphens in keys stand for underscores; a number selects an
    entry of a list; of a key given twice the last counts. Whether a key exists is left
    to `parse`, so that a typing error on the command line and one in the file read the
    same.

    Raises:
      ConfigError: not of this form.
    """
    result = copy.deepcopy(dict(values))
    rest = list(arguments)
    while rest:
        flag, equals, text = rest.pop(0).partition("=")
        missing = not equals and (not rest or rest[0].startswith("--"))
        if missing or not flag.startswith("--"):
            raise ConfigError(f"{flag}: expected --section.key VALUE")
        keys, kinds = _field(flag.removeprefix("--").split("."))
        put(result, keys, _value(text if equals else rest.pop(0), kinds, flag))
    return result


def _field(keys: Sequence[str]) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    """The keys as the schema spells them, and the types their field may have."""
    found, kinds = [], (Config,)
    for key in keys:
        section = next((kind for kind in kinds if _is_section(kind)), None)
        found.append(key if section is None and kinds else key.replace("-", "_"))
        field = section and section.model_fields.get(found[-1])
        kinds = _members(field.annotation) if field else _entries(kinds, key)
    return tuple(found), kinds


def _members(annotation: Any) -> tuple[Any, ...]:
    """The types of a union, each without what is written beside it."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(kind for a in get_args(annotation) for kind in _members(a))
    return (annotation,)


def _entries(kinds: Sequence[Any], key: str) -> tuple[Any, ...]:
    """The types of what stands under `key` in a dictionary, or at it in a list."""
    for kind in kinds:
        inside = get_args(kind)
        match get_origin(kind):
            case builtins.dict:
                return _members(inside[1])
            case builtins.tuple if key.isdecimal():
                same = inside[-1] is Ellipsis
                return _members(inside[0 if same else min(int(key), len(inside) - 1)])
    return ()


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _value(text: str, kinds: Sequence[Any], flag: str) -> Any:
    """What the text of a flag stands for in a field of these types."""
    may_be_none = type(None) in kinds
    kinds = [kind for kind in kinds if kind is not type(None)]
    if kinds and all(
        kind is str
        or get_origin(kind) is Literal
        and all(isinstance(choice, str) for choice in get_args(kind))
        for kind in kinds
    ):
        return None if may_be_none and text == "null" else text
    value = _load_yaml(text, flag)
    # YAML leaves out what it takes for a comment.
    cut = "#" in text and (value is None or isinstance(value, int | float))
    return text if cut else value


def put(tree: Any, keys: Sequence[str], value: Any) -> None:
    """Sets tree[keys[0]][keys[1]]... in place, making sections that are not there.

    Raises:
      ConfigError: the path leads through something that has no keys.
    """
    path = ".".join(keys)
    for key in keys[:-1]:
        if isinstance(tree, list):
            tree = tree[_index(tree, key, path)]
        elif isinstance(tree, dict):
            tree = tree.setdefault(key, {})
    last = keys[-1]
    if isinstance(tree, list):
        tree[_index(tree, last, path)] = value
    elif isinstance(tree, dict):
        tree[last] = value
    else:
        raise ConfigError(f"{path}: {tree!r} is no section that could have {last!r}")


def _index(entries: list, key: str, path: str) -> int:
    if not key.isdecimal() or int(key) >= len(entries):
        raise ConfigError(f"{path}: {key} is not an entry of a list of {len(entries)}")
    return int(key)


def read(path: str | Path) -> Mapping[str, Any]:
    """The YAML mapping in a file, not yet checked.

    Raises:
      ConfigError: no such file, or not a YAML mapping.
    """
    path = Path(path)
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("*.yaml"))
        raise ConfigError(f"{path}: no such file; {path.parent} has {near}")
    values = _load_yaml(path.read_bytes(), str(path))
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path}: expected a mapping of sections, got {values!r}")
    return values


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers. Unlike in YAML 1.1, 1e-6 is one and 0.5_2 is text."""


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


def _load_yaml(text: str | bytes, source: str) -> Any:
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            for problem in _twice(node, (), ()):
                raise ConfigError(f"{source}: {problem}")
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: not YAML: {error}") from None


def _twice(
    node: yaml.Node, path: tuple[str, ...], above: tuple[int, ...]
) -> Iterator[str]:
    """What has no one meaning: keys given twice, and what holds itself."""
    line = node.start_mark.line + 1
    if id(node) in above:
        yield f"line {line}: {'.'.join(path)} holds itself"
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
                f"line {line}: {'.'.join(here)} is given twice, first in line "
                f"{first[same]}; join the two"
            )
        first[same] = line
        yield from _twice(value, here, above)


def explain(error: pydantic.ValidationError, source: str) -> str:
    """One line per problem, each with the path of the key and what would fit."""
    return "\n".join(
        f"{source}: {line}" for item in error.errors() for line in _lines(item)
    )


def _lines(item: Mapping[str, Any]) -> Iterator[str]:
    path = ".".join(map(str, item["loc"]))
    match item["type"]:
        case "extra_forbidden" if advice := renamed.advice(path):
            yield f"{path}: {advice}"
        case "extra_forbidden":
            yield from _unknown(path, item)
        case "missing":
            yield f"{path}: needed but not given"
        case "value_error":
            text = str(item["ctx"]["error"])
            yield f"{path}: {text}" if path else text
        case _:
            yield f"{path}: {item['msg']}, got {item['input']!r}"


def _unknown(path: str, item: Mapping[str, Any]) -> Iterator[str]:
    """What to write instead of a key that no section has."""
    from jaxrl_llm.config.peers import lookup

    known = _keys(item["loc"][:-1])
    near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
    foreign = lookup.advice(path, item["input"])
    for key, text in foreign.items():
        hint = f"; or did you mean {near[0]!r}?" if near and key == path else ""
        yield f"{key}: {text}{hint}"
    if len(foreign) > 1:
        yield f"{path}: `jaxrl convert-config` translates a whole file"
    if foreign:
        return
    if near:
        hint = f"did you mean {near[0]!r}?"
    elif elsewhere := [key for key in keys() if key.endswith(f".{item['loc'][-1]}")]:
        hint = f"there is {' and '.join(elsewhere)}"
    else:
        hint = f"known: {sorted(known)}"
    yield f"{path}: unknown key; {hint}"


def keys() -> list[str]:
    """The dotted path of every key, sections too; without those of one entry of many,
    such as `data.more_train.NAME.path`."""
    return list(_below(Config, ""))


def _below(section: type[BaseModel], path: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield path + name
        for kind in filter(_is_section, _members(field.annotation)):
            yield from _below(kind, f"{path}{name}.")


def _keys(loc: Sequence[str | int]) -> list[str]:
    """The keys of the section at `loc`."""
    _, kinds = _field([str(part) for part in loc])
    return [key for kind in kinds if _is_section(kind) for key in kind.model_fields]
