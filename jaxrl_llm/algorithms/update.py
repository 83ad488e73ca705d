"""One optimizer step on one mini-batch, for any objective: the only update there is.

    state, metrics = update(
        state, batch, objective, optimizer, outputs_fn=logprob_fn, micro_batch_size=8
    )

Nothing here is jitted, knows a model or closes over anything, so it can be jitted with
any sharding, scanned over mini-batches, or dropped into another training loop.

What `outputs_fn` closes over is never differentiated and has no gradient, not even an
allocated one. That is where frozen weights go: a jitted step takes them as an argument
of its own,

    def step(trained, frozen, batch):
        outputs_fn = functools.partial(forward, frozen)
        return update(trained, batch, objective, optimizer, outputs_fn=outputs_fn)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxrl_llm.algorithms import statistics
from jaxrl_llm.algorithms.objectives import SEQUENCES_TOGETHER, Objective, Outputs
from jaxrl_llm.algorithms.statistics import Count, Mean, Metrics, Statistics
from jaxrl_llm.data.rows import TrainBatch, pad_rows

Params = Any
OutputsFn = Callable[[Params, TrainBatch], Outputs]


@no_type_check  # JAX also builds such trees of shapes or shardings
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything an update changes."""

    params: Params
    """What is trained, and nothing else."""
    opt_state: optax.OptState
    step: Int[Array, ""]
    """Updates so far, skipped ones included. What a schedule counts, too."""


def update(
    state: TrainState,
    batch: TrainBatch,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    outputs_fn: OutputsFn,
    micro_batch_size: int | None = None,
    prepare: Callable[[Params], Params] | None = None,
    joinable: bool = False,
) -> tuple[TrainState, Metrics | Statistics]:
    """One optimizer step on one mini-batch.

    If the gradient is not finite, parameters and moments stay as they are and
    NAME/update_skipped is 1, with the objective's name. A schedule goes on.

    Args:
      state: donated by most callers.
      batch: the mini-batch. Any number of rows.
      objective: static.
      optimizer: any optax transformation.
      outputs_fn: `(params, rows) -> outputs`, differentiable in params: what the
        objective is handed. `rows` are some of the rows of `batch`.
      micro_batch_size: rows per forward and backward pass; all if not given. Changes
        memory and speed, never the result.
      prepare: makes what `outputs_fn` gets of the parameters, once for all
        micro-batches, such as a copy in the dtype of matrix products. Its own gradient
        is taken to be the identity.
      joinable: static; metrics say what they are a mean over, for `statistics.join`
        with those of other mini-batches.

    Returns:
      The next state, and scalars: the objective's metrics, the global norm of the
      gradient before clipping (NAME/grad_norm), and whether the update was skipped.

    Raises:
      ValueError: the batch lacks what the objective needs, or its sequences are no
        whole number of the objective's segments.
    """
    together = SEQUENCES_TOGETHER[objective.segments]
    if batch.num_sequences % together:
        raise ValueError(
            f"{batch.num_sequences} sequences are no whole number of the "
            f"{objective.segments} of {objective.name}"
        )
    given, batch = batch, objective.read(batch)
    params = state.params if prepare is None else prepare(state.params)
    planned = _planned(
        params, batch, state.step, objective, outputs_fn, micro_batch_size
    )

    def loss_fn(params, rows, planned):
        return objective.loss(rows, outputs_fn(params, rows), planned)

    with jax.named_scope("gradient"):
        grads, kept = accumulate(
            jax.grad(loss_fn, has_aux=True), params, batch, planned, micro_batch_size
        )
    with jax.named_scope("optimizer"):
        state, grad_norm, skipped = apply(state, grads, optimizer)
    found = {
        **objective.metrics(given, kept, planned),
        f"{objective.name}/grad_norm": Mean(grad_norm, 1),
        f"{objective.name}/update_skipped": Count(skipped),
    }
    if joinable:
        return state, {name: statistics.of(name, x) for name, x in found.items()}
    return state, statistics.values(found)


def measure(
    params: Params,
    batch: TrainBatch,
    objective: Objective,
    *,
    outputs_fn: OutputsFn,
    micro_batch_size: int | None = None,
    prepare: Callable[[Params], Params] | None = None,
) -> Statistics:
    """An objective's metrics of rows that nothing is learned from, such as held-out
    ones, for `statistics.join` with those of others.

    Args:
      others: of `update`.

    Raises:
      ValueError: the batch lacks what the objective needs.
    """
    given, batch = batch, objective.read(batch)
    params = params if prepare is None else prepare(params)
    planned = _planned(
        params, batch, jnp.int32(0), objective, outputs_fn, micro_batch_size
    )
    _, kept = accumulate(
        lambda params, rows, planned: (
            (),
            objective.loss(rows, outputs_fn(params, rows), planned)[1],
        ),
        params,
        batch,
        planned,
        micro_batch_size,
    )
    found = objective.metrics(given, kept, planned)
    return {name: statistics.of(name, x) for name, x in found.items()}


