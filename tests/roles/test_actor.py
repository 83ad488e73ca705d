"""The sharded update of the tiny model, against one device and against itself."""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fixed_rollouts import ADVANTAGES, EIGHT, ONE, make_config, make_rollouts
from observations import anew, part

from jaxrl_llm import models
from jaxrl_llm.algorithms import grpo, logprobs, masked, statistics
from jaxrl_llm.config import plugins
from jaxrl_llm.data import packing
from jaxrl_llm.models import layer_loop as loop
from jaxrl_llm.roles.actor import Actor
from jaxrl_llm.roles.policy import Policy
from jaxrl_llm.sharding import mesh
from jaxrl_llm.training import settings
from jaxrl_llm.training.checkpoint import Checkpoints
from jaxrl_llm.training.roles import actor_of


@functools.cache
def learner(path, sizes=ONE, **actor):
    axes = dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))
    on = mesh.make(axes, jax.devices()[: math.prod(sizes)])
    return actor_of(make_config(path, **actor), models.open(path), on)


@functools.cache
def step(path, sizes=ONE, updates=1, **actor):
    """State and metrics after training steps on the same rollouts."""
    made = learner(path, sizes, **actor)
    state = made.start()
    for _ in range(updates):
        rows = made.make_rows(*make_rollouts(), ADVANTAGES)
        state, metrics = made.update(state, rows, seed=3)
    return jax.device_get(state), metrics


def assert_same(one, other, rtol=1e-5):
    (state, metrics), (others, other_metrics) = one, other
    # How much of the rows is padding is all that may differ.
    metrics, other_metrics = (
        {k: v for k, v in x.items() if k != "perf/token_efficiency"}
        for x in (metrics, other_metrics)
    )
    chex.assert_trees_all_close(
        (state.params, metrics), (others.params, other_metrics), rtol=rtol, atol=1e-6
    )


ALL_TERMS = {"entropy_coeff": 0.1, "use_kl_loss": True, "kl_loss_coef": 0.5}


def test_an_update_moves_every_weight(tiny_model):
    before = learner(tiny_model, ONE, **ALL_TERMS).start().params
    state, metrics = step(tiny_model, **ALL_TERMS)
    for (path, new), old in zip(
        jax.tree.leaves_with_path(state.params), jax.tree.leaves(before), strict=True
    ):
        assert not np.allclose(new, old, rtol=1e-4, atol=0), path
    assert state.step == 1 and metrics["actor/lr"] == 0.05


def test_eight_devices_change_nothing(tiny_model):
    got = step(tiny_model, EIGHT, micro_batch_size=4, **ALL_TERMS)
    assert_same(got, step(tiny_model, **ALL_TERMS))


def of_whole_responses(
    logprobs, advantages, mask, sequence_ids, num_sequences, clip_ratio_high, *, power
):
    """A loss of a user's own, that looks at whole responses: their mean log-probability
    to a power, from below bounded by a number of the configuration."""
    where = mask, sequence_ids, num_sequences
    mean = masked.sequence_average(logprobs, *where)
    return -advantages * jnp.maximum(mean + 6.0, clip_ratio_high) ** power


def test_a_loss_of_ones_own_has_one_gradient_on_any_devices(tiny_model):
    """By SGD of rate 1, which is a function of a user's choice too, so that weights
    change by the gradient."""
    own = {"loss_mode": plugins.offer(of_whole_responses), "params": {"power": 2.0}}
    sgd = {"name": "optax:sgd", "lr": 1.0, "clip_grad": 1e9}

    def gradient(sizes, **actor):
        actor |= {"policy_loss": own, "optim": sgd, "clip_ratio_high": 0.3}
        made = learner.__wrapped__(tiny_model, sizes, **actor)
        before = jax.device_get(made.start().params)
        rows = made.make_rows(*make_rollouts(), ADVANTAGES)
        state, metrics = made.update(made.start(), rows, seed=3)
        after = jax.device_get(state.params)
        return jax.tree.map(np.subtract, before, after), metrics

    (one, metrics), (eight, _) = gradient(ONE), gradient(EIGHT, micro_batch_size=4)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(one))
    chex.assert_trees_all_close(eight, one, rtol=1e-5, atol=1e-6 * largest)
    norm = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(one)))
    np.testing.assert_allclose(metrics["actor/grad_norm"], norm, rtol=1e-3)


