"""Whether a run may go on in a directory that holds one: its facts must be the same."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxrl_llm.config import parsing, reader, renamed, schemas
from jaxrl_llm.config.names import ConfigError
from jaxrl_llm.config.schema import Config
from jaxrl_llm.config.secrets import without_secrets
from jaxrl_llm.config.section import MayChange, Section

_FROM_HERE = {
    "nothing": "",
    "rounding": "; sums are rounded otherwise from here on, and tokens may differ",
    "course": "; the run takes another course from here on",
}


def may_change(key: str, schema: type[Section] = Config) -> MayChange | None:
    """What a run may go on with changed says so at its field, or at the section that
    the field is in; None for what must be as it was.

    Args:
      key: dotted, such as actor.mesh.fsdp.
      schema: that has it.
    """
    kinds, found = (schema,), None
    for name in key.split("."):
        section = next(filter(parsing.is_section, kinds), None)
        field = section and section.model_fields.get(name)
        if field is None:
            break
        marks = [mark for mark in field.metadata if isinstance(mark, MayChange)]
        found = marks[0] if marks else found
        kinds = parsing.members(field.annotation)
    return found


def check(directory: Path, config: Section) -> list[str]:
    """What is set otherwise than when the run in `directory` began, and may be, in a
    line each; nothing if there is none.

    The settings may have been stored by an earlier version: a key that it did not have
    counts as its default, and one that has another name now as that (`renamed.FORMER`).

    Raises:
      ConfigError: `directory` holds a run that this one cannot go on.
    """
    stored = settings_of(directory)
    if stored is None:
        return []
    if config.trainer.resume == "never":
        raise ConfigError(
            f"trainer.resume is never, but output_dir {directory} holds a run; choose "
            "another output_dir"
        )
    if type(stored) is not type(config):
        raise ConfigError(
            f"output_dir {directory} holds a run of `jaxrl {_verb(stored)}`, which "
            f"`jaxrl {_verb(config)}` cannot go on; choose another output_dir"
        )
    before, now = facts(stored), facts(config)
    changed = {
        key: f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    }
    marks = {key: may_change(key, type(config)) for key in changed}
    if wrong := [text for key, text in changed.items() if marks[key] is None]:
        raise ConfigError(
            f"output_dir {directory} holds a run with other settings; choose another "
            f"output_dir, or go on with the same: {'; '.join(wrong)}"
        )
    return [
        text + _FROM_HERE[mark.alters]
        for text, mark in zip(changed.values(), marks.values(), strict=True)
        if mark.alters != "nothing"
    ]


def _verb(config: Section) -> str:
    return getattr(config, "task", "train")


def settings_of(directory: Path) -> Any:
    """The settings of the run in `directory`, as this version reads them: a `Config`,
    or what else `schemas` has; None if there is none.

    Raises:
      ConfigError: they cannot be read, or a key that is gone changed something.
    """
    path = directory / "config.yaml"
    if not path.exists():
        return None
    values = renamed.translated(reader.read(path).values, str(path))
    return parsing.parse(values, str(path), schema=schemas.of_values(values))


def check_inputs(
    directory: Path, config: Section, now: Mapping[str, Mapping[str, str]]
) -> list[str]:
    """What is not as it was when the run in `directory` began, in a line each; nothing
    if that has no checkpoint, or does not say.

    Args:
      now: digests by name, in sections that `_WHAT` tells of.

    Raises:
      ConfigError: something changed, and trainer.resume is not "force".
    """
    if not any(path.name.isdecimal() for path in directory.glob("checkpoints/*")):
        return []
    try:
        before = json.loads((directory / "inputs.json").read_bytes())
        changed = [
            what.format(name=name, source=source)
            for section, what in _WHAT.items()
            for source in [_path(config, section)]
            for was, are in [(before.get(section, {}), now.get(section, {}))]
            for name in sorted(was.keys() | are.keys())
            if was.get(name) != are.get(name)
        ]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, AttributeError) as error:
        return [
            f"{directory / 'inputs.json'} cannot be read, and is not compared: {error}"
        ]
    if changed and config.trainer.resume != "force":
        raise ConfigError(
            f"output_dir {directory} holds a run that was begun otherwise: "
            f"{'; '.join(changed)}. Choose another output_dir, or set "
            "trainer.resume=force to go on all the same"
        )
    return [f"{text}; the run goes on all the same" for text in changed]


_WHAT = {
    "functions": "the source of {name}, or of what it calls, has changed",
    "train": "data.train: {name} of the rows in {source} has changed",
    "model": "model.path: {name} have changed",
    "val": "data.val: {name} of the held-out questions in {source} has changed",
}


def _path(config: Any, section: str) -> str | None:
    source = getattr(config.data, section, None)
    return source.path if source else None


def facts(config: Section) -> dict[str, Any]:
    """What is compared when a run goes on: every setting by its dotted key, but for
    secrets, which are not stored."""
    return _flat(without_secrets(config.model_dump(mode="json")))


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings, by dotted path."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    return {
        path: leaf
        for key, value in tree.items()
        for path, leaf in _flat(value, f"{prefix}.{key}" if prefix else key).items()
    }
