"""The pages about coming from another trainer have the tables that the errors read."""

import pathlib
import runpy

import pytest

from jaxrl_llm.config.peers.lookup import PEERS

DOCS = pathlib.Path(__file__).parents[2] / "docs"
PAGES = {
    path.name: (path, text)
    for path, text in runpy.run_path(str(DOCS / "key_tables.py"))["pages"]()
}


@pytest.mark.parametrize("name", PEERS)
def test_a_page_has_the_keys_of_the_table(name):
    path, text = PAGES[f"from_{name}.md"]
    assert path.read_text() == text, "run python docs/key_tables.py"
    assert all(f"| `{key}` |" in text for key in PEERS[name].keys)
    for heading in ("## What differs", "## What is missing", "## Keys"):
        assert heading in text
