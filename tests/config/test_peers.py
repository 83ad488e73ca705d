"""What the keys of other trainers are here, and where it is said."""

import pytest

from jaxrl_llm.config import parsing, schemas
from jaxrl_llm.config.names import ConfigError
from jaxrl_llm.config.peers import lookup, verl

VALUES = {
    "output_dir": "run",
    "model": {"path": "model"},
    "data": {"train": {"path": "rows.jsonl"}},
    "reward": {"functions": [{"name": "exact"}]},
    "trainer": {"total_training_steps": 1},
}


def said(*arguments):
    with pytest.raises(ConfigError) as error:
        parsing.parse(parsing.override(VALUES, arguments), "run.yaml")
    return str(error.value)


@pytest.mark.parametrize("name", lookup.PEERS)
def test_every_key_of_a_trainer_is_a_key_here_or_says_what_to_do(name):
    known = set(parsing.keys())
    for key, here in lookup.PEERS[name].keys.items():
        assert known.issuperset(here.targets), key
        assert here.targets or here.note, key
        assert here.note == here.note.strip().rstrip("."), key


def test_trls_keys_of_other_trainers_are_keys_of_verbs_here():
    known = {key for task in schemas.OFFLINE for key in parsing.keys(schemas.of(task))}
    for key, here in lookup.OFFLINE["trl"].keys.items():
        assert known.issuperset(here.targets), key
        assert here.targets or here.note, key


@pytest.mark.parametrize(
    "task, key, message",
    [
        ("dpo", "learning_rate", "TRL's learning_rate is learner.optim.lr here"),
        ("rm", "data.batch_size", "unknown key"),
        ("rm", "beta", "unknown key"),  # which only DPO has
    ],
)
def test_the_error_of_another_verb_says_its_own_keys(task, key, message):
    values = {k: VALUES[k] for k in ("output_dir", "model", "data")}
    given = parsing.override(values, [f"--{key}=1"])
    with pytest.raises(ConfigError, match=message) as error:
        parsing.parse(given, "run.yaml", schema=schemas.of(task))
    assert "actor" not in str(error.value)


def test_keys_that_keep_their_name_and_place_are_keys_of_a_configuration():
    assert set(verl.SAME) <= set(parsing.keys())


@pytest.mark.parametrize(
    "argument, message",
    [
        (
            "--actor_rollout_ref.rollout.n=5",
            "run.yaml: actor_rollout_ref.rollout.n: "
            "veRL's actor_rollout_ref.rollout.n is rollout.n here",
        ),
        ("--data.train_files=a.parquet", "data.train_files is data.train.path here"),
        ("--actor.grad_clip=1", "ref.actor.grad_clip is actor.optim.clip_grad here"),
        ("--learning_rate=1e-5", "TRL's learning_rate is actor.optim.lr here"),
        ("--actor.optim.learning_rate=1e-5", "TRL's learning_rate is actor.optim.lr"),
        ("--trainer.n_gpus_per_node=8", "has no counterpart here; the devices that"),
        ("--actor.clip_ratio=0.2", "are actor.clip_ratio_low and actor.clip_ratio_hi"),
        ("--algo.kl.init_coef=0.01", "OpenRLHF's algo.kl.init_coef is algorithm.kl_c"),
        ("--rollout.kv_cache_size=64", "Tunix's kv_cache_size is rollout.cache_gib h"),
        ("--rollout.temprature=1", "unknown key; did you mean 'temperature'?"),
        ("--trainer.cliprange_value=1", "unknown key; there is critic.cliprange_value"),
        ("--actor.prefill_tokens=1", "unknown key; there is rollout.prefill_tokens"),
    ],
)
def test_the_error_says_what_a_key_of_another_trainer_is_here(argument, message):
    assert message in said(argument)


def test_each_key_of_a_section_that_only_another_trainer_has_gets_a_line():
    text = said(
        "--actor_rollout_ref.actor={optim: {lr: 1e-6}, made_up: 1}",
        "--actor_rollout_ref.hybrid_engine=true",
    )
    assert text.splitlines() == [
        "run.yaml: actor_rollout_ref.actor.optim.lr: "
        "veRL's actor_rollout_ref.actor.optim.lr is actor.optim.lr here",
        "run.yaml: actor_rollout_ref.actor.made_up: unknown key",
        "run.yaml: actor_rollout_ref.hybrid_engine: unknown key",
        "run.yaml: actor_rollout_ref: `jaxrl convert-config` translates a whole file",
    ]


@pytest.mark.parametrize(
    "name, message",
    [
        ("learning_rate", r"is actor.optim.lr here; write .*{'actor.optim.lr': 0.5}"),
        ("lr", "write settings={'actor.optim.lr': 0.5} or settings={'critic.optim.lr'"),
        ("beta", r"actor.kl_loss_coef here \(with .*; settings takes such keys"),
        ("made_up", "stands in settings, such as settings={'actor.optim.lr': 1e-05}"),
    ],
)
def test_an_argument_that_is_a_setting_is_told_so(name, message):
    from jaxrl_llm import api

    with pytest.raises(
        TypeError, match=rf"train\(\) has no argument '{name}'; .*{message}"
    ):
        api.train("/nowhere", "rows.jsonl", "exact", **{name: 0.5})
