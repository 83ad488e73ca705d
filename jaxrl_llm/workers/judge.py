"""Runs other people's verifiers in processes of their own.

Symbolic verifiers evaluate what the model wrote, and `9^{9^9}` neither ends nor lets go
of the interpreter's lock: no thread could stop it, only the end of a process can. So
this file is also the program of that process. It is run by its path and imports nothing
of this package; a process stays up for the next call.
"""

import atexit
import importlib.util
import json
import logging
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

Verifier = Callable[..., float]

_MOST_PROCESSES = 8
_START_S = 120.0
"""Longest time the imports of a verifier may take."""


class JudgeError(ValueError):
    """A verifier could not be run, or was given a reference it cannot read."""


def judge(verifier: str, jobs: Sequence[tuple], limit_s: float | int) -> list[float]:
    """The score of each job: `verifier(*job)`, several at a time.

    A reply that takes longer than `limit_s` seconds, or ends the process, scores 0.0:
    it is not an answer that can be checked.

    Raises:
      JudgeError: the verifier is not installed, does not start, or rejects a reference.
    """
    package = _PACKAGES[verifier]
    if importlib.util.find_spec(package) is None:
        raise JudgeError(f"{verifier} needs {package}: pip install 'jaxrl-llm[tasks]'")
    if not limit_s > 0:
        raise JudgeError(f"{verifier}: limit_s must be more than 0, got {limit_s}")
    scores = [0.0] * len(jobs)
    todo = list(range(len(jobs)))
    free = _take(verifier, min(len(jobs), os.cpu_count() or 1, _MOST_PROCESSES))
    busy: dict[Connection, tuple[_Process, int, float]] = {}
    try:
        while todo or busy:
            while todo and free:
                process, index = free.pop(), todo.pop(0)
                process.connection.send(jobs[index])
                busy[process.connection] = process, index, time.monotonic() + limit_s
            nearest = min(deadline for _, _, deadline in busy.values())
            ready = wait(list(busy), max(0.0, nearest - time.monotonic()))
            for connection, (process, index, deadline) in list(busy.items()):
                if connection in ready:
                    answer = process.receive()
                elif time.monotonic() >= deadline:
                    answer = None
                else:
                    continue
                del busy[connection]
                if isinstance(answer, str):
                    free.append(process)
                    raise JudgeError(answer)
                if answer is None:
                    process.kill()
                    process = _Process(verifier)
                    process.wait_until_ready()
                scores[index] = answer or 0.0
                free.append(process)
    finally:
        for process, _, _ in busy.values():
            process.kill()
        with _lock:
            _idle.setdefault(verifier, []).extend(free)
    return scores


class _Process:
    """One verifier, waiting for jobs."""

    def __init__(self, verifier: str) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        # -P: the files beside this one must not hide installed modules.
        # A session of its own: Ctrl-C is for the program that waits, not for this one.
        self._popen = subprocess.Popen(
            [sys.executable, "-P", __file__, verifier, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()
        self._verifier = verifier
        _alive.add(self)

    def wait_until_ready(self) -> None:
        if not self.connection.poll(_START_S) or self.receive() is None:
            self.kill()
            raise JudgeError(f"the process of {self._verifier} did not start")

    def receive(self) -> float | str | None:
        """A score, what the verifier complained of, or None: the process has ended."""
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            return None

    def alive(self) -> bool:
        return self._popen.poll() is None

    def kill(self) -> None:
        _alive.discard(self)
        self._popen.kill()
        self._popen.wait()
        self.connection.close()


_alive: set[_Process] = set()
_idle: dict[str, list[_Process]] = {}
_lock = threading.Lock()


def _take(verifier: str, count: int) -> list[_Process]:
    """`count` ready processes: those that wait since the last call, then new ones."""
    with _lock:
        idle = [process for process in _idle.pop(verifier, []) if process.alive()]
        old, _idle[verifier] = idle[:count], idle[count:]
    new = [_Process(verifier) for _ in range(count - len(old))]
    for process in new:
        process.wait_until_ready()
    return old + new


@atexit.register
def _end() -> None:
    for process in list(_alive):
        process.kill()


def _math() -> Verifier:
    from math_verify import parse, verify

    # It warns that its own time limits are off; ours is the one that counts.
    logging.getLogger("math_verify").setLevel(logging.ERROR)

    def score(reply: str, answer: str) -> float:
        gold = parse(answer, parsing_timeout=None)
        if not gold:
            raise ValueError(f"math-verify finds no expression in answer {answer!r}")
        found = parse(reply, parsing_timeout=None)
        return float(verify(gold, found, timeout_seconds=None))

    return score


def _reasoning_gym() -> Verifier:
    import reasoning_gym

    data_sets: dict[str, Any] = {}

    def score(reply: str, entry: dict[str, Any], task: str, params: dict) -> float:
        key = json.dumps([task, params], sort_keys=True, default=str)
        if key not in data_sets:
            data_sets[key] = reasoning_gym.create_dataset(task, **params)
        data_set = data_sets[key]
        try:
            return float(data_set.score_answer(reply, entry))
        except Exception:  # noqa: BLE001 - several scorers raise on a reply they cannot
            # parse, with any type. If the reference raises too, the entry is at fault.
            data_set.score_answer(entry["answer"], entry)
            return 0.0

    return score


_PACKAGES = {"math": "math_verify", "reasoning_gym": "reasoning_gym"}


def _serve(verifier: str, connection: Connection) -> None:
    score = {"math": _math, "reasoning_gym": _reasoning_gym}[verifier]()
    connection.send("ready")
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            answer: float | str = score(*job)
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller must know
            answer = f"{type(error).__name__}: {error}"
        connection.send(answer)


if __name__ == "__main__":
    _serve(sys.argv[1], Connection(int(sys.argv[2])))
