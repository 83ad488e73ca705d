"""An estimator of one's own: python examples/custom_advantage.py MODEL [OUTPUT_DIR]."""

import sys

import jax.numpy as jnp

import jaxrl_llm


def against_median(rewards, lengths):
    """How much better than the median of its group; long responses count less."""
    return (rewards - jnp.median(rewards, axis=1, keepdims=True)) / jnp.sqrt(lengths)


def digits(completions, **_):
    """The share of digits in each reply."""
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


rows = [{"prompt": f"{i} + {i} ="} for i in range(16)]
size = {"data.train_batch_size": 4, "rollout.n": 4, "rollout.max_response_length": 16}
out = sys.argv[2] if len(sys.argv) > 2 else "runs/custom_advantage"
how = {"advantage": against_median, "output_dir": out, "settings": size}
jaxrl_llm.train(sys.argv[1], rows, digits, steps=2, **how)
