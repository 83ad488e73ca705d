"""Processes that faults are tried on, and how each of them ended."""

import json
import os
import pathlib
import re
import select
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass

RAW = re.compile(
    r"Traceback \(most recent call last\)|Fatal Python error|terminate called|"
    r"Exception ignored in|Segmentation fault|\*\*\* Check failure"
)
"""What nobody should have to read."""


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    status: int
    """As Python's: -9 for SIGKILL."""
    output: str
    seconds: float
    hung: bool
    """It had to be ended, `status` says no more."""

    @property
    def raw(self) -> bool:
        """It ended by an error that is not explained."""
        return bool(RAW.search(self.output)) or self.status not in (0, 2, 75, 130, -9)

    @property
    def last_words(self) -> str:
        return " | ".join(self.output.strip().splitlines()[-6:])[-600:]


class Process:
    """One that the zygote started."""

    def __init__(self, pid: int, folder: pathlib.Path, statuses: pathlib.Path):
        self.pid, self.folder, self._statuses = pid, folder, statuses
        self._started = time.monotonic()

    def running(self) -> bool:
        return not (self._statuses / str(self.pid)).exists()

    def wait(self, limit_s: float) -> Ended:
        """Ends it if it has not ended `limit_s` seconds after its start."""
        while not (over := time.monotonic() - self._started > limit_s):
            if not self.running():
                break
            time.sleep(0.01)
        if over:
            self.kill()
            while self.running():
                time.sleep(0.01)
        status = self._statuses / str(self.pid)
        number = int(status.read_text())
        status.unlink()
        output = (self.folder / "output").read_text(errors="replace")
        return Ended(number, output, time.monotonic() - self._started, over)

    def kill(self) -> None:
        if self.running():
            os.killpg(self.pid, signal.SIGKILL)


class Zygote:
    """The process that others are forks of; see `faults.zygote`."""

    def __init__(self, folder: pathlib.Path, support: pathlib.Path):
        self.folder, self._count = folder, 0
        self._statuses = folder / "statuses"
        self._statuses.mkdir(parents=True)
        self.mark = uuid.uuid4().hex
        root = support.parents[1]
        path = os.pathsep.join([str(support), str(root)])
        # Mounts of a name space of its own end with it, whatever happens.
        program = [sys.executable, "-m", "faults.zygote", str(self._statuses)]
        self._popen = subprocess.Popen(
            [*_own_mounts(), *program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "FAULTS_MARK": self.mark},
            start_new_session=True,
        )

    def start(self, folder: pathlib.Path | None = None, **request: object) -> Process:
        """A process in a new folder; see `faults.zygote.become` for the request."""
        self._count += 1
        folder = folder or self.folder / f"process_{self._count:04d}"
        folder.mkdir(exist_ok=True)
        pid = self._ask({"folder": str(folder), **request})
        return Process(int(pid), folder, self._statuses)

    def preload(self, modules: pathlib.Path) -> None:
        self._ask({"preload": str(modules)})

    def cpu_seconds(self) -> float:
        """Of all its processes that have ended so far."""
        return float(self._ask({"usage": True}))

    def close(self) -> list[str]:
        """Ends it and what it started. Returns the commands of those of others' making
        that outlived it, which are ended too."""
        self._popen.stdin.close()
        self._popen.wait()
        self._popen.stdout.close()
        end = time.monotonic() + 10
        while (left := self._left()) and time.monotonic() < end:
            time.sleep(0.1)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        return list(left.values())

    def _left(self) -> dict[int, str]:
        found, mark = {}, f"FAULTS_MARK={self.mark}".encode()
        for entry in pathlib.Path("/proc").iterdir():
            try:
                if entry.name.isdecimal() and mark in (entry / "environ").read_bytes():
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                    if command:  # not a zombie
                        found[int(entry.name)] = command.decode(errors="replace")
            except OSError:
                continue
        return found

    def _ask(self, request: dict) -> str:
        self._popen.stdin.write(json.dumps(request) + "\n")
        self._popen.stdin.flush()
        ready, _, _ = select.select([self._popen.stdout], [], [], 120)
        assert ready, f"no answer to {request}"
        answer = self._popen.stdout.readline()
        assert answer, f"the zygote ended with {self._popen.poll()}"
        return answer.strip()


def _own_mounts() -> list[str]:
    """The command that gives a program mounts of its own; empty if not permitted."""
    for command in (
        ["unshare", "--mount"],
        ["unshare", "--user", "--map-root-user", "--mount"],
    ):
        try:
            tried = subprocess.run([*command, "true"], capture_output=True)
        except FileNotFoundError:
            return []
        if tried.returncode == 0:
            return command
    return []
