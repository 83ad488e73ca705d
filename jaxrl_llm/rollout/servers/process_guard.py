"""Runs a command and ends it, with all that it started, when standard input closes.

    python guard.py COMMAND [ARGUMENT ...]

Whoever holds the other end of the pipe is outlived by nothing, even if it is killed:
the kernel closes the pipe then. This file imports nothing of the project.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

GRACE_S = 10.0


def main(command: Sequence[str]) -> int:
    """Returns the exit status of the command, whose processes are all gone then."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, start_new_session=True
    )

    def end_when_closed() -> None:
        while os.read(0, 1):  # not sys.stdin, whose lock an exit would wait for
            pass
        process.terminate()  # it ends its own processes in order, given time
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
        _signal(process.pid, signal.SIGKILL)

    threading.Thread(target=end_when_closed, daemon=True).start()
    status = process.wait()
    end = time.monotonic() + GRACE_S
    while _signal(process.pid, 0) and time.monotonic() < end:
        time.sleep(0.1)
    _signal(process.pid, signal.SIGKILL)  # what the command left behind
    return status


def _signal(group: int, number: int) -> bool:
    """Whether there was a process to get the signal."""
    with suppress(ProcessLookupError):
        os.killpg(group, number)
        return True
    return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) % 256)
