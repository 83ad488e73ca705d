"""A whole run: build everything, loop, save. The only place where learning meets
generation.

    from jaxrl_llm.train import train
    result = train("Qwen/Qwen2.5-0.5B-Instruct", rows, reward=f, steps=50)
    result.plot()
"""

import functools
import json
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm import config as configs
from jaxrl_llm import estimate, evaluate, loggers, metrics, models, prompts, report
from jaxrl_llm.batch import Completion, Prompt
from jaxrl_llm.config import Config, ConfigError
from jaxrl_llm.console import before_after, whereabouts
from jaxrl_llm.learner import Learner
from jaxrl_llm.records import Records
from jaxrl_llm.rewards import RewardFunction, Scores, resolve, score
from jaxrl_llm.rollout.decode import JaxEngine
from jaxrl_llm.rollout.engine import Engine, Request, Sampling, generate
from sharding import mesh

_ROLLOUT, _VALIDATION, _ORDER = range(3)  # independent streams of random numbers


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything a run consists of, loaded and checked."""

    config: Config
    source: models.Checkpoint
    data: prompts.Datasets
    score: Callable[[Sequence[Prompt], Sequence[Sequence[Completion]]], Scores]
    engine: Engine
    learner: Learner


def build(config: Config, rewards: Sequence[RewardFunction] | None = None) -> Job:
    """Loads and checks everything, cheap things first.

    Args:
      rewards: used instead of `config.reward.functions`.

    Raises:
      ValueError: something is missing or does not fit; the message names it.
    """
    for name in config.trainer.loggers:
        loggers.find(name)
    train_mesh, rollout_mesh = make_meshes(config)
    functions = resolve(config.reward) if rewards is None else rewards
    names = [function.name for function in functions]
    if len(set(names)) != len(names):
        raise ConfigError(f"reward functions need different names, got {names}")
    source = models.open(
        config.model.path,
        revision=config.model.revision,
        tokenizer=config.model.tokenizer,
    )
    check_lengths(config, source.arch)
    data = prompts.load(config.data, source.tokenizer)
    return Job(
        config=config,
        source=source,
        data=data,
        score=functools.partial(
            score,
            functions,
            timeout_s=config.reward.timeout_s,
            on_error=config.reward.on_error,
        ),
        engine=make_engine(config.rollout, source, rollout_mesh),
        learner=Learner(config, source, train_mesh),
    )


def make_engine(
    rollout: configs.RolloutConfig, source: models.Checkpoint, on: jax.sharding.Mesh
) -> Engine:
    """The generator that `rollout.engine` names."""
    match rollout.engine:
        case "jax":
            return JaxEngine(
                source.arch,
                source.tokenizer,
                mesh=on,
                dtype=jnp.dtype(rollout.dtype),
                max_num_seqs=rollout.max_num_seqs,
                decode_chunk=rollout.decode_chunk,
                checksum_freq=rollout.checksum_freq,
            )


def run(job: Job) -> "Result":
    """Trains to the end, or until SIGTERM or Ctrl-C asks for an early one.

    Raises:
      RewardError: a reward function failed and `reward.on_error` is "raise".
    """
    config, learner, engine = job.config, job.learner, job.engine
    with Records(config, job.source, job.data) as records, _asked_to_stop() as stopping:
        state, first_step = records.open(learner)
        engine.load(state.params, first_step)
        if first_step == 0:
            records.write(0, {}, validate(job, records, 0))
        for step in range(first_step + 1, config.trainer.total_training_steps + 1):
            with records.phase("gen"):
                asked = next(records.prompt_batches)
                rollouts = generate(engine, requests(config, asked, step))
            with records.phase("reward"):
                scores = job.score(asked, rollouts)
            with records.phase("adv"):
                rows, advantage = estimate.make_rows(learner, asked, rollouts, scores)
            with records.phase("update_actor"):
                state, learned = learner.update(state, rows, seed(config, _ORDER, step))
            with records.phase("update_weights"):
                engine.load(state.params, step)
            validation = validate(job, records, step)
            records.rollouts(step, asked, rollouts, scores, advantage)
            records.write(step, learned, validation)
            stop = stopping()
            records.save(step, state, validation, stop)
            if stop:
                break
        records.close(state)
    return _shown(Result(Path(config.output_dir)), config)


def requests(config: Config, asked: Sequence[Prompt], step: int) -> list[Request]:
    """What is asked of the engine in one training step."""
    return [
        Request(
            prompt_id=prompt.id,
            tokens=prompt.tokens,
            num_samples=config.rollout.n,
            seed=seed(config, _ROLLOUT, step),
            sampling=sampling(config, config.rollout),
        )
        for prompt in asked
    ]


def sampling(config: Config, section: configs.SamplingConfig) -> Sampling:
    """How `section` (rollout or val) wants tokens drawn, with rollout's limits."""
    return Sampling(
        max_tokens=config.rollout.max_response_length,
        temperature=section.temperature,
        top_k=section.top_k,
        top_p=section.top_p,
        min_p=section.min_p,
        stop=config.rollout.stop,
        stop_token_ids=config.rollout.stop_token_ids,
    )


