"""The door to a model's files, which anyone may have written and which may be damaged.

Whatever a reader of such a file raises leaves here as one error that names the file.
"""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_JSON_BYTES = 2**25
_POINTER = b"version https://git-lfs.github.com/spec/"
_CHARACTERS = 300


class ModelFileError(ValueError):
    """A file of a model cannot be used; the message, one line, names it."""


@contextmanager
def reading(path: str | os.PathLike) -> Iterator[None]:
    """Turns what goes wrong inside into a `ModelFileError` that names `path`.

    Readers of damaged files raise whatever they please: KeyError, AttributeError,
    RecursionError, struct.error, SafetensorError, and panics of Rust, which are no
    `Exception`.
    """
    try:
        yield
    except (ModelFileError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        path = os.fspath(path)
        said = error.strerror if isinstance(error, OSError) else None
        said = shortened(said or str(error))
        for prefix in (path, os.path.basename(path)):
            said = said.removeprefix(f"{prefix}: ")
        if not said or not isinstance(error, ValueError | OSError):
            said = f"{type(error).__name__}: {said}".removesuffix(": ")
        raise ModelFileError(f"{path} cannot be used: {said}") from error


def shortened(text: str) -> str:
    """The text in one line, its end cut off if it is long."""
    text = " ".join(text.split())
    return text if len(text) <= _CHARACTERS else text[:_CHARACTERS] + "..."


def checked(path: Path, at_most: int | None = None) -> Path:
    """The path, if opening it yields a file's content and reading comes to an end.

    Args:
      at_most: bytes that such a file may have.

    Raises:
      ModelFileError: nothing is there, or a pipe, a device, a folder, the pointer that
        Git LFS leaves in a file's place, or too large a file.
    """
    with reading(path):
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"it is {_kind(found.st_mode)}, not a file")
        if at_most is not None and found.st_size > at_most:
            raise ValueError(
                f"it has {found.st_size} bytes; at most {at_most} are believed"
            )
        with open(path, "rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                raise ValueError(
                    "it is a Git LFS pointer, not the file itself; "
                    "fetch that with `git lfs pull`"
                )
    return path


def _kind(mode: int) -> str:
    for holds, kind in (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
    ):
        if holds(mode):
            return kind
    return "a device"


def json_object(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a JSON file holds.

    Args:
      default: returned if there is no such file.

    Raises:
      ModelFileError: it cannot be read, or holds something else than an object.
    """
    if default is not None and not os.path.lexists(path):
        return default
    checked(path, _JSON_BYTES)
    with reading(path):
        content = json.loads(path.read_text("utf-8"))
        if not isinstance(content, dict):
            raise ValueError(
                f"it holds {shortened(repr(content))}, not an object in braces"
            )
    return content
