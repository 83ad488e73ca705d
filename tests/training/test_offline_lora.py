"""Runs that train adapters from rows: fine-tuning, a reward model, DPO."""

import shutil

import chex
import jax
import numpy as np
import pytest

from jaxrl_llm import cli, models
from jaxrl_llm.config import parsing
from jaxrl_llm.config.schema_offline import DpoConfig, RmConfig, SftConfig
from jaxrl_llm.data import given
from jaxrl_llm.training import fitting, offline_build, offline_loop, offline_tasks
from jaxrl_llm.training.checkpoint import Checkpoints

SCHEMAS = {"sft": SftConfig, "rm": RmConfig, "dpo": DpoConfig}
STEPS = 3


def config_of(verb, model, directory, quantization=None):
    completions = [("completion", "abc")]
    if verb != "sft":
        completions = [("chosen", "abc"), ("rejected", "xyz")]
    rows = [
        {"prompt": f"{i} and {j}:"} | {key: text[: 1 + j] for key, text in completions}
        for i in range(4)
        for j in range(3)
    ]
    path = directory / "rows.jsonl"
    path.write_text("".join(given.json_lines(rows, "train", completions[0][0])))
    values = {
        "output_dir": str(directory / "run"),
        "model": {"path": model},
        "data": {
            "train": {"path": str(path)}, "train_batch_size": 4, "max_length": 16,
        },
        "learner": {
            "optim": {"lr": 3e-2},
            "dtype": "float32",
            "remat": "dots",
            "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
            "lora": {"rank": 4, "alpha": 8.0, "quantization": quantization},
        },
        "trainer": {
            "total_training_steps": STEPS, "save_freq": 1, "num_examples": 0,
        },
    }  # fmt: skip
    return parsing.parse(values, "a test", schema=SCHEMAS[verb])


def run(config, verb):
    job = offline_build.build(config, offline_tasks.of(verb))
    return offline_loop.run(job), job


def learned(job, directory):
    with Checkpoints(directory / "checkpoints", 3) as checkpoints:
        return jax.device_get(checkpoints.restore(job.abstract_state()).state)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("verb", "quantization"),
    [*((verb, None) for verb in SCHEMAS), ("sft", "int8"), ("rm", "int8")],
)
def test_adapters_learn_from_rows_and_go_on_bit_for_bit(
    verb, quantization, tiny_model, tmp_path
):
    config = config_of(verb, tiny_model, tmp_path, quantization)
    result, job = run(config, verb)
    losses = result.table()[f"{verb}/loss"]
    assert losses[STEPS] < losses[1] - 0.05
    if verb != "sft":  # policy and reference, or both answers, are alike at first
        assert losses[1] == pytest.approx(np.log(2), abs=1e-6)
    state = learned(job, result.directory)
    decoder = state.params["decoder"] if verb == "rm" else state.params
    assert {*decoder["layers"]} == {"lora"} and {*decoder} == {"layers"}
    assert ({*state.params} == {"decoder", "weight", "bias"}) == (verb == "rm")
    sizes = offline_build.kept(job.config, job.learner, None, 0)
    frozen = fitting.bytes_of(job.learner.abstract_frozen())
    assert sizes["frozen weights"] == frozen > 0
    # It is stopped after a step, and goes on.
    parts = tmp_path / "parts"
    parts.mkdir()
    again = config_of(verb, tiny_model, parts, quantization)
    shutil.copytree(result.directory, parts / "run")
    for step in range(2, STEPS + 1):
        shutil.rmtree(parts / "run" / "checkpoints" / str(step))
    text = (parts / "run" / "config.yaml").read_text()
    text = text.replace(str(tmp_path / "run"), str(parts / "run"))
    (parts / "run" / "config.yaml").write_text(
        text.replace(str(tmp_path / "rows.jsonl"), str(parts / "rows.jsonl"))
    )
    other, job = run(again, verb)
    chex.assert_trees_all_equal(learned(job, other.directory), state)
    # What is written is the base with the adapters added.
    shardings = jax.tree.map(lambda x: x.sharding, job.abstract_state())
    placed = jax.tree.map(jax.device_put, state, shardings)
    wanted = jax.device_get(job.learner.weights(placed))
    newest = str(result.directory / "checkpoints" / str(STEPS))
    cli.convert(newest, str(tmp_path / "out"), dtype="float32", merge=verb != "rm")
    if verb == "rm":
        opened = models.open_classifier(tmp_path / "out")
        shardings = jax.tree.map(
            lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]),
            models.abstract_critic(opened.arch),
        )
        got = opened.load(dtype="float32", shardings=shardings)
        chex.assert_trees_all_close(got, wanted, rtol=1e-6, atol=1e-7)
    else:
        whole = models.load(tmp_path / "out").params
        chex.assert_trees_all_close(whole, wanted, rtol=1e-6, atol=1e-7)
        _, saved, _ = models.load(result.weights)
        chex.assert_trees_all_close(saved, wanted, rtol=1e-2, atol=1e-4)
        adapters = models.open_adapter(result.directory / "adapter", job.source.arch)
        chex.assert_trees_all_equal(jax.device_get(adapters.load()), state.params)
