"""What a run consists of, made from its configuration and checked."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_llm import models
from jaxrl_llm.config import plugins
from jaxrl_llm.config.names import ConfigError, device_numbers
from jaxrl_llm.config.schema import (
    Config,
    DataConfig,
    PlacementConfig,
    RewardConfig,
)
from jaxrl_llm.data import prompts
from jaxrl_llm.data.sources import Source
from jaxrl_llm.rewards import RewardFunction, Term, resolve
from jaxrl_llm.rewards.builtin import overlong_penalty
from jaxrl_llm.roles.actor import Learner
from jaxrl_llm.roles.critic import Critic
from jaxrl_llm.roles.reward_model import RewardModel
from jaxrl_llm.rollout.engine import Engine
from jaxrl_llm.sharding import mesh, processes
from jaxrl_llm.tracking import services as loggers
from jaxrl_llm.training.experience import Score, score_together


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything a run consists of, loaded and checked."""

    config: Config
    source: models.Checkpoint
    data: prompts.Datasets
    score: Score
    """What responses to train on are worth."""
    weights: tuple[float, ...]
    """Of the terms of `score`."""
    score_held_out: Score
    """The same without what only shapes training (`reward.overlong_buffer`)."""
    engine: Engine
    learner: Learner
    critic: Critic | None
    """None for estimators without one."""
    reward_model: RewardModel | None
    """None if the reward is made of functions alone."""


def build(config: Config, rewards: Sequence[RewardFunction] | None = None) -> Job:
    """Loads and checks everything, cheap things first.

    Args:
      rewards: used instead of `config.reward.functions`.

    Raises:
      ValueError: something is missing or does not fit; the message names it.
    """
    sources = plugins.check(config)
    for name in config.trainer.loggers:
        loggers.find(name)
    meshes = make_meshes(config)
    functions = reward_functions(config.reward) if rewards is None else rewards
    names = [function.name for function in functions]
    names += [RewardModel.name] if config.reward.model else []
    if len(set(names)) != len(names):
        raise ConfigError(f"reward functions need different names, got {names}")
    wanted = config.algorithm.filter_groups
    if wanted and wanted.metric not in ("reward", *names):
        raise ConfigError(
            f"algorithm.filter_groups.metric is {wanted.metric}; use reward or one of "
            f"the reward functions {', '.join(names)}"
        )
    source = models.open(
        config.model.path,
        revision=config.model.revision,
        tokenizer=config.model.tokenizer,
    )
    check_lengths(config, source.arch)
    data = read_data(config.data, source.tokenizer)
    shaped = [*functions, *shaping(config)]
    model = None
    if config.reward.model:
        model = RewardModel(config, source, meshes["reward"])
    how = {"timeout_s": config.reward.timeout_s, "on_error": config.reward.on_error}
    return Job(
        config=config.model_copy(update={"function_sources": sources}),
        source=source,
        data=data,
        score=functools.partial(score_together, shaped, model, **how),
        weights=tuple(term.weight for term in (*shaped, model) if term is not None),
        score_held_out=functools.partial(score_together, functions, model, **how),
        engine=engine_of(
            config,
            source.arch,
            source.tokenizer,
            meshes["rollout"],
            [prompt.tokens for prompt in data.train],
        ),
        learner=Learner(config, source, meshes["actor"], meshes["reference"]),
        critic=Critic(config, source, meshes["critic"]) if has_critic(config) else None,
        reward_model=model,
    )


def reward_functions(section: RewardConfig) -> list[RewardFunction]:
    """The functions that `reward.functions` names."""
    return resolve([Term(**term.model_dump()) for term in section.functions])


