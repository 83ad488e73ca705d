"""A policy loss of one's own: python examples/custom_loss.py MODEL [OUTPUT_DIR]."""

import sys

import jax.numpy as jnp

import jaxrl_llm


def tempered(logprobs, old_logprobs, advantages, *, strength=0.1):
    """The policy gradient, held back by the square of how far a token has moved."""
    ratio = jnp.exp(logprobs - old_logprobs)
    return strength * (logprobs - old_logprobs) ** 2 - advantages * ratio


def digits(completions, **_):
    """The share of digits in each reply."""
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


rows = [{"prompt": f"{i} + {i} ="} for i in range(16)]
size = {"data.train_batch_size": 4, "rollout.n": 4, "rollout.max_response_length": 16}
out = sys.argv[2] if len(sys.argv) > 2 else "runs/custom_loss"
how = {"loss": tempered, "output_dir": out, "settings": size}
jaxrl_llm.train(sys.argv[1], rows, digits, steps=2, **how)
