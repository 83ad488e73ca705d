"""What follows a turn of the policy, as tokens behind those that it sampled.

Sampled tokens stay as they are: they are never made again from their text, from which
a tokenizer may make others. What the environment says is put behind them as the chat
template would write it: a short conversation with the same reply is rendered, and what
stands behind its answer there is what is put behind the sampled one.

    tokens = splicer.begin(messages, tools)              # the policy's first turn
    tokens += sampled + splicer.splice(sampled, finish_reason, reply)   # its second
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxrl_llm.data.chat_template import Encoder
from jaxrl_llm.data.types import Message

Schema = Mapping[str, Any]

_ASKED = {"role": "user", "content": "Asked."}
_ANSWER = "Answered."
_ANSWERED = {"role": "assistant", "content": _ANSWER}
_SAID = "Said."
_HELD, _HOLDS = "\ue000{}\ue000", re.compile("\ue000(\\d+)\ue000")
"""No text: characters that Unicode leaves to private use."""
_ROLES = ("user", "tool")


class Splicer:
    """Turns of a conversation as tokens, in one chat template.

    A template that knows no role "tool" gets a tool's answer in a user's message, as
    <tool_response>. One that prints no tools, or prints them for another way of calling
    them, gets `describe` of them in a system message; one that knows no system message
    gets that before the user's first.

    Args:
      describe: what is said of tools, from their JSON schemas; None to leave that to
        the template.

    Raises:
      ValueError: the tokenizer has no chat template, or none that can go on with a
        conversation: what it writes behind an answer cannot be told apart.
    """

    def __init__(
        self,
        encoder: Encoder,
        describe: Callable[[Sequence[Schema]], str] | None = None,
    ):
        self._encoder, self._describe = encoder, describe
        tokenizer = encoder.tokenizer
        added = tokenizer.added_tokens_decoder
        self._special = {*tokenizer.all_special_ids} | {
            token for token, how in added.items() if how.special
        }
        texts = tokenizer.convert_ids_to_tokens(sorted(self._special))
        texts = sorted(filter(None, texts), key=len, reverse=True)
        self._marks = re.compile("|".join(map(re.escape, texts)) or r"(?!)")
        self._end = encoder.end_of_answer()
        closed = encoder.render([_ASKED, _ANSWERED], end="closed")
        self._closing = closed.rpartition(_ANSWER)[2]
        self._tool = self._way_of_tools()
        for role in _ROLES:
            self._check(role)

    @property
    def rewrites_history(self) -> bool:
        """Whether the template leaves out of an earlier answer what the policy thought,
        between <think> and </think>."""
        thought = f"<think>\n{_SAID}\n</think>\n\n{_ANSWER}"
        answered = {"role": "assistant", "content": thought}
        text = self._encoder.render([_ASKED, answered, _ASKED], end="opened")
        return _SAID not in text

    def begin(
        self, messages: Sequence[Message], tools: Sequence[Schema] = ()
    ) -> tuple[int, ...]:
        """The tokens that the policy's turn follows. Words of users and tools that look
        like special tokens are words.

        Raises:
          ValueError: the template rejects the messages, or leaves one out.
        """
        messages, held = self._hold(messages)
        messages, tools = self._written(messages, tools)
        if held:
            return tuple(self._filled(self._encoder.render(messages, tools), held))
        return self._encoder.encode(messages, tools)

    def splice(
        self,
        sampled: Sequence[int],
        finish_reason: str | None,
        reply: Sequence[Message],
    ) -> tuple[int, ...]:
        """The tokens behind a turn of the policy, up to where its next turn begins.

        Args:
          sampled: the tokens of that turn. If a special token ended it, it stands for
            the one that the template puts behind an answer.
          finish_reason: `Completion.finish_reason` of that turn.
          reply: messages of the roles "tool" and "user".

        Raises:
          ValueError: the template rejects the reply.
        """
        tokens = self._behind(reply)
        ended = finish_reason == "stop" and len(sampled) > 0
        if ended and int(sampled[-1]) in self._special:
            tokens = self._without_end(tokens)
        return tuple(tokens)

    def rewritten(
        self,
        messages: Sequence[Message],
        tools: Sequence[Schema],
        tokens: Sequence[int],
    ) -> tuple[int, ...] | None:
        """The tokens of a conversation as the template writes all of it now.

        None if it says what `tokens` say, white space and special tokens aside.

        Args:
          messages: from the first; the policy's turns are messages of the role
            "assistant" with the text that it sampled, and the last is no such.
          tokens: the conversation as the policy has read and written it.
        """
        found = self.begin(messages, tools)
        said, kept = (
            self._encoder.tokenizer.decode(list(ids), skip_special_tokens=True)
            for ids in (found, tokens)
        )
        return None if said.split() == kept.split() else found

    def check_written_anew(self, role: str) -> None:
        """Raises ValueError unless the template writes whole conversations in which a
        message of that role follows the text of an answer, as `rewritten` needs it."""
        try:
            self.rewritten(
                [_ASKED, _ANSWERED, {"role": role, "content": _SAID}], (), ()
            )
        except ValueError as error:
            raise ValueError(
                "agent.on_rewrite is fork, but the chat template writes no "
                f"conversation in which a {role} message follows the text of an "
                f"answer ({error}); set it to keep"
            ) from error

    # What the template is given.

    def _written(
        self, messages: Sequence[Message], tools: Sequence[Schema]
    ) -> tuple[list[Message], list[Schema] | None]:
        """Messages and tools in the form that the template knows."""
        messages = self._with_answers(messages)
        if not tools:
            return messages, None
        if self._describe is None and self._prints_tools:
            return messages, list(tools)
        if self._describe is None:
            raise ValueError(
                "the chat template prints no tools; say how the policy calls them"
            )
        return self._told(messages, self._describe(tools)), None

    def _told(self, messages: list[Message], text: str) -> list[Message]:
        """Messages with `text` in a system message."""
        first, rest = messages[0], messages[1:]
        if first["role"] in ("system", "developer"):
            return [{**first, "content": f"{first['content']}\n\n{text}"}, *rest]
        if self._knows_system:
            return [{"role": "system", "content": text}, *messages]
        return [{**first, "content": f"{text}\n\n{first['content']}"}, *rest]

    def _with_answers(self, messages: Sequence[Message]) -> list[Message]:
        """Messages with those of tools as the template takes them: one user's message
        for several of them, if it knows none."""
        found: list[Message] = []
        for message in messages:
            if message["role"] == "tool" and self._tool == "user":
                text = f"<tool_response>\n{message['content']}\n</tool_response>"
                if found and found[-1].get("joined"):
                    text = f"{found.pop()['content']}\n{text}"
                message = {"role": "user", "content": text, "joined": True}
            found.append(message)
        return [{k: v for k, v in m.items() if k != "joined"} for m in found]

    @functools.cached_property
    def _prints_tools(self) -> bool:
        function = {"name": "f", "description": _SAID, "parameters": {}}
        tools = [{"type": "function", "function": function}]
        return self._renders([_ASKED], tools)

    @functools.cached_property
    def _knows_system(self) -> bool:
        return self._renders([{"role": "system", "content": _SAID}, _ASKED])

    def _renders(self, messages: list[Message], tools: Any = None) -> bool:
        try:
            self._encoder.render(messages, tools, "opened")
        except ValueError:
            return False
        return True

    # What it makes of a reply.

    def _way_of_tools(self) -> str:
        """How a tool's answer is written: as "tool" behind any answer or behind a
        "call", or else as "user"."""
        for way in ("tool", "call"):
            self._tool = way
            try:
                self._check("tool")
                return way
            except ValueError:
                continue
        return "user"

    def _conversation(self, reply: Sequence[Message]) -> list[Message]:
        """A question, an answer, and the reply to it."""
        reply = self._with_answers(reply)
        count = sum(message["role"] == "tool" for message in reply)
        if self._tool != "call" or not count:
            return [_ASKED, _ANSWERED, *reply]
        names = [f"call{index:05d}" for index in range(count)]
        calls = [
            {"type": "function", "id": id, "function": {"name": "f", "arguments": {}}}
            for id in names
        ]
        answered = {"role": "assistant", "content": "", "tool_calls": calls}
        marked = [
            {"name": "f", "tool_call_id": names.pop(0), **m}
            if m["role"] == "tool"
            else m
            for m in reply
        ]
        return [_ASKED, answered, *marked]

    def _text(self, reply: Sequence[Message]) -> tuple[str, str]:
        """What the template writes up to an answer's last letter, and behind it."""
        conversation = self._conversation(reply)
        text = self._encoder.render(conversation, end="opened")
        if conversation[1] is _ANSWERED:
            before, found, behind = text.partition(_ANSWER)
            if found:
                return before + _ANSWER, behind
        else:
            before = self._encoder.render(conversation[:2], end="closed")
            if text.startswith(before) and before.endswith(self._closing):
                count = len(before) - len(self._closing)
                return text[:count], text[count:]
        raise ValueError(
            "the chat template does not go on behind an answer, so that no second turn "
            "can follow it"
        )

    def _behind(self, reply: Sequence[Message]) -> list[int]:
        """The tokens behind an answer that has not said its end."""
        reply, held = self._hold(reply)
        before, behind = self._text(reply)
        tokens = self._tokens(before + behind)
        answered = self._tokens(before)
        if held:
            return self._filled(behind, held)
        if tokens[: len(answered)] == answered:
            return tokens[len(answered) :]
        return self._tokens(behind)  # a token reaches over the end of the answer

    def _hold(self, messages: Sequence[Message]) -> tuple[list[Message], list[str]]:
        """Messages in which the words of users and tools that look like special tokens
        are held back, lest an environment says what only a template may say; and these
        words, which `_filled` puts back."""
        held: list[str] = []

        def hold(match: re.Match[str]) -> str:
            held.append(match[0])
            return _HELD.format(len(held) - 1)

        found = [
            {**m, "content": self._marks.sub(hold, m["content"])}
            if m["role"] in _ROLES and isinstance(m.get("content"), str)
            else m
            for m in messages
        ]
        return found, held

    def _filled(self, text: str, held: Sequence[str]) -> list[int]:
        """Tokens of `text`, with what was held back as words."""
        tokens: list[int] = []
        for index, part in enumerate(_HOLDS.split(text)):
            if index % 2 == 0:
                tokens += self._tokens(part)
            elif int(part) < len(held):
                tokens += self._tokens(held[int(part)], split_special_tokens=True)
            else:
                tokens += self._tokens(_HELD.format(part))
        return tokens

    def _without_end(self, tokens: list[int]) -> list[int]:
        """`tokens` without the end of an answer that they begin with."""
        if self._end in tokens[:3]:
            count = tokens.index(self._end)
            if not self._encoder.tokenizer.decode(tokens[:count]).strip():
                return tokens[count + 1 :]
        return tokens

    def _tokens(self, text: str, **how: bool) -> list[int]:
        if not text:
            return []
        found = self._encoder.tokenizer(text, add_special_tokens=False, **how).input_ids
        self._encoder.check_vocabulary(found)
        return found

    def _check(self, role: str) -> None:
        """Raises ValueError unless an answer and what is put behind it read as the
        template writes them."""
        reply = [{"role": role, "content": _SAID}]
        before, behind = self._text(reply)
        decode = self._encoder.tokenizer.decode
        whole = decode(self._tokens(before + behind))
        if decode(self._tokens(before) + self._behind(reply)) != whole:
            raise ValueError(
                f"what a {role} message adds to a conversation cannot be put behind an "
                f"answer: the chat template writes {behind!r} there, which the "
                "tokenizer reads in another way if it stands alone"
            )
        if _SAID not in behind:
            raise ValueError(f"the chat template leaves the {role} message out")
