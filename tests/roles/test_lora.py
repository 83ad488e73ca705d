"""Roles that train adapters beside a base that stays, on one device and on eight."""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixed_rollouts import ADVANTAGES, EIGHT, ONE, make_config, make_rollouts

from jaxrl_llm import models
from jaxrl_llm.sharding import mesh
from jaxrl_llm.training import fitting
from jaxrl_llm.training.roles import actor_of, critic_of, shared

LORA = {"rank": 4, "alpha": 8.0}
TERMS = {"use_kl_loss": True, "kl_loss_coef": 0.5, "lora": LORA}


@functools.cache
def learner(path, sizes=ONE, rank=4, quantization=None, **actor):
    axes = dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))
    on = mesh.make(axes, jax.devices()[: math.prod(sizes)])
    own = {"lora": LORA | {"rank": rank, "quantization": quantization}}
    config = make_config(path, **TERMS | own | actor)
    return actor_of(config, shared(config, models.open(path)), on)


@functools.cache
def step(path, sizes=ONE, **actor):
    """Weights and metrics after two training steps on the same rollouts."""
    made = learner(path, sizes, **actor)
    state = made.start()
    for _ in range(2):
        rows = made.make_rows(*make_rollouts(), ADVANTAGES)
        state, metrics = made.update(state, rows, seed=3)
    assert jax.tree.map(lambda x: x.sharding, state) == made.state_shardings()
    del metrics["perf/token_efficiency"]
    return jax.device_get((state.params, made.weights(state.params))), metrics


def assert_same(one, other):
    chex.assert_trees_all_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_adapters_alone_learn(tiny_model):
    (adapters, weights), metrics = step(tiny_model)
    before = jax.device_get(learner(tiny_model).read_weights("float32"))
    assert list(adapters) == ["layers"] and list(adapters["layers"]) == ["lora"]
    for (path, new), old in zip(
        jax.tree.leaves_with_path(weights), jax.tree.leaves(before), strict=True
    ):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        moves = name.removeprefix("layers.") in models.lora.MODULES
        assert moves != np.array_equal(new, old), name
    # The policy is no longer the reference, which is the base.
    assert metrics["actor/kl_loss"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [EIGHT, (1, 4, 2), (1, 8, 1)])
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_eight_devices_change_nothing(tiny_model, sizes, quantization):
    how = {"rank": 8, "quantization": quantization}
    assert_same(
        step(tiny_model, sizes, micro_batch_size=sizes[0] * sizes[1], **how),
        step(tiny_model, **how),
    )


@pytest.mark.parametrize(
    ("rank", "split"),
    [(8, True), (6, False)],  # over four devices
)
def test_fsdp_splits_both_halves_of_an_adapter_and_their_moments(
    tiny_model, rank, split
):
    made = learner(tiny_model, (1, 4, 2), rank)
    state = made.abstract_state()
    wanted = {}
    for name, pair in state.params["layers"]["lora"].items():
        for end, x in pair.items():
            wanted[name, end] = math.prod(x.sharding.shard_shape(x.shape)) / x.size
    halves = {
        "q": "b",
        "k": "b",
        "v": "b",
        "gate": "b",
        "up": "b",
        "o": "a",
        "down": "a",
    }
    for (name, end), part in wanted.items():
        other = end == halves[name]  # the half that has no axis "embed"
        by = {True: 4, False: 1}[not other or split] * (2 if other else 1)
        assert part == 1 / by, (name, end)
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert [x.sharding for x in moments] == 2 * [
        x.sharding for x in jax.tree.leaves(state.params)
    ]


@pytest.mark.slow
def test_an_int8_base_is_shared_and_trains_as_its_numbers_do(tiny_model):
    made = learner(tiny_model, quantization="int8")
    layers, rows = made.frozen["layers"], made.make_rows(*make_rollouts(), ADVANTAGES)
    assert layers["q"].dtype == layers["down"].dtype == jnp.int8
    chex.assert_trees_all_equal_shapes_and_dtypes(made.abstract_frozen(), made.frozen)
    held = jax.tree.leaves((made.reference.frozen, made.reference.initial))
    base = jax.tree.leaves(made.frozen)
    assert all(one is other for one, other in zip(held, base, strict=True))
    # Of what layers hold, in bfloat16, not much more than half is left.
    sizes = []
    for form in (None, "int8"):
        one = learner(tiny_model, quantization=form, dtype="bfloat16")
        sizes.append(fitting.bytes_of(one.abstract_frozen()["layers"]))
    assert 0.5 < sizes[1] / sizes[0] < 0.6
    numbers = models.plain(made.frozen, jnp.float32)

    class Numbers:
        arch = made.arch

        def load(self, *, dtype=jnp.float32, shardings=None):
            return jax.tree.map(lambda x: x.astype(dtype), numbers)

    config = make_config(tiny_model, **TERMS)
    on = mesh.make(dict.fromkeys(("data", "fsdp", "tensor"), 1), jax.devices()[:1])
    plain = actor_of(config, shared(config, Numbers()), on)
    found = []
    for one in (made, plain):
        state = one.start()
        scored = one.with_logprobs(state.params, rows).ref_logprobs
        for _ in range(2):
            state, metrics = one.update(state, rows, seed=3)
        weights = one.weights(state.params)
        chex.assert_trees_all_equal_shapes_and_dtypes(one.abstract_weights(), weights)
        found.append(jax.device_get((state.params, weights, scored)) + (metrics,))
    assert_same(*found)


