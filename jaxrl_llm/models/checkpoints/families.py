"""A config.json to an `Architecture`, and back.

Reads the layout of transformers 5 (`rope_parameters`, `layer_types`) and the older one
that most files on the hub have. A field that would change the numbers and is not
implemented is an error, never ignored.

Source: the configuration and modelling files of transformers 5.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxrl_llm.models.architecture import Architecture, Moe, Rope

Config = Mapping[str, Any]


class Kind(NamedTuple):
    """What a key may hold."""

    what: str
    holds: Callable[[Any], bool]


def _whole(most: int, least: int = 1) -> Kind:
    return Kind(
        f"a whole number from {least} to {most}",
        lambda value: type(value) is int and least <= value <= most,
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
_WHOLES = Kind(
    "a list of 0 and 1",
    lambda value: type(value) is list and all(x in (0, 1) for x in value),
)
_OBJECT = Kind("an object in braces", lambda value: isinstance(value, Mapping))
_ID = _whole(2**31, least=0)
EOS = Kind(
    "a token's number, or a list of them",
    lambda value: all(map(_ID.holds, value if type(value) is list else [value])),
)
_LAYERS, _WIDTH, _HEADS, _SIZE = (
    _whole(4096), _whole(2**18), _whole(2**14), _whole(2**13)
)  # fmt: skip
_WIDER, _LENGTH, _EXPERTS = _whole(2**22), _whole(2**40), _whole(2**14)
_NUMBERS = Kind(
    "a list of layers' numbers",
    lambda value: type(value) is list and all(map(_ID.holds, value)),
)
_SHARE = Kind(
    "a share, above 0 and at most 1",
    lambda value: type(value) in (int, float) and 0 < value <= 1,
)
_KINDS = {
    "vocab_size": _whole(2**24),
    "hidden_size": _WIDTH,
    "intermediate_size": _WIDER,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _HEADS,
    "head_dim": _SIZE,
    "max_position_embeddings": _LENGTH,
    "rms_norm_eps": _POSITIVE,
    "rope_theta": _POSITIVE,
    "rope_local_base_freq": _POSITIVE,
    "query_pre_attn_scalar": _POSITIVE,
    "final_logit_softcapping": _POSITIVE,
    "attn_logit_softcapping": _POSITIVE,
    "sliding_window": _whole(2**40, least=0),
    "max_window_layers": _whole(2**40, least=0),
    "sliding_window_pattern": _LENGTH,
    "no_rope_layer_interval": _LENGTH,
    "rope_scaling": _OBJECT,
    "rope_parameters": _OBJECT,
    "tie_word_embeddings": _SWITCH,
    "use_sliding_window": _SWITCH,
    "attention_bias": _SWITCH,
    "mlp_bias": _SWITCH,
    "hidden_act": _TEXT,
    "hidden_activation": _TEXT,
    "layer_types": _TEXTS,
    "no_rope_layers": _WHOLES,
    "eos_token_id": EOS,
    "clip_qkv": _POSITIVE,
    "num_experts": _EXPERTS,
    "num_local_experts": _EXPERTS,
    "n_routed_experts": _EXPERTS,
    "num_experts_per_tok": _EXPERTS,
    "moe_intermediate_size": _WIDER,
    "shared_expert_intermediate_size": _WIDER,
    "n_shared_experts": _EXPERTS,
    "n_group": _EXPERTS,
    "topk_group": _EXPERTS,
    "routed_scaling_factor": _POSITIVE,
    "norm_topk_prob": _SWITCH,
    "use_qk_norm": _SWITCH,
    "qkv_bias": _SWITCH,
    "decoder_sparse_step": _LAYERS,
    "first_k_dense_replace": _whole(4096, least=0),
    "mlp_only_layers": _NUMBERS,
    "partial_rotary_factor": _SHARE,
}
COUNTS = {
    "block_count": _LAYERS,
    "embedding_length": _WIDTH,
    "feed_forward_length": _WIDER,
    "attention.head_count": _HEADS,
    "attention.head_count_kv": _HEADS,
    "attention.key_length": _SIZE,
    "context_length": _LENGTH,
}
"""Bounds of the keys of a GGUF file that count something."""

_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "rms_norm_eps",
    "max_position_embeddings",
)
# What every family reads, with the value that a missing key stands for.
_SHARED = {
    "num_key_value_heads": None,
    "head_dim": None,
    "rope_theta": None,
    "rope_scaling": None,
    "rope_parameters": None,
    "layer_types": None,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "eos_token_id": None,
}
_WINDOW_SWITCH = {
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_GEMMA = {
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
# What a family reads besides.
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": False, "mlp_bias": False},
    "mistral": {"sliding_window": 4096},
    "qwen2": _WINDOW_SWITCH,
    "qwen3": {**_WINDOW_SWITCH, "attention_bias": False, "head_dim": 128},
    "gemma2": {
        **_GEMMA,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    "gemma3_text": {
        **_GEMMA,
        "final_logit_softcapping": None,
        "rope_local_base_freq": None,
        "sliding_window_pattern": 6,
    },
    "smollm3": {
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
    },
}
_FAMILIES |= {
    "qwen3_moe": {
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "num_experts": None,
        "num_local_experts": None,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
    },
    "olmoe": {
        "attention_bias": False,
        "clip_qkv": None,
        "num_experts": None,
        "num_local_experts": None,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    },
    "mixtral": {
        "sliding_window": None,
        "num_experts": None,
        "num_local_experts": None,
        "num_experts_per_tok": 2,
    },
    "qwen2_moe": {
        **_WINDOW_SWITCH,
        "qkv_bias": True,
        "num_experts": None,
        "num_local_experts": None,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
    },
    "glm4_moe": {
        "attention_bias": False,
        "use_qk_norm": False,
        "partial_rotary_factor": 0.5,
        "n_routed_experts": None,
        "num_local_experts": None,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1408,
        "n_shared_experts": 1,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
    },
}
_COUNT_OF_EXPERTS = {
    "qwen3_moe": 128,
    "olmoe": 64,
    "mixtral": 8,
    "qwen2_moe": 60,
    "glm4_moe": 128,
}
"""What a missing count stands for."""
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
}
_CLASSIFIERS = {
    "llama": "LlamaForSequenceClassification",
    "mistral": "MistralForSequenceClassification",
    "qwen2": "Qwen2ForSequenceClassification",
    "qwen3": "Qwen3ForSequenceClassification",
    "gemma2": "Gemma2ForSequenceClassification",
    "gemma3_text": "Gemma3TextForSequenceClassification",
    "smollm3": "SmolLM3ForSequenceClassification",
    "qwen3_moe": "Qwen3MoeForSequenceClassification",
    "mixtral": "MixtralForSequenceClassification",
    "qwen2_moe": "Qwen2MoeForSequenceClassification",
}
# Keys that change no number, whatever they hold.
_HARMLESS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash
    _flash_attn_2_enabled _name_or_path _sliding_window_pattern architectures
    attn_implementation bad_words_ids begin_suppress_tokens bos_token bos_token_id
    cache_implementation chunk_size_feed_forward decoder_start_token_id
    diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size
    eos_token exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id gradient_checkpointing hf_device_map id2label
    initializer_range is_llama_config keys_to_ignore_at_inference label2id
    length_penalty license max_length max_new_tokens max_sequence_length min_length
    model_max_length model_name model_type name_or_path neftune_noise_alpha
    no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences
    output_attentions output_hidden_states output_router_logits output_scores
    pad_token pad_token_id prefix problem_type remove_invalid_values
    renormalize_logits repetition_penalty return_dict return_dict_in_generate
    sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config
    transformers_version typical_p unk_token unk_token_id unsloth_fixed
    unsloth_version unsloth_training use_bfloat16 use_cache use_flash_attention_2
    use_flash_attn
    """.split()
)
_HARMLESS_HERE = {
    "gemma2": {"hidden_act", "sliding_window_size"},
    "gemma3_text": {"hidden_act"},
    "smollm3": {"max_window_layers", "pretraining_tp"},
    # How much of a loss on the router transformers adds to the one that it computes.
    "qwen3_moe": {"router_aux_loss_coef", "max_window_layers"},
    "olmoe": {"router_aux_loss_coef"},
    "mixtral": {"router_aux_loss_coef"},
    "qwen2_moe": {"router_aux_loss_coef"},
    # Layers that predict more tokens ahead are behind the others and left out.
    "glm4_moe": {"num_mtp_layers", "num_nextn_predict_layers"},
}
# Keys whose only implemented value is this one.
_ONLY = {"attention_dropout": 0, "partial_rotary_factor": 1, "pretraining_tp": 1}

