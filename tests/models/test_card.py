import json
import os

import pytest
import tiny
import yaml

from jaxrl_llm import cli, models
from jaxrl_llm.models.checkpoints import card
from jaxrl_llm.models.checkpoints.card import Origin

LLAMA = """---
language:
- en
license: llama3.1
license_link: "https://example.org/LICENSE"
---
# Some model
license: mit
"""


def header(text):
    return yaml.safe_load(text.split("---")[1])


def test_a_card_names_base_licence_and_recipe():
    said = {"license": "other", "license_name": "llama3.1"}
    text = card.text(Origin("meta/llama", "v1", said), {"lr": 1e-6, "a|b": "x\n`y`"})
    assert header(text) == said | {
        "base_model": "meta/llama",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
    }
    assert "Base model: `meta/llama` at `v1`." in text
    assert "Licence: llama3.1" in text
    assert "| lr | `1e-06` |" in text
    assert "`x 'y'` |" in text


def test_an_unknown_licence_is_said_to_be_unknown(tmp_path):
    text = card.text(Origin(str(tmp_path)), {})
    assert "do not state" in text and "license" not in header(text)
    assert "base_model" not in header(text), "a folder of this machine is no hub id"


def test_what_a_card_says_survives_from_one_model_to_the_next(tmp_path):
    (tmp_path / "README.md").write_text(LLAMA)
    said = card.said_in(tmp_path)
    assert said == {
        "license": "llama3.1",
        "license_link": "https://example.org/LICENSE",
    }
    origin = Origin(str(tmp_path), said=said | {"base_model": "meta/llama"})
    (tmp_path / "README.md").write_text(card.text(origin, {}))
    assert card.said_in(tmp_path) == said | {"base_model": "meta/llama"}


@pytest.mark.parametrize(
    "content", [b"", b"---\nlicense: mit\n", b"\xff---", b"---\n---\n"]
)
def test_a_card_without_a_header_says_nothing(tmp_path, content):
    (tmp_path / "README.md").write_bytes(content)
    assert card.said_in(tmp_path) == {}


def test_a_card_that_is_no_file_says_nothing(tmp_path):
    assert card.said_in(tmp_path) == {}
    os.mkfifo(tmp_path / "README.md")
    assert card.said_in(tmp_path) == {}


def test_a_list_of_one_base_is_read(tmp_path):
    (tmp_path / "README.md").write_text("---\nbase_model:\n  - some/base\n---\n")
    assert card.said_in(tmp_path) == {"base_model": "some/base"}


def test_a_converted_model_has_a_card(tmp_path):
    source = tiny.checkpoint(tmp_path / "model")
    (tmp_path / "model/README.md").write_text(LLAMA)
    cli.convert(source, str(tmp_path / "out"), dtype="float32")
    text = (tmp_path / "out/README.md").read_text()
    assert header(text)["license"] == "llama3.1"
    assert source in text and json.dumps("float32").strip('"') in text
    assert models.open(tmp_path / "out").origin.said["license"] == "llama3.1"
