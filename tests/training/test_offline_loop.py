"""Whole runs of supervised fine-tuning on a tiny model: they learn, stop and go on."""

import dataclasses
import json
import pathlib
import re
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import waiting

import jaxrl_llm
from jaxrl_llm import cli, models
from jaxrl_llm.config import parsing
from jaxrl_llm.config.schema_offline import SftConfig
from jaxrl_llm.planning import offline_dry_run
from jaxrl_llm.tracking import metric_table, run_directory
from jaxrl_llm.tracking.result import Result
from jaxrl_llm.training import evaluation, offline_loop
from jaxrl_llm.training.checkpoint import Checkpoints
from jaxrl_llm.training.offline_build import build
from jaxrl_llm.training.sft import SftTask

STEPS = 4
ROWS = [
    {"prompt": f"{i} and {j}:", "completion": "abc"[: 1 + i % 3]}
    for i in range(6)
    for j in range(6)
]
RL = {
    "output_dir": "none",
    "data": {"train": {"path": "none"}},
    "reward": {"functions": [{"name": "exact"}]},
    "trainer": {"total_training_steps": 1},
}
SETTINGS = {
    "data.train_batch_size": 8,
    "data.max_length": 16,
    "learner.optim.lr": 1e-2,
    "learner.dtype": "float32",
    "learner.remat": "none",
    "learner.mesh": {"data": 2, "fsdp": 4},
    "trainer.save_freq": 2,
    "trainer.test_freq": 2,
}


def trained(model, directory, **changed):
    return jaxrl_llm.sft(
        model,
        ROWS[:30],
        val_rows=ROWS[30:],
        steps=STEPS,
        output_dir=directory,
        settings=SETTINGS | changed,
    )


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    return trained(tiny_model, tmp_path_factory.mktemp("sft") / "run")


def config_of(result):
    return parsing.load(result.directory / "config.yaml", schema=SftConfig)


def state_of(result):
    job = build(config_of(result), SftTask())
    with Checkpoints(result.directory / "checkpoints", 2) as checkpoints:
        return jax.device_get(checkpoints.restore(job.abstract_state()).state)


def lines_of(result):
    """The metrics of each step, without times."""
    return [
        {k: v for k, v in line.items() if not k.startswith(("timing_s/", "perf/"))}
        for line in run_directory.read(result.directory)
    ]


def test_training_and_held_out_loss_fall(finished):
    table = finished.table()
    assert table["sft/loss"][STEPS] < table["sft/loss"][1] - 1
    held_out = table["val-core/all/sft/loss"].dropna()
    assert [*held_out.index] == [0, 2, STEPS] and held_out[STEPS] < held_out[0] - 1
    assert (table["sft/update_skipped"][1:] == 0).all()
    learned = table["training/learned_tokens"][1:]
    assert (learned >= 2 * 8).all() and (learned <= 4 * 8).all()  # stop tokens too
    assert [name for name in table if not metric_table.find(name)] == []


def test_the_trained_weights_are_those_of_the_checkpoint(finished, tiny_model):
    exported, before = models.load(finished.weights), models.load(tiny_model)
    for got, wanted, old in zip(
        *map(jax.tree.leaves, (exported.params, state_of(finished).params)),
        jax.tree.leaves(before.params),
        strict=True,
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-2, atol=1e-6)  # bfloat16
        assert not np.array_equal(wanted, old)
    card = (finished.weights / "README.md").read_text()
    assert "| task | `sft` |" in card
    assert (finished.directory / "report.html").read_text().count("<html") == 1
    titles = [axes.get_title() for axes in finished.plot().axes]
    assert titles == ["training loss", "held-out loss"]
    assert "held-out loss" in finished._repr_html_()


