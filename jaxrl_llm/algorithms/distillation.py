"""How far a student is from its teacher, token by token, on what the student wrote.

    distilled = with_teacher(hidden, matrix, tokens, ..., teacher=(hidden, matrix))
    loss = coef * masked.weighted_sum(distilled.divergence, weights)

p is the teacher's distribution of a token and q the student's, both at the sampling
temperature. Three measures, of which the first is a policy gradient:

    reverse_kl         log q(y) - log p(y) of the sampled token y, whose mean is
                       KL(q || p); its negative is the advantage of that token, as in
                       tinker and in veRL with use_policy_gradient and k1
    forward_kl_topk    KL(p || q) of the teacher's k likeliest tokens, and of all the
                       others as one class more
    jsd                beta KL(p || m) + (1 - beta) KL(q || m) with
                       m = beta p + (1 - beta) q

The first two take numbers that the teacher has computed anywhere; the last takes its
hidden states and output matrix. The logits of a whole row never exist, of neither
model: see `logprobs.of_logits`.

Shapes: R = rows, T = tokens in a row, K = the teacher's likeliest tokens, D = model, V
= vocabulary, d = D or a part of it.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.algorithms import logprobs
from jaxrl_llm.data.rows import Taught


class Distilled(NamedTuple):
    """What a student is told about its tokens, beside what it says itself; 0.0 where
    not asked."""

    logprobs: Float[Array, "R T"]
    """Its own, see `logprobs.Logprobs`."""
    entropy: Float[Array, "R T"]
    """Its own, see `logprobs.Logprobs`."""
    divergence: Float[Array, "R T"]
    """Distance of the two distributions, nats; what is made small."""
    teacher_logprobs: Float[Array, "R T"]
    """Log-probability by the teacher of the token that stands there, nats."""
    teacher_entropy: Float[Array, "R T"]
    """Entropy of the teacher's distribution, nats."""
    student_mass: Float[Array, "R T"]
    """Probability that the student gives the tokens that are compared one by one."""
    teacher_mass: Float[Array, "R T"]
    """Probability that the teacher gives them."""


def reverse_kl(
    logprobs: Float[Array, "R T"], teacher_logprobs: Float[Array, "R T"]
) -> Float[Array, "R T"]:
    """log q(y) - log p(y) of sampled tokens: an estimate of KL(q || p), unbiased.

    Its negative is an advantage; differentiated itself it teaches nothing, as its
    gradient is that of log q(y), whose mean is 0.

    Source: Thinking Machines Lab 2025, On-Policy Distillation; Schulman 2020, k1.
    """
    return logprobs - teacher_logprobs


def forward_kl_topk(
    logits: Float[Array, "*n V"],
    top_ids: Int[Array, "*n K"],
    top_logprobs: Float[Array, "*n K"],
) -> Float[Array, "*n"]:
    """KL of K + 1 classes: the teacher's likeliest tokens, and all others together.

        sum over top v of p[v] (log p[v] - log q[v]) + P (log P - log Q)
        P = 1 - sum over top v of p[v],  Q = sum over other v of q[v]

    Never negative, and 0 only if the classes agree; without the last class it can be
    negative, and clamping that takes the gradient away. At most KL(p || q), which it
    becomes as K grows.

    Args:
      logits: of the student.
      top_ids: K < V different tokens.
      top_logprobs: of the teacher; not differentiated.
    """
    return _topk_kl(logits, top_ids, top_logprobs)


@jax.custom_vjp
def _topk_kl(logits, top_ids, top_logprobs):
    return _topk_kl_forward(logits, top_ids, top_logprobs)[0]


def _topk_kl_forward(logits, top_ids, top_logprobs):
    total = jax.nn.logsumexp(logits, axis=-1)
    own = jnp.take_along_axis(logits, top_ids, axis=-1) - total[..., None]
    others = jnp.put_along_axis(logits, top_ids, -jnp.inf, axis=-1, inplace=False)
    rest = jax.nn.logsumexp(others, axis=-1) - total
    p = jnp.exp(top_logprobs)
    left = jnp.maximum(1.0 - jnp.sum(p, axis=-1), 0.0)
    of_rest = jax.scipy.special.xlogy(left, left) - left * rest
    found = jnp.sum(p * (top_logprobs - own), axis=-1) + of_rest
    return found, (logits, top_ids, p, left, total, rest)


def _topk_kl_backward(kept, g):
    """d logits[v] = q[v] - p[v] of the likeliest tokens, q[v] (1 - P / Q) of others."""
    logits, top_ids, p, left, total, rest = kept
    g, left, total, rest = (x[..., None] for x in (g, left, total, rest))
    of_rest = jnp.exp(jnp.minimum(logits - total - rest, 0.0))  # 1 at most, of others
    d_others = g * (jnp.exp(logits - total) - left * of_rest)
    q = jnp.exp(jnp.take_along_axis(logits, top_ids, axis=-1) - total)
    d_top = g * (q - p)
    d_logits = jnp.put_along_axis(d_others, top_ids, d_top, axis=-1, inplace=False)
    return d_logits, None, None


_topk_kl.defvjp(_topk_kl_forward, _topk_kl_backward)


