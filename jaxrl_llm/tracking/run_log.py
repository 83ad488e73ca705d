"""What a run leaves behind and shows meanwhile. It is told, and gives nothing back."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
from rich.console import Console

from jaxrl_llm.data.types import Episode, Generated, Prompt, Scores
from jaxrl_llm.tracking import device_trace as profile
from jaxrl_llm.tracking import performance, report, step_metrics
from jaxrl_llm.tracking.console import LiveView, progress
from jaxrl_llm.tracking.live_report import LiveReport
from jaxrl_llm.tracking.performance import Devices, Timer
from jaxrl_llm.tracking.rollout_digest import Digests
from jaxrl_llm.tracking.run_directory import MetricsWriter
from jaxrl_llm.tracking.step_metrics import Validation

TokenDetails = Callable[[], Mapping[int, Mapping[str, Any]]]
_PHASES = {
    "gen": "generating",
    "reward": "scoring",
    "old_log_prob": "asking the policy and its reference",
    "teacher": "asking the teacher",
    "values": "asking the critic",
    "adv": "estimating advantages",
    "update_critic": "updating the critic",
    "update_actor": "updating",
    "update_weights": "loading weights",
    "testing": "validating",
    "save_checkpoint": "saving",
}


class RunLog:
    """Metrics, rollouts, the report and the live view of one run.

        with RunLog(...) as log:
            log.start(0)
            log.begin(1)
            with log.phase("gen"): ...
            log.rollouts(1, ...)
            log.write_rollouts()
            log.step(1, metrics)
            log.end()

    Args:
      directory: of the run; made if it does not exist.
      config: the resolved configuration, for config.yaml and the loggers.
      inputs: digests of what the run is made from, for inputs.json.
      devices: what speeds are relative to.
      total_steps: the run ends after this step.
      num_examples: completions in the live view.
      loggers: services that get the metrics too; see `services`.
      project: the run's project there.
      tags: what it can be found by there.
      profile: "FIRST:LAST", the steps whose trace is recorded; None for none.
      writes: False for a process that leaves writing and printing to another one.
    """

    def __init__(
        self,
        directory: Path,
        *,
        config: Mapping[str, Any],
        inputs: Mapping[str, Any] | None = None,
        devices: Devices,
        total_steps: int,
        num_examples: int,
        loggers: Sequence[str],
        project: str,
        tags: Sequence[str] = (),
        profile: str | None,
        writes: bool,
    ):
        self.directory = directory
        self._devices, self._writes = devices, writes
        self._total_steps, self._num_examples = total_steps, num_examples
        self._profiled = tuple(map(int, (profile or "0:0").split(":")))
        self._console = Console(quiet=not writes)
        self._exit = ExitStack()
        self._writer: MetricsWriter | None = None
        self._written = loggers, project, config, inputs, tags
        self._profiler = self._exit.enter_context(ExitStack())
        self._step = 0
        self._timer = Timer()
        self._shown: list[dict[str, Any]] = []
        self._not_written: Callable[[], None] | None = None
        self._batch: dict[str, float] = {}
        self._learns = False
        self._advised: set[str] = set()
        self._report: LiveReport | None = None
        self._digests = Digests(directory)
        self.during = ""
        """The phase under way, or the one that an error has ended; "" between them."""
        if devices.description:
            self.say(devices.description)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(*[Exception] * bool(error)):  # the error itself says more
            self.write_rollouts()
        self._exit.__exit__(kind, error, trace)
        if self._writer and isinstance(error, Exception):
            with suppress(ValueError, OSError):
                self._writer.write_advice(self._step, "stopped", f"stopped: {error}")
                self._write_report(running=False)

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Shows what is done, for how long, before the run starts."""
        with progress(what, console=self._console):
            yield

    def say(self, text: str) -> None:
        """Prints a line that a person must not miss."""
        self._console.print(text, soft_wrap=True, markup=False, highlight=False)

    def start(self, step: int) -> None:
        """The run begins (0), or goes on after `step`: nothing is refused any more, and
        what was written of later steps is void. Nothing is written before."""
        if step:
            self.say(f"going on from step {step} in {self.directory}")
        if self._writes:
            writer = MetricsWriter(self.directory, *self._written)
            self._writer = self._exit.enter_context(writer)
            self._advised = set(writer.rewind(step or -1))
            live = LiveReport(lambda: self._write_report(running=True), self.say)
            self._report = self._exit.enter_context(live)
        self._step = step
        self._view = self._exit.enter_context(
            LiveView(
                self._total_steps,
                step,
                console=self._console,
                num_examples=self._num_examples,
            )
        )
        if self._devices.advice:
            self.advise({"devices": self._devices.advice})

    def begin(self, step: int) -> None:
        """A step begins: the profiler starts before the first step to look at, and
        stops after the last."""
        first, last = self._profiled
        if step == first and self._writes:
            self._profiler.enter_context(profile.recorded(self.directory / "profile"))
        elif step == last + 1:
            self._profiler.close()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Shows and times a phase of the step; profiles show it by its name."""
        self._view.phase(_PHASES[name])
        self.during = name
        with self._timer(name), jax.profiler.TraceAnnotation(name):
            yield
        self.during = ""

    @contextmanager
    def compiling(self) -> Iterator[Callable[[int, int], None]]:
        """Shows and times the wait for programs that are compiled in the background.

        Yields:
          What is to be told how many are done, and how many there are.
        """
        known = 0

        def tell(done: int, count: int) -> None:
            nonlocal known
            known = count
            self._view.phase(f"compiling {done} of {count}")

        start = time.perf_counter()
        with self._timer("compile"):
            yield tell
        if known:
            passed = time.perf_counter() - start
            self._console.print(f"compiling {known} programs: {passed:.1f} s")

    def rollouts(
        self,
        step: int,
        asked: Sequence[Prompt],
        rollouts: Sequence[Sequence[Episode]],
        scores: Scores,
        advantage: np.ndarray,
        generated: Generated,
        *,
        epoch: float,
        update_flops: float,
        token_details: TokenDetails = dict,
    ) -> None:
        """Takes every response that a step trains on with its reward, to be written by
        `write_rollouts`, or else at the end of the step.

        Args:
          advantage: [P, G], the mean of the tokens' of each response.
          generated: what rewards, lengths and speeds are of: these responses, and those
            that are not trained on.
          epoch: passes over the training data so far.
          update_flops: operations of all passes of the policy's update, on the tokens
            of these responses and their prompts.
          token_details: finds what is known of each token of some responses, by the
            place of the response among all; see `token_details.of_step`.
        """

        def write() -> None:
            self._shown = step_metrics.rollout_records(
                step, "train", "train", asked, rollouts, scores, advantage=advantage
            )
            if self._writer:
                for place, details in token_details().items():
                    self._shown[place]["token_details"] = details
                self._writer.write_rollouts(step, "train", self._shown)

        self._not_written = write
        self._batch = step_metrics.batch_metrics(
            generated.asked, generated.rollouts, generated.scores, advantage
        )
        self._learns = True
        read, new = step_metrics.num_tokens(generated.asked, generated.rollouts)
        if generated.greedy:
            more = step_metrics.num_tokens(asked, generated.greedy)
            read, new = read + more[0], new + more[1]
        self._tokens, self._new_tokens = read + new, new
        self._trained_tokens = sum(step_metrics.num_tokens(asked, rollouts))
        self._epoch, self._update_flops = epoch, update_flops

    def rows(self, *, num_tokens: int, epoch: float, update_flops: float) -> None:
        """Takes what a step learns from where nothing is generated.

        Args:
          num_tokens: of all rows.
          others: as of `rollouts`.
        """
        self._tokens = self._trained_tokens = num_tokens
        self._epoch, self._update_flops = epoch, update_flops
        self._learns = True

    def write_rollouts(self) -> None:
        """Writes what `rollouts` took, once: best while devices compute, as the host
        has a while to do."""
        write, self._not_written = self._not_written, None
        if write:
            write()

    def step(
        self,
        step: int,
        metrics: Mapping[str, float],
        validation: Validation | None = None,
    ) -> None:
        """A step is done: writes its metrics and shows them.

        Args:
          step: 0 is before training, without rollouts.
          validation: made after this step, if there was one.
        """
        self.write_rollouts()
        timing = self._timer.metrics()
        line = {**metrics, **self._batch, **timing}
        if self._learns:
            line |= self._speed(timing)
            line["training/epoch"] = self._epoch
        if validation:
            line |= validation.metrics
        if self._writer:
            if validation:
                self._writer.write_rollouts(step, "val", validation.records)
            self._writer.write(step, line)
        self._step = step
        if self._report:
            self._report.ask() if validation else self._report.ask_if_old()
        self._view.update(step, line, self._shown)
        self._timer, self._batch, self._learns = Timer(), {}, False

    def sync(self) -> None:
        """What was written so far is on disk: a checkpoint may count on it."""
        if self._writer:
            self._writer.sync()

    def advise(self, texts: Mapping[str, str]) -> None:
        """Prints what to look at or to change, and keeps it for the report.

        Args:
          texts: by kind; of each kind, the first of a run.
        """
        for kind, text in texts.items():
            if kind not in self._advised:
                self._advised.add(kind)
                self.say(f"note: {text}")
                if self._writer:
                    self._writer.write_advice(self._step, kind, text)

    def end(self) -> None:
        """The run is over, at its end or before: writes the report."""
        self._exit.close()
        if self._writes:
            self._write_report(running=False)
        if self._step < self._total_steps:
            self._console.print(
                f"stopped after step {self._step} of {self._total_steps}; the same "
                "command goes on from there",
                markup=False,
            )

    def _write_report(self, *, running: bool) -> None:
        report.write(self.directory, digests=self._digests, running=running)

    def _speed(self, timing: Mapping[str, float]) -> dict[str, float]:
        devices = self._devices
        speed = {
            **performance.throughput(
                self._tokens, timing["timing_s/step"], devices.count
            ),
            **performance.memory(),
        }
        if generating := timing.get("timing_s/gen"):  # else within an earlier step
            speed["perf/rollout_tokens_per_s"] = self._new_tokens / generating
        update = timing.get("timing_s/update_actor")
        if update is None:  # the critic warms up
            return speed
        return speed | {
            **performance.mfu(
                self._update_flops, update, devices.peak_flops, devices.updating
            ),
            "perf/update_tokens_per_s": self._trained_tokens / update,
        }
