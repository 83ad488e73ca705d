"""Adapters as the library PEFT keeps them: a folder with adapter_config.json and
adapter_model.safetensors.

A file has two matrices for each W [out, in] that is adapted, A [r, in] and B [out, r],

    W' = W + scale * B A

which are `lora`'s a and b of one layer, transposed. A field of the configuration that
would change the numbers and is not implemented is an error, never ignored.

Source: PEFT 0.21, `tuners/lora/config.py` and `tuners/tuners_utils.py`.
"""

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from jaxrl_llm.models.apply import Params
from jaxrl_llm.models.architecture import Architecture
from jaxrl_llm.models.checkpoints import card as cards
from jaxrl_llm.models.checkpoints import families, files
from jaxrl_llm.models.checkpoints import tensor_map as weights
from jaxrl_llm.models.checkpoints.families import Kind
from jaxrl_llm.models.checkpoints.files import ModelFileError
from jaxrl_llm.models.checkpoints.safetensors_folder import INDEX, SafetensorsFiles
from jaxrl_llm.models.checkpoints.safetensors_folder import WEIGHTS as MODEL
from jaxrl_llm.models.lora import MODULES, Lora, abstract_adapters, modules_of
from jaxrl_llm.sharding import processes, rules

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
_ALL = "all-linear"
_DTYPES = ("float32", "bfloat16", "float16")
_REMEDY = (
    "; merge it into its model with peft: AutoPeftModelForCausalLM.from_pretrained("
    "DIRECTORY).merge_and_unload().save_pretrained(NEW_DIRECTORY)"
)

_RANK = Kind(
    "a whole number from 1 to 65536",
    lambda value: type(value) is int and 1 <= value <= 2**16,
)
_POSITIVE = Kind(
    "a positive number",
    lambda value: type(value) in (int, float) and 0 < value < 1e30,
)
_SWITCH = Kind("true or false", lambda value: type(value) is bool)
_TEXT = Kind("a text", lambda value: type(value) is str)
_TEXTS = Kind(
    "a list of texts",
    lambda value: type(value) is list and all(type(x) is str for x in value),
)
_NAMES = Kind("a text, or a list of texts", lambda x: _TEXT.holds(x) or _TEXTS.holds(x))
_LAYERS = Kind(
    "a layer's number, or a list of them",
    lambda value: all(
        type(x) is int and x >= 0 for x in (value if type(value) is list else [value])
    ),
)


def _by_name(values: Kind) -> Kind:
    return Kind(
        f"an object with {values.what} for a module's plain name",
        lambda value: (
            isinstance(value, Mapping)
            and all(re.fullmatch(r"[\w.]+", key) for key in value)
            and all(map(values.holds, value.values()))
        ),
    )


# What is read, what it may hold, and what a missing key stands for.
_KINDS = {
    "base_model_name_or_path": (_TEXT, None),
    "revision": (_TEXT, None),
    "r": (_RANK, 8),
    "lora_alpha": (_POSITIVE, 8),
    "use_rslora": (_SWITCH, False),
    "lora_dropout": (
        Kind("a share", lambda x: type(x) in (int, float) and 0 <= x < 1),
        0.0,
    ),
    "target_modules": (_NAMES, None),
    "exclude_modules": (_TEXTS, None),
    "layers_to_transform": (_LAYERS, None),
    "layers_pattern": (_NAMES, None),
    "rank_pattern": (_by_name(_RANK), {}),
    "alpha_pattern": (_by_name(_POSITIVE), {}),
}
# Keys of which only these values are implemented, or null.
_ONLY: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM",),
    "bias": ("none",),
    # The others begin by changing the model's own weights.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}
# Keys that change no number, whatever they hold.
_HARMLESS = frozenset(
    """
    auto_mapping ensure_weight_tying eva_config inference_mode megatron_core
    peft_version qalora_group_size runtime_config
    """.split()
)


class Description(NamedTuple):
    """What an adapter_config.json says, checked."""

    base: str | None
    """The model that the adapter belongs to."""
    revision: str | None
    said: Mapping[str, Any]
    """Every key that is read."""


