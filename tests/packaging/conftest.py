"""The wheel, and an environment that has it and what it always needs, no more."""

import pathlib
import sys
import tarfile
import venv

import installed
import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The path of the wheel that is built from the source distribution."""
    folder = tmp_path_factory.mktemp("built")
    build = "-m", "hatchling", "build", "-d", str(folder), "-t"
    installed.run(sys.executable, *build, "sdist", cwd=ROOT)
    [source] = folder.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        archive.extractall(folder, filter="data")
    unpacked = source.with_suffix("").with_suffix("")
    installed.run(sys.executable, *build, "wheel", cwd=unpacked)
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def python(wheel, tmp_path_factory):
    """The interpreter of a new environment: the wheel, and what it always needs."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    [packages] = folder.glob("lib/python*/site-packages")
    needed = installed.closure(installed.asked_for())
    installed.link(list(needed.values()), packages)
    python = str(folder / "bin" / "python")
    options = "--no-deps", "--no-index", "--no-compile", "--quiet"
    pip = "-m", "pip", "--python", python, "install", *options, str(wheel)
    installed.run(sys.executable, *pip)
    return python
