"""Attention over pages, against a plain loop in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models.attention import paged
from jaxrl_llm.models.attention import paged_kernels as kernels
from jaxrl_llm.models.quantised import DTYPES, Quantised
from jaxrl_llm.sharding import mesh


def case(B, T, N, K, S, n, H=16, turns=True):
    """Random queries, new keys and values, angles, caches, tables and positions: row 0
    is idle, row 1 at its last position, row 2 at its first."""
    rng = np.random.default_rng(B * T + N + S)
    q = rng.normal(size=(B, T, N, H)).astype(np.float32)
    k, v = rng.normal(size=(2, B, T, K, H)).astype(np.float32)
    keys, values = rng.normal(size=(2, K, B * n + 1, S, H)).astype(np.float32)
    tables = 1 + rng.permutation(B * n).reshape(B, n).astype(np.int32)
    first = rng.integers(0, n * S - T + 1, B)
    first[1:3] = n * S - T, 0
    positions = (first[:, None] + np.arange(T)).astype(np.int32)
    positions[0] = -1
    angles = rng.uniform(0, 6, (B, T, H // 2))
    rotary = (np.float32(np.cos(angles)), np.float32(np.sin(angles))) if turns else None
    return jax.tree.map(jnp.asarray, (q, k, v, rotary, keys, values, tables, positions))


def loop(q, k, v, rotary, keys, values, tables, positions, *, window, scale, softcap):
    """What the queries find, and the caches with what is new."""
    q, k, keys, values = (np.array(x, np.float64) for x in (q, k, keys, values))
    if rotary is not None:
        # Numbers (i, i + H / 2) of a head are a complex one.
        turn = (rotary[0] + 1j * rotary[1])[:, :, None]
        q, k = (
            np.concatenate([turned.real, turned.imag], axis=-1)
            for x in (q, k)
            for first, second in [np.split(x, 2, axis=-1)]
            for turned in [(first + 1j * second) * turn]
        )
    out = np.zeros(q.shape)
    (B, T, N, H), (K, _, S, _) = q.shape, keys.shape
    for b, t in np.argwhere(np.asarray(positions) >= 0):
        page, place = divmod(int(positions[b, t]), S)
        keys[:, tables[b, page], place] = k[b, t]
        values[:, tables[b, page], place] = v[b, t]
    new = keys, values
    for b, t, h in np.ndindex(B, T, N):
        head, p = h // (N // K), int(positions[b, t])
        if p < 0:
            continue
        first = 0 if window is None else max(0, p - window + 1)
        k_seen, v_seen = (
            x[head, tables[b]].reshape(-1, H)[first : p + 1] for x in (keys, values)
        )
        scores = scale * k_seen @ q[b, t, h]
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        out[b, t, h] = weights @ v_seen / weights.sum()
    return out, *new


SHAPES = {"B": 4, "T": 1, "N": 6, "K": 2, "S": 16, "n": 9}


KERNEL = functools.partial(kernels.split_keys, interpret=True)
SEEN = [(None, None), (20, None), (1, 5.0)]  # window and softcap
PAGED = [
    (paged.attend, SHAPES),
    (paged.attend, SHAPES | {"T": 7}),
    (paged.attend, SHAPES | {"turns": False}),
    (paged.attend, SHAPES | {"N": 2, "S": 4, "n": 40}),
    (KERNEL, SHAPES),
    (KERNEL, SHAPES | {"turns": False}),
    (KERNEL, SHAPES | {"N": 32, "n": 40}),  # 16 queries to a key, in three parts
    (KERNEL, SHAPES | {"N": 2, "S": 64, "n": 3}),
]
# The first shape of each is tried with all windows, the others with one in turn.
CASES = [
    pytest.param(
        attend,
        shape,
        *seen,
        marks=() if shape is SHAPES or (i + j) % 3 == 0 else pytest.mark.slow,
    )
    for i, (attend, shape) in enumerate(PAGED)
    for j, seen in enumerate(SEEN)
]


@pytest.mark.parametrize(
    "attend, shape, window, softcap",
    CASES,
    ids=lambda x: getattr(x, "__name__", None) or "kernel" if callable(x) else str(x),
)
def test_attention_over_pages_is_that_of_a_plain_loop(attend, shape, window, softcap):
    arguments = case(**shape)
    options = {"window": window, "scale": 0.25, "softcap": softcap}
    got, *caches = jax.jit(functools.partial(attend, **options))(*arguments)
    wanted, *wanted_caches = loop(*arguments, **options)
    np.testing.assert_allclose(got[1:], wanted[1:], atol=2e-6)
    assert np.isfinite(got).all()
    # Nothing but the new keys and values was written: the idle row wrote none.
    np.testing.assert_allclose(caches, wanted_caches, atol=1e-6)


def rounded(x, bits):
    """x as it is kept: the nearest of the numbers that a scale per vector allows."""
    x = np.asarray(x, np.float64)
    largest = {"int8": 127, "fp8": 448}[bits]
    scale = np.float32(np.abs(x).max(axis=-1, keepdims=True)) / np.float32(largest)
    steps = x / scale
    if bits == "int8":
        return scale * np.round(steps)
    # fp8: 3 bits after the leading one, down to 2^-6.
    unit = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(steps), 2.0**-6))) - 3)
    return scale * unit * np.round(steps / unit)


@pytest.mark.parametrize("bits", ["int8", "fp8"])
@pytest.mark.parametrize(
    "attend",
    [paged.attend, functools.partial(kernels.split_keys, interpret=True)],
    ids=["reference", "kernel"],
)
def test_quantised_pages_hold_the_nearest_numbers(attend, bits):
    q, k, v, _, keys, values, *where = case(**SHAPES, turns=False)
    dtype, options = DTYPES[bits], {"window": None, "scale": 0.25, "softcap": None}
    empty = Quantised(jnp.zeros(keys.shape, dtype), jnp.zeros(keys.shape[:-1]))
    K, P, S, H = keys.shape
    everywhere = jnp.arange(P * S).reshape(1, -1)
    kept = [
        paged.keep(empty, x.reshape(K, 1, P * S, H).transpose(1, 2, 0, 3), everywhere)
        for x in (keys, values)
    ]
    got, *caches = attend(q, k, v, None, *kept, *where, **options)
    nearest = [rounded(x, bits) for x in (k, v, keys, values)]
    wanted, *wanted_caches = loop(
        q, *nearest[:2], None, *nearest[2:], *where, **options
    )
    for cache, numbers in zip(caches, wanted_caches, strict=True):
        found = np.float64(cache.values) * cache.scales[..., None]
        np.testing.assert_allclose(found, numbers, atol=1e-6)
    np.testing.assert_allclose(got[1:], wanted[1:], atol=2e-6)


def test_the_platform_chooses():
    here = mesh.make({"data": 8, "tensor": 1})
    assert kernels.choose(here, 64) is paged.attend


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, *DTYPES.values()], ids=str)
def test_the_gpu_kernel_is_lowered(head_dim, dtype):
    # Without a GPU nothing more can be tried than that JAX can translate it.
    if jax.__version_info__ >= (0, 12):
        pytest.skip("JAX 0.12 lowers Triton kernels only where a GPU is")
    B, n = 8, 20
    q, new, angle, cache, tables, positions = (
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in [
            ((B, 1, 12, head_dim), jnp.bfloat16),
            ((B, 1, 2, head_dim), jnp.bfloat16),
            ((B, 1, head_dim // 2), jnp.float32),
            ((2, B * n, 64, head_dim), dtype),
            ((B, n), jnp.int32),
            ((B, 1), jnp.int32),
        ]
    )
    if dtype != jnp.bfloat16:
        scales = jax.ShapeDtypeStruct(cache.shape[:-1], jnp.float32)
        cache = Quantised(cache, scales)
    shapes = q, new, new, (angle, angle), cache, cache, tables, positions
    kernel = functools.partial(kernels.split_keys, window=1000, scale=0.1)
    lowered = jax.jit(kernel).trace(*shapes).lower(lowering_platforms=("cuda",))
    assert "triton" in lowered.as_text()


def test_pages_are_copied():
    pages = paged.Pages(
        (jnp.arange(24.0).reshape(2, 3, 2, 2),), (jnp.zeros((2, 3, 2, 2)),)
    )
    copied = paged.copy(pages, jnp.array([2, -1]), jnp.array([1, -1]))
    np.testing.assert_array_equal(copied.keys[0][:, 0], pages.keys[0][:, 0])
    np.testing.assert_array_equal(copied.keys[0][:, 1], pages.keys[0][:, 2])
    np.testing.assert_array_equal(copied.keys[0][:, 2], pages.keys[0][:, 2])
