"""Functions that the policy may call: what it is told of them, and how it calls one.

A `Format` is one way of writing calls. Which one a model was taught stands in its chat
template; `choose` finds it there. In `bracket`, calls are short enough for a model that
was taught none.
"""

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxrl_llm.config.names import near

Schema = Mapping[str, Any]


@dataclass(frozen=True)
class Call:
    """The policy calls a function."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Mistake:
    """The policy tries to. It is told why that is no call."""

    kind: str
    """"unreadable", "unknown_tool" or "arguments"."""
    why: str


@dataclass(frozen=True, kw_only=True)
class Format:
    """A way of writing calls."""

    name: str
    find: Callable[[str, Sequence[Schema]], Iterator[Call | Mistake]]
    """The calls in a text, in their order, of functions with these schemas."""
    describe: Callable[[Sequence[Schema]], str]
    """What a model is told that cannot know it from its chat template."""
    marks: tuple[str, ...]
    """What stands in every chat template that teaches it; empty if none does."""


def calls(
    format: Format, text: str, tools: Sequence[Schema]
) -> tuple[Call | Mistake, ...]:
    """What the policy calls in one of its turns; empty if it calls nothing.

    What it says to itself, up to </think>, calls nothing.
    """
    said = text.rpartition("</think>")[2]
    return tuple(
        _checked(found, tools) if isinstance(found, Call) else found
        for found in format.find(said, tools)
    )


def choose(name: str, template: str) -> tuple[Format, bool]:
    """A way of writing calls, and whether the chat template teaches it.

    Args:
      name: of `FORMATS`, or "auto" for the one that the template teaches, "hermes" if
        it teaches none.

    Raises:
      ValueError: there is no such format.
    """
    known = (f for f in FORMATS.values() if f.marks)
    taught = next((f for f in known if all(m in template for m in f.marks)), None)
    if name == "auto":
        return taught or FORMATS["hermes"], taught is not None
    if name not in FORMATS:
        raise ValueError(
            f"there is no format of tool calls {name!r}{near(name, FORMATS)}; there "
            f"are auto, {', '.join(FORMATS)}"
        )
    return FORMATS[name], FORMATS[name] is taught


def schema(function: Callable[..., Any]) -> Schema:
    """The JSON schema of a function, from the types of its parameters and its Google
    docstring, as `transformers` makes it.

    Raises:
      ValueError: a parameter has no type or no description, or there is no docstring.
    """
    from transformers.utils import get_json_schema

    try:
        return get_json_schema(function)
    except Exception as error:  # noqa: BLE001 - types of others are read, of any kind
        name = getattr(function, "__name__", repr(function))
        raise ValueError(
            f"tool {name!r}: {error} A tool has a type for each parameter, and a "
            'docstring with a line for each under "Args:"'
        ) from None


def name_of(tool: Schema) -> str:
    """The function's name in its schema."""
    return tool["function"]["name"]


def _parameters(tool: Schema) -> Mapping[str, Schema]:
    return tool["function"].get("parameters", {}).get("properties", {})


def _named(name: str, tools: Sequence[Schema]) -> Schema | None:
    return next((tool for tool in tools if name_of(tool) == name), None)


# Whether a call fits its function.


def _checked(call: Call, tools: Sequence[Schema]) -> Call | Mistake:
    tool = _named(call.name, tools)
    if tool is None:
        names = [name_of(tool) for tool in tools]
        why = f"there is no tool {call.name!r:.100}; there are {', '.join(names)}"
        return Mistake("unknown_tool", why)
    if _too_deep(call.arguments):
        why = f"arguments of {call.name}: values stand in more than {_DEEPEST} others"
        return Mistake("arguments", why)
    parameters = _parameters(tool)
    required = tool["function"].get("parameters", {}).get("required", ())
    wrong = [
        *(f"{name} is missing" for name in required if name not in call.arguments),
        *(
            f"there is no {name!r:.100}"
            for name in call.arguments
            if name not in parameters
        ),
        *(
            f"{name} is {value!r:.100}, not of type {_wanted(parameters[name])}"
            for name, value in call.arguments.items()
            if name in parameters and not _fits(value, parameters[name])
        ),
    ]
    if wrong:
        return Mistake("arguments", f"arguments of {call.name}: {'; '.join(wrong)}")
    return call


_TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


def _kinds(parameter: Schema) -> list[str]:
    kinds = parameter.get("type", [])
    return [kinds] if isinstance(kinds, str) else list(kinds)


