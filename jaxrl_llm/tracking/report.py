"""One HTML page about a run, or about several, for a browser without a network.

Everything is inside the page. What the model wrote is hostile text: it is embedded as
JSON that cannot end its script element, and shown as text only.
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from jaxrl_llm.tracking import paired_answers, rollout_digest, run_lock
from jaxrl_llm.tracking.rollout_digest import MAX_PER_STEP, Digest, Digests
from jaxrl_llm.tracking.run_directory import (
    advice,
    read,
    replace_text,
    table,
)
from jaxrl_llm.tracking.services import flat
from jaxrl_llm.tracking.step_metrics import accuracy_name

SCRIPTS = ("data.js", "charts.js", "training.js", "answers.js", "page.js")
"""The page's programs, in their order; they share one scope."""


def write(
    run_dir: str | Path,
    *,
    per_step: int = MAX_PER_STEP,
    digests: Digests | None = None,
    running: bool | None = None,
) -> Path:
    """Writes RUN/report.html from what else lies in RUN. Returns its path.

    Args:
      per_step: completions of each step and kind in it, at most.
      digests: of the run's rollouts, if they are known from the last time.
      running: whether the run goes on, so that the page looks for what is new by
        itself; None to look whether a process holds RUN.

    Raises:
      ValueError: `run_dir` holds no metrics.jsonl, or a damaged one.
    """
    run_dir = Path(run_dir)
    digests = digests or Digests(run_dir, per_step)
    path = run_dir / "report.html"
    replace_text(path, page(collect([digests], running=running)))
    return path


def compare(
    run_dirs: Sequence[str | Path], path: str | Path, *, per_step: int = MAX_PER_STEP
) -> Path:
    """Writes one page about several runs: their curves over one another, and their
    greedy answers to the same held-out questions side by side. Returns its path.

    Args:
      path: of the page; a folder that does not exist is made.
      per_step: completions of each step and kind in it, at most.

    Raises:
      ValueError: one of `run_dirs` is given twice, or holds no metrics.jsonl or a
        damaged one.
    """
    if len({Path(run_dir).resolve() for run_dir in run_dirs}) < len(run_dirs):
        given = ", ".join(map(str, run_dirs))
        raise ValueError(f"a run is given twice: {given}; name each once")
    data = collect([Digests(Path(run_dir), per_step) for run_dir in run_dirs])
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, page(data))
    return path


def page(data: Mapping[str, Any]) -> str:
    """The page that shows what `collect` found."""
    folder = Path(__file__).with_name("page")
    filled = (folder / "report.html").read_text(encoding="utf-8")
    script = "\n".join((folder / name).read_text(encoding="utf-8") for name in SCRIPTS)
    style = (folder / "style.css").read_text(encoding="utf-8")
    for name, text in ("STYLE", style), ("SCRIPT", script), ("DATA", embeddable(data)):
        filled = filled.replace(f"{{{{{name}}}}}", text)
    return filled


def collect(runs: Sequence[Digests], *, running: bool | None = None) -> dict[str, Any]:
    """Everything the page shows of one run, or of several."""
    found = [digests.refresh() for digests in runs]
    questions, answers = paired_answers.paired(found)
    names = _names([digests.directory for digests in runs])
    return {
        "written": time.time(),
        "questions": questions,
        "runs": [
            _run(one, digests, kept, running) | {"name": name, "validations": of_run}
            for one, digests, kept, name, of_run in zip(
                [digests.directory for digests in runs],
                runs,
                found,
                names,
                answers,
                strict=True,
            )
        ],
    }


def embeddable(data: Any) -> str:
    """JSON that is safe inside a <script> element: ASCII, without "<", ">" and "&".

    A number that is not finite becomes null.
    """
    text = json.dumps(_finite(data), allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _run(
    run_dir: Path, digests: Digests, found: Sequence[Digest], running: bool | None
) -> dict[str, Any]:
    """What the page shows of one run but its answers to held-out questions."""
    columns = table(read(run_dir))
    text = _text(run_dir / "config.yaml")
    settings = flat(yaml.safe_load(text) or {})
    trained = [one for one in found if one.distributions]
    return {
        "config": text,
        "settings": {name: json.dumps(value) for name, value in settings.items()},
        "versions": json.loads(_text(run_dir / "versions.json") or "{}"),
        "columns": {name: column.tolist() for name, column in columns.items()},
        "accuracy": accuracy_name(list(columns)),
        "advice": advice(run_dir),
        "running": run_lock.in_use(run_dir) if running is None else running,
        "total_steps": settings.get("trainer.total_training_steps"),
        "completions": [record for one in found for record in one.records],
        "counts": {
            "files": digests.num_files,
            "files_read": len(found),
            "read": sum(one.read for one in found),
        },
        "distributions": {
            name: {
                "steps": [one.step for one in trained],
                "values": [one.distributions.get(name, []) for one in trained],
            }
            for name in rollout_digest.DISTRIBUTIONS
        },
    }


def _names(directories: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart."""
    parts = [path.resolve().parts for path in directories]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-length:]) for path in parts]
        if len(set(names)) == len(names):
            break
    return names


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
