import io
import re

import pytest
from rich.console import Console

from jaxrl_llm.tracking import console as view
from jaxrl_llm.tracking.console import LiveView
from jaxrl_llm.tracking.step_metrics import Validation

METRICS = {
    "critic/rewards/mean": 0.53125,
    "val-core/all/acc/greedy": 0.4,
    "response_length/mean": 183.25,
    "response_length/clip_ratio": 0.0,
    "actor/entropy": 0.9,
    "actor/ppo_kl": 0.00012,
    "actor/grad_norm": 0.25,
    "perf/throughput": 12345.6,
    "timing_s/step": 3.0,
}
HOSTILE = "[red]no[/red] [/] [link=x] :smile: \x1b]0;title\x07\x1b[2J\r\n\u202eok\ud800"
HARMLESS = "[red]no[/red] [/] [link=x] :smile: �]0;title��[2J⏎�ok�"


def record(prompt_id, completion, reward, kind="greedy", prompt="2 + 2?"):
    return {
        "prompt_id": prompt_id,
        "kind": kind,
        "prompt": prompt,
        "completion": completion,
        "answer": "4",
        "reward": reward,
    }


def pipe():
    return Console(file=io.StringIO(), force_terminal=False, width=100)


def terminal(width=110):
    return Console(
        file=io.StringIO(), force_terminal=True, width=width, height=60, _environ={}
    )


def test_in_a_pipe_every_step_is_one_plain_line():
    console = pipe()
    with LiveView(40, console=console) as live:
        live.update(0, {"val-core/all/acc/greedy": 0.25})
        live.phase("generating")
        live.update(7, METRICS, [record(1, HOSTILE, 1.0)])
        live.update(8, {"critic/rewards/mean": 1.0})
    assert console.file.getvalue() == (
        "step  0/40  val acc 0.25\n"
        "step  7/40  reward 0.531  val acc 0.4  length 183  cut off 0  entropy 0.9  "
        "kl 0.00012  grad 0.25  tok/s/dev 12,346  s/step 3  left 0:01:39\n"
        "step  8/40  reward 1  left 0:01:36\n"
    )


def test_the_time_left_is_that_of_steps_without_what_not_every_step_has():
    def step(seconds, **others):
        others = {f"timing_s/{name}": value for name, value in others.items()}
        return {"timing_s/step": seconds, "timing_s/gen": 1.0, **others}

    console = pipe()
    with LiveView(3663, console=console) as live:
        live.update(0, step(500.0, testing=400.0))  # nothing is learned in it
        live.update(1, step(102.0, compile=100.0))
        live.update(2, step(52.0, testing=30.0, save_checkpoint=20.0))
        live.update(3, step(9.0))  # a slow one: the median is 2 seconds
        live.update(3663, step(2.0))
    _, first, second, third, last = console.file.getvalue().splitlines()
    # 2 seconds for each of 3662, 3661 and 3660 steps.
    assert first.endswith("left 2:02:04") and second.endswith("left 2:02:02")
    assert third.endswith("left 2:02:00") and "left" not in last
    assert view.plain_seconds(step(102.0, compile=100.0)) == 2.0


def test_a_terminal_that_cannot_redraw_gets_lines():
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, _environ={"TERM": "dumb"})
    with LiveView(2, console=console) as live:
        live.update(1, {"critic/rewards/mean": 1.0})
        assert file.getvalue() == "step 1/2  reward 1\n"


def test_a_terminal_shows_numbers_phase_and_completions():
    console = terminal()
    with LiveView(40, console=console, num_examples=2) as live:
        live.update(1, METRICS, [record(i, f"reply {i}", 1.0) for i in range(6)])
        live.phase("generating")
        shown = console.file.getvalue()
        live.update(2, {"critic/rewards/mean": 1.0})
    assert "generating" in shown and "1/40" in shown
    assert "0.531" in shown and "12,346" in shown
    # Two of six, evenly spaced.
    assert "reply 0" in shown and "reply 3" in shown and "reply 1" not in shown
    after = console.file.getvalue()[len(shown) :]
    assert "▁█" in after and "0.4" in after and "done" in after


@pytest.mark.parametrize("width", [60, 80])
def test_no_number_is_cut_in_a_narrow_terminal(width):
    figures = {**METRICS, "critic/vf_explained_var": -0.125, "timing_s/step": 1234.5}
    console = terminal(width)
    records = [record(i, "a reply of many words " * 20, 0.0) for i in range(2)]
    with LiveView(12_000, console=console) as live:
        live.update(11_999, figures, records)
        live.phase("asking the policy and its reference")
    words = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", " ", console.file.getvalue()).split()
    for name, text in view.key_figures(figures):
        assert {*name.split(), text} <= set(words)
    assert "11999/12000" in words and "0:20:34" in words and "reference" in words

    name = "val-core/HuggingFaceH4/MATH-500/acc/mean@16"
    old = {name: 0.2125, f"{name}/ci95_low": 0.1875, f"{name}/ci95_high": 0.2375}
    new = {name: 0.3375, f"{name}/ci95_low": 0.3125, f"{name}/ci95_high": 0.3625}
    length = "val-aux/response_length/mean"
    before = Validation(metrics={**old, length: 1183.0}, records=records)
    after = Validation(metrics={**new, length: 32768.0}, records=records)
    log = Console(file=io.StringIO(), force_terminal=False, width=width)
    view.before_after(before, after, "/nowhere", console=log)
    shown = log.file.getvalue()
    assert all(len(line) <= width for line in shown.splitlines())
    head, *_ = [line for line in shown.splitlines() if "change" in line]
    assert head.split() == ["metric", "before", "after", "change"]
    numbers = [line.split()[-3:] for line in shown.splitlines()]
    assert ["1,183", "32,768", "+31,585"] in numbers
    for text in ("[0.188, 0.237]", "[0.312, 0.362]", "0.212", "0.338", "+0.125"):
        assert text in shown
    # A name goes on in the next line, behind a "/".
    parts = [line.split()[0] for line in shown.splitlines() if line.strip()]
    assert any(part.endswith("response_length/") for part in parts)
    assert any(part.endswith("mean@16") for part in parts)


