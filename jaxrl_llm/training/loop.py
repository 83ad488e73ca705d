"""A whole run: experience, credit, update, publish. The only place where learning meets
generation.

    from jaxrl_llm import train
    result = train("Qwen/Qwen2.5-0.5B-Instruct", rows, reward=f, steps=50)
    result.plot()
"""

import functools
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path

from jaxrl_llm.sharding import processes
from jaxrl_llm.sharding.ahead import Ahead
from jaxrl_llm.tracking import performance
from jaxrl_llm.tracking.result import Result
from jaxrl_llm.training import advice, checkpoint, compiling, evaluate, memory
from jaxrl_llm.training.build import Job
from jaxrl_llm.training.credit import assign_credit
from jaxrl_llm.training.experience import collect
from jaxrl_llm.training.opening import opened
from jaxrl_llm.training.recipe import recipe
from jaxrl_llm.training.schedule import Collect, Load, Schedule, Synchronous
from jaxrl_llm.training.state import start_or_go_on
from jaxrl_llm.training.stopping import asked_to_stop
from jaxrl_llm.training.update import update, update_flops


def run(
    job: Job, schedule_of: Callable[[Collect, Load], Schedule] = Synchronous
) -> Result:
    """Trains to the end, or until SIGTERM, Ctrl-C or `trainer.max_hours` asks for an
    early one: the step under way is then the last, and its checkpoint is saved.

    Args:
      schedule_of: makes the schedule of its two stages.

    Raises:
      RewardError: a reward function failed and `reward.on_error` is "raise".
      CheckpointError: there are checkpoints in output_dir, but none to go on from.
      OSError: there is no room for a checkpoint.
      OutOfMemory: a device's memory does not suffice.
      Stopped: after SIGTERM, the step under way did not end in time and was given up.
      KeyboardInterrupt: at a second Ctrl-C.
      CannotLearn: weights, or all gradients of some steps, are not finite.
    """
    config, engine, trainer = job.config, job.engine, job.config.trainer
    total = trainer.total_training_steps
    with (
        closing(engine),
        closing(job.rewards),
        closing(job.agent) if job.agent else nullcontext(),
        opened(job) as (stream, log, checkpoints),
        memory.explained(job, lambda: log.during, checkpoints),
        asked_to_stop(log.say, trainer.stop_grace_s, trainer.max_hours) as stopping,
        performance.long_lived_objects_set_aside() as set_aside,
        Ahead(compiling.programs(job, checkpoints.steps)) as ahead,
    ):
        state, first = start_or_go_on(job, stream, checkpoints, log.waiting, log.say)
        log.start(first)
        if first >= total:
            log.say(
                f"nothing is trained: {config.output_dir} holds a run that is complete "
                f"after {first} steps; for more set trainer.total_training_steps, for "
                "another run choose another output_dir"
            )
        log.advise({warning: warning for warning in job.warnings})
        with log.compiling() as tell:
            ahead.wait(tell)
        watch = advice.Watch(config)
        collected = functools.partial(
            *(collect, config, engine, job.score, stream, log.phase), agent=job.agent
        )
        schedule = schedule_of(collected, engine.load)
        sent = schedule.publish(job.served(state.actor.params), first)
        if first == 0:
            log.step(0, sent, validation=evaluate.if_due(job, 0, log.phase))
        stop, step = False, first
        for step in range(first + 1, total + 1):
            log.begin(step)
            groups = schedule.experience(step)
            state, credited = assign_credit(job, state, groups, step, log.phase)
            log.rollouts(
                step,
                groups.asked,
                groups.rollouts,
                groups.scores,
                credited.advantages,
                groups.generated,
                epoch=groups.epoch,
                update_flops=update_flops(job, groups),
                token_details=credited.token_details,
            )
            state, learned = update(
                job, state, credited.rows, step, log.phase, log.write_rollouts
            )
            with log.phase("update_weights"):
                sent = schedule.publish(job.served(state.actor.params), step)
            validation = evaluate.if_due(job, step, log.phase)
            log.step(step, {**credited.metrics, **learned, **sent}, validation)
            log.advise(watch.advise(step, groups, credited.advantages, learned))
            watch.stop(step)
            stop = stopping()
            if checkpoint.due(trainer, step, stop):
                position, reached = groups.position, evaluate.accuracy(validation)
                with log.phase("save_checkpoint"):
                    log.sync()
                    checkpoints.save(step, state, {"prompts": position}, reached)
            if stop:
                break
            set_aside()
        with log.phase("save_checkpoint"):
            if trainer.save_hf:  # while the last checkpoint is written
                params = job.actor.weights(state.actor.params)
                how = recipe(config, step)
                written = config.output_dir, job.source, params, how
                checkpoint.save_weights(*written, config.actor.dtype)
                if lora := job.actor.policy.settings.lora:
                    adapters = config.output_dir, job.source, state.actor.params
                    checkpoint.save_adapters(*adapters, lora, how)
            checkpoints.wait()
        log.end()
    stopped = stop and step < total
    result = Result(Path(config.output_dir), stopped=stopped)
    if processes.leads():
        result.show(num_examples=trainer.num_examples)
    return result
