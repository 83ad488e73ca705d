"""What `import jaxrl_llm` gives, and what it loads."""

import json
import subprocess
import sys
from importlib import metadata

import pytest

import jaxrl_llm
from jaxrl_llm import config
from jaxrl_llm.models.checkpoints import card

SHOWN = """
import json, sys
{program}
print(json.dumps(sorted(name for name in sys.modules if "." not in name)))
"""


def loaded(program):
    """The top-level modules that a new process has after `program`."""
    done = subprocess.run(
        [sys.executable, "-c", SHOWN.format(program=program)],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_face_the_configuration_and_help_load_no_jax():
    light = loaded("import jaxrl_llm, jaxrl_llm.config; dir(jaxrl_llm)")
    assert not light & {"jax", "numpy", "pydantic", "tyro"}
    program = """
from jaxrl_llm import load_config
from jaxrl_llm.cli import main
for given in (["--help"], ["--version"], ["train", "--help"], ["generate", "--help"]):
    try:
        main(given)
    except SystemExit as ended:
        assert ended.code == 0
"""
    found = loaded(program)
    assert "pydantic" in found and not found & {"jax", "flax", "transformers"}


def test_losses_and_log_probabilities_load_jax_only():
    found = loaded("from jaxrl_llm import losses, logprobs")
    assert "jax" in found
    assert not found & {"flax", "optax", "transformers", "pydantic", "orbax", "yaml"}


def test_every_public_name_is_there_and_is_what_it_says():
    verbs = {
        "train",
        "sft",
        "reward_model",
        "dpo",
        "evaluate",
        "generate",
        "load_config",
    }
    for name in jaxrl_llm.__all__:
        found = getattr(jaxrl_llm, name)
        assert name in dir(jaxrl_llm)
        if name in verbs:
            assert callable(found)
        else:
            assert found.__name__.startswith("jaxrl_llm.")
            assert found.__name__.endswith(f".{name}")
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        jaxrl_llm.trian  # noqa: B018
    assert jaxrl_llm.load_config is config.load
    assert issubclass(config.ConfigError, ValueError)
    assert config.parse.__module__ == "jaxrl_llm.config.parsing"
    assert set(config.__all__) <= set(dir(config))
    with pytest.raises(AttributeError, match="has no attribute 'read'"):
        config.read  # noqa: B018


def test_a_checkout_on_the_path_that_is_not_installed_works_too(monkeypatch):
    """Or a run from one would end with an error, when it exports its weights."""
    real = metadata.Distribution.discover

    def others(**how):
        return (x for x in real(**how) if x.name.replace("_", "-") != "jaxrl-llm")

    monkeypatch.setattr(metadata.Distribution, "discover", others)
    monkeypatch.delattr(jaxrl_llm, "__version__", raising=False)
    assert jaxrl_llm.__version__ == "0+not.installed"
    monkeypatch.delattr(jaxrl_llm, "__version__")
    assert "| jaxrl_llm |" not in card.text(card.Origin("a/b"), {"lr": 1})
