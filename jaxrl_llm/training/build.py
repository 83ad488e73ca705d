"""What a run consists of, made from its configuration and checked."""

import functools
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from jaxrl_llm import models
from jaxrl_llm.algorithms.ppo import TrainState
from jaxrl_llm.config import checks, plugins, resume, user_code
from jaxrl_llm.config.names import ConfigError, device_numbers
from jaxrl_llm.config.schema import (
    Config,
    DataConfig,
    DatasetConfig,
    EngineConfig,
    RolloutConfig,
)
from jaxrl_llm.config.schema_offline import OfflineDataConfig
from jaxrl_llm.data import prompts
from jaxrl_llm.data.chat_template import Encoder
from jaxrl_llm.data.sources import Source, first_row
from jaxrl_llm.data.stream import PromptBatches
from jaxrl_llm.rewards import Isolation, RewardFunction, Term, isolation, resolve
from jaxrl_llm.rewards.builtin import overlong_penalty
from jaxrl_llm.rewards.function import check_signatures, takes_environments
from jaxrl_llm.roles import placement
from jaxrl_llm.roles.actor import Actor
from jaxrl_llm.roles.critic import Critic
from jaxrl_llm.roles.reward_model import RewardModel
from jaxrl_llm.rollout.engine import Engine
from jaxrl_llm.sharding import mesh, processes
from jaxrl_llm.tracking import console
from jaxrl_llm.tracking import services as loggers
from jaxrl_llm.training import fitting, settings
from jaxrl_llm.training.experience import Score, score_together
from jaxrl_llm.training.playing import (
    ENVIRONMENT,
    Agent,
    agent_names,
    agent_of,
    named,
    tool_notes,
)
from jaxrl_llm.training.roles import (
    actor_of,
    adapter_notes,
    check_base,
    critic_of,
    open_critic,
    open_reward_model,
    open_teacher,
    reward_model_of,
    served_adapters,
    shared,
    teacher_of,
)
from jaxrl_llm.workers.sandbox.levels import Sandbox


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything a run consists of, loaded and checked."""

    config: Config
    source: models.Checkpoint
    data: prompts.Datasets
    score: Score
    """What responses to train on are worth."""
    weights: tuple[float, ...]
    """Weights of the terms of `score`."""
    score_held_out: Score
    """`score` without what only shapes training (`reward.overlong_buffer`)."""
    rewards: "Rewards"
    """The functions of both, for what has to be done with their workers."""
    engine: Engine
    actor: Actor
    critic: Critic | None
    """None for estimators without one."""
    reward_model: RewardModel | None
    """None if the reward is made of functions alone."""
    agent: Agent | None = None
    """None if prompts are answered in one turn."""
    inputs: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Digests of the user's functions and of the data, see `resume.check_inputs`."""
    warnings: tuple[str, ...]
    """What looks wrong and may be meant."""
    writes_rollouts = True

    @property
    def tags(self) -> list[str]:
        """What loggers can find the run by."""
        config = self.config
        model = config.model.path.rstrip("/").rpartition("/")[2]
        loss = config.actor.policy_loss.loss_mode
        found = [model, config.algorithm.adv_estimator, loss, config.rollout.engine]
        if how := config.distillation:
            found[1:2] = [found[1], how.mode] if how.with_rewards else [how.mode]
        return found

    @property
    def updating(self) -> int:
        """Devices that the policy is updated on."""
        return self.actor.mesh.size

    def stream(self) -> PromptBatches:
        """The training questions in batches, from the beginning.

        Raises:
          ValueError: there are fewer than a batch has.
        """
        return PromptBatches(
            self.data.train,
            self.config.data.train_batch_size,
            seed=self.config.seed,
            shuffle=self.config.data.shuffle,
        )

    def start(self) -> TrainState:
        """The state before the first step. Reads the weights."""
        config, actor = self.config, self.actor.start()
        coef, reference = None, None
        if config.algorithm.use_kl_in_reward:
            coef = np.float32(config.algorithm.kl_ctrl.kl_coef)
            coef = processes.place(coef, actor.step.sharding)
        if config.actor.ref_refresh_steps:
            reference = self.actor.reference.read()
        critic = self.critic and self.critic.start()
        return TrainState(actor, critic, coef, reference)

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state."""
        config, actor = self.config, self.actor.abstract_state()
        coef, reference = None, None
        if config.algorithm.use_kl_in_reward:
            coef = jax.ShapeDtypeStruct((), jnp.float32, sharding=actor.step.sharding)
        if config.actor.ref_refresh_steps:
            reference = self.actor.reference.abstract_params()
        critic = self.critic and self.critic.abstract_state()
        return TrainState(actor, critic, coef, reference)

    def served(self, params: Any) -> Any:
        """The policy's weights as the engine takes them.

        Args:
          params: those of the state.
        """
        if served_adapters(self.config) is None:
            return self.actor.weights(params)
        return self.actor.computed(params)


@dataclass(frozen=True, kw_only=True)
class Rewards:
    """The reward functions of a run and where they run.

    with closing(rewards): ...    # ends their workers
    """

    functions: tuple[RewardFunction, ...]
    isolation: Isolation

    def ready(self) -> None:
        """Waits until all have a worker."""
        isolation.ready(self.functions, self.isolation)

    def notes(self) -> list[str]:
        """What is to be known of where they run, a line each."""
        return isolation.notes(self.functions, self.isolation)

    def close(self) -> None:
        """Ends their workers."""
        isolation.release(self.functions)


def build(
    config: Config,
    rewards: Sequence[RewardFunction] | None = None,
    *,
    learns: bool = True,
) -> Job:
    """Loads and checks everything, cheap things first. Chooses the micro-batch size if
    that is not given, see `fitting.sized`.

    Args:
      rewards: used instead of `config.reward.functions`.
      learns: whether there will be updates, for which a size and training data are
        needed.

    Raises:
      ValueError: something is missing or does not fit; the message names it.
    """
    sources = checks.check_functions(config)
    for name in config.trainer.loggers:
        loggers.find(name)
    for name in agent_names(config.agent):
        named(name)
    meshes = make_meshes(config)
    functions = reward_functions(config) if rewards is None else rewards
    names = [function.name for function in functions]
    names += [RewardModel.name] if config.reward.model else []
    plays = bool(config.agent and config.agent.environment)
    names += [ENVIRONMENT] if plays else []
    if len(set(names)) != len(names):
        raise ConfigError(f"reward functions need different names, got {names}")
    wanted = config.algorithm.filter_groups
    # What functions of the user's return besides a score is known when they are called.
    known = all(function.trusted for function in functions)
    if wanted and known and wanted.metric not in ("reward", *names):
        raise ConfigError(
            f"algorithm.filter_groups.metric is {wanted.metric}; use reward or one of "
            f"the reward functions {', '.join(names)}"
        )
    where = Isolation(
        kind=config.reward.isolation,
        memory_gib=config.reward.memory_gib,
        played=config.agent is not None,
    )
    splits = ("train", "val") if learns else ("val",)
    check_columns(config.data, functions, splits)
    isolation.start(functions, where)  # they import while the rest is loaded
    source = models.open(
        config.model.path,
        revision=config.model.revision,
        tokenizer=config.model.tokenizer,
    )
    check_lengths(config, source.arch)
    check_stop_tokens(config, source)
    check_base(config, "actor", source)
    if config.data.chat_template_file:
        source.tokenizer.chat_template = read_template(config.data.chat_template_file)
    section = with_template_time(config, source.tokenizer)
    data = read_data(section, source.tokenizer, source.arch.vocab_size, train=learns)
    agent = config.agent and agent_of(
        config,
        encoder_of(section, source.tokenizer, source.arch.vocab_size),
        seen=any(takes_environments(one.function) for one in functions),
    )
    if agent:
        agent.environments.check([*data.train, *data.val])
    shaped = [*functions, *shaping(config)]
    judge = valued = taught = None
    if config.distillation and learns:
        taught = open_teacher(config, source)
    if config.reward.model:
        judge = open_reward_model(config, source)
    weights = shared(config, source)
    if has_critic(config):
        valued = open_critic(config, source)
        if config.critic.lora:  # and of the policy's weights, it trains some too
            valued = weights if valued is source else models.Quantising(valued)

    def actor_with(config: Config) -> Actor:
        teacher = taught and teacher_of(config, *taught, meshes["teacher"])
        on = meshes["actor"], meshes["reference"]
        return actor_of(config, weights, *on, teacher=teacher)

    def critic_with(config: Config) -> Critic:
        return critic_of(config, valued, meshes["critic"])

    model = judge and reward_model_of(config, judge, meshes["reward"])
    critic = valued and critic_with(config)
    how = {
        "timeout_s": config.reward.timeout_s,
        "on_error": config.reward.on_error,
        "isolation": where,
        "environment": plays,
    }
    rewards_of_run = Rewards(functions=tuple(functions), isolation=where)
    rewards_of_run.ready()
    engine = engine_of(
        config,
        source.arch,
        source.tokenizer,
        meshes["rollout"],
        [prompt.tokens for prompt in data.train or data.val],
    )
    actor, chosen = actor_with(config), []
    if learns:
        config, actor, critic, chosen = fitting.sized(
            config,
            actor,
            critic,
            lambda: fitting.kept(config, actor, engine, critic, model),
            actor_with,
            critic_with,
            compiling,
        )
        model = judge and reward_model_of(config, judge, meshes["reward"])
    return Job(
        config=config.model_copy(update={"function_sources": sources, "data": section}),
        source=source,
        data=data,
        score=functools.partial(score_together, shaped, model, **how),
        weights=tuple(
            [term.weight for term in (*shaped, model) if term is not None]
            + [1.0] * plays
        ),
        score_held_out=functools.partial(score_together, functions, model, **how),
        rewards=rewards_of_run,
        engine=engine,
        actor=actor,
        critic=critic,
        reward_model=model,
        agent=agent,
        warnings=(
            *data.warnings,
            *stop_warnings(config, source.arch, source.tokenizer),
            *adapter_notes(
                config, {"actor": config.actor, "critic": config.critic}, source.arch
            ),
            *dict.fromkeys([*rewards_of_run.notes(), *tool_notes(config)]),
            *(agent.notes if agent else ()),
            *chosen,
        ),
        inputs={
            "functions": _digests(config, functions),
            "train": prompts.digests(data.train),
            "val": prompts.digests(data.val),
        },
    )


def compiling(what: str) -> AbstractContextManager[None]:
    """Shows what is compiled while it is, in the process that leads."""
    return console.progress(what, console=Console(quiet=not processes.leads()))


def _digests(config: Config, functions: Sequence[RewardFunction]) -> dict[str, str]:
    """A digest of every function of the user's own, by what it is for and its name."""
    found = {
        f"reward function {one.name!r}": user_code.digest(one.function)
        for one in functions
        if user_code.is_users(one.function)
    }
    for name in agent_names(config.agent):
        if user_code.is_users(one := named(name)):
            found[f"agent {name!r}"] = user_code.digest(one)
    for key, name in checks.own_functions(config).items():
        found[f"{key} {name!r}"] = user_code.digest(plugins.find(key, name))
    return found


