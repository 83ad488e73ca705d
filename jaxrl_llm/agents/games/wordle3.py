"""A word of three letters is to be guessed from what is told of the letters.

There are 50 words and five guesses. Whoever does not heed the answers finds at most
5 of 50, 10 %; whoever does can find every word.
"""

import random
import re

WORDS = tuple(
    """
    ant arm art ash bag bat bed bee box bus cap car cat cow cup day dog ear egg elf
    eye fan fig fox gum hat hen ice ink jam key leg lip map mud net nut oak owl pen
    pig rat sea sky sun tea toe van wax zoo
    """.split()
)
"""What may be hidden."""

HERE, ELSEWHERE, ABSENT = "here", "elsewhere", "absent"


def told(guess: str, word: str) -> tuple[str, ...]:
    """For each letter of a guess, whether the word has it here, elsewhere or not."""
    left = [w for g, w in zip(guess, word, strict=True) if g != w]
    found = []
    for g, w in zip(guess, word, strict=True):
        if g == w:
            found.append(HERE)
        elif g in left:
            left.remove(g)
            found.append(ELSEWHERE)
        else:
            found.append(ABSENT)
    return tuple(found)


class Wordle3:
    """Hides one of `WORDS`. Reward 1 if it is guessed in time, else 0.

    Args:
      guesses: how many there are.
    """

    def __init__(self, guesses: int = 5):
        if guesses < 1:
            raise ValueError(f"guesses is {guesses}; it is at least 1")
        self._guesses = guesses

    def reset(self, seed: int) -> str:
        """The rules."""
        self._word = random.Random(seed).choice(WORDS)
        self._left = self._guesses
        return (
            f"Guess a word of three letters in {self._guesses} tries. It is one of: "
            f"{' '.join(WORDS)}. Say only a word."
        )

    def step(self, text: str) -> tuple[str, float, bool, bool, dict]:
        """The last word of three letters in the text is the guess."""
        found = re.findall(r"\b[a-z]{3}\b", text.lower())
        self._left -= 1
        if found and found[-1] == self._word:
            return "Right.", 1.0, True, False, {}
        if not self._left:
            return f"It was {self._word}.", 0.0, True, False, {}
        if not found:
            return "Say a word of three letters.", 0.0, False, False, {}
        words = zip(found[-1], told(found[-1], self._word), strict=True)
        said = ", ".join(f"{letter} {where}" for letter, where in words)
        return f"{said}.", 0.0, False, False, {}
