import os
from types import SimpleNamespace

import pytest

from jaxrl_llm.agents import tools
from jaxrl_llm.config import parsing
from jaxrl_llm.training import playing
from jaxrl_llm.workers.messages import dump_function, load_function
from jaxrl_llm.workers.sandbox import programs
from jaxrl_llm.workers.sandbox.jail import Ran
from jaxrl_llm.workers.sandbox.levels import Sandbox
from jaxrl_llm.workers.sandbox.tool import python, python_tool

BOX = Sandbox(level="none", jobs=1, output_mib=0.1)


@pytest.fixture(autouse=True, scope="module")
def ended():
    yield
    programs.release()


@pytest.mark.parametrize(
    "code, said",
    [
        ("print(1)\n2 + 2", "1\n4"),
        ("x = 3", ""),
        ("None", ""),
        ("'a'", "'a'"),
        ("1 +", "SyntaxError: invalid syntax"),
        ("def f():\n    1 / 0\nf()", "in f\nZeroDivisionError: division by zero"),
        ("import sys\nsys.exit(3)", "[the program ended with status 3]"),
        ("while True: print('x' * 1000)", "printed more than 104857 bytes]"),
        ("print('x' * 5000)", "[1000 characters left out]"),
        ("import sys; print('e', file=sys.stderr)", "e"),
        ("__name__", "'__main__'"),
    ],
)
def test_a_policy_reads_what_a_program_says(code, said):
    found = python_tool(BOX)(code)
    assert found.endswith(said) or "left out" in said and said in found
    assert "program.py" not in found  # nor anything of how it is run


def test_the_tool_has_a_schema_and_goes_to_a_worker_with_its_settings():
    tool = python_tool(BOX)
    schema = tools.schema(tool)
    assert schema == tools.schema(python)
    function = schema["function"]
    assert function["name"] == "python"
    assert list(function["parameters"]["properties"]) == ["code"]
    assert load_function(dump_function(tool))("6 * 7") == "42"


def settings_of(config, monkeypatch):
    """What environments are made of."""
    made = []

    def hosted(settings, _):
        made.append(settings)
        return SimpleNamespace(notes=[])

    monkeypatch.setattr(playing.hosting, "Hosted", hosted)
    template = SimpleNamespace(rewrites_history=False)
    monkeypatch.setattr(playing, "Splicer", lambda *_: template)
    monkeypatch.setattr(playing, "Agent", lambda **_: None)
    encoder = SimpleNamespace(tokenizer=SimpleNamespace(chat_template=""))
    playing.agent_of.__wrapped__(config, encoder, seen=False)
    return made[0]


@pytest.mark.parametrize(
    "agent, jobs, workers",
    [
        ({"tools": ["python"]}, 3, 3),
        ({"tools": ["python"], "workers": 2}, 3, 2),
        ({"tools": ["python"]}, None, os.cpu_count()),
        ({"tools": ["python"], "environment": "blackjack"}, 3, 3),
        ({"tools": ["os.path:join"]}, 3, None),
    ],
)
def test_no_more_programs_of_a_tool_run_than_may(agent, jobs, workers, monkeypatch):
    values = {
        "output_dir": "run",
        "model": {"path": "model"},
        "data": {"train": {"path": "rows.jsonl"}},
        "agent": agent,
        "sandbox": {"level": "none", "jobs": jobs},
        "reward": {"functions": [{"name": "exact"}]},
        "trainer": {"total_training_steps": 1},
    }
    found = settings_of(parsing.parse(values, "test"), monkeypatch)
    assert found.apart == ({"python": workers} if workers else {})
    assert found.workers == agent.get("workers", 256)


def test_the_configuration_names_the_tool_and_its_sandbox(monkeypatch):
    values = {
        "output_dir": "run",
        "model": {"path": "model"},
        "data": {"train": {"path": "rows.jsonl"}},
        "agent": {"tools": ["python"]},
        "sandbox": {"level": "none", "cpu_s": 2.0},
        "reward": {"functions": [{"name": "exact"}]},
        "trainer": {"total_training_steps": 1},
    }
    config = parsing.parse(values, "test")
    settings = settings_of(config, monkeypatch)
    (tool,) = settings.tools
    asked = []
    monkeypatch.setattr(programs, "run", lambda *a: asked.append(a[2]) or Ran(status=0))
    tool("1")
    assert asked == [Sandbox(level="none", cpu_s=2.0)]
    (note,) = playing.tool_notes(config)
    assert "level none" in note
