"""veRL's settings as a configuration."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxrl_llm.bridges.draft import Draft
from jaxrl_llm.config.algorithm import DEFAULT_LOSS, ESTIMATORS, LOSSES
from jaxrl_llm.config.peers.verl import DISTILLATION, OVERLONG, VERL
from jaxrl_llm.data.sources import Source, first_row

_ROLLOUT, _ACTOR = "actor_rollout_ref.rollout.", "actor_rollout_ref.actor."
_MODEL = "actor_rollout_ref.model."
_CORRECTION = "algorithm.rollout_correction."
_DTYPES = {
    "bf16": "bfloat16", "bfloat16": "bfloat16",
    "fp32": "float32", "float32": "float32",
}  # fmt: skip
_LOGGERS = ("tensorboard", "wandb", "mlflow", "trackio")

DEFAULTS = {
    "data.train_batch_size": 1024,
    f"{_ROLLOUT}n": 1,
    f"{_ACTOR}ppo_mini_batch_size": 256,
    "algorithm.adv_estimator": "gae",
}
"""What veRL does where a key is not given and we do something else."""

_REWARDS = {
    "openai/gsm8k": "gsm8k",
    "lighteval/MATH": "math",
    "DigitalLearningGmbH/MATH-lighteval": "math",
    "HuggingFaceH4/MATH-500": "math",
}
"""Built-in rewards by the column data_source, as veRL's default_compute_score has."""


def converted(given: Mapping[str, Any]) -> Draft:
    """A draft of what veRL's settings are here.

    Args:
      given: by dotted key; see `foreign.read`.
    """
    draft = Draft(VERL, given)
    for part in (
        _run, _model, _data, _rollout, _actor, _distillation, _algorithm, _critic,
        _rewards, _length,
    ):  # fmt: skip
        part(draft)
    draft.take_over()
    return draft


def _run(draft: Draft) -> None:
    project = draft.get("trainer.project_name", "verl")
    name = draft.get("trainer.experiment_name", "run")
    default = f"runs/{project}/{name}"
    draft.put(
        "output_dir",
        draft.get("trainer.default_local_dir", default),
        "trainer.default_local_dir, or project_name and experiment_name",
    )
    if "trainer.project_name" in draft.given:
        draft.put("trainer.project", project, "trainer.project_name")
    for name in (f"{_ACTOR}data_loader_seed", f"{_ROLLOUT}seed", "data.seed"):
        if (seed := draft.get(name)) is not None:
            draft.put("seed", seed, name)


def _model(draft: Draft) -> None:
    if path := draft.get(f"{_MODEL}path"):
        draft.put("model.path", path, f"{_MODEL}path")
    for name in ("data.tokenizer", f"{_MODEL}tokenizer_path"):
        if (tokenizer := draft.get(name)) and tokenizer != path:
            draft.put("model.tokenizer", tokenizer, name)
    for section, key in ((_MODEL, "actor.lora"), ("critic.model.", "critic.lora")):
        rank, alpha = (
            draft.get(f"{section}lora_{name}", default)
            for name, default in (("rank", 0), ("alpha", 16))
        )
        modules = draft.get(f"{section}target_modules", "all-linear")
        if rank:
            draft.put(f"{key}.rank", rank, f"{section}lora_rank")
            draft.put(f"{key}.alpha", alpha, f"{section}lora_alpha")
            whole = "all" if modules == "all-linear" else modules
            draft.put(f"{key}.modules", whole, f"{section}target_modules")
    if begin := draft.get(f"{_MODEL}lora_adapter_path"):
        draft.put("actor.lora.path", begin, f"{_MODEL}lora_adapter_path")
    if draft.get(f"{_MODEL}custom_chat_template"):
        draft.left[f"{_MODEL}custom_chat_template"] = (
            "write it to a file and name that in data.chat_template_file"
        )


