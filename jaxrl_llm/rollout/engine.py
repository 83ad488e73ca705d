"""What every generation engine offers.

`load` weights, `submit` requests, take completions as they finish. The JAX engine's
response is a function of (weights, prompt, sampling, seed, prompt id, sample, turn)
alone: it does not depend on which slot, batch or order produced it. vLLM's is one too
where `rollout.vllm.reproducible` asks for it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
from jax.stages import Lowered

from jaxrl_llm.data.types import Completion
from jaxrl_llm.sharding import processes


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. Names and meanings as in vLLM."""

    max_tokens: int
    """The response ends here at the latest (finish reason "length")."""
    temperature: float = 1.0
    """Logits are divided by it; 0 takes the most likely token."""
    top_k: int = -1
    """Only the k most likely tokens; -1 for all."""
    top_p: float = 1.0
    """Only the smallest set of tokens whose probability reaches p."""
    min_p: float = 0.0
    """Only tokens at least min_p times as likely as the most likely one."""
    logprobs: int = 0
    """So many of the most likely tokens are told at every position."""
    prompt_logprobs: bool = False
    """Tell the prompt's log-probabilities too."""
    stop: tuple[str, ...] = ()
    """The response ends with the token that completes one of these strings."""
    stop_token_ids: tuple[int, ...] = ()
    """The response ends with one of these tokens, which is part of it."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be >= 0, got {self.temperature}")
        if self.top_k != -1 and self.top_k < 1:
            raise ValueError(f"top_k must be -1 or at least 1, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}")
        if self.logprobs < 0:
            raise ValueError(f"logprobs must be >= 0, got {self.logprobs}")
        if "" in self.stop:
            raise ValueError("a stop string must not be empty")

    @property
    def truncates(self) -> bool:
        """Whether some tokens may not be drawn."""
        return self.top_k != -1 or self.top_p < 1 or self.min_p > 0

    @property
    def plain(self) -> bool:
        """Whether tokens are drawn from the model's own distribution."""
        return self.temperature == 1 and not self.truncates


@dataclass(frozen=True, kw_only=True)
class Use:
    """What an engine will be asked at a time, again and again."""

    num_prompts: int
    num_samples: int
    """Responses to each."""
    sampling: Sampling
    continued: int = 0
    """Tokens that are read between two turns, at most; 0 where there is one turn."""

    def __post_init__(self) -> None:
        for name in ("num_prompts", "num_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, not positive")

    @property
    def num_responses(self) -> int:
        """To all prompts."""
        return self.num_prompts * self.num_samples


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt, to be answered `num_samples` times."""

    prompt_id: int
    tokens: tuple[int, ...]
    num_samples: int
    seed: int
    """With `prompt_id`, sample and turn, the key of the random numbers; 32 bits."""
    sampling: Sampling
    first_sample: int = 0
    """Number of the first of the samples; the others follow it."""
    turn: int = 0
    """Which turn of the policy in an episode this is, where `tokens` hold those before
    it."""
    key_id: int | None = None
    """In place of `prompt_id` in the key of the random numbers, where ids only tell
    requests apart."""

    @property
    def keyed_by(self) -> int:
        """What stands for the prompt in the key of the random numbers."""
        return self.prompt_id if self.key_id is None else self.key_id

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {self.num_samples}")
        for name in ("first_sample", "turn"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"a seed is from 0 to {2**32 - 1}, got {self.seed}")

    @property
    def samples(self) -> range:
        """The numbers of its samples."""
        return range(self.first_sample, self.first_sample + self.num_samples)

    def check(self, vocab_size: int, max_model_len: int) -> None:
        """Raises ValueError for a request that can never be answered.

        Args:
          vocab_size: tokens that the model knows.
          max_model_len: tokens of the longest sequence that an engine holds.
        """
        prompt, sampling = f"prompt {self.prompt_id}", self.sampling
        if not self.tokens:
            raise ValueError(f"{prompt} is empty")
        for what, tokens in ((prompt, self.tokens), ("stop", sampling.stop_token_ids)):
            for token in (min(tokens, default=0), max(tokens, default=0)):
                if not 0 <= token < vocab_size:
                    raise ValueError(
                        f"{what} has token {token}, but the model's vocabulary has "
                        f"{vocab_size}"
                    )
        if len(self.tokens) + sampling.max_tokens > max_model_len:
            raise ValueError(
                f"{prompt} has {len(self.tokens)} tokens and asks for up to "
                f"{sampling.max_tokens} more, but max_model_len is {max_model_len}"
            )


More = Callable[[bool], Sequence[Request]]
"""Requests that came up while others were answered. It is told whether the engine is
idle: then it may wait for one, and nothing means that there will be none."""


def no_more(idle: bool) -> Sequence[Request]:
    """`More` for those who have asked everything."""
    return ()


@runtime_checkable
class Engine(Protocol):
    """A generator of completions. See the module docstring for the promise it makes."""

    def load(self, params: Any, version: int) -> Mapping[str, float]:
        """Takes new weights, in the trainer's layout.

        Requests submitted later use these weights or newer, and their completions carry
        the version: the training step that made the weights.

        Returns:
          Metrics of the transfer.
        """

    def submit(self, requests: Sequence[Request]) -> None:
        """Queues requests. Raises ValueError for one that can never fit."""

    def completions(self, more: More = no_more) -> Iterator[Completion]:
        """Yields completions as they finish, until nothing submitted is outstanding.

        Args:
          more: asked again and again for what is to be submitted besides. A request
            that begins with the tokens of an answered one is prefilled only from where
            they end, where an engine keeps what it knows of them.
        """

    def memory(self, num_rows: int, num_tokens: int) -> dict[str, int]:
        """Bytes by purpose on each of the trainer's devices, while `num_rows` responses
        are made, each with its prompt at most `num_tokens` long."""

    def programs(
        self,
        uses: Sequence[Use],
        prompts: Iterable[Sequence[int]],
        resident: Callable[[jax.Device], int] | None = None,
    ) -> Mapping[str, Callable[[], Lowered]]:
        """Every program of this process that these uses need, whatever lengths there
        are, each from shapes alone: its name, and what lowers it. What is compiled
        before it is called does not make anybody wait then.

        Args:
          prompts: tokens of all that will be asked.
          resident: bytes that others hold on a device while responses are made; not
            known if not given.
        """

    def close(self) -> None:
        """Ends what the engine runs outside of this process."""


def generate(engine: Engine, requests: Sequence[Request]) -> list[list[Completion]]:
    """Submits `requests` and waits: one list of completions per request, by sample.

    Raises:
      ValueError: two requests share a prompt id, so that answers cannot be told apart.
    """
    ids = [request.prompt_id for request in requests]
    if len(set(ids)) != len(ids):
        twice = sorted({i for i in ids if ids.count(i) > 1})
        raise ValueError(f"prompt ids submitted twice: {twice}")
    engine.submit(requests)
    found: dict[tuple[int, int], Completion] = {
        (c.prompt_id, c.sample): c for c in engine.completions()
    }
    return [
        [found[request.prompt_id, sample] for sample in request.samples]
        for request in requests
    ]


def generate_together(
    engine: Engine, requests: Sequence[Request]
) -> list[list[Completion]]:
    """`generate`, of many processes by each for its share of the requests; all call it
    with the same ones and get all completions."""
    parts = processes.gather(generate(engine, processes.share(requests)))
    return [group for part in parts for group in part]
