"""Cards against a dealer: chance decides much, and good play little.

Cards come from an endless deck. The dealer draws up to 17 and stands. Reward 1 for a
win, 1/2 for a draw, 0 for a loss: whoever always stands gets 0.407 on average, and
the best play 0.477. So small a gap is no demonstration, but a test that what is
estimated from rewards has no bias.
"""

import random
import re

_CARDS = ("A", "2", "3", "4", "5", "6", "7", "8", "9", "10", "J", "Q", "K")
_DEALER = 17


def worth(cards: list[str]) -> int:
    """The best sum up to 21, where an ace is 1 or 11; else the least."""
    values = [min(_CARDS.index(card) + 1, 10) for card in cards]
    total = sum(values)
    return total + 10 if 1 in values and total <= 11 else total


class Blackjack:
    """Deals; every turn of the policy says "hit" or "stand"."""

    def reset(self, seed: int) -> str:
        """The rules and the first cards."""
        self._draw = random.Random(seed)
        self._dealer, self._cards = [self._card()], [self._card(), self._card()]
        return (
            "Get closer to 21 than the dealer, and not over it. The dealer shows "
            f"{self._dealer[0]}. {self._shown()} Say hit or stand."
        )

    def step(self, text: str) -> tuple[str, float, bool, bool, dict]:
        """The last "hit" or "stand" in the text counts; a text without one stands."""
        said = re.findall(r"hit|stand", text.lower())
        if said and said[-1] == "hit":
            self._cards.append(self._card())
            if worth(self._cards) > 21:
                return self._shown(), 0.0, True, False, {}
            return self._shown(), 0.0, False, False, {}
        while worth(self._dealer) < _DEALER:
            self._dealer.append(self._card())
        ours, theirs = worth(self._cards), worth(self._dealer)
        reward = 1.0 if theirs > 21 or ours > theirs else 0.5 * (ours == theirs)
        return f"The dealer has {theirs}.", reward, True, False, {}

    def _card(self) -> str:
        return self._draw.choice(_CARDS)

    def _shown(self) -> str:
        return f"You have {', '.join(self._cards)}, which is {worth(self._cards)}."
