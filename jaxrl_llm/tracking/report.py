"""One HTML page about a run, for a browser without a network: RUN/report.html.

Everything is inside the page. What the model wrote is hostile text: it is embedded as
JSON that cannot end its script element, and shown as text only.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrl_llm.tracking.run_directory import (
    advice,
    completions,
    read,
    replace_text,
    rollout_files,
    table,
)
from jaxrl_llm.tracking.step_metrics import accuracy_name

MAX_FILES = 40
"""Steps per split whose completions are embedded: evenly spaced, first and last
included."""
MAX_PER_STEP = 24
"""Completions per step and kind that are embedded, evenly spaced."""
MAX_CHARACTERS = 4000
"""Of one prompt or completion; the middle of a longer one is left out, visibly."""


def write(run_dir: str | Path) -> Path:
    """Writes RUN/report.html from what else lies in RUN. Returns its path.

    Raises:
      ValueError: `run_dir` holds no metrics.jsonl, or a damaged one.
    """
    run_dir = Path(run_dir)
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    path = run_dir / "report.html"
    replace_text(path, template.replace("{{DATA}}", embeddable(collect(run_dir))))
    return path


def collect(run_dir: Path) -> dict[str, Any]:
    """Everything the page shows."""
    columns = table(read(run_dir))
    completions, counts, changes = _completions(run_dir)
    return {
        "name": run_dir.resolve().name,
        "config": _text(run_dir / "config.yaml"),
        "versions": json.loads(_text(run_dir / "versions.json") or "{}"),
        "columns": {name: column.tolist() for name, column in columns.items()},
        "accuracy": accuracy_name(list(columns)),
        "advice": advice(run_dir),
        "completions": completions,
        "counts": counts,
        "changes": changes,
    }


def embeddable(data: Any) -> str:
    """JSON that is safe inside a <script> element: ASCII, without "<", ">" and "&".

    A number that is not finite becomes null.
    """
    text = json.dumps(_finite(data), allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def thin(items: Sequence, count: int) -> list:
    """At most `count` of the items, evenly spaced, the first and the last included."""
    if len(items) <= count:
        return list(items)
    if count == 1:
        return [items[0]]
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _completions(
    run_dir: Path,
) -> tuple[list[dict[str, Any]], dict[str, int], dict[str, Any] | None]:
    """Records to show, how many there were, and what validation changed."""
    files = rollout_files(run_dir)
    shown: list[dict[str, Any]] = []
    counts = {"files": len(files), "files_read": 0, "read": 0}
    validations: list[list[dict[str, Any]]] = []
    for split in sorted({split for _, split, _ in files}):
        paths = [path for _, of, path in files if of == split]
        for path in thin(paths, MAX_FILES):
            records = completions(path)
            counts["files_read"] += 1
            counts["read"] += len(records)
            for kind in dict.fromkeys(record["kind"] for record in records):
                same = [record for record in records if record["kind"] == kind]
                shown += [_short(record) for record in thin(same, MAX_PER_STEP)]
                if kind == "greedy":
                    validations.append(same)
    changes = _changes(validations[0], validations[-1]) if validations[1:] else None
    return shown, counts, changes


def _changes(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """How many questions were answered rightly before and after training."""
    was = {record["prompt_id"]: record["correct"] for record in before}
    pairs = [
        (was[record["prompt_id"]], record["correct"])
        for record in after
        if record["prompt_id"] in was
    ]
    return {
        "from": before[0]["step"],
        "to": after[0]["step"],
        "fixed": pairs.count((False, True)),
        "broken": pairs.count((True, False)),
        "right": pairs.count((True, True)),
        "wrong": pairs.count((False, False)),
    }


def _short(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields the page shows, long texts cut."""
    kept = ("step", "split", "kind", "prompt_id", "sample", "reward", "scores")
    more = ("advantage", "correct", "finish_reason", "num_tokens")
    return {
        **{name: record[name] for name in (*kept, *more) if name in record},
        "prompt": _cut(record["prompt"]),
        "completion": _cut(record["completion"]),
        "answer": None if record["answer"] is None else _cut(str(record["answer"])),
    }


def _cut(text: str) -> str:
    """The text without its middle, and with "�" for what would show another text than
    is there: halves of surrogate pairs, overrides of the writing direction."""
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    text = re.sub("[\u202a-\u202e\u2066-\u2069]", "�", text)
    left_out = len(text) - MAX_CHARACTERS
    if left_out <= 0:
        return text
    half = MAX_CHARACTERS // 2
    return f"{text[:half]}\n[... {left_out} characters left out ...]\n{text[-half:]}"


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _finite(data: Any) -> Any:
    match data:
        case float():
            return data if math.isfinite(data) else None
        case Mapping():
            return {str(key): _finite(value) for key, value in data.items()}
        case list() | tuple():
            return [_finite(value) for value in data]
    return data
