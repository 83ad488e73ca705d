"""Where metrics go besides the run directory. Services that are not installed are
skipped; what they are told is looked at in a recorder, too."""

import importlib
import sys
import types

import numpy as np
import pytest
import tensorboard_events
import waiting

from jaxrl_llm.tracking import metric_table, run_directory
from jaxrl_llm.tracking import services as loggers

HOSTILE = "a|b\n<script>`x`</script> **# \ud800"
RECORDS = [
    {
        "kind": "train",
        "prompt": "2+2?",
        "completion": HOSTILE,
        "answer": 4,
        "reward": float(sample),
        "advantage": sample - 1.5,
        "num_tokens": 3 + sample,
    }
    for sample in range(4)
]


def writer(run_dir, *names, **config):
    config = {"seed": 3, **config}
    return run_directory.MetricsWriter(
        run_dir, names, "project", config, tags=["mine", "grpo"]
    )


def test_tensorboard_gets_numbers_distributions_and_completions(tmp_path):
    pytest.importorskip("tensorboardX")
    with writer(tmp_path, "tensorboard") as w:
        w.write_rollouts(1, "train", RECORDS)
        w.write(1, {"val-core/all/acc/mean@8": 0.5, "loss": 2.0})
        w.rewind(0)
        w.write(1, {"loss": 3.0})
    found = [
        (value.tag, step, value)
        for step, value in tensorboard_events.read(tmp_path / "tensorboard")
    ]
    numbers = {
        (tag, step, value.simple_value)
        for tag, step, value in found
        if value.HasField("simple_value")
    }
    assert numbers == {
        ("val-core/all/acc/mean_at_8", 1, 0.5),
        ("loss", 1, 2.0),
        ("loss", 1, 3.0),
    }
    rewards = next(v.histo for tag, _, v in found if tag == "histograms/train/reward")
    assert (rewards.num, rewards.sum, rewards.max) == (4, 6.0, 3.0)
    texts = {
        tag.removesuffix("/text_summary"): value.tensor.string_val[0].decode()
        for tag, _, value in found
        if value.HasField("tensor")
    }
    assert texts["tags"] == "mine, grpo" and "| seed | 3 |" in texts["settings"]
    shown = texts["completions/train"].splitlines()
    assert len(shown) == 2 + 4 and all(line.count("|") == 8 for line in shown)
    assert "<script>" not in texts["completions/train"]


