"""Whole runs of reward models and DPO on a tiny model: they learn, stop and go on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxrl_llm import cli, models
from jaxrl_llm.config import parsing
from jaxrl_llm.config.names import ConfigError
from jaxrl_llm.config.schema_offline import DpoConfig, RmConfig
from jaxrl_llm.data import given, preferences
from jaxrl_llm.models.value_head import values
from jaxrl_llm.tracking import metric_table, run_directory
from jaxrl_llm.training import evaluation, offline_loop, offline_tasks
from jaxrl_llm.training.checkpoint import Checkpoints
from jaxrl_llm.training.offline_build import build
from jaxrl_llm.training.reference_logprobs import FILE, Stored

SCHEMAS = {"rm": RmConfig, "dpo": DpoConfig}
STEPS = 4
ROWS = [
    {"prompt": f"{i} and {j}:", "chosen": "abc"[: 1 + i % 3], "rejected": "xyz"[:j]}
    for i in range(6)
    for j in range(1, 4)
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The files of pairs to train on, and of those held out."""
    folder = tmp_path_factory.mktemp("rows")
    for name, some in (("train", ROWS[:14]), ("val", ROWS[14:])):
        lines = given.json_lines(some, name, "chosen")
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return {name: {"path": str(folder / f"{name}.jsonl")} for name in ("train", "val")}


def config_of(verb, model, directory, rows, **changed):
    values = {
        "output_dir": str(directory),
        "model": {"path": model},
        "data": {**rows, "train_batch_size": 4, "max_length": 16},
        "learner": {
            "optim": {"lr": 1e-2},
            "dtype": "float32",
            "remat": "none",
            "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
        },
        "trainer": {
            "total_training_steps": STEPS,
            "test_freq": 2,
            "save_freq": 2,
            "num_examples": 0,
        },
    }
    for key, value in changed.items():
        parsing.put(values, key.split("."), value)
    return parsing.parse(values, "a test", schema=SCHEMAS[verb])


def trained(verb, *args, **changed):
    config = config_of(verb, *args, **changed)
    return offline_loop.run(build(config, offline_tasks.of(verb)))


def lines_of(result):
    """The metrics of each step, without times."""
    return [
        {k: v for k, v in line.items() if not k.startswith(("timing_s/", "perf/"))}
        for line in run_directory.read(result.directory)
    ]


def learned(result, verb):
    """The weights of the newest checkpoint."""
    config = parsing.load(result.directory / "config.yaml", schema=SCHEMAS[verb])
    job = build(config, offline_tasks.of(verb))
    with Checkpoints(result.directory / "checkpoints", 2) as checkpoints:
        return jax.device_get(checkpoints.restore(job.abstract_state()).state.params)


@pytest.mark.parametrize("verb", SCHEMAS)
def test_a_run_is_built_of_pairs(verb, tiny_model, rows, tmp_path):
    config = config_of(verb, tiny_model, tmp_path, rows)
    job = build(config, offline_tasks.of(verb))
    batch = job.rows(next(job.stream()))
    assert batch.num_sequences == 2 * config.data.train_batch_size
    assert (batch.ref_logprobs is None) == (verb == "rm")
    assert job.learner.name == verb and len(job.data.val) == len(ROWS) - 14
    assert ("model" in job.inputs) == (verb == "dpo")
    ends = [e.tokens[-1] for pair in job.data.train for e in pair.episodes]
    assert {*ends} == {*job.source.arch.eos_token_ids}


@pytest.fixture(scope="module")
def reward_model(tiny_model, rows, tmp_path_factory):
    return trained("rm", tiny_model, tmp_path_factory.mktemp("rm") / "run", rows)


