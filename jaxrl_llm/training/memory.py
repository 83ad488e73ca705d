"""What a run keeps on its devices, and what to change when that is too much."""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import jax

from jaxrl_llm.config.checks import uses_kl
from jaxrl_llm.config.names import device_numbers
from jaxrl_llm.sharding import out_of_memory
from jaxrl_llm.sharding.out_of_memory import Shortage
from jaxrl_llm.training import fitting
from jaxrl_llm.training.build import Job
from jaxrl_llm.training.checkpoint import Checkpoints
from jaxrl_llm.training.fitting import CACHE, Sizes, fewer
from jaxrl_llm.training.settings import placed

_GIB = 2**30
PROGRAMS = {
    "update": "the update",
    "update_critic": "the critic's update",
    "measure_held_out": "the loss of held-out rows",
    "whole": "log-probabilities or values",
    "_scores": "the reward model",
    "prefill": "prefill",
    "extend": "prefill",
    "decode": "decode",
}
"""Compiled functions, and what they do in the words of a run."""

# Phases of a step.
_DURING = {
    "gen": "generating",
    "reward": "scoring responses",
    "old_log_prob": "asking the policy and its reference",
    "teacher": "asking the teacher",
    "values": "asking the critic",
    "adv": "estimating advantages",
    "update_critic": "updating the critic",
    "update_actor": "updating the policy",
    "update_weights": "the weights' way to generation",
    "testing": "validating",
    "save_checkpoint": "saving a checkpoint",
}


def held(job: Job) -> Sizes:
    """`fitting.kept` by the roles of a run."""
    return fitting.kept(job.config, job.actor, job.engine, job.critic, job.reward_model)


@contextmanager
def explained(
    job: Job,
    phase: Callable[[], str] = lambda: "",
    checkpoints: Checkpoints | None = None,
) -> Iterator[None]:
    """Says what to change if a device's memory does not suffice in the block.

    Args:
      phase: the phase of the step under way; "" before the first.
      checkpoints: of the run, if there are any to go on from.

    Raises:
      OutOfMemory: in the place of XLA's error.
    """

    sizes = functools.cache(lambda: held(job))
    with explained_by(
        lambda found: _there(job, sizes(), found, phase()),
        lambda found: remedies(job, sizes(), found, phase()),
        phase,
        checkpoints,
    ):
        yield


@contextmanager
def explained_by(
    there: Callable[[Shortage], dict[str, int]],
    advice: Callable[[Shortage], list[str]],
    phase: Callable[[], str],
    checkpoints: Checkpoints | None,
) -> Iterator[None]:
    """`explained` for any run.

    Args:
      there: bytes of what was kept on the device, by purpose.
      advice: settings that a run may go on with, a line each.
      phase, checkpoints: as of `explained`.

    Raises:
      OutOfMemory: in the place of XLA's error.
    """

    def doing(found: Shortage) -> str:
        name = PROGRAMS.get(found.program, "")
        during = _DURING.get(phase(), "")
        return (
            f"{name} ({during})" if name and during else name or during or "the start"
        )

    def after() -> str:
        if checkpoints is None:
            return ""
        if jax.process_count() == 1:  # else others would have to wait, too
            with suppress(OSError):
                checkpoints.wait()
        reached = max(checkpoints.steps, default=0)
        at = f"goes on from step {reached}" if reached else "begins again"
        return f"nothing that was saved is lost: the same command with that {at}"

    with out_of_memory.explained(doing, there, advice, after):
        yield


def _there(job: Job, sizes: Sizes, found: Shortage, phase: str) -> dict[str, int]:
    """What was kept on the device, by purpose."""
    config, groups = job.config, job.config.placement.groups
    name = next(iter(sizes))
    for group, numbers in groups.items():
        if found.device in device_numbers(numbers):
            name = group
    there = dict(sizes.get(name, {}))
    if phase in ("gen", "testing"):
        there[CACHE] = _cache_bytes(job)
    else:
        there.pop(CACHE, None)
    for what, used_in in (("optimizer", "update_actor"), ("reference", "old_log_prob")):
        if what in config.actor.offload and phase != used_in:
            there.pop(what, None)
    if config.reward.model and config.reward.model.offload and phase != "reward":
        there.pop("reward model", None)
    if config.distillation and config.distillation.teacher.offload:
        if phase != _ASKED[config.distillation.mode]:
            there.pop("teacher", None)
    return there


_ASKED = {"reverse_kl": "teacher", "forward_kl_topk": "teacher", "jsd": "update_actor"}
"""In which phase the teacher is asked."""


