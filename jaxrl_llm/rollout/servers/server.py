"""One server: what it can do, and what it is asked.

What differs between kinds of servers is a dialect: a subclass of `Server` with its
routes, and with the arguments that start a server of ours. All else is shared.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

try:
    import httpx
except ModuleNotFoundError:
    raise ImportError(
        "a rollout.engine of servers needs the package httpx, which is not installed: "
        "pip install 'jaxrl-llm[vllm]'"
    ) from None

import jax.numpy as jnp
import numpy as np

from jaxrl_llm import models
from jaxrl_llm.rollout.engine import Request


class ServerError(OSError):
    """A server cannot be used; the message says why and what brings it about."""


class Lost(Exception):
    """A server did not answer in time, the connection broke, or it died of what it was
    asked; its last words are then in `said`."""

    def __init__(self, message: str, said: str = ""):
        super().__init__(message)
        self.said = said


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Servers that generate: running ones (`urls`), or ours, which end with the run."""

    urls: Sequence[str] = ()
    """Running servers, such as http://host:8000. Requests are spread over them."""
    command: Sequence[str] = ()
    """Starts one of ours: the Python of its environment, or a container."""
    args: Sequence[str] = ()
    """More arguments of the command."""
    env: Mapping[str, str] = field(default_factory=dict)
    """More variables of its environment."""
    devices: Sequence[str] = ()
    """One server of ours per entry, which becomes its CUDA_VISIBLE_DEVICES; without
    entries one server, which sees the devices that this process sees."""
    port: int | None = None
    """Port of the first server of ours; the others follow; free ports if None."""
    weights_dir: str | None = None
    """Folder that weights are sent through; trainer and servers must see it. If None,
    /dev/shm for servers of ours where there is such, else `directory`."""
    start_timeout_s: float = 900.0
    """Longest wait for a server to come up, seconds."""
    request_timeout_s: float = 600.0
    """Longest wait for the responses to one prompt, seconds. A server of ours that
    takes longer is started again."""
    max_restarts: int = 3
    """How often servers may be lost between two transfers of weights."""
    reproducible: bool = False
    """Draw every group of responses from a seed of its own."""
    max_probe_diff: float = 0.1
    """Largest mean difference in nats between server and trainer on the probes."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What a server of ours is started for."""

    dtype: str
    """Dtype of weights, activations and cache."""
    max_model_len: int
    """Longest prompt and response together, tokens."""
    max_num_seqs: int
    """Sequences that it decodes together."""
    skip_special_tokens: bool = True
    """Leave special tokens out of texts, and of where stop strings are looked for."""
    lora: models.Lora | None = None
    """The adapters that it will be sent, if any."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """Some of the responses to a request that are asked for together."""

    request: Request
    samples: range
    """Their numbers."""
    stop_token_ids: tuple[int, ...]
    """Tokens that end a response: the model's own, then those of the request."""
    skip_special_tokens: bool
    reproducible: bool
    """See `ServerSettings`."""

    @property
    def seed(self) -> int:
        """One for these samples, 31 bits."""
        request = self.request
        words = [request.seed, request.prompt_id, self.samples[0]]
        words += [request.turn] if request.turn else []
        return int(np.random.SeedSequence(words).generate_state(1)[0] >> 1)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One response, as a server gave it."""

    index: int
    """Which of the samples that were asked for together, from 0."""
    tokens: Sequence[int]
    logprobs: Sequence[float]
    """Under the distribution drawn from; at temperature 0, under softmax(logits)."""
    finish_reason: str
    raw_logprobs: Sequence[float] | None = None
    full_logprobs: Sequence[float] | None = None
    """See `Completion`; None where a server does not tell."""
    likeliest: Sequence[Mapping[int, float]] = ()
    """Log-probabilities of at least so many tokens as asked for, at every position."""
    prompt_logprobs: Sequence[float] | None = None
    """The prompt's, but that of its first token; None if not asked for."""