def test_others_read_what_a_checkpoint_has_learned(finished, tmp_path):
    newest = finished.directory / "checkpoints" / str(STEPS)
    cli.convert(str(newest), str(tmp_path / "out"), dtype="float32")
    got, wanted = models.load(tmp_path / "out").params, state_of(finished).params
    jax.tree.map(np.testing.assert_array_equal, got, wanted)
    assert "| task | `sft` |" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ValueError, match="has no adapters to merge; leave out --merge"):
        cli.convert(str(newest), str(tmp_path / "none"), merge=True)
    rl = parsing.parse({"model": {"path": "another"}, **RL}, "test")
    asked, path = evaluation.model_of(str(newest), rl)
    assert path == newest and asked.model.path == config_of(finished).model.path


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit(finished, tiny_model, tmp_path):
    directory = tmp_path / "run"
    stopped = trained(tiny_model, directory, **{"trainer.max_hours": 1e-9})
    assert stopped.stopped and stopped.after is None
    assert [line["step"] for line in lines_of(stopped)] == [0, 1]
    done = trained(tiny_model, directory)
    assert not done.stopped and lines_of(done) == lines_of(finished)
    for a, b in zip(
        *map(jax.tree.leaves, (state_of(done), state_of(finished))), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_a_dry_run_says_what_the_run_would_be(finished, capsys):
    job = build(config_of(finished), SftTask())
    before = sorted(finished.directory.rglob("*"))
    assert offline_dry_run.show(job)
    said = " ".join(capsys.readouterr().out.split())
    assert "training rows │ 30" in said and "held-out rows │ 6" in said
    assert f"is complete after {STEPS} steps" in said
    assert "gradients, activations" in said
    assert sorted(finished.directory.rglob("*")) == before
    changed = dataclasses.replace(job, inputs={"train": {"the text": "other"}})
    with pytest.raises(ValueError, match="the text of the rows in .* has changed"):
        offline_loop.run(changed)


def test_a_finished_run_says_that_nothing_is_trained(finished, tiny_model, capsys):
    before = (finished.directory / "metrics.jsonl").read_text()
    trained(tiny_model, finished.directory)
    assert "nothing is trained" in capsys.readouterr().out
    assert (finished.directory / "metrics.jsonl").read_text() == before
    with pytest.raises(ValueError, match="learner.optim.lr was 0.01, is 0.1"):
        trained(tiny_model, finished.directory, **{"learner.optim.lr": 0.1})


def config(model, directory, **changed):
    """A file for `jaxrl sft`, as it is written there."""
    rows = directory / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    values = {
        "output_dir": str(directory / "run"),
        "model": {"path": model},
        "data": {"train": {"path": str(rows)}, "train_batch_size": 8, "max_length": 16},
    }
    for key, value in changed.items():
        parsing.put(values, key.split("__"), value)
    path = directory / "sft.yaml"
    path.write_text(json.dumps(values))
    return path


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"data__train_batch_size": 99}, "is 99 but there are 36 training rows"),
        ({"data__max_length": 4}, r"row 0 .* it has 10 tokens, data.max_length is 4"),
        ({"learner__pack_length": 8}, "learner.pack_length is 8 but data.max_length"),
        ({"learner__optm": 1}, "learner.optm: unknown key; did you mean 'optim'"),
        ({"data__val_prompts": {"path": "q.jsonl"}}, "reward.functions is empty"),
        ({"data__end_of_turn": "nobody"}, "data.end_of_turn is 'nobody', which is no"),
        ({"data__max_length": 99999}, "is over the model's"),
        ({"trainer__total_training_steps": 0}, "total_training_steps: .*greater than"),
        ({"learner__optim__lr_warmup_steps": 9}, "lr_warmup_steps is 9, .* are 5 st"),
        ({"learner__mesh": {"fsdp": 3}}, "learner.mesh"),
        ({"task": "rlhf"}, "task: .*'sft'"),
    ],
)
def test_what_cannot_work_is_one_line_of_advice(
    changed, said, tiny_model, tmp_path, capsys
):
    path = config(tiny_model, tmp_path, **changed)
    assert cli.main(["sft", str(path), "--dry-run"]) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert re.search(said, shown), shown
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_each_verb_reads_its_own_files(tiny_model, tmp_path, capsys):
    path = config(tiny_model, tmp_path, task="sft")
    assert cli.main(["train", str(path)]) == 2
    assert "task is sft, which `jaxrl sft` reads" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    kept = {
        "output_dir": "x",
        "model": {"path": "m"},
        "reward": {"model": {"path": "r"}},
    }
    kept |= {"data": {"train": {"path": "q"}}, "trainer": {"total_training_steps": 1}}
    (tmp_path / "run" / "config.yaml").write_text(json.dumps(kept))
    assert cli.main(["sft", str(path)]) == 2
    assert "holds a run of `jaxrl train`, which" in capsys.readouterr().err


