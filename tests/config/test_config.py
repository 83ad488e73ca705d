import ast
import inspect
import pathlib
import re
from typing import get_args

import pydantic
import pytest
import yaml

from jaxrl_llm.algorithms import kl, masked
from jaxrl_llm.algorithms import rollout_correction as correction
from jaxrl_llm.config import (
    names,
    parsing,
    schema_algorithm,
    schema_offline,
    schema_training,
)
from jaxrl_llm.config import schema as configs
from jaxrl_llm.config.parsing import ConfigError
from jaxrl_llm.config.schema import Config
from jaxrl_llm.config.section import Section

ROOT = pathlib.Path(__file__).parents[2]
FILES = sorted(ROOT.glob("configs/*.yaml"))
MINIMAL = {
    "output_dir": "runs/x",
    "model": {"path": "some/model"},
    "data": {"train": {"path": "rows.jsonl"}},
    "reward": {"functions": [{"name": "exact"}]},
    "trainer": {"total_training_steps": 3},
}


def parse(*overrides):
    return parsing.parse(parsing.override(MINIMAL, overrides), "run.yaml")


def complaint(*overrides):
    """The one line that such a configuration gets."""
    with pytest.raises(ConfigError) as error:
        parse(*overrides)
    return str(error.value)


def test_one_response_alone_is_no_group_to_filter():
    said = complaint(
        "--algorithm={adv_estimator: remax, filter_groups: {}}", "--rollout.n=1"
    )
    assert "algorithm.filter_groups is given but rollout.n is 1" in said


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_shipped_configuration_is_valid(path):
    assert parsing.load(path).trainer.total_training_steps > 0


def test_what_is_not_given_has_its_default():
    config = parse()
    assert (config.seed, config.rollout.n, config.actor.clip_ratio_low) == (0, 8, 0.2)
    assert config.data.val is None


def test_a_configuration_survives_being_written_and_read():
    for path in FILES:
        config = parsing.load(path)
        text = yaml.safe_dump(config.model_dump(mode="json"))
        assert parsing.parse(yaml.safe_load(text), "again") == config


def test_a_configuration_cannot_be_changed():
    config = parse()
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.seed = 1
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.actor.optim.lr = 1.0


