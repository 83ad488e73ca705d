"""GGUF files (llama.cpp): architecture, dequantised weights, tokenizer.

Source: the GGUF specification, and llama.cpp's convert_hf_to_gguf.py, whose changes to
the weights are undone here.
"""

import os
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from jaxrl_llm.models.architecture import Architecture, Rope
from jaxrl_llm.models.checkpoints import families, files

_MODEL_TYPES = ("llama", "qwen2", "qwen3")
_KEYS = frozenset(
    """
    attention.head_count attention.head_count_kv attention.key_length
    attention.layer_norm_rms_epsilon attention.value_length block_count context_length
    embedding_length feed_forward_length rope.dimension_count rope.freq_base
    rope.scaling.factor rope.scaling.type vocab_size
    """.split()
)
# What Llama 3.1 and 3.2 were trained with: the only sources of a rope_freqs tensor.
_LLAMA3_FACTORS = (8.0, 32.0)

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How text is cut before merges apply, by tokenizer.ggml.pre.
_SPLITS = {
    "llama-bpe": _WORDS + r"\p{N}{1,3}" + _REST,
    "qwen2": _WORDS + r"\p{N}" + _REST,
}
_CONTROL, _USER_DEFINED = 3, 4
_VALUES = 10_000_000
"""In the metadata of a file. A vocabulary of 262144 tokens has some two million."""
_PART = 1 << 20
"""Numbers that are dequantised at a time, by one of several threads."""


