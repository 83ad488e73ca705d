"""One damaged file of a run, and then the run goes on: right in the end, or refused by
a line that says what is damaged."""

import json
import pathlib

import pyarrow
import pytest
from faults import count, damage, generator, runs
from faults.processes import Ended
from faults.verdicts import of_a_refusal, of_a_whole_run
from pyarrow import parquet


def of_the_checkpoint(run):
    return [p for p in (run / "checkpoints").rglob("*") if p.is_file()]


def of_the_newest_checkpoint(run):
    newest = run / "checkpoints" / str(runs.STEPS - runs.SAVED_EVERY)
    return [p for p in newest.rglob("*") if p.is_file()]


def metrics(run):
    return [run / "metrics.jsonl"]


def rollouts(run):
    return sorted((run / "rollouts").iterdir())


def settings(run):
    return [run / "config.yaml"]


# How many, which files, what is done to them.
KINDS = {
    "flipped bit in a checkpoint": (40, of_the_newest_checkpoint, ("flip",)),
    "truncated checkpoint": (20, of_the_newest_checkpoint, ("cut", "zeros", "gone")),
    "truncated metrics": (20, metrics, ("cut", "zeros")),
    # Those from before the oldest checkpoint may be cleared away: none is "gone".
    "truncated rollouts": (20, rollouts, ("cut", "zeros")),
    "truncated config.yaml": (20, settings, ("cut", "zeros")),
}


@pytest.fixture(scope="module")
def stopped(campaign):
    """A run that has two checkpoints and two more steps to go."""
    place = campaign.place("stopped")
    last = runs.STEPS - runs.SAVED_EVERY
    steps = {"trainer.total_training_steps": last}
    ended = campaign.train(place, changed=steps).wait(campaign.limit_s)
    assert ended.status == 0, ended.output
    return place / "run"


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file(campaign, stopped, verdicts, kind):
    number, files_of, ways = KINDS[kind]
    rng, files = generator(kind), sorted(files_of(stopped))
    filled = [path for path in files if path.stat().st_size]
    rng.shuffle(filled)
    faults = []
    for i in range(count(number)):
        path = filled[i % len(filled)]
        drawn = damage.draw(rng, path, ways[i % len(ways)])
        faults.append({"file": str(path.relative_to(stopped)), **drawn})
    place = campaign.place("damaged")
    results = place / "results"
    config = runs.write_config(place, campaign.values, place / "run")
    process = campaign.zygote.start(
        call="faults.lasting:go_on",
        arguments=dict(
            config=config,
            whole=str(stopped),
            right=str(campaign.right),
            faults=faults,
            results=str(results),
        ),
    )
    ended = process.wait(campaign.limit_s * 4 + 10 * len(faults))
    lines = results.read_text().splitlines() if results.exists() else []
    for found in map(json.loads, lines):
        fault = " ".join(str(found.get(k, "")) for k in ("file", "how", "at", "bit"))
        verdicts(kind, fault, *verdict(campaign, place / "run", found))
    if len(lines) < len(faults):  # the process is no more
        fault = faults[len(lines)]
        what = "hang" if ended.hung else "traceback"
        verdicts(kind, str(fault), what, ended.seconds, ended.last_words)


def verdict(campaign, run, found):
    """On a process that went on after the damage."""
    ended = Ended(found["status"], found["output"], found["seconds"], False)
    if ended.seconds > campaign.limit_s:
        return "hang", ended.seconds, ended.last_words
    if ended.status or ended.raw:
        named = (found["file"].split("/")[0], str(run))
        return of_a_refusal(ended, named)
    return of_a_whole_run(ended, found["wrong"])


@pytest.mark.parametrize("number", range(count(20)))
def test_truncated_data(campaign, stopped, verdicts, number):
    """Of a run that goes on; half of a run that starts."""
    kind, goes_on = "truncated data", number % 2 == 0
    rng, place = generator(kind, number), campaign.place("data")
    rows = pathlib.Path(campaign.values["data"]["train"]["path"])
    whole = rows.read_bytes()
    path = place / ("questions.jsonl" if goes_on else "questions.parquet")
    if not goes_on:
        table = pyarrow.Table.from_pylist([json.loads(x) for x in whole.splitlines()])
        parquet.write_table(table, path)
        whole = path.read_bytes()
    at = rng.randrange(len(whole))
    if goes_on:  # in its place, so that nothing else differs
        runs.copy(stopped, place / "run")
        rows.write_bytes(whole[:at])
        process = campaign.train(place)
    else:
        path.write_bytes(whole[:at])
        process = campaign.train(place, changed={"data.train.path": str(path)})
    ended = process.wait(campaign.limit_s)
    if goes_on:
        rows.write_bytes(whole)
    if ended.status == 0 and goes_on:
        found = of_a_whole_run(ended, runs.wrong(place / "run", campaign.right))
    else:
        found = of_a_refusal(ended, [path.name])
    verdicts(kind, f"{path.name} cut {at}", *found)
