"""Every choice of a configuration, named once."""

import difflib
import re
from collections.abc import Iterable
from typing import Literal

Aggregation = Literal[
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
]


KlEstimator = Literal[
    "k1", "k2", "k3", "abs", "kl", "mse", "low_var_kl",
    "k1+", "k2+", "k3+", "abs+", "kl+", "mse+", "low_var_kl+",
]  # fmt: skip


REJECTIONS = (
    "token_k1", "token_k2", "token_k3",
    "seq_sum_k1", "seq_sum_k2", "seq_sum_k3",
    "seq_mean_k1", "seq_mean_k2", "seq_mean_k3",
    "seq_max_k2", "seq_max_k3",
)  # fmt: skip


Bounds = tuple[float | None, float]


Dimension = Literal[
    "layers", "vocab", "embed", "mlp", "heads", "kv_heads", "head", "norm", "rank",
    "split_rank", "looked_up", "rows", "tokens", "residual",
]  # fmt: skip


TrainAxis = Literal["data", "fsdp", "expert", "context", "tensor"]


TrainRules = dict[Dimension, TrainAxis | tuple[TrainAxis, ...] | None]


Overlong = Literal["error", "truncate", "drop"]


Status = Literal[
    "completed",
    "max_turns",
    "max_tokens",
    "context",
    "parse_error",
    "tool_timeout",
    "env_error",
]
"""Why an episode ended: by itself; at the most turns, at the most tokens, or at the
longest sequence that it may have; by a call that could not be read; because its
environment took too long, or broke."""


class ConfigError(ValueError):
    """A configuration that makes no run; the message has one line per problem."""


def near(name: str, known: Iterable[str]) -> str:
    """The end of an error message, if one of `known` is spelled much like `name`."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {found[0]!r}?" if found else ""


def device_numbers(text: str) -> list[int]:
    """What "0-3" or "0,2,4-5" stands for.

    Raises:
      ValueError: it is no such text.
    """
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        first, last = (int(x or match[1]) for x in match.groups()) if match else (1, 0)
        if last < first:
            raise ValueError(f"{text!r} are no device numbers, such as 0-3 or 0,2,4-5")
        found += range(first, last + 1)
    return found
