"""The command line.

    jaxrl train CONFIG.yaml [--dry-run] [--resume auto|never|force]
                            [--profile FIRST:LAST] [--section.key VALUE ...]
    jaxrl sft CONFIG.yaml   with the options of train, as also
    jaxrl rm CONFIG.yaml    a reward model, and
    jaxrl dpo CONFIG.yaml
    jaxrl evaluate CONFIG.yaml [--models MODEL ...] [--section.key VALUE ...]
        these also with [--coordinator HOST:PORT --num-processes N --process-id I]
                       [--lost-after SECONDS]
    jaxrl init NAME [DIRECTORY]
    jaxrl generate --model PATH [--prompts TEXT ...] [--file FILE] [--out FILE.jsonl]
    jaxrl serve --model PATH [--host HOST] [--port PORT] [--api-key KEY] ...
    jaxrl convert [--merge] SOURCE DIRECTORY
    jaxrl convert-config VERL.yaml|TRL.yaml|RUN.sh [CONFIG.yaml]
    jaxrl report RUN_DIR [RUN_DIR ...] [--out FILE.html] [--completions N]
    jaxrl plan CONFIG.yaml (--topology v5p:4x4x4 | --topology h100:2x8
                           | --devices 8 [--measure STEPS])
                           [--memory 141GB] [--section.key VALUE ...]
    jaxrl bench NAME ...
    jaxrl completion bash|zsh|fish
    jaxrl --version

CONFIG.yaml is a file, or a bundled name: `jaxrl train quickstart`; `jaxrl init NAME`
writes such a file with what each key means. `jaxrl VERB --help` lists what a verb
takes. Exit status: 0 done, 2 input that cannot work or that the memory does not
suffice for, 75 stopped by SIGTERM or the first Ctrl-C (the same command goes on), 130
stopped by the second Ctrl-C, 141 nobody reads on, 1 a bug.
"""

import dataclasses
import functools
import importlib.util
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console

from jaxrl_llm.config import bundled, flags, parsing, reader, schemas
from jaxrl_llm.config.names import ConfigError
from jaxrl_llm.config.schema import Config


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb. Returns the exit status.

    0: done. 75: `train` was stopped by SIGTERM or Ctrl-C, and the same command goes on.
    130: interrupted at once, while training by the second Ctrl-C. 2: input that cannot
    work. 141: nobody reads what is printed any more. A bug raises, which is status 1
    and a traceback.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        try:
            return _run(given)
        finally:
            sys.stdout.flush()  # also what --help prints before it exits
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        # Python flushes once more at its end, and would say so.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _nobody_reads() -> bool:
    """Whether standard output is a pipe whose other end is closed, as head does."""
    try:
        watch = select.poll()
        watch.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in watch.poll(0))
    except (OSError, ValueError):  # it is no file
        return False


def _run(given: list[str]) -> int:
    verbs = {
        "train": _train,
        **{verb: functools.partial(_offline, verb) for verb in OFFLINE},
        "evaluate": _evaluate,
        **{name: functools.partial(_call, name) for name in _functions()},
        "plan": _plan,
        "bench": _bench,
    }
    if not given or given[0] in ("-h", "--help", "help"):
        print(__doc__)
        return 0
    if given[0] in ("--version", "-V", "version"):
        print("jaxrl", sys.modules["jaxrl_llm"].__version__)
        return 0
    if given[0] not in verbs:
        return _fail(f"unknown verb {given[0]!r}; one of {', '.join(verbs)}")
    # Only its tokenizers are used: that PyTorch is missing is no news.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    _start_no_absent_tpu()
    try:
        return verbs[given[0]](given[1:]) or 0
    except KeyboardInterrupt as error:
        return _fail(str(error) or "interrupted by Ctrl-C", status=130)
    except (ValueError, ImportError, OSError) as error:
        gone = isinstance(error, BrokenPipeError) and _nobody_reads()
        if gone or "JAXRL_TRACEBACK" in os.environ:
            raise
        return _fail(f"{error}\n(JAXRL_TRACEBACK=1 shows where)")
    except (RuntimeError, AssertionError) as error:
        if "JAXRL_TRACEBACK" in os.environ or _backend_starts():
            raise
        # JAX asserts that there is some platform of those asked for.
        said = " ".join(str(error).split()) or "no such platform is installed"
        return _fail(
            f"JAX does not start: {said} (JAX_PLATFORMS is "
            f"{os.environ.get('JAX_PLATFORMS') or 'not set'}; jaxrl-llm[cuda] and "
            "jaxrl-llm[tpu] install others than cpu)"
        )