@pytest.mark.parametrize(
    "override, line",
    [
        # Unknown keys, at every depth.
        ("--trainr.steps=3", "trainr: unknown key; did you mean 'trainer'?"),
        ("--actor.optim.lrr=1", "actor.optim.lrr: unknown key; did you mean 'lr'?"),
        (
            "--data.val={path: x, pth: y}",
            "data.val.pth: unknown key; did you mean 'path'",
        ),
        (
            "--reward.functions.0.wieght=2",
            "reward.functions.0.wieght: unknown key; did you mean 'weight'?",
        ),
        ("--model.zzz=1", "model.zzz: unknown key; known: "),
        # Values that no field of that kind can have.
        ("--rollout.n=0", "rollout.n: Input should be greater than 0, got 0"),
        ("--rollout.top_p=1.5", "rollout.top_p: Input should be less than or equal to"),
        ("--rollout.top_k=0", "rollout: top_k is 0, which keeps no token; -1 keeps"),
        ("--actor.optim.lr=-1e-6", "actor.optim.lr: Input should be greater than or"),
        ("--actor.optim.lr=.nan", "actor.optim.lr: Input should be a finite number"),
        ("--actor.optim.lr=fast", "actor.optim.lr: Input should be a valid number"),
        ("--actor.optim.betas=[0.9, 1]", "actor.optim: betas must lie in [0, 1), got"),
        (
            "--actor.remat=some",
            "actor.remat: Input should be 'none', 'dots', 'full' or 'offload', got",
        ),
        ("--rollout.dtype=float16", "rollout.dtype: Input should be 'float32' or"),
        ("--model={path: 3}", "model.path: Input should be a valid string, got 3"),
        # Numbers that nothing can compute with, and what only looks like one.
        ("--seed=-1", "seed: Input should be greater than or equal to 0, got -1"),
        ("--seed=4294967296", "seed: 4294967296 is out of range; at most 4294967295"),
        ("--data.train.seed=-1", "data.train.seed: Input should be greater than or"),
        ("--rollout.n=1e400", "rollout.n: Input should be a finite number, got inf"),
        ("--rollout.n=yes", "rollout.n: should be a number, got True"),
        ("--rollout.n=2.5", "rollout.n: Input should be a valid integer"),
        ("--rollout.n='nan'", "rollout.n: Input should be a valid integer"),
        ("--rollout.stop_token_ids=[5, -1]", "rollout.stop_token_ids.1: Input should"),
        ("--actor.entropy_coeff=-.inf", "actor.entropy_coeff: Input should be a finit"),
        ("--actor.optim.lr=1e39", "actor.optim.lr: 1e+39 is out of range; at most 3.4"),
        ("--actor.optim.lr=true", "actor.optim.lr: should be a number, got True"),
        ("--actor.optim.betas=[true, 0.9]", "actor.optim.betas: should be a number"),
        ("--seed=1" + "0" * 400, "seed: 100000000000 is out of range; at most"),
        ("--rollout.n=[.nan]", "rollout.n: Input should be a valid integer"),
        ("--data.template_time=0", "data.template_time: should be a date such as 2025"),
        ("--data.train.params={a: [.nan]}", "data.train.params: should be a number, g"),
        (
            "--algorithm.rollout_correction.rollout_is_threshold='1e400'",
            "algorithm.rollout_correction: rollout_is_threshold is '1e400'; bounds are",
        ),
        (
            "--data={train: {path: x}, chat_template: off, template_time: 2025-01-31}",
            "data.template_time is given, but data.chat_template is false",
        ),
        ("--output_dir=a\0b", "output_dir: 'a\\x00b' holds a null character"),
        # Names of nothing, variables that nothing fills in, and places out of reach.
        ("--output_dir=", "output_dir: is empty"),
        ("--model.revision= ", "model.revision: is empty"),
        ("--rollout.stop=['']", "rollout.stop.0: String should have at least 1 char"),
        ("--output_dir=${oc.env:SCRATCH}/x", "output_dir: '${oc.env:SCRATCH}/x' has"),
        ("--model.path=$HOME/x", "model.path: '$HOME/x' has the variable $HOME, which"),
        (
            "--output_dir=gs://b/x",
            "output_dir: 'gs://b/x' is an address, and only path",
        ),
        ("--output_dir=file:///x", "output_dir: 'file:///x' is an address"),
        ("--model.path=s3://b/x", "model.path: 's3://b/x' is an address"),
        ("--model.tokenizer=https://x", "model.tokenizer: 'https://x' is an address"),
        ("--data.train.path=disk:gs://b", "data.train.path: 'disk:gs://b' is an addre"),
        ("--rollout.vllm.weights_dir=gs://b", "rollout.vllm.weights_dir: 'gs://b' is"),
        ("--output_dir=~nobody_here/x", "output_dir: '~nobody_here/x': Could not det"),
        ("--data.train.split=a\udced", "data.train.split: 'a\\udced' holds half a ch"),
        ("--reward.functions=[]", "reward.functions is empty; give at least one, or"),
        ("--trainer={}", "trainer.total_training_steps: needed but not given"),
        ("--trainer.loggers=[wandbb]", "trainer.loggers.0: Input should be 'tensor"),
        # Values that do not fit each other.
        (
            "--actor.ppo_mini_batch_size=65",
            "actor.ppo_mini_batch_size is 65 prompts but data.train_batch_size is only "
            "64; use at most 64",
        ),
        ("--rollout.n=1", "rollout.n is 1 but algorithm.adv_estimator=grpo compares"),
        (
            "--algorithm={norm_adv_by_std_in_grpo: false, adv_estimator: rloo}",
            "algorithm.norm_adv_by_std_in_grpo is false, but algorithm.adv_estimator=r",
        ),
        ("--algorithm.lam=0.9", "algorithm.lam is 0.9, which needs algorithm.adv_est"),
        ("--algorithm.pf_ppo={}", "algorithm.pf_ppo needs algorithm.adv_estimator=gae"),
        (
            "--algorithm={use_kl_in_reward: true, adv_estimator: gdpo}",
            "algorithm.use_kl_in_reward has no meaning with algorithm.adv_estimator=gd",
        ),
        (
            "--algorithm.kl_ctrl.kl_coef=0.5",
            "algorithm.kl_ctrl needs algorithm.use_kl_in_reward",
        ),
        (
            "--actor.ref_refresh_steps=2",
            "actor.ref_refresh_steps is 2, but neither actor.use_kl_loss",
        ),
        (
            "--reward.overlong_buffer.len=9999",
            "reward.overlong_buffer.len is 9999 but rollout.max_response_length is",
        ),
        ("--algorithm.gamma=0.9", "algorithm.gamma is 0.9 but algorithm.adv_estimator"),
        (
            "--actor.policy_loss.loss_mode=dro",
            "actor.policy_loss: loss_mode is dro, which needs dro_beta, such as 0.05",
        ),
        (
            "--actor.policy_loss.loss_mode=sapo",
            "actor.policy_loss.loss_mode is sapo, a mean over responses; set",
        ),
        (
            "--actor.loss_scale_factor=3",
            "actor.loss_scale_factor is 3.0 but only actor.loss_agg_mode=seq-mean-tok",
        ),
        (
            "--algorithm.rollout_correction.rollout_rs=token_k4",
            "algorithm.rollout_correction: rollout_rs has 'token_k4'; known: token_k1",
        ),
        (
            "--algorithm.rollout_correction.rollout_rs=token_k1,seq_max_k2,token_k3",
            "algorithm.rollout_correction: rollout_rs_threshold is None but rollout_rs",
        ),
        (
            "--algorithm.rollout_correction.rollout_rs_threshold=2",
            "algorithm.rollout_correction: rollout_rs_threshold is given but rollout",
        ),
        (
            "--algorithm.rollout_correction={rollout_rs: token_k2, "
            "rollout_rs_threshold: 0.1_2}",
            "algorithm.rollout_correction: rollout_rs_threshold of token_k2 is '0.1_2'",
        ),
        (
            "--algorithm.rollout_correction.rollout_is_threshold=3_2",
            "algorithm.rollout_correction: rollout_is_threshold is '3_2'; bounds are",
        ),
        (
            "--algorithm.rollout_correction.rollout_is_threshold=two",
            "algorithm.rollout_correction: rollout_is_threshold is 'two'; expected",
        ),
        (
            "--algorithm.rollout_correction.rollout_is_batch_normalize=true",
            "algorithm.rollout_correction: rollout_is_batch_normalize is on but there",
        ),
        (
            "--algorithm.rollout_correction.loss_type=reinforce",
            "algorithm.rollout_correction: loss_type is reinforce, which is",
        ),
        (
            "--actor.pack_length=1023",
            "actor.pack_length is 1023 but data.max_prompt_length + "
            "rollout.max_response_length is 1024; use at least 1024",
        ),
        ("--rollout.temperature=0", "rollout.temperature is 0: every response of a"),
        (
            "--actor.optim.lr_warmup_steps=4",
            "actor.optim.lr_warmup_steps is 4 but trainer.total_training_steps is 3",
        ),
        ("--actor.mesh.tensor=0", "actor.mesh.tensor is 0; use 1 for an axis that is"),
        (
            "--rollout.mesh.tensor=-1",
            "rollout.mesh is {'data': -1, 'tensor': -1}; only",
        ),
        (
            "--data.train.path=reasoning_gym:gcd",
            "data.train.size is needed for reasoning_gym",
        ),
        (
            "--data.val.path=reasoning_gym:gcd",
            "data.val.size is needed for reasoning_gym",
        ),
        (
            "--data.more_val={a: {path: x}}",
            "data.more_val is given, but data.val, the first of the sets, is not",
        ),
        (
            "--data.more_val={a: {path: x, pth: y}}",
            "data.more_val.a.pth: unknown key; d",
        ),
        ("--data.more_val={'': {path: x}}", "data.more_val"),
        (
            "--data.more_train={a: {path: 'reasoning_gym:gcd'}}",
            "data.more_train.a.size is needed for reasoning_gym",
        ),
    ],
)
def test_a_mistake_is_one_line_with_the_key_and_what_fits(override, line):
    said = complaint(override)
    assert said.startswith(f"run.yaml: {line}"), said
    assert "\n" not in said


