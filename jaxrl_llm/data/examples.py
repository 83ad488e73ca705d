"""Rows of a data source -> examples to learn from: tokens, and what of it is learned.

TRL's formats: `messages`; `prompt` and `completion`, each text or messages; `text`.
What is learned of a conversation is found by rendering its beginnings: where an answer
begins and ends is where the text of the messages before it, and with it, ends. Nothing
is asked of the template but that these texts are beginnings of the whole one, and that
is checked.
"""

import functools
import hashlib
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxrl_llm.config.names import Overlong
from jaxrl_llm.data import packing, prompts
from jaxrl_llm.data.chat_template import Encoder, says
from jaxrl_llm.data.messages import Content, content_of, tools_of
from jaxrl_llm.data.packing import Layout
from jaxrl_llm.data.rows import TrainBatch
from jaxrl_llm.data.sources import Row, Source, column, rows_as_they_are, where
from jaxrl_llm.data.types import Episode, Message, Prompt, Turn


@dataclass(frozen=True, kw_only=True)
class Example:
    """A prompt, and what is to be learned of answers to it. Lives on the host."""

    prompt: Prompt
    """Its tokens are read, and never learned."""
    episodes: tuple[Episode, ...]
    """What follows the prompt, of which the response mask marks what is learned: one
    answer, or several that are compared."""

    @property
    def id(self) -> int:
        """Index of its row in the data set."""
        return self.prompt.id

    @functools.cached_property
    def tokens(self) -> tuple[int, ...]:
        """Those of the prompt, and of all that follows it."""
        found = [np.asarray(self.prompt.tokens), *(e.tokens for e in self.episodes)]
        return tuple(np.concatenate(found).tolist())

    @property
    def lengths(self) -> list[int]:
        """Tokens of the prompt and of each that follows it."""
        return [len(self.prompt.tokens) + len(e.tokens) for e in self.episodes]

    @property
    def num_learned(self) -> int:
        """Tokens that are learned."""
        return sum(int(episode.response_mask.sum()) for episode in self.episodes)


@dataclass(frozen=True, kw_only=True)
class ExampleSets:
    """All examples of a run, and what became of the others."""

    train: list[Example]
    val: list[Example]
    """Empty if there are no held-out rows."""
    dropped: int = 0
    """Rows of both left out because they are too long."""
    truncated: int = 0
    """Rows of both cut to the longest that is allowed."""
    train_removed_as_held_out: int = 0
    """Training rows left out because their prompt is also held out."""
    warnings: tuple[str, ...] = ()
    """What looks wrong about them."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """How rows become examples."""

    chat_template: Literal["messages", "all"] = "messages"
    """all: a prompt and a completion that are text become a user's and an assistant's
    message. messages: text stays text, as in TRL."""
    completion_key: str = "completion"
    messages_key: str = "messages"
    text_key: str = "text"
    completion_only: bool = True
    """Only the completion is learned, where a row has a prompt too."""
    assistant_only: bool = True
    """Only the assistant's messages are learned."""
    stops: frozenset[int] = frozenset()
    """Tokens that end an answer of the model's."""
    end: int | None = None
    """The one of them that is put behind text, and behind a last answer that the chat
    template does not end."""
    max_length: int = 1024
    """Tokens of the longest example."""
    overlong: Overlong = "error"
    """What becomes of longer ones: an error, the first `max_length` tokens, nothing."""


class Encoded(NamedTuple):
    """The tokens of one example."""

    tokens: list[int]
    learned: list[bool]
    """Whether each is learned."""
    apart: bool = False
    """Whether tokens would reach over the border of an answer, so that what lies on the
    two sides of it was tokenized by itself."""


