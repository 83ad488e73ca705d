"""TRL's keys: fields of GRPOConfig and of what its command line takes besides."""

from collections.abc import Iterable

from jaxrl_llm.config.peers.key import Key, Peer

_PROMPTS = "completions there, prompts here: divide by num_generations"
_MICRO = "rows of all devices together; leave it out and what fits is found"
_VLLM = "rollout.engine: vllm starts servers, see rollout.vllm"
_IMPORTANCE = "rollout_is: token or sequence"
_BOUND = 'a number truncates, "LOWER_UPPER" masks'
_NO_QUANTISED = "trained weights are float32"
_LOSS = (
    "grpo is seq-mean-token-mean, dapo token-mean, dr_grpo seq-mean-token-sum-norm; "
    "cispo and sapo are actor.policy_loss.loss_mode"
)


def _without(names: Iterable[str], why: str) -> dict[str, Key]:
    return {name: Key(None, why) for name in names}


KEYS = {
    # the model
    "model_name_or_path": Key("model.path"),
    "model_revision": Key("model.revision"),
    "dtype": Key("actor.dtype"),
    "model_init_kwargs": Key(None, "model.path and model.revision say which weights"),
    "attn_implementation": Key("actor.attention", "auto takes flash attention"),
    "trust_remote_code": Key(
        None, "models are built in, and no code of a model's is ever run"
    ),
    "disable_dropout": Key(None, "there is no dropout"),
    "cast_lm_head_to_fp32": Key(None, "softmax and losses are float32"),
    "use_peft": Key("actor.lora", "false is null"),
    "lora_r": Key("actor.lora.rank"),
    "lora_alpha": Key("actor.lora.alpha"),
    "lora_target_modules": Key("actor.lora.modules", "all-linear is all"),
    **_without(("load_in_4bit", "load_in_8bit"), _NO_QUANTISED),
    # data
    "dataset_name": Key("data.train.path", "hub:NAME for the hub"),
    "dataset_config": Key("data.train.params", "{name: CONFIG}"),
    "dataset_train_split": Key("data.train.split"),
    "dataset_test_split": Key("data.val.split"),
    "dataset_streaming": Key(None, "data.train.size says how many rows are read"),
    "shuffle_dataset": Key("data.shuffle"),
    "max_prompt_length": Key("data.max_prompt_length"),
    "remove_unused_columns": Key(None, "reward functions get every column they name"),
    "chat_template_kwargs": Key("data.chat_template_kwargs"),
    # generation
    "num_generations": Key("rollout.n"),
    "num_generations_eval": Key("val.n"),
    "max_completion_length": Key("rollout.max_response_length"),
    "temperature": Key("rollout.temperature"),
    "top_p": Key("rollout.top_p"),
    "top_k": Key("rollout.top_k", "0 is -1"),
    "min_p": Key("rollout.min_p"),
    "repetition_penalty": Key(None, "it would make sampler and trainer disagree"),
    "generation_kwargs": Key(None, "rollout has the sampling parameters"),
    "use_vllm": Key("rollout.engine", "jax or vllm"),
    "vllm_mode": Key("rollout.vllm.urls", _VLLM),
    "vllm_server_base_url": Key("rollout.vllm.urls"),
    "vllm_server_host": Key("rollout.vllm.urls", "http://HOST:PORT"),
    "vllm_server_port": Key("rollout.vllm.urls", "http://HOST:PORT"),
    "vllm_server_timeout": Key("rollout.vllm.start_timeout_s"),
    "vllm_gpu_memory_utilization": Key(
        "rollout.cache_gib", "GiB on each device; for vLLM see rollout.vllm.args"
    ),
    "vllm_tensor_parallel_size": Key("rollout.mesh.tensor"),
    "vllm_max_model_length": Key(
        None, "data.max_prompt_length + rollout.max_response_length"
    ),
    "vllm_enable_sleep_mode": Key(None, "the jax engine needs no such setting"),
    "vllm_importance_sampling_correction": Key(
        "algorithm.rollout_correction", "given or not"
    ),
    "vllm_importance_sampling_mode": Key(
        "algorithm.rollout_correction.rollout_is", _IMPORTANCE
    ),
    "vllm_importance_sampling_clip_max": Key(
        "algorithm.rollout_correction.rollout_is_threshold", _BOUND
    ),
    "vllm_importance_sampling_clip_min": Key(
        "algorithm.rollout_correction.rollout_is_threshold", _BOUND
    ),
    "use_transformers_paged": Key(None, "the jax engine always has pages"),
    "max_tool_calling_iterations": Key(
        None, "agent.max_turns counts turns, one more than rounds of tools"
    ),
    # batches
    "per_device_train_batch_size": Key("data.train_batch_size", _PROMPTS),
    "generation_batch_size": Key("data.train_batch_size", _PROMPTS),
    "steps_per_generation": Key("data.train_batch_size", _PROMPTS),
    "gradient_accumulation_steps": Key("actor.ppo_mini_batch_size", _PROMPTS),
    "per_device_eval_batch_size": Key(None, "the engine takes all questions at once"),
    # the loss
    "beta": Key(
        "actor.kl_loss_coef",
        "with actor.use_kl_loss: true; of a DistillationConfig or GKDConfig it is "
        "distillation.jsd_beta",
    ),
    "num_iterations": Key("actor.ppo_epochs"),
    "epsilon": Key("actor.clip_ratio_low"),
    "epsilon_high": Key("actor.clip_ratio_high"),
    "delta": Key("actor.clip_ratio_c", "null there and here for none"),
    "loss_type": Key("actor.loss_agg_mode", _LOSS),
    "importance_sampling_level": Key(
        "actor.policy_loss.loss_mode", "sequence is gspo, token vanilla"
    ),
    "scale_rewards": Key(
        "algorithm.norm_adv_by_std_in_grpo", "group is true, none false"
    ),
    "multi_objective_aggregation": Key(
        "algorithm.adv_estimator", "normalize_then_sum is gdpo"
    ),
    "mask_truncated_completions": Key("algorithm.mask_truncated_completions"),
    "sapo_temperature_pos": Key("actor.tau_pos"),
    "sapo_temperature_neg": Key("actor.tau_neg"),
    "entropy_coef": Key("actor.entropy_coeff"),
    "use_adaptive_entropy": Key(None, "actor.entropy_coeff stays as it is"),
    "top_entropy_quantile": Key(
        None, "a loss of your own can do it: actor.policy_loss.loss_mode"
    ),
    "off_policy_mask_threshold": Key(
        None, "algorithm.rollout_correction.rollout_rs rejects what is off-policy"
    ),
    "sync_ref_model": Key("actor.ref_refresh_steps", "the policy becomes it, whole"),
    "ref_model_sync_steps": Key("actor.ref_refresh_steps"),
    "ref_model_mixup_alpha": Key(None, "the policy becomes the reference, whole"),
    # DistillationConfig and GKDConfig
    "teacher_model_name_or_path": Key("distillation.teacher.path"),
    "teacher_model_revision": Key("distillation.teacher.revision"),
    "teacher_model_init_kwargs": Key(
        None, "distillation.teacher.path and its revision say which weights"
    ),
    "max_new_tokens": Key("rollout.max_response_length"),
    "lmbda": Key(None, "all responses are the policy's, which is 1"),
    "seq_kd": Key(None, "all responses are the policy's"),
    # rewards
    "reward_funcs": Key("reward.functions", "module:function"),
    "reward_model_name_or_path": Key("reward.model.path"),
    "reward_weights": Key("reward.functions", "each has a weight"),
    # the optimizer
    "learning_rate": Key("actor.optim.lr"),
    "weight_decay": Key("actor.optim.weight_decay"),
    "adam_beta1": Key("actor.optim.betas", "[beta1, beta2]"),
    "adam_beta2": Key("actor.optim.betas", "[beta1, beta2]"),
    "adam_epsilon": Key("actor.optim.eps"),
    "max_grad_norm": Key("actor.optim.clip_grad"),
    "lr_scheduler_type": Key(
        "actor.optim.lr_scheduler_type", "constant, cosine or linear"
    ),
    "warmup_steps": Key("actor.optim.lr_warmup_steps"),
    "warmup_ratio": Key("actor.optim.lr_warmup_steps", "a number of steps"),
    "optim": Key("actor.optim.name", "adamw, or optax:NAME"),
    # the run
    "output_dir": Key("output_dir"),
    "max_steps": Key(
        "trainer.total_training_steps",
        "updates there, here steps: generate, then all updates on that",
    ),
    "num_train_epochs": Key(
        "trainer.total_training_steps", "epochs x rows / data.train_batch_size"
    ),
    "seed": Key("seed"),
    "save_steps": Key("trainer.save_freq"),
    "save_total_limit": Key("trainer.max_ckpt_to_keep"),
    "eval_steps": Key("trainer.test_freq"),
    "eval_strategy": Key("trainer.test_freq", "no is 0"),
    "eval_on_start": Key("trainer.val_before_train"),
    "resume_from_checkpoint": Key("trainer.resume", "auto does so by itself"),
    "report_to": Key("trainer.loggers"),
    "run_name": Key("output_dir", "its last folder names the run"),
    "logging_steps": Key(None, "every step is logged"),
    "log_completions": Key("trainer.num_examples", "rollouts/ has all of them"),
    "num_completions_to_print": Key("trainer.num_examples"),
    "gradient_checkpointing": Key("actor.remat", "true is full, false is none"),
    "bf16": Key("actor.dtype", "bfloat16"),
    "use_liger_kernel": Key(None, "XLA compiles everything"),
    "push_to_hub": Key(None, "output_dir/huggingface can be uploaded"),
}

TRL = Peer("TRL", "1.16", KEYS)
