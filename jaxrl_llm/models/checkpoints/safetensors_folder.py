"""The tensors of a Hugging Face directory: model.safetensors, or several such files."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from safetensors import safe_open

from jaxrl_llm.models.checkpoints import files
from jaxrl_llm.models.checkpoints.files import ModelFileError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
COMPUTED = "rotary_emb.inv_freq"
"""Ends the names of tensors that are no weights."""
_DTYPES = ("F64", "F32", "F16", "BF16")
_WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module")
"""Prefixes of torch.compile, DistributedDataParallel and FullyShardedDataParallel."""
_HEADS = ("lm_head.", "score.")


class SafetensorsFiles:
    """The tensors of files of a folder, as `tensor_map.Tensors`. Nothing but the files'
    headers is read before `read`.

    Args:
      listed: the file of each tensor, by an index; tensors of which it has another are
        left out.

    Raises:
      ModelFileError: a file is damaged; a tensor's numbers are of no type that can be
        trained.
    """

    def __init__(
        self, folder: Path, names: Iterable[str], listed: Mapping[str, str] = {}
    ):
        self._folder, self._of_name, self._stored = folder, {}, {}
        for file in names:
            path = files.checked(folder / file)
            with files.reading(path):
                self._add(file, safe_open(path, framework="np"), listed)

    def _add(self, file: str, opened: safe_open, listed: Mapping[str, str]) -> None:
        for name in opened.keys():
            if listed.get(name, file) != file:
                continue
            if name in self._of_name:
                raise ValueError(
                    f"tensor {name} is in {self._of_name[name][0]} too, and {INDEX} "
                    "does not say which of them counts"
                )
            dtype = opened.get_slice(name).get_dtype()
            if dtype not in _DTYPES and not name.endswith(COMPUTED):
                raise ValueError(
                    f"tensor {name} is stored as {dtype}; supported: "
                    f"{', '.join(_DTYPES)}. Quantised weights have to be dequantised "
                    "first"
                )
            self._of_name[name] = file, opened
            self._stored[name] = name

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by the tensors' names."""
        return {
            name: tuple(opened.get_slice(self._stored[name]).get_shape())
            for name, (_, opened) in self._of_name.items()
        }

    def read(self, name: str, part: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor, in the type that it is stored in."""
        with files.reading(self.where(name)):
            return self._of_name[name][1].get_slice(self._stored[name])[part]

    def where(self, name: str) -> str:
        """The file that holds a tensor; the folder if none does."""
        if name not in self._of_name:
            return str(self._folder)
        return str(self._folder / self._of_name[name][0])


class SafetensorsFolder(SafetensorsFiles):
    """The tensors of model.safetensors, or of the files that its index lists, by the
    names that a causal model has for them.

    Raises:
      ModelFileError: the folder holds no weights, or more than one set of them; a file
        is damaged; a tensor's numbers are of no type that can be trained.
    """

    def __init__(self, folder: Path):
        listed = _listed(folder)
        super().__init__(folder, sorted(set(listed.values())) or [WEIGHTS], listed)
        for name, file in listed.items():
            if self._of_name.get(name, (None,))[0] != file:
                raise ModelFileError(
                    f"{folder / INDEX}: tensor {name} is not in {file}, where it says"
                )
        self._name_plainly()

    def _name_plainly(self) -> None:
        """Gives tensors the names of a causal model: wrappers of training libraries
        leave theirs in the middle, and a model without its head has no "model."."""
        plain: dict[str, str] = {}
        for stored in self._of_name:
            parts = [part for part in stored.split(".") if part not in _WRAPPERS]
            name = ".".join(parts)
            if name in plain:
                raise ModelFileError(
                    f"{self.where(stored)}: {stored} and {plain[name]} are the same "
                    "tensor twice"
                )
            plain[name] = stored
        if not any(name.startswith("model.") for name in plain):
            plain = {
                name if name.startswith(_HEADS) else f"model.{name}": stored
                for name, stored in plain.items()
            }
        self._of_name = {name: self._of_name[stored] for name, stored in plain.items()}
        self._stored = plain


def _listed(folder: Path) -> dict[str, str]:
    """The file of each tensor by the index; nothing if there is no index.

    Raises:
      ModelFileError: there are no weights, the index is damaged or names a file outside
        the folder, or beside it lies a model.safetensors that it does not know.
    """
    index, alone = folder / INDEX, folder / WEIGHTS
    if not os.path.lexists(index):
        if not os.path.lexists(alone):
            raise ModelFileError(_no_weights(folder))
        return {}
    listed = files.json_object(index).get("weight_map")
    with files.reading(index):
        if not isinstance(listed, dict) or not listed:
            raise ValueError("it has no weight_map that says which file holds a tensor")
        for name, file in listed.items():
            if not isinstance(file, str):
                raise ValueError(f"the file of tensor {name} is {file!r}, not a name")
        for file in sorted(set(listed.values())):
            _check_inside(folder, file)
            if not os.path.lexists(folder / file):
                raise ValueError(f"{file}, which it lists, is missing")
    if os.path.lexists(alone) and WEIGHTS not in listed.values():
        raise ModelFileError(
            f"{folder} has both {WEIGHTS} and {INDEX}, which lists other files: remove "
            "the one that is out of date"
        )
    return listed


def _check_inside(folder: Path, file: str) -> None:
    """Raises ValueError if a name in an index leads out of the folder.

    A link may lead to where the index itself lies: the hub's cache and folders of links
    keep all files of a model in one other place.
    """
    if os.path.isabs(file) or ".." in file.split("/") or "\\" in file:
        raise ValueError(f"{file!r}, which it lists, is outside the folder")
    inside = (folder.resolve(), (folder / INDEX).resolve().parent)
    real = (folder / file).resolve()
    if not any(real.is_relative_to(one) for one in inside):
        raise ValueError(
            f"{file!r}, which it lists, is a link to {real}, outside the folder"
        )


def _no_weights(folder: Path) -> str:
    pickled = sorted(
        p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth")
    )
    if not pickled:
        return f"{folder} has neither {WEIGHTS} nor {INDEX}"
    return (
        f"{folder} has only {', '.join(pickled)}: pickled weights, which can run code "
        "when opened, are not read. If you trust them, convert them with transformers: "
        "AutoModelForCausalLM.from_pretrained(DIRECTORY).save_pretrained(NEW_DIRECTORY)"
    )
