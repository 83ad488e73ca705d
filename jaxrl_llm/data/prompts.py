"""Rows of a data source -> tokenized prompts with their columns, and batches of them.

`sources.read_rows` gets the rows, `render` makes each a question, `tokenize` makes it
tokens; `load` does it for a whole source. `PromptBatches` deals them out.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2

from jaxrl_llm.config.names import Overlong
from jaxrl_llm.data.sources import Row, Source, column, read_rows, where
from jaxrl_llm.data.types import Message, Prompt

if TYPE_CHECKING:
    import transformers


Content = str | list[Message]


@dataclass(frozen=True, kw_only=True)
class Datasets:
    """All prompts of a run."""

    train: list[Prompt]
    val: list[Prompt]
    """Empty if there is no held-out data."""
    dropped: int
    """Prompts of both left out because they are too long."""
    truncated: int
    """Prompts of both cut to the longest that is allowed."""
    train_removed_as_held_out: int
    """Training prompts left out because the same question stands in `val`."""


def load(
    train: Source,
    val: Source | None,
    tokenizer: "transformers.PreTrainedTokenizerBase",
    *,
    max_prompt_length: int,
    overlong_prompts: Overlong = "error",
    chat_template: bool = True,
) -> Datasets:
    """Reads, renders and tokenizes the training and the held-out questions.

    A prompt's id is the index of its row in the source, whatever else is left out.

    Args:
      train: questions to train on; those that also stand in `val` are left out.
      val: held-out questions, or None.
      tokenizer: the model's.
      max_prompt_length: longest prompt in tokens, chat template included.
      overlong_prompts: what becomes of longer ones: an error, the last
        `max_prompt_length` tokens of each, or nothing.
      chat_template: put the tokenizer's chat template around every question.

    Raises:
      ValueError: a source, row or prompt that does not fit, or no prompt that is left.
    """
    held_out = _render_all(val, chat_template) if val else {}
    questions = _render_all(train, chat_template)
    known = {_identity(content) for content, _ in held_out.values()}
    kept = {
        i: (content, row)
        for i, (content, row) in questions.items()
        if _identity(content) not in known
    }
    removed = len(questions) - len(kept)
    if not kept:
        raise ValueError(
            f"data.train: all {removed} questions of {train.path} also stand in "
            "data.val; take another split or seed"
        )
    limits = max_prompt_length, overlong_prompts
    train_prompts, overlong = _tokenize_all(kept, train, tokenizer, *limits)
    val_prompts: list[Prompt] = []
    if val:
        val_prompts, more = _tokenize_all(held_out, val, tokenizer, *limits)
        overlong += more
    return Datasets(
        train=train_prompts,
        val=val_prompts,
        dropped=overlong if overlong_prompts == "drop" else 0,
        truncated=overlong if overlong_prompts == "truncate" else 0,
        train_removed_as_held_out=removed,
    )


def read(
    source: Source,
    tokenizer: "transformers.PreTrainedTokenizerBase",
    *,
    chat_template: bool = True,
) -> list[Prompt]:
    """Every question of one source as a prompt, however long.

    Raises:
      ValueError: the source, a row or a prompt does not fit.
    """
    rendered = _render_all(source, chat_template)
    return _tokenize_all(rendered, source, tokenizer, sys.maxsize, "error")[0]


def _render_all(source: Source, chat_template: bool) -> dict[int, tuple[Content, Row]]:
    """Content and row of every question, by the row's index."""
    rendered = {}
    for i, row in enumerate(read_rows(source)):
        try:
            rendered[i] = render(row, source, chat_template=chat_template), row
        except ValueError as error:
            raise ValueError(f"{where(source, i)}: {error}") from None
    return rendered


