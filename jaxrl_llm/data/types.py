"""What flows through a step on the host: prompts, the responses to them, and what
those are worth."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32

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
    raw_logprobs: np.ndarray | None
    """float32 [t], nats: under the model's own distribution (temperature 1, nothing
    cut off); None where an engine does not tell."""
    finish_reason: str
    """"stop": a stop token or string ended it. "length": it reached its limit."""
    weight_version: int
    """The training step that made the weights it was sampled with."""
    text: str
    """Decoded, without special tokens and without the stop string."""
    top_tokens: np.ndarray | None = None
    """int32 [t, N]: the most likely ones at every position, the first first; None where
    none were asked for."""
    top_logprobs: np.ndarray | None = None
    """float32 [t, N], nats: theirs, under the distribution that was sampled from; at
    temperature 0, where that is a single token, under softmax(logits)."""
    prompt_logprobs: np.ndarray | None = None
    """float32 [p - 1], nats: of the prompt's tokens but the first, under the model's
    own distribution; None where they were not asked for."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The rewards of one step. Lives on the host."""

    total: Float32[np.ndarray, "P G"]
    """Sum over functions of weight * score. A function that does not judge a response
    adds nothing to it; a response that none judges has 0."""
    by_function: dict[str, Float32[np.ndarray, "P G"]]
    """Unweighted; NaN where the function returned None: it does not judge this one."""
    errors: dict[str, int]
    """Per function, how many responses scored 0 because it failed on them."""

    def take(self, prompts: Sequence[int]) -> "Scores":
        """Of the given prompts only. `errors` still counts all of them."""
        picked = np.asarray(prompts, np.intp)
        by_function = {name: x[picked] for name, x in self.by_function.items()}
        return Scores(
            total=self.total[picked], by_function=by_function, errors=self.errors
        )
