"""What `--help` shows and a shell completes is what the command line takes."""

import functools
import json
import pathlib
import re
import subprocess
from contextlib import redirect_stdout
from io import StringIO

import pytest
import shown_flags
import tyro

from jaxrl_llm import cli
from jaxrl_llm.config import flags, parsing, reader
from jaxrl_llm.config.parsing import ConfigError

CONFIGS = sorted(pathlib.Path(__file__).parents[2].glob("configs/*.yaml"))
VALUES = {
    "output_dir": "runs/x",
    "model": {"path": "some/model"},
    "data": {"train": {"path": "rows.jsonl"}},
    "reward": {"functions": [{"name": "exact"}]},
    "trainer": {"total_training_steps": 3},
}


def exits(capsys, *arguments):
    """What the command line prints, which ends with status 0."""
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert not ended.value.code
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def script():
    """What bash is given."""
    with redirect_stdout(StringIO()) as printed, pytest.raises(SystemExit):
        cli.main(["completion", "bash"])
    return printed.getvalue()


@pytest.fixture(scope="module")
def verbs(script):
    """Every flag of every verb, by name."""
    found = shown_flags.spec(script)["subcommands"]
    return {verb: shown_flags.by_flag(options) for verb, options in found.items()}


def uses(flag, option):
    """Argument lists that use a flag as it is shown: one for each kind of value."""
    if shown_flags.is_switch(option):
        return [[flag]]
    shown, _, _ = option["description"].partition(" • ")
    one, *more = shown.split(" [")
    many = bool(more) and more[-1].endswith("...]")
    words = [shown] if not many else [one]
    found = []
    for word in words[0].split("|"):
        value = shown_flags.EXAMPLES.get(word, word)
        found.append([flag, value])
        if many:
            found += [[flag, value, value]]
    return found


def test_every_key_that_is_shown_works(verbs):
    own = set(flags.Train.__annotations__) | set(flags.Processes.__annotations__)
    tried = 0
    for flag, option in verbs["train"].items():
        if flag[2:].replace("-", "_") in own:
            continue
        for arguments in uses(flag, option):
            tried += 1
            try:
                arguments[0] = arguments[0].replace("rules.KEY", "rules.embed")
                values = parsing.override(VALUES, flags.long(arguments))
                parsing.parse(values, "run.yaml")
            except ConfigError as error:
                # It may need others besides, or be out of range; it is understood.
                wrong = "unknown|expected --|be a valid|be a finite|be '|no section"
                assert not re.search(wrong, str(error)), (arguments, str(error))
    assert tried > 350


@pytest.mark.parametrize(
    "verb, kind",
    [("train", flags.Train), ("evaluate", flags.Evaluate), ("plan", flags.Plan)],
)
def test_every_option_of_a_verb_that_is_shown_works(verbs, verb, kind):
    names = {
        field.name: f"--{field.name.replace('_', '-')}"
        for field in flags.dataclasses.fields(kind)
    }
    assert set(names.values()) <= set(verbs[verb])
    for name, flag in names.items():
        for arguments in uses(flag, verbs[verb][flag]):
            found, others = flags.given(kind, ["x.yaml", *arguments, "--seed", "3"])
            assert others == ["x.yaml", "--seed", "3"]
            assert getattr(found, name) != getattr(kind(), name)
            if len(arguments) == 2:
                assert flags.given(kind, ["=".join(arguments)])[0] == found


def test_every_verb_is_listed_and_completed(verbs):
    listed = re.findall(r"^    jaxrl ([a-z-]+)", cli.__doc__, re.M)
    assert {*listed} - {"--version"} == {*verbs}


def test_the_keys_of_a_configuration_are_the_same_for_all_verbs(verbs):
    keys = [
        {flag for flag in verbs[verb] if "." in flag}
        for verb in ("train", "evaluate", "plan")
    ]
    assert keys[0] == keys[1] == keys[2]


