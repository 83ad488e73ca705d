"""What a question is: text, or chat messages in the one form that templates read."""

import ast
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from jaxrl_llm.data.types import Message

Content = str | list[Message]

# Roles that chat templates know; a template may know others, which stand in it.
_ROLES = {"system", "developer", "user", "assistant", "tool", "function", "ipython"}

_EXPORT = re.compile(
    r"""\s*(array\()?\[?\s*\{\s*['"](role|content|from|value|messages)['"]\s*:"""
)


def content_of(value: Any, key: str) -> Content:
    """A column's question: text as it is, or chat messages.

    Messages may be a list, or the text that a list became in a CSV or Parquet file.
    Keys that are null count as not there; content in parts of text is their text.

    Raises:
      ValueError: it is neither, or a message is no message.
    """
    found = _read_export(value, key) if isinstance(value, str) else value
    if isinstance(found, Mapping):  # one message, or the record that messages came in
        found = found.get("messages", [found])
    if isinstance(found, str):
        if not found.strip():
            raise ValueError(f"column {key!r} is empty")
        return found
    if not isinstance(found, Sequence) or not found:
        raise ValueError(
            f"column {key!r} must be text or a list of chat messages, got "
            f"{_short(value)}"
        )
    return [_message(message, f"column {key!r}") for message in found]


def tools_of(row: Mapping[str, Any]) -> list[Any] | None:
    """The tools in the column `tools` of a row; None without any.

    Raises:
      ValueError: they are no list of JSON schemas.
    """
    value = row.get("tools")
    found = _json(value) if isinstance(value, str) else value
    if found is None or found in ("", [], ()):
        return None
    listed = found if isinstance(found, list | tuple) else [found]
    tools = [_json(tool) if isinstance(tool, str) else tool for tool in listed]
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(
            f"column 'tools' must be a list of JSON schemas, got {_short(value)}; a "
            "column of another kind needs another name"
        )
    return _without_null(tools)


def check_roles(messages: Sequence[Message], template: str) -> None:
    """Raises ValueError for a role that neither chat templates nor this one knows."""
    for message in messages:
        role = message["role"]
        quoted = f"'{role}'" in template or f'"{role}"' in template
        if role not in _ROLES and not quoted:
            raise ValueError(
                f"a message has the role {role!r}, which the chat template does not "
                f"know; known are {', '.join(sorted(_ROLES))}"
            )


def check_text(content: Any) -> None:
    """Raises ValueError for text that no tokenizer can read."""
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text holds half of a surrogate pair, {error.object[error.start]!r}, "
            "which is no character"
        ) from None
    except TypeError as error:
        raise ValueError(f"a message holds what is no JSON: {error}") from None


def identity(content: Content) -> str:
    """Equal for questions that are the same but for system prompt, white space, the
    form of Unicode characters, invisible characters, and names beside the text."""
    messages = content
    if isinstance(content, str):
        messages = [{"role": "user", "content": content}]
    return json.dumps(
        [
            (message["role"], _letters(message["content"]), message.get("tool_calls"))
            for message in messages
            if message["role"] not in ("system", "developer")
        ],
        sort_keys=True,
        default=str,
    )


def _letters(text: str) -> str:
    """Text in one form of Unicode, white space as single spaces."""
    text = unicodedata.normalize("NFC", text)
    if not text.isascii():
        text = "".join(c for c in text if unicodedata.category(c) != "Cf")
    return " ".join(text.split())


def _read_export(text: str, key: str) -> Any:
    """The messages that `text` is an export of; else the text itself."""
    inner = _json(text.strip()) if text.lstrip().startswith('"') else text
    if isinstance(inner, str) and _EXPORT.match(inner):
        text = inner  # JSON within JSON
    elif not _EXPORT.match(text):
        return text
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, dict) and isinstance(found.get("messages"), list):
            return found["messages"]
        found = found if isinstance(found, list) else [found]
        named = ({"role", "content"}, {"role", "tool_calls"}, {"from", "value"})
        keys = [set(m) if isinstance(m, dict) else set() for m in found]
        if all(any(names <= k for names in named) for k in keys):
            return found
        return text
    if all(re.search(rf"""['"]{name}['"]\s*:""", text) for name in ("role", "content")):
        raise ValueError(
            f"column {key!r} looks like chat messages in text, but cannot be read: "
            f"{_short(text)}; store them as JSON"
        )
    return text


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise ValueError(
            f"{where}: a chat message has role and content, got {_short(message)}"
        )
    found = {key: value for key, value in message.items() if value is not None}
    calls = found.get("tool_calls")
    calls = _json(calls) if isinstance(calls, str) else calls
    if calls and "content" not in found:
        found["content"] = ""
    if not {"role", "content"} <= set(found) or not isinstance(found["role"], str):
        raise ValueError(
            f"{where}: a chat message has role and content, got {_short(message)}"
        )
    found["content"] = _text(found["content"], where)
    if found["role"] == "user" and not found["content"].strip():
        raise ValueError(f"{where}: a user's message is empty")
    if calls and not isinstance(calls, list | tuple):
        raise ValueError(f"{where}: tool_calls must be a list, got {_short(calls)}")
    if calls:
        found["tool_calls"] = [_call(call, where) for call in _without_null(calls)]
    return found


def _text(content: Any, where: str) -> str:
    """The text of a message's content, which may come in parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or not content:
        raise ValueError(f"{where}: content must be text, got {_short(content)}")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("text", None):
            raise ValueError(
                f"{where}: content has a part of type {kind!r}, and no model here "
                "reads anything but text; leave such rows out"
            )
        if kind is None or not isinstance(part.get("text"), str):
            raise ValueError(
                f"{where}: content must be text or parts of text such as "
                f"{{'type': 'text', 'text': ...}}, got {_short(part)}"
            )
        texts.append(part["text"])
    return "".join(texts)


def _call(call: Any, where: str) -> Any:
    """A tool call whose arguments are an object, which templates write as JSON."""
    if not isinstance(call, Mapping):
        raise ValueError(f"{where}: a tool call is an object, got {_short(call)}")
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(
        function.get("arguments"), str
    ):
        return call
    function = {**function, "arguments": _json(function["arguments"])}
    return {**call, "function": function} if "function" in call else function


def _short(value: Any) -> str:
    return f"{value!r:.200}"


def _json(text: str) -> Any:
    """What JSON text says; other text as it is."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _without_null(value: Any) -> Any:
    """Nested lists and objects without the keys that are null, such as columnar files
    fill in."""
    if isinstance(value, Mapping):
        return {k: _without_null(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_without_null(item) for item in value]
    return value
