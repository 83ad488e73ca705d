"""Compiled programs, kept from one run of the tests to the next.

JAX finds a program by a hash of its text, the options and the compiler's version, so
what has changed is compiled anew. Tests write to a folder of their own run, and what is
there in the end is kept if they all passed: a run that is killed leaves nothing behind.
"""

import os
import pathlib
import shutil
import tempfile

KEPT = pathlib.Path(__file__).parents[2] / "build/compiled"
MOST_BYTES = 2**31
runs = []  # this process's; the workers of a run use the folder of the first


def begin() -> str:
    """A folder for this run that holds what is kept; gone with this process."""
    KEPT.mkdir(parents=True, exist_ok=True)
    if sum(path.stat().st_size for path in KEPT.iterdir()) > MOST_BYTES:
        shutil.rmtree(KEPT)  # old ones are not told from new ones
        KEPT.mkdir()
    runs.append(tempfile.TemporaryDirectory(prefix="compiled-", dir=KEPT.parent))
    for path in KEPT.iterdir():
        os.link(path, pathlib.Path(runs[0].name, path.name))
    return runs[0].name


def keep() -> None:
    """Adds what this run has compiled."""
    for run in runs:
        known = {path.name for path in KEPT.iterdir()}
        for path in pathlib.Path(run.name).iterdir():
            if path.name not in known:
                path.replace(KEPT / path.name)
