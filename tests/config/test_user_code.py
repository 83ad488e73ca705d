"""When a user's function counts as changed."""

import functools
import importlib.util
import json
import sys

import pytest

from jaxrl_llm.config import user_code
from jaxrl_llm.rewards import builtin

REWARD = """
import json
import {helpers}
from {helpers} import strict as tough
SCALE = 2.0
calls = 0
class Base:
    def shift(self): return 1
class Judge(Base):
    def __call__(self, completions): return [tough(c) for c in completions]
def unrelated(): return 1
def reward(completions, **_):
    global calls
    calls += 1
    return [SCALE * {helpers}.score(c) for c in completions]
def late(completions):
    from {helpers} import score
    return [score(c) for c in completions]
def made(bonus, state):
    def inner(completions):
        state.append(1)
        return [bonus + tough(c) for c in completions]
    return inner
"""
HELPERS = """
LIMIT = {"long": 3}
def deeper(c): return len(c)
def score(c): return deeper(c) / LIMIT["long"]
def strict(c): return c == ""
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Makes the module of a reward and of its helpers, with changes to their text."""

    def load(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        spec = importlib.util.spec_from_file_location(name, tmp_path / f"{name}.py")
        made = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, made)
        spec.loader.exec_module(made)
        return made

    def make(*change):
        # The same names in every one, as in another process after an edit.
        monkeypatch.syspath_prepend(str(tmp_path))
        texts = [HELPERS, REWARD.replace("{helpers}", "helpers_of_a_reward")]
        if change:
            assert any(change[0] in text for text in texts)
            texts = [text.replace(*change) for text in texts]
        load("helpers_of_a_reward", texts[0])
        return load("a_reward", texts[1])

    return make


def digests(module):
    return {
        "reward": user_code.digest(module.reward),
        "late": user_code.digest(module.late),
        "made": user_code.digest(module.made(0.5, [])),
        "Judge": user_code.digest(module.Judge()),
    }


def changed(module, *change):
    before, after = digests(module()), digests(module(*change))
    return {name for name in before if before[name] != after[name]}


@pytest.mark.parametrize(
    "change, names",
    [
        (("return 1", "return 1"), set()),
        (("def unrelated(): return 1", "def unrelated(): return 2"), set()),
        (("SCALE *", "SCALE +"), {"reward"}),
        (("SCALE = 2.0", "SCALE = 3.0"), {"reward"}),
        (("calls = 0", "calls = 7"), {"reward"}),
        (("len(c)", "len(c) + 1"), {"reward", "late"}),
        (('"long": 3', '"long": 4'), {"reward", "late"}),
        (('c == ""', 'c != ""'), {"made", "Judge", "late"}),
        (("bonus +", "bonus -"), {"made"}),
        (("def shift(self): return 1", "def shift(self): return 2"), {"Judge"}),
    ],
)
def test_what_a_function_reaches_counts_and_nothing_else(module, change, names):
    # `late` imports all of a file, at a time when nobody sees what it takes of it.
    assert changed(module, *change) == names


def test_values_that_a_function_is_bound_to_count_unless_they_change(module):
    made = module().made
    state = []
    before = user_code.digest(made(0.5, state))
    state.append(1)
    assert user_code.digest(made(0.5, state)) == before
    assert user_code.digest(made(0.25, state)) != before
    bound = functools.partial(made, bonus=1)
    assert user_code.digest(bound) != user_code.digest(functools.partial(made, bonus=2))


def test_a_call_changes_nothing(module):
    reward = module().reward
    before = user_code.digest(reward)
    reward(["a"])
    assert user_code.digest(reward) == before


def test_what_is_installed_or_ours_is_not_the_users(module):
    assert user_code.is_users(module().reward)
    for thing in (json.dumps, len, pytest.raises, builtin.exact, json):
        assert not user_code.is_users(thing)