@pytest.mark.parametrize("cut", ["top_k=20", "top_p=0.9", "min_p=0.1"])
def test_what_vllm_does_not_tell_is_not_corrected_for(cut):
    given = f"--rollout.{cut}", "--algorithm.rollout_correction.bypass_mode=true"
    said = complaint("--rollout.engine=vllm", *given)
    assert "cut anything off, which vLLM does not tell; set rollout.top_k=-1" in said
    assert cut.replace("=", " ") in said
    assert parse(*given).algorithm.rollout_correction.bypass_mode


@pytest.mark.parametrize("engine", ["sglang", "jaxrl"])
def test_servers_that_take_whole_weights_are_sent_no_adapters(engine):
    given = f"--rollout.engine={engine}", "--rollout.lora=separate"
    said = complaint("--actor.lora.rank=4", *given)
    assert f"rollout.engine {engine} is sent whole weights; set rollout.lora" in said
    own = complaint("--rollout.jaxrl.reproducible=true", "--rollout.engine=jaxrl")
    assert "which these servers are in any case" in own
    own = complaint("--rollout.sglang.reproducible=true", "--rollout.engine=sglang")
    assert "SGLang draws from a state of its own" in own
    other = complaint(f"--rollout.{engine}.port=1")
    assert f"rollout.{engine} is given, but rollout.engine is jax" in other


