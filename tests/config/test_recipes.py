"""docs/recipes.md names every configuration, and the test that checks it."""

import re

import pytest
import recipes

from jaxrl_llm.config import bundled, parsing, schemas

PAGE = (recipes.ROOT / "docs/recipes.md").read_text()
ROWS = re.findall(
    r"^\| `(\S+)` \| (.*) \| (.*) \| `(tests/\S+)` \|$", PAGE, re.MULTILINE
)


def test_the_table_has_each_configuration_once_by_its_short_name():
    assert [name for name, *_ in ROWS] == list(bundled.names())
    assert len(re.findall(r"^\| `", PAGE, re.MULTILINE)) == len(ROWS)


def test_the_stages_of_a_pipeline_hand_on_what_they_make():
    folder = recipes.ROOT / "configs/pipeline_smollm2_cpu"
    stages = {
        name: parsing.load(folder / f"{name}.yaml", schema=schemas.of(task))
        for name, task in (("sft", "sft"), ("rm", "rm"), ("ppo", None))
    }
    made = {name: f"{one.output_dir}/huggingface" for name, one in stages.items()}
    assert stages["rm"].model.path == stages["ppo"].model.path == made["sft"]
    assert stages["ppo"].reward.model.path == made["rm"]
    commands = (recipes.ROOT / "Makefile").read_text()
    for name in stages:
        assert f" configs/pipeline_smollm2_cpu/{name}.yaml\n" in commands


@pytest.mark.parametrize("game", ["calculator", "higher_lower"])
def test_a_game_is_shown_before_it_is_played(game):
    file = f"configs/agents_smollm2_cpu/{game}_sft.yaml"
    shown = parsing.load(recipes.ROOT / file, schema=schemas.of("sft"))
    played = parsing.load(recipes.ROOT / f"configs/{game}_smollm2_cpu.yaml")
    assert played.agent.environment == game
    assert played.model.path == f"{shown.output_dir}/huggingface"
    assert shown.data.train.path == f"runs/{game}/traces/train.jsonl"


@pytest.mark.parametrize("name, about, run, test", ROWS, ids=[row[0] for row in ROWS])
def test_a_recipe_says_what_it_is_and_which_test_checks_it(name, about, run, test):
    stem = bundled.names()[name].stem
    assert about and run
    assert test == recipes.test_of(stem)
    file, _, case = test.partition("::")
    function = case.partition("[")[0]
    assert f"\ndef {function}(" in (recipes.ROOT / file).read_text()