@pytest.mark.slow
def test_a_reward_model_tells_right_from_wrong_and_is_written(reward_model, rows):
    table = reward_model.table()
    assert table["rm/loss"][1] == pytest.approx(np.log(2))  # the head starts at 0
    assert table["val-core/all/rm/accuracy"][STEPS] == 1.0
    assert [name for name in table if not metric_table.find(name)] == []
    # What is written scores held-out answers as the run measured them.
    opened = models.open_classifier(reward_model.weights)
    on_one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = models.abstract_critic(opened.arch)
    shardings = jax.tree.map(lambda _: on_one, shapes)
    params = opened.load(dtype="float32", shardings=shardings)
    config = parsing.load(reward_model.directory / "config.yaml", schema=RmConfig)
    job = build(config, offline_tasks.of("rm"))
    margins = []
    for pair in job.data.val:
        scores = []
        for episode in pair.episodes:
            tokens = jnp.array([[*pair.prompt.tokens, *episode.tokens.tolist()]])
            places = jnp.arange(tokens.shape[1])[None]
            where = tokens, places, jnp.zeros_like(tokens)
            found = values(opened.arch, params, *where, dtype=jnp.float32)
            scores.append(float(found[0, -1]))
        margins.append(scores[0] - scores[1])
    # bfloat16 files.
    wanted = table["val-core/all/rm/margin"][STEPS]
    assert np.mean(margins) == pytest.approx(wanted, rel=0.03)


@pytest.mark.slow
def test_a_checkpoint_is_written_as_a_reward_model(reward_model, tiny_model, tmp_path):
    newest = reward_model.directory / "checkpoints" / str(STEPS)
    cli.convert(str(newest), str(tmp_path / "out"), dtype="bfloat16")
    got, wanted = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "out", reward_model.weights)
    )
    assert got.keys() == wanted.keys() and "score.weight" in got
    for name, tensor in wanted.items():
        np.testing.assert_array_equal(got[name], tensor)
    asked = {"output_dir": "x", "model": {"path": tiny_model}, "data": {}}
    asked["data"] = {"train": {"path": "a.jsonl"}, "val": {"path": "a.jsonl"}}
    asked["reward"] = {"functions": [{"name": "exact"}]}
    asked["trainer"] = {"total_training_steps": 1}
    with pytest.raises(ConfigError, match="of a reward model, which answers no"):
        evaluation.model_of(str(newest), parsing.parse(asked, "a test"))


@pytest.mark.slow
@pytest.mark.parametrize("verb", SCHEMAS)
def test_a_stopped_run_goes_on_bit_for_bit(verb, tiny_model, rows, tmp_path):
    whole = trained(verb, tiny_model, tmp_path / "whole", rows)
    part = tmp_path / "part", rows
    stopped = trained(verb, tiny_model, *part, **{"trainer.max_hours": 1e-9})
    assert stopped.stopped and [line["step"] for line in lines_of(stopped)] == [0, 1]
    done = trained(verb, tiny_model, *part)
    assert not done.stopped and lines_of(done) == lines_of(whole)
    jax.tree.map(
        np.testing.assert_array_equal, learned(done, verb), learned(whole, verb)
    )


