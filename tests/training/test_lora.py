"""Whole runs that train adapters."""

import json
import shutil

import chex
import jax
import numpy as np
import pytest
from short_run import GRPO, make_config, mean_id, newest

from jaxrl_llm import cli, models
from jaxrl_llm.config.names import ConfigError
from jaxrl_llm.rewards import RewardFunction
from jaxrl_llm.training import evaluation
from jaxrl_llm.training import loop as train
from jaxrl_llm.training.build import build
from jaxrl_llm.training.roles import adapter_notes, adapters_of, check_base

LORA = {"rank": 4, "alpha": 8.0}


def run(config):
    job = build(config, [RewardFunction(name="high", function=mean_id)])
    train.run(job)
    return job


@pytest.mark.slow
@pytest.mark.parametrize(
    ("refreshed", "quantization"), [(False, None), (True, None), (False, "int8")]
)
def test_a_run_of_adapters_goes_on_bit_for_bit_and_ends_as_a_whole_model(
    tiny_model, tmp_path, refreshed, quantization
):
    own = LORA | {"quantization": quantization}
    changed = {
        "actor.lora": own,
        "critic.lora": own,
        "actor.use_kl_loss": True,
        "actor.ref_refresh_steps": 1 if refreshed else None,
        "data.train_batch_size": 4,
        "trainer.save_freq": 1,
        "trainer.save_hf": True,
        "trainer.total_training_steps": 2,
    }
    config = make_config(tiny_model, tmp_path, **changed)
    run(config)
    whole, parts = tmp_path / "run", tmp_path / "resumed"
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / "2")
    job = run(config.model_copy(update={"output_dir": str(parts)}))
    like = job.abstract_state()
    expected, got = newest(whole, like), newest(parts, like)
    chex.assert_trees_all_equal(expected, got)
    # A checkpoint has adapters, their moments and a critic's head; of the reference,
    # adapters if it is a later one than the base.
    sizes = [x.size for x in jax.tree.leaves(expected.actor.params)]
    assert len(sizes) == 14
    moments = [x.size for x in jax.tree.leaves(expected.actor.opt_state) if x.ndim]
    assert moments == 2 * sizes
    assert len(jax.tree.leaves(expected.reference)) == (14 if refreshed else 0)
    assert {*expected.critic.params} == {"decoder", "weight", "bias"}
    assert {*expected.critic.params["decoder"]["layers"]} == {"lora"}
    _, saved, _ = models.load(whole / "huggingface")
    weights = jax.device_get(job.actor.weights(job.actor.start().params))
    before = jax.device_get(job.actor.read_weights("float32"))
    chex.assert_trees_all_equal(weights, before)
    same = np.asarray(saved["layers"]["q"], np.float32) == before["layers"]["q"]
    assert not same.all()
    merged = jax.device_get(
        models.merged(before, expected.actor.params, models.Lora(**LORA))
    )
    # What is written is rounded to the model's own dtype.
    chex.assert_trees_all_close(saved, merged, rtol=1e-2, atol=1e-2)
    asked, path = evaluation.model_of(str(whole / "checkpoints" / "2"), config)
    assert asked.actor.lora == config.actor.lora and path.name == "2"
    asked, path = evaluation.model_of(str(whole), config)
    assert asked.actor.lora is None and path is None


@pytest.mark.slow
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_an_engine_that_is_sent_adapters_alone_gives_the_same_run(
    tiny_model, tmp_path, quantization
):
    lines = {}
    for how in ("merge", "separate"):
        changed = GRPO | {
            "actor.lora": LORA | {"quantization": quantization},
            "rollout.lora": how,
            "data.train_batch_size": 4,
            "trainer.total_training_steps": 2,
        }
        run(make_config(tiny_model, tmp_path / how, **changed))
        text = (tmp_path / how / "run" / "metrics.jsonl").read_text()
        lines[how] = [json.loads(line) for line in text.splitlines()]
    for one, other in zip(*lines.values(), strict=True):
        assert other["rollout/adapters_mib"] < 0.1 and "rollout/adapters_mib" not in one
        for name in ("reward/high/mean", "actor/grad_norm", "response_length/mean"):
            assert one.get(name) == pytest.approx(other.get(name), abs=1e-4)
    assert "reward/high/mean" in lines["merge"][-1]


