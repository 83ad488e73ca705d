"""Scores of a reward model: those of transformers, wherever and however it is asked."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file
from short_run import make_config

from jaxrl_llm import api, models
from jaxrl_llm.algorithms import masked
from jaxrl_llm.config.parsing import ConfigError
from jaxrl_llm.data.types import Completion, Episode, Prompt, Turn, single_turn
from jaxrl_llm.planning import dry_run, planner
from jaxrl_llm.rewards import RewardError, RewardFunction
from jaxrl_llm.roles.reward_model import RewardModel
from jaxrl_llm.sharding import mesh
from jaxrl_llm.tracking import run_directory
from jaxrl_llm.training import loop as train
from jaxrl_llm.training.build import build
from jaxrl_llm.training.experience import score_together
from jaxrl_llm.training.roles import open_reward_model, reward_model_of

VOCABULARY = 264  # of tiny.checkpoint
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "eos_token_id": 258,
    "bos_token_id": None,
    "pad_token_id": None,
    "num_labels": 1,
}
GEMMA = {"query_pre_attn_scalar": 24, "sliding_window": 6}
GEMMA3 = {
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    },
}
FAMILIES = {
    "Llama": {},
    "Mistral": {"sliding_window": 6},
    "Qwen2": {},
    "Qwen3": {},
    "Gemma2": GEMMA,
    "Gemma3Text": GEMMA | GEMMA3,
    "SmolLM3": {"no_rope_layers": [1, 0]},
}
# A plain decoder, one with biases and one whose layers differ; the hidden states of
# every family are in test_families.
QUICK = {"Llama", "Qwen2", "Gemma3Text"}


@functools.cache
def reference(family, kind="ForSequenceClassification", **changed):
    """A random transformers model, whose scores differ by about 1."""
    torch = pytest.importorskip("torch")
    import transformers

    config = getattr(transformers, f"{family}Config")(
        **COMMON | FAMILIES[family] | changed
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, family + kind)(config).to(torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        if kind == "ForSequenceClassification":
            model.score.weight.mul_(3)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The directory of `reference`, with the policy's tokenizer."""

    @functools.cache
    def save(family, *kind, **changed):
        directory = tmp_path_factory.mktemp(family)
        reference(family, *kind, **changed).save_pretrained(directory)
        tiny.tokenizer().save_pretrained(directory)
        return str(directory)

    return save


def their_scores(family, prompts, completions):
    """One response at a time, without padding."""
    import torch

    with torch.no_grad():
        return np.array(
            [
                [
                    reference(family)(
                        torch.tensor([[*prompt.tokens, *completion.tokens.tolist()]])
                    ).logits.item()
                    for completion in group
                ]
                for prompt, group in zip(prompts, completions, strict=True)
            ],
            np.float32,
        )


@functools.cache
def answered(num_prompts=4, group_size=2):
    """Prompts of 3 to 6 tokens, and responses of 1 to 6."""
    draw = np.random.default_rng(0)
    prompts = [
        Prompt(
            id=p,
            content="",
            tokens=tuple(draw.integers(0, 256, 3 + p % 4).tolist()),
            columns={},
        )
        for p in range(num_prompts)
    ]
    lengths = draw.integers(1, 7, (num_prompts, group_size)).tolist()
    completions = [
        [
            Completion(
                prompt_id=p,
                sample=g,
                tokens=draw.integers(0, 259, length).astype(np.int32),
                logprobs=np.zeros(length, np.float32),
                raw_logprobs=None,
                finish_reason="stop",
                weight_version=0,
                text="",
            )
            for g, length in enumerate(group)
        ]
        for p, group in enumerate(lengths)
    ]
    return prompts, single_turn(completions)


def settings(directory, model, path, **changed):
    """A run of GRPO whose reward is that model's score."""
    critic = {"mesh": {}, "optim.lr": 1e-5, "dtype": "bfloat16", "remat": "full"}
    fields = {
        **{f"critic.{key}": value for key, value in critic.items()},
        "algorithm.adv_estimator": "grpo",
        "data.train_batch_size": 4,
        "reward.functions": [],
        "reward.model": {"path": path, "dtype": "float32"},
    }
    return make_config(model, directory, **fields | changed)


