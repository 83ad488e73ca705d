"""`jaxrl bench reshard`: weights on their way between two layouts, on real links.

Every way of moving gets the same arrays. Bytes are those that the fullest device must
receive, whoever moves them: no way can show more by moving more.
"""

import functools
import json
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from jaxrl_llm import models
from jaxrl_llm.models import known_shapes as shapes
from jaxrl_llm.sharding import checksum, hardware, mesh, reshard, rules
from jaxrl_llm.sharding import transfer_plan as plan

# Bytes per second that one device receives over its fast links; vendors' data sheets.
_LINK = ((r"\bA100\b", 300e9), (r"\bH[12]00\b", 450e9), (r"\bB200\b", 900e9))


Way = Literal["fsdp-to-tensor", "trainer-to-engine", "half-to-half"]


def main(
    model: str = "qwen2.5-7b",
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    tensor: int | None = None,
    chunk_mib: tuple[int, ...] = (1024, 4096),
    ways: tuple[Way, ...] = get_args(Way),
    steps: int = 5,
) -> None:
    """Times the weights' way from FSDP over all devices to tensor parallel, to one
    array per layer from float32 as a run loads its engine, and from the first half of
    the devices to the second.

    Args:
      model: a name of `bench.shapes`, or a config.json.
      dtype: of the weights; of the engine's where the trainer's are float32.
      tensor: devices that generation splits heads over; all if not given.
      chunk_mib: bounds on what one program moves.
      ways: which of these to time.
      steps: timed transfers after one that is not; their median counts.

    Raises:
      ValueError: the number of devices is odd, or `tensor` does not divide it.
    """
    hardware.use_memory()
    devices = jax.devices()
    count, half = len(devices), len(devices) // 2
    if count % 2:
        raise ValueError(f"two halves need an even number of devices, got {count}")
    generate = mesh.make(mesh.fill({"data": -1, "tensor": tensor or count}, count))
    layout = functools.partial(_layout, shapes.find(model))
    pairs: dict[Way, tuple[Any, Any]] = {
        "fsdp-to-tensor": (
            layout(_fsdp(devices), rules.TRAIN, dtype),
            layout(generate, rules.GENERATE, dtype),
        ),
        "trainer-to-engine": (
            layout(_fsdp(devices), rules.TRAIN, "float32"),
            layout(generate, rules.GENERATE, dtype, stacked=False),
        ),
        "half-to-half": (
            layout(_fsdp(devices[:half]), rules.TRAIN, dtype),
            layout(_fsdp(devices[half:]), rules.TRAIN, dtype),
        ),
    }
    table = Table(
        "way", "by", "ms", "received per device", "GB/s", "of the link",
        "times as fast as device_put",
        title=f"{model} on {count} x {devices[0].device_kind}",
    )  # fmt: skip
    for name in ways:
        for found in _compare(*pairs[name], chunk_mib, steps):
            print(json.dumps({"model": model, "way": name, **found}), flush=True)
            table.add_row(name, *_row(found))
    Console().print(table)


def remedies(dtype: str, chunk_mib: tuple[int, ...], **_: Any) -> list[str]:
    """Options that need less memory than these."""
    less = max(min(chunk_mib) // 2, 1)
    narrow = ["--dtype bfloat16"] * (dtype == "float32")
    return [*narrow, f"--chunk-mib {less} (now {' '.join(map(str, chunk_mib))})"]


def _compare(
    source: Any, target: Any, chunk_mib: tuple[int, ...], steps: int
) -> list[dict[str, Any]]:
    """One line for each way to move random values from `source` to `target`."""
    rngs = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(source))))
    params = jax.tree.map(lambda x: _random(next(rngs), x), source)
    ways: dict[str, Callable[[], Any]] = {}
    for mib in chunk_mib:
        made = plan.plan(source, target, chunk_bytes=mib * 2**20)
        ways[f"reshard, {mib} MiB"] = functools.partial(reshard.reshard, params, made)
    moved = reshard.reshard(params, made)
    checksum.verify(moved, made, checksum.expected(params, made))
    del moved
    if jax.tree.structure(source) == jax.tree.structure(target):
        shardings = jax.tree.map(lambda x: x.sharding, target)
        if made.devices == tuple(jax.tree.leaves(shardings)[0].mesh.devices.flat):
            identity = jax.jit(lambda tree: tree, out_shardings=shardings)
            ways["jit"] = functools.partial(identity, params)
        ways["device_put"] = functools.partial(jax.device_put, params, shardings)
    seconds = {by: _median(move, steps) for by, move in ways.items()}
    received = max(made.minimum.values())
    link, theirs = _link(jax.devices()[0].device_kind), seconds.get("device_put")
    return [
        {
            "by": by,
            "seconds": each,
            "bytes": received,
            "gb_per_second": received / each / 1e9,
            **({"of_link": received / each / link} if link else {}),
            **({"speedup": theirs / each} if theirs else {}),
        }
        for by, each in seconds.items()
    ]


def _median(move: Callable[[], Any], steps: int) -> float:
    jax.block_until_ready(move())
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        jax.block_until_ready(move())
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def _fsdp(devices: Sequence[jax.Device]) -> Mesh:
    return mesh.make({"data": 1, "fsdp": len(devices), "tensor": 1}, devices)


def _layout(
    arch: models.Architecture,
    on: Mesh,
    table: rules.Rules,
    dtype: str,
    stacked: bool = True,
) -> Any:
    """Shapes, dtypes and shardings of a model's weights."""
    weights = models.abstract_params(arch, dtype=jnp.dtype(dtype), stacked=stacked)
    axes = models.logical_axes(arch, stacked=stacked)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        weights,
        rules.to_shardings(axes, on, table),
    )


def _random(key: jax.Array, x: jax.ShapeDtypeStruct) -> jax.Array:
    make = jax.jit(
        lambda: jax.random.normal(key, x.shape, x.dtype), out_shardings=x.sharding
    )
    return make()


def _link(device_kind: str) -> float | None:
    return next((rate for kind, rate in _LINK if re.search(kind, device_kind)), None)


def _row(found: dict[str, Any]) -> tuple[str, ...]:
    return (
        found["by"],
        f"{1e3 * found['seconds']:.2f}",
        plan.size(found["bytes"]),
        f"{found['gb_per_second']:.3g}",
        f"{100 * found['of_link']:.0f} %" if "of_link" in found else "",
        f"{found['speedup']:.3g}" if "speedup" in found else "",
    )
