import asyncio
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace

import numpy as np
import pytest
from scored_texts import make, run

from jaxrl_llm.data.sources import Source, read_rows
from jaxrl_llm.data.types import Turn
from jaxrl_llm.rewards import (
    Isolation,
    RewardError,
    RewardFunction,
    Term,
    isolation,
    resolve,
)
from jaxrl_llm.rewards.builtin import exact, gsm8k, math, numeric, reasoning_gym
from jaxrl_llm.rewards.function import check_signatures
from jaxrl_llm.workers.judge import judge

ROOT = pathlib.Path(__file__).parents[2]
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k" / "test.jsonl"
CHAT = [{"role": "user", "content": "q1"}]
PATIENT = {"limit_s": 300.0}  # where no reply takes long, however busy the machine


def length(completions):
    return [len(text) for text in completions]


@pytest.mark.parametrize("kind", ["process", "thread"])
def test_a_function_gets_what_trl_gives_it(kind, tmp_path):
    # TRL 1.16, GRPOTrainer._calculate_rewards: columns repeated for each completion.
    path = str(tmp_path / "call.json")

    def record(prompts, completions, completion_ids, **columns):
        with open(path, "x") as file:
            json.dump((prompts, completions, completion_ids, columns), file)
        return [0.0] * 4

    columns = ({"answer": "A", "level": 1}, {"answer": "B"})
    run(record, data=make(("q0", CHAT), columns), isolation=Isolation(kind=kind))
    with open(path) as file:
        prompts, completions, completion_ids, rest = json.load(file)
    assert prompts == ["q0", "q0", CHAT, CHAT]
    assert completions == [
        "a",
        "bb",
        [{"role": "assistant", "content": "ccc"}],
        [{"role": "assistant", "content": ""}],
    ]
    assert completion_ids == [[0], [0, 1], [0, 1, 2], []]
    assert rest == {"answer": ["A", "A", "B", "B"], "level": [1, 1, None, None]}


def test_a_chat_of_several_turns_is_a_message_each():
    prompts, episodes = make(contents=(CHAT, CHAT))
    said = Turn.observed("tool", [7], "42")
    several = [
        [replace(e, turns=(*e.turns, said, *e.turns)) for e in group]
        for group in episodes
    ]
    seen = {}

    def judges(completions, completion_ids):
        seen.update(messages=completions[1], tokens=completion_ids[1])
        return [0.0] * len(completions)

    run(judges, data=(prompts, several), isolation=Isolation(kind="thread"))
    assert seen["messages"] == [
        {"role": "assistant", "content": "bb"},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "bb"},
    ]
    assert seen["tokens"] == [0, 1, 7, 0, 1]


def test_total_is_the_weighted_sum():
    async def is_b(answer):
        await asyncio.sleep(0)
        return [gold == "B" for gold in answer]

    scores = run(
        RewardFunction(name="length", function=length, weight=0.5),
        RewardFunction(name="b", function=is_b, weight=-2.0),
    )
    np.testing.assert_array_equal(scores.by_function["length"], [[1, 2], [3, 0]])
    np.testing.assert_array_equal(scores.by_function["b"], [[0, 0], [1, 1]])
    np.testing.assert_array_equal(scores.total, [[0.5, 1.0], [-0.5, -2.0]])
    assert scores.total.dtype == np.float32
    assert scores.errors == {"length": 0, "b": 0}


def test_none_adds_nothing_to_the_total():
    scores = run(length, lambda completions: [None, 1.0, None, 2.0])
    np.testing.assert_array_equal(scores.total, [[1, 3], [3, 2]])
    np.testing.assert_array_equal(scores.by_function["f1"], [[np.nan, 1], [np.nan, 2]])
    assert scores.errors == {"f0": 0, "f1": 0}


def test_an_array_of_scores_is_as_good_as_a_list():
    scores = run(lambda completions: np.array([1, 2, 3, 4], np.float32))
    np.testing.assert_array_equal(scores.total, [[1, 2], [3, 4]])


def test_functions_run_side_by_side():
    meet = threading.Barrier(2, timeout=300)

    def meets(completions):
        meet.wait()
        return [1.0] * 4

    async def meets_async(completions):
        meet.wait()
        return [1.0] * 4

    np.testing.assert_array_equal(run(meets, meets_async).total, np.full((2, 2), 2.0))


def raises(completions):
    raise KeyError("lost")


def hangs(completions):
    threading.Event().wait()


