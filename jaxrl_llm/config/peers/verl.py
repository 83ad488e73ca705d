"""veRL's keys, as its ppo_trainer.yaml has them when it is written out in full."""

from jaxrl_llm.config.peers.key import Key, Peer

_MICRO = "rows of all devices together; leave it out and what fits is found"
_PACK = "tokens in a packed row, at least prompt and response"
_COMPILED = "XLA compiles everything"
_ALL_DEVICES = "the devices that are here are used; CUDA_VISIBLE_DEVICES chooses some"
_SAVED = "output_dir/rollouts has every prompt, response and score"
_NO_CODE = "models are built in, and no code of a model's is ever run"
_NO_LORA = "0 is actor.lora null"
_NO_CRITIC_LORA = "0 is critic.lora null"
_MODULES = "all-linear is all"
_SAME_SAMPLER = "the jax engine needs no such setting"
_STEPS = "a number of steps: epochs x rows / data.train_batch_size"
_REWARD = "module:function; one with compute_score's signature is called as veRL does"
_ROLLOUT, _ACTOR = "actor_rollout_ref.rollout.", "actor_rollout_ref.actor."

_SAME_IN_ACTOR = (
    *("ppo_mini_batch_size", "ppo_epochs", "clip_ratio_low", "clip_ratio_high"),
    *("clip_ratio_c", "tau_pos", "tau_neg", "loss_agg_mode", "loss_scale_factor"),
    *("entropy_coeff", "use_kl_loss", "kl_loss_coef", "kl_loss_type"),
    *("policy_loss.loss_mode", "policy_loss.clip_cov_ratio", "policy_loss.clip_cov_lb"),
    *("policy_loss.clip_cov_ub", "policy_loss.kl_cov_ratio", "policy_loss.dro_beta"),
    *("policy_loss.ppo_kl_coef", "optim.lr", "optim.betas", "optim.weight_decay"),
    *("optim.clip_grad", "optim.min_lr_ratio", "optim.lr_scheduler_type"),
)
_SAME_IN_CRITIC = (
    *("ppo_mini_batch_size", "ppo_epochs", "cliprange_value", "loss_agg_mode"),
    *("model.path", "optim.lr", "optim.betas", "optim.weight_decay"),
    *("optim.clip_grad", "optim.min_lr_ratio", "optim.lr_scheduler_type"),
)
_SAME_IN_ROLLOUT = ("n", "temperature", "top_k", "top_p", "dtype", "max_num_seqs")
SAME = (
    *("data.train_batch_size", "data.max_prompt_length", "data.shuffle"),
    *("algorithm.adv_estimator", "algorithm.gamma", "algorithm.lam"),
    *("algorithm.norm_adv_by_std_in_grpo", "algorithm.use_kl_in_reward"),
    *("algorithm.kl_penalty", "algorithm.kl_ctrl.type", "algorithm.kl_ctrl.kl_coef"),
    *("algorithm.kl_ctrl.horizon", "algorithm.kl_ctrl.target_kl"),
    *("algorithm.filter_groups.metric", "algorithm.filter_groups.max_num_gen_batches"),
    *("algorithm.pf_ppo.reweight_method", "algorithm.pf_ppo.weight_pow"),
    *("algorithm.rollout_correction.rollout_is",),
    *("algorithm.rollout_correction.rollout_is_threshold",),
    *("algorithm.rollout_correction.rollout_is_batch_normalize",),
    *("algorithm.rollout_correction.rollout_rs",),
    *("algorithm.rollout_correction.rollout_rs_threshold",),
    *("algorithm.rollout_correction.bypass_mode",),
    *("algorithm.rollout_correction.loss_type", "trainer.total_training_steps"),
    *("trainer.val_before_train", "trainer.critic_warmup"),
)
"""Keys that have the same name and meaning here."""

OVERLONG = (
    "reward_model.overlong_buffer",
    "reward_model.reward_kwargs.overlong_buffer_cfg",
    "reward.reward_kwargs.overlong_buffer_cfg",
)
"""Where DAPO's penalty stands in different versions."""

DISTILLATION = "distillation.distillation_loss"
TEACHER = "distillation.teacher_models.teacher_model"

