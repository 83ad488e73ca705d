"""Preference data: rows with a chosen and a rejected answer -> examples with both ->
rows of a batch.

The columns are TRL's, unchanged: `chosen` and `rejected`, each a whole conversation, or
with their common beginning in a column `prompt`; texts or lists of chat messages; a
number in the column `margin`, if a reward model is to keep one.
"""

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32

from jaxrl_llm.data import examples, packing, prompts
from jaxrl_llm.data.chat_template import Encoder
from jaxrl_llm.data.examples import Example, Format, Read
from jaxrl_llm.data.messages import Content, content_of, tools_of
from jaxrl_llm.data.packing import Layout
from jaxrl_llm.data.rows import TrainBatch
from jaxrl_llm.data.sources import Row, Source, rows_as_they_are, where
from jaxrl_llm.data.types import Message, Prompt

_SIDES = ("chosen", "rejected")


def read(
    source: Source,
    encoder: Encoder,
    form: Format,
    key: str,
    template: str,
    *,
    needs_prompt: bool = True,
) -> Read:
    """The rows of one source as examples of two episodes: the chosen answer and the
    rejected one. Rows whose answers are the same teach nothing and are left out.

    Args:
      key: what errors call the source.
      template: what errors call the chat template.
      needs_prompt: whether answers are told from their prompt: for DPO. A reward model
        looks at whole sequences, which may begin with nothing in common.

    Raises:
      ValueError: a row or column does not fit, or no row is left.
    """
    found, overlong, equal = [], 0, 0
    rows = rows_as_they_are(source)
    has_margins = rows[0].get("margin") is not None
    for i, row in enumerate(rows):
        try:
            prompt, *sides = _encode(row, source, encoder, form, template, needs_prompt)
            margin = _margin(row, has_margins)
            most = form.max_length - len(prompt)
            longest = max(map(len, sides))
            if sides[0] == sides[1]:
                equal += 1
                continue
            if longest > most:
                overlong += 1
                if form.overlong == "error":
                    raise ValueError(
                        f"prompt and answer have {len(prompt) + longest} tokens, "
                        f"data.max_length is {form.max_length}; raise it, or set "
                        "data.overlong to truncate or drop"
                    )
                sides = [side[: max(most, 0)] for side in sides]
                if form.overlong == "drop" or sides[0] == sides[1]:
                    continue
        except ValueError as error:
            raise ValueError(f"{where(source, i)}: {error}") from None
        columns = {} if margin is None else {"margin": margin}
        found.append(
            Example(
                prompt=Prompt(id=i, content="", tokens=tuple(prompt), columns=columns),
                episodes=tuple(
                    examples.episode_of(i, sample, side, [True] * len(side))
                    for sample, side in enumerate(sides)
                ),
            )
        )
    if not found:
        raise ValueError(
            f"{key}: no pair of {source.path} is left: of {len(rows)}, {overlong} are "
            f"longer than data.max_length, {form.max_length} tokens, and {equal} have "
            "the same answer twice"
        )
    warnings = []
    if equal:
        warnings.append(
            f"{source.path}: {equal} of {len(rows)} rows have the same answer as "
            "chosen and rejected; they are left out"
        )
    if has_margins and needs_prompt:
        warnings.append(
            f"{source.path}: column 'margin' is read for reward models only"
        )
    return Read(found, overlong, warnings)


