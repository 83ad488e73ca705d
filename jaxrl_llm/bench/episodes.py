"""`jaxrl bench episodes`: conversations with a scripted environment, random weights.

Three variants of the same episodes: *kept*, where a turn is prefilled from where the
turn before ended; *reread*, where all before it is prefilled again; *waiting*, as kept,
with an environment that takes its time.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from typing import Any, Literal
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxrl_llm import models
from jaxrl_llm.agents.environments import Key, Opening, Outcome, Reply
from jaxrl_llm.agents.loop import Limits, play
from jaxrl_llm.bench import rollout
from jaxrl_llm.data.types import Completion, Episode, Message, Prompt
from jaxrl_llm.models import known_shapes as shapes
from jaxrl_llm.rollout.engine import Engine, More, Request, Sampling, no_more
from jaxrl_llm.rollout.native.engine import JaxEngine
from jaxrl_llm.rollout.native.page_pool import PagePool
from jaxrl_llm.sharding import hardware
from jaxrl_llm.tracking import performance

_SIGMA = 1.0
"""Spread of the logarithm of an environment's seconds, a lognormal number."""


def main(
    model: str = "qwen2.5-1.5b",
    episodes: int = 256,
    turns: int = 4,
    prompt_length: int = 1024,
    length: int = 128,
    answer_length: int = 64,
    seconds: float = 1.0,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    max_num_seqs: int = 256,
    decode_chunk: int = 32,
    prefill_tokens: int = 8192,
    rounds: int = 2,
) -> None:
    """Times whole calls of `agents.loop.play`, after one that warms up. One line per
    variant.

    Args:
      model: a name of `bench.shapes`, or a config.json.
      episodes: conversations, which all begin differently.
      turns: of the policy in each.
      prompt_length: tokens of the opening.
      length: tokens of a turn of the policy, at most; half of that, at least.
      answer_length: tokens of an answer of the environment.
      seconds: that an answer takes in the variant *waiting*, lognormal of this mean
        (sigma 1); 0 leaves that out.
      dtype: of weights, activations and cache.
      max_num_seqs: sequences decoded together.
      decode_chunk: steps per dispatch.
      prefill_tokens: of prompts, per dispatch.
      rounds: timed calls; the median counts.
    """
    hardware.use_memory()
    arch = dataclasses.replace(shapes.find(model), eos_token_ids=())
    limits = Limits(
        max_turns=turns,
        max_tokens=turns * (length + answer_length),
        max_prompt_length=prompt_length,
    )
    engine = rollout.engine_of(
        "jax",
        arch,
        (),
        {},
        kind=functools.partial(_Talking, length),
        directory="",
        tensor=1,
        dtype=dtype,
        max_model_len=prompt_length + limits.max_tokens,
        max_num_seqs=max_num_seqs,
        decode_chunk=decode_chunk,
        prefill_tokens=prefill_tokens,
    )
    console = Console()
    table = Table(
        "variant", "episodes/s", "s", "prefilled tok", "longest answers s",
        title=f"{model} on {jax.device_count()} x {jax.devices()[0].device_kind}, "
        f"{episodes} episodes of {turns} turns",
    )  # fmt: skip
    drawn = np.random.default_rng(0).lognormal(
        np.log(seconds or 1.0) - _SIGMA**2 / 2, _SIGMA, (episodes, turns)
    )
    waits = {"kept": 0 * drawn, "reread": 0 * drawn, "waiting": drawn}
    with closing(engine):
        engine.load(models.RandomWeights(arch).load(dtype=jnp.dtype(dtype)), 0)
        for variant in ("kept", "reread", *["waiting"] * (seconds > 0)):
            speech = _Speech(arch.vocab_size, prompt_length, answer_length)
            found = _measure(
                engine, speech, waits[variant], limits, length, rounds, variant
            )
            table.add_row(
                variant, f"{episodes / found['seconds']:.2f}",
                f"{found['seconds']:.2f}", f"{found['prefilled']:,.0f}",
                f"{found['longest']:.2f}",
            )  # fmt: skip
            line = {"model": model, "variant": variant, **found}
            line["episodes_per_second"] = episodes / found["seconds"]
            print(json.dumps(line), flush=True)
    console.print(table)


def remedies(max_num_seqs: int, **_: Any) -> list[str]:
    """Options that need less memory than these."""
    return [f"--max-num-seqs {max(max_num_seqs // 2, 1)} (now {max_num_seqs})"]


