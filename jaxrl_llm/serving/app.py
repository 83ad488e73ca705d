"""The routes: vLLM's for trainers, OpenAI's for everybody else."""

import asyncio
import hmac
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from jaxrl_llm.data.chat_template import Encoder
from jaxrl_llm.rollout import engine as engines
from jaxrl_llm.serving import answers, bodies
from jaxrl_llm.serving.answering import Answering, Gone
from jaxrl_llm.serving.bodies import Limits, Refused
from jaxrl_llm.serving.metrics import Metrics
from jaxrl_llm.serving.worker import Dropped, Full, Paused, Worker

_MOST_BYTES = 64 * 2**20
"""The longest body."""
_BODY_S = 60.0
"""The longest wait for a body."""
_RETRY = {"Retry-After": "1"}
_GONE = 499
"""Stands in metrics for clients that went away."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """What the routes need."""

    worker: Worker
    encoder: Encoder
    limits: Limits
    info: dict[str, Any]
    """What /server_info says of the engine."""
    read: Callable[[Path], Any]
    """Gives the parameters of a Hugging Face directory; raises ValueError."""
    api_key: str | None = None


def make(served: Served) -> Starlette:
    """The application."""
    routes = _Routes(served)
    found = [
        ("GET", "/health", routes.health),
        ("GET", "/metrics", routes.show_metrics),
        ("GET", "/version", routes.version),
        ("GET", "/server_info", routes.info),
        ("GET", "/v1/models", routes.models),
        ("POST", "/v1/completions", routes.text),
        ("POST", "/v1/chat/completions", routes.chat),
        ("POST", "/inference/v1/generate", routes.tokens),
        ("POST", "/pause", routes.pause),
        ("POST", "/resume", routes.resume),
        ("GET", "/is_paused", routes.is_paused),
        ("POST", "/collective_rpc", routes.collective_rpc),
        ("POST", "/reset_prefix_cache", routes.reset_prefix_cache),
    ]
    return Starlette(
        routes=[
            Route(path, routes.guarded(handler), methods=[method])
            for method, path, handler in found
        ]
    )


class _Routes:
    def __init__(self, served: Served):
        self._served, self._worker = served, served.worker
        self._metrics = Metrics(lambda: served.worker.state)
        self._started = int(time.time())

    def guarded(self, handler: Callable) -> Callable:
        """A handler whose refusals become answers."""
        is_open = handler == self.health

        async def answer(request: Request) -> Response:
            try:
                if not is_open:
                    self._check_key(request)
                return await handler(request)
            except Refused as error:
                kind = "invalid_request_error"
                return self._refuse(f"{error}", kind, error.field, error.status)
            except Full as error:
                return self._refuse(f"{error}", "rate_limit_error", None, 429)
            except (Paused, Dropped) as error:
                return self._refuse(f"{error}", "unavailable", None, 503)
            except (Gone, ClientDisconnect):
                self._metrics.refused.labels(_GONE).inc()
                return Response(status_code=_GONE)

        return answer

    def _refuse(
        self, message: str, kind: str, field: str | None, status: int
    ) -> Response:
        self._metrics.refused.labels(status).inc()
        headers = _RETRY if status in (429, 503) else None
        if status == 401:
            headers = {"WWW-Authenticate": "Bearer"}
        said = answers.error(message, kind, field, status)
        return JSONResponse(said, status_code=status, headers=headers)

    def _check_key(self, request: Request) -> None:
        key = self._served.api_key
        said = request.headers.get("authorization", "").encode()
        if key is not None and not hmac.compare_digest(said, f"Bearer {key}".encode()):
            raise Refused("the API key is wrong or missing", "Authorization", 401)

    # What there is.

    async def health(self, request: Request) -> Response:
        return Response(status_code=503 if self._worker.failure else 200)

    async def show_metrics(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def version(self, request: Request) -> Response:
        return JSONResponse({"version": self._served.info["version"]})

    async def info(self, request: Request) -> Response:
        state = self._worker.state
        more = {"weight_version": state.weight_version, "is_paused": state.paused}
        return JSONResponse(self._served.info | more)

    async def models(self, request: Request) -> Response:
        limits = self._served.limits
        model = {
            "id": limits.name,
            "object": "model",
            "created": self._started,
            "owned_by": "jaxrl",
            "max_model_len": limits.max_model_len,
        }
        return JSONResponse({"object": "list", "data": [model]})

    # Control.

    async def pause(self, request: Request) -> Response:
        mode = request.query_params.get("mode", "abort")
        if mode not in ("wait", "abort"):
            raise Refused(
                f"mode is {mode!r}; wait for what is generated, or abort it", "mode"
            )
        await self._worker.pause(mode)
        return JSONResponse({"status": "paused"})

    async def resume(self, request: Request) -> Response:
        self._worker.resume()
        return JSONResponse({"status": "resumed"})

    async def is_paused(self, request: Request) -> Response:
        return JSONResponse({"is_paused": self._worker.state.paused})

    async def collective_rpc(self, request: Request) -> Response:
        """Weights from a folder: vLLM's reload_weights, with a version besides."""
        given = bodies.read(bodies.Call, await _body(request)).kwargs
        try:
            path = Path(given.weights_path)
            params = await asyncio.to_thread(self._served.read, path)
            version = await self._worker.load(params, given.weight_version)
        except (ValueError, OSError) as error:
            where = "kwargs.weights_path"
            raise Refused(f"{where} {given.weights_path}: {error}", where) from None
        return JSONResponse({"results": [None], "weight_version": version})

    async def reset_prefix_cache(self, request: Request) -> Response:
        # Pages live as long as the responses that are being generated, all of which
        # have the same weights.
        return JSONResponse({"success": True})

    # Work.

    async def text(self, request: Request) -> Response:
        served = self._served
        body = bodies.read(bodies.TextAsked, await _body(request))
        served.limits.check_name(body.model)
        prompts = await asyncio.to_thread(bodies.prompts_of, body, served.encoder)
        top = body.logprobs or 0
        how = {"max_tokens": body.max_tokens, "top": top, "field": "prompt"}
        made = bodies.requests_of(body, prompts, served.limits, **how)
        told = answers.told_of(body, body.logprobs is not None, top)
        return await self._answer(request, "text", body, made, told)

    async def chat(self, request: Request) -> Response:
        served = self._served
        body = bodies.read(bodies.ChatAsked, await _body(request))
        served.limits.check_name(body.model)
        if body.top_logprobs and not body.logprobs:
            raise Refused("top_logprobs needs logprobs to be true", "top_logprobs")
        tokens = await asyncio.to_thread(bodies.conversation_of, body, served.encoder)
        limit = body.max_completion_tokens or body.max_tokens
        how = {"max_tokens": limit, "top": body.top_logprobs, "field": "messages"}
        made = bodies.requests_of(body, [tokens], served.limits, **how)
        told = answers.told_of(body, body.logprobs, body.top_logprobs)
        return await self._answer(request, "chat", body, made, told)

    async def tokens(self, request: Request) -> Response:
        served = self._served
        body = bodies.read(bodies.TokensAsked, await _body(request))
        served.limits.check_name(body.model)
        drawn = body.sampling_params
        top = drawn.logprobs or 0
        how = {"max_tokens": drawn.max_tokens, "top": top, "field": "token_ids"}
        made = bodies.requests_of(drawn, [body.token_ids], served.limits, **how)
        told = answers.told_of(drawn, drawn.logprobs is not None, top)
        return await self._answer(request, "tokens", body, made, told)

    async def _answer(
        self,
        request: Request,
        route: answers.Route,
        body: bodies.Asked | bodies.TokensAsked,
        made: Sequence[engines.Request],
        told: answers.Told,
    ) -> Response:
        options = body.stream_options
        if options and not body.stream:
            raise Refused("stream_options needs stream to be true", "stream_options")
        loop = asyncio.get_running_loop()
        tickets = self._worker.submit(made, streams=body.stream, loop=loop)
        self._metrics.prompt_tokens.inc(sum(len(r.tokens) for r in made))
        answering = Answering(
            worker=self._worker,
            metrics=self._metrics,
            tokenizer=self._served.encoder.tokenizer,
            model=self._served.limits.name,
            skip_special_tokens=self._served.limits.skip_special_tokens,
            route=route,
            id=getattr(body, "request_id", None) or f"{route}-{uuid.uuid4().hex}",
            told=told,
            tickets=tickets,
            usage=bool(options and options.include_usage),
        )
        if body.stream:
            pieces = answering.stream(request)
            return StreamingResponse(pieces, media_type="text/event-stream")
        return JSONResponse(await answering.whole(request))


async def _body(request: Request) -> bytes:
    """The body of a request.

    Raises:
      Refused: it is too long, or does not come.
    """

    async def read() -> bytes:
        found = bytearray()
        async for part in request.stream():
            found += part
            if len(found) > _MOST_BYTES:
                raise Refused(f"the body is over {_MOST_BYTES} bytes", None, 413)
        return bytes(found)

    try:
        return await asyncio.wait_for(read(), _BODY_S)
    except TimeoutError:
        raise Refused(f"the body did not come in {_BODY_S:.0f} s", None, 408) from None
