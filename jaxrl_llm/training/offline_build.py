"""What a run consists of that learns from rows that are there, made from its
configuration and checked.

A `Task` is what tells supervised fine-tuning from other such training: how rows are
made of data, the model's head, the objective and its metrics, and the export.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from jaxrl_llm import models
from jaxrl_llm.algorithms.objectives import SEQUENCES_TOGETHER, Objective
from jaxrl_llm.algorithms.update import TrainState
from jaxrl_llm.config import plugins, schema_offline, user_code
from jaxrl_llm.config.names import ConfigError
from jaxrl_llm.config.schema_offline import OfflineConfig, OfflineDataConfig
from jaxrl_llm.data import examples, prompts
from jaxrl_llm.data.chat_template import Encoder
from jaxrl_llm.data.examples import Example, ExampleSets
from jaxrl_llm.data.messages import content_of
from jaxrl_llm.data.packing import Layout
from jaxrl_llm.data.rows import TrainBatch
from jaxrl_llm.data.sources import Source, column, first_row
from jaxrl_llm.data.stream import PromptBatches
from jaxrl_llm.data.types import Prompt
from jaxrl_llm.models.apply import Params
from jaxrl_llm.rewards import Isolation, RewardFunction, Term, isolation, resolve
from jaxrl_llm.rewards.function import check_signatures
from jaxrl_llm.roles import optimizer, placement
from jaxrl_llm.roles.learner import Learner, OutputsOf
from jaxrl_llm.roles.placement import Place
from jaxrl_llm.roles.sharded_model import ShardedModel
from jaxrl_llm.rollout.engine import Engine
from jaxrl_llm.sharding import hardware, processes
from jaxrl_llm.tracking import services as loggers
from jaxrl_llm.training import fitting, settings
from jaxrl_llm.training.build import (
    Rewards,
    compiling,
    encoder_of,
    jax_engine_of,
    read_template,
    with_template_time,
)
from jaxrl_llm.training.experience import Observe, Score, score_together
from jaxrl_llm.training.roles import adapter_notes, adapters_of, check_base
from jaxrl_llm.workers.sandbox.levels import Sandbox


@runtime_checkable
class Task(Protocol):
    """What one kind of training from rows is. Methods are given the configuration."""

    name: str
    """The verb's, and that of the key `task`."""

    def read(
        self, config: Any, reading: "Reading", held_out: Sequence[Prompt]
    ) -> ExampleSets:
        """The examples of a run.

        Args:
          held_out: questions of validations, which nothing is learned of.

        Raises:
          ValueError: a source or row does not fit.
        """

    def objective(self, config: Any) -> Objective:
        """What is learned."""

    def model(
        self,
        config: Any,
        arch: models.Architecture,
        on: jax.sharding.Mesh,
        rows: Layout,
    ) -> tuple[ShardedModel, OutputsOf]:
        """The model on its mesh, and what the objective is handed of it.

        Raises:
          ValueError: the model or its rows cannot be split evenly over the mesh.
        """

    def weights(self, model: ShardedModel, source: Any, dtype: Any) -> Params:
        """All weights before training, where they lie."""

    def rows(self, chosen: Sequence[Example], layout: Layout) -> TrainBatch:
        """Examples as rows on the host."""
        return examples.make_rows(chosen, layout)

    def inputs(
        self, source: models.Checkpoint, data: ExampleSets
    ) -> dict[str, dict[str, str]]:
        """Digests of what may not change when a run goes on, see
        `resume.check_inputs`."""
        return {
            "train": examples.digests(data.train),
            "val": examples.digests(data.val),
        }

    def begun(
        self,
        job: "OfflineJob",
        state: TrainState,
        step: int,
        waiting: Observe,
        say: Callable[[str], Any],
    ) -> "OfflineJob":
        """The job with what has to be known before the first of the steps to come. All
        processes call it.

        Args:
          state: to go on from.
          step: that made it; 0 for a fresh start.
          waiting: shows what is done, for how long.
          say: takes a line for the run's log.
        """
        return job

    def score(self, metrics: Mapping[str, float]) -> float | None:
        """How good the model is by a validation; the best checkpoint is kept. None if
        that was not measured."""

    def save(self, job: "OfflineJob", params: Params, step: int) -> None:
        """Writes the model as a Hugging Face directory."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How rows become tokens of a model's."""

    encoder: Encoder
    stops: frozenset[int]
    """Tokens that end an answer."""
    end: int | None
    """The one of them that is put where none stands."""
    template: str
    """What errors call the chat template."""


