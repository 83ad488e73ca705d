"""Runs in which the tiny model plays episodes of several turns."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from short_run import GRPO, make_config

from jaxrl_llm.rollout.native import session as running
from jaxrl_llm.tracking import run_directory
from jaxrl_llm.tracking.result import Result
from jaxrl_llm.training import loop
from jaxrl_llm.training.build import build

AGENT = GRPO | {
    "agent": {"environment": "letters:Letters", "isolation": "thread"},
    "reward.functions": [],
    "data.chat_template": True,
    "data.max_prompt_length": 64,
    "agent.max_tokens": 80,
    # A random model hardly ever says the end of a turn.
    "rollout.stop_token_ids": list(range(120)),
    "rollout.max_response_length": 8,
    "trainer.total_training_steps": 2,
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def played(weights, tmp_path_factory):
    """A run, with what its engine was asked for."""
    config = make_config(weights, tmp_path_factory.mktemp("run"), **AGENT)
    job, asked = build(config), []
    completions = job.engine.completions

    def spied(more):
        def noted(idle):
            found = more(idle)
            asked.extend(found)
            return found

        return completions(noted)

    job.engine.completions = spied
    loop.run(job)
    lines = run_directory.read(config.output_dir)
    records = Result(Path(config.output_dir)).completions(1)
    return SimpleNamespace(job=job, asked=asked, lines=lines, records=records)


def test_every_turn_reads_the_sampled_tokens_and_what_was_said_between(played):
    tokenizer = played.job.source.tokenizer
    by_turn = {}
    for request in played.asked[: sum(len(r["turns"]) for r in played.records)]:
        key = request.prompt_id, request.first_sample, request.turn
        by_turn.setdefault(key, request)
    several = 0
    for record in played.records:
        prompt = f"<|im_start|>user\n{record['opening'][0]['content']}<|im_end|>\n"
        before = tokenizer(f"{prompt}<|im_start|>assistant\n").input_ids
        at, turn = 0, 0
        for said in record["turns"]:
            part = record["tokens"][at : at + said["num_tokens"]]
            if said["sampled"]:
                key = record["prompt_id"], record["sample"], turn
                assert by_turn[key].tokens == (*before, *record["tokens"][:at])
                turn += 1
            elif part:  # the last is not read
                text = f"<|im_start|>user\nt{turn}<|im_end|>\n<|im_start|>assistant\n"
                assert tokenizer.decode(part).endswith(text)
                assert said["text"] == f"t{turn}"
            at += said["num_tokens"]
        assert at == len(record["tokens"])
        several += turn > 1
        over = record["turns"][-1]["text"] == "t3"
        assert record["status"] == ("completed" if over else "max_tokens")
    assert several > len(played.records) / 2


def test_an_episode_is_worth_what_its_turns_are(played):
    for record in played.records:
        rewards = [t["reward"] for t in record["turns"] if t["sampled"]]
        assert record["reward"] == pytest.approx(sum(x or 0 for x in rewards))
    assert len({record["reward"] for record in played.records}) > 3


def test_the_sampler_and_the_trainer_agree_across_turns(played):
    first = played.lines[1]
    assert first["mismatch/logprob_diff_max"] < 6e-5
    assert first["actor/ppo_kl"] == 0 and first["actor/grad_norm"] > 0
    sampled = [
        sum(t["num_tokens"] for t in r["turns"] if t["sampled"]) for r in played.records
    ]
    assert first["response_length/mean"] == np.mean(sampled)
    assert first["agent/turns/max"] == 3 and first["agent/turns/mean"] > 2
    assert first["agent/observation_tokens"] > 20
    openings = first["prompt_length/mean"]
    page = running.PAGE_SIZE
    bound = openings + 3 * page + first["agent/observation_tokens"]
    assert openings < first["agent/prefilled_tokens"] < bound
