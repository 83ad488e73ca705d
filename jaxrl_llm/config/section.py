"""What all sections of a configuration have in common, and their kinds of text."""

import math
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    field_validator,
)

# What float32 and unsigned 32-bit integers hold, which everything is computed with.
_LARGEST, _MOST = 3.4e38, 2**32 - 1

# What a path may begin with: a kind of data set in a folder, or of what has a name.
_SAVED, _NAMED = (
    ("disk:",),
    (
        "hub:",
        "package:",
        "reasoning_gym:",
        "episodes:",
    ),
)


Value = TypeVar("Value")


@dataclass(frozen=True)
class MayChange:
    """Marks a field that may be another when a run goes on. Of a section, all of it."""

    alters: Literal["nothing", "rounding", "course"]
    """nothing: what the run learns is the same bit for bit. rounding: sums are taken in
    another order or by other programs, so last bits differ, and tokens that hang on
    them. course: what comes after is what the new value asks for."""


Free = Annotated[Value, MayChange("nothing")]
Rounding = Annotated[Value, MayChange("rounding")]
Course = Annotated[Value, MayChange("course")]


class Section(BaseModel):
    """What all sections of a configuration have in common."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, info: Any) -> Any:
        """Refuses what would be taken for something else, or not be held."""
        _check_plain(value, _kinds(cls.model_fields[info.field_name].annotation))
        return value


def _check_plain(value: Any, kinds: set[Any]) -> None:
    match value:
        case bool():
            if bool not in kinds and kinds & {int, float}:
                raise ValueError(f"should be a number, got {value}")
        case int() | float() if datetime in kinds:
            raise ValueError(f"should be a date such as 2025-01-31, got {value}")
        case float() if math.isnan(value) and Any in kinds:
            raise ValueError("should be a number, got nan")
        case int() | float():
            most = _LARGEST if float in kinds else _MOST
            if kinds & {int, float} and most < abs(value) < math.inf:
                raise ValueError(f"{str(value)[:12]} is out of range; at most {most}")
        case str():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ValueError(f"{value!r} holds half a character") from None
        case list() | tuple():
            for item in value:
                _check_plain(item, kinds)
        case dict() if Any in kinds:
            for item in value.values():
                _check_plain(item, kinds)


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation is made of."""
    return {annotation}.union(*map(_kinds, get_args(annotation)))


def _name(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty")
    if "\0" in text:
        raise ValueError(f"{text!r} holds a null character")
    if variable := re.search(r"\$(\{[^}]*\}?|[A-Za-z_]\w*)", text):
        raise ValueError(
            f"{text!r} has the variable {variable[0]}, which nothing fills in here; "
            "write its value, or give the key on the command line, where the shell does"
        )
    return text


def _path(text: str) -> str:
    kind = next((kind for kind in _SAVED if text.startswith(kind)), "")
    path = text.removeprefix(kind)
    if not text.startswith(_NAMED) and re.match(r"[A-Za-z][\w+.-]*:/", path):
        raise ValueError(
            f"{text!r} is an address, and only paths of this machine are read and "
            "written; mount what is there, or copy it here"
        )
    if not path.startswith("~"):
        return text
    try:
        return kind + str(Path(path).expanduser())
    except RuntimeError as error:  # no such user
        raise ValueError(f"{text!r}: {error}") from None


Name = Annotated[str, AfterValidator(_name)]
"""Text that stands for something: neither empty, nor with a variable in it."""

PathText = Annotated[str, AfterValidator(_name), AfterValidator(_path)]
"""The path of something on this machine, or a name such as a hub's id. A ~ at its start
is the home directory."""
