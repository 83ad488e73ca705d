"""Verbs of the Python API: `train`, `sft`, `reward_model`, `dpo`, `evaluate`,
`generate`."""

import functools
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxrl_llm import models
from jaxrl_llm.config import checks, parsing, plugins, schema_offline, schemas
from jaxrl_llm.config.names import ConfigError
from jaxrl_llm.config.schema import (
    Config,
    RolloutConfig,
    ValConfig,
)
from jaxrl_llm.config.section import Section
from jaxrl_llm.data import given as given_rows
from jaxrl_llm.data import prompts as questions
from jaxrl_llm.data.chat_template import Encoder
from jaxrl_llm.data.messages import content_of
from jaxrl_llm.data.sources import Source
from jaxrl_llm.data.types import Completion, Message
from jaxrl_llm.rewards import Isolation, RewardFunction, Term, resolve
from jaxrl_llm.rewards.builtin import BUILTIN, with_term
from jaxrl_llm.rollout import engine as engines
from jaxrl_llm.rollout.engine import Request, Sampling
from jaxrl_llm.rollout.native.engine import JaxEngine
from jaxrl_llm.sharding import hardware, mesh, out_of_memory
from jaxrl_llm.tracking import run_directory
from jaxrl_llm.tracking.result import Result
from jaxrl_llm.tracking.step_metrics import Validation
from jaxrl_llm.training import (
    fitting,
    memory,
    offline_build,
    offline_loop,
    offline_tasks,
)
from jaxrl_llm.training.build import Rewards, build
from jaxrl_llm.training.evaluate import validate
from jaxrl_llm.training.experience import score_together
from jaxrl_llm.training.loop import run
from jaxrl_llm.training.opening import held
from jaxrl_llm.training.settings import server_share
from jaxrl_llm.workers.sandbox.levels import Sandbox

Reward = str | Callable[..., Any]
Model = str | PathLike[str] | Result
"""A model's path as in a configuration file, a run's directory, or what `train`
returned."""
Environment = str | Callable[..., Any] | Mapping[str, str | Callable[..., Any]]
"""What `agent.environment` takes, or the class itself; or several by name."""
Prompts = str | PathLike[str] | Any
"""A data set's path as in a configuration file; rows with "prompt" and whatever the
reward needs ("answer", ...), as mappings, a pandas.DataFrame or a datasets.Dataset; or
texts."""


