"""The examples, as a reader runs them, with a tiny model; and what a run remembers."""

import pathlib
import runpy
import sys

import pytest
import yaml

import jaxrl_llm
from jaxrl_llm.tracking.result import Result

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
OWN = {
    "custom_loss.py": "__main__:tempered",
    "custom_advantage.py": "__main__:against_median",
}


ENVIRONMENT = "custom_environment.py"


def test_every_example_is_run_here_and_short():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*OWN, ENVIRONMENT}
    for name in (*OWN, ENVIRONMENT):
        assert len((EXAMPLES / name).read_text().splitlines()) <= 25


@pytest.mark.slow
def test_an_environment_trains_and_its_run_goes_on_with_no_other(
    tiny_model, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", [ENVIRONMENT, tiny_model, str(out)])
    runpy.run_path(str(EXAMPLES / ENVIRONMENT), run_name="__main__")
    table = Result(out).table()
    assert (table["agent/turns/mean"].dropna() >= 1).all()
    assert (table["agent/status/env_error"].dropna() == 0).all()
    said = yaml.safe_load((out / "config.yaml").read_text())
    assert said["agent"]["environment"] == "__main__:Echo"

    changed = (EXAMPLES / ENVIRONMENT).read_text().replace("float(", "2 * float(", 1)
    (tmp_path / ENVIRONMENT).write_text(changed)
    with pytest.raises(ValueError, match="agent '__main__:Echo'"):
        runpy.run_path(str(tmp_path / ENVIRONMENT), run_name="__main__")


@pytest.mark.parametrize("name", OWN)
def test_an_example_trains_and_its_run_says_with_what(
    name, tiny_model, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", [name, tiny_model, str(out)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    table = Result(out).table()
    assert list(table.index)[-1] == 2
    assert (table["actor/update_skipped"].dropna() == 0).all()
    said = yaml.safe_load((out / "config.yaml").read_text())
    algorithm, policy_loss = said["algorithm"], said["actor"]["policy_loss"]
    assert OWN[name] in (algorithm["adv_estimator"], policy_loss["loss_mode"])
    assert said["function_sources"].keys() == {OWN[name]}

    changed = (EXAMPLES / name).read_text().replace("    return ", "    return 2 * ", 1)
    (tmp_path / name).write_text(changed)
    with pytest.raises(ValueError, match=f"function_sources.{OWN[name]} was"):
        runpy.run_path(str(tmp_path / name), run_name="__main__")


ROWS = [{"prompt": f"{i} + {i} ="} for i in range(4)]


def zeros(completions, **_):
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    "own, said",
    [
        ({"loss": lambda logprob: logprob}, "asks for 'logprob', did you mean 'logp"),
        ({"advantage": lambda reward: reward}, "asks for 'reward', did you mean 'rewa"),
        ({"loss": "no_such_module:f"}, "No module named 'no_such_module'"),
        ({"loss": "gsop"}, "loss_mode is 'gsop', did you mean 'gspo'?"),
    ],
    ids=["loss", "advantage", "module", "name"],
)
def test_a_wrong_signature_comes_before_weights_and_folders(own, said, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(ValueError) as error:
        jaxrl_llm.train("no/such/model", ROWS, zeros, output_dir=str(out), **own)
    assert said in str(error.value)
    assert not out.exists()
