"""Decoders as pure functions of a parameter tree. Flax shows only in this package.

    arch, params, tokenizer = load("Qwen/Qwen2.5-0.5B-Instruct")
    hidden = forward(arch, params, tokens, positions, sequence_ids, dtype=jnp.bfloat16)
    save(directory, arch, params, tokenizer)

`params` is a nested dict of arrays; `logical_axes(arch)` names their axes.
"""

from jaxrl_llm.models.apply import (
    abstract_params,
    for_products,
    forward,
    fuse,
    fuse_adapters,
    fused_adapter_axes,
    init,
    logical_axes,
    logits,
    merge,
    num_matmul_params,
    num_params,
    output_matrix,
    plain,
    split_params,
    unstack,
)
from jaxrl_llm.models.architecture import Architecture, Moe, Rope
from jaxrl_llm.models.attention.flash import choose as choose_attention
from jaxrl_llm.models.attention.flash import (
    counts_sequences as attention_counts_sequences,
)
from jaxrl_llm.models.attention.packed import shared_prompts
from jaxrl_llm.models.attention.paged import Pages
from jaxrl_llm.models.attention.paged_kernels import choose as choose_paged_attention
from jaxrl_llm.models.checkpoints.card import text as model_card
from jaxrl_llm.models.checkpoints.families import architecture, untied
from jaxrl_llm.models.checkpoints.huggingface import (
    Checkpoint,
    Classifier,
    Model,
    load,
    need_tokenizer,
    open,
    open_adapter,
    open_classifier,
    save,
    save_classifier,
    save_programs,
)
from jaxrl_llm.models.checkpoints.peft import Adapter
from jaxrl_llm.models.checkpoints.peft import save as save_adapter
from jaxrl_llm.models.checkpoints.tensor_map import (
    Quantising,
    RandomWeights,
    ReadOnce,
    WeightSource,
)
from jaxrl_llm.models.embedding import choose as choose_lookup
from jaxrl_llm.models.expert_parallel import choose as choose_experts
from jaxrl_llm.models.layer_loop import COMPILER_OPTIONS
from jaxrl_llm.models.layer_loop import choose as choose_loop
from jaxrl_llm.models.lora import (
    Lora,
    NewAdapters,
    abstract_adapters,
    adapter_axes,
    init_adapters,
    is_adapter,
    merged,
    modules_of,
    remade,
)
from jaxrl_llm.models.moe import is_fixed, routes_dtype
from jaxrl_llm.models.partitioning import kv_copies, partition
from jaxrl_llm.models.quantised import DTYPES, Bits
from jaxrl_llm.models.value_head import (
    abstract_critic,
    critic_axes,
    init_critic,
    values,
)

__all__ = [
    "COMPILER_OPTIONS",
    "DTYPES",
    "Adapter",
    "Architecture",
    "Bits",
    "Checkpoint",
    "Classifier",
    "Lora",
    "Model",
    "Moe",
    "NewAdapters",
    "Pages",
    "Quantising",
    "RandomWeights",
    "ReadOnce",
    "Rope",
    "WeightSource",
    "abstract_adapters",
    "abstract_critic",
    "abstract_params",
    "adapter_axes",
    "architecture",
    "attention_counts_sequences",
    "choose_attention",
    "choose_experts",
    "choose_lookup",
    "choose_loop",
    "choose_paged_attention",
    "critic_axes",
    "for_products",
    "forward",
    "fuse",
    "fuse_adapters",
    "fused_adapter_axes",
    "kv_copies",
    "init",
    "init_adapters",
    "init_critic",
    "is_adapter",
    "is_fixed",
    "load",
    "logical_axes",
    "logits",
    "merge",
    "merged",
    "model_card",
    "modules_of",
    "need_tokenizer",
    "num_matmul_params",
    "num_params",
    "open",
    "open_adapter",
    "open_classifier",
    "output_matrix",
    "partition",
    "plain",
    "remade",
    "routes_dtype",
    "save",
    "save_adapter",
    "save_classifier",
    "save_programs",
    "shared_prompts",
    "split_params",
    "unstack",
    "untied",
    "values",
]
