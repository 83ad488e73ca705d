"""A run's result in a notebook: what changed, two curves, and where the report is.

Plain HTML and SVG: shown wherever HTML is, without a script and without matplotlib.
What comes from outside is escaped.
"""

import html
import math
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from jaxrl_llm.tracking.console import signed, with_interval
from jaxrl_llm.tracking.run_directory import advice, table
from jaxrl_llm.tracking.step_metrics import Validation, accuracy_name, loss_name

_WIDTH, _HEIGHT = 300, 80


def page(
    directory: Path,
    before: Validation | None,
    after: Validation | None,
    *,
    stopped: bool = False,
) -> str:
    """A run as HTML.

    Args:
      directory: of the run; links are relative to the current folder, as those of a
        notebook are.
      before: the validation before training, if there was one.
      after: the newest validation since.
      stopped: whether the run was asked to stop before its last step.

    Raises:
      ValueError: `directory` holds no metrics.jsonl, or a damaged one.
    """
    columns = table(directory)
    steps = columns["step"].tolist()
    state = f"step {max(steps)}, stopped" if stopped else f"{max(steps)} steps"
    parts = [f"<p><b>{_text(directory.resolve().name)}</b>, {state}</p>"]
    if after is not None:
        parts.append(_changes(before, after))
    names = {
        "training reward": "critic/rewards/mean",
        "distance from the teacher": "distillation/loss",
        "training loss": loss_name(columns),
        "held-out loss": f"val-core/all/{loss_name(columns)}",
        "held-out accuracy": accuracy_name(list(columns)),
    }
    parts += [
        curve(title, steps, columns[name].tolist())
        for title, name in names.items()
        if name in columns
    ]
    notes = [f"<li>{_text(line['text'])}</li>" for line in advice(directory)]
    if notes:
        parts.append(f"<p>To look at:</p><ul>{''.join(notes)}</ul>")
    links = {"report": "report.html", "weights": "huggingface", "files": ""}
    shown = [
        f'<a href="{_link(directory / place)}" target="_blank">{name}</a>'
        for name, place in links.items()
        if (directory / place).exists()
    ]
    return f"<div>{''.join(parts)}<p>{' · '.join(shown)}</p></div>"


def curve(title: str, steps: Sequence[int], values: Sequence[float]) -> str:
    """Values by step as a line in SVG, with the first, the lowest, the highest and the
    last number; steps without a value are passed over."""
    known = [(s, v) for s, v in zip(steps, values, strict=True) if math.isfinite(v)]
    if not known:
        return ""
    low, high = min(v for _, v in known), max(v for _, v in known)
    first, last = known[0][0], known[-1][0]
    across = (_WIDTH - 12) / max(last - first, 1)
    up = (_HEIGHT - 12) / ((high - low) or 1.0)
    points = [
        (6 + (s - first) * across, _HEIGHT - 6 - (v - low) * up) for s, v in known
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2"/>' for x, y in points[:50])
    return (
        '<figure style="display:inline-block;margin:0 16px 8px 0">'
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img" fill="#3b82f6">'
        f'<polyline points="{line}" fill="none" stroke="#3b82f6" stroke-width="1.5"/>'
        f"{dots if len(points) <= 50 else ''}</svg>"
        f"<figcaption>{_text(title)}: {known[0][1]:.3g} → {known[-1][1]:.3g} "
        f"(steps {first} to {last}, {low:.3g} to {high:.3g})</figcaption></figure>"
    )


def _changes(before: Validation | None, after: Validation) -> str:
    """What training changed on the held-out questions, as a table."""
    old = before.metrics if before else {}
    heads = ["held-out questions", *(["before"] if before else []), "after"]
    heads += ["change"] if before else []
    rows = ["".join(f"<th>{head}</th>" for head in heads)]
    for name, value in after.metrics.items():
        if "/ci95_" in name:
            continue
        cells = [with_interval(name, after.metrics, True)]
        if before:
            change = signed(value - old[name]) if name in old else "-"
            cells = [with_interval(name, old, True), *cells, change]
        rows.append("".join(f"<td>{_text(cell)}</td>" for cell in (name, *cells)))
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    note = "[low, high]: 95 % interval over questions"
    return f"<table>{body}</table><p><small>{note}</small></p>"


def _text(text: str) -> str:
    return html.escape(text.encode("utf-8", "replace").decode())


def _link(path: Path) -> str:
    return quote(os.path.relpath(path).replace(os.sep, "/"))
