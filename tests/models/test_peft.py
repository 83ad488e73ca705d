"""Adapters in PEFT's folders: in, out, and added to the model that they name."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from jaxrl_llm import cli, models
from jaxrl_llm.models import lora
from jaxrl_llm.models.checkpoints import peft
from jaxrl_llm.models.checkpoints import tensor_map as weights
from jaxrl_llm.models.checkpoints.files import ModelFileError
from jaxrl_llm.sharding import mesh, rules

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ARCH = tiny.arch(vocab_size=264)
# What PEFT calls the matrices of a layer, and their shapes [out, in] in `tiny.arch`.
MATRICES = {
    "q": ("self_attn.q_proj", 32, 32),
    "k": ("self_attn.k_proj", 16, 32),
    "v": ("self_attn.v_proj", 16, 32),
    "o": ("self_attn.o_proj", 32, 32),
    "gate": ("mlp.gate_proj", 64, 32),
    "up": ("mlp.up_proj", 64, 32),
    "down": ("mlp.down_proj", 32, 64),
}
RANK = 3


def tensors(modules=tuple(MATRICES), layers=(0, 1), dtype=np.float32):
    """An adapter as PEFT stores it."""
    draw, found = np.random.default_rng(0), {}
    for i in (0, 1):
        for module, (name, out, inner) in MATRICES.items():
            stem = f"base_model.model.model.layers.{i}.{name}"
            a = draw.standard_normal((RANK, inner)).astype(dtype)
            b = draw.standard_normal((out, RANK)).astype(dtype)
            if module in modules and i in layers:
                found |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
    return found


def write(folder, base, held=None, **said):
    """A folder of PEFT's, written by hand."""
    folder.mkdir(exist_ok=True)
    held = tensors() if held is None else held
    save_file(held, folder / WEIGHTS, {"format": "pt"})
    names = [name.split(".")[-1] for name, _, _ in MATRICES.values()]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": RANK,
        "lora_alpha": 6,
        "target_modules": names,
        "bias": "none",
        "lora_dropout": 0.05,
        "inference_mode": True,
        "peft_version": "0.21.2",
    }
    (folder / CONFIG).write_text(json.dumps(config | said))
    return folder


@pytest.fixture
def adapter(tiny_model, tmp_path):
    return write(tmp_path / "adapter", tiny_model)


def refusal(folder):
    with pytest.raises(ModelFileError) as caught:
        models.open(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def expected(base, held, scale):
    """W + scale * B A for every tensor of a model that has an adapter."""
    found = dict(base)
    for name, a in held.items():
        if name.endswith(".lora_A.weight"):
            b = held[name.replace("lora_A", "lora_B")]
            own = name.removeprefix("base_model.model.").replace(".lora_A", "")
            factor = scale(own) if callable(scale) else scale
            found[own] = found[own] + factor * (b.astype(float) @ a.astype(float))
    return found


def check_merged(folder, wanted):
    """The model of an adapter's folder has these tensors."""
    found = models.open(folder)
    params = found.load()
    stored = {
        name: value()
        for name, _, value in weights.write(found.arch, params, jnp.float32)
    }
    assert stored.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(stored[name], value, atol=2e-6, err_msg=name)


def test_an_adapter_is_read_into_our_axes(adapter, tiny_model):
    found = peft.open(adapter, models.open(tiny_model).arch)
    assert found.lora == lora.Lora(rank=RANK, alpha=6.0)
    assert (found.base, found.dropout, found.lora.scale) == (tiny_model, 0.05, 2.0)
    tree, held = found.load(dtype=jnp.float32)["layers"]["lora"], tensors()
    for module, (name, _, _) in MATRICES.items():
        for i in (0, 1):
            stem = f"base_model.model.model.layers.{i}.{name}"
            a, b = held[f"{stem}.lora_A.weight"], held[f"{stem}.lora_B.weight"]
            # Heads are the outer axis of what PEFT has in one.
            got = np.asarray(tree[module]["a"][i]).reshape(-1, RANK)
            np.testing.assert_array_equal(got, a.T)
            got = np.asarray(tree[module]["b"][i]).reshape(RANK, -1)
            np.testing.assert_array_equal(got, b.T)


def test_what_is_written_is_what_was_read(adapter, tmp_path, tiny_model):
    arch = models.open(tiny_model).arch
    for rslora, dtype in ((False, "float32"), (True, "bfloat16")):
        held = {name: x.astype(dtype) for name, x in tensors().items()}
        first = write(tmp_path / dtype, tiny_model, held, use_rslora=rslora)
        found = peft.open(first, arch)
        assert found.lora.scale == (6 / RANK**0.5 if rslora else 2.0)
        peft.save(
            tmp_path / f"{dtype}-again",
            arch,
            found.load(),
            found.lora,
            base=found.base,
            dtype=dtype,
        )
        again = load_file(tmp_path / f"{dtype}-again" / WEIGHTS)
        assert again.keys() == held.keys()
        for name, x in held.items():
            assert again[name].dtype == x.dtype and again[name].shape == x.shape
            assert again[name].tobytes() == x.tobytes()
        said = json.loads((tmp_path / f"{dtype}-again" / CONFIG).read_text())
        before = json.loads((first / CONFIG).read_text())
        for key in ("r", "lora_alpha", "target_modules", "base_model_name_or_path"):
            assert said[key] == before[key]
        assert said["use_rslora"] is rslora


def test_an_adapter_is_added_to_the_model_it_names(adapter, tiny_model):
    base = load_file(f"{tiny_model}/model.safetensors")
    check_merged(adapter, expected(base, tensors(), 2.0))
    found = models.open(adapter)
    assert found.tokenizer is not None  # the model's own
    assert found.adapter.lora.rank == RANK
    assert models.open(tiny_model).adapter is None


def test_every_device_adds_its_own_part(adapter):
    over = mesh.make({"data": 1, "fsdp": 4, "tensor": 2})
    layout = rules.to_shardings(models.logical_axes(ARCH), over, rules.TRAIN)
    parts = models.load(adapter, shardings=layout).params
    assert len(parts["layers"]["q"].sharding.device_set) == 8
    whole = models.load(adapter).params
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), parts, whole)


