"""Losses of preference pairs: reward models (Bradley-Terry) and DPO.

The functions take one number per pair and return one loss per pair; a DPO loss takes
by name what it needs (`config.algorithm.PREFERENCE_ARRAYS`). `BradleyTerry` and `Dpo`
are objectives for `update.update`:

    state, metrics = update(
        state, batch, Dpo(DpoSettings(beta=0.1)), optimizer, outputs_fn=logprob_fn
    )

In a batch of pairs, sequence 2 i is the chosen one of pair i and sequence 2 i + 1 the
rejected one. Names and definitions are those of TRL 1.16.

Shapes: P = pairs, S = 2 P sequences, R = rows, T = tokens in a row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.algorithms import masked
from jaxrl_llm.algorithms.logprobs import Logprobs
from jaxrl_llm.algorithms.objectives import Objective, Segments
from jaxrl_llm.algorithms.statistics import Largest, Least, Mean, Statistics
from jaxrl_llm.config import plugins
from jaxrl_llm.data.rows import TrainBatch


def bradley_terry(
    chosen: Float[Array, " P"],
    rejected: Float[Array, " P"],
    margins: Float[Array, " P"] | float = 0.0,
) -> Float[Array, " P"]:
    """How unlikely the preference is if scores are Bradley-Terry strengths, nats.

        loss = -log sigmoid(chosen - rejected - margin)

    Args:
      chosen: the score of the chosen response of each pair.
      margins: by how much the chosen score should be above the rejected one.

    Source: Ouyang et al. 2022, eq. 1 (arXiv:2203.02155); margins from Touvron et al.
    2023, eq. 2 (arXiv:2307.09288).
    """
    return -jax.nn.log_sigmoid(chosen - rejected - margins)


def centring(
    chosen: Float[Array, " P"], rejected: Float[Array, " P"]
) -> Float[Array, " P"]:
    """(chosen + rejected)^2: keeps scores near 0, which preferences alone leave open.

    Source: Eisenstein et al. 2023, eq. 2 (arXiv:2312.09244).
    """
    return jnp.square(chosen + rejected)


def sigmoid(
    chosen_ratios: Float[Array, " P"], rejected_ratios: Float[Array, " P"], beta: float
) -> Float[Array, " P"]:
    """DPO: `bradley_terry` of the rewards that the policy itself implies.

        loss = -log sigmoid(beta * (chosen_ratios - rejected_ratios))

    Args:
      chosen_ratios: log(policy / reference) of the whole chosen response, nats.
      rejected_ratios: the same of the rejected response.
      beta: over 0; the larger, the less the policy moves away from the reference.

    Source: Rafailov et al. 2023, eq. 7 (arXiv:2305.18290).
    """
    return -jax.nn.log_sigmoid(beta * (chosen_ratios - rejected_ratios))


def hinge(
    chosen_ratios: Float[Array, " P"], rejected_ratios: Float[Array, " P"], beta: float
) -> Float[Array, " P"]:
    """max(0, 1 - beta * (chosen_ratios - rejected_ratios)); arguments as of `sigmoid`.

    Source: Zhao et al. 2023, eq. 1 (arXiv:2305.10425).
    """
    return jnp.maximum(0.0, 1.0 - beta * (chosen_ratios - rejected_ratios))


def ipo(
    chosen_ratios: Float[Array, " P"],
    rejected_ratios: Float[Array, " P"],
    chosen_lengths: Int[Array, " P"],
    rejected_lengths: Int[Array, " P"],
    beta: float,
) -> Float[Array, " P"]:
    """The squared distance of the difference per token from what beta asks for.

        loss = (chosen_ratios / chosen_lengths - rejected_ratios / rejected_lengths
                - 1 / (2 beta))^2

    Args:
      chosen_lengths: tokens of the chosen response.
      rejected_lengths: tokens of the rejected response.
      beta: tau of the paper. The others as of `sigmoid`.

    Source: Azar et al. 2023, eq. 17 (arXiv:2310.12036); means over tokens as in TRL,
    which had them confirmed by the authors.
    """
    chosen = chosen_ratios / jnp.maximum(chosen_lengths, 1)
    rejected = rejected_ratios / jnp.maximum(rejected_lengths, 1)
    return jnp.square(chosen - rejected - 1.0 / (2.0 * beta))


def robust(
    chosen_ratios: Float[Array, " P"],
    rejected_ratios: Float[Array, " P"],
    beta: float,
    label_smoothing: float,
) -> Float[Array, " P"]:
    """`sigmoid` without bias where some pairs are the wrong way around.

        loss = ((1 - e) * sigmoid - e * sigmoid of the pair turned around) / (1 - 2 e)

    Args:
      label_smoothing: e, the probability that a pair is the wrong way around, from 0 to
        below 0.5. The others as of `sigmoid`.

    Source: Chowdhury et al. 2024, eq. 12 (arXiv:2403.00409).
    """
    clean = sigmoid(chosen_ratios, rejected_ratios, beta)
    flipped = sigmoid(rejected_ratios, chosen_ratios, beta)
    wrong = label_smoothing
    return ((1.0 - wrong) * clean - wrong * flipped) / (1.0 - 2.0 * wrong)


def of_pairs(
    x: Float[Array, "R T"], where: Bool[Array, "R T"], rows: TrainBatch
) -> tuple[Float[Array, " P"], Float[Array, " P"]]:
    """The sums of `x` over the chosen and over the rejected sequence of every pair.

    Args:
      where: the tokens that count.
      rows: of the mini-batch, or some of them; a pair in no row of them has 0.
    """
    sums = masked.sequence_sum(x, where, rows.sequence_ids, rows.num_sequences)
    return sums[0::2], sums[1::2]


def pair_weights(batch: TrainBatch) -> Float[Array, "R T"]:
    """1 / number of pairs on the last token of every chosen sequence, else 0.

    Sums over micro-batches of what is weighted so are means over the mini-batch.
    """
    of_chosen = masked.is_last(batch.sequence_ids) & (batch.sequence_ids % 2 == 0)
    return of_chosen / jnp.maximum(jnp.sum(of_chosen), 1)


@dataclass(frozen=True)
class BradleyTerry(Objective):
    """A reward model's loss; outputs are values after each token, of which the one
    after the last token of a sequence is its score."""

    center_rewards_coefficient: float = 0.0
    """What `centring` counts in the loss."""
    name: str = "rm"
    segments: Segments = "pairs"

    def plan(
        self, batch: TrainBatch, seen: Any, step: Int[Array, ""]
    ) -> Float[Array, "R T"]:
        """`pair_weights`."""
        return pair_weights(batch)

    def loss(
        self,
        rows: TrainBatch,
        outputs: Float[Array, "R T"],
        planned: Float[Array, "R T"],
    ) -> tuple[Float[Array, ""], Float[Array, "R T"]]:
        """`bradley_terry` and centring, the mean over pairs; the values are kept."""
        chosen, rejected = self._scores(rows, outputs)
        margins = 0.0
        if rows.margins is not None:
            last = masked.is_last(rows.sequence_ids)
            margins, _ = of_pairs(rows.margins, last, rows)
        loss = bradley_terry(chosen, rejected, margins)
        if self.center_rewards_coefficient:
            far = centring(chosen, rejected)
            loss = loss + self.center_rewards_coefficient * far
        weights, _ = of_pairs(planned, planned > 0, rows)
        return jnp.sum(weights * loss), outputs

    def metrics(
        self,
        batch: TrainBatch,
        kept: Float[Array, "R T"],
        planned: Float[Array, "R T"],
    ) -> Statistics:
        """TRL's: how often the chosen score is above, by how much, and the scores."""
        loss, _ = self.loss(batch, kept, planned)
        chosen, rejected = self._scores(batch, kept)
        weights, _ = of_pairs(planned, planned > 0, batch)
        pairs = jnp.sum(weights > 0)
        last = masked.is_last(batch.sequence_ids)

        def mean(x):
            return Mean(jnp.sum(weights * x), pairs)

        return {
            "rm/loss": Mean(loss, pairs),
            "rm/accuracy": mean(chosen > rejected),
            "rm/margin": mean(chosen - rejected),
            "rm/mean_reward": mean((chosen + rejected) / 2),
            "rm/min_reward": Least(jnp.min(jnp.where(last, kept, jnp.inf)), pairs),
            "rm/max_reward": Largest(jnp.max(jnp.where(last, kept, -jnp.inf)), pairs),
        }

    def _scores(self, rows: TrainBatch, values: Float[Array, "R T"]):
        return of_pairs(values, masked.is_last(rows.sequence_ids), rows)