_DEEPEST = 100
"""Values within values, that no printing or sending of them fails."""


def _too_deep(value: Any) -> bool:
    layer = [value]
    for _ in range(_DEEPEST):
        layer = [
            inner
            for outer in layer
            if isinstance(outer, dict | list | tuple | set)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return bool(layer)


def _wanted(parameter: Schema) -> str:
    if "enum" in parameter:
        return f"{parameter['enum']}"
    return " or ".join(_kinds(parameter))


def _fits(value: Any, parameter: Schema) -> bool:
    if value is None and parameter.get("nullable"):
        return True
    if "enum" in parameter and value not in parameter["enum"]:
        return False
    kinds = [kind for kind in _kinds(parameter) if kind in _TYPES]
    if not kinds:
        return True  # of several types, or any
    if isinstance(value, bool):
        return "boolean" in kinds
    return any(isinstance(value, _TYPES[kind]) for kind in kinds)


_UNREADABLE = (ValueError, RecursionError)
"""What reading a text raises that is no value, or is one within too many others."""


# hermes: {"name": ..., "arguments": {...}} within <tool_call>, as Qwen2.5 and Qwen3.

_TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|(?=<tool_call>)|\Z)", re.S)


def _find_hermes(text: str, tools: Sequence[Schema]) -> Iterator[Call | Mistake]:
    for match in _TAGGED.finditer(text):
        try:
            yield _from_json(json.loads(match[1]))
        except _UNREADABLE as error:
            yield Mistake("unreadable", f"a tool call is JSON: {error}")


def _listed(tools: Sequence[Schema]) -> str:
    listed = "\n".join(json.dumps(tool) for tool in tools)
    return f"# Tools\n\nThese functions can be called:\n<tools>\n{listed}\n</tools>"


def _describe_hermes(tools: Sequence[Schema]) -> str:
    return (
        f"{_listed(tools)}\n\n"
        "A call is a JSON object within tags:\n<tool_call>\n"
        '{"name": <name>, "arguments": <object>}\n</tool_call>'
    )


def _from_json(found: Any) -> Call | Mistake:
    """A call of an object with a name and arguments, or parameters."""
    if isinstance(found, dict) and isinstance(found.get("function"), dict):
        found = found["function"]
    if isinstance(found, dict) and isinstance(found.get("name"), str):
        arguments = found.get("arguments", found.get("parameters", {}))
        if isinstance(arguments, str):  # JSON within JSON
            arguments = json.loads(arguments)
        if isinstance(arguments, dict):
            return Call(found["name"], arguments)
    return Mistake("unreadable", 'a tool call is {"name": ..., "arguments": {...}}')


# llama: {"name": ..., "parameters": {...}} and nothing else, as Llama 3.1 and 3.2.


def _find_llama(text: str, tools: Sequence[Schema]) -> Iterator[Call | Mistake]:
    rest = text.strip().removeprefix("<|python_tag|>").strip()
    read = json.JSONDecoder().raw_decode
    while rest.startswith("{"):
        try:
            found, end = read(rest)
            yield _from_json(found)
        except _UNREADABLE as error:
            yield Mistake("unreadable", f"a tool call is JSON: {error}")
            return
        rest = rest[end:].lstrip("; \n")


def _describe_llama(tools: Sequence[Schema]) -> str:
    listed = "\n\n".join(json.dumps(tool, indent=4) for tool in tools)
    return (
        "These functions can be called with a JSON object and nothing else:\n"
        f'{{"name": <name>, "parameters": <object>}}\n\n{listed}'
    )


# qwen3_coder: <function=NAME><parameter=KEY>VALUE, as Qwen3-Coder and later Qwen.

_FUNCTION = re.compile(
    r"<function=([^>\n]*)>(.*?)(?:</function>|(?=<function=)|\Z)", re.S
)
_PARAMETER = re.compile(
    r"<parameter=([^>\n]*)>(.*?)(?:</parameter>|(?=<parameter=)|\Z)", re.S
)


def _find_qwen3_coder(text: str, tools: Sequence[Schema]) -> Iterator[Call | Mistake]:
    found = 0
    for match in _FUNCTION.finditer(text):
        name, found = match[1].strip(), found + 1
        tool = _named(name, tools)
        known = _parameters(tool) if tool else {}
        yield Call(
            name,
            {
                key.strip(): _typed(value, known.get(key.strip(), {}))
                for key, value in _PARAMETER.findall(match[2])
            },
        )
    if not found and "<tool_call>" in text:
        yield Mistake("unreadable", "a tool call holds <function=NAME>...</function>")


