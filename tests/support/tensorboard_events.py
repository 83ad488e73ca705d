"""What stands in TensorBoard's event files, without TensorBoard."""

import pathlib
import struct
from collections.abc import Iterator
from typing import Any


def read(directory: pathlib.Path) -> Iterator[tuple[int, Any]]:
    """(step, value) in the order in which they were written.

    A record is length, crc, event, crc.
    """
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(directory.iterdir(), key=lambda p: p.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack_from("<Q", data)
            event = Event.FromString(data[12 : 12 + length])
            yield from ((event.step, value) for value in event.summary.value)
            data = data[12 + length + 4 :]
