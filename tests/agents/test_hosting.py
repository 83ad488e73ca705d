"""Environments of both kinds in workers: what the policy reads, what ends an episode,
and what it was worth."""

import asyncio
import dataclasses
import json
import os
import random
import re
import threading
import time

import pytest
import scripted

from jaxrl_llm.agents import hosting, loop, tools
from jaxrl_llm.agents.games.higher_lower import HigherLower
from jaxrl_llm.agents.hosting import BrokenEnvironment, Hosted, Settings
from jaxrl_llm.agents.loop import Limits
from jaxrl_llm.config.names import ConfigError
from jaxrl_llm.data.types import Prompt
from jaxrl_llm.rollout.engine import Request, Sampling

S = 30.0
"""No test waits so long for what comes."""


@pytest.fixture
def hosted():
    """Makes environments, and ends their workers."""
    made = []

    def make(format="bracket", isolation="thread", **settings):
        given = Settings(isolation=isolation, **settings)
        made.append(Hosted(given, tools.FORMATS[format]))
        return made[-1]

    yield make
    for environments in made:
        environments.shutdown()


def prompt(content="Go.", **columns):
    return Prompt(
        id=columns.pop("id", 0),
        content=[{"role": "user", "content": content}],
        tokens=(1,),
        columns=columns,
    )


def opened(environments, key=(0, 0), seed=3, **columns):
    return environments.open(key, prompt(**columns), seed).result(S)


def said(environments, text, key=(0, 0)):
    return environments.answer(key, text).result(S)


def contents(reply):
    return [message["content"] for message in reply.messages]


def add(a: int, b: int) -> int:
    """Adds.

    Args:
        a: One number.
        b: Another.
    """
    return a + b


async def later(word: str) -> dict:
    """Waits.

    Args:
        word: Said when it is over.
    """
    await asyncio.sleep(0)
    if word == "boom":
        raise KeyError(word)
    return {"word": word}


class Counter:
    """TRL's kind: what the policy calls changes what it is worth."""

    def __init__(self, step: int = 1):
        self._step, self.made = step, 0

    def reset(self, start: int = 0, **columns) -> str:
        self.count, self.columns = start, columns
        self.made += 1
        return f" Count from {start}."

    def increment(self, times: int) -> str:
        """Counts.

        Args:
            times: How often.
        """
        self.count += times * self._step
        return f"now {self.count}"

    async def double(self) -> str:
        """Doubles."""
        self.count *= 2
        return f"now {self.count}"

    def _hidden(self):
        raise AssertionError

    def get_reward(self) -> float:
        return float(self.count)


class Steps:
    """Gymnasium's kind, in every way that there is of saying so."""

    def __init__(self, kind="five"):
        self.kind = kind

    def reset(self, seed=None):
        self.turn, self.seed = 0, seed
        if self.kind == "messages":
            return [
                {"role": "user", "content": "one"},
                {"role": "assistant", "content": "two"},
                {"role": "user", "content": "three"},
            ]
        return f"Seed {seed}.", {"info": 1}

    def step(self, text):
        self.turn += 1
        over = self.turn == 3
        words = f"{self.turn}: {text}"
        match self.kind:
            case "four":
                return words, 0.5, over, {}
            case "skyrl":
                return {
                    "observations": [{"role": "user", "content": words}],
                    "reward": 0.5,
                    "done": over,
                    "metadata": {},
                }
            case "cut":
                return words, 0.5, False, over, {}
            case "bad":
                return words
            case "no number":
                return words, "high", over, False, {}
            case "no words":
                return {1: 2}, 0.5, over, False, {}
            case "boom":
                raise KeyError(text)
            case _:
                return words, 0.5, over, False, {}


