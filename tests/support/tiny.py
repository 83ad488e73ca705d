"""The smallest tokenizer and the smallest model that behave like real ones."""

import json
import pathlib

import jax
import numpy as np
import waiting
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxrl_llm.models import Architecture, Moe, Rope, init, save

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{{ '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """One token per byte and three special ones: pad, <|im_start|>, <|im_end|> (eos).

    259 tokens. Text survives encoding and decoding exactly.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: i for i, char in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


def arch(**overrides) -> Architecture:
    """Two Llama layers, 32 wide; `overrides` are fields of `Architecture`."""
    layers = overrides.get("num_layers", 2)
    fields = {
        "model_type": "llama",
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_layers": layers,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "norm_eps": 1e-5,
        "rope": (Rope(theta=1e4),),
        "rope_of_layer": (0,) * layers,
        "window_of_layer": (None,) * layers,
    }
    return Architecture(**fields | overrides)


def with_experts(**overrides) -> dict:
    """Fields of a GLM-4.5 for `arch`: a dense layer, then two with 8 experts, of which
    3 are chosen from one of two groups, and one that all tokens share."""
    return {
        "model_type": "glm4_moe",
        "num_layers": 3,
        "num_heads": 8,
        "qk_norm": True,
        "tie_embeddings": False,
        "rope": (Rope(theta=1e4, rotated=0.5),),
        "moe": Moe(
            num_experts=8,
            top_k=3,
            expert_size=16,
            score="sigmoid",
            selection_bias=True,
            groups=2,
            chosen_groups=1,
            renormalise=True,
            scale=1.5,
            shared_size=16,
            dense_layers=(0,),
        ),
    } | overrides


def checkpoint(directory, **overrides) -> str:
    """Saves a random model, the same each time, and the tokenizer as a Hugging Face
    directory, which must not exist yet. Returns its path.

    264 tokens, so that a mesh axis of 8 divides them.
    """
    end = tokenizer()
    made = arch(**{"vocab_size": 264, "eos_token_ids": (end.eos_token_id,)} | overrides)
    params = init(made, jax.random.key(0))
    save(directory, made, params, end, dtype="float32")
    return str(directory)


def reward_model(directory, **overrides) -> str:
    """`checkpoint` with a head that scores in place of the output matrix."""
    folder = pathlib.Path(checkpoint(directory, **overrides))
    weights, config = folder / "model.safetensors", folder / "config.json"
    tensors = load_file(weights)
    width = tensors["model.norm.weight"].size
    del tensors["lm_head.weight"]
    head = np.random.default_rng(0).standard_normal((1, width))
    save_file(tensors | {"score.weight": head.astype(np.float32)}, weights)
    said = json.loads(config.read_text())
    said |= {"architectures": ["LlamaForSequenceClassification"]}
    config.write_text(json.dumps(said))
    return str(folder)


def small_ids(completion_ids: list[list[int]]) -> list[float]:
    """A reward that is quickly learned: the share of tokens with an id below 100.

    A test may stop it at any call, see `waiting.at_the_gate`.
    """
    waiting.at_the_gate()
    return [sum(token < 100 for token in ids) / len(ids) for ids in completion_ids]
