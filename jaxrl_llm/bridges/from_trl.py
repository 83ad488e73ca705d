"""TRL's settings for GRPO as a configuration."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxrl_llm.bridges.draft import Draft
from jaxrl_llm.config.algorithm import DEFAULT_LOSS
from jaxrl_llm.config.peers.trl import TRL

_LOGGERS = ("tensorboard", "wandb", "mlflow", "trackio")
_AGGREGATIONS = {
    "grpo": "seq-mean-token-mean",
    "dapo": "token-mean",
    "bnpo": "token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
    "cispo": "token-mean",
    "sapo": "seq-mean-token-mean",
}
_LOSSES = {"cispo": "cispo", "sapo": "sapo"}
"""Losses by `loss_type`, where that says more than how they are aggregated."""
_BOUNDED_ABOVE = ("cispo",)
"""Where `epsilon_high` bounds the ratio itself, and nothing does so from below."""
_OF_LEVEL = {"token": DEFAULT_LOSS, "sequence": "gspo"}
"""Losses by `importance_sampling_level`."""
_REWARDS = {"accuracy_reward": "math", "reasoning_accuracy_reward": "math"}


def converted(given: Mapping[str, Any]) -> Draft:
    """A draft of what TRL's settings are here.

    Args:
      given: by key; see `foreign.read`.
    """
    draft = Draft(TRL, given)
    parts = (_model, _data, _rollout, _batches, _loss, _optimizer, _rewards, _run)
    if "teacher_model_name_or_path" in given:
        parts = (*parts[:4], _distillation, _optimizer, _run)
    for part in parts:
        part(draft)
    draft.take_over()
    return draft


def _model(draft: Draft) -> None:
    revision = draft.get("model_revision", "main")
    if revision != "main":
        draft.put("model.revision", revision, "model_revision")
    rank, alpha = draft.get("lora_r", 16), draft.get("lora_alpha", 32)
    modules = draft.get("lora_target_modules", "all-linear")
    if draft.get("use_peft"):
        draft.put("actor.lora.rank", rank, "lora_r")
        draft.put("actor.lora.alpha", alpha, "lora_alpha")
        whole = "all" if modules in ("all-linear", ["all-linear"]) else modules
        draft.put("actor.lora.modules", whole, "lora_target_modules")


def _data(draft: Draft) -> None:
    name = draft.get("dataset_name")
    config = draft.get("dataset_config")
    splits = {"train": draft.get("dataset_train_split", "train")}
    if draft.get("eval_strategy", "no") != "no":
        splits["val"] = draft.get("dataset_test_split", "test")
        n = draft.get("num_generations_eval", draft.given.get("num_generations", 8))
        draft.put("val.n", n, "num_generations_eval, or num_generations")
        before = draft.get("eval_on_start", False)
        draft.put("trainer.val_before_train", before, "eval_on_start")
    else:
        draft.get("dataset_test_split")
    if name is None:
        if "datasets" in draft.given:
            draft.leave("datasets", "one set in data.train, others in data.more_train")
        draft.todo.append("data.train.path: which questions to train on")
        return
    for split, there in splits.items():
        section = f"data.{split}"
        if str(name).endswith((".jsonl", ".parquet")):
            draft.put(f"{section}.path", name, "dataset_name")
            continue
        path = (
            f"disk:{name}" if Path(str(name)).expanduser().is_dir() else f"hub:{name}"
        )
        draft.put(f"{section}.path", path, "dataset_name")
        draft.put(f"{section}.split", there, f"the split for {split}")
        if config:
            draft.put(f"{section}.params", {"name": config}, "dataset_config")


def _rollout(draft: Draft) -> None:
    top_k = draft.get("top_k", 0)
    if top_k:
        draft.put("rollout.top_k", top_k, "top_k")
    kwargs = draft.section("chat_template_kwargs")
    text = draft.given.get("chat_template_kwargs")
    if isinstance(text, str):
        try:
            kwargs = json.loads(text)
        except ValueError:
            draft.leave("chat_template_kwargs", "it is no JSON")
    if kwargs:
        draft.put("data.chat_template_kwargs", kwargs, "chat_template_kwargs")
    if draft.get("repetition_penalty", 1.0) != 1.0:
        draft.todo.append("repetition_penalty has no counterpart here")
    uses = draft.get("use_vllm", False)
    if uses:
        draft.leave("use_vllm", "rollout.engine: vllm starts servers; jax needs none")
    names = [
        f"vllm_importance_sampling_{end}" for end in ("mode", "clip_max", "clip_min")
    ]
    mode = draft.get(names[0], "sequence_mask")
    high, low = draft.get(names[1], 3.0), draft.get(names[2])
    if not uses or not draft.get("vllm_importance_sampling_correction", True):
        return
    level, _, how = str(mode).partition("_")
    if level not in ("token", "sequence") or how not in ("truncate", "mask"):
        draft.todo.append(f"{names[0]} is {mode}; see algorithm.rollout_correction")
        return
    bounds = high if how == "truncate" else f"{low or 1e-6}_{high}"
    draft.put("algorithm.rollout_correction.rollout_is", level, names[0])
    draft.put(
        "algorithm.rollout_correction.rollout_is_threshold",
        bounds,
        "clip_max and clip_min",
    )


def _batches(draft: Draft) -> None:
    """Prompts for each step and update, and steps for TRL's updates.

    TRL generates per_device_train_batch_size x processes x steps_per_generation
    completions, and updates on per_device_train_batch_size x processes x
    gradient_accumulation_steps of them at a time.
    """
    distils = "teacher_model_name_or_path" in draft.given
    n = draft.count("num_generations", 1 if distils else 8)
    draft.put("rollout.n", n, "num_generations")
    per_device = draft.count("per_device_train_batch_size", 8)
    accumulated = draft.count("gradient_accumulation_steps", 1)
    steps = draft.count("steps_per_generation", accumulated)
    completions = draft.count("generation_batch_size", per_device * steps)
    update = per_device * accumulated
    whole = "generation_batch_size" in draft.given
    note = (
        "generation_batch_size / num_generations"
        if whole
        else "per_device_train_batch_size x steps_per_generation / num_generations"
    )
    if completions % n:
        draft.todo.append(
            f"data.train_batch_size: {completions} completions are no whole number of "
            f"groups of {n}; with more processes than one they may be"
        )
    draft.put("data.train_batch_size", max(1, completions // n), note)
    if update % n == 0 and update < completions:
        note = "per_device_train_batch_size x gradient_accumulation_steps / n"
        draft.put("actor.ppo_mini_batch_size", update // n, note)
    elif update < completions:
        draft.todo.append(
            f"actor.ppo_mini_batch_size: {update} completions are no whole number of "
            f"groups of {n}; with more processes than one they may be"
        )
    draft.todo.append(
        "data.train_batch_size and actor.ppo_mini_batch_size are those of one process; "
        "multiply them by the number of processes that TRL had"
    )
    epochs = draft.count("num_iterations", 1)
    if epochs != 1:
        draft.put("actor.ppo_epochs", epochs, "num_iterations")
    updates = max(1, completions // update) * epochs
    most = draft.number("max_steps", -1)
    if most > 0:
        note = f"max_steps / {updates} updates a step"
        draft.put("trainer.total_training_steps", max(1, most // updates), note)
    else:
        draft.todo.append(
            f"trainer.total_training_steps: num_train_epochs "
            f"{draft.get('num_train_epochs', 3)} x rows of the training data // "
            "data.train_batch_size"
        )
    draft.get("num_train_epochs")
    for name, key in (("save_steps", "save_freq"), ("eval_steps", "test_freq")):
        often = draft.number(name, 0)
        if often >= 1:
            note = f"{name} / {updates} updates a step"
            draft.put(f"trainer.{key}", max(1, int(often) // updates), note)


def _loss(draft: Draft) -> None:
    beta = draft.number("beta", 0.0)
    if beta:
        draft.put("actor.use_kl_loss", True, "beta is over 0")
        draft.put("actor.kl_loss_coef", beta, "beta")
    low = draft.number("epsilon", 0.2)
    high = draft.number("epsilon_high", low)
    kind = draft.word("loss_type", "dapo")
    level = draft.word("importance_sampling_level", "token")
    mode = _LOSSES.get(kind) or _OF_LEVEL.get(level)
    if mode is None:
        draft.todo.append(f"importance_sampling_level is {level}: token or sequence")
    if kind in _BOUNDED_ABOVE:
        low, high = 1.0, max(0.0, high - 1.0)
    if kind not in _AGGREGATIONS:
        draft.leave("loss_type", "a loss of your own is module:function")
        draft.todo.append(f"loss_type is {kind}, which is no loss here")
    else:
        draft.put("actor.loss_agg_mode", _AGGREGATIONS[kind], f"loss_type {kind}")
    if mode and mode != DEFAULT_LOSS:
        draft.put("actor.policy_loss.loss_mode", mode, "loss_type and its level")
    draft.put("actor.clip_ratio_low", low, "epsilon")
    draft.put("actor.clip_ratio_high", high, "epsilon_high, or epsilon")
    draft.put("actor.clip_ratio_c", draft.get("delta"), "delta")
    scale = str(draft.get("scale_rewards", "group")).lower()
    if scale in ("none", "false"):
        draft.put("algorithm.norm_adv_by_std_in_grpo", False, "scale_rewards")
    elif scale not in ("group", "true"):
        draft.todo.append(f"scale_rewards is {scale}; here it is group or none")
    if draft.get("multi_objective_aggregation") == "normalize_then_sum":
        note = "multi_objective_aggregation"
        draft.put("algorithm.adv_estimator", "gdpo", note)
    if draft.get("sync_ref_model"):
        steps = draft.number("ref_model_sync_steps", 512)
        draft.put("actor.ref_refresh_steps", steps, "ref_model_sync_steps")
        if draft.get("ref_model_mixup_alpha", 0.6) != 1.0:
            draft.todo.append(
                "actor.ref_refresh_steps: here the policy becomes the reference; TRL "
                "mixes the two by ref_model_mixup_alpha"
            )


def _distillation(draft: Draft) -> None:
    """DistillationConfig's, and GKDConfig's where that has keys of its own: a
    generalised JSD over the vocabulary, and no rewards."""
    is_gkd = any(name in draft.given for name in ("lmbda", "seq_kd", "max_new_tokens"))
    path = draft.get("teacher_model_name_or_path")
    if path is None:
        draft.todo.append("distillation.teacher.path: which model to learn from")
    else:
        draft.put("distillation.teacher.path", path, "teacher_model_name_or_path")
    draft.put("distillation.mode", "jsd", "what TRL distils with")
    beta = draft.number("beta", 0.5 if is_gkd else 1.0)
    draft.put("distillation.jsd_beta", beta, "beta")
    if is_gkd:
        draft.put(
            "rollout.temperature", draft.number("temperature", 0.9), "temperature"
        )
        length = draft.number("max_new_tokens", 128)
        draft.put("rollout.max_response_length", length, "max_new_tokens")
        if draft.number("lmbda", 0.5) != 1:
            draft.leave("lmbda", "all responses are the policy's, which is 1")
            draft.todo.append(
                "lmbda: TRL takes some responses from the data set; here the policy "
                "writes all of them, which is lmbda 1"
            )


def _optimizer(draft: Draft) -> None:
    decay = draft.get("weight_decay", 0.0)
    draft.put("actor.optim.weight_decay", decay, "weight_decay")
    kind = draft.get("lr_scheduler_type", "linear")
    kind = "constant" if kind == "constant_with_warmup" else kind
    if kind in ("constant", "cosine", "linear"):
        draft.put("actor.optim.lr_scheduler_type", kind, "lr_scheduler_type")
    else:
        draft.leave("lr_scheduler_type", "constant, cosine or linear")
        draft.todo.append(f"lr_scheduler_type is {kind}; here constant, cosine, linear")
    betas = [draft.get("adam_beta1", 0.9), draft.get("adam_beta2", 0.999)]
    if betas != [0.9, 0.999]:
        draft.put("actor.optim.betas", betas, "adam_beta1 and adam_beta2")
    ratio, steps = draft.number("warmup_ratio", 0.0), draft.number("warmup_steps", 0)
    ratio = steps if 0 < steps < 1 else ratio
    total = draft.values.get("trainer.total_training_steps")
    if steps >= 1:
        draft.put("actor.optim.lr_warmup_steps", int(steps), "warmup_steps")
    elif ratio and total:
        draft.put("actor.optim.lr_warmup_steps", int(ratio * total), "warmup_ratio")
    elif ratio:
        draft.todo.append(
            f"actor.optim.lr_warmup_steps: {ratio} x trainer.total_training_steps"
        )
    name = draft.get("optim", "adamw_torch")
    if not str(name).startswith("adamw"):
        draft.leave("optim", "actor.optim.name: adamw or optax:NAME")
        draft.todo.append(f"optim is {name}; set actor.optim.name")


def _rewards(draft: Draft) -> None:
    names = draft.words("reward_funcs")
    weights = draft.get("reward_weights", [1.0] * len(names))
    if not isinstance(weights, list) or len(weights) != len(names):
        draft.leave("reward_weights", "one number for each of reward_funcs")
        draft.todo.append(f"reward_weights is {weights!r}, for {len(names)} functions")
        weights = [1.0] * len(names)
    functions = []
    for name, weight in zip(names, weights, strict=True):
        if name == "get_soft_overlong_punishment":
            draft.put("reward.overlong_buffer.len", 256, name)
            continue
        found = _REWARDS.get(name)
        if found and "data.train.path" in draft.values:
            draft.put("data.train.answer_key", "solution", f"what {name} reads")
            if "data.val.path" in draft.values:
                draft.put("data.val.answer_key", "solution", f"what {name} reads")
        if not found and "." in name:
            module, _, function = name.rpartition(".")
            found = f"{module}:{function}"
        if not found:
            draft.todo.append(f"reward.functions: {name} is no built-in reward here")
            continue
        term = {"name": found}
        functions.append(term | ({"weight": weight} if weight != 1.0 else {}))
    if functions:
        draft.put("reward.functions", functions, "reward_funcs")
    if path := draft.get("reward_model_name_or_path"):
        draft.put("reward.model.path", path, "reward_model_name_or_path")
    elif not functions:
        draft.todo.append("reward.functions: what a response is worth")


def _run(draft: Draft) -> None:
    draft.put("output_dir", draft.get("output_dir", "trainer_output"), "output_dir")
    loggers = draft.words("report_to")
    if kept := [name for name in loggers if name in _LOGGERS]:
        draft.put("trainer.loggers", kept, "report_to")
    if dropped := sorted({*loggers} - {*_LOGGERS, "none"}):
        draft.leave("report_to", f"{', '.join(dropped)}: none of {_LOGGERS}")
    if draft.get("gradient_checkpointing", True) is False:
        draft.put("actor.remat", "none", "gradient_checkpointing")
    if draft.get("bf16") is False:
        draft.put("actor.dtype", "float32", "bf16")
    draft.get("optim")
