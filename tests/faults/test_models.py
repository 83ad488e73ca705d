"""Damaged and hostile models: refused by a line that names the file, or read as they
are. What is read is compared by `jaxrl convert`, which reads and writes all of it."""

import json
import shutil
import struct

import numpy as np
import pytest
from faults import count, damage, generator, runs
from faults.verdicts import LIMIT_S, of_a_refusal
from safetensors.numpy import load_file, save_file

KIND = "hostile model"
MEMORY = 6 * 2**30
NEEDED = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


def cut(rng, model):
    """A file ends too early."""
    path = model / rng.choice(NEEDED)
    damage.apply(path, {"how": "cut", "at": rng.randrange(path.stat().st_size)})
    return path.name


def another_file(rng, model):
    """Something else lies where a file was."""
    path = model / rng.choice(NEEDED)
    by = rng.choice(["fifo", "folder", "loop", "lfs", "empty", "noise", "nothing"])
    damage.replace(path, by, rng)
    return path.name, by


def another_kind_of_json(rng, model):
    """A list, a number or a text stands where a mapping was."""
    path = model / rng.choice([name for name in NEEDED if name.endswith(".json")])
    text = rng.choice(["[]", "null", "3", '"text"', "[" * 100_000, '{"a":' * 9_000])
    path.write_text(text)
    return path.name, text[:8]


def absurd_count(rng, model):
    """A size in config.json that cannot be."""
    path, key = model / "config.json", rng.choice(COUNTS)
    value = rng.choice([-1, 0, 10**9, 2**40, 10**30, 1.5, "8", [8], {}, True])
    said = json.loads(path.read_text()) | {key: value}
    if key == "max_position_embeddings" and value in (10**9, 2**40, 10**30, "8"):
        said[key] = value = -1
    path.write_text(json.dumps(said))
    return path.name, key, str(value)


def bad_value(rng, model):
    """A value in config.json of a kind that it cannot have."""
    path = model / "config.json"
    key = rng.choice(["rope_theta", "rms_norm_eps", "hidden_act", "model_type"])
    value = rng.choice([[], {}, "nonsense", float("nan"), -1.0])
    text = json.loads(path.read_text()) | {key: value}
    if key == "rope_theta":
        text |= {"rope_parameters": {"rope_type": "default", "rope_theta": value}}
    path.write_text(json.dumps(text))
    return path.name, key, str(value)


def header(rng, model):
    """Another number, name, type or shape in the header of the weights."""
    path = model / "model.safetensors"
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    made = json.loads(content[8 : 8 + size])
    names = [name for name in made if name != "__metadata__"]
    name, what = rng.choice(names), rng.choice(["offsets", "dtype", "shape", "name"])
    match what:
        case "offsets":
            made[name]["data_offsets"][rng.randrange(2)] += rng.choice([-4, 4, 2**40])
        case "dtype":
            made[name]["dtype"] = rng.choice(["F64", "I32", "F8_E4M3", "Q4", "BOOL"])
        case "shape":
            shape = made[name]["shape"]
            shape[rng.randrange(len(shape))] = rng.choice([0, -1, 7, 2**62])
        case "name":
            made[name + "x"] = made.pop(name)
    text = json.dumps(made).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    return path.name, name, what


def header_size(rng, model):
    """The weights say that their header is longer than it is."""
    path = model / "model.safetensors"
    size = rng.choice([0, 1, 7, 10**5, 2**31, 2**63])
    path.write_bytes(struct.pack("<Q", size) + path.read_bytes()[8:])
    return path.name, size


def not_a_number(rng, model):
    """Weights that are not finite."""
    path = model / "model.safetensors"
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    flat = tensors[name].copy().reshape(-1)
    flat[rng.randrange(flat.size)] = rng.choice([np.nan, np.inf, -np.inf])
    tensors[name] = flat.reshape(tensors[name].shape)
    save_file(tensors, path, {"format": "pt"})
    return path.name, name


