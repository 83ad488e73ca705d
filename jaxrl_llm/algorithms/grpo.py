"""GRPO as a pure function from training state to training state.

`update` is `update.update` of the objective `Policy`. It is not jitted here and closes
over nothing, so it can be jitted with any sharding, scanned over mini-batches, or
dropped into another training loop:

    update = functools.partial(
        grpo.update, logprob_fn=logprob_fn, optimizer=optimizer, settings=settings
    )
    state, metrics = jax.jit(update, donate_argnums=0)(state, batch)
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.algorithms import kl, losses, masked
from jaxrl_llm.algorithms import rollout_correction as corrections
from jaxrl_llm.algorithms import update as updates
from jaxrl_llm.algorithms.logprobs import Logprobs
from jaxrl_llm.algorithms.objectives import Objective, Segments
from jaxrl_llm.algorithms.statistics import Largest, Mean, Metrics, Statistics
from jaxrl_llm.algorithms.update import Params, TrainState
from jaxrl_llm.config import plugins
from jaxrl_llm.config.algorithm import DEFAULT_LOSS, LOSS_NUMBERS, Loss
from jaxrl_llm.data.rows import TrainBatch, places

LogprobFn = Callable[[Params, TrainBatch], Logprobs]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The numbers of an update, by veRL's names and with its defaults."""

    loss_mode: str | Callable[..., Any] = DEFAULT_LOSS
    """A name of `config.algorithm.LOSSES`, module:function, or a function that takes by
    name any of `LOSS_ARRAYS` and of the numbers below, and returns [R, T]."""
    params: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Other keyword arguments of the loss."""
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
    """Corrects the sampler's mismatch; it is not even measured in veRL's terms if not
    given."""
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
    """Losses that look ahead only: the tokens that they choose."""


def update(
    state: TrainState,
    batch: TrainBatch,
    *,
    logprob_fn: LogprobFn,
    optimizer: optax.GradientTransformation,
    settings: Settings,
    prepare: Callable[[Params], Params] | None = None,
    joinable: bool = False,
) -> tuple[TrainState, Metrics | Statistics]:
    """One optimizer step of a policy on one mini-batch: `update.update` of `Policy`.

    Args:
      state: donated by most callers.
      batch: the mini-batch. Any number of rows.
      logprob_fn: `(params, rows) -> Logprobs`, differentiable in params. `rows` are
        some of the rows of `batch`.
      optimizer: any optax transformation.
      settings: static.
      prepare, joinable: as of `update.update`.

    Returns:
      The next state, and scalars: `objective`'s, `mismatch`'s, those of
      `settings.correction`, the global norm of the gradient before clipping, and
      whether the update was skipped.

    Raises:
      ValueError: a KL loss is asked for and `batch` has no `ref_logprobs`, or a loss
        lacks a number that has no default.
    """
    return updates.update(
        state,
        batch,
        Policy(settings),
        optimizer,
        outputs_fn=logprob_fn,
        micro_batch_size=settings.micro_batch_size,
        prepare=prepare,
        joinable=joinable,
    )


@dataclass(frozen=True)
class Policy(Objective):
    """A policy loss with an entropy bonus and a KL term; outputs are `Logprobs`."""

    settings: Settings
    name: str = "actor"
    segments: Segments = "sequences"

    def read(self, batch: TrainBatch) -> TrainBatch:
        """`batch`; in bypass mode with the sampler's log-probabilities as the old ones.

        Raises:
          ValueError: it lacks `ref_logprobs`, or the loss a number without a default.
        """
        settings = self.settings
        if settings.kl_loss_coef and batch.ref_logprobs is None:
            raise ValueError(
                f"kl_loss_coef is {settings.kl_loss_coef} but the batch has no "
                "ref_logprobs"
            )
        loss = plugins.loss(settings.loss_mode, settings.params)
        for key, example in loss.required.items():
            if not getattr(settings, key):
                raise ValueError(
                    f"loss_mode {loss.name} needs {key} > 0, such as {example}, got "
                    f"{getattr(settings, key)}"
                )
        how = settings.correction
        if how is not None and how.bypass_mode:
            return dataclasses.replace(batch, old_logprobs=batch.sampler_logprobs)
        return batch

    def looks_ahead(self, batch: TrainBatch) -> bool:
        """See `grpo.looks_ahead`."""
        return looks_ahead(self.settings, batch)

    def plan(self, batch: TrainBatch, seen: Any, step: Int[Array, ""]) -> Plan:
        """See `grpo.plan`."""
        return plan(batch, seen, step, self.settings)

    def loss(
        self, rows: TrainBatch, outputs: Logprobs, planned: Plan
    ) -> tuple[Float[Array, ""], Logprobs]:
        """`actor/loss` of `grpo.objective`; the log-probabilities are kept."""
        return objective(rows, outputs, planned, self.settings)["actor/loss"], outputs

    def metrics(self, batch: TrainBatch, kept: Logprobs, planned: Plan) -> Statistics:
        """Those of `objective`, `mismatch` and `settings.correction`."""
        seen, settings = self.read(batch), self.settings
        found = metrics(seen, kept, planned, settings) | mismatch(batch, kept)
        if settings.correction is None:
            return found
        return found | correct(seen, kept, settings).metrics


def looks_ahead(settings: Settings, batch: TrainBatch) -> bool:
    """Whether the log-probabilities of all rows must be known before the first
    gradient: for a choice or a normaliser that no micro-batch can make alone."""
    if plugins.loss(settings.loss_mode, settings.params).looks_ahead:
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
    loss = plugins.loss(settings.loss_mode, settings.params)
    if loss.chosen is not None:
        given = _given(batch, scored.logprobs, mask, loss, settings)
        given |= {
            "tokens": batch.tokens,
            "positions": places(batch),
            "is_prompt": batch.is_prompt,
            "prompt_ids": batch.prompt_ids,
            "step": step,
        }
        chosen = plugins.call(
            loss.chosen, given | {"old_logprobs": old_logprobs_of(batch, scored)}
        )
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


def objective(
    rows: TrainBatch,
    scored: Logprobs,
    planned: Plan,
    settings: Settings,
    *,
    rewarded: bool = True,
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
      rewarded: False leaves out `pg_loss` and what is known of it, for an update that
        does not learn from advantages.
    """
    old_logprobs = old_logprobs_of(rows, scored)
    mask, weights = planned.mask, planned.weights
    terms: Metrics = {}
    if rewarded:
        lost = policy_loss(rows, scored.logprobs, old_logprobs, planned, settings)
        terms["actor/pg_loss"] = masked.weighted_sum(lost.loss, weights)
    terms["actor/entropy"] = masked.weighted_sum(scored.entropy, weights)
    if rewarded:
        clipped, lower = lost.clipped, lost.clipped_lower
        terms["actor/pg_clipfrac"] = masked.token_mean(clipped, mask)
        terms["actor/pg_clipfrac_lower"] = masked.token_mean(lower, mask)
    terms["actor/ppo_kl"] = masked.token_mean(old_logprobs - scored.logprobs, mask)
    loss = terms.get("actor/pg_loss", jnp.float32(0))
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