def _measure(
    engine: Engine,
    speech: "_Speech",
    waits: np.ndarray,
    limits: Limits,
    length: int,
    rounds: int,
    variant: str,
) -> dict[str, float]:
    """Seconds of a call, tokens prefilled in an episode, and the most seconds that one
    episode's answers took."""
    prompts = [
        Prompt(id=i, content="", tokens=(0,), columns={}) for i in range(len(waits))
    ]
    requests = [
        Request(
            prompt_id=prompt.id,
            tokens=(0,),
            num_samples=1,
            seed=0,
            sampling=Sampling(max_tokens=length),
        )
        for prompt in prompts
    ]
    nothing = mock.patch.object(PagePool, "match_prefix", lambda *_: [])
    calls: list[float] = []
    with (
        nothing if variant == "reread" else nullcontext(),
        _Answering(waits) as environments,
        performance.long_lived_objects_set_aside() as set_aside,
    ):
        for _ in range(1 + rounds):
            set_aside()
            start = time.perf_counter()
            groups = play(engine, environments, speech, prompts, requests, limits)
            calls.append(time.perf_counter() - start)
    played = [episode for group in groups for episode in group]
    assert {_turns(episode) for episode in played} == {limits.max_turns}
    return {
        "seconds": float(np.median(calls[1:])),
        "first_seconds": calls[0],
        "prefilled": float(np.mean([episode.played.prefilled for episode in played])),
        "longest": float(waits.sum(axis=1).max()),
        **performance.memory(),
    }


def _turns(episode: Episode) -> int:
    return sum(turn.finish_reason is not None for turn in episode.turns)


class _Talking(JaxEngine):
    """An engine whose random weights end their turns: after as many tokens as are drawn
    for the episode and the turn."""

    def __init__(self, length: int, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._most_of_turn = length

    def completions(self, more: More = no_more) -> Iterator[Completion]:
        """See `Engine.completions`."""

        def asked(idle: bool) -> list[Request]:
            return [self._as_long_as_drawn(request) for request in more(idle)]

        for completion in super().completions(asked):
            yield dataclasses.replace(completion, finish_reason="stop")

    def _as_long_as_drawn(self, request: Request) -> Request:
        drawn = np.random.default_rng((request.prompt_id, request.turn))
        most = int(
            drawn.integers(self._most_of_turn // 2, self._most_of_turn, endpoint=True)
        )
        most = min(most, request.sampling.max_tokens)
        return dataclasses.replace(
            request, sampling=dataclasses.replace(request.sampling, max_tokens=most)
        )


class _Speech:
    """A template of random tokens."""

    def __init__(self, vocab_size: int, opening: int, answer: int):
        self._vocab_size, self._opening, self._answer = vocab_size, opening, answer

    def begin(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
    ) -> tuple[int, ...]:
        """An opening, by the number that it says."""
        return self._drawn(int(messages[0]["content"]), self._opening)

    def splice(
        self, sampled: Sequence[int], finish_reason: str, messages: Sequence[Message]
    ) -> tuple[int, ...]:
        """An answer, by what was sampled."""
        return self._drawn(sum(sampled), self._answer)

    def _drawn(self, seed: int, count: int) -> tuple[int, ...]:
        drawn = np.random.default_rng(seed)
        return tuple(drawn.integers(0, self._vocab_size, count).tolist())


class _Answering:
    """Environments that answer after so many seconds.

    Args:
      waits: [episodes, turns].
    """

    def __init__(self, waits: np.ndarray):
        self._waits, self._turn = waits, dict.fromkeys(range(len(waits)), 0)
        self._threads = ThreadPoolExecutor(max(1, len(waits)))

    def __enter__(self) -> "_Answering":
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def open(self, key: Key, prompt: Prompt, seed: int) -> Future[Opening]:
        """At once."""
        self._turn[key[0]] = 0
        return _ready(Opening(messages=({"role": "user", "content": str(key[0])},)))

    def answer(self, key: Key, text: str) -> Future[Reply]:
        """After as long as the turn takes."""
        reply = Reply(messages=({"role": "user", "content": ""},))
        wait = float(self._waits[key[0], self._turn[key[0]]])
        self._turn[key[0]] += 1
        if not wait:
            return _ready(reply)
        return self._threads.submit(_after, wait, reply)

    def close(self, key: Key) -> Future[Outcome]:
        """At once."""
        return _ready(Outcome(reward=0.0))

    def shutdown(self) -> None:
        """Ends the threads."""
        self._threads.shutdown()


def _after(seconds: float, value: Reply) -> Reply:
    time.sleep(seconds)
    return value


def _ready(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future