@dataclass(frozen=True, kw_only=True)
class OfflineJob:
    """Everything a run consists of, loaded and checked."""

    task: Task
    config: OfflineConfig
    """With the number of steps filled in."""
    source: models.Checkpoint
    data: ExampleSets
    learner: Learner
    questions: list[Prompt]
    """Held-out questions to answer."""
    engine: Engine | None
    """None without any."""
    score: Score
    """What answers to them are worth."""
    rewards: Rewards
    inputs: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Digests of the data and of functions, see `resume.check_inputs`."""
    warnings: tuple[str, ...] = ()
    """What looks wrong and may be meant."""
    writes_rollouts = False

    @property
    def tags(self) -> list[str]:
        """What loggers can find the run by."""
        model = self.config.model.path.rstrip("/").rpartition("/")[2]
        return [model, self.task.name]

    @property
    def updating(self) -> int:
        """Devices that the model is updated on."""
        return self.learner.mesh.size

    def stream(self) -> PromptBatches[Example]:
        """The training examples in batches, from the beginning.

        Raises:
          ValueError: there are fewer than a batch has.
        """
        return PromptBatches(
            self.data.train,
            self.config.data.train_batch_size,
            seed=self.config.seed,
            shuffle=self.config.data.shuffle,
            noun="rows",
        )

    def start(self) -> TrainState:
        """The state before the first step. Reads the weights."""
        return self.learner.start()

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state."""
        return self.learner.abstract_state()

    def rows(self, chosen: Sequence[Example]) -> TrainBatch:
        """Examples of one step, or fewer, as rows of the one shape that steps have."""
        return self.task.rows(chosen, self.layout)

    @property
    def layout(self) -> Layout:
        """How examples are laid out in rows."""
        return _for_steps(self.learner.model.layout, self.config)

    def held_out_rows(self) -> list[TrainBatch]:
        """The held-out examples as rows, as many as a step has at a time."""
        size, val = self.config.data.train_batch_size, self.data.val
        return [self.rows(val[i : i + size]) for i in range(0, len(val), size)]


def build(
    config: OfflineConfig, task: Task, rewards: Sequence[RewardFunction] | None = None
) -> OfflineJob:
    """Loads and checks everything, cheap things first. Chooses the micro-batch size if
    that is not given, see `fitting.largest_fit`.

    Args:
      rewards: used instead of `config.reward.functions`.

    Raises:
      ValueError: something is missing or does not fit; the message names it.
    """
    sources = schema_offline.check_functions(config)
    for name in config.trainer.loggers:
        loggers.find(name)
    meshes = make_meshes(config)
    functions = rewards
    if functions is None:
        terms = [Term(**term.model_dump()) for term in config.reward.functions]
        functions = resolve(terms, Sandbox(**config.sandbox.model_dump()))
    where = Isolation(kind=config.reward.isolation, memory_gib=config.reward.memory_gib)
    if config.data.val_prompts:
        asked = Source(**config.data.val_prompts.model_dump())
        columns = [column for column in first_row(asked) if column != "prompt"]
        check_signatures(functions, columns, "data.val_prompts")
        isolation.start(functions, where)  # they import while the rest is loaded
    source = opened(config)
    check_base(config, "learner", source)
    check_length(config, source.arch)
    section = with_template_time(config, source.tokenizer)
    reading = reading_of(section, source)
    questions = read_questions(section, reading)
    data = task.read(config.model_copy(update={"data": section}), reading, questions)
    config = with_steps(
        config.model_copy(update={"function_sources": sources, "data": section}),
        len(data.train),
    )
    rewards_of_run = Rewards(functions=tuple(functions), isolation=where)
    engine = None
    if questions:
        rewards_of_run.ready()
        engine = jax_engine_of(
            config.rollout,
            source.arch,
            source.tokenizer,
            meshes["rollout"],
            config.data.max_prompt_length + config.rollout.max_response_length,
        )
    longest = longest_example(data)

    def learner_with(config: OfflineConfig) -> Learner:
        return learner_of(task, config, source, meshes["learner"], longest)

    config, learner, chosen = _sized(config, learner_with, engine, len(questions))
    return OfflineJob(
        task=task,
        config=config,
        source=source,
        data=data,
        learner=learner,
        questions=questions,
        engine=engine,
        score=functools.partial(
            score_together,
            functions,
            None,
            timeout_s=config.reward.timeout_s,
            on_error=config.reward.on_error,
            isolation=where,
        ),
        rewards=rewards_of_run,
        inputs={
            "functions": _digests(config),
            **task.inputs(source, data),
        },
        warnings=(
            *data.warnings,
            *rewards_of_run.notes(),
            *adapter_notes(config, {"learner": config.learner}, source.arch),
            *chosen,
        ),
    )


