"""Hostile reward functions: the run ends with a line that names the function, whatever
it did."""

import pytest
from faults import count
from faults.verdicts import of_a_refusal

KIND = "hostile reward"
TIMEOUT_S = 2.0
NAMES = (
    "sleeps",
    "spins",
    "backtracks",
    "powers",
    "deaf",
    "waits_for_itself",
    "leaves",
    "leaves_with_0",
    "interrupts",
    "raises",
    "raises_without_text",
    "raises_what_cannot_be_sent",
    "raises_much",
    "recurses",
    "returns_none",
    "returns_text",
    "returns_too_few",
    "returns_too_many",
    "returns_nan",
    "returns_infinity",
    "returns_words",
    "returns_complex",
    "returns_lists",
    "returns_forever",
    "returns_a_function",
    "allocates",
    "prints",
    "ends_the_process",
    "kills_the_process",
    "closes_everything",
    "breaks_the_process",
)


@pytest.mark.parametrize("name", NAMES[: count(len(NAMES))])
def test_a_hostile_reward(campaign, verdicts, name):
    place = campaign.place("reward")
    changed = {
        "reward.functions": [{"name": f"faults.rewards:{name}"}],
        "reward.timeout_s": TIMEOUT_S,
        "trainer.total_training_steps": 1,
    }
    ended = campaign.train(place, changed=changed).wait(campaign.limit_s)
    verdicts(KIND, name, *of_a_refusal(ended, [name]))
