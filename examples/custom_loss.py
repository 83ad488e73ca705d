"""A policy loss of one's own: python examples/custom_loss.py MODEL OUTPUT_DIR"""

import sys

import jax.numpy as jnp

import jaxrl_llm


def tempered(logprobs, old_logprobs, advantages, *, strength=0.1):
    """The policy gradient, and a pull back to where the step began."""
    moved = logprobs - old_logprobs
    return strength * moved**2 - advantages * jnp.exp(moved)


def brevity(completion_ids, **_):
    """Short replies are better."""
    return [1 / (1 + len(ids)) for ids in completion_ids]


rows = [{"prompt": f"{i} + {i} ="} for i in range(16)]
size = {"data.train_batch_size": 4, "rollout.n": 4, "rollout.max_response_length": 16}
how = {"steps": 2, "settings": size, "output_dir": sys.argv[2]}
jaxrl_llm.train(sys.argv[1], rows, brevity, loss=tempered, **how)
