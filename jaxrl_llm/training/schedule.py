"""What joins the stages of the loop: when experience is gathered, and when the engine
gets new weights.

The loop is the same for every schedule,

    schedule.publish(params, first)
    for step in first + 1, ...:
        groups = schedule.experience(step)        # then credit, update
        schedule.publish(params, step)

and a schedule is made of the same two stages, `collect` and `load`. In step, it is
`Synchronous`. With an exact lag of k steps, `publish(_, s)` would let the collection
under way end, load, and begin that of step s + 1 + k beside the update. With bounded
staleness, collections would go on all the time, `publish` would load between them, and
`experience` would hand out the oldest that is not too old, by the weight version that
each response carries. Groups say where the training data stands behind them, so that a
checkpoint is of what was learned from, however far ahead collecting is.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from jaxrl_llm.training.experience import Groups

Collect = Callable[[int], Groups]
"""Generates and scores the groups of one step, with the weights the engine holds."""
Load = Callable[[Any, int], Mapping[str, float]]
"""Hands the engine weights and the step that made them; metrics of the transfer."""


class Schedule(Protocol):
    """Decides which weights generate what a step learns from."""

    def experience(self, step: int) -> Groups:
        """The groups that `step` learns from; waits for them."""

    def publish(self, params: Any, step: int) -> Mapping[str, float]:
        """Takes the weights that `step` made, before the first step those that training
        begins or goes on with. The engine holds them when this returns, for the
        held-out questions.

        Returns:
          Metrics of the transfer.
        """


@dataclass(frozen=True)
class Synchronous:
    """Every step learns from what the weights before it have generated."""

    collect: Collect
    load: Load

    def experience(self, step: int) -> Groups:
        """Generates now."""
        return self.collect(step)

    def publish(self, params: Any, step: int) -> Mapping[str, float]:
        """Loads now."""
        return self.load(params, step)
