"""Every program of a run, so that all are compiled before the first step."""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
from jax.stages import Lowered

from jaxrl_llm import models
from jaxrl_llm.config import plugins
from jaxrl_llm.config.schema import EngineConfig, ValConfig
from jaxrl_llm.rollout.engine import Use
from jaxrl_llm.training import checkpoint, fitting, memory
from jaxrl_llm.training.build import Job
from jaxrl_llm.training.experience import sampling


def programs(job: Job, done: Sequence[int] = ()) -> dict[str, Callable[[], Lowered]]:
    """What lowers each program that steps and validations need, by its name; those
    that take long to compile come first. None if the last step is among those done."""
    if max(done, default=0) >= job.config.trainer.total_training_steps:
        return {}
    actor, largest = job.actor, job.actor.largest_rows()
    found = dict(actor.programs())
    if job.critic:
        found |= job.critic.programs(largest)
    if "sum_pi_squared" in plugins.estimator_of(job.config.algorithm).needs:
        for rows in actor.policy.shapes_of_rows(largest):
            found[f"sums of squares {list(rows.tokens.shape)}"] = functools.partial(
                actor.lower_sum_pi_squared, rows
            )
    if job.reward_model:
        found |= job.reward_model.programs(largest)
    if job.config.actor.ref_refresh_steps and actor.reference:
        found["copy of the policy"] = actor.reference.lower_copy
    if job.config.trainer.save_hf and job.config.actor.lora is None:
        params = models.merge(actor.abstract_state().params, actor.abstract_frozen())
        kind = job.config.actor.dtype
        found |= models.save_programs(job.source.arch, params, kind)
    questions = itertools.chain(job.data.train, job.data.val)
    tokens = (prompt.tokens for prompt in questions)
    if job.agent:  # environments say more before the first turn, each its own
        length = job.config.data.max_prompt_length
        tokens = ((i % 2,) * length for i in range(2))

    def resident(_: jax.Device) -> int:
        return fitting.beside(job.config, memory.held(job), "rollout")

    found |= job.engine.programs(uses(job), tokens, resident)
    return found | checkpoint.programs(job.abstract_state())


def uses(job: Job) -> list[Use]:
    """What this process asks its engine at a time, in steps and in validations."""
    config, held_out = job.config, len(job.data.val)
    prompts = -(-config.data.train_batch_size // jax.process_count())
    drawn = sampling(config.rollout, config.rollout)
    found = [Use(num_prompts=prompts, num_samples=config.rollout.n, sampling=drawn)]
    greedy = replace(drawn, temperature=0.0)
    if plugins.estimator_of(config.algorithm).asks_greedily:
        found.append(Use(num_prompts=prompts, num_samples=1, sampling=greedy))
    found += validating(config.rollout, config.val, held_out)
    between = config.longest_response if config.agent else 0
    return [replace(use, continued=between) for use in found]


def validating(rollout: EngineConfig, val: ValConfig, questions: int) -> list[Use]:
    """What this process asks its engine at a time in validations."""
    if not questions:
        return []
    share = -(-questions // jax.process_count())
    drawn = sampling(rollout, val)
    found = [Use(num_prompts=share, num_samples=val.n, sampling=drawn)]
    if val.greedy:
        likeliest = replace(drawn, temperature=0.0, top_k=-1, top_p=1.0, min_p=0.0)
        found.append(Use(num_prompts=share, num_samples=1, sampling=likeliest))
    return found