def generalized_jsd(
    logits: Float[Array, "*n V"], teacher_logits: Float[Array, "*n V"], beta: float
) -> Float[Array, "*n"]:
    """Generalised Jensen-Shannon divergence, with TRL's meaning of beta.

        0 < beta < 1:  beta KL(p || m) + (1 - beta) KL(q || m)
                       m = beta p + (1 - beta) q
        beta = 0:      KL(p || q), forward
        beta = 1:      KL(q || p), reverse

    The two ends are limits of the middle divided by beta or 1 - beta.

    Args:
      logits: of the student.
      teacher_logits: not differentiated.

    Source: Agarwal et al. 2024, eq. 1 (arXiv:2306.13649).
    """
    log_q = jax.nn.log_softmax(logits)
    log_p = jax.nn.log_softmax(jax.lax.stop_gradient(teacher_logits))
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    if beta == 0:
        return jnp.sum(p * (log_p - log_q), axis=-1)
    if beta == 1:
        return jnp.sum(q * (log_q - log_p), axis=-1)
    log_m = jnp.logaddexp(log_q + math.log1p(-beta), log_p + math.log(beta))
    of_each = beta * p * (log_p - log_m) + (1.0 - beta) * q * (log_q - log_m)
    return jnp.sum(of_each, axis=-1)


def taught(
    hidden: Float[Array, "R T D"],
    output_matrix: Float[Array, "V d"],
    tokens: Int[Array, "R T"],
    positions: Int[Array, "R T"],
    mask: Bool[Array, "R T"],
    *,
    topk: int | None = None,
    **how: Any,
) -> Taught:
    """What a teacher says about the tokens that `mask` asks for.

    Args:
      hidden, output_matrix: the teacher's.
      topk: K; none if not given.
      how: as of `logprobs.of_tokens`, without what is about gradients.
    """
    function = functools.partial(_taught, topk=topk)
    return logprobs.of_logits(
        function, hidden, output_matrix, tokens, positions, mask, **how
    )


def _taught(logits, _, tokens, *, topk: int | None) -> Taught:
    total, top, ids = jax.nn.logsumexp(logits, axis=-1), None, None
    if topk is not None:
        top, ids = jax.lax.top_k(logits, topk)
        top = top - total[..., None]
    return Taught(_of(logits, total, tokens), _entropy(logits, total), ids, top)


def with_topk(
    hidden: Float[Array, "R T D"],
    output_matrix: Float[Array, "V d"],
    tokens: Int[Array, "R T"],
    positions: Int[Array, "R T"],
    mask: Bool[Array, "R T"],
    said: Taught,
    *,
    entropy_gradient: bool = True,
    **how: Any,
) -> Distilled:
    """`forward_kl_topk` of the tokens that `mask` asks for, in chunks.

    Args:
      hidden, output_matrix: the student's.
      said: of the teacher, about the same tokens.
      how: as of `logprobs.of_tokens`.
    """
    function = functools.partial(_with_topk, entropy_gradient=entropy_gradient)
    beside = tokens, said
    return logprobs.of_logits(
        function, hidden, output_matrix, beside, positions, mask, **how
    )


def _with_topk(logits, _, beside, *, entropy_gradient: bool) -> Distilled:
    tokens, said = beside
    total = jax.nn.logsumexp(logits, axis=-1)
    own = jnp.take_along_axis(logits, said.top_ids, axis=-1) - total[..., None]
    return Distilled(
        _of(logits, total, tokens),
        _entropy(logits, total, entropy_gradient),
        forward_kl_topk(logits, said.top_ids, said.top_logprobs),
        said.logprobs,
        said.entropy,
        jax.lax.stop_gradient(jnp.sum(jnp.exp(own), axis=-1)),
        jnp.sum(jnp.exp(said.top_logprobs), axis=-1),
    )


def with_teacher(
    hidden: Float[Array, "R T D"],
    output_matrix: Float[Array, "V d"],
    tokens: Int[Array, "R T"],
    positions: Int[Array, "R T"],
    mask: Bool[Array, "R T"],
    *,
    teacher: tuple[Array, Array],
    beta: float,
    entropy_gradient: bool = True,
    **how: Any,
) -> Distilled:
    """`generalized_jsd` of the tokens that `mask` asks for, in chunks.

    Args:
      hidden, output_matrix: the student's.
      teacher: hidden states and output matrix of the teacher. If that has fewer tokens,
        the student's distribution is that among these.
      how: as of `logprobs.of_logits`.
    """
    function = functools.partial(
        _with_teacher, beta=beta, entropy_gradient=entropy_gradient
    )
    return logprobs.of_logits(
        function, hidden, output_matrix, tokens, positions, mask, other=teacher, **how
    )


def _with_teacher(logits, teacher_logits, tokens, *, beta, entropy_gradient):
    teacher_logits = jax.lax.stop_gradient(teacher_logits)
    total, teachers = (jax.nn.logsumexp(x, axis=-1) for x in (logits, teacher_logits))
    whole, known = jnp.ones(tokens.shape), teacher_logits.shape[-1]
    return Distilled(
        _of(logits, total, tokens),
        _entropy(logits, total, entropy_gradient),
        generalized_jsd(logits[..., :known], teacher_logits, beta),
        _of(teacher_logits, teachers, tokens),
        _entropy(teacher_logits, teachers),
        whole,
        whole,
    )


def _of(
    logits: Float[Array, "*n V"], total: Float[Array, "*n"], tokens: Int[Array, "*n"]
) -> Float[Array, "*n"]:
    """Log-probability of tokens; -inf for one that is not there."""
    own = jnp.take_along_axis(logits, tokens[..., None], axis=-1, mode="clip")[..., 0]
    return jnp.where(tokens < logits.shape[-1], own - total, -jnp.inf)


def _entropy(
    logits: Float[Array, "*n V"], total: Float[Array, "*n"], gradient: bool = True
) -> Float[Array, "*n"]:
    if not gradient:
        logits, total = jax.lax.stop_gradient((logits, total))
    surprise = total[..., None] - logits
    return jnp.sum(jnp.exp(-surprise) * surprise, axis=-1)
