"""Combinations of fields that make no run, each with what would fit."""

from collections.abc import Iterator, Mapping
from typing import Any

from jaxrl_llm.config import plugins
from jaxrl_llm.config.algorithm import (
    DEFAULT_LOSS,
    ESTIMATORS,
    LOSSES,
    OPTIMIZERS,
    Estimator,
)
from jaxrl_llm.config.names import ConfigError


def misfits(config) -> Iterator[str]:
    """Combinations of fields that make no run, each with what would fit."""
    actor, data, rollout = config.actor, config.data, config.rollout
    mini, batch = actor.ppo_mini_batch_size, data.train_batch_size
    if mini is not None and mini > batch:
        yield (
            f"actor.ppo_mini_batch_size is {mini} prompts but data.train_batch_size is "
            f"only {batch}; use at most {batch}"
        )
    yield from _algorithm_misfits(config)
    yield from _distillation_misfits(config)
    yield from _agent_misfits(config)
    if actor.keep_probabilities and actor.entropy_coeff:
        yield (
            f"actor.entropy_coeff is {actor.entropy_coeff}, whose gradient needs the "
            "logits; set actor.keep_probabilities to false"
        )
    for key, off in (("router_aux_loss_coef", 0.0), ("router_replay", "off")):
        if (value := getattr(actor, key)) != off and config.distillation:
            yield (
                f"actor.{key} is {value}, of which distillation knows nothing; leave "
                "one of them out"
            )
    kept = (actor.ref_refresh_steps, actor.ref_mesh, actor.lora and actor.lora.path)
    if actor.lora and "reference" in actor.offload and not any(kept):
        yield (
            "actor.offload has reference, but with actor.lora the reference is the "
            "policy without its adapters and takes no memory of its own; leave it out"
        )
    own = actor.lora and actor.lora.quantization
    if own and rollout.lora == "separate" and rollout.vllm.urls:
        yield (
            f"actor.lora.quantization is {own} and rollout.lora is separate, but the "
            "running servers of rollout.vllm.urls have the base as it was; use "
            "rollout.lora merge"
        )
    if rollout.lora == "separate" and not actor.lora:
        yield "rollout.lora is separate, but there is no actor.lora; leave it out"
    for name in ("vllm", "sglang", "jaxrl"):
        servers = getattr(rollout, name)
        if rollout.engine != name and servers != type(servers)():
            yield f"rollout.{name} is given, but rollout.engine is {rollout.engine}"
        ours = {"devices", "command", "args", "env", "port"} & servers.model_fields_set
        if servers.urls and ours:
            yield (
                f"rollout.{name}.urls are running servers, so rollout.{name}."
                f"{min(ours)}, which is for servers of our own, says nothing"
            )
    if rollout.engine != "jax" and (rollout.quantization or rollout.kv_cache_dtype):
        yield (
            f"rollout.quantization is {rollout.quantization} and "
            f"rollout.kv_cache_dtype {rollout.kv_cache_dtype}, which are of the jax "
            f"engine; tell servers by rollout.{rollout.engine}.args"
        )
    if rollout.engine in ("sglang", "jaxrl") and rollout.lora == "separate":
        yield (
            f"rollout.lora is separate, but rollout.engine {rollout.engine} is sent "
            "whole weights; set rollout.lora to merge"
        )
    if rollout.sglang.reproducible:
        yield (
            "rollout.sglang.reproducible is true, but SGLang draws from a state of its "
            "own; leave it out, or use rollout.engine=jax, jaxrl or vllm"
        )
    if rollout.jaxrl.reproducible:
        yield (
            "rollout.jaxrl.reproducible is true, which these servers are in any case; "
            "leave it out"
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
    longest = config.longest_sequence
    if actor.pack_length is not None and actor.pack_length < longest:
        yield (
            f"actor.pack_length is {actor.pack_length} but {config.sequence_keys} is "
            f"{longest}; use at least {longest}"
        )
    if actor.share_prompts and actor.pack_length is None:
        yield "actor.share_prompts needs actor.pack_length: tokens in a row"
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
        "critic.mesh": config.critic.mesh,
        "rollout.mesh": rollout.mesh,
    }
    if actor.ref_mesh:
        meshes["actor.ref_mesh"] = actor.ref_mesh
    if config.reward.model:
        meshes["reward.model.mesh"] = config.reward.model.mesh
    if config.distillation and config.distillation.teacher.mesh:
        meshes["distillation.teacher.mesh"] = config.distillation.teacher.mesh
    yield from mesh_misfits(meshes)
    for key in ("chat_template_file", "chat_template_kwargs", "template_time"):
        if getattr(data, key) and not data.chat_template:
            yield f"data.{key} is given, but data.chat_template is false"
    if data.more_val and data.val is None:
        yield "data.more_val is given, but data.val, the first of the sets, is not"
    more = (
        (f"{key}.{name}", source)
        for key in ("more_train", "more_val")
        for name, source in getattr(data, key).items()
    )
    for split, source in (("train", data.train), ("val", data.val), *more):
        kind = source.path.partition(":")[0] if source else ""
        if kind in ("reasoning_gym", "episodes") and not source.size:
            yield (
                f"data.{split}.size is needed for {kind}: how many questions to draw"
            )