def test_weights_and_moments_stay_split(tiny_model):
    made = learner(tiny_model, EIGHT, micro_batch_size=4, **ALL_TERMS)
    wanted = made.state_shardings()
    state = made.start()
    assert jax.tree.map(lambda x: x.sharding, state) == wanted
    rows = made.make_rows(*make_rollouts(), ADVANTAGES)
    state, _ = made.update(state, rows, seed=3)
    assert jax.tree.map(lambda x: x.sharding, state) == wanted
    abstract = made.abstract_state()
    chex.assert_trees_all_equal_shapes_and_dtypes(state, abstract)
    assert jax.tree.map(lambda x: x.sharding, abstract) == wanted
    # 8 devices hold each moment once on either side of "data".
    mu = max(jax.tree.leaves(state.opt_state), key=lambda x: x.size)
    assert mu.addressable_shards[0].data.size == mu.size // 4


@pytest.mark.parametrize(
    "actor",
    [
        # Micro-batches of three are in test_grpo.
        pytest.param({"micro_batch_size": 3, "remat": "full"}, marks=pytest.mark.slow),
        {"pack_length": 32, "remat": "dots", "unroll": "always"},
        {
            "pack_length": 32,
            "share_prompts": True,
            "micro_batch_size": 2,
            "remat": "offload",
        },
    ],
    ids=str,
)
def test_micro_batches_packing_and_remat_change_nothing(tiny_model, actor):
    got = step(tiny_model, **actor, **ALL_TERMS)
    assert_same(got, step(tiny_model, **ALL_TERMS))


@pytest.mark.slow  # their gradient is in test_logprobs
def test_kept_probabilities_change_nothing(tiny_model):
    got = step(tiny_model, EIGHT, micro_batch_size=4, keep_probabilities=True)
    assert_same(got, step(tiny_model))


def test_kept_probabilities_are_not_for_an_entropy_bonus(tiny_model):
    with pytest.raises(ValueError, match="entropy_coeff is 0.1, whose gradient needs"):
        make_config(tiny_model, keep_probabilities=True, entropy_coeff=0.1)


def test_kept_probabilities_are_not_for_capped_logits(tiny_model):
    config = make_config(tiny_model, keep_probabilities=True)
    capped = dataclasses.replace(models.open(tiny_model).arch, logit_softcap=30.0)
    one = mesh.make({"data": 1}, jax.devices()[:1])
    with pytest.raises(
        ValueError, match="actor.keep_probabilities is true, .* caps its logits"
    ):
        Policy(capped, one, settings.policy(config), keys=settings.keys("actor.mesh"))


@pytest.mark.slow  # the gradients of both loops are in test_layer_loop
@pytest.mark.parametrize(
    "over, sizes",
    [
        (loop.in_place, ONE),
        (loop.in_place, EIGHT),
        (loop.unrolled, EIGHT),
    ],
)
def test_a_gpus_loops_change_nothing(tiny_model, monkeypatch, over, sizes):
    monkeypatch.setattr(models, "choose_loop", lambda *_: over)
    made = learner.__wrapped__(
        tiny_model, sizes, micro_batch_size=4, remat="dots", **ALL_TERMS
    )
    rows = made.make_rows(*make_rollouts(), ADVANTAGES)
    state, metrics = made.update(made.start(), rows, seed=3)
    got = jax.device_get(state), metrics
    assert_same(got, step(tiny_model, **ALL_TERMS))


@pytest.mark.slow
def test_what_waits_on_the_host_changes_nothing(tiny_model, tmp_path):
    here = {"micro_batch_size": 4, **ALL_TERMS}
    away = {"offload": ("optimizer", "reference"), **here}
    got = step(tiny_model, EIGHT, updates=2, **away)
    assert_same(got, step(tiny_model, EIGHT, updates=2, **here), rtol=0)
    made = learner(tiny_model, EIGHT, **away)
    rows = made.make_rows(*make_rollouts(), ADVANTAGES)
    state, _ = made.update(made.start(), rows, seed=3)
    away = jax.tree.leaves((state.opt_state, made.reference.initial))
    assert {x.sharding.memory_kind for x in away} == {"pinned_host"}
    here = jax.tree.leaves(state.params)
    assert {x.sharding.memory_kind for x in here} == {"device"}
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(1, state, {}, None)
        checkpoints.wait()
        restored = checkpoints.restore(made.abstract_state()).state
    chex.assert_trees_all_equal(state, restored)


