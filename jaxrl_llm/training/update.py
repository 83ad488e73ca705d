"""The stage of a step in which everything that learns, learns."""

import dataclasses

import numpy as np

from jaxrl_llm import models
from jaxrl_llm.algorithms.ppo import TrainState
from jaxrl_llm.data.rows import TrainBatch
from jaxrl_llm.tracking import performance
from jaxrl_llm.training.build import Job
from jaxrl_llm.training.experience import Groups, Observe
from jaxrl_llm.training.randomness import Purpose, seed


def update(
    job: Job, state: TrainState, rows: TrainBatch, step: int, observe: Observe
) -> tuple[TrainState, dict[str, float]]:
    """The critic learns, then, once that has warmed up, the policy. Donates `state`.

    Returns:
      The next state, and metrics.
    """
    config, learned = job.config, {}
    order = seed(config.seed, Purpose.ORDER, step)
    if job.critic:
        with observe("update_critic"):
            critic, learned = job.critic.update(state.critic, rows, order)
        state = dataclasses.replace(state, critic=critic)
    if step > config.trainer.critic_warmup:
        with observe("update_actor"):
            actor, of_actor = job.actor.update(state.actor, rows, order)
        state, learned = dataclasses.replace(state, actor=actor), learned | of_actor
    refresh = config.actor.ref_refresh_steps
    if refresh and step % refresh == 0:
        reference = job.actor.reference.copy_of(state.actor.params)
        state = dataclasses.replace(state, reference=reference)
    return state, learned


def update_flops(job: Job, groups: Groups) -> float:
    """Operations of all passes of the policy's update over the groups of a step."""
    lengths = np.array(
        [
            len(prompt.tokens) + len(one.tokens)
            for prompt, group in zip(groups.asked, groups.rollouts, strict=True)
            for one in group
        ]
    )
    arch = job.source.arch
    return job.config.actor.ppo_epochs * performance.train_flops(
        models.num_matmul_params(arch),
        int(lengths.sum()),
        int((lengths**2).sum()),
        arch.num_layers,
        arch.num_heads,
        arch.head_dim,
    )