@dataclass(frozen=True)
class Adapter:
    """An adapter whose weights have not been read yet; see `open`."""

    arch: Architecture
    """Architecture of the model that it belongs to."""
    lora: Lora
    base: str | None
    """That model's path or hub id, as the file has it."""
    dropout: float
    """The share of inputs that it was trained without."""
    _tensors: weights.Tensors

    def load(self, *, dtype: Any = jnp.float32, shardings: Any = None) -> Params:
        """Reads the weights, every device only what it will hold.

        Args:
          dtype: of the adapters.
          shardings: a sharding for each of their arrays; None: one device.

        Raises:
          ValueError: a weight is NaN or infinite, or an array cannot be split.
        """
        abstract = abstract_adapters(self.arch, self.lora, dtype=dtype)
        if shardings is not None:
            rules.check_divides(abstract, shardings)
        stored = places(self.arch, self.lora.modules)
        return weights.assemble(abstract, stored, self._tensors, shardings)


def alone(folder: Path) -> bool:
    """Whether a folder holds an adapter, and no model beside it."""
    return bool(_files(folder)) and not _beside(folder)


def refuse(folder: Path) -> None:
    """Raises ModelFileError if the folder holds an adapter, beside a model or alone."""
    if not (found := _files(folder)):
        return
    said = files.json_object(folder / CONFIG, default={})
    base = said.get("base_model_name_or_path")
    choice = (
        "Remove either: these files to use the weights beside them, or those to have "
        "the adapter added to its model"
        if _beside(folder)
        else f"An adapter cannot be used here{_REMEDY}"
    )
    raise ModelFileError(
        f"{folder} holds an adapter ({', '.join(found)}) of "
        f"{'an unnamed model' if base is None else files.shortened(repr(base))}. "
        f"{choice}"
    )


def _files(folder: Path) -> list[str]:
    found = [CONFIG] if os.path.lexists(folder / CONFIG) else []
    return found + sorted(p.name for p in folder.glob("adapter_model*"))


def _beside(folder: Path) -> bool:
    return any(os.path.lexists(folder / name) for name in (MODEL, INDEX))


def describe(folder: Path) -> Description:
    """Reads an adapter_config.json.

    Raises:
      ModelFileError: there is none, or it asks for something that is not supported.
    """
    path = folder / CONFIG
    given = files.json_object(path)
    with files.reading(path):
        if given.get("peft_type") is None:
            raise ValueError("it has no peft_type, so it is not PEFT's")
        for key, value in given.items():
            _check(key, value)
        said = {
            key: default if given.get(key) is None else given[key]
            for key, (_, default) in _KINDS.items()
        }
    return Description(said["base_model_name_or_path"] or None, said["revision"], said)


def _check(key: str, value: Any) -> None:
    """Raises ValueError if a key's value is not supported."""
    if key in _KINDS:
        if value is not None:
            families.check_kind(key, value, _KINDS[key][0])
    elif key == "fan_in_fan_out" and value is True:
        raise ValueError(
            "fan_in_fan_out=True is not supported: no matrix of these models is "
            "stored transposed"
        )
    elif key in _ONLY:
        if value is not None and value not in _ONLY[key]:
            known = ", ".join(repr(x) for x in _ONLY[key])
            raise ValueError(
                f"{key}={families.short(value)} is not supported; supported: {known}"
                f"{_REMEDY}"
            )
    elif value and key not in _HARMLESS:
        raise ValueError(f"{key}={families.short(value)} is not supported{_REMEDY}")


def open(folder: str | os.PathLike, arch: Architecture) -> Adapter:
    """Reads everything of an adapter but its weights.

    Matrices that the folder does not adapt in some layer (`layers_to_transform`), and
    ranks and alphas of their own (`rank_pattern`, `alpha_pattern`), become zeros and a
    factor of b, which computes the same.

    Args:
      arch: of the model that it belongs to.

    Raises:
      ModelFileError: it is damaged or not supported, or a tensor is missing, unexpected
        or of the wrong shape for this model.
    """
    folder = Path(folder).expanduser()
    described = describe(folder)
    if not os.path.lexists(folder / WEIGHTS) and (found := _pickled(folder)):
        raise ModelFileError(
            f"{folder} has {found} but no {WEIGHTS}: pickled weights, which can run "
            "code when opened, are not read; if you trust them, load them with peft "
            "and save_pretrained(NEW_DIRECTORY)"
        )
    stored = SafetensorsFiles(folder, [WEIGHTS])
    with files.reading(folder / CONFIG):
        of_name = _targets(described.said, arch, stored.shapes())
        lora = _record(described.said, of_name)
    _check_tensors(stored, of_name)
    tensors = _OneRank(stored, of_name, lora, arch)
    dropout = float(described.said["lora_dropout"])
    return Adapter(arch, lora, described.base, dropout, tensors)


