"""The stage of a step in which everything that learns, learns."""

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Int

from jaxrl_llm import models
from jaxrl_llm.algorithms import update as updates
from jaxrl_llm.algorithms.ppo import TrainState
from jaxrl_llm.data.rows import TrainBatch
from jaxrl_llm.roles.actor import Actor
from jaxrl_llm.roles.critic import Critic
from jaxrl_llm.roles.learner import Learner
from jaxrl_llm.roles.trained_model import Meanwhile, nothing
from jaxrl_llm.tracking import performance
from jaxrl_llm.training.advice import CannotLearn
from jaxrl_llm.training.build import Job
from jaxrl_llm.training.experience import Groups, Observe
from jaxrl_llm.training.randomness import Purpose, seed


def update(
    job: Job,
    state: TrainState,
    rows: TrainBatch,
    step: int,
    observe: Observe,
    meanwhile: Meanwhile = nothing,
) -> tuple[TrainState, dict[str, float]]:
    """The critic learns, then, once that has warmed up, the policy. Donates `state`.

    Args:
      meanwhile: called when the update of each is dispatched, before it is waited for.

    Returns:
      The next state, and metrics.

    Raises:
      CannotLearn: it has made weights that are not finite, which nobody may go on from.
    """
    config, learned = job.config, {}
    order = seed(config.seed, Purpose.ORDER, step)
    if job.critic:
        with observe("update_critic"):
            critic, learned = job.critic.update(state.critic, rows, order, meanwhile)
        state = dataclasses.replace(state, critic=critic)
        check_weights(job.critic, state.critic, "critic", learned, step)
    if step > config.trainer.critic_warmup:
        with observe("update_actor"):
            actor, of_actor = job.actor.update(state.actor, rows, order, meanwhile)
        state, learned = dataclasses.replace(state, actor=actor), learned | of_actor
        check_weights(job.actor, state.actor, "actor", learned, step)
    refresh = config.actor.ref_refresh_steps
    if refresh and step % refresh == 0:
        reference = job.actor.reference.copy_of(state.actor.params)
        state = dataclasses.replace(state, reference=reference)
    return state, learned


def check_weights(
    role: Actor | Critic | Learner,
    state: updates.TrainState,
    name: str,
    learned: Mapping[str, float],
    step: int,
    key: str | None = None,
) -> None:
    """Raises CannotLearn if an update has made weights that are not finite.

    Args:
      name: what metrics of the role begin with.
      learned: these metrics.
      key: the section of its settings; `name` if not given.
    """
    key = key or name
    if not role.is_finite(state):
        raise CannotLearn(
            f"step {step}: the {key}'s weights are not finite after its update "
            f"({name}/lr {learned[f'{name}/lr']:.3g}, {name}/grad_norm "
            f"{learned[f'{name}/grad_norm']:.3g}); they are not saved, and the newest "
            f"checkpoint is from before: lower {key}.optim.lr or "
            f"{key}.optim.clip_grad, in another output_dir"
        )


def update_flops(job: Job, groups: Groups) -> float:
    """Operations of all passes of the policy's update over the groups of a step."""
    lengths = np.array(
        [
            length
            for prompt, group in zip(groups.asked, groups.rollouts, strict=True)
            for one in group
            for length in one.context_lengths(prompt)
        ]
    )
    return job.config.actor.ppo_epochs * flops_of(
        job.source.arch, lengths, adapters=job.config.actor.lora is not None
    )


def flops_of(
    arch: models.Architecture,
    lengths: Int[np.ndarray, " S"],
    *,
    adapters: bool = False,
) -> float:
    """Operations of one pass of an update over sequences of such lengths.

    Args:
      adapters: nothing but adapters is trained.
    """
    return performance.train_flops(
        models.num_matmul_params(arch),
        int(lengths.sum()),
        int((lengths**2).sum()),
        arch.num_layers,
        arch.num_heads,
        arch.head_dim,
        adapters=adapters,
    )
