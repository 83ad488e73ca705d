"""Expected values are worked by hand in the comments, or counted by brute force."""

import itertools
import math

import numpy as np
import pytest

from jaxrl_llm.config.schema import RolloutConfig, ValConfig
from jaxrl_llm.data.types import Completion, Prompt, Scores
from jaxrl_llm.training import evaluate


def bools(rows):
    return np.array(rows, bool)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_pass_at_k_is_the_mean_over_all_choices_of_k_answers(k):
    correct = bools([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 0]])
    choices = list(itertools.combinations(range(4), k))
    expected = np.mean([[row[list(c)].any() for c in choices] for row in correct])
    assert evaluate.pass_at_k(correct, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_of_many_answers_does_not_overflow():
    # 1 of 1000 right: each choice of 10 holds it with chance 10/1000.
    correct = np.arange(1000)[None, :] == 3
    assert evaluate.pass_at_k(correct, 10) == pytest.approx(0.01, rel=1e-9)


@pytest.mark.parametrize("k", [0, 3])
def test_pass_at_k_needs_k_answers(k):
    with pytest.raises(ValueError, match=f"k={k}, n=2"):
        evaluate.pass_at_k(bools([[1, 0]]), k)


def test_mean_at_k_is_over_answers_then_questions():
    assert evaluate.mean_at_k(np.array([[1.0, 0.0], [0.5, 0.5]])) == 0.5


def test_with_one_answer_per_question_the_interval_is_wilsons():
    # 8 of 10: Wilson's 95 % interval is [0.490, 0.943] (Wikipedia's formula, by hand:
    # z^2 = 3.8415; middle (0.8 + 0.19207) / 1.38415 = 0.71674;
    # reach 1.95996 sqrt(0.016 + 0.0096037) / 1.38415 = 0.22658).
    low, high = evaluate.confidence_interval(bools([[1]] * 8 + [[0]] * 2))
    assert low == pytest.approx(0.71674 - 0.22658, abs=1e-5)
    assert high == pytest.approx(0.71674 + 0.22658, abs=1e-5)


def test_the_interval_has_a_width_when_everything_is_right_or_wrong():
    # Wilson at p = 1: from 1 / (1 + z^2 / Q) to 1.
    low, high = evaluate.confidence_interval(bools([[1] * 4] * 10))
    assert (low, high) == pytest.approx((1 / 1.38415, 1.0), abs=1e-5)
    low, high = evaluate.confidence_interval(bools([[0] * 4] * 10))
    assert (low, high) == pytest.approx((0.0, 1 - 1 / 1.38415), abs=1e-5)
    assert 0 <= low < high <= 1


def test_answers_that_always_agree_count_once():
    once = bools([[1]] * 8 + [[0]] * 2)
    assert evaluate.confidence_interval(np.repeat(once, 16, axis=1)) == pytest.approx(
        evaluate.confidence_interval(once)
    )


def test_no_answers_have_no_interval():
    with pytest.raises(ValueError, match="0 questions"):
        evaluate.confidence_interval(np.zeros((0, 3), bool))


@pytest.mark.parametrize(
    "questions, n, a, b",
    [(50, 1, 2, 3), (50, 4, 0.3, 0.7), (50, 8, 2, 3), (200, 4, 0.1, 0.9)],
)
def test_the_interval_holds_the_truth_about_19_times_in_20(questions, n, a, b):
    # Questions differ: each has its own chance of being answered, Beta(a, b).
    rng = np.random.default_rng(0)
    runs, hits = 1000, 0
    for _ in range(runs):
        chance = rng.beta(a, b, (questions, 1))
        low, high = evaluate.confidence_interval(rng.random((questions, n)) < chance)
        hits += low <= a / (a + b) <= high
    # 1000 runs at 95 % have a standard error of 0.7 %.
    assert 0.93 <= hits / runs <= 0.975


class ScriptedEngine:
    """Says the sample index when sampling, "greedy" at temperature 0."""

    def __init__(self):
        self.batches = []

    def load(self, params, version):
        return 0

    def submit(self, requests):
        self.batches.append(list(requests))

    def memory(self, num_rows, num_tokens):
        return {}

    def programs(self, uses, prompts, resident=None):
        return {}

    def close(self):
        pass

    def completions(self, more=None):
        for request in reversed(self.batches[-1]):
            for sample in range(request.num_samples):
                greedy = request.sampling.temperature == 0
                yield Completion(
                    prompt_id=request.prompt_id,
                    sample=sample,
                    tokens=np.zeros(1 + sample, np.int32),
                    logprobs=np.zeros(1 + sample, np.float32),
                    raw_logprobs=np.zeros(1 + sample, np.float32),
                    finish_reason="length" if sample == 3 else "stop",
                    weight_version=0,
                    text="greedy" if greedy else str(sample),
                )


def score(prompts, completions):
    """1 where the reply is among the accepted ones."""
    total = np.array(
        [
            [float(c.text in p.columns["accepted"]) for c in group]
            for p, group in zip(prompts, completions, strict=True)
        ],
        np.float32,
    )
    unjudged = np.full_like(total, np.nan)
    return Scores(
        total=total, by_function={"f": total, "g": unjudged}, errors={"f": 0, "g": 0}
    )


def question(id, accepted, **columns):
    columns |= {"accepted": accepted, "answer": accepted[0]}
    return Prompt(id=id, content="?", tokens=(id,), columns=columns)


QUESTIONS = [question(3, ["0", "greedy"]), question(9, ["0", "1", "2", "3"])]
ROLLOUT = RolloutConfig(max_response_length=7, stop=("END",), stop_token_ids=(4,))


def validate(prompts, config, engine=None):
    engine = engine or ScriptedEngine()
    return evaluate.validate(
        engine, prompts, score, config=config, rollout=ROLLOUT, seed=11, step=20
    )


def test_validation_metrics_by_hand():
    found = validate(QUESTIONS, ValConfig(n=4)).metrics
    low, high = evaluate.confidence_interval(bools([[1, 0, 0, 0], [1, 1, 1, 1]]))
    greedy_low, greedy_high = evaluate.confidence_interval(bools([[1], [0]]))
    assert found == {
        "val-core/all/reward/mean@4": 0.625,  # (1/4 + 4/4) / 2
        "val-core/all/acc/mean@4": 0.625,
        "val-core/all/acc/mean@4/ci95_low": low,
        "val-core/all/acc/mean@4/ci95_high": high,
        # 1 of 4 right: half of the pairs hold it.
        "val-core/all/acc/best@2/mean": pytest.approx(0.75),
        "val-core/all/acc/best@4/mean": 1.0,
        "val-aux/all/f/mean@4": 0.625,
        "val-aux/response_length/mean": 2.5,
        "val-aux/response_length/clip_ratio": 0.25,
        "val-core/all/acc/greedy": 0.5,
        "val-core/all/acc/greedy/ci95_low": greedy_low,
        "val-core/all/acc/greedy/ci95_high": greedy_high,
    }


def test_data_sources_are_measured_apart():
    prompts = [
        question(1, ["0"], data_source="easy"),
        question(2, ["x"], data_source="hard"),
        question(3, ["0"], data_source="easy"),
    ]
    found = validate(prompts, ValConfig(greedy=False)).metrics
    assert found["val-core/easy/acc/mean@1"] == 1.0
    assert found["val-core/hard/acc/mean@1"] == 0.0
    assert not any("greedy" in name for name in found)


def test_a_reward_below_the_threshold_is_not_correct():
    found = validate(QUESTIONS[1:], ValConfig(threshold=1.5, greedy=False)).metrics
    assert found["val-core/all/reward/mean@1"] == 1.0
    assert found["val-core/all/acc/mean@1"] == 0.0


def test_each_validation_asks_the_same_with_the_same_seed():
    engine = ScriptedEngine()
    config = ValConfig(n=2, temperature=0.7, top_p=0.9, top_k=5, min_p=0.1)
    validate(QUESTIONS, config, engine)
    validate(QUESTIONS, config, engine)
    sampled, greedy, again, greedy_again = engine.batches
    assert sampled == again and greedy == greedy_again
    assert [r.prompt_id for r in sampled] == [r.prompt_id for r in greedy] == [3, 9]
    assert {r.seed for r in sampled} == {11} and sampled[0].tokens == (3,)
    assert [r.num_samples for r in sampled] == [2, 2]
    drawn, best = sampled[0].sampling, greedy[0].sampling
    assert (drawn.temperature, drawn.top_p, drawn.top_k, drawn.min_p) == (
        *(0.7, 0.9, 5, 0.1),
    )
    assert best.temperature == 0
    for limits in (drawn, best):
        assert (limits.max_tokens, limits.stop, limits.stop_token_ids) == (
            *(7, ("END",), (4,)),
        )


def test_records_say_which_answer_was_correct():
    records = validate(QUESTIONS, ValConfig(n=2)).records
    found = [(r["prompt_id"], r["kind"], r["sample"], r["correct"]) for r in records]
    assert found == [
        (3, "sampled", 0, True),
        (3, "sampled", 1, False),
        (9, "sampled", 0, True),
        (9, "sampled", 1, True),
        (3, "greedy", 0, True),
        (9, "greedy", 0, False),
    ]
    assert {(r["step"], r["split"]) for r in records} == {(20, "val")}
    assert math.isfinite(records[0]["reward"])


def test_a_validation_without_questions_is_an_error():
    with pytest.raises(ValueError, match="no held-out questions"):
        validate([], ValConfig())
