"""Preference pairs: TRL's columns, in each of its forms, and rows of them."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from tokenizers.processors import TemplateProcessing

from jaxrl_llm.data import preferences
from jaxrl_llm.data.chat_template import Encoder
from jaxrl_llm.data.examples import Example, Format, episode_of
from jaxrl_llm.data.packing import Layout
from jaxrl_llm.data.sources import Source
from jaxrl_llm.data.types import Prompt

TOKENIZER = tiny.tokenizer()
EOS = TOKENIZER.eos_token_id
QUESTION = [{"role": "user", "content": "2 + 2?"}]
RIGHT, WRONG = ([{"role": "assistant", "content": text}] for text in ("4", "22"))
OPENED = "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def read(tmp_path):
    """The examples of some rows, and what is said of others."""

    def read(rows, encoder=None, needs_prompt=True, **form):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        form = {"max_length": 200, "stops": frozenset({EOS}), "end": EOS} | form
        return preferences.read(
            Source(path=str(path)),
            encoder or Encoder(tokenizer=TOKENIZER),
            Format(**form),
            "data.train",
            "the chat template",
            needs_prompt=needs_prompt,
        )

    return read


def sides(pair):
    """Both whole sequences, the chosen one first."""
    return [[*pair.prompt.tokens, *e.tokens.tolist()] for e in pair.episodes]


def texts(pair):
    """Prompt, chosen and rejected, decoded."""
    parts = (pair.prompt.tokens, *(e.tokens for e in pair.episodes))
    return tuple(TOKENIZER.decode(x) for x in parts)


def row(chosen, rejected, prompt=None, **columns):
    given = {"chosen": chosen, "rejected": rejected} | columns
    return given if prompt is None else {"prompt": prompt} | given


ANSWERS = (OPENED, "4<|im_end|>", "22<|im_end|>")
FORMS = {
    "explicit messages": (row(RIGHT, WRONG, QUESTION), ANSWERS),
    "implicit messages": (row(QUESTION + RIGHT, QUESTION + WRONG), ANSWERS),
    "messages beside a copy of the question": (
        row(QUESTION + RIGHT, QUESTION + WRONG, "2 + 2?"),
        ANSWERS,
    ),
    "messages as a file's text": (
        row(json.dumps(RIGHT), json.dumps(WRONG), json.dumps(QUESTION)),
        ANSWERS,
    ),
    "explicit text": (
        row(" blue", " green", "The sky is"),
        ("The sky is", " blue<|im_end|>", " green<|im_end|>"),
    ),
    "implicit text": (
        row("The sky is blue", "The sky is green"),
        ("The sky is", " blue<|im_end|>", " green<|im_end|>"),
    ),
    "text that ends by itself": (
        row("a: b<|im_end|>", "a: c"),
        ("a:", " b<|im_end|>", " c<|im_end|>"),
    ),
    "one text begins with the other": (
        row("1 + 1 = 2", "1 + 1 = 22"),
        ("1 + 1 = ", "2<|im_end|>", "22<|im_end|>"),
    ),
    "several turns in common": (
        row(QUESTION + WRONG + QUESTION + RIGHT, QUESTION + WRONG + QUESTION + WRONG),
        (
            OPENED + "22<|im_end|>\n" + OPENED,
            "4<|im_end|>",
            "22<|im_end|>",
        ),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_trls_columns(form, read):
    given, wanted = FORMS[form]
    (pair,) = read([given]).examples
    assert texts(pair) == wanted
    assert [side[-1] for side in sides(pair)] == [EOS, EOS]


@pytest.mark.slow
@pytest.mark.parametrize("form", [f for f in FORMS if "file" not in f])
@pytest.mark.parametrize("trainer", ["DPOTrainer", "RewardTrainer"])
def test_tokens_are_trls(form, trainer, read):
    """But for what the chat template puts behind the token that ends an answer."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    given = dict(FORMS[form][0])
    if "beside" in form:
        del given["prompt"]  # which TRL reads in its command-line tools only
    made = getattr(trl, trainer)
    theirs = made.__new__(made)
    theirs._tokenizer = TOKENIZER
    args = SimpleNamespace(
        dataset_num_proc=None, max_length=None, truncation_mode="keep_start"
    )
    prepared = theirs._prepare_dataset(Dataset.from_list([given]), TOKENIZER, args, "")
    needs_prompt = trainer == "DPOTrainer"
    (pair,) = read([given], needs_prompt=needs_prompt).examples
    for side, tokens in zip(("chosen", "rejected"), sides(pair), strict=True):
        found = prepared[0][f"{side}_ids"]
        if needs_prompt:
            assert tuple(prepared[0]["prompt_ids"]) == pair.prompt.tokens
            found = prepared[0]["prompt_ids"] + found
        assert TOKENIZER.decode(found).rstrip("\n") == TOKENIZER.decode(tokens)


