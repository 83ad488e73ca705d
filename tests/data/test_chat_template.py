import datetime

import pytest
import tiny
from tokenizers.processors import TemplateProcessing

from jaxrl_llm.data.chat_template import Encoder

HI = [{"role": "user", "content": "hi"}]
RENDERED = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def encoder(template=tiny.CHAT_TEMPLATE, **fields):
    return Encoder(tokenizer=tiny.tokenizer(template), **fields)


def with_ends(single, template=tiny.CHAT_TEMPLATE):
    """An encoder whose tokenizer puts special tokens around text."""
    tokenizer = tiny.tokenizer(template)
    tokenizer.add_special_tokens({"bos_token": "<|bos|>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single,
        special_tokens=[
            ("<|bos|>", tokenizer.bos_token_id),
            ("<|im_end|>", tokenizer.eos_token_id),
        ],
    )
    return Encoder(tokenizer=tokenizer)


@pytest.mark.parametrize(
    "single, text, expected",
    [
        ("<|bos|> $A", "hi", "<|bos|>hi"),
        ("<|bos|> $A", "<|bos|>hi", "<|bos|>hi"),
        ("<|bos|> $A", "<|bos|>", "<|bos|>"),
        ("<|bos|> $A <|im_end|>", "hi", "<|bos|>hi"),
        ("$A <|im_end|>", "hi", "hi"),
        ("$A <|im_end|>", "hi<|im_end|>", "hi<|im_end|>"),
        ("<|bos|> <|im_end|> $A <|im_end|>", "hi", "<|bos|><|im_end|>hi"),
        ("$A", "hi", "hi"),
    ],
)
def test_text_begins_once_and_does_not_end(single, text, expected):
    made = with_ends(single)
    assert made.tokenizer.decode(made.encode(text)) == expected


def test_a_template_and_its_message_begin_once():
    made = with_ends("<|bos|> $A", "{{ bos_token }}{{ messages[0].content }}")
    for said in ("hi", "<|bos|>hi"):
        message = {"role": "user", "content": said}
        assert made.tokenizer.decode(made.encode([message])) == "<|bos|>hi"


DATED = "{{ strftime_now('%d %b %Y') }}|{{ strftime_now('%-m/%Y') }}|" + (
    tiny.CHAT_TEMPLATE
)


def test_a_template_is_told_one_time():
    noon = datetime.datetime(2024, 7, 6, 12)
    made = encoder(DATED, now=noon)
    assert made.render(HI) == "06 Jul 2024|7/2024|" + RENDERED
    assert made.asks_for_the_time
    assert not encoder().asks_for_the_time
    assert not encoder(None).asks_for_the_time


def test_the_clock_changes_nothing_else_of_a_template():
    for begin in ("\n", "  ", "\n  {% if true %}a{% endif %}", "{# a #}\n b"):
        used = "{% if strftime_now is defined %}{{ strftime_now('x') }}{% endif %}"
        template = begin + tiny.CHAT_TEMPLATE + used
        own = tiny.tokenizer(template).apply_chat_template(
            HI, add_generation_prompt=True, tokenize=False
        )
        assert encoder(template).render(HI) == own


def test_a_template_that_draws_is_refused():
    for drawn in ("{{ ['a', 'b'] | random }}", "{{ lipsum(1) }}"):
        with pytest.raises(ValueError, match="the chat template draws at random"):
            encoder(drawn + tiny.CHAT_TEMPLATE).encode(HI)


ONLY_USERS = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}"
    "{% endfor %}"
)
TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + tiny.CHAT_TEMPLATE


@pytest.mark.parametrize("role", ["system", "developer", "tool"])
def test_a_template_that_leaves_a_message_out_is_refused(role):
    message = {"role": role, "content": "Answer with a number."}
    with pytest.raises(ValueError, match=f"leaves the {role} message out.*a number"):
        encoder(ONLY_USERS).encode([message, *HI])
    assert encoder().encode([message, *HI])