def _pickled(folder: Path) -> str | None:
    return next((p.name for p in folder.glob("adapter_model*.bin")), None)


class _Target(NamedTuple):
    """One matrix of one layer that has an adapter."""

    module: str
    shape: tuple[int, int]
    """[out, in]"""
    lora: Lora
    """Its own rank and scale."""

    @property
    def rank(self) -> int:
        """Rows of A, columns of B."""
        return self.lora.rank


def _matrices(arch: Architecture) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name of each matrix that can have an adapter, as PEFT calls it: which of
    `MODULES` it is, and its shape [out, in]."""
    leaves = weights.flat(weights.abstract_params(arch))
    return {
        place.name.removesuffix(".weight"): (
            place.path.removeprefix("layers."),
            weights.stored_shape(place, leaves),
        )
        for place in weights.places(arch, "huggingface")
        if place.path.removeprefix("layers.") in modules_of(arch)
    }


def _targets(
    said: Mapping[str, Any], arch: Architecture, shapes: Mapping[str, Any]
) -> dict[str, _Target]:
    """What the adapter is on, by PEFT's names.

    A pattern in `target_modules` is not evaluated: the modules are those that the file
    has tensors for, in every layer.

    Raises:
      ValueError: it is on no matrix of the model, or on its embeddings.
    """
    matrices, targets = _matrices(arch), said["target_modules"]
    if isinstance(targets, list):
        for whole in ("lm_head", "model.embed_tokens"):
            if _named(whole, targets):
                raise ValueError(
                    f"target_modules has {whole.split('.')[-1]}: adapters on the "
                    f"embedding or the output matrix are not supported{_REMEDY}"
                )
        names = [name for name in matrices if _named(name, targets)]
        names = _of_layers(names, said)
    elif targets is not None and targets.lower() == _ALL:
        names = list(matrices)
    else:
        there = {
            name.removeprefix(_PREFIX).rsplit(".lora_", 1)[0]
            for name in shapes
            if ".lora_" in name
        }
        modules = {matrices[name][0] for name in there if name in matrices}
        names = [name for name, (module, _) in matrices.items() if module in modules]
    excluded = said["exclude_modules"] or []
    names = [name for name in names if not _named(name, excluded)]
    if not names:
        raise ValueError(
            f"target_modules={families.short(targets)} is on none of the matrices of "
            f"this {arch.model_type} model: {', '.join(_last_names(arch))}"
        )
    found = {}
    for name in names:
        module, shape = matrices[name]
        rank = _of_name(said["rank_pattern"], name, said["r"])
        alpha = _of_name(said["alpha_pattern"], name, said["lora_alpha"])
        own = Lora(rank=rank, alpha=float(alpha), rslora=said["use_rslora"])
        found[name] = _Target(module, shape, own)
    return found


def _last_names(arch: Architecture) -> list[str]:
    """q_proj, k_proj, ..."""
    return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in _matrices(arch)))


def _named(name: str, ends: Sequence[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _of_layers(names: Sequence[str], said: Mapping[str, Any]) -> list[str]:
    """Those of the layers that `layers_to_transform` lists, or all."""
    layers, pattern = said["layers_to_transform"], said["layers_pattern"]
    if layers is None or layers == []:
        return list(names)
    if pattern not in (None, "", [], "layers", ["layers"]):
        raise ValueError(
            f"layers_pattern={families.short(pattern)} is not supported; layers are "
            "called 'layers'"
        )
    chosen = layers if isinstance(layers, list) else [layers]
    return [name for name in names if int(name.split(".")[2]) in chosen]


def _of_name(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    return next((pattern[key] for key in pattern if _named(name, [key])), default)


def _record(said: Mapping[str, Any], of_name: Mapping[str, _Target]) -> Lora:
    """One rank and scale for all: the largest rank, and the scale of the first."""
    first, rank = next(iter(of_name.values())), max(t.rank for t in of_name.values())
    scale = first.lora.scale
    alpha = scale * (math.sqrt(rank) if said["use_rslora"] else rank)
    names = {target.module for target in of_name.values()}
    return Lora(
        rank=rank,
        alpha=first.lora.alpha if first.rank == rank else alpha,
        modules=tuple(module for module in MODULES if module in names),
        rslora=said["use_rslora"],
    )


def _check_tensors(stored: SafetensorsFiles, of_name: Mapping[str, _Target]) -> None:
    """Raises ModelFileError if a tensor is missing, unexpected or of another shape."""
    shapes, where = stored.shapes(), Path(stored.where("")) / WEIGHTS
    wanted: dict[str, tuple[int, int]] = {}
    for name, target in of_name.items():
        out, inner = target.shape
        wanted[_PREFIX + name + _A] = (target.rank, inner)
        wanted[_PREFIX + name + _B] = (out, target.rank)
    for name, shape in wanted.items():
        if name not in shapes:
            raise ModelFileError(
                f"{where}: tensor {name} is missing; by {CONFIG} the adapter has it"
            )
        if shapes[name] != shape:
            raise ModelFileError(
                f"{where}: tensor {name} has shape {shapes[name]}; the rank in "
                f"{CONFIG} and the model ask for {shape}"
            )
    strangers = [name for name in shapes if name not in wanted]
    if strangers:
        more = f" and {len(strangers) - 1} more" if strangers[1:] else ""
        raise ModelFileError(
            f"{where}: unexpected tensor {strangers[0]}{more}: {CONFIG} and the model "
            f"have no place for it{_REMEDY}"
        )


def places(arch: Architecture, modules: Sequence[str]) -> list[weights.Place]:
    """Every tensor of an adapter on these modules, in a reader's order."""
    found = []
    for base in weights.places(arch, "huggingface"):
        module = base.path.removeprefix("layers.")
        if module not in modules:
            continue
        name = _PREFIX + base.name.removesuffix(".weight")
        path, (out, inner) = f"layers.lora.{module}", base.axes
        a = ((len(inner),), tuple(range(len(inner))))
        b = (tuple(range(1, 1 + len(out))), (0,))
        found.append(weights.Place(name + _A, f"{path}.a", base.index, a))
        found.append(weights.Place(name + _B, f"{path}.b", base.index, b))
    return found


