"""Random models of transformers, one of every family and of its kinds."""

import functools

import pytest

COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}
GEMMA = {"query_pre_attn_scalar": 24, "sliding_window": 6}
# transformers configuration class, and its fields.
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "llama-untied-biases": (
        "LlamaConfig",
        {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    ),
    "llama3-rope": ("LlamaConfig", {"rope_scaling": LLAMA3, "rope_theta": 5e5}),
    "linear-rope": ("LlamaConfig", {"rope_scaling": LINEAR}),
    "yarn-rope": ("LlamaConfig", {"rope_scaling": YARN}),
    "yarn-rope-mscale": (
        "LlamaConfig",
        {
            "rope_scaling": YARN
            | {"mscale": 0.7, "mscale_all_dim": 0.3, "truncate": False, "beta_fast": 4}
        },
    ),
    "yarn-rope-attention-factor": (
        "LlamaConfig",
        {"rope_scaling": YARN | {"attention_factor": 1.3}},
    ),
    "mistral": ("MistralConfig", {"sliding_window": 6}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2-window": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", {"attention_bias": True}),
    "gemma2": (
        "Gemma2Config",
        GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        GEMMA
        | {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": LINEAR | {"rope_theta": 1e6},
            },
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0]}),
    "smollm3-window": (
        "SmolLM3Config",
        {"use_sliding_window": True, "sliding_window": 6, "no_rope_layer_interval": 2},
    ),
}


@functools.cache
def reference(family):
    """A random transformers model. Norms and biases are random too, so that none can be
    left out unnoticed."""
    torch = pytest.importorskip("torch")
    import transformers

    name, fields = FAMILIES[family]
    config = getattr(transformers, name)(**{**COMMON, **fields})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model
