"""The value model, and whole runs with one, on a tiny model."""

import dataclasses
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from short_run import make_config, newest

from jaxrl_llm import models
from jaxrl_llm.algorithms import advantages, ppo
from jaxrl_llm.config import parsing
from jaxrl_llm.data.packing import make_rows
from jaxrl_llm.data.types import Completion, Prompt, single_turn
from jaxrl_llm.rewards import RewardFunction
from jaxrl_llm.sharding import mesh
from jaxrl_llm.tracking import run_directory
from jaxrl_llm.training import loop as train
from jaxrl_llm.training.build import build
from jaxrl_llm.training.roles import critic_of, open_critic

ARCH = tiny.arch(num_layers=1, max_positions=64, eos_token_ids=(258,))
HIGH = 200  # token ids from here on are rewarded


@pytest.fixture(scope="module")
def params():
    return models.init(ARCH, jax.random.key(0))


def values(params, tokens, positions, ids):
    arrays = (jnp.asarray(x, jnp.int32)[None] for x in (tokens, positions, ids))
    return np.asarray(models.values(ARCH, params, *arrays, dtype=jnp.float32))[0]


def with_head(params):
    critic = models.init_critic(ARCH, params)
    weight = jax.random.normal(jax.random.key(1), (ARCH.hidden_size,))
    return critic | {"weight": weight, "bias": jnp.float32(0.5)}


def test_a_critic_starts_as_the_policy_and_predicts_zero(params):
    critic = models.init_critic(ARCH, params)
    assert not values(critic, [1, 2, 3], [0, 1, 2], [0, 0, 0]).any()
    assert "output" in params and "output" not in critic["decoder"]


def test_a_value_is_the_product_of_the_hidden_state_and_the_head(params):
    tokens = jnp.array([[1, 2, 3]])
    positions, ids = jnp.arange(3)[None], jnp.zeros((1, 3), int)
    hidden = models.forward(ARCH, params, tokens, positions, ids, dtype=jnp.float32)
    critic = with_head(params)
    expected = np.asarray(hidden)[0] @ np.asarray(critic["weight"]) + 0.5
    got = values(critic, tokens[0], positions[0], ids[0])
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_values_do_not_look_ahead_nor_at_other_sequences(params):
    critic = with_head(params)
    alone = values(critic, [5, 6, 7], [0, 1, 2], [0, 0, 0])
    packed = values(critic, [9, 8, 5, 6, 7], [0, 1, 0, 1, 2], [1, 1, 0, 0, 0])
    np.testing.assert_allclose(packed[2:], alone, rtol=1e-5, atol=1e-6)
    changed = values(critic, [5, 6, 9], [0, 1, 2], [0, 0, 0])
    np.testing.assert_allclose(changed[:2], alone[:2], rtol=1e-5)


def test_shapes_and_axes_are_those_of_a_critic(params):
    critic = models.init_critic(ARCH, params)
    abstract, axes = models.abstract_critic(ARCH), models.critic_axes(ARCH)
    chex.assert_trees_all_equal_shapes_and_dtypes(critic, abstract)
    is_axes = {"is_leaf": lambda x: isinstance(x, tuple)}
    for x, names in zip(
        jax.tree.leaves(critic), jax.tree.leaves(axes, **is_axes), strict=True
    ):
        assert x.ndim == len(names)


@pytest.fixture(scope="module")
def weights(params, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / "tiny"
    models.save(directory, ARCH, params, tiny.tokenizer(), dtype=jnp.float32)
    return str(directory)


def high(prompts, completions, completion_ids, **columns):
    """The share of tokens from `HIGH` on."""
    return [float(np.mean(np.asarray(ids) >= HIGH)) for ids in completion_ids]


def run(config):
    job = build(config, [RewardFunction(name="high", function=high)])
    train.run(job)
    return job


@pytest.mark.slow
def test_ppo_raises_the_reward_and_its_critic_learns(weights, tmp_path):
    config = make_config(
        weights,
        tmp_path,
        **{
            "trainer.total_training_steps": 30,
            "data.train_batch_size": 16,
            "rollout.n": 4,
            "critic.ppo_epochs": 2,
            "trainer.critic_warmup": 2,
        },
    )
    run(config)
    lines = run_directory.read(config.output_dir)
    rewards = [line["critic/rewards/mean"] for line in lines if line["step"]]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.2
    assert "actor/pg_loss" not in lines[2] and "actor/pg_loss" in lines[3]
    assert all(np.isfinite(line["critic/vf_loss"]) for line in lines if line["step"])


@pytest.mark.slow
def test_a_run_that_is_resumed_is_the_run_that_was_not(weights, tmp_path):
    changed = {
        "algorithm.use_kl_in_reward": True,
        "algorithm.kl_ctrl": {"type": "adaptive", "kl_coef": 0.1, "horizon": 100},
        "data.train_batch_size": 4,
        "critic.ppo_mini_batch_size": 2,
        "trainer.save_freq": 1,
        "trainer.total_training_steps": 2,
    }
    config = make_config(weights, tmp_path, **changed)
    run(config)
    whole, parts = tmp_path / "run", tmp_path / "resumed"
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / "2")
    config = config.model_copy(update={"output_dir": str(parts)})
    job = run(config)
    like = job.abstract_state()
    expected, got = newest(whole, like), newest(parts, like)
    assert expected.critic.step == 4 and expected.kl_coef != np.float32(0.1)
    chex.assert_trees_all_equal(expected, got)