def test_servers_that_run_have_no_int8_base():
    own = "--rollout.engine=vllm", "--rollout.lora=separate", "--actor.lora.rank=4"
    int8 = (*own, "--actor.lora.quantization=int8")
    said = complaint(*int8, "--rollout.vllm.urls=[http://a:1]")
    assert "actor.lora.quantization is int8 and rollout.lora is separate, but" in said
    assert parse(*int8).actor.lora.quantization == "int8"
    assert parse(*own, "--rollout.vllm.urls=[http://a:1]").actor.lora
    said = complaint(*own, "--actor.lora.quantization=int4")
    assert "actor.lora.quantization" in said and "int8" in said and "int4" in said


def test_every_mistake_has_its_line():
    lines = complaint("--seeed=1", "--rollout.nn=3", "--val.n=0").splitlines()
    assert [line.split(": ")[1] for line in lines] == ["rollout.nn", "val.n", "seeed"]


@pytest.mark.parametrize(
    "arguments, keys, value",
    [
        (["--actor.optim.lr", "1e-6"], "actor.optim.lr", 1e-6),
        (["--actor.optim.lr=1e-6"], "actor.optim.lr", 1e-6),
        (["--actor.clip-ratio-high", "0.3"], "actor.clip_ratio_high", 0.3),
        (["--rollout.top-k", "-1"], "rollout.top_k", -1),
        (["--rollout.stop", "['####', \"a=b\"]"], "rollout.stop", ("####", "a=b")),
        (["--rollout.stop=['x=y']"], "rollout.stop", ("x=y",)),
        # Lists also as words, switches also without a value.
        (["--rollout.stop", "####", "a: b"], "rollout.stop", ("####", "a: b")),
        (["--rollout.stop=null"], "rollout.stop", ("null",)),
        (["--rollout.stop-token-ids", "5", "7"], "rollout.stop_token_ids", (5, 7)),
        (["--actor.optim.betas", "0.5", "0.9"], "actor.optim.betas", (0.5, 0.9)),
        (["--trainer.loggers", "wandb"], "trainer.loggers", ("wandb",)),
        (["--actor.rules.embed", "fsdp"], "actor.rules", {"embed": "fsdp"}),
        (["--actor.rules.embed", "null"], "actor.rules", {"embed": None}),
        (
            ["--actor.rules.embed", "fsdp", "data"],
            "actor.rules",
            {"embed": ("fsdp", "data")},
        ),
        (["--actor.use-kl-loss", "--seed", "3"], "actor.use_kl_loss", True),
        (["--actor.use-kl-loss", "false"], "actor.use_kl_loss", False),
        (["--data.no-shuffle", "--seed", "3"], "data.shuffle", False),
        (["--data.no_shuffle"], "data.shuffle", False),
        (["--model.tokenizer", "null"], "model.tokenizer", None),
        (["--seed", "1", "--seed", "2"], "seed", 2),
        (["--actor.optim", "{lr: 1, eps: 2}"], "actor.optim.eps", 2.0),
        (["--rollout.n", "010"], "rollout.n", 10),
        # A field's type says how its value is read: text stays text.
        (
            ["--data.train.system-prompt", "# Task"],
            "data.train.system_prompt",
            "# Task",
        ),
        (
            ["--data.train.system_prompt", "a: b\n"],
            "data.train.system_prompt",
            "a: b\n",
        ),
        (["--data.train.system_prompt", "[a"], "data.train.system_prompt", "[a"),
        (["--data.train.system_prompt", ""], "data.train.system_prompt", ""),
        (["--data.train.system_prompt", "null"], "data.train.system_prompt", None),
        (
            ["--data.train.prompt_template", '"{x}"'],
            "data.train.prompt_template",
            '"{x}"',
        ),
        (["--data.train.split", "yes"], "data.train.split", "yes"),
        (["--data.train.split", "null"], "data.train.split", "null"),
        (["--trainer.project", "1e3"], "trainer.project", "1e3"),
        (["--trainer.project", "007"], "trainer.project", "007"),
        (["--model.revision", "2024-01-01"], "model.revision", "2024-01-01"),
        (["--data.train.params.name", "# x"], "data.train.params", {"name": "# x"}),
        (["--data.train.params.name", "3 # x"], "data.train.params", {"name": "3 # x"}),
        (["--data.train.params.depth", "3"], "data.train.params", {"depth": 3}),
        (
            ["--algorithm.rollout_correction.rollout-is-threshold", "0.5_2"],
            "algorithm.rollout_correction.rollout_is_threshold",
            "0.5_2",
        ),
        (
            ["--algorithm.rollout_correction.rollout_is_threshold", "3"],
            "algorithm.rollout_correction.rollout_is_threshold",
            3.0,
        ),
    ],
    ids=str,
)
def test_an_override_is_put_in(arguments, keys, value):
    found = parse(*arguments)
    for key in keys.split("."):
        found = getattr(found, key)
    assert found == value


