"""Whole runs that tell a tracker what they measure, and go on. Trackers that are not
installed are skipped."""

import importlib
import json

import pytest
import tensorboard_events
import waiting
from short_run import GRPO, make_config, mean_id

import jaxrl_llm
from jaxrl_llm.rewards import RewardFunction
from jaxrl_llm.training.build import build
from jaxrl_llm.training.loop import run

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
REWARD = "critic/rewards/mean"
# What they log is of these steps: two, and one more when the run goes on.
STEPS = [1, 2, 3]


OFFLINE = ("sft", "rm", "dpo")


def offline(verb, model, directory, tracker, steps):
    """What learns from rows, so many steps of it."""
    answers = {"completion": "abc"}
    if verb != "sft":
        answers = {"chosen": "abc", "rejected": "xyz"}
    rows = [{"prompt": f"{i} says:", **answers} for i in range(12)]
    learn = {"sft": jaxrl_llm.sft, "rm": jaxrl_llm.reward_model, "dpo": jaxrl_llm.dpo}
    return learn[verb](
        model,
        rows[:8],
        val_rows=rows[8:],
        steps=steps,
        output_dir=directory,
        settings={
            "data.train_batch_size": 2,
            "data.max_length": 16,
            "trainer.loggers": [tracker],
            "trainer.project": "tracked",
            "trainer.save_freq": 1,
            "trainer.test_freq": 1,
            "trainer.save_hf": False,
        },
    )


@pytest.fixture
def tracked(tiny_model, tmp_path, monkeypatch):
    """Trains two steps with a tracker, goes on for a third, and returns the id."""
    monkeypatch.chdir(tmp_path)

    def train(tracker, verb="train"):
        if verb != "train":
            for steps in (2, 3):
                offline(verb, tiny_model, tmp_path / "run", tracker, steps)
            path = tmp_path / "run" / "tracking_id"
            return path.read_text().strip() if path.exists() else None
        changed = {
            "trainer.loggers": [tracker],
            "trainer.project": "tracked",
            "trainer.save_freq": 1,
            "data.val.path": str(tmp_path / "held_out.jsonl"),
            "trainer.test_freq": 1,
        }
        rows = [{"prompt": f"{i} asks", "answer": ""} for i in range(2)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "held_out.jsonl").write_text(text)
        ids = []
        for steps in (2, 3):
            changed["trainer.total_training_steps"] = steps
            config = make_config(tiny_model, tmp_path, **GRPO | changed)
            reward = RewardFunction(name="mean_id", function=mean_id)
            made = run(build(config, [reward])).directory
            # TensorBoard has none: its files are the run's.
            path = made / "tracking_id"
            ids.append(path.read_text().strip() if path.exists() else None)
        assert made == tmp_path / "run" and ids[0] == ids[1]
        return ids[0]

    return train


def test_tensorboard_has_every_step_once(tracked, tmp_path):
    pytest.importorskip("tensorboardX")
    tracked("tensorboard")
    found = list(tensorboard_events.read(tmp_path / "run/tensorboard"))
    assert [step for step, value in found if value.tag == REWARD] == STEPS
    texts = {
        (value.tag.removesuffix("/text_summary"), step)
        for step, value in found
        if value.HasField("tensor")
    }
    assert ("completions/train", 1) in texts
    assert {("completions/val", step) for step in (0, *STEPS)} <= texts


@pytest.mark.parametrize("verb", OFFLINE)
def test_tensorboard_has_what_learns_from_rows(verb, tracked, tmp_path):
    pytest.importorskip("tensorboardX")
    tracked("tensorboard", verb)
    found = list(tensorboard_events.read(tmp_path / "run/tensorboard"))
    for tag, steps in (
        (f"{verb}/loss", STEPS),
        (f"val-core/all/{verb}/loss", [0, *STEPS]),
    ):
        assert [step for step, value in found if value.tag == tag] == steps


@pytest.mark.parametrize("verb", OFFLINE)
def test_wandb_offline_has_what_learns_from_rows(verb, tracked, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    id = tracked("wandb", verb)
    parts = sorted((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))
    assert len(parts) == 2 and all(part.stem == f"run-{id}" for part in parts)
    for part in parts:
        text = f"val-core/all/{verb}/loss".encode()
        waiting.until(lambda part=part, text=text: text in part.read_bytes())


@pytest.mark.parametrize("verb", OFFLINE)
def test_mlflow_has_what_learns_from_rows(verb, tracked, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    id = tracked("mlflow", verb)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("tracked").experiment_id
    (found,) = client.search_runs([experiment])
    assert found.data.tags["jaxrl_llm.run"] == id
    assert found.info.status == "FINISHED"
    history = client.get_metric_history(found.info.run_id, f"{verb}/loss")
    assert sorted(metric.step for metric in history) == STEPS


def test_wandb_offline_has_one_run_in_two_parts(tracked, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    id = tracked("wandb")
    parts = sorted((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))
    assert len(parts) == 2 and all(part.stem == f"run-{id}" for part in parts)
    # wandb's own process may write the file a moment after the run has ended.
    for part in parts:
        for text in (REWARD.encode(), b"completions/val"):
            waiting.until(lambda part=part, text=text: text in part.read_bytes())
    tables = (tmp_path / "run/wandb").glob("offline-run-*/files/media/table/**/*.json")
    assert any("completions" in str(table) for table in tables)


def test_mlflow_has_one_run_with_every_step_and_its_tables(
    tracked, tmp_path, monkeypatch
):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    id = tracked("mlflow")
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("tracked").experiment_id
    (found,) = client.search_runs([experiment])
    assert found.data.tags["jaxrl_llm.run"] == id
    assert found.info.status == "FINISHED"
    assert found.data.tags["changed.trainer.total_training_steps"] == "3"
    history = client.get_metric_history(found.info.run_id, REWARD)
    assert sorted(metric.step for metric in history) == STEPS
    share = "val-core/all/acc/greedy"
    assert {share, f"{share}_ci95_low"} <= found.data.metrics.keys()
    paths = {
        one.path for one in client.list_artifacts(found.info.run_id, "completions")
    }
    assert paths == {
        "completions/train_000001.json",
        *(f"completions/val_{step:06d}.json" for step in (0, *STEPS)),
    }
    place = client.download_artifacts(found.info.run_id, "completions/val_000003.json")
    with open(place) as file:
        shown = json.load(file)
    assert "completion" in shown["columns"] and shown["data"]


def test_trackio_has_one_run_with_every_step(tracked, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    trackio = pytest.importorskip("trackio")
    id = tracked("trackio")
    (found,) = trackio.Api().runs("tracked")
    assert found.name == f"run-{id}"
    # Where its data lies only its own module says.
    store = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
    lines = store.get_logs("tracked", found.name)
    assert [line["step"] for line in lines if REWARD in line] == STEPS
    assert any("completions/train" in line for line in lines)