def load(
    train: Source,
    val: Source | None,
    encoder: Encoder,
    form: Format,
    *,
    held_out: Iterable[Prompt] = (),
    template: str = "the chat template",
    reader: Callable[[Source, Encoder, Format, str, str], "Read"],
) -> ExampleSets:
    """Reads and tokenizes the rows to learn from, and the held-out ones.

    Args:
      train: rows to learn from; those whose prompt (or whose whole text, without one)
        is also held out are left out.
      held_out: prompts that are answered in validations.
      template: what errors call the chat template.
      reader: of one source, such as `read`.

    Raises:
      ValueError: a source or row that does not fit, or no example that is left.
    """
    others = None
    kept = reader(train, encoder, form, "data.train", template)
    if val:
        others = reader(val, encoder, form, "data.val", template)
    known = {tuple(prompt.tokens) for prompt in held_out}
    known |= {_question(example) for example in (others.examples if others else ())}
    left = [one for one in kept.examples if _question(one) not in known]
    if not left:
        raise ValueError(
            f"data.train: all {len(kept.examples)} rows of {train.path} are also held "
            "out; take another split or seed"
        )
    sets = [kept] if others is None else [kept, others]
    overlong = sum(one.overlong for one in sets)
    warnings = [text for one in sets for text in one.warnings]
    if overlong:
        what = "left out" if form.overlong == "drop" else "cut, or left out"
        warnings.append(
            f"{overlong} rows are longer than data.max_length, {form.max_length} "
            f"tokens, and are {what} (data.overlong: {form.overlong})"
        )
    return ExampleSets(
        train=left,
        val=others.examples if others else [],
        dropped=overlong if form.overlong == "drop" else 0,
        truncated=overlong if form.overlong == "truncate" else 0,
        train_removed_as_held_out=len(kept.examples) - len(left),
        warnings=tuple(warnings),
    )


class Read(NamedTuple):
    """The examples of one source."""

    examples: list[Example]
    overlong: int
    """Rows that were too long."""
    warnings: list[str]


def read(
    source: Source, encoder: Encoder, form: Format, key: str, template: str
) -> Read:
    """The rows of one source as examples for supervised fine-tuning.

    Args:
      key: what errors call the source.
      template: what errors call the chat template.

    Raises:
      ValueError: a row does not fit, or none is short enough.
    """
    found, overlong, apart = [], 0, 0
    rows = rows_as_they_are(source)
    steps = (_encoding(row, source, encoder, form, template) for row in rows)
    for i, (row, encoded) in enumerate(
        zip(rows, _together(steps, encoder), strict=True)
    ):
        try:
            if isinstance(encoded, ValueError):
                raise encoded
            if len(encoded.tokens) > form.max_length:
                overlong += 1
                if form.overlong == "error":
                    raise ValueError(
                        f"it has {len(encoded.tokens)} tokens, data.max_length is "
                        f"{form.max_length}; raise it, or set data.overlong to "
                        "truncate or drop"
                    )
                cut = [part[: form.max_length] for part in encoded[:2]]
                if form.overlong == "drop" or not any(cut[1]):
                    continue
                encoded = Encoded(*cut, apart=encoded.apart)
            found.append(example_of(i, encoded, row))
        except ValueError as error:
            raise ValueError(f"{where(source, i)}: {error}") from None
        apart += encoded.apart
    if not found:
        raise ValueError(
            f"{key}: of every row of {source.path}, what is to be learned lies behind "
            f"data.max_length, {form.max_length} tokens"
        )
    warnings = []
    if apart:
        warnings.append(
            f"{source.path}: in {apart} of {len(found)} rows a token would reach from "
            "the prompt into the answer; these are tokenized apart, as the model reads "
            "and writes them (end prompts where a token ends, such as before a space)"
        )
    return Read(found, overlong, warnings)


def encode(
    row: Row, source: Source, encoder: Encoder, form: Format, template: str
) -> Encoded:
    """The tokens of a row in one of TRL's formats, and which of them are learned: of a
    prompt and its completion the completion, of messages the assistant's, of text all.

    Raises:
      ValueError: the row has no such columns, or they do not fit.
    """
    steps = [_encoding(row, source, encoder, form, template)]
    (found,) = _together(steps, encoder)
    if isinstance(found, ValueError):
        raise found
    return found


_Asked = list[tuple[str, bool]]
"""Texts, and whether each is whole, with what the tokenizer puts before a text."""
_Steps = Generator[_Asked, list[Any], Encoded]
"""How one row is encoded: asks for the tokens of texts, and goes on with them. So the
texts of many rows are tokenized together, on all cores."""

_AT_ONCE = 10_000
"""Rows whose texts are held at a time."""


