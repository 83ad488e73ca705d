import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file
from tokenizers import pre_tokenizers

from jaxrl_llm import models
from jaxrl_llm.models.architecture import Rope
from jaxrl_llm.models.checkpoints import gguf as files_of_llama_cpp
from jaxrl_llm.models.checkpoints import peft
from jaxrl_llm.models.lora import Lora, abstract_adapters

# llama.cpp's names, as its convert_hf_to_gguf.py writes them.
RENAMED = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
FAMILIES = {
    "llama": {},
    "llama-tied": {"tie_embeddings": True},
    "qwen2": {"model_type": "qwen2", "qkv_bias": True},
    "qwen3": {"model_type": "qwen3", "qk_norm": True},
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def permute(x, heads):
    """As in llama.cpp: the halves of each head become neighbouring pairs."""
    halves = x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:])
    return halves.swapaxes(1, 2).reshape(x.shape)


def write(path, arch, params, tmp_path, *, quantized=(), metadata=None, extra=None):
    """`params` as llama.cpp would have written them."""
    family = arch.model_type
    models.save(tmp_path / "hf", arch, params, None, dtype=jnp.float32)
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(arch.num_layers)
    writer.add_context_length(arch.max_positions)
    writer.add_embedding_length(arch.hidden_size)
    writer.add_feed_forward_length(arch.intermediate_size)
    writer.add_head_count(arch.num_heads)
    writer.add_head_count_kv(arch.num_kv_heads)
    writer.add_layer_norm_rms_eps(arch.norm_eps)
    writer.add_rope_freq_base(arch.rope[0].theta)
    add_tokenizer(writer)
    for key, value in (metadata or {}).items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for name, x in load_file(tmp_path / "hf/model.safetensors").items():
        if family == "llama" and "q_proj" in name:
            x = permute(x, arch.num_heads)
        if family == "llama" and "k_proj" in name:
            x = permute(x, arch.num_kv_heads)
        for ours, theirs in RENAMED.items():
            name = name.replace(ours, theirs)
        if name in quantized:
            x, kind = gguf.quants.quantize(x, quantized[name]), quantized[name]
            writer.add_tensor(name, x, raw_dtype=kind)
        else:
            writer.add_tensor(name, x)
    for name, x in (extra or {}).items():
        writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["h e", "l l", "he ll", "hell o", "1 2", "Ġ hello"]
    tokens = SPECIAL + alphabet + [m.replace(" ", "") for m in merges]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")


def random_params(arch):
    draw = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(draw.standard_normal(x.shape), jnp.float32),
        models.abstract_params(arch),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_and_architecture_come_back_from_a_llama_cpp_file(family, tmp_path):
    arch = tiny.arch(**FAMILIES[family], eos_token_ids=(2,))
    params = random_params(arch)
    write(tmp_path / "x.gguf", arch, params, tmp_path)
    loaded_arch, loaded, _ = models.load(tmp_path / "x.gguf")
    assert loaded_arch == arch
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_an_adapter_is_added_to_a_model_from_gguf(tmp_path):
    arch = tiny.arch(eos_token_ids=(2,))
    params = random_params(arch)
    write(tmp_path / "x.gguf", arch, params, tmp_path)
    how = Lora(rank=2, alpha=3.0, modules=("q", "down"))
    draw = np.random.default_rng(1)
    adapters = jax.tree.map(
        lambda x: draw.standard_normal(x.shape).astype(np.float32),
        abstract_adapters(arch, how),
    )
    base = str(tmp_path / "x.gguf")
    peft.save(tmp_path / "adapter", arch, adapters, how, base=base)
    got = models.load(tmp_path / "adapter").params["layers"]
    own, added = params["layers"], adapters["layers"]["lora"]
    q = own["q"] + 1.5 * np.einsum("ldr,lrnh->ldnh", *added["q"].values())
    down = own["down"] + 1.5 * np.einsum("lfr,lrd->ldf", *added["down"].values())
    np.testing.assert_allclose(got["q"], q, atol=1e-5)
    np.testing.assert_allclose(got["down"], down, atol=1e-5)
    np.testing.assert_array_equal(got["up"], own["up"])


def test_a_model_from_gguf_is_saved_for_transformers(tmp_path):
    arch = tiny.arch(eos_token_ids=(2,))
    write(tmp_path / "x.gguf", arch, random_params(arch), tmp_path)
    loaded = models.load(tmp_path / "x.gguf")
    models.save(tmp_path / "out", *loaded, dtype=jnp.float32)
    again = models.load(tmp_path / "out")
    assert again.arch == arch
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)
    text = "hello <|im_start|> 12"
    assert again.tokenizer(text).input_ids == loaded.tokenizer(text).input_ids
    assert (again.tokenizer.bos_token_id, again.tokenizer.eos_token_id) == (1, 2)


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q8_0", "IQ3_S", "BF16", "F16"])
def test_parts_side_by_side_are_what_llama_cpp_reads(kind, monkeypatch):
    monkeypatch.setattr(files_of_llama_cpp, "_PART", 700)
    kind = gguf.GGMLQuantizationType[kind]
    bits = np.random.default_rng(0).integers(0, 60, (37, 4096), np.uint8)
    rows = bits[:, : 6 * gguf.GGML_QUANT_SIZES[kind][1]]
    np.testing.assert_array_equal(
        files_of_llama_cpp._dequantised(rows, kind), gguf.quants.dequantize(rows, kind)
    )


