"""What a run writes down, in RUN = config.output_dir, and how it is read back.

    RUN/config.yaml                    the resolved configuration, for `config.load`
    RUN/versions.json                  packages, devices, git commit, time of the start
    RUN/metrics.jsonl                  one line per step: {"step": n, name: number, ...}
    RUN/rollouts/train_000012.jsonl    one line per completion of step 12
    RUN/rollouts/val_000020.jsonl      one line per validation answer after step 20

Step 0 is before training. Metrics of a validation stand in the line of the step after
which it was taken. A metric that is not a finite number is written as null. Names are
veRL's where the quantity is veRL's.
"""

import json
import math
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from jaxtyping import Float

from jaxrl_llm.data.rows import Completion, Prompt
from jaxrl_llm.rewards import Scores
from jaxrl_llm.tracking import services as trackers

Run = str | Path | Sequence[Mapping[str, Any]]
"""A run directory, or the lines of its metrics.jsonl."""


class MetricsWriter:
    """Writes a run directory. One process of a run has one.

    Going on in a directory that has lines already is allowed; a last line torn by a
    killed process is dropped. A fresh start is `rewind(-1)`.

    Raises:
      ImportError: a logger's package is not installed.
      ValueError: metrics.jsonl is damaged before its last line.
    """

    def __init__(
        self,
        run_dir: str | Path,
        loggers: Sequence[str],
        project: str,
        config: Mapping[str, Any],
    ):
        self._dir = Path(run_dir)
        self._loggers = [trackers.find(name) for name in loggers]
        (self._dir / "rollouts").mkdir(parents=True, exist_ok=True)
        plain = json.loads(json.dumps(config))
        replace_text(
            self._dir / "config.yaml",
            yaml.safe_dump(plain, sort_keys=False, allow_unicode=True),
        )
        replace_text(
            self._dir / "versions.json", json.dumps(versions(), indent=2) + "\n"
        )
        self._path = self._dir / "metrics.jsonl"
        self._open(math.inf)
        for logger in self._loggers:
            logger.start(self._dir, project, plain)

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
        """Writes RUN/rollouts/{split}_{step}.jsonl, whole or not at all."""
        lines = [json.dumps(record) + "\n" for record in records]
        replace_text(
            self._dir / "rollouts" / f"{split}_{step:06d}.jsonl", "".join(lines)
        )

    def rewind(self, step: int) -> None:
        """Drops every line and rollout file later than `step`, to go on from there.

        Loggers that cannot forget (wandb, mlflow, trackio) keep what they were sent.
        """
        self._file.close()
        self._open(step)
        for later, _, path in rollout_files(self._dir):
            if later > step:
                path.unlink()
        for logger in self._loggers:
            logger.rewind(step)

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
        kept = [line for line in _lines(self._path) if line["step"] <= up_to]
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


def rollout_records(
    step: int,
    split: str,
    kind: str,
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Completion]],
    scores: Scores,
    **per_response: np.ndarray,
) -> list[dict[str, Any]]:
    """One record per completion, for `MetricsWriter.write_rollouts`.

    A function that does not judge a response has null among its "scores".

    Args:
      kind: "train", "sampled" or "greedy".
      per_response: further [P, G] arrays by name, such as `advantage`.
    """
    return [
        {
            "step": step,
            "split": split,
            "kind": kind,
            "prompt_id": prompt.id,
            "sample": completion.sample,
            "prompt": last_user_message(prompt),
            "content": prompt.content,
            "completion": completion.text,
            "answer": _plain(prompt.columns.get("answer")),
            "reward": float(scores.total[p, g]),
            "scores": _finite(
                {n: float(value[p, g]) for n, value in scores.by_function.items()}
            ),
            **{name: value[p, g].item() for name, value in per_response.items()},
            "finish_reason": completion.finish_reason,
            "num_tokens": len(completion.tokens),
            "tokens": completion.tokens.tolist(),
            "weight_version": completion.weight_version,
        }
        for p, prompt in enumerate(prompts)
        for g, completion in enumerate(completions[p])
    ]


def last_user_message(prompt: Prompt) -> str:
    """The text of the question, without system prompt and earlier turns."""
    if isinstance(prompt.content, str):
        return prompt.content
    users = [m for m in prompt.content if m.get("role") == "user"] or prompt.content
    content = users[-1].get("content", "")
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


def batch_metrics(
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Completion]],
    scores: Scores,
    advantages: Float[np.ndarray, "P G"],
) -> dict[str, float]:
    """What one batch of responses looked like.

    `clip_ratio` is the share of responses cut off at their limit;
    `training/groups_all_equal` the share of prompts whose responses all got the same
    reward, so that they teach GRPO nothing; `reward/NAME/mean` the mean of one
    function over the responses it judges.
    """
    flat = [completion for group in completions for completion in group]
    lengths = [len(completion.tokens) for completion in flat]
    total = scores.total
    metrics = {
        **_spread("critic/rewards", total),
        "critic/score/mean": float(total.mean()),
        **_spread("critic/advantages", advantages),
        **_spread("response_length", lengths),
        "response_length/clip_ratio": cut_off(flat),
        **_spread("prompt_length", [len(prompt.tokens) for prompt in prompts]),
        "training/groups_all_equal": float((np.ptp(total, axis=1) == 0).mean()),
    }
    for name, value in scores.by_function.items():
        if not np.isnan(value).all():
            metrics[f"reward/{name}/mean"] = float(np.nanmean(value))
    for name, count in scores.errors.items():
        if count:
            metrics[f"reward_errors/{name}"] = float(count)
    return metrics


