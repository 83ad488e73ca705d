"""JAX's coordination service, in a process of its own.

    python -m jaxrl_llm.sharding.coordinator PORT NUM_PROCESSES GRACE_S

Process 0 starts it (see `processes`), so that the others can still ask who is alive
when that one is gone. Ends with process 0: at once if it was told "done" on its
standard input, and otherwise after a while for the others to ask.
"""

import signal
import sys
import time

from jaxrl_llm.sharding import private_jax


def main(port: str, num_processes: str, grace_s: str) -> None:
    """Serves until standard input ends."""
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the run, which saves
        signal.signal(number, signal.SIG_IGN)
    service = private_jax.coordination_service(
        f"[::]:{port}", int(num_processes), heartbeat_timeout_s=24 * 3600
    )
    if sys.stdin.read() != "done":
        time.sleep(float(grace_s))
    service.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
