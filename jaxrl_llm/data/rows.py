"""What flows through a step: prompts, rollouts, rows to train on. One alignment.

P = prompts, G = responses per prompt, B = P * G sequences; R = rows, T = tokens in a
row. Index t of every token array talks about token t. In particular `logprobs[r, t]`
is the log-probability of `tokens[r, t]` given the tokens before it in its sequence, so
no caller ever shifts. Positions where `response_mask` is False hold 0, never garbage.
"""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt


@no_type_check  # JAX also builds such trees of NumPy arrays, shapes or shardings
class Taught(NamedTuple):
    """What a teacher says about the tokens of a student; 0 where it is not asked.

    K = the tokens that it finds likeliest.
    """

    logprobs: Float[Array, "R T"]
    """Log-probability of the token that stands there, nats; -inf for one that is none
    of the teacher's vocabulary."""
    entropy: Float[Array, "R T"]
    """Entropy of the distribution that it would have drawn the token from, nats."""
    top_ids: Int[Array, "R T K"] | None = None
    """The likeliest tokens, the likeliest first; None if it is not asked for them."""
    top_logprobs: Float[Array, "R T K"] | None = None
    """Their log-probabilities, nats."""


@no_type_check  # JAX also builds such trees of NumPy arrays, shapes or shardings
@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TrainBatch:
    """Sequences (prompt, then response) in rows, scored and ready for an update.

    A row holds one or more whole sequences one after the other, then padding. With
    shared prompts it holds a prompt once, then several responses to it, each of which
    goes on from the prompt. NumPy arrays on the host, JAX arrays on devices. What
    arranges rows moves arrays [R, T, ...] with any axes behind these two.
    """

    tokens: Int[Array, "R T"]
    sequence_ids: Int[Array, "R T"]
    """Which sequence of the batch a token belongs to, 0 .. num_sequences - 1; -1 on
    padding. A shared prompt belongs to the first response behind it."""
    positions: Int[Array, "R T"]
    """Index of a token within its context, from 0."""
    is_prompt: Bool[Array, "R T"]
    """True on the tokens that a sequence begins with before the policy has any part in
    it, which several sequences may share; False on padding."""
    response_mask: Bool[Array, "R T"]
    """True on tokens the policy sampled, the stop token included. Behind the prompt, it
    is False on observations: tokens the policy reads, such as a tool's answer."""
    sampler_logprobs: Float[Array, "R T"]
    """Under the sampler's policy at the sampling temperature, before top-k, top-p and
    min-p cut anything off, nats; NaN where an engine does not tell."""
    advantages: Float[Array, "R T"]
    ref_logprobs: Float[Array, "R T"] | None = None
    """Under the reference policy, nats; None without one."""
    old_logprobs: Float[Array, "R T"] | None = None
    """Under the policy that the trust region is centred on, nats.

    None: that is the policy before this very update, so the update takes its own
    log-probabilities, not differentiated: ratio = exp(logprobs - sg(logprobs)), whose
    value is 1 and whose gradient is that of logprobs. Exact for the first update after
    generation, without another forward pass."""
    values: Float[Array, "R T"] | None = None
    """Value of the state before the token, by the critic before the update; None
    without one."""
    returns: Float[Array, "R T"] | None = None
    """What `values` should have been; None without a critic."""
    margins: Float[Array, "R T"] | None = None
    """By how much the chosen score of a pair should be above the rejected one, on all
    tokens of the pair; None without any. See `preference.BradleyTerry`."""
    prompt_ids: Int[Array, "R T"] | None = None
    """Which copy of a prompt a token belongs to or goes on from; -1 on padding. None:
    every sequence has its own prompt."""
    contexts: Int[Array, "R T"] | None = None
    """Which context of its sequence a token stands in, counted from 0; it sees the
    tokens of that one only. None: every sequence is a single one."""
    taught: Taught | None = None
    """What the teacher says; None without one, or if the update asks it."""
    routes: UInt[Array, "R T L k"] | None = None
    """Experts to which tokens are to go in each of L layers that have any: 1 + the
    expert's number, or 0 where the router chooses. None: it chooses everywhere."""
    num_sequences: int = dataclasses.field(metadata={"static": True})
    """Sequence ids are below it. An id that no token has is a sequence without tokens,
    which counts nowhere."""
    sequence_capacity: int = dataclasses.field(metadata={"static": True})
    """No row holds more contexts, with padding at its end counted as one: what flash
    attention must make room for."""


def pad_rows(batch: TrainBatch, num_rows: int, length: int | None = None) -> TrainBatch:
    """`batch` with rows of padding added up to `num_rows`, and padding at the end of
    rows up to `length`, if given."""
    rows, tokens = batch.tokens.shape
    extra = ((0, num_rows - rows), (0, (length or tokens) - tokens))
    numpy = jnp if isinstance(batch.tokens, jax.Array) else np

    def pad(x):
        return numpy.pad(x, extra + ((0, 0),) * (x.ndim - 2))

    padded = jax.tree.map(pad, batch)
    ids = numpy.pad(batch.sequence_ids, extra, constant_values=-1)
    return dataclasses.replace(padded, sequence_ids=ids)


def attention_ids(batch: TrainBatch) -> Int[Array, "R T"]:
    """Tokens of a row with the same number stand in one context; -1 on padding."""
    if batch.contexts is None:
        return batch.sequence_ids
    begins = _changes(batch.sequence_ids) | _changes(batch.contexts)
    return jnp.where(batch.sequence_ids < 0, -1, jnp.cumsum(begins, axis=1))


def places(batch: TrainBatch) -> Int[Array, "R T"]:
    """Index of a token within its sequence, from 0, over all of its contexts."""
    if batch.contexts is None:
        return batch.positions
    column = jnp.broadcast_to(jnp.arange(batch.tokens.shape[1]), batch.tokens.shape)
    begins = jnp.where(_changes(batch.sequence_ids), column, 0)
    return column - jax.lax.cummax(begins, axis=1)


def _changes(x: Int[Array, "R T"]) -> Bool[Array, "R T"]:
    """Whether another number than here stands to the left; False at the beginning."""
    return jnp.pad(x[:, 1:] != x[:, :-1], ((0, 0), (1, 0)))


def bare(batch: TrainBatch) -> TrainBatch:
    """The rows without what other models said of them."""
    others = ("ref_logprobs", "old_logprobs", "values", "returns", "taught", "routes")
    return dataclasses.replace(batch, **dict.fromkeys(others))


def previous_tokens(batch: TrainBatch) -> Int[Array, "R T"] | None:
    """Where in its row the token before each token behind a prompt stands, if that is
    not always to its left: before the first token behind a prompt is the prompt's last.
    """
    if batch.prompt_ids is None:
        return None
    place = jnp.broadcast_to(
        jnp.arange(batch.tokens.shape[1])[None], batch.tokens.shape
    )
    end_of_prompt = jax.lax.cummax(jnp.where(batch.is_prompt, place, 0), axis=1)
    left = jnp.maximum(place - 1, 0)

    def of_left(x):
        return jnp.take_along_axis(x, left, axis=1)

    goes_on = ~of_left(batch.is_prompt) & (
        of_left(batch.sequence_ids) == batch.sequence_ids
    )
    return jnp.where(goes_on, left, end_of_prompt)