def cut_off(completions: Sequence[Completion]) -> float:
    """The share of completions that reached their length limit."""
    return float(np.mean([c.finish_reason == "length" for c in completions]))


def accuracy_name(names: Sequence[str]) -> str | None:
    """The validation accuracy to show when there is room for one: the first data
    source's, greedy if it was measured. None without a validation."""
    for pattern in (r"val-core/.+/acc/greedy", r"val-core/.+/acc/mean@\d+"):
        for name in names:
            if re.fullmatch(pattern, name):
                return name
    return None


class Timer:
    """Seconds per phase within one step, which starts when the Timer is made.

    timer = Timer()
    with timer("gen"): ...
    timer.metrics()         # {"timing_s/gen": 3.1, "timing_s/step": 4.0}
    """

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Adds the time of the block to `phase`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            passed = time.perf_counter() - start
            self._seconds[phase] = self._seconds.get(phase, 0.0) + passed

    def metrics(self) -> dict[str, float]:
        """`timing_s/<phase>`, and `timing_s/step`: all the time since the start."""
        seconds = {**self._seconds, "step": time.perf_counter() - self._start}
        return {f"timing_s/{phase}": value for phase, value in seconds.items()}


def throughput(num_tokens: int, seconds: float, num_devices: int) -> dict[str, float]:
    """Tokens (prompts and responses) per second and device."""
    return {
        "perf/total_num_tokens": float(num_tokens),
        "perf/time_per_step": seconds,
        "perf/throughput": num_tokens / seconds / num_devices,
    }


def memory() -> dict[str, float]:
    """The most memory in use so far, in GiB: of this process on the host, and of the
    device that used most, where devices count it (a CPU does not)."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    host *= 1 if sys.platform == "darwin" else 1024
    found = {"perf/max_cpu_memory_gb": host / 2**30}
    peaks = [
        statistics["peak_bytes_in_use"]
        for device in jax.local_devices()
        if (statistics := device.memory_stats())
    ]
    if peaks:
        found["perf/max_memory_allocated_gb"] = max(peaks) / 2**30
    return found


def train_flops(
    num_params_matmul: int,
    num_tokens: int,
    sum_of_squared_lengths: int,
    layers: int,
    heads: int,
    head_dim: int,
) -> float:
    """Floating-point operations of one forward and backward pass over a batch.

        6 * num_params_matmul * num_tokens
          + 6 * sum_of_squared_lengths * head_dim * heads * layers

    Args:
      num_params_matmul: weights of matrix products. veRL counts an embedding, which is
        only looked up, as well.
      sum_of_squared_lengths: over the sequences of the batch, tokens squared. Only the
        causal half of the attention scores counts.

    Source: veRL 0.9.1, utils/flops_counter.py.
    """
    attention = 6.0 * sum_of_squared_lengths * head_dim * heads * layers
    return 6.0 * num_params_matmul * num_tokens + attention


def mfu(
    flops: float, seconds: float, device_kind: str, num_devices: int
) -> dict[str, float]:
    """`perf/mfu/actor`, the share of the devices' peak that `flops` in `seconds` is.

    Empty if the peak of `device_kind` is not known, as for a CPU.
    """
    peak = peak_flops(device_kind)
    if peak is None:
        return {}
    return {"perf/mfu/actor": flops / seconds / num_devices / peak}


# Dense bfloat16, per JAX device; vendors' data sheets. The PCIe and NVL boards of the
# H100 and H200 are slower than the SXM modules, a MIG slice is less than its board.
_PEAK_FLOPS = (
    (r"\bH[12]00\b(?!.*\b(PCIe|NVL|MIG)\b)", 989e12),
    (r"\bA100\b(?!.*\bMIG\b)", 312e12),
    (r"\bB200\b(?!.*\bMIG\b)", 2250e12),
    (r"\bL4\b", 121e12),
    (r"^TPU v4$", 275e12),
    (r"^TPU v5 ?(lite|e)$", 197e12),
    (r"^TPU v5p?$", 459e12),
    (r"^TPU v6 ?(lite|e)$", 918e12),
)


def peak_flops(device_kind: str) -> float | None:
    """Operations per second of `jax.Device.device_kind`; None if not known."""
    for pattern, peak in _PEAK_FLOPS:
        if re.search(pattern, device_kind):
            return peak
    return None


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
    """Writes a file whole or not at all: to a temporary name, then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except TypeError:
        raise ValueError(f"metric {name!r} must be one number, got {value!r}") from None


def _finite(numbers: Mapping[str, float]) -> dict[str, float | None]:
    return {k: v if math.isfinite(v) else None for k, v in numbers.items()}


def _plain(value: Any) -> Any:
    """`value` if JSON can hold it, else its text."""
    try:
        json.dumps(value)
    except TypeError:
        return str(value)
    return value


def _spread(name: str, values: Any) -> dict[str, float]:
    values = np.asarray(values)
    return {
        f"{name}/mean": float(values.mean()),
        f"{name}/max": float(values.max()),
        f"{name}/min": float(values.min()),
    }
