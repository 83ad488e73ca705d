"""Two runs of one output_dir: one of them goes on undisturbed, the other is refused."""

import os

import pytest
import waiting
from faults import count, generator, runs
from faults.verdicts import LIMIT_S, of_a_refusal, of_a_whole_run

KIND = "two runs"


def same(place, run):
    return run


def link(place, run):
    (place / "link").symlink_to(run)
    return place / "link"


def link_above(place, run):
    (place / "above").symlink_to(run.parent)
    return place / "above" / run.name


def around(place, run):
    return f"{run.parent}/../{run.parent.name}/./{run.name}/"


def relative(place, run):
    return os.path.relpath(run, place)


NAMES = (same, link, link_above, around, relative)
CHANGED = (
    {},
    {"trainer.total_training_steps": 2 * runs.STEPS},
    {"trainer.save_freq": 1},
    {"actor.micro_batch_size": 2},
    {"trainer.resume": "never"},
)


def test_another_run_while_one_is_running(campaign, verdicts):
    """The first is held within its second step meanwhile."""
    place = campaign.place("two")
    gate = place / "gate"
    gate.mkdir()
    first = campaign.train(place, environ={"GATE": f"2:{gate}"})
    waiting.until(lambda: any(gate.iterdir()) or not first.running())
    before, found = state(place / "run"), []
    for number in range(count(20)):
        rng = generator(KIND, number)
        named, changed = rng.choice(NAMES), rng.choice(CHANGED)
        mine = campaign.place("second")
        # Relative paths are those of the directory that the process starts in.
        config = runs.write_config(
            mine, campaign.values, named(mine, place / "run"), **changed
        )
        second = campaign.zygote.start(mine, argv=["train", config])
        ended = second.wait(LIMIT_S)
        found.append(
            (f"{named.__name__} {changed}", of_a_refusal(ended, ["is in use"]))
        )
        if (now := state(place / "run")) != before:
            words = f"changed {sorted(now.items() ^ before.items())[:4]}"
            found[-1] = found[-1][0], ("lost", ended.seconds, words)
            before = now
    for path in gate.iterdir():
        path.unlink()
    ended = first.wait(campaign.limit_s + count(20) * LIMIT_S)
    whole = of_a_whole_run(ended, runs.wrong(place / "run", campaign.right))
    for fault, verdict in found:
        verdicts(KIND, fault, *(verdict if whole[0] == "right" else whole))


@pytest.mark.parametrize("number", range(count(4)))
def test_two_start_at_once(campaign, verdicts, number):
    place = campaign.place("race")
    both = [campaign.train(place) for _ in range(2)]
    ended = [process.wait(campaign.limit_s) for process in both]
    ended.sort(key=lambda one: one.status)
    found = of_a_whole_run(ended[0], runs.wrong(place / "run", campaign.right))
    if found[0] == "right":
        found = of_a_refusal(ended[1], ["run"])
    verdicts(KIND, f"started at once, {number}", *found)


def state(run):
    """Every file of the run and when it was last written."""
    return {
        str(path.relative_to(run)): (path.stat().st_mtime_ns, path.stat().st_size)
        for path in sorted(run.rglob("*"))
        if path.is_file() and not path.name.endswith(".lock")
    }
