import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from jaxrl_llm.tracking import report, run_directory

HOSTILE = (
    "</script><script>document.title='owned'</script><!-- <script> "
    "<img src=x onerror=\"document.title='owned'\"> & \u2028 \u2029 \u202e \ud800 end"
)


def record(step, kind, prompt_id, *, completion="reply", correct=None, **fields):
    fields |= {} if correct is None else {"correct": correct}
    return {
        "step": step,
        "split": "train" if kind == "train" else "val",
        "kind": kind,
        "prompt_id": prompt_id,
        "sample": 0,
        "prompt": "question",
        "completion": completion,
        "answer": "4",
        "reward": float(bool(correct)),
        "scores": {"exact": float("nan")},
        "finish_reason": "stop",
        "num_tokens": 3,
        "tokens": [1, 2, 3],
        **fields,
    }


def make_run(run_dir, lines, rollouts=()):
    with run_directory.MetricsWriter(run_dir, [], "p", {"model": {"path": "x/y"}}) as w:
        for step, line in lines:
            w.write(step, line)
        for step, split, records in rollouts:
            w.write_rollouts(step, split, records)
    return run_dir


class Scripts(HTMLParser):
    """The text of each script element, as a browser would delimit it."""

    def __init__(self):
        super().__init__()
        self.found, self._inside = [], False

    def handle_starttag(self, tag, attrs):
        self._inside = tag == "script"
        if self._inside:
            self.found.append("")

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, data):
        if self._inside:
            self.found[-1] += data


def embedded(path):
    """What the page embeds, and the page."""
    page = path.read_text(encoding="utf-8")
    parser = Scripts()
    parser.feed(page)
    assert len(parser.found) == 2
    return json.loads(parser.found[0]), page


def accuracy(value):
    return {"val-core/all/acc/greedy": value}


FULL = [
    (0, accuracy(0.25)),
    (1, {"critic/rewards/mean": 0.5, "timing_s/gen": 1.0, "timing_s/step": 2.0}),
    (2, {"critic/rewards/mean": 0.75, **accuracy(0.5)}),
]
FULL_ROLLOUTS = [
    (0, "val", [record(0, "greedy", i, correct=i < 1) for i in range(4)]),
    (1, "train", [record(1, "train", 9, completion=HOSTILE, advantage=1.0)]),
    (2, "val", [record(2, "greedy", i, correct=0 < i < 3) for i in range(4)]),
]


def test_the_page_holds_the_run(tmp_path):
    path = report.write(make_run(tmp_path / "my run", FULL, FULL_ROLLOUTS))
    assert path == tmp_path / "my run" / "report.html"
    data, _ = embedded(path)
    assert data["name"] == "my run"
    assert data["columns"]["step"] == [0, 1, 2]
    assert data["columns"]["val-core/all/acc/greedy"] == [0.25, None, 0.5]
    assert data["accuracy"] == "val-core/all/acc/greedy"
    assert data["versions"]["num_devices"] == 8
    assert "path: x/y" in data["config"]
    assert [r["completion"] for r in data["completions"] if r["kind"] == "train"] == [
        HOSTILE.replace("\ud800", "�").replace("\u202e", "�")
    ]
    # Question 0 was right and is wrong now, 1 and 2 the other way round, 3 never.
    assert data["changes"] == {
        "from": 0,
        "to": 2,
        "fixed": 2,
        "broken": 1,
        "right": 0,
        "wrong": 1,
    }


def test_the_page_needs_nothing_from_outside(tmp_path):
    _, page = embedded(report.write(make_run(tmp_path, FULL)))
    assert set(re.findall(r"https?://[^\s\"']+", page)) == {
        "http://www.w3.org/2000/svg"  # a namespace, not an address
    }
    assert not re.search(r"<script[^>]+src=|<link[^>]+stylesheet|@import|url\(", page)
    assert "innerHTML" not in page and "default-src 'none'" in page


def test_embedded_json_can_neither_end_the_script_nor_break_it():
    text = report.embeddable({HOSTILE: [HOSTILE, float("nan"), 1e400, 0.5, None]})
    assert text.isascii() and not set(text) & set("<>&")
    assert json.loads(text) == {HOSTILE: [HOSTILE, None, None, 0.5, None]}


@pytest.mark.parametrize(
    "lines, rollouts",
    [
        ([], []),
        ([(1, {"critic/rewards/mean": 0.5})], []),
        ([(0, accuracy(0.5))], FULL_ROLLOUTS[:1]),
        (FULL, []),
    ],
    ids=["no steps", "one step", "validation only", "no rollouts"],
)
def test_a_run_that_lacks_something_has_a_report(tmp_path, lines, rollouts):
    data, _ = embedded(report.write(make_run(tmp_path, lines, rollouts)))
    assert data["columns"]["step"] == [step for step, _ in lines]
    assert data["changes"] is None


def test_a_directory_without_metrics_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"metrics\.jsonl: no such file"):
        report.write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_thin_keeps_both_ends_and_even_spacing():
    assert report.thin(range(9), 5) == [0, 2, 4, 6, 8]
    assert report.thin(range(3), 5) == [0, 1, 2]
    assert report.thin(range(9), 1) == [0]


def test_embedded_completions_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MAX_FILES", 2)
    monkeypatch.setattr(report, "MAX_PER_STEP", 3)
    monkeypatch.setattr(report, "MAX_CHARACTERS", 10)
    rollouts = [
        (
            step,
            "train",
            [record(step, "train", i, completion="a" * 25) for i in [*"ab"] * 4],
        )
        for step in (1, 2, 3)
    ]
    data, _ = embedded(report.write(make_run(tmp_path, [], rollouts)))
    assert [r["step"] for r in data["completions"]] == [1, 1, 1, 3, 3, 3]
    assert data["counts"] == {"files": 3, "files_read": 2, "read": 16}
    assert data["completions"][0]["completion"] == (
        "aaaaa\n[... 15 characters left out ...]\naaaaa"
    )
    assert "tokens" not in data["completions"][0]


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
@pytest.mark.parametrize("rollouts", [FULL_ROLLOUTS, []], ids=["full", "no rollouts"])
def test_a_browser_draws_it_and_does_not_obey_the_model(tmp_path, rollouts):
    path = report.write(make_run(tmp_path / "run", FULL, rollouts))
    page = subprocess.run(
        [
            *("chromium", "--headless", "--no-sandbox", "--disable-gpu"),
            *("--no-first-run", "--disable-background-networking", "--disable-sync"),
            *("--disable-component-update", "--virtual-time-budget=2000"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    ).stdout
    assert "<title>run · run report</title>" in page
    assert "Training reward. mean of the batch: 0.5 at step 1, 0.75 at step 2" in page
    # The script ran to its end: this is the last thing that it fills in.
    assert '"num_devices": 8' in page
    if rollouts:
        assert "&lt;img src=x onerror=" in page and "2 fixed" in page
        assert "<img" not in page