def _data(draft: Draft) -> None:
    for split in ("train", "val"):
        files = draft.get(f"data.{split}_files")
        files = files if isinstance(files, list) else [files] if files else []
        for number, path in enumerate(files):
            where = f"data.{split}"
            if number:
                stem = re.sub(r"\W+", "_", Path(str(path)).stem)
                where = f"data.more_{split}.{stem}_{number}"
            draft.put(f"{where}.path", path, f"data.{split}_files")
            key = draft.get("data.prompt_key", "prompt")
            if key != "prompt":
                draft.put(f"{where}.prompt_key", key, "data.prompt_key")
        name = f"data.{split}_max_samples"
        if files and (size := draft.number(name, -1)) > 0:
            draft.put(f"data.{split}.size", size, f"{name}, the first of them")
    _taken(draft, "data.train_batch_size")
    how, note = "error", "data.truncation"
    match truncation := draft.get(note, "error"):
        case "left":
            how = "truncate"
        case "right" | "middle":
            draft.leave(note, "data.overlong_prompts: truncate keeps the end")
            draft.todo.append(
                f"data.truncation is {truncation}; here data.overlong_prompts is "
                "error, drop, or truncate, which keeps the end"
            )
    if draft.get("data.filter_overlong_prompts"):
        how, note = "drop", "data.filter_overlong_prompts"
    draft.put("data.overlong_prompts", how, note)
    if kwargs := draft.section("data.apply_chat_template_kwargs"):
        draft.put(
            "data.chat_template_kwargs", kwargs, "data.apply_chat_template_kwargs"
        )


def _taken(draft: Draft, name: str, key: str | None = None) -> Any:
    """A value that means the same here; veRL's default if it is not given."""
    value = draft.get(name)
    value = DEFAULTS[name] if value is None else value
    draft.put(key or name, value, name)
    return value


def _rollout(draft: Draft) -> None:
    _taken(draft, f"{_ROLLOUT}n", "rollout.n")
    for name, key in (
        (f"{_ROLLOUT}prompt_length", "data.max_prompt_length"),
        (f"{_ROLLOUT}response_length", "rollout.max_response_length"),
        ("data.max_response_length", "rollout.max_response_length"),
    ):
        if length := draft.get(name):
            draft.put(key, length, name)
    _dtype(draft, f"{_ROLLOUT}dtype", "rollout.dtype")
    for name, axis in (("tensor_model_parallel", "tensor"), ("data_parallel", "data")):
        name = f"{_ROLLOUT}{name}_size"
        if (size := draft.number(name, 1)) > 1:
            draft.put(f"rollout.mesh.{axis}", size, name)
    if tokens := draft.get(f"{_ROLLOUT}max_num_batched_tokens"):
        name = f"{_ROLLOUT}max_num_batched_tokens"
        draft.put("rollout.prefill_tokens", tokens, name)
    held = f"{_ROLLOUT}val_kwargs."
    if draft.get(f"{held}do_sample", False):
        draft.put("val.greedy", False, f"{held}do_sample")
        for name in ("n", "temperature", "top_k", "top_p"):
            if (value := draft.get(f"{held}{name}")) is not None:
                draft.put(f"val.{name}", value, f"{held}{name}")
        if "val.temperature" not in draft.values:
            draft.put("val.temperature", 0, f"{held}temperature")
    else:
        for name in ("n", "temperature", "top_k", "top_p"):
            if draft.get(f"{held}{name}") is not None:
                draft.leave(f"{held}{name}", "val.greedy answers once, greedily")


def _dtype(draft: Draft, name: str, key: str) -> None:
    if (given := draft.get(name)) is None:
        return
    if str(given) in _DTYPES:
        draft.put(key, _DTYPES[str(given)], name)
    else:
        draft.leave(name, f"{key} is bfloat16 or float32")


