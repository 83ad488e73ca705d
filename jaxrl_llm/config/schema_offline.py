"""What a run is that learns from rows that are there, one class for each verb.

Sections that are the same for `jaxrl train` are those of `schema`.
"""

from collections.abc import Iterator
from datetime import datetime
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from jaxrl_llm.config import plugins
from jaxrl_llm.config.algorithm import OPTIMIZERS, PREFERENCE_LOSSES, choice
from jaxrl_llm.config.checks import check_optimizer, mesh_misfits
from jaxrl_llm.config.names import ConfigError, Overlong
from jaxrl_llm.config.schema import (
    DatasetConfig,
    EngineConfig,
    LoopConfig,
    ModelConfig,
    RewardFunctionConfig,
    SandboxConfig,
    SourceConfig,
    ValConfig,
)
from jaxrl_llm.config.schema_training import OptimConfig, TrainedConfig
from jaxrl_llm.config.section import Course, Free, Name, PathText, Rounding, Section


class OfflineDataConfig(Section):
    """Rows to learn from, and how many of them make a step."""

    train: SourceConfig
    val: SourceConfig | None = None
    """Held-out rows, whose loss is a metric. Those whose prompt also stands in `train`
    are taken out of `train`."""
    val_prompts: DatasetConfig | None = None
    """Held-out questions that the model answers; `reward` says how good the answers
    are. They are taken out of `train`, too."""
    train_batch_size: int = Field(64, gt=0)
    """Rows of the data set per step, which is one optimizer step."""
    max_length: int = Field(1024, gt=1)
    """Tokens of a row, chat template included."""
    overlong: Overlong = "error"
    """What to do with longer ones. `truncate` keeps the beginning."""
    max_prompt_length: int = Field(512, gt=0)
    """Tokens of val_prompts, chat template included; a longer one is an error."""
    chat_template: Literal["messages", "all"] = "messages"
    """messages: rows of chat messages are put into the chat template, and text is read
    as it is, as TRL has it. all: text too, as a user's message and the answer to it."""
    chat_template_file: PathText | None = None
    """A chat template to use, and to export with the weights, in the place of the
    tokenizer's."""
    chat_template_kwargs: dict[str, Any] = {}
    """Variables of the chat template, such as {enable_thinking: false}."""
    template_time: datetime | None = None
    """What a chat template that has the date in it takes for now, such as 2025-01-31.
    If not given, when the run began: it goes on with the rows it had."""
    end_of_turn: str | None = None
    """Text of the token that ends an answer, where that is none of the model's stop
    tokens; it is exported as one with the weights."""
    shuffle: bool = True
    """A new order every epoch, a function of `seed` alone."""


class SftDataConfig(OfflineDataConfig):
    """Rows to learn from, in TRL's formats, and how many of them make a step."""

    completion_key: Name = "completion"
    """The column with the answer to the prompt: text or chat messages."""
    messages_key: Name = "messages"
    """The column with a whole conversation, where there is no completion."""
    text_key: Name = "text"
    """The column with text, where there are neither."""
    completion_only_loss: bool = True
    """Learn the completion only of rows that have a prompt, too."""
    assistant_only_loss: bool = True
    """Learn the assistant's only of chat messages, each up to its stop token."""


class LearnerOptimConfig(OptimConfig):
    """The optimizer and its schedule."""

    lr: float = Field(2e-5, ge=0)
    weight_decay: float = Field(0.0, ge=0)


class LearnerConfig(TrainedConfig):
    """The model's update."""

    optim: LearnerOptimConfig = LearnerOptimConfig()
    pack_length: Rounding[int | None] = Field(None, gt=0)
    """Pack several rows of the data set into one of so many tokens, in which none sees
    another; one in each if not given."""


class OfflineTrainerConfig(LoopConfig):
    """How long, how often, and what is written."""

    total_epochs: Course[float] = Field(1.0, gt=0)
    """Passes over the rows, if total_training_steps is not given."""
    total_training_steps: Course[int | None] = Field(None, gt=0)
    """A run that is done goes on with more. A learning rate that decays then does so
    over all of them."""


class ValRewardConfig(Section):
    """How good answers to held-out questions are: the weighted sum of functions."""

    functions: tuple[RewardFunctionConfig, ...] = ()
    timeout_s: float = Field(60.0, gt=0)
    """Longest time one function may take for all answers."""
    isolation: Literal["auto", "process", "thread"] = "auto"
    """Where functions run that are not built in, as of `reward.isolation` in
    `jaxrl train`."""
    memory_gib: float | None = Field(8.0, gt=0)
    """Address space of each such process; null for all there is."""
    on_error: Literal["raise", "zero"] = "raise"
    """A function that raises, hangs or returns NaN stops the run, or scores 0 and is
    counted in the metrics."""


