"""A run whose device has too little memory says what to change, and loses nothing."""

import json
import re

import jax
import pytest
import yaml
from short_run import GRPO, make_config, mean_id

from jaxrl_llm import cli
from jaxrl_llm.config import resume
from jaxrl_llm.rewards import RewardFunction
from jaxrl_llm.roles.trained_model import TrainedModel
from jaxrl_llm.sharding import out_of_memory
from jaxrl_llm.sharding.out_of_memory import OutOfMemory
from jaxrl_llm.training import checkpoint, loop, memory
from jaxrl_llm.training.build import build

GIB = 2**30
SAID = (
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 39.15GiB with "
    "allocator GPU_0_bfc on device 0. [executable_name='jit_{name}']"
)


def lacking(name, *_, **__):
    raise jax.errors.JaxRuntimeError(SAID.format(name=name))


def built(config):
    high = RewardFunction(name="high", function=mean_id, trusted=True)
    return build(config, [high])


@pytest.fixture(scope="module")
def job(tiny_model, tmp_path_factory):
    """With a critic and a reference; all roles on all eight devices."""
    changed = {"actor.use_kl_loss": True, "actor.micro_batch_size": 16}
    folder = tmp_path_factory.mktemp("job") / "data"
    return built(make_config(tiny_model, folder, **changed))


@pytest.fixture(scope="module")
def sizes(job):
    return memory.held(job)


@pytest.fixture(autouse=True)
def counted_once(request, monkeypatch):
    if "job" in request.fixturenames:
        sizes = request.getfixturevalue("sizes")
        monkeypatch.setattr(memory, "held", lambda job: sizes)


def explanation(job, phase, program, folder):
    with checkpoint.Checkpoints(folder, 1) as checkpoints:
        with pytest.raises(OutOfMemory) as raised:
            with memory.explained(job, lambda: phase, checkpoints):
                lacking(program)
    return str(raised.value)


@pytest.mark.parametrize(
    "phase, program, doing, proposed",
    [
        ("", "program", "the start", "actor.offload"),
        ("gen", "prefill", "prefill (generating)", "rollout.prefill_tokens"),
        ("gen", "decode", "decode (generating)", "rollout.max_num_seqs"),
        ("testing", "decode", "decode (validating)", "rollout.max_num_seqs"),
        (
            "old_log_prob",
            "whole",
            "log-probabilities or values (asking the policy and its reference)",
            "actor.micro_batch_size",
        ),
        (
            "values",
            "whole",
            "log-probabilities or values (asking the critic)",
            "critic.micro_batch_size",
        ),
        (
            "update_critic",
            "update_critic",
            "the critic's update (updating the critic)",
            "critic.micro_batch_size",
        ),
        (
            "update_actor",
            "update",
            "the update (updating the policy)",
            "actor.micro_batch_size",
        ),
        ("update_weights", "x", "the weights' way to generation", "actor.offload"),
        ("save_checkpoint", "x", "saving a checkpoint", "actor.offload"),
    ],
)
def test_a_lack_of_memory_names_the_program_and_what_would_fit(
    job, tmp_path, phase, program, doing, proposed
):
    begun = explanation(job, phase, program, tmp_path)
    assert begun.endswith("the same command with that begins again")
    (tmp_path / "4").mkdir()
    text = explanation(job, phase, program, tmp_path)
    assert text.startswith(f"out of memory: {doing} wanted 39.15 GiB in one piece on ")
    assert "it holds: weights " in text and "critic's optimizer " in text
    keys = re.findall(r"^  ([\w.]+): ", text, re.MULTILINE)
    assert 1 <= len(keys) <= 3 and proposed in keys
    for key in keys:  # or the same run could not go on
        assert resume.may_change(key)
    assert text.endswith("the same command with that goes on from step 4")


def test_what_is_counted_makes_values_that_fit(job, monkeypatch, tmp_path):
    class Counting:
        device_kind, id = "NVIDIA H100", 0

        def memory_stats(self):
            return {"bytes_in_use": 52 * GIB, "bytes_limit": 72 * GIB}

    monkeypatch.setattr(out_of_memory.jax, "local_devices", lambda: [Counting()])
    # Of 20 GiB, 19 can be had in one piece. Half of 39.15 GiB are more, and fewer than
    # 8 rows would leave some of the 8 devices without one.
    said = explanation(job, "update_actor", "update", tmp_path)
    assert "actor.micro_batch_size: " not in said and "actor.remat: full" in said
    monkeypatch.setattr(type(job.engine), "cache_bytes", 30 * GIB)
    said = explanation(job, "gen", "decode", tmp_path)
    assert "where 52.00 GiB of 72.00 GiB were in use" in said
    assert "generation cache 30.00 GiB" in said and "other arrays 22.00 GiB" in said
    # 19.15 GiB are lacking, 20.16 with what is lost between arrays.
    assert "rollout.cache_gib: 9.8 (now 30.0)" in said


def test_a_run_ends_with_the_explanation_in_its_report(
    monkeypatch, tiny_model, tmp_path
):
    changed = GRPO | {"trainer.val_before_train": False, "actor.micro_batch_size": 8}
    config = make_config(tiny_model, tmp_path, **changed)
    monkeypatch.setattr(TrainedModel, "update", lambda *_, **__: lacking("update"))
    with pytest.raises(OutOfMemory, match="the update .updating the policy. wanted"):
        loop.run(built(config))
    report = (tmp_path / "run" / "report.html").read_text()
    assert "out of memory: the update" in report and "actor.remat" in report


def test_neither_a_disk_nor_a_file_is_blamed(tmp_path):
    with checkpoint.Checkpoints(tmp_path, 1) as checkpoints:
        with pytest.raises(jax.errors.JaxRuntimeError):
            with checkpoints._writing():
                lacking("of")
        with pytest.raises(jax.errors.JaxRuntimeError):
            checkpoint._agreed(lambda: lacking("of"))


@pytest.mark.slow
def test_the_same_command_with_another_value_goes_on(
    monkeypatch, capsys, tiny_model, tmp_path
):
    changed = GRPO | {
        "trainer.save_freq": 1,
        "actor.micro_batch_size": 16,
        "reward.functions": [{"name": "short_run:mean_id"}],
    }
    config = make_config(tiny_model, tmp_path, **changed)
    path, update, calls = tmp_path / "run.yaml", TrainedModel.update, []

    def fails_at_the_second(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 2:
            lacking("update")
        return update(self, *args, **kwargs)

    monkeypatch.setattr(TrainedModel, "update", fails_at_the_second)
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert cli.main(["train", str(path)]) == 2
    said = capsys.readouterr().err
    assert "out of memory: the update (updating the policy) wanted 39.15 GiB" in said
    assert "actor.micro_batch_size: 8 (now 16)" in said
    assert "the same command with that goes on from step 1" in said
    others = [
        *("--actor.micro_batch_size", "8", "--actor.remat", "full"),
        *("--actor.offload", "[optimizer]", "--rollout.cache_gib", "1"),
        *("--rollout.max_num_seqs", "128", "--rollout.prefill_tokens", "4096"),
    ]
    assert cli.main(["train", str(path), *others]) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3]
