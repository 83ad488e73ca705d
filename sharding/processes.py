"""The processes of a run: one program, started once on every host or for every device.

    with processes.joined("host0:1234", num_processes=2, process_id=0):
        mine = processes.share(work)
        everything = processes.gather([do(one) for one in mine])

One process is the special case of many: outside `joined`, `share` is everything and
`gather` has one entry.

A process that fails, is killed or hangs ends the others: each tells the coordination
service every while that it is alive, and looks who is not. JAX's own watch would abort
them with a C++ stack trace, and at once when the process that holds the service dies.
So the service has a process of its own, `coordinator`, which outlives that one for a
moment, and this watch comes first.
"""

import atexit
import itertools
import os
import pickle
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, Sharding

from jaxrl_llm.sharding import private_jax

Item = TypeVar("Item")
_WEEK_MS = 7 * 24 * 3600 * 1000
_STATES = "processes/"
_round = itertools.count()


def leads() -> bool:
    """Whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def of(mesh: Mesh) -> int:
    """How many processes have devices of the mesh."""
    return len({device.process_index for device in mesh.devices.flat})


_CHUNKS = (1 << 12, 1 << 20)
"""Bytes that processes send each other at once: two programs, whatever is sent."""


def share(items: Sequence[Item]) -> Sequence[Item]:
    """This process' part: consecutive items, as many as any other has or one fewer."""
    index, count = jax.process_index(), jax.process_count()
    return items[len(items) * index // count : len(items) * (index + 1) // count]


def gather(value: Any) -> list[Any]:
    """The value of every process, by its index, in all of them. All must call it.

    Waits for the last of them as long as that is alive. Values are pickled.
    """
    if jax.process_count() == 1:
        return [value]
    # Devices would give up waiting for a process that is busy with something else.
    client = private_jax.coordination_client()
    client.wait_at_barrier(f"gather/{next(_round)}", _WEEK_MS)
    sent = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([len(sent)]))[:, 0]
    chunk = next(size for size in _CHUNKS if sizes.max() <= size or size == _CHUNKS[-1])
    room = -(-int(sizes.max()) // chunk) * chunk
    chunks = np.pad(sent, (0, room - len(sent))).reshape(-1, chunk)
    received = [multihost_utils.process_allgather(part) for part in chunks]
    received = np.concatenate(received, axis=1)
    return [
        pickle.loads(row[:size].tobytes())
        for row, size in zip(received, sizes, strict=True)
    ]


def place(tree: Any, sharding: Sharding) -> Any:
    """Arrays that every process holds, on devices: each sends its own what they need.

    Args:
      tree: of arrays on the host, the same in all processes.
    """

    def put(x: Any) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(
            x.shape, sharding, lambda index: x[index], dtype=x.dtype
        )

    return jax.tree.map(put, tree)


def fetch(x: jax.Array) -> np.ndarray:
    """An array on the host of every process. All must call it."""
    if x.is_fully_addressable:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def here(tree: Any, mesh: Mesh) -> Any:
    """Arrays as this process sees them: on its own devices only.

    Args:
      tree: of arrays on a mesh of all processes, of which each holds a whole copy.
      mesh: this process' part of that mesh.
    """

    def view(x: jax.Array) -> jax.Array:
        return jax.make_array_from_single_device_arrays(
            x.shape,
            NamedSharding(mesh, x.sharding.spec),
            [shard.data for shard in x.addressable_shards],
        )

    return jax.tree.map(view, tree)


@contextmanager
def joined(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    lost_after_s: float | int = 30.0,
    start_timeout_s: int = 300,
) -> Iterator[None]:
    """The block is run together with the other processes, if there are any.

    Must come before JAX looks for devices. What is not given is found out on Slurm,
    Open MPI, Kubernetes and TPU pods; elsewhere the process is alone.

    If the block fails here, the others stop too. If another process fails, or shows no
    sign of life for a while, this one prints which and exits, whatever it is doing,
    with the other's status or with 1.

    Args:
      coordinator: HOST:PORT of process 0, any port that is free there.
      lost_after_s: how long a process that says nothing counts as alive.
      start_timeout_s: how long to wait for all processes to start.

    Raises:
      ValueError: the arguments do not fit each other, or not all processes came.
    """
    found = _settings(coordinator, num_processes, process_id, start_timeout_s)
    if found is None:
        yield
        return
    address, count, index, devices = found
    service = _start_service(address, count, lost_after_s) if index == 0 else None
    # Otherwise a SIGTERM before the run looks for it would be swallowed.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            address,
            count,
            index,
            local_device_ids=devices,
            cluster_detection_method="deactivate",
            # JAX insists on a service in process 0. Nobody calls on this one.
            coordinator_bind_address="127.0.0.1:0",
            initialization_timeout=start_timeout_s,
            heartbeat_timeout_seconds=int(10 * lost_after_s) + 60,
        )
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"process {index} waited {start_timeout_s} s for {count} processes to meet "
            f"at {address}: {error}"
        ) from None
    watch = _Watch(index, count, lost_after_s)
    try:
        yield
    except BaseException as error:
        watch.fail(error)
        raise
    watch.finish()
    jax.distributed.shutdown()
    if service:
        service.communicate(b"done")


