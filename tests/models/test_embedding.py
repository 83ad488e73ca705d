"""The gradient of token embeddings: exact, and summed in an order that stays."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxrl_llm import models
from jaxrl_llm.models.decoder import take
from jaxrl_llm.models.embedding import in_order, ordered_sum
from jaxrl_llm.sharding import mesh as meshes

summed = jax.jit(ordered_sum, static_argnums=2)


def test_sums_are_those_of_numpy_in_float64():
    rng = np.random.default_rng(0)
    ids = rng.integers(-2, 9, 300)
    x = rng.normal(size=(300, 5)) * np.exp(rng.normal(size=(300, 1)) * 3)
    wanted = np.zeros((7, 5))
    kept = (ids >= 0) & (ids < 7)  # others belong to other devices
    np.add.at(wanted, ids[kept], x[kept].astype(np.float32))
    found = summed(jnp.float32(x), ids, 7)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-3)


def test_no_id_at_all():
    found = summed(jnp.ones((4, 2)), jnp.full(4, 9), 3)
    np.testing.assert_array_equal(found, np.zeros((3, 2)))


def test_a_sum_depends_on_nothing_but_its_own_rows():
    """A long sum of numbers that cancel shows every change of the order."""
    rng = np.random.default_rng(1)
    x = jnp.float32(rng.normal(size=(512, 3)) * 10.0 ** rng.integers(-6, 6, (512, 1)))
    alone = summed(x, jnp.zeros(512, int), 1)
    again = summed(x, jnp.full(512, 4), 9)
    np.testing.assert_array_equal(alone[0], again[4])


MESHES = [
    {"data": 1},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"fsdp": 4, "context": 2},
]


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_gradients_on_meshes_are_those_of_a_plain_lookup(axes):
    arch = tiny.arch(vocab_size=48, hidden_size=16)
    mesh = meshes.make(axes, jax.devices()[: math.prod(axes.values())])
    shapes = models.abstract_params(arch)
    partition = models.partition(arch, shapes, models.logical_axes(arch), mesh, {})
    layout = partition.sharding("vocab", "embed")
    keys = jax.random.split(jax.random.key(0), 3)
    table = jax.device_put(jax.random.normal(keys[0], (48, 16)), layout)
    tokens = jax.random.randint(keys[1], (8, 32), 0, 48)
    pulled = jax.random.normal(keys[2], (8, 32, 16), jnp.bfloat16)

    def gradient(lookup):
        def loss(table):
            x = lookup(table, tokens, jnp.bfloat16)
            x = partition.constrain(x, "looked_up", None, "embed")
            return jnp.sum((x * pulled).astype(jnp.float32))

        return jax.jit(jax.grad(loss))

    ours = gradient(lambda *args: in_order(partition, *args))
    chex.assert_trees_all_close(ours(table), gradient(take)(table), rtol=1e-5)
    assert ours(table).sharding.is_equivalent_to(layout, 2)
    # No two additions to one place: nothing waits for the memory.
    assert "scatter-add" not in str(jax.make_jaxpr(ours)(table))
    assert "scatter-add" in str(jax.make_jaxpr(gradient(take))(table))


@pytest.mark.accelerator
def test_gradients_are_the_same_bits_every_time():
    arch = tiny.arch(vocab_size=264, hidden_size=512)
    mesh = meshes.make({"data": 1}, jax.devices()[:1])
    shapes = models.abstract_params(arch)
    partition = models.partition(arch, shapes, models.logical_axes(arch), mesh, {})
    lookup = models.choose_lookup(partition)
    keys = jax.random.split(jax.random.key(0), 4)
    table = jax.random.normal(keys[0], (264, 512))
    tokens = jax.random.randint(keys[1], (16, 1024), 0, 264)
    spread = jnp.exp(3 * jax.random.normal(keys[2], (16, 1024, 1)))
    pulled = (spread * jax.random.normal(keys[3], (16, 1024, 512))).astype(jnp.bfloat16)

    @jax.jit
    def gradient(table):
        return jax.vjp(lambda t: lookup(t, tokens, jnp.bfloat16), table)[1](pulled)

    first = gradient(table)
    for _ in range(20):
        chex.assert_trees_all_equal(gradient(table), first)
