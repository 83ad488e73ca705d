"""Whether a chat template comes to an end: it is a program that came with a model."""

import functools
import json
import signal
import subprocess
import sys
from pathlib import Path

_SECONDS = 5
_BYTES = 2**30
_CHARACTERS = 1_000_000


@functools.cache
def fault(template: str) -> str | None:
    """What speaks against ever rendering the template; None if nothing does.

    Renders it once in a process that is killed after 5 seconds of work or at 1 GiB.
    What the template does with other conversations is not known then.
    """
    if len(template) > _CHARACTERS:
        return f"has {len(template)} characters; at most {_CHARACTERS} are believed"
    asked = json.dumps({"template": template, "seconds": _SECONDS, "bytes": _BYTES})
    # -P: nothing beside the file may stand in for a module that it imports.
    child = [sys.executable, "-P", Path(__file__).with_name("render_once.py")]
    endless = f"does not come to an end within {_SECONDS} seconds"
    try:
        done = subprocess.run(
            child, input=asked, capture_output=True, text=True, timeout=2 * _SECONDS
        )
    except subprocess.TimeoutExpired:
        return endless
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return endless
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        return f"cannot be tried (exit status {done.returncode}): {last}"
    return done.stdout.strip() or None
