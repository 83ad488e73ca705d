"""What a metric of one update is, so that those of several updates join into the one
that a single computation over all of them would give.

An objective says it where it computes the metric:

    {"actor/ppo_kl": Mean(masked.token_mean(x, mask), jnp.sum(mask)), ...}

and `join` is the only place where metrics of mini-batches become those of a step: means
are weighted by how many tokens, sequences or updates they are over, counts added up.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

Metrics = dict[str, Float[Array, ""]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Statistic:
    """A number, and what it takes to join it with those of other updates."""

    value: Any

    def __float__(self) -> float:
        return float(self.value)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Count(Statistic):
    """A number of things that happened."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mean(Statistic):
    """A mean over tokens, sequences or updates."""

    over: Any
    """How many; what is over none is left out."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Largest(Mean):
    """A maximum over so many."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Least(Mean):
    """A minimum over so many."""


class Moments(NamedTuple):
    """Mean and variance (with divisor n) over n tokens or sequences."""

    mean: Any
    variance: Any
    over: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Derived(Statistic):
    """A formula of moments, such as a standard deviation."""

    moments: tuple[Moments, ...]
    formula: Callable[..., Any] = field(metadata={"static": True})
    """A function of a module: its identity is part of a compiled program."""


Statistics = dict[str, Statistic]


def deviation(x: Moments) -> Any:
    """Standard deviation with divisor n."""
    return np.sqrt(x.variance)


def sample_deviation(x: Moments) -> Any:
    """Standard deviation with divisor n - 1."""
    return np.sqrt(x.variance * x.over / max(x.over - 1, 1))


def effective_share(x: Moments) -> Any:
    """Effective sample size over sample size: mean(x)^2 / mean(x^2)."""
    square = x.mean**2
    return square / max(square + x.variance, 1e-20)


def explained_variance(errors: Moments, targets: Moments) -> Any:
    """`masked.explained_variance` from moments."""
    return 1.0 - errors.variance / (targets.variance + 1e-5)


def of(name: str, x: Any) -> Statistic:
    """What a metric is that does not say so: by the end of its name a maximum or
    minimum (_max, _min), else a mean over updates."""
    if isinstance(x, Statistic):
        return x
    kind = {"_max": Largest, "_min": Least}.get(name[-4:], Mean)
    return kind(x, 1)


def values(metrics: Mapping[str, Any]) -> Metrics:
    """The numbers alone."""
    return {name: of(name, x).value for name, x in metrics.items()}


def join(parts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The metrics over all parts, on the host.

    Args:
      parts: metrics of mini-batches by the same names, on the host.
    """
    return {
        name: _joined([of(name, part[name]) for part in parts]) for name in parts[0]
    }


def _joined(parts: Sequence[Statistic]) -> float:
    first = parts[0]
    if len(parts) == 1:
        return float(first.value)
    if isinstance(first, Count):
        return float(sum(part.value for part in parts))
    if isinstance(first, Derived):
        whole = (
            _pooled(same) for same in zip(*(p.moments for p in parts), strict=True)
        )
        return float(first.formula(*whole))
    parts = [part for part in parts if part.over] or parts[:1]
    found = np.array([part.value for part in parts], np.float64)
    if isinstance(first, Largest):
        return float(found.max())
    if isinstance(first, Least):
        return float(found.min())
    weights = [float(part.over) for part in parts]
    return float(np.average(found, weights=weights if any(weights) else None))


def _pooled(parts: Sequence[Moments]) -> Moments:
    """Source: Chan et al. 1979, Updating formulae for computing sample variances."""
    mean, variance, over = np.array(parts, np.float64)[[p.over > 0 for p in parts]].T
    if not len(over):
        return parts[0]
    total = over.sum()
    middle = mean @ over / total
    return Moments(middle, (variance + (mean - middle) ** 2) @ over / total, total)
