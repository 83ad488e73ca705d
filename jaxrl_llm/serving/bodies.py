"""What clients ask, read and checked: every refusal names the field."""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jaxrl_llm.data.chat_template import Encoder
from jaxrl_llm.rollout.engine import Request, Sampling

_TOPS = (0, 1, 5, 20)
"""How many of the likeliest tokens are computed: each is a program of its own."""
MOST_STOP_IDS = 64
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "ignore_eos": (False,),
    "min_tokens": (0,),
    "use_beam_search": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "functions": ([],),
    "modalities": (["text"],),
}
"""Fields that this server does not act on, and the values that ask for nothing. null
asks for nothing either."""
_IDLE = {
    *("user", "metadata", "store", "priority", "cache_salt", "service_tier"),
    *("safety_identifier", "prompt_cache_key", "kv_transfer_params"),
}
"""Fields that change no answer."""


class Refused(ValueError):
    """A request cannot be answered.

    Args:
      field: which of its fields is the reason; None if it is the whole.
      status: of HTTP.
    """

    def __init__(self, message: str, field: str | None = None, status: int = 400):
        super().__init__(message)
        self.field, self.status = field, status


Token = Annotated[int, Field(ge=0)]


class Key(BaseModel):
    """What random numbers are drawn by besides `seed`; see `rollout.engine.Request`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt_id: int = Field(ge=0, lt=2**31)
    first_sample: int = Field(0, ge=0, lt=2**31)
    turn: int = Field(0, ge=0, lt=2**31)


class StreamOptions(BaseModel):
    """What is streamed besides tokens."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    continuous_usage_stats: Literal[False] = False


class Drawing(BaseModel):
    """How responses are drawn; names and meanings as in vLLM."""

    model_config = ConfigDict(extra="forbid", strict=True)

    n: int = Field(1, ge=1)
    temperature: float = Field(1.0, ge=0, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(-1, ge=-1)
    min_p: float = Field(0.0, ge=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**32)
    stop: str | list[str] | None = None
    stop_token_ids: list[Token] | None = Field(None, max_length=MOST_STOP_IDS)
    prompt_logprobs: Literal[0, 1] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: Literal[False] = False
    spaces_between_special_tokens: Literal[True] = True
    detokenize: bool = True
    key: Key | None = None


class Asked(Drawing):
    """What OpenAI's routes have in common, and vLLM's additions to it."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    return_all_logprobs: bool = False
    """Also say raw_logprobs and full_logprobs: see `Completion`."""


class TextAsked(Asked):
    """/v1/completions."""

    prompt: str | list[str] | list[Token] | list[list[Token]]
    max_tokens: int = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=_TOPS[-1])


class ChatAsked(Asked):
    """/v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=_TOPS[-1])


class TokensDrawn(Drawing):
    """The field sampling_params of /inference/v1/generate."""

    max_tokens: int = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=_TOPS[-1])


class TokensAsked(BaseModel):
    """/inference/v1/generate: tokens in, tokens out."""

    model_config = ConfigDict(extra="forbid", strict=True)

    token_ids: list[Token] = Field(min_length=1)
    sampling_params: TokensDrawn
    request_id: str | None = None
    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None


class Weights(BaseModel):
    """Where new weights are, and which they are."""

    model_config = ConfigDict(extra="forbid", strict=True)

    weights_path: str = Field(min_length=1)
    weight_version: int | None = None


class Call(BaseModel):
    """/collective_rpc, of which this server knows one method."""

    model_config = ConfigDict(extra="forbid", strict=True)

    method: Literal["reload_weights"]
    kwargs: Weights


Body = TypeVar("Body", bound=BaseModel)


def read(kind: type[Body], raw: bytes) -> Body:
    """The body of a request.

    Raises:
      Refused: it is not what the route takes.
    """
    try:
        values = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise Refused(f"the body must be an object, got {type(values).__name__}")
    values = _asks(values, "")
    if isinstance(params := values.get("sampling_params"), dict):
        values["sampling_params"] = _asks(params, "sampling_params.")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _refused(error) from None


