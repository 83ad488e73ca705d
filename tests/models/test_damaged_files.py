"""Model files that are damaged, out of date, of something else, or hostile."""

import json
import os
import shutil
import struct

import gguf
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from jaxrl_llm import cli, models
from jaxrl_llm.models import known_shapes
from jaxrl_llm.models.checkpoints import chat_template, files
from jaxrl_llm.models.checkpoints.files import ModelFileError
from jaxrl_llm.models.checkpoints.gguf import GGUFFile
from jaxrl_llm.models.checkpoints.safetensors_folder import SafetensorsFolder
from jaxrl_llm.sharding import mesh, rules

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("pristine") / "model")


@pytest.fixture
def model(pristine, tmp_path):
    """A checkpoint to break."""
    return shutil.copytree(pristine, tmp_path / "model")


def change(file, **values):
    said = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(said | values))


def edit(model, **tensors):
    """Changes tensors by the ends of their names; None takes one away."""
    held = load_file(model / WEIGHTS)
    for end, value in tensors.items():
        end = end.replace("_weight", ".weight")
        (name,) = [n for n in held if n.endswith(end)] or [end]
        held.pop(name, None)
        held |= {} if value is None else {name: value}
    save_file(held, model / WEIGHTS, {"format": "pt"})


def split(model, **index):
    """Spreads the weights over two files with an index; `index` are other entries."""
    held = load_file(model / WEIGHTS)
    (model / WEIGHTS).unlink()
    names = sorted(held)
    of_file = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, names in of_file.items():
        save_file({n: held[n] for n in names}, model / file, {"format": "pt"})
    listed = {name: file for file, names in of_file.items() for name in names}
    (model / INDEX).write_text(json.dumps({"weight_map": listed | index}))
    return held, listed