def scorer(config, model, **axes):
    devices = jax.devices()[: int(np.prod(list(axes.values())))]
    sizes = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1} | axes
    source = open_reward_model(config, models.open(model))
    return reward_model_of(config, source, mesh.make(sizes, devices))


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=() if family in QUICK else pytest.mark.slow)
        for family in FAMILIES
    ],
)
def test_scores_are_those_of_transformers(family, tiny_model, saved, tmp_path):
    config = settings(tmp_path, tiny_model, saved(family))
    found = scorer(config, tiny_model).score(*answered())
    assert found.dtype == np.float32 and np.std(found) > 0.3
    np.testing.assert_allclose(found, their_scores(family, *answered()), atol=1e-4)


@pytest.mark.parametrize(
    "axes, changed",
    [
        pytest.param({"fsdp": 8}, {}, marks=pytest.mark.slow),
        ({"data": 2, "fsdp": 2, "tensor": 2}, {"reward.model.micro_batch_size": 4}),
        ({"context": 2, "tensor": 2}, {"actor.pack_length": 32}),
        pytest.param(
            {"tensor": 4},
            {"reward.model.rules": {"residual": "context"}},
            marks=pytest.mark.slow,
        ),
        ({}, {"reward.model.micro_batch_size": 3, "actor.micro_batch_size": 1}),
        pytest.param(
            {},
            {"actor.pack_length": 40, "reward.model.micro_batch_size": 2},
            marks=pytest.mark.slow,
        ),
        ({}, {"actor.pack_length": 32, "actor.share_prompts": True}),
        ({}, {"reward.model.unroll": "always", "reward.model.offload": True}),
    ],
    ids=lambda x: "-".join(map(str, x)) or "one",
)
def test_mesh_packing_and_micro_batches_change_no_score(
    axes, changed, tiny_model, saved, tmp_path
):
    config = settings(tmp_path, tiny_model, saved("Llama"), **changed)
    found = scorer(config, tiny_model, **axes).score(*answered())
    np.testing.assert_allclose(found, their_scores("Llama", *answered()), atol=1e-4)


def test_more_responses_than_a_step_has_are_scored_in_parts(
    tiny_model, saved, tmp_path
):
    # 4 prompts x 2 responses at a time: of 7 x 3, two prompts at a time.
    many = answered(7, 3)
    config = settings(tmp_path, tiny_model, saved("Llama"))
    model, sizes = scorer(config, tiny_model), []
    inner = model._score
    model._score = lambda params, rows: (
        sizes.append(rows.num_sequences),
        inner(params, rows),
    )[1]
    np.testing.assert_allclose(
        model.score(*many), their_scores("Llama", *many), atol=1e-4
    )
    assert sizes == [
        8,
        8,
        8,
        8,
    ]  # one shape, the last with fewer than there is room for


@pytest.mark.parametrize(
    "family",
    [f if f == "Qwen2" else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES],
)
def test_what_is_written_is_what_transformers_and_we_read(family, saved, tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    opened = models.open_classifier(saved(family))
    params = load_on_one_device(opened)
    models.save_classifier(
        tmp_path / "out", opened.arch, params, opened.tokenizer, dtype="float32"
    )
    again = load_on_one_device(models.open_classifier(tmp_path / "out"))
    jax.tree.map(np.testing.assert_array_equal, params, again)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", attn_implementation="eager"
    ).eval()
    assert theirs.config.num_labels == 1 and type(theirs) is type(reference(family))
    # Two of them together, so that the shorter one is padded.
    prompts, completions = answered()
    texts = [
        [*prompt.tokens, *group[0].tokens.tolist()]
        for prompt, group in zip(prompts[:2], completions[:2], strict=True)
    ]
    longest, pad = max(map(len, texts)), theirs.config.pad_token_id
    ids = torch.tensor([text + [pad] * (longest - len(text)) for text in texts])
    with torch.no_grad():
        found = theirs(ids, attention_mask=(ids != pad).long()).logits[:, 0].numpy()
    wanted = their_scores(family, *answered())[:2, 0]
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def load_on_one_device(classifier):
    on_one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = models.abstract_critic(classifier.arch)
    shardings = jax.tree.map(lambda _: on_one, shapes)
    return classifier.load(dtype="float32", shardings=shardings)


