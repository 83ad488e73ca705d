"""What a step would take on devices that need not be here: memory, traffic, time.

The programs of a run - update, log-probabilities, prefill, decode, reshard - are
compiled from shapes by the compiler of the devices asked for, with every prompt and
response as long as it may be. Memory and collectives are the compiler's; operations and
memory traffic are counted by formula, since a compiler counts a loop's body once. Times
are lower bounds, which have not been compared with runs. For GPUs the programs are
compiled for simulated CPU devices, with their kernels.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from jaxrl_llm import collectives, metrics, models
from jaxrl_llm.bench import hardware, shapes
from jaxrl_llm.config import Config, ConfigError
from jaxrl_llm.config_algorithm import uses_kl
from jaxrl_llm.learner import Learner, needs_old_logprobs, updates_per_step
from jaxrl_llm.rollout.jax_engine import JaxEngine
from jaxrl_llm.train import make_meshes
from sharding import plan, reshard

_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Program:
    """One compiled program on one device, and what a step makes of it."""

    extra_bytes: int
    """Peak above everything that stays."""
    runs: int
    """Per step."""
    flops: float
    """Per step; by formula."""
    memory_traffic: float | int
    """Bytes read and written per step that cannot be avoided; by formula."""
    received_bytes: float | int
    """From other devices, per step; from the compiled program."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What one device holds and does."""

    device_kind: str
    num_devices: int
    held: Mapping[str, int]
    """Bytes of what stays from step to step."""
    cache_bytes: int
    """Of the programs' extra: keys and values."""
    programs: Mapping[str, Program]
    capacity: float | int | None
    """Bytes that a device has; None if not known."""

    @property
    def peak_bytes(self) -> int:
        """While the program runs that needs most."""
        most = max(program.extra_bytes for program in self.programs.values())
        return sum(self.held.values()) + most

    def seconds(self, program: Program) -> float | None:
        """Per step, if operations, memory or links are all that takes time, and each
        works while the others do; None if the device's rates are not known."""
        peak, known = (
            metrics.peak_flops(self.device_kind),
            hardware.facts(self.device_kind),
        )
        if peak is None or known is None:
            return None
        _, memory_rate, link = known
        return max(
            program.flops / peak,
            program.memory_traffic / memory_rate,
            program.received_bytes / link,
        )


def tpu(topology: str) -> Sequence[jax.Device]:
    """The chips of a TPU slice that need not be here, e.g. of "v5p:4x4x4".

    Raises:
      ValueError: there is no such slice; needs the package libtpu.
    """
    from jax.experimental import topologies

    # There is no machine to ask, and no chip that two processes could want.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"--topology {topology}: {error}") from error
    return found.devices


def architecture(config: Config) -> models.Architecture:
    """Of a name of `bench.shapes` or of a checkpoint; weights are not read."""
    path = config.model.path
    if path.lower() in shapes.NAMES or path.endswith(".json"):
        return shapes.find(path)
    return models.open(path, revision=config.model.revision).arch


