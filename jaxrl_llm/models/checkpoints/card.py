"""The README.md of a saved model: what it was made from, its licence, and how."""

import json
import os
import re
import stat
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from jaxrl_llm.models.checkpoints.files import shortened

FILE = "README.md"
_KEPT = ("base_model", "license", "license_name", "license_link")
_BYTES = 2**16


class Origin(NamedTuple):
    """Where a model came from."""

    name: str
    """Its path or hub id, as it was given."""
    revision: str | None = None
    said: Mapping[str, str] = {}
    """Its base model and licence, as its own card has them."""


def said_in(folder: Path) -> dict[str, str]:
    """Base model and licence in the card of a folder; nothing if there is no card."""
    try:
        path = folder / FILE
        if not stat.S_ISREG(path.stat().st_mode):
            return {}
        with path.open(encoding="utf-8", errors="replace") as file:
            text = file.read(_BYTES)
    except OSError:
        return {}
    header = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    found = {}
    for key in _KEPT if header else ():
        value = re.search(rf"^{key}:[ \t]*(?:\n[ \t]*-[ \t]*)?(.+)$", header[1], re.M)
        if value and (plain := value[1].strip().strip("\"'")):
            found[key] = shortened(plain)
    return found


def text(
    origin: Origin, recipe: Mapping[str, Any], library: str = "transformers"
) -> str:
    """The card of a model that was made from another one.

    Args:
      recipe: how, a value for each name.
      library: that reads it.
    """
    local = os.path.exists(Path(origin.name).expanduser())
    said = dict(origin.said)
    if not local and not origin.name.startswith("package:"):
        said["base_model"] = origin.name
    header = {"library_name": library, "pipeline_tag": "text-generation"} | said
    base = f"`{origin.name}`" + (f" at `{origin.revision}`" if origin.revision else "")
    if local and "base_model" in said:
        base += f", which was made from `{said['base_model']}`"
    licence = said.get("license_name", said.get("license"))
    rows = dict(recipe)
    if installed := list(metadata.distributions(name="jaxrl-llm")):
        rows = {"jaxrl_llm": installed[0].version} | rows
    return "\n".join(
        [
            "---",
            *(f"{key}: {json.dumps(value)}" for key, value in header.items()),
            "---",
            "",
            "# Model card",
            "",
            f"Base model: {base}.",
            "",
            f"Licence: {licence}, that of the base model."
            if licence
            else "Licence: the base model's, which its files do not state.",
            "",
            "## Recipe",
            "",
            "| setting | value |",
            "|---|---|",
            *(f"| {name} | `{_cell(value)}` |" for name, value in rows.items()),
            "",
        ]
    )


def _cell(value: Any) -> str:
    plain = value if isinstance(value, str) else json.dumps(value, default=str)
    return shortened(plain).replace("|", "\\|").replace("`", "'")