def test_an_override_reaches_list_entries_and_sections_that_are_not_there():
    config = parse(
        "--reward.functions.0.params.ignore_case=true", "--data.val.path=val.jsonl"
    )
    assert config.reward.functions[0].params == {"ignore_case": True}
    assert config.data.val.path == "val.jsonl"


def test_a_number_with_an_exponent_is_a_number_everywhere():
    # YAML 1.1, which PyYAML reads, takes 1e-3 for text.
    config = parse("--reward.functions.0.params.tolerance=1e-3")
    assert config.reward.functions[0].params == {"tolerance": 0.001}


@pytest.mark.parametrize(
    "text, value",
    [("0.5_2", "0.5_2"), ("1_000", "1_000"), (".5", 0.5), ("-3", -3), ("2.", 2.0)],
)
def test_an_underscore_makes_no_number(text, value):
    # In YAML 1.1 the first is 0.52.
    config = parse(f"--reward.functions.0.params.x={text}")
    assert config.reward.functions[0].params == {"x": value}


def test_overrides_leave_what_they_are_put_into_alone():
    parse("--actor.optim.lr=1", "--reward.functions.0.weight=2")
    assert "actor" not in MINIMAL
    assert MINIMAL["reward"] == {"functions": [{"name": "exact"}]}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--seed"], "--seed: expected --section.key VALUE"),
        (["--rollout.stop"], "--rollout.stop: expected --section.key VALUE"),
        (["--data.no-shuffle", "x"], "x: expected --section.key VALUE"),
        (["seed", "3"], "seed: expected --section.key VALUE"),
        (["--seed", "--rollout.n", "4"], "--seed: expected --section.key VALUE"),
        (["--seed.x", "1"], "seed.x: 0 is no section that could have 'x'"),
        (["--seed.x.y", "1"], "seed.x.y: 0 is no section that could have 'y'"),
        (["--reward.functions.1.weight", "2"], "1 is not an entry of a list of 1"),
        (["--reward.functions.one", "2"], "one is not an entry of a list of 1"),
        (["--rollout.stop", "[a"], "--rollout.stop: not YAML: "),
    ],
    ids=str,
)
def test_an_override_that_cannot_be_put_in_is_refused(arguments, message):
    with pytest.raises(ConfigError) as error:
        parsing.override({**MINIMAL, "seed": 0}, arguments)
    assert message in str(error.value)


