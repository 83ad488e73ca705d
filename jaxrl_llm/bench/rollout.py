"""`jaxrl bench rollout`: the engines on the same requests, with random weights.

Every response is as long as its limit: random weights never stop by themselves.
"""

import dataclasses
import json
import shlex
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
import transformers
from rich.console import Console
from rich.table import Table

from jaxrl_llm import models
from jaxrl_llm.models import known_shapes as shapes
from jaxrl_llm.rollout.engine import Engine, Request, Sampling, generate
from jaxrl_llm.rollout.native.engine import JaxEngine
from jaxrl_llm.sharding import hardware, mesh, rules
from jaxrl_llm.tracking import device_trace as profile
from jaxrl_llm.tracking import performance
from jaxrl_llm.training.settings import utilization


def main(
    model: str = "qwen2.5-1.5b",
    engines: tuple[Literal["jax", "vllm"], ...] = ("jax",),
    prompts: int = 256,
    n: int = 1,
    prompt_length: int = 256,
    length: int = 512,
    mean: int | None = None,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    trained_dtype: Literal["float32", "bfloat16"] = "float32",
    quantization: models.Bits | None = None,
    kv_cache_dtype: models.Bits | None = None,
    max_num_seqs: int = 256,
    decode_chunk: int = 64,
    prefill_tokens: int = 8192,
    tensor: int = 1,
    vllm_command: str = "python -m vllm.entrypoints.openai.api_server",
    vllm_args: str = "",
    rounds: int = 2,
    profiled: bool = False,
) -> None:
    """Times whole calls of `generate`, after one that warms up. One line per engine.

    Args:
      model: a name of `bench.shapes`, or a config.json.
      engines: which to time, one after the other.
      prompts: random ones, all different.
      n: responses to each.
      prompt_length: tokens of a prompt.
      length: tokens of a response.
      mean: draw lengths from a lognormal of this mean instead (sigma 0.8), at most
        `length`.
      dtype: of weights, activations and cache.
      trained_dtype: of the weights that the engines are given, which lie on the devices
        too, split over all of them.
      quantization: of the JAX engine's matrices; see `rollout.quantization`.
      kv_cache_dtype: of the JAX engine; see `rollout.kv_cache_dtype`.
      max_num_seqs: sequences decoded together.
      decode_chunk: steps per dispatch of the JAX engine.
      prefill_tokens: of prompts, per dispatch of the JAX engine.
      tensor: devices of the JAX engine that share a copy of the weights.
      vllm_command: starts vLLM's API server, as a shell would split it.
      vllm_args: more arguments of it, likewise. This process leaves the server what
        its --gpu-memory-utilization says.
      rounds: timed calls and transfers of weights; the median counts.
      profiled: print where the device's time goes while the JAX engine makes the first
        64 tokens of every response.
    """
    served = utilization(shlex.split(vllm_args)) if "vllm" in engines else 0.0
    hardware.use_memory(served)
    arch = dataclasses.replace(shapes.find(model), eos_token_ids=())
    count = jax.device_count()
    partition = rules.Partition(mesh.make({"fsdp": count}), rules.TRAIN)
    params = models.RandomWeights(arch).load(
        dtype=jnp.dtype(trained_dtype),
        shardings=partition.shardings(models.logical_axes(arch)),
    )
    asked = _requests(arch, prompts, n, prompt_length, length, mean)
    tokens = sum(r.sampling.max_tokens * r.num_samples for r in asked)
    console, profiles = Console(), []
    least = floor(
        arch,
        asked,
        max_num_seqs,
        1 if quantization else jnp.dtype(dtype).itemsize,
        1 if kv_cache_dtype else jnp.dtype(dtype).itemsize,
        tensor,
    )
    table = Table(
        "engine", "new tok/s", "s", "ms/step", "of floor", "weights s", "first s",
        "peak",
        title=f"{model} on {count} x {jax.devices()[0].device_kind}, {prompts} x {n} "
        f"responses, {tokens:,} new tokens",
    )  # fmt: skip
    for name in engines:
        with tempfile.TemporaryDirectory() as directory:
            made = engine_of(
                name,
                arch,
                [request.tokens for request in asked],
                {
                    "command": shlex.split(vllm_command),
                    "args": shlex.split(vllm_args),
                },
                directory=directory,
                tensor=tensor,
                dtype=dtype,
                max_model_len=prompt_length + length,
                max_num_seqs=max_num_seqs,
                decode_chunk=decode_chunk,
                prefill_tokens=prefill_tokens,
                quantization=quantization,
                kv_cache_dtype=kv_cache_dtype,
            )
            with closing(made) as engine:
                found = _measure(engine, params, asked, rounds)
                if profiled and name == "jax":
                    with profile.recorded() as recording:
                        generate(engine, _shortened(asked, 64))
                    profiles.append(profile.table(recording))
        steps = max(tokens / max_num_seqs, max(r.sampling.max_tokens for r in asked))
        found["tokens_per_second"] = tokens / found["seconds"]
        found["ms_per_step"] = 1e3 * found["seconds"] / steps
        if least is not None:
            found["share_of_floor"] = least / found["seconds"]
        table.add_row(
            name, f"{found['tokens_per_second']:,.0f}", f"{found['seconds']:.2f}",
            f"{found['ms_per_step']:.2f}", _shown(found, "share_of_floor", 100, "%"),
            f"{found['load_seconds']:.2f}", f"{found['first_seconds']:.1f}",
            _shown(found, "perf/max_memory_allocated_gb", 1, "GB"),
        )  # fmt: skip
        print(json.dumps({"model": model, "engine": name, **found}), flush=True)
    console.print(table, *profiles)