def refusal(path):
    """The one line with which a model is refused."""
    with pytest.raises(ModelFileError) as caught:
        models.open(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


HEAD = np.random.default_rng(1).standard_normal((264, 32)).astype("f4")


def test_a_head_of_its_own_is_used_though_the_config_says_tied(model, tmp_path):
    change(model / "config.json", tie_word_embeddings=True)
    edit(model, lm_head_weight=HEAD)
    loaded = models.load(model)
    assert not loaded.arch.tie_embeddings
    np.testing.assert_array_equal(loaded.params["output"], HEAD)
    models.save(tmp_path / "saved", *loaded, dtype="float32")
    again = models.load(tmp_path / "saved")
    np.testing.assert_array_equal(again.params["output"], HEAD)
    said = json.loads((tmp_path / "saved/config.json").read_text())
    assert said["tie_word_embeddings"] is False


@pytest.mark.parametrize("dtype", ["f4", ml_dtypes.bfloat16])
def test_a_head_that_repeats_the_embedding_stays_tied(model, dtype):
    change(model / "config.json", tie_word_embeddings=True)
    same = load_file(model / WEIGHTS)["model.embed_tokens.weight"]
    same = same.astype(ml_dtypes.bfloat16).astype("f4")
    edit(model, embed_tokens_weight=same, lm_head_weight=same.astype(dtype))
    loaded = models.load(model)
    assert loaded.arch.tie_embeddings and "output" not in loaded.params


def test_only_the_last_row_of_a_head_differs(model):
    change(model / "config.json", tie_word_embeddings=True)
    head = load_file(model / WEIGHTS)["model.embed_tokens.weight"].copy()
    head[-1, -1] += 1
    edit(model, lm_head_weight=head)
    assert not models.open(model).arch.tie_embeddings


def test_of_two_sets_of_weights_both_are_named(model):
    shutil.copy(model / WEIGHTS, model / "kept")
    split(model)
    models.open(model)
    (model / "kept").rename(model / WEIGHTS)
    said = refusal(model)
    assert f"both {WEIGHTS} and {INDEX}" in said
    names = json.loads((model / INDEX).read_text())["weight_map"]
    (model / INDEX).write_text(
        json.dumps({"weight_map": dict.fromkeys(names, WEIGHTS)})
    )
    models.open(model)


def test_of_a_tensor_in_two_files_the_index_decides(model):
    held, listed = split(model)
    name = "model.norm.weight"
    other = {"a.safetensors": "b.safetensors", "b.safetensors": "a.safetensors"}
    file = model / other[listed[name]]
    wrong = load_file(file) | {name: held[name] + 1}
    save_file(wrong, file, {"format": "pt"})
    loaded = models.load(model).params["norm"]["scale"]
    np.testing.assert_array_equal(loaded, held[name])
    del listed[name]
    (model / INDEX).write_text(json.dumps({"weight_map": listed}))
    said = refusal(model)
    assert f"tensor {name}" in said and "a.safetensors" in said and INDEX in said


def test_an_index_that_names_the_wrong_file_is_refused(model):
    split(model, **{"model.norm.weight": "a.safetensors"})
    other = json.loads((model / INDEX).read_text())["weight_map"]
    other["model.norm.weight"] = "b.safetensors"
    first = load_file(model / "a.safetensors")
    if "model.norm.weight" not in first:
        other["model.norm.weight"] = "a.safetensors"
    (model / INDEX).write_text(json.dumps({"weight_map": other}))
    assert "model.norm.weight" in refusal(model)


@pytest.mark.parametrize(
    "entry, named",
    [
        ("../model.safetensors", "'../model.safetensors'.*outside"),
        ("sub/../../x.safetensors", "outside the folder"),
        ("/etc/passwd", "'/etc/passwd'.*outside"),
        ("..\\x.safetensors", "outside"),
        ("link.safetensors", "link to .*outside"),
        ("gone.safetensors", "gone.safetensors.*missing"),
        (3, "model.norm.weight is 3"),
        (None, "model.norm.weight is None"),
        (["a"], r"model.norm.weight is \['a'\]"),
    ],
)
def test_an_index_entry_that_is_no_file_here_is_refused(model, tmp_path, entry, named):
    shutil.copy(model / WEIGHTS, tmp_path / WEIGHTS)
    (model / "link.safetensors").symlink_to(tmp_path / WEIGHTS)
    split(model, **{"model.norm.weight": entry})
    with pytest.raises(ModelFileError, match=f"{INDEX}.*{named}"):
        models.open(model)


def test_a_folder_of_links_is_read(model, tmp_path):
    """As in the cache of the hub."""
    split(model)
    (tmp_path / "links").mkdir()
    for path in model.iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    models.open(tmp_path / "links")


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: name.replace("model.", "model._orig_mod."),
        lambda name: f"module.{name}",
        lambda name: name.replace("model.", ""),
        lambda name: "_orig_mod." + name.replace("model.", ""),
    ],
)
def test_names_with_a_wrapper_or_without_a_prefix_are_the_same(model, rename):
    held = load_file(model / WEIGHTS)
    renamed = {rename(name): x for name, x in held.items()}
    save_file(renamed, model / WEIGHTS, {"format": "pt"})
    split(model)
    tensors = SafetensorsFolder(model)
    assert tensors.shapes() == {name: x.shape for name, x in held.items()}
    for name, x in held.items():
        whole = tuple(slice(0, size) for size in x.shape)
        np.testing.assert_array_equal(tensors.read(name, whole), x)
    models.open(model)


def test_a_tensor_under_two_names_is_refused(model):
    edit(model, **{"_orig_mod.model.norm.weight": np.ones(32, "f4")})
    said = refusal(model)
    assert "_orig_mod.model.norm.weight" in said and "twice" in said


def test_keys_that_change_no_number_are_accepted(model):
    change(model / "config.json", num_beams=4, repetition_penalty=1.1, license="mit")
    models.open(model)


def test_yarn_in_the_config_reaches_beyond_max_position_embeddings(model, tmp_path):
    """As model cards say to add it; 400 is what vLLM then takes."""
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}
    change(model / "config.json", max_position_embeddings=100, rope_scaling=yarn)
    loaded = models.load(model)
    assert loaded.arch.max_positions == 400
    models.save(tmp_path / "out", *loaded)
    assert models.open(tmp_path / "out").arch == loaded.arch
    change(model / "config.json", max_position_embeddings=1000)
    assert models.open(model).arch.max_positions == 1000


@pytest.mark.parametrize("content", ["{}", "[]", '{"weight_map": []}', "nul", "", DEEP])
def test_an_index_that_says_nothing_is_refused(model, content):
    split(model)
    (model / INDEX).write_text(content)
    assert str(model / INDEX) in refusal(model)


