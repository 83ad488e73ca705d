"""The report as a real browser shows it."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import templates
import tiny
from short_run import EPISODES, make_config

from jaxrl_llm.tracking import report, run_directory
from jaxrl_llm.tracking.result import Result
from jaxrl_llm.training import loop
from jaxrl_llm.training.build import build

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="needs chromium"),
]

HOSTILE = (
    "</script><script>document.title='owned'</script><!-- <script> "
    "<img src=x onerror=\"document.title='owned'\"> </textarea><svg onload=alert(1)> "
    "&lt; \u2028 \u2029 \u202etxt.exe\u202c \u05e9\u05dc\u05d5\u05dd \ud800 "
    "\0 \x1b[31m "
)
LONG = "x" * 3000
RIGHT = {0: "1000", 4: "0110"}
"""Which held-out questions are answered rightly after which step."""


def record(step, kind, prompt_id, **fields):
    return {
        "step": step,
        "split": "train" if kind == "train" else "val",
        "kind": kind,
        "prompt_id": prompt_id,
        "sample": 0,
        "prompt": f"question {prompt_id}",
        "completion": f"reply {prompt_id} of step {step}",
        "answer": str(prompt_id),
        "reward": 0.0,
        "scores": {"exact": 0.0},
        "finish_reason": "stop",
        "num_tokens": 3,
        **fields,
    }


def make_run(run_dir, *, steps=4, responses=(), config=None):
    """A run whose learning rate is always the same."""
    config = config or {"model": {"path": "tiny"}, "actor": {"optim": {"lr": 1e-5}}}
    with run_directory.MetricsWriter(run_dir, [], "project", config) as writer:
        for step in range(steps + 1):
            line = {"critic/rewards/mean": step / 10, "actor/lr": 1e-5}
            if step in RIGHT:
                right = RIGHT[step].count("1") / len(RIGHT[step])
                line = {"val-core/all/acc/greedy": right} | (line if step else {})
                answers = [
                    record(step, "greedy", i, correct=mark == "1", reward=float(mark))
                    for i, mark in enumerate(RIGHT[step])
                ]
                writer.write_rollouts(step, "val", answers)
            writer.write(step, line)
            if step:
                made = responses(step) if responses else [record(step, "train", 7)]
                writer.write_rollouts(step, "train", made)
        writer.write_advice(2, "cut_off", "step 2: every response is cut off")
    return run_dir


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        made = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"]
        )
        yield made
        made.close()


@pytest.fixture
def show(browser):
    """Opens a page without a network; what it says to the console is an error."""
    said, contexts = [], []

    def opened(path, **how):
        context = browser.new_context(offline=True, **how)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-drawn]")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert said == []


def texts(page, selector):
    return [" ".join(text.split()) for text in page.locator(selector).all_inner_texts()]


def test_a_run_is_told_from_its_diagnosis_to_its_versions(tmp_path, show):
    page = show(report.write(make_run(tmp_path / "my run")))
    assert page.title() == "my run · run report"
    assert texts(page, "#state") == ["done"]
    assert texts(page, "#advice .text") == ["step 2: every response is cut off"]
    assert "25% → 50%" in texts(page, "#tiles .tile")[0].replace(".0", "")
    assert "2 fixed 1 broken" in texts(page, "#tiles .tile")[1]
    label = page.locator("#charts svg").first.get_attribute("aria-label")
    assert label == "Training reward. mean of the batch: 0.1 at step 1, 0.4 at step 4"
    assert json.loads(page.locator("#versions").text_content())["num_devices"] == 8
    # What does not change is folded away, and drawn when it is asked for.
    assert "One panel does not change: Learning rate 1.00e−5" in texts(page, "#folded")
    page.click("#folded summary")
    assert page.locator("#folded svg").bounding_box()["width"] > 250


def test_an_episode_is_read_turn_by_turn(tmp_path, show):
    def responses(step):
        said = (("assistant", "is it 4?", True, 0.5), ("user", "lower", False, None))
        turns = [
            {"role": r, "text": t, "num_tokens": 5, "sampled": s, "reward": x}
            for r, t, s, x in said
        ]
        opening = [{"role": "user", "content": "guess"}]
        played = {"turns": turns, "status": "max_turns", "opening": opening}
        return [record(step, "train", 1, **played)]

    page = show(report.write(make_run(tmp_path, responses=responses)))
    assert texts(page, "#list h4") == [
        "Opening",
        "Reference answer",
        "1. assistant · 5 tokens · reward 0.5",
        "2. user · 5 tokens",
    ]
    shown = texts(page, "#list .text")
    assert shown == ["user: guess", "1", "is it 4?", "lower"]
    assert "3 tokens, 1 turns, max turns" in texts(page, "#list .meta")[0]


def test_a_run_of_episodes_shows_its_turns(tmp_path, show):
    weights = tiny.checkpoint(tmp_path / "tiny")
    tiny.tokenizer(templates.FORGETS).save_pretrained(weights)
    changed = EPISODES | {
        "agent.on_rewrite": "fork",
        "agent.max_tokens": 240,
        "agent.max_turns": 3,
        "rollout.stop_token_ids": list(range(60)),
    }
    config = make_config(weights, tmp_path / "run", **changed)
    loop.run(build(config))
    records = {
        (record["prompt_id"], record["sample"]): record
        for record in Result(Path(config.output_dir)).completions(2)
    }
    page = show(Path(config.output_dir) / "report.html")
    cards, forks = page.locator("#list article"), 0
    assert cards.count() == 10 and len(records) == 16  # ten on a page
    for card in cards.all():
        meta = " ".join(card.locator(".meta").inner_text().split())
        whose = re.search(r"question (\d+) · sample (\d+)", meta)
        record = records.pop((int(whose[1]), int(whose[2])))
        turns = record["turns"]
        count = sum(turn["sampled"] for turn in turns)
        assert f"{count} turns, {record['status'].replace('_', ' ')}" in meta
        headings = card.locator("h4").all_inner_texts()
        shown = [heading for heading in headings if heading[0].isdigit()]
        wanted = [f"{i}. {turn['role']}" for i, turn in enumerate(turns, 1)]
        assert [heading.split(" · ")[0] for heading in shown] == wanted
        for heading, turn in zip(shown, turns, strict=True):
            assert heading.endswith("the conversation anew") == turn["new_context"]
            tokens = f"{turn['num_tokens']} tokens"
            assert (tokens in heading) == (turn["num_tokens"] > 0)
            forks += turn["new_context"]
    assert forks > 2
    if folder := os.environ.get("SCREENSHOTS"):
        cards.first.scroll_into_view_if_needed()
        page.screenshot(path=Path(folder) / "episodes.png")


def test_search_and_filters_narrow_the_completions(tmp_path, show):
    def responses(step):
        return [
            record(step, "train", i, reward=float(i % 2), completion=f"say {i} Apples")
            for i in range(6)
        ]

    page = show(report.write(make_run(tmp_path, responses=responses)))
    count = "#count"
    assert texts(page, count) == ["6 completions, mean reward 0.5"]
    page.fill("#search", "3 apples")
    assert texts(page, count) == ["1 completion, mean reward 1"]
    assert texts(page, "#list mark") == ["3 Apples"]
    page.select_option("#every", "1")
    assert texts(page, count) == ["4 completions, mean reward 1"]
    page.click("#reset")
    page.fill("#low", "0.5")
    assert texts(page, count) == ["3 completions, mean reward 1"]
    page.fill("#low", "2")
    assert "No completion fits" in texts(page, "#list")[0]
    page.click("#reset")
    page.select_option("#sort", "high")
    assert texts(page, "#list .tag")[0] == "reward 1"
    page.locator("#list button.link").first.click()  # at every step
    assert "question 1 only" in texts(page, count)[0]
    page.select_option("#kind", "greedy")
    assert texts(page, count) == ["4 completions, mean reward 0.5"]


def test_answers_are_paired_between_validations_and_runs(tmp_path, show):
    page = show(report.write(make_run(tmp_path / "one")))
    assert texts(page, "#outcome button") == [
        "2 fixed",
        "1 broken",
        "0 right both times",
        "1 wrong both times",
    ]
    assert len(texts(page, "#pairs article")) == 2
    page.click("#outcome [data-kind=broken]")
    (pair,) = texts(page, "#pairs article")
    assert "question 0" in pair and "reply 0 of step 4" in pair
    # Of 3 changed answers, 1 or fewer broken or fixed: 2 (1 + 3) / 8 = 1.
    assert "p = 1.000" in texts(page, "#sign-test")[0]
    page.fill("#pair-search", "nowhere")
    assert texts(page, "#pair-count") == ["0 of 1 broken"]

    config = {"model": {"path": "tiny"}, "actor": {"optim": {"lr": 3e-5}}}
    other = make_run(tmp_path / "two", steps=2, config=config)
    page = show(report.compare([tmp_path / "one", other], tmp_path / "page.html"))
    assert page.title() == "2 runs · comparison"
    assert texts(page, "#differs tr")[1] == "actor.optim.lr 1e-05 3e-05"
    label = page.locator("#charts svg").first.get_attribute("aria-label")
    assert label == (
        "Training reward. one: 0.1 at step 1, 0.4 at step 4; "
        "two: 0.1 at step 1, 0.2 at step 2"
    )
    # One after its last step against two after its last, which is step 0.
    assert texts(page, "#outcome button b") == ["1", "2", "0", "1"]
    page.select_option("#run", "1")
    assert texts(page, "#step-label") == ["Step 2"]


@pytest.mark.parametrize("width", [390, 1240])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_screen_and_text_is_legible(
    tmp_path, show, width, scheme
):
    def responses(step):
        details = {"text": [LONG], "advantage": [1.0], "logprob": [-1.0]}
        return [record(step, "train", 0, completion=LONG, token_details=details)]

    runs = [make_run(tmp_path / (n * 60), responses=responses) for n in ("a", "b")]
    how = {"viewport": {"width": width, "height": 844}, "color_scheme": scheme}
    for path in report.write(runs[0]), report.compare(runs, tmp_path / "both.html"):
        page = show(path, **how)
        page.select_option("#colour", "advantage")
        for element in page.locator("details:not([open]) > summary").all():
            if element.is_visible():
                element.click()
        assert page.evaluate("document.documentElement.scrollWidth") == width
        for selector in "h1", ".facts dd", "h2", "#list .text", "#count", "#theme":
            if page.locator(selector).count():
                assert contrast(page, selector) >= 4.5, selector
        before = background(page)
        page.click("#theme")
        assert (sum(background(page)) > 384) == (scheme == "dark")
        assert (sum(before) > 384) == (scheme == "light")
        assert contrast(page, "#list .text") >= 4.5


def background(page):
    said = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return [int(x) for x in said.removeprefix("rgb(").removesuffix(")").split(",")]


def contrast(page, selector):
    """WCAG's ratio of the luminances of text and of what lies behind it."""
    return page.locator(selector).first.evaluate(
        """node => {
          const parts = text => text.match(/[\\d.]+/g).map(Number);
          const bright = c => c.slice(0, 3).map(v => v / 255)
            .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
          const ink = bright(parts(getComputedStyle(node).color));
          let behind = node, found;
          do { found = parts(getComputedStyle(behind).backgroundColor);
               behind = behind.parentElement; } while (behind && found[3] === 0);
          const paper = bright(found);
          return (Math.max(ink, paper) + .05) / (Math.min(ink, paper) + .05);
        }"""
    )


