"""The sections of a configuration about what is trained."""

from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from jaxrl_llm.config.algorithm import (
    DEFAULT_OPTIMIZER,
    OPTIMIZER_NUMBERS,
    OPTIMIZERS,
    choice,
)
from jaxrl_llm.config.names import Aggregation, KlEstimator, TrainRules
from jaxrl_llm.config.schema_algorithm import PolicyLossConfig
from jaxrl_llm.config.section import Free, Name, PathText, Rounding, Section

Module = Literal[
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
]  # fmt: skip
"""The matrices of a layer, by their names in Hugging Face checkpoints."""


class TrainMeshConfig(Section):
    """Devices along each training axis; one may be -1: what is left."""

    data: int = Field(1, ge=-1)
    """Replicas of the weights."""
    fsdp: int = Field(-1, ge=-1)
    """Rows and weights are both split over it (ZeRO-3)."""
    expert: int = Field(1, ge=-1)
    """Experts are split over it, as rows are; models without experts use it as
    `fsdp`."""
    context: int = Field(1, ge=-1)
    """Each row is split over it: for long ones."""
    tensor: int = Field(1, ge=-1)
    """Heads, feed-forward and vocabulary are split over it, and between them the tokens
    of a row (Megatron)."""


class ComputeConfig(Section):
    """How a model is computed, of whatever role."""

    micro_batch_size: Rounding[int | None] = Field(None, gt=0)
    """Rows per forward and backward pass. Changes memory and speed, and the result by
    rounding only. If not given, the critic and the reward model have the actor's; that
    is, on GPUs and TPUs, as many as fit, up to 16,384 tokens a device (twice that with
    FSDP), found when the run begins and kept when it goes on; on CPUs the whole
    mini-batch."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of activations and of the weights inside a matrix product; what is not
    trained is also kept in it. Master weights, the optimizer's moments, a value head,
    softmax, scores and losses are float32."""
    attention: Rounding[Literal["auto", "xla"]] = "auto"
    """auto: flash attention on GPU (bfloat16) and TPU. xla: the reference everywhere,
    which holds the scores of a whole row. On GPUs flash attention over packed rows, or
    rows of more than 2,048 tokens, may sum gradients in another order each time: two
    runs, or one that goes on, then may differ from the last bit on. xla never does."""
    unroll: Rounding[Literal["auto", "never", "always"]] = "auto"
    """Compile every layer by itself rather than one for all in a loop: a compile time
    that grows with depth, but one layer's weights travel while another is computed.
    auto: on several GPUs, and on one unless it is trained and remat is dots or full."""
    mesh: Rounding[TrainMeshConfig] = TrainMeshConfig()
    rules: Rounding[TrainRules] = {}
    """Axes of the mesh that a dimension is split over, other than usual: see
    sharding/rules.py. `residual: context` turns sequence parallelism off."""


class LoraConfig(Section):
    """Low-rank adapters: y = x W + scale * (x a) b, of which only a and b are trained,
    in float32. W stays as it is read, in `dtype` or of 8 bits. They learn well at rates
    some ten times those of all weights."""

    rank: int = Field(32, gt=0)
    """Columns of a and rows of b."""
    alpha: float = Field(32.0, gt=0)
    """scale = alpha / rank."""
    modules: Literal["all"] | tuple[Module, ...] = "all"
    """Which matrices of every layer have adapters; all of them, or some of q_proj,
    k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj."""
    rslora: bool = False
    """scale = alpha / sqrt(rank), which does not fade as the rank grows."""
    quantization: Literal["int8"] | None = None
    """Keep the matrices of the layers, which are not trained, as int8 with a scale per
    output: half the memory of bfloat16. Products take the numbers that these stand for,
    rounded to `dtype`, and so do a reference and what is exported. They are made of the
    weights in `dtype`, which are read first."""
    path: PathText | None = None
    """Directory or hub id of PEFT with the adapters to begin with, whose rank, alpha,
    modules and rslora must be these; new ones, which change nothing, if not given."""

    @field_validator("modules", mode="before")
    @classmethod
    def _known(cls, modules: Any) -> Any:
        known = get_args(Module)
        listed = isinstance(modules, list | tuple) and len(modules) > 0
        if modules == "all" or (
            listed
            and all(name in known for name in modules)
            and len(set(modules)) == len(modules)
        ):
            return modules
        raise ValueError(
            f"should be all, or some of [{', '.join(known)}], each once; got {modules}"
        )


