"""Sections of a configuration become the records that components take."""

import dataclasses

import pytest

from jaxrl_llm.config import parsing, schema
from jaxrl_llm.config.names import ConfigError
from jaxrl_llm.data.sources import Source
from jaxrl_llm.rewards import Term
from jaxrl_llm.rollout.servers.jaxrl import JaxrlSettings
from jaxrl_llm.rollout.servers.sglang import SglangSettings
from jaxrl_llm.rollout.servers.vllm import VllmSettings
from jaxrl_llm.training import settings
from jaxrl_llm.workers.sandbox.levels import Sandbox


@pytest.mark.parametrize(
    "section, record",
    [
        (schema.DatasetConfig(path="a.jsonl"), Source(path="a.jsonl")),
        (schema.RewardFunctionConfig(name="exact"), Term(name="exact")),
        (schema.VllmConfig(), VllmSettings()),
        (schema.JaxrlConfig(), JaxrlSettings()),
        (schema.SglangConfig(), SglangSettings()),
        (schema.SandboxConfig(), Sandbox()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_component_has_the_fields_and_defaults_of_its_section(section, record):
    assert section.model_dump() == dataclasses.asdict(record)


def of_servers(engine="vllm", **servers):
    values = {
        "output_dir": "run",
        "model": {"path": "model"},
        "data": {"train": {"path": "rows.jsonl"}},
        "rollout": {"engine": engine, engine: servers},
        "reward": {"functions": [{"name": "exact"}]},
        "trainer": {"total_training_steps": 1},
    }
    return parsing.parse(values, "test")


HALF = ("--gpu-memory-utilization", "0.5")


@pytest.mark.parametrize(
    "seen, vllm, share",
    [
        (None, {}, 0.9),  # what vLLM takes if nothing is said
        (None, {"args": HALF}, 0.5),
        (None, {"args": ("--gpu_memory_utilization=0.3",)}, 0.3),
        (None, {"args": ("--gpu-memory-utilization=0.3", *HALF)}, 0.5),
        (None, {"args": HALF, "devices": ("1", "2")}, 0.5),
        (None, {"args": ("--gpu-memory-utilization=0.2",), "devices": ("1", "1")}, 0.4),
        ("0,1", {"args": HALF}, 0.5),
        ("0,1", {"args": HALF, "devices": ("1,2",)}, 0.5),
        ("0,1", {"args": HALF, "devices": ("2", "3")}, 0.0),
        ("0", {"args": HALF, "env": {"CUDA_VISIBLE_DEVICES": "1"}}, 0.0),
        (None, {"urls": ("http://elsewhere:8000",)}, 0.0),
        (None, {"urls": ("http://elsewhere:8000", "http://localhost:8000")}, None),
    ],
)
def test_servers_share_the_gpus_that_they_and_the_trainer_see(
    monkeypatch, seen, vllm, share
):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if seen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    assert settings.server_share(of_servers(**vllm)) == share


@pytest.mark.parametrize(
    "engine, args, share",
    [
        ("sglang", (), 0.9),
        ("sglang", ("--mem-fraction-static", "0.4"), 0.4),
        ("jaxrl", (), 0.9),
    ],
)
def test_other_servers_take_what_they_say(monkeypatch, engine, args, share):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert settings.server_share(of_servers(engine, args=args)) == share


def test_a_share_that_is_no_number_is_refused():
    with pytest.raises(ConfigError, match="utilization is a share .* got 'half'"):
        settings.utilization(["--gpu-memory-utilization", "half"])