@pytest.mark.slow
@pytest.mark.parametrize(
    "actor",
    [
        {"pack_length": 32, "micro_batch_size": 2, "remat": "dots"},
        {"micro_batch_size": 3, "remat": "full"},
        {"pack_length": 32, "share_prompts": True, "remat": "offload"},
    ],
    ids=str,
)
def test_micro_batches_packing_and_remat_change_nothing(tiny_model, actor):
    assert_same(step(tiny_model, **actor), step(tiny_model))


def test_the_reference_is_the_base_itself_with_adapters_off(tiny_model):
    made = learner(tiny_model)
    rows = made.make_rows(*make_rollouts(), ADVANTAGES)
    before = made.start()
    found = made.with_logprobs(before.params, rows).ref_logprobs
    whole = models.merge(before.params, made.frozen)
    np.testing.assert_array_equal(found, made.policy.score(whole, rows))
    held = jax.tree.leaves((made.reference.frozen, made.reference.initial))
    base = jax.tree.leaves(made.frozen)
    assert all(one is other for one, other in zip(held, base, strict=True))
    sizes = fitting.frozen(made, None)
    assert sizes["actor"]["frozen weights"] == fitting.bytes_of(made.frozen)
    assert sizes["reference"] == {"reference's frozen weights": 0}


@pytest.mark.slow
def test_a_base_is_read_in_the_compute_dtype_and_its_programs_are_known(tiny_model):
    made = learner(tiny_model, dtype="bfloat16", ppo_epochs=2)
    assert {x.dtype for x in jax.tree.leaves(made.frozen)} == {jnp.dtype(jnp.bfloat16)}
    state = made.start()
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.float32)}
    chex.assert_trees_all_equal_shapes_and_dtypes(made.abstract_frozen(), made.frozen)
    chex.assert_trees_all_equal_shapes_and_dtypes(made.abstract_state(), state)
    weights = made.weights(state.params)
    chex.assert_trees_all_equal_shapes_and_dtypes(made.abstract_weights(), weights)
    assert weights["embedding"] is made.frozen["embedding"]
    layouts = [
        [x.sharding for x in jax.tree.leaves(tree)]
        for tree in (weights, made.abstract_weights())
    ]
    assert layouts[0] == layouts[1]
    names = {name.split(" [")[0] for name in made.programs()}
    assert names == {
        "update", "old log-probabilities", "reference", "adapters added to the weights",
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_critic_has_adapters_and_a_head_beside_the_policys_base(
    tiny_model, quantization
):
    own = LORA | {"quantization": quantization}

    def both(sizes):
        axes = dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))
        on = mesh.make(axes, jax.devices()[: math.prod(sizes)])
        config = make_config(tiny_model, lora=own, dtype="float32").model_dump()
        config["algorithm"]["adv_estimator"] = "gae"
        config["critic"] |= {
            "lora": own,
            "dtype": "float32",
            "optim": {"lr": 0.05, "eps": 0.01},
        }
        config = type(make_config(tiny_model)).model_validate(config)
        source = shared(config, models.open(tiny_model))
        actor, critic = actor_of(config, source, on), critic_of(config, source, on)
        rows = actor.make_rows(*make_rollouts(), ADVANTAGES)
        state = critic.start()
        values = critic.judge(state.params, rows)
        assert not values.any()
        known = {"values": values, "returns": rows.advantages}
        rows = dataclasses.replace(rows, **known)
        for _ in range(2):
            state, metrics = critic.update(state, rows, 3)
        sizes = fitting.frozen(actor, critic)
        assert sizes["critic"] == {"critic's frozen weights": 0}
        base = actor.frozen
        assert critic.frozen["decoder"]["layers"]["q"] is base["layers"]["q"]
        assert "output" in base and "output" not in critic.frozen["decoder"]
        names = {*state.params, *state.params["decoder"]["layers"]}
        assert names == {"decoder", "weight", "bias", "lora"}
        return jax.device_get((state.params, critic.judge(state.params, rows)))

    one, eight = both(ONE), both(EIGHT)
    assert np.abs(one[1]).max() > 1e-3
    assert_same(one, eight)
