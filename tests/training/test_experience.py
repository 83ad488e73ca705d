"""Which responses a step trains on, and what it takes off their reward."""

import contextlib
import dataclasses
import shutil
from pathlib import Path

import chex
import numpy as np
import pytest
import scored_texts
import tiny
from short_run import GRPO, make_config, mean_id, newest

from jaxrl_llm.config.parsing import ConfigError
from jaxrl_llm.data.stream import PromptBatches
from jaxrl_llm.data.types import Completion, Prompt, Scores
from jaxrl_llm.rewards import RewardFunction
from jaxrl_llm.rewards.builtin import overlong_penalty
from jaxrl_llm.rewards.scoring import join
from jaxrl_llm.rollout.engine import Engine, generate
from jaxrl_llm.tracking import run_directory
from jaxrl_llm.tracking.result import Result
from jaxrl_llm.training import experience as collect
from jaxrl_llm.training import loop as train
from jaxrl_llm.training.build import build
from jaxrl_llm.training.credit import draw_again


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("model") / "tiny")


def of_odd_prompts(prompts, completion_ids, **columns):
    """Prompts are "0 says", "1 says" ...; all responses to an even one are worth 1."""
    odd = [int(prompt.split()[0]) % 2 for prompt in prompts]
    scores = mean_id(completion_ids)
    return [x if o else 1.0 for x, o in zip(scores, odd, strict=True)]


def run(config, reward):
    job = build(config, [RewardFunction(name="given", function=reward)])
    train.run(job)
    return job, run_directory.read(config.output_dir)


def responses(config, step, split="train"):
    return Result(Path(config.output_dir)).completions(step, split)


@pytest.mark.slow
def test_only_groups_that_differ_are_trained_on(weights, tmp_path):
    changed = GRPO | {
        "data.train_batch_size": 4,
        "algorithm.filter_groups": {},
        "trainer.save_freq": 1,
        "trainer.total_training_steps": 2,
    }
    config = make_config(weights, tmp_path, **changed)
    job, lines = run(config, of_odd_prompts)
    for line in lines[1:]:
        asked = [r["prompt"] for r in responses(config, line["step"])]
        assert len(asked) == 4 * 2
        assert all(int(prompt.split()[0]) % 2 for prompt in asked)
        assert line["training/groups_generated"] >= 8
        assert line["training/groups_kept"] == 4
        assert 0 < line["training/groups_all_equal"] < 1  # of all that were generated
        kept = np.array([r["reward"] for r in responses(config, line["step"])])
        assert line["critic/rewards_kept/mean"] == pytest.approx(kept.mean())
        assert line["critic/rewards/max"] == 1 > line["critic/rewards_kept/max"]

    # Where the data stands after a step with several batches is part of the run.
    parts = tmp_path / "resumed"
    shutil.copytree(config.output_dir, parts)
    shutil.rmtree(parts / "checkpoints" / "2")
    again = config.model_copy(update={"output_dir": str(parts)})
    run(again, of_odd_prompts)
    like = job.abstract_state()
    chex.assert_trees_all_equal(newest(tmp_path / "run", like), newest(parts, like))


@pytest.mark.slow
def test_a_task_without_differences_gives_up_after_the_bound(weights, tmp_path):
    changed = GRPO | {"algorithm.filter_groups": {"max_num_gen_batches": 2}}
    config = make_config(weights, tmp_path, **changed)
    with pytest.raises(
        ValueError,
        match="in 2 batches of 8 prompts only 0 groups .* differ in reward, 8 are "
        "needed; raise algorithm.filter_groups.max_num_gen_batches",
    ):
        run(config, lambda completion_ids: [1.0] * len(completion_ids))


def test_what_must_differ_is_something_that_rewards_return(weights, tmp_path):
    changed = GRPO | {"algorithm.filter_groups": {"metric": "acc"}}
    config = make_config(weights, tmp_path, **changed)
    term = RewardFunction(name="given", function=mean_id, trusted=True)
    with pytest.raises(ConfigError, match="acc; use reward or one of .*given"):
        build(config, [term])


def test_groups_may_have_to_differ_in_a_number_beside_the_score():
    def judge(completions):  # of "a" and "bb", and of "ccc" and ""
        return [{"score": 1.0, "acc": float(c == "ccc")} for c in completions]

    term = RewardFunction(name="mine", function=judge, trusted=True)
    scores = scored_texts.run(term)
    assert collect.differing(scores, "acc") == [1]
    assert collect.differing(scores, "mine") == []
    with pytest.raises(ConfigError, match="acc2, which no .* one of reward, mine, acc"):
        collect.differing(scores, "acc2")
    # Where all calls failed, nobody knows what would have been returned.
    failed = dataclasses.replace(scores, details={}, errors={"mine": 4})
    assert collect.differing(failed, "acc") == []