def reward_functions(config: Config) -> list[RewardFunction]:
    """The functions that `reward.functions` names."""
    terms = [Term(**term.model_dump()) for term in config.reward.functions]
    return resolve(terms, Sandbox(**config.sandbox.model_dump()))


def check_columns(
    section: DataConfig,
    functions: Sequence[RewardFunction],
    splits: Sequence[str] = ("train", "val"),
) -> None:
    """Raises ValueError if a function asks for a column that the first training or
    held-out question of no set has."""
    for name in splits:
        more = getattr(section, f"more_{name}")
        columns = dict.fromkeys(["data_source"] if more else [])
        found = [one for one in (getattr(section, name), *more.values()) if one]
        for one in found:
            columns |= dict.fromkeys(first_row(Source(**one.model_dump())))
        if found:
            offered = [column for column in columns if column != "prompt"]
            check_signatures(functions, offered, f"data.{name}")


def read_data(
    section: DataConfig,
    tokenizer: Any,
    vocab_size: int | None = None,
    *,
    train: bool = True,
) -> prompts.Datasets:
    """The training and the held-out questions that `data` names.

    Args:
      vocab_size: rows of the model's embedding; any if not given.
      train: whether to read those to train on.

    Raises:
      ValueError: a source, row or prompt that does not fit.
    """
    return prompts.load(
        Source(**section.train.model_dump()) if train else None,
        Source(**section.val.model_dump()) if section.val else None,
        encoder_of(section, tokenizer, vocab_size),
        more_train=_sources(section.more_train if train else {}),
        more_val=_sources(section.more_val),
        max_prompt_length=section.max_prompt_length,
        overlong_prompts=section.overlong_prompts,
        chat_template=section.chat_template,
    )