def _call(name: str, rest: list[str]) -> None:
    tyro.cli(_functions()[name], prog=f"jaxrl {name}", args=rest)


def _functions() -> dict[str, Callable[..., None]]:
    """The verbs whose options are a function's arguments."""
    return {
        "init": init,
        "generate": generate,
        "serve": serve,
        "convert": convert,
        "convert-config": convert_config,
        "report": report,
        "completion": completion,
    }


def _backend_starts() -> bool:
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError):
        return False
    return True


def _start_no_absent_tpu() -> None:
    """JAX tries to start a TPU wherever libtpu is installed, which `plan` only compiles
    with: half a second and a page of warnings where there is none."""
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    if any(path.read_text().strip() == _GOOGLE for path in vendors):
        return
    # What libtpu would otherwise ask a machine of Google's for.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    if importlib.util.find_spec("jax_plugins") is None:  # nor anything else
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def _prepare(server: float | None = 0.0) -> None:
    """Starts JAX with the GPU's memory, but for the share that a server takes.

    Programs of GPUs and TPUs stay in the user's cache: the next start of a run does
    not compile again. Also those that are quickly made: compiled again, one may get
    other kernels, which compute other last bits. A CPU's are quickly made, and hold
    for that model of CPU only. JAX_COMPILATION_CACHE_DIR names another folder; empty,
    it keeps none.
    """
    import jax

    from jaxrl_llm.sharding import hardware

    hardware.use_memory(server)
    if jax.default_backend() == "cpu":
        return
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    for name, value in {
        "jax_compilation_cache_dir": str(Path(home) / "jaxrl_llm"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }.items():
        if name.upper() not in os.environ:  # which JAX has read
            jax.config.update(name, value)


OFFLINE = {"sft": flags.Sft, "rm": flags.Rm, "dpo": flags.Dpo}
"""Verbs that learn from rows that are there, and their options."""

_GOOGLE = "0x1ae0"
"""On the PCI bus, as in `jax._src.hardware_utils`."""


def _fail(message: str, status: int = 2) -> int:
    console = Console(stderr=True, soft_wrap=True)
    if status == 2:
        console.print("[bold red]error[/]")
    console.print(message, markup=False, highlight=False)
    return status


def _train(rest: list[str]) -> int:
    own, config, places = _config("train", flags.Train, rest)

    from jaxrl_llm.planning import dry_run
    from jaxrl_llm.training import loop
    from jaxrl_llm.training.build import build
    from jaxrl_llm.training.settings import server_share

    def rehearsed() -> bool:
        dry_run.check_devices(config, rest[0])
        return dry_run.show(build(config))

    return _trained(
        own,
        config,
        places,
        lambda: loop.run(build(config)),
        rehearsed,
        server_share(config),
    )


def _offline(verb: str, rest: list[str]) -> int:
    """Verbs that learn from rows that are there."""
    own, config, places = _config(verb, OFFLINE[verb], rest, schema=schemas.of(verb))

    from jaxrl_llm.planning import offline_dry_run
    from jaxrl_llm.training import offline_loop, offline_tasks
    from jaxrl_llm.training.offline_build import build

    task = offline_tasks.of(verb)
    return _trained(
        own,
        config,
        places,
        lambda: offline_loop.run(build(config, task)),
        lambda: offline_dry_run.show(build(config, task)),
    )


def _trained(
    own: flags.Train,
    config: Any,
    places: parsing.Places,
    run: Callable[[], Any],
    rehearsed: Callable[[], bool],
    server: float | None = 0.0,
) -> int:
    """Runs, or rehearses, and returns the exit status.

    Args:
      run: gives a `Result`.
      rehearsed: shows what the run would be, and says whether it fits.
      server: the share of a GPU's memory that servers take.
    """
    from jaxrl_llm.sharding.ahead import leave_if_compiling
    from jaxrl_llm.training.opening import held
    from jaxrl_llm.training.stopping import STOPPED, Stopped, asked_to_stop

    if own.dry_run:
        with _joined(own, places):
            _prepare(server)
            return 0 if rehearsed() else 2
    try:
        with asked_to_stop(), _joined(own, places):
            _prepare(server)
            with held(Path(config.output_dir)):
                return STOPPED if run().stopped else 0
    except Stopped as stopped:
        _fail(str(stopped), status=STOPPED)
        leave_if_compiling(STOPPED)
        return STOPPED
    except KeyboardInterrupt as error:
        status = _fail(str(error) or "interrupted by Ctrl-C", status=130)
        leave_if_compiling(status)
        return status


def _evaluate(rest: list[str]) -> None:
    own, config, places = _config("evaluate", flags.Evaluate, rest, trains=False)

    from jaxrl_llm.sharding import processes
    from jaxrl_llm.tracking import comparison, console
    from jaxrl_llm.training.evaluation import evaluate_all
    from jaxrl_llm.training.settings import server_share

    with _joined(own, places):
        _prepare(server_share(config))
        results, differences = evaluate_all(config, list(own.models))
        if not processes.leads():
            return
        if differences:
            comparison.show(results, differences)
            console.whereabouts(config.output_dir)
        else:
            (found,) = results.values()
            examples = config.trainer.num_examples
            console.before_after(None, found, config.output_dir, num_examples=examples)


@contextmanager
def _joined(own: flags.Processes, places: parsing.Places) -> Iterator[None]:
    from jaxrl_llm.sharding import processes

    with (
        parsing.placed(places),
        processes.joined(
            own.coordinator,
            own.num_processes,
            own.process_id,
            lost_after_s=own.lost_after,
        ),
    ):
        yield


def _plan(rest: list[str]) -> None:
    task = _task_of(rest)
    own, config, places = _config("plan", flags.Plan, rest, schema=schemas.of(task))
    with parsing.placed(places):
        _show_plan(own, config, task)


def _task_of(rest: Sequence[str]) -> str | None:
    """The verb that a configuration is for; None for `jaxrl train`."""
    if not rest or rest[0].startswith("-"):
        return None
    task = reader.read(bundled.find(rest[0])).values.get("task")
    return task if task is None else str(task)


def _show_plan(own: flags.Plan, config: Any, task: str | None) -> None:
    import jax

    from jaxrl_llm.bench import step
    from jaxrl_llm.planning import dry_run, offline_plan, planner, workload
    from jaxrl_llm.sharding import hardware
    from jaxrl_llm.tracking import console

    hardware.use_memory()

    if own.measure is not None and own.measure < 1:
        raise ConfigError(f"--measure is a number of steps, got {own.measure}")
    memory = _bytes(own.memory) if own.memory is not None else None
    if own.topology is not None:
        jax.config.update("jax_platforms", "cpu")  # nothing here is needed
        devices, usable = planner.elsewhere(own.topology)
        host = planner.host_of(own.topology)
    else:
        if own.devices is None or own.devices < 1:
            raise ConfigError(
                "jaxrl plan needs --topology, such as v5p:4x4x4 or h100:8, or a number "
                f"of --devices; got {own.devices or 'neither'}"
            )
        host, (devices, usable) = None, planner.here(own.devices)
    memory = memory or usable
    if own.measure and list(devices) != jax.devices():
        raise ConfigError(
            f"--measure runs steps on the {jax.device_count()} devices that are here; "
            "the plan is for others"
        )
    if task is not None:
        if own.measure:
            raise ConfigError(f"--measure runs steps of `jaxrl train`, not of {task}")
        from jaxrl_llm.training import offline_tasks

        config, chosen, one = offline_plan.estimate(
            config, devices, memory, offline_tasks.of(task), console.progress
        )
        for line in chosen:
            print(line)
        dry_run.show_plan([one], functools.partial(offline_plan.advice, config))
        return
    config, chosen = planner.completed(config, devices, memory, console.progress)
    for line in chosen:
        print(line)
    found = planner.estimate(config, devices, memory, console.progress, host)
    dry_run.show_plan(found, functools.partial(dry_run.advice, config))
    if own.measure:
        with console.progress(f"running {own.measure} steps"):
            arch = workload.architecture(config.model.path, config.model.revision)
            held, peak = step.measure(config, arch, own.measure)
        dry_run.show_measured(found, held, peak)


def _bytes(text: str) -> float:
    """Bytes of 141GB or 131GiB."""
    match = re.fullmatch(r"([\d.]+) ?(GB|GiB)", text)
    if not match:
        raise ConfigError(f"--memory is a size such as 141GB or 80GiB, got {text!r}")
    return float(match[1]) * (1e9 if match[2] == "GB" else 2**30)


def _bench(rest: list[str]) -> None:
    from jaxrl_llm import bench

    bench.main(rest)


def _config(
    verb: str,
    kind: type[flags.Options],
    rest: list[str],
    *,
    trains: bool = True,
    schema: type[parsing.Run] = Config,
) -> tuple[flags.Options, parsing.Run, parsing.Places]:
    """The verb's own options, what a file and overrides describe, and where each value
    of that comes from."""
    paths = [argument for argument in rest[:1] if not argument.startswith("-")]
    if "--help" in rest or "-h" in rest:
        values = None
        if paths:
            values = parsing.load(paths[0], trains=trains, schema=schema)
        shown = flags.command(kind, values, schema)
        tyro.cli(shown, prog=f"jaxrl {verb}", args=["--help"])
    own, rest = flags.given(kind, rest)
    if not paths:
        raise ConfigError(f"jaxrl {verb} needs a configuration file, such as configs/*")
    trained = issubclass(kind, flags.Train)
    overrides = flags.long(rest[1:]) if trained else rest[1:]
    return own, *parsing.located(paths[0], overrides, trains=trains, schema=schema)


def init(
    name: tyro.conf.Positional[str], directory: tyro.conf.Positional[Path] = Path()
) -> None:
    """Writes DIRECTORY/NAME.yaml: a configuration to start from, its keys explained.

    Args:
      name: a bundled configuration, such as quickstart or gsm8k.
      directory: where to write it; a file that is there is not overwritten.
    """
    path = bundled.write(name, directory.expanduser(), Config)
    print(f"{path}\nnext: jaxrl train {path} --dry-run")


def serve(
    model: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    served_model_name: str | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    max_model_len: int | None = None,
    max_num_seqs: int = 64,
    max_queued: int = 1024,
    decode_chunk: int = 16,
    cache_gib: float | None = None,
    quantization: Literal["int8", "fp8"] | None = None,
    tensor: int = 1,
    skip_special_tokens: bool = True,
) -> None:
    """Answers over HTTP: OpenAI's /v1/completions and /v1/chat/completions, vLLM's
    /inference/v1/generate, and the routes by which a trainer gives new weights.

    Args:
      model: a directory, also of PEFT, a hub id, a .gguf file or
        package:NAME/FILE.gguf.
      host: the address to listen on; others than 127.0.0.1 are seen by other hosts.
      port: 0 takes a free one.
      api_key: who asks must send it as "Authorization: Bearer KEY"; the variable
        JAXRL_API_KEY of the environment if not given, and nobody needs one if that is
        not set.
      served_model_name: what clients call the model; PATH if not given.
      dtype: float32 on a CPU and bfloat16 elsewhere if not given.
      max_model_len: tokens of the longest prompt with its response; what the model has
        positions for, but at most 8192, if not given.
      max_num_seqs: sequences decoded together; more wait.
      max_queued: responses that wait or are being generated, at most; more are refused
        (status 429).
      decode_chunk: tokens between two looks at what came and went; streams get so many
        at once.
      cache_gib: memory for keys and values on each device; what the longest sequences
        need, or what is free if that is less, if not given.
      quantization: dtype of the matrices in the layers.
      tensor: devices that one copy of the weights is split over.
      skip_special_tokens: leave special tokens out of texts, and of where stop strings
        are looked for.
    """
    given = {name: value for name, value in locals().items() if name != "model"}
    given["api_key"] = api_key or os.environ.get("JAXRL_API_KEY") or None
    _prepare()
    from jaxrl_llm.serving.server import Server, Settings

    version = sys.modules["jaxrl_llm"].__version__
    Server(model, Settings(**given), version).run()


def generate(
    model: str,
    prompts: tuple[str, ...] = (),
    file: Path | None = None,
    out: Path | None = None,
    chat: bool = True,
    system: str | None = None,
    n: int = 1,
    max_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int = -1,
    top_p: float = 1.0,
    min_p: float = 0.0,
    stop: tuple[str, ...] = (),
    seed: int = 0,
    dtype: Literal["float32", "bfloat16"] | None = None,
) -> None:
    """Prints completions, or writes them to a file.

    Args:
      model: a directory, also of PEFT, a hub id, a .gguf file or
        package:NAME/FILE.gguf.
      prompts: the prompts themselves.
      file: a file with one prompt per line; in a FILE.jsonl each is the key "prompt" of
        an object, text or a list of chat messages.
      out: a FILE.jsonl to write instead of printing: one object per completion, with
        the prompt's object, sample, completion, finish_reason and num_tokens.
      chat: put each prompt into the model's chat template.
      system: a system message before each prompt.
      n: completions per prompt.
      max_tokens: longest completion.
      temperature: 0 takes the most likely token.
      top_k: only the k most likely tokens; -1 for all.
      top_p: only the smallest set of tokens whose probability reaches p.
      min_p: only tokens at least min_p times as likely as the most likely one.
      stop: strings that end a completion.
      seed: the same seed gives the same completions.
      dtype: float32 on a CPU and bfloat16 elsewhere if not given.
    """
    from jaxrl_llm.data import prompt_file

    rows = [{"prompt": text} for text in prompts]
    rows += prompt_file.read(file) if file else []
    if not rows:
        raise ConfigError("nothing to answer: give --prompts TEXT or --file FILE")
    if system is not None and not chat:
        raise ConfigError("--system is a chat message, but --no-chat asks for none")
    if out is not None:
        prompt_file.check_writable(out := out.expanduser())

    from jaxrl_llm import api
    from jaxrl_llm.tracking.run_directory import replace_text

    _prepare()
    groups = api.generate(
        model,
        [row["prompt"] for row in rows],
        n=n,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        stop=stop,
        chat=chat,
        system=system,
        seed=seed,
        dtype=dtype,
    )
    if out is not None:
        replace_text(out, prompt_file.lines(rows, groups))
        print(f"{n} completions of each of {len(rows)} prompts: {out}")
        return
    console = Console()
    for row, group in zip(rows, groups, strict=True):
        text = row["prompt"]
        text = text if isinstance(text, str) else text[-1]["content"]
        for completion in group:
            console.rule(
                f"{completion.prompt_id + 1}.{completion.sample + 1}  "
                f"{len(completion.tokens)} tokens, {completion.finish_reason}",
                align="left",
            )
            console.print(text, style="dim", markup=False, highlight=False)
            console.print(completion.text, markup=False, highlight=False)


def convert(
    source: tyro.conf.Positional[str],
    directory: tyro.conf.Positional[str],
    dtype: Literal["bfloat16", "float16", "float32"] | None = None,
    merge: bool = False,
) -> None:
    """Writes a model as a Hugging Face directory, or adapters as one of PEFT.

    Args:
      source: a directory, a hub id, a .gguf file, package:NAME/FILE.gguf, or a
        checkpoint of a run, RUN/checkpoints/STEP, whose adapters are written if it
        trains some; with --merge a directory or hub id of PEFT, a run that trained
        adapters, or one of its checkpoints.
      directory: must not exist, or be empty.
      dtype: of what is written; bfloat16 if not given, and float32 for adapters.
      merge: add the adapters of the source to their model, and write the sum.
    """
    from jaxrl_llm import models
    from jaxrl_llm.training import checkpoint, learned

    path = Path(source).expanduser()
    if learned.is_checkpoint(path):
        what = learned.write(path, Path(directory), dtype=dtype, merge=merge)
        print(f"{source} -> {directory}, {what}")
        return
    if merge and (path / checkpoint.ADAPTER).is_dir():
        source = str(path / checkpoint.ADAPTER)
    found = models.open(source)
    if merge != (found.adapter is not None):
        raise ConfigError(
            f"{source} has no adapter that could be merged; leave out --merge"
            if merge
            else f"{source} is an adapter of {found.adapter.base}; --merge adds it to "
            "that model and writes the sum"
        )
    dtype = dtype or "bfloat16"
    card = models.model_card(found.origin, {"saved as": dtype})
    params = found.load()
    models.save(
        directory, found.arch, params, found.tokenizer, dtype=dtype, card=card
    )  # fmt: skip
    print(f"{source} -> {directory}, {dtype}")


def convert_config(
    source: tyro.conf.Positional[Path], target: tyro.conf.Positional[Path | None] = None
) -> None:
    """Writes a configuration from another trainer's settings, which are not executed.

    Each value stands with the key that it comes from; comments name what has no
    counterpart, and what is left to decide.

    Args:
      source: YAML of veRL or TRL, or a shell script with words such as
        algorithm.adv_estimator=grpo.
      target: SOURCE.jaxrl.yaml if not given; a file that is there is not overwritten.
    """
    from jaxrl_llm.bridges.convert import convert as written

    source = source.expanduser()
    path = target.expanduser() if target else source.with_suffix(".jaxrl.yaml")
    todo = written(source, path)
    for line in todo:
        print(f"to do: {line}")
    print(f"{path}\nnext: jaxrl train {path} --dry-run")


def report(
    run_dirs: tyro.conf.Positional[tuple[Path, ...]],
    out: Path | None = None,
    completions: int = 24,
) -> None:
    """Writes a page about a run, from what it has written so far, or about several.

    Of one run it is RUN_DIR/report.html, which a run also writes itself. Of several it
    has their curves over one another and their answers to held-out questions in pairs.

    Args:
      run_dirs: output_dir of each run.
      out: the page; RUN_DIR/report.html of one run and comparison.html of several if
        not given.
      completions: of each kind and step that the page holds, at most.
    """
    from jaxrl_llm.tracking import report as reports

    if not run_dirs:
        raise ConfigError("no run: name the output_dir of one run, or of several")
    if completions < 0:
        raise ConfigError(f"--completions must be 0 or more, got {completions}")
    found = [run_dir.expanduser() for run_dir in run_dirs]
    if len(found) == 1 and out is None:
        print(reports.write(found[0], per_step=completions))
    else:
        path = (out or Path("comparison.html")).expanduser()
        print(reports.compare(found, path, per_step=completions))


def completion(shell: tyro.conf.Positional[Literal["bash", "zsh", "fish"]]) -> None:
    """Prints a script by which a shell completes verbs, flags and their choices.

    bash: jaxrl completion bash > ~/.local/share/bash-completion/completions/jaxrl
    zsh: jaxrl completion zsh > DIRECTORY/_jaxrl, a directory of $fpath
    fish: jaxrl completion fish > ~/.config/fish/completions/jaxrl.fish

    Args:
      shell: which.
    """
    from jaxrl_llm import bench

    names = tyro.conf.Positional[Literal[*bench.NAMES]]
    measure = dataclasses.make_dataclass("Bench", [("name", names)])
    measure.__doc__ = "Measures speed on shapes by name."
    kinds = {"train": flags.Train, "evaluate": flags.Evaluate, "plan": flags.Plan}
    offline = {
        verb: flags.command(kind, schema=schemas.of(verb))
        for verb, kind in OFFLINE.items()
    }
    tyro.extras.subcommand_cli_from_dict(
        {
            **{verb: flags.command(kind) for verb, kind in kinds.items()},
            **offline,
            **_functions(),
            "bench": measure,
        },
        prog="jaxrl",
        args=["--tyro-print-completion", shell],
    )