_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}
_FULL, _SLIDING = "full_attention", "sliding_attention"


def architecture(
    config: Config,
    generation_config: Config | None = None,
    *,
    classifier: bool = False,
) -> Architecture:
    """What a config.json describes.

    Args:
      config: the parsed config.json.
      generation_config: the parsed generation_config.json; tokens that end a response
        are those of either file.
      classifier: the file may also be of a decoder with a head for classification,
        which is no part of the architecture.

    Raises:
      ValueError: the family, or a field's value, is not supported.
    """
    family = _family(config, [_CLASSES, _CLASSIFIERS] if classifier else [_CLASSES])
    c = _read(family, config)
    L, gemma = c["num_hidden_layers"], family.startswith("gemma")
    types = _layer_types(family, c)
    ropes = _rope_of_layer(family, c, types)
    kinds = tuple(dict.fromkeys(ropes))
    head_dim = c["head_dim"] or c["hidden_size"] // c["num_attention_heads"]
    if head_dim < 1 or head_dim % 2:
        given = {k: c[k] for k in ("head_dim", "hidden_size", "num_attention_heads")}
        raise ValueError(
            f"config.json: {given} give heads of {head_dim} numbers; they have to be "
            "pairs"
        )
    attention_bias, clip = c.get("attention_bias") or False, c.get("clip_qkv")
    caps = (c.get("attn_logit_softcapping"), c.get("final_logit_softcapping"))
    attention_cap, logit_cap = (None if cap is None else float(cap) for cap in caps)
    arch = Architecture(
        model_type=family,
        vocab_size=c["vocab_size"],
        hidden_size=c["hidden_size"],
        intermediate_size=c["intermediate_size"],
        num_layers=L,
        num_heads=c["num_attention_heads"],
        num_kv_heads=c["num_key_value_heads"] or c["num_attention_heads"],
        head_dim=head_dim,
        norm_eps=float(c["rms_norm_eps"]),
        rope=kinds,
        rope_of_layer=tuple(kinds.index(rope) for rope in ropes),
        window_of_layer=tuple(
            c["sliding_window"] if kind == _SLIDING else None for kind in types
        ),
        tie_embeddings=c["tie_word_embeddings"] or False,
        qkv_bias=attention_bias or family == "qwen2" or c.get("qkv_bias") or False,
        output_bias=attention_bias and family != "glm4_moe",
        mlp_bias=c.get("mlp_bias") or False,
        qk_norm=family in _NORMED or c.get("use_qk_norm") or False,
        qk_norm_together=family == "olmoe",
        qkv_clip=None if clip is None else float(clip),
        moe=_moe(family, c),
        activation=_activation(c, "hidden_activation" if gemma else "hidden_act"),
        norm_offset=gemma,
        post_norms=gemma,
        embed_scale=gemma,
        query_scale=c["query_pre_attn_scalar"] ** -0.5 if gemma else None,
        attention_softcap=attention_cap,
        logit_softcap=logit_cap,
        max_positions=max(c["max_position_embeddings"], *map(_reach, kinds)),
        eos_token_ids=_eos(generation_config or {}, config),
        source=json.dumps(config),
        generation=json.dumps(generation_config or {}),
    )
    check_ropes(arch)
    return arch


