import json
import re
from html.parser import HTMLParser

import pytest

from jaxrl_llm.tracking import report, rollout_digest, run_directory, run_lock

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
    found, _ = embedded(path)
    (data,) = found["runs"]
    assert data["name"] == "my run"
    assert data["columns"]["step"] == [0, 1, 2]
    assert data["columns"]["val-core/all/acc/greedy"] == [0.25, None, 0.5]
    assert data["accuracy"] == "val-core/all/acc/greedy"
    assert data["versions"]["num_devices"] == 8
    assert "path: x/y" in data["config"]
    assert data["settings"] == {"model.path": '"x/y"'}
    assert [r["completion"] for r in data["completions"] if r["kind"] == "train"] == [
        HOSTILE.replace("\ud800", "�").replace("\u202e", "�")
    ]
    assert data["distributions"]["advantage"] == {"steps": [1], "values": [[1.0]]}


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
    found, _ = embedded(report.write(make_run(tmp_path, lines, rollouts)))
    (data,) = found["runs"]
    assert data["columns"]["step"] == [step for step, _ in lines]
    assert len(data["validations"]) == (1 if rollouts else 0)


def test_a_directory_without_metrics_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"metrics\.jsonl: no such file"):
        report.write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_thin_keeps_both_ends_and_even_spacing():
    assert rollout_digest.thin(range(9), 5) == [0, 2, 4, 6, 8]
    assert rollout_digest.thin(range(3), 5) == [0, 1, 2]
    assert rollout_digest.thin(range(9), 1) == [0]
    assert rollout_digest.thin(range(9), 0) == []


def test_steps_that_are_left_out_stay_left_out_as_a_run_goes_on():
    gone = set()
    for count in range(1, 200):
        kept = rollout_digest.every(range(count), 8)
        assert len(kept) <= 8 and kept[0] == 0 and kept[-1] == count - 1
        assert len(kept) >= min(count, 4)
        assert not gone & set(kept)
        gone |= set(range(count - 1)) - set(kept)


def test_embedded_completions_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(rollout_digest, "MAX_FILES", 2)
    monkeypatch.setattr(rollout_digest, "MAX_CHARACTERS", 10)
    details = {"text": ["a"], "advantage": [1.0], "logprob": [-0.5]}
    rollouts = [
        (
            step,
            "train",
            [record(step, "train", i, completion="a" * 25) for i in [*"ab"] * 4]
            + [record(step, "train", "c", token_details=details)],
        )
        for step in (1, 2, 3)
    ]
    path = report.write(make_run(tmp_path, [], rollouts), per_step=3)
    (data,) = embedded(path)[0]["runs"]
    assert [r["step"] for r in data["completions"]] == [1, 1, 1, 3, 3, 3]
    assert data["counts"] == {"files": 3, "files_read": 2, "read": 18}
    known, cut, _ = data["completions"][:3]
    assert cut["completion"] == "aaaaa\n[... 15 characters left out ...]\naaaaa"
    # One whose tokens are known is always there; other tokens are not.
    assert known["prompt_id"] == "c" and known["tokens"] == details
    assert "tokens" not in cut


def test_greedy_answers_are_paired_by_question_and_not_by_place(tmp_path):
    def answers(step, correct):
        return [
            record(step, "greedy", i, correct=c, prompt=p, completion=f"{p} at {step}")
            for i, (p, c) in enumerate(correct)
        ]

    one = make_run(
        tmp_path / "one" / "run",
        [(0, {}), (4, {})],
        [
            (0, "val", answers(0, [("a", True), ("b", False), ("c", False)])),
            (4, "val", answers(4, [("a", False), ("b", False), ("c", True)])),
        ],
    )
    two = make_run(
        tmp_path / "two" / "run",
        [(0, {}), (9, {})],
        [
            (0, "val", answers(0, [("d", True), ("c", False), ("a", True)])),
            (9, "val", answers(9, [("d", True), ("c", True), ("a", True)])),
        ],
    )
    path = report.compare([one, two], tmp_path / "new" / "both.html")
    assert path == tmp_path / "new" / "both.html"
    data, _ = embedded(path)
    assert [run["name"] for run in data["runs"]] == ["one/run", "two/run"]
    # Those that are answered differently somewhere come first.
    assert [q["prompt"] for q in data["questions"]] == ["a", "c", "b", "d"]
    first, second = (run["validations"] for run in data["runs"])
    assert [(v["step"], v["correct"]) for v in first] == [(0, "100 "), (4, "010 ")]
    assert [(v["step"], v["correct"]) for v in second] == [(0, "10 1"), (9, "11 1")]
    assert second[1]["texts"] == ["a at 9", "c at 9", None, "d at 9"]


