"""What a campaign of faults needs, and its table.

FAULTS_SHARE=0.1 tries a tenth of them.
"""

import json
import pathlib
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import pytest
from faults import SEED

HERE = pathlib.Path(__file__).parent
SUPPORT = HERE.parent / "support"
BAD = ("silent", "lost", "traceback", "hang")
GOOD = ("right", "said", "harmless")
RESULTS = HERE.parents[1] / "build" / "faults.json"


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slow)


@dataclass
class Campaign:
    """A run that was never broken, and where faults are tried on copies of it."""

    zygote: object
    folder: pathlib.Path
    values: dict
    """The configuration."""
    right: pathlib.Path
    """The unbroken run."""
    seconds: float
    """How long that took."""
    points: list[str]
    """What it did to its files, in order; see `faults.points`."""
    numbers: Counter = field(default_factory=Counter)

    @property
    def limit_s(self) -> float:
        """A process that trains hangs if it takes so much longer than the unbroken."""
        return 30 + 4 * self.seconds

    def place(self, name: str) -> pathlib.Path:
        """A new folder."""
        self.numbers[name] += 1
        folder = self.folder / f"{name}_{self.numbers[name]}"
        folder.mkdir()
        return folder

    def train(
        self, folder: pathlib.Path, *more: str, changed=None, run=None, **request
    ):
        """Starts a run in folder/run."""
        from faults import runs

        run = run or folder / "run"
        config = runs.write_config(folder, self.values, run, **(changed or {}))
        return self.zygote.start(argv=["train", config, *more], **request)


@pytest.fixture(scope="session")
def campaign(tmp_path_factory):
    from faults import runs
    from faults.processes import Zygote

    folder = tmp_path_factory.mktemp("faults")
    zygote = Zygote(folder / "zygote", SUPPORT)
    try:
        model = folder / "model"
        made = zygote.start(call="tiny:checkpoint", arguments={"directory": str(model)})
        made.wait(300)
        assert (model / "model.safetensors").exists()
        values = runs.write_inputs(folder, model)
        modules = folder / "modules.json"
        found = Campaign(zygote, folder, values, folder, 300.0, [])
        # Once to compile and to know what is imported, once to know how long it takes.
        for name in ("first", "unbroken"):
            place = found.place(name)
            run = place / "run"
            process = found.train(place, modules=str(modules), watched=str(run))
            ended = process.wait(600)
            assert ended.status == 0, ended.output
            zygote.preload(modules)
        found.right, found.seconds = run, ended.seconds
        found.points = (process.folder / "points").read_text().splitlines()
        again = runs.wrong(run, folder / "first_1" / "run")
        assert again is None, f"two unbroken runs differ: {again}"
        yield found
    finally:
        left = zygote.close()
        assert not left, f"processes outlived those that started them: {left}"


@pytest.fixture
def verdicts(request, campaign):
    """Notes the verdict on each fault; the test fails if one is bad."""
    noted, before = [], campaign.zygote.cpu_seconds()

    def note(kind: str, fault: str, verdict: str, seconds: float, words: str = ""):
        assert verdict in (*BAD, *GOOD), verdict
        row = dict(
            kind=kind, fault=fault, verdict=verdict, seconds=seconds, words=words
        )
        request.node.user_properties.append(("fault", row))
        noted.append(row)

    yield note
    used = campaign.zygote.cpu_seconds() - before
    request.node.user_properties.append(("cpu", used))
    bad = [
        f"{r['fault']}: {r['verdict']}: {r['words']}"
        for r in noted
        if r["verdict"] in BAD
    ]
    assert not bad, "\n".join(bad)


class Table:
    """Collects the verdicts from all workers."""

    def __init__(self):
        self.rows, self.cpu, self.began = [], 0.0, time.monotonic()

    def pytest_runtest_logreport(self, report):
        if report.when == "teardown":
            self.rows += [v for k, v in report.user_properties if k == "fault"]
            self.cpu += sum(v for k, v in report.user_properties if k == "cpu")

    def pytest_terminal_summary(self, terminalreporter):
        if not self.rows:
            return
        kinds = defaultdict(Counter)
        for row in self.rows:
            for name in (row["kind"], "all"):
                kinds[name][row["verdict"]] += 1
                kinds[name]["tried"] += 1
        kinds["all"] = kinds.pop("all")
        columns = ("tried", *BAD, *GOOD)
        terminalreporter.section("faults")
        terminalreporter.line(" ".join([f"{'kind':32}", *(f"{c:>9}" for c in columns)]))
        for kind, counts in kinds.items():
            numbers = (f"{counts[column]:9}" for column in columns)
            terminalreporter.line(" ".join([f"{kind:32}", *numbers]))
        for row in self.rows:
            if row["verdict"] in BAD:
                terminalreporter.line(
                    f"{row['kind']}, {row['fault']}: {row['verdict']}: {row['words']}"
                )
        wall = time.monotonic() - self.began
        terminalreporter.line(
            f"seed {SEED}, {wall:.0f} s, of processors {self.cpu:.0f} s"
        )
        RESULTS.parent.mkdir(exist_ok=True)
        table = {kind: dict(counts) for kind, counts in kinds.items()}
        RESULTS.write_text(
            json.dumps(
                {
                    "seed": SEED,
                    "seconds": wall,
                    "cpu_seconds": self.cpu,
                    "table": table,
                    "faults": self.rows,
                },
                indent=1,
            )
        )
        terminalreporter.line(f"every fault and its verdict: {RESULTS}")


def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Table())
