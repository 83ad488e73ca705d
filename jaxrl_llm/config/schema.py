"""What a run is: typed, frozen, complete. Every field is read somewhere.

`load` reads a YAML file; `Config` checks each field and that they fit together, before
anything is loaded. Keys that share veRL's name keep veRL's meaning.
"""

import copy
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml
from pydantic import BaseModel, Field, model_validator

from jaxrl_llm.config.algorithm import (
    Aggregation,
    AlgorithmConfig,
    KlEstimator,
    PolicyLossConfig,
    misfits,
)
from jaxrl_llm.config.algorithm import Section as _Section
from jaxrl_llm.sharding.mesh import numbers

Positive = Field(gt=0)
NonNegative = Field(ge=0)


class ModelConfig(_Section):
    """Which weights to start from."""

    path: str
    """A Hugging Face directory or hub id, a .gguf file, or package:NAME/FILE.gguf for a
    GGUF file that an installed Python package ships."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    tokenizer: str | None = None
    """Directory or hub id of another tokenizer; the model's own if not given."""


class DatasetConfig(_Section):
    """Where questions come from."""

    path: str
    """FILE.jsonl, FILE.parquet, hub:ID, disk:DIR (a saved Hugging Face data set), or
    reasoning_gym:TASK."""
    params: dict[str, Any] = {}
    """reasoning_gym: the task's parameters. hub: arguments of `datasets.load_dataset`
    such as `name` and `revision`."""
    split: str = "train"
    """hub and disk only."""
    size: int | None = Field(None, gt=0)
    """At most this many questions; all if not given (reasoning_gym needs it)."""
    seed: int = 0
    """reasoning_gym only: which questions are drawn."""
    prompt_key: str = "prompt"
    """The column that holds the question: text, or a list of chat messages."""
    answer_key: str = "answer"
    """The column that holds the reference answer; rewards get it as `answer`."""
    prompt_template: str | None = None
    """Text around the question; {name} stands for column `name`."""
    system_prompt: str | None = None
    """Put before the question as a system message."""


class DataConfig(_Section):
    """The questions, and how many of them make a step."""

    train: DatasetConfig
    val: DatasetConfig | None = None
    """Held-out questions. Those that also stand in `train` are taken out of `train`."""
    train_batch_size: int = Field(64, gt=0)
    """Prompts per step; each is answered rollout.n times."""
    max_prompt_length: int = Field(512, gt=0)
    """Tokens, chat template included."""
    overlong_prompts: Literal["error", "truncate", "drop"] = "error"
    """What to do with longer ones. `truncate` keeps the end of the prompt."""
    chat_template: bool = True
    """Render prompts with the tokenizer's chat template; off for base models."""
    shuffle: bool = True
    """A new order every epoch, a function of `seed` alone."""


class SamplingConfig(_Section):
    """How tokens are drawn."""

    temperature: float = Field(1.0, ge=0)
    """Logits are divided by it; 0 takes the most likely token."""
    top_k: int = Field(-1, ge=-1)
    """Only the k most likely tokens; -1 for all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Only the smallest set of tokens whose probability reaches p."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Only tokens at least min_p times as likely as the most likely one."""

    @model_validator(mode="after")
    def _check(self) -> "SamplingConfig":
        if self.top_k == 0:
            raise ValueError("top_k is 0, which keeps no token; -1 keeps all")
        return self


class RolloutMeshConfig(_Section):
    """Devices along each generation axis; one may be -1: what is left."""

    data: int = Field(-1, ge=-1)
    """Replicas of the model, each with its share of the requests."""
    tensor: int = Field(1, ge=-1)
    """Devices one replica is split over."""


class TrainMeshConfig(_Section):
    """Devices along each training axis; one may be -1: what is left."""

    data: int = Field(1, ge=-1)
    """Replicas of the weights."""
    fsdp: int = Field(-1, ge=-1)
    """Rows and weights are both split over it (ZeRO-3)."""
    expert: int = Field(1, ge=-1)
    """For models with experts; the others use it as `fsdp`."""
    context: int = Field(1, ge=-1)
    """Each row is split over it: for long ones."""
    tensor: int = Field(1, ge=-1)
    """Heads, feed-forward and vocabulary are split over it, and between them the tokens
    of a row (Megatron)."""


