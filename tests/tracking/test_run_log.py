"""What a run log leaves behind of what it is told."""

import json
import threading

import numpy as np
import pytest
from waiting import until

from jaxrl_llm.data.types import Completion, Generated, Prompt, Scores, single_turn
from jaxrl_llm.rewards.scoring import join
from jaxrl_llm.tracking import report, run_directory
from jaxrl_llm.tracking.performance import Devices
from jaxrl_llm.tracking.run_log import RunLog
from jaxrl_llm.tracking.step_metrics import Validation

PROMPT = Prompt(id=5, content="2+2?", tokens=(1, 2, 3), columns={"answer": "4"})
ROLLOUTS = single_turn(
    [
        [
            Completion(
                prompt_id=5,
                sample=sample,
                tokens=np.arange(length, dtype=np.int32),
                logprobs=np.zeros(length, np.float32),
                raw_logprobs=None,
                finish_reason="stop",
                weight_version=0,
                text="4",
            )
            for sample, length in enumerate((2, 4))
        ]
    ]
)
SCORES = Scores(
    total=np.array([[1, 0]], np.float32),
    by_function={"exact": np.array([[1, 0]], np.float32)},
    errors={"exact": 0},
)
DEVICES = Devices(count=2, updating=1, peak_flops=None)
GENERATED = Generated(asked=[PROMPT], rollouts=ROLLOUTS, scores=SCORES)


def log(directory, writes=True, devices=DEVICES):
    return RunLog(
        directory,
        config={"seed": 3},
        devices=devices,
        total_steps=2,
        num_examples=0,
        loggers=[],
        project="project",
        profile=None,
        writes=writes,
    )


def take(log, step, generated=None, **more):
    log.rollouts(
        step,
        [PROMPT],
        ROLLOUTS,
        SCORES,
        np.array([[0.5, -0.5]], np.float32),
        generated or GENERATED,
        epoch=0.25 * step,
        update_flops=1.0,
        **more,
    )


def tell(log, step, generated=None, **more):
    log.begin(step)
    with log.phase("gen"):
        pass
    take(log, step, generated, **more)
    log.step(step, {"actor/pg_loss": 0.5})


def test_what_it_is_told_it_writes(tmp_path):
    with log(tmp_path) as told:
        told.start(0)
        told.step(
            0, {}, Validation(metrics={"val-core/all/acc/greedy": 0.5}, records=[])
        )
        tell(told, 1)
        tell(told, 2)
        told.end()
    lines = run_directory.read(tmp_path)
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert lines[0]["val-core/all/acc/greedy"] == 0.5
    assert lines[2]["actor/pg_loss"] == 0.5
    assert lines[2]["training/epoch"] == 0.5
    assert lines[2]["perf/total_num_tokens"] == 2 * 3 + 2 + 4
    assert (lines[2]["reward/exact/mean"], lines[2]["critic/rewards/mean"]) == (
        0.5,
        0.5,
    )
    assert {"timing_s/gen", "timing_s/step"} <= lines[2].keys()
    assert [(s, n) for s, n, _ in run_directory.rollout_files(tmp_path)] == [
        (0, "val"),
        (1, "train"),
        (2, "train"),
    ]
    assert (tmp_path / "report.html").exists()


def test_rewards_and_speeds_are_of_all_that_was_generated(tmp_path):
    dropped = Scores(
        total=np.array([[3, 3]], np.float32),
        by_function={"exact": np.array([[3, 3]], np.float32)},
        errors={"exact": 0},
    )
    all_of_it = Generated(
        asked=[PROMPT, PROMPT],
        rollouts=[*ROLLOUTS, *ROLLOUTS],
        scores=join([SCORES, dropped]),
        greedy=[ROLLOUTS[0][:1]],
    )
    with log(tmp_path) as told:
        told.start(0)
        with told.phase("update_actor"):
            pass
        tell(told, 1, all_of_it)
    (line,) = run_directory.read(tmp_path)
    assert line["critic/rewards/mean"] == 1.75  # (1 + 0 + 3 + 3) / 4
    assert line["critic/advantages/max"] == 0.5
    assert line["training/groups_all_equal"] == 0.5
    # Two groups of 2 + 4 new tokens and a greedy response of 2, behind prompts of 3.
    new, read, trained = 14, 15, 12
    assert line["perf/total_num_tokens"] == new + read
    rate = line["perf/rollout_tokens_per_s"] * line["timing_s/gen"]
    assert rate == pytest.approx(new)
    rate = line["perf/update_tokens_per_s"] * line["timing_s/update_actor"]
    assert rate == pytest.approx(trained)
    assert len(run_directory.rollout_files(tmp_path)) == 1


