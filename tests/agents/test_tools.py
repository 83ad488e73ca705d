"""What functions are to the policy, and what it says to call one."""

import json
import re
from typing import Literal

import pytest
import templates

from jaxrl_llm.agents import tools
from jaxrl_llm.agents.tools import FORMATS, Call, Mistake


def weather(city: str, days: int = 1, unit: Literal["C", "F"] = "C") -> str:
    """Tells the weather.

    Args:
        city: A city.
        days: From today.
        unit: Of the temperature.
    """


async def add(numbers: list[float], exact: bool | None = None) -> float:
    """Adds numbers.

    Args:
        numbers: What is added.
        exact: Without rounding.
    """


def calculate(expression: str) -> float:
    """Computes a number. More is said here.

    Args:
        expression: Such as 3 * 4.
    """


SCHEMAS = [tools.schema(f) for f in (weather, add, calculate)]


def read(format, text):
    return list(tools.calls(FORMATS[format], text, SCHEMAS))


def test_a_schema_is_made_of_types_and_docstring():
    function = SCHEMAS[0]["function"]
    assert function["name"] == "weather"
    assert function["description"] == "Tells the weather."
    assert function["parameters"]["properties"] == {
        "city": {"type": "string", "description": "A city."},
        "days": {"type": "integer", "description": "From today."},
        "unit": {
            "type": "string",
            "enum": ["C", "F"],
            "description": "Of the temperature.",
        },
    }
    assert function["parameters"]["required"] == ["city"]
    assert SCHEMAS[1]["function"]["parameters"]["properties"]["numbers"] == {
        "type": "array",
        "items": {"type": "number"},
        "description": "What is added.",
    }


def undescribed(x: int) -> int:
    """Does something."""


def untyped(x):
    """Does something.

    Args:
        x: A number.
    """


@pytest.mark.parametrize("function", [undescribed, untyped])
def test_a_function_that_cannot_be_told_is_refused(function):
    with pytest.raises(ValueError, match=f"tool '{function.__name__}'.*Args"):
        tools.schema(function)


BOTH = [
    Call("weather", {"city": "Bern", "days": 2}),
    Call("add", {"numbers": [1, 2.5]}),
]
WRITTEN = {
    "hermes": """Let me see.
<tool_call>
{"name": "weather", "arguments": {"city": "Bern", "days": 2}}
</tool_call>
<tool_call>
{"name": "add", "arguments": {"numbers": [1, 2.5]}}
</tool_call>""",
    "llama": """{"name": "weather", "parameters": {"city": "Bern", "days": 2}}; {"name":
 "add", "parameters": {"numbers": [1, 2.5]}}""",
    "qwen3_coder": """<tool_call>
<function=weather>
<parameter=city>
Bern
</parameter>
<parameter=days>
2
</parameter>
</function>
</tool_call>
<tool_call>
<function=add>
<parameter=numbers>
[1, 2.5]
</parameter>
</function>
</tool_call>""",
    "bracket": """I ask [weather("Bern", days=2), add([1, 2.5])].""",
}


@pytest.mark.parametrize("format", FORMATS)
def test_calls_are_read_in_every_format(format):
    assert read(format, WRITTEN[format]) == BOTH


@pytest.mark.parametrize("format", FORMATS)
def test_text_calls_nothing(format):
    assert read(format, "It is 3 (or [4]) {degrees} <b>now</b>.") == []
    assert read(format, "") == []
    assert read(format, f"<think>{WRITTEN[format]}</think>It rains.") == []


@pytest.mark.parametrize(
    "format, text",
    [
        ("hermes", '<tool_call>\n{"name": "add", "arguments": {"numbers": [1'),
        ("hermes", "<tool_call>add(1, 2)</tool_call>"),
        ("hermes", '<tool_call>{"arguments": {}}</tool_call>'),
        ("hermes", "<tool_call>[]</tool_call>"),
        ("hermes", '<tool_call>{"name": "add", "arguments": [1]}</tool_call>'),
        ("hermes", "<tool_call></tool_call>"),
        ("llama", '{"name": "add", "parameters": {"numbers": [1'),
        ("llama", "{1}"),
        ("qwen3_coder", "<tool_call>\nadd\n</tool_call>"),
        ("bracket", "[add(numbers="),
        ("bracket", "[add(numbers=x + y)]"),
    ],
)
def test_what_cannot_be_read_is_said(format, text):
    [found] = read(format, text)
    assert isinstance(found, Mistake) and found.kind == "unreadable" and found.why


