"""GRPO as a pure function from training state to training state.

`update` is not jitted here and closes over nothing, so it can be jitted with any
sharding, scanned over mini-batches, or dropped into another training loop:

    update = functools.partial(
        grpo.update, logprob_fn=logprob_fn, optimizer=optimizer, settings=settings
    )
    state, metrics = jax.jit(update, donate_argnums=0)(state, batch)
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args, no_type_check

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.algorithms import entropy_covariance as covariance
from jaxrl_llm.algorithms import kl, losses, masked
from jaxrl_llm.algorithms import rollout_correction as corrections
from jaxrl_llm.algorithms.logprobs import Logprobs
from jaxrl_llm.data.rows import TrainBatch, pad_rows

Params = Any
LogprobFn = Callable[[Params, TrainBatch], Logprobs]
Metrics = dict[str, Float[Array, ""]]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The numbers of an update, by veRL's names and with its defaults."""

    loss_mode: losses.Mode = "vanilla"
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    """Bounds of the ratio; of a divergence in dppo_tv and dppo_kl."""
    clip_ratio_c: float | None = 3.0
    """vanilla: dual clip, if any. dppo_tv, dppo_kl: bound of the importance weight."""
    tau_pos: float = 1.0
    tau_neg: float = 1.05
    """sapo."""
    clip_cov_ratio: float = 0.0002
    clip_cov_lb: float = 1.0
    clip_cov_ub: float = 5.0
    """clip_cov."""
    kl_cov_ratio: float = 0.0002
    ppo_kl_coef: float = 0.1
    """kl_cov."""
    dro_beta: float | None = None
    """dro, which has no default."""
    loss_agg_mode: masked.Aggregation = "token-mean"
    loss_scale_factor: float | None = None
    """seq-mean-token-sum-norm, which has no default."""
    correction: corrections.Correction | None = None
    """Of the sampler's mismatch; not even measured in veRL's terms if not given."""
    entropy_coeff: float = 0.0
    kl_loss_coef: float = 0.0
    """Other than 0 needs `TrainBatch.ref_logprobs`."""
    kl_loss_type: kl.Estimator = "k3"
    micro_batch_size: int | None = None
    """Rows per forward and backward pass; all if not given. Changes memory and speed,
    never the result."""


