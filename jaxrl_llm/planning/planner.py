"""What a step would take on devices that need not be here: memory, traffic, time.

The programs of a run - update, log-probabilities, values, prefill, decode, reshard -
are compiled from shapes by the compiler of the devices asked for, with every prompt and
response as long as it may be. Memory and collectives are the compiler's; operations and
memory traffic are counted by formula, since a compiler counts a loop's body once. Times
are lower bounds, which have not been compared with runs. `dry_run` prints it all.
"""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from jaxrl_llm import models
from jaxrl_llm.config.checks import uses_kl
from jaxrl_llm.config.parsing import ConfigError
from jaxrl_llm.config.schema import Config
from jaxrl_llm.planning import gpus, workload
from jaxrl_llm.planning.workload import Program, Work
from jaxrl_llm.roles.actor import Actor
from jaxrl_llm.roles.critic import Critic
from jaxrl_llm.sharding import hardware, mesh, processes
from jaxrl_llm.training import fitting
from jaxrl_llm.training.build import engine_of, has_critic, make_meshes
from jaxrl_llm.training.fitting import bytes_of
from jaxrl_llm.training.roles import actor_of, shared
from jaxrl_llm.training.settings import placed

Watch = Callable[[str], AbstractContextManager[Any]]
"""Called with what is being done while it is done, such as `console.progress`."""
_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What one device of a group holds and does."""

    group: str
    """A group of `placement.groups`, or all devices."""
    device_kind: str
    num_devices: int
    num_processes: int
    """Processes that share the devices."""
    held: Mapping[str, int]
    """Bytes of what stays from step to step."""
    cache_bytes: int
    """Bytes of keys and values, part of what the programs need."""
    wanted_cache_bytes: int
    """Bytes of keys and values if memory sufficed."""
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
            hardware.peak_flops(self.device_kind),
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


def elsewhere(topology: str) -> tuple[Sequence[jax.Device], int | None]:
    """The devices that a topology names, which need not be here, and the memory that
    programs may use of each, or None for what their data sheet says.

    Args:
      topology: of a TPU slice, such as v5p:4x4x4, or of GPUs; see `gpus.devices`.

    Raises:
      ValueError: as of `tpu` and `gpus.devices`.
    """
    if gpus.is_gpu(topology):
        return gpus.devices(topology), gpus.usable_bytes(topology)
    return tpu(topology), None


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
    """The devices of one host of `topology`, such as v5e:2x2 of v5e:4x4."""
    if gpus.is_gpu(topology):
        return gpus.devices(gpus.host_of(topology))
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


def for_devices(plan: Callable[..., Any]) -> Callable[..., Any]:
    """A plan during which JAX's kernels are built for the devices planned for."""

    @functools.wraps(plan)
    def planned(
        config: Any, devices: Sequence[jax.Device], *rest: Any, **more: Any
    ) -> Any:
        with gpus.asked_about(devices):
            return plan(config, devices, *rest, **more)

    return planned


@for_devices
def completed(
    config: Config,
    devices: Sequence[jax.Device],
    memory: float | int | None = None,
    watch: Watch = nullcontext,
) -> tuple[Config, list[str]]:
    """The configuration with the micro-batch sizes that a run on `devices` would choose
    where none is given, and what these are. As it is, if their memory is not known.

    Args:
      memory: bytes that a device has; its data sheet's if not given.

    Raises:
      ValueError: as of `estimate`.
    """
    capacity = capacity_of(devices, memory)
    if capacity is None or config.actor.micro_batch_size is not None:
        return config, []
    _check(config)
    meshes = make_meshes(config, devices)
    arch = workload.architecture(config.model.path, config.model.revision)
    source = shared(config, models.RandomWeights(arch))
    engine = engine_of(config, arch, None, meshes["rollout"], [])

    def actor_with(config: Config) -> Actor:
        return _actor(config, source, meshes)

    def critic_with(config: Config) -> Critic:
        return workload.critic_of(config, source, meshes["critic"])

    actor = actor_with(config)
    critic = critic_with(config) if has_critic(config) else None
    config, _, _, said = fitting.sized(
        config,
        actor,
        critic,
        lambda: fitting.kept(config, actor, engine, critic, None),
        actor_with,
        critic_with,
        watch,
        capacity,
    )
    return config, said


