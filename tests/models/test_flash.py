"""Every attention equals the reference, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models import partitioning as parallel
from jaxrl_llm.models.attention import flash
from jaxrl_llm.models.attention import packed as attention
from jaxrl_llm.sharding import mesh, rules

# Row 0: three sequences of 100, 60, 300 and padding; row 1 is one sequence.
LENGTHS = [[100, 60, 300, 52], [512]]
IDS = jnp.array([np.repeat([0, 1, 2, -1], LENGTHS[0]), np.full(512, 3)], jnp.int32)
POSITIONS = jnp.array(
    [np.concatenate([np.arange(n) for n in row]) for row in LENGTHS], jnp.int32
)
REAL = (IDS >= 0)[:, :, None, None]


def inputs(heads=4, kv_heads=2, size=64, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    counts = (heads, kv_heads, kv_heads)
    return [
        jax.random.normal(key, (2, 512, n, size)).astype(dtype)
        for key, n in zip(keys, counts, strict=True)
    ]


def value_and_grads(attend, arrays, **how):
    def loss(*arrays):
        out = attend(*arrays, IDS, POSITIONS, scale=0.1, **how)
        out = jnp.where(REAL, out.astype(jnp.float32), 0.0)
        return jnp.sum(jnp.sin(out)), out

    (_, out), grads = jax.jit(
        jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    )(*arrays)
    return [np.asarray(x, np.float32) for x in (out, *grads)]


def test_segments_by_hand():
    ids = jnp.array([[4, 4, 4, 7, -1, -1], [0, 0, 0, 0, 0, 0]])
    starts, lengths = flash._segments(ids, 4)
    np.testing.assert_array_equal(starts, [[0, 3, 4, -1], [0, -1, -1, -1]])
    np.testing.assert_array_equal(lengths, [[3, 1, 2, -1], [6, -1, -1, -1]])


@pytest.mark.parametrize("window, softcap", [(None, None), (40, None), (None, 5.0)])
def test_splash_attention_equals_the_reference(window, softcap):
    devices = mesh.make({"data": 2, "fsdp": 1, "tensor": 2}, jax.devices()[:4])
    how = {"window": window, "softcap": softcap}
    kernel = functools.partial(flash.splash, interpret=True)
    kernel = parallel.across(rules.Partition(devices, rules.TRAIN), kernel)
    got = value_and_grads(kernel, inputs(), **how)
    expected = value_and_grads(attention.packed, inputs(), **how)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())


def test_the_platform_chooses():
    on = rules.Partition(mesh.make({"data": 8}), rules.TRAIN)
    assert flash.choose(on, jnp.bfloat16, 2) is attention.packed


@pytest.mark.accelerator
@pytest.mark.parametrize(
    "window, softcap, size",
    [(None, None, 64), (None, None, 128), (40, None, 128), (None, 5.0, 64)],
)
def test_cudnn_equals_the_reference_in_float32_as_well_as_bfloat16_can(
    window, softcap, size
):
    how = {"window": window, "softcap": softcap}
    rounded = inputs(size=size, dtype=jnp.bfloat16)
    exact = [x.astype(jnp.float32) for x in rounded]
    expected = value_and_grads(attention.packed, exact, **how)
    plain = value_and_grads(attention.packed, rounded, **how)
    kernel = functools.partial(flash.cudnn, max_sequences=4)
    got = value_and_grads(kernel, rounded, **how)
    for a, b, c in zip(got, plain, expected, strict=True):
        error = np.abs(a - c).max()
        assert error <= max(2 * np.abs(b - c).max(), 1e-2 * np.abs(c).max())