Dimension = Literal[
    "layers", "vocab", "embed", "mlp", "heads", "kv_heads", "head", "norm", "looked_up",
    "rows", "tokens", "residual",
]  # fmt: skip
TrainAxis = Literal["data", "fsdp", "expert", "context", "tensor"]
TrainRules = dict[Dimension, TrainAxis | tuple[TrainAxis, ...] | None]


class VllmConfig(_Section):
    """Servers that generate: running ones (`urls`), or ours, which end with the run."""

    urls: tuple[str, ...] = ()
    """Running servers, such as http://host:8000. Requests are spread over them."""
    command: tuple[str, ...] = ("python", "-m", "vllm.entrypoints.openai.api_server")
    """Starts one of ours: the Python of vLLM's environment, or a container."""
    args: tuple[str, ...] = ()
    """More arguments of the command, such as --gpu-memory-utilization 0.5."""
    env: dict[str, str] = {}
    """More variables of its environment."""
    devices: tuple[str, ...] = ()
    """One server of ours per entry, which becomes its CUDA_VISIBLE_DEVICES. Without
    entries one server, which sees the devices that the trainer sees."""
    port: int | None = Field(None, gt=0, lt=65536)
    """Of the first server of ours, the others follow; free ports if not given."""
    weights_dir: str | None = None
    """Folder that weights are sent through; trainer and servers must see it. Memory
    (/dev/shm) for servers of ours where there is such, else output_dir."""
    start_timeout_s: float = Field(900.0, gt=0)
    """Longest wait for a server to come up."""
    request_timeout_s: float = Field(600.0, gt=0)
    """Longest wait for the responses to one prompt. A server of ours that takes longer
    hangs, and is started again."""
    max_restarts: int = Field(3, ge=0)
    """How often servers may be lost between two transfers of weights."""
    reproducible: bool = False
    """Draw every group of responses from a seed of its own: the same weights then give
    the same responses, whatever else a server does meanwhile. vLLM draws row by row for
    it, which makes a step of hundreds of rows some times slower."""
    max_probe_diff: float = Field(0.1, gt=0)
    """Mean difference in nats between server and trainer, on probes after each transfer
    of weights, that stops the run."""


class RolloutConfig(SamplingConfig):
    """Generation during training."""

    engine: Literal["jax", "vllm"] = "jax"
    """jax: the compiled decode loop of this package. vllm: servers, see `vllm`."""
    vllm: VllmConfig = VllmConfig()
    n: int = Field(8, gt=0)
    """Responses per prompt (the group)."""
    max_response_length: int = Field(512, gt=0)
    """Tokens, the stop token included."""
    stop: tuple[str, ...] = ()
    """Strings that end a response, besides the model's own stop tokens."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end a response, besides the model's own stop tokens."""
    max_num_seqs: int = Field(256, gt=0)
    """Sequences decoded together; more wait."""
    decode_chunk: int = Field(64, gt=0)
    """Tokens per dispatch of the jax engine. Between dispatches stop strings are looked
    for and memory is shared out."""
    prefill_tokens: int = Field(8192, gt=0)
    """Tokens of prompts that the jax engine reads per dispatch on each replica; longer
    prompts are read in pieces."""
    cache_gib: float | None = Field(None, gt=0)
    """Memory of the jax engine for keys and values on each device. Not given: what
    max_num_seqs of the longest sequences need, or what is free if that is less;
    sequences wait for room, or are put back and go on later."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of weights, activations and KV cache."""
    quantization: Literal["int8", "fp8"] | None = None
    """Of the matrices in the jax engine's layers, a scale per output; fp8 also of what
    they multiply, a scale per token. mismatch/ tells what it costs in precision;
    algorithm.rollout_correction corrects for it."""
    kv_cache_dtype: Literal["int8", "fp8"] | None = None
    """Of the jax engine's KV cache, a scale per head and token; `dtype` if not
    given."""
    checksum_freq: int = Field(100, ge=0)
    """Compare checksums of the engine's weights with the trainer's at the first load
    and every so many steps; 0: never."""
    max_mismatch: float = Field(0.05, gt=0)
    """Mean difference in nats between log-probabilities of sampler and trainer, over
    which a correction is recommended."""
    mesh: RolloutMeshConfig = RolloutMeshConfig()