def test_a_file_and_overrides_make_a_configuration(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    assert parsing.load(path, ["--seed", "4"]).seed == 4
    with pytest.raises(ConfigError, match="^command line: seed: Input should be a val"):
        parsing.load(path, ["--seed", "four"])


@pytest.mark.parametrize(
    "line, overrides, said",
    [
        ("seed: four", [], "FILE:1: seed: Input should be a valid integer"),
        ("sed: 4", [], "FILE:1: sed: unknown key; did you mean 'seed'?"),
        ("actor:\n  optim: {lrr: 1}", [], "FILE:2: actor.optim.lrr: unknown key"),
        ("rollout: {stop: [a,\n  3]}", [], "FILE:2: rollout.stop.1: Input should be"),
        # What is merged stands where it was written.
        (
            "actor: {optim: &o\n {eps: -1}}\ncritic: {optim: {<<: *o}}",
            [],
            "FILE:2: actor.optim.eps: Input should be greater",
        ),
        ("seed: 0\ndata: {}", [], "FILE:2: data.train: needed but not given"),
        # What no single key is wrong about stands at the first that the line names.
        ("actor:\n  clip_ratio_c: 3\n  optim:\n    betas: [0.9, 1]", [], "FILE:4: a"),
        ("rollout:\n  n: 1", [], "FILE:2: rollout.n is 1 but algorithm.adv_estimator"),
        ("seed: 0\nreward: {functions: []}", [], "FILE:2: reward.functions is empt"),
        ("actor: {ppo_mini_batch_size: 9}", ["--data.train_batch_size=8"], "FILE:1: "),
        ("seed: 0", ["--actor.ppo_mini_batch_size=99"], "command line: actor.ppo_mini"),
        ("actor:\n  optim: {lr: -1}", ["--actor.optim.lr=-2"], "command line: actor.o"),
        ("actor: {optim: {lr: -1}}", ["--actor.optim={eps: 1}", "--seed=x"], "command"),
    ],
)
def test_a_mistake_says_in_which_line_it_is(tmp_path, line, overrides, said):
    path = tmp_path / "run.yaml"
    rest = {key: value for key, value in MINIMAL.items() if f"\n{key}:" not in line}
    path.write_text(f"{line}\n{yaml.safe_dump(rest)}")
    with pytest.raises(ConfigError) as error:
        parsing.load(path, overrides)
    assert str(error.value).startswith(said.replace("FILE", str(path)))


def test_every_combination_that_makes_no_run_has_its_line():
    said = complaint("--rollout.n=1", "--actor.mesh.tensor=0")
    assert [line.split(" is ")[0] for line in said.splitlines()] == [
        "run.yaml: rollout.n",
        "run.yaml: actor.mesh.tensor",
    ]


@pytest.mark.parametrize(
    "text, message",
    [
        ("a:\n- [1", ":2: not YAML: while parsing a flow sequence, expected"),
        ("a: \x00", ": not YAML: "),
        ("- 1\n- 2", r": expected a mapping of sections, got \[1, 2\]"),
        ("", ": expected a mapping of sections, got None"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"^{path}{message}"):
        parsing.load(path)


def test_a_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=f"^{path}: not YAML: "):
        parsing.load(path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: {b: 1}\nc: 2\na: {d: 3}\n", ":3: a is given twice, first in line 1"),
        ("a:\n  b: 1\n  b: 1\n", ":3: a.b is given twice, first in line 2"),
        ("a: {b: 1, 'b': 2}", ":1: a.b is given twice, first in line 1"),
        ("a:\n- b: 1\n- b: 2\n  b: 3\n", ":4: a.1.b is given twice"),
        ("a: &x {b: 1}\nc: {<<: *x, d: &y {e: 1, e: 2}}", ":2: c.d.e is given"),
        ("a: &x {b: *x}", ":1: a.b holds itself"),
        ("a: 2024-13-45", ":1: not YAML: month must be in 1..12"),
        ("a: " + "[" * 20000, ": not YAML: maximum recursion depth"),
    ],
)
def test_a_file_that_has_two_meanings_is_refused(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"^{path}{message}"):
        parsing.load(path)


@pytest.mark.parametrize(
    "override, message",
    [
        ("--rollout={n: 2, n: 4}", "--rollout: n is given twice, first in line 1"),
        ("--rollout.n=0" + "1" * 5000, "--rollout.n: not YAML: Exceeds the limit"),
    ],
)
def test_what_is_no_yaml_on_the_command_line_names_its_flag(override, message):
    assert complaint(override).startswith(message)


def test_keys_of_a_dictionary_keep_their_hyphens():
    found = parsing.override({}, ["--rollout.vllm.env.A-b", "1"])
    assert found == {"rollout": {"vllm": {"env": {"A-b": "1"}}}}


@pytest.mark.parametrize(
    "key, value",
    [
        ("output_dir", "{}/run"),
        ("model.path", "{}/model.gguf"),
        ("data.train.path", "{}/a.jsonl"),
        ("data.train.path", "disk:{}/a"),
    ],
)
def test_a_tilde_is_the_home_directory(monkeypatch, key, value):
    monkeypatch.setenv("HOME", "/home/someone")
    found = parse(f"--{key}={value.format('~')}")
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value.format("/home/someone")


def test_a_missing_file_names_its_neighbours(tmp_path):
    (tmp_path / "other.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"run.yaml: no such file; .*other.yaml'\]"):
        parsing.load(tmp_path / "run.yaml")


def sections():
    """Every section by its class's name."""
    kinds, rest = {}, [Section]
    while rest:
        for kind in rest.pop().__subclasses__():
            if kind.__module__.startswith("jaxrl_llm.config."):
                kinds[kind.__name__] = kind
                rest.append(kind)
    return kinds


class Reads(ast.NodeVisitor):
    """Which fields of which section a module reads.

    What an expression holds is known from annotations of arguments, from plain
    assignments and loops, and from the name `config` of an attribute.
    """

    def __init__(self):
        self.found, self._names = set(), {}

    def section_of(self, node):
        """The section that an expression holds, or None."""
        if isinstance(node, ast.Name):
            return self._names.get(node.id)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
            owner = self.section_of(node.args[0])
            return schema_training.ActorConfig if owner is Config else None
        if not isinstance(node, ast.Attribute):
            return None
        owner = self.section_of(node.value)
        if owner is None:
            return Config if node.attr.strip("_") == "config" else None
        return section_in(owner, node.attr)

    def visit_FunctionDef(self, node):
        outside = dict(self._names)
        for argument in [*node.args.args, *node.args.kwonlyargs]:
            if argument.annotation is not None:
                name = ast.unparse(argument.annotation).split(".")[-1]
                kind = sections().get(name.split(" ")[0])
                whole = name == "Any" and argument.arg == "config"
                self._names[argument.arg] = Config if whole else kind
        self.generic_visit(node)
        self._names = outside

    def visit_Assign(self, node):
        self.generic_visit(node)
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=True))
            for name, value in pairs:
                if isinstance(name, ast.Name):
                    self._names[name.id] = self.section_of(value)

    def visit_For(self, node):
        if isinstance(node.target, ast.Name):
            self._names[node.target.id] = self.section_of(node.iter)
        self.generic_visit(node)

    def visit_ListComp(self, node):
        for part in node.generators:
            if isinstance(part.target, ast.Name):
                self._names[part.target.id] = self.section_of(part.iter)
        self.generic_visit(node)

    def visit_Attribute(self, node):
        self.generic_visit(node)
        owner = self.section_of(node.value)
        if owner is None:
            return
        if node.attr == "model_dump":
            if owner is not Config:  # writing a configuration down is not reading it
                for kind in owner.__mro__:
                    self.found |= {(kind, f) for f in getattr(kind, "model_fields", ())}
        elif node.attr in owner.model_fields:
            for kind in owner.__mro__:  # a field is its own class's, wherever it is
                if node.attr in getattr(kind, "model_fields", {}):
                    self.found.add((kind, node.attr))
        elif isinstance(vars(owner).get(node.attr), property):
            source = inspect.getsource(vars(owner)[node.attr].fget)
            read = set(re.findall(r"\bself\.(\w+)", source))
            self.found |= {(owner, field) for field in read & set(owner.model_fields)}