@pytest.mark.slow
def test_what_a_run_leaves_is_read_by_others_and_goes_on_in_another(
    tiny_model, tmp_path, capsys
):
    changed = GRPO | {
        "actor.lora": LORA,
        "data.train_batch_size": 4,
        "trainer.save_freq": 1,
        "trainer.save_hf": True,
        "trainer.total_training_steps": 2,
    }
    config = make_config(tiny_model, tmp_path, **changed)
    job = run(config)
    ran = tmp_path / "run"
    last = newest(ran, job.abstract_state()).actor.params
    found = models.open(ran / "adapter")
    assert found.adapter.base == tiny_model and found.tokenizer.chat_template
    chex.assert_trees_all_equal(jax.device_get(found.adapter.load()), last)
    assert 'library_name: "peft"' in (ran / "adapter" / "README.md").read_text()
    base = models.load(tiny_model).params
    merged = models.merged(base, last, models.Lora(**LORA))
    of_step = str(ran / "checkpoints" / "2")
    for name, source in {"merged": str(ran), "again": of_step}.items():
        cli.convert(source, str(tmp_path / name), dtype="float32", merge=True)
        got = models.load(tmp_path / name).params
        chex.assert_trees_all_close(got, merged, atol=1e-6)
    cli.convert(of_step, str(tmp_path / "adapter"))
    assert "adapters, float32" in capsys.readouterr().out
    one, other = (
        (folder / "adapter_model.safetensors").read_bytes()
        for folder in (ran / "adapter", tmp_path / "adapter")
    )
    assert one == other

    path = {"actor.lora": LORA | {"path": str(ran / "adapter")}}
    more = path | {"actor.use_kl_loss": True, "trainer.save_hf": False}
    config = make_config(tiny_model, tmp_path / "next", **changed | more)
    job = build(config, [RewardFunction(name="high", function=mean_id)])
    start = job.actor.start().params
    chex.assert_trees_all_equal(jax.device_get(start), last)
    # What it is held near is what it began with, not the base.
    rows = job.actor.largest_rows()
    own = job.actor.policy.score(job.actor.computed(start), rows)
    np.testing.assert_array_equal(job.actor.reference.score(rows), own)
    train.run(job)


def test_adapters_to_begin_with_must_be_of_the_form_that_is_trained(
    tiny_model, tmp_path
):
    arch = models.open(tiny_model).arch
    there = models.Lora(rank=2, alpha=6.0, modules=("q", "down"))
    adapters = jax.tree.map(
        lambda x: np.ones(x.shape, x.dtype), models.abstract_adapters(arch, there)
    )
    folder = tmp_path / "adapter"
    models.save_adapter(folder, arch, adapters, there, base="another")

    def config(**section):
        lora = {"path": str(folder)} | section
        return make_config(tiny_model, tmp_path, **GRPO | {"actor.lora": lora})

    wrong = config(rank=2, modules=["q_proj", "k_proj"])
    remedy = (
        r"actor.lora.path .* of another form; set actor.lora.alpha to 6.0, "
        r"actor.lora.modules to \['q_proj', 'down_proj'\]"
    )
    with pytest.raises(ConfigError, match=remedy):
        adapters_of(wrong, "actor", arch)
    right = config(rank=2, alpha=6.0, modules=["down_proj", "q_proj"])
    given = adapters_of(right, "actor", arch)
    chex.assert_trees_all_equal(jax.device_get(given.load()), adapters)
    [note] = adapter_notes(right, {"actor": right.actor}, arch)
    assert "says that it belongs to another; it is put beside model.path" in note
    change = {"base_model_name_or_path": tiny_model, "lora_dropout": 0.1}
    said = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(said | change))
    [note] = adapter_notes(right, {"actor": right.actor}, arch)
    assert "was trained with lora_dropout 0.1; here nothing is dropped" in note
    with pytest.raises(ConfigError, match="which model is to answer"):
        evaluation.evaluate_all(right)  # the base alone is not what it names
    with pytest.raises(ConfigError, match="is an adapter of .* let model.path be that"):
        check_base(right, "actor", models.open(folder))
