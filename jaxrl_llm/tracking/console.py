"""What a run shows in the terminal or notebook while it goes on, and at its end.

In a terminal the view is redrawn in place, in a notebook the cell's output is; where
there is neither (a pipe, CI) every step is one plain line. What the model wrote is
shown as it is: never read as markup, never able to control the terminal. Numbers are
never cut: where a line has no room for them they take more lines.
"""

import math
import re
import statistics
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from jaxrl_llm.tracking.run_directory import reply
from jaxrl_llm.tracking.step_metrics import OFFLINE, Validation, accuracy_name

_BARS = "▁▂▃▄▅▆▇█"
_BESIDES = ("compile", "testing", "save_checkpoint")
"""Phases that not every step has, and that say nothing about the next ones."""


class LiveView:
    """Progress, current phase, key metrics and the latest completions.

        with LiveView(total_steps=40, first_step=0, num_examples=3) as view:
            view.phase("generating")
            view.update(1, metrics, records)

    Args:
      total_steps: the run ends after this step.
      first_step: how many steps were done before, in a run that goes on.
      num_examples: completions shown.
    """

    def __init__(
        self,
        total_steps: int,
        first_step: int = 0,
        *,
        console: Console | None = None,
        num_examples: int = 3,
    ):
        self._console = console or Console()
        self._total = total_steps
        self._num_examples = num_examples
        self._metrics: dict[str, Any] = {}
        self._rewards: list[float] = []
        self._seconds: deque[float] = deque(maxlen=20)
        self._records: Sequence[Mapping[str, Any]] = ()
        self._phase = "starting"
        self._progress = Progress(
            SpinnerColumn(),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=self._console,
            expand=True,
        )
        self._task = self._progress.add_task(
            "", total=total_steps, completed=first_step
        )
        self._live: Live | None = None
        self._cell: Any = None

    def __enter__(self) -> "LiveView":
        if self._console.is_jupyter:
            # rich's own live display warns without ipywidgets; a display handle does
            # the same with what IPython has.
            from IPython.display import display

            self._cell = display(self._panel(), display_id=True)
        elif self._console.is_interactive and not self._console.options.ascii_only:
            self._live = Live(
                get_renderable=self._panel, console=self._console, refresh_per_second=4
            )
            self._live.start()
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        self.phase("stopped" if failure else "done")
        if self._live is not None:
            self._live.stop()
            self._live = None

    def phase(self, name: str) -> None:
        """What goes on now: "generating", "scoring", "updating", ..."""
        self._phase = name
        self._show()

    def update(
        self,
        step: int,
        metrics: Mapping[str, Any],
        records: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """A step is done; `records` are its rollouts. Step 0 is before training.

        Validation metrics stay in view until the next validation.
        """
        self._metrics |= metrics
        self._records = _spread(records, self._num_examples) or self._records
        reward = float(metrics.get("critic/rewards/mean", math.nan))
        if math.isfinite(reward):
            self._rewards.append(reward)
        if step and "timing_s/step" in metrics:
            self._seconds.append(plain_seconds(metrics))
        left = ""
        if self._seconds and step < self._total:
            pace = statistics.median(self._seconds)
            left = f"left {duration(pace * (self._total - step))}"
        self._progress.update(self._task, completed=step, description=left)
        self._show()
        if self._cell is None and self._live is None:
            # Only what is new: a line that repeats an old validation would mislead.
            figures = [f"{name} {text}" for name, text in key_figures(metrics)]
            shown = "  ".join([*figures, left])
            line = f"step {step:>{len(str(self._total))}}/{self._total}  {shown}"
            self._console.print(line.rstrip(), **_RAW, soft_wrap=True)

    def _show(self) -> None:
        if self._live is not None:
            self._live.refresh()
        elif self._cell is not None:
            self._cell.update(self._panel())

    def _panel(self) -> Panel:
        parts: list[RenderableType] = [self._progress]
        inner = self._console.width - 4
        for figures in _rows(key_figures(self._metrics), inner):
            grid = Table.grid(padding=(0, 3))
            for _ in figures:
                grid.add_column(justify="left", no_wrap=True)
            grid.add_row(*(Text(name, style="dim") for name, _ in figures))
            grid.add_row(*(Text(text, style="bold") for _, text in figures))
            parts += [Text(), grid]
        if len(self._rewards) > 1:
            recent = self._rewards[-max(10, min(60, inner - 32)) :]
            line = Text("reward  ", style="dim")
            line.append(sparkline(recent), style="green")
            line.append(f"  {min(recent):.3g} to {max(recent):.3g}", style="dim")
            parts += [Text(), line]
        if self._records:
            parts += [Text(), _examples(self._records)]
        title = Text(self._phase)
        return Panel(Group(*parts), title=title, title_align="left", border_style="dim")


def before_after(
    before: Validation | None,
    after: Validation,
    run_dir: str | Path,
    *,
    console: Console | None = None,
    num_examples: int = 5,
) -> None:
    """Prints what training changed on the held-out questions, and where it all lies.

    Args:
      before: None if no validation was made before training.
      num_examples: questions shown; those whose reward changed first.
    """
    console = console or Console()
    old = before.metrics if before else {}
    wide = console.width >= 80
    measured = [name for name in after.metrics if "/ci95_" not in name]
    rows = []
    for name in measured:
        texts = [with_interval(name, after.metrics, wide)]
        if before:
            known = name in old
            change = signed(after.metrics[name] - old[name]) if known else "-"
            texts = [with_interval(name, old, wide), *texts, change]
        rows.append((name, texts))
    columns = ["before", "after", "change"] if before else ["value"]
    print_numbers("Held-out questions", columns, rows, console)
    if len(measured) < len(after.metrics):
        console.print("[low, high]: 95 % interval over questions", **_RAW)
    if num_examples:
        _answers(before, after, num_examples, console)
    whereabouts(run_dir, console=console)


def print_numbers(
    title: str,
    columns: Sequence[str],
    rows: Sequence[tuple[str, Sequence[str]]],
    console: Console,
) -> None:
    """Prints a table of numbers, none of which is cut; names take more lines.

    Args:
      columns: headings of the numbers.
      rows: a name, and its numbers as text of one or two lines.
    """
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False,
        show_edge=False,
    )  # fmt: skip
    table.add_column("metric", overflow="fold")
    room = console.width
    for place, heading in enumerate(columns):
        texts = [heading, *(texts[place] for _, texts in rows)]
        width = max(cell_len(line) for text in texts for line in text.split("\n"))
        table.add_column(heading, justify="right", overflow="fold", min_width=width)
        room -= 3 + width
    for name, texts in rows:
        folded = _folded(name, max(room, 10))
        table.add_row(Text(folded), *map(Text, texts))
    console.print(table)


