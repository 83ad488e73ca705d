"""What a run writes down, in RUN = config.output_dir, and how it is read back.

    RUN/config.yaml                    the resolved configuration, for `config.load`
    RUN/versions.json                  packages, devices, git commit, time of the start
    RUN/inputs.json                    digests of the user's functions and of the data
    RUN/lock                           who runs here; see `run_lock`
    RUN/metrics.jsonl                  one line per step: {"step": n, name: number, ...}
    RUN/tracking_id                    what loggers know the run by, if it has some
    RUN/advice.jsonl                   what to look at: {"step": n, "kind", "text"}
    RUN/rollouts/train_000012.jsonl    one line per completion of step 12
    RUN/rollouts/val_000020.jsonl      one line per validation answer after step 20

Step 0 is before training. Metrics of a validation stand in the line of the step after
which it was taken. A metric that is not a finite number is written as null. Names are
veRL's where the quantity is veRL's.
"""

import contextlib
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import yaml

from jaxrl_llm.tracking import services as trackers

Run = str | Path | Sequence[Mapping[str, Any]]


"""A run directory, or the lines of its metrics.jsonl."""


class MetricsWriter:
    """Writes a run directory. One process of a run has one.

    Going on in a directory that has lines already is allowed; lines that are torn or
    stand there twice are dropped, see `whole`. A fresh start is `rewind(-1)`.

    Args:
      inputs: what inputs.json is to hold.
      tags: what the loggers can find the run by.

    Raises:
      ImportError: a logger's package is not installed.
    """

    def __init__(
        self,
        run_dir: str | Path,
        loggers: Sequence[str],
        project: str,
        config: Mapping[str, Any],
        inputs: Mapping[str, Any] | None = None,
        tags: Sequence[str] = (),
    ):
        self._dir = Path(run_dir)
        self._loggers = [trackers.find(name) for name in loggers]
        (self._dir / "rollouts").mkdir(parents=True, exist_ok=True)
        for folder in (self._dir, self._dir / "rollouts"):
            for left in folder.glob(".*.tmp"):  # `replace_text` was killed
                left.unlink()
        plain = json.loads(json.dumps(config))
        replace_text(
            self._dir / "config.yaml",
            yaml.safe_dump(plain, sort_keys=False, allow_unicode=True),
        )
        replace_text(
            self._dir / "versions.json", json.dumps(versions(), indent=2) + "\n"
        )
        if inputs is not None:
            replace_text(self._dir / "inputs.json", json.dumps(inputs, indent=2) + "\n")
        self._path = self._dir / "metrics.jsonl"
        self._open(math.inf)
        for logger in self._loggers:
            logger.start(self._dir, project, plain, tags)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends the line of `step`, and hands it to the loggers.

        Raises:
          ValueError: a value is not one number, or the step has been written already.
        """
        if step <= self._last:
            raise ValueError(
                f"{self._path} already ends with step {self._last}, got step {step}; "
                "rewind first"
            )
        numbers = {name: _number(name, value) for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **_finite(numbers)}) + "\n")
        self._file.flush()
        self._last = step
        for logger in self._loggers:
            logger.log(step, numbers)

    def write_rollouts(
        self, step: int, split: str, records: Sequence[Mapping[str, Any]]
    ) -> None:
        """Writes RUN/rollouts/{split}_{step}.jsonl, whole or not at all, and hands the
        records to the loggers."""
        lines = [json.dumps(record) + "\n" for record in records]
        replace_text(
            self._dir / "rollouts" / f"{split}_{step:06d}.jsonl", "".join(lines)
        )
        for logger in self._loggers:
            logger.rollouts(step, split, records)

    def sync(self) -> None:
        """Returns when all lines are on disk. Rollouts are when they are written."""
        os.fsync(self._file.fileno())

    def write_advice(self, step: int, kind: str, text: str) -> None:
        """Appends what there is to look at or to change after `step`."""
        line = json.dumps({"step": step, "kind": kind, "text": text})
        with (self._dir / "advice.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def rewind(self, step: int) -> list[str]:
        """Drops every line and rollout file later than `step`, to go on from there.

        Loggers that cannot forget (wandb, mlflow, trackio) keep what they were sent.

        Returns:
          The kinds of advice that are left.
        """
        path = self._dir / "advice.jsonl"
        left = [line for line in advice(self._dir) if line["step"] <= step]
        left = [line for line in left if line["kind"] != "stopped"]
        if path.exists():
            replace_text(path, "".join(json.dumps(line) + "\n" for line in left))
        self._file.close()
        self._open(step)
        for later, _, path in rollout_files(self._dir):
            if later > step:
                path.unlink()
        for logger in self._loggers:
            logger.rewind(step)
        return [line["kind"] for line in left]

    def close(self) -> None:
        """Closes the file and the loggers."""
        self._file.close()
        for logger in self._loggers:
            logger.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, up_to: float | int) -> None:
        """Opens metrics.jsonl for appending, with only whole lines up to a step."""
        kept: list[dict[str, Any]] = []
        for line, _ in _raw_lines(self._path):
            after = kept[-1]["step"] if kept else -math.inf
            if line is not None and after < line["step"] <= up_to:
                kept.append(line)
        text = "".join(json.dumps(line) + "\n" for line in kept)
        if not self._path.exists() or self._path.read_text() != text:
            replace_text(self._path, text)
        self._last = kept[-1]["step"] if kept else -1
        self._file = self._path.open("a", encoding="utf-8")


def read(run_dir: str | Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, oldest first; a torn last line is left out.

    Raises:
      ValueError: no such file, or a line before the last is not JSON.
    """
    path = Path(run_dir) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; is {str(run_dir)!r} a run directory?")
    return list(_lines(path))


