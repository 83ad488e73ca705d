"""What a run would be: checked, counted and compiled, without reading the weights.

`show` of a run on these devices, `show_plan` of a step on any.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxrl_llm import models
from jaxrl_llm.config import bundled
from jaxrl_llm.config.names import ConfigError
from jaxrl_llm.config.schema import Config
from jaxrl_llm.data.types import Episode, Turn
from jaxrl_llm.planning import workload
from jaxrl_llm.planning.planner import Estimate
from jaxrl_llm.rewards import score
from jaxrl_llm.sharding import checksum, hardware, processes
from jaxrl_llm.sharding.out_of_memory import Shortage
from jaxrl_llm.tracking.console import progress
from jaxrl_llm.training import compiling, fitting, memory
from jaxrl_llm.training.build import Job, make_meshes
from jaxrl_llm.training.rehearsal import rehearse
from jaxrl_llm.training.settings import placed

_GIB = 2**30


def check_devices(config: Config, path: str | Path) -> None:
    """Whether the meshes fit the devices that are here. Prints the command that plans
    the run for others, if the file has it in its comments.

    Raises:
      ConfigError: they do not; the message has that command.
    """
    text = bundled.find(path).read_text(encoding="utf-8")
    found = re.search(r"^#.*?(jaxrl plan .*--topology.*)$", text, re.MULTILINE)
    planned = found and f"for the devices that it was written for:\n  {found[1]}"
    try:
        make_meshes(config)
    except ConfigError as error:
        other = (
            "for devices that are not here, such as v5p:2x4x4 or h100:2x8:\n"
            f"  jaxrl plan {path} --topology KIND:SIZE"
        )
        raise ConfigError(f"{error}; {planned or other}") from None
    if planned and processes.leads():
        print(planned)


def show(job: Job) -> bool:
    """Prints the resolved configuration, sizes, and memory per device.

    Returns:
      False if that memory does not suffice.

    Raises:
      RewardError: a reward function fails.
      ValueError, OSError: the run would not begin; see `rehearse`.
    """
    begins = rehearse(job)
    config, arch, learner = job.config, job.source.arch, job.actor
    console = Console(quiet=not processes.leads())
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    console.print(text, markup=False, highlight=False)

    rows = config.data.train_batch_size * config.rollout.n
    longest = config.longest_sequence
    prompts = np.array([len(prompt.tokens) for prompt in job.data.train])
    facts = {
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "parameters": f"{models.num_params(arch):,}",
        "trained": f"{_count(learner.abstract_state().params):,}",
        "training mesh": dict(learner.mesh.shape),
        "groups": config.placement.groups or "all roles on all devices",
        "generation": config.rollout.engine,
        "training questions": f"{len(prompts):,}",
        "left out of them": f"{job.data.train_removed_as_held_out} held out",
        "too long": f"{job.data.dropped} dropped, {job.data.truncated} truncated",
        "held-out questions": f"{len(job.data.val):,}",
        "prompt tokens": f"{prompts.min()} to {prompts.max()}",
        "responses per step": f"{rows:,}",
        "tokens per step": f"at most {rows * longest:,}",
    }
    show_facts(console, "The run", facts)
    show_facts(console, "Scores of a made-up response", tried_out(job))
    for line in (*begins, *job.warnings):
        console.print(line, markup=False, highlight=False)
    with progress("compiling the largest programs", console=console):
        found = memory_per_device(job)
    limit, suffices = hardware.memory_limit(), True
    for group, held in found.items():
        needed = at_once(config, held)
        sizes = {name: f"{size / _GIB:.3f} GiB" for name, size in held.items()}
        sizes["at once, at most"] = f"{max(needed.values()) / _GIB:.3f} GiB"
        sizes["there is"] = f"{limit / _GIB:.3f} GiB" if limit else "not counted here"
        show_facts(console, f"Memory per device, {group}", sizes)
        if limit:
            lines = too_much(job, found, group, limit)
            suffices &= not lines
            for line in lines or ["it fits"]:
                console.print(line, markup=False, highlight=False)
    return suffices


def at_once(config: Config, held: Mapping[str, int]) -> dict[str, int]:
    """Bytes on a device, by the phase of a step, while it learns, while it generates
    and while it gets new weights."""
    away, stays = set(config.actor.offload), set(held) - {fitting.CACHE, *_WORKS_IN}
    within = {"optimizer"}
    if (how := config.distillation) and how.teacher.offload:
        away |= {"teacher"}
        within |= {"teacher"} if how.mode == "jsd" else set()
    found = {
        "update_actor": stays - (away - within) | {_PEAK},
        "gen": stays - away | {_LEAST},
        "update_weights": stays - away | {_MOVING},
    }
    if config.rollout.cache_gib is not None:  # else it is what there is room for
        found["gen"] ^= {_LEAST, fitting.CACHE}
    sizes = {
        phase: sum(held.get(name, 0) for name in names)
        for phase, names in found.items()
    }
    sizes["gen"] += max(held.get(name, 0) for name in _GENERATING)
    return sizes


def too_much(
    job: Job, sizes: Mapping[str, Mapping[str, int]], group: str, limit: int
) -> list[str]:
    """What does not fit the devices of a group, and what to change; nothing if all
    does.

    Args:
      sizes: as of `memory_per_device`.
      limit: bytes of a device.
    """
    held = sizes[group]
    needed = at_once(job.config, held)
    phase, most = max(needed.items(), key=lambda item: item[1])
    if most <= limit:
        return []
    program = max(_GENERATING, key=lambda name: held.get(name, 0))
    wanted = {"update_actor": _PEAK, "gen": program, "update_weights": _MOVING}[phase]
    if phase == "update_actor":
        group_of = placed(job.config.placement)
        phases = {
            "actor": phase,
            "critic": "update_critic",
            "reward": "reward",
            "reference": "old_log_prob",
            "teacher": "teacher",
        }
        phase = next(p for role, p in phases.items() if group_of[role] == group)
    found = Shortage(
        program=program if phase == "gen" else "",
        wanted=held.get(wanted, 0),
        device=0,
        device_kind=jax.devices()[0].device_kind,
        in_use=most - held.get(wanted, 0),
        limit=limit,
    )
    over = (most - limit) / _GIB
    said = memory.remedies(job, sizes, found, phase)
    return [
        f"{group}: does not fit, by {over:.3f} GiB; change one or more of",
        *(f"  {line}" for line in said),
    ]


def tried_out(job: Job) -> dict[str, str]:
    """What each reward function says to a made-up response to the first question.

    Raises:
      RewardError: one fails.
    """
    if not job.rewards.functions:
        return {"none": "no reward function is given"}
    text, prompt = "This response is made up.", job.data.train[0]
    tokens = np.array(job.source.tokenizer(text).input_ids, np.int32)
    said = Turn(
        role="assistant",
        tokens=tokens,
        response_mask=np.ones(len(tokens), bool),
        logprobs=np.zeros(len(tokens), np.float32),
        weight_versions=np.zeros(len(tokens), np.int32),
        finish_reason="stop",
        text=text,
    )
    episode = Episode(prompt_id=prompt.id, sample=0, turns=(said,))
    scores = score(
        job.rewards.functions,
        [prompt],
        [[episode]],
        timeout_s=job.config.reward.timeout_s,
        on_error="raise",
        isolation=job.rewards.isolation,
    )
    return {
        name: "None" if np.isnan(value[0, 0]) else f"{value[0, 0]:g}"
        for name, value in scores.by_function.items()
    }


def memory_per_device(job: Job) -> dict[str, dict[str, int]]:
    """Bytes on the fullest device of every group."""
    learner, found = job.actor, memory.held(job)
    group_of = placed(job.config.placement)
    if job.reward_model and job.config.reward.model.offload:
        del found[group_of["reward"]]["reward model"]  # there while it scores

    def add_peak(role: str, program: jax.stages.Lowered, more: int = 0) -> None:
        # What computes does so one after the other.
        held, peak = found[group_of[role]], temporary(program) + more
        held[_PEAK] = max(held.get(_PEAK, 0), peak)

    add_peak("actor", learner.lower_largest_update())
    if job.critic:
        add_peak("critic", job.critic.lower_update(learner.largest_rows()))
    if job.reward_model:
        kept = 0
        if job.config.reward.model.offload:
            kept = fitting.bytes_of(job.reward_model.abstract_params())
        add_peak("reward", job.reward_model.lower_scoring(learner.largest_rows()), kept)
    # On the actor's devices, an update needs more than the reference.
    if learner.reference and group_of["reference"] != group_of["actor"]:
        judge, kept = learner.reference.policy, 0
        if "reference" in job.config.actor.offload:
            kept = found[group_of["reference"]]["reference"]
        rows = learner.largest_rows()
        weights = learner.reference.abstract_weights()
        add_peak("reference", judge.lower_scoring(rows, weights), kept)
    if teacher := learner.teacher_before:
        kept = 0
        if teacher.offload:  # there while it is asked
            kept = found[group_of["teacher"]]["teacher"]
        add_peak("teacher", teacher.lower_scoring(learner.largest_rows()), kept)
    # A checkpoint has checksums, one array after the other.
    arrays = jax.tree.leaves(learner.abstract_state())
    add_peak("actor", checksum.lower_of_placed(max(arrays, key=fitting.bytes_of)))
    if job.config.rollout.engine == "jax":
        found[group_of["rollout"]] |= _generating(job)
        moving = workload.moving(
            learner,
            job.engine,
            {"engine's weights": found[group_of["rollout"]][fitting.WEIGHTS]},
            verified=job.config.rollout.checksum_freq > 0,
        )
        for role, program in moving.items():
            found[group_of[role]][_MOVING] = max(program.extra_bytes, 0)
    return found


_PEAK, _MOVING = "gradients, activations", "new weights on their way"
_GENERATING, _LEAST = ("prefill", "decode"), "generation cache, at least"
_WORKS_IN = {_PEAK, _MOVING, *_GENERATING, _LEAST}


def _generating(job: Job) -> dict[str, int]:
    """Bytes that programs of the JAX engine work in, and the fewest of its cache."""
    asked = compiling.uses(job)
    responses = max(use.num_responses for use in asked)
    longest = max(len(prompt.tokens) for prompt in (*job.data.train, *job.data.val))
    programs = job.engine.lower(
        responses, max(use.num_prompts for use in asked), longest
    )
    least = job.engine.memory(responses, longest, free=0)[fitting.CACHE]
    return {
        **{name: temporary(programs[name]) for name in _GENERATING},
        _LEAST: least,
    }


def show_plan(
    estimates: Sequence[Estimate], advised: Callable[[Estimate], list[str]]
) -> None:
    """Prints memory, traffic and time per device of every group, and what to change.

    Args:
      advised: what to change where memory does not suffice.
    """
    console = Console()
    for found in estimates:
        console.print(_memory(found))
        console.print(_work(found))
        where = f"{found.group}: " if len(estimates) > 1 else ""
        if found.capacity:
            said = advised(found)
            console.print(
                where + ("does not fit; change one or more of" if said else "fits")
            )
            for line in said:
                console.print(f"  {line}", markup=False, highlight=False)


def advice(config: Config, found: Estimate) -> list[str]:
    """What to change where memory does not suffice; empty if it does."""
    if found.capacity is None or found.peak_bytes <= found.capacity:
        return []
    held, said = sum(found.held.values()), []
    size, engine = config.rollout.mesh.tensor, found.held.get("engine's weights", 0)
    # An engine does not leave its host.
    divides = engine and 2 * size <= found.num_devices // found.num_processes
    if held > found.capacity / 2:
        if "weights" in found.held and config.actor.mesh.data != 1:
            said.append(
                "actor.mesh: data 1 and fsdp -1, to split all weights and moments"
            )
        for name in ("reference", "optimizer"):
            if found.held.get(name):
                said.append(
                    f"actor.offload: [{name}], which waits in the host's memory"
                )
        if found.held.get("teacher"):
            said.append("distillation.teacher.offload: true, so that it waits there")
        if engine > held / 4 and config.rollout.quantization is None:
            said.append("rollout.quantization: int8, for half the engine's weights")
        needed = -(-held * found.num_devices // int(found.capacity / 2))
        said.append(f"about {needed} devices, to keep half of each for activations")
    if divides:
        said.append(f"rollout.mesh.tensor: {2 * size}, to split weights and cache")
    over = {
        name
        for name, program in found.programs.items()
        if held + program.extra_bytes > found.capacity
    }
    if over & {"prefill", "decode"}:
        most = max(found.programs[name].extra_bytes for name in ("prefill", "decode"))
        room = (found.cache_bytes + found.capacity - held - most) / _GIB
        said += [f"rollout.cache_gib: {math.floor(10 * room) / 10}"] * (room >= 0.1)
    for whose, names in {
        "actor": {"update", "log-probabilities", "reference's log-probabilities"},
        "critic": {"values", "critic's update"},
    }.items():
        if over & names:
            said += _smaller(config, whose)
    if "teacher's log-probabilities" in over:
        own = config.distillation.teacher.micro_batch_size
        micro = own or config.actor.micro_batch_size or 2
        said.append(f"distillation.teacher.micro_batch_size: {max(1, micro // 2)}")
    return said


def _smaller(config: Config, whose: str) -> list[str]:
    """What makes the activations of the actor or the critic fewer."""
    section, said = getattr(config, whose), []
    micro = section.micro_batch_size or config.actor.micro_batch_size
    if section.remat != "full":
        said.append(f"{whose}.remat: full")
    if micro is None or micro > 1:
        said.append(f"{whose}.micro_batch_size: {(micro or 2) // 2}")
    return [*said, f"{whose}.mesh.tensor: twice as many, to split activations"]


def show_measured(estimates: Sequence[Estimate], held: int, peak: int | None) -> None:
    """Prints what `planner.measure` found beside what was planned, of the fullest
    device."""
    table = Table("per device", "planned GiB", "measured GiB", "measured / planned")
    planned = {
        "held": (max(sum(found.held.values()) for found in estimates), held),
        "peak": (max(found.peak_bytes for found in estimates), peak),
    }
    for name, (wanted, found) in planned.items():
        cells = ["not counted", ""]
        if found is not None:
            cells = [f"{found / _GIB:.3f}", f"{found / wanted:.3f}"]
        table.add_row(name, f"{wanted / _GIB:.3f}", *cells)
    Console().print(table)


def _memory(found: Estimate) -> Table:
    title = f"{found.group}, {found.num_devices} x {found.device_kind}"
    table = Table("memory per device", "GiB", title=title)
    for name, size in found.held.items():
        table.add_row(name, f"{size / _GIB:.2f}")
    for name, program in found.programs.items():
        table.add_row(f"+ {name}", f"{program.extra_bytes / _GIB:.2f}")
    if found.wanted_cache_bytes:
        cache = f"{found.cache_bytes / _GIB:.2f}"
        if found.cache_bytes < found.wanted_cache_bytes:
            cache += f" of {found.wanted_cache_bytes / _GIB:.2f} wanted"
        table.add_row("of prefill and decode: KV cache", cache)
    table.add_row("peak", f"{found.peak_bytes / _GIB:.2f}")
    if found.capacity:
        table.add_row("there is", f"{found.capacity / _GIB:.2f}")
    return table


def _work(found: Estimate) -> Table:
    table = Table(
        "per device and step", "runs", "TFLOP", "GB memory", "GB received", "s at least"
    )
    for name, program in found.programs.items():
        seconds, received = found.seconds(program), program.received_bytes
        table.add_row(
            name,
            str(program.runs),
            f"{program.flops / 1e12:.4g}",
            f"{program.memory_traffic / 1e9:.4g}",
            "too large" if received is None else f"{received / 1e9:.4g}",
            "" if seconds is None else f"{seconds:.3g}",
        )
    times = [found.seconds(program) for program in found.programs.values()]
    if None not in times:
        table.add_row("all", "", "", "", "", f"{sum(times):.3g}")
    return table


def _count(params: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def temporary(program: jax.stages.Lowered) -> int:
    """Bytes that it needs besides arguments and results."""
    return program.compile().memory_analysis().temp_size_in_bytes


def show_facts(console: Console, title: str, facts: dict[str, Any]) -> None:
    """Prints facts by name under a title."""
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in facts.items():
        table.add_row(name, Text(str(value)))
    console.print(table)
