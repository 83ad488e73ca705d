"""What the reference policy says of all pairs of a run, computed once and kept in its
directory."""

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from jaxrl_llm.config.names import ConfigError
from jaxrl_llm.sharding import processes

FILE = "reference_logprobs.npz"


class Stored:
    """The file of a run. All processes call each method; the first reads and writes.

    Args:
      directory: of the run.
      of: digests of the pairs and of the model, by what they are of.
    """

    def __init__(self, directory: Path, of: Mapping[str, Mapping[str, str]]):
        self.path = directory / FILE
        text = json.dumps(of, sort_keys=True)
        self._digest = hashlib.sha256(text.encode()).hexdigest()

    def read(
        self, counts: Sequence[int], *, may_differ: bool
    ) -> list[Float32[np.ndarray, " _"]] | None:
        """The log-probabilities of every pair, nats; None if there are none, or they
        are damaged.

        Args:
          counts: tokens of the two answers of each pair.
          may_differ: whether those of other pairs or of another model count as none.

        Raises:
          ConfigError: they are of others.
        """
        found = None
        if processes.leads():
            try:
                with np.load(self.path) as file:
                    found = str(file["digest"]), file["logprobs"]
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
                found = None
        found = processes.gather(found)[0]
        if found is None:
            return None
        digest, logprobs = found
        if digest != self._digest:
            if may_differ:
                return None
            raise ConfigError(
                f"{self.path} is of other pairs or of another model than this run "
                "has: it is no reference for what was learned so far. Choose another "
                "output_dir, or set trainer.resume=force to compute it anew"
            )
        return np.split(logprobs, np.cumsum(counts)[:-1])

    def write(self, logprobs: Sequence[Float32[np.ndarray, " _"]]) -> None:
        """Keeps the log-probabilities of every pair, whole or not at all."""
        if processes.leads():
            new = self.path.with_suffix(".new.npz")
            with new.open("wb") as file:
                np.savez(
                    file,
                    digest=np.array(self._digest),
                    logprobs=np.concatenate(logprobs),
                )
                file.flush()
                os.fsync(file.fileno())
            new.replace(self.path)
        processes.gather(None)
