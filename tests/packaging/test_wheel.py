"""What is installed: the wheel that is built from the source distribution."""

import pathlib
import sys
import zipfile
from collections import Counter

import installed
import pytest

ROOT = pathlib.Path(__file__).parents[2]
IMPORT_ALL = """
import importlib, pkgutil, jaxrl_llm
names = [m.name for m in pkgutil.walk_packages(jaxrl_llm.__path__, "jaxrl_llm.")]
for name in names:
    try:
        if name != "jaxrl_llm.__main__":
            importlib.import_module(name)
    except ImportError as error:  # which says what to install
        said = "pip install 'jaxrl-llm[" in str(error)
        # For all of its room: the verb imports it first.
        room = "jaxrl_llm.serving."
        assert said or name.startswith(room) and name != f"{room}server", error
print(jaxrl_llm.__file__, *names, sep="\\n")
"""


def modules():
    """Every module of the checkout, by the one name that it has."""
    files = [*ROOT.glob("jaxrl_llm/*.py"), *ROOT.glob("jaxrl_llm/*/**/*.py")]
    names = {".".join(f.relative_to(ROOT).with_suffix("").parts) for f in files}
    names |= {f"jaxrl_llm.sharding.{f.stem}" for f in ROOT.glob("sharding/*.py")}
    return {name.removesuffix(".__init__") for name in names} - {"jaxrl_llm"}


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
    beside = {
        "py.typed",
        "algorithms/ALGORITHMS.md",
        "tracking/page/report.html",
        "tracking/page/charts.js",
    }
    beside |= {str(path.relative_to(ROOT)) for path in ROOT.glob("configs/*.yaml")}
    assert {f"jaxrl_llm/{name}" for name in beside} <= set(names)


def test_every_installed_module_imports_beside_a_users_own(python, users_folder):
    where, *names = installed.run(
        python, "-c", IMPORT_ALL, cwd=users_folder
    ).splitlines()
    assert pathlib.Path(where).is_relative_to(pathlib.Path(python).parents[1])
    assert set(names) == modules()


@pytest.mark.slow
def test_every_module_of_the_checkout_imports_beside_a_users_own(users_folder):
    env = {"PYTHONPATH": str(ROOT)}
    said = installed.run(sys.executable, "-c", IMPORT_ALL, cwd=users_folder, env=env)
    where, *names = said.splitlines()
    assert pathlib.Path(where).is_relative_to(ROOT)
    assert set(names) == modules()


def test_what_is_installed_starts_its_coordinator_and_its_command(python, users_folder):
    serve = "-m", "jaxrl_llm.sharding.coordinator", "0", "1", "0"
    assert not installed.run(python, *serve, cwd=users_folder, input="done")
    command = pathlib.Path(python).with_name("jaxrl")
    shown = installed.run(python, command, "--version", cwd=users_folder)
    assert shown == f"jaxrl {installed.project()['version']}\n"


def test_what_the_base_install_lacks_is_one_error_that_names_the_extra(
    python, tmp_path
):
    jaxrl = str(pathlib.Path(python).with_name("jaxrl"))
    env = {"JAX_PLATFORMS": "cpu"}
    said = installed.run(jaxrl, "train", "quickstart", status=2, cwd=tmp_path, env=env)
    assert said.startswith("error\nNo module named 'reasoning_gym': pip install ")
    assert "'jaxrl-llm[tasks]'" in said and "Traceback" not in said
    assert not list(tmp_path.iterdir())
    written = installed.run(jaxrl, "init", "gsm8k", cwd=tmp_path, env=env)
    assert written.startswith("gsm8k.yaml\n") and (tmp_path / "gsm8k.yaml").is_file()


def test_nothing_imports_the_folder_sharding_by_another_name():
    files = [*ROOT.glob("jaxrl_llm/**/*.py"), *ROOT.glob("sharding/*.py")]
    files += [*ROOT.glob("tests/**/*.py"), *ROOT.glob("notebooks/*.ipynb")]
    other = ("import sharding", "from sharding ", "from sharding.")
    lines = [line.strip(' "') for f in files for line in f.read_text().splitlines()]
    assert not [line for line in lines if line.startswith(other)]