def whereabouts(run_dir: str | Path, *, console: Console | None = None) -> None:
    """Prints one line for each thing that lies in the run directory."""
    console = console or Console()
    places = {
        "report": "report.html",
        "weights": "huggingface",
        "checkpoints": "checkpoints",
        "evaluation": "eval.json",
        "answers": "eval.jsonl",
        "metrics": "metrics.jsonl",
        "completions": "rollouts",
        "settings": "config.yaml",
    }
    for name, place in places.items():
        path = Path(run_dir) / place
        if path.exists():
            console.print(f"{name:12} {path}", **_RAW, soft_wrap=True)


@contextmanager
def progress(description: str, *, console: Console | None = None) -> Iterator[None]:
    """A spinner and the time so far while the block runs; then how long it took."""
    console = console or Console()
    start = time.perf_counter()
    if console.is_terminal and not console.is_jupyter:
        text = TextColumn("{task.description}", markup=False)
        columns = SpinnerColumn(), text, TimeElapsedColumn()
        with Progress(*columns, console=console, transient=True) as shown:
            shown.add_task(description)
            yield
    else:
        yield
    passed = time.perf_counter() - start
    console.print(f"{description}: {passed:.1f} s", **_RAW, soft_wrap=True)


def key_figures(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, number) of the metrics to watch, as far as they are there."""
    names = [
        ("reward", "critic/rewards/mean"),
        ("to teacher", "distillation/loss"),
        *(("loss", f"{task}/loss") for task in OFFLINE),
        *(("val loss", f"val-core/all/{task}/loss") for task in OFFLINE),
        ("accuracy", "sft/mean_token_accuracy"),
        ("accuracy", "rm/accuracy"),
        ("accuracy", "rewards/accuracies"),
        ("val acc", "val-core/all/rm/accuracy"),
        ("val acc", "val-core/all/rewards/accuracies"),
        ("val acc", accuracy_name(list(metrics)) or ""),
        ("length", "response_length/mean"),
        ("cut off", "response_length/clip_ratio"),
        ("entropy", "actor/entropy"),
        ("kl", "actor/ppo_kl"),
        ("explained", "critic/vf_explained_var"),
        ("grad", "actor/grad_norm"),
        *(("grad", f"{task}/grad_norm") for task in OFFLINE),
        ("tok/s/dev", "perf/throughput"),
        ("s/step", "timing_s/step"),
    ]
    return [
        (name, number(float(metrics[key]))) for name, key in names if key in metrics
    ]


def plain_seconds(metrics: Mapping[str, Any]) -> float:
    """Seconds of a step without compilation, validation and saving.

        timing_s/step - timing_s/compile - timing_s/testing - timing_s/save_checkpoint

    A time that was not measured counts as 0.
    """
    besides = sum(float(metrics.get(f"timing_s/{name}", 0.0)) for name in _BESIDES)
    return max(float(metrics["timing_s/step"]) - besides, 0.0)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as in 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def number(value: float | int) -> str:
    """Three digits that matter, and no exponent where none is needed."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def signed(change: float) -> str:
    """`number` with its sign."""
    return ("" if change < 0 else "+") + number(change)


