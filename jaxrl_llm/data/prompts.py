"""Rows of a data source -> tokenized prompts with their columns, and batches of them.

`sources.read_rows` gets the rows, `render` makes each a question, `tokenize` makes it
tokens; `load` does it for a whole config. `PromptBatches` deals them out.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2

from jaxrl_llm.config.schema import DataConfig, DatasetConfig
from jaxrl_llm.data.sources import Row, column, read_rows, where
from jaxrl_llm.data.types import Message, Prompt

if TYPE_CHECKING:
    import transformers


Content = str | list[Message]


@dataclass(frozen=True, kw_only=True)
class Datasets:
    """All prompts of a run."""

    train: list[Prompt]
    val: list[Prompt]
    """Empty if the config has no held-out data."""
    dropped: int
    """Prompts of both left out because they are too long."""
    truncated: int
    """Prompts of both cut to data.max_prompt_length."""
    train_removed_as_held_out: int
    """Training prompts left out because the same question stands in `val`."""


def load(
    config: DataConfig, tokenizer: "transformers.PreTrainedTokenizerBase"
) -> Datasets:
    """Reads, renders and tokenizes the training and the held-out questions.

    A prompt's id is the index of its row in the source, whatever else is left out.

    Raises:
      ValueError: a source, row or prompt that does not fit, or no prompt that is left.
    """
    val = _render_all(config.val, config.chat_template) if config.val else {}
    train = _render_all(config.train, config.chat_template)
    held_out = {_identity(content) for content, _ in val.values()}
    kept = {
        i: (content, row)
        for i, (content, row) in train.items()
        if _identity(content) not in held_out
    }
    removed = len(train) - len(kept)
    if not kept:
        raise ValueError(
            f"data.train: all {removed} questions of {config.train.path} also stand in "
            "data.val; take another split or seed"
        )
    train_prompts, overlong = _tokenize_all(kept, config.train, config, tokenizer)
    val_prompts: list[Prompt] = []
    if config.val:
        val_prompts, more = _tokenize_all(val, config.val, config, tokenizer)
        overlong += more
    return Datasets(
        train=train_prompts,
        val=val_prompts,
        dropped=overlong if config.overlong_prompts == "drop" else 0,
        truncated=overlong if config.overlong_prompts == "truncate" else 0,
        train_removed_as_held_out=removed,
    )


def _render_all(
    dataset: DatasetConfig, chat_template: bool
) -> dict[int, tuple[Content, Row]]:
    """Content and row of every question, by the row's index."""
    rendered = {}
    for i, row in enumerate(read_rows(dataset)):
        try:
            rendered[i] = render(row, dataset, chat_template=chat_template), row
        except ValueError as error:
            raise ValueError(f"{where(dataset, i)}: {error}") from None
    return rendered


def _tokenize_all(
    rendered: Mapping[int, tuple[Content, Row]],
    dataset: DatasetConfig,
    config: DataConfig,
    tokenizer: "transformers.PreTrainedTokenizerBase",
) -> tuple[list[Prompt], int]:
    """The prompts that are kept, and how many were too long."""
    prompts, overlong = [], 0
    limit = config.max_prompt_length
    for i, (content, row) in rendered.items():
        try:
            tokens = tokenize(content, tokenizer)
        except ValueError as error:
            raise ValueError(f"{where(dataset, i)}: {error}") from None
        if len(tokens) > limit:
            overlong += 1
            match config.overlong_prompts:
                case "error":
                    raise ValueError(
                        f"{where(dataset, i)}: the prompt has {len(tokens)} tokens, "
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
            f"{dataset.path}: every prompt is longer than data.max_prompt_length, "
            f"{limit} tokens"
        )
    return prompts, overlong


def _identity(content: Content) -> str:
    return json.dumps(content, sort_keys=True, default=str)


def render(row: Row, config: DatasetConfig, *, chat_template: bool) -> Content:
    """The question: chat messages if a chat template will be put around it, else text.

    Raises:
      ValueError: no question, a template that does not fit the columns, or messages
        where only text is possible.
    """
    question = column(row, config.prompt_key)
    if config.prompt_template is not None:
        if not isinstance(question, str):
            raise ValueError("prompt_template cannot be put around chat messages")
        question = _fill(config.prompt_template, row)
    if isinstance(question, str):
        if not question.strip():
            raise ValueError(f"column {config.prompt_key!r} is empty")
        messages = [{"role": "user", "content": question}]
    else:
        messages = _checked(question, config.prompt_key)
    if not chat_template:
        if not isinstance(question, str):
            raise ValueError("chat messages need a chat template: data.chat_template")
        if config.system_prompt is not None:
            raise ValueError(
                "system_prompt needs data.chat_template; without one, put its text "
                "into prompt_template"
            )
        return question
    if config.system_prompt is None:
        return messages
    if messages[0]["role"] == "system":
        raise ValueError("system_prompt is set, but the row has a system message")
    return [{"role": "system", "content": config.system_prompt}, *messages]


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