def test_what_the_model_wrote_cannot_act_on_the_terminal():
    console = terminal(200)
    with LiveView(2, console=console) as live:
        live.update(1, {}, [record(1, HOSTILE, 1.0, prompt=HOSTILE)])
    assert HARMLESS in console.file.getvalue()
    assert "\x1b]0" not in console.file.getvalue()
    console = terminal(200)
    validation = Validation(metrics={}, records=[record(1, HOSTILE, 0.0)])
    view.before_after(validation, validation, "/nowhere", console=console)
    assert "\x1b]0" not in console.file.getvalue()
    assert "[red]no[/red]" in console.file.getvalue()


@pytest.mark.parametrize("metrics", [{}, {"critic/rewards/mean": float("nan")}])
def test_a_step_with_nothing_to_show_is_fine(metrics):
    for console in (pipe(), terminal()):
        with LiveView(1, console=console, num_examples=0) as live:
            live.update(1, metrics, [record(1, "x", 1.0)])


def test_a_run_that_goes_on_starts_where_it_was():
    console = terminal()
    with LiveView(40, 12, console=console):
        pass
    assert "12/40" in console.file.getvalue()


def test_a_failure_is_not_called_done():
    console = terminal()
    with pytest.raises(KeyboardInterrupt), LiveView(2, console=console):
        raise KeyboardInterrupt
    assert "stopped" in console.file.getvalue()
    assert "done" not in console.file.getvalue()


def test_a_notebook_cell_is_redrawn_without_widgets(monkeypatch):
    shown = []

    class Handle:
        def update(self, panel):
            shown.append(panel)

    def display(panel, display_id):
        assert display_id is True
        shown.append(panel)
        return Handle()

    monkeypatch.setattr(pytest.importorskip("IPython.display"), "display", display)
    console = Console(file=io.StringIO(), force_jupyter=True, width=100)
    with LiveView(4, console=console) as live:
        live.update(1, METRICS, [record(1, "<b>hi</b>", 1.0)])
    assert len(shown) == 3  # on entering, on the update, at the end
    assert console.file.getvalue() == ""
    html = shown[-1]._repr_mimebundle_([], [])["text/html"]
    assert "&lt;b&gt;hi&lt;/b&gt;" in html and "0.531" in html


def test_before_and_after_side_by_side(tmp_path):
    def interval(value, low, high):
        name = "val-core/all/acc/greedy"
        return {name: value, f"{name}/ci95_low": low, f"{name}/ci95_high": high}

    before = Validation(
        metrics=interval(0.5, 0.41, 0.59),
        records=[record(1, "same", 0.0), record(2, "old reply", 0.0)],
    )
    after = Validation(
        metrics={**interval(0.75, 0.66, 0.82), "new": 2.0},
        records=[
            record(1, "same", 0.0),
            record(2, "drawn", 0.0, "sampled"),
            record(2, "new reply", 1.0),
        ],
    )
    (tmp_path / "report.html").touch()
    console = terminal(160)
    console.no_color = True
    view.before_after(before, after, tmp_path, console=console, num_examples=1)
    shown = console.file.getvalue()
    assert "0.5 [0.41, 0.59]" in shown and "0.75 [0.66, 0.82]" in shown
    assert "+0.25" in shown
    # The one example is the question whose reward changed, answered greedily.
    assert "old reply" in shown and "new reply" in shown and "0 → 1" in shown
    assert "same" not in shown and "drawn" not in shown
    assert f"report       {tmp_path / 'report.html'}" in shown
    assert "checkpoints" not in shown


def test_without_a_validation_before_there_is_only_after(tmp_path):
    console = pipe()
    after = Validation(metrics={"acc": 0.5}, records=[record(1, "reply", 1.0)])
    view.before_after(None, after, tmp_path, console=console)
    assert "0.5" in console.file.getvalue() and "reply" in console.file.getvalue()


def test_a_terminal_that_knows_only_ascii_still_shows_everything(tmp_path):
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, "ascii"), force_terminal=True)
    validation = Validation(metrics={"acc": 0.5}, records=[record(1, "añb\n", 1.0)])
    with LiveView(2, console=console) as live:
        live.update(1, METRICS, validation.records)
    view.before_after(validation, validation, tmp_path, console=console)
    console.file.flush()
    assert b"a?b" in raw.getvalue()


def test_progress_says_how_long_it_took():
    console = pipe()
    with view.progress("Loading [weights]", console=console):
        pass
    assert re.fullmatch(r"Loading \[weights\]: \d+\.\d s\n", console.file.getvalue())
    with pytest.raises(ValueError), view.progress("Loading", console=terminal()):
        raise ValueError


def test_sparkline_by_hand():
    # Eight heights from the smallest to the largest value.
    assert view.sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert view.sparkline([2.0, 2.0]) == "▁▁"


def test_one_line_cuts_at_either_end():
    assert view.one_line(" a\nb\tc ", 10) == "a⏎b c"
    assert view.one_line("abcdef", 4) == "abc…"
    assert view.one_line("abcdef", 4, keep_end=True) == "…def"


def test_numbers_are_short():
    found = [view.number(x) for x in (0.53125, 12345.6, 0.00012, 1e-6, -2.0)]
    assert found == ["0.531", "12,346", "0.00012", "1e-06", "-2"]