@pytest.mark.parametrize("wrong, sharded", [(np.nan, True), (-np.inf, False)])
def test_weights_that_are_no_numbers_are_named_and_counted(model, wrong, sharded):
    name = "model.layers.1.mlp.up_proj.weight"
    broken = load_file(model / WEIGHTS)[name].copy()
    broken[3, 4:6] = wrong
    edit(model, **{name: broken})

    def shardings(arch):
        devices = mesh.make({"data": 1, "fsdp": 4, "tensor": 2})
        return rules.to_shardings(models.logical_axes(arch), devices, rules.TRAIN)

    named = f"{WEIGHTS}: tensor {name} has 2 of 2048 numbers that are NaN or infinite"
    with pytest.raises(ValueError, match=named):
        models.load(model, shardings=shardings if sharded else None)


def test_a_number_too_large_for_the_type_that_is_asked_for_is_named(model):
    scale = np.full(32, 1e30, "f4")
    edit(model, **{"model.norm.weight": scale})
    with pytest.raises(ValueError, match="model.norm.weight has .*as float16"):
        models.load(model, dtype=jnp.float16)


def test_no_tensor_type_but_floats_is_read(model):
    name = "model.layers.0.mlp.up_proj.weight"
    whole = load_file(model / WEIGHTS)[name]
    for kind, dtype in (("I8", np.int8), ("F8_E4M3", ml_dtypes.float8_e4m3fn)):
        edit(model, **{name: whole.astype(dtype)})
        assert f"tensor {name} is stored as {kind}" in refusal(model)


def test_an_adapter_beside_a_model_is_refused(model):
    said = {"peft_type": "LORA", "base_model_name_or_path": "some/base"}
    (model / "adapter_config.json").write_text(json.dumps(said))
    (model / "adapter_model.safetensors").write_bytes(b"")
    line = refusal(model)
    assert "holds an adapter" in line and "'some/base'" in line
    assert "Remove either" in line


def test_how_others_sample_from_a_model_survives_saving(model, tmp_path, capsys):
    sampling = {"temperature": 0.6, "top_p": 0.95, "do_sample": True, "pad_token_id": 3}
    change(model / "generation_config.json", **sampling, eos_token_id=[7, 256])
    cli.convert(str(model), str(tmp_path / "out"))
    said = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert said == sampling | {"eos_token_id": [7, 256]}


def cut(data):
    return data[: len(data) // 2]


def header(tensors):
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


WHOLE = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        POINTER.encode(),
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 100) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        header({"a": WHOLE}),
        header({"a": WHOLE, "b": WHOLE}) + bytes(16),
        header({"a": WHOLE | {"data_offsets": [0, 2**62]}}) + bytes(16),
        header({"a": WHOLE | {"data_offsets": [16, 0]}}) + bytes(16),
        header({"a": WHOLE | {"shape": [2**40, 2**40]}}) + bytes(16),
        header({"a": WHOLE | {"shape": [3, 2]}}) + bytes(16),
        header({"a": WHOLE | {"shape": [-1, 2]}}) + bytes(16),
        header({"a": WHOLE | {"dtype": "X"}}) + bytes(16),
        header({"a": []}),
        struct.pack("<Q", len(DEEP)) + DEEP.encode(),
    ],
    ids=range(15),
)
def test_a_damaged_weight_file_is_named(model, content):
    (model / WEIGHTS).write_bytes(content)
    assert refusal(model).startswith(f"{model / WEIGHTS} cannot be used: ")


def test_a_weight_file_that_is_cut_off_is_named(model):
    (model / WEIGHTS).write_bytes(cut((model / WEIGHTS).read_bytes()))
    assert str(model / WEIGHTS) in refusal(model)