def remedies(job: Job, sizes: Sizes, found: Shortage, phase: str) -> list[str]:
    """The likeliest settings, at most three, that a run may go on with; a line each."""
    config, arch = job.config, job.source.arch
    actor, critic, model = config.actor, config.critic, config.reward.model
    weights = sizes[placed(config.placement)["actor"]]["weights"]
    copy = weights // 4 * (2 if actor.dtype == "bfloat16" else 4)
    match "reward" if found.program == "_scores" else phase:
        case "update_actor":
            # Gradients of a micro-batch, and their sum, are as large as the weights.
            said = _fewer_rows(job, "actor", found, 2 * weights + copy)
            said += ["actor.remat: full"] * (actor.remat != "full")
            said += _put_away(job, "reference")
            said += _split(job, "actor")
        case "update_critic":
            fixed = sizes[placed(config.placement)["critic"]]["critic's weights"] * 2
            said = _fewer_rows(job, "critic", found, fixed)
            said += ["critic.remat: full"] * (critic.remat != "full")
            said += _put_away(job, "optimizer") + _split(job, "critic")
        case "old_log_prob":
            said = _fewer_rows(job, "actor", found, copy)
            said += _put_away(job, "optimizer") + _split(job, "actor")
        case "values":
            said = _fewer_rows(job, "critic", found, 0)
            said += _put_away(job, "optimizer") + _split(job, "critic")
        case "teacher":
            said = _fewer_rows(job, "distillation.teacher", found, 0)
            said += _teacher_away(job) + _put_away(job, "optimizer")
        case "reward" if model:
            said = _fewer_rows(job, "reward.model", found, 0)
            said += ["reward.model.offload: true"] * (not model.offload)
            said += _put_away(job, "optimizer")
        case "gen" | "testing":
            said = _less_generation(job, found) + _put_away(job, "optimizer")
            said += _teacher_away(job)
            said += _more_tensor(job, arch.num_heads)
        case _:
            said = _put_away(job, "optimizer") + _put_away(job, "reference")
            said += _more_tensor(job, arch.num_heads) + _split(job, "actor")
    return said[:3]


def _fewer_rows(job: Job, whose: str, found: Shortage, fixed: int) -> list[str]:
    """A smaller micro-batch of the actor, the critic or the reward model."""
    config = job.config
    section, model = {
        "actor": lambda: (config.actor, job.actor.policy),
        "critic": lambda: (config.critic, job.critic.model),
        "reward.model": lambda: (config.reward.model, job.reward_model.model),
        "distillation.teacher": lambda: (
            config.distillation.teacher,
            job.actor.teacher.policy,
        ),
    }[whose]()
    now = section.micro_batch_size or config.actor.micro_batch_size
    now = now or len(job.actor.largest_mini_batch().tokens)
    fixed = min(fixed, found.wanted or 0)
    size = fewer(now, model.layout.rows_multiple, found.wanted, found.free, fixed)
    return [f"{whose}.micro_batch_size: {size} (now {now})"] if size else []


def _less_generation(job: Job, found: Shortage) -> list[str]:
    """Less cache, or fewer sequences and tokens at a time."""
    rollout, said, cache = job.config.rollout, [], _cache_bytes(job)
    if rollout.engine != "jax":
        return []
    if found.program in ("prefill", "extend"):
        half = rollout.prefill_tokens // 2
        said.append(f"rollout.prefill_tokens: {half} (now {rollout.prefill_tokens})")
    lacking = (found.wanted or 0) - (found.free or 0)
    room = math.floor(10 * (cache - lacking / fitting.SURELY) / _GIB) / 10
    if cache and found.free is not None and room > 0:
        said.append(f"rollout.cache_gib: {room} (now {cache / _GIB:.1f})")
    responses = job.config.data.train_batch_size * rollout.n
    now = min(rollout.max_num_seqs, -(-responses // jax.process_count()))
    if now > 1:
        said.append(f"rollout.max_num_seqs: {now // 2} (now {now})")
    return said


def _cache_bytes(job: Job) -> int:
    """Bytes of keys and values on each device, as generation chose last, or is told to
    take at most."""
    told = int((job.config.rollout.cache_gib or 0) * _GIB)
    return getattr(job.engine, "cache_bytes", 0) or told


def _put_away(job: Job, what: str) -> list[str]:
    """Something that waits in the host's memory instead."""
    kept = job.config.actor.offload
    if what in kept or (what == "reference" and not uses_kl(job.config)):
        return []
    return [f"actor.offload: [{', '.join([*kept, what])}]"]


def _teacher_away(job: Job) -> list[str]:
    """The teacher's weights wait in the host's memory instead."""
    how = job.config.distillation
    away = how is None or how.teacher.offload
    return [] if away else ["distillation.teacher.offload: true"]


def _more_tensor(job: Job, num_heads: int) -> list[str]:
    """Weights and cache of generation over more devices."""
    engine, size = job.engine, 2 * job.config.rollout.mesh.tensor
    there = engine.mesh.size if job.config.rollout.engine == "jax" else 0
    if size < 2 or there % size or num_heads % size:
        return []
    return [f"rollout.mesh.tensor: {size}, which splits weights and cache"]


def _split(job: Job, whose: str) -> list[str]:
    """Weights, moments and rows over more devices."""
    on = job.critic.mesh if whose == "critic" else job.actor.mesh
    if on.shape["data"] > 1:
        return [f"{whose}.mesh: {{data: 1, fsdp: -1}}, which splits all weights"]
    return [f"{whose}.mesh: more than {on.size} devices, over which weights are split"]
