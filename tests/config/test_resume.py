"""What a run that goes on may have changed, also across versions."""

import copy
import json

import pytest
import yaml

from jaxrl_llm.config import parsing, renamed, resume
from jaxrl_llm.config.parsing import ConfigError

VALUES = {
    "model": {"path": "m"},
    "data": {"train": {"path": "x.jsonl"}},
    "reward": {"functions": [{"name": "exact", "weight": 0.5}]},
    "actor": {"optim": {"lr": 0.5}},
    "trainer": {"total_training_steps": 3},
}


def settings(directory, **changed):
    values = {"output_dir": str(directory), **copy.deepcopy(VALUES)}
    for key, value in changed.items():
        parsing.put(values, key.split("__"), value)
    return parsing.parse(values, "test")


def store(directory, config, without=(), **more):
    """Writes down what an earlier version would have: some keys less, some more."""
    values = config.model_dump(mode="json")
    for key in without:
        *sections, last = key.split("__")
        section = values
        for name in sections:
            section = section[name]
        del section[last]
    for key, value in more.items():
        parsing.put(values, key.split("__"), value)
    (directory / "config.yaml").write_text(yaml.safe_dump(values))


def test_a_directory_without_a_run_is_free(tmp_path):
    resume.check(tmp_path / "none", settings(tmp_path, trainer__resume="never"))


def test_the_same_settings_go_on_and_so_do_those_that_change_no_number(tmp_path):
    config = settings(tmp_path)
    store(tmp_path, config)
    resume.check(tmp_path, config)
    resume.check(tmp_path, settings(tmp_path, trainer__total_training_steps=9))
    resume.check(tmp_path, settings(tmp_path, actor__micro_batch_size=4))


def test_what_may_change_but_alters_numbers_is_said(tmp_path):
    store(tmp_path, settings(tmp_path))
    changed = {
        "trainer__save_freq": 5,
        "rollout__cache_gib": 2.0,
        "actor__mesh__tensor": 2,
        "trainer__total_training_steps": 9,
    }
    assert resume.check(tmp_path, settings(tmp_path, **changed)) == [
        "actor.mesh.tensor was 1, is 2; sums are rounded otherwise from here on, and "
        "tokens may differ",
        "rollout.cache_gib was None, is 2.0; sums are rounded otherwise from here on, "
        "and tokens may differ",
        "trainer.total_training_steps was 3, is 9; the run takes another course from "
        "here on",
    ]


@pytest.mark.parametrize(
    "keys, alters",
    [
        ("output_dir trainer.save_freq trainer.resume val.n val.top_p", "nothing"),
        ("actor.offload reward.model.offload reward.isolation", "nothing"),
        ("reward.memory_gib rollout.checksum_freq rollout.max_mismatch", "nothing"),
        ("rollout.cache_gib rollout.prefill_tokens rollout.max_num_seqs", "rounding"),
        ("rollout.decode_chunk rollout.mesh.tensor rollout.vllm.args", "rounding"),
        ("actor.mesh.fsdp actor.ref_mesh actor.ref_mesh.data actor.remat", "rounding"),
        ("actor.rules.embed actor.pack_length actor.share_prompts", "rounding"),
        ("critic.attention critic.remat reward.model.unroll", "rounding"),
        ("reward.model.micro_batch_size placement.groups.train", "rounding"),
        ("trainer.total_training_steps trainer.critic_warmup", "course"),
        ("rollout.vllm.reproducible", "course"),
        ("seed actor.dtype actor.optim.lr actor.keep_probabilities rollout.n", None),
        ("rollout.dtype reward.model reward.model.path data.train.path", None),
        ("reward.functions rollout.top_p from.the.future", None),
    ],
)
def test_a_field_says_whether_it_may_change(keys, alters):
    for key in keys.split():
        mark = resume.may_change(key)
        assert (mark and mark.alters) == alters, key


def test_a_key_that_was_not_there_yet_counts_as_its_default(tmp_path):
    config = settings(tmp_path)
    store(tmp_path, config, without=["actor__clip_ratio_low", "placement"])
    resume.check(tmp_path, config)
    changed = settings(tmp_path, actor__clip_ratio_low=0.1)
    with pytest.raises(ConfigError, match=r"actor.clip_ratio_low was 0.2, is 0.1"):
        resume.check(tmp_path, changed)


def test_a_key_of_a_reward_function_that_was_not_there_yet_counts_as_its_default(
    tmp_path,
):
    config = settings(tmp_path)
    one = {"name": "exact", "weight": 0.5}
    store(tmp_path, config, reward__functions=[one])
    resume.check(tmp_path, config)


def begun(directory, **inputs):
    """A run that has a checkpoint, and was begun with these."""
    (directory / "checkpoints/4").mkdir(parents=True)
    (directory / "inputs.json").write_text(json.dumps(inputs))


INPUTS = {
    "functions": {"reward function 'judge'": "f"},
    "train": {"column 'prompt'": "p", "column 'answer'": "a"},
    "val": {},
}


