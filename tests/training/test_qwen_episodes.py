"""Episodes with the tokenizer and the chat template of a real model, of which
QWEN2_5_GGUF names a file: any Qwen2.5 that follows instructions."""

import dataclasses
import json
import os
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from short_run import EPISODES, make_config, mean_id

from jaxrl_llm.agents import tools
from jaxrl_llm.config import plugins
from jaxrl_llm.models import init, save
from jaxrl_llm.models.checkpoints.gguf import GGUFFile
from jaxrl_llm.rewards import RewardFunction
from jaxrl_llm.tracking import run_directory
from jaxrl_llm.tracking.result import Result
from jaxrl_llm.training import loop
from jaxrl_llm.training.build import build

QWEN = os.environ.get("QWEN2_5_GGUF", "")


def capital(country: str) -> str:
    """Looks up the capital of a country.

    Args:
        country: Its name in English.
    """
    return {"France": "Paris", "Peru": "Lima 🇵🇪"}[country]


def call(country):
    said = json.dumps({"name": "capital", "arguments": {"country": country}})
    return f"I look it up: né?\n<tool_call>\n{said}\n</tool_call>"


@pytest.mark.slow
@pytest.mark.skipif(not Path(QWEN).is_file(), reason="QWEN2_5_GGUF names no file")
def test_turns_are_exact_with_qwens_tokenizer_and_template(tmp_path, monkeypatch):
    """A random model calls nothing: in their first turns, its words are replaced by two
    calls, spelled as no tokenizer would, whose log-probabilities nobody knows."""
    known = GGUFFile(Path(QWEN)).tokenizer()
    end = known.convert_tokens_to_ids("<|im_end|>")
    arch = tiny.arch(vocab_size=len(known), eos_token_ids=(end,))
    save(tmp_path / "qwen", arch, init(arch, jax.random.key(0)), known, dtype="float32")
    words = [call("France"), call("Peru")]
    spelled = [
        [t for letter in text for t in known(letter).input_ids] + [end]
        for text in words
    ]
    for text, tokens in zip(words, spelled, strict=True):
        assert known.decode(tokens[:-1]) == text
        assert tokens[:-1] != known(text).input_ids
    changed = EPISODES | {
        "agent.environment": None,
        "agent.tools": [plugins.offer(capital)],
        "agent.max_tokens": 600,
        "agent.max_turns": 4,
        "data.max_prompt_length": 300,
        "reward.functions": [{"name": "high"}],
        "trainer.total_training_steps": 1,
    }
    config = make_config(str(tmp_path / "qwen"), tmp_path / "run", **changed)
    job = build(config, [RewardFunction(name="high", function=mean_id)])
    asked, completions = {}, job.engine.completions

    def replaced(more):
        def noted(idle):
            found = more(idle)
            for one in found:
                asked.setdefault((one.prompt_id, one.first_sample, one.turn), one)
            return found

        turns = Counter()
        for made in completions(noted):
            key = made.prompt_id, made.sample
            turn, turns[key] = turns[key], turns[key] + 1
            if turn < 2:
                unknown = np.full(len(spelled[turn]), np.nan, np.float32)
                made = dataclasses.replace(
                    made,
                    tokens=np.array(spelled[turn], np.int32),
                    logprobs=unknown,
                    raw_logprobs=unknown,
                    text=words[turn],
                    finish_reason="stop",
                )
            yield made

    monkeypatch.setattr(job.engine, "completions", replaced)
    with jax.debug_nans(False):
        loop.run(job)
    line = run_directory.read(config.output_dir)[1]
    assert line["agent/tool_calls"] == 2 and line["agent/turns/max"] == 3
    assert np.isfinite(line["actor/grad_norm"]) and line["actor/grad_norm"] > 0
    schema = tools.schema(capital)
    records = Result(Path(config.output_dir)).completions(1)
    assert len(records) == 16
    for record in records:
        messages, before, at = [*record["opening"]], [], 0
        begun = known.apply_chat_template(
            messages, tools=[schema], add_generation_prompt=True, tokenize=False
        )
        assert "<tools>" in begun and '"capital"' in begun
        before = known(begun).input_ids
        for place, turn in enumerate(record["turns"]):
            if turn["sampled"]:
                request = asked[record["prompt_id"], record["sample"], place // 2]
                assert list(request.tokens) == before
                shown = known.apply_chat_template(
                    messages, tools=[schema], add_generation_prompt=True, tokenize=False
                )
                assert known.decode(before) == shown
            messages.append({"role": turn["role"], "content": turn["text"]})
            before = before + record["tokens"][at : at + turn["num_tokens"]]
            at += turn["num_tokens"]
        assert record["tokens"][: len(spelled[0])] == spelled[0]
        answers = [t["text"] for t in record["turns"] if t["role"] == "tool"]
        assert answers == ["Paris", "Lima 🇵🇪"]
