"""What a step would take on devices that need not be here: memory, traffic, time.

The programs of a run - update, log-probabilities, values, prefill, decode, reshard -
are compiled from shapes by the compiler of the devices asked for, with every prompt and
response as long as it may be. Memory and collectives are the compiler's; operations and
memory traffic are counted by formula, since a compiler counts a loop's body once. Times
are lower bounds, which have not been compared with runs. `dry_run` prints it all.
"""

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_llm import collectives, metrics, models
from jaxrl_llm.bench import hardware, shapes, step
from jaxrl_llm.config import Config, ConfigError, CriticModelConfig
from jaxrl_llm.config_algorithm import uses_kl
from jaxrl_llm.critic import Critic
from jaxrl_llm.learner import Learner, needs_old_logprobs, updates_per_step
from jaxrl_llm.rollout.jax_engine import JaxEngine
from jaxrl_llm.train import engine_of, has_critic, make_meshes, placed
from sharding import mesh, plan, reshard

Watch = Callable[[str], AbstractContextManager[Any]]
"""Called with what is being done while it is done, such as `console.progress`."""
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
    received_bytes: float | int | None
    """From other devices, per step; from the compiled program. None if the compiler
    gave up: a device's memory does not suffice."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What one device of a group holds and does."""

    group: str
    """Of `placement.groups`, or all devices."""
    device_kind: str
    num_devices: int
    held: Mapping[str, int]
    """Bytes of what stays from step to step."""
    cache_bytes: int
    """Of the programs' extra: keys and values."""
    wanted_cache_bytes: int
    """The same if memory sufficed."""
    programs: Mapping[str, Program]
    capacity: float | int | None
    """Bytes that a device has; None if not known."""

    @property
    def peak_bytes(self) -> int:
        """While the program runs that needs most."""
        most = max(
            (program.extra_bytes for program in self.programs.values()), default=0
        )
        return sum(self.held.values()) + most

    def seconds(self, program: Program) -> float | None:
        """Per step, if operations, memory or links are all that takes time, and each
        works while the others do; None if the device's rates are not known."""
        peak, known = (
            metrics.peak_flops(self.device_kind),
            hardware.facts(self.device_kind),
        )
        if peak is None or known is None or program.received_bytes is None:
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
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"--topology {topology}: {error}") from error
    return found.devices


def host_of(topology: str) -> Sequence[jax.Device]:
    """A slice as large as what a host of `topology` has, such as v5e:2x2 of v5e:4x4."""
    kind, _, sizes = topology.partition(":")
    own = [chip.coords for chip in tpu(topology) if chip.process_index == 0]
    sides = [1 + max(axis) - min(axis) for axis in zip(*own, strict=True)]
    return tpu(f"{kind}:{'x'.join(map(str, sides[: 1 + sizes.count('x')]))}")


def here(count: int) -> tuple[Sequence[jax.Device], int | None]:
    """The accelerators of this machine if there are so many, and the memory that
    programs may use of each; else simulated CPU devices, whose kernels differ."""
    jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices()
    if devices[0].platform == "cpu" or len(devices) != count:
        return jax.devices("cpu")[:count], None
    return devices, (devices[0].memory_stats() or {}).get("bytes_limit")


def architecture(path: str, revision: str | None = None) -> models.Architecture:
    """Of a name of `bench.shapes` or of a checkpoint; weights are not read."""
    if path.lower() in shapes.NAMES or path.endswith(".json"):
        return shapes.find(path)
    return models.open(path, revision=revision).arch


