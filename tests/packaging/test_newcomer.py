"""What a newcomer does: an empty folder, the wheel, and nothing of ours beside it."""

import json
import os
import pathlib
import signal
import subprocess

import installed
import pytest
import waiting

pytestmark = pytest.mark.slow

REWARD = '''
import pathlib
import time

calls = 0


def low_bytes(completion_ids, **columns):
    """The share of tokens with an id below 100."""
    global calls
    calls += 1
    while calls > 4 and pathlib.Path("wait").exists():
        pathlib.Path("waiting").touch()
        time.sleep(0.01)
    return [sum(id < 100 for id in ids) / len(ids) for ids in completion_ids]
'''
RUN = """
output_dir: runs/mine
model: {path: model}
data:
  train: {path: train.jsonl}
  val: {path: val.jsonl}
  train_batch_size: 4
  max_prompt_length: 48
rollout: {n: 8, max_response_length: 8, decode_chunk: 8, dtype: float32}
actor:
  dtype: float32
  remat: none
  optim: {lr: 0.02, weight_decay: 0.0}
reward:
  functions: [{name: "mine:low_bytes"}]
val: {n: 2, threshold: 0.7}
trainer: {total_training_steps: 8, save_freq: 1, test_freq: 4}
"""
SUMS = [{"prompt": f"{i}+{i + 1}=", "answer": str(2 * i + 1)} for i in range(13)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model):
    """What the newcomer has written: a model, questions, a reward, a configuration."""
    path = tmp_path_factory.mktemp("newcomer")
    (path / "model").symlink_to(tiny_model)
    for name, rows in (("train", SUMS[:10]), ("val", SUMS[10:])):
        lines = [json.dumps(row) + "\n" for row in rows]
        (path / f"{name}.jsonl").write_text("".join(lines))
    (path / "mine.py").write_text(REWARD)
    (path / "run.yaml").write_text(RUN)
    return path


def steps(folder):
    """The metrics of each step that the run has written."""
    lines = (folder / "runs/mine/metrics.jsonl").read_text().splitlines()
    return {row["step"]: row for row in map(json.loads, lines)}


def test_from_an_empty_folder_to_a_better_model(python, folder):
    jaxrl = str(pathlib.Path(python).with_name("jaxrl"))
    env = {"JAX_PLATFORMS": "cpu", "COLUMNS": "120"}

    def said(*arguments):
        return installed.run(jaxrl, *arguments, cwd=folder, env=env)

    assert said("init", "quickstart", "notes").startswith("notes/quickstart.yaml\n")
    said("train", "run.yaml", "--dry-run")
    assert not (folder / "runs").exists()

    # Stopped in the middle, the same command goes on.
    (folder / "wait").touch()
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    train = [jaxrl, "train", "run.yaml"]
    with subprocess.Popen(train, cwd=folder, env=kept | env) as run:
        waiting.until(lambda: (folder / "waiting").exists() or run.poll() is not None)
        run.send_signal(signal.SIGTERM)
        assert run.wait() == 75
    (folder / "wait").unlink()
    before = steps(folder)
    assert 0 < max(before) < 8
    said("train", "run.yaml")
    after = steps(folder)
    assert set(after) == set(range(9))
    assert all(after[step] == row for step, row in before.items())
    key = "val-core/all/reward/mean@2"
    assert after[8][key] > after[0][key] + 0.1

    report = folder / said("report", "runs/mine").strip()
    assert report.name == "report.html" and "mine:low_bytes" in report.read_text()
    weights = "runs/mine/huggingface"
    shown = said("evaluate", "run.yaml", "--model.path", weights)
    assert "val-core/all/acc/mean@2" in shown
    shown = said("generate", "--model", weights, "--prompts", "1+2=", "--n", "2")
    assert "1.1 " in shown and "1.2 " in shown
    answers = "generate", "--model", "runs/mine", "--file", "val.jsonl"
    said(*answers, "--out", "answers.jsonl", "--n", "2")
    lines = (folder / "answers.jsonl").read_text().splitlines()
    told = [(line["answer"], line["sample"]) for line in map(json.loads, lines)]
    assert told == [(row["answer"], i) for row in SUMS[10:] for i in range(2)]

    # A shorter run, beside the first: in a page, and in a table.
    other = "--output_dir=runs/short", "--trainer.total_training_steps=1"
    said("train", "run.yaml", *other)
    page = said("report", "runs/mine", "runs/short", "--out", "both.html").strip()
    assert all(name in (folder / page).read_text() for name in ("mine", "short"))
    models = "model", "runs/mine", "runs/short/checkpoints/1"
    shown = said("evaluate", "run.yaml", "--models", *models)
    assert all(name in shown for name in models)
    found = json.loads((folder / "runs/mine/eval.json").read_text())["models"]
    assert [one["model"] for one in found] == [*models]
    # The runs' own validations asked the same questions with the same seed.
    numbers = [one["metrics"][key] for one in found[:2]]
    assert numbers == pytest.approx([after[0][key], after[8][key]], abs=1e-5)

    # A run that is done stays as it is.
    said("train", "run.yaml")
    assert steps(folder) == after
