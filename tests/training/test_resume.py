"""A run of an earlier version goes on. `fixtures/` says how it was made."""

import hashlib
import json
import pathlib
import tarfile

import jax
import numpy as np
import pytest
import short_run

from jaxrl_llm.config import parsing, resume
from jaxrl_llm.tracking import run_directory
from jaxrl_llm.training import loop
from jaxrl_llm.training.build import build
from jaxrl_llm.training.checkpoint import Checkpoints

ARCHIVE = pathlib.Path(__file__).parents[1] / "fixtures/run_before_the_house.tar.gz"


@pytest.fixture
def there(tmp_path, monkeypatch):
    """The directory that the paths of the old run are relative to."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_from_before_the_house_is_restored_bit_for_bit(there, capsys):
    config = parsing.load("run/config.yaml", ["--trainer.total_training_steps=1"])
    job = build(config)
    with Checkpoints("run/checkpoints", 3) as checkpoints:
        found = checkpoints.restore(job.abstract_state())
    assert (found.step, found.position["prompts"]["batches"]) == (1, 1)
    restored = {
        jax.tree_util.keystr(path, simple=True, separator="."): [
            str(leaf.dtype),
            list(leaf.shape),
            hashlib.sha256(leaf.tobytes()).hexdigest(),
        ]
        for path, leaf in jax.tree.leaves_with_path(jax.device_get(found.state))
    }
    assert restored == json.loads((there / "leaves.json").read_text())

    before = run_directory.read("run")
    loop.run(job)  # nothing is refused, nothing lost
    assert "going on from step 1 in run" in capsys.readouterr().out
    assert run_directory.read("run") == before


@pytest.mark.slow
def test_a_run_from_before_the_house_goes_on_to_the_numbers_it_would_have_had(there):
    loop.run(build(parsing.load("run/config.yaml")))
    told = (there / "metrics.jsonl").read_text().splitlines()
    lines = run_directory.read("run")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    for wanted, got in zip(map(json.loads, told), lines[1:], strict=True):
        assert wanted.keys() <= got.keys()
        for name, value in wanted.items():
            # Another processor, and one device, round otherwise.
            np.testing.assert_allclose(
                got[name], value, rtol=1e-3, atol=1e-4, err_msg=name
            )


FREE = {
    "actor.offload": ["optimizer", "reference"],
    "rollout.checksum_freq": 1,
    "rollout.max_mismatch": 1.0,
    "reward.isolation": "process",
    "reward.memory_gib": 4.0,
    "val.temperature": 0.5,
    "trainer.test_freq": 1,
}


@pytest.mark.slow
def test_what_may_change_without_altering_anything_alters_nothing(tiny_model, tmp_path):
    assert {resume.may_change(key).alters for key in FREE} == {"nothing"}
    lines = []
    for name, changed in (("before", {}), ("after", FREE)):
        given = short_run.GRPO | {
            "actor.use_kl_loss": True,
            "reward.functions": [{"name": "short_run:mean_id"}],
            "trainer.total_training_steps": 2,
            **changed,
        }
        config = short_run.make_config(tiny_model, tmp_path / name, **given)
        loop.run(build(config))
        lines.append(run_directory.read(config.output_dir))
    names = ("actor/", "critic/", "mismatch/", "response_length/")
    before, after = (
        [{k: v for k, v in line.items() if k.startswith(names)} for line in found]
        for found in lines
    )
    assert before == after and "actor/grad_norm" in before[-1]