_WARMUP = "a number of steps"


def _optimizer(prefix: str, section: str) -> dict[str, Key]:
    """The keys of an optimizer that have other names here."""
    return {
        f"{prefix}.optimizer": Key(f"{section}.name", "AdamW is adamw"),
        f"{prefix}.lr_warmup_steps": Key(f"{section}.lr_warmup_steps"),
        f"{prefix}.lr_warmup_steps_ratio": Key(f"{section}.lr_warmup_steps", _WARMUP),
        f"{prefix}.warmup_style": Key(f"{section}.lr_scheduler_type"),
        f"{prefix}.override_optimizer_config": Key(f"{section}.params"),
        f"{prefix}.num_cycles": Key(None, "a cosine goes down once"),
        f"{prefix}.total_training_steps": Key(
            None, "schedules end at trainer.total_training_steps"
        ),
    }


KEYS = {
    # data
    "data.train_files": Key(
        "data.train.path", "a list there; further files stand in data.more_train"
    ),
    "data.val_files": Key(
        "data.val.path", "a list there; further files stand in data.more_val"
    ),
    "data.train_max_samples": Key("data.train.size", "left out for all"),
    "data.val_max_samples": Key("data.val.size", "left out for all"),
    "data.prompt_key": Key("data.train.prompt_key and data.val.prompt_key"),
    "data.reward_fn_key": Key(
        None, "every column reaches reward functions by its own name"
    ),
    "data.max_response_length": Key("rollout.max_response_length"),
    "data.gen_batch_size": Key(
        None, "filter_groups generates data.train_batch_size prompts at a time"
    ),
    "data.val_batch_size": Key(None, "the engine takes all questions at once"),
    "data.seed": Key("seed"),
    "data.filter_overlong_prompts": Key("data.overlong_prompts", "true is drop"),
    "data.filter_overlong_prompts_workers": Key(None, "leave it out"),
    "data.dataloader_num_workers": Key(None, "leave it out"),
    "data.truncation": Key(
        "data.overlong_prompts", "left is truncate, which keeps the end"
    ),
    "data.tokenizer": Key("model.tokenizer"),
    "data.trust_remote_code": Key(None, _NO_CODE),
    "data.apply_chat_template_kwargs": Key("data.chat_template_kwargs"),
    "data.custom_cls.path": Key(None, "write the rows to a Parquet or JSONL file"),
    "data.image_key": Key(None, "prompts are text"),
    "data.return_raw_chat": Key(None, "chat messages reach rewards as they are"),
    # the model
    "actor_rollout_ref.model.path": Key("model.path"),
    "actor_rollout_ref.model.tokenizer_path": Key("model.tokenizer"),
    "actor_rollout_ref.model.custom_chat_template": Key(
        "data.chat_template_file", "a file that holds it"
    ),
    "actor_rollout_ref.model.enable_gradient_checkpointing": Key(
        "actor.remat", "true is full, false is none"
    ),
    "actor_rollout_ref.model.enable_activation_offload": Key(
        "actor.remat", "true is offload"
    ),
    "actor_rollout_ref.model.use_remove_padding": Key("actor.pack_length", _PACK),
    "actor_rollout_ref.model.lora_rank": Key("actor.lora.rank", _NO_LORA),
    "actor_rollout_ref.model.lora_alpha": Key("actor.lora.alpha"),
    "actor_rollout_ref.model.target_modules": Key("actor.lora.modules", _MODULES),
    "actor_rollout_ref.model.lora_adapter_path": Key(
        "actor.lora.path", "with the folder's rank, alpha and modules"
    ),
    "actor_rollout_ref.model.trust_remote_code": Key(None, _NO_CODE),
    "actor_rollout_ref.model.external_lib": Key(None, _NO_CODE),
    "actor_rollout_ref.model.use_liger": Key(None, _COMPILED),
    "actor_rollout_ref.model.use_fused_kernels": Key(None, _COMPILED),
    # the policy
    **{f"{_ACTOR}{name}": Key(f"actor.{name}") for name in _SAME_IN_ACTOR},
    **_optimizer(f"{_ACTOR}optim", "actor.optim"),
    f"{_ACTOR}strategy": Key(
        None, "FSDP, tensor and context parallelism are axes of actor.mesh"
    ),
    f"{_ACTOR}ppo_micro_batch_size": Key("actor.micro_batch_size", _MICRO),
    f"{_ACTOR}ppo_micro_batch_size_per_gpu": Key("actor.micro_batch_size", _MICRO),
    f"{_ACTOR}use_dynamic_bsz": Key("actor.pack_length", _PACK),
    f"{_ACTOR}ppo_max_token_len_per_gpu": Key("actor.pack_length", _PACK),
    f"{_ACTOR}clip_ratio": Key("actor.clip_ratio_low and actor.clip_ratio_high"),
    f"{_ACTOR}grad_clip": Key("actor.optim.clip_grad"),
    f"{_ACTOR}shuffle": Key(None, "mini-batches are always drawn in a new order"),
    f"{_ACTOR}data_loader_seed": Key("seed"),
    f"{_ACTOR}ulysses_sequence_parallel_size": Key("actor.mesh.context"),
    f"{_ACTOR}use_prefix_grouper": Key("actor.share_prompts"),
    f"{_ACTOR}use_torch_compile": Key(None, _COMPILED),
    f"{_ACTOR}calculate_sum_pi_squared": Key(
        None, "computed where the estimator asks for it"
    ),
    f"{_ACTOR}checkpoint.save_contents": Key(
        "trainer.save_hf", "hf_model is true; all else is always saved"
    ),
    f"{_ACTOR}fsdp_config.fsdp_size": Key("actor.mesh.fsdp"),
    f"{_ACTOR}fsdp_config.optimizer_offload": Key(
        "actor.offload", "true is [optimizer]"
    ),
    f"{_ACTOR}fsdp_config.param_offload": Key(
        None, "weights stay on the devices; actor.mesh.fsdp splits them"
    ),
    f"{_ACTOR}fsdp_config.model_dtype": Key(None, "master weights are float32"),
    f"{_ACTOR}fsdp_config.dtype": Key("actor.dtype"),
    f"{_ACTOR}fsdp_config.reshard_after_forward": Key(
        None, "weights are gathered layer by layer, see actor.unroll"
    ),
    "actor_rollout_ref.ref.fsdp_config.param_offload": Key(
        "actor.offload", "true is [reference]"
    ),
    "actor_rollout_ref.ref.log_prob_micro_batch_size": Key(
        "actor.micro_batch_size", _MICRO
    ),
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": Key(
        "actor.micro_batch_size", _MICRO
    ),
    "actor_rollout_ref.ref.ulysses_sequence_parallel_size": Key(
        "actor.ref_mesh.context"
    ),
    # generation
    **{f"{_ROLLOUT}{name}": Key(f"rollout.{name}") for name in _SAME_IN_ROLLOUT},
    f"{_ROLLOUT}name": Key("rollout.engine", "jax, vllm, sglang or jaxrl"),
    f"{_ROLLOUT}mode": Key(None, _SAME_SAMPLER),
    f"{_ROLLOUT}seed": Key("seed"),
    f"{_ROLLOUT}do_sample": Key(None, "rollout.temperature says how tokens are drawn"),
    f"{_ROLLOUT}prompt_length": Key("data.max_prompt_length"),
    f"{_ROLLOUT}response_length": Key("rollout.max_response_length"),
    f"{_ROLLOUT}gpu_memory_utilization": Key(
        "rollout.cache_gib", "GiB of keys and values on each device"
    ),
    f"{_ROLLOUT}tensor_model_parallel_size": Key("rollout.mesh.tensor"),
    f"{_ROLLOUT}data_parallel_size": Key("rollout.mesh.data"),
    f"{_ROLLOUT}max_num_batched_tokens": Key(
        "rollout.prefill_tokens", "tokens of prompts on each replica"
    ),
    f"{_ROLLOUT}max_model_len": Key(
        None, "data.max_prompt_length + rollout.max_response_length"
    ),
    f"{_ROLLOUT}quantization": Key("rollout.quantization", "int8 or fp8"),
    f"{_ROLLOUT}calculate_log_probs": Key(None, "they are always kept"),
    f"{_ROLLOUT}ignore_eos": Key(None, "responses end at the model's stop tokens"),
    f"{_ROLLOUT}enforce_eager": Key(None, _SAME_SAMPLER),
    f"{_ROLLOUT}free_cache_engine": Key(None, _SAME_SAMPLER),
    f"{_ROLLOUT}load_format": Key(None, _SAME_SAMPLER),
    f"{_ROLLOUT}enable_chunked_prefill": Key(
        None, "long prompts are always read in pieces of rollout.prefill_tokens"
    ),
    f"{_ROLLOUT}enable_prefix_caching": Key(
        None, "the prompt of a group is read once, always"
    ),
    f"{_ROLLOUT}log_prob_micro_batch_size": Key("actor.micro_batch_size", _MICRO),
    f"{_ROLLOUT}log_prob_micro_batch_size_per_gpu": Key(
        "actor.micro_batch_size", _MICRO
    ),
    f"{_ROLLOUT}engine_kwargs.vllm": Key(
        "rollout.vllm.args", "arguments of its command line"
    ),
    f"{_ROLLOUT}val_kwargs.n": Key("val.n"),
    f"{_ROLLOUT}val_kwargs.temperature": Key("val.temperature"),
    f"{_ROLLOUT}val_kwargs.top_k": Key("val.top_k"),
    f"{_ROLLOUT}val_kwargs.top_p": Key("val.top_p"),
    f"{_ROLLOUT}val_kwargs.do_sample": Key(
        "val.greedy", "false is true; val.n sampled answers come besides"
    ),
    f"{_ROLLOUT}multi_turn.enable": Key(None, "section agent: tools or an environment"),
    # the critic
    **{f"critic.{name}": Key(f"critic.{name}") for name in _SAME_IN_CRITIC},
    **_optimizer("critic.optim", "critic.optim"),
    "critic.enable": Key(None, "algorithm.adv_estimator: gae has a critic"),
    "critic.grad_clip": Key("critic.optim.clip_grad"),
    "critic.ppo_micro_batch_size": Key("critic.micro_batch_size", _MICRO),
    "critic.ppo_micro_batch_size_per_gpu": Key("critic.micro_batch_size", _MICRO),
    "critic.ulysses_sequence_parallel_size": Key("critic.mesh.context"),
    "critic.model.lora_rank": Key("critic.lora.rank", _NO_CRITIC_LORA),
    "critic.model.lora_alpha": Key("critic.lora.alpha"),
    "critic.model.target_modules": Key("critic.lora.modules", _MODULES),
    "critic.model.enable_gradient_checkpointing": Key(
        "critic.remat", "true is full, false is none"
    ),
    # rewards
    "custom_reward_function.path": Key("reward.functions", _REWARD),
    "custom_reward_function.name": Key("reward.functions", _REWARD),
    "custom_reward_function.reward_kwargs": Key("reward.functions", "as its `params`"),
    "reward.custom_reward_function.path": Key("reward.functions", _REWARD),
    "reward.custom_reward_function.name": Key("reward.functions", _REWARD),
    "reward.custom_reward_function.reward_kwargs": Key(
        "reward.functions", "as its `params`"
    ),
    "reward_model.enable": Key("reward.model", "given or not"),
    "reward_model.model.path": Key("reward.model.path"),
    "reward_model.reward_manager": Key(
        "reward.functions", "and reward.overlong_buffer for dapo"
    ),
    "reward_model.micro_batch_size_per_gpu": Key(
        "reward.model.micro_batch_size", _MICRO
    ),
    **{
        f"{section}.{name}": Key(f"reward.overlong_buffer{here}", note)
        for section in OVERLONG
        for name, here, note in (
            ("enable", "", "given or not"),
            ("len", ".len", ""),
            ("penalty_factor", ".penalty_factor", ""),
        )
    },
    "reward.reward_manager.name": Key(
        "reward.functions", "and reward.overlong_buffer for dapo"
    ),
    "reward.reward_model.enable": Key("reward.model", "given or not"),
    "reward.reward_model.model_path": Key("reward.model.path"),
    "reward.num_workers": Key(None, "each function has a process of its own"),
    # distillation; a teacher has a name of its own below teacher_models
    "distillation.enabled": Key("distillation", "given or not"),
    f"{DISTILLATION}.loss_mode": Key(
        "distillation.mode", "k1 with use_policy_gradient is reverse_kl"
    ),
    f"{DISTILLATION}.use_policy_gradient": Key(
        "distillation.mode", "true with k1 is reverse_kl"
    ),
    f"{DISTILLATION}.topk": Key("distillation.topk"),
    f"{DISTILLATION}.use_task_rewards": Key("distillation.with_rewards"),
    f"{DISTILLATION}.distillation_loss_coef": Key(
        "distillation.coef", "it counts without rewards, too"
    ),
    f"{DISTILLATION}.loss_max_clamp": Key(
        None, "a clamped loss has no gradient; with its tail class no loss is negative"
    ),
    f"{DISTILLATION}.log_prob_min_clamp": Key(
        None, "a clamped log-probability has no gradient"
    ),
    f"{DISTILLATION}.policy_loss_mode": Key("actor.policy_loss.loss_mode"),
    f"{DISTILLATION}.clip_ratio": Key("actor.clip_ratio_low and actor.clip_ratio_high"),
    f"{DISTILLATION}.clip_ratio_low": Key("actor.clip_ratio_low"),
    f"{DISTILLATION}.clip_ratio_high": Key("actor.clip_ratio_high"),
    f"{DISTILLATION}.use_chunked_topk": Key(None, "it is always in chunks"),
    f"{DISTILLATION}.chunked_topk_chunk_size": Key(None, "it is always in chunks"),
    "distillation.n_gpus_per_node": Key(
        "distillation.teacher.mesh", "and placement.teacher for devices of its own"
    ),
    "distillation.nnodes": Key(
        "distillation.teacher.mesh", "and placement.teacher for devices of its own"
    ),
    "distillation.teacher_key": Key(None, "there is one teacher"),
    f"{TEACHER}.model_path": Key("distillation.teacher.path"),
    f"{TEACHER}.key": Key(None, "there is one teacher"),
    f"{TEACHER}.num_replicas": Key("distillation.teacher.mesh", "its axis data"),
    f"{TEACHER}.inference.tensor_model_parallel_size": Key(
        "distillation.teacher.mesh.tensor"
    ),
    f"{TEACHER}.inference.dtype": Key("distillation.teacher.dtype"),
    # the algorithm
    **{name: Key(name) for name in SAME},
    "algorithm.filter_groups.enable": Key("algorithm.filter_groups", "given or not"),
    "algorithm.use_pf_ppo": Key("algorithm.pf_ppo", "given or not"),
    # the trainer
    "trainer.total_epochs": Key("trainer.total_training_steps", _STEPS),
    "trainer.save_freq": Key("trainer.save_freq", "-1 is 0"),
    "trainer.test_freq": Key("trainer.test_freq", "-1 is 0"),
    "trainer.project_name": Key("trainer.project"),
    "trainer.experiment_name": Key("output_dir", "its last folder names the run"),
    "trainer.default_local_dir": Key("output_dir"),
    "trainer.logger": Key("trainer.loggers", "the terminal and files always"),
    "trainer.nnodes": Key(None, "jaxrl train --num-processes N on every host"),
    "trainer.n_gpus_per_node": Key(None, _ALL_DEVICES),
    "trainer.device": Key(None, _ALL_DEVICES),
    "trainer.resume_mode": Key("trainer.resume", "disable is never"),
    "trainer.resume_from_path": Key(
        None, "a run goes on from the newest checkpoint in its output_dir"
    ),
    "trainer.max_actor_ckpt_to_keep": Key("trainer.max_ckpt_to_keep"),
    "trainer.max_critic_ckpt_to_keep": Key("trainer.max_ckpt_to_keep"),
    "trainer.log_val_generations": Key("trainer.num_examples"),
    "trainer.rollout_data_dir": Key(None, _SAVED),
    "trainer.validation_data_dir": Key(None, _SAVED),
    "trainer.val_only": Key(None, "use jaxrl evaluate"),
    "trainer.balance_batch": Key(None, "packed rows have the same length"),
    "global_profiler.steps": Key("trainer.profile", "FIRST:LAST"),
}

VERL = Peer("veRL", "0.9.1", KEYS)