def _sources(sections: Mapping[str, DatasetConfig]) -> dict[str, Source]:
    return {name: Source(**section.model_dump()) for name, section in sections.items()}


def encoder_of(
    section: DataConfig | OfflineDataConfig,
    tokenizer: Any,
    vocab_size: int | None = None,
) -> Encoder:
    """How questions become tokens."""
    now = {"now": section.template_time} if section.template_time else {}
    return Encoder(
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        variables=section.chat_template_kwargs,
        **now,
    )


def read_template(path: str) -> str:
    """The chat template in a file.

    Raises:
      ConfigError: there is none.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.chat_template_file {path}: {error}") from None
    if not text.strip():
        raise ConfigError(f"data.chat_template_file {path} is empty")
    return text


def with_template_time(config: Any, tokenizer: Any) -> Any:
    """`data` with the time that the chat template is told, if it asks for one: that of
    the run in `output_dir`, or now. All processes call it."""
    data = config.data
    encoder = encoder_of(data, tokenizer)
    if data.template_time or not (data.chat_template and encoder.asks_for_the_time):
        return data
    before = resume.settings_of(Path(config.output_dir))
    time = before.data.template_time if before else encoder.now
    time = processes.gather(time)[0]
    return data.model_copy(update={"template_time": time})


def check_stop_tokens(config: Config, source: models.Checkpoint) -> None:
    """Raises ValueError if there is no tokenizer, or a token that ends responses is
    none of the model's."""
    size, path = source.arch.vocab_size, config.model.path
    models.need_tokenizer(
        source.tokenizer, f"model.path {path}", "name one in model.tokenizer"
    )
    for token in config.rollout.stop_token_ids:
        if token >= size:
            raise ConfigError(
                f"rollout.stop_token_ids has {token}, but the vocabulary of {path} has "
                f"{size} tokens"
            )


