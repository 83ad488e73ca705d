"""What each verb that trains reads: its own schema, told by the key `task`.

Configurations of `jaxrl train` have no such key.
"""

import importlib
from collections.abc import Mapping
from typing import Any

from jaxrl_llm.config.names import ConfigError
from jaxrl_llm.config.section import Section

_HOMES = {
    None: ("jaxrl_llm.config.schema", "Config"),
    "sft": ("jaxrl_llm.config.schema_offline", "SftConfig"),
    "rm": ("jaxrl_llm.config.schema_offline", "RmConfig"),
    "dpo": ("jaxrl_llm.config.schema_offline", "DpoConfig"),
}
"""By the task: the module and the class."""

OFFLINE = tuple(task for task in _HOMES if task)
"""The verbs that learn from rows that are there."""


def of(task: str | None) -> type[Section]:
    """The schema of a task; of `jaxrl train` for None.

    Raises:
      ConfigError: there is no such task.
    """
    if task not in _HOMES:
        raise ConfigError(f"task is {task!r}; it is one of {', '.join(OFFLINE)}")
    module, name = _HOMES[task]
    return getattr(importlib.import_module(module), name)


def of_values(values: Mapping[str, Any]) -> type[Section]:
    """The schema of stored settings."""
    return of(values.get("task"))


def check_task(values: Mapping[str, Any], schema: type[Section], source: str) -> None:
    """Raises ConfigError if values say that they are for another verb."""
    field = schema.model_fields.get("task")
    wanted, said = field.default if field else None, values.get("task")
    if said in OFFLINE and said != wanted:
        raise ConfigError(
            f"{source}: task is {said}, which `jaxrl {said}` reads, not "
            f"`jaxrl {wanted or 'train'}`"
        )