def missing_tensor(rng, model):
    """A tensor is not there."""
    path = model / "model.safetensors"
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    del tensors[name]
    save_file(tensors, path, {"format": "pt"})
    return path.name, name


def index(rng, model):
    """An index that leads nowhere, elsewhere, or is none."""
    path = model / "model.safetensors"
    shard = model / "model-00001-of-00001.safetensors"
    names = sorted(load_file(path))
    path.rename(shard)
    entries = dict.fromkeys(names, shard.name)
    where = rng.choice(["outside", "root", "nowhere", "list", "number", "less", "none"])
    entry = rng.choice(names)
    match where:
        case "outside":
            shutil.copy(shard, model.parent / "other.safetensors")
            entries[entry] = "../other.safetensors"
        case "root":
            shutil.copy(shard, model.parent / "other.safetensors")
            entries[entry] = str(model.parent / "other.safetensors")
        case "nowhere":
            entries[entry] = "model-00002-of-00002.safetensors"
        case "list":
            entries = [shard.name]
        case "number":
            entries[entry] = 3
        case "less":
            del entries[entry]
    content = {} if where == "none" else {"metadata": {}, "weight_map": entries}
    (model / "model.safetensors.index.json").write_text(json.dumps(content))
    return "model.safetensors.index.json", where


def tokens_of_the_tokenizer(rng, model):
    """The tokenizer has an id that no row of the embedding is for."""
    path = model / "tokenizer.json"
    said = json.loads(path.read_text())
    vocabulary = said["model"]["vocab"]
    token = rng.choice([t for t in sorted(vocabulary) if t in "0123456789+="])
    vocabulary[token] = rng.choice([300, 10**6, 2**31])
    path.write_text(json.dumps(said))
    return path.name, token


WAYS = (
    cut,
    another_file,
    another_kind_of_json,
    absurd_count,
    bad_value,
    header,
    header_size,
    not_a_number,
    missing_tensor,
    index,
    tokens_of_the_tokenizer,
)
ONLY_TRAINING_SEES = (tokens_of_the_tokenizer,)


@pytest.fixture(scope="module")
def converted(campaign):
    """What `jaxrl convert` makes of the model that nothing is wrong with."""
    place = campaign.place("converted")
    argv = ["convert", campaign.values["model"]["path"], str(place / "made")]
    ended = campaign.zygote.start(argv=[*argv, "--dtype", "float32"]).wait(120)
    assert ended.status == 0, ended.output
    return runs.model_files(place / "made")


@pytest.mark.parametrize("number", range(count(44)))
def test_a_hostile_model(campaign, converted, verdicts, number):
    way, rng = WAYS[number % len(WAYS)], generator(KIND, number)
    place = campaign.place("hostile")
    model = runs.copy(campaign.values["model"]["path"], place / "model")
    what = way(rng, model)
    what = (what,) if isinstance(what, str) else what
    fault = " ".join([way.__name__, *map(str, what)])
    if way in ONLY_TRAINING_SEES or rng.random() < 0.3:
        changed = {"model.path": str(model), "trainer.total_training_steps": 1}
        process = campaign.train(place, changed=changed, memory=MEMORY)
    else:
        argv = ["convert", str(model), str(place / "made"), "--dtype", "float32"]
        process = campaign.zygote.start(argv=argv, memory=MEMORY)
    ended = process.wait(LIMIT_S)
    found = of_a_refusal(ended, [str(model), what[0], "vocabulary"])
    if ended.status == 0 and is_the_model(campaign, converted, place):
        found = "harmless", found[1]
    verdicts(KIND, fault, *found)


def is_the_model(campaign, converted, place):
    """Whether what was made of the model is what is made of the undamaged one."""
    if (place / "made").exists():
        return runs.model_files(place / "made") == converted
    return runs.metrics(place / "run") == runs.metrics(campaign.right)[:2]