class _Watch:
    """Says that this process is alive, and ends it when another is not."""

    def __init__(self, index: int, count: int, lost_after_s: float | int):
        self._index, self._count, self._lost_after = index, count, lost_after_s
        self._client = private_jax.coordination_client()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Waits until all have come this far; from now on they may go."""
        gather(None)
        self._over.set()
        self._thread.join()

    def fail(self, error: BaseException) -> None:
        """Tells the others, unless it is them that have failed."""
        if isinstance(error, RuntimeError):
            # Perhaps a connection to a process that is gone: `_run` will find out.
            time.sleep(1.2 * self._lost_after)
        self._over.set()
        self._thread.join()
        text = str(error) or type(error).__name__
        status = _status(error)
        self._say(f"failed {status}: {text.splitlines()[0][:500]}")
        # JAX would wait for the others at exit, and nothing may wait for ever.
        atexit.register(_exit, status=status)
        timer = threading.Timer(self._lost_after, _exit, kwargs={"status": status})
        timer.daemon = True
        timer.start()

    def _run(self) -> None:
        heard = {process: ("", time.monotonic()) for process in range(self._count)}
        for beat in itertools.count():
            try:
                self._say(f"alive {beat}")
                states = dict(self._client.key_value_dir_get(_STATES))
            except jax.errors.JaxRuntimeError as error:
                self._stop(0, f"does not answer any more ({error})")
            for process in range(self._count):
                state, now = states.get(f"{_STATES}{process}", ""), time.monotonic()
                host, _, what = state.partition(" ")
                if failed := re.fullmatch("failed ([0-9]+): (.*)", what):
                    why = f"on {host} failed: {failed[2]}"
                    self._stop(process, why, int(failed[1]))
                if heard[process][0] != what:
                    heard[process] = what, now
                elif now - heard[process][1] > self._lost_after:
                    silence = f"nothing was heard of it for {self._lost_after:g} s"
                    self._stop(process, f"on {host} is lost: {silence}")
            if self._over.wait(self._lost_after / 10):
                return

    def _say(self, state: str) -> None:
        """States start with the host, for who reads of this process' loss."""
        self._client.key_value_set(
            f"{_STATES}{self._index}",
            f"{socket.gethostname()} {state}",
            allow_overwrite=True,
        )

    def _stop(self, process: int, why: str, status: int = 1) -> None:
        _exit(
            f"process {process} of {self._count} {why}; process {self._index} stops. "
            "When all are started again, the run goes on from its newest checkpoint.",
            status,
        )


def _status(error: BaseException) -> int:
    """The exit status of a program that this error ends."""
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if isinstance(error, ValueError | ImportError | OSError) else 1


def _exit(message: str = "", status: int = 1) -> None:
    """Ends the process now, from any thread."""
    sys.stdout.flush()
    if message:
        print(f"\n{message}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(status)


def _settings(
    address: str | None, count: int | None, index: int | None, timeout_s: int
) -> tuple[str, int, int, Sequence[int] | None] | None:
    """Address, number of processes, index and local devices; None if alone."""
    given = {"coordinator": address, "num-processes": count, "process-id": index}
    missing = [name for name, value in given.items() if value is None]
    devices = None
    if missing:
        found = private_jax.detect_cluster(address, count, index, timeout_s)
        address, count, index, devices = found
    if len(missing) == len(given) and count in (None, 1):
        return None
    if None in (address, count, index):
        raise ValueError(f"{', '.join(missing)}: not given, and no cluster tells")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"coordinator {address!r} is not HOST:PORT")
    if count < 1 or not 0 <= index < count:
        raise ValueError(
            f"process-id {index} does not fit num-processes {count}; use 0 to "
            "num-processes - 1"
        )
    return address, count, index, devices


def _start_service(
    address: str, count: int, lost_after_s: float | int
) -> subprocess.Popen:
    """Process 0 starts the coordination service, which ends after it."""
    port, grace_s = address.rpartition(":")[2], 2 * lost_after_s
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "jaxrl_llm.sharding.coordinator",
            port,
            str(count),
            str(grace_s),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