def estimate(
    config: Config,
    arch: models.Architecture,
    devices: Sequence[jax.Device],
    memory: float | int | None = None,
) -> Estimate:
    """Compiles every program of a step for `devices`.

    Args:
      memory: bytes that a device has; its data sheet's if not given.

    Raises:
      ValueError: a mesh or an array does not fit, or there is a critic, a reward
        model or another engine, whose programs are not planned.
    """
    if config.algorithm.adv_estimator == "gae":
        raise ConfigError(
            "algorithm.adv_estimator gae: a critic's update is not planned"
        )
    if config.reward.model:
        raise ConfigError("reward.model: a reward model's scoring is not planned")
    if config.placement.groups:
        raise ConfigError("placement.groups: only plans of all devices for all roles")
    meshes, source = make_meshes(config, devices), models.RandomWeights(arch)
    learner = Learner(config, source, meshes["actor"], meshes["reference"])
    engine = JaxEngine(
        arch,
        None,
        mesh=meshes["rollout"],
        dtype=jnp.dtype(config.rollout.dtype),
        max_model_len=_wave(config)[1],
        max_num_seqs=config.rollout.max_num_seqs,
        decode_chunk=config.rollout.decode_chunk,
        prefill_tokens=config.rollout.prefill_tokens,
        cache_gib=config.rollout.cache_gib,
        quantization=config.rollout.quantization,
        kv_cache_dtype=config.rollout.kv_cache_dtype,
    )
    state, generation = learner.abstract_state(), engine.memory(*_wave(config))
    held = {
        "weights": _bytes(state.params),
        "optimizer": _bytes(state.opt_state),
        "reference": _bytes(learner.abstract_reference()) if uses_kl(config) else 0,
        "engine's weights": generation["generation weights"],
    }
    held |= dict.fromkeys(config.actor.offload, 0)  # in the host's memory
    known = hardware.facts(devices[0].device_kind)
    return Estimate(
        device_kind=devices[0].device_kind,
        num_devices=len(devices),
        held=held,
        cache_bytes=generation["generation cache"],
        programs=dict(_programs(config, learner, engine)),
        capacity=memory or (known and known[0] * _GIB),
    )


