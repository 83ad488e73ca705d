"""What a run would be: checked, counted and compiled, without reading the weights."""

from typing import Any

import jax
import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from jaxrl_llm import models
from jaxrl_llm.config_algorithm import uses_kl
from jaxrl_llm.console import progress
from jaxrl_llm.train import Job, placed
from sharding import processes

_GIB = 2**30


def show(job: Job) -> None:
    """Prints the resolved configuration, sizes, and memory per device."""
    config, arch, learner = job.config, job.source.arch, job.learner
    console = Console(quiet=not processes.leads())
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    console.print(text, markup=False, highlight=False)

    rows = config.data.train_batch_size * config.rollout.n
    longest = config.data.max_prompt_length + config.rollout.max_response_length
    prompts = np.array([len(prompt.tokens) for prompt in job.data.train])
    facts = {
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "parameters": f"{models.num_params(arch):,}",
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
    _print(console, "The run", facts)
    with progress("compiling the largest update", console=console):
        memory = memory_per_device(job)
    for group, held in memory.items():
        sizes = {name: f"{size / _GIB:.3f} GiB" for name, size in held.items()}
        total = {"total": f"{sum(held.values()) / _GIB:.3f} GiB"}
        _print(console, f"Memory per device, {group}", sizes | total)


def memory_per_device(job: Job) -> dict[str, dict[str, int]]:
    """Bytes on the fullest device of every group."""
    config, learner, critic = job.config, job.learner, job.critic
    state, memory = learner.abstract_state(), {}
    group_of = placed(config.placement)

    def add(role: str, sizes: dict[str, int]) -> None:
        held = memory.setdefault(group_of[role], {})
        # What computes does so one after the other.
        peaks = [peak for of in (held, sizes) if (peak := of.get(_PEAK))]
        held |= sizes | ({_PEAK: max(peaks)} if peaks else {})

    add(
        "actor",
        {
            "weights": _bytes(state.params),
            "optimizer": _bytes(state.opt_state),
            _PEAK: learner.update_memory().temp_size_in_bytes,
        },
    )
    add(
        "rollout",
        job.engine.memory(
            -(-config.data.train_batch_size // jax.process_count()) * config.rollout.n,
            config.data.max_prompt_length + config.rollout.max_response_length,
        ),
    )
    if critic:
        judge = critic.abstract_state()
        peak = critic.update_memory(learner.largest_rows()).temp_size_in_bytes
        add(
            "critic",
            {
                "critic's weights": _bytes(judge.params),
                "critic's optimizer": _bytes(judge.opt_state),
                _PEAK: peak,
            },
        )
    if job.reward_model:
        model, kept = job.reward_model, "reward model"
        if config.reward.model.offload:  # there while it scores
            kept = _PEAK
        sizes = {_PEAK: model.memory(learner.largest_rows()).temp_size_in_bytes}
        sizes[kept] = sizes.get(kept, 0) + _bytes(model.abstract_params())
        add("reward", sizes)
    if uses_kl(config):
        add("reference", {"reference": _bytes(learner.abstract_reference())})
    return memory


_PEAK = "gradients, activations"


def _bytes(tree: Any) -> int:
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def _print(console: Console, title: str, facts: dict[str, Any]) -> None:
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in facts.items():
        table.add_row(name, str(value))
    console.print(table)
