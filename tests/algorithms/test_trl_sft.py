"""Supervised fine-tuning against TRL 1.16.0's SFTTrainer: rows, loss, gradients."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trl_sft
from safetensors.numpy import load_file

from jaxrl_llm import models
from jaxrl_llm.algorithms import logprobs
from jaxrl_llm.algorithms.sft import Sft
from jaxrl_llm.data import examples
from jaxrl_llm.data.chat_template import Encoder
from jaxrl_llm.data.examples import Format
from jaxrl_llm.data.packing import Layout
from jaxrl_llm.data.sources import Source

GOLDEN = json.loads(
    (pathlib.Path(__file__).parents[1] / "golden/trl_1.16.0_sft.json").read_text()
)
PACKED = Layout(pack_length=128, longest=64, most_sequences=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("trl") / "model"
    trl_sft.checkpoint(directory)
    return directory


def ours(model, rows):
    """Examples of rows as TRL has them: all that follows a prompt is learned."""
    source = models.open(str(model))
    end = source.tokenizer.eos_token_id
    form = Format(assistant_only=False, stops=frozenset({end}), end=end)
    how = Encoder(tokenizer=source.tokenizer), form, "the chat template"
    encoded = [examples.encode(row, Source(path="x"), *how) for row in rows]
    made = zip(encoded, rows, strict=True)
    return encoded, [
        examples.example_of(i, one, row) for i, (one, row) in enumerate(made)
    ]


@functools.cache
def differentiated(arch):
    """One program for all: loss, metrics and gradients of packed rows."""

    def loss(params, batch, objective):
        hidden = models.forward(
            arch,
            params,
            batch.tokens,
            batch.positions,
            batch.sequence_ids,
            dtype=jnp.float32,
        )
        found = logprobs.of_tokens(
            hidden,
            models.output_matrix(params),
            batch.tokens,
            batch.positions,
            batch.response_mask,
            likeliest=True,
        )
        planned = objective.plan(batch, None, jnp.int32(0))
        value, kept = objective.loss(batch, found, planned)
        return value, objective.metrics(batch, kept, planned)

    return jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=2)


def check(model, directory, rows, loss_type, told):
    encoded, made = ours(model, rows)
    for mine, theirs in zip(encoded, told["rows"], strict=True):
        assert mine.tokens == theirs["input_ids"]
        learned = [-100 if not one else t for t, one in zip(*mine[:2], strict=True)]
        assert learned == theirs["labels"]
    loaded = models.load(str(model))
    batch = jax.device_put(examples.make_rows(made, PACKED))
    assert batch.tokens.shape == (2, 128)
    (loss, metrics), gradients = differentiated(loaded.arch)(
        loaded.params, batch, Sft(loss_type)
    )
    np.testing.assert_allclose(loss, told["loss"], rtol=1e-5)
    for name, value in told["metrics"].items():
        np.testing.assert_allclose(metrics[f"sft/{name}"].value, value, rtol=1e-5)
    # Gradients have the layout of weights, and so the names of weights.
    models.save(directory, loaded.arch, gradients, loaded.tokenizer, dtype="float32")
    found = load_file(directory / "model.safetensors")
    assert found.keys() == told["gradients"].keys()
    for name, wanted in told["gradients"].items():
        got = trl_sft.seen(name, found[name])
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    "case",
    # One program is enough by default.
    [c if "nll" in c else pytest.param(c, marks=pytest.mark.slow) for c in GOLDEN],
)
def test_rows_loss_and_gradients_are_those_of_trl(case, model, tmp_path):
    kind, _, loss_type = case.partition(", ")
    check(model, tmp_path / "gradients", trl_sft.ROWS[kind], loss_type, GOLDEN[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", GOLDEN)
def test_trl_still_says_so(case, model, tmp_path):
    pytest.importorskip("trl")
    kind, _, loss_type = case.partition(", ")
    rows = trl_sft.ROWS[kind]
    told = trl_sft.told(str(model), rows, loss_type)
    check(model, tmp_path / "gradients", rows, loss_type, told)
