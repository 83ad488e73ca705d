import jax
import pytest

from jaxrl_llm import cli, models
from jaxrl_llm.config import parsing, schemas
from jaxrl_llm.models import known_shapes as shapes
from jaxrl_llm.planning import offline_plan
from jaxrl_llm.training import offline_tasks


def settings(task, **changed):
    values = {
        "task": task,
        "output_dir": "unused",
        "model": {"path": "tiny"},
        "data": {
            "train": {"path": "unused.jsonl"},
            "train_batch_size": 8,
            "max_length": 64,
        },
        "learner": {"micro_batch_size": 8, "mesh": {"data": 1, "fsdp": -1}},
    }
    values["learner"] |= changed
    return parsing.parse(values, "test", schema=schemas.of(task))


def planned(task, memory=None, count=2, **changed):
    config, devices = settings(task, **changed), jax.devices()[:count]
    return offline_plan.estimate(config, devices, memory, offline_tasks.of(task))


@pytest.mark.slow
def test_an_update_of_rows_is_planned_from_shapes_alone():
    _, said, found = planned("sft", remat="none")
    count = models.num_params(shapes.find("tiny"))
    assert said == []
    assert found.held["weights"] == pytest.approx(4 * count / 2, rel=0.05)
    assert found.held["optimizer"] == pytest.approx(8 * count / 2, rel=0.05)
    program = found.programs["update"]
    matrices = models.num_matmul_params(shapes.find("tiny"))
    assert program.flops > 6 * matrices * 8 * 64 / 2
    assert program.extra_bytes > 0 and program.received_bytes > 0
    assert found.peak_bytes == sum(found.held.values()) + program.extra_bytes
    assert offline_plan.advice(settings("sft"), found) == []


@pytest.mark.slow
@pytest.mark.parametrize("task", ["rm", "dpo"])
def test_pairs_take_what_two_rows_take(task):
    one = planned("sft")[2].programs["update"]
    two = planned(task)[2].programs["update"]
    assert two.flops == pytest.approx(2 * one.flops)


@pytest.mark.slow
def test_the_rows_at_a_time_are_those_that_fit_and_what_does_not_is_advised():
    whole = planned("sft", micro_batch_size=8)[2].peak_bytes
    config, said, found = planned("sft", whole, micro_batch_size=None)
    assert config.learner.micro_batch_size in (1, 2, 4, 8) and len(said) == 1
    assert found.peak_bytes <= whole
    tight = sum(found.held.values())
    found = planned("sft", tight, micro_batch_size=8, remat="none")[2]
    lines = offline_plan.advice(settings("sft", remat="none"), found)
    assert "learner.remat: full" in lines and "learner.micro_batch_size: 4" in lines


def test_a_file_says_which_verb_it_is_for(tmp_path, capsys):
    file = tmp_path / "rm.yaml"
    file.write_text(
        "task: rm\noutput_dir: out\nmodel: {path: tiny}\n"
        "data: {train: {path: a.jsonl}, max_length: 64}\n"
    )
    assert cli.main(["plan", str(file), "--devices", "8", "--measure", "1"]) == 2
    assert "not of rm" in capsys.readouterr().err
