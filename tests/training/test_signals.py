"""What the metrics of whole runs say, and what a run says of them."""

import pytest
import tiny
from short_run import GRPO, make_config, mean_id

from jaxrl_llm.rewards import RewardFunction
from jaxrl_llm.tracking import run_directory
from jaxrl_llm.training import loop
from jaxrl_llm.training.build import build

ONE_STEP = GRPO | {"trainer.total_training_steps": 1}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("model") / "tiny")


def run(config, reward=mean_id):
    loop.run(build(config, [RewardFunction(name="given", function=reward)]))
    return run_directory.read(config.output_dir)


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
