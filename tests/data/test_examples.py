"""Rows in TRL's formats to tokens, and what of them is learned."""

import dataclasses
import json

import numpy as np
import pytest
import tiny

from jaxrl_llm.data import examples
from jaxrl_llm.data.chat_template import Encoder
from jaxrl_llm.data.examples import Format
from jaxrl_llm.data.packing import Layout
from jaxrl_llm.data.sources import Source

TOKENIZER = tiny.tokenizer()
END = TOKENIZER.eos_token_id
FORM = Format(stops=frozenset({END}), end=END)
USER = {"role": "user", "content": "1+1"}
TURNS = [
    USER,
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "and 3?"},
    {"role": "assistant", "content": "5"},
]
ASKED = "<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n"
AGAIN = "\n<|im_start|>user\nand 3?<|im_end|>\n<|im_start|>assistant\n"


def encoded(row, template=tiny.CHAT_TEMPLATE, source=None, **changed):
    """The text of a row's tokens, and that of what is learned."""
    encoder = Encoder(tokenizer=tiny.tokenizer(template))
    form = dataclasses.replace(FORM, **changed)
    source = source or Source(path="rows.jsonl")
    found = examples.encode(row, source, encoder, form, "the template t")
    learned = [t for t, one in zip(found.tokens, found.learned, strict=True) if one]
    return TOKENIZER.decode(found.tokens), TOKENIZER.decode(learned)


@pytest.mark.parametrize(
    "row, changed, text, learned",
    [
        ({"text": "a b"}, {}, "a b<|im_end|>", "a b<|im_end|>"),
        ({"text": "a<|im_end|>"}, {}, "a<|im_end|>", "a<|im_end|>"),
        ({"prompt": "1+1=", "completion": "2"}, {}, "1+1=2<|im_end|>", "2<|im_end|>"),
        (
            {"prompt": "1+1=", "completion": "2"},
            {"completion_only": False},
            "1+1=2<|im_end|>",
            "1+1=2<|im_end|>",
        ),
        (
            {"prompt": "1+1", "completion": "2"},
            {"chat_template": "all"},
            ASKED + "2<|im_end|>",
            "2<|im_end|>",
        ),
        (
            {"prompt": [USER], "completion": [TURNS[1]]},
            {},
            ASKED + "2<|im_end|>",
            "2<|im_end|>",
        ),
        # TRL learns what the template puts behind the stop token, too.
        (
            {"prompt": [USER], "completion": [TURNS[1]]},
            {"assistant_only": False},
            ASKED + "2<|im_end|>\n",
            "2<|im_end|>\n",
        ),
        (
            {"messages": TURNS},
            {},
            f"{ASKED}2<|im_end|>{AGAIN}5<|im_end|>",
            "2<|im_end|>5<|im_end|>",
        ),
        (
            {"messages": TURNS},
            {"assistant_only": False},
            f"{ASKED}2<|im_end|>{AGAIN}5<|im_end|>\n",
            f"{ASKED}2<|im_end|>{AGAIN}5<|im_end|>\n",
        ),
        (
            {"prompt": TURNS[:3], "completion": TURNS[3:]},
            {},
            f"{ASKED}2<|im_end|>{AGAIN}5<|im_end|>",
            "5<|im_end|>",
        ),
        (
            {"prompt": TURNS[:3], "completion": TURNS[3:]},
            {"completion_only": False},
            f"{ASKED}2<|im_end|>{AGAIN}5<|im_end|>",
            "2<|im_end|>5<|im_end|>",
        ),
    ],
)
def test_what_is_learned_of_each_format(row, changed, text, learned):
    assert encoded(row, **changed) == (text, learned)


def test_every_answer_ends_in_a_stop_token_that_is_learned():
    encoder = Encoder(tokenizer=TOKENIZER)
    rows = [
        {"messages": TURNS},
        {"prompt": [USER], "completion": "2"},
        {"prompt": "a", "completion": "b"},
        {"text": "c"},
    ]
    for row in rows:
        found = examples.encode(row, Source(path="x"), encoder, FORM, "t")
        learned = np.array([*found.learned, False])
        ends = np.flatnonzero(learned[:-1] & ~learned[1:])
        assert len(ends) and all(found.tokens[i] == END for i in ends)


DROPS_EARLIER_ANSWERS = tiny.CHAT_TEMPLATE.replace(
    "message['content'] }}",
    "(message['content'] if loop.last or message.role != 'assistant' else '...') }}",
)
NO_END = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}" + (
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
OTHER_END = tiny.CHAT_TEMPLATE.replace("<|im_end|>", "<|pad|>")


@pytest.mark.parametrize(
    "row, template, said",
    [
        (
            {"messages": TURNS},
            DROPS_EARLIER_ANSWERS,
            "the template t is not prefix-stable: messages 0 to 1 end in .*2<.*data.ch",
        ),
        ({"messages": TURNS}, NO_END, "template t puts no stop token behind message 1"),
        (
            {"messages": TURNS},
            OTHER_END,
            r"ends an answer with '<\|pad\|>', at which the model does not stop \(it "
            r"stops at '<\|im_end\|>'\); set data.end_of_turn='<\|pad\|>'",
        ),
        ({"messages": TURNS[1:]}, None, "begins with the assistant"),
        ({"messages": TURNS[:1]}, None, "nothing of it is learned"),
        ({"question": "a"}, None, "an example has 'prompt' and 'completion', or 'mess"),
        ({"completion": "a"}, None, "it has 'completion', but no column 'prompt'"),
        ({"messages": "a"}, None, "column 'messages' must be chat messages"),
    ],
)
def test_what_does_not_fit_is_an_error(row, template, said):
    with pytest.raises(ValueError, match=said):
        encoded(row, template or tiny.CHAT_TEMPLATE)


