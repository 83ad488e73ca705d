import json

from jaxrl_llm.config import parsing
from jaxrl_llm.training.recipe import recipe

CONFIG = {
    "output_dir": "secret/folder",
    "model": {"path": "some/model"},
    "data": {"train": {"path": "some/data"}},
    "reward": {"functions": [{"name": "exact", "weight": 0.5}]},
    "actor": {"use_kl_loss": True, "kl_loss_coef": 0.25, "optim": {"lr": 0.125}},
    "trainer": {"total_training_steps": 100},
}


def test_a_recipe_has_what_was_learned_from_what_by_its_keys():
    found = recipe(parsing.parse(CONFIG, ""), 7)
    assert found["step"] == 7
    assert found["data.train.path"] == "some/data"
    assert found["reward.functions"] == {"exact": 0.5}
    assert found["actor.kl_loss_coef"] == 0.25
    assert found["actor.optim.lr"] == 0.125
    assert "secret" not in json.dumps(found)


def test_what_a_run_does_not_use_is_not_in_its_recipe():
    config = CONFIG | {"actor": {}}
    assert "actor.kl_loss_coef" not in recipe(parsing.parse(config, ""), 0)


def test_what_a_teacher_taught_is_no_reward():
    taught = {"teacher": {"path": "some/teacher"}, "mode": "jsd"}
    found = recipe(parsing.parse(CONFIG | {"distillation": taught}, ""), 0)
    assert found["distillation.teacher.path"] == "some/teacher"
    assert found["distillation.mode"] == "jsd"
    assert not {"reward.functions", "algorithm.adv_estimator"} & found.keys()