def estimate(
    config: Config,
    devices: Sequence[jax.Device],
    memory: float | int | None = None,
    watch: Watch = nullcontext,
    host: Sequence[jax.Device] | None = None,
) -> list[Estimate]:
    """Compiles every program of a step for `devices`. One estimate per group.

    Args:
      memory: bytes that a device has; its data sheet's if not given.
      host: what one of several processes has, each of which generates by itself. The
        compiler for a slice makes no programs for a part of it: this is its own slice.

    Raises:
      ValueError: a mesh or an array does not fit, or generation is another engine's,
        whose programs are not ours.
    """
    if config.rollout.engine != "jax":
        raise ConfigError(
            f"rollout.engine {config.rollout.engine}: only what the jax engine needs "
            "can be planned"
        )
    meshes, group_of = make_meshes(config, devices), placed(config.placement)
    arch = architecture(config.model.path, config.model.revision)
    source, known = models.RandomWeights(arch), hardware.facts(devices[0].device_kind)
    capacity = memory or (known and known[0] * _GIB)
    held: dict[str, dict[str, int]] = {group: {} for group in group_of.values()}
    work: dict[str, dict[str, _Work]] = {group: {} for group in held}

    learner = Learner(config, source, meshes["actor"], meshes["reference"])
    held[group_of["actor"]] |= _held_by("", learner.abstract_state())
    work[group_of["actor"]] |= _learning(config, learner)
    if uses_kl(config):
        size = _bytes(learner.abstract_reference())
        held[group_of["reference"]]["reference"] = size
        work[group_of["reference"]] |= _reference(config, learner, size)
    if has_critic(config):
        critic = _critic(config, arch, meshes["critic"])
        held[group_of["critic"]] |= _held_by("critic's ", critic.abstract_state())
        work[group_of["critic"]] |= _judging(config, critic, learner)
    for group in held.values():  # in the host's memory
        group |= {name: 0 for name in config.actor.offload if name in group}

    engine = engine_of(config, arch, None, meshes["rollout"], [])
    rollout, wave = held[group_of["rollout"]], _wave(config, meshes["rollout"])
    wanted = engine.memory(*wave)
    rollout["engine's weights"] = wanted["generation weights"]
    free = None if capacity is None else capacity - sum(rollout.values())
    cache = engine.memory(*wave, free)["generation cache"]
    alone = meshes["rollout"]
    if _processes(alone) > 1:
        alone = mesh.make(alone.local_mesh.shape, host)
    work[group_of["rollout"]] |= _generating(
        config,
        engine_of(config, arch, None, alone, []),
        _wave(config, meshes["rollout"]),
        _processes(meshes["rollout"]),
        free,
    )

    compiled: dict[str, dict[str, Program]] = {group: {} for group in held}
    for group, programs in work.items():
        for name, program in programs.items():
            where = f" on {group}" if config.placement.groups else ""
            with watch(f"compiling {name}{where}"):
                compiled[group][name] = program.compile()
    with watch("compiling reshard"):
        for role, program in _moving(learner, engine, rollout).items():
            compiled[group_of[role]]["reshard"] = program
    counts = {group_of[role]: on.size for role, on in meshes.items()}
    generates = {group_of["rollout"]: (cache, wanted["generation cache"])}
    return [
        Estimate(
            group=group,
            device_kind=devices[0].device_kind,
            num_devices=counts[group],
            held=held[group],
            cache_bytes=generates.get(group, (0, 0))[0],
            wanted_cache_bytes=generates.get(group, (0, 0))[1],
            programs=compiled[group],
            capacity=capacity,
        )
        for group in held
    ]


@dataclass(frozen=True, kw_only=True)
class _Work:
    """A program that is not compiled yet; fields as of `Program`."""

    lower: Callable[[], jax.stages.Lowered]
    kept: int
    """Bytes of its arguments, and of its results, that stay."""
    least: int = 0
    """Extra that is needed just before or after it."""
    num_devices: int
    runs: int
    flops: float
    memory_traffic: float | int

    def compile(self) -> Program:
        received = None
        try:
            compiled = self.lower().compile()
            total = _peak(compiled)
            received = collectives.received(compiled.as_text(), self.num_devices)
        except jax.errors.JaxRuntimeError as error:
            # The compiler of a TPU knows its memory, and how much more it would need.
            needed = re.search(r"\(([\d.]+)G\) exceeds available HBM", str(error))
            if needed is None:
                raise
            total = int(float(needed[1]) * _GIB)
        return Program(
            extra_bytes=max(total - self.kept, self.least),
            runs=self.runs,
            flops=self.flops,
            memory_traffic=self.memory_traffic,
            received_bytes=received and self.runs * received,
        )


def _peak(compiled: jax.stages.Compiled) -> int:
    """Bytes on a device with the program's arguments and results."""
    sizes = compiled.memory_analysis()
    return (
        sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        - sizes.alias_size_in_bytes
        + sizes.temp_size_in_bytes
    )


