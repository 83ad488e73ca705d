"""Runs of a few steps on sixteen questions, in this process."""

import json

import jax
import numpy as np

from jaxrl_llm.config import parsing
from jaxrl_llm.training.checkpoint import Checkpoints

# What `make_config` needs changed to train without a critic.
GRPO = {
    "algorithm.adv_estimator": "grpo",
    "critic.optim.lr": 1e-5,
    "critic.dtype": "bfloat16",
    "critic.remat": "full",
    "critic.mesh": {},
}

# What it needs changed to play episodes of up to three turns.
EPISODES = GRPO | {
    "agent.environment": "letters:Letters",
    "agent.isolation": "thread",
    "reward.functions": [],
    "data.chat_template": True,
    "data.max_prompt_length": 64,
    "agent.max_tokens": 80,
    # A random model hardly ever says the end of a turn.
    "rollout.stop_token_ids": list(range(120)),
    "rollout.max_response_length": 8,
    "trainer.total_training_steps": 2,
}


def make_config(weights, directory, **changed):
    questions = directory / "questions.jsonl"
    directory.mkdir(exist_ok=True)
    rows = [{"prompt": f"{i} says", "answer": ""} for i in range(16)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {
        "output_dir": str(directory / "run"),
        "model.path": weights,
        "data.train.path": str(questions),
        "data.train_batch_size": 8,
        "data.max_prompt_length": 10,
        "data.chat_template": False,
        "rollout.n": 2,
        "rollout.max_response_length": 6,
        "rollout.decode_chunk": 6,
        "rollout.dtype": "float32",
        "algorithm.adv_estimator": "gae",
        "actor.optim.lr": 3e-3,
        "actor.dtype": "float32",
        "actor.remat": "none",
        "actor.mesh": {"data": -1, "fsdp": 1},
        "critic.optim.lr": 3e-3,
        "critic.dtype": "float32",
        "critic.remat": "none",
        "critic.mesh": {"data": -1, "fsdp": 1},
        "reward.functions": [{"name": "high"}],
        "trainer.total_training_steps": 3,
        "trainer.save_hf": False,
    } | changed  # fmt: skip
    values = {}
    for key, value in fields.items():
        parsing.put(values, key.split("."), value)
    return parsing.parse(values, "test")


def newest(directory, like):
    """The arrays of the newest checkpoint."""
    with Checkpoints(directory / "checkpoints", 2) as checkpoints:
        return jax.device_get(checkpoints.restore(like).state)


def mean_id(completion_ids, **columns):
    return [float(np.mean(ids)) / 256 for ids in completion_ids]
