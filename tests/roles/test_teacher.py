"""A teacher of another size: what it says, where it may be, which ones are refused."""

import dataclasses
import json
import math
from types import SimpleNamespace

import fixed_rollouts
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxrl_llm import models
from jaxrl_llm.config import parsing
from jaxrl_llm.config.names import ConfigError
from jaxrl_llm.data.packing import Layout, make_rows
from jaxrl_llm.sharding import mesh
from jaxrl_llm.training import roles

NUM_TOKENS = 259
"""In the tiny tokenizer; models have padding rows behind them."""


@pytest.fixture(scope="module")
def wider(tmp_path_factory):
    """Another model than the tiny one, with more padding."""
    return tiny.checkpoint(
        tmp_path_factory.mktemp("teacher") / "model",
        hidden_size=64,
        num_heads=8,
        vocab_size=272,
        num_layers=3,
        tie_embeddings=False,
    )


def settings(model, teacher, mode="forward_kl_topk", **changed):
    config = fixed_rollouts.make_config(model)
    values = json.loads(config.model_dump_json(exclude_unset=True))
    values["distillation"] = {
        "teacher": {"path": teacher, "dtype": "float32"},
        "mode": mode,
        "coef": 0.5,
    }
    if mode == "forward_kl_topk":
        values["distillation"]["topk"] = 5
    for key, value in changed.items():
        parsing.put(values, key.split("."), value)
    return parsing.parse(values, "test")


def opened(words, **arch):
    """A checkpoint of which only the tokens matter."""
    tokenizer = words and SimpleNamespace(get_vocab=lambda: words)
    arch = tiny.arch(**{"max_positions": 64} | arch)
    made = object.__new__(models.Checkpoint)  # without weights
    made.__dict__.update(arch=arch, tokenizer=tokenizer)
    return made


WORDS = {"a": 0, "b": 1, "<|end|>": 2}
TURNED = {"a": 1, "b": 0, "<|end|>": 2}
MORE = WORDS | {"<|tool|>": 3}


@pytest.mark.parametrize(
    "teacher, own, message",
    [
        (opened(TURNED), WORDS, "'a' is token 1, of the policy 0"),
        (opened(MORE), WORDS, r"policy has no .*tool\|>', which is 3 of the teacher"),
        (opened(WORDS), MORE, r"it has no token .*tool\|>', which is 3 of the policy"),
        (opened(None), WORDS, "has no tokenizer"),
        (opened(WORDS, vocab_size=2), WORDS, "has 2 rows, fewer than the 3 tokens"),
        (opened(WORDS, max_positions=8), WORDS, "has 8 positions, but .* is 16"),
    ],
)
def test_a_teacher_of_other_tokens_is_refused(teacher, own, message, monkeypatch):
    monkeypatch.setattr(models, "open", lambda path, **how: teacher)
    config = settings("student", "other", "reverse_kl")
    with pytest.raises(
        ConfigError, match=f"distillation.teacher.path other.*{message}"
    ):
        roles.open_teacher(config, opened(own))


def test_rows_of_padding_make_no_other_vocabulary(monkeypatch):
    teacher = opened(WORDS, vocab_size=128)
    monkeypatch.setattr(models, "open", lambda path, **how: teacher)
    config = settings("student", "other", **{"distillation.topk": 2})
    found, count = roles.open_teacher(config, opened(dict(WORDS)))
    assert found is teacher and count == 3
    config = settings("student", "other", **{"distillation.topk": 3})
    with pytest.raises(ConfigError, match="topk is 3, .* has only 3 tokens"):
        roles.open_teacher(config, opened(dict(WORDS)))


def teacher_on(config, path, axes):
    on = mesh.make(
        {name: axes.get(name, 1) for name in mesh.AXES},
        jax.devices()[: math.prod(axes.values())],
    )
    return roles.teacher_of(config, models.open(path), NUM_TOKENS, on), on


