"""Other people's verifiers, on as many workers as there are processors.

Symbolic verifiers evaluate what the model wrote, and `9^{9^9}` neither ends nor lets go
of the interpreter's lock: only the end of a process can stop it.
"""

import importlib.util
import json
import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

from jaxrl_llm.workers import pool
from jaxrl_llm.workers.messages import Unjudged, dump_function
from jaxrl_llm.workers.process import (
    GIB,
    Failed,
    Limits,
    Process,
    Returned,
    WorkerError,
)

Verifier = Callable[[Sequence[Any]], float]

_MOST_PROCESSES = 8
_LIMITS = Limits(memory_bytes=4 * GIB)


class JudgeError(ValueError):
    """A verifier could not be run, or was given a reference it cannot read."""


def judge(verifier: str, jobs: Sequence[tuple], limit_s: float | int) -> list[float]:
    """The score of each job, several at a time.

    A reply that takes longer than `limit_s` seconds, or ends the process, scores 0.0:
    it is not an answer that can be checked. Replies that there was no time for, because
    what this is part of has its own limit (`pool.deadline`), are `Unjudged`.

    Args:
      verifier: a name of `_VERIFIERS`.

    Raises:
      JudgeError: the verifier is not installed, does not start, or rejects a reference.
    """
    package, function = _VERIFIERS[verifier]
    if importlib.util.find_spec(package) is None:
        raise JudgeError(f"{verifier} needs {package}: pip install 'jaxrl-llm[tasks]'")
    if not limit_s > 0:
        raise JudgeError(f"{verifier}: limit_s must be more than 0, got {limit_s}")
    workers = _take(verifier, min(len(jobs), os.cpu_count() or 1, _MOST_PROCESSES))
    try:
        asked = [{"job": job} for job in jobs]
        outcomes = pool.call_each(workers, asked, float(limit_s), pool.deadline())
    except WorkerError as error:
        raise JudgeError(f"{verifier} did not start: {error}") from error
    finally:
        with _lock:
            _idle.setdefault(verifier, []).extend(workers)
    scores = []
    for outcome in outcomes:
        match outcome:
            case Returned(value=value):
                scores.append(float(value))
            case Failed(cause=cause) if cause.startswith("raised "):
                raise JudgeError(cause.removeprefix("raised "))
            case Failed():
                scores.append(0.0)
            case None:
                scores.append(Unjudged())
    return scores


def release() -> None:
    """Ends the workers that wait for the next call."""
    with _lock:
        workers = [worker for idle in _idle.values() for worker in idle]
        _idle.clear()
    for worker in workers:
        worker.close()


_idle: dict[str, list[Process]] = {}
_lock = threading.Lock()


def _take(verifier: str, count: int) -> list[Process]:
    """`count` workers: those that wait since the last call, then new ones."""
    with _lock:
        idle = _idle.pop(verifier, [])
        taken, _idle[verifier] = idle[:count], idle[count:]
    package, function = _VERIFIERS[verifier]
    payload = dump_function(function)
    new = [
        Process(
            payload,
            verifier,
            _LIMITS,
            preload=(package, f"{__name__}:{function.__name__}_once"),
        )
        for _ in range(count - len(taken))
    ]
    for worker in new:
        worker.start()
    return taken + new


def _math(job: Sequence[Any]) -> float:
    """Whether a reply's expression equals the answer's."""
    from math_verify import parse, verify

    # It warns that its own time limits are off; ours is the one that counts.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    reply, answer = job
    gold = parse(answer, parsing_timeout=None)
    if not gold:
        raise ValueError(f"math-verify finds no expression in answer {answer!r}")
    try:
        found = parse(reply, parsing_timeout=None)
        return float(verify(gold, found, timeout_seconds=None))
    except Exception:  # noqa: BLE001 - memory, recursion: no answer that can be checked
        return 0.0


def _math_once() -> None:
    """Imports what the first expression needs."""
    _math(("$1$", "$1$"))


def _reasoning_gym(job: Sequence[Any]) -> float:
    """The score of a reply by its task."""
    reply, entry, task, params = job
    key = json.dumps([task, params], sort_keys=True, default=str)
    if key not in _data_sets:
        import reasoning_gym

        _data_sets[key] = reasoning_gym.create_dataset(task, **params)
    data_set = _data_sets[key]
    try:
        return float(data_set.score_answer(reply, entry))
    except Exception:  # noqa: BLE001 - several scorers raise on a reply they cannot
        # parse, with any type. If the reference raises too, the entry is at fault.
        data_set.score_answer(entry["answer"], entry)
        return 0.0


def _reasoning_gym_once() -> None:
    """The import is all."""


_data_sets: dict[str, Any] = {}

_VERIFIERS: dict[str, tuple[str, Verifier]] = {
    "math": ("math_verify", _math),
    "reasoning_gym": ("reasoning_gym", _reasoning_gym),
}