def test_functions_are_called_and_answered_in_order(hosted):
    environments = hosted(format="hermes", tools=[add, later])
    opening = opened(environments)
    assert opening.messages == ({"role": "user", "content": "Go."},)
    assert [tools.name_of(tool) for tool in opening.tools] == ["add", "later"]
    assert not environments.gives_rewards
    calls = [
        {"name": "later", "arguments": {"word": "boom"}},
        {"name": "add", "arguments": {"a": 1, "b": 2}},
        {"name": "later", "arguments": {"word": "x"}},
        {"name": "sub", "arguments": {}},
        {"name": "add", "arguments": {"a": 1}},
    ]
    text = "".join(f"<tool_call>{json.dumps(call)}</tool_call>" for call in calls)
    reply = said(environments, text)
    boom, three, x, sub, missing = contents(reply)
    assert json.loads(boom) == {"error": "KeyError: 'boom'"}
    assert three == "3" and json.loads(x) == {"word": "x"}
    assert "there is no tool 'sub'" in sub and "b is missing" in missing
    assert [m["role"] for m in reply.messages] == ["tool"] * 5
    assert reply.calls == 3 and reply.ended is None and reply.seconds > 0
    assert reply.failures == {"raised": 1, "unknown_tool": 1, "arguments": 1}
    assert said(environments, "It is 3.").ended == "completed"
    assert environments.close((0, 0)).result(S).reward is None


def test_methods_are_tools_and_the_environment_says_the_reward(hosted):
    environments = hosted(environment=Counter, params={"step": 10}, tools=[add])
    opening = opened(environments, start=5, other="x")
    assert opening.messages[-1]["content"] == "Go. Count from 5."
    names = [tools.name_of(tool) for tool in opening.tools]
    assert names == ["add", "double", "increment"] and environments.gives_rewards
    assert contents(said(environments, "[increment(2)]")) == ["now 25"]
    assert contents(said(environments, "[add(1, 2), double()]")) == ["3", "now 50"]
    assert said(environments, "done").ended == "completed"
    outcome = environments.close((0, 0)).result(S)
    assert outcome.reward == 50 and outcome.environment.count == 50
    assert outcome.environment.columns["other"] == "x"
    assert outcome.environment.columns["prompt"][-1]["content"] == "Go."


def test_instances_are_kept_for_those_who_look_at_them_later(hosted):
    environments = hosted(environment=Counter)
    found = []
    for sample in range(3):
        opened(environments, key=(0, sample), start=sample)
        found.append(environments.close((0, sample)).result(S).environment)
    assert [x.count for x in found] == [0, 1, 2]


@pytest.mark.parametrize("kind", ["five", "four", "skyrl"])
def test_text_is_answered_with_text(hosted, kind):
    environments = hosted(environment=Steps, params={"kind": kind})
    assert opened(environments).messages[-1]["content"] == "Go.\n\nSeed 3."
    first, second = said(environments, "a"), said(environments, "b")
    assert contents(first) == ["1: a"] and contents(second) == ["2: b"]
    assert first.reward == 0.5 and first.ended is second.ended is None
    assert said(environments, "c").ended == "completed"
    assert environments.close((0, 0)).result(S).reward == 1.5


@pytest.mark.parametrize("format", tools.FORMATS)
def test_all_text_is_an_environment_s_that_has_no_tools(hosted, format):
    environments = hosted(environment=Steps, format=format)
    opened(environments)
    text = '[f(1)] {"name": 1} <tool_call><function=f></tool_call>'
    for index, written in enumerate((text, text[7:])):
        reply = said(environments, written)
        assert contents(reply) == [f"{index + 1}: {written}"] and not reply.failures


def test_an_environment_s_own_limit_is_one_of_turns(hosted):
    environments = hosted(environment=Steps, params={"kind": "cut"})
    opened(environments)
    assert [said(environments, "a").ended for _ in range(3)] == [
        None,
        None,
        "max_turns",
    ]


def test_messages_take_the_place_of_the_question(hosted):
    environments = hosted(environment=Steps, params={"kind": "messages"})
    messages = opened(environments).messages
    assert [m["content"] for m in messages] == ["one", "two", "three"]
    asked = Prompt(
        id=1,
        content=[
            {"role": "system", "content": "zero"},
            {"role": "user", "content": "Go."},
        ],
        tokens=(1,),
        columns={},
    )
    messages = environments.open((1, 0), asked, 0).result(S).messages
    assert [m["content"] for m in messages] == ["zero", "one", "two", "three"]


def test_a_row_s_own_seed_is_that_of_all_its_episodes(hosted):
    environments = hosted(environment=Steps)
    messages = opened(environments, seed=3).messages
    assert "Seed 3" in messages[-1]["content"]
    messages = environments.open((0, 1), prompt(seed=8), 3).result(S).messages
    assert "Seed 8" in messages[-1]["content"]


