"""Questions to tokens: the chat template and the tokenizer, and what they must not do
without a word."""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from jaxrl_llm.data.messages import Content, check_roles, check_text
from jaxrl_llm.data.types import Message

if TYPE_CHECKING:
    import transformers

# Stands before a template that asks for the time, and answers in the place of
# transformers' own function: templates are given data and no functions. The line break
# is trimmed, so that the template begins where it began.
_CLOCK = (
    "{% macro strftime_now(format) %}{% set said = namespace(text=format) %}"
    "{% for code, value in strftime_values.items() %}"
    "{% set said.text = said.text.replace(code, value) %}{% endfor %}"
    "{{ said.text }}{% endmacro %}\n"
)

_CODES = ("%-d", "%-m", "%-H", "%-I", "%-M", "%-S", "%-j", "%-y") + tuple(
    f"%{code}" for code in "aAwdbBmyYHIMSfpjUWcxXGuVeDFTRhZz"
)

# What a run itself tells a template, and how it asks for the text.
_GIVEN = {
    "messages", "conversation", "tools", "documents", "chat_template",
    "add_generation_prompt", "continue_final_message", "tokenize", "strftime_values",
    "strftime_now", "padding", "truncation", "max_length", "return_tensors",
    "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
}  # fmt: skip

End = Literal["opened", "continued", "closed"]
"""How a text ends: with the beginning of an answer, within the last message, which goes
on, or behind it."""