@pytest.mark.slow
def test_a_frozen_half_stays_and_the_other_learns_as_if_all_did(tiny_model):
    whole = learner(tiny_model, EIGHT, micro_batch_size=4, **ALL_TERMS)
    before = jax.device_get(whole.start().params)  # in float32, as is computed

    def trained(is_trained):
        # Not AdamW: its clipping would look at the norm of all that is trained.
        made = Actor(
            whole.policy,
            models.open(tiny_model),
            whole.settings,
            optimizer=optax.sgd(0.1, momentum=0.9),
            schedule=optax.constant_schedule(0.1),
            reference=whole.reference,
            is_trained=is_trained,
        )
        rows = made.make_rows(*make_rollouts(), ADVANTAGES)
        state, metrics = made.update(made.start(), rows, seed=3)
        assert jax.tree.map(lambda x: x.sharding, state) == made.state_shardings()
        return state, jax.device_get(made.weights(state.params)), metrics

    def in_half(name):
        return name in ("layers.q", "layers.down", "norm.scale", "output")

    (_, all_new, metrics), (state, new, found) = trained(None), trained(in_half)
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert len(moments) == len(jax.tree.leaves(state.params)) == 4
    moved, _ = models.split_params(all_new, in_half)
    _, stays = models.split_params(before, in_half)
    chex.assert_trees_all_close(new, models.merge(moved, stays), rtol=1e-5, atol=1e-6)
    assert found["actor/loss"] == pytest.approx(metrics["actor/loss"], rel=1e-5)


def test_steps_of_any_lengths_are_one_compiled_update(tiny_model, monkeypatch):
    # Two at most: rows of up to 4, or of up to 8 sequences.
    chex.clear_trace_counter()
    monkeypatch.setattr(grpo, "update", chex.assert_max_traces(grpo.update, n=2))
    made = learner.__wrapped__(tiny_model, pack_length=32, micro_batch_size=1)
    prompts, episodes = make_rollouts()
    state = made.start()
    for cut in range(1, 6):
        shorter = [
            [
                dataclasses.replace(
                    episode, turns=tuple(part(turn, 0, cut) for turn in episode.turns)
                )
                for episode in group
            ]
            for group in episodes
        ]
        rows = made.make_rows(prompts, shorter, ADVANTAGES)
        assert rows.tokens.shape == (4, 32)  # 2 of 16 tokens fit a row at worst
        state, _ = made.update(state, rows, seed=3)


def test_the_host_has_its_time_between_dispatch_and_wait(tiny_model, monkeypatch):
    made, events = learner(tiny_model), []

    def noted(event, real):
        return lambda *given: events.append(event) or real(*given)

    monkeypatch.setattr(made._trained, "_step", noted("sent", made._trained._step))
    monkeypatch.setattr(statistics, "join", noted("waited", statistics.join))
    rows = made.make_rows(*make_rollouts(), ADVANTAGES)
    made.update(made.start(), rows, 3, lambda: events.append("meanwhile"))
    assert events == ["sent", "meanwhile", "waited"]


def test_the_policy_is_scored_anew_only_if_the_update_cannot_do_it(
    tiny_model, monkeypatch
):
    def scored(**actor):
        made, asked = learner(tiny_model, **actor), []
        monkeypatch.setattr(made.policy, "_score", lambda *x: asked.append(x) or SCORED)
        made.with_logprobs(None, made.make_rows(*make_rollouts(), ADVANTAGES))
        return len(asked)

    SCORED = logprobs.Logprobs(jnp.zeros((8, 16)), jnp.zeros((8, 16)))
    assert scored() == 0 and scored(ppo_epochs=2) == 1


@pytest.mark.slow
def test_each_rematerialisation_keeps_less(tiny_model):
    def temporary_bytes(remat):
        made = learner(tiny_model, remat=remat)
        memory = made.compile_update(made.largest_rows()).memory_analysis()
        return memory.temp_size_in_bytes

    none, dots, full = map(temporary_bytes, ("none", "dots", "full"))
    assert none > dots > full


SEVERAL = {"ppo_mini_batch_size": 2, "ppo_epochs": 2}


@pytest.mark.parametrize(
    "share_prompts", [pytest.param(False, marks=pytest.mark.slow), True]
)
def test_mini_batches_are_the_same_in_any_layout(tiny_model, share_prompts):
    layout = {"pack_length": 32, "share_prompts": share_prompts}
    got = step(tiny_model, micro_batch_size=1, **layout, **SEVERAL)
    wanted = step(tiny_model, **SEVERAL)
    assert got[0].step == 4
    assert_same(got, wanted, rtol=1e-4)  # four updates


def test_the_reference_is_where_training_began(tiny_model):
    _, metrics = step(tiny_model, **ALL_TERMS)
    assert abs(metrics["actor/kl_loss"]) < 1e-9
    _, metrics = step(tiny_model, updates=2, **ALL_TERMS)
    assert metrics["actor/kl_loss"] > 1e-4


