"""A run that is killed goes on as if it had not been: metrics, rollouts and weights are
those of the run that nothing disturbed, bit for bit.

A chain is one run that is killed several times, each time further on; a second run
where the first has passed a point for good.
"""

import re
import time

import pytest
from faults import count, generator, runs

KILLS = 4
CHAINS = 5
DELAYS_S = (0.001, 0.05)
LAST_SAVED = f"checkpoints/{runs.STEPS}"


def anywhere(points):
    return points


def between_metrics_and_checkpoint(points):
    """From the files of a step that is saved to the checkpoint's last name."""
    found = []
    for step in range(runs.SAVED_EVERY, runs.STEPS + 1, runs.SAVED_EVERY):
        first = next(i for i, p in enumerate(points) if f"train_{step:06d}" in p)
        last = points.index(f"os.rename checkpoints/{step}")
        found += points[first : last + 1]
    return found


def renames(points):
    return [point for point in points if point.startswith("os.rename ")]


def export(points):
    """The exported model and what follows."""
    first = next(i for i, p in enumerate(points) if "huggingface" in p)
    return points[first:]


KINDS = {
    "kill at random": anywhere,
    "kill between metrics and checkpoint": between_metrics_and_checkpoint,
    "kill during a rename": renames,
    "kill during the export": export,
}


@pytest.mark.parametrize("chain", range(count(CHAINS)))
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_goes_on(campaign, verdicts, kind, chain):
    rng = generator(kind, chain)
    once = list(dict.fromkeys(campaign.points))
    among = [point for point in KINDS[kind](once) if not gone(point)]
    drawn = rng.sample(among, len(among))
    waiting, others = sorted(drawn[:KILLS], key=once.index), drawn[KILLS:]
    while waiting:
        place, tried = campaign.place("killed"), []
        if kind == "kill during the export":
            runs.copy(trained(campaign), place / "run")
        ended = None
        while waiting and (ended is None or ended.status == -9):
            name = waiting.pop(0)
            after_s = rng.uniform(*DELAYS_S) if kind == "kill at random" else 0.0
            point = {"name": name, "after_s": after_s}
            process = campaign.train(place, watched=str(place / "run"), point=point)
            ended = process.wait(campaign.limit_s)
            if found := unwanted(ended, (0, -9)):
                # The one before left behind what this process could not go on from.
                verdicts(kind, tried[-1] if tried else name, *found)
                return
            if ended.status == -9:
                tried.append(f"chain {chain}: {name} + {after_s * 1e3:.0f} ms")
            elif tried:
                # Whoever goes on passes here no more: it strikes another run.
                waiting.insert(0, name)
            elif others:  # not every run passes here
                waiting.insert(0, others.pop())
        judge(campaign, verdicts, kind, place, tried)


def judge(campaign, verdicts, kind, place, tried):
    """Lets the run end by itself; what is wrong then is laid to each of its kills."""
    began = time.monotonic()
    ended = campaign.train(place).wait(campaign.limit_s)
    found = unwanted(ended, (0,))
    wrong = None if found else runs.wrong(place / "run", campaign.right)
    for fault in tried:
        if found:
            verdicts(kind, fault, *found)
        elif wrong:
            verdict, _, words = wrong.partition(": ")
            verdicts(kind, fault, verdict, ended.seconds, words)
        else:
            verdicts(kind, fault, "right", time.monotonic() - began)


def trained(campaign):
    """A run that was killed when it had trained and was about to export."""
    place = campaign.folder / "trained"
    if not place.exists():
        place.mkdir()
        begins = export(list(dict.fromkeys(campaign.points)))[0]
        point = {"name": begins, "after_s": 0.0}
        process = campaign.train(place, watched=str(place / "run"), point=point)
        assert process.wait(campaign.limit_s).status == -9
    return place / "run"


def unwanted(ended, statuses):
    """Verdict, seconds and words on a process that should have ended with one of these
    statuses, or None."""
    if ended.hung:
        return "hang", ended.seconds, ended.last_words
    if ended.raw:
        return "traceback", ended.seconds, ended.last_words
    if ended.status not in statuses:
        words = f"status {ended.status}: {ended.last_words}"
        return "lost", ended.seconds, words
    return None


def gone(point):
    """Whether a process that goes on does not pass here any more."""
    return re.search(r"\b(mkdir|open) (run)?$", point)