def _agent_misfits(config: Any) -> Iterator[str]:
    """What makes no episodes, or has no meaning with them."""
    agent, turn = config.agent, config.rollout.max_response_length
    if agent is None:
        return
    if agent.max_tokens is not None and agent.max_tokens < turn:
        yield (
            f"agent.max_tokens is {agent.max_tokens}, of a whole episode, but "
            f"rollout.max_response_length, of one turn, is {turn}; raise the one or "
            "lower the other"
        )
    if agent.on_rewrite == "fork":
        if agent.max_tokens is None:
            yield (
                "agent.on_rewrite is fork, but agent.max_tokens is not given: a "
                "conversation counts in it again with every new context; give it, for "
                f"agent.max_turns {agent.max_turns} that are as long as they may be "
                f"{_of_contexts(config)}"
            )
        if config.actor.share_prompts:
            yield (
                "actor.share_prompts is true, but with agent.on_rewrite=fork episodes "
                "go on from other prompts than they begin with; set it to false"
            )
    if not agent.tools and not agent.environment:
        yield "agent has neither tools nor an environment; give one of them"
    if agent.params and agent.environment is None:
        yield "agent.params are for agent.environment, which is not given"
    if not config.data.chat_template:
        yield (
            "data.chat_template is false, but an agent's turns are told apart by the "
            "chat template; set it to true"
        )
    if config.reward.overlong_buffer:
        yield (
            "reward.overlong_buffer is about the length of one response, and with an "
            "agent there are several; leave it out"
        )


def _of_contexts(config: Any) -> int:
    """Tokens behind the first prompt of an episode in which every turn has a context of
    its own, the answers of the environment left out."""
    turns, turn = config.agent.max_turns, config.rollout.max_response_length
    again = (turns - 1) * config.data.max_prompt_length
    return again + turn * turns * (turns + 1) // 2


