"""`jaxrl bench train`: the GRPO update of a run, on random weights of a real shape.

MFU counts the operations of `performance.train_flops` on real tokens only, over the
peak of the device's data sheet: neither padding nor what is computed again counts.
"""

import functools
import itertools
import json
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from jaxrl_llm import models
from jaxrl_llm.algorithms import grpo
from jaxrl_llm.data import packing
from jaxrl_llm.data.packing import Layout
from jaxrl_llm.data.rows import TrainBatch
from jaxrl_llm.data.types import Completion, Prompt, single_turn
from jaxrl_llm.models import known_shapes as shapes
from jaxrl_llm.roles import optimizer
from jaxrl_llm.roles.actor import Actor, ActorSettings, StepSize
from jaxrl_llm.roles.policy import Policy, PolicySettings
from jaxrl_llm.roles.trained_model import MiniBatches
from jaxrl_llm.sharding import hardware, mesh, out_of_memory
from jaxrl_llm.sharding.out_of_memory import Shortage
from jaxrl_llm.tracking import device_trace as profile
from jaxrl_llm.tracking import performance
from jaxrl_llm.training import fitting, memory

Remat = Literal["none", "dots", "full", "offload"]
_GROUP = 8


def main(
    model: str = "qwen2.5-1.5b",
    sequences: int = 32,
    length: int = 1024,
    mean: int | None = None,
    prompt_length: int = 1,
    pack_length: int | None = None,
    micro_batch_size: tuple[int, ...] = (),
    remat: tuple[Remat, ...] = ("dots",),
    attention: tuple[Literal["auto", "xla"], ...] = ("auto",),
    unroll: Literal["auto", "never", "always"] = "auto",
    keep_probabilities: bool = False,
    lora_rank: int | None = None,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    mu_dtype: Literal["float32", "bfloat16"] = "float32",
    fsdp: int = 1,
    tensor: int = 1,
    steps: int = 5,
    profiled: bool = False,
) -> None:
    """Times the update: forward, backward, AdamW. One line per variant.

    Args:
      model: a name of `bench.shapes`, or a config.json.
      sequences: in a mini-batch; a multiple of 8.
      length: tokens of a sequence, prompt and response.
      mean: draw lengths from a lognormal of this mean instead (sigma 0.8), at most
        `length`.
      prompt_length: of these, tokens that are not trained on.
      pack_length: tokens in a row; one sequence per row if not given.
      micro_batch_size: rows per forward and backward pass; as many as fit, up to 16,384
        tokens a device (twice that with FSDP), if not given, or 8 on CPUs.
      remat: what the backward pass computes again.
      attention: see `actor.attention`.
      unroll: see `actor.unroll`.
      keep_probabilities: see `actor.keep_probabilities`.
      lora_rank: train adapters of this rank on all matrices; all weights if not given.
      dtype: of activations and matrix products.
      mu_dtype: of AdamW's first moment.
      fsdp: devices that weights and rows are split over.
      tensor: devices that heads are split over.
      steps: timed updates after two that are not.
      profiled: print where the device's time goes in one update.
    """
    if sequences % _GROUP:
        raise ValueError(f"sequences must be a multiple of {_GROUP}, got {sequences}")
    hardware.use_memory()
    arch = shapes.find(model)
    lengths = _lengths(sequences, length, mean, prompt_length)
    on = mesh.make(
        {"data": 1, "fsdp": fsdp, "expert": 1, "context": 1, "tensor": tensor}
    )
    table = Table(
        "micro-batch", "remat", "attention", "ms", "tok/s", "MFU", "real tokens",
        "peak GiB", "compile s", title=f"{model}, {len(lengths)} sequences",
    )  # fmt: skip
    console, profiles = Console(), []
    step = StepSize(
        num_prompts=sequences // _GROUP,
        group_size=_GROUP,
        prompt_length=prompt_length,
        response_length=length - prompt_length,
    )

    def make(kept: Remat, kind: str, size: int | None) -> Actor:
        policy = PolicySettings(
            dtype=dtype,
            remat=kept,
            attention=kind,
            unroll=unroll,
            keep_probabilities=keep_probabilities,
            lora=adapters_of(lora_rank),
            rows=Layout(pack_length=pack_length, micro_batch_size=size, longest=length),
        )
        return random_actor(arch, on, policy, step, mu_dtype)

    sizes = micro_batch_size or (None,)
    for size, kept, kind in itertools.product(sizes, remat, attention):
        of_size = functools.partial(make, kept, kind)
        if size is None:
            actor, said = fitting.for_measuring(of_size, beside=0, otherwise=8)
            console.print(said, markup=False, highlight=False)
            size = actor.policy.layout.micro_batch_size
        else:
            actor = of_size(size)
        with _explained(actor):
            result, trace = _measure(actor, lengths, steps, profiled)
        table.add_row(
            str(size), kept, kind,
            f"{1e3 * result['seconds']:.1f}", f"{result['tokens_per_second']:,.0f}",
            f"{100 * result['mfu']:.1f} %" if "mfu" in result else "",
            f"{100 * result['token_efficiency']:.1f} %",
            f"{result['peak_bytes'] / 2**30:.1f}", f"{result['compile_seconds']:.0f}",
        )  # fmt: skip
        variant = {
            "micro_batch_size": size,
            "remat": kept,
            "attention": kind,
            "unroll": unroll,
            "keep_probabilities": keep_probabilities,
            "lora_rank": lora_rank,
        }
        print(json.dumps({"model": model, **variant, **result}), flush=True)
        profiles += [trace] if trace else []
    console.print(table, *profiles)


def remedies(sequences: int, **_: Any) -> list[str]:
    """Options that need less memory than these, besides those of a variant."""
    return [f"--sequences {max(sequences // 2, _GROUP)} (now {sequences})"]