def test_what_no_function_judges_does_not_make_a_group_differ():
    judged = np.array([[1, np.nan], [np.nan, np.nan], [0, 1], [0, np.nan]], np.float32)
    total = np.nan_to_num(judged)
    scores = Scores(total=total, by_function={"a": judged}, errors={"a": 0})
    assert collect.differing(scores, "reward") == collect.differing(scores, "a") == [2]
    also = np.array([[0, 0], [0, 0], [0, 0], [np.nan, 2]], np.float32)
    scores = Scores(
        total=total + np.nan_to_num(also),
        by_function={"a": judged, "b": also},
        errors={"a": 0, "b": 0},
    )
    assert collect.differing(scores, "reward") == [0, 2, 3]


def test_differing_groups_by_hand():
    total = np.array([[1, 1], [0, 1], [2, 2]], np.float32)
    exact = np.array([[0, 1], [1, 1], [np.nan, np.nan]], np.float32)
    scores = Scores(total=total, by_function={"exact": exact}, errors={"exact": 1})
    assert collect.differing(scores, "reward") == [1]
    assert collect.differing(scores, "exact") == [0]
    both = join([scores.take([1]), scores.take([2, 0])])
    np.testing.assert_array_equal(both.total, [[0, 1], [2, 2], [1, 1]])
    np.testing.assert_array_equal(both.by_function["exact"][0], [1, 1])
    assert both.errors == {"exact": 2}


def test_a_prompt_that_comes_back_gets_other_responses(weights, tmp_path):
    config = make_config(weights, tmp_path, **GRPO)
    job = build(config, [RewardFunction(name="given", function=mean_id)])
    job.engine.load(job.actor.read_weights("float32"), 0)
    asked = job.data.train[:1]
    first, again, other = (
        generate(job.engine, collect.requests(config, asked, 1, attempt))[0][0].tokens
        for attempt in (0, 0, 1)
    )
    assert first.tolist() == again.tolist() != other.tolist()


@pytest.mark.slow
def test_remax_compares_with_the_greedy_response(weights, tmp_path):
    changed = GRPO | {
        "algorithm.adv_estimator": "remax",
        "rollout.n": 1,
        "actor.optim.lr": 0.0,
    }
    config = make_config(weights, tmp_path, **changed)
    job, _ = run(config, mean_id)
    records = responses(config, 2)
    by_id = {prompt.id: prompt for prompt in job.data.train}
    asked = [by_id[r["prompt_id"]] for r in records]
    requests = collect.greedily(collect.requests(config, asked, 2))
    greedy = [group[0].tokens for group in generate(job.engine, requests)]
    for record, tokens in zip(records, greedy, strict=True):
        expected = mean_id([record["tokens"]])[0] - mean_id([tokens])[0]
        assert record["advantage"] == pytest.approx(expected, abs=1e-6)
    assert any(r["tokens"] != t.tolist() for r, t in zip(records, greedy, strict=True))


class Echo(Engine):
    """An engine whose responses tell the sample, or that they are the likeliest."""

    def submit(self, requests):
        self.requests = requests

    def completions(self, more=None):
        for request in self.requests:
            for sample in range(request.num_samples):
                token = sample if request.sampling.temperature else 9
                yield Completion(
                    prompt_id=request.prompt_id,
                    sample=sample,
                    tokens=np.array([token], np.int32),
                    logprobs=np.zeros(1, np.float32),
                    raw_logprobs=np.zeros(1, np.float32),
                    finish_reason="length",
                    weight_version=0,
                    text=str(token),
                )


def test_a_prompt_that_is_kept_twice_has_one_greedy_response(tmp_path):
    changed = GRPO | {
        "algorithm.adv_estimator": "remax",
        "algorithm.filter_groups": {},
        "data.train_batch_size": 2,
    }
    config = make_config("not read", tmp_path, **changed)
    prompts = [Prompt(id=i, content="", tokens=(1,), columns={}) for i in range(3)]
    stream = PromptBatches(prompts, 2, seed=0, shuffle=False)

    def score(asked, rollouts):
        """The responses to prompt 0 differ, and no others."""
        total = [
            [float(r.tokens[0]) if prompt.id == 0 else 5.0 for r in group]
            for prompt, group in zip(asked, rollouts, strict=True)
        ]
        total = np.array(total, np.float32)
        return Scores(total=total, by_function={"f": total}, errors={"f": 0})

    def observe(name):
        return contextlib.nullcontext()

    # The second batch is of prompt 2 and of prompt 0 again.
    groups = collect.collect(config, Echo(), score, stream, observe, 1)
    assert [prompt.id for prompt in groups.asked] == [0, 0]
    np.testing.assert_array_equal(groups.baselines, [9.0, 9.0])