async def hangs_async(completions):
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    "function, cause",
    [
        (raises, "raised KeyError: 'lost'"),
        (hangs, "did not finish within 0.5 s"),
        (hangs_async, "did not finish within 0.5 s"),
        (lambda completions: [1.0] * 3, "returned 3 scores for 4 responses"),
        (lambda completions: 1.0, "returned a float, not a list"),
        (lambda completions: "1111", "returned a str, not a list"),
        (lambda solution: [1.0] * 4, "raised TypeError: .*'solution'"),
    ],
)
def test_a_function_that_fails_stops_the_run_or_scores_0_and_is_counted(
    function, cause
):
    limit = {"timeout_s": 0.5} if "finish" in cause else {}
    with pytest.raises(RewardError, match=f"reward function 'f0' {cause}") as info:
        run(function, **limit)
    for shown in ("prompt 0 ends: 'q0'", "response 0: 'a'", "answer: 'A'"):
        assert shown in str(info.value)
    scores = run(function, length, **limit, on_error="zero")
    np.testing.assert_array_equal(scores.by_function["f0"], np.zeros((2, 2)))
    np.testing.assert_array_equal(scores.total, [[1, 2], [3, 0]])
    assert scores.errors == {"f0": 4, "f1": 0}


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), "1.0", 10**400, 1e39])
def test_a_score_that_is_not_a_finite_number_fails_for_its_response_alone(bad):
    def function(completions):
        return [1.0, 1.0, bad, 1.0]

    with pytest.raises(RewardError, match="f0.*not a finite number") as info:
        run(function)
    for shown in ("prompt 1 ends: 'q1'", "response 0: 'ccc'", "answer: 'B'"):
        assert shown in str(info.value)
    scores = run(function, on_error="zero")
    np.testing.assert_array_equal(scores.total, [[1, 1], [0, 1]])
    assert scores.errors == {"f0": 1}


@pytest.mark.parametrize("where", ["process", "thread"])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_what_a_function_raises_does_not_end_the_program(kind, where):
    def function(completions):
        raise kind(7)

    with pytest.raises(RewardError, match=f"'f0' raised {kind.__name__}: 7"):
        run(function, isolation=Isolation(kind=where))


def test_a_function_that_hangs_does_not_keep_the_program_from_ending():
    program = """
        import sys, time
        sys.path.insert(0, "tests/support")
        from scored_texts import run
        def hangs(completions):
            while True:
                time.sleep(0.01)
        try:
            run(hangs, timeout_s=0.2)
        except ValueError as error:
            print(error)
    """
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=ROOT,
        timeout=600,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "did not finish within 0.2 s" in found.stdout


def test_a_function_that_names_it_is_told_why_responses_ended():
    def finished(finish_reason, **columns):
        assert "finish_reason" not in columns
        return [float(reason == "stop") for reason in finish_reason]

    def others(completions, **columns):
        return [float(columns.get("finish_reason") == "mine") for _ in completions]

    prompts, episodes = make()
    turn = replace(episodes[0][1].turns[0], finish_reason="length")
    episodes[0][1] = replace(episodes[0][1], turns=(turn,))
    scores = run(finished, others, data=(prompts, episodes)).by_function
    np.testing.assert_array_equal(scores["f0"], [[1, 0], [1, 1]])
    np.testing.assert_array_equal(scores["f1"], np.zeros((2, 2)))


def test_functions_share_nothing_that_can_be_changed():
    def spoils(prompts, completions, completion_ids, answer):
        for values in (prompts[0], completions[0], completion_ids, answer):
            values.clear()
        return [0.0] * 4

    def counts(prompts, completions, completion_ids, answer):
        return [
            len(x[0]) + len(y[0]) for x, y in zip(prompts, completions, strict=True)
        ]

    for kind in ("process", "thread"):
        data = make((CHAT, CHAT), ({"answer": ["A"]}, {"answer": ["B"]}))
        data[1][0][0].tokens[:] = 7
        scores = run(spoils, counts, data=data, isolation=Isolation(kind=kind))
        np.testing.assert_array_equal(scores.by_function["f1"], np.full((2, 2), 4))
        assert CHAT == [{"role": "user", "content": "q1"}]
        assert [prompt.columns["answer"] for prompt in data[0]] == [["A"], ["B"]]


def test_weights_that_add_up_to_1_give_a_perfect_response_1():
    def perfect(completions):
        return [1.0] * 4

    for weights in ((0.65, 0.15, 0.2), (0.1,) * 10, (0.3, 0.3, 0.4), (1 / 3,) * 3):
        terms = [
            RewardFunction(name=f"f{i}", function=perfect, weight=weight)
            for i, weight in enumerate(weights)
        ]
        np.testing.assert_array_equal(run(*terms).total, np.ones((2, 2)))


