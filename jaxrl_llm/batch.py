"""What flows through a step: prompts, rollouts, rows to train on. One alignment.

P = prompts, G = responses per prompt, B = P * G sequences; R = rows, T = tokens in a
row. Index t of every token array talks about token t. In particular `logprobs[r, t]`
is the log-probability of `tokens[r, t]` given the tokens before it in its sequence, so
no caller ever shifts. Positions where `response_mask` is False hold 0, never garbage.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Message = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One question, tokenized. Lives on the host."""

    id: int
    """Index in the data set before shuffling; part of the key of its random numbers."""
    content: str | list[Message]
    """What the data set says: plain text, or chat messages. Reward functions get it."""
    tokens: tuple[int, ...]
    """After the chat template and, where allowed, truncation."""
    columns: Mapping[str, Any]
    """Every other column of the row ("answer", ...), for the reward functions."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One response, as an engine returns it. Lives on the host.

    The three arrays have one entry per sampled token, the stop token included.
    """

    prompt_id: int
    sample: int
    """0 .. G-1: which of the responses to this prompt."""
    tokens: np.ndarray
    """int32 [t]."""
    logprobs: np.ndarray
    """float32 [t], nats: under the distribution that was sampled from (after
    temperature, top-k, top-p and min-p)."""
    raw_logprobs: np.ndarray
    """float32 [t], nats: under the model's own distribution (temperature 1, nothing
    cut off)."""
    finish_reason: str
    """"stop": a stop token or string ended it. "length": it reached its limit."""
    weight_version: int
    """Which `Engine.load` produced the weights that sampled it."""
    text: str
    """Decoded, without special tokens and without the stop string."""