def test_ranks_alphas_and_layers_of_their_own(tmp_path, tiny_model):
    held = tensors(("q", "down"))
    stem = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
    held[f"{stem}A.weight"] = held[f"{stem}A.weight"][:2]
    held[f"{stem}B.weight"] = held[f"{stem}B.weight"][:, :2].copy()
    folder = write(
        tmp_path / "adapter",
        tiny_model,
        held,
        target_modules=["q_proj", "mlp.down_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 2},
        alpha_pattern={"down_proj": 12},
    )
    base = load_file(f"{tiny_model}/model.safetensors")

    def scale(name):
        if "down_proj" in name:
            return 12 / RANK
        return 6 / 2 if ".1." in name else 6 / RANK

    check_merged(folder, expected(base, held, scale))
    found = models.open(folder).adapter
    assert (found.lora.rank, found.lora.modules) == (RANK, ("q", "down"))
    second = tensors(("q",), layers=(1,))
    write(folder, tiny_model, second, target_modules=["q_proj"], layers_to_transform=1)
    check_merged(folder, expected(base, second, 2.0))


@pytest.mark.parametrize(
    "targets", ["all-linear", r".*\.(q|k|v|o|gate|up|down)_proj", None]
)
def test_a_pattern_means_what_the_file_has_tensors_for(adapter, tiny_model, targets):
    write(adapter, tiny_model, target_modules=targets)
    assert models.open(adapter).adapter.lora.modules == tuple(MATRICES)
    stem = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    write(adapter, tiny_model, without(stem), target_modules=targets)
    assert f"tensor {stem} is missing" in refusal(adapter)


def without(*names):
    return {name: x for name, x in tensors().items() if name not in names}


@pytest.mark.parametrize(
    "said, message",
    [
        ({"peft_type": "IA3"}, "peft_type='IA3' is not supported; supported: 'LORA'"),
        ({"peft_type": None}, "it has no peft_type"),
        ({"task_type": "SEQ_CLS"}, "task_type='SEQ_CLS' is not supported"),
        ({"bias": "all"}, "bias='all' is not supported; supported: 'none'"),
        ({"bias": "lora_only"}, "bias='lora_only' is not supported"),
        ({"lora_bias": True}, "lora_bias=True is not supported"),
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"modules_to_save": ["score"]}, r"modules_to_save=\['score'\] is not supp"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not supported"),
        ({"layer_replication": [[0, 1]]}, r"layer_replication=\[\[0, 1\]\] is not"),
        ({"target_parameters": ["x"]}, "target_parameters.* is not supported"),
        ({"an_invention": 3}, "an_invention=3 is not supported"),
        ({"target_modules": ["q_proj", "lm_head"]}, "target_modules has lm_head"),
        ({"target_modules": ["embed_tokens"]}, "target_modules has embed_tokens"),
        ({"target_modules": ["c_attn"]}, "is on none of the matrices .* q_proj, k_pr"),
        ({"target_modules": 3}, "target_modules=3 is not a text, or a list"),
        ({"rank_pattern": {"(a+)+": 3}}, "rank_pattern=.* is not an object with"),
        ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern=.* is not an object with"),
        ({"r": 0}, "r=0 is not a whole number from 1"),
        ({"r": True}, "r=True is not a whole number from 1"),
        ({"r": 4}, r"lora_A.weight has shape \(3, 32\).* ask for \(4, 32\)"),
        ({"lora_alpha": -1}, "lora_alpha=-1 is not a positive number"),
        ({"lora_dropout": 1.5}, "lora_dropout=1.5 is not a share"),
        ({"use_rslora": "yes"}, "use_rslora='yes' is not true or false"),
        ({"layers_to_transform": [-1]}, "layers_to_transform=.* is not a layer's num"),
        (
            {"layers_to_transform": [0], "layers_pattern": "h"},
            "layers_pattern='h' is not supported",
        ),
        ({"layers_to_transform": [0]}, "unexpected tensor .*layers.1.* and 13 more"),
        ({"target_modules": ["q_proj"]}, "unexpected tensor .*down_proj.* and 23 more"),
        ({"base_model_name_or_path": None}, "has no base_model_name_or_path"),
        (
            {"base_model_name_or_path": "/no/such/model"},
            "base_model_name_or_path '/no/such/model' cannot be opened: /no/such/model",
        ),
    ],
)
def test_what_is_not_supported_is_named(adapter, tiny_model, said, message):
    write(adapter, tiny_model, **said)
    line = refusal(adapter)
    assert line.startswith(f"{adapter}/adapter_")
    with pytest.raises(ModelFileError, match=message):
        models.open(adapter)


