"""The folder that weights travel through, of which nothing is left in the end."""

import hashlib
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from jaxrl_llm import models
from jaxrl_llm.rollout.servers.server import Launch, Server, ServerSettings

_REMOVE = "import shutil, sys; sys.stdin.read(); shutil.rmtree(sys.argv[1], True)"
"""Removes a folder when standard input closes, even if by the end of a killed trainer:
it may be gigabytes of shared memory."""
_SHARD_BYTES = 10**9
"""Size of a file: reading and writing overlap."""


class Transfer:
    """Writes what servers read.

    Args:
      kind: the dialect of the servers.
      arch: the model's shape.
      tokenizer: the model's.
      directory: of the run.
    """

    def __init__(
        self,
        kind: type[Server],
        arch: models.Architecture,
        tokenizer: Any,
        settings: ServerSettings,
        launch: Launch,
        directory: Path,
    ):
        self._kind, self._arch, self._tokenizer = kind, arch, tokenizer
        self._settings, self._launch = settings, launch
        self.folder = self.current = _shared_folder(settings, directory)
        """The folder of this run, and the newest weights in it."""
        self._base = self.folder / "base"
        self._remover = subprocess.Popen(
            [sys.executable, "-c", _REMOVE, self.folder],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    @property
    def first(self) -> Path:
        """What a server of ours is started with."""
        return self._base if self._launch.lora else self.current

    def write(
        self, params: Any, version: int, device: str, *, first: bool
    ) -> dict[str, float]:
        """Writes weights, or adapters; from then on they are `current`. One tensor at a
        time is rounded and comes to the host.

        Args:
          params: in the training layout.
          device: of the servers.
          first: nothing has been sent yet.

        Returns:
          How much it is, of adapters.
        """
        self.current = self.folder / f"{version}"
        if first:
            shutil.rmtree(self.folder, ignore_errors=True)  # of a run that was killed
        else:
            shutil.rmtree(self.current, ignore_errors=True)  # of a load that failed
        # No generation_config.json, by which a server would sample what a request
        # leaves open.
        plain, lora = replace(self._arch, generation="{}"), self._launch.lora
        dtype = self._kind.sent_dtype(self._launch)
        if lora is None:
            self._save(self.current, *self._kind.as_taken(plain, params, device), dtype)
            return {}
        adapters, base = models.split_params(params, models.is_adapter)
        if first and not self._settings.urls:
            self._save(self._base, plain, models.plain(base, dtype), dtype)
        how = {"base": str(self._base), "dtype": dtype}
        models.save_adapter(self.current, self._arch, adapters, lora, **how)
        size = sum(2 * x.size for x in jax.tree.leaves(adapters))
        return {"rollout/adapters_mib": size / 2**20}

    async def bring(self, server: Server) -> None:
        """Has a server that is up read the current weights, or adapters."""
        if self._launch.lora is None:
            await server.reload(self.current)
        else:
            await server.adapt(f"policy-v{self.current.name}", self.current)

    def forget(self, folder: Path) -> None:
        """Removes weights that are current no more."""
        if folder not in (self.folder, self.current):
            shutil.rmtree(folder)

    def close(self) -> None:
        """Removes everything; waits until it is gone."""
        self._remover.communicate()

    def _save(
        self, folder: Path, arch: models.Architecture, params: Any, dtype: Any
    ) -> None:
        how = {"dtype": dtype, "max_shard_bytes": _SHARD_BYTES}
        models.save(folder, arch, params, self._tokenizer, **how)


def _shared_folder(settings: ServerSettings, directory: Path) -> Path:
    """Where weights are sent through: of this run alone, the same each time."""
    memory = Path("/dev/shm")
    if settings.weights_dir:
        folder = Path(settings.weights_dir)
    elif memory.is_dir() and not settings.urls:
        folder = memory
    else:
        folder = directory
    run = hashlib.sha256(str(directory.absolute()).encode()).hexdigest()
    return (folder / f"jaxrl-weights-{run[:12]}").absolute()
