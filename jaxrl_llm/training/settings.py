"""The sections of a configuration as the settings of what computes.

Roles, meshes and optimizers take plain numbers and records of their own; here is where
these come from, and what a configuration calls them in errors.
"""

import itertools
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any, get_args
from urllib.parse import urlsplit

from jaxrl_llm.algorithms import distilled_policy, grpo, ppo
from jaxrl_llm.algorithms.rollout_correction import Correction
from jaxrl_llm.config import plugins
from jaxrl_llm.config.names import ConfigError
from jaxrl_llm.config.schema import Config, PlacementConfig, RolloutMeshConfig
from jaxrl_llm.config.schema_algorithm import RolloutCorrectionConfig
from jaxrl_llm.config.schema_training import (
    LoraConfig,
    Module,
    OptimConfig,
    TrainMeshConfig,
)
from jaxrl_llm.data.packing import Layout
from jaxrl_llm.models import Lora
from jaxrl_llm.roles import optimizer
from jaxrl_llm.roles.actor import ActorSettings, StepSize
from jaxrl_llm.roles.critic import CriticSettings
from jaxrl_llm.roles.placement import EVERYWHERE, Place
from jaxrl_llm.roles.policy import PolicySettings
from jaxrl_llm.roles.sharded_model import ModelSettings
from jaxrl_llm.roles.trained_model import MiniBatches


def keys(mesh: str, section: str = "actor") -> dict[str, str]:
    """What errors of a model on the mesh of that key call their settings.

    Args:
      section: that says how rows are laid out.
    """
    shared = ("pack_length", "share_prompts", "keep_probabilities")
    return {name: f"{section}.{name}" for name in shared} | {"mesh": mesh}


def rows(config: Config, micro_batch_size: int | None) -> Layout:
    """The rows of a training step, on any mesh."""
    forks = config.agent is not None and config.agent.on_rewrite == "fork"
    return Layout(
        pack_length=config.actor.pack_length,
        micro_batch_size=micro_batch_size,
        share_prompts=config.actor.share_prompts,
        longest=config.longest_sequence,
        contexts=config.agent.max_turns if forks else 1,
    )


def policy(config: Config) -> PolicySettings:
    """How the policy is computed, and its reference."""
    actor = config.actor
    return PolicySettings(
        dtype=actor.dtype,
        remat=actor.remat,
        attention=actor.attention,
        unroll=actor.unroll,
        rules=actor.rules,
        rows=rows(config, actor.micro_batch_size),
        temperature=config.rollout.temperature,
        entropy_gradient=actor.entropy_coeff != 0,
        keep_probabilities=actor.keep_probabilities,
        **adapters(actor.lora),
    )


def lora(section: LoraConfig | None) -> Lora | None:
    """The adapters that a section asks for."""
    if section is None:
        return None
    names = get_args(Module) if section.modules == "all" else section.modules
    return Lora(
        rank=section.rank,
        alpha=section.alpha,
        modules=tuple(name.removesuffix("_proj") for name in names),
        rslora=section.rslora,
    )


def adapters(section: LoraConfig | None) -> dict[str, Any]:
    """What of `ModelSettings` the section says."""
    if section is None:
        return {}
    return {"lora": lora(section), "quantization": section.quantization}


def actor(config: Config) -> ActorSettings:
    """How the policy learns."""
    actor, data, rollout = config.actor, config.data, config.rollout
    return ActorSettings(
        update=update_settings(config),
        mini_batches=MiniBatches(
            epochs=actor.ppo_epochs,
            num_prompts=actor.ppo_mini_batch_size,
            group_size=rollout.n,
        ),
        step_size=StepSize(
            num_prompts=data.train_batch_size,
            group_size=rollout.n,
            prompt_length=data.max_prompt_length,
            response_length=config.longest_response,
        ),
        needs_old_logprobs=needs_old_logprobs(config),
        router_aux_loss_coef=actor.router_aux_loss_coef,
        replays=actor.router_replay == "R2",
        offload="optimizer" in actor.offload,
        distillation=distillation(config),
    )