class GGUFFile:
    """An open file: `architecture()`, `tokenizer()`, and its tensors as
    `weights.Tensors`.

    Raises:
      ModelFileError: it is no GGUF file, a damaged one, an adapter, or one part of
        several.
    """

    def __init__(self, path: Path):
        self._path = files.checked(path)
        with files.reading(path):
            self._reader = _Reader(path)
            kind, parts = (
                self._get("general.type", "model"),
                self._get("split.count", 1),
            )
            if kind != "model":
                raise ValueError(
                    f"general.type is {kind!r}, not 'model'; an adapter has to be "
                    "merged into its model first"
                )
            if parts not in (0, 1):
                raise ValueError(
                    f"it is one of {parts} parts (split.count); join them with "
                    "`llama-gguf-split --merge`"
                )
        self._tensors = {t.name: t for t in self._reader.tensors}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of every tensor but rope_freqs, which is part of the architecture."""
        return {
            name: tuple(int(n) for n in reversed(t.shape))
            for name, t in self._tensors.items()
            if name != "rope_freqs.weight"
        }

    def where(self, name: str) -> str:
        """The file's path."""
        return str(self._path)

    def read(self, name: str, part: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor, float32; rows are dequantised one by one as needed."""
        tensor = self._tensors[name]
        try:
            x = _dequantised(tensor.data[part[0]], tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(f"{self._path}: tensor {name}: {error}") from error
        rotated = ".attn_q." in name or ".attn_k." in name
        if rotated and self._model_type() == "llama":
            x = _unpermute(x, self._head_dim())
        return x[(slice(None), *part[1:])]

    def licence(self) -> dict[str, str]:
        """The licence that the metadata names, as a model card has it."""
        named = self._get("general.license")
        return {"license": named} if isinstance(named, str) and named else {}

    def architecture(self) -> Architecture:
        """What the metadata describes, with the config.json it would have had.

        Raises:
          ModelFileError: a model type or a key that would matter is not supported, or a
            value cannot be.
        """
        with files.reading(self._path):
            return self._architecture()

    def _architecture(self) -> Architecture:
        family = self._model_type()
        self._check_keys(family)
        shapes = self.shapes()
        if "token_embd.weight" not in shapes:
            raise ValueError("tensor token_embd.weight is missing")
        L, size = self._count("block_count"), self._head_dim()
        heads = self._count("attention.head_count")
        arch = Architecture(
            model_type=family,
            vocab_size=shapes["token_embd.weight"][0],
            hidden_size=self._count("embedding_length"),
            intermediate_size=self._count("feed_forward_length"),
            num_layers=L,
            num_heads=heads,
            num_kv_heads=self._count("attention.head_count_kv", heads),
            head_dim=size,
            # Stored as float32: 1e-5 comes back as 9.99999974e-06.
            norm_eps=float(
                str(np.float32(self._own("attention.layer_norm_rms_epsilon")))
            ),
            rope=(self._rope(size),),
            rope_of_layer=(0,) * L,
            window_of_layer=(None,) * L,
            tie_embeddings="output.weight" not in shapes,
            qkv_bias="blk.0.attn_q.bias" in shapes,
            output_bias="blk.0.attn_output.bias" in shapes,
            mlp_bias="blk.0.ffn_gate.bias" in shapes,
            qk_norm=family == "qwen3",
            max_positions=self._count("context_length"),
            eos_token_ids=self._ends(),
        )
        families.check_ropes(arch)
        return arch

    def tokenizer(self) -> Any:
        """A transformers tokenizer made from the metadata.

        Raises:
          ModelFileError: its kind, or its way to cut text, is not supported, or it is
            damaged.
        """
        with files.reading(self._path):
            return self._tokenizer()

    def _tokenizer(self) -> Any:
        import tokenizers
        from tokenizers import decoders, normalizers, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        model, pre = self._get("tokenizer.ggml.model"), self._get("tokenizer.ggml.pre")
        known = ("smollm", *_SPLITS)
        if model != "gpt2" or pre not in known:
            raise ValueError(
                f"{self._path}: tokenizer.ggml.model={model!r} with "
                f"tokenizer.ggml.pre={pre!r} is not supported; supported: 'gpt2' with "
                f"{', '.join(known)}. Give the original one: load(..., tokenizer=...)"
            )
        tokens = self._get("tokenizer.ggml.tokens")
        made = tokenizers.Tokenizer(
            tokenizers.models.BPE(
                vocab={token: i for i, token in enumerate(tokens)},
                merges=[
                    tuple(m.split(" ")) for m in self._get("tokenizer.ggml.merges")
                ],
                ignore_merges=pre == "llama-bpe",
            )
        )
        if pre == "qwen2":
            made.normalizer = normalizers.NFC()
        if pre == "smollm":
            cut = [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]
        else:
            regex = tokenizers.Regex(_SPLITS[pre])
            cut = [
                pre_tokenizers.Split(regex, "isolated"),
                pre_tokenizers.ByteLevel(False, use_regex=False),
            ]
        made.pre_tokenizer = pre_tokenizers.Sequence(cut)
        made.decoder = decoders.ByteLevel()
        kinds = self._get("tokenizer.ggml.token_type")
        for token, kind in zip(tokens, kinds, strict=True):
            if kind in (_CONTROL, _USER_DEFINED):
                added = tokenizers.AddedToken(token, normalized=False)
                add = made.add_special_tokens if kind == _CONTROL else made.add_tokens
                add([added])
        named = {
            f"{name}_token": tokens[id]
            for name, key in (
                ("bos", "bos"),
                ("eos", "eos"),
                ("unk", "unknown"),
                ("pad", "padding"),
            )
            if (id := self._get(f"tokenizer.ggml.{key}_token_id")) is not None
        }
        bos, wanted = named.get("bos_token"), self._get("tokenizer.ggml.add_bos_token")
        if wanted and bos is None:
            raise ValueError(
                "tokenizer.ggml.add_bos_token is true, but there is no "
                "tokenizer.ggml.bos_token_id"
            )
        if wanted or (bos and wanted is None and pre == "llama-bpe"):
            made.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A",
                pair=f"{bos} $A {bos} $B",
                special_tokens=[(bos, tokens.index(bos))],
            )
        return PreTrainedTokenizerFast(
            tokenizer_object=made,
            chat_template=self._get("tokenizer.chat_template"),
            model_max_length=self._own("context_length"),
            clean_up_tokenization_spaces=False,
            **named,
        )

    def _get(self, key: str, default: Any = None) -> Any:
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def _own(self, key: str, default: Any = None) -> Any:
        """A key of this model type, e.g. llama.block_count."""
        name = f"{self._model_type()}.{key}"
        value = self._get(name, default)
        if value is None:
            raise ValueError(f"{self._path}: {name} is missing")
        return value

    def _count(self, key: str, default: Any = None) -> int:
        """A key of this model type that counts something."""
        families.check_kind(key, value := self._own(key, default), families.COUNTS[key])
        return value

    def _model_type(self) -> str:
        family = self._get("general.architecture")
        if family not in _MODEL_TYPES:
            raise ValueError(
                f"{self._path}: general.architecture {family!r} is not supported; "
                f"supported: {', '.join(_MODEL_TYPES)}"
            )
        return family

    def _check_keys(self, family: str) -> None:
        for name in self._reader.fields:
            key = name.removeprefix(f"{family}.")
            if key != name and key not in _KEYS and self._get(name):
                raise ValueError(
                    f"{self._path}: {name}={self._get(name)!r} is not supported"
                )
        size = self._head_dim()
        for key in ("rope.dimension_count", "attention.value_length"):
            if self._own(key, size) != size:
                raise ValueError(
                    f"{self._path}: {family}.{key}={self._own(key)} is not the head "
                    f"size {size}"
                )

    def _head_dim(self) -> int:
        derived = self._count("embedding_length") // self._count("attention.head_count")
        return self._count("attention.key_length", derived)

    def _ends(self) -> tuple[int, ...]:
        keys = ("eos_token_id", "eot_token_id", "eom_token_id")
        ids = {key: self._get(f"tokenizer.ggml.{key}") for key in keys}
        given = {key: id for key, id in ids.items() if id is not None}
        for key, id in given.items():
            families.check_kind(f"tokenizer.ggml.{key}", id, families.EOS)
        return tuple(dict.fromkeys(given.values()))

    def _rope(self, size: int) -> Rope:
        theta = self._own("rope.freq_base", 10_000.0)
        if (freqs := self._tensors.get("rope_freqs.weight")) is not None:
            return self._llama3_rope(theta, size, np.asarray(freqs.data))
        match self._own("rope.scaling.type", "none"):
            case "none":
                return Rope(theta=theta)
            case "linear":
                factor = self._own("rope.scaling.factor")
                return Rope(theta=theta, scaling="linear", factor=factor)
            case other:
                raise ValueError(
                    f"{self._path}: rope.scaling.type {other!r} is not supported; "
                    "supported: none, linear"
                )

    def _llama3_rope(self, theta: float, size: int, divisors: np.ndarray) -> Rope:
        """The llama3 scaling that divides the frequencies by these numbers."""
        plain = Rope(theta=theta).frequencies(size)
        for factor in _LLAMA3_FACTORS:
            rope = Rope(theta=theta, scaling="llama3", factor=factor)
            if np.allclose(plain / rope.frequencies(size), divisors, rtol=1e-4):
                return rope
        raise ValueError(
            f"{self._path}: tensor rope_freqs.weight is not the llama3 scaling by "
            f"{_LLAMA3_FACTORS} from 8192 positions"
        )


class _Reader(gguf.GGUFReader):
    """Slices the file as a plain array: `np.memmap` makes each of a vocabulary's
    hundred thousand slices three times as slow."""

    @property
    def data(self) -> np.ndarray:
        return self._data

    @data.setter
    def data(self, mapped: np.memmap) -> None:
        self._data, self._values = mapped.view(np.ndarray), 0

    def _get(self, offset, dtype, count=1, *rest, **more):
        """A part of the file, which has to have it: past the end there would be empty
        values for as long as a damaged count says."""
        self._count(1)
        self._check_end(int(offset) + int(count) * np.dtype(dtype).itemsize)
        return super()._get(offset, dtype, count, *rest, **more)

    def _count(self, values: int) -> None:
        self._values += values
        if self._values > _VALUES:
            raise ValueError(f"its metadata has more than {_VALUES} values")

    def _check_end(self, end: int) -> None:
        if end > self._data.size:
            raise ValueError(
                f"it ends after {self._data.size} bytes, but what it lists needs {end}"
            )

    def _get_field_parts(self, orig_offs, raw_type):
        """A value of the metadata: lists, of which a vocabulary has some of hundreds of
        thousands, without a slice by NumPy for every length and number."""
        if raw_type != gguf.GGUFValueType.ARRAY or self.byte_order != "I":
            return super()._get_field_parts(orig_offs, raw_type)
        kind = self._get(orig_offs, np.uint32)
        count = self._get(orig_offs + 4, np.uint64)
        start, of = int(orig_offs) + 12, gguf.GGUFValueType(kind[0])
        if of is gguf.GGUFValueType.STRING:
            values = self._texts(start, int(count[0]))
            size = 8 * len(values) + sum(value.size for value in values)
        elif (dtype := self.gguf_scalar_to_np.get(of)) is not None:
            values = [self._get(start, dtype, count[0])]
            size = values[0].nbytes
        else:
            return super()._get_field_parts(orig_offs, raw_type)
        where = [*range(2, 2 + len(values))]
        types = [gguf.GGUFValueType.ARRAY, of]
        return 12 + size, [kind, count, *values], where, types

    def _texts(self, start: int, count: int) -> list[np.ndarray]:
        """So many texts, each after its length, as bytes of the file."""
        self._check_end(start + 8 * count)
        self._count(count)
        found, length, data = [], struct.Struct("<Q"), self._data
        for _ in range(count):
            self._check_end(start + 8)
            end = start + 8 + length.unpack_from(data, start)[0]
            self._check_end(end)
            found.append(data[start + 8 : end])
            start = end
        return found


def _dequantised(rows: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """float32 of rows as they are stored.

    In parts of many rows, side by side: `gguf.quants.dequantize` takes 16 at a time, so
    that most of the time is Python's, and the rest waits for its lock.

    Raises:
      NotImplementedError: no way is known to read this type.
    """
    quants = getattr(gguf.quants, kind.name, None)
    if quants is None:
        return gguf.quants.dequantize(rows, kind)
    quants.init_grid()
    block, size = gguf.GGML_QUANT_SIZES[kind]
    flat = rows.reshape(-1, size)
    out = np.empty((len(flat), block), np.float32)
    count = max(1, _PART // block)

    def fill(start: int) -> None:
        at = slice(start, start + count)
        out[at] = quants.dequantize_blocks(flat[at])

    starts = range(0, len(flat), count)
    with ThreadPoolExecutor(max(1, min(len(starts), os.cpu_count() or 1))) as pool:
        for _ in pool.map(fill, starts):
            pass
    return out.reshape(*rows.shape[:-1], -1)


def _unpermute(x: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of whole heads from llama.cpp's order (x0, y0, x1, y1, ...) to (x..., y...).

    It rotates neighbouring pairs; Hugging Face pairs the halves of a head.
    """
    pairs = x.reshape(-1, head_dim // 2, 2, *x.shape[1:])
    return pairs.swapaxes(1, 2).reshape(x.shape)