CONFIGS = [
    {"num_hidden_layers": 10**9},
    {"num_hidden_layers": 0},
    {"num_hidden_layers": 2.0},
    {"num_hidden_layers": "2"},
    {"num_hidden_layers": [2]},
    {"num_hidden_layers": 10**300},
    {"vocab_size": -1},
    {"vocab_size": 10**12},
    {"vocab_size": True},
    {"hidden_size": 0},
    {"intermediate_size": 10**9},
    {"num_attention_heads": 0},
    {"num_key_value_heads": 0},
    {"num_key_value_heads": 3},
    {"head_dim": 0},
    {"head_dim": 7},
    {"head_dim": {}},
    {"max_position_embeddings": -5},
    {"rms_norm_eps": "small"},
    {"rms_norm_eps": float("nan")},
    {"rms_norm_eps": -1e-5},
    {"rope_theta": 0.0, "rope_scaling": None, "rope_parameters": {"rope_theta": -1}},
    {"rope_scaling": []},
    {"rope_scaling": ["linear"]},
    {"rope_scaling": "linear"},
    {"rope_scaling": {"rope_type": ["linear"]}},
    {"rope_scaling": {"rope_type": "linear", "factor": "two"}},
    {"rope_scaling": {"rope_type": "linear", "factor": -2}},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_theta": 1.0},
    {"tie_word_embeddings": "false"},
    {"attention_bias": []},
    {"layer_types": {}},
    {"layer_types": [["full_attention"]] * 2},
    {"hidden_act": ["silu"]},
    {"model_type": ["llama"]},
    {"model_type": None},
    {"architectures": {"LlamaForCausalLM": 1}},
    {"eos_token_id": "end"},
    {"eos_token_id": [[1]]},
    {"eos_token_id": {"a": 1}},
]


@pytest.mark.parametrize("values", CONFIGS, ids=lambda v: json.dumps(v)[:40])
def test_a_value_that_cannot_be_is_refused_by_file_and_key(model, values):
    change(model / "config.json", **values)
    said = refusal(model)
    if values == {"rope_scaling": []}:
        return
    assert str(model / "config.json") in said
    others = ("rope_type", "factor", "num_kv_heads", "position embedding")
    assert any(key in said for key in (*values, *others))


@pytest.mark.parametrize(
    "content", ["[]", "3", "null", "", "{", DEEP, '{"a": 1e', POINTER]
)
@pytest.mark.parametrize(
    "file",
    [
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
        "tokenizer.json",
    ],
)
def test_a_file_of_something_else_is_named(model, file, content):
    (model / file).write_text(content)
    assert str(model / file) in refusal(model)


@pytest.mark.parametrize(
    "file",
    [
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
        "tokenizer.json",
    ],
)
def test_a_file_in_another_encoding_is_named(model, file):
    text = (model / file).read_text()
    (model / file).write_bytes(text.encode("utf-16"))
    assert str(model / file) in refusal(model)
    (model / file).write_bytes(b'{"a": "\xff"}')
    assert str(model / file) in refusal(model)


def test_a_tokenizer_s_values_are_refused_by_the_file_that_holds_them(model):
    change(model / "tokenizer_config.json", eos_token=[1])
    assert str(model / "tokenizer_config.json") in refusal(model)


def test_a_tokenizer_that_is_asked_for_is_never_replaced_by_another(model, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has no tokenizer"):
        models.open(model, tokenizer=tmp_path / "empty")


def test_a_config_alone_is_read_as_carefully(tmp_path):
    file = tmp_path / "config.json"
    for content in ("[]", "{", json.dumps({"model_type": "llama", "vocab_size": -1})):
        file.write_text(content)
        with pytest.raises(ModelFileError, match="config.json cannot be used"):
            known_shapes.find(str(file))


@pytest.mark.parametrize(
    "file",
    [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "adapter_config.json",
    ],
)
def test_what_would_never_end_is_not_opened(model, file):
    path = model / file
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    assert f"{path} cannot be used: it is a pipe" in refusal(model)
    path.unlink()
    path.symlink_to("/dev/zero")
    assert f"{path} cannot be used: it is a device" in refusal(model)
    path.unlink()
    path.mkdir()
    assert f"{path} cannot be used: it is a folder" in refusal(model)


def test_a_file_of_absurd_size_is_not_read(model):
    with (model / "config.json").open("r+b") as file:
        file.truncate(2**40)
    assert f"it has {2**40} bytes" in refusal(model)


def test_a_number_that_no_token_depends_on_may_have_any_type(model):
    change(model / "config.json", initializer_range=1, use_cache="yes")
    assert models.open(model).tokenizer is not None


def test_without_a_tokenizer_the_key_is_named(model, monkeypatch):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (model / file).unlink()
    assert models.open(model).tokenizer is None
    assert cli.main(["generate", "--model", str(model), "--prompts", "hi"]) == 2


@pytest.mark.parametrize(
    "template, fault",
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}"
            "{% endfor %}{% endfor %}",
            "does not come to an end",
        ),
        ("{{ 'a' * 10 ** 11 }}", "too much memory"),
        (
            "{% for a in range(99999) %}" + "ab" * 100 + "{% endfor %}",
            "more than 10000",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nested too deeply"),
        ("a" * 2_000_000, "at most 1000000"),
    ],
)
def test_a_template_that_does_not_end_or_fills_the_memory(template, fault, monkeypatch):
    monkeypatch.setattr(chat_template, "_SECONDS", 1)
    assert fault in chat_template.fault.__wrapped__(template)


