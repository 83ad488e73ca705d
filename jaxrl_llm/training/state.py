"""What a run has learned so far: where it begins, and where it goes on."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.algorithms.ppo import TrainState
from jaxrl_llm.data.stream import PromptBatches
from jaxrl_llm.sharding import processes
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
      CheckpointError: there are checkpoints, but all are damaged.
    """
    found = checkpoints.restore(abstract_state(job), say=say)
    if found is None:
        with waiting("reading the weights"):
            return start(job), 0
    stream.restore(found.position["prompts"])
    return found.state, found.step


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
