"""`jaxrl bench step`: whole GRPO steps on random weights of a real shape, by phase.

Generation, rewards, advantages and packing, update, and the weights' way back to the
engine are those of a run; only the texts mean nothing.
"""

import dataclasses
import gc
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Int
from rich.console import Console
from rich.table import Table

from jaxrl_llm import models
from jaxrl_llm.algorithms import grpo
from jaxrl_llm.bench.train import Remat, adapters_of, random_actor
from jaxrl_llm.config.parsing import ConfigError
from jaxrl_llm.config.schema import Config
from jaxrl_llm.config.schema_algorithm import AlgorithmConfig
from jaxrl_llm.data.packing import Layout
from jaxrl_llm.data.types import Completion, Prompt, single_turn
from jaxrl_llm.models import known_shapes as shapes
from jaxrl_llm.rewards import RewardFunction, builtin, score
from jaxrl_llm.roles.actor import Actor, StepSize
from jaxrl_llm.roles.policy import PolicySettings
from jaxrl_llm.rollout.engine import Engine, Request, Sampling, generate
from jaxrl_llm.rollout.native.engine import JaxEngine
from jaxrl_llm.sharding import hardware, mesh
from jaxrl_llm.tracking import performance
from jaxrl_llm.training import credit as estimate
from jaxrl_llm.training import fitting
from jaxrl_llm.training.build import (
    engine_of,
    has_critic,
    make_meshes,
    reward_functions,
)
from jaxrl_llm.training.roles import actor_of, shared


class _Numbers:
    """Stands for a tokenizer: every token is its number."""

    def batch_decode(
        self, sequences: Sequence[Sequence[int]], skip_special_tokens: bool
    ) -> list[str]:
        return [" ".join(map(str, tokens)) for tokens in sequences]


def main(
    model: str = "qwen2.5-1.5b",
    prompts: int = 64,
    n: int = 8,
    prompt_length: int = 256,
    mean: int = 400,
    cap: int = 1024,
    pack_length: int = 8192,
    micro_batch_size: int | None = None,
    remat: Remat = "dots",
    lora_rank: int | None = None,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    max_num_seqs: int = 512,
    decode_chunk: int = 64,
    steps: int = 3,
) -> None:
    """Times whole steps, after one that compiles. Prints the median of each phase.

    Args:
      model: a name of `bench.shapes`, or a config.json.
      prompts: of a step.
      n: responses to each.
      prompt_length: tokens of a prompt.
      mean: of the lengths of responses, which are lognormal (sigma 0.8).
      cap: tokens of the longest response.
      pack_length: tokens in a row of the update.
      micro_batch_size: rows per forward and backward pass; as many as fit, up to 16,384
        tokens a device (twice that with FSDP), if not given, or 2 on CPUs.
      remat: what the backward pass computes again.
      lora_rank: train adapters of this rank on all matrices; all weights if not given.
      dtype: of generation, and of the matrix products of the update.
      max_num_seqs: sequences decoded together.
      decode_chunk: tokens per dispatch.
      steps: timed steps.
    """
    hardware.use_memory()
    arch, count = shapes.find(model), jax.device_count()
    size = StepSize(
        num_prompts=prompts,
        group_size=n,
        prompt_length=prompt_length,
        response_length=cap,
    )
    axes = {"data": 1, "fsdp": count, "expert": 1, "context": 1, "tensor": 1}
    engine = JaxEngine(
        _endless(arch),
        _Numbers(),
        mesh=mesh.make_by_process({"data": count, "tensor": 1}),
        dtype=dtype,
        max_model_len=prompt_length + cap,
        max_num_seqs=max_num_seqs,
        decode_chunk=decode_chunk,
    )

    def make(rows: int | None) -> Actor:
        policy = PolicySettings(
            dtype=dtype,
            remat=remat,
            lora=adapters_of(lora_rank),
            rows=Layout(
                pack_length=pack_length,
                micro_batch_size=rows,
                longest=prompt_length + cap,
            ),
        )
        return random_actor(arch, mesh.make(axes), policy, size)

    if micro_batch_size is None:
        weights = engine.memory(1, prompt_length + cap)["generation weights"]
        actor, said = fitting.for_measuring(make, weights, otherwise=2)
        Console().print(said, markup=False, highlight=False)
    else:
        actor = make(micro_batch_size)
    setup = Setup(
        actor=actor,
        engine=engine,
        rewards=[RewardFunction(name="numeric", function=builtin.numeric)],
        algorithm=AlgorithmConfig(),
    )
    measured = [found for found, _ in run(setup, steps + 1, mean)]
    medians = {
        name: float(np.median([line.get(name, 0.0) for line in measured[1:]]))
        for name in measured[-1]
    }
    _show(medians, arch, count, adapters=lora_rank is not None)