@pytest.mark.parametrize("where", ["process", "thread"])
def test_an_async_function_has_one_loop_for_the_whole_run(where):
    lock = asyncio.Lock() if where == "process" else None
    kept = {}

    async def judges(completions):
        mine = kept.setdefault("lock", lock or asyncio.Lock())

        async def one():
            async with mine:
                await asyncio.sleep(0)
            return float(kept.setdefault("loop", asyncio.get_running_loop()) is loop)

        loop = asyncio.get_running_loop()
        return await asyncio.gather(*(one() for _ in completions))

    for _ in range(3):
        scores = run(judges, isolation=Isolation(kind=where))
        np.testing.assert_array_equal(scores.total, np.ones((2, 2)))


def test_a_function_that_cannot_be_sent_runs_in_a_thread_and_that_is_said():
    lock = threading.Lock()

    def guarded(completions):
        with lock:
            return [1.0] * 4

    term, how = RewardFunction(name="mine", function=guarded), Isolation()
    np.testing.assert_array_equal(run(term).total, np.ones((2, 2)))
    (note,) = isolation.notes([term], how)
    assert "'mine' runs in a thread of this process" in note
    assert "cannot be pickled" in note
    with pytest.raises(RewardError, match="'mine' cannot run in a process of its own"):
        run(term, isolation=Isolation(kind="process"))
    isolation.release([term])


def test_limits_by_signals_work():
    def limited(completions):
        def end(*_):
            raise TimeoutError

        signal.signal(signal.SIGALRM, end)
        scores = []
        for text in completions:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            try:
                while text == "a":
                    pass
                scores.append(1.0)
            except TimeoutError:
                scores.append(0.0)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0.0)
        return scores

    np.testing.assert_array_equal(run(limited).total, [[0, 1], [1, 1]])


def test_a_weight_that_makes_a_reward_too_large_is_named():
    def function(completions):
        return [1e10] * 4

    term = RewardFunction(name="big", function=function, weight=-1e10)
    with pytest.raises(RewardError, match="'big' returned 1e.10, with its weight -1e"):
        run(term)


def test_replies_that_there_was_no_time_for_score_0_one_by_one(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    (function,) = resolved({"name": "math", "params": {"limit_s": 100.0}})
    data = make(columns=({"answer": "2"}, {"answer": "2"}))
    texts = ["$9^{9^9}$", r"\boxed{2}", "$9^{9^9}$", r"\boxed{2}"]
    episodes = [
        replace(episode, turns=(replace(episode.turns[0], text=text),))
        for episode, text in zip([*data[1][0], *data[1][1]], texts, strict=True)
    ]
    math([r"\boxed{2}"], ["2"], **PATIENT)  # what it imports takes its time
    scores = run(function, data=(data[0], [episodes[:2], episodes[2:]]), timeout_s=4.0)
    np.testing.assert_array_equal(scores.total, [[0, 1], [0, 1]])
    assert scores.errors == {"math": 2}


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda zzz: 0, "asks for 'zzz'; row 0 of data.train offers prompts"),
        (lambda anser, **_: 0, "asks for 'anser', did you mean 'answer'"),
        (lambda completions, /: 0, "takes 'completions' by position"),
        (dict, "has no signature to read"),
        (lambda prompts, answer, *, level=1, **_: 0, None),
    ],
)
def test_what_a_function_asks_for_is_checked_against_the_first_row(function, message):
    term = [RewardFunction(name="mine", function=function)]
    if message is None:
        check_signatures(term, ["answer"], "data.train")
        return
    with pytest.raises(ValueError, match=f"reward function 'mine' {message}"):
        check_signatures(term, ["answer"], "data.train")


def test_groups_must_fit_their_prompts():
    prompts, completions = make()
    for wrong, message in (
        (completions[:1], r"groups of \[2\]"),
        ([completions[0], completions[1][:1]], r"groups of \[2, 1\]"),
        (completions[::-1], "stand at prompt 0"),
    ):
        with pytest.raises(ValueError, match=message):
            run(length, data=(prompts, wrong))
    with pytest.raises(ValueError, match=r"different names, got \['a', 'a'\]"):
        run(*[RewardFunction(name="a", function=length)] * 2)