@pytest.mark.slow
@pytest.mark.parametrize("verb", SCHEMAS)
def test_packing_and_micro_batches_change_nothing(verb, tiny_model, rows, tmp_path):
    kinds = {"loss_type": ["sigmoid", "sft"]} if verb == "dpo" else {}
    plain = trained(verb, tiny_model, tmp_path / "a", rows, **kinds)
    packed = {
        "learner.pack_length": 32,
        "learner.share_prompts": True,
        "learner.micro_batch_size": 4,
    }
    other = trained(verb, tiny_model, tmp_path / "b", rows, **kinds, **packed)
    for one, two in zip(lines_of(plain), lines_of(other), strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            assert two[name] == pytest.approx(value, rel=1e-3, abs=1e-3), name


@pytest.mark.slow
def test_dpo_moves_from_a_reference_that_is_computed_once(tiny_model, rows, tmp_path):
    where = tiny_model, tmp_path / "run", rows
    result = trained("dpo", *where, **{"trainer.total_training_steps": 2})
    table, file = result.table(), result.directory / FILE
    assert table["rewards/margins"][1] == 0.0  # the policy is the reference
    assert table["dpo/loss"][1] == pytest.approx(np.log(2))
    assert table["val-core/all/rewards/accuracies"][2] > 0.5
    assert [name for name in table if not metric_table.find(name)] == []
    made = file.stat().st_mtime_ns
    trained("dpo", *where, **{"trainer.total_training_steps": 3})
    assert file.stat().st_mtime_ns == made
    # A file that is lost is the same again, though the policy has learned since.
    before = dict(np.load(file))
    file.unlink()
    trained("dpo", *where, **{"trainer.total_training_steps": 4})
    np.testing.assert_array_equal(np.load(file)["logprobs"], before["logprobs"])
    # One of another run is refused.
    np.savez(file, **(before | {"digest": np.array("another")}))
    with pytest.raises(ConfigError, match="is of other pairs or of another model"):
        trained("dpo", *where, **{"trainer.total_training_steps": 5})
    forced = {"trainer.total_training_steps": 5, "trainer.resume": "force"}
    trained("dpo", *where, **forced)
    assert str(np.load(file)["digest"]) == str(before["digest"])


def test_stored_log_probabilities(tmp_path):
    told = [np.arange(3, dtype=np.float32), np.arange(2, dtype=np.float32)]
    stored = Stored(tmp_path, {"train": {"a": "1"}})
    assert stored.read([3, 2], may_differ=False) is None
    stored.write(told)
    for got, wanted in zip(stored.read([3, 2], may_differ=False), told, strict=True):
        np.testing.assert_array_equal(got, wanted)
    other = Stored(tmp_path, {"train": {"a": "2"}})
    assert other.read([3, 2], may_differ=True) is None
    with pytest.raises(ConfigError, match="reference_logprobs.npz is of other pairs"):
        other.read([3, 2], may_differ=False)
    damaged = bytearray(stored.path.read_bytes())
    damaged[len(damaged) // 2] ^= 255
    stored.path.write_bytes(damaged)
    assert stored.read([3, 2], may_differ=False) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == [FILE]


@pytest.mark.parametrize(
    "verb, changed, message",
    [
        ("rm", {"center_rewards_coefficient": -1}, "greater than or equal to 0"),
        ("rm", {"learner.pack_length": 24}, "both answers of a pair share .* least 32"),
        ("rm", {"learner.share_prompts": True}, "needs learner.pack_length"),
        ("rm", {"label_smoothing": 0.1}, "unknown key"),
        ("dpo", {"loss_type": "sigmod"}, "did you mean 'sigmoid'"),
        ("dpo", {"loss_type": []}, "loss_type is empty"),
        ("dpo", {"loss_type": ["ipo", "ipo"]}, "name each loss once"),
        ("dpo", {"loss_weights": [1, 2]}, "2 numbers for the 1 losses"),
        ("dpo", {"label_smoothing": 0.1}, "which only loss_type robust reads"),
        ("dpo", {"label_smoothing": 0.5}, "less than 0.5"),
        ("dpo", {"beta": 0}, "greater than 0"),
    ],
)
def test_settings_that_make_no_run(verb, changed, message, rows, tmp_path):
    with pytest.raises(ConfigError, match=message):
        config_of(verb, "model", tmp_path, rows, **changed)


def test_a_reward_model_answers_no_questions(rows, tmp_path):
    asked = {"data.val_prompts": {"path": "questions.jsonl"}}
    with pytest.raises(ConfigError, match="a reward model answers no questions"):
        config_of("rm", "model", tmp_path, rows, **asked)


def test_pairs_keep_their_order_through_rows():
    """So that what is found of them is told to the right ones."""
    from jaxrl_llm.data.examples import Example, episode_of
    from jaxrl_llm.data.packing import Layout
    from jaxrl_llm.data.types import Prompt

    pairs = [
        Example(
            prompt=Prompt(id=i, content="", tokens=(1,), columns={}),
            episodes=tuple(
                episode_of(i, side, [2] * n, [True] * n) for side, n in enumerate(size)
            ),
        )
        for i, size in enumerate([(3, 1), (1, 1), (2, 4)])
    ]
    told = [np.arange(sum(p.lengths) - 2, dtype=np.float32) + 10 * p.id for p in pairs]
    known = [preferences.with_reference(*x) for x in zip(pairs, told, strict=True)]
    for layout in (Layout(), Layout(pack_length=16, share_prompts=True)):
        layout = dataclasses.replace(layout, most_sequences=10)
        rows = preferences.make_rows(known, layout, reference=True)
        found = preferences.by_pair(rows, rows.ref_logprobs, len(pairs))
        for got, wanted in zip(found, told, strict=True):
            np.testing.assert_array_equal(got, wanted)
