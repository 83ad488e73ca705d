"""What is known of a token stands at that token."""

import dataclasses

import numpy as np

from jaxrl_llm.data.packing import Layout, make_rows
from jaxrl_llm.data.types import Episode, Prompt, Turn
from jaxrl_llm.tracking import token_details

NAN = float("nan")


def text_of(tokens):
    """Each token is a byte of UTF-8."""
    return bytes(tokens).decode("utf-8", "replace")


def sampled(text, logprobs):
    tokens = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    return Turn(
        role="assistant",
        tokens=tokens,
        response_mask=np.ones(len(tokens), bool),
        logprobs=np.array(logprobs, np.float32),
        weight_versions=np.zeros(len(tokens), np.int32),
        finish_reason="stop",
        text=text,
    )


def test_details_are_of_the_response_in_whatever_row_it_lies():
    prompts = [
        Prompt(id=i, content=text, tokens=tuple(text.encode()), columns={})
        for i, text in enumerate(["2+2", "1+1"])
    ]
    turns = [
        [[sampled("4.", [-0.5, -1.0])], [sampled("five", [-1, -2, -3, -4])]],
        [
            [
                sampled("?", [-0.25]),
                Turn.observed("tool", list(b"it is"), "it is"),
                sampled("2", [NAN]),
            ],
            [sampled("2", [-8.0])],
        ],
    ]
    episodes = [
        [
            Episode(prompt_id=p, sample=g, turns=tuple(one))
            for g, one in enumerate(group)
        ]
        for p, group in enumerate(turns)
    ]
    advantages = np.array([[1, -1], [0.5, -0.5]], np.float32)
    layout = Layout(pack_length=32, share_prompts=True)
    rows = make_rows(prompts, episodes, advantages, layout=layout)
    lengths = [len(one.tokens) for group in episodes for one in group]
    found = token_details.of_step(rows, lengths, text_of)
    assert {n: "".join(details["text"]) for n, details in found.items()} == {
        0: "4.",
        1: "five",
        2: "?it is2",
        3: "2",
    }
    assert found[1]["logprob"] == [-1, -2, -3, -4]
    assert found[1]["advantage"] == [-1.0] * 4 and "mismatch" not in found[1]
    unknown = [None] * 5  # the tool's
    assert found[2]["logprob"] == [-0.25, *unknown, None]
    assert found[2]["advantage"] == [0.5, *unknown, 0.5]

    trainer = np.where(rows.response_mask, rows.sampler_logprobs + 0.5, 0)
    rows = dataclasses.replace(rows, old_logprobs=trainer)
    found = token_details.of_step(rows, lengths, text_of)
    assert found[2]["mismatch"] == [0.5, *unknown, None]


def test_few_responses_of_many_are_shown_and_none_without_tokens():
    prompt = Prompt(id=0, content="?", tokens=(63,), columns={})
    group = [
        Episode(prompt_id=0, sample=g, turns=(sampled("a" * g, [-1.0] * g),))
        for g in range(10)
    ]
    rows = make_rows([prompt], [group], np.ones((1, 10), np.float32))
    found = token_details.of_step(rows, [*range(10)], text_of)
    assert {n: len(details["text"]) for n, details in found.items()} == {
        3: 3,
        6: 6,
        9: 9,
    }


def test_long_responses_are_cut(monkeypatch):
    monkeypatch.setattr(token_details, "MAX_TOKENS", 3)
    prompt = Prompt(id=0, content="?", tokens=(63,), columns={})
    group = [Episode(prompt_id=0, sample=0, turns=(sampled("abcde", [-1.0] * 5),))]
    rows = make_rows([prompt], [group], np.ones((1, 1), np.float32))
    (found,) = token_details.of_step(rows, [5], text_of).values()
    assert found["text"] == ["a", "b", "c"] and found["logprob"] == [-1.0] * 3


def test_the_pieces_of_a_text_join_to_it_and_a_character_is_the_last_bytes():
    tokens = "aé😀 b".encode()
    found = token_details.pieces(list(tokens), text_of)
    assert found == ["a", "", "é", "", "", "", "😀", " ", "b"]
    assert "".join(token_details.pieces(list(tokens[:5]), text_of)) == "aé\ufffd"
    assert token_details.pieces([], text_of) == []
