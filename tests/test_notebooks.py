"""The notebooks, from first cell to last, with a tiny model in place of a real one."""

import ast
import importlib.util
import json
import pathlib
import re

import nbformat
import pytest
from nbclient import NotebookClient

from jaxrl_llm.config import parsing

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


def of_the_site(name):
    """A module beside the pages, which is in no package."""
    place = NOTEBOOKS.parent / "docs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_site_shows_what_a_notebook_printed_while_it_is_the_same(tmp_path):
    new, output = nbformat.v4, nbformat.v4.new_output
    head = "# A title\n\n[text](../docs/metrics.md)"
    cells = [new.new_markdown_cell(head), new.new_code_cell("x = 1")]
    cells[1].metadata["tags"] = ["parameters"]
    source, run = tmp_path / "a.ipynb", tmp_path / "run.ipynb"
    nbformat.write(new.new_notebook(cells=cells), source)
    pages, runner = of_the_site("notebook_pages"), of_the_site("run_notebook")
    shown = pages.page(source, run)
    assert shown.startswith("# A title\n\n*This is `notebooks/a.ipynb`, which was not")
    assert "[text](../metrics.md)" in shown
    assert "```python\nx = 1\n```" in shown and "put in their place" not in shown
    made = nbformat.read(source, as_version=4)
    runner.with_values(made, {"x": 2})
    link = '<b>b</b> <a href="runs/report.html" target="_blank">report</a>'
    made.cells[-1].outputs = [
        output("stream", text="1 %\r\x1b[1m2 < 3 %\x1b[0m\n"),
        output("display_data", data={"image/png": "AA\nBB", "text/plain": "<Figure>"}),
        output("execute_result", data={"text/html": link, "text/plain": "Result"}),
        output("execute_result", data={"text/plain": "\x1b[31m'</pre>'"}),
    ]
    made.metadata["ran"] = {"seconds": 90, "on": "two CPU cores"}
    nbformat.write(made, run)
    shown = pages.page(source, run)
    assert "as it ran in 1 min 30 s on two CPU cores" in shown
    assert "put in their place:\n\n```python\nx = 2\n```" in shown
    assert "<pre>2 &lt; 3 %</pre>" in shown and "base64,AABB" in shown
    assert "<b>b</b> report" in shown and "<pre>&#x27;&lt;/pre&gt;&#x27;</pre>" in shown
    cells[1].source = "x = 3"
    nbformat.write(new.new_notebook(cells=cells), source)
    assert "which was not run" in pages.page(source, run)


def test_what_the_site_changes_in_a_notebook_are_parameters_of_it():
    for name, values in of_the_site("run_notebook").VALUES.items():
        source = parameters(nbformat.read(NOTEBOOKS / name, as_version=4)).source
        assert values and all(f"\n{key} = " in f"\n{source}" for key in values)


def run(name, folder, **values):
    """A notebook, executed with other parameters."""
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    if values:
        cell = parameters(notebook)
        lines = cell.source.splitlines()
        names = [line.split(" = ")[0] for line in lines if re.match("[A-Z_]+ = ", line)]
        assert names == list(values), "other parameters than this test knows"
        cell.source = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    NotebookClient(
        notebook,
        timeout=900,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
    ).execute()
    found = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in found if output.get("name") == "stderr"]
    return notebook, "".join(output.get("text", "") for output in found)


@pytest.mark.parametrize(
    "path",
    [p for p in sorted(NOTEBOOKS.glob("*.ipynb")) if "SETTINGS" in p.read_text()],
    ids=lambda p: p.name,
)
def test_the_settings_of_a_notebook_are_those_of_a_configuration(path):
    values = {
        "output_dir": "runs",
        "model": {"path": "model"},
        "data": {"train": {"path": "hub:a"}, "val": {"path": "hub:a"}},
        "reward": {"functions": [{"name": "exact"}]},
        "trainer": {"total_training_steps": 10},
    }
    for line in ast.parse(parameters(nbformat.read(path, as_version=4)).source).body:
        if line.targets[0].id in ("SETTINGS", "SOURCES"):
            for key, value in ast.literal_eval(line.value).items():
                parsing.put(values, key.split("."), value)
    if "agent" in values:  # train() is given its own
        values["agent"]["environment"] = "higher_lower"
    parsed = parsing.parse(values, path.name)
    assert parsed.rollout.n == values["rollout"]["n"]


SETTINGS = {
    "data.train_batch_size": 2,
    "data.max_prompt_length": 96,
    "rollout.n": 4,
    "rollout.max_response_length": 12,
    "rollout.dtype": "float32",
    "actor.dtype": "float32",
}


@pytest.mark.slow
def test_the_quickstart_trains_a_model(tiny_model, tmp_path):
    notebook, shown = run(
        "01_quickstart.ipynb",
        tmp_path,
        MODEL=tiny_model,
        STEPS=2,
        OUTPUT_DIR=str(tmp_path / "run"),
        SETTINGS=SETTINGS,
    )
    assert "Warning" not in shown
    assert "done" in "".join(outputs(notebook, "text/plain")), "the live view"
    pages = outputs(notebook, "text/html")
    assert any("critic/rewards/mean" in html for html in pages), "the table"
    assert any('href="run/report.html"' in html for html in pages), "the result"
    assert outputs(notebook, "image/png"), "the plot"
    made = tmp_path / "run"
    assert (made / "report.html").exists() and (made / "huggingface").is_dir()
    lines = (made / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]