def _programs(
    config: Config, learner: Learner, engine: JaxEngine
) -> Iterator[tuple[str, Program]]:
    arch, count = learner.arch, learner.mesh.size
    state, weights = learner.abstract_state(), _bytes(engine.abstract_params())
    rows, (wave, longest) = learner.largest_rows().tokens.shape, _wave(config)
    prompts, prompt = config.data.train_batch_size, config.data.max_prompt_length
    responses, response = prompts * config.rollout.n, longest - prompt
    matrix, heads = models.num_matmul_params(arch), arch.num_heads * arch.head_dim

    def training_flops(sequences: int, length: int) -> float:
        size = sequences * length, sequences * length**2
        shape = arch.num_layers, arch.num_heads, arch.head_dim
        return metrics.train_flops(matrix, *size, *shape) / count

    def program(compiled, kept: int, runs: int, flops: float, traffic: float | int):
        sizes = compiled.memory_analysis()
        return Program(
            extra_bytes=sizes.argument_size_in_bytes
            + sizes.output_size_in_bytes
            - sizes.alias_size_in_bytes
            + sizes.temp_size_in_bytes
            - kept,
            runs=runs,
            flops=flops,
            memory_traffic=traffic,
            received_bytes=runs * collectives.received(compiled.as_text(), count),
        )

    width = jnp.dtype(config.actor.dtype).itemsize
    each = width * models.num_params(arch) // learner.mesh.shape["tensor"]
    whole, passes = training_flops(responses, longest), updates_per_step(config)
    epochs = config.actor.ppo_epochs
    micro = -(-rows[0] // (config.actor.micro_batch_size or rows[0]))
    # Weights are read forward and twice backward, and the state once per update.
    traffic = 3 * each * micro * epochs + 2 * passes * _bytes(state)
    again = 4 / 3 if config.actor.remat == "full" else 1
    update = learner.compile_largest_update()
    yield (
        "update",
        program(update, _bytes(state), passes, again * whole * epochs, traffic),
    )
    policies = uses_kl(config) + needs_old_logprobs(config)
    if policies:
        yield (
            "log-probabilities",
            program(
                learner.compile_largest_scoring(),
                _bytes(state.params),
                policies,
                policies * whole / 3,
                policies * each * micro,
            ),
        )
    waves, chunk = -(-responses // wave), config.rollout.decode_chunk
    compiled = engine.compile(wave, prompt)
    reads = -(-prompts * prompt // (config.rollout.prefill_tokens * engine.replicas))
    flops = training_flops(prompts, prompt) / 3
    read = program(compiled["prefill"], weights, reads, flops, reads * weights)
    yield "prefill", read
    cache = engine.memory(wave, longest)["generation cache"]
    tokens, mean = responses * response, prompt + response / 2
    attended = 4 * heads * arch.num_layers * mean
    yield (
        "decode",
        program(
            compiled["decode"],
            weights,
            waves * -(-response // chunk),
            tokens * (2 * matrix + attended) / count,
            waves * response * (weights + cache * mean / longest),
        ),
    )
    way = plan.plan(state.params, engine.abstract_params())
    reshard.programs(way)  # that it compiles
    yield (
        "reshard",
        Program(
            extra_bytes=way.peak_extra_bytes() - weights,
            runs=1,
            flops=0.0,
            memory_traffic=_bytes(state.params) + weights,
            received_bytes=max(way.received.values()),
        ),
    )


def advice(config: Config, found: Estimate) -> list[str]:
    """What to change where memory does not suffice; empty if it does."""
    if found.capacity is None or found.peak_bytes <= found.capacity:
        return []
    held, room = sum(found.held.values()), found.capacity
    worst = max(found.programs, key=lambda name: found.programs[name].extra_bytes)
    said, size = [], config.rollout.mesh.tensor
    if held > room / 2:
        if config.actor.mesh.data != 1:
            said.append(
                "actor.mesh: data 1 and fsdp -1, to split all weights and moments"
            )
        if not config.actor.offload:
            said.append("actor.offload: [optimizer], which waits in the host's memory")
        if found.held["engine's weights"] > held / 4 and size < found.num_devices:
            said.append(
                f"rollout.mesh.tensor: {2 * size}, to split the engine's weights"
            )
        needed = -(-held * found.num_devices // int(room / 2))
        said.append(f"about {needed} devices, to keep half of each for activations")
    match worst:
        case "update" | "log-probabilities":
            micro = config.actor.micro_batch_size
            if config.actor.remat != "full":
                said.append("actor.remat: full")
            if micro is None or micro > 1:
                said.append(f"actor.micro_batch_size: {(micro or 2) // 2}")
            said.append("actor.mesh.tensor: twice as many, to split activations")
        case "prefill" | "decode":
            half = config.rollout.max_num_seqs // 2
            said.append(f"rollout.max_num_seqs: {half}, for half the cache")
            said.append(f"rollout.mesh.tensor: {2 * size}, to split weights and cache")
    return said


def show(config: Config, found: Estimate) -> None:
    """Prints memory, traffic and time per device, and what to change."""
    console, programs = Console(), found.programs
    memory = Table(
        "memory per device", "GiB", title=f"{found.num_devices} x {found.device_kind}"
    )
    for name, size in found.held.items():
        memory.add_row(name, f"{size / _GIB:.2f}")
    for name, program in programs.items():
        memory.add_row(f"+ {name}", f"{program.extra_bytes / _GIB:.2f}")
    memory.add_row("of prefill and decode: KV cache", f"{found.cache_bytes / _GIB:.2f}")
    memory.add_row("peak", f"{found.peak_bytes / _GIB:.2f}")
    if found.capacity:
        memory.add_row("there is", f"{found.capacity / _GIB:.2f}")
    console.print(memory)
    work = Table(
        "per device and step", "runs", "TFLOP", "GB memory", "GB received", "s at least"
    )
    for name, program in programs.items():
        seconds = found.seconds(program)
        work.add_row(
            name,
            str(program.runs),
            f"{program.flops / 1e12:.4g}",
            f"{program.memory_traffic / 1e9:.4g}",
            f"{program.received_bytes / 1e9:.4g}",
            "" if seconds is None else f"{seconds:.3g}",
        )
    times = [found.seconds(program) for program in programs.values()]
    if None not in times:
        work.add_row("all", "", "", "", "", f"{sum(times):.3g}")
    console.print(work)
    if found.capacity:
        said = advice(config, found)
        console.print("does not fit; change one or more of" if said else "fits")
        for line in said:
            console.print(f"  {line}", markup=False, highlight=False)


def _wave(config: Config) -> tuple[int, int]:
    """Responses decoded together, and tokens of each with its prompt."""
    rows = config.data.train_batch_size * config.rollout.n
    longest = config.data.max_prompt_length + config.rollout.max_response_length
    return min(rows, config.rollout.max_num_seqs), longest


def _bytes(tree: Any) -> int:
    """On one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )
