"""The floor and the optimum of every game, by policies that are written down."""

import functools
import itertools
import random
import re

import pytest

from jaxrl_llm.agents.games import blackjack, wordle3
from jaxrl_llm.agents.games.blackjack import Blackjack
from jaxrl_llm.agents.games.calculator import Calculator, calculate
from jaxrl_llm.agents.games.higher_lower import HigherLower
from jaxrl_llm.agents.games.wordle3 import WORDS, Wordle3


def play(game, policy, seed):
    """The sum of rewards, and what was said.

    Args:
      policy: called with all that the game has said so far.
    """
    said, total = [game.reset(seed=seed)], 0.0
    for _ in range(20):
        words, reward, terminated, truncated, _ = game.step(policy(said))
        said.append(words)
        total += reward
        if terminated or truncated:
            return total, said
    raise AssertionError("the game does not end")


def by_secret(game, secret, policy, seeds=2000):
    """The reward for each value of the attribute `secret`."""
    found = {}
    for seed in range(seeds):
        reward, _ = play(game, policy, seed)
        assert found.setdefault(getattr(game, secret), reward) == reward
    return found


def halving(said):
    low, high = 1, 7
    guess = 4
    for answer in said[1:]:
        low, high = (guess + 1, high) if answer == "Higher." else (low, guess - 1)
        guess = (low + high) // 2
    return f"I say {guess}"


def test_halving_finds_every_number_of_seven():
    assert by_secret(HigherLower(), "_number", halving) == dict.fromkeys(range(1, 8), 1)


def test_three_of_seven_is_the_most_without_heeding_answers():
    for guesses in itertools.product(range(1, 8), repeat=3):
        game, found = HigherLower(), 0
        for number in range(1, 8):
            game.reset(seed=0)
            game._number = number
            found += any(game.step(str(guess))[1] for guess in guesses[:3])
        assert found <= 3
    blind = by_secret(HigherLower(), "_number", lambda said: str(len(said)))
    assert sum(blind.values()) == 3 and len(blind) == 7


def test_a_turn_without_a_number_is_a_guess_lost():
    game = HigherLower(guesses=2)
    game.reset(seed=1)
    assert game.step("hm")[:3] == ("Say a number.", 0.0, False)
    assert game.step("9" * 5000)[:3] == (f"It was {game._number}.", 0.0, True)


def test_a_calculator_answers_what_a_policy_does_not_know():
    game = Calculator()
    for seed in range(200):
        question = game.reset(seed=seed)
        a, b = map(int, re.findall(r"\d+", question))
        assert 1000 <= a < 10_000 and 100 <= b < 1000
        result = game.calculate(f"{a} * {b}")
        assert game.get_reward(f"It is {result}.") == 1
        assert game.get_reward(f"{int(result):,}") == 1
        # Whoever knows the product's size and its last digit has it hardly ever.
        guess = round(a, -2) * round(b, -1) + a * b % 10
        assert game.get_reward(f"{guess}") == (guess == a * b)
        assert game.get_reward(f"{result} or {a}") == 0
        assert game.get_reward("") == 0


@pytest.mark.parametrize(
    "expression, value",
    [
        ("12 * (3 + 4)", "84"),
        ("7 / 2", "3.5"),
        ("8 / 2", "4"),
        ("-3 - -4", "1"),
        ("1,000 * 2", "2000"),
    ],
)
def test_the_calculator_computes(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    ["9**9**9**9", "__import__('os')", "x", "2 +", "'a' * 9", "1" * 200, "", "(" * 99],
)
def test_the_calculator_computes_nothing_else(expression):
    with pytest.raises(ValueError):
        calculate(expression)


def consistent(said, words=WORDS):
    """The words that fit all answers, and the guesses."""
    guesses = []
    for answer in said[1:]:
        pairs = re.findall(r"(\w) (here|elsewhere|absent)", answer)
        guess = "".join(letter for letter, _ in pairs)
        words = [w for w in words if [*wordle3.told(guess, w)] == [p for _, p in pairs]]
        guesses.append(guess)
    return words


@functools.cache
def splitting(said):
    """The guess that tells the words that are left apart best."""
    words = consistent(list(said))
    if len(words) <= 2:
        return words[0]

    def parts(guess):
        return len({wordle3.told(guess, word) for word in words}), guess in words

    return max(WORDS, key=parts)


