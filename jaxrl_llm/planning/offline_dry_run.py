"""What a run would be that learns from rows: checked, counted and compiled, without
reading the weights."""

import jax
import numpy as np
import yaml
from rich.console import Console

from jaxrl_llm import models
from jaxrl_llm.planning.dry_run import show_facts, temporary
from jaxrl_llm.sharding import hardware, processes
from jaxrl_llm.sharding.out_of_memory import Shortage
from jaxrl_llm.tracking.console import progress
from jaxrl_llm.training import fitting, offline_memory
from jaxrl_llm.training.offline_build import OfflineJob
from jaxrl_llm.training.rehearsal import rehearse

_GIB = 2**30
_PEAK, _GENERATING = "gradients, activations", "generation"


def show(job: OfflineJob) -> bool:
    """Prints the resolved configuration, sizes, and memory per device.

    Returns:
      False if that memory does not suffice.

    Raises:
      ValueError, OSError: the run would not begin; see `rehearse`.
    """
    begins = rehearse(job)
    config, arch, data = job.config, job.source.arch, job.data
    console = Console(quiet=not processes.leads())
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    console.print(text, markup=False, highlight=False)
    lengths = np.array([n for one in data.train for n in one.lengths])
    learned = sum(one.num_learned for one in data.train)
    rows = job.learner.largest_rows.tokens.shape
    facts = {
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "parameters": f"{models.num_params(arch):,}",
        "training mesh": dict(job.learner.mesh.shape),
        "training rows": f"{len(data.train):,}",
        "left out of them": f"{data.train_removed_as_held_out} held out",
        "too long": f"{data.dropped} dropped, {data.truncated} truncated",
        "held-out rows": f"{len(data.val):,}",
        "held-out questions": f"{len(job.questions):,}",
        "tokens of a row": f"{lengths.min()} to {lengths.max()}",
        "tokens in an epoch": f"{lengths.sum():,}, {learned:,} of them learned",
        "steps": f"{config.trainer.total_training_steps:,}",
        "shape of a step": f"at most {rows[0]:,} x {rows[1]:,}",
    }
    show_facts(console, "The run", facts)
    for line in (*begins, *job.warnings):
        console.print(line, markup=False, highlight=False)
    with progress("compiling the largest programs", console=console):
        held = memory_per_device(job)
    limit, most = hardware.memory_limit(), at_once(held)
    sizes = {name: f"{size / _GIB:.3f} GiB" for name, size in held.items()}
    sizes["at once, at most"] = f"{most / _GIB:.3f} GiB"
    sizes["there is"] = f"{limit / _GIB:.3f} GiB" if limit else "not counted here"
    show_facts(console, "Memory per device", sizes)
    if limit is None:
        return True
    for line in too_much(job, held, limit) or ["it fits"]:
        console.print(line, markup=False, highlight=False)
    return most <= limit


def memory_per_device(job: OfflineJob) -> dict[str, int]:
    """Bytes on the fullest device by purpose, those that programs work in too."""
    held = offline_memory.held(job)
    held[_PEAK] = temporary(job.learner.lower_largest_update())
    if job.engine:
        count = len(job.questions) * job.config.val.n
        longest = max(len(prompt.tokens) for prompt in job.questions)
        found = job.engine.lower(count, len(job.questions), longest)
        held[_GENERATING] = max(temporary(x) for x in found.values())
    return held


def at_once(held: dict[str, int]) -> int:
    """Bytes on a device while it learns, or while it generates, whichever are more."""
    works_in = {_PEAK, _GENERATING, fitting.CACHE}
    stays = sum(size for name, size in held.items() if name not in works_in)
    generating = held.get(_GENERATING, 0) + held.get(fitting.CACHE, 0)
    return stays + max(held[_PEAK], generating)


def too_much(job: OfflineJob, held: dict[str, int], limit: int) -> list[str]:
    """What to change where memory does not suffice; nothing if it does.

    Args:
      limit: bytes of a device.
    """
    most = at_once(held)
    if most <= limit:
        return []
    learns = held[_PEAK] >= held.get(_GENERATING, 0) + held.get(fitting.CACHE, 0)
    wanted = held[_PEAK] if learns else held[_GENERATING]
    found = Shortage(
        program="",
        wanted=wanted,
        device=0,
        device_kind=jax.devices()[0].device_kind,
        in_use=most - wanted,
        limit=limit,
    )
    phase = "update_actor" if learns else "testing"
    said = offline_memory.remedies(job, held, found, phase)
    over = (most - limit) / _GIB
    return [
        f"it does not fit, by {over:.3f} GiB; change one or more of",
        *(f"  {line}" for line in said),
    ]
