"""What a run has learned so far: where it begins, and where it goes on."""

from typing import Any

from jaxrl_llm.data.stream import PromptBatches
from jaxrl_llm.sharding import processes
from jaxrl_llm.tracking import run_directory
from jaxrl_llm.training.checkpoint import Checkpoints, Say
from jaxrl_llm.training.experience import Observe
from jaxrl_llm.training.startable import Startable


def start_or_go_on(
    job: Startable,
    stream: PromptBatches,
    checkpoints: Checkpoints,
    waiting: Observe,
    say: Say,
) -> tuple[Any, int]:
    """The state to go on from and the step that made it; 0 for a fresh start.

    `stream` then stands where it stood after that step.

    Args:
      waiting: is told what takes long.
      say: is told, in a line each, of checkpoints that cannot be gone on from.

    Raises:
      CheckpointError: there are checkpoints, but none to go on from.
      OSError: there is no room for another checkpoint.
    """
    up_to, like = _written_up_to(job, checkpoints, say), job.abstract_state()
    found = checkpoints.restore(like, up_to=up_to, say=say)
    if found is None or found.step < job.config.trainer.total_training_steps:
        checkpoints.check_room(like)
    if found is None:
        with waiting("reading the weights"):
            state = job.start()
        checkpoints.reserve(state)
        return state, 0
    checkpoints.reserve(found.state)
    stream.restore(found.position["prompts"])
    return found.state, found.step


def _written_up_to(job: Startable, checkpoints: Checkpoints, say: Say) -> int | None:
    """The last step up to which all that the run wrote is there; None if that does not
    matter. What is not there is said."""
    oldest = min(checkpoints.steps, default=0)
    found = None
    if processes.leads():
        found = run_directory.whole(
            job.config.output_dir, oldest, rollouts=job.writes_rollouts
        )
    written = processes.gather(found)[0]
    if not oldest:
        if written.last > 0:
            say(
                f"there is no checkpoint in {job.config.output_dir}: the run begins "
                f"again, and what it wrote up to step {written.last} is void"
            )
        return None
    for fault in written.faults:
        say(fault)
    return None if job.config.trainer.resume == "force" else written.step
