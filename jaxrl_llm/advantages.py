"""How much better a response was than expected: one function per estimator.

Shapes: P = prompts, G = responses to each; R = rows, T = tokens in a row, which may
hold several sequences. Units: rewards, unless divided by a deviation.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def grpo(
    rewards: Float[Array, "P G"], *, normalize_by_std: bool, eps: float = 1e-6
) -> Float[Array, "P G"]:
    """Reward relative to the other responses to the same prompt.

        advantage = (reward - mean) / (std + eps)

    with the mean and the unbiased standard deviation (divisor G - 1) of the group.
    Equal rewards give exactly 0.

    A group of one has nothing to be compared with and gets 0. (veRL returns its raw
    reward, which would train on a response without a baseline.)

    Args:
      normalize_by_std: divide (GRPO) or only centre (Dr. GRPO), which does not
        up-weight prompts that are nearly always or nearly never solved.

    Source: Shao et al. 2024, section 4.1.2 (arXiv:2402.03300); without the division,
    Liu et al. 2025 (arXiv:2503.20783). The divisor and `eps` are veRL's.
    """
    if rewards.shape[1] == 1:
        return jnp.zeros_like(rewards)
    # Against the first reward, equal ones differ by exactly 0: no rounding of a mean.
    shifted = rewards - rewards[:, :1]
    centred = shifted - shifted.mean(axis=1, keepdims=True)
    if not normalize_by_std:
        return centred
    return centred / (shifted.std(axis=1, ddof=1, keepdims=True) + eps)


def gae(
    rewards: Float[Array, "R T"],
    values: Float[Array, "R T"],
    mask: Bool[Array, "R T"],
    sequence_ids: Int[Array, "R T"],
    *,
    gamma: float,
    lam: float,
) -> tuple[Float[Array, "R T"], Float[Array, "R T"]]:
    """Generalised advantages and returns of each token, from its sequence's end back.

        delta_t     = rewards_t + gamma * values_t' - values_t
        advantage_t = delta_t + gamma * lam * advantage_t'
        return_t    = advantage_t + values_t

    where t' is the next unmasked token of the same sequence; after the last one value
    and advantage are 0. Tokens that the policy did not choose (mask False: tool output,
    the next turn's prompt) take no time: no discount, no value, as in veRL.

    Advantages are not whitened; veRL's PPO does that next, with `masked.whiten`.

    Args:
      rewards: of each token, usually 0 but on the last; see `token_rewards`.
      values: expected return before the token is chosen.

    Returns:
      Advantages and returns, both 0 where `mask` is False.

    Source: Schulman et al. 2016, eq. 16 (arXiv:1506.02438).
    """

    def back(later, column):
        value_after, advantage_after, id_after = later
        reward, value, chosen, id = column
        same = id == id_after
        value_after = jnp.where(same, value_after, 0.0)
        advantage_after = jnp.where(same, advantage_after, 0.0)
        advantage = reward + gamma * value_after - value + gamma * lam * advantage_after
        kept = (
            jnp.where(chosen, value, value_after),
            jnp.where(chosen, advantage, advantage_after),
            id,
        )
        return kept, jnp.where(chosen, advantage, 0.0)

    columns = [x.T for x in (rewards, values, mask, sequence_ids)]
    nothing = jnp.zeros_like(values[:, 0])
    start = (nothing, nothing, sequence_ids[:, -1])
    _, found = jax.lax.scan(back, start, columns, reverse=True)
    return found.T, jnp.where(mask, found.T + values, 0.0)


def token_rewards(
    scores: Float[Array, " B"],
    mask: Bool[Array, "R T"],
    sequence_ids: Int[Array, "R T"],
) -> Float[Array, "R T"]:
    """The score of each sequence on its last unmasked token, 0 elsewhere.

    Args:
      scores: by sequence id.
    """
    index = jnp.arange(mask.size).reshape(mask.shape)
    last = jax.ops.segment_max(
        jnp.where(mask, index, -1).ravel(), sequence_ids.ravel(), scores.shape[0]
    )
    is_last = mask & (index == last[sequence_ids])
    return jnp.where(is_last, scores[sequence_ids], 0.0)
