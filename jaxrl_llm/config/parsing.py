"""YAML files and command lines to a `Config`, and what is wrong with them."""

import builtins
import copy
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import pydantic
from pydantic import BaseModel

from jaxrl_llm.config import bundled, reader, renamed, schemas
from jaxrl_llm.config.names import ConfigError
from jaxrl_llm.config.schema import Config
from jaxrl_llm.config.section import Section

Places = Mapping[reader.Keys, str]
"""Where values come from, such as "run.yaml:12", by the way to them."""

COMMAND_LINE = "command line"

Run = TypeVar("Run", bound=Section)
"""What a run is: a `Config`, or the one of another verb."""


def parse(
    values: Mapping[str, Any],
    source: str,
    places: Places | None = None,
    schema: type[Run] = Config,
) -> Run:
    """The config that `values` describe.

    Args:
      values: nested, as in a file.
      source: names them in errors.
      places: of single values, which errors name instead.
      schema: what they are to be.

    Raises:
      ConfigError: one line per problem: where it is, the path of the key, what is
        wrong, what fits.
    """
    schemas.check_task(values, schema, source)
    try:
        return schema.model_validate(values)
    except pydantic.ValidationError as error:
        raise ConfigError(explain(error, source, places or {}, schema)) from None


def load(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    trains: bool = True,
    schema: type[Run] = Config,
) -> Run:
    """Reads a YAML file and applies command-line overrides.

    Args:
      path: of the file, or a bundled name such as "quickstart"; see `bundled`.
      overrides: `--section.key value` pairs; see `assignments`.
      trains: False if `data.val` is only answered: the training data and the number of
        steps need not be given.
      schema: what the file is to describe.

    Raises:
      ConfigError: no such file, not YAML, or not a valid config; each problem begins
        with file:line, or says that it is on the command line.
    """
    return located(path, overrides, trains=trains, schema=schema)[0]


def located(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    trains: bool = True,
    schema: type[Run] = Config,
) -> tuple[Run, Places]:
    """What `load` gives, and where each value comes from."""
    path = bundled.find(path)
    found = reader.read(path)
    places = {keys: f"{path}:{line}" for keys, line in found.lines.items()}
    values = copy.deepcopy(dict(found.values))
    for keys, value in assignments(overrides, schema):
        put(values, keys, value)
        inside = [other for other in places if other[: len(keys)] == keys]
        for other in inside:
            del places[other]
        places[keys] = COMMAND_LINE
    values = values if trains else _answering(values, path)
    return parse(values, str(path), places, schema), places


@contextmanager
def placed(places: Places) -> Iterator[None]:
    """Adds where a value comes from to errors that begin with its key, which are found
    when data, models and devices are looked at."""
    try:
        yield
    except ValueError as error:
        key = re.match(r"[a-z_]\w*(?:\.\w+)+", str(error))
        place = key and places.get(tuple(key[0].split(".")))
        if not place:
            raise
        raise ConfigError(f"{place}: {error}") from error


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
    """`values` with what a command line says put in; see `assignments`. Of a key given
    twice the last counts. Whether a key exists is left to `parse`, so that a typing
    error on the command line and one in the file read the same.

    Raises:
      ConfigError: not of this form.
    """
    result = copy.deepcopy(dict(values))
    for keys, value in assignments(arguments):
        put(result, keys, value)
    return result


def assignments(
    arguments: Sequence[str], schema: type[Section] = Config
) -> Iterator[tuple[reader.Keys, Any]]:
    """The way to each key that a command line names, and the value it gives.

    `--section.key value` or `--section.key=value`; `--section.key` and
    `--section.no-key` for true and false; a list also as its entries, with spaces
    between them. Where a field is text, the value is that text, or null where it need
    not be given; other values are YAML. Hyphens in keys stand for underscores; a number
    selects an entry of a list.

    Raises:
      ConfigError: not of this form.
    """
    rest = list(arguments)
    while rest:
        flag, equals, text = rest.pop(0).partition("=")
        if not flag.startswith("--"):
            raise ConfigError(f"{flag}: expected --section.key VALUE")
        *path, name = flag.removeprefix("--").split(".")
        keys, kinds = _field([*path, name], schema)
        if not equals and not kinds and re.match("no[-_]", name):
            positive, switched = _field([*path, name[3:]], schema)
            if bool in switched:
                yield positive, False
                continue
        words = [text] if equals else []
        most = len(rest) if tuple in map(get_origin, kinds) else 1
        while not equals and len(words) < most and rest and rest[0][:2] != "--":
            words.append(rest.pop(0))
        if words:
            yield keys, _values(words, kinds, flag)
        elif bool in kinds:
            yield keys, True
        else:
            raise ConfigError(f"{flag}: expected --section.key VALUE")


def _field(
    keys: Sequence[str], schema: type[Section]
) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    """The keys as the schema spells them, and the types their field may have."""
    found, kinds = [], (schema,)
    for key in keys:
        section = next((kind for kind in kinds if is_section(kind)), None)
        found.append(key if section is None and kinds else key.replace("-", "_"))
        field = section and section.model_fields.get(found[-1])
        kinds = members(field.annotation) if field else _entries(kinds, key)
    return tuple(found), kinds


def members(annotation: Any) -> tuple[Any, ...]:
    """The types of a union, each without what is written beside it."""
    if get_origin(annotation) is Annotated:
        return members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(kind for a in get_args(annotation) for kind in members(a))
    return (annotation,)


