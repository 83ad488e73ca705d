"""Points of a run at which it can be killed: just before it changes a file.

Python tells audit hooks of what it is about to do to the file system; the data blocks
of checkpoints, which are not written by Python, are met by a delay after a point.
"""

import os
import re
import signal
import sys
import threading
import time

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def watch(root: str, point: dict | None) -> None:
    """Kills this process at a point; without one, writes RECORD of all of them.

    Args:
      root: points are what happens to files below it.
      point: the `name` as in the record; `after_s`, seconds from there to the end.
    """
    root = os.path.realpath(root)
    record = None
    if point is None:
        record = os.open("points", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def hook(event: str, arguments: tuple) -> None:
        found = _path(event, arguments)
        if found is None or not (path := os.path.abspath(found)).startswith(root):
            return
        name = f"{event} {normal(path[len(root) + 1 :])}"
        if record is not None:
            os.write(record, f"{name}\n".encode())
        elif name == point["name"] and not fired:
            fired.append(name)
            if point["after_s"]:
                threading.Thread(target=die, args=[point["after_s"]]).start()
            else:
                die(0.0)

    fired: list[str] = []
    # It is not audited; what it is asked to make last is.
    fsync = os.fsync

    def audited(descriptor) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        hook("fsync", (os.readlink(f"/proc/self/fd/{number}"),))
        fsync(descriptor)

    os.fsync = audited
    sys.addaudithook(hook)


def normal(path: str) -> str:
    """A path without what is another one in each process."""
    path = re.sub(r"(?<=\.new\.)\w{8}(?=/|$)", "RANDOM", path)
    return re.sub(r"(?<=[._-])(?:\d{3,5}|\d{7})(?=\.|$)", "PID", path)


def die(after_s: float) -> None:
    time.sleep(after_s)
    os.kill(os.getpid(), signal.SIGKILL)


def _path(event: str, arguments: tuple) -> str | None:
    """The file that is about to change."""
    match event:
        case "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & WRITING:
                return None
        case "os.rename":
            path = arguments[1]
        case "os.mkdir" | "os.remove" | "os.rmdir" | "os.link" | "os.truncate":
            path = arguments[0]
        case "fsync":
            path = arguments[0]
        case _:
            return None
    return os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else None
