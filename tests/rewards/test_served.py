import threading
import time

import numpy as np
import pytest
from json_server import serving

from jaxrl_llm.data.types import Completion, Prompt, Scores, single_turn
from jaxrl_llm.rewards import Term, resolve, served
from jaxrl_llm.rewards.served import JudgeError, judge, verdict
from jaxrl_llm.training.playing import mask_unjudged, without_masked


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(served.time, "sleep", lambda seconds: None)


def says(text):
    return 200, {"choices": [{"message": {"content": text}}]}


def asked(url, replies=("sunny", "bad"), **params):
    count = len(replies)
    return judge(
        list(replies), ["1 + 1?"] * count, [2] * count, url=url, model="m", **params
    )


@pytest.mark.parametrize(
    "text, score",
    [
        ('It is fine. {"score": 7}', 0.7),
        ('{"score": 1} no, rather {"score": 10, "why": "all right"}', 1.0),
        ('```json\n{"score": 2.5}\n```', 0.25),
        ('{"score": 11}', None),
        ('{"score": "7"}', None),
        ('{"score": true}', None),
        ('{"score": NaN}', None),
        ('{"points": 7}', None),
        ("seven", None),
        ("", None),
    ],
)
def test_the_verdict_is_the_last_score_within_the_scale(text, score):
    assert verdict(text, 0.0, 10.0) == score


def test_a_judge_sees_the_rubric_filled_in_and_its_votes_are_averaged(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "k")
    seen, lock = [], threading.Lock()

    def answer(path, request, headers):
        with lock:
            seen.append((path, request, headers["Authorization"]))
        (message,) = request["messages"]
        score = request["seed"] if message["content"] == "1 + 1?|2|{good}|5" else 0
        return says(f'{{"score": {score}}}')

    rubric = "{question}|{answer}|{response}|{highest}"
    with serving(answer) as url:
        found = asked(
            url + "/v1/",
            ("{good}", "bad"),
            rubric=rubric,
            scale=(0, 5),
            votes=3,
            retries=0,
            key_env="JUDGE_KEY",
        )
    assert [one["score"] for one in found] == pytest.approx([0.2, 0.0])
    assert {path for path, _, _ in seen} == {"/v1/chat/completions"}
    assert {key for _, _, key in seen} == {"Bearer k"}
    assert sorted(request["seed"] for _, request, _ in seen) == [0, 0, 1, 1, 2, 2]


def test_no_verdict_is_none_and_never_0():
    def answer(path, request, headers):
        good = "sunny" in request["messages"][0]["content"]
        return says('{"score": 10}') if good and request["seed"] < 4 else says("hm")

    with serving(answer) as url:  # two votes of three, and none
        found = asked(url, votes=3, retries=1)
    assert found == [{"score": 1.0, "judged": 2 / 3}, {"score": None, "judged": 0.0}]


@pytest.mark.parametrize(
    "failure", [(503, "busy"), (429, "slow"), (200, "<html>"), (200, {"error": "no"})]
)
def test_a_request_that_fails_is_made_again(failure):
    left = [failure] * 2
    lock = threading.Lock()

    def answer(*request):
        with lock:
            return left.pop() if left else says('{"score": 5}')

    with serving(answer) as url:
        assert asked(url, ["x"], retries=2) == [{"score": 0.5, "judged": 1.0}]


def test_a_judge_that_answers_nothing_is_an_error_that_names_it():
    calls = []
    with serving(lambda *request: calls.append(1) or (401, "no key")) as url:
        with pytest.raises(
            JudgeError, match=f"{url} answers nothing: HTTP 401.*no key"
        ):
            asked(url, ["x"], retries=3)
    assert len(calls) == 1  # it would fail again
    with pytest.raises(JudgeError, match="answers nothing: URLError"):
        asked(url, ["x"], retries=1)


@pytest.mark.parametrize(
    "params, cause",
    [
        ({}, "url is '' and model ''"),
        ({"url": "host:8000", "model": "m"}, "url is 'host:8000'"),
        ({"rubric": "{question}"}, "no {response}"),
        ({"scale": [5, 1]}, r"scale is \[5, 1\]"),
        ({"votes": 0}, "votes is 0"),
    ],
)
def test_params_that_do_not_fit_are_refused_before_anything_is_asked(params, cause):
    given = {"url": "http://host", "model": "m"} if params else {}
    with pytest.raises(JudgeError, match=cause):
        resolve([Term(name="judge", params=given | params)])


def test_a_time_limit_ends_a_request():
    gone = threading.Event()

    def answer(*request):
        gone.wait(30.0)
        return says('{"score": 5}')

    with serving(answer) as url:
        start = time.monotonic()
        with pytest.raises(JudgeError, match="timed out"):
            asked(url, ["x"], limit_s=0.05, retries=1)
        assert time.monotonic() - start < 20.0
        gone.set()


def episodes(groups, size):
    return single_turn(
        [
            [
                Completion(
                    prompt_id=p,
                    sample=s,
                    tokens=np.array([1], np.int32),
                    logprobs=np.zeros(1, np.float32),
                    raw_logprobs=None,
                    weight_version=0,
                    text="",
                    finish_reason="stop",
                )
                for s in range(size)
            ]
            for p in range(groups)
        ]
    )


def test_what_nothing_judges_is_masked_and_stands_where_its_group_does():
    nan = np.nan
    scores = Scores(
        total=np.array([[1, 0, 0.5], [0, 0, 0]], np.float32),
        by_function={
            "judge": np.array([[1, nan, 0.5], [nan, 0, nan]], np.float32),
            "overlong_penalty": np.zeros((2, 3), np.float32),
        },
        errors={"judge": 0, "overlong_penalty": 0},
    )
    masked = mask_unjudged(episodes(2, 3), scores)
    assert [[one.masked for one in group] for group in masked] == [
        [False, True, False],
        [True, False, True],
    ]
    np.testing.assert_allclose(without_masked(scores, masked).total[0], [1, 0.75, 0.5])


def test_a_prompt_of_messages_is_shown_whole():
    prompt = Prompt(
        id=0,
        content=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
        ],
        tokens=(1,),
        columns={},
    )
    assert served._question(prompt.for_rewards) == "system: Be brief.\n\nuser: Hi"


def test_a_judge_is_shown_what_the_policy_said_last_and_not_what_a_tool_said():
    seen = []

    def answer(path, request, headers):
        seen.append(request["messages"][0]["content"])
        return says('{"score": 5}')

    reply = [
        {"role": "assistant", "content": "Let me look."},
        {"role": "tool", "content": "The score is 10."},
        {"role": "assistant", "content": "It is 2."},
        {"role": "tool", "content": "Well done."},
    ]
    with serving(answer) as url:
        asked(url, [reply], rubric="{response}")
    assert seen == ["It is 2."]
