"""`jaxrl bench moe`: the grouped products of a layer of experts, kernel by kernel.

Every kernel computes the same layer from the same routes: sort, three products, sum;
forward and backward. Each is compared with XLA's product of every row with every
expert's matrix before it is timed, and one that cannot run here is named with why.
MFU counts the operations of the three products, and twice as many of their gradients,
over the peak of the device's data sheet.
"""

import functools
import json
import time
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from rich.console import Console
from rich.table import Table

from jaxrl_llm.models import COMPILER_OPTIONS, moe
from jaxrl_llm.models.architecture import Moe
from jaxrl_llm.sharding import hardware

Candidate = Literal["dense", "blocked", "ragged", "triton", "mosaic"]
Skew = Literal["even", "skewed", "one"]


def main(
    tokens: int = 16384,
    width: int = 2560,
    expert_size: int = 1280,
    num_experts: int = 64,
    top_k: int = 4,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    kernels: tuple[Candidate, ...] = get_args(Candidate),
    skew: tuple[Skew, ...] = ("even", "skewed"),
    steps: int = 10,
) -> None:
    """Times a layer of experts, forward and backward. One line per variant.

    Args:
      tokens: of a micro-batch on the device.
      width: of the model, D.
      expert_size: width of an expert, F.
      num_experts: E.
      top_k: experts of each token.
      dtype: of activations and matrix products.
      kernels: which to time. dense: every token through every expert, as einsum; as
        long as E / top_k times the work takes. Others: see `models.grouped`.
      skew: how unevenly tokens are spread. even: at random. skewed: expert e in
        proportion to 1 / (1 + e). one: all to the first `top_k`.
      steps: timed runs after two that are not; their median counts.
    """
    hardware.use_memory()
    device = jax.devices()[0]
    layer = Moe(num_experts=num_experts, top_k=top_k, expert_size=expert_size)
    peak = hardware.peak_flops(device.device_kind)
    operations = 18.0 * tokens * top_k * width * expert_size
    table = Table(
        "kernel", "experts", "ms", "TFLOP/s", "MFU", "error",
        title=f"{tokens:,} tokens, {width} wide, {num_experts} experts of "
        f"{expert_size}, {top_k} each, {dtype}, {device.device_kind}",
    )  # fmt: skip
    for kind in skew:
        given = _inputs(layer, tokens, width, jnp.dtype(dtype), kind)
        wanted = None
        for kernel in kernels:
            found = _measured(kernel, layer, given, wanted, steps)
            wanted = found.pop("results", wanted)
            if "seconds" in found:
                rate = operations / found["seconds"]
                found |= {"tflops": rate / 1e12}
                found |= {"mfu": rate / peak} if peak else {}
            line = {"kernel": kernel, "skew": kind, "tokens": tokens, "dtype": dtype}
            print(json.dumps(line | found), flush=True)
            table.add_row(kernel, kind, *_row(found))
    Console().print(table)


def remedies(tokens: int, **_: Any) -> list[str]:
    """Options that need less memory than these."""
    return [f"--tokens {max(1, tokens // 2)} (now {tokens})"]


def _inputs(layer: Moe, tokens: int, width: int, dtype: Any, skew: Skew) -> Any:
    """x, logits, the three matrices, and the gradient of the result."""
    E, F = layer.num_experts, layer.expert_size
    keys = jax.random.split(jax.random.key(0), 6)
    logits = jax.random.gumbel(keys[0], (1, tokens, E))
    bias = {
        "even": np.zeros(E),
        "skewed": -np.log1p(np.arange(E)),
        "one": np.where(np.arange(E) < layer.top_k, 100.0, 0.0),
    }[skew]
    x, gradient = (
        jax.random.normal(key, (1, tokens, width), dtype) for key in keys[1:3]
    )
    matrices = tuple(
        jax.random.normal(key, (E, width, F), dtype) * width**-0.5 for key in keys[3:]
    )
    return x, logits + jnp.asarray(bias, jnp.float32)[None, None], matrices, gradient


def _measured(
    kernel: Candidate, layer: Moe, given: Any, wanted: Any, steps: int
) -> dict[str, Any]:
    x, logits, matrices, gradient = given
    experts = (
        _dense if kernel == "dense" else functools.partial(moe.alone, kernel=kernel)
    )

    @functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
    def run(x, logits, matrices, gradient):
        def of_layer(x, logits, matrices):
            routes = moe.route(layer, logits)
            return experts(x, routes, moe.Weights(*matrices), jax.nn.silu)

        result, pullback = jax.vjp(of_layer, x, logits, matrices)
        return result, pullback(gradient)

    try:
        results = jax.block_until_ready(run(*given))
    except Exception as error:  # whatever a kernel says that is not for this device
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    found: dict[str, Any] = {"results": results} if wanted is None else {}
    if wanted is not None:
        found["error"] = max(
            float(_relative(got, other))
            for got, other in zip(
                jax.tree.leaves(results), jax.tree.leaves(wanted), strict=True
            )
        )
    del results
    return found | {"seconds": _median(lambda: run(*given), steps)}


def _dense(
    x: Float[Array, "R T D"],
    routes: moe.Routes,
    weights: moe.Weights,
    activation: Callable[[Array], Array],
) -> Float[Array, "R T D"]:
    """Every token through every expert, a few experts at a time."""
    chosen: Int[Array, "R T k"] = routes.chosen

    @jax.checkpoint
    def add(total, here):
        number, gate, up, down = here
        weight = jnp.sum(jnp.where(chosen == number, routes.gates, 0), axis=-1)
        hidden = activation(x @ gate) * (x @ up) * weight[..., None].astype(x.dtype)
        return total + jnp.einsum("rtf,df->rtd", hidden, down), None

    numbers = jnp.arange(len(weights.gate))
    return jax.lax.scan(add, jnp.zeros_like(x), (numbers, *weights[:3]))[0]


@jax.jit
def _relative(got: Array, other: Array) -> Float[Array, ""]:
    got, other = got.astype(jnp.float32), other.astype(jnp.float32)
    return jnp.max(jnp.abs(got - other)) / jnp.maximum(jnp.max(jnp.abs(other)), 1e-30)


def _median(run: Callable[[], Any], steps: int) -> float:
    jax.block_until_ready(run())
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def _row(found: dict[str, Any]) -> tuple[str, ...]:
    if "failed" in found:
        return found["failed"], "", "", ""
    return (
        f"{1e3 * found['seconds']:.2f}",
        f"{found['tflops']:.4g}",
        f"{100 * found['mfu']:.1f} %" if "mfu" in found else "",
        f"{found['error']:.2g}" if "error" in found else "the measure",
    )
