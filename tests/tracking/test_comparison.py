"""Expected values are worked by hand in the comments."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from jaxrl_llm.tracking import comparison
from jaxrl_llm.tracking.step_metrics import Validation


def answers(right, kind="sampled", source="all"):
    """Records of answers; `right` is, for each question, a list of 0 and 1."""
    return [
        {
            "prompt_id": question,
            "kind": kind,
            "data_source": source,
            "sample": sample,
            "correct": bool(is_right),
            "completion": f"{question}.{sample}",
        }
        for question, each in right.items()
        for sample, is_right in enumerate(each)
    ]


def test_the_interval_of_one_answer_each_is_bonett_and_prices():
    # 50 questions: 10 that only the first answers, 2 that only the second does.
    # p12 = 11/52, p21 = 3/52: (3 - 11)/52 = -0.15385;
    # 1.95996 sqrt((14/52 - 0.15385^2) / 52) = 0.13468.
    each = np.array([-1.0] * 10 + [1.0] * 2 + [0.0] * 38)
    low, high = comparison.paired_interval(each)
    assert (low, high) == pytest.approx((-0.28853, -0.01917), abs=1e-4)


def test_the_interval_has_a_width_where_nothing_differs():
    # Of 0, 0, 1, -1: variance 2/4; 1.95996 sqrt(0.5 / 4) = 0.69295.
    found = comparison.paired_interval(np.zeros(2))
    assert found == pytest.approx((-0.69295, 0.69295), abs=1e-4)
    low, high = comparison.paired_interval(np.ones(3))
    assert low < 1 and high == 1
    with pytest.raises(ValueError, match="no questions"):
        comparison.paired_interval(np.zeros(0))


@pytest.mark.parametrize("n, gain", [(1, 0.1), (4, 0.1), (4, 0.0)])
def test_the_interval_holds_the_truth_about_19_times_in_20(n, gain):
    # Hard and easy questions, each a little easier for the second model.
    rng = np.random.default_rng(0)
    runs, hits = 1000, 0
    for _ in range(runs):
        chance = rng.uniform(0, 0.9, (100, 1))
        first = (rng.random((100, n)) < chance).mean(axis=1)
        second = (rng.random((100, n)) < chance + gain).mean(axis=1)
        low, high = comparison.paired_interval(second - first)
        hits += low <= gain <= high
    # 1000 runs at 95 % have a standard error of 0.7 %.
    assert 0.93 <= hits / runs <= 0.975


def test_models_are_compared_question_by_question():
    first = Validation(
        metrics={},
        records=[
            *answers({1: [1, 0], 2: [0, 0], 3: [1, 1], 7: [0, 1]}),
            *answers({1: [1], 2: [0], 3: [1], 7: [0]}, "greedy"),
        ],
    )
    second = Validation(  # question 7 was too long for it
        metrics={},
        records=[
            *answers({3: [0, 1], 2: [1, 1], 1: [1, 0]}),
            *answers({1: [1], 2: [1], 3: [1]}, "greedy"),
        ],
    )
    found = comparison.compare(first, second)
    assert found.keys() == {"val-core/all/acc/mean@2", "val-core/all/acc/greedy"}
    sampled = found["val-core/all/acc/mean@2"]
    # 0, 1 and -1/2 for questions 1, 2 and 3.
    assert sampled.change == pytest.approx(0.5 / 3)
    assert (sampled.questions, sampled.better, sampled.worse) == (3, 1, 1)
    low, high = comparison.paired_interval(np.array([0.0, 1.0, -0.5]))
    assert (sampled.ci95_low, sampled.ci95_high) == pytest.approx((low, high))
    greedy = found["val-core/all/acc/greedy"]
    assert greedy.change == pytest.approx(1 / 3) and greedy.worse == 0


def results():
    name = "val-core/HuggingFaceH4/MATH-500/acc/mean@1"

    def found(share, **right):
        metrics = {name: share, f"{name}/ci95_low": 0.125, f"{name}/ci95_high": 0.875}
        records = answers(
            {int(q[1:]): [r] for q, r in right.items()}, source="HuggingFaceH4/MATH-500"
        )
        metrics["val-aux/response_length/mean"] = 1000 * share
        return Validation(metrics=metrics, records=records)

    models = {
        "Qwen/Qwen2.5-0.5B-Instruct": found(0.25, q1=1, q2=0, q3=0, q4=0),
        "runs/a-rather-long-name/checkpoints/40": found(0.75, q1=1, q2=1, q3=1, q4=0),
    }
    first, second = models.values()
    return models, {list(models)[1]: comparison.compare(first, second)}


@pytest.mark.parametrize("width", [60, 80, 120])
def test_one_table_has_every_model_under_every_metric(width):
    console = Console(file=io.StringIO(), force_terminal=False, width=width)
    comparison.show(*results(), console=console)
    shown = console.file.getvalue()
    assert all(len(line) <= width for line in shown.splitlines())
    # The differences 0, 1, 1, 0 and 1, -1: mean 1/3, variance 2/3 - 1/9;
    # 1.95996 sqrt(0.55556 / 6) = 0.59640.
    for text in ("0.25", "0.75", "+0.5", "[0.125, 0.875]", "[-0.263, 0.93]", "+500"):
        assert text in shown
    joined = "".join(shown.split())
    assert "change:fromQwen/Qwen2.5-0.5B-Instruct" in joined


def test_what_came_of_it_is_written_and_an_earlier_one_kept(tmp_path):
    models, differences = results()
    folder = tmp_path / "run"
    assert comparison.set_aside(folder) == []
    comparison.write(folder, models, differences, {"config": {"seed": 3}})
    found = json.loads((folder / "eval.json").read_text())
    assert found["config"] == {"seed": 3}
    assert [one["model"] for one in found["models"]] == list(models)
    assert found["models"][0]["differences_from_first"] == {}
    (between,) = found["models"][1]["differences_from_first"].values()
    assert between["change"] == 0.5 and between["better"] == 2
    text = (folder / "eval.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["model"] for line in lines] == [m for m in models for _ in range(4)]
    assert lines[5]["completion"] == "2.0" and lines[5]["correct"] is True

    said = comparison.set_aside(folder)
    assert len(said) == 2 and "eval.1.json" in said[0]
    comparison.write(folder, models, differences, {})
    comparison.set_aside(folder)
    assert (folder / "eval.1.jsonl").read_text() == text
    assert (folder / "eval.2.json").exists() and not (folder / "eval.json").exists()
