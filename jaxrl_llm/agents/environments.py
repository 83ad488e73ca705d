"""What stands at the other end of an episode: it says the first words, answers every
turn of the policy, and says what the episode was worth."""

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

from jaxrl_llm.data.types import Message, Prompt, Status

Key = tuple[int, int]
"""Id of the prompt, and sample: which episode of a batch."""


@dataclass(frozen=True, kw_only=True)
class Opening:
    """The beginning of an episode."""

    messages: tuple[Message, ...]
    """The whole first conversation, with the environment's first words."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """JSON schemas of the functions that the policy may call."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What an environment answers to one turn of the policy."""

    messages: tuple[Message, ...] = ()
    """What follows that turn, in this order. Roles are "tool" or "user"."""
    reward: float | None = None
    """What that turn alone was worth; None where it has none."""
    ended: Status | None = None
    """Why the episode is over; None if it goes on, which takes a message."""
    calls: int = 0
    """Tools that were called."""
    failures: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    """How often something went wrong, by kind. The policy reads it in `messages`, or
    `ended` says so."""
    seconds: float = 0.0
    """How long it took."""
    why: str = ""
    """What happened, where `ended` is a failure."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a whole episode came to."""

    reward: float | None
    """None from an environment that leaves rewards to reward functions."""
    environment: Any = None
    """The instance that played it, for reward functions that take `environments`; None
    where it lived in another process, or there is none."""
    why: str = ""
    """What happened, where it could not say what the episode was worth."""


@runtime_checkable
class Environments(Protocol):
    """All environments of a run. Its futures may be made ready by other threads, and
    their results are the same for any number of episodes side by side.

    Each future raises ValueError where the environment cannot be used at all; an
    episode that breaks says so in `Reply.ended`.
    """

    def open(self, key: Key, prompt: Prompt, seed: int) -> Future[Opening]:
        """Begins an episode.

        Args:
          seed: 32 bits, from the run's seed, the prompt and the sample.
        """

    def answer(self, key: Key, text: str) -> Future[Reply]:
        """Answers a turn of the policy, `text` without special tokens."""

    def close(self, key: Key) -> Future[Outcome]:
        """Ends an episode, whether or not the environment said that it is over."""

    def shutdown(self) -> None:
        """Ends all workers."""
