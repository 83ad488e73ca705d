"""Other trainers' settings become a configuration, and nothing is lost silently."""

import pathlib

import pyarrow
import pyarrow.parquet
import pytest

from jaxrl_llm import cli
from jaxrl_llm.bridges import convert as bridge
from jaxrl_llm.bridges import foreign, from_trl, from_verl
from jaxrl_llm.config import parsing
from jaxrl_llm.config.names import ConfigError

VERL = """
data:
  train_files: [TRAIN, other.parquet]
  val_files: test.parquet
  train_batch_size: 4
  max_response_length: 100
  filter_overlong_prompts: true
  apply_chat_template_kwargs: {enable_thinking: false}
actor_rollout_ref:
  model: {path: some/model, enable_gradient_checkpointing: false}
  actor:
    ppo_mini_batch_size: 2
    ppo_micro_batch_size_per_gpu: 8
    clip_ratio: 0.3
    clip_ratio_high: 0.4
    use_kl_loss: true
    grad_clip: 0.5
    optim: {lr: 1e-6, lr_warmup_steps_ratio: 0.25, betas: [0.9, 0.95]}
    fsdp_config: {optimizer_offload: true, dtype: bf16}
  ref: {fsdp_config: {param_offload: true}}
  rollout:
    name: vllm
    n: 5
    temperature: 0.7
    response_length: ${data.max_response_length}
    tensor_model_parallel_size: 2
    gpu_memory_utilization: 0.6
    val_kwargs: {do_sample: true, n: 4, temperature: 0.6}
algorithm: {adv_estimator: grpo, gamma: 0.9, kl_ctrl: {kl_coef: 0.1}}
critic: {optim: {lr: 1e-5}}
custom_reward_function:
  path: rewards/mine.py
  name: judge
  reward_kwargs: {strict: true}
trainer: {logger: [console, wandb, swanlab], total_epochs: 3, test_freq: -1,
          save_freq: 10, made_up: 7, project_name: p, experiment_name: e}
"""


