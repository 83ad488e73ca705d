"""Configurations by name, and what `jaxrl init` writes."""

import pathlib

import pytest
import yaml

from jaxrl_llm import cli
from jaxrl_llm.config import bundled, parsing
from jaxrl_llm.config.names import ConfigError
from jaxrl_llm.config.schema import Config
from jaxrl_llm.config.schema_training import OptimConfig

ROOT = pathlib.Path(__file__).parents[2]


def test_every_configuration_has_a_name_of_its_own():
    known = bundled.names()
    assert {path.resolve() for path in known.values()} == set(
        ROOT.glob("configs/*.yaml")
    )
    assert known["quickstart"].name == "quickstart_smollm2_cpu.yaml"
    assert known["gsm8k"].name == "gsm8k_qwen2.5_0.5b_1gpu.yaml"
    for path in known.values():  # the long name of a file stays a name
        assert bundled.find(path.stem) == path


def test_a_run_can_be_named_instead_of_its_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = parsing.load("ppo", ["--seed", "3"])
    file = ROOT / "configs/ppo_smollm2_cpu.yaml"
    assert named == parsing.load(file, ["--seed", "3"])
    # A file of the user's comes first, with or without a suffix.
    text = file.read_text().replace("runs/ppo_smollm2", "mine")
    (tmp_path / "ppo").write_text(text)
    assert parsing.load("ppo").output_dir == "mine"
    with pytest.raises(ConfigError, match="^ppo.yaml: no such file"):
        parsing.load("ppo.yaml")


def test_an_unknown_name_lists_those_that_are_known(capsys):
    assert cli.main(["train", "quikstart"]) == 2
    said = capsys.readouterr().err
    assert "quikstart: neither a file nor a bundled configuration" in said
    assert (
        "did you mean 'quickstart'? bundled: "
        "calculator_qwen2.5_coder_1.5b_1gpu, calculator, dapo, distil, " in said
    )


@pytest.mark.parametrize("name", bundled.names())
def test_what_init_writes_is_the_same_run(name, tmp_path):
    path = bundled.write(name, tmp_path / "new", Config)
    assert path == tmp_path / "new" / f"{name}.yaml"
    source = bundled.names()[name]
    assert parsing.load(path) == parsing.load(source)
    lines = path.read_text().splitlines()
    kept = source.read_text().splitlines()
    assert [line for line in lines if line in kept] == kept
    assert all(line.lstrip().startswith("#") for line in lines if line not in kept)


def test_init_explains_every_key_it_writes(tmp_path, capsys):
    assert cli.main(["init", "gsm8k", str(tmp_path)]) == 0
    path = tmp_path / "gsm8k.yaml"
    assert capsys.readouterr().out.startswith(f"{path}\n")
    lines = path.read_text().splitlines()
    where = lines.index("  train_batch_size: 64")
    assert lines[where - 1] == (
        "  # Prompts per step; each is answered rollout.n times."
    )
    # What a one-line section holds is explained above it, key by key.
    where = lines.index("  optim: {lr: 1e-6, lr_warmup_steps: 5}")
    about = OptimConfig.model_fields["lr_warmup_steps"].description
    said = [line.strip(" #") for line in lines[where - 8 : where]]
    assert f"lr_warmup_steps: {' '.join(about.split())}" in " ".join(said)
    assert lines[lines.index("rollout:") - 1].startswith("# ")


def test_init_overwrites_nothing(tmp_path, capsys):
    (tmp_path / "gsm8k.yaml").write_text("mine")
    assert cli.main(["init", "gsm8k", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path}/gsm8k.yaml exists and is not overwritten" in said
    assert (tmp_path / "gsm8k.yaml").read_text() == "mine"
    assert cli.main(["init", "gsm8k", str(tmp_path / "gsm8k.yaml")]) == 2
    assert "gsm8k.yaml is a file, not a folder" in capsys.readouterr().err
    assert cli.main(["init", "configs/gsm8k.yaml", str(tmp_path)]) == 2
    assert "no bundled configuration has this name" in capsys.readouterr().err


def test_long_explanations_are_wrapped_and_read_as_comments():
    text = "actor:\n  optim: {lr: 1e-6}\n"
    found = bundled.explained(text, Config)
    assert all(len(line) <= 88 for line in found.splitlines())
    assert yaml.safe_load(found) == yaml.safe_load(text)