def _together(
    steps: Iterable[_Steps], encoder: Encoder
) -> Iterator[Encoded | ValueError]:
    """What comes of each row, or what is wrong with it."""
    rest = iter(steps)
    while part := list(itertools.islice(rest, _AT_ONCE)):
        found: list[Any] = [None] * len(part)
        asked, answers = {}, dict.fromkeys(range(len(part)))
        while answers:
            asked.clear()
            for i, answer in answers.items():
                try:
                    asked[i] = part[i].send(answer)
                except StopIteration as end:
                    found[i] = end.value
                except ValueError as error:
                    found[i] = error
            answers = _answered(asked, encoder)
        yield from found


def _answered(asked: Mapping[int, _Asked], encoder: Encoder) -> dict[int, list[Any]]:
    """The tokens of all texts that rows ask for, or what is wrong with a text."""
    every = [one for texts in asked.values() for one in texts]
    whole = iter(encoder.encode_all([(text, None) for text, is_all in every if is_all]))
    parts = iter(encoder.tokens_of([text for text, is_all in every if not is_all]))
    return {
        i: [next(whole if is_all else parts) for _, is_all in texts]
        for i, texts in asked.items()
    }


def _encoding(
    row: Row, source: Source, encoder: Encoder, form: Format, template: str
) -> _Steps:
    """`encode`, step by step."""
    completion = _column(row, form.completion_key)
    if completion is not None:
        completion = content_of(completion, form.completion_key)
        if _column(row, source.prompt_key) is None:
            raise ValueError(
                f"it has {form.completion_key!r}, but no column {source.prompt_key!r}; "
                f"it has {list(row)}"
            )
        asked = content_of(column(row, source.prompt_key), source.prompt_key)
        is_text = isinstance(asked, str) and isinstance(completion, str)
        chat = form.chat_template == "all" or not is_text
        before = prompts.render(row, source, chat_template=chat)
        if not chat:
            encoded = yield from _text_steps(before, completion, form)
        else:
            if isinstance(completion, str):
                completion = [{"role": "assistant", "content": completion}]
            encoded = yield from _message_steps(
                [*before, *completion],
                tools_of(row),
                encoder,
                form,
                template,
                first=len(before),
            )
    elif (messages := _column(row, form.messages_key)) is not None:
        messages = content_of(messages, form.messages_key)
        if isinstance(messages, str):
            raise ValueError(f"column {form.messages_key!r} must be chat messages")
        messages = _with_system(messages, source)
        tools = tools_of(row)
        encoded = yield from _message_steps(messages, tools, encoder, form, template)
    elif isinstance(text := _column(row, form.text_key), str) and text:
        encoded = yield from _text_steps("", text, form)
    else:
        raise ValueError(
            f"it has the columns {list(row)}; an example has {source.prompt_key!r} and "
            f"{form.completion_key!r}, or {form.messages_key!r}, or {form.text_key!r} "
            "(see completion_key, messages_key and text_key)"
        )
    encoder.check_vocabulary(encoded.tokens)
    if not any(encoded.learned[1:]):
        raise ValueError("nothing of it is learned: it has no answer of the assistant")
    return encoded


def _text_steps(before: str, text: str, form: Format) -> _Steps:
    """Text behind other text, as a tokenizer has them together if no token reaches over
    the border, then the token that ends an answer, if it is not there.

    Args:
      before: "" for none.

    Raises:
      ValueError: there is no text, or a token that the model does not know.
    """
    border, apart = 0, False
    asked = [
        (before + text, True),
        *([(before, True), (text, False)] if before else []),
    ]
    found = yield asked
    if wrong := [one for one in found if isinstance(one, ValueError)]:
        raise wrong[0]
    tokens = list(found[0])
    if before:
        first = list(found[1])
        border = len(first)
        apart = tokens[:border] != first
        if apart:
            tokens = [*first, *found[2]]
    if tokens[-1] not in form.stops:
        tokens = [*tokens, end_token(form)]
    learned = [i >= (border if form.completion_only else 0) for i in range(len(tokens))]
    return Encoded(tokens, learned, apart)