def _entries(kinds: Sequence[Any], key: str) -> tuple[Any, ...]:
    """The types of what stands under `key` in a dictionary, or at it in a list."""
    for kind in kinds:
        inside = get_args(kind)
        match get_origin(kind):
            case builtins.dict:
                return members(inside[1])
            case builtins.tuple if key.isdecimal():
                same = inside[-1] is Ellipsis
                return members(inside[0 if same else min(int(key), len(inside) - 1)])
    return ()


def is_section(kind: Any) -> bool:
    """Whether it is a type of sections."""
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _values(words: Sequence[str], kinds: Sequence[Any], flag: str) -> Any:
    """What the words after a flag stand for: a value, or the entries of a list."""
    lists = {get_origin(kind) for kind in kinds if kind is not type(None)} == {tuple}
    if len(words) == 1 and not (lists and not words[0].startswith("[")):
        return _value(words[0], kinds, flag)
    return [
        _value(word, _entries(kinds, str(index)), flag)
        for index, word in enumerate(words)
    ]


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
    value = reader.load(text, flag, is_file=False).values
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


def find(tree: Any, keys: Sequence[str], default: Any) -> Any:
    """tree[keys[0]][keys[1]]..., or `default` if that is not there."""
    for key in keys:
        if isinstance(tree, Mapping) and key in tree:
            tree = tree[key]
        elif isinstance(tree, list) and key.isdecimal() and int(key) < len(tree):
            tree = tree[int(key)]
        else:
            return default
    return tree


_NOTHING = object()


def merge(tree: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    """Sets what `put` does, but what is there stays, and sections go in key by key.

    Raises:
      ConfigError: the key is there, with another value; or as for `put`.
    """
    there = find(tree, keys, _NOTHING)
    nested = isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    if there is _NOTHING:
        put(tree, keys, {} if nested else copy.deepcopy(value))
    elif not (nested and isinstance(there, dict | list)) and there != value:
        path = ".".join(keys)
        raise ConfigError(f"{path} is given twice, as {there!r} and as {value!r}")
    if nested:
        for key, inside in value.items():
            merge(tree, (*keys, key), inside)


def _index(entries: list, key: str, path: str) -> int:
    if not key.isdecimal() or int(key) >= len(entries):
        raise ConfigError(f"{path}: {key} is not an entry of a list of {len(entries)}")
    return int(key)


def explain(
    error: pydantic.ValidationError,
    source: str,
    places: Places | None = None,
    schema: type[Section] = Config,
) -> str:
    """One line per problem, each with its place, the path of the key and what would
    fit."""
    return "\n".join(
        f"{_place(item, line, places or {}) or source}: {line}"
        for item in error.errors()
        for text in _lines(item, schema)
        for line in text.splitlines()
    )


def _place(item: Mapping[str, Any], said: str, places: Places) -> str | None:
    """Where the value stands that a problem is of, or what it should stand in."""
    loc = tuple(map(str, item["loc"]))
    if item["type"] in ("value_error", "extra_forbidden"):  # tell of keys inside
        words = re.findall(r"[a-z_]\w*(?:\.\w+)*", said)
        named = [tuple(word.split(".")) for word in words]
        for keys in (keys for inside in named for keys in (inside, (*loc, *inside))):
            within = keys[: len(loc)] == loc and len(keys) > max(1, len(loc))
            if within and keys in places:
                return places[keys]
    while loc and loc not in places:
        loc = loc[:-1]
    return places.get(loc)


def _lines(item: Mapping[str, Any], schema: type[Section]) -> Iterator[str]:
    path = ".".join(map(str, item["loc"]))
    match item["type"]:
        case "extra_forbidden" if advice := renamed.advice(path):
            yield f"{path}: {advice}"
        case "extra_forbidden":
            yield from _unknown(path, item, schema)
        case "missing":
            yield f"{path}: needed but not given"
        case "value_error":
            text = str(item["ctx"]["error"])
            yield f"{path}: {text}" if path else text
        case _:
            yield f"{path}: {item['msg']}, got {item['input']!r}"


def _unknown(
    path: str, item: Mapping[str, Any], schema: type[Section]
) -> Iterator[str]:
    """What to write instead of a key that no section has."""
    from jaxrl_llm.config.peers import lookup

    known = _keys(item["loc"][:-1], schema)
    near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
    peers = lookup.PEERS
    if schema is not Config:
        peers = lookup.of_offline(keys(schema))
    foreign = lookup.advice(path, item["input"], peers)
    for key, text in foreign.items():
        hint = f"; or did you mean {near[0]!r}?" if near and key == path else ""
        yield f"{key}: {text}{hint}"
    if len(foreign) > 1:
        yield f"{path}: `jaxrl convert-config` translates a whole file"
    if foreign:
        return
    if near:
        hint = f"did you mean {near[0]!r}?"
    elif elsewhere := [
        key for key in keys(schema) if key.endswith(f".{item['loc'][-1]}")
    ]:
        hint = f"there is {' and '.join(elsewhere)}"
    else:
        hint = f"known: {sorted(known)}"
    yield f"{path}: unknown key; {hint}"


def keys(schema: type[Section] = Config) -> list[str]:
    """The dotted path of every key, sections too; without those of one entry of many,
    such as `data.more_train.NAME.path`."""
    return list(_below(schema, ""))


def _below(section: type[BaseModel], path: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield path + name
        for kind in filter(is_section, members(field.annotation)):
            yield from _below(kind, f"{path}{name}.")


def _keys(loc: Sequence[str | int], schema: type[Section]) -> list[str]:
    """The keys of the section at `loc`."""
    _, kinds = _field([str(part) for part in loc], schema)
    return [key for kind in kinds if is_section(kind) for key in kind.model_fields]