def test_hostile_text_is_shown_and_does_nothing(tmp_path, show):
    def responses(step):
        details = {
            "text": [HOSTILE, LONG],
            "advantage": [1.0, -1.0],
            "logprob": [-1.0, None],
            "mismatch": [None, 0.5],
        }
        hostile = {"prompt": HOSTILE, "completion": HOSTILE + LONG, "answer": HOSTILE}
        hostile |= {"scores": {HOSTILE: 1.0, "b": 0.0}, "token_details": details}
        return [record(step, "train", HOSTILE, **hostile)]

    text = HOSTILE.replace("\ud800", "")  # which YAML cannot hold
    config = {"model": {"path": text}, text: text}
    run = make_run(tmp_path / "run<img src=x>", responses=responses, config=config)
    page = show(report.write(run))
    before = page.locator("*").count()
    assert page.title() == "run<img src=x> · run report"
    assert page.locator("img, main script, textarea, svg[onload]").count() == 0
    (shown,) = page.locator("#list .cols > div:nth-child(2) .text").all_text_contents()
    assert shown.startswith("</script><script>document.title='owned'</script>")
    assert "\u202e" not in shown and "\0" not in shown and "\u2400" in shown
    page.fill("#search", "</script>")
    assert page.locator("#list mark").count() >= 3
    for colour in "advantage", "logprob", "mismatch":
        page.select_option("#colour", colour)
        page.locator("#list .tok").first.hover()
        assert "token 1" in texts(page, "#list .readout")[0]
    assert page.locator("#list .tok").first.text_content().startswith("</script>")
    assert page.title() == "run<img src=x> · run report" and before > 100


