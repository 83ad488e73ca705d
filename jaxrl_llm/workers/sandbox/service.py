"""Programs run by a SandboxFusion service, or another that answers POST /run_code.

    {"code", "language": "python", "stdin", "run_timeout", "compile_timeout"}
    -> {"status": "Success" | "Failed" | "SandboxError", "message",
        "run_result": {"status": "Finished" | "Error" | "TimeLimitExceeded",
                       "return_code", "stdout", "stderr", "execution_time"}}

Tests run here, in a process of their own, and ask the program there: each question is
one request, in which the program is run from its beginning and asked again all that it
was asked before. So the service sees no test, and what it prints decides nothing but
the answers.

Source: https://bytedance.github.io/SandboxFusion/docs/api/run-code-run-code-post
"""

import base64
import contextlib
import dataclasses
import json
import secrets
import socket
import struct
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from importlib import resources
from typing import Any

from jaxrl_llm.workers.sandbox.jail import (
    Bounds,
    Enclosure,
    Jail,
    JailError,
    Part,
    Ran,
)
from jaxrl_llm.workers.sandbox.levels import SandboxError

_TRIES = 4
_SLOWER = 10.0
"""How many times as long tests may take here as the program there: most of it they wait
for the service, which is not the program's fault."""
_MOST_QUESTIONS = 500
"""A program of which tests ask more, such as one without end, has failed."""
_SIZE = struct.Struct("!Q")


class ServiceError(SandboxError):
    """A service does not answer as it should."""


def check(url: str) -> None:
    """Asks a service that was not asked before to run a program.

    Raises:
      ServiceError: it does not.
    """
    with _lock:
        if url in _checked:
            return
        word = secrets.token_hex(8)
        ran = _post(url, f"print(input() + {word!r})", "ran ", Bounds(), _in(30.0))
        if ran.stdout.decode(errors="replace").strip() != f"ran {word}":
            raise ServiceError(
                f"sandbox.url is {url}, where a program that should print 'ran {word}' "
                f"printed {ran.stdout[:200]!r}, {ran.why or ran.stderr[:200]!r}"
            )
        _checked.add(url)


_checked: set[str] = set()
_lock = threading.Lock()


def _in(seconds: float) -> float:
    return time.monotonic() + seconds


class TooSlow(TimeoutError):
    """A service had not answered when there was no more time to test a program."""


class AtService:
    """Runs programs there, and tests of them here."""

    def __init__(self, url: str, bounds: Bounds):
        self._url, self._bounds = url, bounds
        self._here = Jail(Enclosure(name="none", confined=False))

    def run(self, source: str, stdin: str, until: float) -> Ran:
        """Runs a program that reads and prints.

        Raises:
          ServiceError: the service does not answer as it should.
        """
        return _post(self._url, source, stdin, self._bounds, until)

    def test(self, source: str, tests: Mapping[str, Any], until: float) -> bytes:
        """What tests say of a program.

        Raises:
          ServiceError: the service does not answer as it should.
          TooSlow: it takes too long to say what they say.
        """
        ours, theirs = socket.socketpair()
        failed: list[Exception] = []
        asking = threading.Event()
        asked = threading.Thread(
            target=self._answer, args=(source, ours, until, failed, asking), daemon=True
        )
        asked.start()
        wall_s = _SLOWER * self._bounds.wall_s
        bounds = dataclasses.replace(self._bounds, wall_s=wall_s)
        part = Part(payload={"mode": "test", **tests}, channel=theirs, verdict=True)
        try:
            (ran,) = self._here.run([part], bounds, until)
            late = bool(ran.why) and asking.is_set()
        except JailError as error:
            raise SandboxError(f"tests cannot be run: {error}") from error
        finally:
            with contextlib.suppress(OSError):
                ours.shutdown(socket.SHUT_RDWR)
            asked.join()
        if failed:
            raise failed[0]
        if late:
            raise TooSlow(self._url)
        return ran.verdict

    def close(self) -> None:
        """Ends the process of tests."""
        self._here.close()

    def _answer(
        self,
        source: str,
        channel: socket.socket,
        until: float,
        failed: list[Exception],
        asking: threading.Event,
    ) -> None:
        """Answers the questions of tests until they ask no more. `asking` is set while
        the service is asked."""
        questions: list[str] = []
        try:
            with channel, channel.makefile("rwb") as file:
                while len(head := file.read(_SIZE.size)) == _SIZE.size:
                    question = file.read(_SIZE.unpack(head)[0])
                    questions.append(base64.b64encode(question).decode())
                    asking.set()
                    answer = self._ask(source, questions, until)
                    asking.clear()
                    file.write(_SIZE.pack(len(answer)) + answer)
                    file.flush()
                    if not answer:
                        return
        except ServiceError as error:
            failed.append(error)
        except OSError:  # the tests have ended
            pass

    def _ask(self, source: str, questions: list[str], until: float) -> bytes:
        if len(questions) > _MOST_QUESTIONS:
            return b""
        mark = secrets.token_hex(8)
        code = _ASKED.format(
            remote=resources.files(__package__).joinpath("remote.py").read_text(),
            source=source,
            mark=mark,
        )
        ran = _post(self._url, code, json.dumps(questions), self._bounds, until)
        for line in ran.stdout.decode(errors="replace").splitlines():
            if line.startswith(mark):
                with contextlib.suppress(ValueError):
                    return base64.b64decode(line.removeprefix(mark))
        return b""


