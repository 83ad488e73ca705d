"""A run directory, to look at in a notebook."""

import html
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxrl_llm.tracking import plot, run_directory, summary
from jaxrl_llm.tracking.console import before_after, whereabouts
from jaxrl_llm.tracking.step_metrics import Validation


@dataclass(frozen=True)
class Result:
    """A run directory, to look at in a notebook."""

    directory: Path
    stopped: bool = False
    """Whether it was asked to stop before its last step; the same call goes on."""

    @property
    def weights(self) -> Path:
        """The trained policy, as a Hugging Face directory."""
        return self.directory / "huggingface"

    @property
    def before(self) -> Validation | None:
        """The first validation, if it was made before training."""
        return self._validation(0)

    @property
    def after(self) -> Validation | None:
        """The newest validation since training began."""
        steps = [s for s, split, _ in run_directory.rollout_files(self.directory)
                 if split == "val" and s > 0]  # fmt: skip
        return self._validation(max(steps)) if steps else None

    def table(self) -> Any:
        """Every metric by step, as a pandas DataFrame."""
        return run_directory.to_pandas(self.directory)

    def plot(self) -> Any:
        """Reward, held-out accuracy and response length over the steps, as a matplotlib
        figure. A notebook shows it, whatever its backend is; in a script its `show()`
        opens a window, or writes RUN/plot.png where there is no display."""
        return plot.figure(self.directory)

    @property
    def advice(self) -> list[str]:
        """What the run found to look at or to change, in the order of the steps."""
        return [line["text"] for line in run_directory.advice(self.directory)]

    def completions(self, step: int, split: str = "train") -> list[dict[str, Any]]:
        """The responses of one step with their rewards; split is train or val."""
        files = {s: p for s, of, p in run_directory.rollout_files(self.directory)
                 if of == split}  # fmt: skip
        if step not in files:
            raise ValueError(f"no {split} completions of step {step}; of {list(files)}")
        return run_directory.completions(files[step])

    def _validation(self, step: int) -> Validation | None:
        lines = {line["step"]: line for line in run_directory.read(self.directory)}
        found = {k: v for k, v in lines.get(step, {}).items() if k.startswith("val-")}
        if not found:
            return None
        return Validation(metrics=found, records=self.completions(step, "val"))

    def _repr_html_(self) -> str:
        """What training changed, two curves, and links into the directory."""
        try:
            return summary.page(
                self.directory, self.before, self.after, stopped=self.stopped
            )
        except ValueError as error:  # no run yet
            return f"<p>{html.escape(str(error))}</p>"

    def show(self, *, num_examples: int = 3) -> None:
        """Prints what training changed on the held-out questions, if it was measured,
        and where everything lies.

        Args:
          num_examples: questions shown with their answers.
        """
        if self.after:
            before_after(
                self.before, self.after, self.directory, num_examples=num_examples
            )
        else:
            whereabouts(self.directory)