@pytest.mark.parametrize(
    "kind, why",
    [
        ("boom", "raised KeyError: 'a'"),
        ("bad", "not .observation, reward"),
        ("no number", "'high', not a finite number"),
        ("no words", "neither text nor chat messages"),
    ],
)
def test_a_broken_environment_is_no_reward(hosted, kind, why):
    environments = hosted(environment=Steps, params={"kind": kind})
    opened(environments)
    reply = said(environments, "a")
    assert reply.ended == "env_error" and reply.failures == {"env_error": 1}
    assert re.search(why, reply.why)
    environments.close((0, 0)).result(S)


class Unopened:
    """Does not begin, or does not say what it is worth."""

    def __init__(self, reward=None):
        self._reward = reward

    def reset(self, fails=True):
        if fails:
            raise OSError("no connection")

    def look(self) -> str:
        """Looks."""
        return ""

    def get_reward(self):
        if self._reward == "boom":
            raise OSError("no connection")
        return self._reward


def test_an_environment_that_does_not_begin_says_why_and_can_be_opened_again(hosted):
    environments = hosted(environment=Unopened)
    with pytest.raises(BrokenEnvironment, match="reset raised OSError: no connection"):
        opened(environments)
    opened(environments, fails=False)


@pytest.mark.parametrize("reward", ["boom", "high", float("nan"), float("inf")])
def test_a_reward_that_cannot_be_had_is_not_0(hosted, reward):
    environments = hosted(
        environment=Unopened, params={"reward": reward}, isolation="thread", workers=1
    )
    for _ in range(2):  # its worker is free for another
        opened(environments, fails=False)
        outcome = environments.close((0, 0)).result(S)
        assert outcome.reward is None and outcome.why.startswith("get_reward")
        assert isinstance(outcome.environment, Unopened)


def test_a_reward_may_be_none(hosted):
    environments = hosted(environment=Unopened)
    opened(environments, fails=False)
    assert environments.close((0, 0)).result(S).reward is None


def test_three_turns_that_cannot_be_read_end_an_episode(hosted):
    environments = hosted(format="hermes", tools=[add])
    opened(environments)
    right = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>'
    texts = ["<tool_call>", "<tool_call>", right, *["<tool_call>{"] * 3]
    replies = [said(environments, text) for text in texts]
    assert [r.ended for r in replies] == [None] * 5 + ["parse_error"]
    assert "JSON" in replies[-1].why and "JSON" in contents(replies[0])[0]
    assert sum(r.failures.get("unreadable", 0) for r in replies) == 5


def test_calls_beyond_the_most_are_told_and_not_made(hosted):
    environments = hosted(tools=[add], max_tool_calls=2)
    opened(environments)
    reply = said(environments, "[add(1, 2), add(2, 3), add(3, 4)]")
    assert contents(reply)[:2] == ["3", "5"] and "no more than 2" in contents(reply)[2]
    assert reply.calls == 2 and reply.failures == {"too_many_calls": 1}
    assert said(environments, "[add(1, 2)]").calls == 0
    assert said(environments, "5").ended == "completed"


class Gate:
    """Holds whoever says "wait" until it is opened."""

    gate = threading.Event()

    def reset(self):
        return None

    def step(self, text):
        if text == "wait":
            Gate.gate.wait(S)
        return text, 0.0, False, False, {}


def test_nobody_waits_for_another_s_answer(hosted):
    Gate.gate.clear()
    environments = hosted(environment=Gate)
    for sample in range(3):
        opened(environments, key=(0, sample))
    slow = environments.answer((0, 0), "wait")
    assert contents(said(environments, "a", key=(0, 1))) == ["a"]
    assert contents(said(environments, "b", key=(0, 2))) == ["b"]
    assert not slow.done()
    Gate.gate.set()
    assert contents(slow.result(S)) == ["wait"]


def test_who_takes_too_long_is_left_behind(hosted):
    Gate.gate.clear()
    environments = hosted(environment=Gate, turn_timeout_s=0.05)
    opened(environments)
    reply = said(environments, "wait")
    assert reply.ended == "tool_timeout" and "within 0.05 s" in reply.why
    assert reply.failures == {"tool_timeout": 1}
    environments.close((0, 0)).result(S)
    opened(environments)
    assert contents(said(environments, "a")) == ["a"]
    Gate.gate.set()


