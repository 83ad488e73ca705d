"""GRPO as a pure function from training state to training state.

`update` is not jitted here and closes over nothing, so it can be jitted with any
sharding, scanned over mini-batches, or dropped into another training loop:

    update = functools.partial(
        grpo.update, logprob_fn=logprob_fn, optimizer=optimizer, settings=settings
    )
    state, metrics = jax.jit(update, donate_argnums=0)(state, batch)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxrl_llm import kl, losses, masked
from jaxrl_llm.batch import TrainBatch, pad_rows
from jaxrl_llm.logprobs import Logprobs

Params = Any
LogprobFn = Callable[[Params, TrainBatch], Logprobs]
Metrics = dict[str, Float[Array, ""]]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The numbers of an update, by veRL's names."""

    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    loss_agg_mode: masked.Aggregation = "token-mean"
    entropy_coeff: float = 0.0
    kl_loss_coef: float = 0.0
    """Other than 0 needs `TrainBatch.ref_logprobs`."""
    kl_loss_type: kl.Estimator = "k3"
    micro_batch_size: int | None = None
    """Rows per forward and backward pass; all if not given. Changes memory and speed,
    never the result."""


@no_type_check  # JAX also builds such trees of shapes or shardings
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything an update changes."""

    params: Params
    opt_state: optax.OptState
    step: Int[Array, ""]
    """Updates so far, skipped ones included."""


def update(
    state: TrainState,
    batch: TrainBatch,
    *,
    logprob_fn: LogprobFn,
    optimizer: optax.GradientTransformation,
    settings: Settings,
) -> tuple[TrainState, Metrics]:
    """One optimizer step on one mini-batch.

    If the gradient is not finite, parameters and optimizer stay as they are and
    `actor/update_skipped` is 1.

    Args:
      state: donated by most callers.
      batch: the mini-batch. Any number of rows.
      logprob_fn: `(params, rows) -> Logprobs`, differentiable in params. `rows` are
        some of the rows of `batch`.
      optimizer: any optax transformation.
      settings: static.

    Returns:
      The next state, and scalars: `objective`'s, `mismatch`'s, the global norm of the
      gradient before clipping, and whether the update was skipped.

    Raises:
      ValueError: a KL loss is asked for and `batch` has no `ref_logprobs`.
    """
    if settings.kl_loss_coef and batch.ref_logprobs is None:
        raise ValueError(
            f"kl_loss_coef is {settings.kl_loss_coef} but the batch has no ref_logprobs"
        )
    weights = masked.weights(
        settings.loss_agg_mode,
        batch.response_mask,
        batch.sequence_ids,
        batch.num_sequences,
    )

    def loss_fn(params, rows, weights):
        scored = logprob_fn(params, rows)
        return objective(rows, scored, weights, settings)["actor/loss"], scored

    grads, scored = accumulate(
        jax.grad(loss_fn, has_aux=True),
        state.params,
        batch,
        weights,
        settings.micro_batch_size,
    )
    state, grad_norm, skipped = apply(state, grads, optimizer)
    metrics = (
        objective(batch, scored, weights, settings)
        | mismatch(batch, scored)
        | {"actor/grad_norm": grad_norm, "actor/update_skipped": skipped}
    )
    return state, metrics


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
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (optax.apply_updates(state.params, updates), opt_state),
        (state.params, state.opt_state),
    )
    state = TrainState(params, opt_state, state.step + jnp.int32(1))
    return state, grad_norm, 1.0 - finite.astype(jnp.float32)


def objective(
    rows: TrainBatch,
    scored: Logprobs,
    weights: Float[Array, "R T"],
    settings: Settings,
) -> Metrics:
    """The loss `actor/loss` and what it is made of.

        loss = pg_loss - entropy_coeff * entropy + kl_loss_coef * kl_loss

    each term summed over tokens with `weights`. `actor/ppo_kl` (old - new
    log-probability) and `actor/pg_clipfrac` are means over tokens.

    Args:
      rows: all rows of a mini-batch, or a micro-batch of them.
      scored: `logprob_fn` of the same rows.
      weights: `masked.weights` of the whole mini-batch, so that the losses of its
        micro-batches add up to its loss.
    """
    logprobs, entropy = scored
    old_logprobs = _old_logprobs(rows, scored)
    ratio = (logprobs, old_logprobs, rows.advantages)
    clip = {
        "clip_ratio_low": settings.clip_ratio_low,
        "clip_ratio_high": settings.clip_ratio_high,
    }
    mask = rows.response_mask
    terms = {
        "actor/pg_loss": masked.weighted_sum(
            losses.clipped_surrogate(*ratio, **clip), weights
        ),
        "actor/entropy": masked.weighted_sum(entropy, weights),
        "actor/pg_clipfrac": masked.token_mean(
            losses.is_clipped(*ratio, **clip).astype(jnp.float32), mask
        ),
        "actor/ppo_kl": masked.token_mean(old_logprobs - logprobs, mask),
    }
    loss = terms["actor/pg_loss"]
    if settings.entropy_coeff:
        loss = loss - settings.entropy_coeff * terms["actor/entropy"]
    if rows.ref_logprobs is not None:
        terms["actor/kl_loss"] = masked.weighted_sum(
            kl.estimate(settings.kl_loss_type, logprobs, rows.ref_logprobs), weights
        )
        if settings.kl_loss_coef:
            loss = loss + settings.kl_loss_coef * terms["actor/kl_loss"]
    return terms | {"actor/loss": loss}


def mismatch(batch: TrainBatch, scored: Logprobs) -> Metrics:
    """How far the sampler's log-probabilities are from the trainer's before the update.

    `mismatch/logprob_diff_mean` and `_max` are of |sampler - trainer|, in nats;
    `mismatch/kl` is KL(sampler || trainer). All are over response tokens.
    """
    trainer = _old_logprobs(batch, scored)
    difference = jnp.abs(batch.sampler_logprobs - trainer)
    mask = batch.response_mask
    return {
        "mismatch/logprob_diff_mean": masked.token_mean(difference, mask),
        "mismatch/logprob_diff_max": jnp.max(jnp.where(mask, difference, 0.0)),
        "mismatch/kl": masked.token_mean(kl.k3(batch.sampler_logprobs, trainer), mask),
    }


def _old_logprobs(rows: TrainBatch, scored: Logprobs) -> Float[Array, "R T"]:
    if rows.old_logprobs is not None:
        return rows.old_logprobs
    return jax.lax.stop_gradient(scored.logprobs)


def accumulate(
    function: Callable[[Params, TrainBatch, Array], tuple[Any, Any]],
    params: Params,
    batch: TrainBatch,
    weights: Float[Array, "R T"],
    micro_batch_size: int | None,
) -> tuple[Any, Any]:
    """Sums a function, such as a gradient, over micro-batches of rows, in float32.

    Micro-batch m of M has the rows m, m + M, m + 2 M, ... so that rows that are split
    over devices stay split over all of them. Rows of padding fill up the last ones.

    Args:
      function: `(params, rows, weights of the rows) -> (terms, per token)`, the latter
        such as `Logprobs`: a tree of [R, T].

    Returns:
      The sum of the terms, and what was found per token, of all rows.
    """
    num_rows = weights.shape[0]
    if micro_batch_size is None or micro_batch_size >= num_rows:
        return function(params, batch, weights)
    count = -(-num_rows // micro_batch_size)
    padded = pad_rows(batch, count * micro_batch_size)
    extra = ((0, count * micro_batch_size - num_rows), (0, 0))

    def split(x):
        return x.reshape(micro_batch_size, count, -1).swapaxes(0, 1)

    def join(x):
        return x.swapaxes(0, 1).reshape(micro_batch_size * count, -1)[:num_rows]

    def add(total, micro_batch):
        terms, scored = function(params, *micro_batch)
        return jax.tree.map(jnp.add, total, terms), scored

    micro_batches = jax.tree.map(split, (padded, jnp.pad(weights, extra)))
    first = jax.tree.map(lambda x: x[0], micro_batches)
    terms, _ = jax.eval_shape(function, params, *first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), terms)
    total, scored = jax.lax.scan(add, zeros, micro_batches)
    return total, jax.tree.map(join, scored)
