"""Updates of models with experts: what spreads tokens over them; what stays fixed."""

import dataclasses
import math

import jax
import numpy as np
import optax
import pytest
import tiny
from fixed_rollouts import ADVANTAGES, make_config, make_rollouts

from jaxrl_llm import models
from jaxrl_llm.algorithms.router_balance import auxiliary_loss
from jaxrl_llm.config.names import ConfigError
from jaxrl_llm.models import Moe, Rope
from jaxrl_llm.sharding import mesh
from jaxrl_llm.training.roles import actor_of


@pytest.fixture(scope="module")
def glm(tmp_path_factory):
    directory = tmp_path_factory.mktemp("experts") / "glm"
    return tiny.checkpoint(directory, **tiny.with_experts())


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    directory = tmp_path_factory.mktemp("experts") / "qwen"
    fields = tiny.with_experts(
        model_type="qwen3_moe",
        num_layers=2,
        rope=(Rope(theta=1e4),),
        moe=Moe(num_experts=8, top_k=3, expert_size=16, renormalise=True),
    )
    return tiny.checkpoint(directory, **fields)


def learner(path, axes=None, **actor):
    axes = {"data": 1, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1} | (axes or {})
    on = mesh.make(axes, jax.devices()[: math.prod(axes.values())])
    return actor_of(make_config(path, **actor), models.open(path), on)


@pytest.mark.slow
def test_a_selection_bias_stays_as_it_is(glm):
    made = learner(glm)
    before = made.start()
    layers = before.params["layers"]
    moe = layers["moe"] | {"selection_bias": layers["moe"]["selection_bias"] + 1.0}
    params = before.params | {"layers": layers | {"moe": moe}}
    wanted = jax.device_get(params)
    before = dataclasses.replace(before, params=params)
    rows = made.make_rows(*make_rollouts(), ADVANTAGES)
    after = jax.device_get(made.update(before, rows, seed=3)[0].params)
    for (path, x), y in zip(
        jax.tree.leaves_with_path(after), jax.tree.leaves(wanted), strict=True
    ):
        is_bias = "selection_bias" in jax.tree_util.keystr(path)
        assert np.array_equal(x, y) == is_bias, path


@pytest.mark.slow
def test_the_auxiliary_loss_is_of_the_whole_mini_batch_and_of_any_mesh(qwen):
    coef, nothing = 0.5, np.zeros_like(ADVANTAGES)
    whole = learner(qwen, router_aux_loss_coef=coef)
    rows = whole.make_rows(*make_rollouts(), nothing)
    state, wanted = whole.update(whole.start(), rows, seed=3)
    policy, params = whole.policy, whole.start().params

    @jax.jit
    @jax.value_and_grad
    def direct(params):
        return auxiliary_loss(
            policy.logprobs_and_use(params, policy.on_devices(rows))[1]
        )

    value, gradient = direct(params)
    # Without advantages nothing else has a gradient.
    np.testing.assert_allclose(wanted["actor/router_aux_loss"], value, rtol=1e-6)
    norm = coef * optax.tree.norm(gradient)
    np.testing.assert_allclose(wanted["actor/grad_norm"], norm, rtol=1e-5)
    assert norm > 0.01 and 3 <= value < 8 and 1 <= wanted["actor/expert_load_max"] < 8
    for axes, size in (({}, 2), ({"expert": 4, "tensor": 2}, None)):
        made = learner(qwen, axes, router_aux_loss_coef=coef, micro_batch_size=size)
        rows = made.make_rows(*make_rollouts(), nothing)
        other, found = made.update(made.start(), rows, seed=3)
        for name in ("router_aux_loss", "grad_norm", "expert_load_max"):
            name = f"actor/{name}"
            np.testing.assert_allclose(found[name], wanted[name], 1e-5, err_msg=name)
        for x, y in zip(
            jax.tree.leaves(other.params), jax.tree.leaves(state.params), strict=True
        ):
            np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.slow
def test_replayed_experts_are_those_of_before(glm):
    # Four updates a step; the policy before them is asked for its experts.
    how = {"ppo_mini_batch_size": 1, "optim": {"lr": 0.01}}
    made, off = (learner(glm, router_replay=x, **how) for x in ("R2", "off"))
    state, rows = made.start(), made.make_rows(*make_rollouts(), ADVANTAGES)
    whole = made.with_logprobs(state.params, rows)
    E, k = made.arch.moe.num_experts, made.arch.moe.top_k
    there = rows.sequence_ids >= 0
    assert whole.routes.shape == (*rows.tokens.shape, 2, k)
    assert whole.routes.dtype == np.uint8
    assert whole.routes[there].min() >= 1 and whole.routes[there].max() <= E

    # What the router would choose anyway changes no bit.
    policy, params = made.policy, state.params
    score = jax.jit(lambda params, rows: policy.logprobs_and_use(params, rows))
    alone, _ = score(params, policy.on_devices(rows))
    again, use = score(params, policy.on_devices(whole))
    np.testing.assert_array_equal(again.logprobs, alone.logprobs)
    assert float(use.agreeing.sum()) == float(use.count.sum()) == 2 * there.sum()
    # Other experts do, and gates stay those of the router, with a gradient.
    turned = dataclasses.replace(whole, routes=np.uint8(1 + whole.routes % E))
    other, use = score(params, policy.on_devices(turned))
    assert np.abs(other.logprobs - alone.logprobs).max() > 1e-3
    assert float(use.agreeing.sum()) < float(use.count.sum())
    gradient = jax.jit(
        jax.grad(
            lambda params: policy.logprobs(
                params, policy.on_devices(turned)
            ).logprobs.sum()
        )
    )(params)
    assert np.abs(gradient["layers"]["moe"]["router"]).max() > 1e-4

    _, found = made.update(made.start(), rows, seed=3)
    _, wanted = off.update(off.start(), rows, seed=3)
    # The first of four updates agrees; after it, routers would choose others.
    assert 0.25 < found["actor/route_agreement"] < 1
    assert found["actor/grad_norm"] != wanted["actor/grad_norm"]


def test_what_experts_cannot_do_yet_is_refused_by_its_key(tiny_model, glm):
    for path, said in ((tiny_model, "no experts"), (glm, "experts with a sigmoid")):
        with pytest.raises(ConfigError, match=f"router_aux_loss_coef is 0.1.*{said}"):
            learner(path, router_aux_loss_coef=0.1)
    with pytest.raises(ConfigError, match="actor.router_replay is R2.*no experts"):
        learner(tiny_model, router_replay="R2")
    with pytest.raises(ConfigError, match="actor.lora.modules has gate_proj, up_proj"):
        learner(glm, lora={"rank": 2})
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    made = learner(glm, lora={"rank": 2, "modules": attention})
    assert made.policy.settings.lora.modules == ("q", "k", "v", "o")