class OptimConfig(_Section):
    """AdamW and its schedule."""

    lr: float = Field(1e-6, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    clip_grad: float = Field(1.0, gt=0)
    """Gradients are scaled down to this global norm."""
    mu_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the first moment. The second needs float32: it changes by a thousandth."""
    lr_scheduler_type: Literal["constant", "cosine", "linear"] = "constant"
    """After warm-up."""
    lr_warmup_steps: int = Field(0, ge=0)
    """Training steps of linear warm-up from 0."""
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    """cosine and linear end at lr * min_lr_ratio."""

    @model_validator(mode="after")
    def _check(self) -> "OptimConfig":
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {self.betas}")
        return self


class ActorConfig(_Section):
    """The policy's update."""

    optim: OptimConfig = OptimConfig()
    ppo_mini_batch_size: int | None = Field(None, gt=0)
    """Prompts per optimizer step; the whole batch if not given."""
    ppo_epochs: int = Field(1, gt=0)
    """Passes over each batch."""
    micro_batch_size: int | None = Field(None, gt=0)
    """Rows per forward and backward pass; the whole mini-batch if not given. Changes
    memory and speed, never the result."""
    pack_length: int | None = Field(None, gt=0)
    """Pack sequences into rows of this many tokens; one sequence per row if not
    given."""
    share_prompts: bool = False
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
    use_kl_loss: bool = False
    """Keep the initial weights as reference, and add KL(policy || reference)."""
    ref_refresh_steps: int | None = Field(None, gt=0)
    """Every so many steps the policy becomes the new reference of the KL loss and of
    algorithm.use_kl_in_reward; it stays the initial weights if not given."""
    kl_loss_coef: float = Field(0.001, ge=0)
    kl_loss_type: KlEstimator = "k3"
    """Estimator of the KL; k3 = low_var_kl, k2 = mse, k1 = kl. NAME+ has the value of
    NAME and the gradient of k2."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of activations and of the weights inside a matrix product. The master weights,
    the optimizer's moments, softmax and losses are float32."""
    remat: Literal["none", "dots", "full", "offload"] = "full"
    """What the backward pass of a layer computes again. none: nothing. dots: all but
    matrix products and attention. full: everything. offload: as dots, with the
    products kept in the host's memory meanwhile."""
    keep_probabilities: bool = False
    """Keep softmax(logits) of a micro-batch's tokens, in `dtype`, for the backward pass
    rather than compute the logits again: 2 % of a 1.5B model's update for tokens x
    vocabulary x 2 bytes."""
    offload: tuple[Literal["optimizer", "reference"], ...] = ()
    """What waits in the host's memory while it is not in use: the optimizer's moments
    during generation, the reference's weights outside of its own pass."""
    attention: Literal["auto", "xla"] = "auto"
    """auto: flash attention on GPU (bfloat16) and TPU. xla: the reference everywhere,
    which holds the scores of a whole row."""
    unroll: Literal["auto", "never", "always"] = "auto"
    """Compile every layer by itself rather than one for all in a loop: a compile time
    that grows with depth, but one layer's weights travel while another is computed.
    auto: on several GPUs, and on one unless remat is dots or full."""
    mesh: TrainMeshConfig = TrainMeshConfig()
    ref_mesh: TrainMeshConfig | None = None
    """Of the reference policy; `mesh` if not given."""
    rules: TrainRules = {}
    """Axes of the mesh that a dimension is split over, other than usual: see
    sharding/rules.py. `residual: context` turns sequence parallelism off."""


class CriticOptimConfig(OptimConfig):
    """The same, faster: a value head starts from nothing."""

    lr: float = Field(1e-5, ge=0)


class CriticModelConfig(_Section):
    """Which weights the critic starts from; its value head starts at 0."""

    path: str | None = None
    """As `model.path`, with the same vocabulary; the policy's initial weights if not
    given."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""


class CriticConfig(_Section):
    """The value model's update; only with algorithm.adv_estimator=gae."""

    model: CriticModelConfig = CriticModelConfig()
    optim: CriticOptimConfig = CriticOptimConfig()
    ppo_mini_batch_size: int | None = Field(None, gt=0)
    """Prompts per optimizer step; as actor.ppo_mini_batch_size if not given."""
    ppo_epochs: int | None = Field(None, gt=0)
    """Passes over each batch; as actor.ppo_epochs if not given."""
    micro_batch_size: int | None = Field(None, gt=0)
    """Rows per forward and backward pass; as actor.micro_batch_size if not given.
    Changes memory and speed, never the result."""
    cliprange_value: float = Field(0.5, gt=0)
    """An update moves a value at most so far from what it was, in units of reward."""
    loss_agg_mode: Aggregation = "token-mean"
    """How per-token losses become one number."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of activations and of the weights inside a matrix product. The master weights,
    the optimizer's moments, the value head and losses are float32."""
    remat: Literal["none", "dots", "full", "offload"] = "full"
    """What the backward pass of a layer computes again. none: nothing. dots: all but
    matrix products and attention. full: everything. offload: as dots, with the
    products kept in the host's memory meanwhile."""
    attention: Literal["auto", "xla"] = "auto"
    """auto: flash attention on GPU (bfloat16) and TPU. xla: the reference everywhere,
    which holds the scores of a whole row."""
    unroll: Literal["auto", "never", "always"] = "auto"
    """Compile every layer by itself rather than one for all in a loop: a compile time
    that grows with depth, but one layer's weights travel while another is computed.
    auto: on several GPUs, and on one unless remat is dots or full."""
    mesh: TrainMeshConfig = TrainMeshConfig()
    rules: TrainRules = {}
    """As actor.rules."""


class RewardFunctionConfig(_Section):
    """One term of the reward."""

    name: str
    """exact, numeric, gsm8k, math, reasoning_gym, or module:function with TRL's
    signature f(prompts, completions, completion_ids, **columns)."""
    weight: float = 1.0
    params: dict[str, Any] = {}
    """Keyword arguments passed to the function."""


class RewardModelConfig(_Section):
    """A model that scores prompt and response, one more term of the reward by the name
    reward_model."""

    path: str
    """A Hugging Face directory or hub id of a ...ForSequenceClassification with one
    label, that reads the policy's tokens."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    weight: float = 1.0
    """Its scores are multiplied by it."""
    micro_batch_size: int | None = Field(None, gt=0)
    """Rows per forward pass; as actor.micro_batch_size if not given. Changes memory and
    speed, never the result."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of weights and activations; the score is float32."""
    offload: bool = False
    """Weights wait in the host's memory while nothing is scored."""
    attention: Literal["auto", "xla"] = "auto"
    """As actor.attention."""
    unroll: Literal["auto", "never", "always"] = "auto"
    """As actor.unroll."""
    mesh: TrainMeshConfig = TrainMeshConfig()
    rules: TrainRules = {}
    """As actor.rules."""


class OverlongBufferConfig(_Section):
    """A penalty that grows over the last tokens a response may have (DAPO)."""

    len: int = Field(gt=0)
    """Of the rollout.max_response_length tokens, the last so many cost."""
    penalty_factor: float = Field(1.0, gt=0)
    """What the longest response costs."""


class RewardConfig(_Section):
    """What a response is worth: the weighted sum of the functions and the model."""

    functions: tuple[RewardFunctionConfig, ...] = ()
    model: RewardModelConfig | None = None
    """None if not given."""
    overlong_buffer: OverlongBufferConfig | None = None
    """In training, takes a penalty off the reward of responses that are nearly too
    long; off if not given."""
    timeout_s: float = Field(60.0, gt=0)
    """Longest time one function may take for one step."""
    on_error: Literal["raise", "zero"] = "raise"
    """A function that raises, hangs or returns NaN stops the run, or scores 0 and is
    counted in the metrics."""

    @model_validator(mode="after")
    def _check(self) -> "RewardConfig":
        if not self.functions and self.model is None:
            raise ValueError("functions is empty; give at least one, or a model")
        return self


class ValConfig(SamplingConfig):
    """How the held-out questions are answered."""

    n: int = Field(1, gt=0)
    """Sampled answers per question."""
    greedy: bool = True
    """Also answer once greedily."""
    threshold: float = 1.0
    """A reward of at least this counts as correct."""


class TrainerConfig(_Section):
    """How long, how often, and what is written."""

    total_training_steps: int = Field(gt=0)
    critic_warmup: int = Field(0, ge=0)
    """The first so many steps update only the critic; they count as steps."""
    test_freq: int = Field(0, ge=0)
    """Validate every so many steps; 0: only before and after."""
    val_before_train: bool = True
    save_freq: int = Field(0, ge=0)
    """Save a checkpoint every so many steps; 0: only at the end."""
    max_ckpt_to_keep: int = Field(2, gt=0)
    """The newest so many, and the best by validation besides."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the newest checkpoint in output_dir, if there is one."""
    profile: str | None = Field(None, pattern=r"^[1-9]\d*:[1-9]\d*$")
    """FIRST:LAST, such as 3:5: write a trace of these steps, both included, to
    output_dir/profile, for xprof and Perfetto."""
    save_hf: bool = True
    """Write the final weights as a Hugging Face directory, output_dir/huggingface."""
    loggers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """Besides the files, which are always written."""
    project: str = "jaxrl_llm"
    """Project name for the loggers."""
    num_examples: int = Field(3, ge=0)
    """Completions shown in the terminal."""


class PlacementConfig(_Section):
    """Which devices each role computes on. A role without a group has all devices, if
    there are no groups."""

    groups: dict[str, str] = {}
    """Device numbers by the name of a group, such as {train: 0-5, generate: 6-7}. Every
    device is in one group."""
    actor: str | None = None
    """Its group."""
    critic: str | None = None
    """Its group; the actor's if not given."""
    reference: str | None = None
    """Of the KL term's reference policy; the actor's if not given."""
    reward: str | None = None
    """Of the reward model; the actor's if not given."""
    rollout: str | None = None
    """Of the jax engine; the actor's if not given."""

    @model_validator(mode="after")
    def _check(self) -> "PlacementConfig":
        for name, text in self.groups.items():
            try:
                numbers(text)
            except ValueError as error:
                raise ValueError(f"group {name}: {error}") from None
        roles = ("actor", "critic", "reference", "reward", "rollout")
        used = {role: getattr(self, role) for role in roles}
        for role, group in used.items():
            if group is not None and group not in self.groups:
                raise ValueError(
                    f"{role} is {group}, which is none of the groups "
                    f"{', '.join(self.groups) or '(there are none)'}"
                )
        if self.groups and self.actor is None:
            raise ValueError("actor: needed, one of the groups; the others follow it")
        idle = [name for name in self.groups if name not in used.values()]
        if idle:
            raise ValueError(f"group {', '.join(idle)} has no role")
        return self


class Config(_Section):
    """A whole run."""

    output_dir: str
    """Everything the run writes is in here."""
    seed: int = 0
    """Of data order, sampling and everything else that is random."""
    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    actor: ActorConfig = ActorConfig()
    critic: CriticConfig = CriticConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    reward: RewardConfig
    val: ValConfig = ValConfig()
    placement: PlacementConfig = PlacementConfig()
    trainer: TrainerConfig

    @model_validator(mode="after")
    def _check(self) -> "Config":
        problems = list(_misfits(self))
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _misfits(config: Config):
    """Combinations of fields that make no run, each with what would fit."""
    actor, data, rollout = config.actor, config.data, config.rollout
    mini, batch = actor.ppo_mini_batch_size, data.train_batch_size
    if mini is not None and mini > batch:
        yield (
            f"actor.ppo_mini_batch_size is {mini} prompts but data.train_batch_size is "
            f"only {batch}; use at most {batch}"
        )
    yield from misfits(config)
    if actor.keep_probabilities and actor.entropy_coeff:
        yield (
            f"actor.entropy_coeff is {actor.entropy_coeff}, whose gradient needs the "
            "logits; set actor.keep_probabilities to false"
        )
    if rollout.engine != "vllm" and rollout.vllm != VllmConfig():
        yield f"rollout.vllm is given, but rollout.engine is {rollout.engine}"
    ours = {"devices", "command", "args", "env", "port"} & rollout.vllm.model_fields_set
    if rollout.vllm.urls and ours:
        yield (
            f"rollout.vllm.urls are running servers, so rollout.vllm.{min(ours)}, "
            "which is for servers of our own, says nothing"
        )
    if rollout.engine != "jax" and (rollout.quantization or rollout.kv_cache_dtype):
        yield (
            f"rollout.quantization is {rollout.quantization} and "
            f"rollout.kv_cache_dtype {rollout.kv_cache_dtype}, which are of the jax "
            "engine; tell vLLM by rollout.vllm.args"
        )
    if rollout.engine != "jax" and config.placement.rollout is not None:
        yield (
            f"placement.rollout is {config.placement.rollout}, but rollout.engine is "
            f"{rollout.engine}, whose servers have devices of their own"
        )
    if config.placement.reward is not None and config.reward.model is None:
        yield (
            f"placement.reward is {config.placement.reward}, but there is no "
            "reward.model to place"
        )
    longest = data.max_prompt_length + rollout.max_response_length
    if actor.pack_length is not None and actor.pack_length < longest:
        yield (
            f"actor.pack_length is {actor.pack_length} but data.max_prompt_length + "
            f"rollout.max_response_length is {longest}; use at least {longest}"
        )
    if actor.share_prompts and actor.pack_length is None:
        yield "actor.share_prompts needs actor.pack_length: tokens in a row"
    if actor.share_prompts and actor.policy_loss.loss_mode in ("clip_cov", "kl_cov"):
        yield (
            f"actor.policy_loss.loss_mode is {actor.policy_loss.loss_mode}, which "
            "draws tokens by whole sequences; actor.share_prompts takes them apart"
        )
    buffer = config.reward.overlong_buffer
    if buffer and buffer.len > rollout.max_response_length:
        yield (
            f"reward.overlong_buffer.len is {buffer.len} but "
            f"rollout.max_response_length is only {rollout.max_response_length}"
        )
    if rollout.temperature == 0:
        yield "rollout.temperature is 0: every response of a group would be the same"
    first, _, last = (config.trainer.profile or "1:1").partition(":")
    if int(first) > int(last):
        yield f"trainer.profile is {first}:{last}, which is no step"
    steps, warmup = config.trainer.total_training_steps, actor.optim.lr_warmup_steps
    if warmup > steps:
        yield (
            f"actor.optim.lr_warmup_steps is {warmup} but "
            f"trainer.total_training_steps is {steps}"
        )
    meshes = {
        "actor.mesh": actor.mesh,
        "actor.ref_mesh": actor.ref_mesh or actor.mesh,
        "critic.mesh": config.critic.mesh,
        "rollout.mesh": rollout.mesh,
    }
    if config.reward.model:
        meshes["reward.model.mesh"] = config.reward.model.mesh
    for name, given in meshes.items():
        sizes = given.model_dump()
        for axis, size in sizes.items():
            if size == 0:
                yield f"{name}.{axis} is 0; use 1 for an axis that is not used"
        if list(sizes.values()).count(-1) > 1:
            yield f"{name} is {sizes}; only one axis may be -1 (what is left)"
    for split, source in (("train", data.train), ("val", data.val)):
        if source and source.path.startswith("reasoning_gym:") and not source.size:
            yield (
                f"data.{split}.size is needed for reasoning_gym: how many questions to "
                "draw"
            )


class ConfigError(ValueError):
    """A configuration that makes no run; the message has one line per problem."""


def parse(values: Mapping[str, Any], source: str) -> Config:
    """The config that `values` describe; `source` names them in errors.

    Raises:
      ConfigError: one line per problem: the path of the key, what is wrong, what fits.
    """
    try:
        return Config.model_validate(values)
    except pydantic.ValidationError as error:
        raise ConfigError(explain(error, source)) from None


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file and applies command-line overrides.

    Args:
      overrides: `--section.key value` pairs; see `override`.

    Raises:
      ConfigError: no such file, not YAML, or not a valid config.
    """
    return parse(override(read(path), overrides), str(path))


def override(values: Mapping[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
    """`values` with `--section.key value` or `--section.key=value` put in.

    Values are YAML; hyphens in keys stand for underscores; a number selects an entry of
    a list. Whether a key exists is left to `parse`, so that a typing error on the
    command line and one in the file read the same.

    Raises:
      ConfigError: not of this form.
    """
    result = copy.deepcopy(dict(values))
    rest = list(arguments)
    while rest:
        flag, equals, text = rest.pop(0).partition("=")
        missing = not equals and (not rest or rest[0].startswith("--"))
        if missing or not flag.startswith("--"):
            raise ConfigError(f"{flag}: expected --section.key VALUE")
        keys = flag.removeprefix("--").replace("-", "_").split(".")
        put(result, keys, _load_yaml(text if equals else rest.pop(0), flag))
    return result


def put(tree: Any, keys: Sequence[str], value: Any) -> None:
    """Sets tree[keys[0]][keys[1]]... in place, making sections that are not there.

    Raises:
      ConfigError: the path leads through something that has no keys.
    """
    path = ".".join(keys)
    for key in keys[:-1]:
        if isinstance(tree, list):
            tree = tree[_index(tree, key, path)]
        elif isinstance(tree, dict):
            tree = tree.setdefault(key, {})
    last = keys[-1]
    if isinstance(tree, list):
        tree[_index(tree, last, path)] = value
    elif isinstance(tree, dict):
        tree[last] = value
    else:
        raise ConfigError(f"{path}: {tree!r} is no section that could have {last!r}")


def _index(entries: list, key: str, path: str) -> int:
    if not key.isdecimal() or int(key) >= len(entries):
        raise ConfigError(f"{path}: {key} is not an entry of a list of {len(entries)}")
    return int(key)


def read(path: str | Path) -> Mapping[str, Any]:
    """The YAML mapping in a file, not yet checked.

    Raises:
      ConfigError: no such file, or not a YAML mapping.
    """
    path = Path(path)
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("*.yaml"))
        raise ConfigError(f"{path}: no such file; {path.parent} has {near}")
    values = _load_yaml(path.read_bytes(), str(path))
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path}: expected a mapping of sections, got {values!r}")
    return values


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers. Unlike in YAML 1.1, 1e-6 is one and 0.5_2 is text."""


_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    first: [found for found in resolvers if found[0] not in (_INT, _FLOAT)]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_INT, re.compile(r"[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$"
        r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)


def _load_yaml(text: str | bytes, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source}: not YAML: {error}") from None


def explain(error: pydantic.ValidationError, source: str) -> str:
    """One line per problem, each with the path of the key and what would fit."""
    return "\n".join(f"{source}: {_line(item)}" for item in error.errors())


def _line(item: Mapping[str, Any]) -> str:
    path = ".".join(map(str, item["loc"]))
    match item["type"]:
        case "extra_forbidden":
            known = _keys(item["loc"][:-1])
            near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {sorted(known)}"
            return f"{path}: unknown key; {hint}"
        case "missing":
            return f"{path}: needed but not given"
        case "value_error":
            text = str(item["ctx"]["error"])
            return f"{path}: {text}" if path else text
        case _:
            return f"{path}: {item['msg']}, got {item['input']!r}"


def _keys(loc: Sequence[str | int]) -> list[str]:
    """The keys of the section at `loc`."""
    section: Any = Config
    for part in loc:
        if isinstance(part, int):
            continue
        annotation = section.model_fields[part].annotation
        choices = getattr(annotation, "__args__", (annotation,))
        section = next(
            c for c in choices if isinstance(c, type) and issubclass(c, BaseModel)
        )
    return list(section.model_fields)