@pytest.mark.parametrize(
    "reply, answer, expected",
    [(" 42\n", "42", 1), ("42", 42, 1), ("42.", "42", 0), ("Paris", "paris", 0)],
)
def test_exact(reply, answer, expected):
    assert exact([reply], [answer]) == [expected]
    chat = [[{"role": "assistant", "content": reply}]]
    assert exact(chat, [answer]) == [expected]


def test_exact_without_case():
    assert exact(["PARIS", "Rome"], ["Paris", "paris"], ignore_case=True) == [1, 0]


@pytest.mark.parametrize(
    "reply, answer, expected",
    [
        ("first 3, then it is 1,234.", "1234", 1),
        ("$1,234.50", 1234.5, 1),
        ("= -5", "-5", 1),
        ("-$5", "-5", 1),
        ("x = \u22125", "-5", 1),
        ("5", "-5", 0),
        ("from 3-5", "5", 1),  # a dash, not a sign
        ("7 - 5", "-5", 0),
        ("1, 2,3", "3", 1),  # a list, not 12,3
        ("0.1", "0.10", 1),
        (".5", "0.5", 1),
        ("2.5e3 m", "2500", 1),
        ("5 is right, I checked 2 times", "5", 0),  # the last number counts
        ("none", "5", 0),
        ("42", "40 + 2 = 42\n#### 42", 1),
        ("9" * 5000, "9" * 5000, 1),
        ("1e999", "5", 0),
    ],
)
def test_numeric(reply, answer, expected):
    assert numeric([reply], [answer]) == [expected]


def test_numeric_within_tolerance():
    replies = ["3.14", "3.15", "3.16"]
    assert numeric(replies, ["3.15"] * 3, tolerance=0.01) == [1, 1, 1]
    assert numeric(replies, ["3.14"] * 3, tolerance=0.01) == [1, 1, 0]
    with pytest.raises(ValueError, match="'pi' has no number"):
        numeric(["3.14"], ["pi"])


# Inputs and scores of verl/utils/reward_score/gsm8k.py, computed with veRL 0.9.1.
VERL_GSM8K = [
    ("strict", "... #### 72", "72", 1.0),
    ("strict", "#### 1,234", "1234", 1.0),
    ("strict", "#### $72", "72", 0.0),
    ("strict", "answer is 72", "72", 0.0),
    ("strict", "#### 10 then #### 72", "72", 1.0),
    ("strict", "#### -5", "-5", 1.0),
    ("strict", "#### 72.0", "72", 0.0),
    ("strict", "#### 72" + "x" * 300, "72", 0.0),
    ("flexible", "answer is 72", "72", 1.0),
    ("flexible", "answer is 72.", "72", 0.0),
    ("flexible", "none", "72", 0.0),
]


@pytest.mark.parametrize("method, reply, answer, expected", VERL_GSM8K)
def test_gsm8k_scores_as_verl_does(method, reply, answer, expected):
    assert gsm8k([reply], [answer], method=method) == [expected]


@pytest.mark.skipif(not GSM8K.is_file(), reason="no GSM8K here")
def test_gsm8k_accepts_every_reference_solution():
    rows = read_rows(Source(path=str(GSM8K), prompt_key="question"))
    answers = [row["answer"] for row in rows]
    assert gsm8k(answers, answers) == [1.0] * 1319
    numbers = [answer.split("#### ")[1] for answer in answers]
    assert numeric(numbers, answers) == [1.0] * 1319
    # Each beside the next problem's reference: equal numbers only by chance.
    assert sum(gsm8k(answers, answers[1:] + answers[:1])) < 100


# The first five are math_reward's cases in veRL 0.9.1, the rest by hand.
MATH = [
    (r"so \boxed{\frac12}", r"\frac{1}{2}", 1),
    (r"\boxed{0.5}", r"\frac{1}{2}", 1),
    (r"\boxed{3} then \boxed{4}", "4", 1),
    (r"\boxed{10\%}", "10", 1),
    (r"x=\boxed{\sqrt3}", r"\sqrt{3}", 1),
    ("no box", "1", 0),
    (r"\boxed{4} then \boxed{3}", "4", 0),
    (r"\boxed{\{2,1\}}", r"\{1,2\}", 1),
    ("it is 12", "3 + 9 = 12\n#### 12", 1),
    (r"\boxed{12}", r"hence \boxed{11}, no: \boxed{12}", 1),
]


def test_math_is_equality_of_expressions():
    replies, answers, expected = zip(*MATH, strict=True)
    assert math(replies, answers, **PATIENT) == list(expected)