def _message_steps(
    messages: Sequence[Message],
    tools: Sequence[Any] | None,
    encoder: Encoder,
    form: Format,
    template: str,
    *,
    first: int = 0,
) -> _Steps:
    """Messages in the chat template, and which of their tokens are learned.

    Each answer of the assistant that is learned ends with a stop token of the model's,
    which is learned too; what the template puts behind it is not.

    Args:
      first: the completion begins with this message.

    Raises:
      ValueError: the template is not prefix-stable, or does not end an answer.
    """
    text, count = encoder.render(messages, tools, "closed"), len(messages)
    start = first if form.completion_only else 0
    answers = [i for i in range(start, count) if messages[i]["role"] == "assistant"]
    asked = set(answers)
    if not form.assistant_only:  # only the last is looked at, for its end
        answers = [i for i in answers if i + 1 == count]
        asked = {*answers, *([start] if start else [])}
    spans = {
        i: _span(messages, i, text, tools, encoder, template) for i in sorted(asked)
    }
    tokens, borders, apart = yield from _tokens(text, spans, encoder)
    learned = [False] * len(tokens)
    if not form.assistant_only:
        begin = borders[start][0] if start else 0
        learned[begin:] = [True] * (len(tokens) - begin)
    for i in answers:
        begin, end = borders[i]
        stop = next((n for n in range(end)[::-1] if tokens[n] in form.stops), -1)
        if stop < begin:
            check_unended(i, count, encoder, form, template)
            stop, tokens = end, [*tokens, end_token(form)]
        learned[begin : stop + 1] = [True] * (stop + 1 - begin)
    if form.assistant_only:
        tokens = tokens[: max((n + 1 for n, x in enumerate(learned) if x), default=1)]
    return Encoded(tokens, learned[: len(tokens)], apart)


def _span(
    messages: Sequence[Message],
    i: int,
    text: str,
    tools: Sequence[Any] | None,
    encoder: Encoder,
    template: str,
) -> tuple[int, int]:
    """Where message i begins and ends in the text of all messages.

    Raises:
      ValueError: it cannot be told, or the template leaves part of the message out.
    """
    ends = i + 1 < len(messages)
    if i == 0:
        raise ValueError(
            "the conversation begins with the assistant, so nothing asks for the first "
            "answer; begin with a user's message"
        )
    before = encoder.render(messages[:i], tools, "opened")
    upto = encoder.render(messages[: i + 1], tools, "closed") if ends else text
    for shorter, longer, what in (
        (before, upto, f"the {i} messages before message {i} (from 0)"),
        (upto, text, f"messages 0 to {i}"),
    ):
        if not longer.startswith(shorter):
            at = next(
                (n for n, (a, b) in enumerate(zip(shorter, longer, strict=False))
                 if a != b),
                min(len(shorter), len(longer)),
            )  # fmt: skip
            raise ValueError(
                f"{template} is not prefix-stable: {what} end in "
                f"{shorter[max(at - 20, 0) : at + 40]!r} by themselves, but in "
                f"{longer[max(at - 20, 0) : at + 40]!r} with what follows, so that the "
                "model would learn to answer what it never reads. Give each answer a "
                "row of its own (prompt and completion), or another template in "
                "data.chat_template_file"
            )
    said = messages[i]["content"]
    if not says(upto[len(before) :], said):
        raise ValueError(
            f"{template} leaves part of message {i} (from 0) out, the assistant's, "
            f"which says {said!r:.200}"
        )
    return len(before), len(upto)


def _tokens(
    text: str, spans: Mapping[int, tuple[int, int]], encoder: Encoder
) -> Generator[_Asked, list[Any], tuple[list[int], dict[int, tuple[int, int]], bool]]:
    """The tokens of a text, those that each span begins and ends at, and whether text
    within and outside of spans was tokenized apart because tokens reach over it."""
    marks = sorted({mark for span in spans.values() for mark in span} | {len(text)})
    beginnings = yield [(text[:mark], False) for mark in marks]
    whole, counts, apart = list(beginnings[-1]), {}, False
    for mark, found in zip(marks, beginnings, strict=True):
        apart |= whole[: len(found)] != found
        counts[mark] = len(found)
    if apart:
        ends = list(itertools.pairwise([0, *marks]))
        pieces = yield [(text[begin:end], False) for begin, end in ends]
        whole = []
        for mark, piece in zip(marks, pieces, strict=True):
            whole += piece
            counts[mark] = len(whole)
    bos = encoder.tokenizer.bos_token_id
    twice = bos is not None and whole[:2] == [bos, bos]
    borders = {i: tuple(counts[mark] - twice for mark in span)
               for i, span in spans.items()}  # fmt: skip
    return whole[twice:], borders, apart