def seed(config: Config, stream: int, step: int) -> int:
    """A 32-bit seed for one purpose in one step; nothing random has other state."""
    return int(np.random.SeedSequence([config.seed, stream, step]).generate_state(1)[0])


def make_meshes(config: Config) -> tuple[jax.sharding.Mesh, jax.sharding.Mesh]:
    """The training and the generation mesh, both over all devices.

    Raises:
      ConfigError: a mesh does not fit the devices.
    """
    return (
        _make_mesh("actor.mesh", config.actor.mesh.model_dump()),
        _make_mesh("rollout.mesh", config.rollout.mesh.model_dump()),
    )


def _make_mesh(name: str, axes: Mapping[str, int]) -> jax.sharding.Mesh:
    try:
        return mesh.make(mesh.fill(axes, jax.device_count()))
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from None


def check_lengths(config: Config, arch: models.Architecture) -> None:
    """Raises ConfigError if prompt and response cannot fit the model."""
    prompt, response = config.data.max_prompt_length, config.rollout.max_response_length
    if prompt + response > arch.max_positions:
        raise ConfigError(
            f"data.max_prompt_length {prompt} + rollout.max_response_length {response} "
            f"is over the model's {arch.max_positions} positions"
        )


@contextmanager
def _asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM or Ctrl-C has come, so that the loop can end after its step.

    A second Ctrl-C interrupts at once. Outside the main thread (some notebooks) signals
    are left alone.
    """
    asked = threading.Event()

    def ask(number: int, _frame: Any) -> None:
        if asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()

    numbers = (signal.SIGTERM, signal.SIGINT)
    if threading.current_thread() is not threading.main_thread():
        numbers = ()
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def validate(job: Job, records: Records, step: int) -> evaluate.Validation | None:
    """Answers the held-out questions with the weights the engine holds, if it is time
    for it."""
    if not records.validation_due(step):
        return None
    with records.phase("testing"):
        return _answer_held_out(job, step)


def _answer_held_out(job: Job, step: int) -> evaluate.Validation:
    return evaluate.validate(
        job.engine,
        job.data.val,
        job.score,
        config=job.config.val,
        rollout=job.config.rollout,
        seed=seed(job.config, _VALIDATION, 0),
        step=step,
    )


@dataclass(frozen=True)
class Result:
    """A run directory, to look at in a notebook."""

    directory: Path

    @property
    def weights(self) -> Path:
        """The trained policy, as a Hugging Face directory."""
        return self.directory / "huggingface"

    @property
    def before(self) -> evaluate.Validation | None:
        """The first validation, if it was made before training."""
        return self._validation(0)

    @property
    def after(self) -> evaluate.Validation | None:
        """The newest validation since training began."""
        steps = [s for s, split, _ in metrics.rollout_files(self.directory)
                 if split == "val" and s > 0]  # fmt: skip
        return self._validation(max(steps)) if steps else None

    def table(self) -> Any:
        """Every metric by step, as a pandas DataFrame."""
        return metrics.to_pandas(self.directory)

    def plot(self) -> Any:
        """Reward, held-out accuracy and response length over the steps, as a matplotlib
        figure."""
        return report.figure(self.directory)

    def completions(self, step: int, split: str = "train") -> list[dict[str, Any]]:
        """The responses of one step with their rewards; split is train or val."""
        files = {s: p for s, of, p in metrics.rollout_files(self.directory)
                 if of == split}  # fmt: skip
        if step not in files:
            raise ValueError(f"no {split} completions of step {step}; of {list(files)}")
        path = files[step]
        return [json.loads(line) for line in path.read_text().splitlines()]

    def _validation(self, step: int) -> evaluate.Validation | None:
        lines = {line["step"]: line for line in metrics.read(self.directory)}
        found = {k: v for k, v in lines.get(step, {}).items() if k.startswith("val-")}
        if not found:
            return None
        return evaluate.Validation(metrics=found, records=self.completions(step, "val"))


def _shown(result: Result, config: Config) -> Result:
    """Prints what came of a run."""
    if result.after:
        before_after(
            result.before,
            result.after,
            result.directory,
            num_examples=config.trainer.num_examples,
        )
    else:
        whereabouts(result.directory)
    return result


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
        several.
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
        configs.put(values, key.split("."), value)
    return run(build(configs.parse(values, "train()"), functions))


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
    metrics.replace_text(path, text)
    return str(path)


def evaluate_only(job: Job) -> evaluate.Validation:
    """Answers the held-out questions with the model as it is, and prints how well."""
    if not job.data.val:
        raise ConfigError("data.val is needed: which questions to answer")
    job.engine.load(job.learner.read_weights("float32"), version=0)
    validation = _answer_held_out(job, 0)
    before_after(
        None,
        validation,
        job.config.output_dir,
        num_examples=job.config.trainer.num_examples,
    )
    return validation
