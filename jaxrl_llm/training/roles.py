"""The roles of a run, each made from its configuration, and the models that they are
opened from."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import jax

from jaxrl_llm import models
from jaxrl_llm.config.checks import uses_kl
from jaxrl_llm.config.names import ConfigError
from jaxrl_llm.config.schema import (
    Config,
)
from jaxrl_llm.config.schema_offline import OfflineConfig
from jaxrl_llm.config.schema_training import TrainedConfig
from jaxrl_llm.roles import optimizer
from jaxrl_llm.roles.actor import Actor
from jaxrl_llm.roles.critic import Critic
from jaxrl_llm.roles.policy import Policy
from jaxrl_llm.roles.reference import Reference
from jaxrl_llm.roles.reward_model import RewardModel
from jaxrl_llm.roles.sharded_model import ShardedModel
from jaxrl_llm.roles.teacher import Teacher
from jaxrl_llm.training import settings
from jaxrl_llm.training.randomness import Purpose, seed


def served_adapters(config: Config) -> models.Lora | None:
    """The adapters that the engine takes beside the weights, if it takes any."""
    separate = config.rollout.lora == "separate"
    return settings.lora(config.actor.lora) if separate else None


def shared(config: Config, source: models.WeightSource) -> models.WeightSource:
    """The policy's weights for all that read them: the same arrays for all, if they are
    never changed; quantised for those that keep them so."""
    made = models.Quantising(source)
    return made if config.actor.lora is None else models.ReadOnce(made)


def actor_of(
    config: Config,
    source: models.WeightSource,
    on: jax.sharding.Mesh,
    reference_on: jax.sharding.Mesh | None = None,
    *,
    teacher: Teacher | None = None,
) -> Actor:
    """The policy of a run, with a reference if a KL term asks for one.

    Args:
      source: of the weights to start from, see `shared`.
      reference_on: the mesh of the reference; `on` if not given.
      teacher: of `teacher_of`; without one, the policy that is not to be trained.

    Raises:
      ValueError: the model or its rows cannot be split evenly over a mesh, or
        `actor.keep_probabilities` is not for this model.
    """
    actor, how, arch = config.actor, settings.policy(config), source.arch
    _check_balance(actor.router_aux_loss_coef, arch)
    if actor.router_replay != "off" and arch.moe is None:
        raise ConfigError(
            f"actor.router_replay is {actor.router_replay}, but a {arch.model_type} "
            "model has no experts; set it to off"
        )
    adapters = adapters_of(config, "actor", arch)
    policy, reference = Policy(arch, on, how, keys=settings.keys("actor.mesh")), None
    if uses_kl(config):
        # The initial policy is the base, if its adapters change nothing yet.
        given = actor.lora and actor.lora.path
        own = adapters if actor.ref_refresh_steps or given else None
        judge = policy
        if reference_on is not None and reference_on != on or how.lora and not own:
            keys = settings.keys("actor.ref_mesh" if actor.ref_mesh else "actor.mesh")
            alike = dataclasses.replace(how, lora=how.lora if own else None)
            judge = Policy(arch, reference_on or on, alike, keys=keys)
        reference = Reference(
            judge,
            own if how.lora else source,
            base=source if how.lora else None,
            offload="reference" in actor.offload,
        )
    steps = config.trainer.total_training_steps - config.trainer.critic_warmup
    numbers = settings.optim(actor.optim), steps, settings.updates_per_step(config)
    return Actor(
        policy,
        source,
        settings.actor(config),
        optimizer=optimizer.make(*numbers),
        schedule=optimizer.schedule(*numbers),
        reference=reference,
        teacher=teacher,
        adapters=adapters,
    )


def _check_balance(coef: float, arch: models.Architecture) -> None:
    """Raises ConfigError if there is nothing to balance."""
    if coef and (arch.moe is None or arch.moe.score == "sigmoid"):
        has = "no experts" if arch.moe is None else "experts with a sigmoid each"
        raise ConfigError(
            f"actor.router_aux_loss_coef is {coef}, but a {arch.model_type} model has "
            f"{has}; the loss is one of a softmax over experts: set it to 0"
        )


def adapters_of(
    config: Config | OfflineConfig,
    role: Literal["actor", "critic", "learner"],
    arch: models.Architecture,
) -> models.WeightSource | None:
    """The adapters that a role begins with, if it has any.

    Args:
      arch: of the weights beside them.

    Raises:
      ConfigError: those that it is to begin with are not of the form that it trains.
      ValueError: there are none, or they cannot be read.
    """
    section = getattr(config, role).lora
    if section is None:
        return None
    lora, key = settings.lora(section), f"{role}.lora"
    fit = models.modules_of(arch)
    if missing := [f"{m}_proj" for m in lora.modules if m not in fit]:
        raise ConfigError(
            f"{key}.modules has {', '.join(missing)}, but the model has experts there, "
            "whose adapters are not supported; name some of "
            f"{', '.join(f'{m}_proj' for m in fit)}"
        )
    if section.path is None:
        whose = {"actor": Purpose.ACTOR_ADAPTERS, "critic": Purpose.CRITIC_ADAPTERS}
        purpose = whose.get(role, Purpose.LEARNER_ADAPTERS)
        return models.NewAdapters(arch, lora, seed(config.seed, purpose, 0))
    found = models.open_adapter(section.path, arch)
    here, there = (
        dataclasses.asdict(one)
        | {"modules": [f"{m}_proj" for m in models.lora.MODULES if m in one.modules]}
        for one in (lora, found.lora)
    )
    differ = {name: value for name, value in there.items() if value != here[name]}
    if differ:
        has = ", ".join(f"{key}.{name} to {value}" for name, value in differ.items())
        raise ConfigError(
            f"{key}.path {section.path} has adapters of another form; set {has}"
        )
    return found


def adapter_notes(
    config: Config | OfflineConfig,
    roles: Mapping[str, TrainedConfig],
    arch: models.Architecture,
) -> Iterator[str]:
    """What is to be known of adapters that are given, a line each.

    Args:
      roles: those that may have such, by their keys.
    """
    for role, section in roles.items():
        if not (section.lora and section.lora.path):
            continue
        key, path = f"{role}.lora.path", section.lora.path
        found = models.open_adapter(path, arch)
        if found.dropout:
            yield (
                f"{key} {path} was trained with lora_dropout {found.dropout}; here "
                "nothing is dropped"
            )
        base = config.model.path
        if found.base and Path(found.base).absolute() != Path(base).absolute():
            yield (
                f"{key} {path} says that it belongs to {found.base}; it is put beside "
                f"model.path {base}"
            )


def check_base(
    config: Config | OfflineConfig, role: str, source: models.Checkpoint
) -> None:
    """Raises ConfigError if adapters are to be trained beside an adapter."""
    if getattr(config, role).lora and source.adapter is not None:
        raise ConfigError(
            f"model.path {config.model.path} is an adapter of {source.adapter.base}, "
            f"and {role}.lora asks for another one. To go on with it, let model.path "
            f"be that model and {role}.lora.path the adapter; else merge it first: "
            "jaxrl convert --merge ADAPTER DIRECTORY"
        )


def teacher_of(
    config: Config,
    source: models.WeightSource,
    num_tokens: int,
    on: jax.sharding.Mesh,
) -> Teacher:
    """The teacher of a run.

    Args:
      source: of its weights, such as of `open_teacher`.
      num_tokens: of the vocabulary that it shares with the policy.

    Raises:
      ValueError: the model or its rows cannot be split evenly over the mesh.
    """
    section = config.distillation
    keys = settings.keys("distillation.teacher.mesh")
    policy = Policy(source.arch, on, settings.teacher(config, num_tokens), keys=keys)
    topk = section.topk if section.mode == "forward_kl_topk" else None
    return Teacher(policy, source, topk=topk, offload=section.teacher.offload)


def critic_of(
    config: Config, source: models.WeightSource, on: jax.sharding.Mesh
) -> Critic:
    """The value model of a run.

    Args:
      source: of the weights to start from, such as of `open_critic`.

    Raises:
      ValueError: the model or its rows cannot be split evenly over the mesh.
    """
    how, keys = settings.value_model(config), settings.keys("critic.mesh")
    adapters = adapters_of(config, "critic", source.arch)
    model = ShardedModel(source.arch, on, how, head="value", keys=keys)
    steps, count = (
        config.trainer.total_training_steps,
        settings.critic_updates_per_step(config),
    )
    numbers = settings.optim(config.critic.optim), steps, count
    return Critic(
        model,
        source,
        settings.critic(config),
        optimizer=optimizer.make(*numbers),
        schedule=optimizer.schedule(*numbers),
        adapters=adapters,
    )


def reward_model_of(
    config: Config, source: models.Classifier, on: jax.sharding.Mesh
) -> RewardModel:
    """The reward model of a run.

    Args:
      source: of `open_reward_model`.

    Raises:
      ValueError: the model or its rows cannot be split evenly over the mesh.
    """
    how, keys = settings.reward_model(config), settings.keys("reward.model.mesh")
    return RewardModel(
        ShardedModel(source.arch, on, how, head="value", keys=keys),
        source,
        most_responses=config.data.train_batch_size * config.rollout.n,
        weight=config.reward.model.weight,
        offload=config.reward.model.offload,
    )


def open_critic(config: Config, source: models.WeightSource) -> models.WeightSource:
    """The checkpoint the critic starts from: the policy's, unless `critic.model.path`
    says otherwise.

    Raises:
      ConfigError: the critic's model does not fit the policy's.
      ValueError: there is no such model.
    """
    model = config.critic.model
    if model.path is None:
        return source
    found = models.open(model.path, revision=model.revision)
    _check_same_tokens(f"critic.model.path {model.path}", found, source)
    wanted, longest = source.arch.vocab_size, found.arch.max_positions
    if found.arch.vocab_size != wanted:
        raise ConfigError(
            f"critic.model.path {model.path} has {found.arch.vocab_size} tokens in its "
            f"vocabulary, the policy {wanted}; they must read the same tokens"
        )
    needed = config.longest_sequence
    if needed > longest:
        raise ConfigError(
            f"critic.model.path {model.path} has {longest} positions, but "
            f"{config.sequence_keys} is {needed}"
        )
    return found


def open_reward_model(config: Config, source: models.Checkpoint) -> models.Classifier:
    """The checkpoint of the reward model, if it can judge what the policy says.

    Args:
      source: the policy's.

    Raises:
      ConfigError: there is no such model, or it does not fit the policy's.
    """
    section = config.reward.model
    key = f"reward.model.path {section.path}"
    try:
        found = models.open_classifier(section.path, revision=section.revision)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from error
    arch, wanted = found.arch, source.arch.vocab_size
    if arch.vocab_size != wanted:
        raise ConfigError(
            f"{key} has {arch.vocab_size} tokens in its vocabulary, the policy "
            f"{wanted}; they must read the same tokens"
        )
    _check_same_tokens(key, found, source)
    needed = config.longest_sequence
    if needed > arch.max_positions:
        raise ConfigError(
            f"{key} has {arch.max_positions} positions, but "
            f"{config.sequence_keys} is {needed}"
        )
    return found


def open_teacher(
    config: Config, source: models.Checkpoint
) -> tuple[models.Checkpoint, int]:
    """The checkpoint of the teacher, and how many tokens its vocabulary has, which is
    the policy's. Rows of an output matrix beyond these are padding.

    Args:
      source: the policy's.

    Raises:
      ConfigError: there is no such model, or it does not fit the policy's.
    """
    section = config.distillation
    key = f"distillation.teacher.path {section.teacher.path}"
    try:
        found = models.open(section.teacher.path, revision=section.teacher.revision)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from error
    if found.tokenizer is None:
        raise ConfigError(
            f"{key} has no tokenizer, so that nothing says that its tokens are the "
            "policy's; copy the files of one into it"
        )
    _check_same_tokens(key, found, source)
    own, given = found.tokenizer.get_vocab(), source.tokenizer.get_vocab()
    for lacks, has, missing in (
        ("it", "the policy", given.keys() - own.keys()),
        ("the policy", "the teacher", own.keys() - given.keys()),
    ):
        if missing:
            both = own | given
            first = min(missing, key=both.__getitem__)
            raise ConfigError(
                f"{key} has another vocabulary than the policy: {lacks} has no token "
                f"{first!r}, which is {both[first]} of {has}; a teacher must read and "
                "write the same tokens"
            )
    count = 1 + max(given.values())
    for whose, arch in ((key, found.arch), ("model.path", source.arch)):
        if count > arch.vocab_size:
            raise ConfigError(
                f"{whose}: the output matrix has {arch.vocab_size} rows, fewer than "
                f"the {count} tokens of the vocabulary"
            )
    if section.mode == "forward_kl_topk" and section.topk >= count:
        raise ConfigError(
            f"distillation.topk is {section.topk}, but the vocabulary has only {count} "
            "tokens"
        )
    needed = config.longest_sequence
    if needed > found.arch.max_positions:
        raise ConfigError(
            f"{key} has {found.arch.max_positions} positions, but "
            f"{config.sequence_keys} is {needed}"
        )
    return found, count


def _check_same_tokens(
    key: str, found: models.Checkpoint | models.Classifier, source: models.Checkpoint
) -> None:
    """Raises ConfigError if a model that reads the policy's tokens knows one of them as
    another text, or has no embedding of it."""
    if found.tokenizer is None or source.tokenizer is None:
        return
    own, given = found.tokenizer.get_vocab(), source.tokenizer.get_vocab()
    texts = {token: text for text, token in own.items()}
    for text, token in sorted(given.items(), key=lambda item: item[1]):
        if own.get(text, token) != token:
            raise ConfigError(
                f"{key}: {text!r} is token {own[text]}, of the policy {token}; they "
                "must read the same tokens"
            )
        if texts.get(token, text) != text:
            raise ConfigError(
                f"{key}: token {token} is {texts[token]!r}, of the policy {text!r}; "
                "they must read the same tokens"
            )