_ASKED = """
import base64, json, sys, types
questions = [base64.b64decode(x) for x in json.loads(sys.stdin.read())]
remote = types.ModuleType("remote")
exec({remote!r}, vars(remote))
program, failed = types.ModuleType("program"), None
sys.modules["program"] = program
try:
    exec(compile({source!r}, "program.py", "exec"), vars(program))
except BaseException as error:
    failed = error
asked = remote.Program(vars(program), failed)
for question in questions:
    answer = asked.answer(question)
print("\\n" + {mark!r} + base64.b64encode(answer).decode(), flush=True)
"""


def _post(url: str, code: str, stdin: str, bounds: Bounds, until: float) -> Ran:
    """Asks a service to run a program; again if it has no place or no answer.

    Raises:
      ServiceError: it has none to the end.
    """
    request = {
        "code": code,
        "language": "python",
        "stdin": stdin,
        "run_timeout": bounds.wall_s,
        "compile_timeout": bounds.wall_s,
        "memory_limit_MB": bounds.memory_bytes // 2**20,
    }
    why = ""
    for turn in range(_TRIES):
        left = min(bounds.wall_s + 30.0, until - time.monotonic())
        if left <= 0:
            return Ran(why="took too long")
        if turn:
            time.sleep(min(2.0 ** (turn - 2), left))
        try:
            answer = _sent(f"{url.rstrip('/')}/run_code", request, left)
            if answer["status"] != "SandboxError":
                return _ran(answer, bounds)
            why = str(answer.get("message"))[:300]
        except urllib.error.HTTPError as error:
            why = f"HTTP {error.code} {error.reason}"
            if error.code < 500 and error.code != 429:
                break
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = f"{type(error).__name__}: {error}"
    raise ServiceError(f"sandbox.url is {url}, which does not run programs: {why}")


def _sent(url: str, request: Mapping[str, Any], limit_s: float) -> dict[str, Any]:
    data = json.dumps(request).encode()
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(
        urllib.request.Request(url, data, headers), timeout=limit_s
    ) as response:
        return json.load(response)


def _ran(answer: Mapping[str, Any], bounds: Bounds) -> Ran:
    result = answer["run_result"] or {}
    stdout = (result.get("stdout") or "").encode()
    ran = Ran(
        status=result.get("return_code"),
        stdout=stdout,
        stderr=(result.get("stderr") or "").encode(),
        cpu_s=result.get("execution_time") or 0.0,
    )
    if result.get("status") == "TimeLimitExceeded":
        ran.why = "took too long"
    elif len(stdout) > bounds.output_bytes:
        ran.why = f"printed more than {bounds.output_bytes} bytes"
    elif ran.status is None:
        ran.why = str(answer.get("message") or "did not run")[:300]
    return ran