def make_rows(
    pairs: Sequence[Example], layout: Layout, *, reference: bool = False
) -> TrainBatch:
    """Rows of pairs: sequence 2 i is the chosen one of pair i, 2 i + 1 the rejected
    one, in one row.

    An objective of log-probabilities looks at the tokens behind the prompt. A sequence
    without a prompt has its first token in that place: no model can say how likely it
    is.

    Args:
      reference: whether the episodes have the reference's log-probabilities, see
        `with_reference`.
    """
    layout = dataclasses.replace(layout, sequences_together=2)
    asked, answers = [], []
    for i, pair in enumerate(pairs):
        for sample, episode in enumerate(pair.episodes):
            number, prompt = 2 * i + sample, pair.prompt
            if not prompt.tokens:
                first, *rest = episode.tokens.tolist()
                prompt = dataclasses.replace(prompt, tokens=(first,))
                episode = examples.episode_of(i, 0, rest, [True] * len(rest))
            asked.append(dataclasses.replace(prompt, id=number))
            answers.append([dataclasses.replace(episode, prompt_id=number)])
    nothing = np.zeros((len(asked), 1), np.float32)
    batch = packing.make_rows(asked, answers, nothing, layout=layout)
    found: dict[str, Any] = {}
    if reference:
        ref = batch.sampler_logprobs
        found = {"ref_logprobs": ref, "sampler_logprobs": np.zeros_like(ref)}
    if "margin" in pairs[0].prompt.columns:
        margins = np.array([p.prompt.columns["margin"] for p in pairs], np.float32)
        of_token = margins[np.maximum(batch.sequence_ids, 0) // 2]
        found["margins"] = np.where(batch.sequence_ids >= 0, of_token, np.float32(0))
    return dataclasses.replace(batch, **found)


def with_reference(pair: Example, logprobs: Float32[np.ndarray, " _"]) -> Example:
    """A pair whose episodes have the reference policy's log-probabilities.

    Args:
      logprobs: nats; of every token of the chosen answer, then of the rejected one.
    """
    start, made = 0, []
    for episode in pair.episodes:
        turn, count = episode.turns[0], len(episode.tokens)
        turn = dataclasses.replace(turn, logprobs=logprobs[start : start + count])
        made.append(dataclasses.replace(episode, turns=(turn,)))
        start += count
    return dataclasses.replace(pair, episodes=tuple(made))


def by_pair(
    rows: TrainBatch, found: Float32[np.ndarray, "R T"], count: int
) -> list[Float32[np.ndarray, " _"]]:
    """What was found of the answers' tokens in rows of `make_rows`, for each of so many
    pairs: of the chosen answer, then of the rejected one."""
    asked = np.asarray(rows.response_mask)
    sequences = np.asarray(rows.sequence_ids)[asked]
    order = np.argsort(sequences, kind="stable")  # each is in one row, in its order
    ends = np.searchsorted(sequences[order] // 2, np.arange(1, count))
    return np.split(found[asked][order], ends)


def digests(pairs: Sequence[Example]) -> dict[str, str]:
    """`examples.digests`, and one of the margins, if there are any."""
    margins = [pair.prompt.columns.get("margin") for pair in pairs]
    found = examples.digests(pairs)
    if any(margin is not None for margin in margins):
        text = repr(margins).encode()
        found["column 'margin'"] = hashlib.sha256(text).hexdigest()[:16]
    return found


def _encode(
    row: Row,
    source: Source,
    encoder: Encoder,
    form: Format,
    template: str,
    needs_prompt: bool,
) -> tuple[list[int], list[int], list[int]]:
    """Tokens of the prompt, and of both answers behind it, however long.

    Raises:
      ValueError: a column does not fit, the chat template rejects it, or answers cannot
        be told from the prompt.
    """
    given, *said = _sides(row, source, form)
    is_text = isinstance(said[0], str)
    if is_text:
        if tools_of(row):
            raise ValueError("column 'tools' needs chat messages")
        sides = [list(encoder.encode((given or "") + side)) for side in said]
        prompt = list(encoder.encode(given)) if given else sides[0]
    else:
        tools = tools_of(row)
        sides = [_closed(encoder, [*(given or []), *side], tools) for side in said]
        prompt = list(encoder.encode(given, tools)) if given else sides[0]
    sides = [_ended(tokens, is_text, encoder, form, template) for tokens in sides]
    split = len(prompt)
    for tokens in sides:
        encoder.check_vocabulary(tokens)
        split = min(split, _same(prompt, tokens), len(tokens) - 1)
    if needs_prompt and (not split or not (given or is_text)):
        raise ValueError(
            "columns 'chosen' and 'rejected' have no beginning in common that could be "
            f"the prompt; add a column {source.prompt_key!r}"
        )
    if needs_prompt and not is_text and split < len(prompt):
        raise ValueError(
            f"{template} ends the prompt otherwise where an answer follows: "
            f"{encoder.tokenizer.decode(prompt[split:])!r} is not there; take a "
            "template that does not, in data.chat_template_file"
        )
    return sides[0][:split], sides[0][split:], sides[1][split:]


def _sides(
    row: Row, source: Source, form: Format
) -> tuple[Content | None, Content, Content]:
    """Prompt, chosen and rejected; the prompt None if both are whole conversations that
    have no beginning in common.

    Raises:
      ValueError: a column lacks, or is none of the kinds that belong together.
    """
    for name in _SIDES:
        if row.get(name) is None:
            raise ValueError(
                f"no column {name!r}; it has {list(row)}; preference data has chosen "
                "and rejected, and perhaps prompt and margin"
            )
    for name, remedy in (
        ("chat_template_kwargs", "set data.chat_template_kwargs for all rows"),
        ("images", "no model here reads images; leave such rows out"),
        ("image", "no model here reads images; leave such rows out"),
    ):
        if row.get(name):
            raise ValueError(f"column {name!r} is not read here; {remedy}")
    said = [content_of(row[name], name) for name in _SIDES]
    kinds = ["text" if isinstance(side, str) else "messages" for side in said]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"column 'chosen' is {kinds[0]} and column 'rejected' {kinds[1]}; make "
            "both text or both messages"
        )
    for name, side in zip(_SIDES, said, strict=True):
        if not isinstance(side, str) and side[-1]["role"] != "assistant":
            raise ValueError(
                f"column {name!r} ends with a message of the role "
                f"{side[-1]['role']!r}, not with an answer of the assistant"
            )
    key = source.prompt_key
    is_text, asked = isinstance(said[0], str), row.get(key)
    if asked is not None:
        asked = content_of(asked, key)
        if is_text != isinstance(asked, str):
            if is_text or said[0][0]["role"] == "assistant":
                raise ValueError(
                    f"columns {key!r}, 'chosen' and 'rejected' must all be text or all "
                    f"be messages; {key!r} is {'messages' if is_text else 'text'}"
                )
            asked = None  # a copy of the question, beside whole conversations
    if asked is None:
        if form.chat_template == "all" and is_text:
            raise ValueError(
                f"data.chat_template is all, but there is no column {key!r} that the "
                "user would say"
            )
        return _common(*said)
    if form.chat_template == "all" and is_text:
        is_text = False
        said = [[{"role": "assistant", "content": side}] for side in said]
    return prompts.render(row, source, chat_template=not is_text), said[0], said[1]


def _common(
    chosen: Content, rejected: Content
) -> tuple[Content | None, Content, Content]:
    """The beginning that both sides have in common, and what is left of each, as TRL's
    `extract_prompt` finds it: at least one message, or character, is left to each."""
    most = min(len(chosen), len(rejected)) - 1
    pairs = zip(chosen[:most], rejected[:most], strict=True)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), most)
    is_text, differ = isinstance(chosen, str), chosen[same] != rejected[same]
    if is_text and differ and chosen[:same].endswith(" "):
        same -= 1  # a space belongs to the word behind it
    return chosen[:same] or None, chosen[same:], rejected[same:]


