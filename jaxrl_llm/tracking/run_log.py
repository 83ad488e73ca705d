"""What a run leaves behind and goes on from, and what it shows meanwhile."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from jaxrl_llm import models
from jaxrl_llm.algorithms.ppo import TrainState
from jaxrl_llm.config import resume
from jaxrl_llm.config.names import device_numbers
from jaxrl_llm.config.parsing import ConfigError
from jaxrl_llm.config.schema import Config
from jaxrl_llm.data.prompts import Datasets
from jaxrl_llm.data.stream import PromptBatches
from jaxrl_llm.data.types import Completion, Prompt
from jaxrl_llm.rewards import Scores
from jaxrl_llm.sharding import processes
from jaxrl_llm.tracking import device_trace as profile
from jaxrl_llm.tracking import performance, report, step_metrics
from jaxrl_llm.tracking.console import LiveView, progress
from jaxrl_llm.tracking.performance import Timer
from jaxrl_llm.tracking.run_directory import MetricsWriter
from jaxrl_llm.training import evaluate
from jaxrl_llm.training.checkpoint import Checkpoints

_PHASES = {
    "gen": "generating",
    "reward": "scoring",
    "old_log_prob": "asking the policy and its reference",
    "values": "asking the critic",
    "adv": "estimating advantages",
    "update_critic": "updating the critic",
    "update_actor": "updating",
    "update_weights": "loading weights",
    "testing": "validating",
    "save_checkpoint": "saving",
}


class Records:
    """What a run leaves behind and goes on from: metrics, rollouts, checkpoints, the
    live view. A context manager; `open` is called first."""

    def __init__(self, config: Config, source: models.Checkpoint, data: Datasets):
        self.config, self.source, self.data = config, source, data
        self.directory = Path(config.output_dir)
        self._leads = processes.leads()
        self._console = Console(quiet=not self._leads)
        resume.check(self.directory, config)
        self.prompt_batches = PromptBatches(
            data.train,
            config.data.train_batch_size,
            seed=config.seed,
            shuffle=config.data.shuffle,
        )
        trainer = config.trainer
        self._exit = ExitStack()
        processes.gather(None)  # nobody writes before all have looked
        self._writer: MetricsWriter | None = None
        if self._leads:
            self._writer = self._exit.enter_context(
                MetricsWriter(
                    self.directory,
                    trainer.loggers,
                    trainer.project,
                    config.model_dump(mode="json"),
                )
            )
        processes.gather(None)
        if not (self.directory / "config.yaml").exists():
            raise ConfigError(
                f"output_dir {self.directory}: what process 0 writes there is not seen "
                f"by process {jax.process_index()}; use a directory that all share"
            )
        self._checkpoints = self._exit.enter_context(
            Checkpoints(self.directory / "checkpoints", trainer.max_ckpt_to_keep)
        )
        self._profiler = self._exit.enter_context(ExitStack())
        self._step = 0
        self._timer = Timer()
        self._shown: list[dict[str, Any]] = []
        self._batch: dict[str, float] = {}
        self._said: str | None = None

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def open(
        self, like: TrainState, start: Callable[[], TrainState]
    ) -> tuple[TrainState, int]:
        """The state to go on from and the step it is at; 0 for a fresh start.

        Args:
          like: shapes, dtypes and shardings of the state.
          start: makes the state of a fresh start.
        """
        trainer = self.config.trainer
        found = self._checkpoints.restore(like)
        step = self._step = found.step if found else 0
        if found:
            state = found.state
            self.prompt_batches.restore(found.position["prompts"])
            self._console.print(f"going on from step {step} in {self.directory}")
        else:
            with progress("reading the weights", console=self._console):
                state = start()
        if self._writer:  # only now that nothing is refused
            self._writer.rewind(step if found else -1)
        self._view = self._exit.enter_context(
            LiveView(
                trainer.total_training_steps,
                step,
                console=self._console,
                num_examples=trainer.num_examples,
            )
        )
        return state, step

    def begin(self, step: int) -> None:
        """A step begins: the profiler starts before the first step to look at, and
        stops after the last."""
        first, _, last = (self.config.trainer.profile or "0:0").partition(":")
        if step == int(first) and self._leads:
            directory = self.directory / "profile"
            self._profiler.enter_context(profile.recorded(directory))
        elif step == int(last) + 1:
            self._profiler.close()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Shows and times a phase of the step; profiles show it by its name."""
        self._view.phase(_PHASES[name])
        with self._timer(name), jax.profiler.TraceAnnotation(name):
            yield

    def validation_due(self, step: int) -> bool:
        """Whether the held-out questions are to be answered after this step."""
        trainer = self.config.trainer
        if not self.data.val:
            return False
        if step == 0:
            return trainer.val_before_train
        last = step == trainer.total_training_steps
        return last or (trainer.test_freq > 0 and step % trainer.test_freq == 0)

    def rollouts(
        self,
        step: int,
        asked: Sequence[Prompt],
        rollouts: Sequence[Sequence[Completion]],
        scores: Scores,
        advantage: np.ndarray,
    ) -> None:
        """Writes every response of a step with its reward."""
        self._shown = step_metrics.rollout_records(
            step, "train", "train", asked, rollouts, scores, advantage=advantage
        )
        self._batch = step_metrics.batch_metrics(asked, rollouts, scores, advantage)
        lengths = [
            len(p.tokens) + len(c.tokens)
            for p, g in zip(asked, rollouts, strict=True)
            for c in g
        ]
        self._lengths = np.asarray(lengths)
        if self._writer:
            self._writer.write_rollouts(step, "train", self._shown)

    def write(
        self,
        step: int,
        learned: Mapping[str, float],
        validation: evaluate.Validation | None,
    ) -> None:
        """Writes the step's metrics and shows them."""
        timing = self._timer.metrics()
        line = {**learned, **self._batch, **timing}
        if self._batch:
            line |= self._speed(timing)
            line["training/epoch"] = self.prompt_batches.epoch
        if validation:
            line |= validation.metrics
        if self._writer:
            if validation:
                self._writer.write_rollouts(step, "val", validation.records)
            self._writer.write(step, line)
        self._step = step
        self._view.update(step, line, self._shown)
        advice = recommendation(self.config, line)
        if advice and not self._said:  # once
            self._said = advice
            self._console.print(advice, soft_wrap=True, markup=False, highlight=False)
        self._timer, self._batch = Timer(), {}

    def _speed(self, timing: Mapping[str, float]) -> dict[str, float]:
        arch, count = self.source.arch, jax.device_count()
        tokens = int(self._lengths.sum())
        generated = self._batch["response_length/mean"] * len(self._lengths)
        flops = self.config.actor.ppo_epochs * performance.train_flops(
            models.num_matmul_params(arch),
            tokens,
            int((self._lengths**2).sum()),
            arch.num_layers,
            arch.num_heads,
            arch.head_dim,
        )
        speed = {
            **performance.throughput(tokens, timing["timing_s/step"], count),
            **performance.memory(),
            "perf/rollout_tokens_per_s": generated / timing["timing_s/gen"],
        }
        update = timing.get("timing_s/update_actor")
        if update is None:  # the critic warms up
            return speed
        placement = self.config.placement
        if placement.groups:
            count = len(device_numbers(placement.groups[placement.actor]))
        return speed | {
            **performance.mfu(flops, update, jax.devices()[0].device_kind, count),
            "perf/update_tokens_per_s": tokens / update,
        }

    def save(
        self,
        step: int,
        state: TrainState,
        validation: evaluate.Validation | None,
        stopping: bool,
    ) -> None:
        """Saves a checkpoint in the background, if this is a step for it."""
        trainer = self.config.trainer
        last = step == trainer.total_training_steps or stopping
        if not last and not (trainer.save_freq and step % trainer.save_freq == 0):
            return
        score = None
        if validation:
            name = step_metrics.accuracy_name(list(validation.metrics))
            score = validation.metrics[name] if name else None
        with self.phase("save_checkpoint"):
            self._checkpoints.save(
                step,
                state,
                {"prompts": self.prompt_batches.state()},
                score,
            )

    def close(self, state: TrainState) -> None:
        """Waits for the checkpoints, writes the weights and the report."""
        with self.phase("save_checkpoint"):
            self._checkpoints.wait()
            if self.config.trainer.save_hf:
                self._save_weights(state)
        self._exit.close()
        if self._leads:
            report.write(self.directory)
        if self._step < self.config.trainer.total_training_steps:
            self._console.print(
                f"stopped after step {self._step} of "
                f"{self.config.trainer.total_training_steps}; the same command goes on "
                "from there",
                markup=False,
            )

    def _save_weights(self, state: TrainState) -> None:
        """Writes the policy as a Hugging Face directory, in place of an older one."""
        directory = self.directory / "huggingface"
        fresh = self.directory / "huggingface.new"
        if self._leads:
            shutil.rmtree(fresh, ignore_errors=True)
        processes.gather(None)
        models.save(fresh, self.source.arch, state.actor.params, self.source.tokenizer)
        if self._leads:
            shutil.rmtree(directory, ignore_errors=True)
            fresh.rename(directory)


def recommendation(config: Config, line: Mapping[str, float]) -> str | None:
    """What to change when sampler and trainer differ by more than they should."""
    found = line.get("mismatch/logprob_diff_mean", 0.0)
    if config.algorithm.rollout_correction or found <= config.rollout.max_mismatch:
        return None
    return (
        f"sampler and trainer differ by {found:.3g} nats per token "
        "(mismatch/logprob_diff_mean), over rollout.max_mismatch "
        f"{config.rollout.max_mismatch}: --algorithm.rollout_correction.rollout_is "
        "token corrects for it"
    )
