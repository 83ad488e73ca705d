"""What a verb takes on the command line: options of its own, and every key of a
configuration.

`given` reads the options; `command` is what --help shows and what a shell completes.
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from types import NoneType
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

import tyro
from pydantic import BaseModel
from pydantic_core import PydanticUndefined, to_jsonable_python

from jaxrl_llm.config import parsing
from jaxrl_llm.config.names import ConfigError
from jaxrl_llm.config.schema import Config, LoopConfig
from jaxrl_llm.config.section import MayChange, Section

Options = TypeVar("Options")
Field = tuple[str, Any, Any]
"""Name, type and `dataclasses.field`, as `dataclasses.make_dataclass` takes them."""


def _option(default: Any, text: str, metavar: str = "") -> Any:
    return dataclasses.field(
        default=default, metadata={"help": text, "metavar": metavar}
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """How a run of several processes finds together."""

    coordinator: str | None = _option(
        None, "Where process 0 listens, if there are several processes.", "HOST:PORT"
    )
    num_processes: int | None = _option(
        None, "How many there are; as the cluster tells if not given.", "INT"
    )
    process_id: int | None = _option(
        None, "Which of them this is, from 0; as the cluster tells if not given.", "INT"
    )
    lost_after: float = _option(
        30.0, "Without a sign of life for so long, a process counts as lost.", "SECONDS"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(Processes):
    """Trains, or goes on with a run that was stopped."""

    dry_run: bool = _option(
        False, "Check the run, show it resolved and what it needs; train nothing."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sft(Train):
    """Learns from rows of prompts and completions, conversations or text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rm(Train):
    """Trains a reward model on pairs of a chosen and a rejected answer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dpo(Train):
    """Learns from pairs of a chosen and a rejected answer, without a reward model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(Processes):
    """Answers and scores the held-out questions; trains nothing."""

    models: tuple[str, ...] = _option(
        (), "Answer with each of these in the place of model.path.", "MODEL [MODEL ...]"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Compiles a step for devices that need not be here: memory, traffic, time."""

    topology: str | None = _option(
        None, "The devices, such as v5p:4x4x4 (TPUs) or h100:2x8 (GPUs).", "KIND:SIZE"
    )
    devices: int | None = _option(None, "So many of the devices that are here.", "INT")
    memory: str | None = _option(
        None, "Of one device, such as 141GB or 80GiB; its own if not given.", "SIZE"
    )
    measure: int | None = _option(
        None, "With --devices: also run so many steps, and compare.", "STEPS"
    )


_SHORT = ("resume", "profile")
"""Keys of `trainer` that verbs that train also take without their section."""


def long(arguments: Sequence[str]) -> list[str]:
    """The arguments of `jaxrl train`, with the section where it may be left out."""
    pattern = rf"^--({'|'.join(_SHORT)})(?==|$)"
    return [re.sub(pattern, r"--trainer.\1", argument) for argument in arguments]


def given(kind: type[Options], arguments: Sequence[str]) -> tuple[Options, list[str]]:
    """The options that arguments give, and all other arguments.

    Raises:
      ConfigError: an option without a value, or with one that is no number.
    """
    kinds, found, others = get_type_hints(kind), {}, []
    rest = list(arguments)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        name = flag[2:].replace("-", "_")
        if flag[:2] != "--" or name not in kinds:
            others.append(flag + equals + value)
            continue
        if kinds[name] is bool and not equals:
            found[name] = True
            continue
        words = [value] if equals else []
        many = get_origin(kinds[name]) is tuple
        if not equals:
            words += itertools.takewhile(lambda x: x[:2] != "--", rest)
            words = words if many else words[:1]
            del rest[: len(words)]
        if not words:
            values = "one or more values" if many else "a value"
            raise ConfigError(f"{flag}: expected {values}")
        found[name] = tuple(words) if many else _value(flag, words[0], kinds[name])
    return kind(**found), others


def _value(flag: str, text: str, kind: Any) -> Any:
    for number in (int, float):
        if number in (kind, *get_args(kind)):
            try:
                return number(text)
            except ValueError:
                raise ConfigError(f"{flag} is a number, got {text!r}") from None
    if kind is bool:
        raise ConfigError(f"{flag} takes no value, got {text!r}")
    return text


def command(
    kind: type, values: Section | None = None, schema: type[Section] = Config
) -> type:
    """A dataclass whose command line in tyro is what a verb takes.

    Args:
      kind: the verb's own options.
      values: what the keys have; their defaults if not given.
      schema: of the keys.
    """
    config = Annotated[
        str,
        tyro.conf.arg(
            metavar="CONFIG.yaml", help="A file, or a bundled name such as quickstart."
        ),
        tyro.conf.Positional,
    ]
    fields: list[Field] = [("config_file", config, dataclasses.field())]
    hints = get_type_hints(kind)
    for option in dataclasses.fields(kind):
        text, metavar = option.metadata["help"], option.metadata["metavar"]
        switch = tyro.conf.FlagCreatePairsOff[bool]
        shown = switch if hints[option.name] is bool else str
        fields.append(_leaf(option.name, shown, metavar, text, option.default))
    if issubclass(kind, Train):
        for name in _SHORT:
            field = LoopConfig.model_fields[name]
            shown = _shown(parsing.members(field.annotation))
            text = f"Short for --trainer.{name}. {field.description}"
            fields.append(_leaf(name, *shown, " ".join(text.split()), field.default))
    return dataclasses.make_dataclass(
        kind.__name__,
        [*fields, *_fields(schema, values)],
        kw_only=True,
        namespace={"__doc__": kind.__doc__},
    )


_MARKS = {
    "nothing": " May change when a run goes on.",
    "rounding": " May change when a run goes on, but for rounding.",
    "course": " May change when a run goes on, which then takes another course.",
}


def _fields(section: type[BaseModel], values: BaseModel | None) -> Iterator[Field]:
    for name, field in section.model_fields.items():
        value = field.get_default(call_default_factory=True)
        if values is not None:
            value = getattr(values, name)
        kinds = parsing.members(field.annotation)
        text = " ".join((field.description or "").split())
        text += "".join(
            _MARKS[mark.alters]
            for mark in field.metadata
            if isinstance(mark, MayChange)
        )
        if inside := [kind for kind in kinds if parsing.is_section(kind)]:
            held = value if isinstance(value, BaseModel) else None
            yield _group(name, _flag(name), inside[0], held, text)
            continue
        yield _leaf(name, *_shown(kinds), text, value)
        yield from _entries(name, kinds, value)


def _entries(name: str, kinds: Sequence[Any], value: Any) -> Iterator[Field]:
    """The flags of entries of a list of sections, or of a dictionary."""
    for kind in kinds:
        inside = get_args(kind)
        if get_origin(kind) is dict and not parsing.is_section(inside[1]):
            shown = "|".join(map(_metavar, parsing.members(inside[1])))
            keys = ", ".join(map(str, get_args(inside[0])))
            text = f"One entry of {name}" + (f", for one of {keys}." if keys else ".")
            yield _leaf(f"{name}_KEY", str, shown, text, None, f"{_flag(name)}.KEY")
        elif get_origin(kind) is dict:
            held = {"NAME": None} | (value or {})
            for key in [key for key in held if "_" not in key]:  # tyro shows a hyphen
                flag = f"{_flag(name)}.{key}"
                yield _group(f"{name}_{key}", flag, inside[1], held[key])
        elif get_origin(kind) is tuple and parsing.is_section(inside[0]):
            for index, held in enumerate(value or [None]):
                yield _group(
                    f"{name}_{index}", f"{_flag(name)}.{index}", inside[0], held
                )


def _group(
    identifier: str,
    name: str,
    section: type[BaseModel],
    values: BaseModel | None,
    text: str = "",
) -> Field:
    said = " ".join(f"{section.__doc__ or ''} {text}".split())
    kind = dataclasses.make_dataclass(
        section.__name__,
        _fields(section, values),
        kw_only=True,
        namespace={"__doc__": said},
    )
    shown = tyro.conf.arg(name=name, help=said)
    return identifier, Annotated[kind, shown], dataclasses.field()


def _leaf(
    identifier: str, kind: Any, metavar: str, text: str, value: Any, name: str = ""
) -> Field:
    shown = tyro.conf.arg(
        name=name or _flag(identifier),
        metavar=metavar or None,
        help=text,
        # What is not there by itself need not be something that can be given.
        help_behavior_hint=None if "null" in metavar or value is not None else "",
    )
    if value in (PydanticUndefined, dataclasses.MISSING):
        return identifier, Annotated[kind, shown], dataclasses.field()
    if isinstance(value, tuple):
        kind, value = tuple[kind, ...], tuple(map(_text, value))
    elif not isinstance(value, bool):
        value = _text(value)
    return identifier, Annotated[kind, shown], dataclasses.field(default=value)


def _shown(kinds: Sequence[Any]) -> tuple[Any, str]:
    """The type that tyro is given for a field of these types, and what it shows."""
    if bool in kinds:
        return bool, ""
    (first, *more) = [kind for kind in kinds if kind is not NoneType]
    many = get_origin(first) is tuple and not more
    entry = get_args(first)[0] if many else first
    metavar = "|".join(map(_metavar, parsing.members(entry) if many else kinds))
    choices = get_args(entry) if get_origin(entry) is Literal and not more else ()
    choices += ("null",) * (NoneType in kinds and bool(choices))
    return (
        Literal[choices] if choices else str,
        f"{metavar} [{metavar} ...]" if many else metavar,
    )


def _flag(key: str) -> str:
    return key.replace("_", "-")


def _metavar(kind: Any) -> str:
    match get_origin(kind) or kind:
        case _ if kind is NoneType:
            return "null"
        case _ if kind is Any:
            return "VALUE"
        case _ if get_origin(kind) is Literal:
            return "|".join(map(str, get_args(kind)))
        case _ if get_origin(kind) is tuple:
            return "[VALUE, ...]"
        case _ if get_origin(kind) is dict or parsing.is_section(kind):
            return "{KEY: VALUE}"
        case _:
            return {int: "INT", float: "FLOAT", str: "TEXT", datetime: "DATE"}[kind]


def _text(value: Any) -> str:
    """A value as a flag takes it."""
    plain = to_jsonable_python(value)
    return plain if isinstance(plain, str) else json.dumps(plain)
