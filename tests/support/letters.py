"""An environment of text that a random model can play."""


class Letters:
    """Asks for letters; a turn is worth the share of its bytes that are below 64, the
    third is the last.

    Args:
      wanted: of turns.
    """

    def __init__(self, wanted: int = 3):
        self._wanted, self._turns = wanted, 0

    def reset(self, seed: int) -> str:
        self._turns = 0
        return f"s{seed % 10}"

    def step(self, text: str):
        self._turns += 1
        low = sum(ord(letter) < 64 for letter in text) / max(1, len(text))
        done = self._turns == self._wanted
        return f"t{self._turns}", low, done, False, {}
