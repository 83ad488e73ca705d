"""Saved and restored states, on eight simulated devices."""

import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl_llm.sharding import mesh
from jaxrl_llm.training.checkpoint import Checkpoints

RNG = np.random.default_rng(0)
STATE = {
    "params": {"wi": RNG.normal(size=(8, 16)).astype(np.float32)},
    "moments": [RNG.normal(size=(16,)).astype(jnp.bfloat16), np.int32(7)],
}
SPECS = {"params": {"wi": P("fsdp", "tensor")}, "moments": [P("fsdp"), P()]}
POSITION = {"prompts": {"batches": 3}, "kl_loss_coef": 1e-3}


def layout(fsdp, tensor):
    on = mesh.make({"fsdp": fsdp, "tensor": tensor}, jax.devices()[: fsdp * tensor])
    return jax.tree.map(lambda spec: NamedSharding(on, spec), SPECS)


def on_devices(fsdp=8, tensor=1, state=STATE):
    return jax.device_put(state, layout(fsdp, tensor))


def like(fsdp=8, tensor=1, state=STATE):
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=s),
        state,
        layout(fsdp, tensor),
    )


def save(directory, steps, keep=9, scores=None):
    with Checkpoints(directory, keep) as checkpoints:
        for step in steps:
            score = (scores or {}).get(step)
            checkpoints.save(step, on_devices(), {**POSITION, "step": step}, score)


def kept(directory):
    return sorted(int(path.name) for path in directory.iterdir())


def newest(directory, wanted=None):
    with Checkpoints(directory, 9) as checkpoints:
        return checkpoints.restore(wanted or like())


@pytest.mark.parametrize("fsdp, tensor", [(8, 1), (2, 4), (1, 1)])
def test_a_state_comes_back_bit_for_bit_on_any_mesh(tmp_path, fsdp, tensor):
    save(tmp_path, [5])
    step, state, position = newest(tmp_path, like(fsdp, tensor))
    assert step == 5 and position == {**POSITION, "step": 5}
    chex.assert_trees_all_equal(state, STATE)
    chex.assert_trees_all_equal_dtypes(state, STATE)
    assert jax.tree.map(lambda x: x.sharding, state) == layout(fsdp, tensor)


def test_a_state_may_be_overwritten_while_it_is_being_saved(tmp_path):
    scale = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)
    with Checkpoints(tmp_path, 1) as checkpoints:
        state = on_devices()
        checkpoints.save(1, state, POSITION)
        scale(state)
    np.testing.assert_array_equal(
        newest(tmp_path).state["params"]["wi"], STATE["params"]["wi"]
    )


def test_without_a_checkpoint_there_is_none(tmp_path):
    assert newest(tmp_path / "new") is None


def test_the_newest_stay(tmp_path):
    save(tmp_path, [2, 4, 6, 8], keep=2)
    assert kept(tmp_path) == [6, 8]
    assert newest(tmp_path).step == 8


def test_the_best_stays_besides_also_after_a_restart(tmp_path):
    scores = {2: 0.5, 4: 0.9, 6: 0.7}
    save(tmp_path, [2, 4, 6, 8], keep=1, scores=scores)
    assert kept(tmp_path) == [4, 8]
    save(tmp_path, [10, 12], keep=1, scores={10: 0.8})
    assert kept(tmp_path) == [4, 12]
    save(tmp_path, [14], keep=1, scores={14: 0.9})
    assert kept(tmp_path) == [14]  # of equally good ones the newest


def test_a_step_that_is_saved_is_not_saved_again(tmp_path):
    save(tmp_path, [3])
    with Checkpoints(tmp_path, 9) as checkpoints:
        checkpoints.save(3, on_devices(), {"other": 1})
    assert newest(tmp_path).position == {**POSITION, "step": 3}


def test_what_was_not_finished_does_not_exist(tmp_path):
    save(tmp_path, [2, 4])
    (tmp_path / "4").rename(tmp_path / "6.orbax-checkpoint-tmp")
    with Checkpoints(tmp_path, 9) as checkpoints:
        assert checkpoints.restore(like()).step == 2
        # What is left of it is removed in the background, at the latest before a save.
        checkpoints.save(8, on_devices(), POSITION)
        assert "6.orbax-checkpoint-tmp" not in {p.name for p in tmp_path.iterdir()}
    assert kept(tmp_path) == [2, 8]


def test_one_that_was_being_deleted_is_in_nobodys_way(tmp_path):
    save(tmp_path, [2, 4], scores={2: 0.9, 4: 0.1})
    for path in (tmp_path / "2").iterdir():
        if path.name != "state":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert newest(tmp_path).step == 4
    save(tmp_path, [6], keep=1)
    assert newest(tmp_path).step == 6


def test_each_says_its_format_and_older_ones_are_read(tmp_path):
    save(tmp_path, [5])
    (stored,) = (tmp_path / "5" / "position").glob("metadata*")
    said = json.loads(stored.read_text())
    assert said.pop("format") == 1
    stored.write_text(json.dumps(said))  # as it was before there were numbers
    assert newest(tmp_path).position == {**POSITION, "step": 5}


def test_a_format_of_a_later_version_is_an_error_that_names_both(tmp_path):
    save(tmp_path, [5])
    (stored,) = (tmp_path / "5" / "position").glob("metadata*")
    stored.write_text(json.dumps({**json.loads(stored.read_text()), "format": 7}))
    with pytest.raises(ValueError, match="5 has checkpoint format 7, .* up to 1; go"):
        newest(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda s: s["params"].update(wi=np.zeros((8, 32), np.float32)),
            r"5 is a checkpoint of another .* params.wi is \(8, 16\), not \(8, 32\)",
        ),
        (
            lambda s: s["params"].update(wo=s["params"].pop("wi")),
            "the configuration has no params.wi",
        ),
        (
            lambda s: s.update(params={"wi": s["params"]["wi"], "z": np.float32(1)}),
            "the checkpoint has no params.z",
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path, change, message):
    save(tmp_path, [5])
    wanted = jax.tree.map(np.asarray, STATE)
    change(wanted)
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), wanted)
    with pytest.raises(ValueError, match=message):
        newest(tmp_path, wanted)
