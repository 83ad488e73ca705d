"""The programs of a step from shapes: who runs what, how often, on how much.

A program's memory and what it receives from other devices are its compiler's figures;
operations and memory traffic are formulas, since a compiler counts a loop's body once.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxrl_llm import models
from jaxrl_llm.config import plugins
from jaxrl_llm.config.schema import Config
from jaxrl_llm.config.schema_training import TrainedConfig
from jaxrl_llm.models import known_shapes as shapes
from jaxrl_llm.roles.actor import Actor
from jaxrl_llm.roles.critic import Critic
from jaxrl_llm.roles.teacher import Teacher
from jaxrl_llm.rollout.native.engine import JaxEngine
from jaxrl_llm.sharding import checksum, processes, reshard
from jaxrl_llm.sharding import compiled_traffic as collectives
from jaxrl_llm.sharding import transfer_plan as plan
from jaxrl_llm.tracking import performance
from jaxrl_llm.training import roles, settings
from jaxrl_llm.training.fitting import bytes_of, peak

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
class Work:
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
        """The program, as far as the devices' memory lets its compiler go."""
        received = None
        try:
            compiled = self.lower().compile()
            total = peak(compiled)
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


def held_by(whose: str, state: Any) -> dict[str, int]:
    """Bytes of a training state on each device, by purpose."""
    return {
        f"{whose}weights": bytes_of(state.params),
        f"{whose}optimizer": bytes_of(state.opt_state),
    }


