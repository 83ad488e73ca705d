"""Saved and restored states, on eight simulated devices."""

import json
import os
import resource
import shutil
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl_llm.sharding import mesh
from jaxrl_llm.training import checkpoint
from jaxrl_llm.training.checkpoint import CheckpointError, Checkpoints

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


def test_the_policy_alone_can_be_read_and_is_verified(tmp_path):
    whole = {"actor": {**STATE, "step": STATE["moments"][1]}}
    placed = {"actor": {**on_devices(), "step": on_devices()["moments"][1]}}
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(4, placed, POSITION)
    path, wanted = tmp_path / "4", like(2, 4)["params"]
    found = checkpoint.read_policy(path, wanted)
    chex.assert_trees_all_equal(found, whole["actor"]["params"])
    assert found["wi"].sharding == wanted["wi"].sharding
    other = {"wi": jax.ShapeDtypeStruct((8, 8), np.float32)}
    with pytest.raises(
        CheckpointError, match=r"another model: .* shape \[8, 16\], not"
    ):
        checkpoint.read_policy(path, other)
    with pytest.raises(
        CheckpointError, match="another model: it has no actor.params.x"
    ):
        checkpoint.read_policy(path, {"x": wanted["wi"]})
    with pytest.raises(CheckpointError, match="5 is damaged: .*No such file"):
        checkpoint.read_policy(tmp_path / "5", wanted)
    file = path / "position/metadata"
    file.write_text(file.read_text().replace('"checksum": ', '"checksum": 1'))
    with pytest.raises(CheckpointError, match="damaged: .* its digest differs"):
        checkpoint.read_policy(path, wanted)


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


def rewrite(directory, change):
    """Changes what a checkpoint says besides its arrays."""
    stored = directory / "position" / "metadata"
    said = json.loads(stored.read_text())
    change(said)
    stored.write_text(json.dumps(said))


def as_an_older_one(said):
    """As before there were checksums, and before there were numbers."""
    assert said.pop("format") == 2
    for name in ("score", "arrays", "sha256"):
        del said[name]


def test_each_says_its_format_and_older_ones_are_read_which_carry_no_checksums(
    tmp_path,
):
    save(tmp_path, [5])
    rewrite(tmp_path / "5", as_an_older_one)
    said = []
    with Checkpoints(tmp_path, 9) as checkpoints:
        found = checkpoints.restore(like(), say=said.append)
    assert found.position == {**POSITION, "step": 5}
    assert len(said) == 1 and "5 was written by an earlier version" in said[0]


def test_a_format_of_a_later_version_is_an_error_that_names_both(tmp_path):
    save(tmp_path, [5])

    def later(said):
        del said["sha256"]
        said["format"] = 7
        said["sha256"] = checkpoint._digest(said)

    rewrite(tmp_path / "5", later)
    with pytest.raises(ValueError, match="5 has checkpoint format 7, .* up to 2; go"):
        newest(tmp_path)


def flip(path, place=0.5, bit=3):
    """Flips one bit of a file."""
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    path.write_bytes(data)


def blocks(directory):
    """The files that hold the values of the arrays, and some that are read no more."""
    return list(directory.glob("state/**/d/*"))


def other_numbers(directory):
    """A file of another state, of the same shape: what a block that is old is like."""
    state = jax.tree.map(lambda x: x * 0, STATE)
    with Checkpoints(directory.parent / "other", 9) as checkpoints:
        checkpoints.save(4, on_devices(state=state), {})
    shutil.rmtree(directory / "state")
    shutil.copytree(directory.parent / "other" / "4" / "state", directory / "state")
    shutil.rmtree(directory.parent / "other")