def advice(run_dir: str | Path) -> list[dict[str, Any]]:
    """The lines of advice.jsonl, oldest first; none without such a file."""
    return list(_lines(Path(run_dir) / "advice.jsonl"))


def table(run: Run) -> dict[str, np.ndarray]:
    """One column per metric, one row per step; NaN where a step lacks the metric.

    `step` is an int64 column, every other one float64.
    """
    lines = read(run) if isinstance(run, str | Path) else run
    names = dict.fromkeys(name for line in lines for name in line if name != "step")
    columns = {"step": np.array([line["step"] for line in lines], np.int64)}
    for name in names:
        # float64 turns None, which stands for null, into NaN.
        columns[name] = np.array([line.get(name) for line in lines], np.float64)
    return columns


def to_pandas(run: Run) -> Any:
    """`table` as a pandas DataFrame indexed by step.

    Raises:
      ImportError: pandas is not installed.
    """
    pandas = trackers.imported("pandas", "metrics.to_pandas", "notebooks")
    return pandas.DataFrame(table(run)).set_index("step")


def rollout_files(run_dir: str | Path) -> list[tuple[int, str, Path]]:
    """(step, split, file) of every file in RUN/rollouts, by step."""
    found = []
    for path in Path(run_dir).glob("rollouts/*.jsonl"):
        if match := re.fullmatch(r"(.+)_(\d+)", path.stem):
            found.append((int(match[2]), match[1], path))
    return sorted(found)


class Written(NamedTuple):
    """How far what a run wrote can be gone on from."""

    step: int
    """Up to this step all is there, once; -1 if not even step 0 is."""
    last: int
    """The last step that there is any line of."""
    faults: list[str]
    """What is torn, missing or doubled, by file."""


def reply(record: Mapping[str, Any]) -> str:
    """The text of a record's response; of an episode, its turns, each with who speaks,
    and how it ended, if not by itself."""
    if "turns" not in record:
        return record["completion"]
    said = [f"{turn['role']}: {turn['text']}" for turn in record["turns"]]
    if record["status"] != "completed":
        said.append(f"[{record['status']}]")
    return "\n".join(said)


