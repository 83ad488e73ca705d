"""How much better a response was than expected: one function per estimator.

Those that judge a response by one number take rewards `[P, G]`, and its length where
the equation has one, and return one advantage per response, `[P, G]`. Those that judge
tokens take the rows of a `TrainBatch`: token_rewards `[R, T]` (usually all on a
response's last token), its `response_mask` and its `sequence_ids`. They give the same
numbers however the sequences are packed. A run gives an estimator what it asks for by
name (`config.algorithm.ESTIMATORS`). Tokens behind a prompt that the policy did not
sample (observations of a tool) have mask False: they hold 0 in results, and time does
not pass there.

Wherever a group is compared with itself, equal rewards give exactly 0, and a group of
one gets 0: it has nothing to be compared with. (veRL returns its raw reward, which
trains on a response without a baseline.) Where lengths are given, a response of length
0 is none of its group, and the others have the advantages that they had without it; its
reward is what `of_others` gives.

Shapes: P = prompts, G = responses to each; R = rows, T = tokens in a row; S = sequences
of the batch. Units: rewards, unless divided by a deviation.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxrl_llm.algorithms import masked


def grpo(
    rewards: Float[Array, "P G"],
    lengths: Int[Array, "P G"] | None = None,
    *,
    normalize_by_std: bool,
    eps: float = 1e-6,
) -> Float[Array, "P G"]:
    """Reward relative to the other responses to the same prompt.

        advantage = (reward - mean) / (std + eps)

    with the mean and the unbiased standard deviation (divisor G - 1) of the group.

    Args:
      normalize_by_std: divide (GRPO) or only centre (Dr. GRPO), which does not
        up-weight prompts that are nearly always or nearly never solved.

    Source: Shao et al. 2024, section 4.1.2 (arXiv:2402.03300); without the division,
    Liu et al. 2025 (arXiv:2503.20783). The divisor and `eps` are veRL's.
    """
    centred = _centred(rewards)
    return centred / (_std(rewards, lengths) + eps) if normalize_by_std else centred


def grpo_passk(
    rewards: Float[Array, "P G"],
    lengths: Int[Array, "P G"] | None = None,
    *,
    normalize_by_std: bool,
    eps: float = 1e-6,
) -> Float[Array, "P G"]:
    """Only the best response of a group counts: by how much it beats the second best.

        advantage = (best - second best) [/ (std + eps)]   for the best, 0 for others

    Raises:
      ValueError: a group of one has no second best.

    Source: arXiv:2503.19595. The divisor and `eps` are veRL's.
    """
    if rewards.shape[1] < 2:
        raise ValueError(
            f"grpo_passk needs at least 2 responses per prompt, got {rewards.shape[1]}"
        )
    counted, count = rewards, rewards.shape[1]
    if lengths is not None:
        counted = jnp.where(lengths > 0, rewards, -jnp.inf)
        count = _count(lengths)
    order = jnp.sort(counted, axis=1)
    lead = jnp.where(count > 1, order[:, -1:] - order[:, -2:-1], 0.0)
    if normalize_by_std:
        lead = lead / (_std(rewards, lengths) + eps)
    best = jax.nn.one_hot(jnp.argmax(counted, axis=1), rewards.shape[1])
    return best * lead


def turn_grpo(
    turn_rewards: Float[Array, "P G K"],
    num_turns: Int[Array, "P G"],
    *,
    gamma: float,
    normalize_by_std: bool,
    eps: float = 1e-6,
) -> Float[Array, "P G K"]:
    """Turn by turn, what came from there on, relative to the others of the group.

        returns[k]   = turn_rewards[k] + gamma * returns[k + 1]
        advantage[k] = (returns[k] - mean) [/ (std + eps)]

    with mean and unbiased deviation over the episodes of the group that have a turn k.
    One that nobody else has gets 0. With one turn, it is `grpo`.

    Args:
      turn_rewards: 0 where an episode has no turn any more.
      normalize_by_std: as of `grpo`.

    Source: Zeng et al. 2025 (arXiv:2505.11821), the comparison within a turn; the
    rewards of later turns as in REINFORCE.
    """
    there = jax.lax.broadcasted_iota(jnp.int32, turn_rewards.shape, 2)
    there = there < num_turns[..., None]

    def step(after, rewards):
        here = rewards + gamma * after
        return here, here

    along = jnp.moveaxis(turn_rewards, 2, 0)
    start = jnp.zeros(turn_rewards.shape[:2])
    _, returns = jax.lax.scan(step, start, along, reverse=True)
    each, std = _among(jnp.moveaxis(returns, 0, 2), there, axis=1)
    return each / (std + eps) if normalize_by_std else each


def gdpo(
    rewards_by_function: Float[Array, "K P G"],
    reward_weights: Float[Array, " K"],
    lengths: Int[Array, "P G"],
    judged: Bool[Array, "K P G"] | None = None,
    *,
    normalize_by_std: bool,
    eps: float = 1e-6,
) -> Float[Array, "P G"]:
    """Each of K rewards compared within the group on its own, then added up.

        whiten(sum over k of reward_weights[k] * grpo(rewards_by_function[k]))

    with each token counting once, so that a reward with a large spread does not drown
    the others. Responses that a function does not judge are no part of its group: they
    get nothing from it, and 0 if no function judges them.

    Args:
      judged: which rewards there are; those that are not NaN if not given.

    Source: arXiv:2601.05242.
    """
    if judged is None:
        judged = ~jnp.isnan(rewards_by_function)
    each, std = _among(rewards_by_function, judged, axis=2)
    if normalize_by_std:
        each = each / (std + eps)
    found = masked.whiten(jnp.einsum("k,kpg->pg", reward_weights, each), lengths)
    return jnp.where(jnp.any(judged, axis=0), found, 0.0)


def rloo(
    rewards: Float[Array, "P G"], lengths: Int[Array, "P G"] | None = None
) -> Float[Array, "P G"]:
    """Reward minus the mean of the others' in the group: G / (G - 1) * (reward - mean).

    Source: Ahmadian et al. 2024 (arXiv:2402.14740).
    """
    G = jnp.float32(rewards.shape[1]) if lengths is None else _count(lengths)
    return _centred(rewards) * (G / jnp.maximum(G - 1, 1))


def opo(
    rewards: Float[Array, "P G"], lengths: Int[Array, "P G"]
) -> Float[Array, "P G"]:
    """Reward minus the group's mean, longer responses weighing more in it.

        advantage = reward - sum(lengths * rewards) / sum(lengths)

    Source: Hao et al. 2025 (arXiv:2505.23585).
    """
    if rewards.shape[1] == 1:
        return jnp.zeros_like(rewards)
    shifted = rewards - rewards[:, :1]
    total = jnp.maximum(jnp.sum(lengths, axis=1, keepdims=True), 1)
    return shifted - jnp.sum(lengths * shifted, axis=1, keepdims=True) / total


def gpg(
    rewards: Float[Array, "P G"], lengths: Int[Array, "P G"] | None = None
) -> Float[Array, "P G"]:
    """Reward minus the group's mean, scaled up for responses that earned nothing.

        advantage = P * G / (number of rewards that are not 0) * (reward - mean)

    Source: Chu et al. 2025 (arXiv:2504.02546).
    """
    counted = jnp.ones(rewards.shape, bool) if lengths is None else lengths > 0
    earned = jnp.maximum(jnp.count_nonzero(jnp.where(counted, rewards, 0.0)), 1)
    return _centred(rewards) * (jnp.count_nonzero(counted) / earned)


def reinforce_plus_plus_baseline(
    rewards: Float[Array, "P G"], lengths: Int[Array, "P G"]
) -> Float[Array, "P G"]:
    """whiten(reward - mean of the group), each token of the batch counting once.

    Source: Hu et al. 2025 (arXiv:2501.03262).
    """
    return masked.whiten(_centred(rewards), lengths)


def reinforce_plus_plus(
    token_rewards: Float[Array, "R T"],
    mask: Bool[Array, "R T"],
    sequence_ids: Int[Array, "R T"],
    *,
    gamma: float,
) -> Float[Array, "R T"]:
    """whiten(`discounted_returns`) over all tokens of the batch: no group needed.

    Source: Hu et al. 2025 (arXiv:2501.03262).
    """
    returns = discounted_returns(token_rewards, mask, sequence_ids, gamma=gamma)
    return masked.whiten(returns, mask)


def remax(
    token_rewards: Float[Array, "R T"],
    sequence_baselines: Float[Array, " S"],
    mask: Bool[Array, "R T"],
    sequence_ids: Int[Array, "R T"],
) -> Float[Array, "R T"]:
    """Reward to go minus the reward of the greedy response to the same prompt.

    Args:
      sequence_baselines: for each sequence, the reward of its prompt's greedy response.

    Source: Li et al. 2023 (arXiv:2310.10505).
    """
    returns = discounted_returns(token_rewards, mask, sequence_ids, gamma=1.0)
    return jnp.where(mask, returns - sequence_baselines[sequence_ids], 0.0)


def gae(
    token_rewards: Float[Array, "R T"],
    values: Float[Array, "R T"],
    mask: Bool[Array, "R T"],
    sequence_ids: Int[Array, "R T"],
    *,
    gamma: float,
    lam: float,
) -> tuple[Float[Array, "R T"], Float[Array, "R T"]]:
    """Generalised advantage estimates, whitened, and the returns a critic learns.

        delta[t]     = token_rewards[t] + gamma * values[t + 1] - values[t]
        advantage[t] = delta[t] + gamma * lam * advantage[t + 1]
        returns[t]   = advantage[t] + values[t]

    where t + 1 is the next token of the response that the policy sampled; after the
    last one both are 0. Advantages are whitened over all tokens of the batch, returns
    are not.

    Source: Schulman et al. 2015, eq. 16 (arXiv:1506.02438); whitening as in veRL.
    """

    def step(after, here):
        reward, value = here
        advantage = reward + gamma * after[0] - value + gamma * lam * after[1]
        return (value, advantage)

    _, found = _scan(step, (token_rewards, values), mask, sequence_ids, reverse=True)
    returns = jnp.where(mask, found + values, 0.0)
    return masked.whiten(found, mask), returns


def optimal_token_baseline(
    token_rewards: Float[Array, "R T"],
    logprobs: Float[Array, "R T"],
    sum_pi_squared: Float[Array, "R T"],
    mask: Bool[Array, "R T"],
    sequence_ids: Int[Array, "R T"],
    positions: Int[Array, "R T"],
    is_prompt: Bool[Array, "R T"],
    group_ids: Int[Array, " S"],
    *,
    correction: Float[Array, "R T"] | None = None,
) -> Float[Array, "R T"]:
    """Reward to go minus the baseline with the least variance, step by step.

        w[t] = (1 - 2 * p[t] + sum_pi_squared[t]) * correction[t]^2
        W[t] = w[first] + ... + w[t]
        B[t] = sum(returns[t] * W[t]) / (sum(W[t]) + 1e-8)   over the group at step t
        advantage[t] = returns[t] - B[t]

    w is the expected square of the score of a token, from its probability p. Steps are
    counted from the first token behind the prompt, observations included. Where only
    one response of the group is still going (its steps from the number of sampled
    tokens of the second longest on), and in a group of one, B is 0.

    Args:
      logprobs: under the policy before the update.
      sum_pi_squared: sum over the vocabulary of the square of its distribution there.
      group_ids: for each sequence, its prompt; below the number of sequences.
      correction: importance weights, if the sampler's distribution was another.

    Source: veRL 0.9.1, optimal_token_baseline.
    """
    first = jax.ops.segment_min(
        jnp.where(is_prompt, positions.shape[1], positions).ravel(),
        jnp.where(sequence_ids < 0, group_ids.size, sequence_ids).ravel(),
        group_ids.size,
    )
    return _minus_token_baseline(
        token_rewards, logprobs, sum_pi_squared, mask, sequence_ids,
        positions - first[sequence_ids], group_ids, correction,
    )  # fmt: skip


def tir_optimal_token_baseline(
    token_rewards: Float[Array, "R T"],
    logprobs: Float[Array, "R T"],
    sum_pi_squared: Float[Array, "R T"],
    mask: Bool[Array, "R T"],
    sequence_ids: Int[Array, "R T"],
    group_ids: Int[Array, " S"],
    *,
    correction: Float[Array, "R T"] | None = None,
) -> Float[Array, "R T"]:
    """`optimal_token_baseline` with steps counted over sampled tokens only.

    So that the k-th token a policy sampled is compared with the k-th of the others,
    however long the observations between them were (tool-integrated reasoning).

    Source: veRL 0.9.1, tir_optimal_token_baseline.
    """
    ones = mask.astype(jnp.float32)
    step = _running_sum(ones, mask, sequence_ids).astype(jnp.int32) - 1
    return _minus_token_baseline(
        token_rewards, logprobs, sum_pi_squared, mask, sequence_ids,
        step, group_ids, correction,
    )  # fmt: skip


def discounted_returns(
    rewards: Float[Array, "R T"],
    mask: Bool[Array, "R T"],
    sequence_ids: Int[Array, "R T"],
    *,
    gamma: float,
) -> Float[Array, "R T"]:
    """returns[t] = rewards[t] + gamma * returns[t + 1] along a response.

    t + 1 is the next token that the policy sampled; rewards of others do not count.
    """

    def step(after, here):
        return (here[0] + gamma * after[0],)

    return _scan(step, (rewards,), mask, sequence_ids, reverse=True)[0]


def at_last_token(
    rewards: Float[Array, " S"],
    mask: Bool[Array, "R T"],
    sequence_ids: Int[Array, "R T"],
    positions: Int[Array, "R T"],
) -> Float[Array, "R T"]:
    """The reward of a whole response, on the last token of it that was sampled."""
    last = jax.ops.segment_max(
        jnp.where(mask, positions, -1).ravel(),
        jnp.where(mask, sequence_ids, rewards.size).ravel(),
        rewards.size,
    )
    is_last = mask & (positions == last[sequence_ids])
    return jnp.where(is_last, rewards[sequence_ids], 0.0)


def turns(
    mask: Bool[Array, "R T"], sequence_ids: Int[Array, "R T"]
) -> Int[Array, "R T"]:
    """Which turn of the policy a token belongs to, from 0: each begins behind tokens
    that it did not sample. 0 where the mask is False."""
    begins = mask & ~(_of_left(mask) & (_of_left(sequence_ids) == sequence_ids))
    count = _running_sum(begins.astype(jnp.float32), mask, sequence_ids)
    return jnp.maximum(count.astype(jnp.int32) - 1, 0)


def at_turn_ends(
    turn_rewards: Float[Array, "S K"],
    mask: Bool[Array, "R T"],
    sequence_ids: Int[Array, "R T"],
) -> Float[Array, "R T"]:
    """The reward of every turn, on the last token of it that was sampled.

    Args:
      turn_rewards: of every turn that `turns` counts.
    """
    right = jnp.flip(_of_left(jnp.flip(mask, 1)), 1)
    same = jnp.flip(_of_left(jnp.flip(sequence_ids, 1)), 1) == sequence_ids
    found = turn_rewards[sequence_ids, turns(mask, sequence_ids)]
    return jnp.where(mask & ~(right & same), found, 0.0)


def of_others(
    rewards: Float[Array, "P G"], lengths: Int[Array, "P G"]
) -> Float[Array, "P G"]:
    """Rewards in which a response of length 0 has the mean of the others of its group:
    the mean of all is theirs. 0 where the group has no other."""
    there = lengths > 0
    centred, _ = _among(rewards, there, axis=1)
    first = jnp.argmax(there, axis=1, keepdims=True)
    mean = jnp.take_along_axis(rewards - centred, first, axis=1)
    mean = jnp.where(jnp.any(there, axis=1, keepdims=True), mean, 0.0)
    return jnp.where(there, rewards, mean)


def pf_ppo_weights(
    rewards: Float[Array, " B"],
    method: Literal["pow", "max_min", "max_random"],
    *,
    weight_pow: float = 2.0,
    counted: Bool[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    """How likely PF-PPO is to train on a response, up to a common factor.

        pow         |reward|^weight_pow
        max_min     1 for the best and the worst reward of the batch, else 0
        max_random  0.4 for the best, else 0.1

    plus 1e-8 each. Draw B of them with `resample`.

    Args:
      counted: what there is to train on; the others have weight 0 and are neither best
        nor worst. Where there is nothing, all weigh the same.

    Source: Shen and Zhang 2024 (arXiv:2409.06957).
    """
    there = jnp.ones(rewards.shape, bool) if counted is None else counted
    best = jnp.max(rewards, where=there, initial=-jnp.inf)
    worst = jnp.min(rewards, where=there, initial=jnp.inf)
    match method:
        case "pow":
            weights = jnp.abs(rewards) ** weight_pow
        case "max_min":
            weights = ((rewards == best) | (rewards == worst)).astype(jnp.float32)
        case "max_random":
            weights = jnp.where(rewards == best, 0.4, 0.1)
        case _:
            raise ValueError(
                f"reweight_method is {method!r}; known: pow, max_min, max_random"
            )
    weights = jnp.where(there, weights + 1e-8, 0.0)
    return jnp.where(jnp.any(there), weights, 1.0)


def resample(key: PRNGKeyArray, weights: Float[Array, " B"]) -> Int[Array, " B"]:
    """B indices drawn with replacement, index i in proportion to weights[i]."""
    return jax.random.categorical(key, jnp.log(weights), shape=weights.shape)


def _centred(rewards):
    """reward - mean of the group; exactly 0 if all are equal."""
    # Against the first reward, equal ones differ by exactly 0: no rounding of a mean.
    shifted = rewards - rewards[:, :1]
    return shifted - shifted.mean(axis=1, keepdims=True)


def _std(rewards, lengths=None):
    """Unbiased deviation of each group; 0 for a group of one."""
    shifted, G = rewards - rewards[:, :1], rewards.shape[1]
    found = shifted.std(axis=1, ddof=min(1, G - 1), keepdims=True)
    if lengths is None:
        return found
    # Those of length 0 stand at the mean: they add to the divisor alone.
    return found * jnp.sqrt(max(G - 1, 1) / jnp.maximum(_count(lengths) - 1, 1))


def _count(lengths):
    """Responses of each group that count, float32."""
    return jnp.sum(lengths > 0, axis=1, keepdims=True, dtype=jnp.float32)


def _among(values, there, axis):
    """What `_centred` and `_std` give, along an axis, of those that are there."""
    first = jnp.argmax(there, axis=axis, keepdims=True)
    reference = jnp.take_along_axis(values, first, axis=axis)
    shifted = jnp.where(there, values - reference, 0.0)
    count = jnp.sum(there, axis=axis, keepdims=True)
    mean = shifted.sum(axis=axis, keepdims=True) / jnp.maximum(count, 1)
    each = jnp.where(there, shifted - mean, 0.0)
    squares = jnp.sum(jnp.square(each), axis=axis, keepdims=True)
    return each, jnp.sqrt(squares / jnp.maximum(count - 1, 1))


def _of_left(x):
    """What stands one place to the left in a row; 0 at its beginning."""
    return jnp.pad(x, ((0, 0), (1, 0)))[:, :-1]


def _scan(step, columns, mask, sequence_ids, *, reverse):
    """What `step` makes of the tokens of `mask` one after the other, per sequence.

    `step` gets what it returned for the last such token of the same sequence (zeros at
    the first) and what `columns` hold here. 0 where the mask is False.
    """

    def advance(carry, here):
        before, last_id = carry
        mask, ids, columns = here
        before = tuple(jnp.where(ids == last_id, x, 0.0) for x in before)
        now = step(before, columns)
        kept = tuple(jnp.where(mask, n, b) for n, b in zip(now, before, strict=True))
        return (kept, ids), tuple(jnp.where(mask, n, 0.0) for n in now)

    rows = jnp.zeros_like(columns[0][:, 0])
    start = (tuple(rows for _ in columns), jnp.full_like(sequence_ids[:, 0], -1))
    along = jax.tree.map(jnp.transpose, (mask, sequence_ids, columns))
    _, found = jax.lax.scan(advance, start, along, reverse=reverse)
    return tuple(x.T for x in found)


def _running_sum(x, mask, sequence_ids):
    def step(before, here):
        return (before[0] + here[0],)

    return _scan(step, (x,), mask, sequence_ids, reverse=False)[0]


def _minus_token_baseline(
    rewards, logprobs, sum_pi_squared, mask, sequence_ids, step, group_ids, correction
):
    S, T = group_ids.size, mask.shape[1]
    returns = discounted_returns(rewards, mask, sequence_ids, gamma=1.0)
    scores = 1.0 - 2.0 * jnp.exp(logprobs) + sum_pi_squared
    if correction is not None:
        scores = scores * jnp.square(correction)
    weights = _running_sum(scores, mask, sequence_ids)

    # One cell for each step of each group; tokens that do not count fall out of bounds.
    cell = jnp.where(mask, group_ids[sequence_ids] * T + step, S * T)
    above = jax.ops.segment_sum((returns * weights).ravel(), cell.ravel(), S * T)
    below = jax.ops.segment_sum(weights.ravel(), cell.ravel(), S * T)
    baselines = (above / (below + 1e-8)).at[cell].get(mode="fill", fill_value=0.0)

    lengths = masked.sequence_sum(mask.astype(jnp.int32), mask, sequence_ids, S)
    longest = jax.ops.segment_max(lengths, group_ids, S)
    is_longest = lengths == longest[group_ids]
    shorter = jnp.where(is_longest, 0, lengths)
    second = jnp.maximum(jax.ops.segment_max(shorter, group_ids, S), 0)
    tied = jax.ops.segment_sum(is_longest.astype(jnp.int32), group_ids, S) > 1
    alone_from = jnp.where(is_longest & ~tied[group_ids], second[group_ids], T)
    baselines = jnp.where(step >= alone_from[sequence_ids], 0.0, baselines)
    return jnp.where(mask, returns - baselines, 0.0)