def distillation(config: Config) -> distilled_policy.Settings | None:
    """What is learned from the teacher; None without one."""
    section = config.distillation
    if section is None:
        return None
    return distilled_policy.Settings(
        mode=section.mode,
        coef=section.coef,
        with_rewards=section.with_rewards,
        topk=section.topk,
        beta=section.jsd_beta,
    )


def teacher(config: Config, num_tokens: int) -> PolicySettings:
    """How the teacher is computed.

    Args:
      num_tokens: of the vocabulary that it shares with the policy.
    """
    section, size = config.distillation.teacher, config.actor.micro_batch_size
    return PolicySettings(
        dtype=section.dtype,
        attention=section.attention,
        unroll=section.unroll,
        rules=section.rules,
        rows=rows(config, section.micro_batch_size or size),
        temperature=config.rollout.temperature,
        num_tokens=num_tokens,
    )


def value_model(config: Config) -> ModelSettings:
    """How the critic's model is computed."""
    critic = config.critic
    return ModelSettings(
        dtype=critic.dtype,
        remat=critic.remat,
        attention=critic.attention,
        unroll=critic.unroll,
        rules=critic.rules,
        rows=rows(config, critic.micro_batch_size or config.actor.micro_batch_size),
        **adapters(critic.lora),
    )


def critic(config: Config) -> CriticSettings:
    """How the critic learns."""
    critic, actor = config.critic, config.actor
    return CriticSettings(
        update=ppo.CriticSettings(
            cliprange_value=critic.cliprange_value,
            loss_agg_mode=critic.loss_agg_mode,
            micro_batch_size=critic.micro_batch_size or actor.micro_batch_size,
        ),
        mini_batches=MiniBatches(
            epochs=critic.ppo_epochs or actor.ppo_epochs,
            num_prompts=critic.ppo_mini_batch_size or actor.ppo_mini_batch_size,
            group_size=config.rollout.n,
        ),
    )


def reward_model(config: Config) -> ModelSettings:
    """How the reward model is computed."""
    section = config.reward.model
    return ModelSettings(
        dtype=section.dtype,
        attention=section.attention,
        unroll=section.unroll,
        rules=section.rules,
        rows=rows(config, section.micro_batch_size or config.actor.micro_batch_size),
    )


def optim(section: OptimConfig) -> optimizer.Settings:
    """The numbers of an optimizer and its schedule."""
    return optimizer.Settings(**section.model_dump())


def places(config: Config) -> dict[str, Place]:
    """The mesh and the group that each role (actor, reference, critic, reward, teacher,
    rollout) wants; reward and teacher only if there is one."""
    meshes = {
        "actor": ("actor.mesh", config.actor.mesh),
        "reference": ("actor.ref_mesh", config.actor.ref_mesh or config.actor.mesh),
        "critic": ("critic.mesh", config.critic.mesh),
        "rollout": ("rollout.mesh", config.rollout.mesh),
    }
    if config.reward.model:
        meshes["reward"] = ("reward.model.mesh", config.reward.model.mesh)
    if config.distillation:
        own = config.distillation.teacher.mesh or config.actor.mesh
        meshes["teacher"] = ("distillation.teacher.mesh", own)
    group_of = placed(config.placement)
    return {
        role: Place(
            axes=axes(sizes),
            group=group_of[role],
            key=key,
            by_process=role == "rollout",
        )
        for role, (key, sizes) in meshes.items()
    }


def axes(section: TrainMeshConfig | RolloutMeshConfig) -> dict[str, int]:
    """How many devices lie along each axis of a mesh; -1: what is left."""
    return section.model_dump()


def placed(placement: PlacementConfig) -> dict[str, str]:
    """The group of each role; one of all devices, if no groups are named."""
    actor = placement.actor or EVERYWHERE
    return {
        "actor": actor,
        "reference": placement.reference or actor,
        "critic": placement.critic or actor,
        "reward": placement.reward or actor,
        "teacher": placement.teacher or actor,
        "rollout": placement.rollout or actor,
    }


