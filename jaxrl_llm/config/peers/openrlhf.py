"""OpenRLHF's keys: options of openrlhf.cli.train_ppo_ray."""

from jaxrl_llm.config.peers.key import Key, Peer

_DEVICES = "the devices that are here are used; placement gives roles some of them"
_MICRO = "rows of all devices together; leave it out and what fits is found"
_SERVERS = (
    "the jax engine lives in the trainer; rollout.vllm.devices has one server each"
)
_ESTIMATORS = (
    "group_norm is grpo, dr_grpo grpo with norm_adv_by_std_in_grpo: false, "
    "reinforce reinforce_plus_plus, reinforce_baseline reinforce_plus_plus_baseline"
)
_IMPORTANCE = "rollout_is and rollout_is_threshold, rollout_rs and rollout_rs_threshold"

KEYS = {
    "actor.model_name_or_path": Key("model.path"),
    "critic.model_name_or_path": Key("critic.model.path"),
    "reward.model_name_or_path": Key("reward.model.path"),
    "reward.remote_url": Key(
        "reward.functions", "module:function, which may call a server"
    ),
    "train.agent_func_path": Key(
        None, "agent.environment takes a class with reset and step"
    ),
    "data.prompt_dataset": Key("data.train.path", "hub:NAME for the hub"),
    "data.prompt_split": Key("data.train.split"),
    "data.prompt_probs": Key(
        "data.more_train", "each set has its `size`, no probability"
    ),
    "data.input_key": Key("data.train.prompt_key"),
    "data.label_key": Key("data.train.answer_key"),
    "data.input_template": Key("data.train.prompt_template", "{COLUMN}, not {}"),
    "data.apply_chat_template": Key("data.chat_template", "true if not given"),
    "data.max_samples": Key("data.train.size"),
    "data.max_len": Key("data.max_prompt_length and rollout.max_response_length"),
    "eval.dataset": Key("data.val.path"),
    "eval.split": Key("data.val.split"),
    "eval.steps": Key("trainer.test_freq", "-1 is 0"),
    "eval.temperature": Key("val.temperature"),
    "eval.n_samples_per_prompt": Key("val.n"),
    "rollout.batch_size": Key("data.train_batch_size", "prompts in both"),
    "rollout.n_samples_per_prompt": Key("rollout.n"),
    "rollout.max_new_tokens": Key("rollout.max_response_length"),
    "rollout.temperature": Key("rollout.temperature"),
    "rollout.top_p": Key("rollout.top_p"),
    "rollout.micro_batch_size": Key("actor.micro_batch_size", _MICRO),
    "rollout.max_tokens_per_gpu": Key("actor.pack_length", "tokens in a packed row"),
    "train.batch_size": Key(
        "actor.ppo_mini_batch_size",
        "responses there, prompts here: divide by rollout.n_samples_per_prompt",
    ),
    "train.micro_batch_size": Key("actor.micro_batch_size", _MICRO),
    "train.max_tokens_per_gpu": Key("actor.pack_length", "tokens in a packed row"),
    "train.dynamic_batch_enable": Key("actor.pack_length", "tokens in a packed row"),
    "ds.packing_samples": Key("actor.pack_length", "tokens in a packed row"),
    "train.max_epochs": Key("actor.ppo_epochs"),
    "train.num_episodes": Key(
        "trainer.total_training_steps", "episodes x rows / data.train_batch_size"
    ),
    "train.seed": Key("seed"),
    "train.async_enable": Key(None, "generation and updates take turns"),
    "train.colocate_all": Key("placement", "all roles share all devices by default"),
    "actor.eps_clip": Key("actor.clip_ratio_low and actor.clip_ratio_high"),
    "actor.eps_clip_low_high": Key("actor.clip_ratio_low and actor.clip_ratio_high"),
    "actor.dual_clip": Key("actor.clip_ratio_c", "null for none"),
    "actor.policy_loss_type": Key(
        "actor.policy_loss.loss_mode", "ppo is vanilla, gspo gspo"
    ),
    "actor.loss_agg_mode": Key("actor.loss_agg_mode"),
    "actor.entropy_coef": Key("actor.entropy_coeff"),
    "actor.adam.lr": Key("actor.optim.lr"),
    "actor.adam.betas": Key("actor.optim.betas"),
    "actor.adam.weight_decay": Key("actor.optim.weight_decay"),
    "actor.max_norm": Key("actor.optim.clip_grad"),
    "actor.lr_scheduler": Key(
        "actor.optim.lr_scheduler_type", "constant, cosine or linear"
    ),
    "actor.lr_warmup_ratio": Key("actor.optim.lr_warmup_steps", "a number of steps"),
    "actor.gradient_checkpointing_enable": Key("actor.remat", "true is full"),
    "actor.num_gpus_per_node": Key(None, _DEVICES),
    "critic.value_clip": Key("critic.cliprange_value"),
    "critic.freezing_steps": Key("trainer.critic_warmup"),
    "algo.advantage.estimator": Key("algorithm.adv_estimator", _ESTIMATORS),
    "algo.advantage.gamma": Key("algorithm.gamma"),
    "algo.advantage.lambd": Key("algorithm.lam"),
    "algo.advantage.no_std_norm": Key(
        "algorithm.norm_adv_by_std_in_grpo", "true is false"
    ),
    "algo.advantage.is_correction_level": Key(
        "algorithm.rollout_correction", _IMPORTANCE
    ),
    "algo.kl.init_coef": Key(
        "algorithm.kl_ctrl.kl_coef", "actor.kl_loss_coef if use_loss is on"
    ),
    "algo.kl.target": Key("algorithm.kl_ctrl.target_kl", "with type: adaptive"),
    "algo.kl.horizon": Key("algorithm.kl_ctrl.horizon"),
    "algo.kl.estimator": Key("algorithm.kl_penalty", "or actor.kl_loss_type"),
    "algo.kl.use_loss": Key("actor.use_kl_loss", "false: algorithm.use_kl_in_reward"),
    "algo.dynamic_filtering_enable": Key("algorithm.filter_groups", "given or not"),
    "algo.dynamic_filtering_range": Key(
        None, "filter_groups keeps the groups whose responses differ"
    ),
    "reward.clip_range": Key(None, "a function of your own can clip what it returns"),
    "reward.normalize_enable": Key(None, "the advantage estimators normalise"),
    "reward.overlong_buffer_len": Key("reward.overlong_buffer.len"),
    "reward.overlong_penalty_factor": Key("reward.overlong_buffer.penalty_factor"),
    "ref.offload": Key("actor.offload", "[reference]"),
    "reward.offload": Key("reward.model.offload"),
    "ds.adam_offload": Key("actor.offload", "[optimizer]"),
    "ds.zero_stage": Key("actor.mesh.fsdp", "rows and weights are split over it"),
    "ds.tensor_parallel_size": Key("actor.mesh.tensor"),
    "ds.ring_attn_size": Key("actor.mesh.context"),
    "ds.param_dtype": Key("actor.dtype"),
    "ds.attn_implementation": Key("actor.attention", "auto takes flash attention"),
    "ds.lora.rank": Key("actor.lora.rank", "0 is actor.lora null"),
    "ds.lora.alpha": Key("actor.lora.alpha"),
    "vllm.num_engines": Key("rollout.mesh.data", _SERVERS),
    "vllm.tensor_parallel_size": Key("rollout.mesh.tensor"),
    "vllm.gpu_memory_utilization": Key("rollout.cache_gib", "GiB on each device"),
    "vllm.enable_sleep": Key(None, "the jax engine needs no such setting"),
    "ckpt.output_dir": Key("output_dir"),
    "ckpt.path": Key("output_dir"),
    "ckpt.save_steps": Key("trainer.save_freq", "-1 is 0"),
    "ckpt.max_num": Key("trainer.max_ckpt_to_keep"),
    "ckpt.load_enable": Key("trainer.resume", "auto does so by itself"),
    "ckpt.save_hf": Key("trainer.save_hf"),
    "logger.wandb.project": Key("trainer.project", "with loggers: [wandb]"),
    "logger.wandb.key": Key(None, "WANDB_API_KEY, or `wandb login`"),
    "logger.tensorboard_dir": Key("trainer.loggers", "[tensorboard]"),
}

OPENRLHF = Peer("OpenRLHF", "0.11.2", KEYS)