@dataclass(frozen=True, kw_only=True)
class DpoSettings:
    """The numbers of DPO, by TRL's names and with its defaults."""

    loss_type: tuple[str | Callable[..., Any], ...] = ("sigmoid",)
    """Names of `config.algorithm.PREFERENCE_LOSSES`, sft, module:function, or functions
    that take by name any of `PREFERENCE_ARRAYS` and `PREFERENCE_NUMBERS` and return one
    number per pair. sft: the mean negative log-likelihood of the chosen tokens."""
    loss_weights: tuple[float, ...] = (1.0,)
    """What each of them counts in the loss."""
    beta: float = 0.1
    """Over 0; the larger, the less the policy moves away from the reference."""
    label_smoothing: float = 0.0
    """robust: the probability that a pair is the wrong way around."""

    def __post_init__(self) -> None:
        if len(self.loss_type) != len(self.loss_weights):
            raise ValueError(
                f"loss_weights {list(self.loss_weights)} has {len(self.loss_weights)} "
                f"numbers for the {len(self.loss_type)} losses of loss_type "
                f"{list(self.loss_type)}"
            )


SFT = "sft"
"""The `loss_type` that looks at the chosen sequences alone."""


class DpoPlan(NamedTuple):
    """What micro-batches need to know of the whole mini-batch, for each token."""

    pairs: Float[Array, "R T"]
    """`pair_weights`."""
    chosen: Float[Array, "R T"]
    """`masked.token_weights` of the chosen sequences."""