class OfflineConfig(Section):
    """A whole run that learns from rows that are there."""

    task: Name
    """The verb that reads this file."""
    output_dir: Free[PathText]
    """Everything the run writes is in here."""
    seed: int = Field(0, ge=0)
    """Seed of data order and everything else that is random."""
    model: ModelConfig
    data: OfflineDataConfig
    learner: LearnerConfig = LearnerConfig()
    rollout: Free[EngineConfig] = EngineConfig()
    """How data.val_prompts are answered."""
    reward: Free[ValRewardConfig] = ValRewardConfig()
    sandbox: Free[SandboxConfig] = SandboxConfig()
    val: Free[ValConfig] = ValConfig()
    trainer: Free[OfflineTrainerConfig] = OfflineTrainerConfig()
    function_sources: dict[str, str] = {}
    """A hash of the source of every module:function above that learning calls; filled
    in by the run, which goes on only with the same."""

    @model_validator(mode="after")
    def _check(self) -> "OfflineConfig":
        problems = list(misfits(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self


class SftConfig(OfflineConfig):
    """A whole run of supervised fine-tuning."""

    task: Literal["sft"] = "sft"
    """That `jaxrl sft` reads this file."""
    data: SftDataConfig
    loss_type: Literal["nll", "dft"] = "nll"
    """nll: the mean negative log-probability of the tokens to learn. dft: each weighted
    by its probability (Dynamic Fine-Tuning, arXiv:2508.05629)."""


class PairsLearnerConfig(LearnerConfig):
    """The model's update."""

    share_prompts: Rounding[bool] = False
    """Packed rows hold the prompt of a pair once: less to compute where prompts are
    long beside answers. Attention is then the reference's, so rows of a few thousand
    tokens at most."""


class RmOptimConfig(LearnerOptimConfig):
    """The optimizer and its schedule."""

    lr: float = Field(1e-5, ge=0)


class RmLearnerConfig(PairsLearnerConfig):
    """The reward model's update."""

    optim: RmOptimConfig = RmOptimConfig()


class RmConfig(OfflineConfig):
    """A whole run that trains a reward model on pairs of answers."""

    task: Literal["rm"] = "rm"
    """That `jaxrl rm` reads this file."""
    data: OfflineDataConfig
    learner: RmLearnerConfig = RmLearnerConfig()
    center_rewards_coefficient: float = Field(0.0, ge=0)
    """Weight of (chosen + rejected score)^2 in the loss, which keeps scores near 0;
    0.01 does, 0 leaves them where they are."""


class DpoOptimConfig(LearnerOptimConfig):
    """The optimizer and its schedule."""

    lr: float = Field(1e-6, ge=0)


class DpoLearnerConfig(PairsLearnerConfig):
    """The policy's update."""

    optim: DpoOptimConfig = DpoOptimConfig()


class DpoConfig(OfflineConfig):
    """A whole run of direct preference optimization on pairs of answers."""

    task: Literal["dpo"] = "dpo"
    """That `jaxrl dpo` reads this file."""
    data: OfflineDataConfig
    learner: DpoLearnerConfig = DpoLearnerConfig()
    loss_type: tuple[str, ...] = ("sigmoid",)
    """Losses that are added up: sigmoid, hinge, ipo, robust, sft (the negative
    log-probability of the chosen answers' tokens), or module:function, which takes by
    name any of chosen_ratios, rejected_ratios, chosen_lengths, rejected_lengths, beta
    and label_smoothing and returns a number for each pair."""
    loss_weights: tuple[float, ...] | None = None
    """What each of them counts; 1 if not given."""
    beta: float = Field(0.1, gt=0)
    """The larger, the less the policy moves away from the reference, the model that the
    run begins with."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """robust: the probability that a pair is the wrong way around."""

    @field_validator("loss_type", mode="before")
    @classmethod
    def _several(cls, given: Any) -> Any:
        return (given,) if isinstance(given, str) else given


def misfits(config: Any) -> Iterator[str]:
    """Combinations of fields that make no run, each with what would fit."""
    data, learner, trainer = config.data, config.learner, config.trainer
    if learner.pack_length is not None and learner.pack_length < data.max_length:
        yield (
            f"learner.pack_length is {learner.pack_length} but data.max_length is "
            f"{data.max_length}; use at least {data.max_length}"
        )
    first, _, last = (trainer.profile or "1:1").partition(":")
    if int(first) > int(last):
        yield f"trainer.profile is {first}:{last}, which is no step"
    steps, warmup = trainer.total_training_steps, learner.optim.lr_warmup_steps
    if steps is not None and warmup > steps:
        yield (
            f"learner.optim.lr_warmup_steps is {warmup} but "
            f"trainer.total_training_steps is {steps}"
        )
    meshes = {"learner.mesh": learner.mesh, "rollout.mesh": config.rollout.mesh}
    yield from mesh_misfits(meshes)
    if data.val_prompts and not config.reward.functions:
        yield (
            "data.val_prompts is given, but reward.functions is empty: give at least "
            "one, which says how good an answer is"
        )
    if config.reward.functions and not data.val_prompts:
        yield (
            "reward.functions says how good answers are, but data.val_prompts, the "
            "questions to answer, is not given"
        )
    yield from _misfits_of_pairs(config)
    for split in ("train", "val", "val_prompts"):
        source = getattr(data, split)
        if source and source.path.startswith("reasoning_gym:") and not source.size:
            yield (
                f"data.{split}.size is needed for reasoning_gym: how many rows to draw"
            )


def _misfits_of_pairs(config: Any) -> Iterator[str]:
    """Combinations of fields that make no run on pairs of answers."""
    if not isinstance(config, RmConfig | DpoConfig):
        return
    data, learner = config.data, config.learner
    packed = learner.pack_length
    if packed is not None and data.max_length <= packed < 2 * data.max_length:
        yield (
            f"learner.pack_length is {packed}, but both answers of a pair share a row, "
            f"and data.max_length is {data.max_length}; use at least "
            f"{2 * data.max_length}, or a lower data.max_length"
        )
    if learner.share_prompts and packed is None:
        yield "learner.share_prompts needs learner.pack_length: rows that are shared"
    if learner.share_prompts and learner.mesh.context != 1:
        yield (
            f"learner.share_prompts needs whole rows, but learner.mesh.context is "
            f"{learner.mesh.context}; use 1"
        )
    if isinstance(config, RmConfig):
        if data.val_prompts:
            yield "data.val_prompts: a reward model answers no questions; leave it out"
        return
    kinds, weights = config.loss_type, config.loss_weights
    if not kinds:
        yield "loss_type is empty; name at least one, such as sigmoid"
    for kind in kinds:
        try:
            choice("loss_type", kind, {**PREFERENCE_LOSSES, "sft": ""})
        except ConfigError as error:
            yield str(error)
    if len(set(kinds)) != len(kinds):
        yield f"loss_type is {list(kinds)}; name each loss once, with its weight"
    if weights is not None and len(weights) != len(kinds):
        yield (
            f"loss_weights has {len(weights)} numbers for the {len(kinds)} losses of "
            "loss_type; give one for each"
        )
    own = any(":" in kind for kind in kinds)
    if config.label_smoothing and "robust" not in kinds and not own:
        yield (
            f"label_smoothing is {config.label_smoothing}, which only loss_type robust "
            "reads"
        )


def check_functions(config: Any) -> dict[str, str]:
    """Finds the functions of the user's own that a configuration names, before anything
    is read or written, and returns a hash of the source of each by its name.

    Raises:
      ConfigError: as of `checks.check_functions`.
    """
    check_optimizer("learner.optim", config.learner.optim)
    found = {}
    for key, name in own_functions(config).items():
        if key.startswith("loss_type"):
            plugins.preference_loss(name)
        found[name] = plugins.fingerprint(plugins.find(key, name))
    for name, known in config.function_sources.items():
        if found.get(name) != known:
            raise ConfigError(
                f"function_sources: {name} was {known}, but is {found.get(name)}: its "
                "source has changed; go on with the function as it was, or leave "
                "function_sources out and choose another output_dir"
            )
    return found


def own_functions(config: Any) -> dict[str, str]:
    """The functions of the user's own that learning calls, as module:function, by the
    keys that name them."""
    names = {"learner.optim.name": config.learner.optim.name}
    if isinstance(config, DpoConfig):
        names |= {f"loss_type.{i}": name for i, name in enumerate(config.loss_type)}
    known = {*OPTIMIZERS, *PREFERENCE_LOSSES, "sft"}
    return {key: name for key, name in names.items() if name not in known}