def remedies(
    trained_dtype: str, max_num_seqs: int, quantization: str | None, **_: Any
) -> list[str]:
    """Options that need less memory than these."""
    return [
        *["--trained-dtype bfloat16"] * (trained_dtype == "float32"),
        *["--quantization int8"] * (quantization is None),
        f"--max-num-seqs {max(max_num_seqs // 2, 1)} (now {max_num_seqs})",
    ]


def engine_of(
    name: Literal["jax", "vllm"],
    arch: models.Architecture,
    prompts: Sequence[Sequence[int]],
    servers: Mapping[str, Sequence[str]],
    *,
    directory: str,
    tensor: int,
    dtype: str,
    max_model_len: int,
    max_num_seqs: int,
    kind: Callable[..., JaxEngine] = JaxEngine,
    **of_jax: Any,
) -> Engine:
    """One of the engines.

    Args:
      kind: makes the JAX engine.
      servers: fields of `VllmSettings`.
      of_jax: arguments that only `JaxEngine` has.
    """
    tokenizer = _tokenizer(arch.vocab_size)
    sizes = {"max_model_len": max_model_len, "max_num_seqs": max_num_seqs}
    if name == "vllm":
        # Needs the extra `vllm`.
        from jaxrl_llm.rollout.servers.vllm import VllmEngine, VllmSettings

        return VllmEngine(
            arch,
            tokenizer,
            prompts,
            VllmSettings(**servers),
            directory=directory,
            dtype=dtype,
            **sizes,
        )
    axes = mesh.fill({"data": -1, "tensor": tensor}, jax.device_count())
    return kind(
        arch,
        tokenizer,
        mesh=mesh.make(axes),
        dtype=jnp.dtype(dtype),
        **sizes,
        **of_jax,
    )


