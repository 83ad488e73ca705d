"""Where metrics can go besides the run directory: one small class per service.

Each imports its package when it is made, so that a missing one is an error before
anything is computed, and starts its run in `start`. A run has one id, in
RUN/tracking_id, by which the services know it again when it goes on.
"""

import html
import importlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

Records = Sequence[Mapping[str, Any]]
"""The lines of a rollout file; see `step_metrics.rollout_records`."""

MAX_CHARACTERS = 4000
"""Characters of one prompt or completion in a table; RUN/rollouts has all of it."""
TABLE_ROWS = 32
"""Completions of a step that a service gets as a table, evenly spaced: those of every
validation, and of training in the first step and every tenth."""
_COLUMNS = ("step", "kind", "prompt", "completion", "answer", "reward", "scored")


@runtime_checkable
class Logger(Protocol):
    """Takes the metrics and completions of each step."""

    def start(
        self,
        run_dir: Path,
        project: str,
        config: Mapping[str, Any],
        tags: Sequence[str] = (),
    ) -> None:
        """Begins a run named after the directory, or goes on with it.

        Args:
          tags: what it can be found by.
        """

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes the metrics of one step."""

    def rollouts(self, step: int, split: str, records: Records) -> None:
        """Takes a table of completions, see `table`, and `distributions`."""

    def rewind(self, step: int) -> None:
        """The run goes on after `step`; what came later is void."""

    def close(self) -> None:
        """Ends the run."""


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self) -> None:
        self._package = imported("tensorboardX", "the logger 'tensorboard'", "tracking")

    def start(
        self,
        run_dir: Path,
        project: str,
        config: Mapping[str, Any],
        tags: Sequence[str] = (),
    ) -> None:
        """Tags and settings are texts of step 0."""
        self._dir = str(run_dir / "tensorboard")
        self._writer = self._package.SummaryWriter(self._dir)
        self._about = {"tags": ", ".join(tags), "project": project}
        settings = flat(config).items()
        self._about["settings"] = _markdown(["key", "value"], settings)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Flushed, so that nothing is lost when the process is killed."""
        for name, text in self._about.items():
            self._writer.add_text(name, text, 0)
        self._about = {}
        for name, value in metrics.items():
            # tensorboardX would make "mean@8" "mean_8".
            self._writer.add_scalar(name.replace("@", "_at_"), value, step)
        self._writer.flush()

    def rollouts(self, step: int, split: str, records: Records) -> None:
        """The table is a text."""
        for name, values in distributions(split, records).items():
            self._writer.add_histogram(name, values, step)
        if rows := table(step, split, records):
            text = _markdown(_COLUMNS, rows)
            self._writer.add_text(f"completions/{split}", text, step)

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
    """A run in Weights & Biases, the same one when it goes on."""

    def __init__(self) -> None:
        self._package = imported("wandb", "the logger 'wandb'", "tracking")

    def start(
        self,
        run_dir: Path,
        project: str,
        config: Mapping[str, Any],
        tags: Sequence[str] = (),
    ) -> None:
        """Obeys WANDB_MODE and the other variables of wandb."""
        self._run = self._package.init(
            project=project,
            name=run_dir.resolve().name,
            id=run_id(run_dir),
            resume="allow",
            dir=run_dir,
            config=dict(config),
            tags=[tag[:64] for tag in tags],
            allow_val_change=True,
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """The step is a metric: wandb's own counter cannot go back."""
        self._run.log({"step": step, **metrics})

    def rollouts(self, step: int, split: str, records: Records) -> None:
        """Logged beside the metrics of the step."""
        package = self._package
        found = {
            name: package.Histogram(values.tolist())
            for name, values in distributions(split, records).items()
        }
        if rows := table(step, split, records):
            data = [list(map(str, row)) for row in rows]
            found[f"completions/{split}"] = package.Table(list(_COLUMNS), data)
        if found:
            self._run.log({"step": step, **found})

    def rewind(self, step: int) -> None:
        """wandb cannot forget: of a step that is logged again, both points stay."""

    def close(self) -> None:
        """Ends the run; wandb's own process may write a little longer."""
        self._run.finish()


class MLflow:
    """A run in MLflow, where MLFLOW_TRACKING_URI says, the same one when it goes on."""

    def __init__(self) -> None:
        self._package = imported("mlflow", "the logger 'mlflow'", "tracking")
        # mlflow-skinny, which the extra installs, has no store of its own.
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            raise ValueError(
                "the logger 'mlflow' needs MLFLOW_TRACKING_URI, which is not set: the "
                "address of a server, such as http://localhost:5000, or "
                "sqlite:///FILE.db if the full mlflow package is installed"
            )

    def start(
        self,
        run_dir: Path,
        project: str,
        config: Mapping[str, Any],
        tags: Sequence[str] = (),
    ) -> None:
        """A client of its own, so that the caller's active run stays untouched. A
        parameter that has changed since the run began is a tag, as parameters cannot
        change."""
        self._client = self._package.MlflowClient()
        found = self._client.get_experiment_by_name(project)
        experiment = (
            found.experiment_id if found else self._client.create_experiment(project)
        )
        named = {"jaxrl_llm.run": run_id(run_dir)}
        wanted = f"tags.`jaxrl_llm.run` = '{named['jaxrl_llm.run']}'"
        runs = self._client.search_runs([experiment], wanted, max_results=1)
        if runs:
            run = runs[0]
            self._client.update_run(run.info.run_id, status="RUNNING")
        else:
            run = self._client.create_run(
                experiment,
                run_name=run_dir.resolve().name,
                tags={**named, "tags": ", ".join(tags)},
            )
        self._id, known = run.info.run_id, run.data.params
        self._tables = json.loads(run.data.tags.get(_TABLES, "[]"))
        values = {name: str(value)[:6000] for name, value in flat(config).items()}
        new = [(name, value) for name, value in values.items() if name not in known]
        param = self._package.entities.Param
        for some in _parts(new, 100):  # as many as MLflow takes
            self._client.log_batch(self._id, params=[param(*one) for one in some])
        for name in known.keys() & values.keys():
            if known[name] != values[name]:
                self._client.set_tag(self._id, f"changed.{name}", values[name])

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One request for all metrics."""
        now, metric = int(time.time() * 1000), self._package.entities.Metric
        found = [
            metric(mlflow_name(name), value, now, step)
            for name, value in metrics.items()
        ]
        for some in _parts(found, 1000):  # as many as MLflow takes
            self._client.log_batch(self._id, metrics=some)

    def rollouts(self, step: int, split: str, records: Records) -> None:
        """The table is an artifact, in the form of `log_table`, which needs pandas.
        MLflow has no histograms."""
        if not (rows := table(step, split, records)):
            return
        path = f"completions/{split}_{step:06d}.json"
        text = json.dumps({"columns": _COLUMNS, "data": rows})
        self._client.log_text(self._id, text, path)
        if not any(one["path"] == path for one in self._tables):
            # The newest, as many as a tag has room for.
            self._tables = [*self._tables[-49:], {"path": path, "type": "table"}]
            self._client.set_tag(self._id, _TABLES, json.dumps(self._tables))

    def rewind(self, step: int) -> None:
        """MLflow cannot forget: of a step that is logged again, both points stay."""

    def close(self) -> None:
        """Marks the run as finished."""
        self._client.set_terminated(self._id)


def mlflow_name(name: str) -> str:
    """A metric's name as MLflow takes it: without "@", as in "mean@8", and not below
    another metric, for which a store of files has no place."""
    return name.replace("@", "_at_").replace("/ci95_", "_ci95_")


_TABLES = "mlflow.loggedArtifacts"
"""The tag by which MLflow knows which artifacts are tables."""


class Trackio:
    """A run in trackio, in its own local data base, the same one when it goes on."""

    def __init__(self) -> None:
        self._package = imported("trackio", "the logger 'trackio'", "tracking")

    def start(
        self,
        run_dir: Path,
        project: str,
        config: Mapping[str, Any],
        tags: Sequence[str] = (),
    ) -> None:
        """trackio knows runs by their names: the id is a part of it. Tags stand in the
        configuration."""
        self._run = self._package.init(
            project=project,
            name=f"{run_dir.resolve().name}-{run_id(run_dir)}",
            resume="allow",
            config={**config, "tags": list(tags)},
            embed=False,
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One point per metric."""
        self._run.log(dict(metrics), step=step)

    def rollouts(self, step: int, split: str, records: Records) -> None:
        """Logged beside the metrics of the step."""
        found = {
            name: self._package.Histogram(values)
            for name, values in distributions(split, records).items()
        }
        if rows := table(step, split, records):
            data = [dict(zip(_COLUMNS, row, strict=True)) for row in rows]
            found[f"completions/{split}"] = self._package.Table(data=data)
        if found:
            self._run.log(found, step=step)

    def rewind(self, step: int) -> None:
        """trackio cannot forget: of a step that is logged again, both points stay."""

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


def run_id(run_dir: Path) -> str:
    """The id that services know the run by: eight hexadecimal digits, drawn once and
    kept in RUN/tracking_id."""
    path = run_dir / "tracking_id"
    known = path.read_text().strip() if path.exists() else ""
    if not re.fullmatch("[0-9a-f]{8}", known):
        known = secrets.token_hex(4)
        path.write_text(known + "\n")
    return known


def distributions(split: str, records: Records) -> dict[str, np.ndarray]:
    """What the numbers of one step's responses are like, by the name of the histogram:
    reward, advantage (of training) and length in tokens."""
    names = {"reward": "reward", "advantage": "advantage", "num_tokens": "length"}
    found = {}
    for key, name in names.items():
        values = np.array([r[key] for r in records if key in r], np.float64)
        values = values[np.isfinite(values)]
        if values.size:
            found[f"histograms/{split}/{name}"] = values
    return found


def table(step: int, split: str, records: Records) -> list[list[Any]]:
    """`TABLE_ROWS` of the records as rows: step, kind, prompt, completion, answer,
    reward, and the advantage or whether it is correct. None for most steps of
    training."""
    if split == "train" and step != 1 and step % 10:
        return []
    count = min(TABLE_ROWS, len(records))
    shown = [records[i * len(records) // count] for i in range(count)]
    names = ("kind", "prompt", "completion", "answer", "reward")
    return [
        [
            step,
            *(_plain(record.get(name)) for name in names),
            record.get("advantage", record.get("correct")),
        ]
        for record in shown
    ]


def _plain(value: Any) -> float | int | str | None:
    """Numbers as they are, everything else as text that can be written as UTF-8."""
    if value is None or isinstance(value, int | float):
        return value
    text = str(value).encode("utf-8", "replace").decode()
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]} …"


def _parts(items: Sequence, size: int) -> Iterator[list]:
    """The items, at most `size` at a time."""
    for begin in range(0, len(items), size):
        yield list(items[begin : begin + size])


def _markdown(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown, whose cells are text and nothing else."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value: Any) -> str:
    text = html.escape(str(_plain(value))).replace("|", "&#124;")
    return re.sub(r"([\\`*_\[\]#~])", r"\\\1", text).replace("\n", "<br>")


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
