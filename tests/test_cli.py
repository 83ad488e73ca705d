"""The command line; a whole `train` is in test_train.py."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import yaml

import jaxrl_llm
from jaxrl_llm import cli as launch
from jaxrl_llm import models
from jaxrl_llm.sharding import hardware
from jaxrl_llm.tracking import run_directory
from jaxrl_llm.tracking.step_metrics import Validation
from jaxrl_llm.training import evaluation


def failure(capsys, *arguments):
    """What standard error says of arguments that cannot work."""
    assert launch.main(arguments) == 2
    printed = capsys.readouterr()
    assert not printed.out and "Traceback" not in printed.err
    first, *lines, hint = printed.err.strip().splitlines()
    assert first == "error"
    return "\n".join([*lines, hint]).removesuffix("(JAXRL_TRACEBACK=1 shows where)")


@pytest.fixture
def run_yaml(tiny_model, tmp_path):
    """A configuration of a run that asks two held-out questions."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "{i}+1=", "answer": 1}}\n' for i in (1, 2)))
    values = {
        "output_dir": str(tmp_path / "run"),
        "model": {"path": tiny_model},
        "data": {
            "train": {"path": str(rows), "prompt_template": "Say {answer}: {prompt}"},
            "val": {"path": str(rows)},
            "train_batch_size": 2,
        },
        "rollout": {"max_response_length": 4, "decode_chunk": 32, "dtype": "float32"},
        "reward": {"functions": [{"name": "exact"}]},
        "val": {"greedy": False},
        "trainer": {"total_training_steps": 1},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_without_a_verb_the_verbs_are_listed(capsys, arguments):
    assert launch.main(arguments) == 0
    shown = capsys.readouterr().out
    for verb in ("train", "evaluate", "generate", "convert", "report"):
        assert f"jaxrl {verb} " in shown


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["trian"], "unknown verb 'trian'; one of train, sft, rm, dpo, "),
        (["train"], "jaxrl train needs a configuration file"),
        (["evaluate", "--seed", "1"], "jaxrl evaluate needs a configuration file"),
        (["evaluate", "a.yaml", "--models"], "--models: expected one or more values"),
        (["train", "none.yaml"], "none.yaml: no such file"),
        (["generate", "--model", "/nowhere"], "nothing to answer: give --prompts"),
        (
            ["generate", "--model", "/nowhere", "--prompts", "a"],
            "/nowhere: no such directory",
        ),
        (
            ["generate", "--model", "m", "--file", "/nowhere.txt"],
            "No such file or directory: '/nowhere.txt'",
        ),
        (
            [
                "generate",
                "--model",
                "m",
                "--prompts",
                "a",
                "--no-chat",
                "--system",
                "b",
            ],
            "--system is a chat message, but --no-chat asks for none",
        ),
        (["convert", "/nowhere", "x"], "/nowhere: no such directory"),
        (["report", "/nowhere"], "/nowhere/metrics.jsonl: no such file; is '/nowhere'"),
    ],
    ids=str,
)
def test_what_cannot_work_is_one_message(capsys, arguments, message):
    assert message in failure(capsys, *arguments)


def test_a_mistake_in_the_configuration_is_one_message(capsys, run_yaml):
    said = failure(capsys, "train", run_yaml, "--actor.optim.lrr", "1e-6")
    assert said == "command line: actor.optim.lrr: unknown key; did you mean 'lr'?\n"
    said = failure(capsys, "train", run_yaml, "--data.train.path", "rows.csv")
    assert said.startswith("data path 'rows.csv' is neither FILE.jsonl")
    said = failure(capsys, "train", run_yaml, "--reward.functions.0.name", "no:where")
    assert "No module named 'no'" in said


def test_what_does_not_fit_the_devices_says_where_it_is_set(capsys, run_yaml):
    text = Path(run_yaml).read_text()
    Path(run_yaml).write_text(f"actor:\n  mesh: {{fsdp: 3}}\n{text}")
    mesh = "actor.mesh: mesh {'data': 1, 'fsdp': "
    said = failure(capsys, "train", run_yaml)
    assert said.startswith(f"{run_yaml}:2: {mesh}3")
    said = failure(capsys, "evaluate", run_yaml, "--actor.mesh={fsdp: 5}")
    assert said.startswith(f"command line: {mesh}5")
    said = failure(capsys, "plan", run_yaml, "--devices=8")
    assert said.startswith(f"{run_yaml}:2: {mesh}3")


