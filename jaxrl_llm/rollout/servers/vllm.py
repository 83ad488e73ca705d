"""vLLM. Only its native routes are spoken. Source: vLLM 0.22 to 0.33, entrypoints/."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxrl_llm import models
from jaxrl_llm.rollout.servers.engine import ServerEngine
from jaxrl_llm.rollout.servers.server import (
    Answer,
    Ask,
    Launch,
    Server,
    ServerError,
    ServerSettings,
)

_OLDEST = (0, 22)
_ROUTES = ("/pause", "/resume", "/collective_rpc", "/reset_prefix_cache")
_LOAD, _UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's --max-lora-rank."""
_NO_VLLM = "rollout.vllm.command starts a Python without vLLM"
_NO_ROOM = (
    "the device has no room; lower --gpu-memory-utilization in rollout.vllm.args, or "
    "XLA_PYTHON_CLIENT_MEM_FRACTION of the trainer"
)
_KEPT = (
    "; on a CPU, vLLM keeps the output matrix of a model that ties it to its "
    "embeddings: start the server with "
    """--hf-overrides '{"tie_word_embeddings": false}'"""
)


@dataclass(frozen=True, kw_only=True)
class VllmSettings(ServerSettings):
    """Servers of vLLM."""

    command: Sequence[str] = ("python", "-m", "vllm.entrypoints.openai.api_server")


def of_prompt(tokens: Sequence[int], answer: Mapping[str, Any]) -> list[float]:
    """What an answer says of its prompt: the log-probability of every token but the
    first, nats."""
    return [
        entry[str(token)]["logprob"]
        for token, entry in zip(tokens[1:], answer["prompt_logprobs"][1:], strict=True)
    ]


def lora_flags(lora: models.Lora) -> tuple[str, ...]:
    """How a server is started that takes adapters like these, and on no other matrices:
    on a CPU, vLLM 0.32 dies of a prompt's log-probabilities if there might be one on
    the output matrix.

    Raises:
      ValueError: vLLM takes none of that rank.
    """
    if lora.rank > _RANKS[-1]:
        raise ValueError(
            f"actor.lora.rank is {lora.rank}, but vLLM takes at most {_RANKS[-1]}; "
            "lower it, or set rollout.lora to merge"
        )
    rank = next(limit for limit in _RANKS if limit >= lora.rank)
    names = [f"{module}_proj" for module in lora.modules]
    flags = ("--enable-lora", "--max-lora-rank", str(rank))
    return *flags, "--lora-target-modules", *names