def _actor(draft: Draft) -> None:
    mini = _taken(draft, f"{_ACTOR}ppo_mini_batch_size", "actor.ppo_mini_batch_size")
    batch = draft.values.get("data.train_batch_size")
    default = f"{_ACTOR}ppo_mini_batch_size" not in draft.given
    if mini == batch or default and isinstance(batch, int) and mini > batch:
        del draft.values["actor.ppo_mini_batch_size"]  # one update a step
    both = draft.get(f"{_ACTOR}clip_ratio")
    for side in ("low", "high"):
        value = draft.get(f"{_ACTOR}clip_ratio_{side}", both)
        if value is not None:
            draft.put(f"actor.clip_ratio_{side}", value, f"{_ACTOR}clip_ratio_{side}")
    length = draft.number(f"{_ACTOR}ppo_max_token_len_per_gpu", 16384)
    if draft.get(f"{_ACTOR}use_dynamic_bsz"):
        note = f"{_ACTOR}ppo_max_token_len_per_gpu, with use_dynamic_bsz"
        draft.put("actor.pack_length", length, note)
    if (clip := draft.get(f"{_ACTOR}grad_clip")) is not None:
        draft.put("actor.optim.clip_grad", clip, f"{_ACTOR}grad_clip")
    _optimizer(draft, f"{_ACTOR}optim.", "actor.optim")
    _dtype(draft, f"{_ACTOR}fsdp_config.dtype", "actor.dtype")
    for name, axis in (
        ("ulysses_sequence_parallel_size", "context"),
        ("fsdp_config.fsdp_size", "fsdp"),
    ):
        if (size := draft.number(f"{_ACTOR}{name}", -1)) > 1:
            draft.put(f"actor.mesh.{axis}", size, f"{_ACTOR}{name}")
    name = "actor_rollout_ref.ref.ulysses_sequence_parallel_size"
    if (size := draft.number(name, 1)) > 1:
        draft.put("actor.ref_mesh.context", size, name)
    if draft.get(f"{_ACTOR}use_prefix_grouper") and "actor.pack_length" in draft.values:
        draft.put("actor.share_prompts", True, f"{_ACTOR}use_prefix_grouper")
    offload = {
        "optimizer": f"{_ACTOR}fsdp_config.optimizer_offload",
        "reference": "actor_rollout_ref.ref.fsdp_config.param_offload",
    }
    waits = [what for what, name in offload.items() if draft.get(name)]
    if waits:
        draft.put("actor.offload", waits, " and ".join(offload[w] for w in waits))
    for model, section in ((_MODEL, "actor"), ("critic.model.", "critic")):
        recompute = draft.get(f"{model}enable_gradient_checkpointing")
        if recompute is False:
            note = f"{model}enable_gradient_checkpointing"
            draft.put(f"{section}.remat", "none", note)
        if draft.get(f"{model}enable_activation_offload"):
            note = f"{model}enable_activation_offload"
            draft.put(f"{section}.remat", "offload", note)
    mode = draft.word(f"{_ACTOR}policy_loss.loss_mode", DEFAULT_LOSS)
    if mode not in LOSSES:
        draft.leave(f"{_ACTOR}policy_loss.loss_mode", "no such loss here")
        draft.todo.append(
            f"{_ACTOR}policy_loss.loss_mode is {mode}; here there are "
            f"{', '.join(LOSSES)}, and module:function for one of your own"
        )
        return
    if mode != DEFAULT_LOSS:
        name = f"{_ACTOR}policy_loss.loss_mode"
        draft.put("actor.policy_loss.loss_mode", mode, name)
    if fixed := LOSSES[mode].aggregation:
        draft.get(f"{_ACTOR}loss_agg_mode")
        draft.put("actor.loss_agg_mode", fixed, f"what {mode} is a mean over")
    elif draft.given.get(f"{_ACTOR}loss_agg_mode") != "seq-mean-token-sum-norm":
        if draft.get(f"{_ACTOR}loss_scale_factor"):
            draft.leave(f"{_ACTOR}loss_scale_factor", "only seq-mean-token-sum-norm")