def check_unended(
    i: int, count: int, encoder: Encoder, form: Format, template: str
) -> None:
    """Raises ValueError unless message i is the last of `count`, and the template puts
    no token of its own behind an answer."""
    own = encoder.end_of_answer()
    if own is not None and own not in form.stops:
        text = encoder.tokenizer.convert_ids_to_tokens(own)
        known = encoder.tokenizer.convert_ids_to_tokens(sorted(form.stops))
        raise ValueError(
            f"{template} ends an answer with {text!r}, at which the model does not "
            f"stop (it stops at {', '.join(map(repr, known)) or 'nothing'}); set "
            f"data.end_of_turn={text!r}, which is then exported with the weights"
        )
    if i + 1 < count:
        raise ValueError(
            f"{template} puts no stop token behind message {i} (from 0), so that the "
            "model would learn to go on; give each answer a row of its own"
        )


def end_token(form: Format) -> int:
    """What is put behind an answer that nothing ends.

    Raises:
      ValueError: there is no such token.
    """
    if form.end is None:
        raise ValueError(
            "nothing ends an answer: neither the model nor its tokenizer names an end "
            "of sequences; set data.end_of_turn to the text of a token that does"
        )
    return form.end


def example_of(index: int, encoded: Encoded, row: Mapping[str, Any]) -> Example:
    """The tokens before the first that is learned as a prompt, the others behind it."""
    learned = np.array(encoded.learned, bool)
    learned[0] = False  # nothing comes before it
    if not learned.any():
        raise ValueError("nothing of it is learned: it has one token")
    begin = int(learned.argmax())
    return Example(
        prompt=Prompt(
            id=index,
            content="",
            tokens=tuple(encoded.tokens[:begin]),
            columns=dict(row),
        ),
        episodes=(episode_of(index, 0, encoded.tokens[begin:], learned[begin:]),),
    )


def episode_of(
    index: int, sample: int, tokens: Sequence[int], learned: Sequence[bool] | np.ndarray
) -> Episode:
    """What follows a prompt, as an episode of one turn."""
    count = len(tokens)
    turn = Turn(
        role="assistant",
        tokens=np.asarray(tokens, np.int32),
        response_mask=np.asarray(learned, bool),
        logprobs=np.zeros(count, np.float32),
        weight_versions=np.zeros(count, np.int32),
        finish_reason="stop",
        text="",
    )
    return Episode(prompt_id=index, sample=sample, turns=(turn,))


def make_rows(examples: Sequence[Example], layout: Layout) -> TrainBatch:
    """The examples laid out as NumPy rows; all have as many episodes."""
    count = len(examples[0].episodes)
    return packing.make_rows(
        [example.prompt for example in examples],
        [example.episodes for example in examples],
        np.zeros((len(examples), count), np.float32),
        layout=layout,
    )


def longest_of(lengths: Sequence[int], count: int) -> list[Example]:
    """So many made-up examples, each with episodes of such lengths with its prompt."""
    prompt = Prompt(id=0, content="", tokens=(0,), columns={})
    episodes = tuple(
        episode_of(0, i, [0] * (n - 1), [True] * (n - 1)) for i, n in enumerate(lengths)
    )
    return [Example(prompt=prompt, episodes=episodes)] * count


def digests(examples: Sequence[Example]) -> dict[str, str]:
    """The first 16 digits of a sha256 of all tokens, and of which are learned."""
    tokens, learned = hashlib.sha256(), hashlib.sha256()
    for example in examples:
        tokens.update(np.array([*example.lengths, *example.tokens], "<i8").tobytes())
        for episode in example.episodes:
            learned.update(np.packbits(episode.response_mask).tobytes())
    if not examples:
        return {}
    found = {"the text": tokens, "what is learned": learned}
    return {name: one.hexdigest()[:16] for name, one in found.items()}


def _question(example: Example) -> tuple[int, ...]:
    """What an example is known by: its prompt, or all of it where that is a token."""
    prompt = tuple(example.prompt.tokens)
    return prompt if len(prompt) > 1 else example.tokens


def _column(row: Row, key: str) -> Any:
    """A column's value; None if there is no such column, or nothing in it."""
    try:
        return column(row, key)
    except KeyError:
        return None


def _with_system(messages: Content, source: Source) -> Content:
    if source.system_prompt is None:
        return messages
    if messages[0]["role"] in ("system", "developer"):
        raise ValueError("system_prompt is set, but the row has a system message")
    return [{"role": "system", "content": source.system_prompt}, *messages]