DAMAGES = {
    "a bit of the arrays": lambda d: [flip(block) for block in blocks(d)],
    "old arrays": other_numbers,
    "cut short": lambda d: [os.truncate(block, 99) for block in blocks(d)],
    "files are gone": lambda d: [block.unlink() for block in blocks(d)],
    "no arrays": lambda d: shutil.rmtree(d / "state"),
    "a bit of what describes the arrays": lambda d: flip(d / "state/_METADATA"),
    "a bit of the position": lambda d: flip(d / "position/metadata", 0.1),
    "another position": lambda d: rewrite(d, lambda said: said.update(step=3)),
    "another format": lambda d: rewrite(d, lambda said: said.update(format=3)),
    "no digest": lambda d: rewrite(d, lambda said: said.pop("sha256")),
    "no position": lambda d: (d / "position/metadata").write_text(""),
    "nothing in it": lambda d: [shutil.rmtree(d), d.mkdir()],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_one_is_named_and_set_aside_for_the_one_before(tmp_path, damage):
    save(tmp_path, [2, 4])
    damage(tmp_path / "4")
    said = []
    with Checkpoints(tmp_path, 9) as checkpoints:
        found = checkpoints.restore(like(), say=said.append)
        assert found.step == 2 and found.position == {**POSITION, "step": 2}
        chex.assert_trees_all_equal(found.state, STATE)
        checkpoints.save(4, on_devices(), {**POSITION, "step": 4})
    (line,) = said
    assert f"{tmp_path / '4'} is damaged: " in line and "from checkpoint 2" in line
    assert "\n" not in line
    assert newest(tmp_path).step == 4
    assert (tmp_path / "4.aside").is_dir()


def test_a_full_disk_is_seen_before_anything_is_computed(tmp_path, monkeypatch):
    free = sum(x.nbytes for x in jax.tree.leaves(STATE))
    usage = types.SimpleNamespace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with Checkpoints(tmp_path, 9) as checkpoints:
        checkpoints.check_room(like())
        usage.free -= 1
        with pytest.raises(OSError, match="takes 0.00 GB, but only .* are free; make"):
            checkpoints.check_room(like())


def test_if_all_are_damaged_nothing_is_changed(tmp_path):
    save(tmp_path, [2, 4])
    DAMAGES["a bit of the arrays"](tmp_path / "2")
    flip(tmp_path / "4/position/metadata")
    with pytest.raises(CheckpointError, match="4 is damaged: .*; .*2 is damaged: "):
        newest(tmp_path)
    assert kept(tmp_path) == [2, 4]


def test_only_one_up_to_a_step_is_gone_on_from(tmp_path):
    save(tmp_path, [2, 4, 6])
    with Checkpoints(tmp_path, 9) as checkpoints:
        assert checkpoints.restore(like(), up_to=5).step == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "4", "6.aside"]
    with (
        pytest.raises(CheckpointError, match=r"up to step 1, .* steps \[2, 4\] only"),
        Checkpoints(tmp_path, 9) as checkpoints,
    ):
        checkpoints.restore(like(), up_to=1)


@pytest.mark.slow
def test_no_flipped_bit_of_any_file_is_restored(tmp_path):
    save(tmp_path / "sound", [2, 4])
    files = [p for p in (tmp_path / "sound/4").glob("**/*") if p.is_file()]
    places = np.random.default_rng(1)
    for file in files:
        for _ in range(6):
            shutil.copytree(tmp_path / "sound", tmp_path / "run")
            flipped = tmp_path / "run" / file.relative_to(tmp_path / "sound")
            flip(flipped, places.uniform(), places.integers(8))
            step, state, position = newest(tmp_path / "run")
            assert position == {**POSITION, "step": step}, flipped
            chex.assert_trees_all_equal(state, STATE)
            assert (step == 2) == (tmp_path / "run/4.aside").exists()
            shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda s: s["params"].update(wi=np.zeros((8, 32), np.float32)),
            r"5 is a checkpoint of another .*wi has shape \[8, 16\], not \[8, 32\]",
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


def test_what_cannot_be_written_is_one_line_and_no_trace(tmp_path, capfd):
    """The limit stands for a full disk: the kernel refuses to write on."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(OSError) as failed, Checkpoints(tmp_path, 9) as checkpoints:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
        try:
            checkpoints.save(1, on_devices(), POSITION)
            checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    text = str(failed.value)
    assert text.startswith(f"{tmp_path}: a checkpoint could not be written: ")
    assert text.endswith("the same command goes on at the beginning")
    assert "\n" not in text
    assert "Traceback" not in capfd.readouterr().err


def test_what_was_under_way_when_an_array_was_damaged_is_not_printed():
    class Unraisable:
        exc_value = Exception("Encountered error while reading array index: (slice())")

    told = []
    checkpoint._unraisable(told.append, Unraisable)
    assert not told
    Unraisable.exc_value = Exception("something else")
    checkpoint._unraisable(told.append, Unraisable)
    assert told == [Unraisable]