def _explained(actor: Actor) -> AbstractContextManager[None]:
    """Says what to change if a device's memory does not suffice for the update.

    Raises:
      OutOfMemory: in the block.
    """
    state, policy = actor.abstract_state(), actor.policy
    weights = fitting.bytes_of(state.params)
    now, rows = policy.layout.micro_batch_size, policy.layout.rows_multiple

    def less(found: Shortage) -> list[str]:
        fixed = min(2 * weights, found.wanted or 0)
        size = fitting.fewer(now, rows, found.wanted, found.free, fixed)
        return [
            *([f"--micro-batch-size {size} (now {now})"] if size else []),
            *["--remat full"] * (policy.settings.remat != "full"),
            f"--fsdp {2 * actor.mesh.shape['fsdp']}, on so many devices",
        ]

    return out_of_memory.explained(
        lambda found: memory.PROGRAMS.get(found.program, "the measurement"),
        lambda _: {
            "weights": weights,
            "optimizer": fitting.bytes_of(state.opt_state),
            fitting.FROZEN: fitting.bytes_of(actor.abstract_frozen()),
        },
        less,
    )


def adapters_of(rank: int | None) -> models.Lora | None:
    """Adapters of this rank on all matrices; none if that is not given."""
    return None if rank is None else models.Lora(rank=rank, alpha=float(rank))


def random_actor(
    arch: models.Architecture,
    on: Mesh,
    policy: PolicySettings,
    step: StepSize,
    mu_dtype: Literal["float32", "bfloat16"] = "float32",
) -> Actor:
    """A policy of random weights with the update of GRPO: vanilla loss, AdamW, one
    optimizer step per training step; of adapters alone, if `policy` has any."""
    adamw = optimizer.Settings(lr=1e-6, mu_dtype=mu_dtype), 1000
    lora = policy.lora
    return Actor(
        Policy(arch, on, policy),
        models.RandomWeights(arch),
        ActorSettings(
            update=grpo.Settings(micro_batch_size=policy.rows.micro_batch_size),
            mini_batches=MiniBatches(group_size=step.group_size),
            step_size=step,
        ),
        optimizer=optimizer.make(*adamw),
        schedule=optimizer.schedule(*adamw),
        adapters=lora and models.NewAdapters(arch, lora, seed=0),
    )


def _measure(
    actor: Actor, lengths: Sequence[int], steps: int, profiled: bool
) -> tuple[dict[str, float], Table | None]:
    batch = _batch(actor, lengths)
    start = time.perf_counter()
    compiled = actor.compile_update(batch)
    compile_seconds = time.perf_counter() - start
    rows, state = actor.policy.on_devices(batch), actor.start()
    seconds, trace = [], None
    for _ in range(steps + 2):
        start = time.perf_counter()
        state, found = compiled(state, rows, actor.frozen)
        jax.block_until_ready((state, found))
        seconds.append(time.perf_counter() - start)
    if profiled:
        with profile.recorded() as recording:
            state, found = compiled(state, rows, actor.frozen)
            jax.block_until_ready((state, found))
        trace = profile.table(recording)
    median = float(np.median(seconds[2:]))
    tokens, arch, devices = sum(lengths), actor.arch, actor.mesh.devices
    flops = performance.train_flops(
        models.num_matmul_params(arch),
        tokens,
        sum(n * n for n in lengths),
        arch.num_layers,
        arch.num_heads,
        arch.head_dim,
        adapters=actor.policy.settings.lora is not None,
    )
    peak = hardware.peak_flops(devices.flat[0].device_kind)
    share = performance.mfu(flops, median, peak, devices.size)
    return {
        "seconds": median,
        "tokens_per_second": tokens / median,
        **({"mfu": share["perf/mfu/actor"]} if share else {}),
        "token_efficiency": packing.token_efficiency(
            batch, actor.policy.layout.micro_batch_size
        ),
        "peak_bytes": fitting.peak(compiled),
        "compile_seconds": compile_seconds,
        "loss": float(found["actor/loss"]),
    }, trace


def _lengths(count: int, longest: int, mean: int | None, shortest: int) -> list[int]:
    if mean is None:
        return [longest] * count
    sigma = 0.8
    drawn = np.random.default_rng(0).lognormal(
        np.log(mean) - sigma**2 / 2, sigma, size=count
    )
    return np.clip(drawn, shortest + 1, longest).astype(int).tolist()


def _batch(actor: Actor, lengths: Sequence[int]) -> TrainBatch:
    """Random tokens as responses to random prompts."""
    rng = np.random.default_rng(0)
    size, vocabulary = actor.settings.step_size.prompt_length, actor.arch.vocab_size
    prompts = [
        Prompt(
            id=p,
            content="",
            tokens=tuple(rng.integers(0, vocabulary, size).tolist()),
            columns={},
        )
        for p in range(len(lengths) // _GROUP)
    ]
    completions = [
        Completion(
            prompt_id=i // _GROUP,
            sample=i % _GROUP,
            tokens=rng.integers(0, vocabulary, n - size).astype(np.int32),
            logprobs=np.full(n - size, -np.log(vocabulary), np.float32),
            raw_logprobs=np.full(n - size, -np.log(vocabulary), np.float32),
            finish_reason="length",
            weight_version=0,
            text="",
        )
        for i, n in enumerate(lengths)
    ]
    starts = range(0, len(lengths), _GROUP)
    groups = single_turn([completions[i : i + _GROUP] for i in starts])
    advantages = rng.normal(size=(len(prompts), _GROUP)).astype(np.float32)
    return actor.make_rows(prompts, groups, advantages)