@dataclass(frozen=True)
class Dpo(Objective):
    """DPO losses with an SFT term; outputs are `Logprobs`."""

    settings: DpoSettings = DpoSettings()
    name: str = "dpo"
    segments: Segments = "pairs"

    def read(self, batch: TrainBatch) -> TrainBatch:
        """`batch`. Raises ValueError if it has no `ref_logprobs`."""
        if batch.ref_logprobs is None:
            raise ValueError("DPO needs batch.ref_logprobs, those of the reference")
        return batch

    def plan(self, batch: TrainBatch, seen: Any, step: Int[Array, ""]) -> DpoPlan:
        """What each pair and each chosen token counts."""
        of_chosen = batch.response_mask & (batch.sequence_ids % 2 == 0)
        return DpoPlan(pair_weights(batch), masked.token_weights(of_chosen))

    def loss(
        self, rows: TrainBatch, outputs: Logprobs, planned: DpoPlan
    ) -> tuple[Float[Array, ""], Logprobs]:
        """The weighted sum of the losses; the log-probabilities are kept."""
        return self._terms(rows, outputs, planned)["dpo/loss"], outputs

    def metrics(
        self, batch: TrainBatch, kept: Logprobs, planned: DpoPlan
    ) -> Statistics:
        """TRL's, and each loss by itself if there are several."""
        settings, mask = self.settings, batch.response_mask
        weights, _ = of_pairs(planned.pairs, planned.pairs > 0, batch)
        pairs, tokens = jnp.sum(weights > 0), jnp.sum(mask)
        chosen, rejected = self._ratios(batch, kept)
        of_chosen, of_rejected = of_pairs(kept.logprobs, mask, batch)

        def mean(x):
            return Mean(jnp.sum(weights * x), pairs)

        terms = self._terms(batch, kept, planned)
        return {
            **{name: Mean(x, pairs) for name, x in terms.items()},
            "rewards/chosen": mean(settings.beta * chosen),
            "rewards/rejected": mean(settings.beta * rejected),
            "rewards/accuracies": mean(chosen > rejected),
            "rewards/margins": mean(settings.beta * (chosen - rejected)),
            "logps/chosen": mean(of_chosen),
            "logps/rejected": mean(of_rejected),
            "dpo/entropy": Mean(masked.token_mean(kept.entropy, mask), tokens),
        }

    def _terms(
        self, rows: TrainBatch, scored: Logprobs, planned: DpoPlan
    ) -> dict[str, Float[Array, ""]]:
        """The loss, and what it is made of if there are several."""
        settings = self.settings
        weights, _ = of_pairs(planned.pairs, planned.pairs > 0, rows)
        chosen, rejected = self._ratios(rows, scored)
        ones = jnp.ones_like(scored.logprobs)
        lengths = of_pairs(ones, rows.response_mask, rows)
        given = {
            "chosen_ratios": chosen,
            "rejected_ratios": rejected,
            "chosen_lengths": lengths[0].astype(jnp.int32),
            "rejected_lengths": lengths[1].astype(jnp.int32),
            "beta": settings.beta,
            "label_smoothing": settings.label_smoothing,
        }
        terms, total = {}, jnp.float32(0.0)
        for kind, weight in zip(settings.loss_type, settings.loss_weights, strict=True):
            if kind == SFT:
                name = SFT
                term = -masked.weighted_sum(scored.logprobs, planned.chosen)
            else:
                name, function = plugins.preference_loss(kind)
                loss = plugins.call(function, given)
                if loss.shape != chosen.shape:
                    raise ValueError(
                        f"loss {name} returned an array of shape {loss.shape}, not one "
                        f"number for each pair, {chosen.shape}"
                    )
                term = jnp.sum(weights * loss)
            terms[f"dpo/{name}_loss"] = term
            total = total + weight * term
        return {"dpo/loss": total} | (terms if len(terms) > 1 else {})

    def _ratios(self, rows: TrainBatch, scored: Logprobs):
        """log(policy / reference) of both sequences. Differences per token come first:
        sums of a thousand log-probabilities have few digits left for them."""
        return of_pairs(scored.logprobs - rows.ref_logprobs, rows.response_mask, rows)