def read_data(section: DataConfig, tokenizer: Any) -> prompts.Datasets:
    """The training and the held-out questions that `data` names."""
    return prompts.load(
        Source(**section.train.model_dump()),
        Source(**section.val.model_dump()) if section.val else None,
        tokenizer,
        max_prompt_length=section.max_prompt_length,
        overlong_prompts=section.overlong_prompts,
        chat_template=section.chat_template,
    )


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
    return [RewardFunction(name="overlong_penalty", function=penalty)]


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
    rollout = config.rollout
    match rollout.engine:
        case "jax":
            from jaxrl_llm.rollout.native.engine import JaxEngine

            return JaxEngine(
                arch,
                tokenizer,
                mesh=on,
                dtype=jnp.dtype(rollout.dtype),
                max_model_len=config.data.max_prompt_length
                + rollout.max_response_length,
                max_num_seqs=rollout.max_num_seqs,
                decode_chunk=rollout.decode_chunk,
                prefill_tokens=rollout.prefill_tokens,
                cache_gib=rollout.cache_gib,
                quantization=rollout.quantization,
                kv_cache_dtype=rollout.kv_cache_dtype,
                checksum_freq=rollout.checksum_freq,
            )
        case "vllm":
            # Needs the extra `vllm`.
            from jaxrl_llm.rollout.servers.vllm import VllmEngine, VllmSettings

            return VllmEngine(
                arch,
                tokenizer,
                questions,
                VllmSettings(**rollout.vllm.model_dump()),
                directory=config.output_dir,
                dtype=rollout.dtype,
                max_model_len=config.data.max_prompt_length
                + rollout.max_response_length,
                max_num_seqs=rollout.max_num_seqs,
            )


def has_critic(config: Config) -> bool:
    """Whether the estimator needs values."""
    return plugins.estimator_of(config.algorithm).has_critic


def make_meshes(
    config: Config, devices: Sequence[jax.Device] | None = None
) -> dict[str, jax.sharding.Mesh]:
    """The mesh of each role (actor, reference, critic, reward, rollout) over its
    devices; reward only if there is a reward model.

    Args:
      devices: all of them; those of this run if not given.

    Raises:
      ConfigError: a group or a mesh does not fit the devices.
    """
    placement, actor = config.placement, config.actor
    devices = jax.devices() if devices is None else devices
    everywhere = {_EVERYWHERE: f"0-{len(devices) - 1}"}
    try:
        texts = placement.groups or everywhere
        numbers = {name: device_numbers(text) for name, text in texts.items()}
        groups = mesh.groups(numbers, devices)
    except ValueError as error:
        raise ConfigError(f"placement: {error}") from None
    wanted = {
        "actor": ("actor.mesh", actor.mesh),
        "reference": ("actor.ref_mesh", actor.ref_mesh or actor.mesh),
        "critic": ("critic.mesh", config.critic.mesh),
        "rollout": ("rollout.mesh", config.rollout.mesh),
    }
    if config.reward.model:
        wanted["reward"] = ("reward.model.mesh", config.reward.model.mesh)
    made, group_of = {}, placed(placement)
    for role, (name, sizes) in wanted.items():
        group = group_of[role]
        where = f"{name} on {group}" if placement.groups else name
        try:
            axes = mesh.fill(sizes.model_dump(), len(groups[group]))
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from None
        # Processes generate by themselves, each on its own devices.
        make = mesh.make_by_process if role == "rollout" else mesh.make
        made[role] = make(axes, groups[group])
    _check_processes(config, made["rollout"])
    return made


_EVERYWHERE = "all devices"


def placed(placement: PlacementConfig) -> dict[str, str]:
    """The group of each role; one of all devices, if no groups are named."""
    actor = placement.actor or _EVERYWHERE
    return {
        "actor": actor,
        "reference": placement.reference or actor,
        "critic": placement.critic or actor,
        "reward": placement.reward or actor,
        "rollout": placement.rollout or actor,
    }


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
    prompt, response = config.data.max_prompt_length, config.rollout.max_response_length
    if prompt + response > arch.max_positions:
        raise ConfigError(
            f"data.max_prompt_length {prompt} + rollout.max_response_length {response} "
            f"is over the model's {arch.max_positions} positions"
        )
