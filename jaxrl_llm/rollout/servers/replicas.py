"""The servers of a run: started, watched, and brought back when they are lost."""

import asyncio
import shutil
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from jaxrl_llm.rollout.servers.process import Process
from jaxrl_llm.rollout.servers.server import (
    Launch,
    Lost,
    Server,
    ServerError,
    ServerSettings,
)
from jaxrl_llm.rollout.servers.transfer import Transfer


@dataclass
class Replica:
    """One server and what is known of it."""

    server: Server | None
    """None until one of ours is started."""
    process: Process | None = None
    device: str | None = None
    starts: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    verified: tuple[np.ndarray, np.ndarray] | None = None
    """The server's and the trainer's scores of the probes with the last weights that
    arrived, [N, T] each; None after a start."""


class Replicas:
    """All servers of a run, which hold the same weights.

    Args:
      kind: the dialect that they speak.
      directory: where the logs of servers of ours go.
      verify: called with one that was brought back.

    Raises:
      ServerError: the command that starts them does not exist.
    """

    def __init__(
        self,
        kind: type[Server],
        settings: ServerSettings,
        launch: Launch,
        transfer: Transfer,
        directory: Path,
        verify: Callable[[Replica], Awaitable[Any]],
    ):
        self._kind, self._settings, self._launch = kind, settings, launch
        self._transfer, self._directory, self._verify = transfer, directory, verify
        self.lost = 0
        """How often one was lost since the last transfer of weights."""
        self._command = tuple(settings.command)
        self._all = self._running() if settings.urls else self._own()

    def __iter__(self) -> Iterator[Replica]:
        return iter(self._all)

    def __getitem__(self, number: int) -> Replica:
        return self._all[number]

    async def everywhere(self, act: Callable[[Replica], Awaitable[Any]]) -> list[Any]:
        """What `act` returns of each, at the same time."""
        return await asyncio.gather(*map(act, self._all))

    async def check(self) -> None:
        """Reads what the running servers can do."""
        for server in [replica.server for replica in self if replica.server]:
            try:
                await self._check(server)
            except Lost as error:
                raise ServerError(
                    f"no {self._kind.name} server answers at {server.url}: {error}"
                ) from None

    async def send(self, replica: Replica) -> None:
        """Brings the current weights to a server, which may have to be started."""
        if not self._settings.urls and not replica.process:
            return await self._start(replica)
        starts = replica.starts
        try:
            await self._transfer.bring(replica.server)
        except Lost as error:
            await self.recover(replica, starts, error)

    async def recover(self, replica: Replica, starts: int, error: Lost) -> None:
        """Brings back a server that was lost when it had been started `starts` times.

        Raises:
          ServerError: it was lost more often than it may be, or does not come back.
        """
        async with replica.lock:
            if replica.starts != starts:
                return  # another request has seen to it
            settings, kind = self._settings, self._kind
            self.lost += 1
            if self.lost > settings.max_restarts:
                raise ServerError(
                    f"{error}; servers were lost {self.lost} times in one step, "
                    f"{kind.section}.max_restarts is {settings.max_restarts}"
                )
            said = f"{kind.name} is lost: {error}"
            Console().print(said, markup=False, soft_wrap=True)
            if settings.urls:
                await self._wait_for(replica.server, error)
                replica.starts += 1
                replica.verified = None
                await self._transfer.bring(replica.server)
            else:
                await asyncio.to_thread(replica.process.stop)
                await replica.server.close()
                await self._start(replica)
            await self._verify(replica)

    async def close(self) -> None:
        """Ends those that are ours."""
        for replica in self:
            if replica.process:
                await asyncio.to_thread(replica.process.stop)
            if replica.server:
                await replica.server.close()

    def device(self, other: str) -> str:
        """What running servers compute on, or `other`, which those of ours will."""
        return next((r.server.device for r in self if r.server), other)

    def _running(self) -> list[Replica]:
        longest = self._settings.request_timeout_s
        return [Replica(self._kind(url, longest)) for url in self._settings.urls]

    def _own(self) -> list[Replica]:
        settings = self._settings
        self._command = self._command or self._kind.own_command()
        command = self._command[0]
        if not shutil.which(command):
            section = self._kind.section
            raise ServerError(f"{section}.command: there is no program {command!r}")
        return [Replica(None, device=device) for device in settings.devices or (None,)]

    async def _check(self, server: Server) -> None:
        await server.check(self._launch.max_model_len, self._launch.lora)

    async def _start(self, replica: Replica) -> None:
        """Starts a server of ours with the current weights; returns when it is up."""
        settings, number = self._settings, self._all.index(replica)
        environment = self._kind.environment(self._launch) | dict(settings.env)
        if replica.device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = replica.device
        name = self._kind.section.rpartition(".")[2]
        process = replica.process = Process(
            self._kind,
            self._command,
            (
                *self._kind.arguments(self._transfer.first, self._launch),
                *settings.args,
            ),
            environment,
            settings.port and settings.port + number,
            self._directory / f"{name}-{number}.log",
        )
        replica.starts += 1
        replica.verified = None
        replica.server = self._kind(process.url, settings.request_timeout_s)
        await self._until_up(process, replica.server)
        await self._check(replica.server)
        if self._launch.lora is not None:
            await self._transfer.bring(replica.server)

    async def _until_up(self, process: Process, server: Server) -> None:
        longest, name = self._settings.start_timeout_s, self._kind.name
        console, start, said = Console(), time.monotonic(), 0.0
        console.print(
            f"starting {name}, log in {process.log}", markup=False, soft_wrap=True
        )
        while not await server.alive():
            passed = time.monotonic() - start
            if not process.running():
                raise process.failure("ended while it was starting")
            if passed > longest:
                process.stop()
                raise process.failure(
                    f"is not up after {self._kind.section}.start_timeout_s, "
                    f"{passed:.0f} s"
                )
            if passed > said + 10:
                said = passed
                console.print(
                    f"starting {name}, {passed:.0f} s: {process.last_words(1)[:160]}",
                    markup=False,
                    highlight=False,
                    soft_wrap=True,
                )
            await asyncio.sleep(0.25)
        console.print(f"{name} is up after {time.monotonic() - start:.0f} s")

    async def _wait_for(self, server: Server, error: Lost) -> None:
        longest = self._settings.start_timeout_s
        end = time.monotonic() + longest
        while not await server.alive():
            if time.monotonic() > end:
                raise ServerError(
                    f"{error}; it did not come back within "
                    f"{self._kind.section}.start_timeout_s, {longest:.0f} s"
                )
            await asyncio.sleep(0.5)
