"""Seeds: everything random in a run is a function of the run's seed, what the numbers
are for, and the step. Nothing random has other state, so that a run goes on bit for
bit.
"""

import enum

import numpy as np


class Purpose(enum.IntEnum):
    """Independent streams of random numbers."""

    ROLLOUT = 0
    """Tokens of the responses that are trained on."""
    VALIDATION = 1
    """Tokens of the answers to held-out questions."""
    ORDER = 2
    """The order of the prompts in each pass of an update."""
    RESAMPLE = 3
    """Which responses PF-PPO trains on."""
    ACTOR_ADAPTERS = 4
    """The policy's adapters before the first step."""
    CRITIC_ADAPTERS = 5
    """The critic's."""
    LEARNER_ADAPTERS = 6
    """Those of a model that learns from rows."""


def seed(run_seed: int, purpose: Purpose, step: int, attempt: int = 0) -> int:
    """A 32-bit seed for one purpose in one step.

    Args:
      run_seed: the configuration's `seed`.
      attempt: a further seed for the same purpose in the same step.
    """
    words = [run_seed, int(purpose), step, attempt]
    return int(np.random.SeedSequence(words).generate_state(1)[0])
