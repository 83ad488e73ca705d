"""What a notebook or a script shows of a run."""

import re

import pytest

from jaxrl_llm.tracking import run_directory, summary
from jaxrl_llm.tracking.result import Result

NAME = "val-core/all/acc/greedy"


def accuracy(value):
    return {NAME: value, f"{NAME}/ci95_low": value - 0.1, f"{NAME}/ci95_high": value}


def make_run(run_dir, lines):
    with run_directory.MetricsWriter(run_dir, [], "p", {}) as w:
        for step, line in lines:
            if NAME in line:
                w.write_rollouts(step, "val", [])
            w.write(step, line)
    return run_dir


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [
        (0, accuracy(0.25)),
        (1, {"critic/rewards/mean": 0.5}),
        (2, {"critic/rewards/mean": 0.75, **accuracy(0.625)}),
    ]
    make_run(tmp_path / "runs/<b>&'one", lines)
    (tmp_path / "runs/<b>&'one/report.html").touch()
    return tmp_path / "runs/<b>&'one"


def test_a_notebook_shows_what_changed_and_where_the_report_is(run):
    with run_directory.MetricsWriter(run, [], "p", {}) as w:
        w.write_advice(2, "groups_equal", "step 2: <script>alert(1)</script>")
    result = Result(run, stopped=True)
    shown = result._repr_html_()
    cells = re.findall("<td>(.*?)</td>", shown)
    assert cells == [NAME, "0.25 [0.15, 0.25]", "0.625 [0.525, 0.625]", "+0.375"]
    assert "step 2, stopped" in shown
    link = "runs/%3Cb%3E%26%27one/report.html"
    assert f'href="{link}"' in shown and "weights" not in shown
    assert "<b>&'" not in shown and "<script" not in shown
    assert result.advice == ["step 2: <script>alert(1)</script>"]
    assert "training reward: 0.5 → 0.75" in shown
    assert "held-out accuracy: 0.25 → 0.625" in shown
    assert "no such file" in Result(run / "nothing")._repr_html_()


def test_a_run_without_a_validation_before_has_no_change_to_show(tmp_path):
    shown = Result(make_run(tmp_path, [(1, accuracy(0.5))]))._repr_html_()
    assert re.findall("<td>(.*?)</td>", shown) == [NAME, "0.5 [0.4, 0.5]"]
    assert "change" not in shown


def test_a_curve_passes_over_what_was_not_measured():
    shown = summary.curve("a", [0, 10, 20], [0.0, float("nan"), 2.0])
    # From the lower left to the upper right, six pixels from the edges.
    assert 'points="6.0,74.0 294.0,6.0"' in shown and "0 → 2" in shown
    assert 'points="6.0,74.0"' in summary.curve("a", [3], [1.0])
    assert summary.curve("a", [0], [float("nan")]) == ""


@pytest.mark.filterwarnings("default")
def test_a_plot_is_a_picture_to_notebooks_and_a_file_to_scripts(run, capsys):
    matplotlib = pytest.importorskip("matplotlib")
    backend = matplotlib.get_backend()
    matplotlib.use("agg")
    try:
        plot = Result(run).plot()
        assert plot._repr_png_().startswith(b"\x89PNG")
        plot.show()
    finally:
        matplotlib.use(backend)
    assert capsys.readouterr().out == f"plot         {run}/plot.png\n"
    assert (run / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_figure_shows_what_was_measured(tmp_path):
    pytest.importorskip("matplotlib")
    name = "val-core/all/acc/greedy"
    lines = [
        (0, {name: 0.25, f"{name}/ci95_low": 0.125, f"{name}/ci95_high": 0.5}),
        (1, {"critic/rewards/mean": 0.5}),
        (2, {"critic/rewards/mean": 0.75, name: 0.5}),
    ]
    reward, accuracy = Result(make_run(tmp_path, lines)).plot().axes
    (line,) = reward.lines
    assert line.get_xydata().tolist() == [[1, 0.5], [2, 0.75]]
    (line,) = accuracy.lines
    assert line.get_xydata().tolist() == [[0, 0.25], [2, 0.5]]
    assert Result(make_run(tmp_path / "empty", [])).plot().axes == []
