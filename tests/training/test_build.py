"""What a run is made of, and what is wrong with it before anything is computed."""

import datetime
import json
import pathlib
import shutil

import pytest
import tiny
import yaml
from short_run import GRPO, make_config

from jaxrl_llm import models
from jaxrl_llm.config.names import ConfigError
from jaxrl_llm.training import build, roles

END = tiny.tokenizer().eos_token_id
DATED = "{{ strftime_now('%d %b %Y') }}" + tiny.CHAT_TEMPLATE


@pytest.fixture
def model(tiny_model, tmp_path):
    """A copy of the model that a test may change."""
    return pathlib.Path(shutil.copytree(tiny_model, tmp_path / "model"))


def put(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def with_eos(model, config, generation, tokenizer="<|im_end|>"):
    put(model / "config.json", eos_token_id=config)
    put(model / "generation_config.json", eos_token_id=generation)
    put(model / "tokenizer_config.json", eos_token=tokenizer)
    return models.open(model)


def test_a_response_ends_where_any_file_of_the_model_says(model):
    for config, generation, ends in (
        (5, 5, (5, END)),
        (END, [7, 5], (7, 5, END)),
        (None, None, (END,)),
        ([5, 7], None, (5, 7, END)),
    ):
        assert with_eos(model, config, generation).arch.eos_token_ids == ends
    assert with_eos(model, 5, 5, tokenizer=None).arch.eos_token_ids == (5,)


def test_another_tokenizer_brings_its_end(model):
    other = tiny.tokenizer()
    other.eos_token = "<|im_start|>"
    ends = models.open(model, tokenizer=other).arch.eos_token_ids
    assert ends == (END, other.eos_token_id)


def test_an_end_outside_of_the_vocabulary_is_named(model):
    other = tiny.tokenizer()
    names = [f"<|{i}|>" for i in range(8)]
    other.add_special_tokens({"additional_special_tokens": names})
    other.eos_token = names[-1]
    assert other.eos_token_id >= 264
    with pytest.raises(ValueError, match="says the tokenizer, but .* has 264 tokens"):
        models.open(model, tokenizer=other)
    for where in ((264, None), (None, [5, 264])):
        with pytest.raises(ValueError, match="token 264, says its config.*has 264 tok"):
            with_eos(model, *where)


def test_a_run_that_nothing_stops_says_so(tiny_model, tmp_path):
    def said(ends, **changed):
        config = make_config(tiny_model, tmp_path, **GRPO, **changed)
        arch = tiny.arch(eos_token_ids=ends)
        return build.stop_warnings(config, arch, tiny.tokenizer())

    (warning,) = said(())
    assert warning.startswith("nothing ends a response before its 6 tokens: neither")
    assert "set rollout.stop or rollout.stop_token_ids" in warning
    assert said((5,)) == said((), **{"rollout.stop": ["\n"]}) == []
    assert said((), **{"rollout.stop_token_ids": [5]}) == []


def test_a_template_whose_answers_end_with_no_stop_token_is_pointed_at(
    tiny_model, tmp_path
):
    def said(ends, template=tiny.CHAT_TEMPLATE, **changed):
        fields = GRPO | {"data.chat_template": True} | changed
        config = make_config(tiny_model, tmp_path, **fields)
        arch = tiny.arch(eos_token_ids=ends)
        return build.stop_warnings(config, arch, tiny.tokenizer(template))

    (warning,) = said((5,))
    assert "'<|im_end|>' behind an answer, which ends no response" in warning
    assert f"add its token {END} to rollout.stop_token_ids" in warning
    assert said((END,)) == said((5,), **{"rollout.stop_token_ids": [END]}) == []
    stop = {"rollout.stop": ["<|im_end|>"]}
    assert said((5,), **stop, **{"rollout.skip_special_tokens": False}) == []
    (warning,) = said((5,), **stop)
    assert "rollout.stop has '<|im_end|>', which is never found in texts" in warning
    assert "set rollout.skip_special_tokens=false, or stop at its token" in warning
    assert said((5,), **{"data.chat_template": False}) == []
    only_text = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    assert said((5,), only_text) == said((5,), None) == []
    assert said((5,), "{{ raise_exception('no') }}") == []


def test_a_stop_token_outside_of_the_vocabulary_is_named(tiny_model, tmp_path):
    source = models.open(tiny_model)
    config = make_config(
        tiny_model, tmp_path, **GRPO, **{"rollout.stop_token_ids": [5, 264]}
    )
    with pytest.raises(ConfigError, match="stop_token_ids has 264, but the vocabulary"):
        build.check_stop_tokens(config, source)


def test_what_reads_the_policys_tokens_knows_them_by_the_same_text(model, tiny_model):
    policy = models.open(tiny_model)
    critic = str(model)
    config = make_config(
        tiny_model, model.parent / "q", **{"critic.model.path": critic}
    )
    assert roles.open_critic(config, policy).arch == policy.arch
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|policy|>"]})
    policy = models.open(tiny_model, tokenizer=tokenizer)
    assert roles.open_critic(config, policy)
    other = tiny.tokenizer()
    other.add_special_tokens({"additional_special_tokens": ["<|critic|>"]})
    other.save_pretrained(model)
    with pytest.raises(
        ConfigError, match=r"token 259 is '<\|critic\|>', of the policy"
    ):
        roles.open_critic(config, policy)


def test_a_run_goes_on_with_the_date_that_its_prompts_have(tiny_model, tmp_path):
    dated, plain = tiny.tokenizer(DATED), tiny.tokenizer()
    fields = GRPO | {"data.chat_template": True, "data.max_prompt_length": 200}
    config = make_config(tiny_model, tmp_path, **fields)

    def time(tokenizer, config=config):
        return build.with_template_time(config, tokenizer).template_time

    assert time(plain) is None
    assert abs(time(dated) - datetime.datetime.now()) < datetime.timedelta(hours=1)
    once = config.model_dump(mode="json")
    once["data"]["template_time"] = "2024-07-06T12:00:00"
    run = pathlib.Path(config.output_dir)
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(once))
    assert time(dated) == datetime.datetime(2024, 7, 6, 12)
    going_on = build.with_template_time(config, dated)
    prompt = build.read_data(going_on, dated).train[0]
    assert dated.decode(prompt.tokens).startswith("06 Jul 2024<|im_start|>")
    # What the user sets counts, and a run of before this setting had the day it ran.
    fields |= {"data.template_time": "2025-01-31"}
    said = make_config(tiny_model, tmp_path, **fields)
    assert time(dated, said) == datetime.datetime(2025, 1, 31)
    del once["data"]["template_time"]
    (run / "config.yaml").write_text(yaml.safe_dump(once))
    assert time(dated) is None


def test_a_template_of_ones_own_is_used_and_exported(tiny_model, tmp_path):
    own = tmp_path / "own.jinja"
    own.write_text("{{ mood }}{{ messages[0].content }}")
    fields = GRPO | {
        "data.chat_template": True,
        "data.chat_template_file": str(own),
        "data.chat_template_kwargs": {"mood": "!"},
        "reward.functions": [{"name": "exact"}],
    }
    job = build.build(make_config(tiny_model, tmp_path / "q", **fields))
    tokenizer = job.source.tokenizer
    assert tokenizer.decode(job.data.train[3].tokens) == "!3 says"
    assert tokenizer.chat_template == own.read_text()
    assert job.config.data.template_time is None


@pytest.mark.parametrize(
    "write, message",
    [
        (lambda path: None, "No such file or directory"),
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: path.write_bytes(b"\xff"), "can't decode byte"),
        (lambda path: path.write_text(" "), "is empty"),
    ],
)
def test_a_template_that_cannot_be_read_is_named(tmp_path, write, message):
    path = tmp_path / "own.jinja"
    write(path)
    with pytest.raises(ConfigError, match=f"data.chat_template_file {path}.*{message}"):
        build.read_template(str(path))
