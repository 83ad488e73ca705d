"""What a signal does to a block that listens for it."""

import os
import signal
import subprocess
import sys
import threading

import pytest
import waiting

from jaxrl_llm import cli as launch
from jaxrl_llm.tracking.result import Result
from jaxrl_llm.training import build, loop
from jaxrl_llm.training.stopping import Stopped, asked_to_stop

FOR_EVER = threading.Event().wait


def send(number):
    os.kill(os.getpid(), number)


def test_nothing_stops_what_nobody_asked_to():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with asked_to_stop(grace_s=60) as stops:
        assert not stops()
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


def test_the_first_ctrl_c_is_acknowledged_and_the_second_interrupts():
    said = []
    with (
        pytest.raises(KeyboardInterrupt),
        asked_to_stop(said.append, 60) as stops,
    ):
        send(signal.SIGINT)
        waiting.until(stops)
        waiting.until(lambda: len(said) == 1)
        assert said == ["stopping after this step; Ctrl-C again to stop now"]
        send(signal.SIGINT)
        FOR_EVER()
    assert said[1] == "stopping now"


def test_sigterm_waits_for_the_step_only_so_long():
    said = []
    with pytest.raises(Stopped, match="within 0.05 s") as stopped:
        with asked_to_stop(said.append, 0.05):
            send(signal.SIGTERM)
            FOR_EVER()
    assert stopped.value.code == 75
    assert said == ["SIGTERM: stopping after this step"]


def test_saving_is_not_given_up():
    with asked_to_stop(lambda text: None, 1) as stops:
        assert not stops()  # which may start JAX
        send(signal.SIGTERM)
        waiting.until(stops)
        threading.Event().wait(1.1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_before_the_first_step_there_is_nothing_to_wait_for(number):
    with pytest.raises(Stopped), asked_to_stop(lambda text: None):
        send(number)
        FOR_EVER()


def test_so_many_hours_are_a_bound_too():
    said = []
    with asked_to_stop(said.append, 60, max_hours=1e-9) as stops:
        assert stops() and stops()
    assert said == ["stopping: trainer.max_hours 1e-09 are over"]
    with asked_to_stop(said.append, 60, max_hours=1) as stops:
        assert not stops()


def test_another_thread_leaves_signals_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def listen():
        with asked_to_stop() as stops:
            seen.append((stops(), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


# A mutex that is locked twice: no signal interrupts it, as none does a compiler.
STUCK = """
import ctypes, os, signal
from jaxrl_llm.training.stopping import asked_to_stop
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
with asked_to_stop(lambda text: print(text, flush=True), 0.01):
    os.kill(os.getpid(), signal.SIGTERM)
    libc.pthread_mutex_lock(mutex), libc.pthread_mutex_lock(mutex)
"""


def test_a_process_that_does_not_answer_is_ended():
    done = subprocess.run(
        [sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 75, done.stderr
    assert "does not answer and is ended" in done.stdout


@pytest.fixture
def train(monkeypatch, tmp_path):
    """The exit status of `jaxrl train` if the run does something."""
    path = tmp_path / "config.yaml"
    path.write_text(
        "output_dir: run\nmodel: {path: m}\ndata: {train: {path: x.jsonl}}\n"
        "reward: {functions: [{name: exact}]}\ntrainer: {total_training_steps: 1}\n"
    )
    monkeypatch.setattr(build, "build", lambda config: None)

    def status(run):
        monkeypatch.setattr(loop, "run", run)
        return launch.main(["train", str(path)])

    return status


def raising(error):
    def run(job):
        raise error

    return run


def test_the_exit_status_says_how_a_run_ended(train, tmp_path, capsys):
    assert train(lambda job: Result(tmp_path)) == 0
    assert train(lambda job: Result(tmp_path, stopped=True)) == 75
    assert train(raising(Stopped("given up"))) == 75
    assert "given up" in capsys.readouterr().err
    assert train(raising(KeyboardInterrupt())) == 130
    assert train(raising(ValueError("no"))) == 2
    with pytest.raises(TypeError):
        train(raising(TypeError("a bug")))
