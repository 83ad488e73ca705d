"""What a step of learning from rows would take on devices that need not be here.

The update is compiled from shapes, with every example as long as `data.max_length`;
figures are those of `planner`. Generation for validations is not part of a step and not
planned, nor are the reference's log-probabilities of DPO, which are asked for once.
"""

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import jax

from jaxrl_llm import models
from jaxrl_llm.algorithms.objectives import SEQUENCES_TOGETHER
from jaxrl_llm.config.schema_offline import OfflineConfig
from jaxrl_llm.planning import planner, workload
from jaxrl_llm.planning.planner import Estimate, Watch
from jaxrl_llm.planning.workload import Work
from jaxrl_llm.roles.learner import Learner
from jaxrl_llm.tracking import performance
from jaxrl_llm.training import fitting, offline_build
from jaxrl_llm.training.offline_build import Task


@planner.for_devices
def estimate(
    config: Any,
    devices: Sequence[jax.Device],
    memory: float | int | None,
    task: Task,
    watch: Watch = nullcontext,
) -> tuple[Any, list[str], Estimate]:
    """Compiles the update of `task` for `devices`.

    Args:
      memory: bytes that a device has; its data sheet's if not given.

    Returns:
      The configuration with the micro-batch size that a run would choose where none is
      given, what that is, and the estimate.

    Raises:
      ValueError: the mesh or an array does not fit.
    """
    on = offline_build.make_meshes(config, devices)["learner"]
    arch = workload.architecture(config.model.path, config.model.revision)
    source, said = models.RandomWeights(arch), []
    together = SEQUENCES_TOGETHER[task.objective(config).segments]
    longest = [config.data.max_length] * together
    if config.trainer.total_training_steps is None:  # only a schedule asks
        trainer = config.trainer.model_copy(update={"total_training_steps": 1})
        config = config.model_copy(update={"trainer": trainer})

    def learner_with(config: OfflineConfig) -> Learner:
        return offline_build.learner_of(task, config, source, on, longest)

    learner = learner_with(config)
    held = offline_build.kept(config, learner, None, 0)
    capacity = planner.capacity_of(devices, memory)
    shape = learner.largest_rows.tokens.shape
    if capacity is not None and config.learner.micro_batch_size is None:
        found = fitting.largest_fit(
            learner.model,
            learner.abstract_state(),
            shape,
            int(fitting.SURELY * capacity),
            lambda size: learner_with(offline_build.with_rows(config, size)),
            Learner.lower_largest_update,
            watch,
        )
        said = [found.said("learner.micro_batch_size", shape[0])]
        config, learner = offline_build.with_rows(config, found.size), found.made
    with watch("compiling update"):
        program = _update(config, learner, together).compile()
    return (
        config,
        said,
        Estimate(
            group="all devices",
            device_kind=devices[0].device_kind,
            num_devices=on.size,
            num_processes=1,
            held=held,
            cache_bytes=0,
            wanted_cache_bytes=0,
            programs={"update": program},
            capacity=capacity,
        ),
    )


def _update(config: OfflineConfig, learner: Learner, together: int) -> Work:
    """The one program of a step.

    Args:
      together: sequences of an example.
    """
    section, arch, state = config.learner, learner.arch, learner.abstract_state()
    count, longest = config.data.train_batch_size * together, config.data.max_length
    flops = functools.partial(
        performance.train_flops,
        models.num_matmul_params(arch),
        count * longest,
        count * longest**2,
        arch.num_layers,
        arch.num_heads,
        arch.head_dim,
    )
    whole = flops(adapters=section.lora is not None)
    again = flops(adapters=False) / 3 if section.remat == "full" else 0.0
    rows = len(learner.largest_rows.tokens)
    micro = -(-rows // (section.micro_batch_size or rows))
    read = workload.weights_read(arch, learner.mesh, section.dtype)
    size = fitting.bytes_of(state)
    return Work(
        lower=learner.lower_largest_update,
        kept=size + fitting.bytes_of(learner.abstract_frozen()),
        num_devices=learner.mesh.size,
        runs=1,
        flops=(whole + again) / learner.mesh.size,
        # Weights are read forward and twice backward, the state once.
        memory_traffic=3 * read * micro + 2 * size,
    )


def advice(config: OfflineConfig, found: Estimate) -> list[str]:
    """What to change where memory does not suffice; empty if it does."""
    if found.capacity is None or found.peak_bytes <= found.capacity:
        return []
    section, held, said = config.learner, sum(found.held.values()), []
    if held > found.capacity / 2:
        if section.mesh.data != 1:
            said.append("learner.mesh: data 1 and fsdp -1, to split all weights")
        needed = -(-held * found.num_devices // int(found.capacity / 2))
        said.append(f"about {needed} devices, to keep half of each for activations")
    said += ["learner.remat: full"] * (section.remat != "full")
    micro = section.micro_batch_size
    if micro is None or micro > 1:
        said.append(f"learner.micro_batch_size: {(micro or 2) // 2}")
    return [*said, "learner.mesh.tensor: twice as many, to split activations"]
