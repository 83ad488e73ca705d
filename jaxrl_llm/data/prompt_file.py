"""Files that `jaxrl generate` reads prompts from and writes completions to."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrl_llm.data.messages import content_of
from jaxrl_llm.data.sources import Row, read_jsonl
from jaxrl_llm.data.types import Completion

_OURS = ("prompt_id", "sample", "completion", "finish_reason", "num_tokens")


def read(path: Path) -> list[Row]:
    """One row per prompt, each with `prompt`: text, or a list of chat messages.

    Args:
      path: FILE.jsonl with an object on each line, which may have other columns; or any
        other file with a prompt of text on each line.

    Raises:
      ValueError: a line is no object, or has no prompt; the message names it.
      OSError: the file cannot be read.
    """
    path = path.expanduser()
    if path.suffix != ".jsonl":
        return [{"prompt": line} for line in path.read_text("utf-8").splitlines()]
    rows = list(read_jsonl(path))
    for number, row in enumerate(rows):
        place = f"{path}, row {number} (from 0)"
        if "prompt" not in row:
            raise ValueError(f"{place}: no column 'prompt'; it has {list(row)}")
        try:
            row["prompt"] = content_of(row["prompt"], "prompt")
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        if taken := [name for name in _OURS if name in row]:
            raise ValueError(
                f"{place}: column {taken[0]!r} has the name of what is written of each "
                "completion; rename it"
            )
    return rows


def check_writable(path: Path) -> None:
    """Raises ValueError if completions cannot be written to a new file `path`."""
    if path.suffix != ".jsonl":
        raise ValueError(f"--out {path}: name a FILE.jsonl")
    if path.exists():
        raise ValueError(f"--out {path} exists; name another file, or remove it")
    if not path.parent.is_dir():
        raise ValueError(f"--out {path}: there is no folder {path.parent}")


def lines(rows: Sequence[Row], groups: Sequence[Sequence[Completion]]) -> str:
    """One JSON object per line and completion: the columns of its prompt's row, then
    `prompt_id` (the row, from 0), `sample` (from 0), `completion`, `finish_reason`
    ("stop" or "length") and `num_tokens`, the stop token included.

    Args:
      groups: for each row, its completions.
    """
    return "".join(
        json.dumps(_record(row, completion)) + "\n"
        for row, group in zip(rows, groups, strict=True)
        for completion in group
    )


def _record(row: Mapping[str, Any], completion: Completion) -> dict[str, Any]:
    return {
        **row,
        "prompt_id": completion.prompt_id,
        "sample": completion.sample,
        "completion": completion.text,
        "finish_reason": completion.finish_reason,
        "num_tokens": len(completion.tokens),
    }
