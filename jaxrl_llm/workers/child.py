"""The fork server and the workers that it forks: programs beside the one that starts
them.

The server imports little, starts no thread and sees no accelerator, whatever the
program has done that starts it: what it forks is clean, and there within milliseconds.
It waits for requests on a socket and ends when that does; then it ends whatever its
workers have started, too. A worker is a session of its own, so that Ctrl-C is for the
program alone, and it can be killed with all its children.
"""

import asyncio
import contextlib
import ctypes
import importlib
import inspect
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from jaxrl_llm.workers.messages import (
    dump_plain,
    load_function,
    load_plain,
    plain,
    show_error,
)

REQUEST = struct.Struct("<cQQd")
"""Kind, number, process, seconds."""
REPLY = struct.Struct("<Qq")
"""Number of the request, result."""
FORK, END = b"F", b"E"
"""Fork a worker with the two sockets sent along: its process. End a process, giving it
some seconds to go by itself: its exit status, or minus the signal that killed it."""

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def serve(control: socket.socket, preload: Sequence[str]) -> None:
    """Answers requests until `control` is closed.

    Args:
      preload: modules that are imported, and `module:function` that are called, once
        here rather than in every worker.
    """
    del sys.argv[1:]
    _ignore_what_ends_the_program()
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # what workers leave behind comes here
    for name in preload:
        with contextlib.suppress(Exception):  # a worker will say what is wrong
            module, _, function = name.partition(":")
            found = importlib.import_module(module)
            if function:
                getattr(found, function)()
    parent, workers = os.getppid(), set()
    while os.getppid() == parent:
        if not select.select([control], [], [], 1.0)[0]:
            _reap(workers)
            continue
        try:
            data, fds, _, _ = socket.recv_fds(control, REQUEST.size, 2)
        except ConnectionResetError:  # the parent was killed in the middle of a word
            break
        if len(data) < REQUEST.size:
            break
        kind, number, process, seconds = REQUEST.unpack(data)
        if kind == FORK:
            result = os.fork()
            if result == 0:
                control.close()
                _work(Connection(fds[0]), fds[1])
                raise SystemExit
            for fd in fds:
                os.close(fd)
            workers.add(result)
        else:
            result = _end(process, time.monotonic() + seconds)
            workers.discard(process)
        try:
            control.sendall(REPLY.pack(number, result))
        except OSError:
            break
    end = time.monotonic() + 1.0
    for worker in workers:
        _end(worker, end)
    _end_orphans()


def _end(process: int, deadline: float) -> int:
    """The status of a worker that has ended, by itself or, after a while, by force."""
    ended = os.WEXITED | os.WNOWAIT | os.WNOHANG
    try:
        while os.waitid(os.P_PID, process, ended) is None:
            if time.monotonic() >= deadline:
                break
            time.sleep(0.005)
        # Its group first: the number is nobody else's before it is waited for.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    except ChildProcessError:  # it was released before
        return 0


def _reap(workers: set[int]) -> None:
    """Waits for workers that went because nobody needs them any more."""
    for worker in list(workers):
        if os.waitid(os.P_PID, worker, os.WEXITED | os.WNOWAIT | os.WNOHANG):
            _end(worker, 0.0)
            workers.discard(worker)


def _end_orphans() -> None:
    """Kills what workers have left behind, until nothing is left."""
    path = f"/proc/self/task/{os.getpid()}/children"
    for _ in range(100):
        try:
            with open(path) as file:
                children = [int(pid) for pid in file.read().split()]
        except OSError:  # no Linux
            return
        if not children:
            return
        for pid in children:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def _ignore_what_ends_the_program() -> None:
    """Schedulers send it to all processes; the program decides what it means. Programs
    started from here have it as usual."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)


def _heed_what_ends_the_program() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):
            signal.signal(number, signal.SIG_DFL)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _work(connection: Connection, output: int) -> None:
    """A worker: is sent its setup and its function, then calls it as often as asked."""
    server = os.getppid()
    os.setsid()
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != server:
        raise SystemExit
    with contextlib.suppress(OSError):  # the first to go when memory is short
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    os.register_at_fork(after_in_child=_heed_what_ends_the_program)
    for fd in (1, 2):
        os.dup2(output, fd)
    os.close(output)
    how = {"buffering": 1, "errors": "backslashreplace", "closefd": False}
    sys.stdout, sys.stderr = open(1, "w", **how), open(2, "w", **how)
    try:
        setup = load_plain(connection.recv_bytes())
        sys.path[:] = setup["path"]
        if setup["memory_bytes"]:
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_AS, (setup["memory_bytes"],) * 2)
        payload = connection.recv_bytes()
        try:
            function = load_function(payload)
        except BaseException as error:  # noqa: BLE001 - imports run anything
            connection.send_bytes(dump_plain(["failed", show_error(error), ""]))
            return
        connection.send_bytes(dump_plain(["ready"]))
        called = _Caller(function)
        while True:
            arguments = connection.recv_bytes()
            answer = called(arguments, setup["output_bytes"])
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):  # it may be closed by now
                    stream.flush()
            connection.send_bytes(answer)
    except EOFError:  # nobody needs it any more
        return
    except OSError:  # the program is gone, or the function closed the way to it
        os._exit(0)


class _Caller:
    """Calls one function again and again, a coroutine function on one event loop."""

    def __init__(self, function: Callable[..., Any]):
        self._function = function
        self._loop: asyncio.AbstractEventLoop | None = None

    def __call__(self, arguments: bytes, most: int) -> bytes:
        """The answer: what it returned, or what it raised."""
        try:
            result = self._function(**load_function(arguments))
            if inspect.isawaitable(result):
                if self._loop is None:
                    self._loop = asyncio.new_event_loop()
                    asyncio.set_event_loop(self._loop)
                result = self._loop.run_until_complete(_await(result))
            answer = dump_plain(["returned", plain(result)])
        except BaseException as error:  # noqa: BLE001 - SystemExit is a failure as well
            return dump_plain(["raised", show_error(error), trace(error)])
        if len(answer) > most:
            cause = f"returned {len(answer)} bytes, more than the {most} allowed"
            return dump_plain(["refused", cause, ""])
        return answer


async def _await(awaitable: Any) -> Any:
    return await awaitable


def trace(error: BaseException) -> str:
    """Where an error came from, in the function and what it calls."""
    try:
        lines = traceback.format_tb(error.__traceback__, limit=-20)[1:]
    except BaseException:  # noqa: BLE001 - sources are somebody's too
        return ""
    return "".join(lines)[-4000:]