def opened(config: OfflineConfig) -> models.Checkpoint:
    """The model to start from, with the chat template and the end of turns that the
    configuration gives it.

    Raises:
      ValueError: there is no such model, it has no tokenizer, or no such token.
    """
    model, data = config.model, config.data
    source = models.open(model.path, revision=model.revision, tokenizer=model.tokenizer)
    models.need_tokenizer(
        source.tokenizer, f"model.path {model.path}", "name one in model.tokenizer"
    )
    if data.chat_template_file:
        source.tokenizer.chat_template = read_template(data.chat_template_file)
    if data.end_of_turn is None:
        return source
    token = source.tokenizer.get_vocab().get(data.end_of_turn)
    if token is None or token >= source.arch.vocab_size:
        raise ConfigError(
            f"data.end_of_turn is {data.end_of_turn!r}, which is no single token of "
            f"{model.path}; name one, such as {source.tokenizer.eos_token!r}"
        )
    source.tokenizer.eos_token = data.end_of_turn
    known = [one for one in source.arch.eos_token_ids if one != token]
    arch = dataclasses.replace(source.arch, eos_token_ids=(token, *known))
    return dataclasses.replace(source, arch=arch)


def check_length(config: OfflineConfig, arch: models.Architecture) -> None:
    """Raises ConfigError if a row, or a question and its answer, cannot fit the
    model."""
    data, most = config.data, arch.max_positions
    if data.max_length > most:
        raise ConfigError(
            f"data.max_length {data.max_length} is over the model's {most} positions"
        )
    answered = data.max_prompt_length + config.rollout.max_response_length
    if data.val_prompts and answered > most:
        raise ConfigError(
            f"data.max_prompt_length {data.max_prompt_length} + "
            f"rollout.max_response_length {config.rollout.max_response_length} is over "
            f"the model's {most} positions"
        )


def reading_of(section: OfflineDataConfig, source: models.Checkpoint) -> Reading:
    """How rows become tokens."""
    tokenizer, stops = source.tokenizer, source.arch.eos_token_ids
    end = tokenizer.eos_token_id
    file = section.chat_template_file
    return Reading(
        encoder=encoder_of(section, tokenizer, source.arch.vocab_size),
        stops=frozenset(stops),
        end=end if end in stops else next(iter(stops), None),
        template=f"the chat template {file}" if file else "the model's chat template",
    )


def read_questions(section: OfflineDataConfig, reading: Reading) -> list[Prompt]:
    """The held-out questions to answer; none if there are none.

    Raises:
      ValueError: a source, row or prompt that does not fit, or is too long.
    """
    if section.val_prompts is None:
        return []
    source = Source(**section.val_prompts.model_dump())
    chat = section.chat_template == "all" or _has_messages(source)
    found = prompts.read(source, reading.encoder, chat_template=chat)
    for prompt in found:
        if len(prompt.tokens) > section.max_prompt_length:
            raise ValueError(
                f"{source.path}, row {prompt.id} (from 0): the prompt has "
                f"{len(prompt.tokens)} tokens, data.max_prompt_length is "
                f"{section.max_prompt_length}; raise it"
            )
    return found


def _has_messages(source: Source) -> bool:
    """Whether questions are chat messages, by the first."""
    asked = column(first_row(source), source.prompt_key)
    return not isinstance(content_of(asked, source.prompt_key), str)


def with_steps(config: OfflineConfig, count: int) -> Any:
    """The configuration with the number of steps that it stands for.

    Args:
      count: training examples.
    """
    trainer = config.trainer
    if trainer.total_training_steps is not None:
        return config
    steps = math.ceil(trainer.total_epochs * count / config.data.train_batch_size)
    warmup = config.learner.optim.lr_warmup_steps
    if warmup > steps:
        raise ConfigError(
            f"learner.optim.lr_warmup_steps is {warmup}, but trainer.total_epochs "
            f"{trainer.total_epochs:g} of {count} rows are {steps} steps"
        )
    trainer = trainer.model_copy(update={"total_training_steps": max(steps, 1)})
    return config.model_copy(update={"trainer": trainer})


def longest_example(data: ExampleSets) -> list[int]:
    """The most tokens that an example has, for each of its episodes."""
    found = np.array([example.lengths for example in (*data.train, *data.val)])
    return [int(found.max())] * found.shape[1]