def remedies(
    micro_batch_size: int | None, remat: str, max_num_seqs: int, **_: Any
) -> list[str]:
    """Options that need less memory than these."""
    rows = micro_batch_size or 2
    return [
        *[f"--micro-batch-size {rows // 2} (now {micro_batch_size})"] * (rows > 1),
        *["--remat full"] * (remat != "full"),
        f"--max-num-seqs {max(max_num_seqs // 2, 1)} (now {max_num_seqs})",
    ]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What steps are made of."""

    actor: Actor
    engine: Engine
    """Generates with a model that never stops by itself."""
    rewards: Sequence[RewardFunction]
    algorithm: AlgorithmConfig


def run(
    setup: Setup, steps: int, mean: int | None = None
) -> Iterator[tuple[dict[str, float], Any]]:
    """Whole steps without a critic: what each measured, and the state after it.

    Args:
      mean: of the lengths of responses; all as long as they may be if not given.
    """
    state = setup.actor.start()
    setup.engine.load(setup.actor.weights(state.params), 0)
    with performance.long_lived_objects_set_aside() as set_aside:
        for step in range(steps):
            timer = performance.Timer()
            state, found = _step(setup, state, timer, mean, step)
            yield {**timer.metrics(), **found}, state
            set_aside()


def measure(
    config: Config, arch: models.Architecture, steps: int
) -> tuple[int, int | None]:
    """Runs steps of `config` on the devices that are here, on random weights, with
    everything as long as it may be.

    Returns:
      Bytes held after the last step besides what was there before, of the fullest
      device; and the most that its allocator has handed out in this process, None where
      there is none that counts.

    Raises:
      ConfigError: it has a critic, a penalty in the reward or a teacher, which are not
        run so.
    """
    if has_critic(config) or config.algorithm.use_kl_in_reward:
        raise ConfigError(
            "--measure: runs without a critic and without a penalty in the reward; got "
            f"algorithm.adv_estimator {config.algorithm.adv_estimator}, "
            f"algorithm.use_kl_in_reward {config.algorithm.use_kl_in_reward}"
        )
    if config.distillation:
        raise ConfigError("--measure: runs without a teacher; leave out distillation")
    held, others = 0, _live_bytes()
    meshes = make_meshes(config)
    source = shared(config, models.RandomWeights(arch))
    setup = Setup(
        actor=actor_of(config, source, meshes["actor"], meshes["reference"]),
        engine=engine_of(config, _endless(arch), _Numbers(), meshes["rollout"], []),
        rewards=reward_functions(config),
        algorithm=config.algorithm,
    )
    for _ in run(setup, steps):
        gc.collect()  # what Python has not let go of yet does not stay
        held = max(size - others.get(on, 0) for on, size in _live_bytes().items())
    peak = performance.memory().get("perf/max_memory_allocated_gb")
    return held, None if peak is None else round(peak * 2**30)


def _live_bytes() -> dict[int, int]:
    """Bytes of all arrays that there are, by device id. Two may share a buffer."""
    sizes: dict[int, dict[int, int]] = {}
    for x in jax.live_arrays():
        for shard in x.addressable_shards:
            place = shard.data.unsafe_buffer_pointer()
            sizes.setdefault(shard.device.id, {})[place] = shard.data.nbytes
    return {device: sum(of.values()) for device, of in sizes.items()}


def _endless(arch: models.Architecture) -> models.Architecture:
    """A model that never stops by itself."""
    return dataclasses.replace(arch, eos_token_ids=())


def _step(
    setup: Setup,
    state: grpo.TrainState,
    timer: performance.Timer,
    mean: int | None,
    step: int,
):
    rng, actor, engine = np.random.default_rng(step), setup.actor, setup.engine
    size = actor.settings.step_size
    asked = [
        Prompt(
            id=p,
            content="",
            tokens=tuple(
                rng.integers(0, actor.arch.vocab_size, size.prompt_length).tolist()
            ),
            columns={"answer": "1"},
        )
        for p in range(size.num_prompts)
    ]
    lengths = np.full((len(asked), size.group_size), size.response_length)
    if mean is not None:
        lengths = _drawn(rng, mean, lengths)
    with timer("gen"):
        rollouts = single_turn(_responses(engine, asked, lengths.tolist(), step))
    with timer("reward"):
        scores = score(setup.rewards, asked, rollouts, timeout_s=60.0, on_error="raise")
    with timer("adv"):
        unknown = np.zeros_like(scores.total)
        rows = actor.make_rows(asked, rollouts, unknown)
        noise = rng.normal(size=unknown.shape).astype(np.float32)
        judged = estimate.Judged(
            rewards=scores.total + noise,
            by_function=np.stack([*scores.by_function.values()]),
            weights=np.ones(1, np.float32),
        )
        rows, _ = jax.device_get(
            estimate.advantages_of(rows, judged, algorithm=setup.algorithm)
        )
    with timer("update_actor"):
        state, learned = actor.update(state, rows, seed=step)
    with timer("update_weights"):
        engine.load(actor.weights(state.params), step + 1)
    sizes = lengths.ravel() + size.prompt_length
    return state, {
        "tokens": float(sizes.sum()),
        "new_tokens": float(np.sum(lengths)),
        "squares": float((sizes**2).sum()),
        "token_efficiency": learned["perf/token_efficiency"],
    }


def _drawn(
    rng: np.random.Generator, mean: int, most: Int[np.ndarray, "P G"]
) -> Int[np.ndarray, "P G"]:
    """Lognormal lengths."""
    sigma = 0.8
    drawn = rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, most.shape)
    return np.clip(drawn, 1, most).astype(int)


def _responses(
    engine: Engine, asked: Sequence[Prompt], lengths: list[list[int]], seed: int
) -> list[list[Completion]]:
    """Responses of these lengths. Random weights never stop by themselves, so each gets
    its own limit; where all are equal they are asked for as in a run."""
    count, limits = len(lengths[0]), {x for of in lengths for x in of}
    each = 1 if len(limits) > 1 else count
    requests = [
        Request(
            prompt_id=p.id * count + g,
            tokens=p.tokens,
            num_samples=each,
            seed=seed,
            sampling=Sampling(max_tokens=lengths[p.id][g]),
        )
        for p in asked
        for g in range(0, count, each)
    ]
    found = [one for of in generate(engine, requests) for one in of]
    return [
        [_sample(found[p.id * count + g], p, g) for g in range(count)] for p in asked
    ]


def _sample(completion: Completion, prompt: Prompt, sample: int) -> Completion:
    return dataclasses.replace(completion, prompt_id=prompt.id, sample=sample)


def _show(
    medians: dict[str, float],
    arch: models.Architecture,
    devices: int,
    *,
    adapters: bool,
) -> None:
    whole = medians["timing_s/step"]
    phases = {
        name.removeprefix("timing_s/"): value
        for name, value in medians.items()
        if name.startswith("timing_s/") and name != "timing_s/step"
    }
    phases["the rest"] = whole - sum(phases.values())
    table = Table("phase", "s", "share", title=f"one step, {whole:.2f} s")
    for name, seconds in phases.items():
        table.add_row(name, f"{seconds:.3f}", f"{100 * seconds / whole:.1f} %")
    update = phases["update_actor"]
    flops = performance.train_flops(
        models.num_matmul_params(arch),
        int(medians["tokens"]),
        int(medians["squares"]),
        arch.num_layers,
        arch.num_heads,
        arch.head_dim,
        adapters=adapters,
    )
    peak = hardware.peak_flops(jax.devices()[0].device_kind)
    found = {
        "step_seconds": whole,
        **{f"{name}_seconds": seconds for name, seconds in phases.items()},
        "generated_tokens_per_second": medians["new_tokens"] / phases["gen"],
        "update_tokens_per_second": medians["tokens"] / update,
        **performance.mfu(flops, update, peak, devices),
        **performance.memory(),
        "token_efficiency": medians["token_efficiency"],
        "neither_rollout_nor_update": 1 - (phases["gen"] + update) / whole,
    }
    Console().print(table)
    print(json.dumps(found), flush=True)
