"""A whole run that learns from rows that are there: one optimizer step after the other.

    from jaxrl_llm import sft
    result = sft("HuggingFaceTB/SmolLM2-135M", rows, epochs=2)
    result.plot()

It begins, goes on, stops, logs and saves as `loop` does; what is learned is a `Task`.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax.stages import Lowered
from jaxtyping import Int

from jaxrl_llm.algorithms.update import TrainState
from jaxrl_llm.data.examples import Example
from jaxrl_llm.data.rows import TrainBatch
from jaxrl_llm.data.stream import PromptBatches
from jaxrl_llm.roles.trained_model import nothing
from jaxrl_llm.sharding import processes
from jaxrl_llm.sharding.ahead import Ahead
from jaxrl_llm.tracking import performance
from jaxrl_llm.tracking.result import Result
from jaxrl_llm.tracking.step_metrics import Validation
from jaxrl_llm.training import (
    advice,
    checkpoint,
    compiling,
    evaluate,
    fitting,
    offline_memory,
)
from jaxrl_llm.training.experience import Observe
from jaxrl_llm.training.offline_build import OfflineJob
from jaxrl_llm.training.opening import opened
from jaxrl_llm.training.randomness import Purpose, seed
from jaxrl_llm.training.sft import recipe
from jaxrl_llm.training.state import start_or_go_on
from jaxrl_llm.training.stopping import asked_to_stop
from jaxrl_llm.training.update import check_weights, flops_of

EVERY = "all"
"""What metrics call the source of held-out rows."""


def run(job: OfflineJob) -> Result:
    """Trains to the end, or until SIGTERM, Ctrl-C or `trainer.max_hours` asks for an
    early one: the step under way is then the last, and its checkpoint is saved.

    Raises:
      RewardError: a reward function failed and `reward.on_error` is "raise".
      CheckpointError: there are checkpoints in output_dir, but none to go on from.
      OSError: there is no room for a checkpoint.
      OutOfMemory: a device's memory does not suffice.
      Stopped: after SIGTERM, the step under way did not end in time and was given up.
      KeyboardInterrupt: at a second Ctrl-C.
      CannotLearn: weights, or all gradients of some steps, are not finite.
    """
    config, learner, trainer = job.config, job.learner, job.config.trainer
    total, name = trainer.total_training_steps, learner.name
    with ExitStack() as block:
        if job.engine:
            block.enter_context(closing(job.engine))
        block.enter_context(closing(job.rewards))
        stream, log, checkpoints = block.enter_context(opened(job))
        block.enter_context(
            offline_memory.explained(job, lambda: log.during, checkpoints)
        )
        stopping = block.enter_context(
            asked_to_stop(log.say, trainer.stop_grace_s, trainer.max_hours)
        )
        set_aside = block.enter_context(performance.long_lived_objects_set_aside())
        ahead = block.enter_context(Ahead(programs(job, checkpoints.steps)))
        state, first = start_or_go_on(job, stream, checkpoints, log.waiting, log.say)
        if first < total:
            job = job.task.begun(job, state, first, log.waiting, log.say)
            stream.put(job.data.train)
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
        watch = advice.UpdateWatch(
            {name: 1},
            roles={name: "model"},
            keys={name: "learner"},
            patience=min(advice.PATIENCE, total),
            max_skipped_steps=trainer.max_skipped_steps,
        )
        if first == 0:
            log.step(0, {}, validated_if_due(job, state, 0, log.phase))
        batches = Batches(job, stream)
        stop, step = False, first
        for step in range(first + 1, total + 1):
            log.begin(step)
            batch = batches.take()
            log.rows(
                num_tokens=int(batch.lengths.sum()),
                epoch=batch.epoch,
                update_flops=flops_of(
                    job.source.arch,
                    batch.lengths,
                    adapters=config.learner.lora is not None,
                ),
            )
            with log.phase("update_actor"):
                ahead_of = batches.prepare if step < total else nothing
                state, learned = learner.update(state, batch.rows, ahead_of)
            check_weights(learner, state, name, learned, step, "learner")
            validation = validated_if_due(job, state, step, log.phase)
            log.step(
                step,
                {"training/learned_tokens": float(batch.num_learned), **learned},
                validation,
            )
            log.advise(
                {
                    kind: f"step {step}: {said}"
                    for kind, said in watch.of_updates(learned)
                }
            )
            watch.stop(step)
            stop = stopping()
            if checkpoint.due(trainer, step, stop):
                reached = validation and job.task.score(validation.metrics)
                with log.phase("save_checkpoint"):
                    log.sync()
                    checkpoints.save(step, state, {"prompts": batch.position}, reached)
            if stop:
                break
            set_aside()
        with log.phase("save_checkpoint"):
            if trainer.save_hf:  # while the last checkpoint is written
                job.task.save(job, learner.weights(state), step)
                lora = learner.model.settings.lora
                if lora and learner.model.head == "tokens":
                    adapters = config.output_dir, job.source, state.params
                    how = recipe(config, step)
                    checkpoint.save_adapters(*adapters, lora, how)
            checkpoints.wait()
        log.end()
    stopped = stop and step < total
    result = Result(Path(config.output_dir), stopped=stopped)
    if processes.leads():
        result.show(num_examples=trainer.num_examples)
    return result


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one step learns from. Lives on the host."""

    rows: TrainBatch
    lengths: Int[np.ndarray, " S"]
    """Tokens of each sequence."""
    num_learned: int
    """Tokens that are learned."""
    epoch: float
    """Passes over the training data up to and with these rows."""
    position: Mapping[str, Any]
    """Where the training data stands behind them."""


