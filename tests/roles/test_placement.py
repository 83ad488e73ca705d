"""Roles on groups of devices: the same loop, and the same numbers."""

import functools

import jax
import pytest
import tiny

from jaxrl_llm.config import parsing
from jaxrl_llm.config.names import device_numbers
from jaxrl_llm.config.parsing import ConfigError
from jaxrl_llm.planning import dry_run
from jaxrl_llm.rewards import RewardFunction
from jaxrl_llm.tracking import metric_table, run_directory
from jaxrl_llm.training import loop as train
from jaxrl_llm.training.build import build, make_meshes


def high(completion_ids, **_):
    """The share of tokens over 100."""
    return [sum(t > 100 for t in ids) / max(len(ids), 1) for ids in completion_ids]


def values(folder, name, **placement):
    data = folder / "rows.jsonl"
    data.write_text("".join(f'{{"prompt": "{c}", "answer": "1"}}\n' for c in "abcd"))
    return {
        "output_dir": str(folder / name),
        "model": {"path": str(folder / "model")},
        "data": {
            "train": {"path": str(data)},
            "train_batch_size": 4,
            "max_prompt_length": 48,  # so that a step has one size
        },
        "rollout": {
            "n": 2,
            "max_response_length": 6,
            "decode_chunk": 6,
            "dtype": "float32",
        },
        "actor": {
            "dtype": "float32",
            "remat": "none",
            "use_kl_loss": True,
            "ref_refresh_steps": 2,
            "optim": {"lr": 1e-2},
        },
        "critic": {"dtype": "float32", "remat": "none", "optim": {"lr": 1e-2}},
        "algorithm": {"adv_estimator": "gae"},
        "placement": placement,
        "reward": {"functions": [{"name": "exact"}]},
        "trainer": {"total_training_steps": 3, "save_hf": False},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("placement")
    tiny.checkpoint(found / "model", num_layers=1)
    return found


def job(folder, name, **placement):
    config = parsing.parse(values(folder, name, **placement), "test")
    return build(config, [RewardFunction(name="high", function=high)])


PLACEMENTS = {
    "split": {
        "groups": {"learn": "0-3", "judge": "4-7"},
        "actor": "learn",
        "critic": "judge",
        "rollout": "judge",
    },
    "disjoint": {
        "groups": {"actor": "0-1", "critic": "2,4", "ref": "3,7", "rollout": "5-6"},
        "actor": "actor",
        "critic": "critic",
        "reference": "ref",
        "rollout": "rollout",
    },
}


def devices(tree):
    return {d.id for x in jax.tree.leaves(tree) for d in x.sharding.device_set}


def run(folder, name, **placement):
    """What learning measured at every step."""
    made = job(folder, name, **placement)
    train.run(made)
    lines = run_directory.read(made.config.output_dir)
    assert {k for line in lines for k in line if not metric_table.find(k)} == {"step"}
    return lines


@pytest.fixture(scope="module")
def ran(folder):
    """The lines of the run of a placement, or of none."""

    @functools.cache
    def lines(name):
        return run(folder, name, **PLACEMENTS.get(name, {}))

    return lines


@pytest.mark.slow
def test_the_roles_of_a_run_get_their_weights_wherever_they_are(ran):
    _, *lines = ran("disjoint")
    assert len(lines) == 3
    for line in lines:
        # The sampler has the trainer's weights, and both models learn.
        assert line["mismatch/logprob_diff_max"] < 1e-4
        assert line["actor/grad_norm"] > 0 < line["critic/grad_norm"]
    # The reference is the initial policy until step 2 ends, then that of step 2.
    kl = [line["actor/kl_loss"] for line in lines]
    assert kl[1] > 0.1 and max(kl[0], kl[2]) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", PLACEMENTS)
def test_every_placement_gives_the_same_numbers(ran, name):
    found, wanted = (
        [
            {k: v for k, v in line.items() if k.startswith(("actor/", "critic/"))}
            for line in ran(placement)
        ]
        for placement in (name, "colocated")
    )
    for got, other in zip(found, wanted, strict=True):
        assert got == pytest.approx(other, rel=1e-4, abs=1e-5)


def test_roles_are_where_they_are_placed(folder):
    made = job(folder, "where", **PLACEMENTS["disjoint"])
    assert devices(made.actor.abstract_state()) == {0, 1}
    assert devices(made.actor.reference.abstract_params()) == {3, 7}
    assert devices(made.critic.abstract_state()) == {2, 4}
    assert devices(made.engine.abstract_params()) == {5, 6}
    held = dry_run.memory_per_device(made)
    assert list(held) == ["actor", "rollout", "critic", "ref"]
    assert list(held["ref"]) == ["reference", "gradients, activations"]
    # Rows of one reference on two devices, as those of the actor on two: half of each.
    assert held["ref"]["reference"] == held["actor"]["weights"]


@pytest.mark.parametrize(
    "placement, message",
    [
        (
            {"groups": {"a": "0-3", "b": "3-7"}, "actor": "a", "rollout": "b"},
            "device 3 is in group a and in group b",
        ),
        ({"groups": {"a": "0-5"}, "actor": "a"}, "in no group: device 6, 7"),
        (
            {"groups": {"a": "0-8"}, "actor": "a"},
            "group a has device 8, but there are only 8",
        ),
        (
            {"groups": {"a": "0-x"}, "actor": "a"},
            "group a: '0-x' are no device numbers",
        ),
        (
            {"groups": {"a": "3-0"}, "actor": "a"},
            "group a: '3-0' are no device numbers",
        ),
        ({"groups": {"a": "0-7"}}, "actor: needed, one of the groups"),
        ({"groups": {"a": "0-7"}, "actor": "b"}, "actor is b, which is none of the"),
        ({"groups": {"a": "0-3", "b": "4-7"}, "actor": "a"}, "group b has no role"),
    ],
)
def test_what_does_not_fit_is_said(folder, placement, message):
    with pytest.raises(ConfigError, match=message):
        make_meshes(parsing.parse(values(folder, "no", **placement), "test"))


def test_a_mesh_is_filled_from_its_group(folder):
    given = values(folder, "fill", **PLACEMENTS["split"])
    given["actor"]["mesh"] = {"fsdp": 2, "tensor": -1}
    given["actor"]["ref_mesh"] = {"data": -1, "fsdp": 1}
    made = make_meshes(parsing.parse(given, "test"))
    shapes = {
        role: {k: v for k, v in m.shape.items() if v > 1} for role, m in made.items()
    }
    assert shapes == {
        "actor": {"fsdp": 2, "tensor": 2},
        "reference": {"data": 4},
        "critic": {"fsdp": 4},
        "rollout": {"data": 4},
    }
    given["actor"]["mesh"] = {"fsdp": 8}
    with pytest.raises(ConfigError, match="actor.mesh on learn: .* does not fit 4"):
        make_meshes(parsing.parse(given, "test"))


def test_device_numbers():
    assert device_numbers("0, 2,4-6") == [0, 2, 4, 5, 6]