def _actor(
    config: Config, source: models.WeightSource, meshes: Mapping[str, Mesh]
) -> Actor:
    """The policy of a run, with its reference and its teacher, of random weights."""
    teacher = None
    if config.distillation:
        teacher = workload.teacher_of(config, source.arch, meshes["teacher"])
    on = meshes["actor"], meshes["reference"]
    return actor_of(config, source, *on, teacher=teacher)


def capacity_of(
    devices: Sequence[jax.Device], memory: float | int | None
) -> float | int | None:
    """Bytes that a device has; None if that is not known."""
    known = hardware.facts(devices[0].device_kind)
    return memory or (known and known[0] * _GIB)


def _check(config: Config) -> None:
    """Raises ConfigError for what cannot be planned."""
    if config.rollout.engine != "jax":
        raise ConfigError(
            f"rollout.engine {config.rollout.engine}: only what the jax engine needs "
            "can be planned"
        )
    if config.reward.model:
        raise ConfigError("reward.model: a reward model's scoring is not planned")


@for_devices
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
      ValueError: a mesh or an array does not fit, there is a reward model, whose
        programs are not planned, or generation is another engine's.
    """
    _check(config)
    meshes, group_of = make_meshes(config, devices), placed(config.placement)
    arch = workload.architecture(config.model.path, config.model.revision)
    source = shared(config, models.RandomWeights(arch))
    capacity = capacity_of(devices, memory)
    held: dict[str, dict[str, int]] = {group_of[role]: {} for role in meshes}
    work: dict[str, dict[str, Work]] = {group: {} for group in held}

    learner = _actor(config, source, meshes)
    held[group_of["actor"]] |= workload.held_by("", learner.abstract_state())
    work[group_of["actor"]] |= workload.learning(config, learner)
    if uses_kl(config):
        size = bytes_of(learner.reference.abstract_params())
        held[group_of["reference"]]["reference"] = size
        work[group_of["reference"]] |= workload.reference(config, learner)
    if learner.teacher:
        size = bytes_of(learner.teacher.abstract_params())
        held[group_of["teacher"]]["teacher"] = size
        work[group_of["teacher"]] |= workload.teaching(config, learner, size)
    critic = None
    if has_critic(config):
        critic = workload.critic_of(config, source, meshes["critic"])
        state = critic.abstract_state()
        held[group_of["critic"]] |= workload.held_by("critic's ", state)
        work[group_of["critic"]] |= workload.judging(config, critic, learner)
    for role, sizes in fitting.frozen(learner, critic).items():
        held[group_of[role]] |= sizes
    for group in held.values():  # in the host's memory
        away = [*config.actor.offload]
        if learner.teacher and learner.teacher.offload:
            away.append("teacher")
        group |= {name: 0 for name in away if name in group}

    engine = engine_of(config, arch, None, meshes["rollout"], [])
    rollout, alone = held[group_of["rollout"]], meshes["rollout"]
    wave, count = workload.wave_of(config, alone), processes.of(alone)
    wanted = engine.memory(*wave)
    rollout["engine's weights"] = wanted["generation weights"]
    free = None if capacity is None else capacity - sum(rollout.values())
    cache = engine.memory(*wave, free)["generation cache"]
    if count > 1:
        alone = mesh.make(alone.local_mesh.shape, host)
    work[group_of["rollout"]] |= workload.generating(
        config, engine_of(config, arch, None, alone, []), wave, count, free
    )

    compiled: dict[str, dict[str, Program]] = {group: {} for group in held}
    for group, programs in work.items():
        for name, program in programs.items():
            where = f" on {group}" if config.placement.groups else ""
            with watch(f"compiling {name}{where}"):
                compiled[group][name] = program.compile()
    with watch("compiling reshard"):
        verified = config.rollout.checksum_freq > 0
        moving = workload.moving(learner, engine, rollout, verified=verified)
        for role, program in moving.items():
            compiled[group_of[role]]["reshard"] = program
    counts = {group_of[role]: on.size for role, on in meshes.items()}
    generates = {group_of["rollout"]: (cache, wanted["generation cache"])}
    return [
        Estimate(
            group=group,
            device_kind=devices[0].device_kind,
            num_devices=counts[group],
            num_processes=count,
            held=held[group],
            cache_bytes=generates.get(group, (0, 0))[0],
            wanted_cache_bytes=generates.get(group, (0, 0))[1],
            programs=compiled[group],
            capacity=capacity,
        )
        for group in held
    ]
