"""What a run says of what it sees; no model computes anything here."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from jaxrl_llm.config import parsing
from jaxrl_llm.data.types import (
    Completion,
    Generated,
    Played,
    Prompt,
    Scores,
    single_turn,
)
from jaxrl_llm.training import advice
from jaxrl_llm.training.advice import CannotLearn, Watch
from jaxrl_llm.training.experience import Groups

GOOD = {"actor/entropy": 1.0, "actor/update_skipped": 0.0, "actor/pg_loss": 0.1}
SKIPPED = GOOD | {"actor/update_skipped": 1.0}
P, G = 2, 2


@pytest.fixture
def config(values):
    return configured(values)


def configured(values, *overrides):
    whole = json.loads(json.dumps(values)) | {"output_dir": "RUN"}
    return parsing.parse(parsing.override(whole, list(overrides)), "test")


def groups(scores=None, errors=None, reason="stop", alike=False, **by_function):
    """Two questions with two responses each; rewards differ if not given."""
    made = [
        [
            Completion(
                prompt_id=p,
                sample=g,
                tokens=np.array([1, 0 if alike else g], np.int32),
                logprobs=np.zeros(2, np.float32),
                raw_logprobs=None,
                finish_reason="stop" if g and reason == "some" else reason,
                weight_version=0,
                text="",
            )
            for g in range(G)
        ]
        for p in range(P)
    ]
    found = np.array([[0, 1], [1, 0]] if scores is None else scores, np.float32)
    by_function = by_function or {"exact": found}
    prompts = [Prompt(id=p, content="", tokens=(1,), columns={}) for p in range(P)]
    all_of_it = Generated(
        asked=prompts,
        rollouts=single_turn(made),
        scores=Scores(
            total=np.nan_to_num(found),
            by_function=by_function,
            errors=errors or dict.fromkeys(by_function, 0),
        ),
    )
    return Groups(
        asked=prompts,
        rollouts=all_of_it.rollouts,
        scores=all_of_it.scores,
        generated=all_of_it,
        epoch=0.0,
        position={},
    )


EVEN = np.array([[1, -1], [1, -1]], np.float32)


def told(watch, *seen, first=1):
    """Kinds and texts after each step."""
    steps = enumerate(seen, first)
    return [watch.advise(step, made, EVEN, GOOD) for step, made in steps]


NONE = np.full((P, G), np.nan, np.float32)
ONE = np.ones((P, G), np.float32)
BAD = {
    "rewards_equal": groups(np.full((P, G), 0.5)),
    "groups_equal": groups([[0, 0], [1, 1]]),
    "rewards_none": groups(NONE, a=NONE, b=NONE),
    "silent/b": groups(a=ONE, b=NONE),
    "failed/a": groups(errors={"a": P * G}, a=ONE),
    "cut_off": groups(reason="length"),
    "responses_alike": groups(alike=True),
}
NAMES = {
    "rewards_equal": "step 3: every response gets the same reward, 0.5 .*RUN/rollouts",
    "groups_equal": "adv_estimator|grpo learns nothing",
    "rewards_none": "no reward function judges any response",
    "silent/b": "the reward function b judges no response",
    "failed/a": "the reward function a fails on every response",
    "cut_off": "rollout.max_response_length 8 ",
    "responses_alike": "raise rollout.temperature",
}


@pytest.mark.parametrize("kind", BAD)
def test_what_lasts_for_some_steps_is_told(config, kind):
    good, bad = groups(a=ONE, b=ONE), BAD[kind]
    found = told(Watch(config), good, bad, bad, good, bad, bad, bad, bad)
    assert found[:6] == [{}] * 6
    assert found[6].keys() == found[7].keys() == {kind}  # the log tells it once
    assert re.search(NAMES[kind].replace("step 3", "step 7"), found[6][kind])


def test_a_short_run_is_told_after_all_of_its_steps(values):
    watch = Watch(configured(values, "--trainer.total_training_steps=1"))
    (found,) = told(watch, BAD["rewards_equal"])
    assert found.keys() == {"rewards_equal"}


def test_some_that_are_cut_off_or_fail_are_no_reason(config):
    some = groups(reason="some", errors={"a": 3}, a=ONE)
    assert told(Watch(config), some, some, some) == [{}] * 3


def test_an_agent_that_calls_no_tool_is_told_how_it_may_be_heard(values):
    def played(calls):
        made = groups()
        for group, numbers in zip(made.rollouts, calls, strict=True):
            did = (Played(calls=number) for number in numbers)
            group[:] = map(lambda one, its: replace(one, played=its), group, did)
        return [made] * 3

    watch = Watch(configured(values, "--agent.tools", "[python]"))
    first, _, third = told(watch, *played([[0, 0], [0, 0]]))
    assert "no_tool_called" not in first
    assert "agent.parser auto" in third["no_tool_called"]
    assert told(watch, *played([[0, 0], [0, 1]])) == [{}] * 3
    assert told(Watch(configured(values)), *[groups()] * 3) == [{}] * 3


def test_estimators_that_compare_no_groups_learn_from_equal_ones(values):
    given = ("--algorithm.adv_estimator=reinforce_plus_plus", "--rollout.n=1")
    bad = BAD["groups_equal"]
    assert told(Watch(configured(values, *given)), bad, bad, bad) == [{}] * 3


def test_a_policy_without_entropy_is_told(config):
    watch = Watch(config)
    sure = GOOD | {"actor/entropy": 0.001}
    found = [watch.advise(s, groups(), EVEN, sure) for s in (1, 2, 3)]
    assert found[:2] == [{}, {}] and "its entropy is 0.001 nats" in found[2]["entropy"]


@pytest.mark.parametrize("name, role", [("actor", "policy"), ("critic", "critic")])
def test_a_run_without_finite_gradients_says_so_and_stops(config, name, role):
    watch, skipped = Watch(config), GOOD | {f"{name}/update_skipped": 1.0}
    for step, learned in enumerate([skipped, skipped, GOOD, skipped, skipped], 1):
        found = watch.advise(step, groups(), EVEN, learned)
        assert (f"{name}_skipped" in found) == (learned is skipped)
        watch.stop(step)
    assert f"1 of 1 updates of the {role} were skipped" in found[f"{name}_skipped"]
    assert "after 3 steps without any the run stops" in found[f"{name}_skipped"]
    watch.advise(6, groups(), EVEN, skipped)
    with pytest.raises(CannotLearn, match=f"step 6: no gradient of the {role} was fin"):
        watch.stop(6)


def test_a_step_with_one_finite_update_counts_as_learning(values):
    watch = Watch(configured(values, "--actor.ppo_epochs=2"))
    for step in range(1, 9):
        found = watch.advise(step, groups(), EVEN, SKIPPED)
        assert "1 of 2 updates of the policy" in found["actor_skipped"]
        watch.stop(step)


def test_a_run_may_be_told_to_go_on(values):
    watch = Watch(configured(values, "--trainer.max_skipped_steps=0"))
    for step in range(1, 9):
        watch.advise(step, groups(), EVEN, SKIPPED)
        watch.stop(step)


@pytest.mark.parametrize(
    "advantages, loss, cause",
    [
        (
            [[np.nan, 1], [1, np.inf]],
            np.nan,
            "2 of 4 advantages are not finite",
        ),
        ([[1, 2], [3, 4]], np.nan, "not finite, though advantages up to 4"),
        (
            [[1, 2], [3, 4]],
            0.5,
            r"the loss is finite \(0.5\) and its",
        ),
    ],
)
def test_the_cause_is_named(config, advantages, loss, cause):
    learned = SKIPPED | {"actor/pg_loss": loss}
    found = Watch(config).advise(1, groups(), np.array(advantages, np.float32), learned)
    assert re.search(cause, found["actor_skipped"])


def test_a_correction_is_recommended_where_sampler_and_trainer_differ(values):
    def said(*overrides, differ):
        learned = GOOD | {"mismatch/logprob_diff_mean": differ}
        watch = Watch(configured(values, *overrides))
        return watch.advise(1, groups(), EVEN, learned).get("mismatch")

    text = said(differ=0.06)
    assert "differ by 0.06 nats" in text and "rollout.max_mismatch 0.05" in text
    assert said(differ=0.04) is None and said(differ=np.nan) is None
    # What it says to add is a configuration, for which it says nothing more.
    option = re.search(r"(--algorithm\S+) (\w+) corrects", text)
    assert said(f"{option[1]}={option[2]}", differ=0.06) is None


def test_patience_is_what_the_texts_of_the_tests_say():
    assert (advice.PATIENCE, advice.LEAST_ENTROPY) == (3, 0.01)
