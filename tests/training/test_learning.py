"""Every estimator, loss and correction teaches the tiny model; slow, but not exact."""

import numpy as np
import pytest
import tiny
from short_run import GRPO, make_config, mean_id

from jaxrl_llm.config import parsing
from jaxrl_llm.rewards import RewardFunction
from jaxrl_llm.tracking import metric_table, run_directory
from jaxrl_llm.training import loop as train
from jaxrl_llm.training.build import build

SEQUENCE_MEAN = {"actor.loss_agg_mode": "seq-mean-token-mean"}
CRITIC = {
    "critic.optim.lr": 3e-3,
    "critic.dtype": "float32",
    "critic.remat": "none",
    "trainer.critic_warmup": 1,
}
FAMILIES = [
    *(
        {"algorithm.adv_estimator": name}
        for name in (
            "grpo",
            "grpo_passk",
            "gdpo",
            "rloo",
            "opo",
            "gpg",
            "reinforce_plus_plus",
            "reinforce_plus_plus_baseline",
            "remax",
            "optimal_token_baseline",
            "tir_optimal_token_baseline",
        )
    ),
    {"algorithm.adv_estimator": "gae", **CRITIC},
    {
        "algorithm.adv_estimator": "gae",
        "algorithm.pf_ppo.reweight_method": "pow",
        **CRITIC,
    },
    {
        "algorithm.filter_groups.metric": "reward",
        "reward.overlong_buffer.len": 2,
        "actor.clip_ratio_high": 0.28,
    },
    *(
        {"actor.policy_loss.loss_mode": name}
        for name in ("dppo_tv", "dppo_kl", "gpg", "clip_cov", "kl_cov", "cispo")
    ),
    {"actor.policy_loss.loss_mode": "dro", "actor.policy_loss.dro_beta": 0.05},
    {"actor.policy_loss.loss_mode": "gspo", **SEQUENCE_MEAN},
    {"actor.policy_loss.loss_mode": "sapo", **SEQUENCE_MEAN},
    {"actor.policy_loss.loss_mode": "geo_mean", **SEQUENCE_MEAN},
    {
        "algorithm.norm_adv_by_std_in_grpo": False,
        "actor.loss_agg_mode": "seq-mean-token-sum-norm",
    },
    {
        "algorithm.rollout_correction.rollout_is": "token",
        "algorithm.rollout_correction.rollout_rs": "token_k1,seq_max_k3",
        "algorithm.rollout_correction.rollout_rs_threshold": "0.5_2,0.1",
    },
    {
        "algorithm.rollout_correction.bypass_mode": True,
        "algorithm.rollout_correction.loss_type": "reinforce",
        "algorithm.rollout_correction.rollout_is": "sequence",
    },
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", FAMILIES, ids=lambda x: "-".join(map(str, x.values()))
)
def test_the_reward_rises(values, tmp_path, family):
    whole = {"output_dir": str(tmp_path / "run"), **values}
    arguments = [f"--{key}={value}" for key, value in family.items()]
    # Two updates per step, so that ratios move away from 1; nothing but the learning.
    arguments += ["--actor.ppo_mini_batch_size=2", "--data.val=null"]
    config = parsing.parse(parsing.override(whole, arguments), "test")
    result = train.run(build(config))
    rewards = result.table()["critic/rewards/mean"].dropna()
    assert rewards.iloc[-2:].mean() > rewards.iloc[0] + 0.1
    assert [name for name in result.table() if not metric_table.find(name)] == []


@pytest.mark.slow
@pytest.mark.parametrize("held", [False, True])
def test_the_adaptive_coefficient_holds_the_kl_near_its_target(tmp_path, held):
    # Without a penalty, learning the task moves the policy 6 nats per token away.
    penalty = {"type": "adaptive", "kl_coef": 0.05, "target_kl": 0.2, "horizon": 300}
    changed = GRPO | {
        "algorithm.adv_estimator": "reinforce_plus_plus",
        "algorithm.use_kl_in_reward": True,
        "algorithm.kl_ctrl": penalty if held else {"kl_coef": 0.0},
        "rollout.n": 16,
        "actor.optim.lr": 1e-3,
        "trainer.total_training_steps": 100,
    }
    config = make_config(tiny.checkpoint(tmp_path / "tiny"), tmp_path, **changed)
    reward = RewardFunction(name="given", function=mean_id)
    train.run(build(config, [reward]))
    lines = run_directory.read(config.output_dir)[-60:]
    kl = np.mean([line["actor/reward_kl_penalty"] for line in lines])
    assert 0.1 < kl < 0.4 if held else kl > 2