def test_of_many_processes_one_writes_and_prints(tmp_path, capsys):
    with log(tmp_path / "run", writes=False) as told:
        told.start(0)
        tell(told, 1)
        told.advise({"kind": "change something"})
        told.end()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_a_run_that_goes_on_says_so_and_drops_what_was_later(tmp_path, capsys):
    tmp_path /= "[sums]"
    with log(tmp_path) as told:
        told.start(0)
        tell(told, 1)
        tell(told, 2)
    with log(tmp_path) as told:
        told.start(1)
        told.end()
    said = capsys.readouterr().out.replace("\n", " ")
    assert f"going on from step 1 in {tmp_path}" in said
    assert "stopped after step 1 of 2; the same command goes on from there" in said
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1]


def test_advice_of_a_kind_is_given_once_and_kept(tmp_path, capsys):
    with log(tmp_path) as told:
        told.start(0)
        told.advise({})
        tell(told, 1)
        told.advise({"a": "step 1: use less", "b": "step 1: use more"})
        tell(told, 2)
        told.advise({"a": "step 2: use less", "c": "step 2: use none"})
    with log(tmp_path) as told:  # goes on after step 1
        told.start(1)
        told.advise({"a": "step 2: use less", "c": "step 2: use none"})
        tell(told, 2)
        told.end()
    said = capsys.readouterr().out
    assert said.count("note: step 1: use less") == said.count("use more") == 1
    assert "step 2: use less" not in said and said.count("use none") == 2
    kept = run_directory.advice(tmp_path)
    assert [(line["step"], line["kind"]) for line in kept] == [
        (1, "a"),
        (1, "b"),
        (1, "c"),
    ]
    assert "step 1: use more" in (tmp_path / "report.html").read_text()


def test_the_devices_are_named_first(tmp_path, capsys):
    devices = Devices(
        count=1, updating=1, peak_flops=None, description="a GPU", advice="use it"
    )
    with log(tmp_path, devices=devices) as told:
        with told.waiting("reading"):
            pass
        told.start(0)
    assert capsys.readouterr().out.splitlines()[0] == "a GPU"
    assert [line["text"] for line in run_directory.advice(tmp_path)] == ["use it"]


def test_why_a_run_has_stopped_is_in_its_report(tmp_path):
    with pytest.raises(ValueError), log(tmp_path) as told:
        told.start(0)
        tell(told, 1)
        raise ValueError("weights are gone")
    assert "stopped: weights are gone" in (tmp_path / "report.html").read_text()
    with log(tmp_path) as told:
        told.start(1)
    assert run_directory.advice(tmp_path) == []  # it goes on


def test_a_run_that_fails_is_not_shown_as_done(tmp_path, monkeypatch):
    shown = []
    with pytest.raises(RuntimeError), log(tmp_path) as told:
        told.start(0)
        monkeypatch.setattr(told._view, "phase", shown.append)
        raise RuntimeError
    assert shown == ["stopped"]


def test_the_report_is_there_from_the_first_validation_and_says_that_it_goes_on(
    tmp_path, monkeypatch
):
    written = []
    real = report.write

    def write(directory, **how):
        written.append((threading.current_thread().name, how["running"]))
        return real(directory, **how)

    monkeypatch.setattr(report, "write", write)
    with log(tmp_path) as told:
        told.start(0)
        told.step(0, {}, Validation(metrics={}, records=[]))
        until(lambda: (tmp_path / "report.html").exists())
        assert '"running":true' in (tmp_path / "report.html").read_text()
        tell(told, 1)
        told.end()
    assert '"running":false' in (tmp_path / "report.html").read_text()
    assert written == [("live report", True), ("MainThread", False)]


def test_what_is_known_of_tokens_is_written_with_their_response(tmp_path):
    details = {"text": ["4"], "advantage": [0.5], "logprob": [-1.0]}
    with log(tmp_path) as told:
        told.start(0)
        tell(told, 1, token_details=lambda: {1: details})
    records = run_directory.completions(tmp_path / "rollouts" / "train_000001.jsonl")
    assert [record.get("token_details") for record in records] == [None, details]


def test_rollouts_are_written_when_there_is_time_or_at_the_end_of_the_step_or_run(
    tmp_path,
):
    asked = []

    def details():
        asked.append(len(asked))
        return {}

    def steps():
        return [step for step, _, _ in run_directory.rollout_files(tmp_path)]

    with pytest.raises(RuntimeError, match="the update fails"):
        with log(tmp_path) as told:
            told.start(0)
            take(told, 1, token_details=details)
            assert (steps(), asked) == ([], [])
            told.write_rollouts()
            assert (steps(), asked) == ([1], [0])
            told.step(1, {})
            take(told, 2, token_details=details)
            told.step(2, {})
            assert (steps(), asked) == ([1, 2], [0, 1])
            take(told, 3, token_details=details)
            raise RuntimeError("the update fails")
    assert (steps(), asked) == ([1, 2, 3], [0, 1, 2])
    with log(tmp_path / "other", writes=False) as told:
        told.start(0)
        take(told, 1, token_details=details)
        told.step(1, {})
    assert asked == [0, 1, 2]  # who writes nothing looks for nothing