def stop_warnings(
    config: Config, arch: models.Architecture, tokenizer: Any
) -> list[str]:
    """What ends no response and was likely meant to."""
    rollout = config.rollout
    ends = {*arch.eos_token_ids, *rollout.stop_token_ids}
    if not ends and not rollout.stop:
        return [
            f"nothing ends a response before its {rollout.max_response_length} tokens: "
            f"neither {config.model.path} nor its tokenizer names an end of sequences; "
            "set rollout.stop or rollout.stop_token_ids"
        ]
    added = tokenizer.added_tokens_decoder.values()
    special = [token.content for token in added if token.special]
    unseen = [s for s in rollout.stop if any(token in s for token in special)]
    if unseen and rollout.skip_special_tokens:
        return [
            f"rollout.stop has {unseen[0]!r}, which is never found in texts without "
            "special tokens; set rollout.skip_special_tokens=false, or stop at its "
            "token by rollout.stop_token_ids"
        ]
    if not config.data.chat_template:
        return []
    end = encoder_of(config.data, tokenizer).end_of_answer()
    if end is None or end in ends:
        return []
    text = tokenizer.convert_ids_to_tokens(end)
    if any(stop in text for stop in rollout.stop):
        return []
    return [
        f"the chat template puts {text!r} behind an answer, which ends no response: "
        f"the model goes on after it; add its token {end} to rollout.stop_token_ids"
    ]


def shaping(config: Config) -> list[RewardFunction]:
    """Terms of the reward that only training has."""
    buffer = config.reward.overlong_buffer
    if buffer is None:
        return []
    penalty = functools.partial(
        overlong_penalty,
        max_length=config.rollout.max_response_length,
        buffer=buffer.len,
        factor=buffer.penalty_factor,
    )
    return [RewardFunction(name="overlong_penalty", function=penalty, trusted=True)]


def engine_of(
    config: Config,
    arch: models.Architecture,
    tokenizer: Any,
    on: jax.sharding.Mesh,
    questions: Sequence[Sequence[int]],
) -> Engine:
    """The generator that `rollout.engine` names.

    Args:
      on: the mesh to generate on, if that is done in this process.
      questions: tokens of the prompts; what servers hold is tried on some of them.
    """
    rollout, lora = config.rollout, served_adapters(config)
    match rollout.engine:
        case "jax":
            return jax_engine_of(
                rollout,
                arch,
                tokenizer,
                on,
                config.longest_sequence,
                lora,
                lora and config.actor.lora.quantization,
            )
        case _:
            kind, servers = _servers_of(rollout)
            return kind(
                arch,
                tokenizer,
                questions,
                servers,
                directory=config.output_dir,
                dtype=rollout.dtype,
                max_model_len=config.longest_sequence,
                max_num_seqs=rollout.max_num_seqs,
                skip_special_tokens=rollout.skip_special_tokens,
                lora=lora,
            )


