"""An estimator of one's own: python examples/custom_advantage.py MODEL OUTPUT_DIR"""

import sys

import jax.numpy as jnp

import jaxrl_llm


def against_median(rewards, lengths):
    """How much better than the median of its group; long responses count less."""
    better = rewards - jnp.median(rewards, axis=1, keepdims=True)
    return better / jnp.sqrt(jnp.maximum(lengths, 1))


def brevity(completion_ids, **_):
    """Short replies are better."""
    return [1 / (1 + len(ids)) for ids in completion_ids]


rows = [{"prompt": f"{i} + {i} ="} for i in range(16)]
size = {"data.train_batch_size": 4, "rollout.n": 4, "rollout.max_response_length": 16}
how = {"steps": 2, "settings": size, "output_dir": sys.argv[2]}
jaxrl_llm.train(sys.argv[1], rows, brevity, advantage=against_median, **how)
