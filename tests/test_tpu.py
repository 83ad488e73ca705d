"""The real TPU compiler takes the update as it is; no TPU is needed for that."""

import dataclasses
import os

import pytest

from jaxrl_llm import config, models
from jaxrl_llm.bench import shapes
from jaxrl_llm.learner import Learner
from sharding import mesh

pytest.importorskip("libtpu", reason="the TPU compiler is the package libtpu")


@pytest.fixture(scope="module")
def chips():
    from jax.experimental import topologies

    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # there is no machine to ask
    found = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
    return found.devices


def make_learner(chips, **actor):
    """Two layers as wide as SmolLM2's, one with a window; rows of 1,024 tokens."""
    settings = config.parse(
        {
            "output_dir": "unused",
            "model": {"path": "unused"},
            "data": {
                "train": {"path": "unused.jsonl"},
                "train_batch_size": 8,
                "max_prompt_length": 128,
            },
            "rollout": {"n": 8, "max_response_length": 384},
            "reward": {"functions": [{"name": "exact"}]},
            "trainer": {"total_training_steps": 1},
            "actor": {"pack_length": 1024, "micro_batch_size": 8, **actor},
        },
        "test",
    )
    arch = dataclasses.replace(
        shapes.find("smollm2-135m"),
        num_layers=2,
        rope_of_layer=(0, 0),
        window_of_layer=(None, 300),
        vocab_size=1024,
    )
    devices = mesh.make({"data": 2, "fsdp": 4, "tensor": 1}, chips)
    return Learner(settings, models.RandomWeights(arch), devices)


@pytest.mark.slow  # tests/test_planner.py compiles a smaller one
@pytest.mark.parametrize("remat", ["dots", "none", "full"])
def test_the_update_compiles_for_eight_chips_with_splash_attention(chips, remat):
    learner = make_learner(chips, remat=remat)
    compiled = learner.compile_update(learner.largest_rows())
    assert "splash" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes > 0
