"""A number is to be guessed, and every guess is told whether it is higher or lower.

Of 1 to 7, three guesses find every number by halving. Whoever does not heed the answers
finds at most 3 of 7, 43 %.
"""

import random
import re


class HigherLower:
    """Thinks of a number. Reward 1 if it is guessed in time, else 0.

    Args:
      highest: numbers are from 1 to it.
      guesses: how many there are.
    """

    def __init__(self, highest: int = 7, guesses: int = 3):
        if highest < 1 or guesses < 1:
            raise ValueError(
                f"highest is {highest} and guesses {guesses}; both are at least 1"
            )
        self._highest, self._guesses = highest, guesses

    def reset(self, seed: int) -> str:
        """The rules."""
        self._number = random.Random(seed).randint(1, self._highest)
        self._left = self._guesses
        return (
            f"I think of a number from 1 to {self._highest}. You have {self._guesses} "
            "guesses. Say only a number."
        )

    def step(self, text: str) -> tuple[str, float, bool, bool, dict]:
        """The last number in the text is the guess; a text without one is lost."""
        found = re.findall(r"\d+", text)
        guess = int(found[-1]) if found and len(found[-1]) < 10 else None
        self._left -= 1
        if guess == self._number:
            return "Right.", 1.0, True, False, {}
        if not self._left:
            return f"It was {self._number}.", 0.0, True, False, {}
        if guess is None:
            return "Say a number.", 0.0, False, False, {}
        return "Higher." if guess < self._number else "Lower.", 0.0, False, False, {}
