"""Starts `jaxrl` processes fast: what they import is imported once, each is a fork.

    python -m faults.zygote STATUSES

A request is a line of JSON; see `become` for those that start a process. The answer is
the line of its process id; when that ends, STATUSES/PID says how. JAX starts in the
fork only, so each is what `python -m jaxrl_llm` would be, but for the time to import.
"""

import contextlib
import ctypes
import importlib
import json
import os
import pathlib
import resource
import runpy
import signal
import sys
import warnings

from faults import points

PR_SET_PDEATHSIG = 1
MNT_DETACH = 2
libc = ctypes.CDLL(None, use_errno=True)


def serve(statuses: pathlib.Path) -> None:
    def reap(*_):
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                part = statuses / f".{ended[0]}"
                part.write_text(str(os.waitstatus_to_exitcode(ended[1])))
                part.rename(statuses / str(ended[0]))

    signal.signal(signal.SIGCHLD, reap)
    for line in sys.stdin:
        request = json.loads(line)
        if "preload" in request:
            preload(json.loads(pathlib.Path(request["preload"]).read_text()))
            print("preloaded", flush=True)
        elif "usage" in request:
            used = resource.getrusage(resource.RUSAGE_CHILDREN)
            print(used.ru_utime + used.ru_stime, flush=True)
        elif pid := os.fork():
            print(pid, flush=True)
        else:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            become(request)


def become(request: dict) -> None:
    """This process becomes the one that was asked for, and ends with it.

    folder: of the process, where `output` gets its terminal's text.
    argv: of jaxrl; or call and arguments: a function "module:name" and its keywords.
    environ: added to the environment.
    point, watched: where it dies, see `points.watch`.
    modules: a file that gets the names of all modules in the end.
    memory: limit of the address space beyond now.
    """
    os.setsid()
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.chdir(request["folder"])
    said = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for ours, theirs in ((nothing, 0), (said, 1), (said, 2)):
        os.dup2(ours, theirs)
    os.environ.update(request.get("environ", {}))
    if "memory" in request:
        used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * 4096
        most = used + request["memory"]
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    if "watched" in request:
        points.watch(request["watched"], request.get("point"))
    try:
        if "argv" in request:
            sys.argv = ["jaxrl", *request["argv"]]
            runpy.run_module("jaxrl_llm", run_name="__main__", alter_sys=True)
        else:
            module, _, name = request["call"].partition(":")
            function = getattr(importlib.import_module(module), name)
            sys.exit(function(**request["arguments"]))
    finally:
        if "modules" in request:
            names = json.dumps(sorted(sys.modules))
            pathlib.Path(request["modules"]).write_text(names)


def preload(names: list[str]) -> None:
    """Imports what a process had imported in its end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            # Some exist only as others make them.
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def mount(directory: str, size: int) -> int:
    """Puts a file system of `size` bytes over a directory; 0 if that is permitted."""
    return libc.mount(
        b"tmpfs", directory.encode(), b"tmpfs", 0, f"size={size}".encode()
    )


def unmount(directory: str) -> None:
    libc.umount2(directory.encode(), MNT_DETACH)


if __name__ == "__main__":
    serve(pathlib.Path(sys.argv[1]))
