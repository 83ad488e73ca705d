"""What the metrics of whole runs say, and what a run says of them."""

import jax
import pytest
import tiny
from short_run import GRPO, make_config, mean_id

from jaxrl_llm.config import plugins
from jaxrl_llm.rewards import RewardFunction
from jaxrl_llm.tracking import metric_table, run_directory
from jaxrl_llm.training import loop
from jaxrl_llm.training.advice import CannotLearn
from jaxrl_llm.training.build import build

ONE_STEP = GRPO | {"trainer.total_training_steps": 1}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("model") / "tiny")


def run(config, reward=mean_id):
    loop.run(build(config, [RewardFunction(name="given", function=reward)]))
    return run_directory.read(config.output_dir)


@pytest.mark.slow
def test_what_is_cut_off_is_no_mismatch(weights, tmp_path):
    """The first update, by the engine's weights: whatever was not drawn from, the ratio
    to the sampler's probability is 1."""
    config = make_config(
        weights,
        tmp_path,
        **ONE_STEP,
        **{
            "rollout.temperature": 0.8,
            "rollout.top_p": 0.5,
            "rollout.top_k": 100,
            "rollout.min_p": 0.01,
            "algorithm.rollout_correction": {"bypass_mode": True},
        },
    )
    line = run(config)[-1]
    assert line["actor/pg_clipfrac"] == 0
    assert line["mismatch/logprob_diff_max"] < 1e-4 and abs(line["actor/ppo_kl"]) < 1e-5
    assert abs(line["rollout_corr/kl"]) < 1e-5
    assert 0 < line["rollout/kept_mass_min"] <= line["rollout/kept_mass_mean"] < 0.7
    assert [name for name in line if not metric_table.find(name)] == ["step"]


def test_destroyed_weights_stop_the_run_and_replace_nothing(weights, tmp_path):
    """The first rate of the warm-up is 0, the second destroys every weight."""
    changed = GRPO | {
        "actor.optim.lr": 3e38,
        "actor.optim.weight_decay": 10.0,
        "actor.optim.lr_warmup_steps": 1,
        "trainer.save_freq": 1,
        "trainer.save_hf": True,
    }
    config = make_config(weights, tmp_path, **changed)
    with pytest.raises(CannotLearn, match="step 2: the actor's weights are not finite"):
        run(config)
    directory = tmp_path / "run"
    kept = [p.name for p in (directory / "checkpoints").iterdir() if p.name.isdigit()]
    assert kept == ["1"] and not (directory / "huggingface").exists()
    assert "weights are not finite" in (directory / "report.html").read_text()


def overflows(logprobs, advantages):
    """A loss that no float32 holds."""
    return advantages * logprobs * 3e38 * 1e3


@pytest.mark.slow
def test_a_run_that_cannot_learn_says_so_in_terminal_and_report(
    weights, tmp_path, capsys
):
    changed = GRPO | {"actor.policy_loss.loss_mode": plugins.offer(overflows)}
    config = make_config(weights, tmp_path, **changed)
    with jax.debug_nans(False), pytest.raises(CannotLearn, match="step 3: no gradient"):
        run(config)
    said, directory = capsys.readouterr().out, tmp_path / "run"
    assert said.startswith("devices: ")
    skipped = "updates of the policy were skipped"
    assert said.count(skipped) == 1
    assert skipped in (directory / "report.html").read_text()
    lines = run_directory.read(directory)[1:]
    assert [line["actor/update_skipped"] for line in lines] == [1.0] * 3
