"""Which estimator a configuration gets, from rewards to rows."""

import jax
import numpy as np
import pytest
from test_learner import EIGHT, P, make_config, make_rollouts

from jaxrl_llm import estimate, models
from jaxrl_llm.config import ConfigError
from jaxrl_llm.config_algorithm import AlgorithmConfig
from jaxrl_llm.learner import Learner
from jaxrl_llm.rewards import Scores
from sharding import mesh

PROMPTS, COMPLETIONS = make_rollouts()
LENGTHS = np.array([[5, 2], [7, 3], [1, 8], [4, 4]])
REWARDS = np.array([[1, 0], [0.5, 2], [0, 0], [1, 3]], np.float32)


def made(path, pack_length=None, **algorithm):
    """(rows, mean advantage of each response)."""
    config = make_config(path, pack_length=pack_length)
    config = config.model_copy(update={"algorithm": AlgorithmConfig(**algorithm)})
    on = mesh.make(
        dict(zip(("data", "fsdp", "tensor"), EIGHT, strict=True)), jax.devices()
    )
    learner = Learner(config, models.open(path), on)
    unjudged = np.where(np.arange(P)[:, None] == 2, np.nan, REWARDS)
    scores = Scores(total=REWARDS, by_function={"exact": unjudged}, errors={})
    return estimate.make_rows(learner, PROMPTS, COMPLETIONS, scores)


def centred():
    return REWARDS - REWARDS.mean(axis=1, keepdims=True)


def whitened(x):
    """Each token counting once."""
    copies = np.repeat(x.ravel(), LENGTHS.ravel())
    return (x - copies.mean()) / copies.std(ddof=1)


def normalized():
    return centred() / (REWARDS.std(axis=1, ddof=1, keepdims=True) + 1e-6)


EXPECTED = {
    "grpo": normalized,
    "grpo_passk": lambda: np.where(centred() > 0, 2 * normalized(), 0),
    "gdpo": lambda: whitened(normalized()),
    "rloo": lambda: 2 * centred(),
    "opo": lambda: (
        REWARDS
        - (REWARDS * LENGTHS).sum(axis=1, keepdims=True)
        / LENGTHS.sum(axis=1, keepdims=True)
    ),
    "gpg": lambda: centred() * 8 / 5,
    "reinforce_plus_plus": lambda: whitened(REWARDS),
    "reinforce_plus_plus_baseline": lambda: whitened(centred()),
}


@pytest.mark.parametrize("estimator", EXPECTED)
def test_every_estimator_by_name(tiny_model, estimator):
    rows, means = made(tiny_model, adv_estimator=estimator)
    np.testing.assert_allclose(means, EXPECTED[estimator](), rtol=1e-5, atol=1e-6)
    assert rows.advantages.shape == rows.tokens.shape
    for s, expected in enumerate(means.ravel()):
        where = (rows.sequence_ids == s) & rows.response_mask
        assert where.sum() == LENGTHS.ravel()[s]
        np.testing.assert_allclose(
            rows.advantages[where], expected, rtol=1e-5, atol=1e-6
        )
    assert not rows.advantages[~rows.response_mask].any()


@pytest.mark.parametrize("pack_length", [None, 40])
def test_reinforce_plus_plus_discounts_per_token(tiny_model, pack_length):
    rows, means = made(
        tiny_model, pack_length, adv_estimator="reinforce_plus_plus", gamma=0.5
    )
    returns = [
        reward * 0.5 ** np.arange(length)[::-1]
        for reward, length in zip(REWARDS.ravel(), LENGTHS.ravel(), strict=True)
    ]
    every = np.concatenate(returns)
    for s, expected in enumerate(returns):
        expected = (expected - every.mean()) / every.std(ddof=1)
        where = (rows.sequence_ids == s) & rows.response_mask
        np.testing.assert_allclose(rows.advantages[where], expected, rtol=1e-4)
        np.testing.assert_allclose(means.ravel()[s], expected.mean(), rtol=1e-4)


def test_what_a_run_does_not_have_is_not_estimated(tiny_model):
    # The configuration refuses it first.
    with pytest.raises(ConfigError, match="gae needs more than this"):
        made(tiny_model, adv_estimator="gae")
