"""Two runs in one directory."""

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import threading

import pytest

from jaxrl_llm.config.names import ConfigError
from jaxrl_llm.tracking.run_lock import locked

HOLDS = """
import pathlib, sys
from jaxrl_llm.tracking.run_lock import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the directory until its input ends."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_second_names_the_first_and_touches_nothing(other, tmp_path):
    before = (tmp_path / "run/lock").read_bytes()
    message = f"in use by process {other.pid} on {socket.gethostname()}, since 2"
    with pytest.raises(ConfigError, match=message), locked(tmp_path / "run"):
        pass
    assert (tmp_path / "run/lock").read_bytes() == before
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]


def test_what_a_killed_process_left_is_taken_over(other, tmp_path):
    other.kill()
    other.wait()
    assert (tmp_path / "run/lock").exists()
    with locked(tmp_path / "run"):
        owner = json.loads((tmp_path / "run/lock").read_text())
        assert owner["pid"] == os.getpid()
    assert not (tmp_path / "run/lock").exists()


def test_what_a_block_leaves_stays_and_an_empty_directory_goes(tmp_path):
    with locked(tmp_path / "a/b"):
        pass
    assert not (tmp_path / "a").exists()
    with locked(tmp_path / "a/b"):
        (tmp_path / "a/b/metrics.jsonl").touch()
    assert [p.name for p in (tmp_path / "a/b").iterdir()] == ["metrics.jsonl"]


def test_blocks_of_one_thread_nest_and_another_thread_is_refused(tmp_path):
    refused = []

    def second():
        try:
            with locked(tmp_path):
                pass
        except ConfigError as error:
            refused.append(str(error))

    with locked(tmp_path):
        with locked(tmp_path):
            pass
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        assert (tmp_path / "lock").exists()
    assert f"in use by process {os.getpid()} on" in refused[0]
    second()
    assert len(refused) == 1


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch, other):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    said = []
    with locked(tmp_path / "new", said.append):
        pass
    assert len(said) == 1 and "has no locks (No locks available)" in said[0]
    # On this host, it can be seen who is alive.
    with pytest.raises(ConfigError, match=f"process {other.pid}"):
        with locked(tmp_path / "run", said.append):
            pass
    other.kill()
    other.wait()
    with locked(tmp_path / "run", said.append):
        pass