def rows(**layout):
    made = make_rows(
        *fixed_rollouts.make_rollouts(),
        fixed_rollouts.ADVANTAGES,
        layout=Layout(**layout),
    )
    tokens = made.tokens.copy()
    tokens[1, 8] = 270  # a padding row of the policy's, if that has so many
    return dataclasses.replace(made, tokens=tokens)


@pytest.mark.slow
@pytest.mark.parametrize(
    "axes, changed",
    [
        ({}, {}),
        ({"fsdp": 2, "tensor": 4}, {"distillation.teacher.micro_batch_size": 2}),
        ({"context": 2, "tensor": 2}, {"distillation.teacher.offload": True}),
    ],
    ids=["one", "fsdp, tensor", "context, tensor"],
)
def test_a_teacher_says_what_its_logits_do_without_padding(
    axes, changed, tiny_model, wider
):
    batch = rows()
    teacher, _ = teacher_on(settings(tiny_model, wider, **changed), wider, axes)
    found = teacher.score(batch)
    arch, params, _ = models.load(wider)
    read = jax.device_put((batch.tokens, batch.positions, batch.sequence_ids))
    hidden = models.forward(arch, params, *read, dtype=jnp.float32)
    logits = np.asarray(hidden @ models.output_matrix(params).T, np.float64)
    logp = np.roll(logits[..., :NUM_TOKENS], 1, axis=1) / 0.8
    logp -= np.log(np.exp(logp).sum(axis=-1, keepdims=True))
    mask, known = batch.response_mask, batch.tokens < NUM_TOKENS
    own = np.minimum(batch.tokens, NUM_TOKENS - 1)[..., None]
    own = np.where(known, np.take_along_axis(logp, own, axis=-1)[..., 0], -np.inf)
    assert not known.all()
    close = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(found.logprobs, np.where(mask, own, 0), **close)
    ids = np.argsort(-logp, axis=-1)[..., :5]
    np.testing.assert_array_equal(found.top_ids, np.where(mask[..., None], ids, 0))
    top = np.where(mask[..., None], np.take_along_axis(logp, ids, axis=-1), 0)
    np.testing.assert_allclose(found.top_logprobs, top, **close)
    entropy = np.where(mask, -(np.exp(logp) * logp).sum(axis=-1), 0)
    np.testing.assert_allclose(found.entropy, entropy, **close)


def learned(config, model, wider, axes):
    """Metrics and weights after an update."""
    teacher, on = teacher_on(config, wider, axes)
    actor = roles.actor_of(config, models.open(model), on, teacher=teacher)
    batch = actor.make_rows(*fixed_rollouts.make_rollouts(), fixed_rollouts.ADVANTAGES)
    state, metrics = actor.update(actor.start(), batch, seed=0)
    return metrics, jax.device_get(state.params)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["reverse_kl", "forward_kl_topk", "jsd"])
def test_an_update_is_that_of_one_device_on_any_mesh(mode, tiny_model, wider):
    wanted, weights = learned(settings(tiny_model, wider, mode), tiny_model, wider, {})
    assert wanted["distillation/loss"] != 0
    for axes, changed in (
        ({"data": 2, "fsdp": 2, "tensor": 2}, {"actor.micro_batch_size": 4}),
        ({"context": 2, "tensor": 2}, {}),
        ({"fsdp": 4}, {"actor.pack_length": 32}),
        ({}, {"actor.pack_length": 32, "actor.share_prompts": True}),
    ):
        config = settings(tiny_model, wider, mode, **changed)
        found, moved = learned(config, tiny_model, wider, axes)
        for name in wanted.keys() - {"perf/token_efficiency"}:
            np.testing.assert_allclose(
                found[name], wanted[name], 2e-5, 2e-6, err_msg=f"{axes} {name}"
            )
        for x, y in zip(*map(jax.tree.leaves, (moved, weights)), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-6, err_msg=axes)
