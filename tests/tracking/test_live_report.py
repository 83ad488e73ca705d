"""The report of a run that goes on holds up nobody."""

import threading

import pytest

from jaxrl_llm.tracking import live_report
from jaxrl_llm.tracking.live_report import LiveReport


def test_nobody_waits_for_what_is_written_and_the_newest_is_written():
    started, go_on, written = threading.Semaphore(0), threading.Event(), []
    newest = 0

    def write():
        seen = newest
        started.release()
        go_on.wait()
        written.append(seen)

    with LiveReport(write, pytest.fail) as live:
        live.ask()
        started.acquire()
        for _ in range(3):
            newest += 1
            live.ask()  # returns though nothing is written yet
        assert written == []
        go_on.set()
        started.acquire()
    assert written == [0, 3]


def test_what_fails_is_told_once_and_stops_nothing():
    told, failed, written = [], threading.Semaphore(0), threading.Semaphore(0)
    outcomes = iter([OSError("no space left"), None])

    def write():
        if error := next(outcomes):
            failed.release()
            raise error
        written.release()

    live = LiveReport(write, told.append)
    with live:
        live.ask()
        failed.acquire()
        live.ask()
        written.acquire()
    live.ask()
    live.ask()
    assert told == ["note: the report is not written: no space left"]


def test_without_validations_it_is_written_now_and_then(monkeypatch):
    written = threading.Semaphore(0)
    with LiveReport(written.release, pytest.fail) as live:
        live.ask_if_old()
        written.acquire()
        monkeypatch.setattr(live, "ask", pytest.fail)
        live.ask_if_old()  # just written
        monkeypatch.undo()
        monkeypatch.setattr(live_report, "REFRESH_S", 0.0)
        live.ask_if_old()
        written.acquire()
