"""One run at a time in a directory.

RUN/lock holds the host and the process that runs there. The operating system keeps the
lock itself, and frees it however the process ends, so a file that a killed one has left
behind is in nobody's way.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jaxrl_llm.config.names import ConfigError

_held: dict[str, int] = {}
"""The thread of this process that holds a directory."""
_guard = threading.Lock()


@contextmanager
def locked(directory: Path, say: Callable[[str], None] = print) -> Iterator[None]:
    """Nobody else runs in `directory` during the block. It is made if it does not
    exist, and goes again if nothing is left in it. Blocks of one thread may be nested.

    Args:
      say: is told if the file system has no locks. Another run is then noticed on the
        same host only.

    Raises:
      ConfigError: another process or thread runs there; the message names it.
    """
    key = os.path.realpath(directory)
    with _guard:
        me = threading.get_ident()
        holder = _held.get(key)
        _held.setdefault(key, me)
    if holder == me:
        yield
        return
    if holder is not None:
        raise ConfigError(_in_use(directory, _me()))
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = _lock(directory, say)
        try:
            yield
        finally:
            (directory / "lock").unlink(missing_ok=True)
            os.close(file)
    finally:
        del _held[key]
        with contextlib.suppress(OSError):  # not empty
            for path in made:
                path.rmdir()


def in_use(directory: Path) -> bool:
    """Whether a process of this host that is alive, this one or another, runs in
    `directory`, as far as its lock says."""
    if os.path.realpath(directory) in _held:
        return True
    try:
        file = os.open(directory / "lock", os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return _runs_here(_owner(file))
    finally:
        os.close(file)


def _lock(directory: Path, say: Callable[[str], None]) -> int:
    """The descriptor of the file that is locked now."""
    path = directory / "lock"
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        owner = _owner(file)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise ConfigError(_in_use(directory, owner)) from None
        except OSError as error:
            if _runs_here(owner):
                os.close(file)
                raise ConfigError(_in_use(directory, owner)) from None
            say(
                f"output_dir {directory}: its file system has no locks "
                f"({error.strerror}), so a run there on another host would not be "
                "noticed; make sure that there is none"
            )
        # The one who held it may have removed the file in between.
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(file).st_ino == os.stat(path).st_ino:
                break
        os.close(file)
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps(_me()).encode(), 0)
    return file


def _me() -> dict[str, Any]:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": now}


def _owner(file: int) -> Mapping[str, Any]:
    """What the file says; nothing if it says nothing that can be read."""
    try:
        said = json.loads(os.pread(file, 4096, 0))
        return said if isinstance(said, dict) else {}
    except ValueError:
        return {}


def _runs_here(owner: Mapping[str, Any]) -> bool:
    """Whether the owner is another process of this host that is alive."""
    pid = owner.get("pid")
    if owner.get("host") != socket.gethostname() or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return pid != os.getpid()


def _in_use(directory: Path, owner: Mapping[str, Any]) -> str:
    who = "another process"
    if owner:
        who = "process {pid} on {host}, since {since}".format(
            **{"pid": "?", "host": "?", "since": "?", **owner}
        )
    return (
        f"output_dir {directory} is in use by {who}; wait until it is done, or choose "
        "another output_dir"
    )
