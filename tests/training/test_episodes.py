"""Runs in which the tiny model plays episodes of several turns."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import letters
import numpy as np
import pytest
import templates
import tiny
from short_run import EPISODES, make_config, newest

from jaxrl_llm.config import plugins
from jaxrl_llm.rewards import RewardFunction
from jaxrl_llm.rollout.native import session as running
from jaxrl_llm.tracking import run_directory
from jaxrl_llm.tracking.result import Result
from jaxrl_llm.training import loop
from jaxrl_llm.training.build import build


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def played(weights, tmp_path_factory):
    """A run, with what its engine was asked for."""
    config = make_config(weights, tmp_path_factory.mktemp("run"), **EPISODES)
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


def checkpoints(directory, like):
    return jax.tree.leaves(newest(directory, like))


@pytest.mark.slow
@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_a_killed_run_goes_on_bit_for_bit(isolation, weights, tmp_path):
    changed = EPISODES | {
        "agent.isolation": isolation,
        "agent.reproducible": True,
        "trainer.total_training_steps": 3,
        "trainer.save_freq": 1,
        "trainer.max_ckpt_to_keep": 9,
    }
    config = make_config(weights, tmp_path / "whole", **changed)
    job = build(config)
    loop.run(job)
    whole, parts = Path(config.output_dir), tmp_path / "parts"
    shutil.copytree(whole, parts)
    for step in (2, 3):
        shutil.rmtree(parts / "checkpoints" / str(step))
    loop.run(build(config.model_copy(update={"output_dir": str(parts)})))
    wanted, got = (run_directory.read(str(path)) for path in (whole, parts))
    clocks = ("timing_s/", "perf/", "agent/environment_s")
    for one, other in zip(wanted, got, strict=True):
        assert {k: v for k, v in one.items() if not k.startswith(clocks)} == {
            k: v for k, v in other.items() if not k.startswith(clocks)
        }
    assert wanted[-1]["agent/turns/mean"] > 2
    for step in (1, 2, 3):
        assert Result(whole).completions(step) == Result(parts).completions(step)
    like = job.abstract_state()
    for one, other in zip(
        checkpoints(whole, like), checkpoints(parts, like), strict=True
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["turn_grpo", "gae", "reinforce_plus_plus"])
def test_rewards_of_turns_are_learned_from(estimator, weights, tmp_path):
    changed = EPISODES | {"algorithm.adv_estimator": estimator, "rollout.n": 4}
    if estimator == "gae":
        changed |= {"critic.dtype": "float32", "critic.remat": "none"}
    config = make_config(weights, tmp_path, **changed)
    loop.run(build(config))
    line = run_directory.read(config.output_dir)[1]
    assert line["actor/grad_norm"] > 0 and line["mismatch/logprob_diff_max"] < 6e-5
    advantages = [
        r["advantage"] for r in Result(Path(config.output_dir)).completions(1)
    ]
    assert len(set(advantages)) > 10


class Breaks(letters.Letters):
    """Cannot go on in the second turn of some episodes."""

    def reset(self, seed):
        self._breaks = seed % 3 == 0
        return super().reset(seed)

    def step(self, text):
        if self._breaks and self._turns == 1:
            raise RuntimeError("a wheel came off")
        return super().step(text)


@pytest.mark.slow
def test_what_broke_is_masked_and_counts_nowhere(weights, tmp_path):
    name = plugins.offer(Breaks)
    changed = EPISODES | {
        "agent.environment": name,
        "agent.max_retries": 0,
        "rollout.n": 4,
        "data.val.path": str(tmp_path / "questions.jsonl"),
        "data.train.path": "episodes:play",
        "data.train.size": 16,
        "algorithm.use_kl_in_reward": True,
        "algorithm.kl_ctrl": {"type": "adaptive", "kl_coef": 0.1, "horizon": 50},
    }
    config = make_config(weights, tmp_path, **changed)
    loop.run(build(config))
    lines = run_directory.read(config.output_dir)
    records = Result(Path(config.output_dir)).completions(1)
    broken = [r for r in records if r["status"] == "env_error"]
    assert 3 < len(broken) < len(records)
    assert lines[1]["agent/masked"] == len(broken) / len(records)
    assert lines[1]["agent/status/env_error"] == lines[1]["agent/masked"]
    # The policy still is its reference, so the coefficient falls, by as many episodes
    # as were learned from.
    coefs = [line["actor/reward_kl_penalty_coeff"] for line in lines[1:]]
    fall = 0.2 * (len(records) - len(broken)) / 50
    np.testing.assert_allclose(coefs, [0.1, 0.1 * (1 - fall)], rtol=1e-5)
    assert all(r["masked"] and r["advantage"] == 0 for r in broken)
    assert all("a wheel came off" in r["why"] for r in broken)
    groups = {}
    for r in records:
        groups.setdefault(r["prompt_id"], []).append(r)
    for group in groups.values():
        kept = [r["reward"] for r in group if not r["masked"]]
        for r in group:
            if r["masked"] and kept:  # as the others are, and never 0 for nothing
                assert r["reward"] == pytest.approx(np.mean(kept), rel=1e-5)
                assert r["scores"]["environment"] is None
    assert 0 < lines[0]["val-aux/agent/masked"] < 1


@pytest.mark.slow
def test_rewards_see_environments(weights, tmp_path):
    seen = []

    def judge(completions, environments):
        seen.extend(environments)
        assert all(one._turns <= 3 for one in environments)
        return [float(len(c)) for c in completions]  # what was said last

    term = RewardFunction(name="judge", function=judge)
    config = make_config(weights, tmp_path, **EPISODES | {"agent.isolation": "auto"})
    loop.run(build(config, [term]))
    assert all(isinstance(one, letters.Letters) for one in seen) and len(seen) == 32
    line = run_directory.read(config.output_dir)[1]
    assert line["reward/judge/mean"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("how", ["whole rows", "packed rows", "gae"])
def test_contexts_of_an_episode_are_learned_from_as_one(how, tmp_path):
    tokenizer = tiny.tokenizer(templates.FORGETS)
    weights = tiny.checkpoint(tmp_path / "tiny")
    tokenizer.save_pretrained(weights)
    changed = EPISODES | {
        "agent.on_rewrite": "fork",
        "agent.max_tokens": 240,
        "agent.max_turns": 3,
        "rollout.n": 4,
        "rollout.stop_token_ids": list(range(60)),
    }
    if how == "packed rows":
        changed |= {"actor.pack_length": 400}
    if how == "gae":
        changed |= {"algorithm.adv_estimator": "gae"}
        changed |= {"critic.dtype": "float32", "critic.remat": "none"}
    config = make_config(weights, tmp_path / "run", **changed)
    loop.run(build(config))
    lines = run_directory.read(config.output_dir)
    first, records = lines[1], Result(Path(config.output_dir)).completions(1)
    assert first["mismatch/logprob_diff_max"] < 6e-5
    assert first["actor/ppo_kl"] == 0 and first["actor/grad_norm"] > 0
    forks = [sum(t["new_context"] for t in r["turns"]) for r in records]
    assert first["agent/forks"] == np.mean(forks) > 0.5
    assert len(records) == 8 * 4 and first["agent/turns/max"] == 3
    assert not [record["why"] for record in records if record["masked"]]
    for record in records:
        at, said = 0, [("user", record["opening"][0]["content"])]
        for turn in record["turns"]:
            part = record["tokens"][at : at + turn["num_tokens"]]
            at += turn["num_tokens"]
            said.append((turn["role"], turn["text"]))
            if turn["new_context"]:
                left = [text.split("\ufffd")[-1].lstrip("\n") for _, text in said]
                shown = "".join(
                    f"<|im_start|>{role}\n{text}<|im_end|>\n"
                    for (role, _), text in zip(said, left, strict=True)
                )
                assert tokenizer.decode(part) == f"{shown}<|im_start|>assistant\n"
    if how != "gae":  # an episode counts once in its group, whatever its contexts
        for p in {r["prompt_id"] for r in records}:
            group = [r for r in records if r["prompt_id"] == p]
            rewards = np.array([r["reward"] for r in group])
            wanted = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
            np.testing.assert_allclose(
                [r["advantage"] for r in group], wanted, rtol=1e-3, atol=1e-4
            )