def with_interval(name: str, metrics: Mapping[str, float], wide: bool) -> str:
    """A number and its 95 % interval, if it has one: behind it, or below it."""
    if name not in metrics:
        return "-"
    text = number(metrics[name])
    if f"{name}/ci95_low" in metrics:
        low, high = metrics[f"{name}/ci95_low"], metrics[f"{name}/ci95_high"]
        text += f"{' ' if wide else chr(10)}[{low:.3g}, {high:.3g}]"
    return text


def sparkline(values: Sequence[float | int]) -> str:
    """One block per value, its height between the smallest and the largest."""
    low, high = min(values), max(values)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] for value in values)


def one_line(text: str, limit: int, *, keep_end: bool = False) -> str:
    """`text` with newlines as ⏎, without control characters, cut to `limit`.

    What is not printable (escape sequences, direction overrides, lone surrogates)
    becomes "�"; tabs become spaces.
    """
    swaps = {"\n": "⏎", "\t": " ", "\r": ""}
    shown = "".join(swaps.get(c, c if c.isprintable() else "�") for c in text.strip())
    if len(shown) <= limit:
        return shown
    return "…" + shown[1 - limit :] if keep_end else shown[: limit - 1] + "…"


_RAW: dict[str, Any] = {"markup": False, "highlight": False, "emoji": False}


def _examples(records: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), expand=True, show_edge=False)
    table.add_column("question", style="dim", ratio=2, no_wrap=True)
    table.add_column("reply", ratio=4, no_wrap=True)
    table.add_column("answer", max_width=16, no_wrap=True)
    table.add_column("reward", justify="right", no_wrap=True)
    for record in records:
        table.add_row(
            Text(one_line(record["prompt"], 60, keep_end=True)),
            Text(one_line(reply(record), 200, keep_end=True)),
            Text(one_line(_answer(record), 16)),
            Text(number(record["reward"])),
        )
    return table


def _answers(
    before: Validation | None, after: Validation, count: int, console: Console
) -> None:
    """Prints replies to the same questions before and after; greedy ones if there are
    any."""
    earlier = _by_question(before.records) if before else {}
    later = _by_question(after.records)

    def changed(prompt_id: int) -> bool:
        was = earlier.get(prompt_id)
        return was is not None and was["reward"] != later[prompt_id]["reward"]

    for prompt_id in sorted(later, key=lambda i: not changed(i))[:count]:
        record, was = later[prompt_id], earlier.get(prompt_id)
        replies = {"before": was, "after": record} if before else {"reply": record}
        rewards = [number(r["reward"]) for r in replies.values() if r is not None]
        texts = {
            "question": one_line(record["prompt"], 160, keep_end=True),
            "answer": one_line(_answer(record), 60),
            **{
                name: one_line(reply(one), 240, keep_end=True)
                for name, one in replies.items()
                if one is not None
            },
            "reward": " → ".join(rewards),
        }
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, text in texts.items():
            grid.add_row(name, Text(_encodable(text, console)))
        console.print()
        console.print(grid)


def _by_question(
    records: Sequence[Mapping[str, Any]],
) -> dict[int, Mapping[str, Any]]:
    """One answer to each question: the greedy one, or the first sampled one."""
    found: dict[int, Mapping[str, Any]] = {}
    for record in records:
        if record["kind"] == "greedy" or record["prompt_id"] not in found:
            found[record["prompt_id"]] = record
    return found


def _answer(record: Mapping[str, Any]) -> str:
    return "" if record["answer"] is None else str(record["answer"])


def _folded(name: str, width: int) -> str:
    """A metric's name in lines that end behind a "/", as far as it has some."""
    lines = [""]
    for part in re.findall("[^/]*/|[^/]+", name):
        if lines[-1] and len(lines[-1] + part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _rows(
    figures: Sequence[tuple[str, str]], width: int
) -> list[list[tuple[str, str]]]:
    """Names with their numbers, in rows of at most `width` characters."""
    rows: list[list[tuple[str, str]]] = []
    room = 0
    for name, text in figures:
        needed = max(len(name), len(text)) + 3
        if needed > room + 3 or not rows:
            rows.append([])
            room = width
        rows[-1].append((name, text))
        room -= needed
    return rows


def _spread(records: Sequence[Mapping[str, Any]], count: int) -> list:
    """`count` of the records, evenly spaced."""
    count = min(count, len(records))
    return [records[i * len(records) // count] for i in range(count)]


def _encodable(text: str, console: Console) -> str:
    """`text` as far as the terminal's encoding has it; "?" for the rest."""
    return text.encode(console.encoding, "replace").decode(console.encoding)