def test_an_argument_that_is_a_setting_says_which():
    with pytest.raises(TypeError, match="sft.. has no argument 'lr'; write .*learner"):
        jaxrl_llm.sft("m", ROWS, lr=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed",
    [
        {"learner.mesh": {"data": 1, "fsdp": 2, "tensor": 4}},
        {"learner.mesh": {"fsdp": 2, "context": 2, "tensor": 2}},
        {"learner.pack_length": 64, "learner.micro_batch_size": 8},
        {"learner.mesh": {"data": 1, "fsdp": 8}, "learner.remat": "full"},
    ],
)
def test_meshes_and_packing_make_no_difference(finished, tiny_model, tmp_path, changed):
    found = trained(tiny_model, tmp_path / "run", **changed)
    for one, other in zip(lines_of(found), lines_of(finished), strict=True):
        for name, value in one.items():
            np.testing.assert_allclose(value, other[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_held_out_questions_are_answered(tiny_model, tmp_path):
    questions = [{"prompt": row["prompt"]} for row in ROWS[30:]]

    def shows_a(completions, **columns):
        return [float("a" in text) for text in completions]

    found = jaxrl_llm.sft(
        tiny_model,
        ROWS,
        val_prompts=questions,
        reward=shows_a,
        epochs=8,
        output_dir=tmp_path / "run",
        settings=SETTINGS
        | {"rollout.max_response_length": 4, "rollout.dtype": "float32"},
    )
    accuracy = "val-core/all/acc/greedy"
    assert found.after.metrics[accuracy] > 0.9 > found.before.metrics[accuracy]
    assert pathlib.Path(found.directory, "checkpoints").is_dir()
    evaluated = jaxrl_llm.evaluate(found, questions, shows_a, max_tokens=4)
    assert evaluated.metrics[accuracy] == found.after.metrics[accuracy]


@pytest.mark.slow
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 75), (signal.SIGKILL, -9)])
def test_a_process_that_is_ended_goes_on_bit_for_bit(
    number, status, tiny_model, tmp_path
):
    def command(folder):
        folder.mkdir()
        how = {"trainer__total_training_steps": 300, "trainer__save_freq": 5}
        return [sys.executable, "-m", "jaxrl_llm", "sft", str(
            config(tiny_model, folder, learner__dtype="float32", **how)
        )]  # fmt: skip

    whole, ended = command(tmp_path / "whole"), command(tmp_path / "ended")
    subprocess.run(whole, check=True, capture_output=True)
    run = tmp_path / "ended" / "run"
    process = subprocess.Popen(ended, stdout=subprocess.DEVNULL)
    waiting.until(lambda: (run / "checkpoints" / "10").is_dir())
    process.send_signal(number)
    assert process.wait() == status
    reached = run_directory.read(run)[-1]["step"]
    assert reached < 300
    subprocess.run(ended, check=True, capture_output=True)
    done, wanted = (Result(tmp_path / n / "run") for n in ("ended", "whole"))
    assert lines_of(done) == lines_of(wanted)
    for a, b in zip(
        *map(jax.tree.leaves, (state_of(done), state_of(wanted))), strict=True
    ):
        np.testing.assert_array_equal(a, b)