def test_math_gives_up_on_a_reply_that_never_ends():
    # sympy would compute 9^(9^9), all 369,693,100 digits of it.
    assert math(["$9^{9^9}$"], ["2"], limit_s=0.5) == [0.0]
    assert math([r"\boxed{2}"], ["2"], **PATIENT) == [1.0]


def test_math_refuses_an_answer_that_is_no_expression():
    with pytest.raises(ValueError, match="no expression in answer"):
        math([r"\boxed{1}"], [""], **PATIENT)


def entry_columns(task, **fields):
    path = f"reasoning_gym:{task}"
    rows = read_rows(Source(path=path, size=2, **fields))
    names = ("question", "answer", "metadata", "dataset_params")
    return {name: [row[name] for row in rows] for name in names}


def test_reasoning_gym_scores_as_the_task_does():
    columns = entry_columns("chain_sum")
    first, second = columns["answer"]
    tagged = f"<answer>0</answer> or <answer> {first} </answer>"
    assert reasoning_gym([tagged, f" {second}\n"], **columns, **PATIENT) == [1.0, 1.0]
    assert reasoning_gym(["hm", "<answer></answer>"], **columns, **PATIENT) == [
        0.0,
        0.0,
    ]
    # This scorer raises on 'hello'.
    columns = entry_columns("prime_factorization")
    replies = [columns["answer"][0], "hello"]
    assert reasoning_gym(replies, **columns, **PATIENT) == [1.0, 0.0]


def test_reasoning_gym_names_an_entry_that_its_scorer_cannot_read():
    columns = entry_columns("prime_factorization") | {"answer": ["broken"] * 2}
    with pytest.raises(ValueError, match="ValueError: invalid literal.*'broken'"):
        reasoning_gym(["2", "3"], **columns, **PATIENT)


def test_a_verifier_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"math_verify: pip install 'jaxrl-llm\[tasks"):
        judge("math", [("1", "1")], 1.0)


def resolved(*functions):
    return resolve([Term(**function) for function in functions])


def test_a_config_names_built_in_functions_and_imported_ones(tmp_path, monkeypatch):
    (tmp_path / "my_rewards_for_test.py").write_text(
        "def brevity(completions, *, most=9):\n"
        "    return [float(len(c) <= most) for c in completions]\n"
        "NUMBER = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    found = resolved(
        {"name": "gsm8k"},
        {"name": "gsm8k", "params": {"method": "flexible"}, "weight": 0.5},
        {"name": "my_rewards_for_test:brevity", "params": {"most": 1}},
    )
    assert [(f.name, f.weight) for f in found] == [
        ("gsm8k", 1.0),
        ("gsm8k_2", 0.5),
        ("brevity", 1.0),
    ]
    np.testing.assert_array_equal(run(*found).by_function["brevity"], [[1, 0], [0, 1]])
    with pytest.raises(ValueError, match="no function 'breviti', did you mean 'brev"):
        resolved({"name": "my_rewards_for_test:breviti"})
    with pytest.raises(ValueError, match="no function 'NUMBER'"):
        resolved({"name": "my_rewards_for_test:NUMBER"})


@pytest.mark.parametrize(
    "function, message",
    [
        ({"name": "numerik"}, "'numerik' is not built in, did you mean 'numeric'"),
        ({"name": "zzz"}, r"use one of \['code', 'exact', 'gsm8k'"),
        ({"name": "no_such_module:f"}, "No module named 'no_such_module'"),
        (
            {"name": "numeric", "params": {"tolerence": 1}},
            "no parameter 'tolerence', did you mean 'tolerance'",
        ),
        ({"name": "numeric", "params": {"tolerance": -1}}, "tolerance must be"),
        ({"name": "gsm8k", "params": {"method": "loose"}}, "method is 'loose'"),
        ({"name": "math", "params": {"limit_s": 0}}, "limit_s must be more than 0"),
    ],
)
def test_a_function_that_is_not_there_is_named(function, message):
    with pytest.raises(ValueError, match=message):
        resolved(function)


def test_a_column_is_never_taken_for_a_parameter():
    columns = ({"answer": "A", "ignore_case": True}, {"answer": "B"})
    (function,) = resolved({"name": "exact"})
    scores = run(function, data=make(columns=columns))
    np.testing.assert_array_equal(scores.total, np.zeros((2, 2)))  # "a" is not "A"
    (function,) = resolved({"name": "exact", "params": {"ignore_case": True}})
    scores = run(function, data=make(columns=columns))
    np.testing.assert_array_equal(scores.total, [[1, 0], [0, 0]])
