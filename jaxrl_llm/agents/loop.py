"""Episodes: the policy and its environments take turns, none waits for another's.

A turn that has ended goes to its environment at once, and the engine goes on with other
episodes; when the answer is there, its tokens are put behind those that were sampled,
and the next turn is asked for. What the policy reads is what it wrote, token by token.

    engine.completions() -> turn -> Environments.answer -> splice -> Request -> ...

An episode is a function of (weights, prompt, sampling, seed, prompt id, sample) and of
what its environment answers: not of the others, and not of how long answers take.
"""

import dataclasses
import queue
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxrl_llm.agents.environments import Environments, Opening, Outcome, Reply
from jaxrl_llm.data.types import (
    Completion,
    Episode,
    Message,
    Played,
    Prompt,
    Status,
    Turn,
)
from jaxrl_llm.rollout.engine import Engine, Request


@runtime_checkable
class Template(Protocol):
    """Puts what is said into tokens, as the chat template does."""

    def begin(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
    ) -> tuple[int, ...]:
        """A whole conversation, and what begins the policy's turn."""

    def splice(
        self,
        sampled: Sequence[int],
        finish_reason: str,
        messages: Sequence[Message],
    ) -> tuple[int, ...]:
        """What stands behind a turn of the policy: what is missing of its end, then the
        messages, then what begins its next turn."""

    def rewritten(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        tokens: Sequence[int],
    ) -> tuple[int, ...] | None:
        """What `begin` makes of a conversation whose policy has read and written
        `tokens`; None if it says the same."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long an episode may be, and what becomes of one that failed."""

    max_turns: int
    """Turns of the policy."""
    max_tokens: int
    """Behind the opening: what is sampled, and what is read between."""
    max_prompt_length: int
    """Tokens of the opening."""
    forks: bool = False
    """A conversation that the template would write otherwise than it was sampled goes
    on as the template writes it, in a new context."""
    together: bool = False
    """Wait for all answers before the engine goes on, so that what it computes together
    does not hang on how long they take."""
    at_once: int | None = None
    """Episodes under way at a time; all if not given."""
    masked: frozenset[Status] = frozenset()
    """Nothing is learned from an episode that ends so."""
    retried: frozenset[Status] = frozenset()
    """It is begun anew, with other random numbers; and masked after the last time."""
    max_retries: int = 0
    """How often."""


class CannotOpen(ValueError):
    """An environment could not be opened; the message names the prompt."""


def play(
    engine: Engine,
    environments: Environments,
    template: Template,
    prompts: Sequence[Prompt],
    requests: Sequence[Request],
    limits: Limits,
) -> list[list[Episode]]:
    """Plays the episodes that `requests` ask for: one list per prompt, by sample.

    Args:
      requests: one for each prompt, whose tokens are not read: the opening takes their
        place. `max_tokens` of its sampling is that of a turn.

    Raises:
      ValueError: an opening is longer than it may be, an environment cannot be used, or
        two prompts share an id.
    """
    ids = [prompt.id for prompt in prompts]
    if len(set(ids)) != len(ids):
        twice = sorted({i for i in ids if ids.count(i) > 1})
        raise ValueError(f"prompt ids played twice: {twice}")
    loop = _Loop(environments, template, limits)
    for prompt, request in zip(prompts, requests, strict=True):
        loop.waiting += [_Playing(prompt, request, i) for i in request.samples]
    for completion in engine.completions(loop.more):
        loop.take(completion)
    return [
        [loop.done[request.prompt_id, sample] for sample in request.samples]
        for request in requests
    ]