def test_a_message_may_stand_in_a_template_with_other_white_space_or_as_json():
    said = [{"role": "system", "content": ' a\n "b"  \u00e9 '}, *HI]
    for how in ("trim", "tojson", "upper | lower", "replace('\\n', '')"):
        template = "{% for m in messages %}{{ m.content | " + how + " }}{% endfor %}"
        assert encoder(template).encode(said)


def test_what_a_template_adds_is_text_that_a_tokenizer_reads():
    broken = encoder("{{ '\\ud83d' }}{{ messages[0].content }}")
    assert broken.end_of_answer() is None
    with pytest.raises(ValueError, match="template rejects it: .* surrogate pair"):
        broken.encode(HI)


def test_tools_stand_in_the_prompt_or_are_refused():
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert encoder(TOOLS).render(HI, tools).startswith('[{"type": "function"')
    assert encoder(TOOLS).render(HI) == RENDERED
    with pytest.raises(ValueError, match="leaves out the column 'tools'"):
        encoder().encode(HI, tools)
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        encoder(TOOLS).encode(HI, [{"name": "\ud83d"}])
    with pytest.raises(ValueError, match="'tools' needs a chat template"):
        encoder().encode("hi", tools)


@pytest.mark.parametrize(
    "content, message",
    [
        ("a\ud83d", r"half of a surrogate pair, '\\ud83d'"),
        ([{"role": "user", "content": "a\udc00"}], "half of a surrogate pair"),
        (
            [{"role": "User", "content": "a"}],
            "the role 'User', which the chat template",
        ),
        ([{"role": "human", "content": "a"}], "the role 'human', which the chat templ"),
    ],
)
def test_what_no_tokenizer_or_template_knows_is_refused(content, message):
    with pytest.raises(ValueError, match=message):
        encoder().encode(content)


def test_a_role_that_only_this_template_knows_is_read():
    template = "{% for m in messages %}{% if m.role == 'critic' %}C{% endif %}"
    template += "{{ m.content }}{% endfor %}"
    said = encoder(template).render([{"role": "critic", "content": "a"}])
    assert said == "Ca"


@pytest.mark.parametrize("broken", ["{{ 1 + 'a' }}", "{{ 1 / 0 }}", "{{ x.y.z }}"])
def test_whatever_a_template_raises_is_one_error(broken):
    with pytest.raises(ValueError, match="the chat template rejects it: "):
        encoder(broken).encode(HI)


def test_a_token_that_the_model_has_no_embedding_of_is_named():
    assert encoder(vocab_size=259).encode(HI)
    made = encoder(vocab_size=258)
    special = made.tokenizer.convert_ids_to_tokens(258)
    with pytest.raises(ValueError) as error:
        made.encode(special)
    said = str(error.value)
    assert f"token 258 ('{special}') is not in the model's vocabulary of 258" in said
    assert "the tokenizer has 259" in said


def test_many_at_once_are_as_one_by_one():
    made = with_ends("<|bos|> $A <|im_end|>")
    questions = [("hi", None), (HI, None), ("", None), ("<|bos|>hello", None)]
    questions += [("a\ud83d", None), (HI, [{"name": "f"}]), ([*HI, *HI], None)]
    found = made.encode_all(questions)
    for question, tokens in zip(questions, found, strict=True):
        if isinstance(tokens, ValueError):
            with pytest.raises(ValueError) as error:
                made.encode(*question)
            assert str(error.value) == str(tokens)
        else:
            assert made.encode(*question) == tokens
    assert [isinstance(one, ValueError) for one in found] == [0, 0, 1, 0, 1, 1, 0]


THINKS = "{% if not think %}<think></think>{% endif %}" + tiny.CHAT_TEMPLATE


def test_variables_of_a_template_are_set():
    assert encoder(THINKS).render(HI) == "<think></think>" + RENDERED
    assert encoder(THINKS, variables={"think": True}).render(HI) == RENDERED


@pytest.mark.parametrize("name", ["thinking", "messages", "tokenize", "chat_template"])
def test_a_variable_that_a_template_does_not_read_is_refused(name):
    with pytest.raises(ValueError, match=f"no variable '{name}' to set; see data.chat"):
        encoder(THINKS, variables={name: True}).render(HI)