def _optimizer(draft: Draft, there: str, here: str) -> None:
    optimizer = draft.get(f"{there}optimizer", "AdamW")
    if optimizer != "AdamW":
        draft.leave(f"{there}optimizer", f"{here}.name: adamw or optax:NAME")
        draft.todo.append(f"{there}optimizer is {optimizer}; set {here}.name")
    for name in ("lr_scheduler_type", "warmup_style"):
        kind = draft.get(f"{there}{name}")
        if kind in ("constant", "cosine", "linear"):
            draft.put(f"{here}.lr_scheduler_type", kind, f"{there}{name}")
        elif kind is not None:
            draft.leave(f"{there}{name}", "constant, cosine or linear")
            draft.todo.append(f"{there}{name} is {kind}; set {here}.lr_scheduler_type")
    steps = draft.number(f"{there}lr_warmup_steps", -1)
    ratio = draft.number(f"{there}lr_warmup_steps_ratio", 0.0)
    if steps > 0:
        draft.put(f"{here}.lr_warmup_steps", steps, f"{there}lr_warmup_steps")
    elif ratio > 0:
        # Of a length that is known later.
        draft.put(f"{here}.lr_warmup_steps", ratio, f"{there}lr_warmup_steps_ratio")


def _distillation(draft: Draft) -> None:
    section, loss = "distillation.", f"{DISTILLATION}."
    if not draft.get(f"{section}enabled"):
        for name in [name for name in draft.given if name.startswith(section)]:
            draft.leave(name, "distillation.enabled is false")
        return
    paths = {
        name: draft.get(name)
        for name in draft.given
        if name.startswith(f"{section}teacher_models.") and name.endswith(".model_path")
    }
    paths = {name: path for name, path in paths.items() if path}
    if len(paths) == 1:
        ((name, path),) = paths.items()
        draft.put("distillation.teacher.path", path, name)
    else:
        draft.todo.append(
            f"distillation.teacher.path: veRL has {len(paths)} teachers, here there is "
            "one"
        )
    rewarded = draft.get(f"{loss}use_task_rewards", True)
    draft.put("distillation.with_rewards", rewarded, f"{loss}use_task_rewards")
    coef = draft.get(f"{loss}distillation_loss_coef", 1.0)
    if rewarded:
        draft.put("distillation.coef", coef, f"{loss}distillation_loss_coef")
    kind = draft.word(f"{loss}loss_mode", "k3")
    gradient = draft.get(f"{loss}use_policy_gradient", False)
    topk = draft.number(f"{loss}topk", 32)
    if kind == "forward_kl_topk" and not gradient:
        draft.put("distillation.mode", kind, f"{loss}loss_mode")
        draft.put("distillation.topk", topk, f"{loss}topk")
    elif kind in ("k1", "kl") and gradient:
        note = f"{loss}loss_mode {kind} and use_policy_gradient"
        draft.put("distillation.mode", "reverse_kl", note)
    else:
        draft.todo.append(
            f"distillation.mode: veRL's is {kind} with use_policy_gradient {gradient}; "
            "here reverse_kl is k1 as a policy gradient, forward_kl_topk and jsd are "
            "differentiated"
        )


def _learns_from_teacher_alone(draft: Draft) -> bool:
    return draft.values.get("distillation.with_rewards") is False


