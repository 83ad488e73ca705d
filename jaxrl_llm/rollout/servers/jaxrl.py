"""`jaxrl serve`: the engine of this package in processes of its own.

It speaks vLLM's words, and takes the whole key of the random numbers: with the same
weights in the same dtype, responses are those of the engine in the trainer.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxrl_llm import models
from jaxrl_llm.rollout.servers.engine import ServerEngine
from jaxrl_llm.rollout.servers.server import (
    Ask,
    Launch,
    ServerError,
    ServerSettings,
)
from jaxrl_llm.rollout.servers.vllm import VllmServer

API_KEY = "JAXRL_API_KEY"
"""The variable of the environment that has the key of `jaxrl serve`, on both sides."""


@dataclass(frozen=True, kw_only=True)
class JaxrlSettings(ServerSettings):
    """Servers of this package. Without a command, one is started by this Python."""


class JaxrlServer(VllmServer):
    """One server of this package."""

    name, section = "jaxrl serve", "rollout.jaxrl"
    known_failures: Mapping[str, str] = {
        "Unrecognized options": "it does not know one of rollout.jaxrl.args",
        "jaxrl-llm[serve]": "its Python has not what `jaxrl serve` needs: "
        "pip install 'jaxrl-llm[serve]'",
        "No module named jaxrl_llm": "rollout.jaxrl.command starts a Python without "
        "this package",
        "RESOURCE_EXHAUSTED": "the device has no room; give servers devices of their "
        "own, by rollout.jaxrl.devices",
    }

    @classmethod
    def own_command(cls) -> tuple[str, ...]:
        """See `Server.own_command`."""
        return sys.executable, "-m", "jaxrl_llm", "serve"

    @classmethod
    def alone(cls, greedy: bool) -> bool:
        """See `Server.alone`."""
        return False

    @classmethod
    def headers(cls) -> dict[str, str]:
        """See `Server.headers`."""
        key = os.environ.get(API_KEY)
        return {"Authorization": f"Bearer {key}"} if key else {}

    @classmethod
    def check_adapters(cls, lora: models.Lora) -> None:
        """See `Server.check_adapters`."""
        raise ValueError(
            f"{cls.name} is sent no adapters alone; set rollout.lora to merge"
        )

    @classmethod
    def arguments(cls, model: Path, launch: Launch) -> tuple[str, ...]:
        """See `Server.arguments`."""
        skips = "--skip-special-tokens"
        if not launch.skip_special_tokens:
            skips = "--no-skip-special-tokens"
        return (
            *("--model", str(model), "--served-model-name", "policy"),
            *("--dtype", launch.dtype, skips),
            *("--max-model-len", str(launch.max_model_len)),
            *("--max-num-seqs", str(launch.max_num_seqs)),
            *("--max-queued", str(max(1024, 4 * launch.max_num_seqs))),
        )

    @classmethod
    def environment(cls, launch: Launch) -> dict[str, str]:
        """See `Server.environment`: its Python environment is ours."""
        return {}

    @classmethod
    def sent_dtype(cls, launch: Launch) -> Any:
        """See `Server.sent_dtype`: what it computes in, so that nothing is lost."""
        return jnp.dtype(launch.dtype)

    @classmethod
    def as_taken(
        cls, arch: models.Architecture, params: Any, device: str
    ) -> tuple[models.Architecture, Any]:
        """See `Server.as_taken`."""
        return arch, params

    def why_stale(self, arch: models.Architecture) -> str:
        """See `Server.why_stale`."""
        return ""

    async def check(self, max_len: int, lora: models.Lora | None = None) -> None:
        """See `Server.check`."""
        info = await self.ask("GET", "/server_info")
        if not isinstance(info, dict) or info.get("engine") != "jaxrl":
            raise ServerError(f"{self.url} is no jaxrl serve: its /server_info differs")
        self.check_length(info["max_model_len"], max_len, "--max-model-len")
        self.model, self.device = info["name"], "jax"

    def options(self, ask: Ask) -> dict[str, Any]:
        """See `VllmServer.options`."""
        request = ask.request
        options = super().options(ask)
        del options["ignore_eos"]  # the model's own ends are ours
        return options | {
            "seed": request.seed,
            "key": {
                "prompt_id": request.keyed_by,
                "first_sample": ask.samples[0],
                "turn": request.turn,
            },
            "return_all_logprobs": True,
        }

    async def read_weights(self, directory: Path) -> None:
        """See `Server.read_weights`."""
        given = {"weights_path": str(directory), "weight_version": int(directory.name)}
        call = {"method": "reload_weights", "kwargs": given}
        await self.ask("POST", "/collective_rpc", call)


class JaxrlEngine(ServerEngine):
    """An `Engine` whose tokens come from servers of this package."""

    dialect = JaxrlServer
