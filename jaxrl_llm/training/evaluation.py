"""`jaxrl evaluate`: one or several models on the same held-out questions."""

import json
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from pathlib import Path

from jaxrl_llm import models
from jaxrl_llm.config.names import ConfigError
from jaxrl_llm.config.schema import Config, ModelConfig
from jaxrl_llm.config.schema_offline import RmConfig
from jaxrl_llm.config.schema_training import LoraConfig
from jaxrl_llm.config.secrets import without_secrets
from jaxrl_llm.sharding import processes
from jaxrl_llm.tracking import comparison, run_directory
from jaxrl_llm.tracking.comparison import Difference
from jaxrl_llm.tracking.step_metrics import Validation
from jaxrl_llm.training import checkpoint, learned, memory
from jaxrl_llm.training.build import build
from jaxrl_llm.training.evaluate import answer_held_out

Say = Callable[[str], None]


def evaluate_all(
    config: Config, names: Sequence[str] = (), *, say: Say = print
) -> tuple[dict[str, Validation], dict[str, dict[str, Difference]]]:
    """Answers the held-out questions with one model after the other, and writes
    eval.json and eval.jsonl in `config.output_dir`: after each model, so that what one
    has answered is not lost with the next.

    Args:
      names: models as `model.path` names them, directories of runs, or checkpoints
        (RUN/checkpoints/STEP); `config.model.path` if there are none.
      say: is told what to know, a line each.

    Returns:
      What came of it, and what lies between the first model and each other one; both by
      the model's name.

    Raises:
      ConfigError: there are no held-out questions, or something else does not fit.
      CheckpointError: a checkpoint is not as it was saved.
      OutOfMemory: a device's memory does not suffice.
    """
    if not names and config.actor.lora and config.actor.lora.path:
        raise ConfigError(
            f"actor.lora.path {config.actor.lora.path} is what a run would begin with; "
            "which model is to answer? Name it: --models MODEL or the adapter's folder"
        )
    names = list(names) or [config.model.path]
    if not processes.leads():
        say = _nothing
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ConfigError(f"--models: {twice[0]} is given twice")
    if not config.data.val:
        raise ConfigError("data.val is needed: which questions to answer")
    asked = {name: model_of(name, config) for name in names}
    for of_model, _ in asked.values():  # before the first of them is asked
        section = of_model.model
        models.open(
            section.path, revision=section.revision, tokenizer=section.tokenizer
        )
    directory = Path(config.output_dir)
    if processes.leads():
        for line in comparison.set_aside(directory):
            say(line)
    about = {
        "config": without_secrets(json.loads(config.model_dump_json())),
        "versions": run_directory.versions(),
    }
    results: dict[str, Validation] = {}
    differences: dict[str, dict[str, Difference]] = {}
    for name, (of_model, saved) in asked.items():
        if len(asked) > 1:
            say(f"{name}: answering")
        results[name] = _answered(of_model, saved, say)
        if name != names[0]:
            differences[name] = comparison.compare(results[names[0]], results[name])
        if processes.leads():
            comparison.write(directory, results, differences, about)
    return results, differences


def model_of(name: str, config: Config) -> tuple[Config, Path | None]:
    """The configuration with the model that a name stands for, and the checkpoint that
    its weights are in; None if they are the model's own.

    Raises:
      ConfigError: a run has no weights, or its settings are gone.
    """
    path = Path(name).expanduser()
    if (path / "huggingface").is_dir():
        return _with(config, _own(str(path / "huggingface"), config)), None
    if (path / "checkpoints").is_dir():
        raise ConfigError(
            f"{name} is a run without final weights; name one of its checkpoints, "
            f"such as {path / 'checkpoints' / 'STEP'}"
        )
    if not learned.is_checkpoint(path):
        return _with(config, _own(name, config)), None
    settings = learned.run_of(path)
    if isinstance(settings, RmConfig):
        raise ConfigError(
            f"{name} is of a reward model, which answers no questions; name it in "
            "reward.model.path"
        )
    lora = learned.trained_by(settings).lora
    # What they began with has been trained on: the checkpoint has all of them.
    lora = lora and lora.model_copy(update={"path": None})
    return _with(config, settings.model, lora), path


def _with(config: Config, model: ModelConfig, lora: LoraConfig | None = None) -> Config:
    """The configuration with another model and its adapters."""
    actor = config.actor.model_copy(update={"lora": lora})
    return config.model_copy(update={"model": model, "actor": actor})


def _own(path: str, config: Config) -> ModelConfig:
    """The configuration's model, or another one with a tokenizer of its own."""
    if path == config.model.path:
        return config.model
    return ModelConfig(path=path)


def _answered(config: Config, saved: Path | None, say: Say) -> Validation:
    """What comes of the held-out questions with the configuration's model as it is.

    Args:
      saved: a checkpoint of a run of that model, whose weights to take.
    """
    job = build(config, learns=False)
    for warning in job.warnings:
        say(f"note: {warning}")
    with (
        closing(job.engine),
        closing(job.rewards),
        closing(job.agent) if job.agent else nullcontext(),
        memory.explained(job, lambda: "testing"),
    ):
        if saved is None:
            params = job.actor.read_weights("float32")
        else:
            like = job.actor.abstract_state().params
            params = job.served(checkpoint.read_policy(saved, like))
        job.engine.load(params, version=0)
        del params
        return answer_held_out(job, 0)


def _nothing(_: str) -> None:
    """Says nothing."""