def floor(
    arch: models.Architecture,
    asked: Sequence[Request],
    rows: int,
    weight_bytes: int,
    cache_bytes: int,
    tensor: int,
) -> float | None:
    """Seconds that no engine can beat on these devices: weights are read once per step,
    keys and values once per token that attends to them, and prompts are multiplied with
    the weights once. None if the devices' rates are not known.

    Args:
      rows: sequences decoded together on all devices.
      weight_bytes, cache_bytes: of a weight in the layers, and of a key's or value's
        number.
      tensor: devices that share a copy of the weights.
    """
    kind = jax.devices()[0].device_kind
    known, peak = hardware.facts(kind), hardware.peak_flops(kind)
    if known is None or peak is None:
        return None
    matrix = models.num_matmul_params(arch)
    output = arch.vocab_size * arch.hidden_size  # never quantised
    weights = matrix * weight_bytes + output * max(0, 2 - weight_bytes)
    tokens = sum(r.sampling.max_tokens * r.num_samples for r in asked)
    longest = max(r.sampling.max_tokens for r in asked)
    attended = sum(
        r.num_samples * r.sampling.max_tokens
        * (len(r.tokens) + r.sampling.max_tokens / 2)
        for r in asked
    )  # fmt: skip
    each = 2 * arch.num_layers * arch.num_kv_heads * arch.head_dim
    steps = max(tokens / rows, longest)
    count = jax.device_count()
    kept = attended * each * cache_bytes
    read = (steps * weights / tensor + kept / count) / known[1]
    prompts = 2 * matrix * sum(len(r.tokens) for r in asked) / peak
    return read + prompts / count


def _shown(found: Mapping[str, float], name: str, scale: int, unit: str) -> str:
    return f"{scale * found[name]:.1f} {unit}" if name in found else ""


def _measure(
    engine: Engine, params: Any, asked: Sequence[Request], rounds: int
) -> dict[str, float]:
    start = time.perf_counter()
    engine.load(params, 0)
    generate(engine, asked)
    first = time.perf_counter() - start
    loads, calls = [], []
    with performance.long_lived_objects_set_aside() as set_aside:
        set_aside()
        for version in range(1, rounds + 1):
            start = time.perf_counter()
            sent = engine.load(params, version)
            loads.append(time.perf_counter() - start)
            start = time.perf_counter()
            groups = generate(engine, asked)
            calls.append(time.perf_counter() - start)
    for request, group in zip(asked, groups, strict=True):
        assert {len(c.tokens) for c in group} == {request.sampling.max_tokens}
    return {
        "seconds": float(np.median(calls)),
        "load_seconds": float(np.median(loads)),
        "first_seconds": first,
        **sent,
        **performance.memory(),
    }


def _requests(
    arch: models.Architecture,
    prompts: int,
    n: int,
    prompt_length: int,
    longest: int,
    mean: int | None,
) -> list[Request]:
    rng, sigma = np.random.default_rng(0), 0.8
    drawn = rng.lognormal(np.log(mean or 1) - sigma**2 / 2, sigma, prompts * n)
    lengths = np.clip(drawn, 1, longest).astype(int)
    asked = []
    for p in range(prompts):
        tokens = tuple(rng.integers(0, arch.vocab_size, prompt_length).tolist())
        # Responses of different lengths are requests of their own.
        each = [(length, 1) for length in lengths[p::prompts]]
        asked += [
            Request(
                prompt_id=p * n + i,
                tokens=tokens,
                num_samples=count,
                seed=0,
                sampling=Sampling(max_tokens=int(length)),
            )
            for i, (length, count) in enumerate(each if mean else [(longest, n)])
        ]
    return asked


def _shortened(asked: Sequence[Request], most: int) -> list[Request]:
    return [
        dataclasses.replace(
            r,
            sampling=dataclasses.replace(
                r.sampling, max_tokens=min(most, r.sampling.max_tokens)
            ),
        )
        for r in asked
    ]


def _tokenizer(size: int) -> transformers.PreTrainedTokenizerFast:
    """Every token is its number."""
    words = tokenizers.models.WordLevel({str(i): i for i in range(size)}, unk_token="0")
    made = tokenizers.Tokenizer(words)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made)
