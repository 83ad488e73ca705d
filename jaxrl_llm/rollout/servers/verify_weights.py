"""Does a server hold the weights that it was sent? Its log-probabilities tell.

Shapes: N = probe sequences, T = tokens in the longest.
"""

import asyncio
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm import models
from jaxrl_llm.algorithms import logprobs
from jaxrl_llm.rollout.servers.replicas import Replica
from jaxrl_llm.rollout.servers.server import Server, ServerError

_NUM_PROBES, _PROBE_TOKENS = 16, 32


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
    sent = jax.tree.map(lambda x: x.astype(dtype), models.plain(params, dtype))
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


class Verification:
    """Compares servers with the trainer after each transfer of weights.

    Args:
      arch: the model's shape.
      prompts: tokens of questions; responses to the first of them become the probes.
      dtype: that weights are rounded to on their way.
      max_model_len: longest prompt and response together, tokens.
      max_probe_diff: largest mean difference, nats.
      attached: whether the servers run already.
      lora: the adapters of the weights, if they have any.
    """

    def __init__(
        self,
        arch: models.Architecture,
        prompts: Sequence[Sequence[int]],
        *,
        dtype: Any,
        max_model_len: int,
        max_probe_diff: float,
        attached: bool,
        lora: models.Lora | None,
    ):
        self._arch, self._dtype, self._lora = arch, dtype, lora
        self._prompts = [tuple(p) for p in prompts[:_NUM_PROBES]]
        self._max_len, self._most = max_model_len, max_probe_diff
        self._attached = attached
        self._version = -1
        self._probes: Probes | None = None
        self._scores: np.ndarray | None = None

    async def make_probes(self, server: Server) -> None:
        """Has the questions answered, once."""
        if self._probes is None:
            length = min(_PROBE_TOKENS, self._max_len - max(map(len, self._prompts)))
            answers = await asyncio.gather(
                *[server.sample(tokens, length) for tokens in self._prompts]
            )
            pairs = zip(self._prompts, answers, strict=True)
            most = self._max_len - 1  # who scores samples a token, too
            self._probes = rows([[*tokens, *answer][:most] for tokens, answer in pairs])

    def score(self, params: Any, version: int) -> None:
        """Has the trainer score the probes with new weights."""
        tokens, asked = self._probes
        how = {"arch": self._arch, "dtype": self._dtype, "lora": self._lora}
        self._scores = np.asarray(score(params, tokens, asked, **how))
        self._version = version

    async def verify(self, replica: Replica) -> dict[str, float]:
        """Has a server score the probes.

        Returns:
          rollout/probe_diff_mean and _max, and rollout/probe_followed if it has been
          verified before; nothing if there is nothing to compare with yet.

        Raises:
          ServerError: it holds other weights than the trainer's.
        """
        if self._scores is None:
            return {}
        tokens, asked = self._probes
        ends = asked.sum(axis=1) + 1
        told = await asyncio.gather(
            *[
                replica.server.score(row[:end].tolist())
                for row, end in zip(tokens, ends, strict=True)
            ]
        )
        server = np.zeros(tokens.shape, np.float32)
        server[asked] = np.concatenate(told)
        mean, most = difference(server, self._scores, asked)
        found = {"rollout/probe_diff_mean": mean, "rollout/probe_diff_max": most}
        what = (
            f"{replica.server.url} does not hold the weights of step {self._version}: "
            f"its log-probabilities of {asked.sum()} probe tokens are "
            f"{server[asked].mean():.4f} on average, the trainer's "
            f"{self._scores[asked].mean():.4f};"
        )
        hint = replica.server.why_stale(self._arch) if self._attached else ""
        if not mean <= self._most:
            raise ServerError(
                f"{what} they differ by {mean:.4f}, "
                f"{replica.server.section}.max_probe_diff is {self._most}{hint}"
            )
        if replica.verified:
            before, wanted = replica.verified
            slope, error = followed(
                (server - before)[asked], (self._scores - wanted)[asked]
            )
            if abs(slope - 1) > 0.25 + 5 * error:
                raise ServerError(
                    f"{what} they made {slope:.2f} of the trainer's change since the "
                    f"last transfer (standard error {error:.2f}){hint}"
                )
            found["rollout/probe_followed"] = slope
        replica.verified = server, self._scores
        return found