@pytest.mark.parametrize("tied", [True, False])
def test_a_reward_model_is_written_of_a_language_model(tied, tmp_path):
    """Whose padding must not be the token that ends an answer."""
    base = models.load(tiny.checkpoint(tmp_path / "base", tie_embeddings=tied))
    base.tokenizer.pad_token = base.tokenizer.eos_token
    params = models.init_critic(base.arch, base.params)
    params["weight"] += 0.5
    models.save_classifier(tmp_path / "out", base.arch, params, base.tokenizer)
    said = json.loads((tmp_path / "out/config.json").read_text())
    read = models.open_classifier(tmp_path / "out")
    assert said["architectures"] == ["LlamaForSequenceClassification"]
    assert said["pad_token_id"] == read.tokenizer.pad_token_id
    assert said["pad_token_id"] not in base.arch.eos_token_ids
    assert base.tokenizer.pad_token_id in base.arch.eos_token_ids
    held = load_on_one_device(read)["weight"]
    np.testing.assert_array_equal(held, np.full(base.arch.hidden_size, 0.5))
    with pytest.raises(ValueError, match="bias is 1.0, which no file can hold"):
        params["bias"] += 1.0
        models.save_classifier(tmp_path / "no", base.arch, params, base.tokenizer)


def test_scores_in_bfloat16_are_near(tiny_model, saved, tmp_path):
    changed = {"reward.model.dtype": "bfloat16"}
    config = settings(tmp_path, tiny_model, saved("Llama"), **changed)
    model = scorer(config, tiny_model)
    found = model.score(*answered())
    assert found.dtype == np.float32
    assert {x.dtype.name for x in jax.tree.leaves(model._kept)} == {"bfloat16"}
    np.testing.assert_allclose(found, their_scores("Llama", *answered()), atol=0.2)


def test_the_last_tokens_of_sequences_by_hand():
    ids = jnp.array([[0, 0, 0, 2, 1, 1], [3, 3, -1, -1, -1, -1]])
    expected = [[0, 0, 1, 1, 0, 1], [0, 1, 0, 0, 0, 0]]
    np.testing.assert_array_equal(masked.is_last(ids), np.array(expected, bool))


def test_a_language_model_is_refused_by_the_tensor_it_lacks(
    tiny_model, saved, tmp_path
):
    for path in (tiny_model, saved("Llama", "ForCausalLM")):
        config = settings(tmp_path, tiny_model, path)
        with pytest.raises(
            ConfigError, match="reward.model.path .*tensor score.weight is missing"
        ):
            build(config)


