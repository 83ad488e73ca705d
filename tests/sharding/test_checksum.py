import jax
import jax.numpy as jnp
import layouts
import numpy as np
import pytest
from layouts import JOIN, filled, seven_layers

from jaxrl_llm.sharding import checksum, reshard
from jaxrl_llm.sharding import transfer_plan as plan


def by_hand(bits):
    """Two sums of 32-bit words mixed with their index, one element at a time."""

    def mix(x):
        x = (x ^ (x >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
        x = (x ^ (x >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
        return x ^ (x >> 16)

    return [
        sum(mix(int(b) ^ mix(i + seed & 0xFFFFFFFF)) for i, b in enumerate(bits))
        & 0xFFFFFFFF
        for seed in (0x9E3779B9, 0x7F4A7C15)
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "uint32", "bool"])
def test_a_checksum_is_the_sum_of_mixed_words(dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 5)) * 9).astype(dtype)
    words = np.asarray(x).view(f"uint{8 * x.dtype.itemsize}").astype(np.uint64)
    assert checksum.of(x).tolist() == by_hand(words.ravel())
    per_row = checksum.of(x, batch_dims=1).tolist()
    assert per_row == [by_hand(row.ravel()) for row in words]


@pytest.mark.parametrize("name", layouts.same_devices())
def test_a_layout_does_not_change_a_checksum(name):
    x = jnp.arange(24 * 48.0).reshape(24, 48)
    there = jax.device_put(x, layouts.same_devices()[name])
    assert jax.jit(checksum.of)(there).tolist() == checksum.of(x).tolist()


@pytest.fixture(scope="module")
def transfer():
    source, target = seven_layers()
    params = filled(source)
    made = plan.plan(source, target, join=JOIN)
    return params, made, reshard.reshard(params, made)


def test_a_good_transfer_passes(transfer):
    params, made, moved = transfer
    checksum.verify(moved, made, checksum.expected(params, made))


def test_a_transfer_to_other_devices_passes():
    source = {"w": jax.device_put(jnp.arange(24 * 48.0).reshape(24, 48),
                                  layouts.other_devices()["first two"])}  # fmt: skip
    wanted = jax.ShapeDtypeStruct(
        (24, 48), jnp.float32, sharding=layouts.other_devices()["last four"]
    )
    made = plan.plan(source, {"w": wanted})
    moved = reshard.reshard(source, made)
    checksum.verify(moved, made, checksum.expected(source, made))


def swap_rows(x):
    return x.at[0].set(x[1]).at[1].set(x[0])


def flip_one_bit(x):
    bits = jax.lax.bitcast_convert_type(x, jnp.uint16)
    return jax.lax.bitcast_convert_type(bits.at[3, 5].set(bits[3, 5] ^ 1), x.dtype)


@pytest.mark.parametrize("damage", [swap_rows, flip_one_bit, jnp.zeros_like])
def test_damage_is_found_and_named(transfer, damage):
    params, made, moved = transfer
    layers = dict(moved["layers"])
    x = layers[4]["gate_up"]
    layers[4] = layers[4] | {"gate_up": jax.device_put(damage(x), x.sharding)}
    before = checksum.expected(params, made)
    with pytest.raises(checksum.TransferError, match=r"\['layers.4.gate_up'\]"):
        checksum.verify(moved | {"layers": layers}, made, before)


def test_layers_in_the_wrong_order_are_found(transfer):
    params, made, moved = transfer
    layers = moved["layers"] | {2: moved["layers"][3], 3: moved["layers"][2]}
    before = checksum.expected(params, made)
    with pytest.raises(checksum.TransferError, match="layers.2.down.*layers.3.down"):
        checksum.verify(moved | {"layers": layers}, made, before)
