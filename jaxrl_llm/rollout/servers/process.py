"""A server of our own: its process, and what its log says."""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxrl_llm.rollout.servers import process_guard as guard
from jaxrl_llm.rollout.servers.server import Server, ServerError


class Process:
    """A server of our own. It ends with `stop`, or when this process ends, however.

    Args:
      kind: the dialect that it speaks.
      command: what starts it; `arguments` are added to it.
      arguments: as it takes them, without host and port.
      environment: variables besides our own.
      port: to listen on; a free one if not given.
      log: file that its output is added to.
    """

    def __init__(
        self,
        kind: type[Server],
        command: Sequence[str],
        arguments: Sequence[str],
        environment: Mapping[str, str],
        port: int | None,
        log: Path,
    ):
        self.kind, self.port, self.log = kind, port or _free_port(), log
        where = ["--host", "127.0.0.1", "--port", str(self.port)]
        log.parent.mkdir(parents=True, exist_ok=True)
        self._from = log.stat().st_size if log.exists() else 0
        with log.open("ab") as output:
            self._guard = subprocess.Popen(
                [sys.executable, "-P", guard.__file__, *command, *arguments, *where],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | dict(environment),
                start_new_session=True,
            )

    @property
    def url(self) -> str:
        """Where it listens, or will."""
        return f"http://127.0.0.1:{self.port}"

    def running(self) -> bool:
        """Whether the process has not ended."""
        return self._guard.poll() is None

    def stop(self) -> None:
        """Ends the server and all its processes; waits until they are gone."""
        self._guard.stdin.close()
        self._guard.wait(2 * guard.GRACE_S + 10.0)

    def last_words(self, lines: int = 12) -> str:
        """The end of its log."""
        with self.log.open("rb") as file:
            file.seek(self._from)
            text = file.read().decode(errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def failure(self, what: str) -> ServerError:
        """The error to raise when it does not start or work: what, why, and its log."""
        end, kind = self.last_words(200), self.kind
        known = {"ddress already in use": _PORT.format(kind.section)}
        known |= kind.known_failures
        why = [say for sign, say in known.items() if sign in end]
        reason = f": {why[0]}" if why else ""
        return ServerError(
            f"the {kind.name} server {what}{reason}. The end of {self.log}:\n"
            f"{self.last_words()}"
        )


_PORT = "its port is taken; set another {}.port"


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