def learning(config: Config, learner: Actor) -> dict[str, Work]:
    """The policy's programs."""
    state, rows = learner.abstract_state(), learner.largest_rows()
    frozen, actor = bytes_of(learner.abstract_frozen()), config.actor
    whole = _training_flops(config, learner.arch) / learner.mesh.size
    update = _update_flops(config, learner.arch, actor) / learner.mesh.size
    each, micro = weights_read(learner.arch, learner.mesh, actor.dtype), 1
    if actor.micro_batch_size:
        micro = -(-rows.tokens.shape[0] // actor.micro_batch_size)
    epochs, updates = actor.ppo_epochs, settings.updates_per_step(config)
    # What waits in the host's memory comes for the update and is not held otherwise.
    away = bytes_of(state.opt_state) if "optimizer" in actor.offload else 0
    flops = update * epochs
    # Weights are read forward and twice backward, the state once per update.
    traffic = 3 * each * micro * epochs + 2 * updates * bytes_of(state)
    held = bytes_of(state) - away + frozen
    if teacher := learner.teacher_within:  # reads the rows in every pass
        own = teacher.policy
        flops += _training_flops(config, own.arch) / 3 / own.mesh.size * epochs
        read = weights_read(own.arch, own.mesh, own.settings.dtype)
        traffic += read * micro * epochs
        held += 0 if teacher.offload else bytes_of(teacher.abstract_params())
    found = {
        "update": Work(
            lower=learner.lower_largest_update,
            kept=held,
            num_devices=learner.mesh.size,
            runs=updates,
            flops=flops,
            memory_traffic=traffic,
        )
    }
    # The concentration, which some baselines need, takes what log-probabilities take.
    baseline = "sum_pi_squared" in plugins.estimator_of(config.algorithm).needs
    passes = settings.needs_old_logprobs(config) + baseline
    if passes:
        found["log-probabilities"] = Work(
            lower=lambda: learner.lower_scoring(rows),
            kept=bytes_of(state.params) + frozen,
            num_devices=learner.mesh.size,
            runs=passes,
            flops=passes * whole / 3,
            memory_traffic=passes * each * micro,
        )
    return found


def reference(config: Config, learner: Actor) -> dict[str, Work]:
    """The log-probabilities of the reference."""
    judge, rows, actor = learner.reference, learner.largest_rows(), config.actor
    policy, own = judge.policy, bytes_of(judge.abstract_params())
    micro = -(-rows.tokens.shape[0] // (actor.micro_batch_size or len(rows.tokens)))
    return {
        "reference's log-probabilities": Work(
            lower=lambda: policy.lower_scoring(rows, judge.abstract_weights()),
            kept=(0 if "reference" in actor.offload else own)
            + bytes_of(judge.abstract_frozen()),
            num_devices=policy.mesh.size,
            runs=1,
            flops=_training_flops(config, learner.arch) / 3 / policy.mesh.size,
            memory_traffic=micro * weights_read(learner.arch, policy.mesh, actor.dtype),
        )
    }


def teacher_of(config: Config, arch: models.Architecture, on: Mesh) -> Teacher:
    """A teacher of random weights, of the shape that `distillation.teacher` names.

    Args:
      arch: the policy's.
    """
    wanted = config.distillation.teacher
    own = architecture(wanted.path, wanted.revision)
    shared = min(own.vocab_size, arch.vocab_size)
    return roles.teacher_of(config, models.RandomWeights(own), shared, on)


def teaching(config: Config, learner: Actor, size: int) -> dict[str, Work]:
    """What the teacher says before the update, whose weights have `size` bytes."""
    teacher, rows = learner.teacher_before, learner.largest_rows()
    if teacher is None:
        return {}
    policy = teacher.policy
    together = policy.layout.micro_batch_size or len(rows.tokens)
    micro = -(-len(rows.tokens) // together)
    return {
        "teacher's log-probabilities": Work(
            lower=lambda: teacher.lower_scoring(rows),
            kept=0 if teacher.offload else size,
            num_devices=policy.mesh.size,
            runs=1,
            flops=_training_flops(config, policy.arch) / 3 / policy.mesh.size,
            memory_traffic=micro
            * weights_read(policy.arch, policy.mesh, policy.settings.dtype),
        )
    }


def critic_of(config: Config, source: models.WeightSource, on: Mesh) -> Critic:
    """A critic of random weights, of the shape that `critic.model` names.

    Args:
      source: the policy's.
    """
    wanted = config.critic.model
    if wanted.path is not None:
        arch = architecture(wanted.path, wanted.revision)
        source = models.Quantising(models.RandomWeights(arch))
    return roles.critic_of(config, source, on)


def judging(config: Config, critic: Critic, learner: Actor) -> dict[str, Work]:
    """The critic's programs."""
    state, rows, section = (
        critic.abstract_state(),
        learner.largest_rows(),
        config.critic,
    )
    frozen = bytes_of(critic.abstract_frozen())
    whole = _training_flops(config, critic.arch) / critic.mesh.size
    update = _update_flops(config, critic.arch, section) / critic.mesh.size
    each = weights_read(critic.arch, critic.mesh, section.dtype)
    size = section.micro_batch_size or config.actor.micro_batch_size
    micro = -(-len(rows.tokens) // (size or len(rows.tokens)))
    updates = settings.critic_updates_per_step(config)
    epochs = critic.settings.mini_batches.epochs
    return {
        "values": Work(
            lower=lambda: critic.lower_judging(rows),
            kept=bytes_of(state.params) + frozen,
            num_devices=critic.mesh.size,
            runs=1,
            flops=whole / 3,
            memory_traffic=each * micro,
        ),
        "critic's update": Work(
            lower=lambda: critic.lower_update(rows),
            kept=bytes_of(state) + frozen,
            num_devices=critic.mesh.size,
            runs=updates,
            flops=update * epochs,
            memory_traffic=3 * each * micro * epochs + 2 * updates * bytes_of(state),
        ),
    }


def generating(
    config: Config,
    engine: JaxEngine,
    largest: tuple[int, int],
    num_processes: int,
    free: float | int | None,
) -> dict[str, Work]:
    """The programs of the engine of one of `num_processes`, for `largest` as of
    `wave_of`, with `free` bytes on each device."""
    rollout, arch, count = config.rollout, engine.arch, num_processes * engine.mesh.size
    wave, longest = largest
    size = engine.memory(wave, longest, free)
    weights, cache = size["generation weights"], size["generation cache"]
    prompts, prompt = config.data.train_batch_size, config.data.max_prompt_length
    responses, response = prompts * rollout.n, config.longest_response
    matrix, heads = models.num_matmul_params(arch), arch.num_heads * arch.head_dim
    shape = arch.num_layers, arch.num_heads, arch.head_dim
    read = performance.train_flops(
        matrix, prompts * prompt, prompts * prompt**2, *shape
    )
    reads = -(
        -prompts * prompt // (rollout.prefill_tokens * engine.replicas * num_processes)
    )
    waves, mean = -(-responses // (wave * num_processes)), prompt + response / 2
    attended = 4 * heads * arch.num_layers * mean

    def lower() -> dict[str, jax.stages.Lowered]:
        return engine.lower(wave, -(-prompts // num_processes), prompt, free)

    return {
        "prefill": Work(
            lower=lambda: lower()["prefill"],
            kept=weights,
            num_devices=engine.mesh.size,
            runs=reads,
            flops=read / 3 / count,
            memory_traffic=reads * weights,
        ),
        "decode": Work(
            lower=lambda: lower()["decode"],
            kept=weights,
            num_devices=engine.mesh.size,
            runs=waves * -(-response // rollout.decode_chunk),
            flops=responses * response * (2 * matrix + attended) / count,
            memory_traffic=waves * response * (weights + cache * mean / longest),
        ),
    }


def moving(
    learner: Actor, engine: JaxEngine, held: Mapping[str, int], *, verified: bool
) -> dict[str, Program]:
    """The weights' way to the engine, by the role whose devices have a part in it.

    Args:
      held: by the engine's devices.
      verified: whether checksums of some transfers are compared.
    """
    params, target = learner.abstract_weights(), engine.abstract_params()
    adapters = engine.abstract_adapters()
    merged = bytes_of(learner.abstract_merged()) if adapters is None else 0
    weights, before = held["engine's weights"], bytes_of(target)
    traffic = {"actor": bytes_of(params), "rollout": before}
    # The old copy goes before the new one comes, whose layers are then joined.
    joining = before + engine.layer_bytes - weights
    way, source = plan.plan(params, target), jax.tree.leaves(params)[0].sharding
    together = source.device_set == jax.tree.leaves(target)[0].sharding.device_set
    peaks, made = {"actor": 0, "rollout": joining}, 0
    for chunk, compiled in zip(way.chunks, reshard.programs(way), strict=True):
        size = sum(move.wanted_bytes for move in chunk)
        if compiled is not None:
            size = peak(compiled)
            if together:  # else blocks are cut out, and zeros where there are none
                size -= compiled.memory_analysis().argument_size_in_bytes
        peaks["actor"] = max(peaks["actor"], size)
        peaks["rollout"] = max(peaks["rollout"], made + size - weights)
        made += sum(move.wanted_bytes for move in chunk)
    if verified and len(way.devices) > 1:
        checks = [lowered.compile() for lowered in checksum.lower_largest(way)]
        sent, arrived = [x.memory_analysis().temp_size_in_bytes for x in checks]
        peaks["actor"] = max(peaks["actor"], sent)
        both = max(sent, arrived) if together else arrived
        peaks["rollout"] = max(peaks["rollout"], made + both - weights)
    if adapters is not None:  # nothing else comes after the first time
        state = learner.abstract_state().params
        way = plan.plan(state, adapters)
        traffic = {"actor": bytes_of(state), "rollout": bytes_of(adapters)}
    received = max(way.received.values())
    # What adapters were added to is there until all has arrived.
    peaks["rollout" if together else "actor"] += merged
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


def _update_flops(
    config: Config, arch: models.Architecture, section: TrainedConfig
) -> float:
    """One pass of an update over a step's rows, on all devices."""
    again = _training_flops(config, arch) / 3 if section.remat == "full" else 0.0
    return again + _training_flops(config, arch, adapters=section.lora is not None)


def _training_flops(
    config: Config, arch: models.Architecture, *, adapters: bool = False
) -> float:
    """Forward and backward, of a step's prompts and responses, on all devices."""
    responses, longest = (
        config.data.train_batch_size * config.rollout.n,
        _longest(config),
    )
    return performance.train_flops(
        models.num_matmul_params(arch),
        responses * longest,
        responses * longest**2,
        arch.num_layers,
        arch.num_heads,
        arch.head_dim,
        adapters=adapters,
    )


def weights_read(arch: models.Architecture, on: Mesh, dtype: str) -> int:
    """Bytes of all weights that a device multiplies with."""
    width = jnp.dtype(dtype).itemsize
    return width * models.num_params(arch) // on.shape["tensor"]


def _longest(config: Config) -> int:
    """Tokens of a prompt with its response."""
    return config.longest_sequence


def wave_of(config: Config, on: Mesh) -> tuple[int, int]:
    """Responses that a process decodes together, and tokens of each with its prompt."""
    prompts = -(-config.data.train_batch_size // processes.of(on))
    return min(prompts * config.rollout.n, config.rollout.max_num_seqs), _longest(
        config
    )


def architecture(path: str, revision: str | None = None) -> models.Architecture:
    """The architecture of a checkpoint or of a name of `bench.shapes`, without
    weights."""
    if path.lower() in shapes.NAMES or path.endswith(".json"):
        return shapes.find(path)
    return models.open(path, revision=revision).arch
