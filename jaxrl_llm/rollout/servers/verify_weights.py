"""Does a server hold the weights that it was sent? Its log-probabilities tell.

Shapes: N = probe sequences, T = tokens in the longest.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm import models
from jaxrl_llm.algorithms import logprobs


class Probes(NamedTuple):
    """Sequences to score, one per row, padded at their ends."""

    tokens: Int[np.ndarray, "N T"]
    asked: Bool[np.ndarray, "N T"]
    """True on every token but the first, whose log-probability nobody knows, and
    padding."""


def rows(sequences: Sequence[Sequence[int]]) -> Probes:
    """Pads sequences of tokens to rows."""
    lengths = np.array([len(sequence) for sequence in sequences])[:, None]
    tokens = np.zeros((len(sequences), lengths.max()), np.int32)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[: len(sequence)] = sequence
    place = np.arange(tokens.shape[1])[None]
    return Probes(tokens, (place > 0) & (place < lengths))


@functools.partial(
    jax.jit,
    static_argnames=("arch", "dtype", "lora"),
    compiler_options=models.COMPILER_OPTIONS,
)
def score(
    params: Any,
    tokens: Int[Array, "N T"],
    asked: Bool[Array, "N T"],
    *,
    arch: models.Architecture,
    dtype: Any,
    lora: models.Lora | None = None,
) -> Float[Array, "N T"]:
    """What the trainer makes of probes: log-probability of each token, 0.0 where not
    asked, nats.

    Args:
      params: stacked, in the training layout; with adapters if `lora` is given.
      dtype: weights are rounded to it, as they are sent; the rest is float32.
    """
    sent = jax.tree.map(lambda x: x.astype(dtype), params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    one = jnp.zeros_like(tokens)
    how = {"dtype": jnp.float32, "lora": lora}
    hidden = models.forward(arch, sent, tokens, positions, one, **how)
    matrix = models.output_matrix(sent).astype(jnp.float32)
    return logprobs.of_tokens(
        hidden, matrix, tokens, positions, asked, logit_softcap=arch.logit_softcap
    ).logprobs


def difference(
    server: Float[np.ndarray, "N T"],
    trainer: Float[np.ndarray, "N T"],
    asked: Bool[np.ndarray, "N T"],
) -> tuple[float, float]:
    """Mean and maximum of |server - trainer| over the tokens asked for, nats."""
    off = np.abs(server - trainer)[asked]
    return float(off.mean()), float(off.max())


def followed(
    server: Float[np.ndarray, " n"], trainer: Float[np.ndarray, " n"]
) -> tuple[float, float]:
    """How much of the trainer's change since the last transfer the server has made.

        slope = <server, trainer> / <trainer, trainer>

    1 if the server took all of the new weights, 0 if it took none, something between
    if it took some; (1, inf) if the trainer did not change.

    Args:
      server: change of the server's log-probabilities of the probes' tokens.
      trainer: change of the trainer's.

    Returns:
      The slope of the regression through the origin, and its standard error.
    """
    server, trainer = server.astype(np.float64), trainer.astype(np.float64)
    moved = float(trainer @ trainer)
    if not moved:
        return 1.0, float("inf")
    slope = float(server @ trainer) / moved
    rest = server - slope * trainer
    return slope, float(np.sqrt(rest @ rest / max(1, len(rest) - 1) / moved))