def test_a_tensor_that_is_missing_is_named_before_anything_is_read(tmp_path):
    path = tiny.reward_model(tmp_path / "model")
    name, file = "model.layers.1.mlp.up_proj.weight", f"{path}/model.safetensors"
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file)
    with pytest.raises(ValueError, match=f"tensor {name} is missing"):
        models.open_classifier(path)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"num_labels": 2}, r"score.weight has shape \(2, 32\).*num_labels must be 1"),
        ({"vocab_size": 300}, "has 300 tokens in its vocabulary, the policy 264"),
        ({"max_position_embeddings": 8}, "has 8 positions, but .* is 16"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(
    changed, message, tiny_model, saved, tmp_path
):
    config = settings(tmp_path, tiny_model, saved("Qwen2", **changed))
    with pytest.raises(ConfigError, match=f"reward.model.path .*{message}"):
        build(config)


def test_a_model_of_other_tokens_is_refused(tiny_model, tmp_path):
    path = tmp_path / "other"
    reference("Llama").save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    file = path / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    file.write_text(json.dumps(tokenizer))
    config = settings(tmp_path, tiny_model, str(path))
    with pytest.raises(ConfigError, match="'A' is token .*they must read the same"):
        build(config)


def test_a_policy_cannot_start_from_a_model_without_output(saved, tmp_path):
    with pytest.raises(ValueError, match="LlamaForSequenceClassification"):
        models.open(saved("Llama"))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"reward.model": None}, "functions is empty; give at least one, or a model"),
        ({"reward.model.pth": "x"}, "reward.model.pth: unknown key.*'path'"),
        ({"reward.model.mesh": {"fsdp": 0}}, "reward.model.mesh.fsdp is 0"),
        (
            {"placement": {"groups": {"a": "0-7"}, "actor": "a", "reward": "b"}},
            "reward is b, which is none of the groups a",
        ),
        (
            {
                "placement": {
                    "groups": {"a": "0-3", "b": "4-7"},
                    "actor": "a",
                    "reward": "b",
                },
                "reward.model": None,
                "reward.functions": [{"name": "exact"}],
            },
            "placement.reward is b, but there is no reward.model",
        ),
    ],
)
def test_what_makes_no_run_is_refused(changed, message, tiny_model, tmp_path):
    with pytest.raises(ConfigError, match=message):
        settings(tmp_path, tiny_model, "nowhere", **changed)


def test_a_function_and_the_model_need_different_names(tiny_model, saved, tmp_path):
    config = settings(tmp_path, tiny_model, saved("Llama"))
    with pytest.raises(ConfigError, match="different names.*reward_model"):
        build(config, [RewardFunction(name="reward_model", function=length)])


class Broken(RewardModel):
    """Has no number for the last response."""

    weight = 2.0

    def __init__(self):
        pass

    def score(self, prompts, completions):
        scores = np.ones((len(prompts), len(completions[0])), np.float32)
        scores[-1, -1] = np.nan
        return scores


def test_a_score_that_is_no_number_stops_the_run_or_is_counted():
    how = {"timeout_s": 5.0}
    with pytest.raises(RewardError, match="'reward_model' returned nan, not a finite"):
        score_together([], Broken(), *answered(), **how, on_error="raise")
    found = score_together([], Broken(), *answered(), **how, on_error="zero")
    np.testing.assert_array_equal(found.total, [[2, 2], [2, 2], [2, 2], [2, 0]])
    assert found.errors == {"reward_model": 1}


def length(completion_ids, **_):
    return [float(len(ids)) for ids in completion_ids]


def run(config, rewards=()):
    job = build(config, list(rewards))
    return job, train.run(job)


@pytest.mark.slow
def test_functions_and_model_add_up_in_training_and_validation(
    tiny_model, saved, tmp_path
):
    changed = {
        "reward.model.weight": 0.5,
        "reward.overlong_buffer": {"len": 4, "penalty_factor": 1.0},
        "data.val.path": str(tmp_path / "questions.jsonl"),
        "data.val.size": 3,
        "trainer.total_training_steps": 1,
    }
    config = settings(tmp_path, tiny_model, saved("Llama"), **changed)
    job, result = run(config, [RewardFunction(name="length", function=length)])
    assert job.weights == (1.0, 1.0, 0.5)

    def said(tokens):
        turn = Turn.observed("assistant", tokens, "")
        return Episode(prompt_id=0, sample=0, turns=(turn,))

    prompts = {p.id: p for p in (*job.data.train, *job.data.val)}
    for split in ("train", "val"):
        records = result.completions(1, split)
        theirs = their_scores(
            "Llama",
            [prompts[r["prompt_id"]] for r in records],
            [[said(r["tokens"])] for r in records],
        )
        for record, expected in zip(records, theirs[:, 0].tolist(), strict=True):
            scores, count = record["scores"], len(record["tokens"])
            assert scores["reward_model"] == pytest.approx(expected, abs=1e-4)
            penalty = 0.0 if split == "val" else min(0, (2 - count) / 4)
            assert record["reward"] == pytest.approx(
                count + 0.5 * expected + penalty, abs=1e-4
            )
        assert ("overlong_penalty" in records[0]["scores"]) == (split == "train")
    line = run_directory.read(config.output_dir)[1]
    scores = [r["scores"]["reward_model"] for r in result.completions(1)]
    assert line["reward/reward_model/mean"] == pytest.approx(np.mean(scores))
    assert "val-aux/all/reward_model/mean@1" in line


