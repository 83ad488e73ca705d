"""One vLLM server: what it can do, what it is asked, and, if it is ours, its process.

Only vLLM's native routes are spoken. Source: vLLM 0.22 to 0.33, entrypoints/.
"""

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

try:
    import httpx
except ModuleNotFoundError:
    raise ImportError(
        "rollout.engine vllm needs the package httpx, which is not installed: "
        "pip install 'jaxrl-llm[vllm]'"
    ) from None

from jaxrl_llm import models
from jaxrl_llm.rollout.servers import process_guard as guard

_OLDEST = (0, 22)
_ROUTES = ("/pause", "/resume", "/collective_rpc", "/reset_prefix_cache")
_LOAD, _UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's --max-lora-rank."""
# What the end of a log says, and what to do about it.
_KNOWN_FAILURES = {
    "ddress already in use": "its port is taken; set another rollout.vllm.port",
    "No module named vllm": "rollout.vllm.command starts a Python without vLLM",
    "No module named 'vllm'": "rollout.vllm.command starts a Python without vLLM",
    "unrecognized arguments": "it does not know one of rollout.vllm.args",
    "out of memory": "the device has no room; lower --gpu-memory-utilization in "
    "rollout.vllm.args, or XLA_PYTHON_CLIENT_MEM_FRACTION of the trainer",
    "less than desired GPU memory utilization": "the device has no room; lower "
    "--gpu-memory-utilization in rollout.vllm.args, or "
    "XLA_PYTHON_CLIENT_MEM_FRACTION of the trainer",
    "No available memory for the cache blocks": "weights leave no room for a KV cache; "
    "raise --gpu-memory-utilization in rollout.vllm.args",
    "is less than requested memory for kv": "the host has no room; lower "
    "VLLM_CPU_KVCACHE_SPACE in rollout.vllm.env",
    "is larger than the maximum number of tokens": "its KV cache is too small for one "
    "sequence; give it more memory in rollout.vllm.args or rollout.vllm.env",
}


class ServerError(OSError):
    """A server cannot be used; the message says why and what brings it about."""


class Lost(Exception):
    """A server did not answer in time, the connection broke, or it died of what it was
    asked; its last words are then in `said`."""

    def __init__(self, message: str, said: str = ""):
        super().__init__(message)
        self.said = said


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


