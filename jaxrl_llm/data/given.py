"""Questions that are handed over in memory: as rows, texts or a table of some library.

Libraries are told by their type's module, so that none of them is imported.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date
from os import PathLike, fspath
from typing import Any


def path_of(given: Any) -> str | None:
    """The path that is handed over; None for rows."""
    if isinstance(given, str | PathLike):
        return fspath(given)
    return None


def json_lines(given: Any, name: str, text_key: str | None = None) -> Iterator[str]:
    """One line of JSON per question, or per example.

    A text is a question without an answer, or the text of an example. In a
    pandas.DataFrame and a datasets.Dataset a row is one; what a DataFrame lacks (NaN,
    NaT, None) is null. NumPy's numbers and arrays are written as numbers and lists,
    dates as text.

    Args:
      given: rows, texts, a pandas.DataFrame or a datasets.Dataset.
      name: of the set, for errors.
      text_key: the column that a text is, of examples; None for questions.

    Raises:
      ValueError: it is none of these, or a row holds what JSON cannot.
    """
    for i, row in enumerate(_rows(given, name)):
        if isinstance(row, str):
            row = {text_key or "prompt": row}
        if not isinstance(row, Mapping):
            raise ValueError(f"{name} row {i}: expected {{'prompt': ...}}, got {row!r}")
        try:
            # A reward of the user's own may need no answer; veRL's rows have it inside.
            inside = row.get("reward_model")
            has = isinstance(inside, Mapping) and "ground_truth" in inside
            answer = {} if has or text_key else {"answer": None}
            yield json.dumps({**answer, **row}, default=_plain) + "\n"
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} row {i} is not JSON: {error}") from None


def _rows(given: Any, name: str) -> Iterable[Any]:
    kinds = [
        f"{kind.__module__.partition('.')[0]}.{kind.__name__}"
        for kind in type(given).__mro__
    ]
    if "pandas.DataFrame" in kinds:
        return _frame(given, name)
    if "datasets.Dataset" in kinds:
        return given
    if "datasets.DatasetDict" in kinds:
        raise ValueError(
            f"{name} is a {kinds[0]} of {list(given)}; give one of them, such as "
            f"dataset[{next(iter(given), 'train')!r}]"
        )
    if "datasets.IterableDataset" in kinds:
        raise ValueError(
            f"{name} is a {kinds[0]}, which may have no end; give so many of its rows: "
            "list(dataset.take(1000))"
        )
    if not isinstance(given, Sequence) or isinstance(given, bytes):
        raise ValueError(
            f"{name} is a {kinds[0]}; give a path, or a list of texts or of rows with "
            "'prompt', a pandas.DataFrame or a datasets.Dataset"
        )
    return given


def _frame(frame: Any, name: str) -> Iterator[dict[str, Any]]:
    """The rows of a pandas.DataFrame.

    Raises:
      ValueError: two columns of one name, or a name that is no text.
    """
    columns = list(frame.columns)
    for column in columns:
        if not isinstance(column, str) or columns.count(column) > 1:
            raise ValueError(
                f"{name}: the columns of a DataFrame need different names that are "
                f"text, got {columns}"
            )
    for values in frame.itertuples(index=False, name=None):
        yield {
            column: None if _is_missing(value) else value
            for column, value in zip(columns, values, strict=True)
        }


def _is_missing(value: Any) -> bool:
    if isinstance(value, float):  # NumPy's too
        return math.isnan(value)
    return type(value).__name__ in ("NAType", "NaTType")


def _plain(value: Any) -> Any:
    """What JSON can hold instead of NumPy's values and dates."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, date):  # datetime and pandas.Timestamp too
        return value.isoformat()
    raise TypeError(f"Object of type {type(value).__name__} is no text or number")