def _margin(row: Row, has_margins: bool) -> float | None:
    given = row.get("margin")
    if (given is not None) != has_margins:
        raise ValueError(
            f"column 'margin' is {given!r}; all rows of a set have one, or none"
        )
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, int | float):
        raise ValueError(f"column 'margin' must be a number, got {given!r:.200}")
    if not math.isfinite(given):
        raise ValueError(f"column 'margin' is {given}, which is no finite number")
    return float(given)


def _closed(
    encoder: Encoder, messages: Sequence[Message], tools: list[Any] | None
) -> list[int]:
    text = encoder.render(messages, tools, "closed")
    tokens = list(encoder.tokenizer(text, add_special_tokens=False).input_ids)
    bos = encoder.tokenizer.bos_token_id
    while bos is not None and tokens[:2] == [bos, bos]:
        tokens = tokens[1:]
    return tokens


def _ended(
    tokens: list[int], is_text: bool, encoder: Encoder, form: Format, template: str
) -> list[int]:
    """Tokens up to the one that ends the answer, without what a template puts behind
    it; with such a token added if there is none."""
    last = max((i for i, token in enumerate(tokens) if token in form.stops), default=-1)
    if last >= 0 and not encoder.tokenizer.decode(tokens[last + 1 :]).strip():
        return tokens[: last + 1]
    if not is_text:
        examples.check_unended(0, 1, encoder, form, template)
    return [*tokens, examples.end_token(form)]


def _same(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    count = min(len(a), len(b))
    return next((i for i in range(count) if a[i] != b[i]), count)