def test_a_logger_that_is_not_installed_is_one_message(capsys, run_yaml, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    said = failure(capsys, "train", run_yaml, "--trainer.loggers", "[wandb]")
    assert "pip install 'jaxrl-llm[tracking]'" in said


def test_where_a_mistake_is_can_be_shown(monkeypatch):
    monkeypatch.setenv("JAXRL_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no such file"):
        launch.main(["train", "none.yaml"])


@pytest.mark.parametrize(
    "backend, named, folder",
    [
        ("gpu", None, "HOME/jaxrl_llm"),
        ("gpu", "", None),  # the user wants none
        ("gpu", "/elsewhere", None),  # JAX has read it
        ("cpu", None, None),
    ],
)
def test_compiled_programs_are_kept(monkeypatch, tmp_path, backend, named, folder):
    found = {}
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax.config, "update", found.__setitem__)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    if named is not None:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", named)
    launch._prepare()
    wanted = (
        {"jax_persistent_cache_min_compile_time_secs": 0} if backend == "gpu" else {}
    )
    if folder:
        wanted["jax_compilation_cache_dir"] = folder.replace("HOME", str(tmp_path))
    assert found == wanted


def test_the_shell_gets_status_and_message():
    done = subprocess.run(
        [sys.executable, "-m", "jaxrl_llm", "train", "none.yaml"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error\nnone.yaml: no such file")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("spelling", ["--version", "-V", "version"])
def test_the_version_is_told(capsys, spelling):
    assert launch.main([spelling]) == 0
    assert capsys.readouterr().out == f"jaxrl {jaxrl_llm.__version__}\n"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["train", "--help"], ["report", "RUN"]]
)
def test_nobody_has_to_read_on(monkeypatch, capsys, tmp_path, arguments):
    with run_directory.MetricsWriter(tmp_path, [], "project", {}) as writer:
        writer.write(1, {"critic/rewards/mean": 0.5})
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as closed, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", closed)
        given = [str(tmp_path) if word == "RUN" else word for word in arguments]
        assert launch.main(given) == 128 + signal.SIGPIPE
    assert capsys.readouterr().err == ""


def test_a_broken_pipe_of_another_kind_is_an_error(capsys, monkeypatch):
    def breaks(*_):
        raise BrokenPipeError("of a worker")

    monkeypatch.setattr(launch, "_evaluate", breaks)
    assert "of a worker" in failure(capsys, "evaluate")


@pytest.mark.parametrize(
    "verb",
    ["train", "evaluate", "generate", "serve", "convert", "convert-config", "report"],
)
def test_every_verb_has_help(capsys, verb):
    with pytest.raises(SystemExit) as ended:
        launch.main([verb, "--help"])
    assert ended.value.code == 0
    assert f"usage: jaxrl {verb}" in capsys.readouterr().out