def completions(path: Path) -> list[dict[str, Any]]:
    """The lines of a rollout file.

    Raises:
      ValueError: a line is damaged.
    """
    found = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                found.append(json.loads(line))
            except ValueError as error:
                said = f"{path}, line {number}: not JSON: {error}"
                raise ValueError(said) from None
    return found


def whole(run_dir: str | Path, first: int = 0, *, rollouts: bool = True) -> Written:
    """How far metrics.jsonl has every step, once and in order, and RUN/rollouts the
    responses of each.

    Args:
      first: rollouts are looked for behind this step only; older ones may have been
        cleared away.
      rollouts: whether there are any.
    """
    path, faults = Path(run_dir, "metrics.jsonl"), []
    step, last = -1, -1
    for number, (line, text) in enumerate(_raw_lines(path), 1):
        found = line["step"] if line else None
        last = max(last, found or 0)
        if faults or found == step + 1:
            step += not faults
            continue
        what = f"has step {found} where step {step + 1} is missing"
        if found is None:
            what = f"is torn behind step {step}: {text[-40:]!r}"
        elif found <= step:
            what = f"has step {found} a second time"
            step = found - 1
        faults.append(f"{path}, line {number} {what}")
    if step < 0 and not path.exists():
        faults.append(f"{path} is missing")
    there = {s: p for s, split, p in rollout_files(run_dir) if split == "train"}
    for s in range(first + 1, step + 1) if rollouts else ():
        file = Path(run_dir, "rollouts", f"train_{s:06d}.jsonl")
        if s not in there or not _ends_whole(file):
            faults.append(f"{file} is {'torn' if s in there else 'missing'}")
            step = s - 1
            break
    return Written(step, last, faults)


def _ends_whole(path: Path) -> bool:
    """Whether the last line of a file of JSON lines is a whole one."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 1))
        return file.read() == b"\n"


def versions() -> dict[str, Any]:
    """What is needed to say where a number came from."""
    devices = jax.devices()
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        **{
            name: _version(name)
            for name in ("jax", "jaxlib", "flax", "optax", "transformers", "jaxrl-llm")
        },
        "system": platform.platform(),
        "platform": devices[0].platform,
        "device_kinds": sorted({device.device_kind for device in devices}),
        "num_devices": len(devices),
        "num_processes": jax.process_count(),
        "git_commit": _git_commit(),
    }


def replace_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all, to a temporary name, then renamed; both are on
    disk when this returns."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_directory(path: Path) -> None:
    """Returns when the names in a directory are on disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError:
        pass  # some file systems cannot, and need not
    finally:
        os.close(file)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit this package is checked out at; None if it is not in a checkout."""
    root = Path(__file__).resolve().parents[2]
    try:
        done = subprocess.run(
            ["git", "-C", root, "rev-parse", "--show-toplevel", "HEAD"],
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        return None
    # An installed package may lie in the checkout of something else.
    if done.returncode or Path(done.stdout.split("\n")[0]) != root:
        return None
    return done.stdout.split("\n")[1]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    for i, line in enumerate(lines[:-1], 1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {i}: not JSON: {error}") from None


def _raw_lines(path: Path) -> Iterator[tuple[dict[str, Any] | None, str]]:
    """Every line that there is, as text and, if it is one of a step, as that."""
    data = path.read_bytes() if path.exists() else b""
    *lines, rest = data.split(b"\n")
    for raw in [*lines, rest] if rest else lines:
        text, line = raw.decode(errors="replace"), None
        if raw is not rest:
            with contextlib.suppress(ValueError):
                line = json.loads(raw)
        ours = isinstance(line, dict) and type(line.get("step")) is int
        yield (line if ours else None), text


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except TypeError:
        raise ValueError(f"metric {name!r} must be one number, got {value!r}") from None


def _finite(numbers: Mapping[str, float]) -> dict[str, float | None]:
    return {k: v if math.isfinite(v) else None for k, v in numbers.items()}
