"""Supervised fine-tuning as a pure function from training state to training state.

    state, metrics = sft.update(state, batch, logprob_fn=..., optimizer=...)

Like `grpo.update`, nothing here is jitted, closes over anything or knows a model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jaxrl_llm.algorithms import masked
from jaxrl_llm.algorithms import update as updates
from jaxrl_llm.algorithms.logprobs import Logprobs
from jaxrl_llm.algorithms.objectives import Objective
from jaxrl_llm.algorithms.statistics import Derived, Mean, Metrics, Moments, Statistics
from jaxrl_llm.algorithms.update import Params
from jaxrl_llm.data.rows import TrainBatch

LossType = Literal["nll", "dft"]


def token_losses(
    logprobs: Float[Array, "R T"], loss_type: LossType = "nll"
) -> Float[Array, "R T"]:
    """The loss of each token.

        nll    -logprob
        dft    -logprob * sg(exp(logprob))

    Source: Wu et al. 2025, equation 9 (arXiv:2508.05629), for dft.
    """
    if loss_type == "dft":
        return -logprobs * jax.lax.stop_gradient(jnp.exp(logprobs))
    return -logprobs


def update(
    state: updates.TrainState,
    batch: TrainBatch,
    *,
    logprob_fn: Callable[[Params, TrainBatch], Logprobs],
    optimizer: optax.GradientTransformation,
    loss_type: LossType = "nll",
    micro_batch_size: int | None = None,
) -> tuple[updates.TrainState, Metrics]:
    """One optimizer step on one mini-batch: `update.update` of `Sft`.

    Args:
      state: donated by most callers.
      batch: the mini-batch; what `response_mask` marks is learned.
      logprob_fn: `(params, rows) -> Logprobs`, differentiable in params.
      micro_batch_size: as of `update.update`.

    Returns:
      The next state, and scalars: those of `Sft`, the global norm of the gradient, and
      whether the update was skipped.
    """
    return updates.update(
        state,
        batch,
        Sft(loss_type),
        optimizer,
        outputs_fn=logprob_fn,
        micro_batch_size=micro_batch_size,
    )


@dataclass(frozen=True)
class Sft(Objective):
    """The mean loss of the tokens to learn; outputs are `Logprobs`."""

    loss_type: LossType = "nll"
    name: str = "sft"

    def plan(
        self, batch: TrainBatch, seen: Any, step: Int[Array, ""]
    ) -> Float[Array, "R T"]:
        """What each token counts: of a mean over the tokens of the mini-batch."""
        return masked.token_weights(batch.response_mask)

    def loss(
        self, rows: TrainBatch, outputs: Logprobs, planned: Float[Array, "R T"]
    ) -> tuple[Float[Array, ""], Logprobs]:
        """`token_losses`, weighted; the outputs are kept."""
        losses = token_losses(outputs.logprobs, self.loss_type)
        return masked.weighted_sum(losses, planned), outputs

    def metrics(
        self, batch: TrainBatch, kept: Logprobs, planned: Float[Array, "R T"]
    ) -> Statistics:
        """The loss, the perplexity exp(mean negative log-probability), the entropy,
        the share of tokens that are the likeliest ones, if outputs tell, by TRL's
        names where it has the metric, and the number of tokens that were learned."""
        mask = batch.response_mask
        tokens = jnp.sum(mask)

        def mean(x):
            return Mean(masked.token_mean(x, mask), tokens)

        nll = masked.token_mean(-kept.logprobs, mask)
        found = {
            "sft/loss": mean(token_losses(kept.logprobs, self.loss_type)),
            "sft/perplexity": Derived(
                jnp.exp(nll), (Moments(nll, jnp.zeros_like(nll), tokens),), _perplexity
            ),
            "sft/entropy": mean(kept.entropy),
        }
        if kept.is_likeliest is not None:
            found["sft/mean_token_accuracy"] = mean(kept.is_likeliest)
        return found


def _perplexity(nll: Moments) -> Any:
    """exp of the mean over all tokens."""
    return np.exp(nll.mean)
