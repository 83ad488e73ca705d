"""Several models on the same held-out questions: what each gets right, and what lies
between them.

The models answer the same questions, so the difference is taken question by question:
its interval is narrower than those of two models by themselves say.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.console import Console

from jaxrl_llm.tracking import console as view
from jaxrl_llm.tracking import run_directory
from jaxrl_llm.tracking.step_metrics import Validation

RESULT, ANSWERS = "eval.json", "eval.jsonl"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What lies between two models in one share of correct answers."""

    change: float
    """Share of the second model less that of the first."""
    ci95_low: float
    ci95_high: float
    """95 % interval of the change, over questions like these."""
    questions: int
    """Those that both answered."""
    better: int
    """Questions that the second model answers correctly more often."""
    worse: int
    """Questions that it answers correctly less often."""


def paired_interval(differences: Float[np.ndarray, " Q"]) -> tuple[float, float]:
    """95 % interval for the mean difference of two shares, over questions like these.

        m +- z sqrt(v / (Q + 2))      m, v: mean and variance of d_1 ... d_Q, 1, -1

    Two questions are added that the models answer differently, one for each: the
    interval has a width even where no answer differs. With one answer to a question it
    is Bonett and Price's interval for paired proportions.

    Args:
      differences: for each question, the share of correct answers of the second model
        less that of the first; in -1 .. 1.

    Raises:
      ValueError: there are no questions.

    Source: Bonett and Price 2012, "Adjusted Wald confidence interval for a difference
    of binomial proportions based on paired data".
    """
    if not differences.size:
        raise ValueError("there are no questions that both models answered")
    added = np.append(differences, [1.0, -1.0])
    reach = 1.959963984540054 * math.sqrt(float(added.var()) / len(added))
    middle = float(added.mean())
    return max(middle - reach, -1.0), min(middle + reach, 1.0)


def compare(first: Validation, second: Validation) -> dict[str, Difference]:
    """What lies between two models, by the name of the share of correct answers."""
    before, after = _shares(first), _shares(second)
    found = {}
    for name in before:
        both = [
            question for question in before[name] if question in after.get(name, ())
        ]
        if not both:
            continue
        each = np.array([after[name][q] - before[name][q] for q in both])
        low, high = paired_interval(each)
        found[name] = Difference(
            change=float(each.mean()),
            ci95_low=low,
            ci95_high=high,
            questions=len(both),
            better=int((each > 0).sum()),
            worse=int((each < 0).sum()),
        )
    return found


def show(
    results: Mapping[str, Validation],
    differences: Mapping[str, Mapping[str, Difference]],
    *,
    console: Console | None = None,
) -> None:
    """Prints one table: under each metric every model and its change from the first.

    Args:
      results: by the name of the model.
      differences: of `compare` with the first model; by the name of the other one.
    """
    console = console or Console()
    wide = console.width >= 80
    first = next(iter(results.values())).metrics
    rows: list[tuple[str, list[str]]] = []
    for metric in first:
        if "/ci95_" in metric:
            continue
        rows.append((metric, ["", ""]))
        for model, result in results.items():
            change, between = "", differences.get(model, {}).get(metric)
            if between:
                change = view.signed(between.change)
                ends = f"[{between.ci95_low:.3g}, {between.ci95_high:.3g}]"
                change += (" " if wide else "\n") + ends
            elif result.metrics is not first and metric in result.metrics:
                change = view.signed(result.metrics[metric] - first[metric])
            text = view.with_interval(metric, result.metrics, wide)
            rows.append((f"  {model}", [text, change]))
    named = next(iter(results))
    title = "Held-out questions"
    view.print_numbers(title, ["value", "change"], rows, console)
    notes = [
        "[low, high]: 95 % interval over questions",
        f"change: from {named}; its interval is of differences question by question",
    ]
    for note in notes:
        console.print(note, markup=False, highlight=False, emoji=False)


def write(
    directory: Path,
    results: Mapping[str, Validation],
    differences: Mapping[str, Mapping[str, Difference]],
    about: Mapping[str, Any],
) -> None:
    """Writes DIRECTORY/eval.json, what came of it, and DIRECTORY/eval.jsonl, every
    answer; each whole or not at all.

    Args:
      results: by the name of the model.
      differences: of `compare` with the first model; by the name of the other one.
      about: more to write down, such as the configuration.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"model": model, **record}) + "\n"
        for model, result in results.items()
        for record in result.records
    ]
    run_directory.replace_text(directory / ANSWERS, "".join(lines))
    models = [
        {
            "model": model,
            "metrics": result.metrics,
            "differences_from_first": {
                name: asdict(one) for name, one in differences.get(model, {}).items()
            },
        }
        for model, result in results.items()
    ]
    text = json.dumps({"models": models, **about}, indent=2) + "\n"
    run_directory.replace_text(directory / RESULT, text)


def set_aside(directory: Path) -> list[str]:
    """Gives an earlier evaluation's files the names eval.1.json and so on, and says so
    in a line each."""
    number = 1
    while any((directory / f"eval.{number}{Path(n).suffix}").exists() for n in _NAMES):
        number += 1
    said = []
    for name in _NAMES:
        path = directory / name
        if path.exists():
            aside = path.with_name(f"eval.{number}{path.suffix}")
            path.rename(aside)
            said.append(f"{path} of an earlier evaluation is now {aside}")
    return said


_NAMES = (RESULT, ANSWERS)


def _shares(found: Validation) -> dict[str, dict[int, float]]:
    """For each share of correct answers that has an interval, that of each question."""
    answers: dict[str, dict[int, list[bool]]] = {}
    for record in found.records:
        kind = "greedy" if record["kind"] == "greedy" else "mean@"
        source = f"val-core/{record.get('data_source', 'all')}/acc/{kind}"
        answers.setdefault(source, {}).setdefault(record["prompt_id"], []).append(
            record["correct"]
        )
    shares = {}
    for name, questions in answers.items():
        n = len(next(iter(questions.values())))
        full = name + (str(n) if name.endswith("@") else "")
        shares[full] = {q: sum(right) / len(right) for q, right in questions.items()}
    return shares