class Batches:
    """The batches of the steps, each laid out while the one before is computed."""

    def __init__(self, job: OfflineJob, stream: PromptBatches[Example]):
        self._job, self._stream = job, stream
        self._next: Batch | None = None

    def prepare(self) -> None:
        """Lays the next batch out, if that is not done."""
        if self._next is not None:
            return
        chosen = next(self._stream)
        self._next = Batch(
            rows=self._job.rows(chosen),
            lengths=np.array([n for one in chosen for n in one.lengths]),
            num_learned=sum(one.num_learned for one in chosen),
            epoch=self._stream.epoch,
            position=self._stream.state(),
        )

    def take(self) -> Batch:
        """The next batch."""
        self.prepare()
        found, self._next = self._next, None
        return found


def validated_if_due(
    job: OfflineJob, state: TrainState, step: int, observe: Observe
) -> Validation | None:
    """What is measured after this step, if it is time for it and there is something.

    Metrics of held-out rows are those of the objective by the names
    `val-core/all/NAME`, such as `val-core/all/sft/loss`; those of answers are those of
    `evaluate.validate`.
    """
    if not (job.data.val or job.engine) or not evaluate.due(job.config.trainer, step):
        return None
    with observe("testing"):
        metrics: dict[str, float] = {}
        records: list[dict[str, Any]] = []
        if job.data.val:
            found = job.learner.measure(state.params, job.held_out_rows())
            metrics |= {f"val-core/{EVERY}/{name}": x for name, x in found.items()}
        if job.engine:
            metrics |= job.engine.load(job.learner.weights(state), step)
            answers = evaluate.validate(
                job.engine,
                job.questions,
                job.score,
                config=job.config.val,
                rollout=job.config.rollout,
                seed=seed(job.config.seed, Purpose.VALIDATION, 0),
                step=step,
            )
            metrics |= answers.metrics
            records = answers.records
    return Validation(metrics=metrics, records=records)


def programs(
    job: OfflineJob, done: Sequence[int] = ()
) -> dict[str, Callable[[], Lowered]]:
    """What lowers each program that steps and validations need, by its name. None if
    the last step is among those done."""
    config = job.config
    if max(done, default=0) >= config.trainer.total_training_steps:
        return {}
    found = job.learner.programs(measures=bool(job.data.val))
    if job.engine:
        sizes = offline_memory.held(job)
        kept = ("weights", "optimizer", fitting.FROZEN)
        beside = sum(sizes.get(name, 0) for name in kept)
        uses = compiling.validating(config.rollout, config.val, len(job.questions))
        tokens = (prompt.tokens for prompt in job.questions)
        found |= job.engine.programs(uses, tokens, lambda _: beside)
    return found | checkpoint.programs(job.abstract_state())
