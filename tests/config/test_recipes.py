"""docs/recipes.md names every configuration, and the test that checks it."""

import re

import pytest
import recipes

from jaxrl_llm.config import bundled

PAGE = (recipes.ROOT / "docs/recipes.md").read_text()
ROWS = re.findall(
    r"^\| `(\S+)` \| (.*) \| (.*) \| `(tests/\S+)` \|$", PAGE, re.MULTILINE
)


def test_the_table_has_each_configuration_once_by_its_short_name():
    assert [name for name, *_ in ROWS] == list(bundled.names())
    assert len(re.findall(r"^\| `", PAGE, re.MULTILINE)) == len(ROWS)


@pytest.mark.parametrize("name, about, run, test", ROWS, ids=[row[0] for row in ROWS])
def test_a_recipe_says_what_it_is_and_which_test_checks_it(name, about, run, test):
    stem = bundled.names()[name].stem
    assert about and run
    assert test == recipes.test_of(stem)
    file, _, case = test.partition("::")
    function = case.partition("[")[0]
    assert f"\ndef {function}(" in (recipes.ROOT / file).read_text()
