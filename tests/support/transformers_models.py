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
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
FAMILIES |= {
    "qwen3-moe": ("Qwen3MoeConfig", EXPERTS | {"moe_intermediate_size": 24}),
    "qwen3-moe-dense-layers": (
        "Qwen3MoeConfig",
        EXPERTS
        | {
            "num_hidden_layers": 4,
            "moe_intermediate_size": 24,
            "norm_topk_prob": False,
            "decoder_sparse_step": 2,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 6,
        },
    ),
    "olmoe": (
        "OlmoeConfig",
        EXPERTS | {"head_dim": 8, "norm_topk_prob": False, "clip_qkv": 0.7},
    ),
    "mixtral": (
        "MixtralConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},
    ),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        EXPERTS
        | {
            "head_dim": 8,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
            "mlp_only_layers": [1],
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 6,
        },
    ),
    "glm4-moe": (
        "Glm4MoeConfig",
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "n_shared_experts": 2,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.7,
            "first_k_dense_replace": 1,
            "num_hidden_layers": 3,
            "attention_bias": True,
            "use_qk_norm": True,
        },
    ),
}
WITH_EXPERTS = [family for family in FAMILIES if "moe" in family or family == "mixtral"]


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
        for name, buffer in model.named_buffers():
            if "correction_bias" in name:
                buffer.add_(0.1 * torch.randn_like(buffer))
    return model
