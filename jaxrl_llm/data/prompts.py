"""Rows of a data source -> tokenized prompts with their columns, and batches of them.

`sources.read_rows` gets the rows, `render` makes each a question, `Encoder` makes it
tokens; `load` does it for a whole source. `PromptBatches` deals them out.
"""

import hashlib
import json
import string
import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from jaxrl_llm.config.names import Overlong
from jaxrl_llm.data.chat_template import Encoder
from jaxrl_llm.data.messages import Content, content_of, identity, tools_of
from jaxrl_llm.data.sources import Row, Source, column, read_rows, where
from jaxrl_llm.data.types import Prompt

if TYPE_CHECKING:
    import transformers


Rendered = Mapping[int, tuple[Content, Row]]
"""Content and row of every question, by the row's index."""


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
    warnings: tuple[str, ...] = ()
    """What looks wrong about them."""


def load(
    train: Source | None,
    val: Source | None,
    encoder: Encoder,
    *,
    more_train: Mapping[str, Source] = MappingProxyType({}),
    more_val: Mapping[str, Source] = MappingProxyType({}),
    max_prompt_length: int,
    overlong_prompts: Overlong = "error",
    chat_template: bool = True,
) -> Datasets:
    """Reads, renders and tokenizes the training and the held-out questions.

    A prompt's id is the index of its row in the source, whatever else is left out.

    Args:
      train: questions to train on; those that also stand in `val` are left out. None
        to read the held-out questions only.
      val: held-out questions, or None.
      encoder: makes tokens of questions.
      more_train: more sets to train on by name, which becomes their column
        `data_source`; their ids follow those of `train`.
      more_val: the same of held-out questions.
      max_prompt_length: longest prompt in tokens, chat template included.
      overlong_prompts: what becomes of longer ones: an error, the last
        `max_prompt_length` tokens of each, or nothing.
      chat_template: put the tokenizer's chat template around every question.

    Raises:
      ValueError: a source, row or prompt that does not fit, or no prompt that is left.
    """
    held_out = [
        (name, source, _render_all(source, chat_template))
        for name, source in (*([(None, val)] if val else []), *more_val.items())
    ]
    questions = [
        (name, source, _render_all(source, chat_template))
        for name, source in (*([(None, train)] if train else []), *more_train.items())
    ]
    known = {
        one
        for _, source, rendered in held_out
        for content, row in rendered.values()
        for one in _identities(content, row, source)
    }
    limits = encoder, max_prompt_length, overlong_prompts
    train_prompts, removed, overlong = _tokenize_sets(questions, known, *limits)
    val_prompts, _, more = _tokenize_sets(held_out, set(), *limits)
    overlong += more
    return Datasets(
        train=train_prompts,
        val=val_prompts,
        dropped=overlong if overlong_prompts == "drop" else 0,
        truncated=overlong if overlong_prompts == "truncate" else 0,
        train_removed_as_held_out=removed,
        warnings=tuple(
            warning
            for _, source, rendered in questions
            for warning in _rendered_before(rendered, source, encoder)
        ),
    )


def _tokenize_sets(
    sets: Sequence[tuple[str | None, Source, Rendered]],
    held_out: Set[str],
    encoder: Encoder,
    limit: int,
    overlong_prompts: Overlong,
) -> tuple[list[Prompt], int, int]:
    """The prompts of all sets, how many were held out, and how many too long.

    Raises:
      ValueError: every question is held out, or a set has none that is short enough.
    """
    prompts: list[Prompt] = []
    before = removed = overlong = 0
    for name, source, rendered in sets:
        kept = {
            i: (content, row)
            for i, (content, row) in rendered.items()
            if held_out.isdisjoint(_identities(content, row, source))
        }
        removed += len(rendered) - len(kept)
        if kept:
            found, more = _tokenize_all(kept, source, encoder, limit, overlong_prompts)
            overlong += more
            if name is not None:
                found = [_told_apart(prompt, name, before) for prompt in found]
            prompts += found
        before += len(rendered)
    if sets and not prompts:
        paths = ", ".join(source.path for _, source, _ in sets)
        raise ValueError(
            f"data.train: all {removed} questions of {paths} also stand in data.val; "
            "take another split or seed"
        )
    return prompts, removed, overlong


def _told_apart(prompt: Prompt, name: str, before: int) -> Prompt:
    """A prompt of a further set, which `before` rows of other sets come before."""
    columns = {**prompt.columns, "data_source": name}
    return replace(prompt, id=prompt.id + before, columns=columns)


def read(
    source: Source, encoder: Encoder, *, chat_template: bool = True
) -> list[Prompt]:
    """Every question of one source as a prompt, however long.

    Raises:
      ValueError: the source, a row or a prompt does not fit.
    """
    rendered = _render_all(source, chat_template)
    return _tokenize_all(rendered, source, encoder, sys.maxsize, "error")[0]