def mesh_misfits(meshes: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the sizes of meshes, by the keys of these."""
    for name, given in meshes.items():
        sizes = given.model_dump()
        for axis, size in sizes.items():
            if size == 0:
                yield f"{name}.{axis} is 0; use 1 for an axis that is not used"
        if list(sizes.values()).count(-1) > 1:
            yield f"{name} is {sizes}; only one axis may be -1 (what is left)"


def _algorithm_misfits(config) -> Iterator[str]:
    """Combinations of a `Config`'s algorithm that make no run, with what would fit."""
    algorithm, actor, rollout = config.algorithm, config.actor, config.rollout
    loss = LOSSES.get(actor.policy_loss.loss_mode)
    estimator = ESTIMATORS.get(algorithm.adv_estimator)
    if estimator and learns_from_rewards(config):
        yield from estimator_misfits(config, estimator)
    if algorithm.filter_groups and rollout.n == 1:
        yield (
            "algorithm.filter_groups is given but rollout.n is 1, and one response "
            "alone never differs; use at least 2"
        )
    if (
        algorithm.kl_ctrl != type(algorithm.kl_ctrl)()
        and not algorithm.use_kl_in_reward
    ):
        yield "algorithm.kl_ctrl needs algorithm.use_kl_in_reward: true"
    refresh = actor.ref_refresh_steps
    if refresh is not None and not uses_kl(config):
        yield (
            f"actor.ref_refresh_steps is {refresh}, but neither actor.use_kl_loss nor "
            "algorithm.use_kl_in_reward keeps a reference"
        )
    if loss and loss.aggregation not in (None, actor.loss_agg_mode):
        yield (
            f"actor.policy_loss.loss_mode is {loss.name}, a mean over responses; set "
            f"actor.loss_agg_mode={loss.aggregation}, got {actor.loss_agg_mode}"
        )
    if actor.loss_scale_factor and actor.loss_agg_mode != "seq-mean-token-sum-norm":
        yield (
            f"actor.loss_scale_factor is {actor.loss_scale_factor} but only "
            f"actor.loss_agg_mode=seq-mean-token-sum-norm reads it"
        )
    correction = algorithm.rollout_correction
    cut = rollout.top_k != -1 or rollout.top_p < 1 or rollout.min_p > 0
    if correction and cut and rollout.engine == "vllm":
        yield (
            "algorithm.rollout_correction compares log-probabilities from before top_k "
            f"{rollout.top_k}, top_p {rollout.top_p} and min_p {rollout.min_p} cut "
            "anything off, which vLLM does not tell; set rollout.top_k=-1, "
            "rollout.top_p=1 and rollout.min_p=0, or rollout.engine=jax, or leave the "
            "correction out"
        )
    mode = actor.policy_loss.loss_mode
    if correction and correction.bypass_mode and mode != DEFAULT_LOSS:
        yield (
            "algorithm.rollout_correction.bypass_mode brings its own loss; set "
            f"actor.policy_loss.loss_mode={DEFAULT_LOSS}, got {mode}"
        )


def estimator_misfits(config, estimator: Estimator) -> Iterator[str]:
    """What of a configuration does not fit its estimator, and what would.

    Args:
      estimator: of the table, or of a user's own function once that is known.
    """
    algorithm, name = config.algorithm, estimator.name
    if config.rollout.n == 1 and estimator.group:
        yield (
            f"rollout.n is 1 but algorithm.adv_estimator={name} compares the "
            "responses of a group; use at least 2, or "
            f"{_those(lambda e: not e.group)}"
        )
    if algorithm.gamma != 1 and not estimator.discounts:
        yield (
            f"algorithm.gamma is {algorithm.gamma} but algorithm.adv_estimator="
            f"{name} does not discount; use gamma 1, or one of "
            f"{_those(lambda e: e.discounts)}"
        )
    if not algorithm.norm_adv_by_std_in_grpo and not estimator.normalises:
        yield (
            "algorithm.norm_adv_by_std_in_grpo is false, but algorithm.adv_estimator="
            f"{name} does not divide by a deviation; use one of "
            f"{_those(lambda e: e.normalises)}"
        )
    for need, how in (
        ("rewards_by_function", "each reward function by itself"),
        ("turn_rewards", "the rewards of turns"),
    ):
        if need in estimator.needs and algorithm.use_kl_in_reward:
            yield (
                "algorithm.use_kl_in_reward has no meaning with "
                f"algorithm.adv_estimator={name}, which reads {how}; set "
                "actor.use_kl_loss"
            )
    if "turn_rewards" in estimator.needs and config.agent is None:
        yield (
            f"algorithm.adv_estimator={name} judges the turns of episodes, and there "
            "is no agent; give one, or use grpo"
        )
    correction = algorithm.rollout_correction
    weighs = correction and correction.rollout_is
    if weighs and "sum_pi_squared" in estimator.needs:
        yield (
            f"algorithm.adv_estimator={name} is not defined with importance "
            "weights here; set algorithm.rollout_correction.rollout_is=null"
        )
    yield from _critic_misfits(config, estimator)


def _those(are) -> str:
    return ", ".join(name for name, record in ESTIMATORS.items() if are(record))


def learns_from_rewards(config) -> bool:
    """Whether rewards become advantages; else they are measured at most."""
    return config.distillation is None or config.distillation.with_rewards


def _distillation_misfits(config) -> Iterator[str]:
    """What has no meaning with a teacher, or none without one."""
    reward, placement, how = config.reward, config.placement, config.distillation
    rewarding = config.agent and config.agent.environment
    judged = bool(reward.functions or reward.model or rewarding)
    if not judged and learns_from_rewards(config):
        yield "reward.functions is empty; give at least one, or a model"
    if how is None:
        if placement.teacher is not None:
            yield (
                f"placement.teacher is {placement.teacher}, but there is no "
                "distillation.teacher to place"
            )
        return
    if not judged and config.data.val is not None:
        yield (
            "data.val is given, but nothing says which answers are right; give "
            "reward.functions, which distillation.with_rewards=false only measures"
        )
    for key, mode in (("topk", "forward_kl_topk"), ("jsd_beta", "jsd")):
        given, default = getattr(how, key), type(how).model_fields[key].default
        if given != default and how.mode != mode:
            yield (
                f"distillation.{key} is {given}, which only distillation.mode={mode} "
                f"reads, got {how.mode}"
            )
    if how.mode == "jsd":
        yield from _misfits_within(config)
    if config.actor.keep_probabilities and how.mode != "reverse_kl":
        yield (
            f"actor.keep_probabilities is true, but distillation.mode={how.mode} needs "
            "the logits; set it to false"
        )
    if not how.with_rewards:
        yield from _unread_without_rewards(config)


def _misfits_within(config) -> Iterator[str]:
    """What does not fit a teacher that the update itself asks."""
    teacher, placement = config.distillation.teacher, config.placement
    other = "or choose distillation.mode=forward_kl_topk, which asks from elsewhere"
    if teacher.mesh not in (None, config.actor.mesh):
        yield (
            f"distillation.teacher.mesh is {teacher.mesh.model_dump()}, but with "
            f"distillation.mode=jsd the update asks the teacher; leave it out, {other}"
        )
    if placement.teacher not in (None, placement.actor):
        yield (
            f"placement.teacher is {placement.teacher}, but with distillation.mode=jsd "
            f"the update, on {placement.actor}, asks the teacher; leave it out, {other}"
        )
    if teacher.micro_batch_size is not None:
        yield (
            f"distillation.teacher.micro_batch_size is {teacher.micro_batch_size}, but "
            "with distillation.mode=jsd the teacher reads the update's micro-batches; "
            "set actor.micro_batch_size"
        )


def _unread_without_rewards(config) -> Iterator[str]:
    """Settings about rewards that are set where these are not learned from."""
    algorithm, policy = config.algorithm, config.actor.policy_loss
    names = ["adv_estimator", "adv_params", "norm_adv_by_std_in_grpo", "gamma", "lam"]
    names += ["use_kl_in_reward", "filter_groups", "pf_ppo"]
    given = {f"algorithm.{name}": getattr(algorithm, name) for name in names}
    default = {f"algorithm.{name}": getattr(type(algorithm)(), name) for name in names}
    given |= {"reward.overlong_buffer": config.reward.overlong_buffer}
    given |= {"trainer.critic_warmup": config.trainer.critic_warmup or None}
    if config.distillation.mode != "reverse_kl":
        given["algorithm.rollout_correction"] = algorithm.rollout_correction
        given["actor.policy_loss.loss_mode"] = policy.loss_mode
        default["actor.policy_loss.loss_mode"] = DEFAULT_LOSS
    for key, value in given.items():
        if value != default.get(key):
            shown = value if isinstance(value, str | int | float) else "given"
            yield (
                f"{key} is {shown}, but with distillation.with_rewards=false nothing "
                "is learned from rewards; leave it out, or set with_rewards to true"
            )
    if config.critic != type(config.critic)():
        yield (
            "critic: a critic learns from rewards; leave it out, or set "
            "distillation.with_rewards to true"
        )


def uses_kl(config) -> bool:
    """Whether a reference policy is kept."""
    return config.actor.use_kl_loss or config.algorithm.use_kl_in_reward


def _critic_misfits(config, estimator: Estimator) -> Iterator[str]:
    """What has a meaning only with a critic, or none with one."""
    critic, algorithm, trainer = config.critic, config.algorithm, config.trainer
    if not estimator.has_critic:
        needs = "needs algorithm.adv_estimator="
        needs += f"{_those(lambda e: e.has_critic)}, not {estimator.name}"
        if critic != type(critic)():
            yield f"critic: a critic {needs}"
        if algorithm.lam != 1:
            yield f"algorithm.lam is {algorithm.lam}, which {needs}"
        if algorithm.pf_ppo:
            yield f"algorithm.pf_ppo {needs}"
        if trainer.critic_warmup:
            yield f"trainer.critic_warmup is {trainer.critic_warmup}, which {needs}"
        return
    steps = trainer.total_training_steps
    if trainer.critic_warmup >= steps:
        yield (
            f"trainer.critic_warmup is {trainer.critic_warmup}, but with "
            f"trainer.total_training_steps {steps} the policy would never be updated"
        )
    mini, batch = critic.ppo_mini_batch_size, config.data.train_batch_size
    if mini is not None and mini > batch:
        yield (
            f"critic.ppo_mini_batch_size is {mini} prompts but data.train_batch_size "
            f"is only {batch}; use at most {batch}"
        )
    if critic.optim.lr_warmup_steps > steps:
        yield (
            f"critic.optim.lr_warmup_steps is {critic.optim.lr_warmup_steps} but "
            f"trainer.total_training_steps is {steps}"
        )
    if critic.model.revision is not None and critic.model.path is None:
        yield "critic.model.revision needs critic.model.path"


def check_functions(config: Any) -> dict[str, str]:
    """Finds the functions of the user's own that a configuration names, before anything
    is read or written, and returns their `fingerprints`.

    Raises:
      ConfigError: there is no such function, it asks for what it cannot get, what it
        asks for does not fit the rest of the configuration, or its source is not that
        of the fingerprint that the configuration has.
    """
    policy_loss = config.actor.policy_loss
    plugins.loss(policy_loss.loss_mode, policy_loss.params)
    own = plugins.estimator_of(config.algorithm)
    for key, section in _optimizers(config):
        check_optimizer(key, section)
    of_own = own.name not in ESTIMATORS and learns_from_rewards(config)
    if of_own and (bad := [*estimator_misfits(config, own)]):
        raise ConfigError("; ".join(bad))
    found = fingerprints(config)
    for name, known in config.function_sources.items():
        if found.get(name) != known:
            raise ConfigError(
                f"function_sources: {name} was {known}, but is {found.get(name)}: its "
                "source has changed; go on with the function as it was, or leave "
                "function_sources out and choose another output_dir"
            )
    return found


def fingerprints(config: Any) -> dict[str, str]:
    """A hash of the source of every function of the user's own that learning calls, by
    its module:function."""
    return {
        name: plugins.fingerprint(plugins.find(key, name))
        for key, name in own_functions(config).items()
    }


def own_functions(config: Any) -> dict[str, str]:
    """The functions of the user's own that learning calls, as module:function, by the
    keys that name them."""
    names = {
        "actor.policy_loss.loss_mode": config.actor.policy_loss.loss_mode,
        "algorithm.adv_estimator": config.algorithm.adv_estimator,
        **{f"{key}.name": section.name for key, section in _optimizers(config)},
    }
    builtin = LOSSES.keys() | ESTIMATORS.keys() | OPTIMIZERS.keys()
    return {key: name for key, name in names.items() if name not in builtin}


def _optimizers(config: Any) -> Iterator[tuple[str, Any]]:
    yield "actor.optim", config.actor.optim
    yield "critic.optim", config.critic.optim


def check_optimizer(key: str, section: Any) -> None:
    """Raises ConfigError also for a setting that the optimizer does not read."""
    function = plugins.optimizer(key, section.name, section.params)
    takes = {k for k in plugins.named_parameters(function) if k not in section.params}
    for field, names in (
        ("betas", {"b1", "b2"}),
        *((n, {n}) for n in ("eps", "weight_decay", "mu_dtype")),
    ):
        default = type(section).model_fields[field].default
        if getattr(section, field) != default and takes.isdisjoint(names):
            raise ConfigError(
                f"{key}.{field} is {getattr(section, field)}, but {section.name} takes "
                f"no {' or '.join(sorted(names))} from it"
            )
