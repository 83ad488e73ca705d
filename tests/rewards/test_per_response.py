"""veRL's signature of rewards, and scores that come with other numbers."""

import functools
import json
import sys

import numpy as np
import pytest
from scored_texts import make, run

from jaxrl_llm import rewards
from jaxrl_llm.config import user_code
from jaxrl_llm.data.types import Scores
from jaxrl_llm.rewards import Isolation, RewardError, RewardFunction, Term
from jaxrl_llm.rewards.builtin import with_term
from jaxrl_llm.rewards.function import check_signatures
from jaxrl_llm.rewards.scoring import join
from jaxrl_llm.tracking import step_metrics

HERE = Isolation(kind="thread")
COLUMNS = (
    {"answer": "a", "data_source": "one", "extra_info": {"index": 3}},
    {"answer": "ccc", "data_source": "two", "extra_info": None},
)


def compute_score(data_source, solution_str, ground_truth, extra_info=None, scale=1.0):
    """What a reward file for veRL has."""
    return scale * float(solution_str == ground_truth)


def test_a_function_of_verls_is_called_for_each_response():
    calls = []

    def compute_score(data_source, solution_str, ground_truth, extra_info=None):
        calls.append((data_source, solution_str, ground_truth, extra_info))
        return float(solution_str == ground_truth)

    scores = run(compute_score, data=make(columns=COLUMNS), isolation=HERE)
    assert calls == [
        ("one", "a", "a", {"index": 3}),
        ("one", "bb", "a", {"index": 3}),
        ("two", "ccc", "ccc", {}),
        ("two", "", "ccc", {}),
    ]
    np.testing.assert_array_equal(scores.total, [[1, 0], [1, 0]])


def test_it_gets_the_text_of_a_chat_and_may_be_awaited():
    async def compute_score(solution_str, ground_truth, **rest):
        assert not rest
        return len(solution_str)

    chat = [{"role": "user", "content": "q"}]
    data = make((chat, chat), ({"answer": "A"}, {"answer": "B"}))
    np.testing.assert_array_equal(
        run(compute_score, data=data, isolation=HERE).total, [[1, 2], [3, 0]]
    )


def test_it_runs_in_a_process_of_its_own():
    scores = run(compute_score, data=make(columns=COLUMNS))
    np.testing.assert_array_equal(scores.total, [[1, 0], [1, 0]])


def test_params_are_its_own(tmp_path, monkeypatch):
    term = Term(name="compute_score", params={"scale": 0.5}, weight=2.0)
    given = with_term(RewardFunction(name="f", function=compute_score), term)
    scores = run(given, data=make(columns=COLUMNS), isolation=HERE)
    np.testing.assert_array_equal(scores.by_function["f"], [[0.5, 0], [0.5, 0]])

    (tmp_path / "verl_reward_file.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info, *, to):"
        "\n    return to * len(solution_str)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "verl_reward_file", raising=False)
    (named,) = rewards.resolve(
        [Term(name="verl_reward_file:compute_score", params={"to": 2})]
    )
    scores = run(named, data=make(columns=COLUMNS), isolation=HERE)
    np.testing.assert_array_equal(scores.total, [[2, 4], [6, 0]])
    with pytest.raises(ValueError, match="has no parameter 'tu'; it has"):
        rewards.resolve([Term(name="verl_reward_file:compute_score", params={"tu": 2})])


def test_what_it_needs_and_no_row_has_is_said_before_the_run():
    function = RewardFunction(name="f", function=compute_score)
    check_signatures([function], ["answer", "data_source"], "data.train")
    with pytest.raises(ValueError, match="'f' asks for 'data_source'.* of data.train"):
        check_signatures([function], ["answer"], "data.train")


def test_its_source_is_what_the_run_goes_on_with():
    function = RewardFunction(name="f", function=compute_score).function
    bound = functools.partial(compute_score, scale=2.0)
    of_bound = RewardFunction(name="f", function=bound).function
    assert user_code.is_users(function) and user_code.is_users(of_bound)
    assert user_code.digest(function) == user_code.digest(compute_score)
    assert user_code.digest(function) != user_code.digest(make)


def graded(completions):
    return [
        {"score": len(text) / 2, "acc": text == "bb", "pred": text, "format": 1}
        if text
        else {"score": 0.0, "acc": False}
        for text in completions
    ]


def test_the_score_of_a_dictionary_is_the_reward_and_its_other_numbers_are_metrics():
    prompts, episodes = data = make()
    scores = run(graded, data=data)
    np.testing.assert_array_equal(scores.by_function["f0"], [[0.5, 1], [1.5, 0]])
    np.testing.assert_array_equal(scores.total, [[0.5, 1], [1.5, 0]])
    np.testing.assert_array_equal(scores.details["acc"], [[0, 1], [0, 0]])
    np.testing.assert_array_equal(scores.details["format"], [[1, 1], [1, np.nan]])
    assert set(scores.details) == {"acc", "format"}

    metrics = step_metrics.batch_metrics(prompts, episodes, scores, scores.total)
    assert metrics["reward/f0/mean"] == 0.75
    assert metrics["reward/acc/mean"] == 0.25
    assert metrics["reward/format/mean"] == 1.0
    records = step_metrics.rollout_records(1, "train", "train", *data, scores)
    assert json.loads(json.dumps(records[3]["scores"])) == {
        "f0": 0.0, "acc": 0.0, "format": None
    }  # fmt: skip


def test_numbers_of_several_functions_have_the_functions_names():
    terms = [RewardFunction(name=name, function=graded) for name in ("acc", "b")]
    scores = run(*terms, isolation=HERE)
    assert set(scores.details) == {"acc.acc", "acc.format", "b.acc", "b.format"}
    (only,) = terms[:1]
    assert set(run(only, isolation=HERE).details) == {"acc.acc", "format"}


def test_numbers_that_one_process_has_are_missing_in_the_others():
    parts = [run(graded, isolation=HERE), run(lambda completions: [1.0] * 4)]
    parts[1] = Scores(
        total=parts[1].total, by_function=parts[1].by_function, errors={"f0": 0}
    )
    joined = join(parts)
    assert np.isnan(joined.details["acc"][2:]).all()
    np.testing.assert_array_equal(joined.take([1, 2]).details["acc"][0], [0, 0])


def test_a_dictionary_without_a_score_is_an_error():
    with pytest.raises(RewardError, match=r"'acc': 1\}, a dictionary without 'score'"):
        run(lambda completions: [{"acc": 1}] * 4, isolation=HERE)
