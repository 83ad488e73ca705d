"""What a decoder is: one frozen record whose fields tell the families apart.

L = layers, D = model width, N = query heads, K = key/value heads, H = head size,
F = feed-forward width, V = vocabulary, E = experts, k = experts of a token.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding of one kind of layer.

    The angle of position p in pair i is p * frequencies[i]; cosine and sine are
    multiplied by `attention_factor`.
    """

    theta: float
    scaling: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    """How many times longer the context becomes."""
    low_freq_factor: float = 1.0
    """llama3 only."""
    high_freq_factor: float = 4.0
    """llama3 only."""
    original_max_position: int = 8192
    """llama3 and yarn: the context length before scaling."""
    beta_fast: float = 32.0
    """yarn only."""
    beta_slow: float = 1.0
    """yarn only."""
    truncate: bool = True
    """yarn only: round the ramp's ends to whole pairs."""
    attention_factor: float = 1.0
    rotated: float = 1.0
    """The share of a head, from its beginning, that is rotated (GLM-4.5: a half)."""

    def frequencies(self, head_size: int) -> np.ndarray:
        """float32 [head_size * rotated / 2], radians per position.

        Source: Su et al. 2021 (arXiv:2104.09864); linear: Chen et al. 2023
        (arXiv:2306.15595); yarn: Peng et al. 2023, section 3 (arXiv:2309.00071);
        llama3: the Llama 3.1 reference code.
        """
        head_size = int(head_size * self.rotated)
        pairs = np.arange(0, head_size, 2, dtype=np.float32) / np.float32(head_size)
        base = (1.0 / np.float32(self.theta) ** pairs).astype(np.float32)
        match self.scaling:
            case "default":
                return base
            case "linear":
                return (base / np.float32(self.factor)).astype(np.float32)
            case "llama3":
                return self._llama3(base)
            case "yarn":
                return self._yarn(base, head_size)

    def _llama3(self, base: np.ndarray) -> np.ndarray:
        turns = self.original_max_position * base / (2 * math.pi)
        smooth = (turns - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        smooth = np.clip(smooth, 0.0, 1.0)
        return ((1 - smooth) * base / self.factor + smooth * base).astype(np.float32)

    def _yarn(self, base: np.ndarray, head_size: int) -> np.ndarray:
        def pair_that_turns(times: float) -> float:
            return (
                head_size
                * math.log(self.original_max_position / (times * 2 * math.pi))
                / (2 * math.log(self.theta))
            )

        low, high = pair_that_turns(self.beta_fast), pair_that_turns(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_size - 1)
        ramp = (np.arange(head_size // 2) - low) / max(high - low, 0.001)
        keep = 1 - np.clip(ramp, 0.0, 1.0)
        return (base / self.factor * (1 - keep) + base * keep).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Moe:
    """A mixture of experts: feed-forwards of which every token goes through a few.

    Raises:
      ValueError: fields that choose no experts.
    """

    num_experts: int
    """E."""
    top_k: int
    """Experts of every token."""
    expert_size: int
    """Width of an expert."""
    score: Literal["softmax", "sigmoid", "softmax_of_chosen"] = "softmax"
    """What is made of the router's logits. softmax: over all experts. sigmoid: of each
    by itself (DeepSeek V3, GLM-4.5). softmax_of_chosen: over the chosen (Mixtral)."""
    selection_bias: bool = False
    """A number for each expert is added to the scores where experts are chosen, and not
    to what they are weighted with. It is not trained."""
    groups: int = 1
    """Experts are chosen from the best groups of neighbours only, those with the
    largest sum of their two best scores."""
    chosen_groups: int = 1
    renormalise: bool = False
    """The weights of a token's experts are divided by their sum."""
    scale: float = 1.0
    """What they are multiplied by then."""
    shared_size: int | None = None
    """Width of the experts that every token goes through, all together."""
    shared_gate: bool = False
    """Their result is multiplied by the sigmoid of a product with the input
    (Qwen2-MoE)."""
    dense_layers: tuple[int, ...] = ()
    """Layers with a plain feed-forward of the architecture's `intermediate_size`."""

    def __post_init__(self) -> None:
        E, of_each = self.num_experts, self.num_experts // self.groups
        if not 1 <= self.top_k <= E:
            raise ValueError(f"top_k {self.top_k} of {E} experts cannot be chosen")
        if E % self.groups or not 1 <= self.chosen_groups <= self.groups:
            raise ValueError(
                f"{E} experts in {self.groups} groups, of which "
                f"{self.chosen_groups} are chosen"
            )
        if self.groups > 1 and of_each < 2:
            raise ValueError(f"{self.groups} groups of {E} experts have less than two")
        if self.top_k > self.chosen_groups * of_each:
            raise ValueError(
                f"top_k {self.top_k} is more than {self.chosen_groups} groups of "
                f"{of_each} experts have"
            )


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Everything about a decoder but its weights. Hashable, so `jit` may close over it.

    The families (Llama, Mistral, Qwen, Gemma, SmolLM) are values of these fields.
    """

    model_type: str
    """The name in a Hugging Face config.json: llama, mistral, qwen2, qwen3, gemma2,
    ..."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: tuple[Rope | None, ...]
    """The kinds of position embedding in this model; None: no positions (NoPE)."""
    rope_of_layer: tuple[int, ...]
    """[L]: index into `rope`."""
    window_of_layer: tuple[int | None, ...]
    """[L]: how many tokens back, itself included, a layer sees; None: all of them."""
    tie_embeddings: bool = False
    """The output matrix is the embedding."""
    qkv_bias: bool = False
    output_bias: bool = False
    """Bias on the attention's output projection."""
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMS norm of every query and key head before the rotation (Qwen3, Gemma 3)."""
    qk_norm_together: bool = False
    """That norm is over all heads together (OLMoE)."""
    qkv_clip: float | None = None
    """Queries, keys and values are cut off at plus and minus it (OLMoE)."""
    activation: Literal["silu", "gelu_tanh"] = "silu"
    norm_offset: bool = False
    """Norms multiply by 1 + weight (Gemma)."""
    post_norms: bool = False
    """Norms after attention and feed-forward too, before the sum (Gemma 2, 3)."""
    embed_scale: bool = False
    """Embeddings are multiplied by sqrt(D) (Gemma)."""
    query_scale: float | None = None
    """Queries are multiplied by it; 1 / sqrt(H) if not given."""
    attention_softcap: float | None = None
    """s -> cap * tanh(s / cap) on attention scores (Gemma 2)."""
    logit_softcap: float | None = None
    """s -> cap * tanh(s / cap) on the output logits (Gemma 2)."""
    moe: Moe | None = None
    """Experts in place of the feed-forward."""
    max_positions: int = 8192
    """The context length the model was made for."""
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end a response."""
    source: str = field(default="{}", compare=False)
    """The config.json it came from, as text: what a saved copy starts from."""
    generation: str = field(default="{}", compare=False)
    """Its generation_config.json as text: how others sample from a saved copy."""

    @property
    def attention_scale(self) -> float:
        """What products of queries and keys are multiplied by."""
        return self.head_dim**-0.5 if self.query_scale is None else self.query_scale

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has experts in place of a plain feed-forward."""
        return self.moe is not None and layer not in self.moe.dense_layers

    @property
    def active_size(self) -> int:
        """Width of what a token goes through in a layer's feed-forward, at most."""
        if self.moe is None:
            return self.intermediate_size
        routed = self.moe.top_k * self.moe.expert_size + (self.moe.shared_size or 0)
        return max(routed, self.intermediate_size) if self.moe.dense_layers else routed

    @property
    def runs(self) -> list[range]:
        """Neighbouring layers that all have experts, or none."""
        edges = [
            i
            for i in range(1, self.num_layers)
            if self.has_experts(i) != self.has_experts(i - 1)
        ]
        return [
            range(*pair)
            for pair in zip([0, *edges], [*edges, self.num_layers], strict=True)
        ]

    def __post_init__(self) -> None:
        for name in ("rope_of_layer", "window_of_layer"):
            if len(getattr(self, name)) != self.num_layers:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries for "
                    f"{self.num_layers} layers"
                )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is no multiple of num_kv_heads "
                f"{self.num_kv_heads}"
            )
        dense = self.moe.dense_layers if self.moe else ()
        if strangers := [i for i in dense if not 0 <= i < self.num_layers]:
            raise ValueError(
                f"moe.dense_layers has {strangers[0]}; there are {self.num_layers} "
                "layers"
            )
        if self.moe and len(set(dense)) == self.num_layers:
            raise ValueError("moe is given, but moe.dense_layers has all layers")
