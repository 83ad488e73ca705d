"""Curves of a run as a matplotlib figure that notebooks and scripts show."""

import io
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl_llm.tracking.run_directory import read, table
from jaxrl_llm.tracking.services import imported
from jaxrl_llm.tracking.step_metrics import accuracy_name, loss_name


def figure(run_dir: str | Path) -> Any:
    """Reward or losses, held-out accuracy and response length by step: a matplotlib
    figure.

    What the run did not measure is left out. Every notebook shows it, also without
    `%matplotlib inline`. Its `show()` is for scripts: it opens a window, or where there
    is none to open writes RUN/plot.png and says so.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: `run_dir` holds no metrics.jsonl, or a damaged one.
    """
    columns = table(read(run_dir))
    imported("matplotlib", "Result.plot", "notebooks")
    import matplotlib
    from matplotlib.backends import BackendFilter, backend_registry
    from matplotlib.figure import Figure

    class Curves(Figure):
        def _repr_png_(self) -> bytes:
            picture = io.BytesIO()
            self.savefig(picture, format="png")
            return picture.getvalue()

        def show(self, warn: bool = True) -> None:
            windows = backend_registry.list_builtin(BackendFilter.INTERACTIVE)
            if matplotlib.get_backend().lower() in windows:
                from matplotlib import pyplot

                _draw(pyplot.figure(figsize=self.get_size_inches()), columns)
                pyplot.show()
                return
            path = Path(run_dir) / "plot.png"
            self.savefig(path)
            print(f"plot         {path}")

    shown = Curves(figsize=(4.2 * max(len(_panels(columns)), 1), 3.2))
    _draw(shown, columns)
    return shown


def _panels(columns: dict[str, np.ndarray]) -> dict[str, str]:
    """The metric of each panel by its title."""
    panels = {
        "training reward": "critic/rewards/mean",
        "distance from the teacher": "distillation/loss",
        "training loss": loss_name(columns),
        "held-out loss": f"val-core/all/{loss_name(columns)}",
        "held-out accuracy, 95 % interval": accuracy_name(list(columns)),
        "response length, tokens": "response_length/mean",
    }
    return {title: name for title, name in panels.items() if name in columns}


def _draw(shown: Any, columns: dict[str, np.ndarray]) -> None:
    panels = _panels(columns)
    shown.set_layout_engine("constrained")
    for place, (title, name) in enumerate(panels.items(), 1):
        axes = shown.add_subplot(1, len(panels), place)
        known = ~np.isnan(columns[name])
        steps = columns["step"][known]
        axes.plot(steps, columns[name][known], marker="o", markersize=3)
        if f"{name}/ci95_low" in columns:
            low, high = (
                columns[f"{name}/ci95_{end}"][known] for end in ("low", "high")
            )
            axes.fill_between(steps, low, high, alpha=0.2)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
