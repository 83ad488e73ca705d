"""What a run has learned so far: where it begins, and where it goes on."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.algorithms.ppo import TrainState
from jaxrl_llm.data.stream import PromptBatches
from jaxrl_llm.sharding import processes
from jaxrl_llm.tracking import run_directory
from jaxrl_llm.training.build import Job
from jaxrl_llm.training.checkpoint import Checkpoints, Say
from jaxrl_llm.training.experience import Observe


def start_or_go_on(
    job: Job,
    stream: PromptBatches,
    checkpoints: Checkpoints,
    waiting: Observe,
    say: Say,
) -> tuple[TrainState, int]:
    """The state to go on from and the step that made it; 0 for a fresh start.

    `stream` then stands where it stood after that step.

    Args:
      waiting: is told what takes long.
      say: is told, in a line each, of checkpoints that cannot be gone on from.

    Raises:
      CheckpointError: there are checkpoints, but none to go on from.
      OSError: there is no room for another checkpoint.
    """
    up_to, like = _written_up_to(job, checkpoints, say), abstract_state(job)
    found = checkpoints.restore(like, up_to=up_to, say=say)
    if found is None or found.step < job.config.trainer.total_training_steps:
        checkpoints.check_room(like)
    if found is None:
        with waiting("reading the weights"):
            return start(job), 0
    stream.restore(found.position["prompts"])
    return found.state, found.step


def _written_up_to(job: Job, checkpoints: Checkpoints, say: Say) -> int | None:
    """The last step up to which all that the run wrote is there; None if that does not
    matter. What is not there is said."""
    oldest = min(checkpoints.steps, default=0)
    found = None
    if processes.leads():
        found = run_directory.whole(job.config.output_dir, oldest)
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


def start(job: Job) -> TrainState:
    """The state before the first step. Reads the weights."""
    config, actor = job.config, job.actor.start()
    coef, reference = None, None
    if config.algorithm.use_kl_in_reward:
        coef = np.float32(config.algorithm.kl_ctrl.kl_coef)
        coef = processes.place(coef, actor.step.sharding)
    if config.actor.ref_refresh_steps:
        reference = job.actor.reference.read()
    critic = job.critic and job.critic.start()
    return TrainState(actor, critic, coef, reference)


def abstract_state(job: Job) -> TrainState:
    """Shapes, dtypes and shardings of the state."""
    config, actor = job.config, job.actor.abstract_state()
    coef, reference = None, None
    if config.algorithm.use_kl_in_reward:
        coef = jax.ShapeDtypeStruct((), jnp.float32, sharding=actor.step.sharding)
    if config.actor.ref_refresh_steps:
        reference = job.actor.reference.abstract_params()
    critic = job.critic and job.critic.abstract_state()
    return TrainState(actor, critic, coef, reference)