def test_a_question_that_is_asked_twice_is_two_questions(tmp_path):
    def twice(step, *correct):
        return [record(step, "greedy", i, correct=c) for i, c in enumerate(correct)]

    rollouts = [(0, "val", twice(0, True, False)), (1, "val", twice(1, True, True))]
    data, _ = embedded(report.write(make_run(tmp_path, [], rollouts)))
    before, after = (v["correct"] for v in data["runs"][0]["validations"])
    assert sorted(before) == ["0", "1"] and after == "11"


def test_one_run_given_twice_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="given twice"):
        report.compare([tmp_path, tmp_path / "."], tmp_path / "page.html")


def test_rollouts_that_were_read_are_not_read_again(tmp_path, monkeypatch):
    digests = rollout_digest.Digests(make_run(tmp_path, FULL, FULL_ROLLOUTS[:2]))
    assert len(digests.refresh()) == 2
    read = []
    real = rollout_digest.completions
    monkeypatch.setattr(
        rollout_digest, "completions", lambda path: read.append(path.name) or real(path)
    )
    with run_directory.MetricsWriter(tmp_path, [], "p", {}) as writer:
        writer.write_rollouts(2, "val", FULL_ROLLOUTS[2][2])
    assert [one.step for one in digests.refresh()] == [1, 0, 2]
    assert read == ["val_000002.jsonl"]


def test_an_episode_is_shown_turn_by_turn(tmp_path):
    turns = [
        {"role": r, "text": t, "num_tokens": n, "sampled": n > 4, "reward": x}
        for r, t, n, x in (
            ("assistant", "is it 4?", 5, 0.5),
            ("user", "lower\u202e", 3, None),
            ("assistant", "2", 6, None),
        )
    ]
    opening = [{"role": "user", "content": "guess"}]
    played = {"turns": turns, "status": "max_turns", "opening": opening}
    episode = record(1, "train", 0, completion="is it 4?lower2", **played)
    told = "assistant: is it 4?\nuser: lower\u202e\nassistant: 2\n[max_turns]"
    assert run_directory.reply(episode) == told
    assert run_directory.reply(episode | {"status": "completed"}) == told[:-12]
    assert run_directory.reply(record(1, "train", 0)) == "reply"
    lines = [(1, {"critic/rewards/mean": 1.0})]
    run = make_run(tmp_path / "run", lines, [(1, "train", [episode])])
    report.write(run)
    [shown] = embedded(run / "report.html")[0]["runs"][0]["completions"]
    assert shown["status"] == "max_turns" and shown["opening"] == "user: guess"
    assert [t["text"] for t in shown["turns"]] == ["is it 4?", "lower\ufffd", "2"]
    assert [t["reward"] for t in shown["turns"]] == [0.5, None, None]
    assert shown["completion"] == told.replace("\u202e", "\ufffd")


def test_a_page_says_whether_its_run_goes_on(tmp_path):
    def running(path):
        return embedded(path)[0]["runs"][0]["running"]

    make_run(tmp_path, FULL)
    assert not running(report.write(tmp_path))
    with run_lock.locked(tmp_path):
        assert running(report.write(tmp_path))
    assert running(report.write(tmp_path, running=True))


def test_text_shows_what_is_there():
    # A NUL, an escape sequence, an override of the writing direction, half a character.
    assert rollout_digest.visible("a\0\x1b[31m\n\tb\u202ec\ud800") == (
        "a\u2400\u241b[31m\n\tb\ufffdc\ufffd"
    )