def toy_rows():
    """Responses whose score is the share of high tokens: what is known grows with
    every token."""
    rng = np.random.default_rng(0)
    prompts = [Prompt(id=p, content="", tokens=(1, 2), columns={}) for p in range(16)]
    answers = rng.integers(0, 256, (16, 2, 6))
    completions = [
        [
            Completion(
                prompt_id=p,
                sample=g,
                tokens=answers[p, g].astype(np.int32),
                logprobs=np.zeros(6, np.float32),
                raw_logprobs=np.zeros(6, np.float32),
                finish_reason="length",
                weight_version=0,
                text="",
            )
            for g in range(2)
        ]
        for p in range(16)
    ]
    scores = (answers >= HIGH).mean(axis=2).astype(np.float32)
    return make_rows(prompts, single_turn(completions), np.zeros_like(scores)), scores


def credit(critic, state, rows, scores):
    rewards = advantages.at_last_token(
        jnp.asarray(scores.ravel()),
        *map(jnp.asarray, (rows.response_mask, rows.sequence_ids, rows.positions)),
    )
    rows = jax.device_put(rows)
    values = jnp.asarray(critic.judge(state.params, jax.device_get(rows)))
    return jax.device_get(ppo.credit(rows, rewards, values, gamma=1.0, lam=1.0))


def one_device():
    return mesh.make({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])


@pytest.mark.slow
def test_a_critic_learns_to_predict_returns(weights, tmp_path):
    config = make_config(weights, tmp_path, **{"data.train_batch_size": 16})
    critic = critic_of(config, models.open(weights), one_device())
    state, (rows, scores) = critic.start(), toy_rows()
    for i in range(40):
        state, found = critic.update(state, credit(critic, state, rows, scores), i)
    assert found["critic/vf_explained_var"] > 0.5


@pytest.mark.slow
def test_the_mesh_and_the_micro_batches_of_a_critic_change_nothing(weights, tmp_path):
    rows, scores = toy_rows()
    base = {"data.train_batch_size": 16, "critic.optim.lr": 1e-4}
    found = []
    for sizes, micro in (((1, 1, 1), None), ((2, 2, 2), 8)):
        config = make_config(
            weights, tmp_path, **base, **{"critic.micro_batch_size": micro}
        )
        axes = dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))
        devices = jax.devices()[: int(np.prod(sizes))]
        critic = critic_of(config, models.open(weights), mesh.make(axes, devices))
        state = critic.start()
        state, _ = critic.update(state, credit(critic, state, rows, scores), 0)
        credited = credit(critic, state, rows, scores)
        found.append((credited.values, credited.advantages))
    chex.assert_trees_all_close(*found[::-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changed, message",
    [
        (
            {"algorithm.adv_estimator": "grpo"},
            "critic: a critic needs",
        ),
        ({"trainer.critic_warmup": 3}, "critic_warmup is 3, but with"),
        ({"critic.ppo_mini_batch_size": 9}, "critic.ppo_mini_batch_size is 9 prompts"),
        (
            {"algorithm.kl_ctrl.kl_coef": 0.5},
            "kl_ctrl needs algorithm.use_kl",
        ),
        ({"critic.model.revision": "main"}, "revision needs critic.model.path"),
        ({"critic.optim.lr_warmup_steps": 4}, "critic.optim.lr_warmup_steps is 4"),
        ({"algorithm.norm_adv_by_std_in_grpo": False}, "does not divide"),
        ({"critic.mesh.fsdp": 0}, "critic.mesh.fsdp is 0"),
        ({"critic.lr": 1.0}, "critic.lr: unknown key"),
    ],
)
def test_what_makes_no_run_is_refused(weights, tmp_path, changed, message):
    with pytest.raises(parsing.ConfigError, match=message):
        make_config(weights, tmp_path, **changed)


@pytest.mark.parametrize(
    "key, value",
    [
        ("algorithm.lam", 0.9),
        ("trainer.critic_warmup", 1),
    ],
)
def test_what_needs_values_is_refused_without(weights, tmp_path, key, value):
    changed = {
        "algorithm.adv_estimator": "grpo",
        "critic.optim.lr": 1e-5,
        "critic.dtype": "bfloat16",
        "critic.remat": "full",
        "critic.mesh": {},
    }
    make_config(weights, tmp_path, **changed)
    with pytest.raises(parsing.ConfigError, match=f"{key} is .* needs algorithm.adv"):
        make_config(weights, tmp_path, **changed, **{key: value})


def test_a_critic_s_learning_rate_does_not_depend_on_what_else_is_set(
    weights, tmp_path
):
    changed = {"critic.optim": {"weight_decay": 0.0}}
    assert make_config(weights, tmp_path, **changed).critic.optim.lr == 1e-5


def test_one_response_to_each_prompt_is_enough(weights, tmp_path):
    make_config(weights, tmp_path, **{"rollout.n": 1})


def test_a_critic_reads_the_policy_s_tokens(weights, tmp_path):
    other = dataclasses.replace(ARCH, vocab_size=400)
    models.save(
        tmp_path / "other",
        other,
        models.init(other, jax.random.key(0)),
        tiny.tokenizer(),
    )
    config = make_config(
        weights, tmp_path, **{"critic.model.path": str(tmp_path / "other")}
    )
    with pytest.raises(parsing.ConfigError, match="has 400 tokens in its vocabulary"):
        open_critic(config, models.open(weights))