class Server:
    """A client of one server. Its subclasses are dialects.

    Args:
      url: such as http://127.0.0.1:8000.
      timeout_s: longest wait for one answer.
    """

    name: ClassVar[str]
    """What people call such a server."""
    section: ClassVar[str]
    """Where its settings are in a configuration."""
    known_failures: ClassVar[Mapping[str, str]] = {}
    """What the end of a log says, and what to do about it."""

    def __init__(self, url: str, timeout_s: float):
        self.url, self._timeout_s = url.rstrip("/"), timeout_s
        self.model = self.device = ""
        self._client = httpx.AsyncClient(
            base_url=self.url,
            headers=self.headers(),
            timeout=httpx.Timeout(timeout_s, connect=5.0),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=1.0),
            trust_env=False,
        )

    # What a dialect says.

    @classmethod
    def alone(cls, greedy: bool) -> bool:
        """Whether two responses to one prompt cannot be asked for together.

        Args:
          greedy: whether they are the most likely tokens.
        """
        return False

    @classmethod
    def headers(cls) -> dict[str, str]:
        """Sent with everything that is asked."""
        return {}

    @classmethod
    def own_command(cls) -> tuple[str, ...]:
        """What starts one of ours where a configuration says no command."""
        raise ValueError(f"{cls.section}.command is empty; say what starts a server")

    @classmethod
    def check_adapters(cls, lora: models.Lora) -> None:
        """Raises ValueError if no such server takes adapters like these."""
        raise ValueError(
            f"{cls.name} is sent no adapters alone; set rollout.lora to merge"
        )

    @classmethod
    def arguments(cls, model: Path, launch: Launch) -> tuple[str, ...]:
        """What the command that starts one of ours is given, without host and port."""
        raise NotImplementedError

    @classmethod
    def environment(cls, launch: Launch) -> dict[str, str]:
        """Variables besides our own that one of ours is started with."""
        return {}

    @classmethod
    def sent_dtype(cls, launch: Launch) -> Any:
        """What weights are rounded to on their way."""
        return jnp.bfloat16

    @classmethod
    def as_taken(
        cls, arch: models.Architecture, params: Any, device: str
    ) -> tuple[models.Architecture, Any]:
        """The model in a form in which new weights of it are taken.

        Args:
          device: of the servers, as far as it is known.
        """
        return arch, params

    async def check(self, max_len: int, lora: models.Lora | None = None) -> None:
        """Reads what the server can do.

        Args:
          max_len: tokens of the longest prompt with its response.
          lora: the adapters that it will be sent, if any.

        Raises:
          ServerError: something is missing; the message says which flag or version
            brings it.
        """
        raise NotImplementedError

    async def complete(self, ask: Ask) -> list[Answer]:
        """Responses, also those that the server dropped: "abort" ended these."""
        raise NotImplementedError

    async def sample(self, tokens: Sequence[int], count: int) -> list[int]:
        """At most `count` tokens that the model says after `tokens`: a probe's."""
        raise NotImplementedError

    async def score(self, tokens: Sequence[int]) -> list[float]:
        """The log-probability of every token but the first, nats."""
        raise NotImplementedError

    async def pause(self) -> None:
        """Has it finish what it generates, and begin nothing."""
        raise NotImplementedError

    async def resume(self) -> None:
        """Has it generate again."""
        raise NotImplementedError

    async def forget(self) -> None:
        """Empties its cache of keys and values.

        Raises:
          ServerError: it does not.
        """
        raise NotImplementedError

    async def read_weights(self, directory: Path) -> None:
        """Reads the weights of a Hugging Face directory in place of its own."""
        raise NotImplementedError

    async def read_adapter(self, name: str, directory: Path) -> None:
        """Reads an adapter from a folder of PEFT, in place of those whose names are
        `name` but for its number."""
        raise NotImplementedError

    def why_stale(self, arch: models.Architecture) -> str:
        """What may be the reason if a running server keeps old weights, as the end of
        a message."""
        return ""

    # What all share.

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.aclose()

    async def alive(self) -> bool:
        """Whether it answers now."""
        try:
            return (await self._client.get("/health", timeout=5.0)).is_success
        except httpx.TransportError:
            return False

    def check_length(self, there: int, max_len: int, flag: str) -> None:
        """Raises ServerError if its sequences are shorter than those of the run.

        Args:
          there: tokens of the longest that it takes.
          flag: what makes it take longer ones.
        """
        if there < max_len:
            raise ServerError(
                f"{self.url} takes {there} tokens, but data.max_prompt_length + "
                f"rollout.max_response_length is {max_len}; start it with "
                f"{flag} {max_len}"
            )

    async def reload(self, directory: Path) -> None:
        """Reads the weights of a Hugging Face directory in place of its own, while
        nothing is generated. The directory's name is their version.

        Raises:
          ServerError: it cannot read them, or still holds keys and values of the old
            ones.
        """
        await self._take(directory, self.read_weights(directory))

    async def adapt(self, name: str, directory: Path) -> None:
        """Reads an adapter from a folder of PEFT, and answers with it from now on, in
        place of those whose names are `name` but for its number.

        Args:
          name: ends with a number.

        Raises:
          ServerError: it cannot read it, or still holds keys and values of another of
            that name.
        """
        await self._take(directory, self.read_adapter(name, directory))
        self.model = name

    async def _take(self, directory: Path, reading: Any) -> None:
        """Has weights read while nothing is generated, and forgets those of before."""
        try:
            await self.pause()
        except BaseException:
            reading.close()
            raise
        try:
            await reading
        except (ServerError, Lost) as error:
            if isinstance(error, Lost) and not error.said:
                raise
            raise ServerError(
                f"{error}; can it read {directory}? {self.section}.weights_dir must be "
                "a folder that trainer and server both see"
            ) from None
        await self.forget()
        await self.resume()

    async def ask(self, method: str, path: str, body: Any = None) -> Any:
        """The answer of one route.

        While the server is paused (503) or has no room (429) it is asked again, ever
        less often.

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
            if answer.status_code not in (429, 503):
                break
            if time.monotonic() - start > self._timeout_s:
                raise Lost(
                    f"{self.url} refuses work for {self._timeout_s:.0f} s "
                    f"({answer.status_code})"
                )
            await asyncio.sleep(wait)
            wait = min(2 * wait, 2.0)
        if answer.is_success:
            is_json = "json" in answer.headers.get("content-type", "")
            return answer.json() if answer.content and is_json else None
        if answer.is_server_error and not await self.alive():
            said = answer.text[:500]
            raise Lost(f"{self.url}: {answer.status_code} {said}", said)
        raise ServerError(f"{self.url}{path}: {answer.status_code} {answer.text[:500]}")