def _asks(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields that ask for something.

    Raises:
      Refused: one asks for what this server does not do.
    """
    for name, neutral in _NEUTRAL.items():
        value = values.get(name)
        if value is not None and not any(value == one for one in neutral):
            if name == "best_of" and value == values.get("n", 1):
                continue
            raise Refused(
                f"{where}{name} is {_short(value)}, which this server does not do; "
                "leave it out",
                where + name,
            )
    left_out = {*_NEUTRAL, *_IDLE}
    return {
        name: value
        for name, value in values.items()
        if name not in left_out and value is not None
    }


def _refused(error: ValidationError) -> Refused:
    one = error.errors(include_url=False)[0]
    # The kinds of a union are no part of a field's name.
    path = [str(part) for part in one["loc"] if not _is_kind(part)]
    name = ".".join(path)
    if one["type"] == "extra_forbidden":
        return Refused(f"{name} is no field of this route", name)
    if one["type"] == "missing":
        return Refused(f"{name} is missing", name)
    said = one["msg"][:1].lower() + one["msg"][1:]
    return Refused(f"{name} is {_short(one['input'])}: {said}", name)


def _is_kind(part: int | str) -> bool:
    return isinstance(part, str) and ("[" in part or part in ("str", "int"))


def _short(value: Any) -> str:
    said = repr(value)
    return said if len(said) <= 80 else f"{said[:77]}..."


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the served model takes."""

    name: str
    """The name of the model."""
    vocab_size: int
    max_model_len: int
    """Tokens of the longest prompt with its response."""
    max_queued: int
    skip_special_tokens: bool

    def check_name(self, name: str | None) -> None:
        """Raises Refused for another model than this."""
        if name is not None and name != self.name:
            message = f"model is {name!r}, but this server has {self.name!r}"
            raise Refused(message, "model", 404)


def requests_of(
    drawn: Drawing,
    prompts: Sequence[Sequence[int]],
    limits: Limits,
    *,
    max_tokens: int | None,
    top: int,
    field: str,
) -> list[Request]:
    """What the engine is asked, a request for each prompt.

    Args:
      max_tokens: of a response; all that there is room for if None.
      top: so many of the likeliest tokens are to be told.
      field: the name of the prompts in the body.

    Raises:
      Refused: the engine can never answer it.
    """
    if drawn.n * len(prompts) > limits.max_queued:
        raise Refused(
            f"n is {drawn.n} for {len(prompts)} prompts, but the server holds "
            f"{limits.max_queued} responses at most",
            "n",
        )
    if drawn.skip_special_tokens not in (None, limits.skip_special_tokens):
        raise Refused(
            f"skip_special_tokens is {drawn.skip_special_tokens}, but the server was "
            f"started with {limits.skip_special_tokens}",
            "skip_special_tokens",
        )
    stop = [drawn.stop] if isinstance(drawn.stop, str) else drawn.stop or []
    if "" in stop:
        raise Refused("stop has an empty string", "stop")
    if drawn.key and len(prompts) > 1:
        raise Refused(f"key is of one prompt, got {len(prompts)}", "key")
    if prompts and max_tokens is None:
        max_tokens = max(1, limits.max_model_len - max(map(len, prompts)))
    sampling = Sampling(
        max_tokens=max_tokens,
        temperature=drawn.temperature,
        top_k=drawn.top_k or -1,
        top_p=drawn.top_p,
        min_p=drawn.min_p,
        logprobs=next(count for count in _TOPS if count >= top),
        prompt_logprobs=drawn.prompt_logprobs is not None,
        stop=tuple(stop),
        stop_token_ids=tuple(drawn.stop_token_ids or ()),
    )
    seed = secrets.randbits(32) if drawn.seed is None else drawn.seed
    made = []
    for i, tokens in enumerate(prompts):
        longest = len(tokens) + sampling.max_tokens
        if longest > limits.max_model_len:
            raise Refused(
                f"{field} has {len(tokens)} tokens and max_tokens is "
                f"{sampling.max_tokens}, together over the {limits.max_model_len} of "
                "this server",
                field if len(tokens) >= limits.max_model_len else "max_tokens",
            )
        key = drawn.key or Key(prompt_id=i)
        request = Request(
            prompt_id=i,
            tokens=tuple(tokens),
            num_samples=drawn.n,
            seed=seed,
            sampling=sampling,
            first_sample=key.first_sample,
            turn=key.turn,
            key_id=key.prompt_id,
        )
        try:
            request.check(limits.vocab_size, limits.max_model_len)
        except ValueError as error:
            is_stop = str(error).startswith("stop")
            raise Refused(
                f"{error}".replace(f"prompt {i}", field, 1),
                "stop_token_ids" if is_stop else field,
            ) from None
        made.append(request)
    return made


def prompts_of(body: TextAsked, encoder: Encoder) -> list[Sequence[int]]:
    """The tokens of every prompt.

    Raises:
      Refused: one is empty, or text that no tokenizer reads.
    """
    prompt: Any = body.prompt
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        prompt = [prompt]
    if not prompt:
        raise Refused("prompt is empty", "prompt")
    try:
        return [encoder.encode(p) if isinstance(p, str) else p for p in prompt]
    except ValueError as error:
        raise Refused(f"prompt: {error}", "prompt") from None


def conversation_of(body: ChatAsked, encoder: Encoder) -> Sequence[int]:
    """The tokens of a conversation in the model's chat template.

    Raises:
      Refused: the template does not take it.
    """
    messages = []
    for i, message in enumerate(body.messages):
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(_text(part, f"messages.{i}.content") for part in content)
        if not isinstance(message.get("role"), str):
            raise Refused(f"messages.{i}.role is missing", f"messages.{i}.role")
        if not isinstance(content, str):
            where = f"messages.{i}.content"
            raise Refused(f"{where} must be text, got {_short(content)}", where)
        messages.append({**message, "content": content})
    try:
        return encoder.encode(messages)
    except ValueError as error:
        raise Refused(f"messages: {error}", "messages") from None


def _text(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text":
        if isinstance(text := part.get("text"), str):
            return text
    raise Refused(f"{where} has {_short(part)}, which is no text", where)
