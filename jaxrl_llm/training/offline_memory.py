"""What an offline run keeps on its devices, and what to change if that is too much."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from jaxrl_llm.sharding.out_of_memory import Shortage
from jaxrl_llm.training import fitting, memory, offline_build
from jaxrl_llm.training.checkpoint import Checkpoints
from jaxrl_llm.training.offline_build import OfflineJob


def held(job: OfflineJob) -> dict[str, int]:
    """`offline_build.kept` by a run."""
    return offline_build.kept(job.config, job.learner, job.engine, len(job.questions))


@contextmanager
def explained(
    job: OfflineJob, phase: Callable[[], str], checkpoints: Checkpoints
) -> Iterator[None]:
    """Says what to change if a device's memory does not suffice in the block.

    Args:
      phase: the phase of the step under way; "" before the first.
      checkpoints: of the run, if there are any to go on from.

    Raises:
      OutOfMemory: in the place of XLA's error.
    """
    sizes = functools.cache(lambda: held(job))

    def there(_: Shortage) -> dict[str, int]:
        away = () if phase() == "testing" else (fitting.CACHE,)
        return {name: size for name, size in sizes().items() if name not in away}

    with memory.explained_by(
        there, lambda found: remedies(job, sizes(), found, phase()), phase, checkpoints
    ):
        yield


def remedies(
    job: OfflineJob, sizes: dict[str, int], found: Shortage, phase: str
) -> list[str]:
    """The likeliest settings, at most three, that a run may go on with; a line each."""
    section, model, said = job.config.learner, job.learner.model, []
    now = section.micro_batch_size or len(job.learner.largest_rows.tokens)
    if phase == "testing" and found.program not in ("", "measure_held_out"):
        rollout = job.config.rollout
        most = min(rollout.max_num_seqs, len(job.questions) * job.config.val.n)
        said.append(f"rollout.max_num_seqs: {max(most // 2, 1)} (now {most})")
    fixed = min(3 * sizes["weights"], found.wanted or 0)
    multiple = model.layout.rows_multiple
    if size := fitting.fewer(now, multiple, found.wanted, found.free, fixed):
        said.append(f"learner.micro_batch_size: {size} (now {now})")
    said += ["learner.remat: full"] * (section.remat != "full")
    on = job.learner.mesh
    if on.shape["data"] > 1:
        said.append("learner.mesh: {data: 1, fsdp: -1}, which splits all weights")
    else:
        said.append(
            f"learner.mesh: more than {on.size} devices, over which weights are split"
        )
    return said[:3]
