"""Greedy answers to the same held-out questions, side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxrl_llm.tracking.rollout_digest import MAX_PAIRS, Digest, cut, greedy_answers
from jaxrl_llm.tracking.run_directory import completions, reply


def paired(
    runs: Sequence[Sequence[Digest]],
) -> tuple[list[dict[str, Any]], list[list[dict[str, Any]]]]:
    """The greedy answers of runs to held-out questions, paired by question.

    Returns:
      The questions whose answers are there as text, at most `MAX_PAIRS`: first those
      that are answered rightly in one of the first and last validations and wrongly in
      another. And the validations of each run: "correct" has "1", "0" or " " (not
      asked) for each question, the questions with text first and in their order;
      "texts" has, in the first and the last validation, the answers to these.
    """
    validated = [[one for one in found if one.greedy] for found in runs]
    ends = {one.path: one for found in validated for one in (found[:1] + found[-1:])}
    texts = {path: greedy_answers(completions(path)) for path in ends}
    asked = {
        key: record for records in texts.values() for key, record in records.items()
    }
    changed = {
        key
        for key in asked
        if len({one.greedy[key] for one in ends.values() if key in one.greedy}) > 1
    }
    shown = sorted(asked, key=lambda key: key not in changed)[:MAX_PAIRS]
    others = (key for found in validated for one in found for key in one.greedy)
    order = list(dict.fromkeys([*shown, *others]))
    questions = [
        {"prompt": cut(asked[key]["prompt"]), "answer": _cut(asked[key]["answer"])}
        for key in shown
    ]
    return questions, [
        [
            {
                "step": one.step,
                "correct": "".join(_mark(one.greedy.get(key)) for key in order),
                "texts": [_completion(texts[one.path].get(key)) for key in shown]
                if one.path in texts
                else None,
            }
            for one in found
        ]
        for found in validated
    ]


def _mark(correct: bool | None) -> str:
    return " " if correct is None else "01"[correct]


def _completion(record: Mapping[str, Any] | None) -> str | None:
    return None if record is None else cut(reply(record))


def _cut(answer: Any) -> str | None:
    return None if answer is None else cut(str(answer))