def _typed(text: str, parameter: Schema) -> Any:
    """A value of the parameter's type, or the text if it is of none."""
    text = text.removeprefix("\n").removesuffix("\n")
    if "string" in _kinds(parameter):
        return text
    try:
        return json.loads(text)
    except _UNREADABLE:
        return {"True": True, "False": False, "None": None}.get(text.strip(), text)


def _describe_qwen3_coder(tools: Sequence[Schema]) -> str:
    return (
        f"{_listed(tools)}\n\n"
        "A call has this form:\n<tool_call>\n<function=NAME>\n<parameter=PARAMETER>\n"
        "value\n</parameter>\n</function>\n</tool_call>"
    )


# bracket: [name(value)] or [name(key=value), name(...)], as in Llama 3.2's lists.

_FIRST, _NEXT = re.compile(r"\[([A-Za-z_]\w*)\("), re.compile(r",\s*([A-Za-z_]\w*)\(")


def _find_bracket(text: str, tools: Sequence[Schema]) -> Iterator[Call | Mistake]:
    match = _FIRST.search(text)
    while match:
        inside, place = _inside(text, match.end() - 1)
        if inside is None:
            yield Mistake("unreadable", f"{match[1]}( has no ) behind it")
            return
        yield _from_python(match[1], inside, tools)
        match = _NEXT.match(text, place) or _FIRST.search(text, place)


def _inside(text: str, place: int) -> tuple[str | None, int]:
    """What stands between the bracket at `place` and the one that closes it, and where
    that ends."""
    depth, quote = 0, ""
    for index in range(place, len(text)):
        letter = text[index]
        if quote:
            quote = "" if letter == quote and text[index - 1] != "\\" else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
            if depth == 0:
                return text[place + 1 : index], index + 1
    end = text.find(")", place)  # a quote may be an apostrophe
    return (None, len(text)) if end < 0 else (text[place + 1 : end], end + 1)


def _from_python(name: str, inside: str, tools: Sequence[Schema]) -> Call | Mistake:
    """A call whose arguments are Python's literals; one that takes a single text may
    have it without quotes."""
    tool = _named(name, tools)
    parameters = list(_parameters(tool)) if tool else []
    try:
        found = ast.parse(f"f({inside}\n)", mode="eval").body
        values = [ast.literal_eval(node) for node in found.args]
        arguments = dict(zip(parameters, values, strict=False))
        if len(values) > len(parameters):
            return Mistake("arguments", f"{name} takes {len(parameters)} arguments")
        for keyword in found.keywords:
            arguments[keyword.arg or "**"] = ast.literal_eval(keyword.value)
        if not _is_text(tool) or isinstance([*arguments.values(), ""][0], str):
            return Call(name, arguments)
    except (*_UNREADABLE, SyntaxError, AttributeError, MemoryError):
        pass
    if _is_text(tool):
        text = inside.strip().removeprefix(f"{parameters[0]}=").strip()
        return Call(name, {parameters[0]: text})
    return Mistake(
        "unreadable", f"arguments of {name} are no literals: {inside!r:.100}"
    )


def _is_text(tool: Schema | None) -> bool:
    """Whether a function takes one text and nothing else."""
    parameters = list(_parameters(tool).values()) if tool else []
    return len(parameters) == 1 and _kinds(parameters[0]) == ["string"]


def _describe_bracket(tools: Sequence[Schema]) -> str:
    lines = []
    for tool in tools:
        names = ", ".join(_parameters(tool))
        said = tool["function"].get("description", "").strip().partition("\n")[0]
        lines.append(f"[{name_of(tool)}({names})] {said}".strip())
    return "Write one of these to call it:\n" + "\n".join(lines)


FORMATS: Mapping[str, Format] = {
    f.name: f
    for f in (
        Format(
            name="qwen3_coder",
            find=_find_qwen3_coder,
            describe=_describe_qwen3_coder,
            marks=("<function=", "<parameter="),
        ),
        Format(
            name="hermes",
            find=_find_hermes,
            describe=_describe_hermes,
            marks=("<tool_call>", "tools"),
        ),
        Format(
            name="llama",
            find=_find_llama,
            describe=_describe_llama,
            marks=('"parameters": ', "tools", "ipython"),
        ),
        Format(
            name="bracket", find=_find_bracket, describe=_describe_bracket, marks=()
        ),
    )
}
"""The ways of writing calls, by name; those that say more of a template first."""
