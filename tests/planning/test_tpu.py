"""What the real TPU compiler makes of our programs; no TPU is needed for that."""

import dataclasses
import os

import jax
import pytest
import recipes

from jaxrl_llm import models
from jaxrl_llm.config import parsing
from jaxrl_llm.models import known_shapes as shapes
from jaxrl_llm.planning import planner
from jaxrl_llm.rollout.native.engine import JaxEngine
from jaxrl_llm.sharding import mesh
from jaxrl_llm.training.roles import actor_of

pytest.importorskip("libtpu", reason="the TPU compiler is the package libtpu")


@pytest.fixture(scope="module")
def chips():
    from jax.experimental import topologies

    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # there is no machine to ask
    found = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
    return found.devices


def make_learner(chips, **actor):
    """Two layers as wide as SmolLM2's, one with a window; rows of 1,024 tokens."""
    settings = parsing.parse(
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
    return actor_of(settings, models.RandomWeights(arch), devices)


def test_a_decoding_step_does_not_copy_its_cache():
    arch = dataclasses.replace(
        shapes.find("smollm2-135m"),
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=128,
        rope_of_layer=(0, 0),
        window_of_layer=(None, None),
        vocab_size=1024,
    )
    engine = JaxEngine(
        arch,
        None,
        mesh=mesh.make({"data": 2, "tensor": 2}, planner.tpu("v5e:2x2")),
        dtype="bfloat16",
        max_model_len=4096,
        max_num_seqs=128,
        decode_chunk=8,
    )
    with jax.debug_nans(False):  # which keeps what is donated
        program = engine.lower(128, 128, 64)["decode"].compile()
    cache = engine.memory(128, 4096)["generation cache"]
    assert program.memory_analysis().temp_size_in_bytes < cache / 4


def test_generation_does_not_leave_a_host():
    # 16 chips in a square, 2 x 2 at each of 4 hosts: a row of four belongs to two.
    chips, axes = planner.tpu("v5e:4x4"), {"data": 4, "tensor": 4}

    def hosts(made):
        return [len({chip.process_index for chip in row}) for row in made.devices]

    assert hosts(mesh.make(axes, chips)) == [2, 2, 2, 2]
    assert hosts(mesh.make_by_process(axes, chips)) == [1, 1, 1, 1]
    assert len(planner.host_of("v5e:4x4")) == 4 == len(planner.host_of("v5p:2x4x4"))


@pytest.mark.slow  # tests/test_planner.py compiles a smaller one
@pytest.mark.parametrize("remat", ["dots", "none", "full"])
def test_the_update_compiles_for_eight_chips_with_splash_attention(chips, remat):
    learner = make_learner(chips, remat=remat)
    compiled = learner.compile_update(learner.largest_rows())
    assert "splash" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", recipes.PLANNED)
def test_a_recipe_is_planned(name, monkeypatch):
    """With the first two layers of its model: the others are compiled likewise."""
    topology, model = recipes.plan_of(name)
    whole = shapes.find(model)
    cut = dataclasses.replace(
        whole,
        num_layers=2,
        rope_of_layer=whole.rope_of_layer[:2],
        window_of_layer=whole.window_of_layer[:2],
    )
    monkeypatch.setattr(planner.workload, "architecture", lambda *_: cut)
    config = parsing.load(recipes.FILES[name])
    chips, memory = planner.elsewhere(topology)
    host = planner.host_of(topology)
    [found] = planner.estimate(config, chips, memory, host=host)
    assert found.num_devices == len(chips) and found.num_processes == len(chips) // 4
    assert {"update", "prefill", "decode", "reshard"} <= set(found.programs)
    assert found.peak_bytes < found.capacity
