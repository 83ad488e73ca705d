"""Well-known models by name, as shapes without weights.

Source: the config.json of each model on the Hugging Face hub.
"""

from pathlib import Path
from typing import Any

from jaxrl_llm.models import Architecture, architecture
from jaxrl_llm.models.checkpoints import files


def _llama(vocab, hidden, inner, layers, heads, kv_heads, head, tied, theta, **more):
    return {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head,
        "tie_word_embeddings": tied,
        "rope_theta": theta,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 40960,
        **more,
    }


def _qwen2(*sizes: Any) -> dict[str, Any]:
    shape = _llama(151936, *sizes, 1e6, model_type="qwen2")
    del shape["head_dim"]
    return shape


def _qwen3(*sizes: Any) -> dict[str, Any]:
    return _llama(151936, *sizes, 1e6, model_type="qwen3")


def _qwen3_moe(*sizes: Any, experts: int, chosen: int, inner: int) -> dict[str, Any]:
    return _qwen3(*sizes) | {
        "model_type": "qwen3_moe",
        "num_experts": experts,
        "num_experts_per_tok": chosen,
        "moe_intermediate_size": inner,
        "norm_topk_prob": True,
    }


# vocabulary, width, feed-forward, layers, heads, KV heads, head size, tied, theta
_SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _llama(512, 64, 128, 2, 4, 2, 16, True, 1e4),
    "smollm2-135m": _llama(49152, 576, 1536, 30, 9, 3, 64, True, 1e5),
    "llama3.1-8b": _llama(128256, 4096, 14336, 32, 32, 8, 128, False, 5e5),
    "llama3.1-70b": _llama(128256, 8192, 28672, 80, 64, 8, 128, False, 5e5),
    "qwen2.5-0.5b": _qwen2(896, 4864, 24, 14, 2, 64, True),
    "qwen2.5-1.5b": _qwen2(1536, 8960, 28, 12, 2, 128, True),
    "qwen2.5-7b": _qwen2(3584, 18944, 28, 28, 4, 128, False) | {"vocab_size": 152064},
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, 8, 128, True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, 8, 128, True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, 8, 128, True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, 8, 128, False),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64, 8, 128, False),
    "qwen3-30b-a3b": _qwen3_moe(
        2048, 6144, 48, 32, 4, 128, False, experts=128, chosen=8, inner=768
    ),
    "qwen3-235b-a22b": _qwen3_moe(
        4096, 12288, 94, 64, 4, 128, False, experts=128, chosen=8, inner=1536
    ),
}

NAMES = tuple(_SHAPES)


def find(name: str) -> Architecture:
    """The shape of that name, or of a config.json file.

    Raises:
      ValueError: neither a known name nor a file that describes a model.
    """
    if name.lower() in _SHAPES:
        return architecture(_SHAPES[name.lower()])
    path = Path(name)
    if path.is_file():
        said = files.json_object(path)
        with files.reading(path):
            return architecture(said)
    raise ValueError(
        f"model {name!r} is no config.json and none of {', '.join(_SHAPES)}"
    )
