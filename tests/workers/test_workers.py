import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time

import jax.numpy as jnp
import pytest
from waiting import until

from jaxrl_llm.workers import messages
from jaxrl_llm.workers.messages import NotPortable, Opaque, dump_function
from jaxrl_llm.workers.pool import Inline, Thread, call, call_each
from jaxrl_llm.workers.process import Failed, Limits, Process, Returned, close_idle

ROOT = pathlib.Path(__file__).parents[2]
PATIENT = 300.0


@pytest.fixture
def start():
    """Makes workers, and ends them after the test."""
    workers = []

    def made(function, **limits):
        worker = Process(dump_function(function), "it", Limits(**limits))
        workers.append(worker)
        return worker

    yield made
    for worker in workers:
        worker.close()


def ask(worker, limit_s=PATIENT, **arguments):
    (outcome,) = call([(worker, arguments)], limit_s)
    return outcome


def gone(pid):
    """Whether a process has ended; one that nobody has waited for has, too."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except OSError:
        return True


def misbehaves(how):
    if how == "exit":
        sys.exit(3)
    if how == "_exit":
        os._exit(3)
    if how == "abort":
        os.abort()
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "memory":
        bytearray(2**40)
    if how == "recursion":
        misbehaves(how)
    if how == "regex":
        re.match(r"(a+)+$", "a" * 60 + "b")
    if how == "sleep":
        time.sleep(10**6)
    if how == "much":
        return "x" * 10**6
    if how == "text":

        class Silent(Exception):
            def __str__(self):
                raise RuntimeError

        raise Silent
    return os.getpid()


@pytest.mark.parametrize(
    "how, cause",
    [
        ("exit", "raised SystemExit: 3"),
        ("_exit", "ended its process, with exit status 3"),
        ("abort", "ended its process: killed by SIGABRT"),
        ("kill", "killed by SIGKILL, perhaps for want of memory"),
        ("memory", "raised MemoryError"),
        ("recursion", "raised RecursionError"),
        ("regex", "did not finish within 0.3 s"),
        ("sleep", "did not finish within 0.3 s"),
        ("much", "returned 1000.* bytes, more than the 500000 allowed"),
        ("text", "raised Silent: <its text cannot be made: RuntimeError>"),
    ],
)
def test_whatever_a_function_does_ends_and_is_named(how, cause, start):
    worker = start(misbehaves, output_bytes=500_000, memory_bytes=2**36)
    limit_s = 0.3 if "finish" in cause else PATIENT
    outcome = ask(worker, limit_s, how=how)
    assert isinstance(outcome, Failed)
    assert re.search(cause, outcome.cause)
    assert isinstance(ask(worker, how=""), Returned)  # it goes on


def test_a_worker_lasts_and_keeps_what_its_function_keeps(start):
    seen = []

    def remember(x):
        seen.append(x)
        return [
            os.getpid(),
            threading.current_thread() is threading.main_thread(),
            seen,
        ]

    worker = start(remember)
    first, second = ask(worker, x=1).value, ask(worker, x=2).value
    assert first[0] == second[0] != os.getpid()
    assert first[1]
    assert second[2] == [1, 2]
    assert seen == []


def test_what_hangs_is_killed_with_its_children_and_started_anew(start, tmp_path):
    path = str(tmp_path / "pids")

    def hangs(for_ever):
        if not for_ever:
            return "here"
        child = subprocess.Popen(["sleep", "1000"])
        with open(path, "w") as file:
            file.write(f"{os.getpid()} {child.pid}")
        child.wait()

    worker = start(hangs)
    assert ask(worker, for_ever=False) == Returned("here")
    assert isinstance(ask(worker, 1.0, for_ever=True), Failed)
    pids = pathlib.Path(path).read_text().split()
    until(lambda: all(gone(pid) for pid in pids))
    assert ask(worker, for_ever=False) == Returned("here")


def test_what_ends_between_calls_is_started_anew_and_that_is_said(start, capsys):
    worker = start(os.getpid)
    pid = ask(worker).value
    os.kill(pid, signal.SIGKILL)
    until(lambda: gone(pid))
    assert isinstance(ask(worker), Returned)
    shown = capsys.readouterr().out
    assert "between calls, it ended its process: killed by SIGKILL" in shown


def test_what_is_printed_is_shown_up_to_a_limit(start, capsys):
    def prints(count):
        print("x" * count)

    worker = start(prints, printed_bytes=1000)
    ask(worker, count=10)
    assert capsys.readouterr().out == "x" * 10 + "\n"
    ask(worker, count=10**6)
    shown = capsys.readouterr().out
    assert shown == "x" * 1000 + "\n[it prints more; it is left out]\n"


def test_a_worker_sees_no_accelerator(start):
    def environment():
        return [os.environ.get(k) for k in ("CUDA_VISIBLE_DEVICES", "JAX_PLATFORMS")]

    assert ask(start(environment)) == Returned(["", "cpu"])


def test_what_cannot_be_sent_is_said():
    lock, array = threading.Lock(), jnp.zeros(2)
    with pytest.raises(NotPortable, match="cannot be pickled.*lock"):
        dump_function(lambda: lock)
    with pytest.raises(NotPortable, match="holds a jaxlib.*Array.* on a device"):
        dump_function(lambda: array)


def test_answers_are_plain_data_whoever_makes_them():
    class Odd:
        def __repr__(self):
            raise ValueError

    found = messages.plain([1.5, (True, None), {"a": b"b"}, jnp.ones(2), Odd()])
    assert found[:4] == [1.5, [True, None], {"a": b"b"}, [1.0, 1.0]]
    assert isinstance(found[4], Opaque)
    assert messages.load_plain(messages.dump_plain(found))[:4] == found[:4]
    import pickle

    with pytest.raises(pickle.UnpicklingError, match="posix.system is no plain data"):
        messages.load_plain(pickle.dumps(os.system))


def test_few_slow_jobs_do_not_take_the_time_of_many_quick_ones(start):
    def sleeps(job):
        time.sleep(1000 if job == "slow" else 0)
        return job

    jobs = [{"job": "slow"}] * 2 + [{"job": i} for i in range(20)]
    worker = start(sleeps)
    worker.wait_until_ready()
    found = call_each([worker], jobs, 300.0, time.monotonic() + 3.0)
    assert found[:2] == [None] * 2
    assert found[2:] == [Returned(i) for i in range(20)]


def test_each_job_has_a_limit_of_its_own(start):
    def sleeps(job):
        time.sleep(1000 if job == "slow" else 0)
        return job

    found = call_each([start(sleeps)], [{"job": "slow"}, {"job": 1}], 0.3)
    assert found == [Failed("did not finish within 0.3 s"), Returned(1)]


def test_a_thread_that_hangs_is_not_called_again_until_it_is_back():
    gate = threading.Event()

    async def waits():
        return 5

    def hangs():
        gate.wait()
        return 6

    before = threading.active_count()
    worker = Thread(hangs, "hangs")
    assert ask(worker, 0.1) == Failed("did not finish within 0.1 s")
    for _ in range(3):
        assert ask(worker, 0.1) == Failed("is still in a call that was left behind")
    assert threading.active_count() == before + 1
    gate.set()
    until(lambda: ask(worker) == Returned(6))
    worker.close()
    worker = Thread(waits, "waits")
    assert [ask(worker), ask(worker)] == [Returned(5)] * 2
    worker.close()
    assert ask(Inline(lambda x: x + 1), x=1) == Returned(2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_workers_and_their_children_end_with_the_program(number, tmp_path):
    program = """
        import os, signal, subprocess, sys, time
        from jaxrl_llm.workers.messages import dump_function
        from jaxrl_llm.workers.process import Limits, Process
        from jaxrl_llm.workers.pool import call

        def hangs():
            child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
            print(os.getppid(), os.getpid(), child.pid, flush=True)
            time.sleep(1000)

        def handler(*_):
            raise SystemExit(0)

        signal.signal(signal.SIGTERM, handler)
        worker = Process(dump_function(hangs), "it", Limits())
        try:
            call([(worker, {})], 1000.0)
        except KeyboardInterrupt:
            pass
    """
    run = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    with run:
        pids = run.stdout.readline().split()
        assert len(pids) == 3
        run.send_signal(number)
        run.wait(PATIENT)
        until(lambda: all(gone(pid) for pid in pids))


def test_a_server_without_workers_ends():
    worker = Process(dump_function(os.getppid), "it", Limits(), preload=("colorsys",))
    server = ask(worker).value
    worker.close()
    close_idle()
    assert gone(server)
