"""TRL's keys of trainers that learn from rows: SFTConfig, RewardConfig, DPOConfig."""

from jaxrl_llm.config.peers.key import Key, Peer

_ROWS = "rows of all devices and of all accumulated batches together"
_LENGTH = "RewardTrainer drops longer rows: data.overlong: drop"

KEYS = {
    # the model
    "model_name_or_path": Key("model.path"),
    "model_revision": Key("model.revision"),
    "dtype": Key("learner.dtype"),
    "attn_implementation": Key("learner.attention", "auto takes flash attention"),
    "trust_remote_code": Key(
        None, "models are built in, and no code of a model's is ever run"
    ),
    "disable_dropout": Key(None, "there is no dropout"),
    "chat_template_path": Key("data.chat_template_file"),
    "eos_token": Key("data.end_of_turn"),
    "pad_token": Key(None, "rows are padded where no token sees it"),
    # data
    "dataset_name": Key("data.train.path", "hub:NAME for the hub"),
    "dataset_config": Key("data.train.params", "{name: CONFIG}"),
    "dataset_train_split": Key("data.train.split"),
    "dataset_test_split": Key("data.val.split"),
    "dataset_streaming": Key(None, "data.train.size says how many rows are read"),
    "dataset_text_field": Key("data.text_key"),
    "max_length": Key("data.max_length", _LENGTH),
    "truncation_mode": Key("data.overlong", "truncate keeps the start"),
    "packing": Key("learner.pack_length", "tokens of a packed row"),
    "padding_free": Key("learner.pack_length", "tokens of a packed row"),
    "completion_only_loss": Key("data.completion_only_loss"),
    "assistant_only_loss": Key("data.assistant_only_loss"),
    "pad_to_multiple_of": Key(None, "rows have few shapes by themselves"),
    # batches
    "per_device_train_batch_size": Key("data.train_batch_size", _ROWS),
    "gradient_accumulation_steps": Key("data.train_batch_size", _ROWS),
    "per_device_eval_batch_size": Key(None, "as many rows as a step has"),
    # the loss
    "loss_type": Key("loss_type"),
    "loss_weights": Key("loss_weights"),
    "beta": Key("beta"),
    "label_smoothing": Key("label_smoothing", "of loss_type robust"),
    "center_rewards_coefficient": Key(
        "center_rewards_coefficient", "null there, 0 here for none"
    ),
    "precompute_ref_log_probs": Key(None, "they always are, once, and are kept"),
    "precompute_ref_batch_size": Key(None, "as many pairs as a step has"),
    "sync_ref_model": Key(None, "the reference stays the model to start from"),
    "f_divergence_type": Key(None, "reverse_kl; a loss of your own can do others"),
    "ld_alpha": Key(None, "all tokens of an answer count the same"),
    "use_weighting": Key(None, "pairs count the same"),
    # the optimizer
    "learning_rate": Key("learner.optim.lr"),
    "weight_decay": Key("learner.optim.weight_decay"),
    "adam_beta1": Key("learner.optim.betas", "[beta1, beta2]"),
    "adam_beta2": Key("learner.optim.betas", "[beta1, beta2]"),
    "adam_epsilon": Key("learner.optim.eps"),
    "max_grad_norm": Key("learner.optim.clip_grad"),
    "lr_scheduler_type": Key(
        "learner.optim.lr_scheduler_type", "constant, cosine or linear"
    ),
    "warmup_steps": Key("learner.optim.lr_warmup_steps"),
    "warmup_ratio": Key("learner.optim.lr_warmup_steps", "a number of steps"),
    "optim": Key("learner.optim.name", "adamw, or optax:NAME"),
    # the run
    "output_dir": Key("output_dir"),
    "max_steps": Key("trainer.total_training_steps"),
    "num_train_epochs": Key("trainer.total_epochs"),
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
    "gradient_checkpointing": Key("learner.remat", "true is full, false is none"),
    "bf16": Key("learner.dtype", "bfloat16"),
    "use_liger_kernel": Key(None, "XLA compiles everything"),
    "activation_offloading": Key("learner.remat", "offload"),
    "push_to_hub": Key(None, "output_dir/huggingface can be uploaded"),
}

TRL_OFFLINE = Peer("TRL", "1.16", KEYS)