def test_every_key_of_the_shipped_configurations_is_shown(verbs):
    shown = {flag.replace("-", "_") for flag in verbs["train"]}
    for path in CONFIGS:
        for keys in reader.read(path).lines:
            flag = "__" + ".".join(keys).replace("-", "_")
            entry = f"{flag.rpartition('.')[0]}.KEY"
            inside = any(known.startswith(f"{flag}.") for known in shown)
            number = keys[-1].isdecimal()
            params = re.search(r"\.(params|groups)\.", flag)
            assert number or inside or params or {flag, entry} & shown, (path, keys)


NEEDED = {
    "init": ["quickstart"],
    "generate": ["--model", "m"],
    "serve": ["--model", "m"],
    "convert": ["a", "b"],
    "convert-config": ["verl.yaml"],
    "report": ["run"],
    "completion": ["bash"],
}


@pytest.mark.parametrize("verb", cli._functions())
def test_every_flag_of_the_other_verbs_works(verbs, verb):
    function, needed = cli._functions()[verb], NEEDED[verb]
    assert tyro.cli(functools.wraps(function)(lambda **options: options), args=needed)
    given = functools.wraps(function)(lambda **options: options)
    for arguments in shown_flags.all_used(verbs[verb]):
        found = tyro.cli(given, args=[*needed, *arguments])
        shown_flags.check_given(found, arguments)


@pytest.mark.parametrize("verb", ["train", "plan"])
def test_help_shows_what_is_completed(capsys, verbs, verb, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    found = exits(capsys, verb, "--help")
    words = set(re.findall(r"(?<!\S)--[a-z][\w.-]*\w", found))
    assert set(verbs[verb]) <= words
    assert {word for word in words if "." in word} <= set(verbs[verb])


def test_help_with_a_configuration_has_its_entries_and_values(capsys, tmp_path):
    path = tmp_path / "run.yaml"
    more = {"more_train": {"mine": {"path": "b.jsonl"}, "my_own": {"path": "c"}}}
    path.write_text(json.dumps(VALUES | {"data": VALUES["data"] | more}))
    found = exits(capsys, "train", str(path), "--help")
    assert "--data.more-train.mine.path TEXT" in found
    assert "(default: rows.jsonl)" in found and "(default: b.jsonl)" in found
    assert "--reward.functions.0.name" in found


@pytest.mark.slow  # tyro's scripts for other shells know what that for bash does
@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_a_shell_gets_a_script(capsys, shell):
    script = exits(capsys, "completion", shell)
    assert "jaxrl" in script and "actor.optim.lr" in script


def test_bash_completes_flags_and_choices(script, tmp_path):
    path = tmp_path / "jaxrl.bash"
    path.write_text(script)
    ask = "COMP_CWORD=$((${#COMP_WORDS[@]}-1)); _tyro_jaxrl; echo ${COMPREPLY[@]}"
    lines = ["jaxrl train --actor.optim.l", "jaxrl plan --rollout.engine j"]
    asked = [f"COMP_WORDS=({line}); {ask}" for line in lines]
    done = subprocess.run(
        ["bash", "-c", "; ".join([f"source {path}", *asked])],
        capture_output=True,
        text=True,
        check=True,
    )
    names, choice = done.stdout.splitlines()
    assert choice == "jax jaxrl"
    assert {"--actor.optim.lr", "--actor.optim.lr-warmup-steps"} <= set(names.split())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--num-processes", "two"], "--num-processes is a number, got 'two'"),
        (["--lost-after="], "--lost-after is a number, got ''"),
        (["--coordinator"], "--coordinator: expected a value"),
        (["--coordinator", "--dry-run"], "--coordinator: expected a value"),
        (["--dry-run=yes"], "--dry-run takes no value, got 'yes'"),
    ],
)
def test_an_option_that_cannot_be_read_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        flags.given(flags.Train, arguments)
