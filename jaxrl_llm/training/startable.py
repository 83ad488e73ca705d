"""What every run is to those who open, begin, rehearse and log it."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from jaxrl_llm.data.stream import PromptBatches


@runtime_checkable
class Startable(Protocol):
    """Everything that a run consists of: `build.Job` or `offline_build.OfflineJob`."""

    @property
    def config(self) -> Any:
        """With output_dir, placement-free `trainer` and `data`: what all runs have."""

    @property
    def inputs(self) -> Mapping[str, Mapping[str, str]]:
        """Digests of the user's functions and of the data, see
        `resume.check_inputs`."""

    @property
    def writes_rollouts(self) -> bool:
        """Whether every step leaves responses behind."""

    @property
    def tags(self) -> list[str]:
        """What loggers can find the run by."""

    @property
    def updating(self) -> int:
        """Devices that the update runs on."""

    def stream(self) -> PromptBatches:
        """What steps are made of, from the beginning."""

    def start(self) -> Any:
        """The state before the first step. Reads the weights."""

    def abstract_state(self) -> Any:
        """Shapes, dtypes and shardings of the state."""