def _held_by(whose: str, state: Any) -> dict[str, int]:
    return {
        f"{whose}weights": _bytes(state.params),
        f"{whose}optimizer": _bytes(state.opt_state),
    }


def _learning(config: Config, learner: Learner) -> dict[str, _Work]:
    """The policy's programs."""
    state, rows = learner.abstract_state(), learner.largest_rows()
    params, actor = _bytes(state.params), config.actor
    whole = _training_flops(config, learner.arch) / learner.mesh.size
    each, micro = _weights_read(learner.arch, learner.mesh, actor.dtype), 1
    if actor.micro_batch_size:
        micro = -(-rows.tokens.shape[0] // actor.micro_batch_size)
    epochs, updates = actor.ppo_epochs, updates_per_step(config)
    # What waits in the host's memory comes for the update and is not held otherwise.
    away = _bytes(state.opt_state) if "optimizer" in actor.offload else 0
    found = {
        "update": _Work(
            lower=learner.lower_largest_update,
            kept=_bytes(state) - away,
            num_devices=learner.mesh.size,
            runs=updates,
            flops=(4 / 3 if actor.remat == "full" else 1) * whole * epochs,
            # Weights are read forward and twice backward, the state once per update.
            memory_traffic=3 * each * micro * epochs + 2 * updates * _bytes(state),
        )
    }
    # The concentration, which some baselines need, takes what log-probabilities take.
    baseline = config.algorithm.adv_estimator.endswith("optimal_token_baseline")
    passes = needs_old_logprobs(config) + baseline
    if passes:
        found["log-probabilities"] = _Work(
            lower=lambda: learner.policy.lower_scoring(rows, jnp.float32),
            kept=params,
            num_devices=learner.mesh.size,
            runs=passes,
            flops=passes * whole / 3,
            memory_traffic=passes * each * micro,
        )
    return found


def _reference(config: Config, learner: Learner, size: int) -> dict[str, _Work]:
    """The log-probabilities of the reference, whose weights have `size` bytes."""
    policy, rows, actor = learner.reference_policy, learner.largest_rows(), config.actor
    micro = -(-rows.tokens.shape[0] // (actor.micro_batch_size or len(rows.tokens)))
    return {
        "reference's log-probabilities": _Work(
            lower=lambda: policy.lower_scoring(rows, jnp.dtype(actor.dtype)),
            kept=0 if "reference" in actor.offload else size,
            num_devices=policy.mesh.size,
            runs=1,
            flops=_training_flops(config, learner.arch) / 3 / policy.mesh.size,
            memory_traffic=micro
            * _weights_read(learner.arch, policy.mesh, actor.dtype),
        )
    }


def _critic(config: Config, arch: models.Architecture, on: jax.sharding.Mesh):
    """A critic of random weights, of the shape that `critic.model` names."""
    wanted = config.critic.model
    if wanted.path is not None:
        arch = architecture(wanted.path, wanted.revision)
        alone = config.critic.model_copy(update={"model": CriticModelConfig()})
        config = config.model_copy(update={"critic": alone})
    return Critic(config, models.RandomWeights(arch), on)


def _judging(config: Config, critic: Critic, learner: Learner) -> dict[str, _Work]:
    """The critic's programs."""
    state, rows, section = (
        critic.abstract_state(),
        learner.largest_rows(),
        config.critic,
    )
    whole = _training_flops(config, critic.arch) / critic.mesh.size
    each = _weights_read(critic.arch, critic.mesh, section.dtype)
    size = section.micro_batch_size or config.actor.micro_batch_size
    micro = -(-len(rows.tokens) // (size or len(rows.tokens)))
    updates, epochs = critic.updates_per_step, critic.epochs
    return {
        "values": _Work(
            lower=lambda: critic.lower_judging(rows),
            kept=_bytes(state.params),
            num_devices=critic.mesh.size,
            runs=1,
            flops=whole / 3,
            memory_traffic=each * micro,
        ),
        "critic's update": _Work(
            lower=lambda: critic.lower_update(rows),
            kept=_bytes(state),
            num_devices=critic.mesh.size,
            runs=updates,
            flops=(4 / 3 if section.remat == "full" else 1) * whole * epochs,
            memory_traffic=3 * each * micro * epochs + 2 * updates * _bytes(state),
        ),
    }


def _generating(
    config: Config,
    engine: JaxEngine,
    largest: tuple[int, int],
    processes: int,
    free: float | int | None,
) -> dict[str, _Work]:
    """The programs of the engine of one of `processes`, for `largest` as of `_wave`,
    with `free` bytes on each device."""
    rollout, arch, count = config.rollout, engine.arch, processes * engine.mesh.size
    wave, longest = largest
    size = engine.memory(wave, longest, free)
    weights, cache = size["generation weights"], size["generation cache"]
    prompts, prompt = config.data.train_batch_size, config.data.max_prompt_length
    responses, response = prompts * rollout.n, rollout.max_response_length
    matrix, heads = models.num_matmul_params(arch), arch.num_heads * arch.head_dim
    shape = arch.num_layers, arch.num_heads, arch.head_dim
    read = metrics.train_flops(matrix, prompts * prompt, prompts * prompt**2, *shape)
    reads = -(
        -prompts * prompt // (rollout.prefill_tokens * engine.replicas * processes)
    )
    waves, mean = -(-responses // (wave * processes)), prompt + response / 2
    attended = 4 * heads * arch.num_layers * mean

    def lower() -> dict[str, jax.stages.Lowered]:
        return engine.lower(wave, -(-prompts // processes), prompt, free)

    return {
        "prefill": _Work(
            lower=lambda: lower()["prefill"],
            kept=weights,
            num_devices=engine.mesh.size,
            runs=reads,
            flops=read / 3 / count,
            memory_traffic=reads * weights,
        ),
        "decode": _Work(
            lower=lambda: lower()["decode"],
            kept=weights,
            num_devices=engine.mesh.size,
            runs=waves * -(-response // rollout.decode_chunk),
            flops=responses * response * (2 * matrix + attended) / count,
            memory_traffic=waves * response * (weights + cache * mean / longest),
        ),
    }


def _moving(
    learner: Learner, engine: JaxEngine, held: Mapping[str, int]
) -> dict[str, Program]:
    """The weights' way to the engine, by the role whose devices have a part in it.

    Args:
      held: by the engine's devices.
    """
    params, target = learner.abstract_state().params, engine.abstract_params()
    weights, before = held["engine's weights"], _bytes(target)
    traffic = {"actor": _bytes(params), "rollout": before}
    # The old copy goes before the new one comes, whose layers are then joined.
    joining = before + engine.layer_bytes - weights
    if engine.shares_devices(params):
        return {
            "actor": _Work(
                lower=lambda: engine.lower_load(params),
                kept=_bytes(params) + weights,
                least=joining,
                num_devices=learner.mesh.size,
                runs=1,
                flops=0.0,
                memory_traffic=sum(traffic.values()),
            ).compile()
        }
    way, source = plan.plan(params, target), jax.tree.leaves(params)[0].sharding
    together = source.device_set == jax.tree.leaves(target)[0].sharding.device_set
    peaks, made = {"actor": 0, "rollout": joining}, 0
    for chunk, compiled in zip(way.chunks, reshard.programs(way), strict=True):
        size = _peak(compiled)
        if together:  # else blocks are cut out, and zeros where there are none
            size -= compiled.memory_analysis().argument_size_in_bytes
        peaks["actor"] = max(peaks["actor"], size)
        peaks["rollout"] = max(peaks["rollout"], made + size - weights)
        made += sum(move.wanted_bytes for move in chunk)
    received = max(way.received.values())
    if together:
        return {
            "actor": Program(
                extra_bytes=peaks["rollout"],
                runs=1,
                flops=0.0,
                memory_traffic=sum(traffic.values()),
                received_bytes=received,
            )
        }
    return {
        role: Program(
            extra_bytes=peaks[role],
            runs=1,
            flops=0.0,
            memory_traffic=traffic[role],
            received_bytes=received if role == "rollout" else 0,
        )
        for role in peaks
    }


def _training_flops(config: Config, arch: models.Architecture) -> float:
    """Forward and backward, of a step's prompts and responses, on all devices."""
    responses, longest = (
        config.data.train_batch_size * config.rollout.n,
        _longest(config),
    )
    return metrics.train_flops(
        models.num_matmul_params(arch),
        responses * longest,
        responses * longest**2,
        arch.num_layers,
        arch.num_heads,
        arch.head_dim,
    )


def _weights_read(arch: models.Architecture, on: jax.sharding.Mesh, dtype: str) -> int:
    """Bytes of all weights that a device multiplies with."""
    width = jnp.dtype(dtype).itemsize
    return width * models.num_params(arch) // on.shape["tensor"]


def _longest(config: Config) -> int:
    """Tokens of a prompt with its response."""
    return config.data.max_prompt_length + config.rollout.max_response_length


def _wave(config: Config, on: jax.sharding.Mesh) -> tuple[int, int]:
    """Responses that a process decodes together, and tokens of each with its prompt."""
    prompts = -(-config.data.train_batch_size // _processes(on))
    return min(prompts * config.rollout.n, config.rollout.max_num_seqs), _longest(
        config
    )


def _processes(on: jax.sharding.Mesh) -> int:
    return len({device.process_index for device in on.devices.flat})


def _bytes(tree: Any) -> int:
    """On one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def measure(config: Config, steps: int) -> tuple[int, int | None]:
    """Runs steps of `config` on the devices that are here, on random weights, with
    everything as long as it may be.

    Returns:
      Bytes held after the last step, of the fullest device; and the most that its
      allocator has handed out in this process, None where there is none that counts.

    Raises:
      ConfigError: it has a critic or a penalty in the reward, which are not run so.
    """
    if has_critic(config) or config.algorithm.use_kl_in_reward:
        raise ConfigError(
            "--measure: runs without a critic and without a penalty in the reward; got "
            f"algorithm.adv_estimator {config.algorithm.adv_estimator}, "
            f"algorithm.use_kl_in_reward {config.algorithm.use_kl_in_reward}"
        )
    held, arch = 0, architecture(config.model.path, config.model.revision)
    for _ in step.run(config, arch, steps):
        held = max(_live_bytes().values())
    peak = metrics.memory().get("perf/max_memory_allocated_gb")
    return held, None if peak is None else round(peak * _GIB)


def _live_bytes() -> dict[int, int]:
    """Of all arrays that there are, by device id. Two may share a buffer."""
    sizes: dict[int, dict[int, int]] = {}
    for x in jax.live_arrays():
        for shard in x.addressable_shards:
            place = shard.data.unsafe_buffer_pointer()
            sizes.setdefault(shard.device.id, {})[place] = shard.data.nbytes
    return {device: sum(of.values()) for device, of in sizes.items()}


def advice(config: Config, found: Estimate) -> list[str]:
    """What to change where memory does not suffice; empty if it does."""
    if found.capacity is None or found.peak_bytes <= found.capacity:
        return []
    held, room = sum(found.held.values()), found.capacity
    worst = max(found.programs, key=lambda name: found.programs[name].extra_bytes)
    whose = "critic" if worst in ("values", "critic's update") else "actor"
    section = getattr(config, whose)
    said, size = [], config.rollout.mesh.tensor
    if held > room / 2:
        learns = "weights" in found.held
        if learns and config.actor.mesh.data != 1:
            said.append(
                "actor.mesh: data 1 and fsdp -1, to split all weights and moments"
            )
        if learns and "optimizer" not in config.actor.offload:
            said.append("actor.offload: [optimizer], which waits in the host's memory")
        engine = found.held.get("engine's weights", 0)
        if engine > held / 4 and size < found.num_devices:
            said.append(
                f"rollout.mesh.tensor: {2 * size}, to split the engine's weights"
            )
        needed = -(-held * found.num_devices // int(room / 2))
        said.append(f"about {needed} devices, to keep half of each for activations")
    match worst:
        case "prefill" | "decode":
            half = config.rollout.max_num_seqs // 2
            said.append(f"rollout.max_num_seqs: {half}, for half the cache")
            said.append(f"rollout.mesh.tensor: {2 * size}, to split weights and cache")
        case "reshard":
            said.append(f"rollout.mesh.tensor: {2 * size}, to split what arrives")
        case _:
            micro = section.micro_batch_size or config.actor.micro_batch_size
            if section.remat != "full":
                said.append(f"{whose}.remat: full")
            if micro is None or micro > 1:
                said.append(f"{whose}.micro_batch_size: {(micro or 2) // 2}")
            said.append(f"{whose}.mesh.tensor: twice as many, to split activations")
    return said