def test_those_beyond_the_most_workers_wait_for_a_free_one(hosted):
    environments = hosted(environment=Steps, workers=2)
    futures = [environments.open((0, i), prompt(), 0) for i in range(3)]
    for future in futures[:2]:
        future.result(S)
    assert not futures[2].done()
    environments.close((0, 1))
    futures[2].result(S)


def test_a_row_names_one_of_several_environments(hosted):
    environments = hosted(environment={"count": Counter, "steps": Steps})
    first = opened(environments, environment="count")
    second = opened(environments, key=(0, 1), environment="steps")
    assert len(first.tools) == 2 and second.tools == ()
    environments.check([prompt(environment="steps")])
    with pytest.raises(ValueError, match="prompt 4: .*None, there are count, steps"):
        environments.check([prompt(id=4)])


def test_the_package_s_games_are_played_at_once(hosted):
    environments = hosted(environment=HigherLower, isolation="auto")
    opened(environments)
    guesses = [environments.answer((0, 0), guess) for guess in "888"]
    assert all(guess.done() for guess in guesses)
    assert [contents(guess.result()) for guess in guesses[:2]] == [["Lower."]] * 2
    assert guesses[2].result().ended == "completed"
    assert environments.close((0, 0)).result().reward == 0


class Own:
    """Draws from the random numbers of its process, and can end it."""

    def reset(self):
        return f"{random.random()} {os.getpid()}"

    def step(self, text):
        match text:
            case "end":
                os._exit(3)
            case "hang":
                while True:
                    time.sleep(1)
        return f"{random.random()} {os.getpid()}", 1.0, False, False, {}


def test_a_process_of_its_own_is_seeded_and_takes_no_other_with_it(hosted):
    environments = hosted(environment=Own, isolation="process", turn_timeout_s=5.0)

    def numbers(key, seed):
        first = opened(environments, key=key, seed=seed).messages[-1]["content"]
        second = said(environments, "a", key=key).messages[-1]["content"]
        return [first.split()[1], second.split()[0]], second.split()[1]

    (one, _), (two, _), (other, _) = (
        numbers((0, i), seed) for i, seed in enumerate((7, 7, 8))
    )
    assert one == two != other
    processes = {
        said(environments, "a", key=(0, i)).messages[-1]["content"].split()[1]
        for i in range(3)
    }
    assert len(processes) == 3 and str(os.getpid()) not in processes
    ended = said(environments, "end", key=(0, 0))
    assert ended.ended == "env_error" and "exit status 3" in ended.why
    assert said(environments, "a", key=(0, 1)).reward == 1
    for i in range(3):
        environments.close((0, i)).result(S)
    again, process = numbers((1, 0), 7)
    assert again == one and process in processes  # one that was free


class Maker:
    """Draws when it is made."""

    def __init__(self):
        self.made = random.random()

    def reset(self):
        return f"{random.random()}"

    def step(self, text):
        raise AssertionError


def test_random_numbers_do_not_depend_on_whether_a_worker_is_new(hosted):
    environments = hosted(environment=Maker, isolation="process", workers=1)
    words = []
    for _ in range(2):
        words.append(opened(environments, seed=7).messages[-1]["content"])
        environments.close((0, 0)).result(S)
    assert words[0] == words[1]


def throw() -> float:
    """Throws with the random numbers of its process."""
    return random.random()


def test_functions_alone_draw_the_random_numbers_of_their_episode(hosted):
    environments = hosted(tools=[throw], isolation="process", workers=1)

    def thrown(key, seed):
        opened(environments, key=key, seed=seed)
        return [contents(said(environments, "[throw()]", key=key)) for _ in range(2)]

    first, other, again = (thrown((0, i), seed) for i, seed in enumerate((7, 8, 7)))
    assert first == again != other and first[0] != first[1]


class Dice:
    """Throws with the random numbers of its process, which instances would share."""

    def reset(self):
        return f"{random.random()}"

    def step(self, text):
        time.sleep(0.01 * random.random())
        return f"{random.random()} {text}", random.random(), False, False, {}