def test_help_with_a_configuration_shows_its_values(capsys, run_yaml):
    with pytest.raises(SystemExit) as ended:
        launch.main(["train", run_yaml, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "--actor.optim.lr" in shown and "Say {answer}: {prompt}" in shown


def test_an_unknown_option_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        launch.main(["report", "somewhere", "--pdf"])
    assert ended.value.code == 2
    assert "--pdf" in capsys.readouterr().err


def test_generate_prints_completions(capsys, tiny_model, tmp_path):
    (tmp_path / "more.txt").write_text("[bold]2+2=[/]\n")
    options = ["--max-tokens", "4", "--temperature", "1.0", "--seed", "3", "--n", "2"]
    asked = ["--prompts", "1+1=", "--file", str(tmp_path / "more.txt")]
    arguments = ["generate", "--model", tiny_model, *asked, *options]
    assert launch.main(arguments) == 0
    shown = capsys.readouterr().out
    assert [f"{p}.{n} " in shown for p in (1, 2) for n in (1, 2)] == [True] * 4
    assert shown.count("1+1=") == 2 == shown.count("[bold]2+2=[/]")
    out = tmp_path / "out.jsonl"
    assert launch.main([*arguments, "--out", str(out)]) == 0
    assert f"2 completions of each of 2 prompts: {out}" in capsys.readouterr().out
    found = [json.loads(line) for line in out.read_text().splitlines()]
    asked = ["1+1=", "1+1=", "[bold]2+2=[/]", "[bold]2+2=[/]"]
    assert [one["prompt"] for one in found] == asked
    # The same seed gives the same completions; a console gets no control characters.
    plain = ["".join(filter(str.isprintable, one["completion"])) for one in found]
    assert all(text in "".join(filter(str.isprintable, shown)) for text in plain)
    assert "exists; name another file" in failure(capsys, *arguments, "--out", str(out))
    assert launch.main([*arguments, "--system", "Add."]) == 0
    assert capsys.readouterr().out != shown


def test_evaluate_says_how_good_the_model_is(capsys, run_yaml, tmp_path, monkeypatch):
    # What it computes is in training/test_loop.py.
    record = {"prompt_id": 0, "kind": "sampled", "prompt": "1+1=", "completion": "2"}
    record |= {"answer": 2, "reward": 1.0, "correct": True, "sample": 0}
    found = Validation(metrics={"val-core/all/acc/mean@2": 0.75}, records=[record])
    asked = []

    def evaluate_all(config, names):
        asked.append((config.data.val.path, config.val.n, names))
        return dict.fromkeys(names or ["only"], found), dict.fromkeys(names[1:], {})

    monkeypatch.setattr(evaluation, "evaluate_all", evaluate_all)
    rows = str(tmp_path / "rows.jsonl")
    assert launch.main(["evaluate", run_yaml, "--val.n", "2"]) == 0
    shown = capsys.readouterr().out
    assert "val-core/all/acc/mean@2" in shown and "0.75" in shown and "1+1=" in shown
    models = ["--models", "a", "b/c", "--val.n", "3"]
    assert launch.main(["evaluate", run_yaml, *models]) == 0
    assert "change: from a;" in capsys.readouterr().out
    assert asked == [(rows, 2, []), (rows, 3, ["a", "b/c"])]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow  # so in test_dry_run
def test_a_dry_run_leaves_nothing_behind(capsys, run_yaml, tmp_path):
    assert launch.main(["train", run_yaml, "--dry-run", "--rollout.n", "2"]) == 0
    assert "Memory per device" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_convert_writes_a_model_that_loads(capsys, tiny_model, tmp_path):
    target = tmp_path / "copy"
    assert launch.main(["convert", tiny_model, str(target), "--dtype", "float16"]) == 0
    assert f"-> {target}, float16" in capsys.readouterr().out
    assert json.loads((target / "config.json").read_text())["torch_dtype"] == "float16"
    copy, model = models.open(target), models.open(tiny_model)
    assert copy.arch == model.arch
    assert copy.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    assert "exists and is not empty" in failure(
        capsys, "convert", tiny_model, str(target)
    )


def test_report_writes_the_page(capsys, tmp_path):
    with run_directory.MetricsWriter(tmp_path, [], "project", {}) as writer:
        writer.write(1, {"critic/rewards/mean": 0.5})
    assert launch.main(["report", str(tmp_path)]) == 0
    page = tmp_path / "report.html"
    assert capsys.readouterr().out.strip() == str(page)
    assert "critic/rewards/mean" in page.read_text()


def test_report_compares_runs(capsys, tmp_path, monkeypatch):
    runs = [tmp_path / "one", tmp_path / "two"]
    for run in runs:
        with run_directory.MetricsWriter(run, [], "project", {}) as writer:
            writer.write(1, {"critic/rewards/mean": 0.5})
    monkeypatch.chdir(tmp_path)
    assert launch.main(["report", *map(str, runs)]) == 0
    assert capsys.readouterr().out.strip() == "comparison.html"
    page = (tmp_path / "comparison.html").read_text()
    assert '"name":"one"' in page and '"name":"two"' in page
    assert launch.main(["report", str(runs[0]), "--out", "new/page.html"]) == 0
    assert (tmp_path / "new" / "page.html").exists()
    assert not (runs[0] / "report.html").exists()
    assert capsys.readouterr().out.strip() == "new/page.html"
    assert "name the output_dir" in failure(capsys, "report")
    said = failure(capsys, "report", str(runs[0]), "--completions", "-1")
    assert "--completions must be 0 or more, got -1" in said
    assert "given twice" in failure(capsys, "report", "one", "one")
    assert "metrics.jsonl: no such file" in failure(capsys, "report", "one", "three")


def test_a_backend_that_does_not_start_is_one_line(capsys, monkeypatch):
    def fails(*_):
        raise RuntimeError("Unable to initialize backend 'cuda': no GPU\n(set it)")

    monkeypatch.setattr(launch, "_evaluate", fails)
    with pytest.raises(RuntimeError):  # JAX starts, so that is not what is wrong
        launch.main(["evaluate"])
    monkeypatch.setattr(jax, "devices", fails)
    said = failure(capsys, "evaluate")
    assert (
        "JAX does not start: Unable to initialize backend 'cuda': no GPU (set" in said
    )
    assert "JAX_PLATFORMS is cpu" in said and "Traceback" not in said


SERVED = [
    "--rollout.engine",
    "vllm",
    "--rollout.vllm.args",
    "[--gpu-memory-utilization=.4]",
]


@pytest.mark.parametrize(
    "arguments, server",
    [
        (["train", "RUN"], 0.0),
        (["train", "RUN", "--dry-run"], 0.0),
        (["train", "RUN", *SERVED], 0.4),
        (["evaluate", "RUN", *SERVED], 0.4),
        (["generate", "--model", "MODEL", "--prompts", "a"], 0.0),
        (["plan", "RUN", "--devices", "8"], 0.0),
        (["bench", "train"], 0.0),
        (["bench", "step"], 0.0),
        (["bench", "reshard"], 0.0),
        (["bench", "rollout"], 0.0),
        (["bench", "rollout", "--engines", "vllm"], 0.9),
    ],
)
def test_every_verb_gives_jax_what_a_server_leaves(
    monkeypatch, run_yaml, arguments, server
):
    class Given(Exception):
        """Nothing is to be computed after it."""

    def given(server=0.0):
        raise Given(server)

    monkeypatch.setattr(hardware, "use_memory", given)
    arguments = [run_yaml if word == "RUN" else word for word in arguments]
    with pytest.raises(Given) as found:
        launch.main(arguments)
    assert found.value.args == (server,)
