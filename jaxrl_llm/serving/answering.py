"""From a request that was taken to its answer, whole or in pieces, for as long as
somebody waits for it."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from jaxrl_llm.data.types import Completion
from jaxrl_llm.serving import answers
from jaxrl_llm.serving.metrics import Metrics
from jaxrl_llm.serving.worker import Dropped, Event, Ticket, Worker


class Gone(Exception):
    """The client does not wait any more."""


@dataclass(frozen=True, kw_only=True)
class Answering:
    """An answer that is being made."""

    worker: Worker
    metrics: Metrics
    tokenizer: Any
    model: str
    skip_special_tokens: bool
    route: answers.Route
    id: str
    told: answers.Told
    tickets: Sequence[Ticket]
    usage: bool = False
    """Whether a stream ends with how much was read and written."""

    @property
    def _read(self) -> int:
        return sum(len(ticket.request.tokens) for ticket in self.tickets)

    async def whole(self, request: Request) -> dict[str, Any]:
        """The answer.

        Raises:
          Gone: nobody waits for it; the responses are aborted.
          Dropped: the engine failed.
        """
        found: dict[int, dict[str, Any]] = {}
        said, written = self._head(), 0
        async for ticket, index, choice, piece, event in self._choices(request, False):
            if isinstance(event, Dropped) and self.worker.failure:
                raise event
            said |= _version(event)
            written += len(piece.tokens)
            found[index] = choice
            prompt = list(ticket.request.tokens)
            scored = answers.prompt_logprobs(prompt, piece.prompt_logprobs)
            one = said if self.route == "tokens" else choice
            if scored is not None:
                one["prompt_logprobs"] = scored
            if self.told.token_ids:
                (said if self.route == "chat" else choice)["prompt_token_ids"] = prompt
        said["choices"] = [found[index] for index in sorted(found)]
        return said | {"usage": answers.usage(self._read, written)}

    async def stream(self, request: Request) -> AsyncIterator[str]:
        """The answer as server-sent events, each with a piece of one response."""
        written = 0
        with suppress(Gone):
            async for _, _, choice, piece, event in self._choices(request, True):
                if isinstance(event, Dropped) and self.worker.failure:
                    yield _sent(answers.error(f"{event}", "unavailable", None, 503))
                    return
                written += len(piece.tokens)
                yield _sent(self._head() | _version(event) | {"choices": [choice]})
            if self.usage:
                total = answers.usage(self._read, written)
                yield _sent(self._head() | {"choices": [], "usage": total})
            yield "data: [DONE]\n\n"

    def _head(self) -> dict[str, Any]:
        if self.route == "tokens":
            return {"request_id": self.id}
        kind = {"text": "text_completion", "chat": "chat.completion"}[self.route]
        if self.route == "chat" and self.tickets[0].streams:
            kind += ".chunk"
        return {
            "id": self.id,
            "object": kind,
            "created": int(time.time()),
            "model": self.model,
        }

    async def _choices(
        self, request: Request, stream: bool
    ) -> AsyncIterator[tuple[Ticket, int, dict[str, Any], answers.Piece, Event]]:
        """The entries of `choices` as they come, with their tickets and numbers, and
        what they were made of."""
        responses: dict[int, answers.Response] = {}
        async for place, ticket, sample, event in self._events(request):
            asked = ticket.request
            index = place * asked.num_samples + sample
            response = responses.setdefault(
                index,
                answers.Response(
                    tokenizer=self.tokenizer,
                    told=self.told,
                    stop=asked.sampling.stop,
                    skip_special_tokens=self.skip_special_tokens,
                ),
            )
            if isinstance(event, Dropped):
                piece = response.dropped()
            elif isinstance(event, Completion):
                piece = response.ended(event)
            else:
                piece = response.grown(event)
            choice = response.choice(self.route, index, piece, stream)
            yield ticket, index, choice, piece, event

    async def _events(
        self, request: Request
    ) -> AsyncIterator[tuple[int, Ticket, int, Event]]:
        """What becomes of each response: the place of its ticket, its number in it, and
        the event, until all have ended.

        Raises:
          Gone: the client does not wait any more.
        """
        start = time.monotonic()
        gone = asyncio.create_task(_disconnected(request))
        merged: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        feeding = [
            asyncio.create_task(_feed(place, ticket, merged))
            for place, ticket in enumerate(self.tickets)
        ]
        left = [set(range(ticket.request.num_samples)) for ticket in self.tickets]
        try:
            while any(left):
                one = asyncio.ensure_future(merged.get())
                await asyncio.wait({one, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not one.done():
                    one.cancel()
                    raise Gone
                place, event = one.result()
                ticket = self.tickets[place]
                if isinstance(event, Dropped):
                    samples, left[place] = sorted(left[place]), set()
                    self.metrics.responses.labels("abort").inc(len(samples))
                else:
                    samples = [event.sample - ticket.request.first_sample]
                if isinstance(event, Completion):
                    left[place].discard(samples[0])
                    self.metrics.responses.labels(event.finish_reason).inc()
                    self.metrics.generation_tokens.inc(len(event.tokens))
                for sample in samples:
                    yield place, ticket, sample, event
        finally:
            gone.cancel()
            for task in feeding:
                task.cancel()
            # Nothing is left to abort if the answer is complete.
            self.metrics.aborted.inc(self.worker.abort(self.tickets))
            self.metrics.seconds.observe(time.monotonic() - start)


async def _feed(place: int, ticket: Ticket, merged: asyncio.Queue) -> None:
    while True:
        merged.put_nowait((place, await ticket.events.get()))


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _version(event: Event) -> dict[str, Any]:
    is_told = isinstance(event, Completion)
    return {"weight_version": event.weight_version} if is_told else {}


def _sent(said: dict[str, Any]) -> str:
    return f"data: {json.dumps(said)}\n\n"