@dataclass(eq=False)
class _Playing:
    """An episode under way."""

    prompt: Prompt
    request: Request
    sample: int
    attempt: int = 0
    opening: tuple[Message, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    begun: tuple[int, ...] = ()
    """Tokens of the opening."""
    said: list[Message] = field(default_factory=list)
    """Behind the opening."""
    context: list[int] = field(default_factory=list)
    """Tokens that the policy sees, from the first."""
    length: int = 0
    """Tokens of all contexts behind the opening."""
    turns: list[Turn] = field(default_factory=list)
    status: Status = "completed"
    why: str = ""
    calls: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    prefilled: int | None = 0

    @property
    def key(self) -> tuple[int, int]:
        return self.prompt.id, self.sample

    @property
    def num_turns(self) -> int:
        """Turns of the policy so far."""
        return sum(turn.finish_reason is not None for turn in self.turns)

    def seed(self, *more: int) -> int:
        """32 bits; another one for every attempt but the first."""
        words = [self.request.seed, *more, *[self.attempt] * bool(self.attempt)]
        return int(np.random.SeedSequence(words).generate_state(1)[0])

    def asks(self, max_tokens: int) -> Request:
        """The request for its next turn."""
        request = self.request
        return dataclasses.replace(
            request,
            tokens=tuple(self.context),
            num_samples=1,
            first_sample=self.sample,
            turn=self.num_turns,
            seed=self.seed() if self.attempt else request.seed,
            sampling=dataclasses.replace(request.sampling, max_tokens=max_tokens),
        )

    def hears(
        self, messages: Sequence[Message], tokens: Sequence[int], anew: bool = False
    ) -> None:
        """Takes what the environment said, and which tokens that is; none if the policy
        will not read it.

        Args:
          anew: whether these are all that it sees from now on.
        """
        for i, message in enumerate(messages):
            own, first = (tokens, anew) if i == 0 else ((), False)
            text, role = str(message.get("content", "")), str(message["role"])
            self.turns.append(Turn.observed(role, own, text, new_context=first))
        if tokens and not messages:  # what the template alone puts between two turns
            self.turns.append(Turn.observed("user", tokens, ""))
        self.said += messages
        self.context = [*tokens] if anew else [*self.context, *tokens]
        self.length += len(tokens)

    def ended(self, outcome: Outcome, masked: bool) -> Episode:
        """The whole of it."""
        return Episode(
            prompt_id=self.prompt.id,
            sample=self.sample,
            turns=tuple(self.turns),
            status=self.status,
            opening=self.opening,
            opening_tokens=self.begun,
            masked=masked,
            played=Played(
                reward=outcome.reward,
                calls=self.calls,
                failures=dict(self.failures),
                seconds=self.seconds,
                why=self.why,
                attempt=self.attempt,
                prefilled=self.prefilled,
                environment=outcome.environment,
            ),
        )


_Arrival = tuple[tuple[int, int], Callable[[], Request | None]]
"""Which episode an answer is for, and what is to be done with it."""


class _Loop:
    """All episodes of a call of `play`."""

    def __init__(self, environments: Environments, template: Template, limits: Limits):
        self._environments, self._template = environments, template
        self._limits = limits
        self.waiting: deque[_Playing] = deque()
        self.done: dict[tuple[int, int], Episode] = {}
        self._sampling: dict[tuple[int, int], _Playing] = {}
        self._open = 0
        self._pending = 0  # answers of environments
        self._arrived: queue.SimpleQueue[_Arrival] = queue.SimpleQueue()

    def more(self, idle: bool) -> list[Request]:
        """The turns that can be asked for now; see `rollout.engine.More`."""
        found: list[Request] = []
        while True:
            most = self._limits.at_once or len(self.waiting) + self._open
            while self.waiting and self._open < most:
                self._begin(self.waiting.popleft())
            arrived = self._together() if self._limits.together else []
            if not self._limits.together:
                waits = idle and not found and self._pending > 0
                with suppress(queue.Empty):
                    arrived.append(self._arrived.get(block=waits))
            if not arrived:
                return found
            self._pending -= len(arrived)
            found += [r for _, then in arrived if (r := then()) is not None]

    def _together(self) -> list["_Arrival"]:
        """All that is pending, in an order that time has no part in."""
        found = [self._arrived.get() for _ in range(self._pending)]
        return sorted(found, key=lambda arrival: arrival[0])

    def take(self, completion: Completion) -> None:
        """A turn of the policy has ended."""
        playing = self._sampling.pop((completion.prompt_id, completion.sample))
        playing.turns.append(Turn.sampled(completion))
        playing.said.append({"role": "assistant", "content": completion.text})
        playing.context += completion.tokens.tolist()
        playing.length += len(completion.tokens)
        if completion.prefilled is None or playing.prefilled is None:
            playing.prefilled = None
        else:
            playing.prefilled += completion.prefilled
        if completion.finish_reason == "length":
            self._end(playing, "max_tokens")
            return
        answer = self._environments.answer(playing.key, completion.text)
        self._when(answer, playing, self._answered)

    def _when(
        self,
        future: Future[Any],
        playing: _Playing,
        then: Callable[[_Playing, Future[Any]], Request | None],
    ) -> None:
        """Calls `then` in the thread of the engine, when it asks for more."""
        self._pending += 1
        future.add_done_callback(
            lambda ready: self._arrived.put((playing.key, lambda: then(playing, ready)))
        )

    def _begin(self, playing: _Playing) -> None:
        self._open += 1
        seed = playing.seed(*playing.key)
        opening = self._environments.open(playing.key, playing.prompt, seed)
        self._when(opening, playing, self._opened)

    def _opened(self, playing: _Playing, future: Future[Opening]) -> Request | None:
        where = f"prompt {playing.prompt.id}, episode {playing.sample}"
        opening = _result(future)
        if isinstance(opening, Exception):
            playing.status = "env_error"
            if self._again(playing):
                return None
            raise CannotOpen(
                f"{where}: its environment could not be opened "
                f"(attempts: {playing.attempt + 1}): {_described(opening)}\nNo episode "
                "has begun that could be masked; see agent.on_status.env_error: retry "
                "and agent.max_retries"
            ) from opening
        playing.opening = tuple(opening.messages)
        playing.tools = tuple(opening.tools)
        playing.begun = tuple(self._template.begin(opening.messages, opening.tools))
        playing.context = list(playing.begun)
        most = self._limits.max_prompt_length
        if len(playing.begun) > most:
            raise ValueError(
                f"{where}: the conversation that its environment opens has "
                f"{len(playing.begun)} tokens, data.max_prompt_length is {most}; "
                "raise it"
            )
        return self._ask(playing, self._limits.max_tokens)

    def _answered(self, playing: _Playing, future: Future[Reply]) -> Request | None:
        reply = _result(future)
        if isinstance(reply, Exception):
            reply = Reply(
                ended="env_error",
                why=_described(reply),
                failures={"env_error": 1},
            )
        turn = playing.turns[-1]
        playing.turns[-1] = dataclasses.replace(turn, reward=reply.reward)
        playing.calls += reply.calls
        playing.failures.update(reply.failures)
        playing.seconds += reply.seconds
        playing.why = reply.why
        ended = reply.ended
        if ended is None and playing.num_turns == self._limits.max_turns:
            ended = "max_turns"
        if ended is None:
            tokens = self._template.splice(
                turn.tokens.tolist(), turn.finish_reason, reply.messages
            )
            written = self._written_anew(playing, reply.messages, tokens)
            tokens = written or tokens
            room = self._limits.max_tokens - playing.length - len(tokens)
            if room > 0:
                playing.hears(reply.messages, tokens, anew=written is not None)
                return self._ask(playing, room)
            ended = "context"
        playing.hears(reply.messages, ())
        self._end(playing, ended)
        return None

    def _written_anew(
        self, playing: _Playing, reply: Sequence[Message], tokens: Sequence[int]
    ) -> tuple[int, ...] | None:
        """The conversation in a new context, if it goes on in one.

        Args:
          tokens: that `reply` would be behind those that the policy sees.
        """
        if not self._limits.forks or not reply:
            return None
        messages = [*playing.opening, *playing.said, *reply]
        read = [*playing.context, *tokens]
        return self._template.rewritten(messages, playing.tools, read)

    def _ask(self, playing: _Playing, room: int) -> Request:
        """The next turn, for which there is room for so many tokens."""
        self._sampling[playing.key] = playing
        return playing.asks(min(room, playing.request.sampling.max_tokens))

    def _end(self, playing: _Playing, status: Status) -> None:
        playing.status = status
        self._when(self._environments.close(playing.key), playing, self._closed)

    def _closed(self, playing: _Playing, future: Future[Outcome]) -> None:
        outcome = _result(future)
        if isinstance(outcome, Exception):
            outcome = Outcome(reward=None, why=_described(outcome))
        if outcome.why:
            playing.status, playing.why = "env_error", outcome.why
            playing.failures["env_error"] += 1
        if self._again(playing):
            return
        self._open -= 1
        limits = self._limits
        masked = playing.status in limits.masked | limits.retried
        self.done[playing.key] = playing.ended(outcome, masked)

    def _again(self, playing: _Playing) -> bool:
        """Whether a closed episode is to be begun anew; puts it among the first that
        wait."""
        limits = self._limits
        if (
            playing.status not in limits.retried
            or playing.attempt == limits.max_retries
        ):
            return False
        self._open -= 1
        self.waiting.appendleft(
            _Playing(
                playing.prompt, playing.request, playing.sample, playing.attempt + 1
            )
        )
        return True


def _result(future: Future[Any]) -> Any:
    """What an environment gave, or what it raised.

    Raises:
      ValueError: it cannot be used at all.
    """
    error = future.exception()
    if isinstance(error, ValueError) or not isinstance(error, Exception | None):
        raise error
    return error or future.result()


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