def train(
    model: str | PathLike[str],
    prompts: Prompts | int,
    reward: Reward | Sequence[Reward] = (),
    *,
    tools: Sequence[Callable[..., Any] | str] = (),
    environment: Environment | None = None,
    environment_factory: Environment | None = None,
    val_prompts: Prompts | int | None = None,
    steps: int | None = None,
    output_dir: str | PathLike[str] | None = None,
    loss: str | Callable[..., Any] | None = None,
    advantage: str | Callable[..., Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    **unknown: Any,
) -> Result:
    """GRPO in one call.

    Args:
      model: as `model.path` in a configuration file.
      prompts: rows with "prompt" and whatever the reward needs ("answer", ...), as
        mappings, a pandas.DataFrame or a datasets.Dataset; or texts; or a data set's
        path as in a configuration file; or how many different episodes there are, of
        an environment that asks its questions itself.
      reward: name of a built-in reward, or a function with TRL's signature
        f(prompts, completions, completion_ids, **columns) -> list of numbers, or
        with veRL's f(data_source, solution_str, ground_truth, extra_info) -> number;
        or several; or [], if the environment gives rewards, or `settings` give a
        reward.model, or a distillation that does without.
      tools: functions that the policy may call, over several turns, with types and a
        docstring in Google's style; or their names, module:function.
      environment: what every episode is played against: a class with `step`, which
        reads text, or with methods that are tools; or what `agent.environment` has a
        name for; or several by name, of which the column `environment` chooses.
      environment_factory: the same, by the name that TRL has for it.
      val_prompts: held-out questions, for the validation before and after.
      steps: of training; 20, unless `settings` say otherwise.
      output_dir: of the run; "runs/notebook", unless `settings` say otherwise.
      loss: as `actor.policy_loss.loss_mode`, or a function that takes by name what it
        needs of `config.algorithm.LOSS_ARRAYS` and returns the loss of each token.
      advantage: as `algorithm.adv_estimator`, or a function that takes by name what it
        needs of `config.algorithm.ESTIMATOR_ARRAYS` and returns advantages, [P, G] or
        [R, T].
      settings: anything else a configuration file can say, by dotted key:
        {"actor.optim.lr": 1e-5, "rollout.n": 16}; or in sections, as in the file:
        {"actor": {"optim": {"lr": 1e-5}}, "rollout": {"n": 16}}.

    The same call again goes on from the newest checkpoint in `output_dir`; if nothing
    was left to do, it says so and trains nothing. Ctrl-C or SIGTERM ends the run after
    the step under way, whose result is returned with `stopped` set; a second Ctrl-C
    ends it at once.

    Raises:
      ValueError: something is missing or does not fit, or is given twice and not the
        same; the message names it. So too if `output_dir` is in use, or holds a run
        with other settings, rows or functions.
      TypeError: an argument that is none of these; the message says which of `settings`
        it may be.
      jaxrl_llm.training.stopping.Stopped: the step under way was not over within
        `trainer.stop_grace_s` after SIGTERM; a SystemExit with status 75.
      KeyboardInterrupt: at a second Ctrl-C.
    """
    _refuse("train", unknown, Config)
    rewards = _listed(reward)
    given = [_function(one) for one in rewards if callable(one)]
    names = [one if isinstance(one, str) else _function(one).name for one in rewards]
    if environment is not None and environment_factory is not None:
        raise ConfigError(
            "train(): environment and environment_factory are two names of one "
            "argument; give one of them"
        )
    played = environment if environment_factory is None else environment_factory

    def described(path: Callable[[Any, str], str]) -> Config:
        values = _nested(settings)
        _complete(values, names)
        own = {
            "model": ("model.path", fspath(model)),
            "tools": ("agent.tools", [*map(_offered, tools)] or None),
            "environment": ("agent.environment", _offered_by_name(played)),
            **_counted("prompts", "data.train", prompts),
            **_counted("val_prompts", "data.val", val_prompts),
            "prompts": ("data.train.path", path(prompts, "train")),
            "val_prompts": (
                "data.val.path",
                None if val_prompts is None else path(val_prompts, "val"),
            ),
            "steps": ("trainer.total_training_steps", steps),
            "output_dir": ("output_dir", output_dir and fspath(output_dir)),
            "loss": ("actor.policy_loss.loss_mode", _offered(loss)),
            "advantage": ("algorithm.adv_estimator", _offered(advantage)),
        }
        _put("train", values, own)
        values.setdefault("output_dir", "runs/notebook")
        total = ("trainer", "total_training_steps")
        parsing.put(values, total, parsing.find(values, total, 20))
        return parsing.parse(values, "train()")

    # All that can be wrong without the rows is said before they are written down.
    checked = described(lambda rows, name: _path_of(rows) or f"{name}.jsonl")
    hardware.use_memory(server_share(checked))
    checks.check_functions(checked)
    functions = _with_terms(given, names, checked)
    directory, anew = checked.output_dir, checked.trainer.resume == "force"
    with held(Path(directory)):
        config = described(lambda rows, name: _stored(rows, directory, name, anew))
        return run(build(config, functions))


def sft(
    model: str | PathLike[str],
    rows: Prompts,
    *,
    val_rows: Prompts | None = None,
    val_prompts: Prompts | None = None,
    reward: Reward | Sequence[Reward] = (),
    epochs: float | int | None = None,
    steps: int | None = None,
    output_dir: str | PathLike[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    **unknown: Any,
) -> Result:
    """Supervised fine-tuning in one call.

    Args:
      model: as `model.path` in a configuration file.
      rows: TRL's formats, with "prompt" and "completion" (text or chat messages),
        "messages", or "text": as mappings, a pandas.DataFrame or a datasets.Dataset;
        or texts; or a data set's path as in a configuration file.
      val_rows: held-out rows, whose loss is measured before and after.
      val_prompts: held-out questions, rows with "prompt" and whatever the reward needs,
        which are answered before and after.
      reward: as `train` takes it: how good these answers are.
      epochs: passes over the rows; 1, unless `settings` say otherwise.
      steps: optimizer steps, in the place of epochs.
      output_dir: of the run; "runs/sft", unless `settings` say otherwise.
      settings: anything else that a configuration file of `jaxrl sft` can say, by
        dotted key or in sections: {"learner.optim.lr": 1e-5}.

    The same call again goes on from the newest checkpoint, and Ctrl-C and SIGTERM end
    the run, as of `train`.

    Raises:
      ValueError, TypeError, jaxrl_llm.training.stopping.Stopped, KeyboardInterrupt: as
        of `train`.
    """
    sets = {"train": rows, "val": val_rows, "val_prompts": val_prompts}
    own = _length_of(epochs, steps)
    return _learn("sft", model, sets, own, reward, output_dir, settings, unknown)


def reward_model(
    model: str | PathLike[str],
    rows: Prompts,
    *,
    val_rows: Prompts | None = None,
    epochs: float | int | None = None,
    steps: int | None = None,
    output_dir: str | PathLike[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    **unknown: Any,
) -> Result:
    """Trains a reward model on pairs of answers in one call; the result's `weights` is
    what `reward.model.path` takes.

    Args:
      model: a language model, as `model.path` in a configuration file.
      rows: TRL's preference format, with "chosen" and "rejected", and perhaps "prompt"
        and "margin" (text or chat messages): as mappings, a pandas.DataFrame or a
        datasets.Dataset; or a data set's path as in a configuration file.
      val_rows: held-out pairs, of which it is measured how many it tells right.
      epochs, steps: as of `sft`.
      output_dir: of the run; "runs/rm", unless `settings` say otherwise.
      settings: anything else that a configuration file of `jaxrl rm` can say, by dotted
        key or in sections: {"center_rewards_coefficient": 0.01}.

    Raises:
      ValueError, TypeError, jaxrl_llm.training.stopping.Stopped, KeyboardInterrupt: as
        of `train`.
    """
    sets = {"train": rows, "val": val_rows}
    own = _length_of(epochs, steps)
    return _learn("rm", model, sets, own, (), output_dir, settings, unknown)


def dpo(
    model: str | PathLike[str],
    rows: Prompts,
    *,
    val_rows: Prompts | None = None,
    val_prompts: Prompts | None = None,
    reward: Reward | Sequence[Reward] = (),
    beta: float | None = None,
    loss_type: str | Sequence[str] | None = None,
    epochs: float | int | None = None,
    steps: int | None = None,
    output_dir: str | PathLike[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    **unknown: Any,
) -> Result:
    """Direct preference optimization in one call.

    Args:
      model: to start from, and the reference; as `model.path` in a configuration file.
      rows, val_rows: pairs of answers, as of `reward_model`.
      val_prompts, reward: as of `sft`.
      beta: the larger, the less the policy moves away from the reference; 0.1, unless
        `settings` say otherwise.
      loss_type: one of sigmoid, hinge, ipo, robust and sft, or several that are added
        up; sigmoid, unless `settings` say otherwise.
      epochs, steps: as of `sft`.
      output_dir: of the run; "runs/dpo", unless `settings` say otherwise.
      settings: anything else that a configuration file of `jaxrl dpo` can say, by
        dotted key or in sections.

    Raises:
      ValueError, TypeError, jaxrl_llm.training.stopping.Stopped, KeyboardInterrupt: as
        of `train`.
    """
    sets = {"train": rows, "val": val_rows, "val_prompts": val_prompts}
    own = _length_of(epochs, steps) | {
        "beta": ("beta", beta),
        "loss_type": ("loss_type", loss_type),
    }
    return _learn("dpo", model, sets, own, reward, output_dir, settings, unknown)


def _length_of(
    epochs: float | int | None, steps: int | None
) -> dict[str, tuple[str, Any]]:
    return {
        "epochs": ("trainer.total_epochs", epochs),
        "steps": ("trainer.total_training_steps", steps),
    }


def _learn(
    task: str,
    model: str | PathLike[str],
    sets: Mapping[str, Prompts | None],
    own: Mapping[str, tuple[str, Any]],
    reward: Reward | Sequence[Reward],
    output_dir: str | PathLike[str] | None,
    settings: Mapping[str, Any] | None,
    unknown: Mapping[str, Any],
) -> Result:
    """A run that learns from rows that are there.

    Args:
      task: the verb of the command line.
      sets: rows by their key in `data`.
      own: other arguments of the verb: the key of each, and its value.
    """
    schema = schemas.of(task)
    verb = {"rm": "reward_model"}.get(task, task)
    arguments = {"train": "rows", "val": "val_rows"}
    _refuse(verb, unknown, schema)
    rewards = _listed(reward)
    given = [_function(one) for one in rewards if callable(one)]
    names = [one if isinstance(one, str) else _function(one).name for one in rewards]

    def described(path: Callable[[Any, str], str | None]) -> Any:
        values = _nested(settings)
        if names:
            _complete(values, names)
        said = {
            "model": ("model.path", fspath(model)),
            "output_dir": ("output_dir", output_dir and fspath(output_dir)),
            **own,
        }
        for key, rows in sets.items():
            said[arguments.get(key, key)] = f"data.{key}.path", path(rows, key)
        _put(verb, values, said)
        values.setdefault("output_dir", f"runs/{task}")
        return parsing.parse(values, f"{verb}()", schema=schema)

    def named(rows: Any, name: str) -> str | None:
        return None if rows is None else given_rows.path_of(rows) or f"{name}.jsonl"

    checked = described(named)
    hardware.use_memory()
    schema_offline.check_functions(checked)
    functions = _with_terms(given, names, checked)
    directory, anew = checked.output_dir, checked.trainer.resume == "force"
    of_text = "text" if task == "sft" else "chosen"

    def stored(rows: Any, name: str) -> str | None:
        if rows is None:
            return None
        kind = None if name == "val_prompts" else of_text
        return _stored(rows, directory, name, anew, text_key=kind)

    with held(Path(directory)):
        job = offline_build.build(described(stored), offline_tasks.of(task), functions)
        return offline_loop.run(job)


def evaluate(
    model: Model,
    prompts: Source | Prompts,
    reward: Reward | Sequence[Reward],
    *,
    n: int = 1,
    greedy: bool = True,
    threshold: float = 1.0,
    max_tokens: int = 512,
    temperature: float = 1.0,
    top_k: int = -1,
    top_p: float = 1.0,
    min_p: float = 0.0,
    stop: Sequence[str] = (),
    chat: bool = True,
    seed: int = 0,
    dtype: Literal["float32", "bfloat16"] | None = None,
    timeout_s: float = 60.0,
) -> Validation:
    """Answers questions and says how good the answers are. Nothing is written.

    Args:
      model: a model's path as in a configuration file, a run's directory, or what
        `train` returned.
      prompts: as `train` takes them, or a `Source`.
      reward: as `train` takes it.
      n: sampled answers per question.
      greedy: also answer once with the most likely tokens.
      threshold: a reward of at least this counts as correct.
      max_tokens: longest answer.
      temperature, top_k, top_p, min_p: how the sampled answers are drawn; see
        `rollout.engine.Sampling`.
      stop: strings that end an answer.
      chat: put each question into the model's chat template.
      seed: the same seed gives the same answers.
      dtype: float32 on a CPU and bfloat16 elsewhere if None.
      timeout_s: seconds that the rewards have.

    Returns:
      Metrics by the names that a run's validations have, such as
      "val-core/all/acc/mean@1", and one record per answer.

    Raises:
      ValueError: something is missing or does not fit; the message names it.
      RewardError: a reward function failed.
    """
    functions = [_function(one) for one in _listed(reward)]
    drawn = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p
    }  # fmt: skip
    config = ValConfig(n=n, greedy=greedy, threshold=threshold, **drawn)
    rollout = RolloutConfig(max_response_length=max_tokens, stop=tuple(stop))
    loaded = _load(model)
    with tempfile.TemporaryDirectory() as directory:
        source = prompts
        if not isinstance(prompts, Source):
            source = Source(path=_stored(prompts, directory, "prompts"))
        asked = questions.read(source, _encoder(loaded), chat_template=chat)
    _check_ends(loaded, stop, max_tokens)
    lengths = [len(prompt.tokens) for prompt in asked]
    longest = max(lengths) + max_tokens
    rewards = Rewards(functions=tuple(functions), isolation=Isolation())
    with (
        closing(rewards),
        _engine(loaded, longest, n * len(asked), dtype, max_tokens) as engine,
    ):
        rewards.ready()
        for note in rewards.notes():
            print(note)
        return validate(
            engine,
            asked,
            functools.partial(
                score_together, functions, None, timeout_s=timeout_s, on_error="raise"
            ),
            config=config,
            rollout=rollout,
            seed=seed,
            step=0,
        )


def generate(
    model: Model,
    prompts: Sequence[str | list[Message]],
    *,
    n: int = 1,
    max_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int = -1,
    top_p: float = 1.0,
    min_p: float = 0.0,
    stop: Sequence[str] = (),
    chat: bool = True,
    system: str | None = None,
    seed: int = 0,
    dtype: Literal["float32", "bfloat16"] | None = None,
) -> list[list[Completion]]:
    """Continues or answers prompts: for each of them, its n completions.

    Args:
      model: a model's path as in a configuration file, a run's directory, or what
        `train` returned.
      prompts: each is text, or a list of chat messages.
      n: completions per prompt.
      max_tokens: longest completion.
      temperature: logits are divided by it; 0 takes the most likely token.
      top_k: only the k most likely tokens; -1 for all.
      top_p: only the smallest set of tokens whose probability reaches p.
      min_p: only tokens at least min_p times as likely as the most likely one.
      stop: strings that end a completion.
      chat: put prompts that are text into the model's chat template.
      system: a system message before each prompt that is text.
      seed: the same seed gives the same completions.
      dtype: float32 on a CPU and bfloat16 elsewhere if None.

    Raises:
      ValueError: no prompts, or something that does not fit; the message names it.
    """
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts must be a list of at least one, got {prompts!r}")
    if system is not None and not chat:
        raise ValueError("system is a chat message, but chat is False")
    sampling = Sampling(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        stop=tuple(stop),
    )
    loaded = _load(model)
    before = [] if system is None else [{"role": "system", "content": system}]
    encoder, tokens = _encoder(loaded), []
    for i, prompt in enumerate(prompts):
        if chat and isinstance(prompt, str):
            prompt = [*before, {"role": "user", "content": prompt}]
        elif not isinstance(prompt, str):
            prompt = content_of(prompt, "prompts")
        try:
            tokens.append(encoder.encode(prompt))
        except ValueError as error:
            raise ValueError(f"prompt {i} (from 0): {error}") from None
    requests = [
        Request(prompt_id=i, tokens=asked, num_samples=n, seed=seed, sampling=sampling)
        for i, asked in enumerate(tokens)
    ]
    _check_ends(loaded, stop, max_tokens)
    longest = max(map(len, tokens)) + max_tokens
    with _engine(loaded, longest, n * len(prompts), dtype, max_tokens) as engine:
        return engines.generate(engine, requests)


def _check_ends(loaded: models.Model, stop: Sequence[str], max_tokens: int) -> None:
    """Warns if nothing but its length ends a completion."""
    if not stop and not loaded.arch.eos_token_ids:
        warnings.warn(
            f"nothing ends a completion before its {max_tokens} tokens: neither the "
            "model nor its tokenizer names an end of sequences; give stop",
            stacklevel=3,
        )


def _encoder(loaded: models.Model) -> Encoder:
    """How questions become tokens of a model."""
    return Encoder(tokenizer=loaded.tokenizer, vocab_size=loaded.arch.vocab_size)


def _load(model: Model) -> models.Model:
    """A model that answers text, which without a tokenizer is not even read."""
    hardware.use_memory()
    found = models.open(path := _weights(model))
    models.need_tokenizer(found.tokenizer, path, "copy the files of one into it")
    return models.Model(found.arch, found.load(), found.tokenizer)


@contextmanager
def _engine(
    loaded: models.Model, longest: int, count: int, dtype: str | None, max_tokens: int
) -> Iterator[JaxEngine]:
    """An engine on all devices with the weights of `loaded`, for `count` sequences of
    at most `longest` tokens.

    Raises:
      OutOfMemory: in the block, a device's memory does not suffice.
    """
    on_cpu = jax.default_backend() == "cpu"
    kept = jnp.dtype(dtype or ("float32" if on_cpu else "bfloat16"))
    engine = JaxEngine(
        loaded.arch,
        loaded.tokenizer,
        mesh=mesh.make({"data": jax.device_count(), "tensor": 1}),
        dtype=kept,
        max_model_len=longest,
        max_num_seqs=min(256, count),
        decode_chunk=64,
    )

    def remedies(_: out_of_memory.Shortage) -> list[str]:
        narrow = ["dtype bfloat16"] * (kept.itemsize > 2)
        return [*narrow, f"max_tokens {max_tokens // 2} (now {max_tokens})"]

    with (
        closing(engine),
        out_of_memory.explained(
            lambda found: memory.PROGRAMS.get(found.program, "loading the weights"),
            lambda _: engine.memory(1, longest) | {fitting.CACHE: engine.cache_bytes},
            remedies,
        ),
    ):
        engine.load(loaded.params, version=0)
        yield engine


def _weights(model: Model) -> str:
    """Where a model's weights are; those of a run lie in its folder `huggingface`."""
    if isinstance(model, Result):
        return str(model.weights)
    trained = Path(model, "huggingface").expanduser()
    return str(trained) if trained.is_dir() else fspath(model)


def _refuse(verb: str, unknown: Mapping[str, Any], schema: type[Section]) -> None:
    """Raises TypeError for an argument that a verb does not have; the message says
    which of its settings it may be."""
    for name, value in unknown.items():
        from jaxrl_llm.config.peers import lookup

        known, peers = parsing.keys(schema), lookup.PEERS
        if schema is not Config:
            peers = lookup.of_offline(known)
        advice = lookup.setting(name, value, known, peers)
        raise TypeError(f"{verb}() has no argument {name!r}; {advice}")


def _nested(settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """Settings by dotted keys, or in sections, as a file has them."""
    values: dict[str, Any] = {}
    for key, value in (settings or {}).items():
        parsing.merge(values, key.split("."), value)
    return values


def _put(verb: str, values: dict[str, Any], own: Mapping[str, tuple[str, Any]]) -> None:
    """Puts what a verb's arguments say among its settings; None says nothing.

    Args:
      own: by the argument, the dotted key and the value.

    Raises:
      ConfigError: settings say another value.
    """
    for argument, (key, value) in own.items():
        if value is None:
            continue
        there = parsing.find(values, key.split("."), value)
        if there != value:
            raise ConfigError(
                f"{verb}(): {key} is {there!r} in settings, but {argument} makes it "
                f"{value!r}; leave one of them out"
            )
        parsing.put(values, key.split("."), value)


def _listed(reward: Reward | Sequence[Reward]) -> list[Reward]:
    return [reward] if isinstance(reward, str) or callable(reward) else list(reward)


def _function(reward: Reward) -> RewardFunction:
    if callable(reward):
        name = getattr(reward, "__name__", type(reward).__name__)
        trusted = reward in BUILTIN.values()
        return RewardFunction(name=name, function=reward, trusted=trusted)
    return resolve([Term(name=reward)])[0]


def _offered(function: str | Callable[..., Any] | None) -> str | None:
    """What a configuration calls a loss or an estimator."""
    return plugins.offer(function) if callable(function) else function


def _offered_by_name(environment: Environment | None) -> Any:
    """What a configuration calls an environment, or several."""
    if isinstance(environment, Mapping):
        return {name: _offered(one) for name, one in environment.items()}
    return _offered(environment)


def _counted(argument: str, key: str, rows: Any) -> dict[str, tuple[str, Any]]:
    """What says how many episodes a data set has, where `rows` is their number. Those
    that are held out begin from other seeds."""
    if _path_of(rows) != _EPISODES:
        return {}
    seed = int(argument == "val_prompts")
    return {
        f"{argument} (a number)": (f"{key}.size", rows),
        f"{argument} (its seed)": (f"{key}.seed", seed or None),
    }


def _path_of(rows: Any) -> str | None:
    """The path of a data set that need not be written down."""
    counted = isinstance(rows, int) and not isinstance(rows, bool)
    return _EPISODES if counted else given_rows.path_of(rows)


_EPISODES = "episodes:"


def _complete(values: dict[str, Any], names: Sequence[str]) -> None:
    """Adds those of `names` that `reward.functions` does not list. Settings of entries
    by their number, such as {"0": {"weight": 2}}, are of the functions passed."""
    section, terms = values.setdefault("reward", {}), [{"name": n} for n in names]
    listed = section.get("functions", {}) if isinstance(section, dict) else None
    if isinstance(listed, Mapping):
        section["functions"] = terms
        parsing.merge(values, ("reward", "functions"), listed)
    elif isinstance(listed, Sequence) and not isinstance(listed, str):
        known = [term.get("name") for term in listed if isinstance(term, Mapping)]
        missing = [term for term in terms if term["name"] not in known]
        section["functions"] = [*listed, *missing]


def _with_terms(
    given: Sequence[RewardFunction],
    passed: Sequence[str],
    config: Any,
) -> list[RewardFunction]:
    """A function for each entry of `reward.functions`: of those given, the one of its
    name, with the entry's weight and params; else the one that the name stands for.

    Raises:
      ConfigError: something passed has the name of something else.
    """
    terms = config.reward.functions
    for names in (passed, [term.name for term in terms]):
        for name in passed:
            if names.count(name) > 1:
                raise ConfigError(
                    f"reward functions need different names, got {name!r} "
                    f"{names.count(name)} times in {names}"
                )
    known = {function.name: function for function in given}
    found = [Term(**term.model_dump()) for term in terms]
    sandbox = Sandbox(**config.sandbox.model_dump())
    others = iter(resolve([one for one in found if one.name not in known], sandbox))
    return [
        with_term(known[term.name], term) if term.name in known else next(others)
        for term in found
    ]


def _stored(
    rows: Any,
    directory: str,
    name: str,
    anew: bool = False,
    text_key: str | None = None,
) -> str:
    """The path of a data set; rows are written down first, so that the run's
    configuration says where its data is.

    Args:
      anew: in place of other rows, if a run of this directory had such.
      text_key: the column that a text is, of rows that are no questions.
    """
    if (path := _path_of(rows)) is not None:
        return path
    text = "".join(given_rows.json_lines(rows, name, text_key))
    path = Path(directory) / f"{name}.jsonl"
    if path.exists() and path.read_text() == text:
        return str(path)
    if path.exists() and (path.parent / "config.yaml").exists() and not anew:
        raise ValueError(
            f"output_dir {directory} holds a run on other {name} rows; choose another "
            "output_dir"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    run_directory.replace_text(path, text)
    return str(path)
