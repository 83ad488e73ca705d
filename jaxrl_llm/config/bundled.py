"""The configurations that come with the package, by name.

jaxrl train quickstart     trains with configs/quickstart_smollm2_cpu.yaml
jaxrl init gsm8k runs      writes runs/gsm8k.yaml: a copy that explains each key
"""

import difflib
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from jaxrl_llm.config.names import ConfigError

FOLDER = Path(__file__).parents[1] / "configs"
_SHORT = {"gsm8k_qwen2.5_0.5b_1gpu": "gsm8k"}
_WIDTH = 88


def names() -> dict[str, Path]:
    """Every bundled configuration by its short name.

    A name is the file's without .yaml, less the model and machine where these are the
    smallest: `ppo` is ppo_smollm2_cpu.yaml.
    """
    return {
        _SHORT.get(
            path.stem, path.stem.replace("_smollm2", "").removesuffix("_cpu")
        ): path
        for path in sorted(FOLDER.glob("*.yaml"))
    }


def find(name: str | Path) -> Path:
    """The file that stands behind a path or a bundled name; a file of that name counts
    first. A path that ends in .yaml or names a folder is returned as it is.

    Raises:
      ConfigError: neither; lists the bundled names.
    """
    text = str(name)
    if text.endswith((".yaml", ".yml")) or "/" in text or Path(text).is_file():
        return Path(text)
    return _named(text, "neither a file nor a bundled configuration")


def _named(name: str, otherwise: str) -> Path:
    known = names()
    by_stem = {path.stem: path for path in known.values()}
    if path := known.get(name) or by_stem.get(name):
        return path
    near = difflib.get_close_matches(name, known, n=1)
    hint = f", did you mean {near[0]!r}?" if near else ";"
    raise ConfigError(f"{name}: {otherwise}{hint} bundled: {', '.join(known)}")


def write(name: str, directory: Path, section: type[BaseModel]) -> Path:
    """Writes a bundled configuration, with what each key means, to DIRECTORY/NAME.yaml.

    Args:
      name: a bundled name.
      directory: made if it is not there.
      section: what the file's keys are fields of.

    Raises:
      ConfigError: no such name, or the file is there; nothing is overwritten.
    """
    source = _named(name, "no bundled configuration has this name")
    path = directory / f"{name}.yaml"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with path.open("x") as file:
            file.write(
                f"# All keys, with what they are here: jaxrl train {path} --help\n"
            )
            file.write(explained(source.read_text(), section))
    except (FileExistsError, NotADirectoryError):
        if directory.is_dir():
            raise ConfigError(
                f"{path} exists and is not overwritten; name another folder: "
                f"jaxrl init {name} FOLDER"
            ) from None
        raise ConfigError(f"{directory} is a file, not a folder") from None
    return path


def explained(text: str, section: type[BaseModel]) -> str:
    """A configuration's text with a comment above each key: its field's docstring."""
    lines = text.splitlines()
    node = yaml.compose(text, yaml.SafeLoader)
    notes: dict[int, list[str]] = {}
    for line, indent, note in _notes(node, section):
        begin = " " * indent + "# "
        notes.setdefault(line, []).extend(
            textwrap.wrap(
                note,
                _WIDTH,
                initial_indent=begin,
                subsequent_indent=begin,
                break_long_words=False,
                break_on_hyphens=False,
            )
        )
    written = [[*notes.get(number, ()), line] for number, line in enumerate(lines)]
    return "\n".join(line for group in written for line in group) + "\n"


def _notes(
    node: yaml.MappingNode,
    section: type[BaseModel],
    above: tuple[int, int] | None = None,
) -> Iterator[tuple[int, int, str]]:
    """Line, indentation and text of what explains each key.

    Args:
      above: line and indentation of the key whose one-line mapping this is.
    """
    for key, value in node.value:
        field = section.model_fields.get(key.value)
        if field is None:  # `<<`
            continue
        inside = next(_sections(field.annotation), None)
        note = field.description or (inspect.getdoc(inside) if inside else "")
        place = above or (key.start_mark.line, key.start_mark.column)
        if note:
            text = " ".join(note.split())
            yield *place, f"{key.value}: {text}" if above else text
        if inside and isinstance(value, yaml.MappingNode):
            yield from _notes(value, inside, place if value.flow_style else None)


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections among the members of a union, or an annotation that is one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inside in getattr(annotation, "__args__", ()):
        if getattr(annotation, "__origin__", None) not in (dict, tuple):
            yield from _sections(inside)