@pytest.mark.slow
def test_adapters_learn_beside_all_weights(tiny_model, tmp_path):
    notebook, shown = run(
        "07_lora.ipynb",
        tmp_path,
        MODEL=tiny_model,
        STEPS=2,
        OUTPUT_DIR="runs",
        SETTINGS={**SETTINGS, "actor.optim.lr": 1e-4},
    )
    found = re.findall(r"(?:weights|adapters): (\S+) MB", shown)
    assert len(found) == 2 and outputs(notebook, "image/png")
    files = "".join(outputs(notebook, "text/plain"))
    assert "adapter_model.safetensors" in files and "huggingface" in files


@pytest.mark.slow
def test_episodes_are_played_and_looked_at(tiny_model, tmp_path):
    notebook, shown = run(
        "08_agents.ipynb",
        tmp_path,
        MODEL=tiny_model,
        STEPS=2,
        OUTPUT_DIR="run",
        SETTINGS={
            **SETTINGS,
            "data.max_prompt_length": 192,
            "agent.max_turns": 3,
            "agent.max_tokens": 192,
        },
    )
    halving, always = map(float, re.findall(r"(?m)^([01]\.\d+)$", shown)[:2])
    assert halving > 0.9 > always
    assert len(re.findall("    said ['\"]", shown)) >= 3
    assert "agent/turns/mean" in "".join(outputs(notebook, "text/html"))
    assert shown.count("Call(name='add', arguments={'a': 1, 'b': 2})") == 2


@pytest.mark.slow
def test_three_stages_follow_one_another(tiny_model, tmp_path):
    notebook, shown = run(
        "09_sft_rm_ppo.ipynb",
        tmp_path,
        MODEL=tiny_model,
        STEPS=1,
        OUTPUT_DIR="runs",
        SETTINGS={
            **SETTINGS,
            "algorithm.adv_estimator": "gae",
            "critic.dtype": "float32",
        },
    )
    tables = "".join(outputs(notebook, "text/html"))
    for name in ("val-core/all/sft/loss", "val-core/all/rm/accuracy"):
        assert name in tables
    found = "".join(outputs(notebook, "text/plain"))
    assert "'at first'" in found and "'after PPO'" in found
    assert outputs(notebook, "image/png")
    lines = (tmp_path / "runs/ppo/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["reward/reward_model/mean"] != 0


@pytest.mark.slow
def test_a_reward_of_ones_own_is_tried_and_paid_for(tiny_model, tmp_path):
    notebook, shown = run(
        "04_own_reward.ipynb",
        tmp_path,
        MODEL=tiny_model,
        STEPS=2,
        OUTPUT_DIR="run",
        SETTINGS=SETTINGS,
    )
    assert "([1.0, 0.5, 0.5, 0.0], [1.0, 0.0, 0.0, 0.0])" in "".join(
        outputs(notebook, "text/plain")
    )
    assert shown.count("'has_words':") == 5 and outputs(notebook, "image/png")


@pytest.mark.slow
def test_gsm8k_is_measured_before_and_after(tiny_model, tmp_path):
    rows = [
        {
            "question": f"What is {i} and {i}?",
            "answer": f"{i}+{i}={2 * i}\n#### {2 * i}",
        }
        for i in range(12)
    ]
    for name, part in (("train", rows[:8]), ("test", rows[8:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (tmp_path / f"{name}.jsonl").write_text(text)
    notebook, shown = run(
        "05_gsm8k.ipynb",
        tmp_path,
        MODEL=tiny_model,
        TRAIN="train.jsonl",
        TEST="test.jsonl",
        STEPS=2,
        OUTPUT_DIR="run",
        SOURCES={},
        SETTINGS={**SETTINGS, "data.max_prompt_length": 192},
    )
    assert "val-core/all/acc/greedy: +0.000 [" in shown and "0 worse of 4" in shown
    assert "fixed: 0" in shown and outputs(notebook, "image/png")


@pytest.mark.slow
def test_what_learns_nothing_is_diagnosed(tiny_model, tmp_path):
    notebook, shown = run(
        "06_diagnose.ipynb",
        tmp_path,
        MODEL=tiny_model,
        STEPS=2,
        OUTPUT_DIR="runs",
        SETTINGS=SETTINGS,
    )
    said = "".join(outputs(notebook, "text/plain"))
    assert "every response gets the same reward" in said
    assert "rollout.max_response_length" in shown and "if not:" in shown


@pytest.mark.slow
def test_the_losses_by_hand_are_as_they_say(tmp_path):
    # What they claim, they assert.
    notebook, _ = run("02_losses_by_hand.ipynb", tmp_path)
    assert len(outputs(notebook, "image/png")) == 3


@pytest.mark.slow
def test_two_meshes_shows_who_holds_what_and_what_moved(tmp_path):
    # What moved, and that no less would do, it asserts.
    notebook, shown = run("03_two_meshes.ipynb", tmp_path)
    assert len(outputs(notebook, "image/png")) == 1
    assert "most received" in shown, "the table"
    # 4,608 elements of two bytes, of which a device wants a quarter and lacks 7/8.
    assert f"{8 * 2 * (512 + 4096) // 4 * 7 // 8} bytes moved" in shown