@pytest.mark.parametrize(
    "template",
    [
        tiny.CHAT_TEMPLATE,
        "{{ raise_exception('no system message') }}",
        "{% generation %}{{ messages | tojson(indent=2) }}{% endgeneration %}",
        "{{ bos_token + strftime_now('%d %b %Y') }}{% break %}",
    ],
)
def test_any_other_template_is_left_to_who_renders_it(template):
    assert chat_template.fault(template) is None


def test_a_template_is_tried_before_the_model_is_used(model, monkeypatch):
    monkeypatch.setattr(chat_template, "fault", lambda template: "is never done")
    assert f"{model}: the chat template is never done" in refusal(model)


def gguf_file(tmp_path, change=lambda writer: None, layers=1):
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_embedding_length(4)
    writer.add_head_count(2)
    writer.add_tensor("token_embd.weight", np.ones((4, 4), "f4"))
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_that_is_cut_anywhere_is_named(tmp_path):
    path = gguf_file(tmp_path, lambda w: w.add_token_list(["a", "b"]))
    whole = path.read_bytes()
    for length in (*range(0, len(whole) - 32, 7), len(whole) - 33):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelFileError, match=r"x\.gguf cannot be used"):
            GGUFFile(path)


@pytest.mark.parametrize("kind", [0, 8, 9])
def test_a_count_beyond_the_gguf_file_ends_at_once(tmp_path, kind):
    """Of 2 ** 60 numbers, texts or lists in the first value of the metadata."""
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    key = struct.pack("<Q", 1) + b"k"
    path = tmp_path / "x.gguf"
    path.write_bytes(head + key + struct.pack("<IIQ", 9, kind, 2**60) + bytes(256))
    with pytest.raises(ModelFileError, match="ends after"):
        GGUFFile(path)


def test_the_lists_of_a_gguf_file_are_those_that_its_library_reads(tmp_path):
    def lists(writer):
        writer.add_token_list(["a", "", "né", "\n" * 300])
        writer.add_token_types([1, 3, 1, -1])
        writer.add_token_scores([0.5, -1.0, 0.0, 2.0])
        writer.add_array("flags", [True, False])
        writer.add_array("nested", [[1, 2], [3]])

    path = gguf_file(tmp_path, lists)
    read, expected = GGUFFile(path)._reader, gguf.GGUFReader(path)
    assert list(read.fields) == list(expected.fields)
    for name, field in expected.fields.items():
        assert read.fields[name].contents() == field.contents(), name
        assert read.fields[name].types == field.types, name
    assert read.tensors[0].data_offset == expected.tensors[0].data_offset


def test_other_gguf_files_say_what_they_are(tmp_path):
    (tmp_path / "x.gguf").write_text(POINTER)
    assert "git lfs pull" in refusal(tmp_path / "x.gguf")
    adapter = gguf_file(tmp_path, lambda w: w.add_type("adapter"))
    assert "adapter" in refusal(adapter)
    part = gguf_file(tmp_path, lambda w: w.add_uint16("split.count", 3))
    assert "one of 3 parts" in refusal(part)
    layers = gguf_file(tmp_path, layers=10**9)
    assert "block_count=1000000000" in refusal(layers)
    os.unlink(layers)
    os.mkfifo(layers)
    assert "it is a pipe" in refusal(layers)


def test_a_reader_s_error_becomes_one_line(tmp_path):
    for raised, said in [
        (KeyError("a"), "KeyError: 'a'"),
        (RecursionError("deep\n  down"), "RecursionError: deep down"),
        (MemoryError(), "MemoryError"),
        (ValueError("x.json: bad"), "bad"),
        (OSError(5, "Input/output error"), "Input/output error"),
    ]:
        with (
            pytest.raises(ModelFileError) as caught,
            files.reading(tmp_path / "x.json"),
        ):
            raise raised
        assert str(caught.value) == f"{tmp_path / 'x.json'} cannot be used: {said}"
    with pytest.raises(KeyboardInterrupt), files.reading(tmp_path):
        raise KeyboardInterrupt