class Plan(NamedTuple):
    """What micro-batches need to know of the whole mini-batch, for each token."""

    weights: Float[Array, "R T"]
    """`masked.weights`: what the token counts; 0 if it does not."""
    mask: Bool[Array, "R T"]
    """Response tokens that were not rejected."""
    correction: Float[Array, "R T"] | None = None
    """Importance weights, if the loss is to be multiplied by any."""
    chosen: Bool[Array, "R T"] | None = None
    """clip_cov and kl_cov only: tokens with too large a covariance."""


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
    prepare: Callable[[Params], Params] | None = None,
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
      prepare: makes what `logprob_fn` gets of the parameters, once for all
        micro-batches, such as a copy in the dtype of matrix products. Its own gradient
        is taken to be the identity.

    Returns:
      The next state, and scalars: `objective`'s, `mismatch`'s, those of
      `settings.correction`, the global norm of the gradient before clipping, and
      whether the update was skipped.

    Raises:
      ValueError: a KL loss is asked for and `batch` has no `ref_logprobs`, or a loss
        lacks a number that has no default.
    """
    if settings.kl_loss_coef and batch.ref_logprobs is None:
        raise ValueError(
            f"kl_loss_coef is {settings.kl_loss_coef} but the batch has no ref_logprobs"
        )
    if settings.loss_mode == "dro" and not settings.dro_beta:
        raise ValueError(f"loss_mode dro needs dro_beta > 0, got {settings.dro_beta}")
    given = batch
    params = state.params if prepare is None else prepare(state.params)
    if settings.correction is not None and settings.correction.bypass_mode:
        batch = dataclasses.replace(batch, old_logprobs=batch.sampler_logprobs)
    first = None
    if looks_ahead(settings, batch):
        _, first = accumulate(
            lambda params, rows, _: ((), logprob_fn(params, rows)),
            params,
            batch,
            (),
            settings.micro_batch_size,
        )
    planned = plan(batch, first, state.step, settings)

    def loss_fn(params, rows, planned):
        scored = logprob_fn(params, rows)
        return objective(rows, scored, planned, settings)["actor/loss"], scored

    with jax.named_scope("gradient"):
        grads, scored = accumulate(
            jax.grad(loss_fn, has_aux=True),
            params,
            batch,
            planned,
            settings.micro_batch_size,
        )
    with jax.named_scope("optimizer"):
        state, grad_norm, skipped = apply(state, grads, optimizer)
    metrics = (
        objective(batch, scored, planned, settings)
        | mismatch(given, scored)
        | (correct(batch, scored, settings).metrics if settings.correction else {})
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


def looks_ahead(settings: Settings, batch: TrainBatch) -> bool:
    """Whether the log-probabilities of all rows must be known before the first
    gradient: for a choice or a normaliser that no micro-batch can make alone."""
    if settings.loss_mode in ("clip_cov", "kl_cov"):
        return True
    how = settings.correction
    if how is None or not (how.weighs or how.rejections):
        return False
    return how.bypass_mode or batch.old_logprobs is None


def plan(
    batch: TrainBatch,
    scored: Logprobs | None,
    step: Int[Array, ""],
    settings: Settings,
) -> Plan:
    """Everything in the loss that is decided over the whole mini-batch.

    Args:
      scored: `logprob_fn` of all rows; needed if it `looks_ahead`.
      step: what is random differs from one to the next.
    """
    mask, weights, chosen = batch.response_mask, None, None
    how = settings.correction
    if how is not None and (how.weighs or how.rejections):
        corrected = correct(batch, scored, settings)
        mask = corrected.mask
        weights = corrected.weights if how.weighs else None
    if settings.loss_mode in ("clip_cov", "kl_cov"):
        chosen = _chosen(batch, scored, mask, step, settings)
    return Plan(
        masked.weights(
            settings.loss_agg_mode,
            mask,
            batch.sequence_ids,
            batch.num_sequences,
            settings.loss_scale_factor,
        ),
        mask,
        weights,
        chosen,
    )


def correct(
    batch: TrainBatch, scored: Logprobs | None, settings: Settings
) -> corrections.Corrected:
    """`corrections.correct` of the policy that `settings.correction` is about."""
    how = settings.correction
    known = None if how.bypass_mode else batch.old_logprobs
    return corrections.correct(
        scored.logprobs if known is None else known,
        batch.sampler_logprobs,
        batch.response_mask,
        batch.sequence_ids,
        batch.num_sequences,
        how,
    )


def _chosen(batch, scored, mask, step, settings) -> Bool[Array, "R T"]:
    found = covariance.covariance(scored.logprobs, batch.advantages, mask)
    bits = covariance.random_bits(
        batch.tokens, batch.positions, batch.sequence_ids, batch.num_sequences, step
    )
    if settings.loss_mode == "kl_cov":
        ratio = settings.kl_cov_ratio
        return covariance.largest(found, mask, bits, kl_cov_ratio=ratio)
    clipped = losses.is_clipped(
        scored.logprobs,
        _old_logprobs(batch, scored),
        batch.advantages,
        clip_ratio_low=settings.clip_ratio_low,
        clip_ratio_high=settings.clip_ratio_high,
    )
    return covariance.some_between(
        found,
        ~clipped,
        mask,
        bits,
        clip_cov_ratio=settings.clip_cov_ratio,
        clip_cov_lb=settings.clip_cov_lb,
        clip_cov_ub=settings.clip_cov_ub,
    )


def objective(
    rows: TrainBatch, scored: Logprobs, planned: Plan, settings: Settings
) -> Metrics:
    """The loss `actor/loss` and what it is made of.

        loss = pg_loss - entropy_coeff * entropy + kl_loss_coef * kl_loss

    each term summed over tokens with `planned.weights`. `actor/ppo_kl` (old - new
    log-probability), `actor/pg_clipfrac` and `actor/pg_clipfrac_lower` (see
    `policy_loss`) are means over tokens.

    Args:
      rows: all rows of a mini-batch, or a micro-batch of them.
      scored: `logprob_fn` of the same rows.
      planned: `plan` of the whole mini-batch, the same rows of it, so that the losses
        of its micro-batches add up to its loss.
    """
    old_logprobs = _old_logprobs(rows, scored)
    lost = policy_loss(rows, scored.logprobs, old_logprobs, planned, settings)
    mask, weights = planned.mask, planned.weights
    terms = {
        "actor/pg_loss": masked.weighted_sum(lost.loss, weights),
        "actor/entropy": masked.weighted_sum(scored.entropy, weights),
        "actor/pg_clipfrac": masked.token_mean(lost.clipped, mask),
        "actor/pg_clipfrac_lower": masked.token_mean(lost.clipped_lower, mask),
        "actor/ppo_kl": masked.token_mean(old_logprobs - scored.logprobs, mask),
    }
    loss = terms["actor/pg_loss"]
    if settings.entropy_coeff:
        loss = loss - settings.entropy_coeff * terms["actor/entropy"]
    if rows.ref_logprobs is not None:
        terms["actor/kl_loss"] = masked.weighted_sum(
            kl.estimate(settings.kl_loss_type, scored.logprobs, rows.ref_logprobs),
            weights,
        )
        if settings.kl_loss_coef:
            loss = loss + settings.kl_loss_coef * terms["actor/kl_loss"]
    return terms | {"actor/loss": loss}


class PolicyLoss(NamedTuple):
    """What `policy_loss` finds for each token."""

    loss: Float[Array, "R T"]
    clipped: Float[Array, "R T"]
    """1 where a bound has taken the gradient away or, in cispo, limits it."""
    clipped_lower: Float[Array, "R T"]
    """1 where it is that of `clip_ratio_c`, or, in geo_mean, the lower one."""


def policy_loss(
    rows: TrainBatch,
    logprobs: Float[Array, "R T"],
    old_logprobs: Float[Array, "R T"],
    planned: Plan,
    settings: Settings,
) -> PolicyLoss:
    """The loss that `settings.loss_mode` names, times the importance weights.

    Bypass mode with `loss_type` reinforce takes the place of that loss.
    """
    A = rows.advantages
    pair = (logprobs, old_logprobs)
    bounds = {
        "clip_ratio_low": settings.clip_ratio_low,
        "clip_ratio_high": settings.clip_ratio_high,
    }
    c = settings.clip_ratio_c
    where = (planned.mask, rows.sequence_ids, rows.num_sequences)
    weights = planned.correction
    how = settings.correction
    bypass = how is not None and how.bypass_mode and how.loss_type == "reinforce"
    clipped = lower = jnp.zeros(A.shape, bool)
    match "reinforce" if bypass else settings.loss_mode:
        case "vanilla":
            loss = losses.clipped_surrogate(*pair, A, **bounds, clip_ratio_c=c)
            clipped = losses.is_clipped(*pair, A, **bounds)
            if c is not None:
                lower = (A < 0) & losses.is_over(*pair, c)
        case "dppo_tv" | "dppo_kl" as mode:
            inside_of = losses.inside_tv if mode == "dppo_tv" else losses.inside_kl
            inside = inside_of(*pair, A, **bounds)
            most = jnp.inf if c is None else c
            loss = losses.dppo(*pair, A, inside, clip_ratio_c=most)
            clipped = ~inside
            lower = inside & losses.is_over(*pair, most)
        case "gspo":
            ratio = losses.sequence_log_ratio(*pair, *where)
            pair = (ratio, jnp.zeros_like(ratio))
            loss = losses.clipped_surrogate(*pair, A, **bounds)
            clipped = losses.is_clipped(*pair, A, **bounds)
        case "sapo":
            tau = {"tau_pos": settings.tau_pos, "tau_neg": settings.tau_neg}
            loss = losses.sapo(*pair, A, **tau)
        case "gpg" | "reinforce":
            loss = losses.reinforce(logprobs, A)
        case "clip_cov":
            loss = losses.clip_cov(*pair, A, planned.chosen, **bounds)
            clipped = planned.chosen
        case "kl_cov":
            coef = settings.ppo_kl_coef
            loss = losses.kl_cov(*pair, A, planned.chosen, ppo_kl_coef=coef)
        case "geo_mean":
            loss = losses.gmpo(*pair, A, *where, **bounds)
            outside = losses.is_outside(*pair, **bounds, log=True)
            clipped, lower = outside & (A > 0), outside & (A < 0)
            if weights is not None:  # of the whole response, as its ratio is
                logs = jnp.log(weights + 1e-10)
                weights = jnp.exp(masked.sequence_average(logs, *where))
        case "dro":
            loss = losses.dro(*pair, A, beta=settings.dro_beta)
        case "cispo":
            loss = losses.cispo(*pair, A, **bounds)
            clipped = losses.is_outside(*pair, **bounds)
        case mode:
            known = ", ".join(get_args(losses.Mode))
            raise ValueError(f"loss_mode is {mode!r}; known: {known}")
    if weights is not None:
        loss = loss * weights
    as_floats = (x.astype(jnp.float32) for x in (clipped, lower))
    return PolicyLoss(loss, *as_floats)


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
      function: `(params, rows, their part of beside) -> (terms, per token)`, the latter
        such as `Logprobs`: a tree of [R, T].
      beside: a tree of [R, T] arrays.

    Returns:
      The sum of the terms, and what was found per token, of all rows.
    """
    num_rows = batch.tokens.shape[0]
    if micro_batch_size is None or micro_batch_size >= num_rows:
        terms, scored = function(params, batch, beside)
        return jax.tree.map(lambda x: x.astype(jnp.float32), terms), scored
    count = -(-num_rows // micro_batch_size)
    padded = pad_rows(batch, count * micro_batch_size)
    extra = ((0, count * micro_batch_size - num_rows), (0, 0))

    def split(x):
        return x.reshape(micro_batch_size, count, -1).swapaxes(0, 1)

    def join(x):
        return x.swapaxes(0, 1).reshape(micro_batch_size * count, -1)[:num_rows]

    beside = jax.tree.map(lambda x: jnp.pad(x, extra), beside)
    micro_batches = jax.tree.map(split, (padded, beside))

    def part(i):
        return jax.tree.map(lambda x: x[i], micro_batches)

    def add(i, found):
        terms, scored = function(params, *part(i))
        return (
            jax.tree.map(jnp.add, found[0], terms),
            jax.tree.map(lambda all, x: all.at[i].set(x), found[1], scored),
        )

    terms, scored = jax.eval_shape(function, params, *part(0))
    total = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), terms)
    scored = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), scored)
    in_use = jnp.any(micro_batches[0].sequence_ids >= 0, axis=(1, 2))
    last = jnp.max(jnp.where(in_use, jnp.arange(1, count + 1), 0))
    total, scored = jax.lax.fori_loop(0, last, add, (total, scored))
    return total, jax.tree.map(join, scored)
