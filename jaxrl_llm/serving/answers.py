"""What clients are told: the shapes of OpenAI's answers and of vLLM's additions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from jaxrl_llm.data.types import Completion
from jaxrl_llm.rollout.native.engine import Progress

Route = Literal["text", "chat", "tokens"]
_LEAST = -9999.0
"""Stands for -inf, which JSON cannot say, as in vLLM."""


@dataclass(frozen=True, kw_only=True)
class Told:
    """What is said of the tokens of an answer, besides the tokens."""

    logprobs: bool = False
    top: int = 0
    """So many of the likeliest."""
    greedy: bool = False
    token_ids: bool = False
    tokens_as_ids: bool = False
    all_logprobs: bool = False


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Some tokens of a response: all, or those that are new."""

    tokens: Sequence[int]
    logprobs: Sequence[float]
    """Under the distribution drawn from; at temperature 0, under softmax(logits)."""
    likeliest: Sequence[Sequence[tuple[int, float]]]
    text: str
    finish_reason: str | None = None
    raw_logprobs: Sequence[float] | None = None
    full_logprobs: Sequence[float] | None = None
    prompt_logprobs: Sequence[float] | None = None
    offset: int = 0
    """Characters of the tokens before it."""


@dataclass
class Response:
    """A response as a client sees it grow: each piece continues those before it, and
    together they are what a client gets who waits for the end.

    Args:
      told: what is said of tokens.
      stop: strings that end it, of which nothing may be shown.
    """

    tokenizer: Any
    told: Told
    stop: Sequence[str]
    skip_special_tokens: bool
    _tokens: list[int] = field(default_factory=list)
    _shown: str = ""
    _offset: int = 0

    def grown(self, new: Progress) -> Piece:
        """The piece that more tokens are."""
        self._tokens += new.tokens
        text = self.tokenizer.decode(
            self._tokens, skip_special_tokens=self.skip_special_tokens
        )
        logprobs = new.raw_logprobs if self.told.greedy else new.logprobs
        tops = zip(new.top_tokens, new.top_logprobs, strict=True)
        return self._piece(
            new.tokens, logprobs, list(tops), self._certain(text), None, {}
        )

    def ended(self, completion: Completion) -> Piece:
        """The last piece: all that was not told yet."""
        start = len(self._tokens)
        self._tokens += completion.tokens[start:].tolist()
        greedy = self.told.greedy
        logprobs = completion.raw_logprobs if greedy else completion.logprobs
        tops = []
        if completion.top_tokens is not None:
            pairs = completion.top_tokens[start:], completion.top_logprobs[start:]
            tops = list(zip(*pairs, strict=True))
        more: dict[str, Any] = {}
        if completion.prompt_logprobs is not None:
            more["prompt_logprobs"] = completion.prompt_logprobs.tolist()
        if self.told.all_logprobs:
            full = completion.full_logprobs
            more["raw_logprobs"] = completion.raw_logprobs.tolist()
            more["full_logprobs"] = None if full is None else full.tolist()
        return self._piece(
            completion.tokens[start:].tolist(),
            logprobs[start:].tolist(),
            tops,
            completion.text,
            completion.finish_reason,
            more,
        )

    def dropped(self) -> Piece:
        """The last piece of a response that will not be completed."""
        return self._piece([], [], [], self._shown, "abort", {})

    def _piece(
        self,
        tokens: Sequence[int],
        logprobs: Sequence[float],
        tops: Sequence[tuple[np.ndarray, np.ndarray]],
        text: str,
        finish_reason: str | None,
        more: Mapping[str, Any],
    ) -> Piece:
        """A piece that ends where `text` does."""
        count, before = self.told.top, self._offset
        if self.told.logprobs:
            names = (self.name(token) for token in tokens)
            self._offset += sum(map(len, names))
        # What was shown is not taken back.
        new = text[len(self._shown) :] if text.startswith(self._shown) else ""
        self._shown += new
        return Piece(
            tokens=tokens,
            logprobs=logprobs,
            likeliest=[
                list(zip(ids[:count].tolist(), values[:count].tolist(), strict=True))
                for ids, values in tops
            ],
            text=new,
            finish_reason=finish_reason,
            offset=before,
            **more,
        )

    def _certain(self, text: str) -> str:
        """The beginning of the text so far that what follows cannot change: without the
        bytes of a character that is not whole, and without the beginning of a stop
        string."""
        text = text.rstrip("\ufffd")
        if getattr(self.tokenizer, "clean_up_tokenization_spaces", True):
            text = text[: max(text.rfind(" "), 0)]
        for stop in self.stop:
            for size in range(min(len(stop) - 1, len(text)), 0, -1):
                if text.endswith(stop[:size]):
                    text = text[:-size]
                    break
        return text

    def name(self, token: int) -> str:
        """A token in words, or in the form that tells its number."""
        if self.told.tokens_as_ids:
            return f"token_id:{token}"
        return self.tokenizer.decode([token])

    def choice(self, route: Route, index: int, piece: Piece, stream: bool) -> dict:
        """An entry of `choices`.

        Args:
          index: of the entry, among all.
          stream: whether it is one of several pieces.
        """
        made: dict[str, Any] = {"index": index, "finish_reason": piece.finish_reason}
        if route == "text":
            made |= {"text": piece.text, "logprobs": self._of_text(piece)}
        elif route == "tokens":
            made |= {"token_ids": piece.tokens, "logprobs": self._of_chat(piece)}
        else:
            said = {"role": "assistant", "content": piece.text}
            made["delta" if stream else "message"] = said
            made["logprobs"] = self._of_chat(piece)
        if self.told.token_ids and route != "tokens":
            made["token_ids"] = piece.tokens
        if self.told.all_logprobs and piece.finish_reason:
            made["raw_logprobs"] = _finite(piece.raw_logprobs)
            made["full_logprobs"] = _finite(piece.full_logprobs)
        return made

    def _of_text(self, piece: Piece) -> dict[str, Any] | None:
        if not self.told.logprobs:
            return None
        names, offsets, at = [self.name(t) for t in piece.tokens], [], piece.offset
        for name in names:
            offsets.append(at)
            at += len(name)
        return {
            "tokens": names,
            "token_logprobs": _finite(piece.logprobs),
            "top_logprobs": [dict(self._pairs(piece, i)) for i in range(len(names))]
            if self.told.top
            else None,
            "text_offset": offsets,
        }

    def _of_chat(self, piece: Piece) -> dict[str, Any] | None:
        if not self.told.logprobs:
            return None

        def entry(name: str, logprob: float) -> dict[str, Any]:
            return {"token": name, "logprob": logprob, "bytes": list(name.encode())}

        return {
            "content": [
                entry(self.name(token), *_finite([logprob]))
                | {
                    "top_logprobs": [entry(*pair) for pair in self._pairs(piece, i)]
                    if self.told.top
                    else []
                }
                for i, (token, logprob) in enumerate(
                    zip(piece.tokens, piece.logprobs, strict=True)
                )
            ]
        }

    def _pairs(self, piece: Piece, at: int) -> list[tuple[str, float]]:
        """The likeliest tokens, and the one that was drawn."""
        found = dict(piece.likeliest[at])
        found.setdefault(piece.tokens[at], piece.logprobs[at])
        return [(self.name(t), *_finite([value])) for t, value in found.items()]


def prompt_logprobs(tokens: Sequence[int], values: Sequence[float] | None) -> Any:
    """What is said of a prompt, as vLLM says it; None if nothing."""
    if values is None:
        return None
    pairs = zip(tokens[1:], _finite(values), strict=True)
    return [None, *({str(token): {"logprob": value}} for token, value in pairs)]


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """How much was read and written."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def error(message: str, kind: str, field: str | None, status: int) -> dict[str, Any]:
    """An error in OpenAI's form."""
    said = {"message": message, "type": kind, "param": field, "code": status}
    return {"error": said}


def _finite(values: Sequence[float] | None) -> Any:
    if values is None:
        return None
    return [max(value, _LEAST) if value == value else None for value in values]


def told_of(asked: Any, logprobs: bool, top: int) -> Told:
    """What a body asks to be told."""
    return Told(
        logprobs=logprobs,
        top=top,
        greedy=asked.temperature == 0,
        token_ids=getattr(asked, "return_token_ids", False),
        tokens_as_ids=getattr(asked, "return_tokens_as_token_ids", False),
        all_logprobs=getattr(asked, "return_all_logprobs", False),
    )