def learner_of(
    task: Task,
    config: OfflineConfig,
    source: Any,
    on: jax.sharding.Mesh,
    longest: Sequence[int],
) -> Learner:
    """The model that learns.

    Args:
      source: of the weights to start from.
      longest: tokens of the longest example, for each of its episodes.

    Raises:
      ValueError: the model or its rows cannot be split evenly over the mesh.
    """
    section, objective = config.learner, task.objective(config)
    rows = Layout(
        pack_length=section.pack_length,
        micro_batch_size=section.micro_batch_size,
        longest=max(longest),
        sequences_together=SEQUENCES_TOGETHER[objective.segments],
    )
    model, outputs = task.model(config, source.arch, on, rows)
    largest = task.rows(
        examples.longest_of(longest, config.data.train_batch_size),
        _for_steps(model.layout, config),
    )
    numbers = settings.optim(section.optim), config.trainer.total_training_steps
    return Learner(
        model,
        objective,
        outputs,
        read=functools.partial(task.weights, model, models.Quantising(source)),
        optimizer=optimizer.make(*numbers),
        schedule=optimizer.schedule(*numbers),
        largest=largest,
        adapters=adapters_of(config, "learner", source.arch),
    )


def _for_steps(layout: Layout, config: OfflineConfig) -> Layout:
    """The layout of rows, of which there are as many for fewer examples than a step
    has."""
    count = config.data.train_batch_size * layout.sequences_together
    return dataclasses.replace(layout, most_sequences=count)


def make_meshes(
    config: OfflineConfig, devices: Sequence[jax.Device] | None = None
) -> dict[str, jax.sharding.Mesh]:
    """The mesh of the learner, and of generation (rollout), over all devices.

    Args:
      devices: those of this run if not given.

    Raises:
      ConfigError: a mesh does not fit the devices.
    """
    devices = jax.devices() if devices is None else devices
    places = {
        "learner": Place(axes=settings.axes(config.learner.mesh), key="learner.mesh"),
        "rollout": Place(
            axes=settings.axes(config.rollout.mesh), key="rollout.mesh", by_process=True
        ),
    }
    if not config.data.val_prompts:
        del places["rollout"]
    try:
        return placement.make_meshes(places, {placement.EVERYWHERE: devices})
    except ValueError as error:
        raise ConfigError(str(error)) from None


def kept(
    config: OfflineConfig, learner: Learner, engine: Engine | None, questions: int
) -> dict[str, int]:
    """Bytes by purpose on each device, as they stay from step to step; of the
    generation cache, what the longest answers want."""
    state = learner.abstract_state()
    found = {
        "weights": fitting.bytes_of(state.params),
        "optimizer": fitting.bytes_of(state.opt_state),
    }
    if frozen := learner.abstract_frozen():
        found[fitting.FROZEN] = fitting.bytes_of(frozen)
    if engine:
        share, samples = -(-questions // jax.process_count()), config.val.n
        longest = config.data.max_prompt_length + config.rollout.max_response_length
        found |= engine.memory(share * samples, longest)
    return found


def _sized(
    config: OfflineConfig,
    learner_with: Callable[[Any], Learner],
    engine: Engine | None,
    questions: int,
) -> tuple[Any, Learner, list[str]]:
    """The configuration with the micro-batch size if that was not given, the learner
    that has it, and what was chosen. All processes choose the same; a run that goes on
    keeps the size that it has."""
    key = "learner.micro_batch_size"
    learner = learner_with(config)
    limits = processes.gather(hardware.memory_limit())
    if config.learner.micro_batch_size is not None or None in limits:
        return config, learner, []
    if before := fitting.begun(config):
        size = before.learner.micro_batch_size
        config = with_rows(config, size)
        said = f"{key} is not given: {size or 'all'} rows at a time, as the run began"
        return config, learner_with(config), [said]
    held = kept(config, learner, engine, questions)
    shape = learner.largest_rows.tokens.shape
    found = fitting.largest_fit(
        learner.model,
        learner.abstract_state(),
        shape,
        int(fitting.SURELY * min(limits)) - held.get(fitting.WEIGHTS, 0),
        lambda size: learner_with(with_rows(config, size)),
        Learner.lower_largest_update,
        compiling,
    )
    return with_rows(config, found.size), found.made, [found.said(key, shape[0])]


def with_rows(config: OfflineConfig, size: int | None) -> Any:
    """The configuration with this micro-batch size of the learner."""
    section = config.learner.model_copy(update={"micro_batch_size": size})
    return config.model_copy(update={"learner": section})


def _digests(config: OfflineConfig) -> dict[str, str]:
    """A digest of every function of the user's own that learning calls."""
    return {
        f"{key} {name!r}": user_code.digest(plugins.find(key, name))
        for key, name in schema_offline.own_functions(config).items()
    }
