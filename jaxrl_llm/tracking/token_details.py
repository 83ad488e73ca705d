"""What is known of each token of the few responses that are shown token by token."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxrl_llm.data.rows import TrainBatch

NUM_RESPONSES = 4
"""Responses of a step that are shown token by token, evenly spaced over the batch."""
MAX_TOKENS = 512
"""Tokens that are shown of one response: its first."""

Decode = Callable[[list[int]], str]
"""The text of tokens, special ones too."""


def of_step(
    rows: TrainBatch, num_tokens: Sequence[int], decode: Decode
) -> dict[int, dict[str, Any]]:
    """What is known of the tokens of `NUM_RESPONSES` responses, by sequence id.

    Args:
      rows: of the step, NumPy arrays, with advantages.
      num_tokens: behind the prompt, by sequence id.
      decode: makes texts of tokens.
    """
    spread = np.linspace(0, len(num_tokens) - 1, NUM_RESPONSES).round().astype(int)
    return {
        sequence: of_response(rows, sequence, decode)
        for sequence in np.unique(spread).tolist()
        if num_tokens[sequence]
    }


def of_response(rows: TrainBatch, sequence: int, decode: Decode) -> dict[str, Any]:
    """What is known of the first `MAX_TOKENS` tokens behind the prompt of one sequence.

    Returns:
      Lists with one entry for each token: "text"; "advantage"; "logprob", the
      sampler's, in nats; and, where the trainer's log-probability before the update is
      known, "mismatch", the trainer's less the sampler's. An entry is None for a token
      that the policy did not sample, and where an engine does not tell.
    """
    at = np.nonzero((rows.sequence_ids == sequence) & ~rows.is_prompt)
    at = tuple(axis[:MAX_TOKENS] for axis in at)  # it stands in order in one row
    sampled = rows.response_mask[at]
    found = {
        "text": pieces(rows.tokens[at].tolist(), decode),
        "advantage": _plain(rows.advantages[at], sampled),
        "logprob": _plain(rows.sampler_logprobs[at], sampled),
    }
    if rows.old_logprobs is not None:
        mismatch = rows.old_logprobs[at] - rows.sampler_logprobs[at]
        found["mismatch"] = _plain(mismatch, sampled)
    return found


def pieces(tokens: Sequence[int], decode: Decode) -> list[str]:
    """The part of the text that each token adds. The bytes of a character that several
    tokens make together are the last one's."""
    found: list[str] = []
    start, end = 0, 0  # the tokens before: how a token is written depends on them
    for place in range(1, len(tokens) + 1):
        before = decode(list(tokens[start:end]))
        text = decode(list(tokens[start:place]))
        whole = not text.endswith("\ufffd") or place == len(tokens)
        if whole and len(text) > len(before):
            found.append(text[len(before) :])
            start, end = end, place
        else:
            found.append("")
    return found


def _plain(values: np.ndarray, sampled: np.ndarray) -> list[float | None]:
    known = sampled & np.isfinite(values)
    return [
        float(f"{value:.4g}") if is_known else None
        for value, is_known in zip(values.tolist(), known.tolist(), strict=True)
    ]