def test_a_margin_and_what_digests_tell(read):
    rows = [row("ab", "ac", margin=1), row("ad", "ae", margin=0.5)]
    found = read(rows).examples
    assert [pair.prompt.columns for pair in found] == [{"margin": 1.0}, {"margin": 0.5}]
    told = preferences.digests(found)
    assert told == preferences.digests(read(rows).examples)
    rows[1]["margin"] = 0.6
    changed = preferences.digests(read(rows).examples)
    assert [k for k in told if told[k] != changed[k]] == ["column 'margin'"]
    assert "'margin' is read for reward models only" in read(rows).warnings[0]
    assert not read(rows, needs_prompt=False).warnings
    plain = preferences.digests(read([row("ab", "ac")]).examples)
    assert "column 'margin'" not in plain


@pytest.mark.parametrize(
    "given, message",
    [
        ({"chosen": "a"}, "row 1 .*no column 'rejected'; it has .'chosen'."),
        (row(RIGHT, "a"), "'chosen' is messages and column 'rejected' text"),
        (row("a", 3), "row 1 .*column 'rejected' must be text or a list"),
        (row(" ", "b"), "column 'chosen' is empty"),
        (row("a", "b", QUESTION), "must all be text or all be messages"),
        (row(RIGHT, WRONG, "2 + 2?"), "'prompt' is text"),
        (row(RIGHT, QUESTION, QUESTION), "'rejected' ends with .* role 'user'"),
        (row("ab", "ac", margin="1"), "column 'margin' must be a number, got '1'"),
        (row("ab", "ac", margin=float("inf")), "no finite number"),
        (row("ab", "ac"), "column 'margin' is None; all rows"),
        (row("a", "b", margin=1), "no beginning in common .*add a column 'prompt'"),
        (row(RIGHT, WRONG, margin=1), "no beginning in common"),
        (row("ab", "ac", margin=1, images=["x"]), "column 'images' is not read"),
        (row("ab", "ac", margin=1, tools=[{}]), "'tools' needs chat messages"),
        (row("a" * 300, "a" * 299, margin=1), "301 tokens, data.max_length is 200"),
    ],
)
def test_a_row_that_does_not_fit_is_named_with_its_column(given, message, read):
    with pytest.raises(ValueError, match=message):
        read([row("ab", "ac", margin=0.0), given])


def test_answers_end_with_a_stop_token_of_the_models(read):
    plain = Encoder(
        tokenizer=tiny.tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}")
    )
    other = TOKENIZER.convert_tokens_to_ids("<|im_start|>")
    for rows in ([row("ab", "ac")], [row(RIGHT, WRONG, QUESTION)]):
        how = {"encoder": plain, "needs_prompt": False}
        (pair,) = read(rows, stops=frozenset({other}), end=other, **how).examples
        assert [side[-1] for side in sides(pair)] == [other, other]
        with pytest.raises(ValueError, match="nothing ends an answer"):
            read(rows, stops=frozenset(), end=None, **how)


def test_a_template_that_ends_answers_where_the_model_goes_on(read):
    with pytest.raises(ValueError, match="ends an answer with '<.im_end.>', at which"):
        read([row(RIGHT, WRONG, QUESTION)], stops=frozenset({0}), end=0)


def test_a_template_that_tells_a_prompt_otherwise_than_a_whole_talk(read):
    template = tiny.CHAT_TEMPLATE.replace("assistant\n' }}", "assistant\nHm: ' }}")
    encoder = Encoder(tokenizer=tiny.tokenizer(template))
    given = [row(RIGHT, WRONG, QUESTION)]
    with pytest.raises(ValueError, match="ends the prompt otherwise.*'Hm: ' is not"):
        read(given, encoder=encoder)
    (pair,) = read(given, encoder=encoder, needs_prompt=False).examples
    assert texts(pair) == ANSWERS


