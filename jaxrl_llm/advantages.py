"""How much better a response was than expected: one function per estimator.

Shapes: P = prompts, G = responses to each. Units: rewards, unless divided by a
deviation.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


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