def _tokenize_all(
    rendered: Mapping[int, tuple[Content, Row]],
    source: Source,
    tokenizer: "transformers.PreTrainedTokenizerBase",
    limit: int,
    overlong_prompts: Overlong,
) -> tuple[list[Prompt], int]:
    """The prompts that are kept, and how many were longer than `limit` tokens."""
    prompts, overlong = [], 0
    for i, (content, row) in rendered.items():
        try:
            tokens = tokenize(content, tokenizer)
        except ValueError as error:
            raise ValueError(f"{where(source, i)}: {error}") from None
        if len(tokens) > limit:
            overlong += 1
            match overlong_prompts:
                case "error":
                    raise ValueError(
                        f"{where(source, i)}: the prompt has {len(tokens)} tokens, "
                        f"data.max_prompt_length is {limit}; raise it, or set "
                        "data.overlong_prompts to truncate or drop"
                    )
                case "drop":
                    continue
                case "truncate":
                    tokens = tokens[-limit:]
        columns = {key: value for key, value in row.items() if key != "prompt"}
        prompts.append(Prompt(id=i, content=content, tokens=tokens, columns=columns))
    if not prompts:
        raise ValueError(
            f"{source.path}: every prompt is longer than data.max_prompt_length, "
            f"{limit} tokens"
        )
    return prompts, overlong


def _identity(content: Content) -> str:
    return json.dumps(content, sort_keys=True, default=str)


def render(row: Row, source: Source, *, chat_template: bool) -> Content:
    """The question: chat messages if a chat template will be put around it, else text.

    Raises:
      ValueError: no question, a template that does not fit the columns, or messages
        where only text is possible.
    """
    question = column(row, source.prompt_key)
    if source.prompt_template is not None:
        if not isinstance(question, str):
            raise ValueError("prompt_template cannot be put around chat messages")
        question = _fill(source.prompt_template, row)
    if isinstance(question, str):
        if not question.strip():
            raise ValueError(f"column {source.prompt_key!r} is empty")
        messages = [{"role": "user", "content": question}]
    else:
        messages = _checked(question, source.prompt_key)
    if not chat_template:
        if not isinstance(question, str):
            raise ValueError("chat messages need a chat template: data.chat_template")
        if source.system_prompt is not None:
            raise ValueError(
                "system_prompt needs data.chat_template; without one, put its text "
                "into prompt_template"
            )
        return question
    if source.system_prompt is None:
        return messages
    if messages[0]["role"] == "system":
        raise ValueError("system_prompt is set, but the row has a system message")
    return [{"role": "system", "content": source.system_prompt}, *messages]


def _fill(template: str, row: Row) -> str:
    try:
        return template.format(**row)
    except KeyError as error:
        raise ValueError(
            f"prompt_template has the placeholder {{{error.args[0]}}}, the columns are "
            f"{list(row)}"
        ) from None
    except (IndexError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"prompt_template cannot be filled ({error}); it is {template!r}; "
            "write {{ and }} for braces that are text"
        ) from None


def _checked(messages: Any, key: str) -> list[Message]:
    if not isinstance(messages, Sequence) or not messages:
        raise ValueError(
            f"column {key!r} must be text or a list of chat messages, got {messages!r}"
        )
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ValueError(
                f"column {key!r}: a chat message has role and content, got {message!r}"
            )
    return list(messages)


def tokenize(
    content: Content, tokenizer: "transformers.PreTrainedTokenizerBase"
) -> tuple[int, ...]:
    """The tokens the model continues: text as it is, messages in the chat template.

    After a user's message the template opens the assistant's; an assistant's message at
    the end is left open, to be continued.

    Raises:
      ValueError: messages but no chat template, one that rejects them, or no tokens.
    """
    if isinstance(content, str):
        tokens = tokenizer(content).input_ids
    elif tokenizer.chat_template is None:
        raise ValueError(
            "the tokenizer has no chat template; set data.chat_template: false"
        )
    else:
        unfinished = content[-1]["role"] == "assistant"
        try:
            tokens = tokenizer.apply_chat_template(
                content,
                add_generation_prompt=not unfinished,
                continue_final_message=unfinished,
                tokenize=True,
                return_dict=False,
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template rejects it: {error}") from None
    if not tokens:
        raise ValueError("the prompt has no tokens")
    return tuple(tokens)