def test_text_may_be_put_into_the_chat_template(read):
    given = [row("4", "22", "2 + 2?")]
    (pair,) = read(given, chat_template="all").examples
    assert texts(pair) == ANSWERS
    with pytest.raises(ValueError, match="no column 'prompt' that the user would say"):
        read([row("4", "22")], chat_template="all")


def test_a_reward_model_needs_no_prompt(read):
    (pair,) = read([row("good", "bad")], needs_prompt=False).examples
    assert texts(pair) == ("", "good<|im_end|>", "bad<|im_end|>")
    batch = preferences.make_rows([pair], Layout())
    assert batch.sequence_ids[0].tolist()[:9] == [0] * 5 + [1] * 4
    assert batch.is_prompt[0].tolist()[:9] == [True, *[False] * 4, True, *[False] * 3]


def test_text_begins_with_what_the_tokenizer_puts_there(read):
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|bos|>"})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", bos)]
    )
    encoder = Encoder(tokenizer=tokenizer)
    pairs = read([row("a", "b"), row("a", "b", "c")], encoder=encoder).examples
    assert pairs[0].prompt.tokens == (bos,)
    (c,) = tokenizer("c", add_special_tokens=False).input_ids
    assert pairs[1].prompt.tokens == (bos, c)


def test_what_is_left_out_is_counted(read):
    rows = [
        row("ab", "ac"),
        row("x" * 50 + "a", "x" * 50 + "b", "y" * 150),
        row("same", "same"),
    ]
    found = read(rows, overlong="drop")
    assert [pair.id for pair in found.examples] == [0] and found.overlong == 1
    (said,) = found.warnings
    assert "1 of 3 rows have the same answer as chosen and rejected" in said
    with pytest.raises(ValueError, match="of 2, 1 are longer .* and 1 have the same"):
        read(rows[1:], overlong="drop")


def test_a_pair_is_cut_to_what_is_allowed(read):
    rows = [
        row("xxxxa", "b", "yy"),
        row("aa", "bb", "y" * 9),
        row("cccccd", "ccccce", "y"),
    ]
    found = read(rows, max_length=6, overlong="truncate")
    # A prompt may leave no room for an answer, and answers may differ too late.
    wanted = [("yy", "xxxx", "b<|im_end|>")]
    assert [texts(pair) for pair in found.examples] == wanted
    assert found.overlong == 3


def example(i, chosen, rejected, columns):
    return Example(
        prompt=Prompt(id=i, content="", tokens=(1, 2), columns=columns),
        episodes=tuple(
            episode_of(i, sample, tokens, [True] * len(tokens))
            for sample, tokens in enumerate((chosen, rejected))
        ),
    )


@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(pack_length=24), Layout(pack_length=24, share_prompts=True)],
)
def test_rows_have_both_sides_of_a_pair_in_one(layout):
    lengths = [(1, 3), (2, 2), (4, 1)]
    pairs = [
        example(i, [3] * a, [4] * b, {"margin": i + 0.5})
        for i, (a, b) in enumerate(lengths)
    ]
    ref = [np.arange(a + b, dtype=np.float32) - 10 for a, b in lengths]
    told = [preferences.with_reference(*x) for x in zip(pairs, ref, strict=True)]
    batch = preferences.make_rows(told, layout, reference=True)
    assert batch.num_sequences == 6 and not batch.sampler_logprobs.any()
    assert not batch.margins[batch.sequence_ids < 0].any()
    for i, pair in enumerate(pairs):
        assert len({int(r) for r, _ in np.argwhere(batch.sequence_ids // 2 == i)}) == 1
        found = []
        for side, episode in enumerate(pair.episodes):
            here = batch.sequence_ids == 2 * i + side
            asked = here & batch.response_mask
            assert batch.tokens[asked].tolist() == episode.tokens.tolist()
            assert set(batch.margins[here]) == {i + 0.5}
            found += batch.ref_logprobs[asked].tolist()
        assert found == ref[i].tolist()


def test_rows_of_pairs_without_margin_or_reference():
    batch = preferences.make_rows([example(0, [2], [3], {})], Layout())
    assert batch.margins is None and batch.ref_logprobs is None
