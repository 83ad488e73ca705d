"""A process in which programs run, from outside: what goes in and what comes out."""

import contextlib
import dataclasses
import fcntl
import json
import os
import select
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

_PACKAGE = __name__.rpartition(".")[0]
_SOURCES = ("confine", "remote", "inside")
_IMPORTS = """
abc argparse array ast bisect calendar cmath collections contextlib copy csv ctypes
dataclasses datetime decimal enum fractions functools hashlib heapq io itertools json
math numbers operator platform pprint queue random re statistics string struct textwrap
threading time traceback typing unicodedata unittest uuid zlib
""".split()
_START_S = 30.0
_PIECE = 2**16


class JailError(RuntimeError):
    """A jail does not come up; the message says why."""


class JailLost(JailError):
    """A jail's process has ended with the programs in it."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What one program may use."""

    cpu_s: float = 5.0
    """Seconds of processor time, rounded up to whole ones."""
    wall_s: float = 10.0
    """Seconds from its start."""
    memory_bytes: int = 2**30
    """Address space."""
    output_bytes: int = 2**23
    """Most bytes that it prints; with more it is ended."""


@dataclass(frozen=True, kw_only=True)
class Enclosure:
    """A way to start a jail."""

    name: str
    """How it is called in the run's log."""
    command: tuple[str, ...] = ()
    """What the interpreter is started by."""
    confined: bool = True
    """Whether its process and programs give up their rights."""
    landlock: bool = False
    """Whether it is no jail without Landlock."""
    user: int | None = None
    """The number of the user that it runs as; this process' own if not given."""
    threads: int | None = None
    """Most tasks of its user at a time, where only its own are counted."""
    packages: tuple[str, ...] = ()
    """Folders that programs can read and import from."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One process of what runs in a jail at a time."""

    payload: Mapping[str, Any]
    """See `inside`: its mode and what that takes."""
    stdin: str = ""
    channel: socket.socket | None = None
    """Its end of what it speaks to another part through."""
    verdict: bool = False
    """Whether it has a file for a verdict."""


@dataclass
class Ran:
    """What came of a part."""

    status: int | None = None
    """Its exit status, or minus the signal that ended it; None if it had to be."""
    why: str = ""
    """Why it had to be ended."""
    stdout: bytes = b""
    stderr: bytes = b""
    verdict: bytes = b""
    cpu_s: float = 0.0
    memory_bytes: int = 0
    """The most that was resident."""


def python() -> str:
    """The interpreter of jails: this one, without a virtual environment."""
    return os.path.realpath(sys.executable)


