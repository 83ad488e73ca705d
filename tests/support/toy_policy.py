"""A policy of three small matrices, and six episodes that begin with three prompts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from observations import insert

from jaxrl_llm.algorithms import grpo, logprobs
from jaxrl_llm.data.packing import Layout, make_rows
from jaxrl_llm.data.rows import previous_tokens
from jaxrl_llm.data.types import Completion, Episode, Prompt

VOCAB, WIDTH = 7, 4
OPTIMIZER = optax.sgd(0.1)
RNG = np.random.default_rng(0)


def draw(low, high, size):
    return RNG.integers(low, high, size)


PROMPTS = [
    Prompt(id=p, content="", tokens=tuple(draw(0, VOCAB, n).tolist()), columns={})
    for p, n in enumerate([3, 5, 2])
]
SAMPLED = [
    [
        Completion(
            prompt_id=p,
            sample=g,
            tokens=draw(0, VOCAB, n).astype(np.int32),
            logprobs=RNG.uniform(-3, -1, n).astype(np.float32),
            raw_logprobs=np.zeros(n, np.float32),
            finish_reason="stop",
            weight_version=0,
            text="",
        )
        for g, n in enumerate(lengths)
    ]
    for p, lengths in enumerate([(1, 4), (2, 6), (3, 1)])
]
# What tools say before which sampled tokens: nothing, at the start, within, repeatedly.
OBSERVED = {(0, 1): {0: [2, 5]}, (1, 1): {1: [3], 4: [6, 0]}, (2, 0): {0: [1], 2: [4]}}
EPISODES = [
    [insert(Episode.of(c), OBSERVED.get((p, g), {})) for g, c in enumerate(group)]
    for p, group in enumerate(SAMPLED)
]
ADVANTAGES = np.array([[1.0, -1.0], [0.3, -0.3], [-2.0, 2.0]], np.float32)


def hidden_states(params, rows):
    """What the policy knows after each token."""
    known = params["tokens"][rows.tokens] + params["positions"][rows.positions]
    return jnp.tanh(known)


@jax.jit
def logprob_fn(params, rows):
    """Position and token embeddings into a linear output: no attention, so packing is
    only a matter of positions and of what stands before a token."""
    return logprobs.of_tokens(
        hidden_states(params, rows),
        params["output"],
        rows.tokens,
        rows.positions,
        rows.response_mask,
        previous=previous_tokens(rows),
    )


def make_state(optimizer=OPTIMIZER, key=0):
    keys = jax.random.split(jax.random.key(key), 3)
    params = {
        "tokens": jax.random.normal(keys[0], (VOCAB, WIDTH)),
        "positions": jax.random.normal(keys[1], (16, WIDTH)),
        "output": jax.random.normal(keys[2], (VOCAB, WIDTH)),
    }
    return grpo.TrainState(params, optimizer.init(params), jnp.int32(0))


def make_batch(order=(0, 1, 2), off_policy=True, **how):
    """Off-policy: old and reference log-probabilities are those of other weights."""
    batch = make_rows(
        [PROMPTS[p] for p in order],
        [EPISODES[p] for p in order],
        ADVANTAGES[list(order)],
        layout=Layout(**how),
    )
    batch = jax.device_put(batch)
    if not off_policy:
        return batch
    near = jax.tree.map(
        lambda x, y: x + 0.2 * y, make_state().params, make_state(key=1).params
    )
    old = logprob_fn(near, batch).logprobs
    return dataclasses.replace(batch, old_logprobs=old, ref_logprobs=old - 0.1)