_NORMED = frozenset({"qwen3", "gemma3_text", "qwen3_moe", "olmoe"})
"""Families with norms of queries and keys."""


def _moe(family: str, c: Config) -> Moe | None:
    """The experts, if the family has any."""
    if family not in _COUNT_OF_EXPERTS:
        return None
    counts = (
        c.get(key) for key in ("num_experts", "n_routed_experts", "num_local_experts")
    )
    E = next((count for count in counts if count), _COUNT_OF_EXPERTS[family])
    L, shared = c["num_hidden_layers"], c.get("shared_expert_intermediate_size")
    size = c.get("moe_intermediate_size", c["intermediate_size"])
    dense: Sequence[int] = ()
    if family in ("qwen3_moe", "qwen2_moe"):
        step, named = c["decoder_sparse_step"] or 1, c["mlp_only_layers"] or []
        dense = [i for i in range(L) if i in named or (i + 1) % step]
    elif family == "glm4_moe":
        dense, shared = range(c["first_k_dense_replace"]), size * c["n_shared_experts"]
    is_glm, is_mixtral = family == "glm4_moe", family == "mixtral"
    if len(dense) >= L:
        raise ValueError(
            f"config.json: none of {L} layers has experts; a {family} without any is "
            "not supported"
        )
    try:
        return Moe(
            num_experts=E,
            top_k=c["num_experts_per_tok"],
            expert_size=size,
            score="sigmoid" if is_glm else _SCORES[is_mixtral],
            selection_bias=is_glm,
            groups=c.get("n_group", 1),
            chosen_groups=c.get("topk_group", 1),
            renormalise=c.get("norm_topk_prob") or False,
            scale=float(c.get("routed_scaling_factor", 1.0)),
            shared_size=shared,
            shared_gate=family == "qwen2_moe",
            dense_layers=tuple(dense),
        )
    except ValueError as error:
        raise ValueError(f"config.json: {error}") from None