def test_q4_1_is_minimum_plus_step_times_nibble(tmp_path):
    arch, name = tiny.arch(), "blk.1.ffn_up.weight"
    kind = gguf.GGMLQuantizationType.Q4_1
    write(
        tmp_path / "x.gguf",
        arch,
        random_params(arch),
        tmp_path,
        quantized={name: kind},
    )
    stored = load_file(tmp_path / "hf/model.safetensors")
    up = stored["model.layers.1.mlp.up_proj.weight"]
    # Blocks of 32 numbers share a float16 minimum and a float16 step of 1/15 range.
    expected = np.empty_like(up)
    for row in range(64):
        low, step = up[row].min(), (up[row].max() - up[row].min()) / 15
        nibble = np.floor((up[row] - low) / step + 0.5).clip(0, 15)
        expected[row] = nibble * np.float32(np.float16(step)) + np.float16(low)
    loaded = models.load(tmp_path / "x.gguf").params["layers"]["up"]
    np.testing.assert_allclose(loaded[1], expected.T, rtol=1e-6)


@pytest.mark.parametrize(
    "metadata, rope",
    [
        ({}, Rope(theta=1e4)),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
            Rope(theta=1e4, scaling="linear", factor=4.0),
        ),
    ],
)
def test_rope_scaling_is_read(metadata, rope, tmp_path):
    arch = tiny.arch()
    params = random_params(arch)
    write(tmp_path / "x.gguf", arch, params, tmp_path, metadata=metadata)
    assert models.load(tmp_path / "x.gguf").arch.rope == (rope,)


def test_rope_freqs_are_recognised_as_llama3_scaling_or_refused(tmp_path):
    """Divisors of a model with theta 500000, head size 8, factor 32, worked by hand.

    The four wavelengths are 2 pi theta^(i/4) = 6.28, 167, 4443, 118143 positions. The
    first two are below 8192 / 4: divisor 1. The last is above 8192: 32. The third turns
    8192 / 4443 = 1.8438 times, so keeps (1.8438 - 1) / 3 = 0.28127 of its frequency and
    1 / 32 of the rest: 1 / (0.28127 + 0.71873 / 32) = 3.2923.
    """
    arch = tiny.arch(rope=(Rope(theta=500000.0),))
    params = random_params(arch)
    divisors = np.array([1, 1, 3.2923, 32], np.float32)
    extra = {"rope_freqs.weight": divisors}
    write(tmp_path / "x.gguf", arch, params, tmp_path, extra=extra)
    llama3 = Rope(theta=500000.0, scaling="llama3", factor=32.0)
    assert models.load(tmp_path / "x.gguf").arch.rope == (llama3,)

    (tmp_path / "2").mkdir()
    extra = {"rope_freqs.weight": divisors + 1}
    write(tmp_path / "y.gguf", arch, params, tmp_path / "2", extra=extra)
    with pytest.raises(ValueError, match="rope_freqs.weight"):
        models.load(tmp_path / "y.gguf")


@pytest.mark.parametrize(
    "change, metadata, named",
    [
        ({}, {"llama.expert_count": 8}, "llama.expert_count=8"),
        ({}, {"llama.rope.scaling.type": "yarn"}, "'yarn'"),
        ({}, {"llama.rope.dimension_count": 4}, "rope.dimension_count=4"),
        ({"model_type": "mistral"}, {}, "'mistral'.*supported: llama"),
    ],
)
def test_an_unsupported_file_is_refused_by_name(change, metadata, named, tmp_path):
    arch = tiny.arch(**change)
    write(tmp_path / "x.gguf", arch, random_params(arch), tmp_path, metadata=metadata)
    with pytest.raises(ValueError, match=named):
        models.load(tmp_path / "x.gguf")


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"<html>not found</html>" * 10)
    with pytest.raises(ValueError, match="x.gguf cannot be used: GGUF magic"):
        models.load(tmp_path / "x.gguf")


def test_an_unsupported_tokenizer_is_refused_by_name(tmp_path, monkeypatch):
    arch = tiny.arch()
    monkeypatch.setattr(
        gguf.GGUFWriter,
        "add_tokenizer_pre",
        lambda self, pre: self.add_string("tokenizer.ggml.pre", "chameleon"),
    )
    write(tmp_path / "x.gguf", arch, random_params(arch), tmp_path)
    with pytest.raises(ValueError, match="pre='chameleon'.*smollm, llama-bpe, qwen2"):
        models.load(tmp_path / "x.gguf")
    own = tiny.tokenizer()
    assert models.load(tmp_path / "x.gguf", tokenizer=own).tokenizer is own


def test_the_tokenizer_keeps_special_tokens_whole_and_digits_apart(tmp_path):
    arch = tiny.arch()
    write(tmp_path / "x.gguf", arch, random_params(arch), tmp_path)
    tokenizer = models.load(tmp_path / "x.gguf").tokenizer
    assert tokenizer.tokenize("<|im_start|>hello hello 12<|im_end|>") == [
        "<|im_start|>", "hello", "Ġhello", "Ġ", "1", "2", "<|im_end|>"
    ]  # fmt: skip
    assert tokenizer("<|im_start|>").input_ids == [1]
    for text in ("naïve 🙂\n\n\t x", "  two  spaces ", "数学 12.5%"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    chat = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "hello"
