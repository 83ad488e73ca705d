"""A function in a process of its own, which lasts and can be killed."""

import atexit
import contextlib
import itertools
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

from jaxrl_llm.workers import child
from jaxrl_llm.workers.messages import dump_plain, load_plain

Arguments = Mapping[str, Any]
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a worker may use."""

    start_s: float = 120.0
    """Seconds for what its function imports."""
    memory_bytes: int | None = 8 * GIB
    """Bytes of address space; None for all there is."""
    output_bytes: int = GIB // 4
    """Most bytes of one result."""
    printed_bytes: int = 2**16
    """Most bytes that are printed in one call. The rest is left out."""


@dataclass(frozen=True)
class Returned:
    """A call came to its end."""

    value: Any
    """Plain data, see `messages.plain`."""


@dataclass(frozen=True)
class Failed:
    """A call did not."""

    cause: str
    """What the function did, as in "raised KeyError: 'x'"."""
    trace: str = ""
    """Where it raised."""


Outcome = Returned | Failed


class WorkerError(ValueError):
    """A worker could not be started; the message says why."""


class Process:
    """A function in a process of its own, in that process' main thread.

    Args:
      payload: the function, by `messages.dump_function`.
      name: of the function, where what it prints is cut off.
      preload: modules that are imported, and `module:function` that are called, once
        for all workers that name the same.
    """

    def __init__(
        self, payload: bytes, name: str, limits: Limits, preload: Sequence[str] = ()
    ):
        self._payload, self._name, self.limits = payload, name, limits
        self._server_key = tuple(preload)
        self._connection: Connection | None = None
        self._output: socket.socket | None = None
        self._server: _Server | None = None
        self._ready = False

    def start(self) -> None:
        """Starts the process, without waiting for it to be ready."""
        self._ready, self._printed = False, 0
        self._connection, theirs = Pipe()
        ours, output = socket.socketpair()
        self._server = _Server.of(self._server_key)
        with theirs, output:
            self._pid = self._server.fork([theirs.fileno(), output.fileno()])
        self._server.workers.add(self)
        ours.setblocking(False)
        self._output = ours
        setup = {
            "path": sys.path,
            "memory_bytes": self.limits.memory_bytes,
            "output_bytes": self.limits.output_bytes,
        }
        with contextlib.suppress(BrokenPipeError):  # found out when it is waited for
            self._connection.send_bytes(dump_plain(setup))
            self._connection.send_bytes(self._payload)

    @property
    def ready(self) -> bool:
        """Whether it has its function, as far as `poll` has found out."""
        return self._ready

    def wait_until_ready(self) -> None:
        """Waits until the process has its function, or says why not.

        Raises:
          WorkerError: it has not.
        """
        if self._connection is None:
            self.start()
        deadline = time.monotonic() + self.limits.start_s
        while not self._ready:
            wait(self.connections, max(0.0, deadline - time.monotonic()))
            found = self._receive()
            if isinstance(found, Failed):
                self.close()
                raise WorkerError(found.cause)
            if found is None and time.monotonic() >= deadline:
                self.close()
                raise WorkerError(
                    f"its imports took longer than {self.limits.start_s:g} s"
                )

    def begin(self, arguments: Arguments, limit_s: float) -> None:
        """Begins a call, once the process is ready.

        Raises:
          WorkerError: it does not get ready.
        """
        self.wait_until_ready()
        if self._connection.poll():  # nobody asked: it has ended meanwhile
            cause = _ended(self._end(0.5))
            _print(f"[between calls, {self._name} {cause}; it is started anew]\n")
            self.wait_until_ready()
        self._printed = 0
        data = pickle.dumps(dict(arguments), pickle.HIGHEST_PROTOCOL)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._connection.send_bytes(data)

    @property
    def connections(self) -> list[Any]:
        """What the answer and what is printed are read from."""
        return [c for c in (self._connection, self._output) if c is not None]

    def poll(self) -> Outcome | None:
        """What came of the call, if it is over."""
        found = self._receive()
        if found is None or self._connection is None:
            return found
        self._relay()
        return found

    def abandon(self, *, restart: bool) -> None:
        """Kills the process in its call."""
        self._end(0.0)
        if restart:
            with contextlib.suppress(WorkerError):
                self.start()

    def close(self) -> None:
        """Lets the process end as programs do, or kills it if it does not."""
        self._end(2.0)

    def release(self) -> None:
        """Lets the process end when it will; waits for nothing."""
        for connection in self.connections:
            connection.close()
        self._connection = self._output = None
        if self._server:
            self._server.workers.discard(self)

    def _end(self, grace_s: float) -> int:
        if self._connection is None:
            return 0
        self._connection.close()
        self._connection = None
        self._server.workers.discard(self)
        status = self._server.end(self._pid, grace_s)
        self._relay()
        if self._output:
            self._output.close()
            self._output = None
        return status

    def _receive(self) -> Outcome | None:
        """An answer of the process, if there is one by now."""
        self._relay()
        if not self._connection.poll():
            return None
        try:
            data = self._connection.recv_bytes(self.limits.output_bytes + 2**16)
            kind, *rest = load_plain(data)
        except (EOFError, ConnectionResetError):
            return Failed(_ended(self._end(0.5)))
        except (OSError, pickle.UnpicklingError, ValueError, TypeError) as error:
            self._end(0.0)
            return Failed(f"answered what cannot be read: {error}")
        match kind:
            case "ready":
                self._ready = True
                return None
            case "returned":
                return Returned(rest[0])
            case "raised":
                return Failed(f"raised {rest[0]}", rest[1])
            case _:
                return Failed(*rest)

    def _relay(self) -> None:
        """Prints what the process has printed, up to a limit."""
        for _ in range(16):  # more than fits into the socket, but not for ever
            if self._output is None:
                return
            try:
                data = self._output.recv(2**16)
            except (BlockingIOError, ConnectionResetError):
                return
            if not data:  # closed there
                self._output.close()
                self._output = None
                return
            most = self.limits.printed_bytes
            room, before = most - self._printed, self._printed
            self._printed += len(data)
            if room > 0:
                _print(data[:room].decode(errors="backslashreplace"))
            if before <= most < self._printed:
                _print(f"\n[{self._name} prints more; it is left out]\n")


def _print(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.write(text)
        sys.stdout.flush()


def _ended(status: int) -> str:
    if status >= 0:
        return f"ended its process, with exit status {status}"
    name = signal.Signals(-status).name
    why = ", perhaps for want of memory" if name == "SIGKILL" else ""
    return f"ended its process: killed by {name}{why}"


class _Server:
    """The fork server of workers that want the same modules imported beforehand."""

    _all: "dict[tuple[str, ...], _Server]" = {}
    _lock = threading.RLock()

    @classmethod
    def of(cls, preload: tuple[str, ...]) -> "_Server":
        with cls._lock:
            known = cls._all.get(preload)
            if known is None or not known.alive():
                known = cls._all[preload] = cls(preload)
            return known

    def __init__(self, preload: tuple[str, ...]):
        if not hasattr(os, "fork"):
            raise WorkerError("this system cannot fork processes")
        self._owner, self._numbers = os.getpid(), itertools.count()
        self.workers: set[Process] = set()
        self._control, theirs = socket.socketpair()
        # -c, with this program's own path: the package may come from anywhere.
        program = (
            "import json, socket, sys"
            "; fd, path, preload = map(json.loads, sys.argv[1:]); sys.path[:] = path"
            "; from jaxrl_llm.workers import child"
            "; child.serve(socket.socket(fileno=fd), preload)"
        )
        given = (theirs.fileno(), sys.path, preload)
        with theirs:
            self._popen = subprocess.Popen(
                [sys.executable, "-c", program, *map(json.dumps, given)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
                # Accelerators are the program's own.
                env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"},
            )

    def alive(self) -> bool:
        """Whether it can be asked, by the process that started it."""
        return self._owner == os.getpid() and self._popen.poll() is None

    def fork(self, fds: Sequence[int]) -> int:
        """The process of a new worker, which gets these sockets."""
        try:
            return self._ask(child.FORK, 0, 0.0, fds)
        except OSError as error:
            raise WorkerError(f"the fork server has ended: {error}") from error

    def end(self, process: int, grace_s: float) -> int:
        """Ends a worker. Returns its exit status, or minus the signal it died of."""
        if self._owner != os.getpid():
            return 0
        try:
            return self._ask(child.END, process, grace_s, ())
        except OSError:  # its workers end with it
            return -signal.SIGKILL

    def _ask(
        self, kind: bytes, process: int, seconds: float, fds: Sequence[int]
    ) -> int:
        with self._lock:
            number = next(self._numbers)
            request = child.REQUEST.pack(kind, number, process, seconds)
            socket.send_fds(self._control, [request], fds)
            while True:
                reply = b""
                while len(reply) < child.REPLY.size:
                    more = self._control.recv(child.REPLY.size - len(reply))
                    if not more:
                        raise OSError("no answer")
                    reply += more
                answered, result = child.REPLY.unpack(reply)
                if answered == number:  # not of a question that nobody waited for
                    return result

    def close(self) -> None:
        """Ends the server and all its workers."""
        if self._owner != os.getpid():
            return
        self._control.close()
        try:
            self._popen.wait(5.0)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()


def close_idle() -> None:
    """Ends the fork servers that have no worker."""
    _close(lambda server: not server.workers)


@atexit.register
def close_all() -> None:
    """Ends all fork servers, with all workers."""
    _close(lambda server: True)


def _close(which: Callable[[_Server], bool]) -> None:
    with _Server._lock:
        all_of_them = _Server._all
        chosen = [key for key, server in all_of_them.items() if which(server)]
        servers = [all_of_them.pop(key) for key in chosen]
    for server in servers:
        server.close()