def test_the_same_episodes_are_played_whatever_else_is_under_way(hosted):
    found, limits = [], Limits(max_turns=3, max_tokens=500, max_prompt_length=99)
    requests = [
        Request(
            prompt_id=i,
            tokens=(1,),
            num_samples=4,
            seed=5,
            sampling=Sampling(max_tokens=4),
        )
        for i in range(2)
    ]
    for at_once in (1, 8):
        environments = hosted(environment=Dice, isolation="process")
        engine = scripted.Engine(order=at_once, cut=lambda request: False)
        prompts = [prompt(id=i) for i in range(2)]
        how = dataclasses.replace(limits, at_once=at_once)
        groups = loop.play(
            engine, environments, scripted.Template(), prompts, requests, how
        )
        found.append(
            [
                (
                    one.status,
                    one.played.reward,
                    [(turn.role, turn.text, turn.reward) for turn in one.turns],
                )
                for group in groups
                for one in group
            ]
        )
    assert found[0] == found[1]
    assert len({reward for _, reward, _ in found[0]}) > 2


def where() -> int:
    """Says which process it is in."""
    return os.getpid()


class Where:
    """An environment that says which process it is in."""

    def reset(self) -> None:
        """Has nothing to say."""

    def at_home(self) -> int:
        """Says which process it is in."""
        return os.getpid()


@pytest.mark.parametrize("environment", [Where, None])
def test_no_more_calls_of_a_function_apart_are_under_way_than_it_has_workers(
    hosted, environment
):
    env = hosted(
        isolation="process",
        tools=[add, where],
        apart={"where": 1},
        environment=environment,
    )
    keys = [(0, sample) for sample in range(3)]
    for key in keys:
        opened(env, key)
    call = "at_home()" if environment else "add(a=1, b=2)"
    replies = [env.answer(key, f"[where(), {call}, where()]") for key in keys]
    found = [contents(reply.result(S)) for reply in replies]
    assert len({pid for first, _, last in found for pid in (first, last)}) == 1
    if environment:  # each episode has its own, and none of them is that one
        assert len({own for _, own, _ in found} | {found[0][0]}) == 4
    else:
        assert [own for _, own, _ in found] == ["3"] * 3


def test_a_function_apart_that_fails_ends_its_episode_alone(hosted):
    def dies() -> None:
        """Ends its process."""
        os._exit(3)

    env = hosted(
        isolation="process", tools=[dies], apart={"dies": 1}, environment=Where
    )
    for sample in (0, 1):
        opened(env, (0, sample))
    failed = said(env, "[dies(), at_home()]", (0, 0))
    assert failed.ended == "env_error" and failed.failures == {"env_error": 1}
    assert said(env, "[at_home()]", (0, 1)).ended is None
    assert said(env, "[dies()]", (0, 1)).ended == "env_error"  # in a worker that is new


@pytest.mark.slow
def test_a_process_that_hangs_is_killed(hosted):
    environments = hosted(environment=Own, isolation="process", turn_timeout_s=1.0)
    opened(environments)
    pid = int(said(environments, "a").messages[-1]["content"].split()[1])
    assert said(environments, "hang").ended == "tool_timeout"
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize(
    "settings, why",
    [
        ({}, "give tools, an environment, or both"),
        ({"tools": [add, add]}, "two are called 'add'"),
        ({"environment": Counter, "params": {"stop": 1}}, "Counter: agent.params"),
        ({"environment": object}, "object has no method reset"),
        ({"tools": [add], "turn_timeout_s": 0.0}, "turn_timeout_s is 0"),
        (
            {"environment": type("Mute", (), {"reset": lambda self: None})},
            "Mute has neither a method step",
        ),
    ],
)
def test_what_makes_no_environment_is_refused_at_once(hosted, settings, why):
    with pytest.raises(ValueError, match=why):
        hosted(**settings)


def test_environments_are_found_by_name():
    assert hosting.find("agent.environment", "higher_lower") is HigherLower
    game = hosting.find("agent.environment", "textarena:GuessTheNumber-v0-raw")
    assert game.args == ("GuessTheNumber-v0-raw",)
    name = f"{HigherLower.__module__}:HigherLower"
    assert hosting.find("agent.environment", name) is HigherLower
    with pytest.raises(ConfigError, match="agent.environment: .*mean 'higher_lower'"):
        hosting.find("agent.environment", "higher_lowr")
