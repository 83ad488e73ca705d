"""What a run would say against its beginning, found without changing anything."""

from pathlib import Path

from jaxrl_llm.config import resume
from jaxrl_llm.tracking import run_directory
from jaxrl_llm.training import checkpoint
from jaxrl_llm.training.opening import held
from jaxrl_llm.training.startable import Startable


def rehearse(job: Startable) -> list[str]:
    """What a run would say at its beginning, a line each. All processes call it.

    Weights and checkpoints are not read, so that one is damaged is not seen.

    Raises:
      ConfigError: output_dir holds a run that this one cannot go on, is in use by
        another one, or is not seen by all processes.
      CheckpointError: what the run wrote is not whole up to any checkpoint.
      ValueError: there are fewer prompts than a batch has.
      OSError: output_dir cannot be written to, or has no room for a checkpoint.
    """
    config, trainer = job.config, job.config.trainer
    directory = Path(config.output_dir)
    with held(directory):
        said = resume.check(directory, config)
        said += resume.check_inputs(directory, config, job.inputs)
        job.stream()
        folder, up_to = directory / "checkpoints", None
        steps = checkpoint.steps_in(folder)
        if steps:
            written = run_directory.whole(
                directory, min(steps), rollouts=job.writes_rollouts
            )
            said += written.faults
            up_to = None if trainer.resume == "force" else written.step
        sound = [step for step in steps if up_to is None or step <= up_to]
        if steps and not sound:
            raise checkpoint.CheckpointError(
                checkpoint.none_up_to(up_to, folder, steps)
            )
        reached = max(sound, default=0)
        if reached >= trainer.total_training_steps:
            return [*said, f"the run in {directory} is complete after {reached} steps"]
        checkpoint.check_room(directory, job.abstract_state())
        if reached:
            said.append(f"the run goes on from step {reached}")
    return said