def tokenize(
    content: Content, tokenizer: "transformers.PreTrainedTokenizerBase"
) -> tuple[int, ...]:
    """The tokens of one question; see `Encoder.encode`."""
    return Encoder(tokenizer=tokenizer).encode(content)


def _render_all(source: Source, chat_template: bool) -> Rendered:
    """Content and row of every question, by the row's index."""
    rendered = {}
    for i, row in enumerate(read_rows(source)):
        try:
            rendered[i] = render(row, source, chat_template=chat_template), row
        except ValueError as error:
            raise ValueError(f"{where(source, i)}: {error}") from None
    return rendered


def _tokenize_all(
    rendered: Rendered,
    source: Source,
    encoder: Encoder,
    limit: int,
    overlong_prompts: Overlong,
) -> tuple[list[Prompt], int]:
    """The prompts that are kept, and how many were longer than `limit` tokens."""
    prompts, overlong = [], 0
    questions = []
    for i, (content, row) in rendered.items():
        try:
            questions.append((content, tools_of(row)))
        except ValueError as error:
            raise ValueError(f"{where(source, i)}: {error}") from None
    encoded = encoder.encode_all(questions)
    for (i, (content, row)), tokens in zip(rendered.items(), encoded, strict=True):
        if isinstance(tokens, ValueError):
            raise ValueError(f"{where(source, i)}: {tokens}") from None
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
        question = _asked(row, source)
        text = None
        if isinstance(question, str) and not isinstance(content, str):
            text = content[-1]["content"]
        prompts.append(
            Prompt(id=i, content=content, tokens=tokens, columns=columns, text=text)
        )
    if not prompts:
        raise ValueError(
            f"{source.path}: every prompt is longer than data.max_prompt_length, "
            f"{limit} tokens"
        )
    return prompts, overlong


def _identities(content: Content, row: Row, source: Source) -> Iterator[str]:
    """What a question is known by: as it is asked, and as it was before it was put into
    a template that holds nothing else of the row. An episode is known by its seed: what
    is asked comes from it."""
    if _begins_episodes(source):
        yield f"episodes:{row['seed']}"
        return
    yield identity(content)
    template = source.prompt_template
    if template is not None and _placeholders(template) == {source.prompt_key}:
        yield identity(content_of(column(row, source.prompt_key), source.prompt_key))


def _placeholders(template: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(template) if name}


def _rendered_before(
    questions: Rendered, source: Source, encoder: Encoder
) -> Iterator[str]:
    """A warning if questions hold the chat template's own tokens."""
    special = [text for text in encoder.tokenizer.all_special_tokens if text.strip()]
    for i, (content, _) in questions.items():
        texts = [] if isinstance(content, str) else [m["content"] for m in content]
        for token in special:
            if any(token in text for text in texts):
                yield (
                    f"{where(source, i)}: the question itself holds the special token "
                    f"{token!r}; if it went through a chat template already, set "
                    "data.chat_template: false"
                )
                return


def render(row: Row, source: Source, *, chat_template: bool) -> Content:
    """The question: chat messages if a chat template will be put around it, else text.

    Raises:
      ValueError: no question, a template that does not fit the columns, or messages
        where only text is possible.
    """
    question = _asked(row, source)
    if source.prompt_template is not None:
        if not isinstance(question, str):
            raise ValueError("prompt_template cannot be put around chat messages")
        question = _fill(source.prompt_template, row)
    if not chat_template:
        if not isinstance(question, str):
            raise ValueError("chat messages need a chat template: data.chat_template")
        if source.system_prompt is not None:
            raise ValueError(
                "system_prompt needs data.chat_template; without one, put its text "
                "into prompt_template"
            )
        return question
    messages = question
    if isinstance(question, str):
        messages = [{"role": "user", "content": question}]
    if source.system_prompt is None:
        return messages
    if messages[0]["role"] in ("system", "developer"):
        raise ValueError("system_prompt is set, but the row has a system message")
    return [{"role": "system", "content": source.system_prompt}, *messages]


def _asked(row: Row, source: Source) -> Content:
    """The question in a row; empty where an environment will say all of it."""
    question = column(row, source.prompt_key)
    if _begins_episodes(source) and not question:
        return ""
    return content_of(question, source.prompt_key)


def _begins_episodes(source: Source) -> bool:
    return source.path.startswith("episodes:")


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


def digests(prompts: Sequence[Prompt]) -> dict[str, str]:
    """For the questions and for each column, the first 16 digits of a sha256."""
    found: dict[str, Any] = {}
    for prompt in prompts:
        for name, value in [("prompt", prompt.content), *prompt.columns.items()]:
            known = found.setdefault(f"column {name!r}", hashlib.sha256())
            text = json.dumps(value, sort_keys=True, default=str)
            known.update(f"{prompt.id}:{text}\n".encode())
    return {name: known.hexdigest()[:16] for name, known in found.items()}
