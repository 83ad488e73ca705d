"""What a configuration with a teacher may say."""

import pytest

from jaxrl_llm.config import checks, parsing
from jaxrl_llm.config.names import ConfigError

REWARD = {"functions": [{"name": "exact"}]}


def parsed(distillation=(), **changed):
    values = {
        "output_dir": "run",
        "model": {"path": "model"},
        "data": {"train": {"path": "rows.jsonl"}},
        "trainer": {"total_training_steps": 1},
    }
    if distillation is not None:
        values["distillation"] = {"teacher": {"path": "t"}} | dict(distillation)
    for key, value in changed.items():
        parsing.put(values, key.split("."), value)
    return parsing.parse(values, "test")


def test_no_reward_and_no_group_is_needed_to_learn_from_a_teacher_alone():
    config = parsed(**{"rollout.n": 1})
    assert not checks.learns_from_rewards(config)
    assert config.distillation.mode == "reverse_kl"
    assert config.distillation.coef == 1.0
    both = parsed({"with_rewards": True}, reward=REWARD)
    assert checks.learns_from_rewards(both)


GROUPS = {"a": "0-3", "b": "4-7"}
OWN_MESH = {"path": "t", "mesh": {"fsdp": 4}}


@pytest.mark.parametrize(
    "distillation, changed, message",
    [
        ({"with_rewards": True}, {}, "reward.functions is empty"),
        ({"with_rewards": True}, {"rollout.n": 1, "reward": REWARD}, "rollout.n is 1"),
        ({}, {"data.val": {"path": "v"}}, "data.val is given, but nothing says which"),
        ({"teacher": {}}, {}, "distillation.teacher.path: needed"),
        ({"mode": "kl"}, {}, "distillation.mode.*'reverse_kl'"),
        ({"coef": 0}, {}, "distillation.coef"),
        ({"topk": 8}, {}, "distillation.topk is 8, which only .*forward_kl_topk reads"),
        ({"jsd_beta": 0.9}, {}, "distillation.jsd_beta is 0.9, which only .*=jsd"),
        ({"mode": "jsd", "teacher": OWN_MESH}, {}, "teacher.mesh is .*leave it out"),
        (
            {"mode": "jsd"},
            {"placement": {"groups": GROUPS, "actor": "a", "teacher": "b"}},
            "placement.teacher is b, .*update, on a, asks the teacher",
        ),
        (
            {"mode": "jsd", "teacher": {"path": "t", "micro_batch_size": 2}},
            {},
            "teacher.micro_batch_size is 2, but .*set actor.micro_batch_size",
        ),
        ({"mode": "jsd"}, {"actor.keep_probabilities": True}, "keep_probabilities"),
        ({}, {"algorithm.adv_estimator": "rloo"}, "adv_estimator is rloo, but with"),
        ({}, {"algorithm.filter_groups": {}}, "filter_groups is given, but with"),
        ({}, {"critic.optim.lr": 1.0}, "critic: a critic learns from rewards"),
        (
            {"mode": "jsd"},
            {"actor.policy_loss.loss_mode": "gspo"},
            "loss_mode is gspo, but with distillation.with_rewards=false",
        ),
        ({"teacher": {"path": "t", "mesh": {"fsdp": 0}}}, {}, "teacher.mesh.fsdp is 0"),
    ],
)
def test_what_does_not_fit_a_teacher_is_refused(distillation, changed, message):
    with pytest.raises(ConfigError, match=message):
        parsed(distillation, **changed)


def test_a_place_for_no_teacher_is_refused():
    place = {"groups": GROUPS, "actor": "a", "teacher": "b"}
    with pytest.raises(ConfigError, match="there is no distillation.teacher to place"):
        parsed(None, placement=place, reward=REWARD)