def _servers_of(rollout: RolloutConfig) -> tuple[Any, Any]:
    """The engine of the servers that `rollout.engine` names, and their settings. Needs
    the extra `vllm`."""
    match rollout.engine:
        case "vllm":
            from jaxrl_llm.rollout.servers.vllm import VllmEngine, VllmSettings

            return VllmEngine, VllmSettings(**rollout.vllm.model_dump())
        case "sglang":
            from jaxrl_llm.rollout.servers.sglang import SglangEngine, SglangSettings

            return SglangEngine, SglangSettings(**rollout.sglang.model_dump())
        case "jaxrl":
            from jaxrl_llm.rollout.servers.jaxrl import JaxrlEngine, JaxrlSettings

            return JaxrlEngine, JaxrlSettings(**rollout.jaxrl.model_dump())


def jax_engine_of(
    rollout: EngineConfig,
    arch: models.Architecture,
    tokenizer: Any,
    on: jax.sharding.Mesh,
    max_model_len: int,
    lora: models.Lora | None = None,
    base: models.Bits | None = None,
) -> Engine:
    """The generator of this package.

    Args:
      max_model_len: tokens of the longest sequence.
      lora: the adapters that it is sent, if it is sent such.
      base: how the matrices beside them are quantised, if they are.

    Raises:
      ConfigError: the model cannot be split over the mesh.
    """
    from jaxrl_llm.rollout.native.engine import JaxEngine

    tensor = on.shape["tensor"]
    try:
        models.kv_copies(arch, tensor)
    except ValueError as error:
        raise ConfigError(f"rollout.mesh.tensor {tensor}: {error}") from None
    return JaxEngine(
        arch,
        tokenizer,
        mesh=on,
        dtype=jnp.dtype(rollout.dtype),
        max_model_len=max_model_len,
        max_num_seqs=rollout.max_num_seqs,
        decode_chunk=rollout.decode_chunk,
        prefill_tokens=rollout.prefill_tokens,
        cache_gib=rollout.cache_gib,
        quantization=rollout.quantization,
        kv_cache_dtype=rollout.kv_cache_dtype,
        checksum_freq=rollout.checksum_freq,
        skip_special_tokens=rollout.skip_special_tokens,
        lora=lora,
        base=base,
    )


def has_critic(config: Config) -> bool:
    """Whether the estimator needs values."""
    return plugins.estimator_of(config.algorithm).has_critic


def make_meshes(
    config: Config, devices: Sequence[jax.Device] | None = None
) -> dict[str, jax.sharding.Mesh]:
    """The mesh of each role (actor, reference, critic, reward, teacher, rollout) over
    its devices; reward and teacher only if there is one.

    Args:
      devices: all of them; those of this run if not given.

    Raises:
      ConfigError: a group or a mesh does not fit the devices.
    """
    devices = jax.devices() if devices is None else devices
    everywhere = {placement.EVERYWHERE: f"0-{len(devices) - 1}"}
    try:
        texts = config.placement.groups or everywhere
        numbers = {name: device_numbers(text) for name, text in texts.items()}
        groups = mesh.groups(numbers, devices)
    except ValueError as error:
        raise ConfigError(f"placement: {error}") from None
    try:
        made = placement.make_meshes(settings.places(config), groups)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    _check_processes(config, made["rollout"])
    return made


def _check_processes(config: Config, rollout: jax.sharding.Mesh) -> None:
    """Raises ConfigError if many processes cannot share the work of generating."""
    count, prompts = processes.of(rollout), config.data.train_batch_size
    if count == 1:
        return
    if config.placement.groups:
        raise ConfigError(
            f"placement.groups are for one process, not {count}: of many, each "
            "generates on its own devices"
        )
    if config.rollout.engine != "jax":
        raise ConfigError(
            f"rollout.engine {config.rollout.engine} works with one process, not "
            f"{count}; use jax"
        )
    if prompts < count:
        raise ConfigError(
            f"data.train_batch_size {prompts} leaves some of {count} processes without "
            f"a prompt; use at least {count}"
        )
    tensor, devices = rollout.shape["tensor"], rollout.size // count
    if rollout.local_mesh.shape["tensor"] != tensor:
        raise ConfigError(
            f"rollout.mesh.tensor {tensor} spans processes of {devices} devices each, "
            f"but each generates by itself; use a divisor of {devices}"
        )


def check_lengths(config: Config, arch: models.Architecture) -> None:
    """Raises ConfigError if prompt and response cannot fit the model."""
    prompt, response = config.data.max_prompt_length, config.longest_response
    if prompt + response > arch.max_positions:
        key = config.sequence_keys.rpartition(" ")[2]
        raise ConfigError(
            f"data.max_prompt_length {prompt} + {key} {response} is over the model's "
            f"{arch.max_positions} positions"
        )
