"""`jaxrl bench rollout`: the engines on the same requests, with random weights.

Every response is as long as its limit: random weights never stop by themselves.
"""

import dataclasses
import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from typing import Any, Literal

import jax
import numpy as np
import tokenizers
import transformers
from rich.console import Console
from rich.table import Table

from jaxrl_llm import config as configs
from jaxrl_llm import metrics, models
from jaxrl_llm.bench import shapes
from jaxrl_llm.rollout.engine import Engine, Request, Sampling, generate
from jaxrl_llm.train import engine_of
from sharding import mesh


def main(
    model: str = "qwen2.5-1.5b",
    engines: tuple[Literal["jax", "vllm"], ...] = ("jax",),
    prompts: int = 256,
    n: int = 1,
    prompt_length: int = 256,
    length: int = 512,
    mean: int | None = None,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    max_num_seqs: int = 256,
    decode_chunk: int = 64,
    vllm_command: tuple[str, ...] = (
        "python",
        "-m",
        "vllm.entrypoints.openai.api_server",
    ),
    vllm_args: tuple[str, ...] = (),
    rounds: int = 2,
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
      max_num_seqs: sequences decoded together.
      decode_chunk: tokens per dispatch of the JAX engine.
      vllm_command: starts vLLM's API server.
      vllm_args: more arguments of it. Trainer and server share a device by
        XLA_PYTHON_CLIENT_MEM_FRACTION and --gpu-memory-utilization.
      rounds: timed calls and transfers of weights; the median counts.
    """
    arch = dataclasses.replace(shapes.find(model), eos_token_ids=())
    params = models.RandomWeights(arch).load()
    asked = _requests(arch, prompts, n, prompt_length, length, mean)
    tokens = sum(r.sampling.max_tokens * r.num_samples for r in asked)
    table = Table(
        "engine", "new tok/s", "s", "weights s", "first s",
        title=f"{model}, {prompts} x {n} responses, {tokens:,} new tokens",
    )  # fmt: skip
    for name in engines:
        with tempfile.TemporaryDirectory() as directory:
            servers = {"command": vllm_command, "args": vllm_args}
            config = configs.parse(
                {
                    "output_dir": directory,
                    "model": {"path": model},
                    "data": {
                        "train": {"path": "unused.jsonl"},
                        "max_prompt_length": prompt_length,
                    },
                    "reward": {"functions": [{"name": "exact"}]},
                    "rollout": {
                        "engine": name,
                        "max_response_length": length,
                        "dtype": dtype,
                        "max_num_seqs": max_num_seqs,
                        "decode_chunk": decode_chunk,
                        **({"vllm": servers} if name == "vllm" else {}),
                    },
                    "trainer": {"total_training_steps": 1},
                },
                "jaxrl bench rollout",
            )
            on = mesh.make({"data": jax.device_count(), "tensor": 1})
            tokenizer = _tokenizer(arch.vocab_size)
            probes = [request.tokens for request in asked]
            with closing(engine_of(config, arch, tokenizer, on, probes)) as engine:
                found = _measure(engine, params, asked, rounds)
        found["tokens_per_second"] = tokens / found["seconds"]
        table.add_row(
            name, f"{found['tokens_per_second']:,.0f}", f"{found['seconds']:.2f}",
            f"{found['load_seconds']:.2f}", f"{found['first_seconds']:.1f}",
        )  # fmt: skip
        print(json.dumps({"model": model, "engine": name, **found}), flush=True)
    Console().print(table)


def _measure(
    engine: Engine, params: Any, asked: Sequence[Request], rounds: int
) -> dict[str, float]:
    start = time.perf_counter()
    engine.load(params, 0)
    generate(engine, asked)
    first = time.perf_counter() - start
    loads, calls = [], []
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
        **metrics.memory(),
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
    lengths = np.full(prompts, longest)
    if mean is not None:
        drawn = rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, prompts)
        lengths = np.clip(drawn, 1, longest).astype(int)
    return [
        Request(
            prompt_id=p,
            tokens=tuple(rng.integers(0, arch.vocab_size, prompt_length).tolist()),
            num_samples=n,
            seed=0,
            sampling=Sampling(max_tokens=int(lengths[p])),
        )
        for p in range(prompts)
    ]


def _tokenizer(size: int) -> transformers.PreTrainedTokenizerFast:
    """Every token is its number."""
    words = tokenizers.models.WordLevel({str(i): i for i in range(size)}, unk_token="0")
    made = tokenizers.Tokenizer(words)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made)