def server_share(config: Config) -> float | None:
    """The most that servers take of the memory of a GPU that this process sees, too;
    None if they run on this host and it is not known which GPUs they have."""
    name = config.rollout.engine
    if name == "jax":
        return 0.0
    servers = getattr(config.rollout, name)
    if servers.urls:
        hosts = {urlsplit(url).hostname for url in servers.urls}
        return None if hosts & {"localhost", "127.0.0.1", "0.0.0.0", "::1"} else 0.0
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    alike = servers.env.get("CUDA_VISIBLE_DEVICES", seen or "all")
    count = Counter(
        gpu.strip() for text in servers.devices or (alike,) for gpu in text.split(",")
    )
    shared = count if seen is None else map(str.strip, seen.split(","))
    most = max(count[gpu] for gpu in shared)
    if name == "jaxrl":
        return _USUAL * most
    flag = "--mem-fraction-static" if name == "sglang" else _OF_VLLM
    return utilization(servers.args, flag) * most


_OF_VLLM = "--gpu-memory-utilization"
_USUAL = 0.9
"""The share of a GPU's memory that a server takes where nothing else is said."""


def utilization(arguments: Sequence[str], name: str = _OF_VLLM) -> float:
    """The share of a GPU's memory that a server takes if started with these arguments.

    Args:
      name: the argument that says so.

    Raises:
      ConfigError: they say no number.
    """
    said = f"{_USUAL}"
    words = [word for text in arguments for word in text.split("=", 1)]
    for word, value in itertools.pairwise([*words, ""]):
        said = value if word.replace("_", "-") == name else said
    try:
        return float(said)
    except ValueError:
        raise ConfigError(f"{name} is a share such as 0.4, got {said!r}") from None


def update_settings(config: Config) -> grpo.Settings:
    """The numbers of one update."""
    actor = config.actor
    return grpo.Settings(
        clip_ratio_low=actor.clip_ratio_low,
        clip_ratio_high=actor.clip_ratio_high,
        clip_ratio_c=actor.clip_ratio_c,
        tau_pos=actor.tau_pos,
        tau_neg=actor.tau_neg,
        loss_agg_mode=actor.loss_agg_mode,
        loss_scale_factor=actor.loss_scale_factor or float(config.longest_response),
        entropy_coeff=actor.entropy_coeff,
        kl_loss_coef=actor.kl_loss_coef if actor.use_kl_loss else 0.0,
        kl_loss_type=actor.kl_loss_type,
        micro_batch_size=actor.micro_batch_size,
        correction=_correction(config.algorithm.rollout_correction),
        **actor.policy_loss.model_dump(),
    )


def _correction(section: RolloutCorrectionConfig | None) -> Correction | None:
    if section is None:
        return None
    return Correction(
        rollout_is=section.rollout_is,
        is_bounds=section.is_bounds,
        rollout_is_batch_normalize=section.rollout_is_batch_normalize,
        rejections=section.rejections,
        bypass_mode=section.bypass_mode,
        loss_type=section.loss_type,
    )


def needs_old_logprobs(config: Config) -> bool:
    """Whether the policy before the first update must be asked: for a penalty or a
    baseline, for the experts that it chooses, or because the trust region is centred on
    it in several updates."""
    algorithm = config.algorithm
    needs = plugins.estimator_of(algorithm).needs
    if algorithm.use_kl_in_reward or "logprobs" in needs:
        return True
    if config.actor.router_replay == "R2":
        return True
    correction = algorithm.rollout_correction
    bypass = correction is not None and correction.bypass_mode
    return updates_per_step(config) > 1 and not bypass


def updates_per_step(config: Config) -> int:
    """Optimizer steps of the policy per training step."""
    actor, prompts = config.actor, config.data.train_batch_size
    return actor.ppo_epochs * -(-prompts // (actor.ppo_mini_batch_size or prompts))


def critic_updates_per_step(config: Config) -> int:
    """Optimizer steps of the critic per training step."""
    how, prompts = critic(config).mini_batches, config.data.train_batch_size
    return how.epochs * -(-prompts // (how.num_prompts or prompts))