class _OneRank:
    """The tensors of an adapter, as `tensor_map.Tensors`, brought to one rank and one
    scale, in all layers."""

    def __init__(
        self,
        stored: SafetensorsFiles,
        of_name: Mapping[str, _Target],
        lora: Lora,
        arch: Architecture,
    ):
        self._stored, self._held = stored, stored.shapes()
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._factors: dict[str, float] = {}
        for name, (module, (out, inner)) in _matrices(arch).items():
            if module not in lora.modules:
                continue
            self._shapes[_PREFIX + name + _A] = (lora.rank, inner)
            self._shapes[_PREFIX + name + _B] = (out, lora.rank)
            scale = of_name[name].lora.scale if name in of_name else lora.scale
            self._factors[_PREFIX + name + _B] = scale / lora.scale

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors, by name."""
        return self._shapes

    def where(self, name: str) -> str:
        """The file that holds a tensor."""
        return self._stored.where(name)

    def read(self, name: str, part: weights.Slices) -> np.ndarray:
        """A part of a tensor."""
        bounds = [
            range(*s.indices(n)) for s, n in zip(part, self._shapes[name], strict=True)
        ]
        held, factor = self._held.get(name, (0, 0)), self._factors.get(name, 1.0)
        cut = tuple(
            slice(min(r.start, n), min(r.stop, n))
            for r, n in zip(bounds, held, strict=True)
        )
        sizes = [s.stop - s.start for s in cut]
        whole = [len(r) for r in bounds]
        if not all(sizes):
            return np.zeros(whole, np.float32)
        x = self._stored.read(name, cut)
        if factor != 1.0:
            x = x.astype(np.float32) * np.float32(factor)
        room = [(0, n - size) for n, size in zip(whole, sizes, strict=True)]
        return np.pad(x, room) if sizes != whole else x


class Merged:
    """A model's tensors with an adapter added to them, as `tensor_map.Tensors`.

        W' = W + scale * B A,    float32

    Args:
      base: the model's own.
      form: of their names, "huggingface" or "gguf".
    """

    def __init__(self, base: weights.Tensors, form: str, adapter: Adapter):
        self._base, self.adapter = base, adapter
        names = [weights.places(adapter.arch, one) for one in ("huggingface", form)]
        self._name = {
            own.name: _PREFIX + place.name.removesuffix(".weight")
            for place, own in zip(*names, strict=True)
            if place.path.removeprefix("layers.") in adapter.lora.modules
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the model's tensors, by name."""
        return self._base.shapes()

    def where(self, name: str) -> str:
        """The model's file that holds a tensor."""
        return self._base.where(name)

    def read(self, name: str, part: weights.Slices) -> np.ndarray:
        """A part of a tensor, with its adapter.

        Raises:
          ValueError: the adapter has numbers that are NaN or infinite.
        """
        x = self._base.read(name, part)
        if name not in self._name:
            return x
        stem, every, (rows, columns) = self._name[name], slice(None), part
        factors = []
        for end, wanted in ((_B, (rows, every)), (_A, (every, columns))):
            factor = self.adapter._tensors.read(stem + end, wanted)
            weights.check_finite(factor, self.adapter._tensors, stem + end)
            factors.append(factor.astype(np.float32))
        scale = np.float32(self.adapter.lora.scale)
        return x.astype(np.float32) + scale * (factors[0] @ factors[1])