class VllmServer(Server):
    """One vLLM server."""

    name, section = "vLLM", "rollout.vllm"
    known_failures = {
        "No module named vllm": _NO_VLLM,
        "No module named 'vllm'": _NO_VLLM,
        "unrecognized arguments": "it does not know one of rollout.vllm.args",
        "out of memory": _NO_ROOM,
        "less than desired GPU memory utilization": _NO_ROOM,
        "No available memory for the cache blocks": "weights leave no room for a KV "
        "cache; raise --gpu-memory-utilization in rollout.vllm.args",
        "is less than requested memory for kv": "the host has no room; lower "
        "VLLM_CPU_KVCACHE_SPACE in rollout.vllm.env",
        "is larger than the maximum number of tokens": "its KV cache is too small for "
        "one sequence; give it more memory in rollout.vllm.args or rollout.vllm.env",
    }

    @classmethod
    def alone(cls, greedy: bool) -> bool:
        """See `Server.alone`: vLLM refuses two greedy ones."""
        return greedy

    @classmethod
    def check_adapters(cls, lora: models.Lora) -> None:
        """See `lora_flags`."""
        lora_flags(lora)

    @classmethod
    def arguments(cls, model: Path, launch: Launch) -> tuple[str, ...]:
        """See `Server.arguments`."""
        return (
            *("--model", str(model)),
            *("--served-model-name", "policy"),
            *("--runner", "generate", "--dtype", launch.dtype),
            *("--max-model-len", str(launch.max_model_len)),
            *("--max-num-seqs", str(launch.max_num_seqs)),
            *("--logprobs-mode", "processed_logprobs"),
            *(() if launch.lora is None else lora_flags(launch.lora)),
        )

    @classmethod
    def environment(cls, launch: Launch) -> dict[str, str]:
        """See `Server.environment`."""
        lora = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"} if launch.lora else {}
        return {
            "VLLM_SERVER_DEV_MODE": "1",  # the routes that weights are sent through
            "VLLM_NO_USAGE_STATS": "1",
            "PYTHONPATH": "",  # its Python environment is not ours
            **lora,
        }

    @classmethod
    def as_taken(
        cls, arch: models.Architecture, params: Any, device: str
    ) -> tuple[models.Architecture, Any]:
        """On a CPU, vLLM keeps a packed copy of the output matrix and packs anew only
        what it reads: embeddings are sent as both."""
        if device != "cpu" or not arch.tie_embeddings:
            return arch, params
        return models.untied(arch), params | {"output": params["embedding"]}

    def why_stale(self, arch: models.Architecture) -> str:
        """See `as_taken`: a running server has the form that it was started with."""
        return _KEPT if self.device == "cpu" and arch.tie_embeddings else ""

    async def check(self, max_len: int, lora: models.Lora | None = None) -> None:
        """See `Server.check`."""
        version = (await self.ask("GET", "/version"))["version"]
        numbers = tuple(int(x) for x in version.split(".")[:2] if x.isdigit())
        if numbers < _OLDEST and numbers != (0, 1):  # 0.1.dev: built from source
            raise ServerError(f"{self.url} is vLLM {version}; 0.22 is the oldest known")
        routes = (await self.ask("GET", "/openapi.json"))["paths"]
        missing = [route for route in _ROUTES if route not in routes]
        if missing:
            raise ServerError(
                f"{self.url} has no {', '.join(missing)}; start it with "
                "VLLM_SERVER_DEV_MODE=1 in its environment and --runner generate"
            )
        info = await self.ask("GET", "/server_info?config_format=json")
        model = info["vllm_config"]["model_config"]
        self.device = info["vllm_config"]["device_config"]["device"]
        if lora is not None:
            self._check_lora(lora, routes, info["vllm_config"].get("lora_config"))
        self.check_length(model["max_model_len"], max_len, "--max-model-len")
        if model["logprobs_mode"] != "processed_logprobs":
            raise ServerError(
                f"{self.url} gives {model['logprobs_mode']}, which are not those of "
                "the distribution that is sampled from; start it with "
                "--logprobs-mode processed_logprobs"
            )
        self.model = (await self.ask("GET", "/v1/models"))["data"][0]["id"]

    def _check_lora(
        self,
        lora: models.Lora,
        routes: Mapping[str, Any],
        found: Mapping[str, Any] | None,
    ) -> None:
        """Raises ServerError if it does not take such adapters while it runs.

        Args:
          found: what it says of adapters.
        """
        flags = f"start it with {' '.join(lora_flags(lora))}"
        if found is None or _LOAD not in routes or _UNLOAD not in routes:
            raise ServerError(
                f"{self.url} takes no adapters while it runs; {flags} and "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment"
            )
        if found["max_lora_rank"] < lora.rank:
            raise ServerError(
                f"{self.url} takes adapters of rank {found['max_lora_rank']} at most, "
                f"but actor.lora.rank is {lora.rank}; {flags}"
            )
        there, names = found.get("target_modules"), lora_flags(lora)[4:]
        if (there is None and self.device == "cpu") or set(names) - set(there or names):
            raise ServerError(
                f"{self.url} takes adapters on {there or 'all matrices'}, not on "
                f"{', '.join(names)}; {flags}"
            )

    async def complete(self, ask: Ask) -> list[Answer]:
        """See `Server.complete`."""
        request, sampling = ask.request, ask.request.sampling
        options = self.options(ask)
        if sampling.prompt_logprobs:
            options["prompt_logprobs"] = 0
        return [
            self._answer(request.tokens, sampling.logprobs, choice)
            for choice in await self._choices(request.tokens, options)
        ]

    def options(self, ask: Ask) -> dict[str, Any]:
        """How responses are drawn, in the words of /v1/completions."""
        sampling = ask.request.sampling
        options = {
            "n": len(ask.samples),
            "logprobs": sampling.logprobs,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "stop": list(sampling.stop),
            "stop_token_ids": list(ask.stop_token_ids),
            "skip_special_tokens": ask.skip_special_tokens,
            "ignore_eos": True,  # its idea of the end; ours is in stop_token_ids
        }
        return options | ({"seed": ask.seed} if ask.reproducible else {})

    def _answer(
        self, prompt: Sequence[int], count: int, choice: Mapping[str, Any]
    ) -> Answer:
        told = choice["logprobs"]
        return Answer(
            index=choice["index"],
            tokens=choice["token_ids"],
            logprobs=told["token_logprobs"],
            finish_reason=choice["finish_reason"],
            raw_logprobs=choice.get("raw_logprobs"),
            full_logprobs=choice.get("full_logprobs"),
            likeliest=[_by_id(one) for one in told["top_logprobs"]] if count else (),
            prompt_logprobs=of_prompt(prompt, choice)
            if choice.get("prompt_logprobs")
            else None,
        )

    async def _choices(
        self, tokens: Sequence[int], options: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """Responses to `tokens`; `options` are those of /v1/completions."""
        body = {
            "model": self.model,
            "prompt": list(tokens),
            "logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            **options,
        }
        return (await self.ask("POST", "/v1/completions", body))["choices"]

    async def sample(self, tokens: Sequence[int], count: int) -> list[int]:
        """See `Server.sample`."""
        options = {"max_tokens": count, "seed": 0}
        return (await self._choices(tokens, options))[0]["token_ids"]

    async def score(self, tokens: Sequence[int]) -> list[float]:
        """See `Server.score`."""
        options = {"max_tokens": 1, "prompt_logprobs": 0, "temperature": 1.0}
        [choice] = await self._choices(tokens, options)
        return of_prompt(tokens, choice)

    async def pause(self) -> None:
        """See `Server.pause`."""
        await self.ask("POST", "/pause?mode=wait")

    async def resume(self) -> None:
        """See `Server.resume`."""
        await self.ask("POST", "/resume")

    async def forget(self) -> None:
        """See `Server.forget`."""
        cleared = await self.ask("POST", "/reset_prefix_cache")
        if cleared and not cleared["success"]:  # the oldest versions answer nothing
            raise ServerError(
                f"{self.url} did not reset its prefix cache ({cleared}), so it would "
                "go on with keys and values of old weights"
            )

    async def read_weights(self, directory: Path) -> None:
        """See `Server.read_weights`."""
        call = {"method": "reload_weights", "kwargs": {"weights_path": str(directory)}}
        await self.ask("POST", "/collective_rpc", call)

    async def read_adapter(self, name: str, directory: Path) -> None:
        """See `Server.read_adapter`."""
        kind = name.rstrip("0123456789")
        for entry in (await self.ask("GET", "/v1/models"))["data"]:
            known = entry["id"]
            if known.startswith(kind) and known.removeprefix(kind).isdigit():
                await self.ask("POST", _UNLOAD, {"lora_name": known})
        call = {"lora_name": name, "lora_path": str(directory)}
        await self.ask("POST", _LOAD, call)


class VllmEngine(ServerEngine):
    """An `Engine` whose tokens come from vLLM."""

    dialect = VllmServer


def _by_id(told: Mapping[str, float]) -> dict[int, float]:
    """Log-probabilities by token. vLLM tells the sampled token's too; it says
    "token_id:<id>" and, where JSON cannot say -inf, -9999."""
    return {
        int(name.split(":")[1]): -float("inf") if value <= -9999 else value
        for name, value in told.items()
    }
