"""Numbers of 8 bits, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxrl_llm import models
from jaxrl_llm.models import quantised


def test_scale_is_the_largest_over_127():
    x = jnp.array([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]])
    values, scales = quantised.quantise(x, jnp.int8)
    np.testing.assert_array_equal(values, [[64, -127, 32], [0, 0, 0]])
    np.testing.assert_allclose(scales, [2 / 127, 0], rtol=1e-6)


def test_fp8_keeps_three_bits_after_the_first():
    values, scales = quantised.quantise(
        jnp.array([448.0, 17.0, 0.3]), jnp.float8_e4m3fn
    )
    np.testing.assert_array_equal(np.float32(values), [448, 16, 0.3125])
    assert scales == 1


@pytest.mark.parametrize("bits", ["int8", "fp8"])
def test_products_are_those_of_the_rounded_numbers(bits):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 4, 8)).astype(np.float32)
    w = rng.normal(size=(4, 8, 5)).astype(np.float32)
    values, scales = quantised.quantise(jnp.asarray(w), quantised.DTYPES[bits], (0, 1))
    got = quantised.product("btnh,nhd->btd", jnp.asarray(x), values, scales)
    if bits == "fp8":
        own = np.abs(x).max(axis=(2, 3), keepdims=True) / 448
        x = own * np.float32(jnp.asarray(x / own).astype(jnp.float8_e4m3fn))
    wanted = np.einsum("btnh,nhd->btd", x, np.float32(values) * np.asarray(scales))
    np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("bits, step", [("int8", 1 / 254), ("fp8", 1 / 16)])
def test_fused_matrices_are_near_what_they_were(bits, step):
    arch = tiny.arch()
    params = models.unstack(arch, models.init(arch, jax.random.key(0)), jnp.float32)
    whole = models.fuse(params["layers"][0])
    eight = models.fuse(params["layers"][0], bits)
    for name in ("qkv", "o", "gate_up", "down"):
        assert eight[name].dtype.itemsize == 1
        scale = np.asarray(eight[f"{name}_scale"])
        summed = {"o": (1, 2), "down": (1,)}.get(name, (0,))
        largest = np.abs(whole[name]).max(axis=summed, keepdims=True)
        scale = np.expand_dims(scale, summed)
        off = np.abs(np.float32(eight[name]) * scale - whole[name])
        assert (off <= 1.001 * step * largest).all() and off.max() > 0
    # What was int8 before stays as it is, and has the same numbers in any other form.
    before = quantised.matrices(params["layers"][0], bits)
    same = models.fuse(before, bits, dtype=jnp.float32)
    for name, x in eight.items():
        if not isinstance(x, dict):
            np.testing.assert_array_equal(np.float32(same[name]), np.float32(x))
    numbers = quantised.plain_matrices(before, jnp.float32)
    plain, wanted = models.fuse(before, dtype=jnp.float32), models.fuse(numbers)
    assert plain.keys() == wanted.keys()
    for name in ("qkv", "o", "gate_up", "down"):
        np.testing.assert_array_equal(plain[name], wanted[name])
    kept = set(whole) - {"qkv", "o", "gate_up", "down"}
    assert all((eight[name] is whole[name]) or name.endswith("norm") for name in kept)