def test_tensors_that_do_not_fit_are_named(adapter, tiny_model):
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    name = f"{stem}.lora_A.weight"
    write(adapter, tiny_model, without(name))
    assert f"{adapter / WEIGHTS}: tensor {name} is missing" in refusal(adapter)
    more = {f"{stem}.lora_magnitude_vector": np.ones(32, np.float32)}
    write(adapter, tiny_model, tensors() | more)
    assert f"unexpected tensor {stem}.lora_magnitude_vector" in refusal(adapter)
    write(adapter, tiny_model, {k: x.astype(np.int8) for k, x in tensors().items()})
    assert "is stored as I8" in refusal(adapter)
    damaged = tensors()
    damaged[name][0, 5] = np.nan
    write(adapter, tiny_model, damaged)
    with pytest.raises(ValueError, match=f"{WEIGHTS}: tensor {name} has 1 of 96 numb"):
        models.load(adapter)


def test_files_that_cannot_be_read_are_named(adapter, tiny_model):
    whole = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    assert f"{adapter / WEIGHTS} cannot be used" in refusal(adapter)
    (adapter / WEIGHTS).unlink()
    assert f"{adapter / WEIGHTS} cannot be used: No such file" in refusal(adapter)
    (adapter / "adapter_model.bin").write_bytes(b"")
    assert "pickled weights, which can run code" in refusal(adapter)
    (adapter / CONFIG).write_text("[]")
    assert f"{adapter / CONFIG} cannot be used: it holds []" in refusal(adapter)
    (adapter / CONFIG).unlink()
    assert f"{adapter / CONFIG} cannot be used: No such file" in refusal(adapter)


def test_an_adapter_of_an_adapter_and_an_adapter_that_scores_are_refused(
    adapter, tmp_path
):
    second = write(tmp_path / "second", str(adapter))
    assert f"cannot be opened: {adapter} holds an adapter" in refusal(second)
    with pytest.raises(ModelFileError, match="An adapter cannot be used here; merge"):
        models.open_classifier(adapter)


def test_its_own_tokenizer_comes_before_the_models(adapter, tiny_model):
    shutil.copy(f"{tiny_model}/tokenizer.json", adapter)
    said = json.loads(pathlib.Path(tiny_model, "tokenizer_config.json").read_text())
    (adapter / "tokenizer_config.json").write_text(
        json.dumps(said | {"chat_template": "only mine"})
    )
    assert models.open(adapter).tokenizer.chat_template == "only mine"


def test_convert_writes_the_sum_if_it_is_asked_to(adapter, tiny_model, tmp_path):
    with pytest.raises(ValueError, match="is an adapter of .*; --merge adds it to"):
        cli.convert(str(adapter), str(tmp_path / "out"))
    with pytest.raises(ValueError, match="has no adapter that could be merged"):
        cli.convert(tiny_model, str(tmp_path / "out"), merge=True)
    cli.convert(str(adapter), str(tmp_path / "out"), dtype="float32", merge=True)
    base = load_file(f"{tiny_model}/model.safetensors")
    wanted, got = (
        expected(base, tensors(), 2.0),
        load_file(tmp_path / "out/model.safetensors"),
    )
    assert wanted.keys() == got.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(got[name], value, atol=2e-6)


def test_what_does_not_fit_together_is_not_written(tmp_path):
    two = lora.Lora(rank=RANK, modules=("q",))
    adapters = jax.tree.map(
        lambda x: np.zeros(x.shape, x.dtype), lora.abstract_adapters(ARCH, two)
    )
    for record, dtype, message in (
        (dataclasses.replace(two, rank=4), "float32", "the adapters are not those of"),
        (two, "int8", "dtype int8 is not one of float32"),
    ):
        with pytest.raises(ValueError, match=message):
            peft.save(tmp_path / "out", ARCH, adapters, record, base="x", dtype=dtype)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("kept")
    with pytest.raises(ValueError, match="exists and is not empty"):
        peft.save(tmp_path / "full", ARCH, adapters, two, base="x")
    assert not (tmp_path / "out").exists()