def test_a_greedy_response_that_nobody_judged_is_no_baseline_of_0(tmp_path):
    changed = GRPO | {
        "algorithm.adv_estimator": "remax",
        "data.train_batch_size": 2,
        "rollout.n": 3,
    }
    config = make_config("not read", tmp_path, **changed)
    prompts = [Prompt(id=i, content="", tokens=(1,), columns={}) for i in range(2)]
    stream = PromptBatches(prompts, 2, seed=0, shuffle=False)

    def score(asked, rollouts):
        """Nothing judges the greedy response to prompt 1, nor sample 0."""
        given = [
            [
                np.nan if prompt.id and r.tokens[0] in (0, 9) else float(r.tokens[0])
                for r in group
            ]
            for prompt, group in zip(asked, rollouts, strict=True)
        ]
        given = np.array(given, np.float32)
        total = np.nan_to_num(given)
        return Scores(total=total, by_function={"f": given}, errors={"f": 0})

    def observe(name):
        return contextlib.nullcontext()

    groups = collect.collect(config, Echo(), score, stream, observe, 1)
    np.testing.assert_array_equal(groups.baselines, [9.0, 1.5])


def test_the_overlong_penalty_by_hand():
    ids = [[0] * n for n in (1, 6, 7, 8, 10)]
    found = overlong_penalty(ids, max_length=10, buffer=4, factor=2.0)
    np.testing.assert_allclose(found, [0, 0, -0.5, -1.0, -2.0])


@pytest.mark.slow
def test_long_responses_cost_in_training_only(weights, tmp_path):
    changed = GRPO | {
        "reward.overlong_buffer": {"len": 4, "penalty_factor": 0.5},
        "data.val.path": str(tmp_path / "questions.jsonl"),
        "data.val.size": 1,
        "trainer.total_training_steps": 1,
    }
    config = make_config(weights, tmp_path, **changed)
    run(config, mean_id)
    records = responses(config, 1)
    assert {r["num_tokens"] for r in records} & {3, 4, 5, 6}
    for r in records:
        penalty = 0.5 * min(0, (2 - r["num_tokens"]) / 4)
        assert r["reward"] == pytest.approx(mean_id([r["tokens"]])[0] + penalty)
        assert r["scores"]["overlong_penalty"] == pytest.approx(penalty)
    for r in responses(config, 1, "val"):
        assert r["reward"] == pytest.approx(mean_id([r["tokens"]])[0])


@pytest.mark.slow
def test_a_refreshed_reference_is_the_policy_and_survives_a_restart(weights, tmp_path):
    changed = GRPO | {
        "actor.use_kl_loss": True,
        "actor.ref_refresh_steps": 2,
        "data.train_batch_size": 4,
        "trainer.total_training_steps": 4,
        "trainer.save_freq": 1,
        "trainer.max_ckpt_to_keep": 9,
    }
    config = make_config(weights, tmp_path, **changed)
    job, lines = run(config, mean_id)
    kl = {line["step"]: line["actor/kl_loss"] for line in lines if line["step"]}
    assert kl[1] == kl[3] == 0 and kl[2] > 1e-4 and kl[4] > 1e-4

    parts = tmp_path / "resumed"
    shutil.copytree(config.output_dir, parts)
    shutil.rmtree(parts / "checkpoints" / "4")
    run(config.model_copy(update={"output_dir": str(parts)}), mean_id)
    like = job.abstract_state()
    chex.assert_trees_all_equal(newest(tmp_path / "run", like), newest(parts, like))


@pytest.mark.slow
@pytest.mark.parametrize(
    "estimator",
    [
        "optimal_token_baseline",
        # Needs less of the same; its advantages are in test_verl_parity.
        pytest.param("tir_optimal_token_baseline", marks=pytest.mark.slow),
    ],
)
def test_a_token_baseline_gets_what_it_needs(weights, tmp_path, estimator):
    changed = GRPO | {
        "algorithm.adv_estimator": estimator,
        "trainer.total_training_steps": 1,
    }
    config = make_config(weights, tmp_path, **changed)
    _, lines = run(config, mean_id)
    assert np.isfinite(lines[1]["actor/pg_loss"]) and lines[1]["actor/grad_norm"] > 0


@pytest.mark.slow
def test_pf_ppo_trains_on_the_best_and_the_worst_only(weights, tmp_path):
    config = make_config(
        weights,
        tmp_path,
        **{
            "algorithm.pf_ppo": {"reweight_method": "max_min"},
            "trainer.total_training_steps": 1,
        },
    )
    job = build(config, [RewardFunction(name="given", function=mean_id)])
    rewards = np.array([[0.5, 0.1], [0.2, 0.9]], np.float32)
    rows, _ = two_groups(job)
    drawn = draw_again(job, rows, rewards, 1)
    assert drawn.num_sequences == rows.num_sequences == 4
    best_and_worst = {tuple(tokens_of(rows, s)) for s in (1, 2 + 1)}
    assert {tuple(tokens_of(drawn, s)) for s in range(4)} <= best_and_worst
    train.run(job)


def two_groups(job):
    job.engine.load(job.actor.read_weights("float32"), 0)
    asked = job.data.train[:2]
    rollouts = generate(job.engine, collect.requests(job.config, asked, 1))
    zeros = np.zeros((2, 2), np.float32)
    return job.actor.make_rows(asked, rollouts, zeros), rollouts


def tokens_of(rows, sequence):
    return rows.tokens[rows.sequence_ids == sequence].tolist()