def _algorithm(draft: Draft) -> None:
    if _learns_from_teacher_alone(draft):
        for name in [name for name in draft.given if name.startswith("algorithm.")]:
            draft.leave(name, "nothing is learned from rewards")
        return
    name = "algorithm.adv_estimator"
    estimator = str(_taken(draft, name)).removesuffix("_vectorized")
    draft.values[name] = estimator
    if estimator not in ESTIMATORS:
        draft.todo.append(
            f"{name} is {estimator}; here there are {', '.join(ESTIMATORS)}, and "
            "module:function for one of your own"
        )
        return
    found = ESTIMATORS[estimator]
    for key, idle, read in (
        ("algorithm.gamma", 1.0, found.discounts),
        ("algorithm.lam", 1.0, found.has_critic),
        ("algorithm.norm_adv_by_std_in_grpo", True, found.normalises),
    ):
        if not read and draft.get(key, idle) != idle:
            draft.leave(key, f"{estimator} does not read it")
    if draft.get("algorithm.use_kl_in_reward"):
        draft.put("algorithm.use_kl_in_reward", True, "algorithm.use_kl_in_reward")
    else:
        for key in ("type", "kl_coef", "horizon", "target_kl"):
            if draft.get(f"algorithm.kl_ctrl.{key}") is not None:
                draft.leave(
                    f"algorithm.kl_ctrl.{key}", "algorithm.use_kl_in_reward is off"
                )
    filters = "algorithm.filter_groups."
    on, metric = draft.get(f"{filters}enable"), draft.get(f"{filters}metric", "reward")
    most = draft.number(f"{filters}max_num_gen_batches", 0)
    if on:
        own = any([draft.get(f"{where}path") for where in _OWN_REWARD])
        if metric != "reward":
            note, counted = f"{filters}metric", metric
            if not own or metric in ("score", "seq_reward", "seq_final_reward"):
                note, counted = f"{note}, {metric} there", "reward"
            draft.put(f"{filters}metric", counted, note)
        draft.put(
            f"{filters}max_num_gen_batches", most, f"{filters}max_num_gen_batches"
        )
    resampled = draft.get("algorithm.use_pf_ppo")
    for key in ("reweight_method", "weight_pow"):
        value = draft.get(f"algorithm.pf_ppo.{key}")
        if resampled and value is not None:
            draft.put(f"algorithm.pf_ppo.{key}", value, f"algorithm.pf_ppo.{key}")
    if resampled and "algorithm.pf_ppo.reweight_method" not in draft.values:
        draft.put("algorithm.pf_ppo.reweight_method", "pow", "algorithm.use_pf_ppo")
    _correction(draft)


def _correction(draft: Draft) -> None:
    uses = [
        _CORRECTION + name
        for name in ("rollout_is", "rollout_rs", "bypass_mode")
        if draft.given.get(_CORRECTION + name)
    ]
    for name in [name for name in draft.given if name.startswith(_CORRECTION)]:
        only = {
            "rollout_is_threshold": "rollout_is",
            "rollout_is_batch_normalize": "rollout_is",
            "rollout_rs_threshold": "rollout_rs",
            "loss_type": "bypass_mode",
        }.get(name.removeprefix(_CORRECTION))
        if not uses or only and not draft.given.get(_CORRECTION + only):
            draft.leave(name, "no correction is asked for" if not uses else "idle")


def _critic(draft: Draft) -> None:
    found = ESTIMATORS.get(draft.values.get("algorithm.adv_estimator"))
    if found is None or not found.has_critic:
        why = "there is no critic with this estimator"
        for name in draft.given:
            if name.startswith("critic.") and draft.get(name) is not None:
                draft.leave(name, why)
        if draft.get("trainer.critic_warmup"):
            draft.leave("trainer.critic_warmup", why)
        return
    if (clip := draft.get("critic.grad_clip")) is not None:
        draft.put("critic.optim.clip_grad", clip, "critic.grad_clip")
    _optimizer(draft, "critic.optim.", "critic.optim")
    path = draft.get("critic.model.path")
    if path and path != draft.values.get("model.path"):
        draft.put("critic.model.path", path, "critic.model.path")
    if (size := draft.number("critic.ulysses_sequence_parallel_size", 1)) > 1:
        note = "critic.ulysses_sequence_parallel_size"
        draft.put("critic.mesh.context", size, note)


_OWN_REWARD = ("custom_reward_function.", "reward.custom_reward_function.")


def _rewards(draft: Draft) -> None:
    functions, note = [], ""
    for section in _OWN_REWARD:
        file, name = draft.get(f"{section}path"), draft.get(f"{section}name")
        params = draft.section(f"{section}reward_kwargs")
        if not file:
            continue
        note = f"{section}path and name"
        module = _module(draft, str(file), f"{section}path")
        term = {"name": f"{module}:{name or 'compute_score'}"}
        functions.append(term | ({"params": params} if params else {}))
    for on, path in (
        ("reward_model.enable", "reward_model.model.path"),
        ("reward.reward_model.enable", "reward.reward_model.model_path"),
    ):
        enabled, model = draft.get(on), draft.get(path)
        if enabled and model:
            draft.put("reward.model.path", model, path)
    if not functions and "reward.model.path" not in draft.values:
        if name := _builtin(draft):
            functions, note = [{"name": name}], "what veRL takes for this data_source"
    if functions:
        draft.put("reward.functions", functions, note)
    elif "reward.model.path" not in draft.values and not _learns_from_teacher_alone(
        draft
    ):
        draft.todo.append(
            "reward.functions: veRL chooses a function by the column data_source; name "
            "gsm8k, math or module:function"
        )
    for section in OVERLONG:
        on = draft.get(f"{section}.enable")
        for key in ("len", "penalty_factor"):
            value = draft.get(f"{section}.{key}")
            if on and value is not None:
                draft.put(f"reward.overlong_buffer.{key}", value, f"{section}.{key}")


