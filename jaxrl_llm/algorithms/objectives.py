"""What an update is made for: the protocol between `update` and any objective.

An objective does not know the model. It is handed what an outputs function makes of
some rows (log-probabilities, values, or hidden states with the output matrix) and says
what that costs:

    batch   = objective.read(batch)
    seen    = objective.look(rows, outputs)       of all rows, if it looks ahead
    planned = objective.plan(batch, seen, step)   over the whole mini-batch
    loss, kept = objective.loss(rows, outputs, planned)   of each micro-batch
    metrics = objective.metrics(batch, kept, planned)

Micro-batches give the gradient of the whole mini-batch because everything that is
divided by (numbers of tokens, of sequences, of pairs) is in `planned`, and because the
losses of micro-batches are added up.

Shapes: R = rows, T = tokens in a row. What is kept or planned is a tree of arrays whose
first axis is rows, [R, T, ...].
"""

from collections.abc import Mapping
from typing import Any, Literal, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int

from jaxrl_llm.algorithms.statistics import Statistic
from jaxrl_llm.data.rows import TrainBatch

Outputs = Any
Segments = Literal["tokens", "sequences", "pairs"]

SEQUENCES_TOGETHER: dict[Segments, int] = {"tokens": 1, "sequences": 1, "pairs": 2}
"""How many neighbouring sequences must share a row, for an objective of such segments:
what `Layout.sequences_together` is to be."""


@runtime_checkable
class Objective(Protocol):
    """What an update is made for. Those that derive from it need define only `plan`,
    `loss` and `metrics`."""

    name: str
    """Metrics begin with it: NAME/loss, NAME/grad_norm, NAME/update_skipped."""
    segments: Segments = "tokens"
    """What the loss is a sum over. Sequences are whole in their row; the sequences 2 i
    and 2 i + 1 of a batch of pairs are in one."""

    def read(self, batch: TrainBatch) -> TrainBatch:
        """The mini-batch as this objective sees it.

        Raises:
          ValueError: the batch lacks what the objective needs.
        """
        return batch

    def looks_ahead(self, batch: TrainBatch) -> bool:
        """Whether the outputs of all rows must be seen before the first gradient: for
        a choice or a normaliser that no micro-batch can make alone."""
        return False

    def look(self, rows: TrainBatch, outputs: Outputs) -> Any:
        """What is kept of the outputs of some rows for `plan`, if it looks ahead."""
        return outputs

    def plan(self, batch: TrainBatch, seen: Any, step: Int[Array, ""]) -> Any:
        """What is decided over the whole mini-batch, such as `masked.weights`.

        Args:
          seen: `look` of all rows; None if it does not look ahead.
          step: updates so far; what is random differs from one to the next.
        """

    def loss(
        self, rows: TrainBatch, outputs: Outputs, planned: Any
    ) -> tuple[Float[Array, ""], Any]:
        """What is differentiated, and what is kept of each row for `metrics`.

        Args:
          rows: some of the rows of the mini-batch.
          planned: `plan` of the mini-batch, the same rows of it.
        """

    def metrics(
        self, batch: TrainBatch, kept: Any, planned: Any
    ) -> Mapping[str, Statistic | Float[Array, ""]]:
        """What is to be known of the update, from before its step, and what it is a
        mean over; a plain number counts as `statistics.of` says.

        Args:
          batch: the mini-batch as it was given, before `read`.
          kept: what `loss` kept, of all rows.
        """
