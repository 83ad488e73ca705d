"""Which distributions an installation has, and a new one that has a part of them.

    python tests/support/installed.py > constraints.txt

writes the versions that this environment has of what jaxrl-llm needs.
"""

import os
import pathlib
import platform
import subprocess
import sys
import tomllib
from importlib import metadata

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parents[2]
EXTRAS = ("tasks", "sandbox", "vllm", "serve", "notebooks", "docs", "dev")
"""What `make test` installs, with tensorboardX of `tracking`."""


def project() -> dict:
    """The table [project] of pyproject.toml."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)["project"]


def asked_for(*extras: str) -> list[Requirement]:
    """What pyproject.toml names: always needed, and for each of the extras."""
    optional = project()["optional-dependencies"]
    texts = [*project()["dependencies"], *(t for e in extras for t in optional[e])]
    return [need for need in map(Requirement, texts) if holds(need, ())]


def holds(need: Requirement, extras: tuple[str, ...]) -> bool:
    """Whether a requirement holds here, for a distribution with these extras."""
    if need.marker is None:
        return True
    here = default_environment()
    return any(need.marker.evaluate(here | {"extra": e}) for e in ("", *extras))


def closure(needs: list[Requirement]) -> dict[str, metadata.Distribution]:
    """The distributions that `needs` need, and what these need, by name.

    Raises:
      importlib.metadata.PackageNotFoundError: one of them is not installed.
    """
    found, seen, rest = {}, set(), list(needs)
    while rest:
        need = rest.pop()
        key = canonicalize_name(need.name), tuple(sorted(need.extras))
        if key in seen:
            continue
        seen.add(key)
        found[key[0]] = metadata.distribution(need.name)
        own = map(Requirement, found[key[0]].requires or ())
        rest += [other for other in own if holds(other, key[1])]
    return dict(sorted(found.items()))


def link(distributions: list[metadata.Distribution], packages: pathlib.Path) -> None:
    """Links every file of the distributions into an empty site-packages folder."""
    for distribution in distributions:
        for file in distribution.files or ():
            if ".." in file.parts:
                continue  # a command
            target = packages / file
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                target.symlink_to(distribution.locate_file(file))


def run(*command: str, status: int = 0, env: dict | None = None, **options) -> str:
    """What a program prints, without what this process says of paths: its output, or
    its errors where it is to end with another status than 0."""
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=kept | (env or {}), **options
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stderr if status else done.stdout


def constraints() -> str:
    """The text of constraints.txt as this environment has it."""
    known = closure([*asked_for(*EXTRAS), Requirement("tensorboardX")])
    lines = [f"{name}=={found.version}" for name, found in known.items()]
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return "\n".join(
        [
            "# Versions that the test suite ran with: "
            f"Python {python}, {platform.system()} {platform.machine()}.",
            "#   pip install -c constraints.txt '.[cuda,tasks]'",
            "# Written by `make constraints`.",
            *lines,
            "",
        ]
    )


if __name__ == "__main__":
    print(constraints(), end="")