def section_in(owner, field):
    if field not in owner.model_fields:
        return None
    annotation = owner.model_fields[field].annotation
    for kind in getattr(annotation, "__args__", (annotation,)):
        if kind in sections().values():
            return kind
    return None


SAME_CODE = {
    schema_offline.OfflineConfig: Config,
    schema_offline.OfflineDataConfig: configs.DataConfig,
    schema_offline.ValRewardConfig: configs.RewardConfig,
}
"""Sections whose fields the code of `jaxrl train` reads, by the same names."""


def test_every_field_is_read_outside_of_the_configuration():
    found = set()
    for path in ROOT.glob("jaxrl_llm/**/*.py"):
        if path.parent.name != "config" or path.stem in ("checks", "resume"):
            reads = Reads()
            reads.visit(ast.parse(path.read_text()))
            found |= reads.found
    meshes = [
        (schema_training.TrainMeshConfig, f)
        for f in schema_training.TrainMeshConfig.model_fields
    ]
    assert set(meshes) <= found, "the way meshes are read is not understood"
    unread = [
        f"{name}.{field}"
        for name, kind in sections().items()
        for field in kind.__annotations__
        # A field with another default is read as the one of the class above.
        if not any((k, field) in found for k in (*kind.__mro__, SAME_CODE.get(kind)))
        and kind is not configs.RolloutMeshConfig
    ]
    assert not unread


def test_names_are_those_the_functions_know():
    # The configuration is read before JAX is, so it cannot import them.
    for ours, theirs in [
        (names.Aggregation, masked.Aggregation),
        (names.KlEstimator, kl.Estimator),
    ]:
        assert get_args(ours) == get_args(theirs)
    assert names.REJECTIONS == get_args(correction.Rejection)


def test_verl_s_thresholds_become_bounds():
    section = schema_algorithm.RolloutCorrectionConfig(
        rollout_is_threshold="0.5_5",
        rollout_rs="token_k1, seq_mean_k3,seq_sum_k1",
        rollout_rs_threshold="0.5_1.2,0.01,2",
    )
    assert section.is_bounds == (0.5, 5.0)
    assert section.rejections == (
        ("token_k1", (0.5, 1.2)),
        ("seq_mean_k3", (None, 0.01)),
        ("seq_sum_k1", (0.5, 2.0)),
    )


def test_one_threshold_is_for_all_rejections():
    section = schema_algorithm.RolloutCorrectionConfig(
        rollout_rs="token_k2,token_k3", rollout_rs_threshold=0.1
    )
    assert {bounds for _, bounds in section.rejections} == {(None, 0.1)}
