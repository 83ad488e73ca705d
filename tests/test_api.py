"""`evaluate` and `generate`; `train` is in test_notebooks.py and tests/training."""

import pathlib

import numpy as np
import pytest
import scored_texts

import jaxrl_llm
from jaxrl_llm import api
from jaxrl_llm.config import plugins
from jaxrl_llm.data.sources import Source, read_rows
from jaxrl_llm.tracking.result import Result

ROWS = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(3)]


def length(completions):
    """The characters of a reply."""
    return [float(len(completion)) for completion in completions]


def test_generate_returns_the_completions_of_every_prompt(tiny_model, tmp_path):
    prompts = ["1+1=", [{"role": "user", "content": "1+1="}], "2+1="]
    groups = jaxrl_llm.generate(tiny_model, prompts, n=2, max_tokens=4, seed=3)
    assert [[(c.prompt_id, c.sample) for c in group] for group in groups] == [
        [(i, 0), (i, 1)] for i in range(3)
    ]
    assert all(1 <= len(c.tokens) <= 4 for group in groups for c in group)


def test_a_run_stands_for_the_weights_in_it(tmp_path):
    (tmp_path / "huggingface").mkdir()
    for model in (tmp_path, str(tmp_path), Result(tmp_path)):
        with pytest.raises(ValueError, match=f"^{tmp_path}/huggingface"):
            jaxrl_llm.generate(model, ["a"])


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ("1+1=", {}, "prompts must be a list of at least one, got '1"),
        ([], {}, r"prompts must be a list of at least one, got \[\]"),
        (["a"], {"system": "b", "chat": False}, "system is a chat message"),
        (["a"], {"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0"),
        (["a"], {}, "/nowhere: no such directory"),
    ],
)
def test_what_cannot_be_generated_is_named(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        jaxrl_llm.generate("/nowhere", prompts, **options)


def test_evaluate_scores_the_answers_that_generate_gives(tiny_model):
    found = jaxrl_llm.evaluate(
        tiny_model, ROWS, [length, "exact"], n=2, max_tokens=4, threshold=3.0
    )
    by_kind = {kind: [r for r in found.records if r["kind"] == kind]
               for kind in ("sampled", "greedy")}  # fmt: skip
    assert [len(records) for records in by_kind.values()] == [6, 3]
    texts = [record["completion"] for record in by_kind["greedy"]]
    questions = [row["prompt"] for row in ROWS]
    greedy = jaxrl_llm.generate(tiny_model, questions, max_tokens=4, temperature=0.0)
    assert texts == [completion.text for (completion,) in greedy]
    rewards = [
        len(r["completion"]) + (r["completion"].strip() == r["answer"])
        for r in by_kind["sampled"]
    ]
    mean = found.metrics["val-core/all/reward/mean@2"]
    assert mean == pytest.approx(np.mean(rewards))
    share = found.metrics["val-core/all/acc/mean@2"]
    assert share == pytest.approx(np.mean(np.array(rewards) >= 3))
    assert found.records[0]["prompt"] == "0+1="


def test_evaluate_reads_rows_as_training_does(tiny_model):
    with pytest.raises(ValueError, match="prompts row 1 is not JSON: Object of type"):
        jaxrl_llm.evaluate(tiny_model, [{"prompt": "a"}, {"prompt": b"b"}], length)
    with pytest.raises(ValueError, match="row 0 .from 0.: no column 'prompt'"):
        jaxrl_llm.evaluate(tiny_model, [{"question": "a"}], length)


def brevity(completions, *, most=9):
    """Whether a reply is short."""
    return [float(len(completion) <= most) for completion in completions]


def test_weights_and_params_in_settings_are_those_of_the_functions(
    monkeypatch, tmp_path
):
    jobs = []
    monkeypatch.setattr(api, "build", lambda config, functions: (config, functions))
    monkeypatch.setattr(api, "run", lambda job: jobs.append(job) or Result(tmp_path))
    terms = [
        {"name": "brevity", "weight": 0.25, "params": {"most": 2}},
        {"name": "exact", "weight": 3.0},
    ]
    jaxrl_llm.train(
        "/nowhere",
        ROWS,
        [length, brevity],
        output_dir=str(tmp_path),
        settings={"reward.functions": terms},
    )
    ((config, functions),) = jobs
    assert [(f.name, f.weight) for f in functions] == [
        ("brevity", 0.25),
        ("exact", 3.0),
        ("length", 1.0),
    ]
    assert [(t.name, t.weight) for t in config.reward.functions] == [
        (f.name, f.weight) for f in functions
    ]
    scores = scored_texts.run(*functions).by_function
    np.testing.assert_array_equal(scores["brevity"], [[1, 1], [0, 1]])
    np.testing.assert_array_equal(scores["length"], [[1, 2], [3, 0]])


def configured(monkeypatch, **given):
    """The configuration that `train` makes of its arguments."""
    made = []
    monkeypatch.setattr(api, "build", lambda config, functions: made.append(config))
    monkeypatch.setattr(api, "run", lambda job: Result(pathlib.Path()))
    api.train("/nowhere", "rows.jsonl", "exact", **given)
    return made[0]


def test_settings_in_sections_are_merged_as_dotted_ones_are(monkeypatch, tmp_path):
    nested = {
        "output_dir": str(tmp_path),
        "data": {"train": {"prompt_key": "q"}, "train_batch_size": 3},
        "actor": {"optim": {"lr": 1e-5}},
        "actor.optim.weight_decay": 0.5,
        "algorithm": {"filter_groups": {}},
        "reward": {"functions": {"0": {"weight": 2.0}}},
        "trainer": {"save_freq": 7},
    }
    dotted = {
        "data.train.prompt_key": "q",
        "data.train_batch_size": 3,
        "actor.optim.lr": 1e-5,
        "actor.optim.weight_decay": 0.5,
        "algorithm.filter_groups": {},
        "reward.functions.0.weight": 2.0,
        "trainer.save_freq": 7,
        "trainer.total_training_steps": 20,
    }
    found = configured(monkeypatch, settings=nested)
    assert found == configured(monkeypatch, settings=dotted, output_dir=tmp_path)
    assert found.data.train.path == "rows.jsonl" and found.actor.optim.lr == 1e-5
    assert [(f.name, f.weight) for f in found.reward.functions] == [("exact", 2.0)]
    assert nested["data"] == {"train": {"prompt_key": "q"}, "train_batch_size": 3}


@pytest.mark.parametrize(
    "given, message",
    [
        (
            {"settings": {"actor": {"optim": {"lr": 1e-5}}, "actor.optim.lr": 1e-6}},
            "actor.optim.lr is given twice, as 1e-05 and as 1e-06",
        ),
        (
            {"settings": {"trainer": {"total_training_steps": 9}}, "steps": 5},
            "trainer.total_training_steps is 9 in settings, but steps makes it 5",
        ),
        (
            {"settings": {"data.train": {"path": "other.jsonl"}}},
            "data.train.path is 'other.jsonl' in settings, but prompts makes it",
        ),
        ({"settings": {"data": 5}}, "data.train.path: 5 is no section that could have"),
        ({"settings": {"actor": {"optim": {"l": 1}}}}, "actor.optim.l: unknown key"),
    ],
)
def test_settings_that_say_something_else_are_refused(
    given, message, monkeypatch, tmp_path
):
    with pytest.raises(ValueError, match=message):
        configured(monkeypatch, output_dir=tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "reward, terms, message",
    [
        ([length, length], [], "different names, got 'length' 2 times"),
        (length, [{"name": "length"}] * 2, "different names, got 'length' 2 times"),
        (brevity, [{"name": "brevity", "params": {"mot": 1}}], "no parameter 'mot'"),
        (length, [{"name": "exct"}], "'exct' is not built in, did you mean 'exact'"),
        (lambda anser: [], [], "asks for 'anser', did you mean 'answer'"),
    ],
)
def test_what_is_wrong_with_rewards_is_said_before_a_model_is_read(
    reward, terms, message, tmp_path
):
    with pytest.raises(ValueError, match=message):
        jaxrl_llm.train(
            "/nowhere",
            ROWS,
            reward,
            output_dir=str(tmp_path),
            settings={"reward.functions": terms},
        )


@pytest.mark.parametrize(
    "call",
    [
        lambda model: api.generate(model, ["a"]),
        lambda model: api.evaluate(model, [{"prompt": "a"}], "exact"),
        lambda model: api.train(model, [{"prompt": "a"}], "exact"),
    ],
    ids=["generate", "evaluate", "train"],
)
def test_every_function_gives_jax_the_memory_first(monkeypatch, tiny_model, call):
    class Given(Exception):
        """Nothing is to be computed after it."""

    def given(server=0.0):
        raise Given(server)

    monkeypatch.setattr(api.hardware, "use_memory", given)
    with pytest.raises(Given) as found:
        call(tiny_model)
    assert found.value.args == (0.0,)


def test_train_takes_paths_and_texts(monkeypatch, tmp_path):
    jobs = []
    monkeypatch.setattr(api, "build", lambda config, functions: config)
    monkeypatch.setattr(api, "run", lambda job: jobs.append(job) or Result(tmp_path))
    jaxrl_llm.train(
        tmp_path / "model",
        ["1 + 1?", "2 + 2?"],
        length,
        val_prompts=tmp_path / "val.jsonl",
        output_dir=tmp_path / "run",
    )
    (config,) = jobs
    assert config.model.path == str(tmp_path / "model")
    assert config.data.val.path == str(tmp_path / "val.jsonl")
    assert [
        row["prompt"] for row in read_rows(Source(path=config.data.train.path))
    ] == [
        "1 + 1?",
        "2 + 2?",
    ]


def double(number: int) -> int:
    """Doubles a number.

    Args:
        number: to be doubled.
    """
    return 2 * number


class Guess:
    """A game."""

    def reset(self, seed: int) -> str:
        """Begins."""
        return "guess"

    def step(self, text: str):
        """Answers."""
        return "no", 0.0, True, False, {}


def test_tools_and_environments_become_a_configuration(monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(api, "build", lambda config, functions: made.append(config))
    monkeypatch.setattr(api, "run", lambda job: Result(tmp_path))
    options = {"output_dir": tmp_path / "run"}
    api.train("/nowhere", ROWS, "exact", tools=[double], **options)
    several = {"a": Guess, "b": "higher_lower"}
    rows = [row | {"environment": "a"} for row in ROWS]
    api.train("/nowhere", rows, environment_factory=several, output_dir=tmp_path / "b")
    api.train("/nowhere", 64, environment=Guess, val_prompts=8, **options)
    first, second, third = made
    assert first.agent.tools == (f"{__name__}:double",)
    assert plugins.find("agent.tools", first.agent.tools[0]) is double
    assert second.agent.environment == {"a": f"{__name__}:Guess", "b": "higher_lower"}
    assert second.reward.functions == ()
    train, val = third.data.train, third.data.val
    assert (train.path, train.size, train.seed) == ("episodes:", 64, 0)
    assert (val.path, val.size, val.seed) == ("episodes:", 8, 1)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"environment": Guess, "environment_factory": Guess}, "two names of one"),
        ({}, "reward.functions is empty"),
        ({"tools": [double]}, "reward.functions is empty"),
        (
            {"environment": Guess, "settings": {"agent.max_tokens": 5}},
            "agent.max_tokens is 5, of a whole episode, but rollout.max_response_",
        ),
        (
            {"environment": Guess, "settings": {"data.chat_template": False}},
            "an agent's turns are told apart by the chat template",
        ),
        (
            {"environment": Guess, "settings": {"reward.overlong_buffer": {"len": 4}}},
            "with an agent there are several",
        ),
        (
            {
                "environment": Guess,
                "settings": {
                    "agent.on_rewrite": "fork",
                    "agent.max_turns": 3,
                    "rollout.max_response_length": 10,
                    "data.max_prompt_length": 100,
                },
            },
            # The prompt twice more, and 10 + 20 + 30 that turns say and read again.
            "agent.max_tokens is not given: .* as long as they may be 260",
        ),
        (
            {
                "environment": Guess,
                "settings": {
                    "agent.on_rewrite": "fork",
                    "agent.max_tokens": 3000,
                    "actor.pack_length": 20000,
                    "actor.share_prompts": True,
                },
            },
            "actor.share_prompts is true, but with agent.on_rewrite=fork",
        ),
        (
            {"settings": {"agent": {"params": {"a": 1}}}},
            "agent has neither tools nor an environment",
        ),
        ({"environment": "highr_lower"}, "no 'highr_lower', did you mean 'higher_l"),
    ],
)
def test_what_makes_no_agent_is_refused(given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        jaxrl_llm.train("/nowhere", ROWS, output_dir=str(tmp_path), **given)
