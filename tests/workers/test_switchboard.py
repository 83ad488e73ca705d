"""Calls of many workers, none of which waits for another."""

import threading

import pytest

from jaxrl_llm.workers.messages import dump_function
from jaxrl_llm.workers.pool import Inline, Thread
from jaxrl_llm.workers.process import (
    Failed,
    Limits,
    Process,
    Returned,
    WorkerError,
)
from jaxrl_llm.workers.switchboard import Switchboard, TimedOut

S = 30.0
"""No test waits so long for what comes."""


@pytest.fixture
def board():
    made = Switchboard()
    yield made
    made.close()


def twice(x):
    return 2 * x


def fails(x):
    raise KeyError(x)


def test_each_call_is_answered_by_itself(board):
    gate = threading.Event()
    slow = Thread(lambda: gate.wait(S), "slow")
    waiting = board.call(slow, {}, S)
    quick = Thread(twice, "quick")
    for x in range(3):
        assert board.call(quick, {"x": x}, S).result(S) == Returned(2 * x)
    assert not waiting.done()
    gate.set()
    assert waiting.result(S) == Returned(True)


def test_who_raises_and_who_takes_too_long_is_told_apart(board):
    failed = board.call(Thread(fails, "fails"), {"x": 1}, S).result(S)
    assert type(failed) is Failed and failed.cause == "raised KeyError: 1"
    gate = threading.Event()
    late = board.call(Thread(lambda: gate.wait(S), "late"), {}, 0.01).result(S)
    assert isinstance(late, TimedOut) and "0.01 s" in late.cause
    gate.set()


def test_what_is_inline_is_over_at_once(board):
    assert board.call(Inline(twice), {"x": 3}, S).result(0) == Returned(6)


def test_processes_start_side_by_side_and_one_that_cannot_says_why(board):
    good = [Process(dump_function(twice), f"f{i}", Limits()) for i in range(2)]
    bad = Process(b"no function", "bad", Limits())
    futures = [board.call(worker, {"x": 4}, S) for worker in (*good, bad)]
    assert [future.result(S) for future in futures[:2]] == [Returned(8)] * 2
    with pytest.raises(WorkerError, match="UnpicklingError"):
        futures[2].result(S)
    for worker in good:
        worker.close()


class Unable(Thread):
    """Cannot be called."""

    def begin(self, arguments, limit_s):
        raise OSError(24, "Too many open files")


def test_a_call_that_cannot_be_begun_fails_by_itself(board):
    gate = threading.Event()
    waiting = board.call(Thread(lambda: gate.wait(S), "slow"), {}, S)
    unable = Unable(twice, "unable")
    with pytest.raises(OSError, match="Too many open files"):
        board.call(unable, {"x": 1}, S).result(S)
    unable.close()
    assert board.call(Thread(twice, "quick"), {"x": 1}, S).result(S) == Returned(2)
    gate.set()
    assert waiting.result(S) == Returned(True)


def test_a_board_that_ends_by_itself_leaves_nobody_waiting(board, monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr(board, "_wait", lambda: 1 / 0)
    waiting = board.call(Thread(lambda: gate.wait(S), "slow"), {}, S)
    with pytest.raises(ZeroDivisionError):
        waiting.result(S)
    gate.set()
    with pytest.raises(RuntimeError, match="closed"):
        board.call(Thread(twice, "late"), {"x": 1}, S)


def test_a_closed_board_leaves_nobody_waiting():
    board, gate = Switchboard(), threading.Event()
    waiting = board.call(Thread(lambda: gate.wait(S), "slow"), {}, S)
    board.close()
    board.close()
    assert waiting.cancelled()
    gate.set()
    with pytest.raises(RuntimeError, match="closed"):
        board.call(Thread(twice, "late"), {"x": 1}, S)