_AT_RANDOM = re.compile(r"\|\s*random\b|\blipsum\s*\(")


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """How questions become tokens: the same at every time and in every process."""

    tokenizer: "transformers.PreTrainedTokenizerBase"
    now: datetime.datetime = field(
        default_factory=lambda: datetime.datetime.now().replace(microsecond=0)
    )
    """The time that a chat template is told."""
    vocab_size: int | None = None
    """Rows of the model's embedding; any if None."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the chat template, besides the messages and tools."""

    @property
    def asks_for_the_time(self) -> bool:
        """Whether the chat template has the date in it."""
        return "strftime_now" in json.dumps(self.tokenizer.chat_template)

    def encode(
        self, content: Content, tools: Sequence[Any] | None = None
    ) -> tuple[int, ...]:
        """The tokens the model continues: text as it is, messages in the chat template.

        After a user's message the template opens the assistant's; an assistant's
        message at the end is left open, to be continued. Text that says its own BOS
        gets no second one, and the end that a tokenizer puts behind text is left off.

        Args:
          tools: JSON schemas of the functions that the model may call.

        Raises:
          ValueError: messages but no chat template, one that rejects them or leaves
            something out, no tokens, or one that the model has no embedding of.
        """
        found = self.encode_all([(content, tools)])[0]
        if isinstance(found, ValueError):
            raise found
        return found

    def encode_all(
        self, questions: Sequence[tuple[Content, Sequence[Any] | None]]
    ) -> list[tuple[int, ...] | ValueError]:
        """What `encode` returns or raises for each, on all cores at once.

        Args:
          questions: content and tools of each.
        """
        found: list[Any] = [self._text(*question) for question in questions]
        texts = [i for i, text in enumerate(found) if isinstance(text, str)]
        plain = [i for i in texts if isinstance(questions[i][0], str)]
        alone = self.tokens_of([found[i] for i in texts])
        # Text gets what the tokenizer puts before it; a chat template says its own.
        given = self._tokens([found[i] for i in plain])
        around = dict(zip(plain, given, strict=True))
        for i, tokens in zip(texts, alone, strict=True):
            found[i] = self._checked(
                _begun(tokens, around[i]) if i in around else tokens
            )
        return found

    def tokens_of(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of texts by themselves, nothing put before or behind them, on all
        cores at once."""
        return self._tokens(texts, add_special_tokens=False)

    def _text(self, content: Content, tools: Sequence[Any] | None) -> str | ValueError:
        try:
            check_text([content, tools])
            if not isinstance(content, str):
                return self.render(content, tools)
            if tools:
                raise ValueError("column 'tools' needs a chat template to stand in")
            return content
        except ValueError as error:
            return error

    def _tokens(self, texts: Sequence[str], **how: bool) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(list(texts), return_attention_mask=False, **how).input_ids

    def _checked(self, tokens: Sequence[int]) -> tuple[int, ...] | ValueError:
        """One BOS at most, something, and nothing that the model does not know."""
        bos = self.tokenizer.bos_token_id
        while bos is not None and list(tokens[:2]) == [bos, bos]:
            tokens = tokens[1:]
        if not tokens:
            return ValueError("the prompt has no tokens")
        try:
            self.check_vocabulary(tokens)
        except ValueError as error:
            return error
        return tuple(tokens)

    def check_vocabulary(self, tokens: Sequence[int]) -> None:
        """Raises ValueError for a token that the model has no embedding of."""
        last = max(tokens)
        if self.vocab_size is not None and last >= self.vocab_size:
            raise ValueError(
                f"token {last} ({self.tokenizer.convert_ids_to_tokens(last)!r}) is not "
                f"in the model's vocabulary of {self.vocab_size}; the tokenizer has "
                f"{len(self.tokenizer)}; take the model's own, or a model with an "
                "embedding of all of them"
            )

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        end: End | None = None,
    ) -> str:
        """The text of messages in the chat template.

        Args:
          end: how it ends; if not given, an assistant's message at the end is
            continued, and else an answer is opened.

        Raises:
          ValueError: there is no template, or it rejects them or leaves something out.
        """
        if self.tokenizer.chat_template is None:
            raise ValueError(
                "the tokenizer has no chat template; set data.chat_template: false"
            )
        template = self.tokenizer.get_chat_template(None, tools)
        if _AT_RANDOM.search(template):
            raise ValueError(
                "the chat template draws at random, so that no run could go on with "
                "the prompts it had"
            )
        for name in self.variables:
            if name in _GIVEN or not re.search(rf"\b{re.escape(name)}\b", template):
                raise ValueError(
                    f"the chat template has no variable {name!r} to set; see "
                    "data.chat_template_kwargs"
                )
        check_roles(messages, template)
        if end is None:
            answers = messages[-1]["role"] == "assistant"
            end = "continued" if answers else "opened"
        text = self._apply(template, messages, tools, end)
        for message in messages:
            role, said = message["role"], message["content"]
            if role != "assistant" and not says(text, said):
                raise ValueError(
                    f"the chat template leaves the {role} message out, which says "
                    f"{said!r:.200}"
                )
        if tools and self._apply(template, messages, None, end) == text:
            raise ValueError(
                "the chat template leaves out the column 'tools'; take one that "
                "prints tools, or drop the column"
            )
        return text

    def end_of_answer(self) -> int | None:
        """The token of its own that the chat template puts behind an answer; None if
        there is none, or no template."""
        if self.tokenizer.chat_template is None:
            return None
        template = self.tokenizer.get_chat_template(None, None)
        answer = "Answered."
        messages = [
            {"role": "user", "content": "Answer."},
            {"role": "assistant", "content": answer},
        ]
        try:
            text = self._apply(template, messages, None, "closed")
        except ValueError:
            return None
        _, found, end = text.rpartition(answer)
        tokens = self.tokenizer(end.strip(), add_special_tokens=False).input_ids
        own = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        return tokens[0] if found and tokens and tokens[0] in own else None

    def _apply(
        self,
        template: str,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        end: End,
    ) -> str:
        variables = dict(self.variables)
        if "strftime_now" in template:
            said = {code: self.now.strftime(code) for code in _CODES}
            template = _CLOCK + template
            variables["strftime_values"] = said
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) if tools else None,
                chat_template=template,
                add_generation_prompt=end == "opened",
                continue_final_message=end == "continued",
                tokenize=False,
                **variables,
            )
            check_text(text)
        except Exception as error:  # whatever a template's own code may raise
            raise ValueError(f"the chat template rejects it: {error}") from None
        return text


def _begun(alone: list[int], given: list[int]) -> list[int]:
    """Text with what the tokenizer puts before it, and nothing behind it.

    Args:
      alone: tokens of the text.
      given: with what the tokenizer puts around it.
    """
    count = len(alone)
    for start in range(len(given) - count + 1):
        if given[start : start + count] == alone:
            before = given[:start]
            return alone if alone[:start] == before else before + alone
    return given


def says(text: str, message: str) -> bool:
    """Whether a message's words stand in a rendered text, perhaps as JSON."""
    if message in text:
        return True
    words = re.sub(r"\W+", "", text)
    quoted = (json.dumps(message, ensure_ascii=ascii) for ascii in (False, True))
    return any(re.sub(r"\W+", "", form) in words for form in (message, *quoted))