_SCORES: tuple[Literal["softmax"], Literal["softmax_of_chosen"]] = (
    "softmax",
    "softmax_of_chosen",
)


def check_kind(key: str, value: Any, kind: Kind) -> None:
    """Raises ValueError if a key holds something else than it may."""
    if not kind.holds(value):
        raise ValueError(f"{key}={short(value)} is not {kind.what}")


def check_ropes(arch: Architecture) -> None:
    """Raises ValueError if a position embedding has no numbers to rotate by."""
    for rope in arch.rope:
        if rope is None:
            continue
        if int(arch.head_dim * rope.rotated) % 2:
            raise ValueError(
                f"its position embedding rotates {rope.rotated} of heads of "
                f"{arch.head_dim} numbers, which are no pairs"
            )
        try:
            with np.errstate(all="ignore"):
                usable = np.isfinite(rope.frequencies(arch.head_dim)).all()
        except (ArithmeticError, ValueError):
            usable = False
        if not usable:
            raise ValueError(f"its position embedding gives no angles: {rope}")


def short(value: Any) -> str:
    """How an error shows a value of a file."""
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "..."


def config(arch: Architecture) -> dict[str, Any]:
    """The config.json of `arch`: the one it came from, or else a new one.

    Raises:
      ValueError: `arch` is not what the file would say, so whoever reads the file would
        compute something else.
    """
    made = json.loads(arch.source)
    if "model_type" not in made:
        made = _written(arch)
    said = _comparable(architecture(made, classifier=True))
    meant = _comparable(arch)
    for name in meant:
        if said[name] != meant[name]:
            raise ValueError(
                f"a {arch.model_type} config.json cannot hold {name}={meant[name]!r} "
                f"(it says {said[name]!r})"
            )
    return made


def classifier_config(arch: Architecture, pad_token_id: int) -> dict[str, Any]:
    """The config.json of a decoder of `arch` with a head of one number.

    Args:
      pad_token_id: what stands behind shorter sequences; transformers reads the score
        before the first of them.

    Raises:
      ValueError: as of `config`.
    """
    if arch.model_type not in _CLASSIFIERS:
        raise ValueError(
            f"transformers has no {arch.model_type} model with a head of one number; "
            f"it has those of {', '.join(_CLASSIFIERS)}"
        )
    made = json.loads(arch.source)
    if "model_type" in made:  # whether it says that its output matrix is tied
        tied = architecture(made, classifier=True).tie_embeddings
        arch = dataclasses.replace(arch, tie_embeddings=tied)
    return config(arch) | {
        "architectures": [_CLASSIFIERS[arch.model_type]],
        "num_labels": 1,
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "pad_token_id": pad_token_id,
    }


def untied(arch: Architecture) -> Architecture:
    """This model with an output matrix of its own."""
    made = json.loads(arch.source)
    if "model_type" in made:
        made["tie_word_embeddings"] = False
    return dataclasses.replace(arch, tie_embeddings=False, source=json.dumps(made))


def _family(config: Config, known: Sequence[Mapping[str, str]]) -> str:
    family = config.get("model_type")
    if not isinstance(family, str) or family not in _FAMILIES:
        raise ValueError(
            f"config.json: model_type {short(family)} is not supported; "
            f"supported: {', '.join(_FAMILIES)}"
        )
    classes = config.get("architectures")
    if classes and classes not in [[of_family.get(family)] for of_family in known]:
        supported = [name for of_family in known for name in of_family.values()]
        raise ValueError(
            f"config.json: architectures {classes} is not supported; "
            f"supported: {', '.join(supported)}"
        )
    return family