def _planned(
    params: Params,
    batch: TrainBatch,
    step: Int[Array, ""],
    objective: Objective,
    outputs_fn: OutputsFn,
    micro_batch_size: int | None,
) -> Any:
    """What an objective decides over the whole mini-batch."""
    seen = None
    if objective.looks_ahead(batch):
        _, seen = accumulate(
            lambda params, rows, _: (
                (),
                objective.look(rows, outputs_fn(params, rows)),
            ),
            params,
            batch,
            (),
            micro_batch_size,
        )
    return objective.plan(batch, seen, step)


def apply(
    state: TrainState, grads: Params, optimizer: optax.GradientTransformation
) -> tuple[TrainState, Float[Array, ""], Float[Array, ""]]:
    """One optimizer step; if the gradient is not finite, none.

    Returns:
      The next state, the global norm of the gradient before clipping, and 1 if the step
      was skipped, else 0.
    """
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(grad_norm)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)

    def if_finite(new, old):
        if isinstance(new, optax.ScaleByScheduleState):
            return new  # a schedule goes on, whether or not the step is made
        return jnp.where(finite, new, old)

    params, opt_state = jax.tree.map(
        if_finite,
        (optax.apply_updates(state.params, updates), opt_state),
        (state.params, state.opt_state),
        is_leaf=lambda x: isinstance(x, optax.ScaleByScheduleState),
    )
    state = TrainState(params, opt_state, state.step + jnp.int32(1))
    return state, grad_norm, 1.0 - finite.astype(jnp.float32)


def accumulate(
    function: Callable[[Params, TrainBatch, Any], tuple[Any, Any]],
    params: Params,
    batch: TrainBatch,
    beside: Any,
    micro_batch_size: int | None,
) -> tuple[Any, Any]:
    """Sums a function, such as a gradient, over micro-batches of rows, in float32.

    Micro-batch m of M has the rows m, m + M, m + 2 M, ... so that rows that are split
    over devices stay split over all of them. Rows of padding fill up the last ones;
    micro-batches of padding alone at the end are not computed.

    Args:
      function: `(params, rows, their part of beside) -> (terms, kept)`; what is kept is
        a tree of arrays whose first axis is rows, such as `Logprobs`, [R, T].
      beside: a tree of arrays whose first axis is rows, [R, T, ...].

    Returns:
      The sum of the terms, and what was kept of all rows.
    """
    num_rows = batch.tokens.shape[0]
    if micro_batch_size is None or micro_batch_size >= num_rows:
        terms, kept = function(params, batch, beside)
        return jax.tree.map(lambda x: x.astype(jnp.float32), terms), kept
    count = -(-num_rows // micro_batch_size)
    padded = pad_rows(batch, count * micro_batch_size)

    def pad(x):
        extra = (0, count * micro_batch_size - num_rows)
        return jnp.pad(x, (extra, *((0, 0),) * (x.ndim - 1)))

    def split(x):
        return x.reshape(micro_batch_size, count, *x.shape[1:]).swapaxes(0, 1)

    def join(x):
        x = x.swapaxes(0, 1)
        return x.reshape(micro_batch_size * count, *x.shape[2:])[:num_rows]

    beside = jax.tree.map(pad, beside)
    micro_batches = jax.tree.map(split, (padded, beside))

    def part(i):
        return jax.tree.map(lambda x: x[i], micro_batches)

    def add(i, found):
        terms, kept = function(params, *part(i))
        return (
            jax.tree.map(jnp.add, found[0], terms),
            jax.tree.map(lambda all, x: all.at[i].set(x), found[1], kept),
        )

    terms, kept = jax.eval_shape(function, params, *part(0))
    total = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), terms)
    kept = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), kept)
    in_use = jnp.any(micro_batches[0].sequence_ids >= 0, axis=(1, 2))
    last = jnp.max(jnp.where(in_use, jnp.arange(1, count + 1), 0))
    total, kept = jax.lax.fori_loop(0, last, add, (total, kept))
    return total, jax.tree.map(join, kept)
