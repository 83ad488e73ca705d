"""The notebooks, from first cell to last, with a tiny model in place of a real one."""

import json
import pathlib

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = pathlib.Path(__file__).parent.parent / "notebooks"


def parameters(notebook):
    """The cell that says what a reader may want to change."""
    [cell] = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    return cell


def outputs(notebook, kind):
    """Every output that has a representation of this MIME type."""
    found = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [o["data"][kind] for o in found if kind in o.get("data", {})]


@pytest.mark.parametrize(
    "path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda p: p.name
)
def test_a_notebook_is_stored_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not c.outputs and c.execution_count is None for c in code)


def test_the_quickstart_trains_a_model(tiny_model, tmp_path):
    notebook = nbformat.read(NOTEBOOKS / "01_quickstart.ipynb", as_version=4)
    settings = {
        "data.train_batch_size": 2,
        "data.max_prompt_length": 96,
        "rollout.n": 4,
        "rollout.max_response_length": 12,
        "rollout.dtype": "float32",
        "actor.dtype": "float32",
    }
    cell = parameters(notebook)
    names = [line.split(" = ")[0] for line in cell.source.splitlines() if " = " in line]
    values = {
        "MODEL": tiny_model,
        "STEPS": 2,
        "OUTPUT_DIR": str(tmp_path / "run"),
        "SETTINGS": settings,
    }
    assert names == list(values), "other parameters than this test knows"
    cell.source = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    NotebookClient(
        notebook,
        timeout=900,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()

    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert output.get("name") != "stderr", output["text"]
    shown = "".join(
        output.get("text", "")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
    )
    assert "Warning" not in shown
    assert "done" in "".join(outputs(notebook, "text/plain")), "the live view"
    assert any("critic/rewards/mean" in html for html in outputs(notebook, "text/html"))
    assert outputs(notebook, "image/png"), "the plot"
    run = tmp_path / "run"
    assert (run / "report.html").exists() and (run / "huggingface").is_dir()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]


def test_the_losses_by_hand_are_as_they_say(tmp_path):
    # What they claim, they assert.
    notebook = nbformat.read(NOTEBOOKS / "02_losses_by_hand.ipynb", as_version=4)
    NotebookClient(
        notebook,
        timeout=900,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    assert len(outputs(notebook, "image/png")) == 3
    found = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in found if output.get("name") == "stderr"]


def test_two_meshes_shows_who_holds_what_and_what_moved(tmp_path):
    # What moved, and that no less would do, it asserts.
    notebook = nbformat.read(NOTEBOOKS / "03_two_meshes.ipynb", as_version=4)
    NotebookClient(
        notebook,
        timeout=900,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    assert len(outputs(notebook, "image/png")) == 1
    found = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in found if output.get("name") == "stderr"]
    shown = "".join(output.get("text", "") for output in found)
    assert "most received" in shown, "the table"
    # 4,608 elements of two bytes, of which a device wants a quarter and lacks 7/8.
    assert f"{8 * 2 * (512 + 4096) // 4 * 7 // 8} bytes moved" in shown
