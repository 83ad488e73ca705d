"""Verbs of the Python API: `train`, `evaluate`, `generate`."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from jaxrl_llm.config import parsing
from jaxrl_llm.config import schema as configs
from jaxrl_llm.config.parsing import ConfigError
from jaxrl_llm.rewards import RewardFunction, resolve
from jaxrl_llm.sharding import processes
from jaxrl_llm.tracking import run_directory
from jaxrl_llm.tracking.console import before_after
from jaxrl_llm.tracking.result import Result
from jaxrl_llm.training import evaluate
from jaxrl_llm.training.build import Job, build
from jaxrl_llm.training.loop import _answer_held_out, run

Reward = str | Callable[..., Any]


def train(
    model: str,
    prompts: str | Sequence[Mapping[str, Any]],
    reward: Reward | Sequence[Reward],
    *,
    val_prompts: str | Sequence[Mapping[str, Any]] | None = None,
    steps: int = 20,
    output_dir: str = "runs/notebook",
    settings: Mapping[str, Any] | None = None,
) -> Result:
    """GRPO in one call.

    Args:
      model: as `model.path` in a configuration file.
      prompts: rows with "prompt" and whatever the reward needs ("answer", ...), or a
        data set's path as in a configuration file.
      reward: name of a built-in reward, or a function with TRL's signature
        f(prompts, completions, completion_ids, **columns) -> list of numbers; or
        several; or [], if `settings` give a reward.model.
      val_prompts: held-out questions, for the validation before and after.
      settings: anything else a configuration file can say, by dotted key:
        {"actor.optim.lr": 1e-5, "rollout.n": 16}.

    Raises:
      ValueError: something is missing or does not fit; the message names it.
    """
    given = [reward] if isinstance(reward, str) or callable(reward) else list(reward)
    functions = [_function(one) for one in given]
    values = {
        "output_dir": output_dir,
        "model": {"path": model},
        "data": {"train": {"path": _stored(prompts, output_dir, "train")}},
        "reward": {"functions": [{"name": f.name} for f in functions]},
        "trainer": {"total_training_steps": steps},
    }
    if val_prompts is not None:
        values["data"]["val"] = {"path": _stored(val_prompts, output_dir, "val")}
    for key, value in (settings or {}).items():
        parsing.put(values, key.split("."), value)
    return run(build(parsing.parse(values, "train()"), functions))


def _function(reward: Reward) -> RewardFunction:
    if callable(reward):
        name = getattr(reward, "__name__", type(reward).__name__)
        return RewardFunction(name=name, function=reward)
    named = configs.RewardFunctionConfig(name=reward)
    return resolve(configs.RewardConfig(functions=(named,)))[0]


def _stored(rows: str | Sequence[Mapping[str, Any]], directory: str, name: str) -> str:
    """The path of a data set; rows are written down first, so that the run's
    configuration says where its data is."""
    if isinstance(rows, str):
        return rows
    lines = []
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(f"{name} row {i}: expected {{'prompt': ...}}, got {row!r}")
        try:
            # A reward of the user's own may need no answer.
            lines.append(json.dumps({"answer": None, **row}) + "\n")
        except TypeError as error:
            raise ValueError(f"{name} row {i} is not JSON: {error}") from None
    path, text = Path(directory) / f"{name}.jsonl", "".join(lines)
    started = (path.parent / "config.yaml").exists() and path.exists()
    if started and path.read_text() != text:
        raise ValueError(
            f"output_dir {directory} holds a run on other {name} rows; choose another "
            "output_dir"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    run_directory.replace_text(path, text)
    return str(path)


def evaluate_only(job: Job) -> evaluate.Validation:
    """Answers the held-out questions with the model as it is, and prints how well."""
    if not job.data.val:
        raise ConfigError("data.val is needed: which questions to answer")
    with closing(job.engine):
        job.engine.load(job.learner.read_weights("float32"), version=0)
        validation = _answer_held_out(job, 0)
    if processes.leads():
        before_after(
            None,
            validation,
            job.config.output_dir,
            num_examples=job.config.trainer.num_examples,
        )
    return validation
