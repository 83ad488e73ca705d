"""The tasks of the offline loop by their names."""

from jaxrl_llm.training.offline_build import Task
from jaxrl_llm.training.preference import DpoTask, RewardModelTask
from jaxrl_llm.training.sft import SftTask

TASKS: dict[str, Task] = {
    task.name: task for task in (SftTask(), RewardModelTask(), DpoTask())
}
"""By the verb that runs them, which is also the key `task` of their configurations."""


def of(name: str) -> Task:
    """The task of a verb."""
    return TASKS[name]
