"""What is installed: the wheel that is built from the source distribution."""

import os
import pathlib
import site
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections import Counter

import pytest

ROOT = pathlib.Path(__file__).parents[2]
IMPORT_ALL = """
import importlib, pkgutil, jaxrl_llm
names = [m.name for m in pkgutil.walk_packages(jaxrl_llm.__path__, "jaxrl_llm.")]
for name in names:
    if name != "jaxrl_llm.__main__":
        importlib.import_module(name)
print(jaxrl_llm.__file__, *names, sep="\\n")
"""


def modules():
    """Every module of the checkout, by the one name that it has."""
    files = [*ROOT.glob("jaxrl_llm/*.py"), *ROOT.glob("jaxrl_llm/*/**/*.py")]
    names = {".".join(f.relative_to(ROOT).with_suffix("").parts) for f in files}
    names |= {f"jaxrl_llm.sharding.{f.stem}" for f in ROOT.glob("sharding/*.py")}
    return {name.removesuffix(".__init__") for name in names} - {"jaxrl_llm"}


def run(python, *arguments, **options):
    """A program's output, without what this process says of paths."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= options.pop("env", {})
    done = subprocess.run(
        [python, *arguments], capture_output=True, text=True, env=env, **options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel's path."""
    folder = tmp_path_factory.mktemp("built")
    build = "-m", "hatchling", "build", "-d", str(folder), "-t"
    run(sys.executable, *build, "sdist", cwd=ROOT)
    [source] = folder.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        archive.extractall(folder, filter="data")
    run(sys.executable, *build, "wheel", cwd=source.with_suffix("").with_suffix(""))
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """The interpreter of a new environment: the wheel, and what it depends on."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    [packages] = folder.glob("lib/python*/site-packages")
    # Not with what *.pth files there add, such as this checkout.
    (packages / "parent.pth").write_text("\n".join(site.getsitepackages()))
    python = str(folder / "bin" / "python")
    options = "--no-deps", "--no-index", "--no-compile", "--quiet"
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel)
    return python


@pytest.fixture(scope="module")
def users_folder(tmp_path_factory):
    """A folder with a file named as each of our rooms, which nobody may import."""
    folder = tmp_path_factory.mktemp("user")
    for name in {"losses", *(module.split(".")[1] for module in modules())}:
        text = f"raise AssertionError('this is the user\\'s own {name}')\n"
        (folder / f"{name}.py").write_text(text)
    (folder / "__main__.py").unlink()
    return folder


def test_the_wheel_has_every_module_once_and_what_is_read_beside_them(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert set(Counter(names).values()) == {1}
    code = {n.removesuffix(".py").replace("/", ".") for n in names if n.endswith(".py")}
    code = {name.removesuffix(".__init__") for name in code}
    assert code == {"jaxrl_llm", *modules()}
    beside = ("py.typed", "algorithms/ALGORITHMS.md", "tracking/report.html")
    assert {f"jaxrl_llm/{name}" for name in beside} <= set(names)


def test_every_installed_module_imports_beside_a_users_own(python, users_folder):
    where, *names = run(python, "-c", IMPORT_ALL, cwd=users_folder).splitlines()
    assert pathlib.Path(where).is_relative_to(pathlib.Path(python).parents[1])
    assert set(names) == modules()


def test_every_module_of_the_checkout_imports_beside_a_users_own(users_folder):
    env = {"PYTHONPATH": str(ROOT)}
    where, *names = run(
        sys.executable, "-c", IMPORT_ALL, cwd=users_folder, env=env
    ).splitlines()
    assert pathlib.Path(where).is_relative_to(ROOT)
    assert set(names) == modules()


def test_what_is_installed_starts_its_coordinator_and_its_command(python, users_folder):
    serve = "-m", "jaxrl_llm.sharding.coordinator", "0", "1", "0"
    assert not run(python, *serve, cwd=users_folder, input="done")
    command = pathlib.Path(python).with_name("jaxrl")
    with (ROOT / "pyproject.toml").open("rb") as file:
        version = tomllib.load(file)["project"]["version"]
    shown = run(python, command, "--version", cwd=users_folder)
    assert shown == f"jaxrl {version}\n"


def test_nothing_imports_the_folder_sharding_by_another_name():
    files = [*ROOT.glob("jaxrl_llm/**/*.py"), *ROOT.glob("sharding/*.py")]
    files += [*ROOT.glob("tests/**/*.py"), *ROOT.glob("notebooks/*.ipynb")]
    other = ("import sharding", "from sharding ", "from sharding.")
    lines = [line.strip(' "') for f in files for line in f.read_text().splitlines()]
    assert not [line for line in lines if line.startswith(other)]
