"""No space is left while a run writes: it says so and ends, and with more space it goes
on as if there had always been enough."""

import json

from faults import count, generator, runs
from faults.processes import Ended
from faults.verdicts import of_a_refusal, of_a_whole_run

KIND = "disk full"
SIZES = 24
LEAST = 4096


def test_a_full_disk(campaign, verdicts):
    rng, place = generator(KIND), campaign.place("full")
    enough = sum(p.stat().st_size for p in campaign.right.rglob("*") if p.is_file())
    sizes = [rng.randrange(LEAST, enough // 2) for _ in range(count(SIZES))]
    config = runs.write_config(place, campaign.values, place / "run")
    results = place / "results"
    ended = campaign.zygote.start(
        call="faults.lasting:fill",
        arguments=dict(
            config=config,
            right=str(campaign.right),
            sizes=sizes,
            results=str(results),
        ),
    ).wait(campaign.limit_s * 4 + 20 * len(sizes))
    found = results.read_text().splitlines() if results.exists() else []
    for size, line in zip(sizes, map(json.loads, found), strict=False):
        if line["full"]["status"] == 0 and line["full"]["wrong"] is None:
            continue  # it was enough
        first, then = (process(line[name]) for name in ("full", "roomy"))
        verdict = of_a_refusal(first, [str(place / "run")])
        if verdict[0] == "said":
            whole = of_a_whole_run(then, line["roomy"]["wrong"])
            verdict = verdict if whole[0] == "right" else whole
        verdicts(KIND, f"{size} bytes", *verdict)
    if len(found) < len(sizes):  # the process is no more
        what = "hang" if ended.hung else "traceback"
        size = sizes[len(found)]
        verdicts(KIND, f"{size} bytes", what, ended.seconds, ended.last_words)


def process(found):
    return Ended(found["status"], found["output"], found["seconds"], False)