def save(
    directory: str | os.PathLike,
    arch: Architecture,
    adapters: Params,
    lora: Lora,
    *,
    base: str,
    revision: str | None = None,
    dtype: Any = jnp.float32,
    tokenizer: Any = None,
    card: str | None = None,
) -> None:
    """Writes a folder that PEFT reads; it appears complete or not at all.

    All processes call it, and the first writes.

    Args:
      directory: must not exist, or be empty.
      adapters: see `models.lora`.
      base: the model that they belong to, a path or a hub id.
      revision: of a hub id.
      dtype: of the saved weights: float32, bfloat16 or float16.
      tokenizer: None to save none; the model's own then counts.
      card: the text of its README.md.

    Raises:
      ValueError: an argument does not fit; nothing has been written then.
    """
    target, dtype = Path(directory).expanduser().absolute(), jnp.dtype(dtype)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not empty")
    if dtype.name not in _DTYPES:
        raise ValueError(f"dtype {dtype.name} is not one of {', '.join(_DTYPES)}")
    wanted = weights.flat(abstract_adapters(arch, lora))
    given = weights.flat(adapters)
    if {k: v.shape for k, v in given.items()} != {
        k: v.shape for k, v in wanted.items()
    }:
        raise ValueError(f"the adapters are not those of {lora}")
    stored = places(arch, lora.modules)
    tensors = {
        name: np.ascontiguousarray(value())
        for name, _, value in weights.disassemble(adapters, stored, dtype)
    }
    if not processes.leads():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        made.chmod(0o755)
        save_file(tensors, made / WEIGHTS, {"format": "pt"})
        said = json.dumps(_config(arch, lora, base, revision), indent=2)
        (made / CONFIG).write_text(said + "\n", "utf-8")
        if card is not None:
            (made / cards.FILE).write_text(card, "utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(made)
        os.replace(made, target)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _config(
    arch: Architecture, lora: Lora, base: str, revision: str | None
) -> dict[str, Any]:
    names = [
        name.rsplit(".", 1)[-1]
        for name, (module, _) in _matrices(arch).items()
        if module in lora.modules
    ]
    whole = float(lora.alpha).is_integer()
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if whole else lora.alpha,
        "use_rslora": lora.rslora,
        "target_modules": list(dict.fromkeys(names)),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }
