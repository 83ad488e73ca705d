"""The process inside a jail, which forks one more for every program.

It imports what programs mostly want, gives up all rights but to read Python's library
(`confine`), and waits for programs. One that is forked gives up what else it needs not,
and runs. As it can start no process, write no file and signal nobody, nothing of it is
left when it has ended, and the next one finds the jail as it was.

This module runs inside the jail: standard library only. Two of its processes speak to
each other in frames (`remote`), to the outside in packets of JSON.
"""

import ast
import atexit
import builtins
import contextlib
import fcntl
import gc
import importlib
import io
import json
import linecache
import os
import random
import select
import signal
import socket
import struct
import sys
import threading
import traceback
import types
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

from jaxrl_llm.workers.sandbox import confine, remote

ROLES = ("stdin", "stdout", "stderr", "channel", "verdict")
"""What a program's process gets as its first files, in this order."""
_SIZE = struct.Struct("!Q")


def serve(control: socket.socket, setup: Mapping[str, Any]) -> None:
    """Forks programs until `control` is closed, then ends them all.

    Args:
      setup: `imports`, modules; `path`, more folders to import from; `confined`, and
        then `landlock` (whether it must be there), `readable` and `listed`.
    """
    # Its number is that of the process outside: too high to be waited for, or to be
    # closed in a program's process, where many files are open there.
    given, control = control, control.dup()
    given.close()
    for name in setup["imports"]:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    sys.path += setup["path"]
    if setup["confined"]:
        if setup["landlock"] or confine.landlock_version():
            confine.keep_to(setup["readable"], setup["listed"])
        if os.geteuid() == 0:
            confine.drop_capabilities()
        confine.no_new_privileges()
    gc.freeze()
    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    running: dict[int, int] = {}  # numbers by process
    control.send(json.dumps({"ready": True}).encode())
    while True:
        ready, _, _ = select.select([control, woken], [], [])
        if woken in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(woken, 4096)
            _report(control, running)
        if control in ready:
            data, fds, _, _ = socket.recv_fds(control, 2**16, 8)
            if not data:
                break
            request = json.loads(data)
            if "end" in request:
                _kill([p for p, n in running.items() if n == request["end"]])
                continue
            parent, process = os.getpid(), os.fork()
            if process == 0:
                confine.end_with(parent)
                try:
                    _begin(request["roles"], fds, setup["confined"])
                finally:
                    os._exit(70)
            running[process] = request["begin"]
            for fd in fds:
                os.close(fd)
    _kill(running)


def _report(control: socket.socket, running: dict[int, int]) -> None:
    """Says which programs have ended, and how."""
    ended = os.WEXITED | os.WNOWAIT | os.WNOHANG
    while running and (found := os.waitid(os.P_ALL, 0, ended)):
        process = found.si_pid
        _kill([process])  # and what it has left behind, where it could
        _, status, used = os.wait4(process, 0)
        if process in running:
            said = {
                "ended": running.pop(process),
                "status": os.waitstatus_to_exitcode(status),
                "cpu_s": used.ru_utime + used.ru_stime,
                "memory_bytes": used.ru_maxrss * 1024,
            }
            with contextlib.suppress(OSError):
                control.send(json.dumps(said).encode())


def _kill(processes: Sequence[int]) -> None:
    for process in list(processes):
        for end in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                end(process, signal.SIGKILL)


def _begin(roles: Sequence[str], fds: Sequence[int], confined: bool) -> None:
    """The forked process: takes its files, reads what to run, gives up rights, runs."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in fds]
    payload = json.loads(_whole(high[0]))
    os.closerange(0, 100)
    for role, fd in zip(roles, high[1:], strict=True):
        os.dup2(fd, ROLES.index(role))
    os.closerange(100, 4096)
    how = {"encoding": "utf-8", "errors": "backslashreplace", "closefd": False}
    sys.stdin = sys.__stdin__ = open(0, **{**how, "errors": "strict"})
    sys.stdout = sys.__stdout__ = open(1, "w", **how)
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, **how)
    sys.argv = ["program.py"]
    random.seed(0)  # programs that draw are the same each time
    confine.bound(payload["limits"])
    if confined:
        confine.filter_calls()
    code = 1
    try:
        code = _MODES[payload["mode"]](payload)
    except SystemExit as error:
        code = _exit_code(error)
    except BaseException:  # noqa: BLE001 - a program ends however it likes
        _show_error()
    finally:
        with contextlib.suppress(BaseException):
            threading._shutdown()  # as Python does: others' threads end first
            atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(BaseException):
                stream.flush()
        os._exit(code)


def _whole(fd: int) -> bytes:
    parts, at = [], 0
    while part := os.pread(fd, 2**20, at):
        parts.append(part)
        at += len(part)
    return b"".join(parts)


def _exit_code(error: SystemExit) -> int:
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code & 0xFF
    with contextlib.suppress(Exception):
        print(error.code, file=sys.stderr)
    return 1


def _show_error() -> None:
    """Prints an error as Python does, without the lines of this module."""
    kind, error, trace = sys.exc_info()
    while trace and trace.tb_frame.f_code.co_filename == __name__:
        trace = trace.tb_next
    with contextlib.suppress(BaseException):
        traceback.print_exception(kind, error, trace, limit=-20)


def _module(name: str, source: str) -> dict[str, Any]:
    """Runs a program as a module, whose names it returns."""
    module = types.ModuleType(name)
    module.__file__ = "program.py"
    sys.modules[name] = module
    lines = source.splitlines(keepends=True)
    linecache.cache["program.py"] = (len(source), None, lines, "program.py")
    exec(compile(source, "program.py", "exec"), vars(module))
    return vars(module)


def _run(payload: Mapping[str, Any]) -> int:
    """A program that reads and prints."""
    _module("__main__", payload["source"])
    return 0


def _serve_program(payload: Mapping[str, Any]) -> int:
    """A program that tests in another process call."""
    failed = None
    try:
        names = _module("program", payload["source"])
    except BaseException as error:  # noqa: BLE001 - told to whoever asks first
        names, failed = {}, error
    program = remote.Program(names, failed)
    with _channel() as channel:
        while question := _read(channel):
            _write(channel, program.answer(question))
    return 0


def _test(payload: Mapping[str, Any]) -> int:
    """Tests of a program in another process.

    The verdict goes out with the word that was sent in, and through a file that the
    program's process does not have.
    """
    with _channel() as channel:
        tests = remote.Tests(lambda question: _ask(channel, question))
        said = _verdict(tests, payload)
    os.write(ROLES.index("verdict"), json.dumps(said | payload["word"]).encode())
    return 0


def _verdict(tests: remote.Tests, payload: Mapping[str, Any]) -> dict[str, Any]:
    """For each test whether it passed, why the first did not, and what is wrong with
    the tests themselves."""
    names = _Names(tests, payload["programs"])
    passed: list[bool] = []
    said = {"passed": passed, "why": None, "broken": None}
    try:
        codes = [compile(text, "tests", "exec") for text in payload["tests"]]
        exec(compile(payload["setup"], "tests", "exec"), names)
    except BaseException as error:  # noqa: BLE001 - tests are somebody's too
        return said | {"why" if tests.count else "broken": _text(error)}
    names.leave_to_the_program(_builtins_tested(payload))
    for code in codes:
        try:
            exec(code, names)
            passed.append(True)
        except BaseException as error:  # noqa: BLE001 - whatever it is, it has failed
            judged = isinstance(error, AssertionError) or tests.count
            if isinstance(error, remote.NotPlain) or not judged:
                return said | {"broken": _text(error)}
            said["why"] = said["why"] or _text(error)
            passed.append(False)
            if payload["first_only"] or isinstance(error, remote.Unanswered):
                break
    return said


class _Names(dict):
    """The names of tests; those that they do not define are the program's.

    Args:
      programs: what the program calls some of them.
    """

    def __init__(self, tests: remote.Tests, programs: Mapping[str, str]):
        super().__init__(__name__="tests", __builtins__=builtins)
        self._tests, self._programs = tests, programs
        self._tested: Set[str] = frozenset()

    def leave_to_the_program(self, builtins_tested: Set[str]) -> None:
        """Forgets what stands in the set-up only to be completed, as the beginning of a
        function does. `builtins_tested` are the program's where it defines them."""
        for name in self._programs:
            self.pop(name, None)
        self._tested = builtins_tested

    def __missing__(self, name: str) -> Any:
        if name in self._tested:
            try:
                self[name] = found = self._tests.name(name)
                return found
            except NameError:
                raise KeyError(name) from None
        if hasattr(builtins, name) or name.startswith("__"):
            raise KeyError(name)
        found = self._tests.name(self._programs.get(name, name))
        if isinstance(found, remote.Remote):
            self[name] = found
        return found


def _builtins_tested(payload: Mapping[str, Any]) -> Set[str]:
    """Built-in functions that tests call and that the program may have defined anew.

    None if they use any other name of the program's: then they mean Python's own, and
    a program that defines `all` or `abs` passes no test by that.
    """
    used, defined = set(), set()
    for node in ast.walk(ast.parse("\n".join([payload["setup"], *payload["tests"]]))):
        match node:
            case ast.Name(id=name, ctx=ast.Load()):
                used.add(name)
            case ast.alias(name=name, asname=other):
                defined.add(other or name.partition(".")[0])
            case ast.Name(id=name) | ast.arg(arg=name):
                defined.add(name)
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                defined.add(name)
            case ast.AsyncFunctionDef(name=name) | ast.ExceptHandler(name=name):
                defined.add(name)
    used -= defined
    if payload["programs"] or not all(hasattr(builtins, name) for name in used):
        return frozenset()
    return {
        name
        for name in used
        if isinstance(getattr(builtins, name), types.BuiltinFunctionType)
    }


def _text(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}".removesuffix(": ")[:500]
    except Exception:  # noqa: BLE001 - its text may be made by anybody
        return type(error).__name__


def _channel() -> io.BufferedRWPair:
    fd = ROLES.index("channel")
    return io.BufferedRWPair(*(io.FileIO(fd, mode, closefd=False) for mode in "rw"))


def _ask(channel: Any, question: bytes) -> bytes:
    try:
        _write(channel, question)
        answer = _read(channel)
    except OSError:
        answer = b""
    if not answer:
        raise remote.Unanswered("the program ended")
    return answer


def _write(channel: Any, data: bytes) -> None:
    channel.write(_SIZE.pack(len(data)) + data)
    channel.flush()


def _read(channel: Any) -> bytes:
    head = channel.read(_SIZE.size)
    return channel.read(_SIZE.unpack(head)[0]) if len(head) == _SIZE.size else b""


_MODES: dict[str, Callable[[Mapping[str, Any]], int]] = {
    "run": _run,
    "serve": _serve_program,
    "test": _test,
}