@pytest.mark.parametrize(
    "format, text",
    [
        ("hermes", "<tool_call>" + "[" * 10**5),
        ("hermes", '<tool_call>{"name": "add", "arguments": "' + "[" * 10**5 + '"}'),
        (
            "hermes",
            '<tool_call>{"name": "add", "arguments": {"numbers": '
            + "[" * 300
            + "]" * 300
            + "}}",
        ),
        ("llama", '{"name":' * 10**5),
        ("qwen3_coder", "<function=add><parameter=numbers>" + "[" * 10**5),
        ("bracket", "[add(" + "-" * 10**5 + "1)]"),
    ],
)
def test_values_within_values_without_end_are_a_mistake(format, text):
    [found] = read(format, text)
    assert isinstance(found, Mistake) and found.why


def test_a_call_that_a_stop_string_cut_off_is_whole():
    text = WRITTEN["hermes"].rpartition("\n</tool_call>")[0]
    assert read("hermes", text) == BOTH
    assert read("bracket", "[calculate(3 * 4)") == [
        Call("calculate", {"expression": "3 * 4"})
    ]


def test_a_broken_call_leaves_the_next_one_whole():
    text = f"<tool_call>{{<tool_call>{json.dumps({'name': 'add'})}</tool_call>"
    first, second = read("hermes", text)
    assert first.kind == "unreadable"
    assert second.kind == "arguments" and "numbers is missing" in second.why


@pytest.mark.parametrize(
    "name, arguments, kind, why",
    [
        ("wether", {"city": "Bern"}, "unknown_tool", "no tool 'wether'; there are we"),
        ("weather", {}, "arguments", "city is missing"),
        ("weather", {"city": "Bern", "at": 1}, "arguments", "there is no 'at'"),
        ("weather", {"city": 3}, "arguments", "city is 3, not of type string"),
        ("weather", {"city": "B", "days": True}, "arguments", "not of type integer"),
        ("weather", {"city": "B", "days": 1.5}, "arguments", "not of type integer"),
        ("weather", {"city": "B", "unit": "K"}, "arguments", r"not of type \['C', 'F'"),
        ("add", {"numbers": "1, 2"}, "arguments", "not of type array"),
    ],
)
def test_a_call_that_does_not_fit_is_told_why(name, arguments, kind, why):
    call = json.dumps({"name": name, "arguments": arguments})
    [found] = read("hermes", f"<tool_call>{call}</tool_call>")
    assert isinstance(found, Mistake) and found.kind == kind
    assert re.search(why, found.why)


def test_none_fits_what_may_be_none():
    call = {"name": "add", "arguments": {"numbers": [], "exact": None}}
    assert read("hermes", f"<tool_call>{json.dumps(call)}") == [
        Call("add", {"numbers": [], "exact": None})
    ]


@pytest.mark.parametrize(
    "inside", ["4837 * 926", '"4837 * 926"', "expression=4837 * 926", "'4837 * 926'"]
)
def test_a_single_text_needs_no_quotes_in_brackets(inside):
    [found] = read("bracket", f"[calculate({inside})]")
    assert found == Call("calculate", {"expression": "4837 * 926"})


def test_brackets_and_apostrophes_within_brackets():
    assert read("bracket", "[calculate((3 + 4) * (5))]") == [
        Call("calculate", {"expression": "(3 + 4) * (5)"})
    ]
    assert read("bracket", "[calculate(what's 3)]") == [
        Call("calculate", {"expression": "what's 3"})
    ]
    assert read("bracket", '[weather("a) b]")]') == [Call("weather", {"city": "a) b]"})]


def test_text_stays_text_in_xml_and_other_values_get_their_types():
    text = (
        "<function=weather><parameter=city>12</parameter><parameter=days>3</parameter>"
        "</function><function=add><parameter=numbers>[1]</parameter>"
        "<parameter=exact>True</parameter></function>"
    )
    assert read("qwen3_coder", text) == [
        Call("weather", {"city": "12", "days": 3}),
        Call("add", {"numbers": [1], "exact": True}),
    ]


def test_a_template_says_which_format_it_teaches():
    assert tools.choose("auto", templates.THINKING) == (FORMATS["hermes"], True)
    assert tools.choose("auto", templates.HEADERS) == (FORMATS["llama"], True)
    assert tools.choose("auto", templates.ALTERNATING) == (FORMATS["hermes"], False)
    coder = templates.THINKING + "<function=f><parameter=p>"
    assert tools.choose("auto", coder) == (FORMATS["qwen3_coder"], True)
    assert tools.choose("bracket", coder) == (FORMATS["bracket"], False)
    with pytest.raises(ValueError, match="'hermez', did you mean 'hermes'"):
        tools.choose("hermez", coder)


@pytest.mark.parametrize("format", FORMATS)
def test_a_model_is_told_of_every_function(format):
    text = FORMATS[format].describe(SCHEMAS)
    for schema in SCHEMAS:
        assert tools.name_of(schema) in text
        for parameter in schema["function"]["parameters"]["properties"]:
            assert parameter in text
