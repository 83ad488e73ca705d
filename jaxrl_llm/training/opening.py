"""What a run reads its rows from and writes to, opened by all its processes."""

import errno
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import jax

from jaxrl_llm.config import resume
from jaxrl_llm.config.names import ConfigError
from jaxrl_llm.config.secrets import without_secrets
from jaxrl_llm.data.stream import PromptBatches
from jaxrl_llm.sharding import hardware, processes
from jaxrl_llm.tracking import run_lock
from jaxrl_llm.tracking.performance import Devices
from jaxrl_llm.tracking.run_log import RunLog
from jaxrl_llm.training.checkpoint import Checkpoints
from jaxrl_llm.training.startable import Startable
from jaxrl_llm.training.stopping import Stopped


@contextmanager
def opened(job: Startable) -> Iterator[tuple[PromptBatches, RunLog, Checkpoints]]:
    """What a run reads its rows from and writes to, if nothing stands against it.

    Raises:
      ConfigError: output_dir holds a run that this one cannot go on, is in use by
        another one, or is not seen by all processes.
      ValueError: there are fewer prompts than a batch has.
      OSError: there is no room to write.
    """
    with held(Path(job.config.output_dir)), _opened(job) as parts:
        yield parts


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """No other run writes to `directory` during the block. All processes call it.

    Raises:
      ConfigError: another one does, or process 0 is the only one that sees it.
    """
    with ExitStack() as block:
        refused = None
        if processes.leads():
            try:
                block.enter_context(run_lock.locked(directory))
            except ConfigError as error:
                refused = str(error)
        if refused := processes.gather(refused)[0]:
            raise ConfigError(refused)
        if not (directory / "lock").exists():
            raise ConfigError(
                f"output_dir {directory}: what process 0 writes there is not seen by "
                f"process {jax.process_index()}; use a directory that all share"
            )
        yield


@contextmanager
def _opened(job: Startable) -> Iterator[tuple[PromptBatches, RunLog, Checkpoints]]:
    config, trainer = job.config, job.config.trainer
    directory = Path(config.output_dir)
    changed = resume.check(directory, config)
    changed += resume.check_inputs(directory, config, job.inputs)
    stream = job.stream()
    processes.gather(None)  # nobody writes before all have looked
    with (
        _room_in(directory),
        RunLog(
            directory,
            config=without_secrets(config.model_dump(mode="json")),
            inputs=job.inputs,
            devices=_devices(job.updating),
            total_steps=trainer.total_training_steps,
            num_examples=trainer.num_examples,
            loggers=trainer.loggers,
            project=trainer.project,
            tags=list(dict.fromkeys([*trainer.tags, *job.tags])),
            profile=trainer.profile,
            writes=processes.leads(),
        ) as log,
    ):
        for text in changed:
            log.say(text)
        folder = directory / "checkpoints"
        try:
            with Checkpoints(folder, trainer.max_ckpt_to_keep) as checkpoints:
                yield stream, log, checkpoints
        except (Stopped, KeyboardInterrupt):
            reached = max(checkpoints.steps, default=0)
            log.say(f"the same command goes on from step {reached}")
            raise


@contextmanager
def _room_in(directory: Path) -> Iterator[None]:
    """Says what a full disk means for the run: a failed write names no file."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(
            f"output_dir {directory}: {error.strerror}; make room, and the same "
            "command goes on from the newest checkpoint"
        ) from error


def _devices(updating: int) -> Devices:
    """The devices that speeds are told of."""
    return Devices(
        count=jax.device_count(),
        updating=updating,
        peak_flops=hardware.peak_flops(jax.devices()[0].device_kind),
        description=hardware.described(),
        advice=hardware.unused_gpus(),
    )
