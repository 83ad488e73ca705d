"""One process that goes on with the same run again and again, after another fault each.

A run of a few steps takes seconds to trace and compile, and then milliseconds. Nothing
but that is kept from one time to the next: all files are read and checked anew.
"""

import contextlib
import json
import os
import pathlib
import resource
import shutil
import sys
import time
import traceback

from faults import damage, runs, zygote


def go_on(config: str, whole: str, right: str, faults: list[dict], results: str) -> int:
    """Damages a copy of the run WHOLE, and goes on with it; for each of `faults`.

    Args:
      config: of the run, whose output_dir is the copy's.
      right: the run that was never broken.
      results: gets a line per fault: what was wrong, and what was said.
    """
    run = _built_once(config)
    for fault in faults:
        runs.copy(pathlib.Path(whole), run)
        damage.apply(run / fault["file"], fault)
        _note(results, fault | _trained(config, run, right))
    return 0


def fill(config: str, right: str, sizes: list[int], results: str) -> int:
    """Runs where so many bytes have room, then goes on where more have.

    A file system of that size, or where mounting is not permitted, files that cannot
    grow beyond it.
    """
    run = _built_once(config)
    aside = run.with_name("aside")
    for size in sizes:
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        mounted = zygote.mount(str(run), size) == 0
        if not mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        full = _trained(config, run, right)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        if mounted:
            runs.copy(run, aside)
            zygote.unmount(str(run))
            runs.copy(aside, run)
        _note(results, {"full": full, "roomy": _trained(config, run, right)})
    return 0


def _built_once(config: str) -> pathlib.Path:
    """From here on `train` takes what is built now. Returns output_dir."""
    from jaxrl_llm.config import parsing
    from jaxrl_llm.training import build

    once = build.build(parsing.load(config))
    build.build = lambda config, rewards=None: once
    return pathlib.Path(once.config.output_dir)


def _trained(config: str, run: pathlib.Path, right: str) -> dict:
    """How `jaxrl train` ended, and what the run is then."""
    from jaxrl_llm import cli

    began = time.monotonic()
    status, output = _said(lambda: cli.main(["train", config]))
    return {
        "status": status,
        "output": output,
        "seconds": time.monotonic() - began,
        "wrong": runs.wrong(run, pathlib.Path(right)),
    }


def _note(results: str, found: dict) -> None:
    with open(results, "a") as file:
        file.write(json.dumps(found) + "\n")


def _said(call) -> tuple[int, str]:
    """The exit status of a call and what it wrote to the terminal."""
    with open("said", "w+") as file:
        kept = [os.dup(number) for number in (1, 2)]
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        try:
            try:
                status = call()
            except SystemExit as end:
                status = end.code
            except BaseException:  # noqa: BLE001 - as the interpreter's end would
                traceback.print_exc()
                status = 1
            with contextlib.suppress(Exception):
                sys.stdout.flush(), sys.stderr.flush()
        finally:
            for number, old in zip((1, 2), kept, strict=True):
                os.dup2(old, number)
                os.close(old)
        return status, pathlib.Path("said").read_text(errors="replace")