def _module(draft: Draft, path: str, name: str) -> str:
    """The module that a file of Python is, seen from the folder that it is run in."""
    if path.startswith("pkg://"):
        return path.removeprefix("pkg://")
    parts = Path(path).with_suffix("").parts
    if all(part.isidentifier() for part in parts):
        return ".".join(parts)
    draft.todo.append(
        f"{name} is {path}; the folder of this file must be the one that jaxrl is run "
        "in, or in PYTHONPATH"
    )
    return parts[-1]


def _builtin(draft: Draft) -> str | None:
    """The built-in reward for the data, by the column data_source of its first row, or
    by the file's name if the file is not here."""
    path = str(draft.values.get("data.train.path", ""))
    try:
        source = str(first_row(Source(path=path)).get("data_source"))
    except ValueError:
        return "gsm8k" if "gsm8k" in path.lower() else None
    return _REWARDS.get(source)


def _length(draft: Draft) -> None:
    steps = draft.get("trainer.total_training_steps")
    note = "trainer.total_training_steps"
    epochs = draft.number("trainer.total_epochs", 30)
    if steps is None:
        rows = _rows(draft)
        batch = draft.values.get("data.train_batch_size")
        note = f"trainer.total_epochs {epochs} x {rows} rows // {batch}"
        steps = rows and isinstance(batch, int) and epochs * (rows // batch)
    if steps:
        draft.put("trainer.total_training_steps", steps, note)
    else:
        draft.todo.append(
            f"trainer.total_training_steps: {epochs} epochs x rows of the training "
            "data // data.train_batch_size"
        )
    for section in ("actor", "critic"):
        key = f"{section}.optim.lr_warmup_steps"
        share = draft.values.get(key)
        if isinstance(share, float) and share < 1:
            if steps:
                draft.values[key] = int(share * steps)
            else:
                del draft.values[key]
                draft.todo.append(f"{key}: {share} x trainer.total_training_steps")
    for name in ("save_freq", "test_freq"):
        often = draft.number(f"trainer.{name}", -1)
        draft.put(f"trainer.{name}", max(often, 0), f"trainer.{name}")
    if keep := draft.get("trainer.max_actor_ckpt_to_keep"):
        name = "trainer.max_actor_ckpt_to_keep"
        draft.put("trainer.max_ckpt_to_keep", keep, name)
    if draft.get("trainer.resume_mode") == "disable":
        draft.put("trainer.resume", "never", "trainer.resume_mode")
    loggers = draft.words("trainer.logger")
    kept = [name for name in loggers if name in _LOGGERS]
    if kept:
        draft.put("trainer.loggers", kept, "trainer.logger")
    if dropped := sorted({*loggers} - {*_LOGGERS, "console"}):
        draft.left["trainer.logger"] = f"{', '.join(dropped)}: none of {_LOGGERS}"


def _rows(draft: Draft) -> int | None:
    """Rows of the training data, if it is in Parquet files that are here."""
    import pyarrow.parquet

    paths = [
        Path(str(value)).expanduser()
        for key, value in draft.values.items()
        if key.startswith(("data.train.path", "data.more_train."))
        and key.endswith("path")
    ]
    if not paths or not all(p.suffix == ".parquet" and p.is_file() for p in paths):
        return None
    counts = [pyarrow.parquet.read_metadata(path).num_rows for path in paths]
    size = draft.values.get("data.train.size")
    return min([sum(counts), size] if size else [sum(counts)])