class Server:
    """A client of one server.

    Args:
      url: such as http://127.0.0.1:8000.
      timeout_s: longest wait for one answer.
    """

    def __init__(self, url: str, timeout_s: float):
        self.url, self._timeout_s = url.rstrip("/"), timeout_s
        self.model = self.device = ""
        self._client = httpx.AsyncClient(
            base_url=self.url,
            timeout=httpx.Timeout(timeout_s, connect=5.0),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=1.0),
            trust_env=False,
        )

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.aclose()

    async def alive(self) -> bool:
        """Whether it answers now."""
        try:
            return (await self._client.get("/health", timeout=5.0)).is_success
        except httpx.TransportError:
            return False

    async def check(self, max_len: int, lora: models.Lora | None = None) -> None:
        """Reads what the server can do.

        Args:
          max_len: tokens of the longest prompt with its response.
          lora: the adapters that it will be sent, if any.

        Raises:
          ServerError: something is missing; the message says which flag or version
            brings it.
        """
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
            self._check_adapters(lora, routes, info["vllm_config"].get("lora_config"))
        if model["max_model_len"] < max_len:
            raise ServerError(
                f"{self.url} takes {model['max_model_len']} tokens, but "
                f"data.max_prompt_length + rollout.max_response_length is {max_len}; "
                f"start it with --max-model-len {max_len}"
            )
        if model["logprobs_mode"] != "processed_logprobs":
            raise ServerError(
                f"{self.url} gives {model['logprobs_mode']}, which are not those of "
                "the distribution that is sampled from; start it with "
                "--logprobs-mode processed_logprobs"
            )
        self.model = (await self.ask("GET", "/v1/models"))["data"][0]["id"]

    def _check_adapters(
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

    async def complete(
        self, tokens: Sequence[int], options: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """Responses to `tokens`; `options` are those of vLLM's /v1/completions."""
        body = {
            "model": self.model,
            "prompt": list(tokens),
            "logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            **options,
        }
        return (await self.ask("POST", "/v1/completions", body))["choices"]

    async def score(self, tokens: Sequence[int]) -> list[float]:
        """The log-probability of every token but the first, nats."""
        options = {"max_tokens": 1, "prompt_logprobs": 0, "temperature": 1.0}
        [answer] = await self.complete(tokens, options)
        return of_prompt(tokens, answer)

    async def reload(self, directory: Path) -> None:
        """Reads the weights of a Hugging Face directory in place of its own.

        Raises:
          ServerError: it cannot read them, or still holds keys and values of the old
            ones.
        """
        call = {"method": "reload_weights", "kwargs": {"weights_path": str(directory)}}
        await self._take(directory, [("/collective_rpc", call)])

    async def adapt(self, name: str, directory: Path) -> None:
        """Reads an adapter from a folder of PEFT, and answers with it from now on, in
        place of those whose names are `name` but for its number.

        Args:
          name: ends with a number.

        Raises:
          ServerError: it cannot read it, or still holds keys and values of another of
            that name.
        """
        kind = name.rstrip("0123456789")
        known = [entry["id"] for entry in (await self.ask("GET", "/v1/models"))["data"]]
        others = [
            {"lora_name": id}
            for id in known
            if id.startswith(kind) and id.removeprefix(kind).isdigit()
        ]
        call = {"lora_name": name, "lora_path": str(directory)}
        await self._take(
            directory, [*((_UNLOAD, other) for other in others), (_LOAD, call)]
        )
        self.model = name

    async def _take(
        self, directory: Path, calls: Sequence[tuple[str, Mapping[str, Any]]]
    ) -> None:
        """Has weights read while nothing is generated, and forgets those of before."""
        await self.ask("POST", "/pause?mode=wait")
        try:
            for route, call in calls:
                await self.ask("POST", route, call)
        except (ServerError, Lost) as error:
            if isinstance(error, Lost) and not error.said:
                raise
            raise ServerError(
                f"{error}; can it read {directory}? rollout.vllm.weights_dir must be a "
                "folder that trainer and server both see"
            ) from None
        cleared = await self.ask("POST", "/reset_prefix_cache")
        if cleared and not cleared["success"]:  # the oldest versions answer nothing
            raise ServerError(
                f"{self.url} did not reset its prefix cache ({cleared}), so it would "
                "go on with keys and values of old weights"
            )
        await self.ask("POST", "/resume")

    async def ask(self, method: str, path: str, body: Any = None) -> Any:
        """The answer of one route.

        While the server is paused (503) it is asked again, ever less often.

        Raises:
          ServerError: it refuses.
          Lost: it does not answer.
        """
        start, wait, tries = time.monotonic(), 0.05, 0
        while True:
            try:
                answer = await self._client.request(method, path, json=body)
            except httpx.TransportError as error:
                tries += 1  # an idle connection that the server closed, or worse
                broke = not isinstance(error, httpx.TimeoutException)
                if broke and tries < 3 and await self.alive():
                    continue
                raise Lost(f"{self.url}: {type(error).__name__} {error}") from None
            if answer.status_code != 503:
                break
            if time.monotonic() - start > self._timeout_s:
                raise Lost(f"{self.url} refuses work for {self._timeout_s:.0f} s (503)")
            await asyncio.sleep(wait)
            wait = min(2 * wait, 2.0)
        if answer.is_success:
            is_json = "json" in answer.headers.get("content-type", "")
            return answer.json() if answer.content and is_json else None
        if answer.is_server_error and not await self.alive():
            said = answer.text[:500]
            raise Lost(f"{self.url}: {answer.status_code} {said}", said)
        raise ServerError(f"{self.url}{path}: {answer.status_code} {answer.text[:500]}")


class Process:
    """A server of our own. It ends with `stop`, or when this process ends, however.

    Args:
      command: what starts vLLM's API server; `arguments` are added to it.
      arguments: as vLLM takes them, without host and port.
      environment: variables besides our own.
      port: to listen on; a free one if not given.
      log: file that its output is added to.
    """

    def __init__(
        self,
        command: Sequence[str],
        arguments: Sequence[str],
        environment: Mapping[str, str],
        port: int | None,
        log: Path,
    ):
        self.port, self.log = port or _free_port(), log
        where = ["--host", "127.0.0.1", "--port", str(self.port)]
        log.parent.mkdir(parents=True, exist_ok=True)
        self._from = log.stat().st_size if log.exists() else 0
        with log.open("ab") as output:
            self._guard = subprocess.Popen(
                [sys.executable, "-P", guard.__file__, *command, *arguments, *where],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | _OWN_ENVIRONMENT | dict(environment),
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
        end = self.last_words(200)
        why = [say for sign, say in _KNOWN_FAILURES.items() if sign in end]
        reason = f": {why[0]}" if why else ""
        return ServerError(
            f"the vLLM server {what}{reason}. The end of {self.log}:\n"
            f"{self.last_words()}"
        )


_OWN_ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",  # the routes that weights are sent through
    "VLLM_NO_USAGE_STATS": "1",
    "PYTHONPATH": "",  # its Python environment is not ours
}


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