def test_heeding_answers_finds_every_word():
    found = by_secret(Wordle3(), "_word", lambda said: splitting(tuple(said)))
    assert found == dict.fromkeys(WORDS, 1) and len(WORDS) == 50


def test_five_of_fifty_is_what_a_list_finds():
    found = by_secret(Wordle3(), "_word", lambda said: WORDS[len(said)])
    assert sum(found.values()) == 5 and len(found) == 50


def test_letters_that_occur_twice_are_told_once_for_each():
    assert wordle3.told("eye", "bee") == ("elsewhere", "absent", "here")
    assert wordle3.told("egg", "gum") == ("absent", "elsewhere", "absent")


# Blackjack: expected rewards from the rules, without a card dealt.

WORTH = [1, *range(2, 10), 10, 10, 10, 10]


@functools.cache
def dealer(hard, ace):
    """The chances of the dealer's last sums; 22 stands for all above 21."""
    total = hard + 10 if ace and hard <= 11 else hard
    if total >= 17:
        return {min(total, 22): 1.0}
    found = {}
    for value in WORTH:
        for last, chance in dealer(hard + value, ace or value == 1).items():
            found[last] = found.get(last, 0) + chance / 13
    return found


@functools.cache
def stand(total, shown):
    chances = dealer(shown, shown == 1)
    return sum(
        chance * (1.0 if last > 21 or total > last else 0.5 * (total == last))
        for last, chance in chances.items()
    )


@functools.cache
def hit(hard, ace, shown):
    found = 0.0
    for value in WORTH:
        new, has = hard + value, ace or value == 1
        found += 0 if new > 21 else best(new, has, shown) / 13
    return found


def best(hard, ace, shown):
    total = hard + 10 if ace and hard <= 11 else hard
    return max(stand(total, shown), hit(hard, ace, shown))


def expected(value):
    """The mean reward over all first cards."""
    hands = itertools.product(WORTH, WORTH, WORTH)
    return sum(value(a + b, 1 in (a, b), shown) for a, b, shown in hands) / 13**3


def always_stand(hard, ace, shown):
    return stand(hard + 10 if ace and hard <= 11 else hard, shown)


def by_the_book(said):
    """Hits where that is worth more."""
    shown = re.search(r"shows (\w+)\.", said[0])[1]
    cards = re.search(r"have ([\w, ]+), which", said[-1])[1].split(", ")
    values = [blackjack.worth([c]) if c != "A" else 1 for c in cards]
    shown = 1 if shown == "A" else blackjack.worth([shown])
    hard, ace = sum(values), 1 in values
    total = hard + 10 if ace and hard <= 11 else hard
    return "hit" if hit(hard, ace, shown) > stand(total, shown) else "stand"


@pytest.mark.parametrize(
    "policy, value, mean",
    [(lambda said: "stand", always_stand, 0.407), (by_the_book, best, 0.477)],
    ids=["always stand", "best"],
)
def test_blackjack_pays_what_its_rules_say(policy, value, mean):
    exact, count = expected(value), 3000
    assert exact == pytest.approx(mean, abs=0.0005)
    rewards = [play(Blackjack(), policy, seed)[0] for seed in range(count)]
    # Rewards from 0 to 1 deviate by at most 1/2: four times the mean's deviation.
    assert sum(rewards) / count == pytest.approx(exact, abs=4 * 0.5 / count**0.5)


@pytest.mark.parametrize("game", [HigherLower, Wordle3, Blackjack, Calculator])
def test_a_game_is_its_seed_s(game):
    first, second = game(), game()
    for seed in range(20):
        random.seed(1)
        words = first.reset(seed=seed)
        random.seed(2)
        assert words == second.reset(seed=seed)
        secret = {k: v for k, v in vars(first).items() if k != "_draw"}
        assert secret == {k: v for k, v in vars(second).items() if k != "_draw"}


@pytest.mark.parametrize(
    "make",
    [
        lambda: HigherLower(highest=0),
        lambda: Wordle3(guesses=0),
        lambda: Calculator(digits=(0, 3)),
    ],
)
def test_a_game_that_cannot_be_played_is_refused(make):
    with pytest.raises(ValueError):
        make()
