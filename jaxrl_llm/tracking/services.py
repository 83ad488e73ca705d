"""Where metrics can go besides the run directory: one small class per service.

Each imports its package when it is made, so that a missing one is an error before
anything is computed, and starts its run in `start`.
"""

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Logger(Protocol):
    """Takes the metrics of each step."""

    def start(self, run_dir: Path, project: str, config: Mapping[str, Any]) -> None:
        """Begins a run named after the directory."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes the metrics of one step."""

    def rewind(self, step: int) -> None:
        """The run goes on after `step`; what came later is void."""

    def close(self) -> None:
        """Ends the run."""


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self) -> None:
        self._package = imported("tensorboardX", "the logger 'tensorboard'", "tracking")

    def start(self, run_dir: Path, project: str, config: Mapping[str, Any]) -> None:
        """`project` and `config` have no place in an event file."""
        self._dir = str(run_dir / "tensorboard")
        self._writer = self._package.SummaryWriter(self._dir)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Flushed, so that nothing is lost when the process is killed."""
        for name, value in metrics.items():
            # tensorboardX would make "mean@8" "mean_8".
            self._writer.add_scalar(name.replace("@", "_at_"), value, step)
        self._writer.flush()

    def rewind(self, step: int) -> None:
        """TensorBoard then hides the points of later steps."""
        self._writer.close()
        # Without a suffix, files of the same second would have the same name.
        self._writer = self._package.SummaryWriter(
            self._dir, purge_step=step + 1, filename_suffix=f".from{step + 1}"
        )

    def close(self) -> None:
        """Ends the event file."""
        self._writer.close()


class Wandb:
    """A run in Weights & Biases. A run that goes on later is a new run of one group."""

    def __init__(self) -> None:
        self._package = imported("wandb", "the logger 'wandb'", "tracking")

    def start(self, run_dir: Path, project: str, config: Mapping[str, Any]) -> None:
        """Obeys WANDB_MODE and the other variables of wandb."""
        name = run_dir.resolve().name
        self._run = self._package.init(
            project=project, name=name, group=name, dir=run_dir, config=dict(config)
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """The step is a metric: wandb's own counter cannot go back."""
        self._run.log({"step": step, **metrics})

    def rewind(self, step: int) -> None:
        """wandb cannot forget."""

    def close(self) -> None:
        """Ends the run; wandb's own process may write a little longer."""
        self._run.finish()


class MLflow:
    """A run in MLflow, where MLFLOW_TRACKING_URI says."""

    def __init__(self) -> None:
        self._package = imported("mlflow", "the logger 'mlflow'", "tracking")
        # mlflow-skinny, which the extra installs, has no store of its own.
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            raise ValueError(
                "the logger 'mlflow' needs MLFLOW_TRACKING_URI, which is not set: the "
                "address of a server, such as http://localhost:5000, or "
                "sqlite:///FILE.db if the full mlflow package is installed"
            )

    def start(self, run_dir: Path, project: str, config: Mapping[str, Any]) -> None:
        """A client of its own, so that the caller's active run stays untouched."""
        self._client = self._package.MlflowClient()
        found = self._client.get_experiment_by_name(project)
        experiment = (
            found.experiment_id if found else self._client.create_experiment(project)
        )
        run = self._client.create_run(experiment, run_name=run_dir.resolve().name)
        self._id = run.info.run_id
        for name, value in flat(config).items():
            self._client.log_param(self._id, name, str(value)[:6000])

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One point per metric."""
        for name, value in metrics.items():
            # MLflow allows no "@", as in "mean@8".
            self._client.log_metric(
                self._id, name.replace("@", "_at_"), value, step=step
            )

    def rewind(self, step: int) -> None:
        """MLflow cannot forget."""

    def close(self) -> None:
        """Marks the run as finished."""
        self._client.set_terminated(self._id)


class Trackio:
    """A run in trackio, in its own local data base."""

    def __init__(self) -> None:
        self._package = imported("trackio", "the logger 'trackio'", "tracking")

    def start(self, run_dir: Path, project: str, config: Mapping[str, Any]) -> None:
        """A run of that name that exists already is continued."""
        self._run = self._package.init(
            project=project, name=run_dir.resolve().name, config=dict(config)
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One point per metric."""
        self._run.log(dict(metrics), step=step)

    def rewind(self, step: int) -> None:
        """trackio cannot forget."""

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


def find(name: str) -> Logger:
    """The logger called `name` in `trainer.loggers`.

    Raises:
      ImportError: its package is not installed.
      ValueError: there is no such logger, or it lacks a setting.
    """
    match name:
        case "tensorboard":
            return TensorBoard()
        case "wandb":
            return Wandb()
        case "mlflow":
            return MLflow()
        case "trackio":
            return Trackio()
    raise ValueError(
        f"no logger is called {name!r}; known: tensorboard, wandb, mlflow, trackio"
    )


def imported(package: str, user: str, extra: str) -> Any:
    """The package, imported.

    Raises:
      ImportError: naming who needs it and the extra that installs it.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ImportError(
            f"{user} needs the package {package}, which is not installed: "
            f"pip install 'jaxrl-llm[{extra}]'"
        ) from None


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found