def _read(family: str, config: Config) -> dict[str, Any]:
    """The keys this family reads; raises for any other that would matter."""
    defaults = _SHARED | _FAMILIES[family]
    harmless = _HARMLESS | _HARMLESS_HERE.get(family, set())
    for key in _REQUIRED:
        if config.get(key) is None:
            raise ValueError(f"config.json: {key} is missing")
    for key, kind in _KINDS.items():
        read = key in defaults or key in _REQUIRED
        if read and config.get(key) is not None:
            check_kind(f"config.json: {key}", config[key], kind)
    for key, value in config.items():
        if key in harmless or key in defaults or key in _REQUIRED or not value:
            continue
        if key not in _ONLY or value != _ONLY[key]:
            raise ValueError(
                f"config.json: {key}={short(value)} is not supported for {family}"
            )
    return defaults | {k: config[k] for k in (*_REQUIRED, *defaults) if k in config}


def _activation(c: Config, key: str):
    if c[key] not in _ACTIVATIONS:
        raise ValueError(
            f"config.json: {key}={c[key]!r} is not supported; "
            f"supported: {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[c[key]]


def _eos(*configs: Config) -> tuple[int, ...]:
    ids: list[int] = []
    for config in configs:
        given = config.get("eos_token_id")
        ids += [] if given is None else given if isinstance(given, list) else [given]
    return tuple(dict.fromkeys(ids))


def _layer_types(family: str, c: Config) -> list[str]:
    """ "full_attention" or "sliding_attention" for every layer."""
    L, window = c["num_hidden_layers"], c.get("sliding_window")
    match family:
        case "mistral":
            sliding = [window is not None] * L
        case "mixtral":
            sliding = [window is not None] * L
        case "qwen3_moe":
            sliding = [c["use_sliding_window"] and window is not None] * L
        case "qwen2_moe":
            on, last = c["use_sliding_window"] and window, c["max_window_layers"]
            sliding = [bool(on) and i % 2 == 0 and i < last for i in range(L)]
        case "qwen2" | "qwen3":
            on = c["use_sliding_window"] and window is not None
            sliding = [on and i >= c["max_window_layers"] for i in range(L)]
        case "gemma2":
            sliding = [i % 2 == 0 for i in range(L)]
        case "gemma3_text":
            sliding = [(i + 1) % c["sliding_window_pattern"] > 0 for i in range(L)]
        case "smollm3":
            on = c["use_sliding_window"] and window is not None
            sliding = [on and not rotates for rotates in _rotates(c)]
        case _:
            sliding = [False] * L
    types = [_SLIDING if slides else _FULL for slides in sliding]
    given = c["layer_types"]
    if given is not None and given != types:
        fixed = family in ("llama", "mistral")
        if fixed or len(given) != L or set(given) - {_FULL, _SLIDING}:
            raise ValueError(
                f"config.json: layer_types={given} is not supported for {family} "
                f"with {L} layers"
            )
        types = given
    off = not window or not c.get("use_sliding_window", True)
    if _SLIDING in types and off:
        raise ValueError(
            f"config.json: layer_types has {_SLIDING}, but "
            f"sliding_window={window}, use_sliding_window="
            f"{c.get('use_sliding_window')}"
        )
    return types


def _rotates(c: Config) -> list[bool]:
    """Which layers of SmolLM3 have a position embedding."""
    L, every = c["num_hidden_layers"], c["no_rope_layer_interval"] or 4
    given = c["no_rope_layers"]
    if given is None:
        return [(i + 1) % every != 0 for i in range(L)]
    if len(given) < L:
        raise ValueError(f"config.json: no_rope_layers={given} for {L} layers")
    return [bool(x) for x in given[:L]]


def _rope_of_layer(family: str, c: Config, types: list[str]) -> list[Rope | None]:
    if c["rope_scaling"] and c["rope_parameters"]:
        raise ValueError("config.json has both rope_scaling and rope_parameters")
    given = c["rope_parameters"] or c["rope_scaling"] or {}
    by_type = any(isinstance(value, Mapping) for value in given.values())
    if family != "gemma3_text":
        if by_type:
            raise ValueError(
                f"config.json: rope_parameters={given} by layer type is not supported "
                f"for {family}"
            )
        rope = _rope(given, c, _THETA.get(family, 1e4))
        if family == "smollm3":
            return [rope if rotates else None for rotates in _rotates(c)]
        return [rope] * len(types)
    if c["rope_parameters"] and not by_type:
        raise ValueError(
            f"config.json: rope_parameters={given} of gemma3_text must be given by "
            "layer type"
        )
    full, sliding = (
        (given, {}) if not by_type else (given.get(_FULL), given.get(_SLIDING))
    )
    for kind, value in ((_FULL, full), (_SLIDING, sliding)):
        check_kind(f"config.json: {kind} of rope_parameters", value, _OBJECT)
    local = c | {"rope_theta": c["rope_local_base_freq"]}
    ropes = {_FULL: _rope(full, c, 1e6), _SLIDING: _rope(sliding, local, 1e4)}
    return [ropes[kind] for kind in types]


_THETA = {"smollm3": 2e6, "mixtral": 1e6}


def _rope(given: Config, c: Config, default_theta: float) -> Rope:
    """The embedding, of a share of each head where the family says so."""
    share = c.get("partial_rotary_factor", 1.0)
    if "partial_rotary_factor" in c and given.get("partial_rotary_factor"):
        share = given["partial_rotary_factor"]
        check_kind("config.json: partial_rotary_factor", share, _SHARE)
        given = {k: v for k, v in given.items() if k != "partial_rotary_factor"}
    rope = dataclasses.replace(_whole_rope(given, c, default_theta), rotated=share)
    if share < 1 and rope.scaling != "default":
        raise ValueError(
            f"config.json: partial_rotary_factor={share} with rope_type "
            f"{rope.scaling!r} is not supported"
        )
    return rope


def _whole_rope(given: Config, c: Config, default_theta: float) -> Rope:
    scaling = given.get("rope_type", given.get("type")) or "default"
    if not isinstance(scaling, str) or scaling not in _ROPE_KEYS:
        raise ValueError(
            f"config.json: rope_type {short(scaling)} is not supported; "
            f"supported: {', '.join(_ROPE_KEYS)}"
        )
    known = {"rope_type", "type", "rope_theta", *_ROPE_KEYS[scaling]}
    for key, value in given.items():
        if key not in known and value is not None and _ONLY.get(key) != value:
            raise ValueError(
                f"config.json: {key}={value!r} is not supported for rope_type "
                f"{scaling!r}"
            )
    for key in {"rope_theta", *_ROPE_KEYS[scaling]} - {"truncate"}:
        if given.get(key):
            check_kind(f"config.json: {key}", given[key], _POSITIVE)
    theta = float(given.get("rope_theta") or c["rope_theta"] or default_theta)
    values = {k: float(v) for k, v in given.items() if k in _ROPE_KEYS[scaling] and v}
    original = int(
        values.get("original_max_position_embeddings", c["max_position_embeddings"])
    )
    match scaling:
        case "linear":
            _need(values, scaling, "factor")
            return Rope(theta=theta, scaling="linear", factor=values["factor"])
        case "llama3":
            _need(values, scaling, "factor", "low_freq_factor", "high_freq_factor")
            return Rope(
                theta=theta,
                scaling="llama3",
                factor=values["factor"],
                low_freq_factor=values["low_freq_factor"],
                high_freq_factor=values["high_freq_factor"],
                original_max_position=original,
            )
        case "yarn":
            factor = values.get("factor", c["max_position_embeddings"] / original)
            return Rope(
                theta=theta,
                scaling="yarn",
                factor=factor,
                original_max_position=original,
                beta_fast=values.get("beta_fast", 32.0),
                beta_slow=values.get("beta_slow", 1.0),
                truncate=given.get("truncate", True),
                attention_factor=_yarn_attention_factor(values, factor),
            )
    return Rope(theta=theta)


def _reach(rope: Rope | None) -> int:
    """Positions that a config's YaRN makes of those the model was trained with, as in
    vLLM. Model cards say to add it to files whose max_position_embeddings stays."""
    if rope is None or rope.scaling != "yarn":
        return 0
    return int(rope.original_max_position * rope.factor)


def _need(values: Config, scaling: str, *keys: str) -> None:
    for key in keys:
        if key not in values:
            raise ValueError(f"config.json: rope_type {scaling!r} needs {key}")


def _yarn_attention_factor(values: Config, factor: float) -> float:
    """Source: Peng et al. 2023, section 3.4 (arXiv:2309.00071)."""

    def scale(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if "attention_factor" in values:
        return values["attention_factor"]
    if "mscale" in values and "mscale_all_dim" in values:
        return scale(values["mscale"]) / scale(values["mscale_all_dim"])
    return scale(1.0)


def _comparable(arch: Architecture) -> dict[str, Any]:
    """Fields that change numbers; position embeddings layer by layer."""
    fields = {f.name: getattr(arch, f.name) for f in dataclasses.fields(arch)}
    for name in ("eos_token_ids", "source", "generation", "rope_of_layer"):
        del fields[name]
    return fields | {"rope": [arch.rope[i] for i in arch.rope_of_layer]}


def _written(arch: Architecture) -> dict[str, Any]:
    """A config.json in the older layout, which every version of transformers reads."""
    if arch.model_type not in _FAMILIES:
        raise ValueError(
            f"model_type {arch.model_type!r} has no config.json; "
            f"supported: {', '.join(_FAMILIES)}"
        )
    windows = [window for window in arch.window_of_layer if window is not None]
    ropes = [arch.rope[i] for i in arch.rope_of_layer]
    by_type = dict(zip(arch.window_of_layer, ropes, strict=True))
    rotating = [rope for rope in ropes if rope is not None] or [Rope(theta=1e4)]
    full = by_type.get(None) or rotating[0]
    local = by_type[windows[0]] if windows else None
    names = {value: key for key, value in _ACTIVATIONS.items()}
    gemma, glm = arch.model_type.startswith("gemma"), arch.model_type == "glm4_moe"
    everything = {
        "num_key_value_heads": arch.num_kv_heads,
        "head_dim": arch.head_dim,
        "rope_theta": full.theta,
        "rope_scaling": _written_scaling(full),
        "rope_local_base_freq": local.theta if local else None,
        "tie_word_embeddings": arch.tie_embeddings,
        "attention_bias": arch.output_bias or (glm and arch.qkv_bias),
        "qkv_bias": arch.qkv_bias,
        "use_qk_norm": arch.qk_norm,
        "clip_qkv": arch.qkv_clip,
        "partial_rotary_factor": full.rotated,
        **_written_moe(arch),
        "mlp_bias": arch.mlp_bias,
        "sliding_window": windows[0] if windows else None,
        "use_sliding_window": bool(windows),
        "no_rope_layers": [int(rope is not None) for rope in ropes],
        "query_pre_attn_scalar": arch.query_scale and round(arch.query_scale**-2),
        "final_logit_softcapping": arch.logit_softcap,
        "attn_logit_softcapping": arch.attention_softcap,
        "hidden_activation" if gemma else "hidden_act": names[arch.activation],
    }
    if arch.model_type not in ("llama", "mistral", *_COUNT_OF_EXPERTS):
        everything["layer_types"] = [
            _FULL if window is None else _SLIDING for window in arch.window_of_layer
        ]
    kept = _SHARED | _FAMILIES[arch.model_type]
    return {
        "architectures": [_CLASSES[arch.model_type]],
        "model_type": arch.model_type,
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.intermediate_size,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_heads,
        "rms_norm_eps": arch.norm_eps,
        "max_position_embeddings": arch.max_positions,
        **{key: value for key, value in everything.items() if key in kept},
    }


def _written_moe(arch: Architecture) -> dict[str, Any]:
    if (moe := arch.moe) is None:
        return {}
    return {
        "num_experts": moe.num_experts,
        "num_local_experts": moe.num_experts,
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.expert_size,
        "shared_expert_intermediate_size": moe.shared_size,
        "n_shared_experts": (moe.shared_size or 0) // moe.expert_size,
        "norm_topk_prob": moe.renormalise,
        "mlp_only_layers": list(moe.dense_layers),
        "first_k_dense_replace": len(moe.dense_layers),
        "routed_scaling_factor": moe.scale,
        "n_group": moe.groups,
        "topk_group": moe.chosen_groups,
    }


def _written_scaling(rope: Rope) -> dict[str, Any] | None:
    if rope.scaling == "default":
        return None
    values = dataclasses.asdict(rope) | {
        "original_max_position_embeddings": rope.original_max_position
    }
    return {"rope_type": rope.scaling} | {
        key: values[key] for key in _ROPE_KEYS[rope.scaling] if key in values
    }