def parquet(path, rows, source="openai/gsm8k"):
    row = {
        "data_source": source,
        "prompt": [{"role": "user", "content": "1 + 1?"}],
        "reward_model": {"style": "rule", "ground_truth": "2"},
    }
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row] * rows), path)
    return str(path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def verl(folder, text):
    (folder / "verl.yaml").write_text(text)
    return from_verl.converted(foreign.read(folder / "verl.yaml"))


def test_verls_settings_are_a_configuration(folder, capsys):
    parquet(folder / "other.parquet", 3)
    text = VERL.replace("TRAIN", parquet(folder / "train.parquet", 10))
    (folder / "verl.yaml").write_text(text)
    assert cli.main(["convert-config", "verl.yaml"]) == 0
    assert "next: jaxrl train verl.jaxrl.yaml --dry-run" in capsys.readouterr().out
    config = parsing.load("verl.jaxrl.yaml")
    assert config.output_dir == "runs/p/e"
    assert config.data.train.path == str(folder / "train.parquet")
    assert [one.path for one in config.data.more_train.values()] == ["other.parquet"]
    assert config.data.overlong_prompts == "drop"
    assert config.data.chat_template_kwargs == {"enable_thinking": False}
    assert config.rollout.max_response_length == 100
    assert (config.rollout.n, config.rollout.temperature) == (5, 0.7)
    assert config.rollout.mesh.tensor == 2
    assert (config.val.n, config.val.temperature, config.val.greedy) == (4, 0.6, False)
    actor = config.actor
    assert (actor.clip_ratio_low, actor.clip_ratio_high) == (0.3, 0.4)
    assert actor.optim.lr == 1e-6 and actor.optim.betas == (0.9, 0.95)
    assert actor.optim.clip_grad == 0.5
    assert actor.offload == ("optimizer", "reference")
    assert (actor.remat, actor.use_kl_loss, actor.ppo_mini_batch_size) == (
        "none", True, 2
    )  # fmt: skip
    (function,) = config.reward.functions
    assert function.name == "rewards.mine:judge"
    assert function.params == {"strict": True}
    # 3 epochs of 13 rows in batches of 4; a quarter of it is warm-up.
    assert config.trainer.total_training_steps == 9
    assert actor.optim.lr_warmup_steps == 2
    assert config.trainer.test_freq == 0 and config.trainer.loggers == ("wandb",)


def test_what_has_no_counterpart_stands_in_comments(folder):
    draft = verl(folder, VERL.replace("TRAIN", "gone.parquet"))
    comments = " ".join(
        line.removeprefix("#").strip()
        for line in draft.text("verl.yaml").splitlines()
        if line.startswith("#")
    )
    for said in (
        "actor_rollout_ref.rollout.gpu_memory_utilization: 0.6 - rollout.cache_gib",
        "algorithm.gamma: 0.9 - grpo does not read it",
        "algorithm.kl_ctrl.kl_coef: 0.1 - algorithm.use_kl_in_reward is off",
        "critic.optim.lr: 1e-05 - there is no critic with this estimator",
        "Keys that are not known here: trainer.made_up: 7",
        "swanlab: none of",
        "TO DO: trainer.total_training_steps: 3 epochs x rows",
        "TO DO: actor.optim.lr_warmup_steps: 0.25 x",
    ):
        assert said in comments
    every = {*draft.seen}
    assert every >= {*draft.given}


def test_what_is_not_given_is_what_verl_takes(folder):
    draft = verl(folder, "data: {train_files: a.parquet, train_batch_size: 512}")
    values = draft.tree()
    assert values["algorithm"]["adv_estimator"] == "gae"
    assert values["rollout"]["n"] == 1
    assert values["actor"]["ppo_mini_batch_size"] == 256
    assert "n: 1  # actor_rollout_ref.rollout.n, veRL's default" in draft.text("x")


@pytest.mark.parametrize(
    "source, reward", [("openai/gsm8k", "gsm8k"), ("HuggingFaceH4/MATH-500", "math")]
)
def test_the_reward_is_what_verl_takes_for_the_data(folder, source, reward):
    path = parquet(folder / "train.parquet", 1, source)
    draft = verl(folder, f"data: {{train_files: {path}}}")
    assert draft.tree()["reward"]["functions"] == [{"name": reward}]


@pytest.mark.parametrize(
    "own, metric, wanted",
    [
        ("mine.py", "acc", "acc"),
        ("mine.py", "seq_reward", "reward"),
        ("", "acc", "reward"),
    ],
)
def test_groups_differ_in_what_the_users_function_returns(folder, own, metric, wanted):
    filters = f"{{enable: true, metric: {metric}}}"
    draft = verl(
        folder,
        f"custom_reward_function: {{path: {own or 'null'}}}\n"
        f"algorithm: {{adv_estimator: grpo, filter_groups: {filters}}}",
    )
    assert draft.tree()["algorithm"]["filter_groups"]["metric"] == wanted


def test_adapters_are_taken_over(folder):
    lines = (
        "{lora_rank: 8, lora_alpha: 4, target_modules: [q_proj, down_proj], "
        "lora_adapter_path: begun}"
    )
    draft = verl(folder, f"actor_rollout_ref: {{model: {lines}}}")
    wanted = {"rank": 8, "alpha": 4, "modules": ["q_proj", "down_proj"]}
    wanted |= {"path": "begun"}
    assert draft.tree()["actor"]["lora"] == wanted
    draft = verl(folder, "actor_rollout_ref: {model: {lora_rank: 0}}")
    assert "lora" not in draft.tree()["actor"]


@pytest.mark.parametrize(
    "line, said",
    [
        ("algorithm: {adv_estimator: mine}", "algorithm.adv_estimator is mine; here"),
        ("data: {truncation: right}", "data.truncation is right; here data.overlong"),
        (
            "actor_rollout_ref: {model: {lora_rank: 8, target_modules: [qkv]}}",
            "actor.lora.modules: should be all, or some of [q_proj,",
        ),
        ("trainer: {save_freq: often}", "save_freq is 'often', which is no number"),
        ("trainer: {total_epochs: '${oc.env:N}'}", r"is ${oc.env:N}: say what it"),
        ("data: {train_batch_size: many}", "data.train_batch_size: "),
        ("custom_reward_function: {path: /a/my-file.py}", "the folder of this file"),
    ],
)
def test_what_somebody_has_to_decide_is_said(folder, line, said):
    points = verl(folder, line).open_points()
    assert any(said in point for point in points), points


def test_a_script_is_read_and_not_run(folder):
    (folder / "run.sh").write_text(
        "touch ran\n"
        "MODEL=some/model; export N=4\n"
        "python3 -m verl.trainer.main_ppo \\\n"
        "    algorithm.adv_estimator=grpo \\\n"
        "    actor_rollout_ref.model.path=$MODEL actor_rollout_ref.rollout.n=${N} \\\n"
        "    +data.train_files=\"['a.parquet', 'b.parquet']\" \\\n"
        "    trainer.total_training_steps=${STEPS:-7} trainer.logger=$(date) $@\n"
    )
    assert foreign.read(folder / "run.sh") == {
        "algorithm.adv_estimator": "grpo",
        "actor_rollout_ref.model.path": "some/model",
        "actor_rollout_ref.rollout.n": 4,
        "data.train_files": ["a.parquet", "b.parquet"],
        "trainer.total_training_steps": 7,
        "trainer.logger": "$(date)",
    }
    assert not (folder / "ran").exists()


def test_references_are_followed(folder):
    path = folder / "x.yaml"
    path.write_text(
        "data: {length: 5, text: 'a ${data.length} b'}\n"
        "a: {x: '${data.length}', y: '${.x}', z: '${oc.select:no.such,null}'}\n"
        "c: {d: '${c.e}', e: '${c.d}', f: '${oc.env:HOME}'}\n"
    )
    found = foreign.read(path)
    assert (found["data.text"], found["a.x"], found["a.y"]) == ("a 5 b", 5, 5)
    assert found["a.z"] is None
    assert "$" in found["c.d"] and found["c.f"] == "${oc.env:HOME}"


TRL = {
    "model_name_or_path": "some/model",
    "dataset_name": "rows.jsonl",
    "reward_funcs": ["accuracy_reward", "lib.rewards.short"],
    "reward_weights": [1.0, 0.5],
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 4,
    "max_steps": 100,
    "save_steps": 10,
    "learning_rate": 1e-5,
    "beta": 0.04,
    "epsilon_high": 0.28,
    "scale_rewards": "none",
    "loss_type": "dr_grpo",
    "push_to_hub": True,
}


def test_trls_settings_are_a_configuration(tmp_path):
    draft = from_trl.converted(TRL)
    assert [point[:22] for point in draft.open_points()] == ["data.train_batch_size "]
    config = parsing.parse(draft.tree(), "")
    # 32 completions are 8 prompts, which two updates share.
    assert config.data.train_batch_size == 8
    assert config.actor.ppo_mini_batch_size == 4
    assert config.trainer.total_training_steps == 50
    assert config.trainer.save_freq == 5
    assert config.actor.optim.lr == 1e-5 and config.actor.optim.weight_decay == 0.0
    assert config.actor.optim.lr_scheduler_type == "linear"
    assert config.actor.use_kl_loss and config.actor.kl_loss_coef == 0.04
    assert (config.actor.clip_ratio_low, config.actor.clip_ratio_high) == (0.2, 0.28)
    assert config.actor.clip_ratio_c is None
    assert config.actor.loss_agg_mode == "seq-mean-token-sum-norm"
    assert not config.algorithm.norm_adv_by_std_in_grpo
    assert [(one.name, one.weight) for one in config.reward.functions] == [
        ("math", 1.0),
        ("lib.rewards:short", 0.5),
    ]
    assert "# push_to_hub: true - output_dir/huggingface can be" in draft.text("x")


@pytest.mark.parametrize(
    "more, key, value",
    [
        (
            {"importance_sampling_level": "sequence"},
            "actor.policy_loss.loss_mode",
            "gspo",
        ),
        ({"loss_type": "sapo"}, "actor.policy_loss.loss_mode", "sapo"),
        ({"loss_type": "cispo", "epsilon_high": 5.0}, "actor.clip_ratio_high", 4.0),
        ({"use_vllm": True}, "algorithm.rollout_correction.rollout_is", "sequence"),
        ({"num_iterations": 2}, "trainer.total_training_steps", 25),
        ({"warmup_ratio": 0.1}, "actor.optim.lr_warmup_steps", 5),
        ({"chat_template_kwargs": '{"a": 1}'}, "data.chat_template_kwargs", {"a": 1}),
    ],
)
def test_what_trl_says_in_another_way_is_said_in_ours(more, key, value):
    draft = from_trl.converted(TRL | more)
    assert draft.values[key] == value
    parsing.parse(draft.tree(), "")


LEARNER = {
    "model_name_or_path": "some/model",
    "teacher_model_name_or_path": "some/teacher",
    "dataset_name": "rows.jsonl",
    "max_steps": 100,
}


def test_trls_distillation_learns_from_its_teacher_alone():
    config = parsing.parse(from_trl.converted(LEARNER).tree(), "")
    found = config.distillation
    assert (found.teacher.path, found.mode, found.jsd_beta) == (
        "some/teacher",
        "jsd",
        1,
    )
    assert (config.rollout.n, config.data.train_batch_size) == (1, 8)
    assert not found.with_rewards and not config.reward.functions
    more = {"max_new_tokens": 64, "beta": 0.1, "lmbda": 0.5}
    draft = from_trl.converted(LEARNER | more)
    config = parsing.parse(draft.tree(), "")
    assert config.rollout.temperature == 0.9  # GKD's
    assert config.rollout.max_response_length == 64
    assert config.distillation.jsd_beta == 0.1
    assert any(
        point.startswith("lmbda: TRL takes some") for point in draft.open_points()
    )


DISTILS = """
data: {train_files: a.parquet}
trainer: {total_training_steps: 3}
actor_rollout_ref: {model: {path: m}}
algorithm: {adv_estimator: gae, gamma: 0.9}
distillation:
  enabled: true
  teacher_models: {teacher_model: {model_path: some/teacher}}
  distillation_loss: {loss_mode: LOSS, topk: 64, use_task_rewards: REWARDS,
    use_policy_gradient: GRADIENT, distillation_loss_coef: 0.5}
"""


@pytest.mark.parametrize(
    "loss, rewards, gradient, wanted",
    [
        ("forward_kl_topk", "false", "false", ("forward_kl_topk", 64, 1.0)),
        ("k1", "true", "true", ("reverse_kl", 32, 0.5)),
        ("k3", "false", "false", None),
    ],
)
def test_verls_distillation_is_ours(folder, loss, rewards, gradient, wanted):
    text = DISTILS.replace("LOSS", loss).replace("REWARDS", rewards)
    draft = verl(folder, text.replace("GRADIENT", gradient))
    if wanted is None:
        (point,) = (p for p in draft.open_points() if p.startswith("distillation.mode"))
        assert "is k3 with use_policy_gradient False" in point
        return
    if rewards == "true":
        draft.values["reward.functions"] = [{"name": "exact"}]
    config = parsing.parse(draft.tree(), "")
    found = config.distillation
    assert (found.mode, found.topk, found.coef) == wanted
    assert found.teacher.path == "some/teacher"
    assert found.with_rewards is (rewards == "true")
    estimator = config.algorithm.adv_estimator
    assert estimator == ("gae" if found.with_rewards else "grpo")


@pytest.mark.parametrize("value", ["text", 0, ["a"], [{"b": 1}], None, "${x}"])
@pytest.mark.parametrize("trainer", [from_verl, from_trl])
def test_a_value_of_another_kind_is_a_point_or_a_problem(trainer, value):
    base = TRL if trainer is from_trl else {"algorithm.adv_estimator": "grpo"}
    for key in trainer.converted({}).peer.keys:
        draft = trainer.converted({**base, key: value})
        assert key in draft.seen or value is None
        assert draft.tree()


def test_what_is_read_again_is_what_was_meant(folder):
    (folder / "trl.yaml").write_text(
        "model_name_or_path: 'yes'\noutput_dir: '1e3 # \"no\"'\nnum_generations: 2\n"
    )
    bridge.convert(folder / "trl.yaml", folder / "new/ours.yaml")
    text = (folder / "new/ours.yaml").read_text()
    assert 'path: "yes"' in text and '"1e3 # \\"no\\""' in text


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("x.yaml", "a: 1", "x.yaml: no settings of veRL or TRL; it has a"),
        ("x.yaml", "algo: {kl: {target: 1}}", "look like OpenRLHF's, and only veRL's"),
        ("x.sh", "echo hello", "no words such as algorithm.adv_estimator=grpo"),
        ("x.sh", "echo 'a", "not a script that can be read: No closing quotation"),
    ],
)
def test_what_cannot_be_converted_is_one_message(folder, name, text, message):
    pathlib.Path(name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        bridge.convert(pathlib.Path(name), folder / "ours.yaml")
    assert not (folder / "ours.yaml").exists()


def test_a_file_that_is_there_is_kept(folder, capsys):
    (folder / "trl.yaml").write_text("num_generations: 2")
    (folder / "ours.yaml").write_text("mine")
    assert cli.main(["convert-config", "trl.yaml", "ours.yaml"]) == 2
    assert "ours.yaml exists and is not overwritten" in capsys.readouterr().err
    assert (folder / "ours.yaml").read_text() == "mine"
