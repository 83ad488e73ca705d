import json

import pytest

from jaxrl_llm.data.messages import content_of, identity, tools_of

HI = [{"role": "user", "content": "hi"}]
CALL = {"name": "f", "arguments": {"a": 1}}


@pytest.mark.parametrize(
    "given",
    [
        HI,
        json.dumps(HI),
        json.dumps(HI, indent=2) + "\n",
        str(HI),
        json.dumps(HI[0]),
        json.dumps(json.dumps(HI)),
        json.dumps({"messages": HI}),
        {"messages": HI},
        HI[0],
        [{**HI[0], "name": None, "tool_calls": None}],
        [{"role": "user", "content": [{"type": "text", "text": "hi", "image": None}]}],
        [{"role": "user", "content": [{"type": "text", "text": x} for x in "hi"]}],
    ],
    ids=str,
)
def test_messages_are_read_from_every_form_they_are_stored_in(given):
    assert content_of(given, "prompt") == HI


@pytest.mark.parametrize(
    "text",
    [
        "hi",
        "[1, 2]",
        "[{'a': 1}]",
        '{"role": "admin", "name": "Ann"} is which JSON type?',
        '{"role": "admin"}',
        '{"content": "x", "kind": "y"}',
        "{x + y}",
        '"hi"',
        '"[1]"',
        '{"messages": 3}',
        "[" * 5000,
    ],
)
def test_text_that_is_no_message_stays_text(text):
    assert content_of(text, "prompt") == text


def test_a_call_of_a_tool_needs_no_content_and_has_an_object_for_arguments():
    for arguments in (CALL["arguments"], json.dumps(CALL["arguments"])):
        calls = [{"type": "function", "function": {**CALL, "arguments": arguments}}]
        message = {"role": "assistant", "content": None, "tool_calls": calls}
        (found,) = content_of([message], "prompt")
        assert found["content"] == ""
        assert found["tool_calls"] == [{"type": "function", "function": CALL}]


@pytest.mark.parametrize(
    "given, message",
    [
        ([], "must be text or a list of chat messages, got"),
        ("[]", None),
        (None, "must be text or a list of chat messages, got None"),
        (3, "must be text or a list of chat messages, got 3"),
        ("\n ", "column 'q' is empty"),
        ([{"role": "user", "content": None}], "a chat message has role and content"),
        ([{"role": "user", "content": ""}], "a user's message is empty"),
        ([{"role": "user", "content": 3}], "content must be text, got 3"),
        ([{"role": "user", "content": []}], r"content must be text, got \[\]"),
        ([{"role": "user", "content": ["hi"]}], "parts of text such as"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
            "a part of type 'image_url', and no model here reads anything but text",
        ),
        ([{"role": None, "content": "x"}], "a chat message has role and content"),
        ([{"role": 1, "content": "x"}], "a chat message has role and content"),
        (["hi"], "a chat message has role and content, got 'hi'"),
        ('[{"from": "human", "value": "hi"}]', "a chat message has role and content"),
        ('[{"role": "user", "content": "hi"}', "looks like chat messages in text"),
        (
            "[{'role': 'user', 'content': 'a'}\n {'role': 'b', 'content': 'c'}]",
            "looks like chat mess",
        ),
        ("array([{'content': 'a', 'role': 'user'}], dtype=object)", "looks like chat"),
        (
            [{"role": "assistant", "content": "", "tool_calls": ["f"]}],
            "a tool call is an object, got 'f'",
        ),
        (
            [{"role": "assistant", "content": "", "tool_calls": 5}],
            "tool_calls must be a list, got 5",
        ),
        ({"a": 1}, "a chat message has role and content, got {'a': 1}"),
    ],
    ids=str,
)
def test_what_is_no_question_says_why(given, message):
    if message is None:
        assert content_of(given, "q") == given
        return
    with pytest.raises(ValueError, match=message):
        content_of(given, "q")


def test_tools_are_read_from_every_form_they_are_stored_in():
    tool = {"type": "function", "function": {"name": "f"}}
    padded = {"type": "function", "function": {"name": "f", "description": None}}
    forms = ([tool], json.dumps([tool]), [json.dumps(tool)], tool, [padded])
    for given in forms:
        assert tools_of({"tools": given}) == [tool]
    for nothing in (None, [], "[]", ""):
        assert tools_of({"tools": nothing}) is None
    assert tools_of({}) is None
    for other in ("calculator", [1], 3):
        with pytest.raises(ValueError, match="column 'tools' must be a list of JSON"):
            tools_of({"tools": other})


SAME = [
    HI,
    "hi",
    " hi\r\n",
    "h\u200bi",
    [{"role": "system", "content": "Be brief."}, *HI],
    [{"role": "developer", "content": "Be brief."}, *HI],
    [{**HI[0], "name": "Ann"}],
]


@pytest.mark.parametrize("content", SAME, ids=ascii)
def test_a_question_is_the_same_behind_another_system_prompt(content):
    assert identity(content) == identity("hi")


def test_questions_differ_by_their_words_and_who_says_them():
    assert identity("caf\u00e9 au\u00a0lait") == identity("cafe\u0301  au\nlait")
    others = ["Hi", "h i", [*HI, {"role": "assistant", "content": "hi"}], "x\u00b2"]
    assert len({identity(content) for content in ["hi", "x2", *others]}) == 6