def test_ten_thousand_completions_are_there_within_two_seconds(tmp_path, show):
    def responses(step):
        text = "step by step, so the sum is forty-two " * 10
        return [
            record(step, "train", i, completion=f"{i}: {text}", reward=float(i % 3))
            for i in range(250)
        ]

    path = report.write(make_run(tmp_path, steps=40, responses=responses), per_step=250)
    page = show(path)
    assert texts(page, "#thinned") == ["All 10,008 completions are here."]
    seconds = page.evaluate(
        """() => performance.getEntriesByName("drawn")[0].startTime / 1000"""
    )
    assert seconds < 2
    took = page.evaluate(
        """() => {
          const start = performance.now();
          document.getElementById("every").value = "1";
          const search = document.getElementById("search");
          search.value = "249: STEP";
          search.dispatchEvent(new Event("input"));
          return (performance.now() - start) / 1000;
        }"""
    )
    assert texts(page, "#count") == ["40 completions, mean reward 0, page 1 of 4"]
    assert took < 2


def test_a_page_of_a_run_that_goes_on_shows_what_is_new_where_it_was(tmp_path, show):
    run = make_run(tmp_path)
    page = show(report.write(run, running=True))
    assert texts(page, "#state")[0].startswith("running, step 4")
    page.fill("#search", "reply")
    page.select_option("#sort", "long")
    page.evaluate("scrollTo(0, 700)")
    with run_directory.MetricsWriter(run, [], "project", {}) as writer:
        writer.write_rollouts(5, "train", [record(5, "train", 7)])
        writer.write(5, {"critic/rewards/mean": 0.9})
    report.write(run, running=True)
    with page.expect_navigation():
        page.evaluate("remember(); location.reload()")
    page.wait_for_selector("html[data-drawn]")
    assert texts(page, "#state")[0].startswith("running, step 5")
    assert page.input_value("#search") == "reply"
    assert page.input_value("#sort") == "long"
    assert texts(page, "#step-label") == ["Step 5"]  # the newest
    assert page.evaluate("scrollY") == 700
    page.click("#pause")
    assert texts(page, "#pause") == ["Go on refreshing"]