@pytest.mark.filterwarnings("default")
def test_wandb_gets_every_step_offline_under_one_id(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for steps in (5, 9):  # a setting that may change when the run goes on
        with writer(tmp_path, "wandb", steps=steps) as w:
            w.write_rollouts(steps, "val", RECORDS)
            w.write(steps, {"val-core/all/acc/mean@8": 0.5})
    id = (tmp_path / "tracking_id").read_text().strip()
    first, second = (tmp_path / "wandb").glob(f"offline-run-*-{id}/*.wandb")
    # wandb's own process may write the file a moment after `finish` returns.
    for text in (b"val-core/all/acc/mean@8", b"completions/val", b"histograms/val/rew"):
        waiting.until(lambda text=text: text in first.read_bytes())
        waiting.until(lambda text=text: text in second.read_bytes())


@pytest.mark.filterwarnings("default")
def test_mlflow_gets_parameters_numbers_and_tables_in_one_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    many = {f"key{i}": i for i in range(150)}
    for step in (1, 2):
        with writer(tmp_path / "run", "mlflow", steps=step, **many) as w:
            w.write_rollouts(step, "train", RECORDS)
            # With its interval: a store of files cannot have one name below another.
            w.write(step, {"mean@8": 0.25 + 0.25 * step, "mean@8/ci95_low": 0.1})
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("project").experiment_id
    (run,) = client.search_runs([experiment])
    params = {key: str(value) for key, value in many.items()}
    assert run.data.params == {"seed": "3", "steps": "1", **params}
    assert run.data.tags["changed.steps"] == "2" and run.info.status == "FINISHED"
    assert run.data.tags["tags"] == "mine, grpo"
    history = client.get_metric_history(run.info.run_id, "mean_at_8")
    assert [(m.step, m.value) for m in history] == [(1, 0.5), (2, 0.75)]
    (shown,) = client.list_artifacts(run.info.run_id, "completions")
    assert shown.path == "completions/train_000001.json"
    assert shown.path in run.data.tags["mlflow.loggedArtifacts"]


@pytest.mark.filterwarnings("default")
def test_trackio_goes_on_with_its_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    trackio = pytest.importorskip("trackio")
    monkeypatch.chdir(tmp_path)
    for step in (1, 2):
        with writer(tmp_path / "run", "trackio") as w:
            w.write_rollouts(step, "val", RECORDS)
            w.write(step, {"mean@8": 0.25 + 0.25 * step})
    (run,) = trackio.Api().runs("project")
    assert run.name == f"run-{loggers.run_id(tmp_path / 'run')}"
    assert run.config["tags"] == ["mine", "grpo"]
    # Where its data lies only its own module says.
    store = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
    lines = [one for one in store.get_logs("project", run.name) if "mean@8" in one]
    assert [(line["step"], line["mean@8"]) for line in lines] == [(1, 0.5), (2, 0.75)]


class Recorder(types.ModuleType):
    """Stands for a package: `init` begins a run, whose calls it keeps."""

    def __init__(self, name):
        super().__init__(name)
        self.begun, self.logged = [], []

    def init(self, **how):
        self.begun.append(how)
        return self

    def log(self, values, **how):
        self.logged.append((how.get("step", values.get("step")), values))

    def define_metric(self, *_, **__):
        pass

    def finish(self):
        pass

    def Histogram(self, values):  # noqa: N802 - the packages' name
        return sorted(values)

    def Table(self, columns=None, data=()):  # noqa: N802
        return [list(row.values()) if isinstance(row, dict) else row for row in data]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_run_that_goes_on_is_the_same_run(tmp_path, monkeypatch, name):
    package = Recorder(name)
    monkeypatch.setitem(sys.modules, name, package)
    for step in (10, 11):
        with writer(tmp_path / "run", name) as w:
            w.write_rollouts(step, "train", RECORDS)
            w.write(step, {"loss": 0.5})
    with writer(tmp_path / "other" / "run", name):
        pass
    first, second, other = (how.get("id", how["name"]) for how in package.begun)
    assert first == second != other
    assert loggers.run_id(tmp_path / "run") in first
    assert {how["resume"] for how in package.begun} == {"allow"}
    how = package.begun[0]
    assert how.get("tags", how["config"].get("tags")) == ["mine", "grpo"]
    assert [step for step, _ in package.logged] == [10, 10, 11, 11]
    shown = package.logged[0][1]
    assert shown["histograms/train/advantage"] == [-1.5, -0.5, 0.5, 1.5]
    table = shown["completions/train"]
    assert len(table) == 4 and all(len(row) == 7 for row in table)
    assert table[3][3] == HOSTILE.replace("\ud800", "?")
    assert "completions/train" not in package.logged[2][1], "every tenth step only"


def test_an_id_that_is_torn_is_drawn_anew(tmp_path):
    drawn = loggers.run_id(tmp_path)
    assert loggers.run_id(tmp_path) == drawn and len(drawn) == 8
    (tmp_path / "tracking_id").write_text(drawn[:3])
    assert len(loggers.run_id(tmp_path)) == 8


def test_of_many_and_long_completions_a_table_has_some_of_each():
    many = [
        {**RECORDS[0], "prompt": str(i), "completion": "x" * 5000} for i in range(64)
    ]
    rows = loggers.table(20, "val", many)
    assert [row[2] for row in rows] == [str(2 * i) for i in range(32)]
    assert rows[0][3] == "x" * loggers.MAX_CHARACTERS + " …"
    assert loggers.table(20, "val", []) == [] == loggers.table(19, "train", many)


def test_distributions_are_of_what_is_finite():
    records = [{"reward": 1.0, "num_tokens": 2}, {"reward": np.nan, "num_tokens": 3}]
    found = loggers.distributions("val", records)
    assert {name: list(values) for name, values in found.items()} == {
        "histograms/val/reward": [1.0],
        "histograms/val/length": [2.0, 3.0],
    }


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow", "trackio"])
def test_a_missing_logger_is_an_error_before_anything_is_written(
    tmp_path, monkeypatch, name
):
    package = {"tensorboard": "tensorboardX"}.get(name, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{name}.*jaxrl-llm\[tracking\]"):
        writer(tmp_path / "run", name)
    assert not (tmp_path / "run").exists()


def test_an_unknown_logger_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match="'print'; known: tensorboard, wandb"):
        loggers.find("print")


def test_no_metric_of_mlflow_lies_below_another():
    names = {loggers.mlflow_name(metric.name) for metric in metric_table.METRICS}
    assert not [n for n in names for at in names if n.startswith(f"{at}/")]
    assert loggers.mlflow_name("a/mean@8/ci95_low") == "a/mean_at_8_ci95_low"


def test_nested_settings_become_dotted_names():
    assert loggers.flat({"a": {"b": 1, "c": {}}, "d": [2]}) == {
        "a.b": 1,
        "a.c": {},
        "d": [2],
    }