def test_the_ratio_is_one_in_the_first_of_several_updates(tiny_model, monkeypatch):
    made = learner(tiny_model, ONE, **SEVERAL)
    seen, update = [], made._trained._step

    def watched(state, rows, frozen):
        state, metrics = update(state, rows, frozen)
        seen.append(jax.device_get(metrics))
        return state, metrics

    monkeypatch.setattr(made._trained, "_step", watched)
    rows = made.make_rows(*make_rollouts(), ADVANTAGES)
    _, means = made.update(made.start(), rows, seed=3)
    drift = [abs(float(metrics["actor/ppo_kl"])) for metrics in seen]
    config = make_config(tiny_model, **SEVERAL)
    assert len(drift) == settings.updates_per_step(config) == 4
    assert drift[0] < 1e-6 and min(drift[1:]) > 1e-4
    assert float(seen[0]["actor/pg_clipfrac"]) == 0
    tokens = [metrics["actor/ppo_kl"].over for metrics in seen]
    wanted = np.average([float(m["actor/ppo_kl"]) for m in seen], weights=tokens)
    np.testing.assert_allclose(means["actor/ppo_kl"], wanted, rtol=1e-6)
    joined = statistics.join(seen)
    assert {name: means[name] for name in joined} == pytest.approx(joined)


def test_the_order_of_prompts_in_mini_batches_is_the_seeds(tiny_model):
    made = learner(tiny_model, ONE, **SEVERAL)
    rows = made.make_rows(*make_rollouts(), ADVANTAGES)
    one, same, other = (
        jax.device_get(made.update(made.start(), rows, seed=s)[0]) for s in (3, 3, 4)
    )
    chex.assert_trees_all_equal(one.params, same.params)
    with pytest.raises(AssertionError, match="not equal"):
        chex.assert_trees_all_equal(same.params, other.params)


@pytest.mark.parametrize(
    "batch, mini, epochs, updates",
    [(8, None, 1, 1), (8, 8, 2, 2), (8, 3, 1, 3), (8, 4, 3, 6)],
)
def test_updates_per_step(tiny_model, batch, mini, epochs, updates):
    config = make_config(tiny_model, ppo_mini_batch_size=None, ppo_epochs=epochs)
    data = config.data.model_copy(update={"train_batch_size": batch})
    actor = config.actor.model_copy(update={"ppo_mini_batch_size": mini})
    config = config.model_copy(update={"data": data, "actor": actor})
    assert settings.updates_per_step(config) == updates


def test_a_context_is_scored_as_if_it_were_a_prompt_and_its_response(tiny_model):
    prompts, episodes = make_rollouts()
    forked = [[anew(episode) for episode in group] for group in episodes]
    whole = learner(tiny_model, pack_length=64)
    contexts = max(e.num_contexts for group in forked for e in group)
    layout = dataclasses.replace(whole.policy.layout, contexts=contexts)
    how = dataclasses.replace(whole.policy.settings, rows=layout)
    policy = Policy(whole.policy.arch, whole.policy.mesh, how)
    params = whole.start().params
    layout = dataclasses.replace(policy.layout, most_sequences=20)
    zeros = np.zeros((4, 2), np.float32)
    rows = packing.make_rows(prompts, forked, zeros, layout=layout)
    scored = policy.score(params, rows)
    # Each context by itself: what it begins with is a prompt.
    parts = []
    for prompt, group in zip(prompts, forked, strict=True):
        for episode in group:
            before, turns = prompt.tokens, ()
            for turn in (*episode.turns, None):
                if turn is None or turn.new_context:
                    if turns:
                        alone = dataclasses.replace(
                            episode, turns=turns, opening_tokens=before
                        )
                        parts.append((prompt, alone))
                    before, turns = turn and tuple(turn.tokens.tolist()), ()
                else:
                    turns = (*turns, turn)
    assert len(parts) > 12
    one_by_one = packing.make_rows(
        [prompt for prompt, _ in parts],
        [[dataclasses.replace(e, sample=0)] for _, e in parts],
        np.zeros((len(parts), 1), np.float32),
        layout=layout,
    )
    alone = policy.score(params, one_by_one)

    def sampled(rows, found):
        where = rows.response_mask
        order = np.argsort(rows.sequence_ids[where], kind="stable")
        return np.asarray(found)[where][order]

    np.testing.assert_allclose(
        sampled(rows, scored), sampled(one_by_one, alone), atol=2e-6
    )
    # Not so behind all that was said before.
    kept = packing.make_rows(prompts, episodes, zeros, layout=layout)
    behind = sampled(kept, policy.score(params, kept))
    assert np.abs(behind - sampled(one_by_one, alone)).max() > 1e-2