@pytest.mark.slow
def test_grpo_raises_the_score(tiny_model, saved, tmp_path):
    changed = {
        "rollout.n": 8,
        "data.train_batch_size": 8,
        "actor.optim.lr": 3e-2,
        "trainer.total_training_steps": 10,
    }
    config = settings(tmp_path, tiny_model, saved("Llama"), **changed)
    run(config)
    lines = run_directory.read(config.output_dir)
    rewards = [line["critic/rewards/mean"] for line in lines if line["step"]]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 2


def test_no_plan_is_made_of_it(tiny_model, tmp_path):
    config = settings(tmp_path, tiny_model, "nowhere")
    with pytest.raises(ConfigError, match="a reward model's scoring is not planned"):
        planner.estimate(config, jax.devices())


@pytest.mark.slow
def test_the_python_api_takes_a_model_alone(tiny_model, saved, tmp_path):
    result = api.train(
        tiny_model,
        [{"prompt": f"{i} says"} for i in range(4)],
        [],
        steps=1,
        output_dir=str(tmp_path / "run"),
        settings={
            "reward.model.path": saved("Llama"),
            "data.train_batch_size": 4,
            "data.max_prompt_length": 64,
            "rollout.n": 2,
            "rollout.max_response_length": 4,
        },
    )
    assert list(result.completions(1)[0]["scores"]) == ["reward_model"]


APART = {
    "groups": {"learn": "0-3", "judge": "4-5", "generate": "6-7"},
    "actor": "learn",
    "reward": "judge",
    "rollout": "generate",
}


@pytest.mark.slow
def test_a_group_of_its_own_gives_the_same_numbers(tiny_model, saved, tmp_path):
    found = []
    for name, placement in (("together", {}), ("apart", APART)):
        config = settings(
            tmp_path / name, tiny_model, saved("Llama"), placement=placement
        )
        run(config)
        found.append(
            [
                {k: v for k, v in line.items()
                 if k.startswith(("actor/", "critic/", "reward/"))}
                for line in run_directory.read(config.output_dir)
            ]
        )  # fmt: skip
    for together, apart in zip(*found, strict=True):
        assert apart == pytest.approx(together, rel=1e-4, abs=1e-5)
    assert found[0][1]["reward/reward_model/mean"] != 0


@pytest.mark.slow
def test_it_lies_where_it_is_placed_and_is_counted_there(tiny_model, saved, tmp_path):
    changed = {
        "placement": APART,
        "reward.model.mesh": {"fsdp": 1, "tensor": 2},
    }
    config = settings(tmp_path, tiny_model, saved("Llama"), **changed)
    job = build(config)
    model = job.reward_model
    job.score(*answered())
    ids = {d.id for x in jax.tree.leaves(model._kept) for d in x.sharding.device_set}
    assert ids == {4, 5}
    held = dry_run.memory_per_device(job)["judge"]
    leaves = jax.tree.leaves(model._kept)
    on_one = sum(x.addressable_shards[0].data.nbytes for x in leaves)
    assert held["reward model"] == on_one < 0.6 * sum(x.nbytes for x in leaves)
    assert held["gradients, activations"] > 0
    # Weights that wait in the host's memory come back for the pass.
    section = config.reward.model.model_copy(update={"offload": True})
    reward = config.reward.model_copy(update={"model": section})
    waits = build(config.model_copy(update={"reward": reward}))
    peak = dry_run.memory_per_device(waits)["judge"]
    assert peak == {"gradients, activations": sum(held.values())}
