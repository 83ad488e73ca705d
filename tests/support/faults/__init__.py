"""What tests/faults tries faults with: processes, the points they die at, verdicts."""

import os
import random

SEED = 22
SHARE = float(os.environ.get("FAULTS_SHARE", "1"))


def count(number: int) -> int:
    """So many faults, or the share of them that is asked for."""
    return max(1, round(number * SHARE))


def generator(*names: object) -> random.Random:
    """Random numbers that are the same in each campaign."""
    return random.Random(f"{SEED} {names}")
