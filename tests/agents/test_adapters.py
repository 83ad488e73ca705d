"""Environments of other libraries, as these ship them."""

import re

import pytest

from jaxrl_llm.agents import hosting, tools
from jaxrl_llm.agents.hosting import Hosted, Settings
from jaxrl_llm.data.types import Prompt

pytestmark = pytest.mark.slow
S = 120.0


@pytest.fixture
def play():
    """Plays an episode; the first words, the replies, and the outcome.

    Args of what it gives:
      policy: called with all that the environment has said.
    """
    made = []

    def play(environment, policy, seed=3, params=None, **columns):
        settings = Settings(
            environment=environment, params=params or {}, isolation="process"
        )
        made.append(Hosted(settings, tools.FORMATS["bracket"]))
        hosted, key, replies = made[-1], (0, 0), []
        prompt = Prompt(
            id=0,
            content=[{"role": "user", "content": "Play."}],
            tokens=(1,),
            columns=columns,
        )
        opening = hosted.open(key, prompt, seed).result(S)
        said = [opening.messages[-1]["content"]]
        while not replies or replies[-1].ended is None:
            replies.append(hosted.answer(key, policy(said)).result(S))
            said += [message["content"] for message in replies[-1].messages]
        return said, replies, hosted.close(key).result(S)

    yield play
    for hosted in made:
        hosted.shutdown()


def halving(low, high, write):
    """Finds a number by what is said of the guesses so far."""

    def policy(said):
        a, b = low, high
        for answer in said[1:]:
            guess = (a + b) // 2
            a, b = (guess + 1, b) if "higher" in answer else (a, guess - 1)
        return write.format((a + b) // 2)

    return policy


def test_a_game_of_textarena_is_played_to_its_end_and_is_its_seed_s(play):
    pytest.importorskip("textarena")
    game = hosting.find("agent.environment", "textarena:GuessTheNumber-v0-raw")
    games = [play(game, halving(1, 20, "I say [{}]"), seed) for seed in (3, 3, 7)]
    for said, replies, outcome in games:
        assert "between 1 and 20" in said[0] and "I say" not in "".join(said)
        assert replies[-1].ended == "completed" and outcome.reward == 1
    assert games[0][0] == games[1][0] != games[2][0]


def test_an_environment_of_gem_is_played_to_its_end_and_is_its_seed_s(play):
    pytest.importorskip("gem")
    game = hosting.find("agent.environment", "gem:game:GuessTheNumber-v0-easy")
    games = [play(game, halving(1, 10, "\\boxed{{{}}}"), seed) for seed in (3, 3, 7)]
    for said, replies, outcome in games:
        assert "between 1 and 10" in said[0]
        assert replies[-1].ended == "completed" and outcome.reward == 1
    assert games[0][0] == games[1][0] != games[2][0]


def test_an_environment_of_skyrl_gym_gets_its_row(play):
    pytest.importorskip("skyrl_gym")
    name = "skyrl_gym.envs.gsm8k.env:GSM8kEnv"
    env = hosting.find("agent.environment", name)
    row = {"reward_spec": {"ground_truth": "42"}}
    for answer, reward in (("#### 42", 1), ("#### 41", 0)):
        said, replies, outcome = play(env, lambda _, text=answer: text, **row)
        assert said == ["Play."] and replies[-1].ended == "completed"
        assert outcome.reward == reward


def test_several_turns_of_skyrl_gym(play):
    pytest.importorskip("skyrl_gym")
    name = "skyrl_gym.envs.gsm8k.multi_turn_env:GSM8kMultiTurnEnv"
    env = hosting.find("agent.environment", name)
    row = {"reward_spec": {"ground_truth": "42"}, "max_turns": 3}
    answers = iter(["hm", "hm", "#### 42"])
    said, replies, outcome = play(env, lambda _: next(answers), **row)
    assert len(replies) == 3 and re.search(r"\w", said[1])
    assert outcome.reward == pytest.approx(sum(reply.reward for reply in replies))
    assert outcome.reward > 0