class TrainedConfig(ComputeConfig):
    """How a model is computed that is trained."""

    remat: Rounding[Literal["none", "dots", "full", "offload"]] = "full"
    """What the backward pass of a layer computes again. none: nothing. dots: all but
    matrix products and attention. full: everything. offload: as dots, with the
    products kept in the host's memory meanwhile."""
    lora: LoraConfig | None = None
    """Train low-rank adapters beside weights that stay as they are; all weights if not
    given."""


class OptimConfig(Section):
    """The optimizer and its schedule."""

    name: str = Field(
        DEFAULT_OPTIMIZER,
        description=f"{', '.join(OPTIMIZERS)}, or module:function, such as optax:sgd, "
        "which returns an optax.GradientTransformation. It is given what it takes of "
        f"{', '.join(OPTIMIZER_NUMBERS)}: the schedule and the settings below.",
    )
    params: dict[str, Any] = {}
    """Other keyword arguments of the optimizer."""
    lr: float = Field(1e-6, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    clip_grad: float = Field(1.0, gt=0)
    """Gradients are scaled down to this global norm."""
    mu_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the first moment. The second needs float32: it changes by a
    thousandth."""
    lr_scheduler_type: Literal["constant", "cosine", "linear"] = "constant"
    """After warm-up."""
    lr_warmup_steps: int = Field(0, ge=0)
    """Training steps of linear warm-up from 0."""
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    """cosine and linear end at lr * min_lr_ratio."""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        return choice("name", name, OPTIMIZERS)

    @model_validator(mode="after")
    def _check(self) -> "OptimConfig":
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {self.betas}")
        return self


class ActorConfig(TrainedConfig):
    """The policy's update."""

    optim: OptimConfig = OptimConfig()
    ppo_mini_batch_size: int | None = Field(None, gt=0)
    """Prompts per optimizer step; the whole batch if not given."""
    ppo_epochs: int = Field(1, gt=0)
    """Passes over each batch."""
    pack_length: Rounding[int | None] = Field(None, gt=0)
    """Pack sequences into rows of this many tokens; one sequence per row if not
    given."""
    share_prompts: Rounding[bool] = False
    """Packed rows hold a prompt once for several responses to it: less to compute where
    prompts are long beside responses. Attention is then the reference's, so rows of a
    few thousand tokens at most."""
    policy_loss: PolicyLossConfig = PolicyLossConfig()
    clip_ratio_low: float = Field(0.2, ge=0, le=1)
    clip_ratio_high: float = Field(0.2, ge=0)
    """The ratio new / old probability is clipped to [1 - low, 1 + high]. dppo_tv and
    dppo_kl bound a divergence by them instead."""
    clip_ratio_c: float | None = Field(3.0, gt=1)
    """Where the advantage is negative, the ratio beyond which there is no gradient
    (dual clip); null for none. dppo_tv and dppo_kl: bound of the importance weight."""
    tau_pos: float = Field(1.0, gt=0)
    """sapo: how fast gradients die away from ratio 1 where the advantage is over 0,"""
    tau_neg: float = Field(1.05, gt=0)
    """sapo: and elsewhere."""
    loss_agg_mode: Aggregation = "token-mean"
    """How per-token losses become one number."""
    loss_scale_factor: float | None = Field(None, gt=0)
    """seq-mean-token-sum-norm: tokens to divide by; rollout.max_response_length if not
    given."""
    entropy_coeff: float = 0.0
    """Weight of the entropy bonus."""
    router_aux_loss_coef: float = Field(0.0, ge=0)
    """Models with experts: weight of a loss that spreads tokens over them, as of
    transformers but over the whole mini-batch. Needs one more forward pass. Nothing
    reads that of the model's config.json."""
    router_replay: Literal["off", "R2"] = "off"
    """Models with experts. R2: in every update of a step, tokens go to the experts that
    they went to when the policy before the first of them was asked; only the choice is
    that of then. Of use where a step has several updates."""
    use_kl_loss: bool = False
    """Keep the initial weights as reference, and add KL(policy || reference)."""
    ref_refresh_steps: int | None = Field(None, gt=0)
    """Every so many steps the policy becomes the new reference of the KL loss and of
    algorithm.use_kl_in_reward; it stays the initial weights if not given."""
    kl_loss_coef: float = Field(0.001, ge=0)
    kl_loss_type: KlEstimator = "k3"
    """Estimator of the KL; k3 = low_var_kl, k2 = mse, k1 = kl. NAME+ has the value of
    NAME and the gradient of k2."""
    keep_probabilities: bool = False
    """Keep softmax(logits) of a micro-batch's tokens, in `dtype`, for the backward pass
    rather than compute the logits again: 2 % of a 1.5B model's update for tokens x
    vocabulary x 2 bytes."""
    offload: Free[tuple[Literal["optimizer", "reference"], ...]] = ()
    """What waits in the host's memory while it is not in use: the optimizer's moments
    during generation, the reference's weights outside of its own pass."""
    ref_mesh: Rounding[TrainMeshConfig | None] = None
    """Mesh of the reference policy; `mesh` if not given."""


class CriticOptimConfig(OptimConfig):
    """AdamW, faster than the actor's: a value head starts from nothing."""

    lr: float = Field(1e-5, ge=0)


class CriticModelConfig(Section):
    """Which weights the critic starts from; its value head starts at 0."""

    path: PathText | None = None
    """A folder, file or name like `model.path`, with its vocabulary; the policy's
    initial weights if not given."""
    revision: Name | None = None
    """Branch, tag or commit on the hub."""


class CriticConfig(TrainedConfig):
    """The value model's update; only with algorithm.adv_estimator=gae."""

    model: CriticModelConfig = CriticModelConfig()
    optim: CriticOptimConfig = CriticOptimConfig()
    ppo_mini_batch_size: int | None = Field(None, gt=0)
    """Prompts per optimizer step; as actor.ppo_mini_batch_size if not given."""
    ppo_epochs: int | None = Field(None, gt=0)
    """Passes over each batch; as actor.ppo_epochs if not given."""
    cliprange_value: float = Field(0.5, gt=0)
    """An update moves a value at most so far from what it was, in units of reward."""
    loss_agg_mode: Aggregation = "token-mean"
    """How per-token losses become one number."""


class TeacherConfig(ComputeConfig):
    """A frozen model of any size that reads and writes the policy's tokens."""

    path: PathText
    """A folder, file or name like `model.path`; a run's output_dir/huggingface is one.
    Its tokenizer must have the policy's vocabulary."""
    revision: Name | None = None
    """Branch, tag or commit on the hub."""
    mesh: Rounding[TrainMeshConfig | None] = None
    """actor.mesh if not given."""
    offload: Free[bool] = False
    """Weights wait in the host's memory while nothing is asked."""


class DistillationConfig(Section):
    """On-policy distillation: the policy learns what a teacher says about the tokens
    that the policy wrote."""

    teacher: TeacherConfig
    mode: Literal["reverse_kl", "forward_kl_topk", "jsd"] = "reverse_kl"
    """reverse_kl: log p_teacher - log p_policy of each sampled token is its advantage,
    times `coef`. forward_kl_topk: KL(teacher || policy) of the teacher's `topk`
    likeliest tokens and of all others as one, times `coef`, is added to the loss. jsd:
    so is the generalised Jensen-Shannon divergence over the vocabulary; the update asks
    the teacher, which is then where the policy is."""
    coef: float = Field(1.0, gt=0)
    """Weight of what is learned from the teacher."""
    with_rewards: bool = False
    """Learn from rewards too, by `algorithm`. If not, rewards are only measured, and
    none need be given."""
    topk: int = Field(32, gt=0)
    """forward_kl_topk: tokens that are compared one by one."""
    jsd_beta: float = Field(0.5, ge=0, le=1)
    """jsd, with TRL's meaning: 0 is KL(teacher || policy), 1 is KL(policy || teacher),
    between them beta KL(teacher || m) + (1 - beta) KL(policy || m) with m = beta
    teacher + (1 - beta) policy."""