def metrics(
    rows: TrainBatch,
    scored: Logprobs,
    planned: Plan,
    settings: Settings,
    *,
    rewarded: bool = True,
) -> Statistics:
    """`objective` of the whole mini-batch, and what each of its numbers is over."""
    tokens = jnp.sum(planned.mask)
    counted = num_counted(rows, planned, settings)
    terms = objective(rows, scored, planned, settings, rewarded=rewarded)
    return {
        name: Mean(value, tokens if name in _TOKEN_MEANS else counted)
        for name, value in terms.items()
    }


def num_counted(rows: TrainBatch, planned: Plan, settings: Settings) -> Any:
    """What a sum with `planned.weights` is a mean over."""
    where = planned.mask, rows.sequence_ids, rows.num_sequences
    return masked.num_counted(settings.loss_agg_mode, *where)


_TOKEN_MEANS = ("actor/pg_clipfrac", "actor/pg_clipfrac_lower", "actor/ppo_kl")
"""Metrics of `objective` that are means over tokens; the others are sums with the
weights of the loss."""


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
    A, how, weights = rows.advantages, settings.correction, planned.correction
    clipped = lower = jnp.zeros(A.shape, bool)
    named = plugins.loss(settings.loss_mode, settings.params)
    if how is not None and how.is_policy_gradient:
        loss = losses.reinforce(logprobs, A)
    else:
        given = _given(rows, logprobs, planned.mask, named, settings)
        given |= {"old_logprobs": old_logprobs, "chosen": planned.chosen}
        loss = plugins.call(named.function, given, named.params)
        if loss.shape != A.shape:
            raise ValueError(
                f"loss {named.name} returned an array of shape {loss.shape}, not one "
                f"number for each token, {A.shape}"
            )
        if named.clipped is not None:
            clipped, lower = plugins.call(named.clipped, given)
    if weights is not None:
        if named.weighs_sequences:  # of the whole response, as its ratio is
            where = (planned.mask, rows.sequence_ids, rows.num_sequences)
            logs = jnp.log(weights + 1e-10)
            weights = jnp.exp(masked.sequence_average(logs, *where))
        loss = loss * weights
    as_floats = (x.astype(jnp.float32) for x in (clipped, lower))
    return PolicyLoss(loss, *as_floats)


def _given(
    rows: TrainBatch, logprobs, mask, loss: Loss, settings: Settings
) -> dict[str, Any]:
    """What functions of a loss may ask for, but for what differs between them."""
    numbers = {name: getattr(settings, name) for name in LOSS_NUMBERS}
    renamed = {p: numbers[name] for p, name in loss.parameters.items()}
    return {
        "logprobs": logprobs,
        "advantages": rows.advantages,
        "mask": mask,
        "sequence_ids": rows.sequence_ids,
        "num_sequences": rows.num_sequences,
        **numbers,
        **renamed,
    }


def mismatch(batch: TrainBatch, scored: Logprobs) -> Statistics:
    """How far the sampler's log-probabilities are from the trainer's before the update.

    `mismatch/logprob_diff_mean` and `_max` are of |sampler - trainer|, in nats;
    `mismatch/kl` is KL(sampler || trainer). All are over response tokens.
    """
    trainer = old_logprobs_of(batch, scored)
    difference = jnp.abs(batch.sampler_logprobs - trainer)
    mask, tokens = batch.response_mask, jnp.sum(batch.response_mask)
    divergence = kl.k3(batch.sampler_logprobs, trainer)
    return {
        "mismatch/logprob_diff_mean": Mean(masked.token_mean(difference, mask), tokens),
        "mismatch/logprob_diff_max": Largest(
            jnp.max(jnp.where(mask, difference, 0.0)), tokens
        ),
        "mismatch/kl": Mean(masked.token_mean(divergence, mask), tokens),
    }


def old_logprobs_of(rows: TrainBatch, scored: Logprobs) -> Float[Array, "R T"]:
    """Log-probabilities of the policy that the trust region is centred on; not
    differentiated."""
    if rows.old_logprobs is not None:
        return rows.old_logprobs
    return jax.lax.stop_gradient(scored.logprobs)
