"""The table of metrics against the code that names them."""

import ast
import itertools
import pathlib
import re
from types import SimpleNamespace

import pytest

from jaxrl_llm.tracking import metric_table
from jaxrl_llm.tracking.metric_table import METRICS, find

PACKAGE = pathlib.Path(metric_table.__file__).parent.parent
# These log nothing, or only read what was logged.
READERS = {
    "bench",
    "planning",
    "sharding",
    "metric_table.py",
    "console.py",
    "report.py",
}


def texts():
    """Every text in the code, and a pattern for each text with something filled in."""
    constants, patterns = set(), set()
    for path in PACKAGE.rglob("*.py"):
        if READERS & set(path.relative_to(PACKAGE).parts):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                constants.add(node.value)
            elif isinstance(node, ast.JoinedStr):
                for filled in ("(.*)", "(.*?)"):  # where two follow, either is longer
                    parts = [
                        re.escape(x.value) if isinstance(x, ast.Constant) else filled
                        for x in node.values
                    ]
                    if re.search("[a-z]", "".join(parts)):
                        patterns.add(re.compile("".join(parts)))
    return constants, patterns


@pytest.fixture(scope="module")
def code():
    return SimpleNamespace(**dict(zip(("constants", "patterns"), texts(), strict=True)))


def each(name):
    """The names that one row stands for, with words in capitals left as they are."""
    parts = [p.split(",") for p in re.split(r"\{(.+?)\}", name)]
    return {"".join(chosen) for chosen in itertools.product(*parts)}


def logged(name, code):
    """Whether the code has this name, or puts it together from names that it has."""
    return (
        name in code.constants
        or re.fullmatch("[A-Z]+", name) is not None
        or any(
            all(len(x) < len(name) and logged(x, code) for x in found.groups())
            for pattern in code.patterns
            # An empty prefix takes its underscore along.
            for whole in (name, f"_{name}")
            if (found := pattern.fullmatch(whole))
        )
    )


def test_every_row_is_logged_by_the_code(code):
    names = [name for metric in METRICS for name in each(metric.name)]
    assert len(names) == len(set(names)) > 100
    assert [name for name in names if not logged(name, code)] == []
    assert not logged("training/groups_lost", code)
    assert not logged("rollout_corr/rollout_is_median", code)


def test_every_metric_that_the_code_names_has_a_row(code):
    group = re.compile(
        rf"({'|'.join(metric_table.GROUPS)})/[a-zA-Z0-9_@/-]*[a-zA-Z0-9]"
    )
    named = {name for name in code.constants if group.fullmatch(name)}
    starts = {name.rpartition("/")[0] for m in METRICS for name in each(m.name)}
    assert "actor/pg_loss" in named and "critic/rewards" in named
    assert {name for name in named if not find(name)} - starts == set()


def test_a_row_is_found_by_what_is_logged_and_by_nothing_else():
    for logged_name, row in {
        "actor/entropy": "actor/entropy",
        "critic/rewards/max": "critic/rewards/{mean,max,min}",
        "reward/my.module:f/mean": "reward/NAME/mean",
        "val-core/all/acc/mean@4/ci95_low": "val-core/SOURCE/acc/"
        "{mean@N,greedy}/{ci95_low,ci95_high}",
        "val-core/a/b/acc/mean@16": "val-core/SOURCE/acc/mean@N",
    }.items():
        assert find(logged_name).name == row
    for name in ("actor/entropi", "val-core/all/acc/mean@x", "step", "reward/mean"):
        assert find(name) is None


def test_what_has_a_remedy_says_what_is_healthy():
    for metric in METRICS:
        assert metric.formula and (metric.healthy or not metric.remedy)
        assert metric.name.partition("/")[0] in metric_table.GROUPS