def test_a_template_without_an_end_gets_one_behind_the_last_answer():
    found = encoded({"messages": TURNS[:2]}, NO_END)
    assert found == ("[user]1+1[assistant]2<|im_end|>", "2<|im_end|>")


def test_without_any_stop_token_nothing_is_learned_to_end():
    with pytest.raises(ValueError, match="set data.end_of_turn"):
        encoded({"text": "a"}, stops=frozenset(), end=None)


def test_what_a_source_puts_around_prompts_is_there():
    source = Source(path="x", system_prompt="Add.", prompt_template="{prompt}=")
    row = {"prompt": "1+1", "completion": "2"}
    text, learned = encoded(row, source=source, chat_template="all")
    assert text.startswith("<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n1+1=")
    assert learned == "2<|im_end|>"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(path=str(path))


def load(train, val=None, **changed):
    form = dataclasses.replace(FORM, **changed)
    encoder = Encoder(tokenizer=TOKENIZER)
    return examples.load(train, val, encoder, form, reader=examples.read)


def test_long_rows_are_refused_cut_or_left_out_and_counted(tmp_path):
    rows = [{"prompt": "ab", "completion": "c" * n} for n in (2, 6, 3)]
    rows.append({"prompt": "p" * 9, "completion": "d"})
    source = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=r"row 1 .* it has 9 tokens, data.max_length"):
        load(source, max_length=6)
    cut = load(source, max_length=6, overlong="truncate")
    # The last has nothing left to learn.
    assert [e.lengths for e in cut.train] == [[5], [6], [6]]
    assert (cut.truncated, cut.dropped) == (2, 0)
    left = load(source, max_length=6, overlong="drop")
    assert [e.id for e in left.train] == [0, 2]
    assert (left.truncated, left.dropped) == (0, 2)
    with pytest.raises(ValueError, match="lies behind data.max_length, 2 tokens"):
        load(source, max_length=2, overlong="truncate")


def test_held_out_prompts_are_not_learned(tmp_path):
    rows = [{"prompt": p * 2, "completion": c} for p in "abc" for c in "xy"]
    train = write(tmp_path / "train.jsonl", rows)
    val = write(tmp_path / "val.jsonl", rows[2:3])
    found = load(train, val)
    assert found.train_removed_as_held_out == 2
    assert [e.id for e in found.train] == [0, 1, 4, 5]
    with pytest.raises(ValueError, match="all 6 rows .* are also held out"):
        load(train, train)


def test_rows_hold_the_tokens_and_what_is_learned(tmp_path):
    rows = [{"messages": TURNS}, {"messages": TURNS[:2]}]
    found = load(write(tmp_path / "rows.jsonl", rows)).train
    batch = examples.make_rows(found, Layout(pack_length=256, longest=128))
    for i, example in enumerate(found):
        mine = batch.sequence_ids == i
        assert tuple(batch.tokens[mine].tolist()) == example.tokens
        assert batch.response_mask[mine].sum() == example.num_learned
        learned = TOKENIZER.decode(batch.tokens[mine & batch.response_mask])
        assert learned == ["2<|im_end|>5<|im_end|>", "2<|im_end|>"][i]
    changed = load(write(tmp_path / "rows.jsonl", rows), assistant_only=False).train
    assert examples.digests(changed) != examples.digests(found)


def test_tokens_that_reach_over_the_border_are_taken_apart():
    """With a merge of "b" and "c", the prompt's last token depends on the answer."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {w: i for i, w in enumerate(["a", "b", "c", "bc", "<e>"])}
    backend = Tokenizer(models.BPE(vocab=words, merges=[("b", "c")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>")
    form = Format(stops=frozenset({4}), end=4)
    row = {"prompt": "ab", "completion": "ca"}
    source, encoder = Source(path="x"), Encoder(tokenizer=tokenizer)
    found = examples.encode(row, source, encoder, form, "t")
    assert (found.tokens, found.apart) == ([0, 1, 2, 0, 4], True)
    assert found.learned == [False, False, True, True, True]


def test_rows_of_all_formats_are_tokenized_together_as_one_by_one(
    tmp_path, monkeypatch
):
    kinds = [
        {"messages": TURNS},
        {"prompt": "1+1=", "completion": "2"},
        {"text": "a b"},
        {"prompt": [USER], "completion": [TURNS[1]]},
    ]
    rows = [kinds[i % 4] for i in range(40)]
    source = write(tmp_path / "rows.jsonl", rows)
    encoder, calls = Encoder(tokenizer=TOKENIZER), []
    alone = [examples.encode(row, source, encoder, FORM, "t") for row in rows]
    whole = Encoder._tokens
    monkeypatch.setattr(
        Encoder, "_tokens", lambda *a, **k: calls.append(1) or whole(*a, **k)
    )
    found = load(source).train
    assert [e.tokens for e in found] == [tuple(one.tokens) for one in alone]
    assert len(calls) <= 6
    rows[21] = {"prompt": "1+1=", "completion": ""}
    rows[30] = {"no": "columns"}
    with pytest.raises(ValueError, match="row 21 .*is empty"):
        load(write(tmp_path / "rows.jsonl", rows))
