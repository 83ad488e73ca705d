"""The little of a run's rollouts that its report shows.

A rollouts file does not change once it is there, so a report that is written again and
again reads each but once.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxrl_llm.tracking.run_directory import completions, reply, rollout_files

MAX_FILES = 40
"""Steps per split that are read: evenly spaced, first and last included."""
MAX_PER_STEP = 24
"""Completions per step and kind that are kept, evenly spaced, besides those whose
tokens are known one by one."""
MAX_CHARACTERS = 4000
"""Characters that are kept of one prompt or completion; the middle of a longer one is
left out, visibly."""
MAX_VALUES = 64
"""Values that stand for the distribution of one quantity in one step."""
MAX_PAIRS = 200
"""Held-out questions whose first and last answers are kept as text."""

DISTRIBUTIONS = {"reward": "reward", "advantage": "advantage", "length": "num_tokens"}
"""The field of a record of training behind each distribution."""


@dataclass(frozen=True, kw_only=True)
class Digest:
    """What is kept of one rollouts file."""

    path: Path
    step: int
    split: str
    read: int
    """Completions in the file."""
    records: list[dict[str, Any]]
    """What the page shows of them, texts cut."""
    distributions: dict[str, list[float]]
    """Numbers of all responses that were trained on: `MAX_VALUES` order statistics
    each."""
    greedy: dict[str, bool]
    """Whether the greedy answer to each held-out question is correct, by the question's
    `key`."""


@dataclass
class Digests:
    """What is kept of every rollouts file of a run that its report shows.

    Args:
      per_step: completions of one step and kind.
    """

    directory: Path
    per_step: int = MAX_PER_STEP
    num_files: int = 0
    """Rollouts files that there are."""
    _known: dict[tuple[Path, int], Digest] = field(default_factory=dict)

    def refresh(self) -> list[Digest]:
        """Reads what is new. Returns what there is, by split and step.

        Raises:
          ValueError: a line is damaged.
        """
        files = rollout_files(self.directory)
        self.num_files = len(files)
        known = {}
        for split in sorted({split for _, split, _ in files}):
            of_split = [(step, path) for step, of, path in files if of == split]
            for step, path in every(of_split, MAX_FILES):
                key = path, path.stat().st_mtime_ns
                known[key] = self._known.get(key) or digest(
                    path, step, split, self.per_step
                )
        self._known = known
        return [*known.values()]


def digest(path: Path, step: int, split: str, per_step: int = MAX_PER_STEP) -> Digest:
    """What is kept of one rollouts file.

    Raises:
      ValueError: a line is damaged.
    """
    records = completions(path)
    shown: list[dict[str, Any]] = []
    for kind in dict.fromkeys(record["kind"] for record in records):
        same = [record for record in records if record["kind"] == kind]
        rest = [record for record in same if "token_details" not in record]
        kept = [record for record in same if "token_details" in record]
        kept = kept[:per_step] + thin(rest, per_step - len(kept[:per_step]))
        shown += [_short(record) for record in kept]
    trained = [record for record in records if record["kind"] == "train"]
    return Digest(
        path=path,
        step=step,
        split=split,
        read=len(records),
        records=shown,
        distributions={
            name: thin(sorted(r[of] for r in trained), MAX_VALUES)
            for name, of in DISTRIBUTIONS.items()
            if trained and all(isinstance(r.get(of), int | float) for r in trained)
        },
        greedy={key: bool(r["correct"]) for key, r in greedy_answers(records).items()},
    )


def greedy_answers(
    records: Sequence[Mapping[str, Any]],
) -> dict[str, Mapping[str, Any]]:
    """The greedy answer to each held-out question, by a key of the question that is the
    same in every run that asks it."""
    found: dict[str, Mapping[str, Any]] = {}
    times: Counter[str] = Counter()
    for record in records:
        if record["kind"] == "greedy":
            asked = record.get("content", record["prompt"]), record["answer"]
            text = json.dumps(asked, sort_keys=True, default=str)
            times[text] += 1
            key = hashlib.blake2b(
                f"{times[text]} {text}".encode(), digest_size=8
            ).hexdigest()
            found[key] = record
    return found


def thin(items: Sequence, count: int) -> list:
    """At most `count` of the items, evenly spaced, the first and the last included."""
    if len(items) <= count:
        return list(items)
    if count <= 1:
        return list(items[:count])
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def every(items: Sequence, count: int) -> list:
    """At most `count` of the items, the first and the last included: every 2^k-th one,
    so that items that are added bring back none that was left out.

    Args:
      count: at least 2.
    """
    stride = 1
    while -(-(len(items) - 1) // stride) + 1 > count:
        stride *= 2
    kept = list(items[::stride])
    return kept if (len(items) - 1) % stride == 0 or not items else [*kept, items[-1]]


def _short(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields the page shows, long texts cut."""
    kept = ("step", "split", "kind", "prompt_id", "sample", "reward", "scores")
    more = ("advantage", "correct", "finish_reason", "num_tokens")
    answer = record["answer"]
    short = {
        **{name: record[name] for name in (*kept, *more) if name in record},
        "prompt": cut(record["prompt"]),
        "completion": cut(reply(record)),
        "answer": None if answer is None else cut(str(answer)),
    }
    if "turns" in record:
        short["status"] = record["status"]
        short["opening"] = _messages(record["opening"])
        short["turns"] = [
            {**turn, "text": cut(turn["text"])} for turn in record["turns"]
        ]
    if details := record.get("token_details"):
        texts = [visible(text) for text in details["text"]]
        short["tokens"] = {**details, "text": texts}
    return short


def _messages(opening: Sequence[Mapping[str, Any]]) -> str:
    """What was said before the first turn."""
    said = [f"{message['role']}: {message.get('content', '')}" for message in opening]
    return cut("\n".join(said))


def cut(text: str) -> str:
    """The text as `visible` has it, without its middle if it is long."""
    text = visible(text)
    left_out = len(text) - MAX_CHARACTERS
    if left_out <= 0:
        return text
    half = MAX_CHARACTERS // 2
    return f"{text[:half]}\n[... {left_out} characters left out ...]\n{text[-half:]}"


def visible(text: str) -> str:
    """The text with a visible character for each that would show another text than is
    there: "�" for halves of surrogate pairs and overrides of the writing direction, a
    picture for control characters."""
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    text = re.sub("[\u202a-\u202e\u2066-\u2069]", "�", text)
    return re.sub("[\0-\x08\x0b-\x1f]", lambda c: chr(0x2400 + ord(c[0])), text)
