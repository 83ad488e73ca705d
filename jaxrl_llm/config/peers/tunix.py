"""Tunix's keys: fields of its algorithm, training, rollout and cluster settings."""

from jaxrl_llm.config.peers.key import Key, Peer

_VLLM = "rollout.engine: vllm starts servers, see rollout.vllm"
_MESH = "actor.mesh and rollout.mesh; placement gives roles devices of their own"

KEYS = {
    # GRPOConfig, DAPOConfig, DrGRPOConfig, PPOConfig
    "num_generations": Key("rollout.n"),
    "num_iterations": Key("actor.ppo_epochs"),
    "beta": Key("actor.kl_loss_coef", "with actor.use_kl_loss: true"),
    "epsilon": Key("actor.clip_ratio_low and actor.clip_ratio_high"),
    "epsilon_low": Key("actor.clip_ratio_low"),
    "epsilon_high": Key("actor.clip_ratio_high"),
    "epsilon_c": Key("actor.clip_ratio_c"),
    "loss_algo": Key("actor.policy_loss.loss_mode", "grpo is vanilla, gspo-token gspo"),
    "policy_loss_fn": Key("actor.policy_loss.loss_mode", "or module:function"),
    "advantage_estimator": Key("algorithm.adv_estimator", "or module:function"),
    "loss_agg_mode": Key(
        "actor.loss_agg_mode", "sequence-mean-token-mean is seq-mean-token-mean"
    ),
    "kl_loss_mode": Key("actor.kl_loss_type"),
    "kl_method": Key("algorithm.kl_penalty"),
    "gamma": Key("algorithm.gamma"),
    "gae_lambda": Key("algorithm.lam"),
    "entropy_coef": Key("actor.entropy_coeff"),
    "clip_range_value": Key("critic.cliprange_value"),
    "overlong_buffer": Key("reward.overlong_buffer", "len and penalty_factor"),
    "dynamic_sampling": Key("algorithm.filter_groups", "given or not"),
    "reward_fns": Key("reward.functions", "with TRL's signature"),
    "reward_manager": Key("reward.functions"),
    # RLTrainingConfig
    "actor_optimizer": Key("actor.optim", "optax:NAME is a name too"),
    "critic_optimizer": Key("critic.optim", "optax:NAME is a name too"),
    "mini_batch_size": Key("actor.ppo_mini_batch_size", "prompts"),
    "train_micro_batch_size": Key("actor.micro_batch_size", "rows, not prompts"),
    "rollout_micro_batch_size": Key("rollout.max_num_seqs", "responses, not prompts"),
    "compute_logps_micro_batch_size": Key("actor.micro_batch_size", "rows"),
    "max_steps": Key("trainer.total_training_steps"),
    "eval_every_n_steps": Key("trainer.test_freq"),
    "checkpoint_root_directory": Key("output_dir"),
    "checkpointing_options": Key("trainer.save_freq and trainer.max_ckpt_to_keep"),
    "metrics_logging_options": Key("trainer.loggers"),
    "profiler_options": Key("trainer.profile", "FIRST:LAST"),
    "data_sharding_axis": Key(None, "actor.rules says what is split over what"),
    "max_seq_token_per_tpu": Key("actor.pack_length", "tokens in a packed row"),
    # RolloutConfig
    "max_tokens_to_generate": Key("rollout.max_response_length"),
    "max_prompt_length": Key("data.max_prompt_length"),
    "kv_cache_size": Key("rollout.cache_gib", "GiB on each device"),
    "eos_tokens": Key("rollout.stop_token_ids"),
    "temperature": Key("rollout.temperature"),
    "top_p": Key("rollout.top_p"),
    "top_k": Key("rollout.top_k"),
    "seed": Key("seed"),
    "tensor_parallel_size": Key("rollout.mesh.tensor"),
    "data_parallel_size": Key("rollout.mesh.data"),
    "return_logprobs": Key(None, "they are always kept"),
    "rollout_vllm_max_num_seqs": Key("rollout.max_num_seqs"),
    "rollout_vllm_max_num_batched_tokens": Key("rollout.prefill_tokens"),
    "rollout_vllm_hbm_utilization": Key("rollout.cache_gib", "GiB on each device"),
    "rollout_vllm_kwargs": Key("rollout.vllm.args", _VLLM),
    # ClusterConfig
    "rollout_engine": Key("rollout.engine", "vanilla is jax"),
    "role_to_mesh": Key("placement", _MESH),
    "role_to_logical_axis_rule": Key("actor.rules"),
    "offload_to_cpu": Key("actor.offload", "[optimizer, reference]"),
}

TUNIX = Peer("Tunix", "0.1.7", KEYS)
