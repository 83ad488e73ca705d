"""What an objective adds where a model has experts: an auxiliary loss that spreads
tokens over them, and how far what is replayed is from what the router would choose.

    loss = that of the objective + coef * E * sum over experts e of f[e] * p[e]

f[e] are the choices of expert e and p[e] the sum of the router's probabilities for it,
each per token and layer, over the whole mini-batch: with padding left out, prompts
counted, and no gradient through f. It is 1 * k, for k experts of each token, where all
are chosen alike.

Source: Fedus et al. 2021 (arXiv:2101.03961), equations 4 to 6;
`load_balancing_loss_func` of transformers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.algorithms.objectives import Objective, Outputs, Segments
from jaxrl_llm.algorithms.statistics import Mean, Statistic
from jaxrl_llm.data.rows import TrainBatch
from jaxrl_llm.data.types import RouterUse


def auxiliary_loss(use: RouterUse) -> Float[Array, ""]:
    """E * sum of f * p, of all rows."""
    return jnp.sum(per_probability(use)[None] * use.probabilities)


def per_probability(use: RouterUse) -> Float[Array, " E"]:
    """What each of the probabilities adds to the loss: E * f[e] / count."""
    count = jnp.maximum(jnp.sum(use.count), 1.0)
    chosen = jnp.sum(use.chosen, axis=0)
    return chosen.shape[0] * chosen / count**2


@dataclass(frozen=True)
class Routed(Objective):
    """An objective of a model with experts. Outputs are a pair: those of the objective,
    and the `RouterUse` of the rows."""

    objective: Objective
    coef: float = 0.0
    """Weight of the auxiliary loss; 0 for none."""
    replayed: bool = False
    """Whether routes are replayed."""

    @property
    def name(self) -> str:  # type: ignore[override]
        """That of the objective."""
        return self.objective.name

    @property
    def segments(self) -> Segments:  # type: ignore[override]
        """Those of the objective."""
        return self.objective.segments

    def read(self, batch: TrainBatch) -> TrainBatch:
        """See the objective."""
        return self.objective.read(batch)

    def looks_ahead(self, batch: TrainBatch) -> bool:
        """With the auxiliary loss, as how often experts are chosen must be known of
        all rows."""
        return bool(self.coef) or self.objective.looks_ahead(batch)

    def look(self, rows: TrainBatch, outputs: Outputs) -> Any:
        """What the objective asks for, if it does, and the use of the experts."""
        inner, use = outputs
        return self.objective.look(rows, inner), use

    def plan(self, batch: TrainBatch, seen: Any, step: Int[Array, ""]) -> Any:
        """The objective's plan, what each probability adds, and, for metrics, the loss
        and the largest load."""
        inner, use = seen or (None, None)
        if not self.objective.looks_ahead(batch):
            inner = None
        plan = self.objective.plan(batch, inner, step)
        if not self.coef:
            return plan, None, None
        load = jnp.sum(use.chosen, axis=0)
        rows = (len(batch.tokens), 1)
        each = jnp.tile(self.coef * per_probability(use)[None], rows)
        most = jnp.max(load) / jnp.maximum(jnp.mean(load), 1e-9)
        said = jnp.tile(jnp.stack([auxiliary_loss(use), most])[None], rows)
        return plan, each, said

    def loss(
        self, rows: TrainBatch, outputs: Outputs, planned: Any
    ) -> tuple[Float[Array, ""], Any]:
        """See the module."""
        (inner, use), (plan, each, _) = outputs, planned
        loss, kept = self.objective.loss(rows, inner, plan)
        if each is not None:
            loss = loss + jnp.sum(each * use.probabilities)
        return loss, (kept, use.agreeing, use.count)

    def metrics(
        self, batch: TrainBatch, kept: Any, planned: Any
    ) -> Mapping[str, Statistic | Float[Array, ""]]:
        """Those of the objective; with the auxiliary loss NAME/router_aux_loss, before
        `coef`, and NAME/expert_load_max, choices of the most chosen expert over their
        mean; with replay NAME/route_agreement, the share of tokens and layers whose
        router would choose the experts that are replayed."""
        (plan, _, said), (kept, agreeing, count) = planned, kept
        found = dict(self.objective.metrics(batch, kept, plan))
        if said is not None:
            found[f"{self.name}/router_aux_loss"] = Mean(said[0, 0], 1)
            found[f"{self.name}/expert_load_max"] = Mean(said[0, 1], 1)
        if self.replayed:
            total = jnp.sum(count)
            share = jnp.sum(agreeing) / jnp.maximum(total, 1.0)
            found[f"{self.name}/route_agreement"] = Mean(share, total)
        return found