@pytest.mark.parametrize(
    "section, name, message",
    [
        (
            "functions",
            "reward function 'judge'",
            "the source of reward function 'j",
        ),
        (
            "train",
            "column 'answer'",
            "data.train: column 'answer' of the rows in",
        ),
        ("train", "column 'new'", "data.train: column 'new' of the rows"),
        (
            "val",
            "column 'prompt'",
            "data.val: column 'prompt' of the held-out questions",
        ),
    ],
)
def test_a_changed_input_is_named_and_refused_or_forced(
    tmp_path, section, name, message
):
    begun(tmp_path, **INPUTS)
    config = settings(tmp_path)
    assert resume.check_inputs(tmp_path, config, INPUTS) == []
    now = {**INPUTS, section: {**INPUTS[section], name: "other"}}
    with pytest.raises(ConfigError, match=message) as error:
        resume.check_inputs(tmp_path, config, now)
    assert "trainer.resume=force" in str(error.value)
    forced = settings(tmp_path, trainer__resume="force")
    (said,) = resume.check_inputs(tmp_path, forced, now)
    assert message[-20:] in said and "goes on all the same" in said


def test_without_a_checkpoint_or_a_record_inputs_may_change(tmp_path):
    config = settings(tmp_path)
    begun(tmp_path, **INPUTS)
    (tmp_path / "inputs.json").write_text("torn")
    (said,) = resume.check_inputs(tmp_path, config, INPUTS)
    assert "inputs.json cannot be read" in said
    (tmp_path / "inputs.json").unlink()  # of an earlier version
    assert resume.check_inputs(tmp_path, config, INPUTS) == []
    (tmp_path / "inputs.json").write_text("{}")
    (tmp_path / "checkpoints/4").rmdir()
    assert resume.check_inputs(tmp_path, config, INPUTS) == []


def test_a_renamed_key_is_read_as_the_new_one(tmp_path, monkeypatch):
    monkeypatch.setitem(renamed.FORMER, "optim.step_size", "actor.optim.lr")
    config = settings(tmp_path)
    without = ["actor__optim__lr"]
    store(tmp_path, config, without=without, optim={"step_size": 0.5})
    with pytest.raises(ConfigError, match="optim: unknown key"):
        resume.check(tmp_path, config)  # the section that held it is not in the table
    monkeypatch.setitem(renamed.FORMER, "optim", renamed.Removed("drop it", {}))
    resume.check(tmp_path, config)
    store(tmp_path, config, without=without, optim={"step_size": 0.25})
    with pytest.raises(ConfigError, match=r"actor.optim.lr was 0.25, is 0.5"):
        resume.check(tmp_path, config)


def test_a_renamed_section_is_read_as_the_new_one(tmp_path, monkeypatch):
    monkeypatch.setitem(renamed.FORMER, "policy", "actor")
    config = settings(tmp_path)
    stored = config.model_dump(mode="json")["actor"]
    store(tmp_path, config, without=["actor"], policy=stored)
    resume.check(tmp_path, config)


def test_a_key_that_is_gone_may_have_been_idle_only(tmp_path, monkeypatch):
    gone = renamed.Removed("use actor.clip_ratio_low", idle=False)
    monkeypatch.setitem(renamed.FORMER, "actor.clip", gone)
    config = settings(tmp_path)
    store(tmp_path, config, actor__clip=False)
    resume.check(tmp_path, config)
    store(tmp_path, config, actor__clip=True)
    with pytest.raises(ConfigError, match="actor.clip is True, but .* gone; use actor"):
        resume.check(tmp_path, config)


def test_a_key_that_this_version_does_not_know_is_an_error_that_names_it(tmp_path):
    config = settings(tmp_path)
    store(tmp_path, config, actor__from_the_future=1)
    with pytest.raises(ConfigError, match="actor.from_the_future: unknown key"):
        resume.check(tmp_path, config)


def test_a_former_key_in_a_file_is_an_error_that_names_the_new_one(monkeypatch):
    gone = renamed.Removed("leave it out", idle=None)
    monkeypatch.setitem(renamed.FORMER, "actor.step_size", "actor.optim.lr")
    monkeypatch.setitem(renamed.FORMER, "seeds", gone)
    values = {"output_dir": "x", **VALUES, "seeds": [1]}
    values["actor"] = {"step_size": 0.5}
    with pytest.raises(ConfigError) as error:
        parsing.parse(values, "a.yaml")
    assert sorted(str(error.value).splitlines()) == [
        "a.yaml: actor.step_size: this key is now actor.optim.lr",
        "a.yaml: seeds: this key is gone; leave it out",
    ]


def test_every_former_key_is_unknown_now_and_every_new_one_is_known():
    known = {path for path in resume.facts(settings("x")) | {"actor.optim.lr": 0.5}}
    for key, now in renamed.FORMER.items():
        assert not any(path == key or path.startswith(f"{key}.") for path in known)
        if isinstance(now, str):
            assert any(path == now or path.startswith(f"{now}.") for path in known)
