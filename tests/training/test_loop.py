"""Whole runs of the tiny model, on eight simulated devices."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import waiting
import yaml
from learnable import PROMPTS, QUESTIONS, SAMPLES, STEPS

from jaxrl_llm import api, models
from jaxrl_llm import cli as launch
from jaxrl_llm.config import parsing
from jaxrl_llm.rewards import RewardError
from jaxrl_llm.tracking import metric_table, run_directory
from jaxrl_llm.tracking.result import Result
from jaxrl_llm.training.build import build
from jaxrl_llm.training.checkpoint import Checkpoints


def write_config(values, directory):
    path = directory.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({"output_dir": str(directory), **values}))
    return str(path)


@pytest.fixture(scope="module")
def finished(values, tmp_path_factory):
    """A run that nothing disturbed."""
    directory = tmp_path_factory.mktemp("runs") / "finished"
    assert launch.main(["train", write_config(values, directory)]) == 0
    return Result(directory)


def settings(values, **more):
    """The configuration as `api.train` takes it."""
    flat = {"data.train_batch_size": PROMPTS, "data.max_prompt_length": 48}
    for section in ("rollout", "actor", "val"):
        flat |= {f"{section}.{key}": value for key, value in values[section].items()}
    return flat | {name.replace("__", "."): value for name, value in more.items()}


def test_the_reward_rises(finished):
    rewards = finished.table()["critic/rewards/mean"].dropna()
    assert list(rewards.index) == list(range(1, STEPS + 1))
    # At first a token is one of 264, of which 100 are rewarded.
    assert abs(rewards[1] - 100 / 264) < 0.1
    assert rewards[STEPS] > rewards[1] + 0.15


def test_held_out_questions_show_it_too(finished):
    name = "val-core/all/reward/mean@2"
    assert finished.after.metrics[name] > finished.before.metrics[name] + 0.15
    measured = finished.table()[name].dropna()
    assert list(measured.index) == [0, 4, 8]
    assert measured[0] == finished.before.metrics[name]


def test_models_and_checkpoints_of_the_run_are_compared_in_one_table(
    finished, values, tiny_model, tmp_path, capsys
):
    # As somebody has it who has only the questions to answer.
    asked = {**values, "output_dir": str(tmp_path / "out")}
    asked["data"] = {k: v for k, v in values["data"].items() if k != "train"}
    del asked["trainer"]
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(asked))
    trained = str(finished.directory / "checkpoints" / str(STEPS))
    arguments = ["evaluate", str(tmp_path / "eval.yaml"), "--models"]
    assert launch.main([*arguments, tiny_model, trained]) == 0
    assert "change: from" in capsys.readouterr().out
    result = json.loads((tmp_path / "out/eval.json").read_text())
    first, second = result["models"]
    # What the run's own validations measured with the same weights.
    assert first["metrics"] == pytest.approx(finished.before.metrics)
    assert second["metrics"] == pytest.approx(finished.after.metrics)
    name = "val-core/all/acc/mean@2"
    between = second["differences_from_first"][name]
    change = finished.after.metrics[name] - finished.before.metrics[name]
    assert between["change"] == pytest.approx(change) and between["questions"] == 3
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("eval.json", "eval.jsonl"),
    }
    assert launch.main([*arguments, tiny_model, str(tmp_path / "nothing")]) == 2
    assert "no such directory" in capsys.readouterr().err


def test_trainer_and_sampler_agree_and_the_first_ratio_is_one(finished):
    table = finished.table().loc[1:]
    assert (table["mismatch/logprob_diff_max"] < 1e-4).all()
    assert (table["actor/ppo_kl"] == 0).all()
    assert (table["actor/pg_clipfrac"] == 0).all()
    assert (table["actor/update_skipped"] == 0).all()


def test_everything_is_there_and_reads_back(finished, values):
    run = finished.directory
    config = parsing.load(run / "config.yaml")
    assert config == parsing.parse({"output_dir": str(run), **values}, "values")
    assert json.loads((run / "versions.json").read_text())["num_devices"] == 8
    assert [line["step"] for line in run_directory.read(run)] == list(range(STEPS + 1))
    files = [(step, split) for step, split, _ in run_directory.rollout_files(run)]
    trained = [(step, "train") for step in range(1, STEPS + 1)]
    assert sorted(files) == sorted([*trained, (0, "val"), (4, "val"), (8, "val")])
    assert (run / "report.html").read_text().count("<html") == 1
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert set(kept) >= {"6", "8"} and len(kept) <= 3  # and the best
    assert not list(run.glob("**/*.tmp")) + list(run.glob("**/*.new"))
    assert [name for name in finished.table() if not metric_table.find(name)] == []


def test_every_response_is_written_with_its_reward(finished):
    records = finished.completions(3)
    assert len(records) == PROMPTS * SAMPLES
    assert [record["sample"] for record in records[:SAMPLES]] == list(range(SAMPLES))
    for record in records:
        assert record["reward"] == pytest.approx(
            tiny.small_ids([record["tokens"]])[0], rel=1e-6
        )
        assert record["weight_version"] == 2  # made by step 2
        question = QUESTIONS[record["prompt_id"]]
        assert (record["prompt"], record["answer"]) == tuple(question.values())
    table = finished.table()
    mean = np.mean([record["reward"] for record in records])
    assert table["critic/rewards/mean"][3] == pytest.approx(mean, rel=1e-6)
    lengths = np.mean([record["num_tokens"] for record in records])
    assert table["response_length/mean"][3] == pytest.approx(lengths)
    advantages = np.reshape([r["advantage"] for r in records], (PROMPTS, SAMPLES))
    np.testing.assert_allclose(advantages.mean(axis=1), 0, atol=1e-5)
    with pytest.raises(ValueError, match="no train completions of step 99; of"):
        finished.completions(99)


def final_params(result):
    """The weights of the newest checkpoint, as they are."""
    job = build(parsing.load(result.directory / "config.yaml"))
    with Checkpoints(result.directory / "checkpoints", 9) as checkpoints:
        step, state, _ = checkpoints.restore(job.abstract_state())
    assert step == state.actor.step == STEPS
    return jax.device_get(state.actor.params)


def test_the_trained_weights_load_again(finished, tiny_model):
    trained = models.load(finished.weights, dtype=jnp.bfloat16)
    before = models.load(tiny_model).params
    for (path, got), wanted, old in zip(
        jax.tree.leaves_with_path(trained.params),
        *map(jax.tree.leaves, (final_params(finished), before)),
        strict=True,
    ):
        np.testing.assert_array_equal(got, wanted.astype(jnp.bfloat16), str(path))
        assert not np.allclose(wanted, old, atol=1e-3), path
    assert trained.tokenizer.decode(trained.tokenizer("1+2=").input_ids) == "1+2="
    card = (finished.weights / "README.md").read_text()
    assert f"`{tiny_model}`" in card and f"| step | `{STEPS}` |" in card


def test_it_is_plotted(finished):
    titles = [axes.get_title() for axes in finished.plot().axes]
    assert titles[0] == "training reward" and len(titles) == 3


class Process:
    """`python -m jaxrl_llm train CONFIG`, like the run in this process.

    Its `stop_at`-th call of the reward function waits at the gate.
    """

    def __init__(self, config, cache, stop_at=0):
        self.gate = pathlib.Path(tempfile.mkdtemp(dir=cache.parent))
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "8",
            # A process that is killed may leave half a file behind.
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "GATE": f"{stop_at}:{self.gate}",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jaxrl_llm", "train", config],
            cwd=pathlib.Path(tiny.__file__).parent,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def stop_when(self, condition, number):
        """Sends the signal as soon as the condition holds; returns what was printed."""

        def holds():
            assert self.process.poll() is None, self.process.stdout.read()
            return condition()

        waiting.until(holds)
        self.process.send_signal(number)
        for waits in self.gate.iterdir():
            waits.unlink()
        return self.finish()

    def is_at_the_gate(self):
        return any(self.gate.iterdir())

    def finish(self):
        return self.process.communicate(timeout=600)[0]


def lines(run):
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def steps_on_disk(run):
    """Steps whose checkpoint exists, even if it is only being written."""
    return {int(path.name.split(".")[0]) for path in run.glob("checkpoints/*")}


def what_a_run_says(run):
    """All but how long things took."""
    return [
        {k: v for k, v in line.items() if not k.startswith(("timing_s/", "perf/"))}
        for line in run_directory.read(run)
    ]


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(finished, values, tmp_path):
    run = tmp_path / "killed"
    trainer = values["trainer"] | {"stop_grace_s": 300}
    config = write_config(values | {"trainer": trainer}, run)
    cache = tmp_path / "compiled"

    # In the middle of step 4, after two scores of the first validation and three of
    # steps; then while checkpoint 4 is being written, or has just been.
    process = Process(config, cache, stop_at=6)
    saved = run / "checkpoints" / "2"
    process.stop_when(
        lambda: process.is_at_the_gate() and saved.exists(), signal.SIGKILL
    )
    assert process.process.returncode == -signal.SIGKILL and lines(run) == 4
    process = Process(config, cache, stop_at=6)
    said = process.stop_when(lambda: max(steps_on_disk(run)) >= 4, signal.SIGKILL)
    assert process.process.returncode == -signal.SIGKILL

    # Asked to stop, it ends the step, saves, and says how to go on.
    process = Process(config, cache, stop_at=2)
    said = process.stop_when(process.is_at_the_gate, signal.SIGTERM)
    assert process.process.returncode == 75, said
    assert "SIGTERM: stopping after this step" in said
    last = run_directory.read(run)[-1]["step"]
    assert f"stopped after step {last} of {STEPS}; the same command goes on" in said
    assert last in steps_on_disk(run)

    process = Process(config, cache)
    said = process.finish()
    assert process.process.returncode == 0, said
    assert f"going on from step {last}" in said

    result = Result(run)
    assert what_a_run_says(run) == what_a_run_says(finished.directory)
    files = {
        directory: {p.name: p.read_bytes() for p in directory.glob("rollouts/*")}
        for directory in (run, finished.directory)
    }
    assert files[run] == files[finished.directory]
    chex.assert_trees_all_equal(final_params(result), final_params(finished))
    weights = [r.weights / "model.safetensors" for r in (result, finished)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("step, goes_on_from", [(8, 6), (3, None)])
def test_a_run_goes_back_to_where_all_is_whole(
    finished, tmp_path, capsys, step, goes_on_from
):
    run = tmp_path / "run"
    shutil.copytree(finished.directory, run)
    path = run / "metrics.jsonl"
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join(whole[:step] + whole[step + 1 :]))
    rerun = ["train", str(run / "config.yaml"), f"--output_dir={run}"]
    before = {p: p.read_bytes() for p in run.glob("**/*") if p.is_file()}
    if goes_on_from is None:
        assert launch.main(rerun) == 2
        said = capsys.readouterr()
        assert "line 4 has step 4 where step 3 is missing" in said.out
        assert "whole up to step 2, but" in said.err
        after = {p: p.read_bytes() for p in run.glob("**/*") if p.is_file()}
        assert after == before
        assert launch.main([*rerun, "--resume=force"]) == 0
        return
    assert launch.main(rerun) == 0
    assert f"going on from step {goes_on_from}" in capsys.readouterr().out
    assert what_a_run_says(run) == what_a_run_says(finished.directory)


@pytest.mark.slow
def test_a_step_that_does_not_end_is_given_up_for_the_newest_checkpoint(
    values, tmp_path
):
    run = tmp_path / "hanging"
    trainer = values["trainer"] | {"stop_grace_s": 0.1}
    config = write_config(values | {"trainer": trainer}, run)
    process = Process(config, tmp_path / "compiled", stop_at=6)
    waiting.until(lambda: process.is_at_the_gate() and steps_on_disk(run) == {2})
    process.process.terminate()
    said = process.finish()  # though the reward function still waits
    assert process.process.returncode == 75, said
    assert "did not end within 0.1 s of SIGTERM" in said.replace("\n", " ")
    assert "the same command goes on from step 2" in said
    assert "Traceback" not in said


def test_a_run_stopped_before_its_first_validation_has_no_result_to_show(finished):
    # Its only validation is the one before training.
    run = finished.directory
    later = [
        path for step, split, path in run_directory.rollout_files(run) if split == "val"
    ]
    for path in later[1:]:
        path.rename(path.with_suffix(".aside"))
    assert finished.before is not None and finished.after is None
    for path in later[1:]:
        path.with_suffix(".aside").rename(path)


def test_a_finished_run_says_that_nothing_is_trained(finished, capsys):
    before = what_a_run_says(finished.directory)
    assert launch.main(["train", str(finished.directory / "config.yaml")]) == 0
    said = capsys.readouterr().out
    assert f"nothing is trained: {finished.directory} holds a run that is" in said
    assert what_a_run_says(finished.directory) == before


@pytest.mark.parametrize(
    "override, message",
    [
        ("--trainer.resume=never", "trainer.resume is never, but output_dir"),
        ("--resume=never", "trainer.resume is never, but output_dir"),
        ("--seed=1", "seed was 0, is 1"),
        ("--actor.optim.lr=1", "actor.optim.lr was 0.02, is 1.0"),
    ],
)
def test_another_run_is_not_mixed_into_one(finished, override, message, capsys):
    config = finished.directory / "config.yaml"
    before = config.read_text()
    assert launch.main(["train", str(config), override]) == 2
    assert message in capsys.readouterr().err
    assert config.read_text() == before


@pytest.mark.slow
def test_three_prompts_five_samples_and_four_rows_at_a_time_work(
    tiny_model, values, tmp_path
):
    result = api.train(
        tiny_model,
        [{"prompt": row["prompt"]} for row in QUESTIONS[:3]],  # no answer is needed
        tiny.small_ids,
        steps=2,
        output_dir=str(tmp_path),
        settings=settings(
            values,
            data__train_batch_size=3,
            rollout__n=5,
            actor__micro_batch_size=4,
            actor__pack_length=64,
            actor__ppo_mini_batch_size=2,
            actor__use_kl_loss=True,
            trainer__save_hf=False,
            trainer__profile="2:2",
        ),
    )
    assert len(result.completions(2)) == 15
    table = result.table()
    assert table["training/epoch"][2] == 2
    assert (table.loc[1:, "actor/kl_loss"] >= 0).all()
    assert result.before is None and result.after is None
    assert not result.weights.exists()
    (trace,) = (tmp_path / "profile").glob("**/*.xplane.pb")  # of one step of the two
    planes = jax.profiler.ProfileData.from_file(str(trace)).planes
    names = [e.name for plane in planes for line in plane.lines for e in line.events]
    assert {names.count(phase) for phase in ("gen", "reward", "update_actor")} == {1}
    assert list((tmp_path / "profile").glob("**/perfetto_trace.json.gz"))


def brittle(luck):
    """A reward function that raises when it has no more luck."""

    def judge(completion_ids):
        luck.append(luck.pop() - 1)
        if luck[0] == 0:
            raise ZeroDivisionError("no luck")
        return tiny.small_ids(completion_ids)

    return judge


@pytest.mark.slow
def test_a_reward_that_fails_stops_a_run_that_can_go_on(
    tiny_model, values, tmp_path, finished
):
    def go(reward):
        return api.train(
            tiny_model,
            QUESTIONS[:10],
            reward,
            steps=2,
            output_dir=str(tmp_path),
            settings=settings(values, trainer__save_freq=1, trainer__save_hf=False),
        )

    with pytest.raises(RewardError, match="'judge' raised ZeroDivisionError: no luck"):
        go(brittle([2]))
    assert [line["step"] for line in run_directory.read(tmp_path)] == [0, 1]
    result = go(brittle([99]))
    # The run of the fixture asked the same questions with the same seed.
    name = "critic/rewards/mean"
    np.testing.assert_array_equal(result.table()[name][1:], finished.table()[name][1:3])


@pytest.mark.slow  # what counts is in test_rewards
def test_a_reward_that_fails_may_count_as_zero(tiny_model, values, tmp_path):
    result = api.train(
        tiny_model,
        QUESTIONS[:10],
        brittle([2]),
        steps=2,
        output_dir=str(tmp_path),
        settings=settings(values, reward__on_error="zero", trainer__save_hf=False),
    )
    table = result.table()
    assert table["reward_errors/judge"][2] == PROMPTS * SAMPLES
    assert table["critic/rewards/mean"][2] == 0 < table["critic/rewards/mean"][1]
    assert np.isnan(table["reward_errors/judge"][1])


def test_rows_of_another_run_are_not_overwritten(tiny_model, finished):
    kept = finished.directory / "train.jsonl"
    kept.write_text('{"prompt": "kept", "answer": null}\n')
    with pytest.raises(ValueError, match="holds a run on other train rows"):
        api.train(tiny_model, QUESTIONS, "exact", output_dir=str(finished.directory))
    assert "kept" in kept.read_text()
    kept.unlink()


@pytest.mark.parametrize(
    "rows, reward, more, message",
    [
        ([{"prompt": {1}}], "exact", {}, "train row 0 is not JSON: .* set"),
        ([{"question": "1"}], "exact", {}, "row 0 .*: no column 'prompt'"),
        (QUESTIONS, "exactt", {}, "'exactt' is not built in, did you mean 'exact'"),
        (QUESTIONS, ["exact", "exact"], {}, "need different names, got"),
        (QUESTIONS, [], {}, "train\\(\\): reward.functions is empty"),
        (QUESTIONS, "exact", {"rollout.m": 1}, "train\\(\\): rollout.m: unknown key"),
        (QUESTIONS, "exact", {"actor.mesh.data": 3}, "actor.mesh: mesh .* 8 devices"),
        (QUESTIONS, "exact", {"data.train_batch_size": 14}, "use at most 13"),
        (
            QUESTIONS,
            "exact",
            {"rollout.max_response_length": 9000},
            "max_response_length 9000 is over the model's 8192 positions",
        ),
        (QUESTIONS, "exact", {"model.tokenizer": "/nowhere"}, "/nowhere: no such dir"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_computed(
    tiny_model, tmp_path, rows, reward, more, message
):
    more = {"data.train_batch_size": 1} | more
    run = tmp_path / "run"
    with pytest.raises(ValueError, match=message):
        api.train(tiny_model, rows, reward, output_dir=str(run), settings=more)
    assert not (run / "metrics.jsonl").exists()
