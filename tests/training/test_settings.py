"""Sections of a configuration become the records that components take."""

import dataclasses

import pytest

from jaxrl_llm.config import schema
from jaxrl_llm.data.sources import Source
from jaxrl_llm.rewards import Term
from jaxrl_llm.rollout.servers.vllm import VllmSettings


@pytest.mark.parametrize(
    "section, record",
    [
        (schema.DatasetConfig(path="a.jsonl"), Source(path="a.jsonl")),
        (schema.RewardFunctionConfig(name="exact"), Term(name="exact")),
        (schema.VllmConfig(), VllmSettings()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_component_has_the_fields_and_defaults_of_its_section(section, record):
    assert section.model_dump() == dataclasses.asdict(record)