def python_library(packages: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """What Python needs to read, and of which folders it lists the names.

    Folders of installed packages are left out: data sets with their answers may be
    installed there.
    """
    folders = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib")}
    folders = {os.path.realpath(path) for path in folders}
    standard = os.path.dirname(os.path.realpath(os.__file__))
    readable = [
        str(path)
        for path in Path(standard).iterdir()
        if path.name not in ("site-packages", "dist-packages")
    ]
    readable += system_libraries()
    return [*readable, *packages, "/dev/null", "/dev/urandom"], [standard]


def system_libraries() -> list[str]:
    """The shared libraries that Python's own modules load: the system's folders of
    them, and those beside Python where that is elsewhere."""
    machine = sysconfig.get_config_var("MULTIARCH") or ""
    places = [f"/usr/lib/{machine}", f"/lib/{machine}"] if machine else []
    found = [p for p in [*places, "/usr/lib64", "/lib64"] if os.path.isdir(p)]
    own = Path(sysconfig.get_config_var("LIBDIR") or "/nonexistent").resolve()
    there = {Path(place).resolve() for place in found}
    besides = () if there & {own, *own.parents} else own.glob("*.so*")
    return [*found, "/etc/ld.so.cache", *map(str, besides)]


class Jail:
    """One process behind an enclosure, in which programs run one after another."""

    def __init__(self, enclosure: Enclosure):
        self.enclosure = enclosure
        self._popen: subprocess.Popen[bytes] | None = None
        self._numbers = 0
        self._closed = False

    def start(self) -> None:
        """Starts its process and waits until that is ready.

        Raises:
          JailError: it does not come up.
        """
        how = self.enclosure
        self._control, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
        command = [*how.command, python(), "-S", "-s", "-P", "-X", "utf8"]
        command += ["-c", _BEGIN, str(theirs.fileno())]
        user = {} if how.user is None else {"user": how.user, "group": how.user}
        with theirs:
            try:
                self._popen = subprocess.Popen(
                    command,
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    start_new_session=True,
                    cwd="/",
                    env={"PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "0", "HOME": "/tmp"}
                    | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
                    **({**user, "extra_groups": []} if user else {}),
                )
            except OSError as error:
                self._control.close()
                raise JailError(f"{command[0]}: {error.strerror}") from error
        with contextlib.suppress(OSError):  # the first to go when memory is short
            Path(f"/proc/{self._popen.pid}/oom_score_adj").write_text("1000")
        readable, listed = python_library(how.packages)
        sources = {
            f"{_PACKAGE}.{name}": resources.files(_PACKAGE)
            .joinpath(f"{name}.py")
            .read_text()
            for name in _SOURCES
        }
        setup = {
            "imports": _IMPORTS,
            "path": how.packages,
            "confined": how.confined,
            "landlock": how.landlock,
            "readable": readable,
            "listed": listed,
        }
        with contextlib.suppress(OSError):  # found out below
            self._control.send(
                json.dumps({"sources": sources, "setup": setup}).encode()
            )
        if self._closed or not self._receive(time.monotonic() + _START_S):
            said = self._stop()
            raise JailError(said or "its process did not get ready")

    def run(self, parts: Sequence[Part], bounds: Bounds, until: float) -> list[Ran]:
        """Runs processes side by side to the end of all, or until one bound is reached.

        Args:
          until: when all have to end, on the clock of `time.monotonic`, whatever else
            their bounds are.

        Returns:
          What came of each part.

        Raises:
          JailError: the jail does not come up; JailLost: it has ended in the middle.
        """
        if self._popen is None:
            self.start()
        with contextlib.ExitStack() as stack:
            deadline = min(until, time.monotonic() + bounds.wall_s)
            running = {}
            for part in parts:
                self._numbers += 1
                running[self._numbers] = stack.enter_context(
                    _Running(part, bounds, self.enclosure.threads)
                )
                self._begin(self._numbers, running[self._numbers])
            try:
                self._follow(running, bounds, deadline)
            except BaseException:
                self._stop()
                raise
            return [one.ran for one in running.values()]

    def close(self) -> None:
        """Ends its process with all programs, also while it starts or they run; it runs
        none any more."""
        self._closed = True
        self._stop()

    def _stop(self) -> str:
        """Ends its process with all programs. Returns what it said of itself."""
        if self._popen is None:
            return ""
        popen, self._popen = self._popen, None
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)  # it kills its programs, and ends
        self._control.close()
        try:
            popen.wait(2.0)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(popen.pid, 9)
            popen.wait()
        with popen.stderr as stream:
            os.set_blocking(stream.fileno(), False)
            lines = (stream.read(_PIECE) or b"").decode(errors="replace").splitlines()
        return lines[-1] if lines else ""

    def _begin(self, number: int, one: "_Running") -> None:
        request = json.dumps({"begin": number, "roles": list(one.roles)}).encode()
        try:
            socket.send_fds(self._control, [request], list(one.theirs))
        except OSError as error:
            raise JailLost(f"the jail has ended: {self._stop()}") from error
        one.begun()

    def _end(self, number: int) -> None:
        with contextlib.suppress(OSError):
            self._control.send(json.dumps({"end": number}).encode())

    def _receive(self, deadline: float) -> dict[str, Any] | None:
        """A word of the jail's process; None if it has ended or says none in time."""
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        while (left := deadline - time.monotonic()) > 0:
            if poll.poll(1000 * left):
                with contextlib.suppress(ConnectionResetError):
                    if data := self._control.recv(_PIECE):
                        return json.loads(data)
                return None
        return None

    def _follow(
        self, running: Mapping[int, "_Running"], bounds: Bounds, deadline: float
    ) -> None:
        """Reads what parts print until all have ended."""
        left, poll, by_fd = set(running), select.poll(), {}
        poll.register(self._control, select.POLLIN)
        for number, one in running.items():
            for fd in one.ours:
                poll.register(fd, select.POLLIN)
                by_fd[fd] = number
        ending = False
        while left:
            wait_s = deadline - time.monotonic()
            if wait_s <= 0 and ending:
                raise JailLost(f"a program could not be ended: {self._stop()}")
            if wait_s <= 0:
                for number in left:
                    running[number].ran.why = "took too long"
                    self._end(number)
                ending, deadline = True, time.monotonic() + 5.0
                continue
            for fd, _ in poll.poll(1000 * wait_s):
                if fd != self._control.fileno():
                    one = running[by_fd[fd]]
                    if not one.read(fd):
                        poll.unregister(fd)
                    if one.printed > bounds.output_bytes and not one.ran.why:
                        one.ran.why = f"printed more than {bounds.output_bytes} bytes"
                        self._end(by_fd[fd])
                    continue
                said = self._receive(time.monotonic() + 1.0)
                if said is None:
                    raise JailLost(f"the jail has ended: {self._stop()}")
                left.discard(said["ended"])
                running[said["ended"]].ended(said)


class _Running:
    """A part that runs: the files that it was given, and what it has said in them."""

    def __init__(self, part: Part, bounds: Bounds, threads: int | None):
        self.ran = Ran()
        self.printed = 0
        limits = dataclasses.asdict(bounds) | {"threads": threads}
        payload = json.dumps({**part.payload, "limits": limits}).encode()
        self._pieces: dict[int, list[bytes]] = {}
        self._names: dict[int, str] = {}
        self._given = [_memory(payload)]
        self.roles = ["stdin"]
        self._given.append(_memory(part.stdin.encode(errors="surrogatepass")))
        for role in ("stdout", "stderr", *["verdict"] * part.verdict):
            ours, theirs = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(ours, False)
            self._names[ours], self._pieces[ours] = role, []
            self._given.append(theirs)
            self.roles.append(role)
        if part.channel:
            self._given.append(os.dup(part.channel.fileno()))
            part.channel.close()
            self.roles.append("channel")

    @property
    def theirs(self) -> Sequence[int]:
        """What the process gets: its payload, then a file for each role."""
        return self._given

    @property
    def ours(self) -> Sequence[int]:
        """What is read."""
        return list(self._names)

    def __enter__(self) -> "_Running":
        return self

    def __exit__(self, *error: Any) -> None:
        self.begun()
        for fd in self._names:
            os.close(fd)

    def begun(self) -> None:
        """Closes what is the process' alone."""
        given, self._given = self._given, []
        for fd in given:
            os.close(fd)

    def read(self, fd: int) -> bool:
        """Takes a piece of what is printed. Returns whether there may be more."""
        try:
            piece = os.read(fd, _PIECE)
        except BlockingIOError:
            return True
        self.printed += len(piece)
        self._pieces[fd].append(piece)
        return bool(piece)

    def ended(self, said: Mapping[str, Any]) -> None:
        """Takes what is left to be read."""
        for fd, name in self._names.items():
            for _ in range(32):  # more than a pipe holds
                with contextlib.suppress(BlockingIOError):
                    if piece := os.read(fd, _PIECE):
                        self._pieces[fd].append(piece)
                        continue
                break
            setattr(self.ran, name, b"".join(self._pieces[fd]))
        if not self.ran.why:
            self.ran.status = said["status"]
        self.ran.cpu_s, self.ran.memory_bytes = said["cpu_s"], said["memory_bytes"]


def _memory(data: bytes) -> int:
    """A file in memory that cannot be changed any more."""
    fd = os.memfd_create("program", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


_BEGIN = f"""
import json, socket, sys, types
control = socket.socket(fileno=int(sys.argv[1]))
told = json.loads(control.recv(2**20))
parts = "{_PACKAGE}".split(".")
for end in range(1, len(parts) + 1):
    name = ".".join(parts[:end])
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = []
for name, source in told["sources"].items():
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(source, name, "exec"), vars(module))
module.serve(control, told["setup"])
"""
