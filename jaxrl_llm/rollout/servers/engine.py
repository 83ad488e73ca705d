"""Generation by servers: ours, or running ones, of any dialect.

Weights travel as safetensors through a folder that trainer and servers see; of a model
with adapters perhaps these alone, as PEFT keeps them (`transfer`). After each transfer
the servers score probes, and so does the trainer: if they differ, the run stops
(`verify_weights`). A server of ours that dies or hangs is started again with the
current weights, and what it had not answered is asked again (`replicas`).
"""

import asyncio
import atexit
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
from jax.stages import Lowered

from jaxrl_llm import models
from jaxrl_llm.data.types import Completion
from jaxrl_llm.rollout.engine import More, Request, Use, no_more
from jaxrl_llm.rollout.servers.replicas import Replica, Replicas
from jaxrl_llm.rollout.servers.server import (
    Answer,
    Ask,
    Launch,
    Lost,
    Server,
    ServerError,
    ServerSettings,
)
from jaxrl_llm.rollout.servers.transfer import Transfer
from jaxrl_llm.rollout.servers.verify_weights import Verification

_Asked = tuple[Request, range]
"""A request, and which of its samples are asked for together."""
_LOOK_S = 0.02
"""Longest time for which a later turn of an episode waits to be sent."""


class ServerEngine:
    """An `Engine` whose tokens come from servers. A subclass says of which dialect.

    Args:
      arch: the model's shape.
      tokenizer: the model's; decodes responses.
      prompts: tokens of questions; responses to the first of them become the probes.
      settings: which servers, and how they are started and watched.
      directory: where the logs of servers of ours go.
      dtype: of weights, activations and cache of servers of ours.
      max_model_len: longest prompt and response together, tokens.
      max_num_seqs: sequences that one server decodes together.
      skip_special_tokens: leave special tokens out of texts, and of where stop strings
        are looked for.
      lora: the adapters of the weights, which are then sent alone: a server of ours
        reads the rest once, a running one must have been started with it. None: all
        weights are sent.

    Raises:
      ServerError: a running server lacks something, or the command does not exist.
      ValueError: servers of this dialect take no such adapters.
    """

    dialect: ClassVar[type[Server]]

    def __init__(
        self,
        arch: models.Architecture,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        settings: ServerSettings,
        *,
        directory: str | Path,
        dtype: str,
        max_model_len: int,
        max_num_seqs: int,
        skip_special_tokens: bool = True,
        lora: models.Lora | None = None,
    ):
        kind, directory = self.dialect, Path(directory)
        if lora is not None:
            kind.check_adapters(lora)
        self.arch, self.tokenizer, self.settings = arch, tokenizer, settings
        self.lora = lora
        launch = self._launch = Launch(
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            skip_special_tokens=skip_special_tokens,
            lora=lora,
        )
        self._version = -1
        self._waiting: list[_Asked] = []
        self._verification = Verification(
            arch,
            prompts,
            dtype=kind.sent_dtype(launch),
            max_model_len=max_model_len,
            max_probe_diff=settings.max_probe_diff,
            attached=bool(settings.urls),
            lora=lora,
        )
        self._transfer = Transfer(kind, arch, tokenizer, settings, launch, directory)
        self._weights = self._transfer.folder
        try:
            self._replicas = Replicas(
                kind,
                settings,
                launch,
                self._transfer,
                directory,
                self._verification.verify,
            )
        except BaseException:
            self._transfer.close()
            raise
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        atexit.register(self.close)
        try:
            self._call(self._replicas.check())
        except BaseException:
            self.close()
            raise

    def load(self, params: Any, version: int) -> dict[str, float]:
        """Sends weights to every server, and verifies that they arrived.

        Args:
          params: in the training layout, with adapters if there is a `lora`.

        Returns:
          rollout/probe_diff_mean and _max: |server - trainer| over the probes' tokens,
          nats; rollout/probe_followed: see `verify_weights.followed`, if there was a
          transfer before; rollout/weights_write_s, _read_s and _verify_s: of the
          trainer writing them, the servers taking them (or starting), and the probes,
          seconds; with `lora` also rollout/adapters_mib: of what is sent to each.

        Raises:
          ServerError: a server cannot be used, or holds other weights than these.
        """
        first, self._replicas.lost = self._version < 0, 0
        before = self._transfer.current
        times = [time.perf_counter()]
        device = self._replicas.device(jax.default_backend())
        sizes = self._transfer.write(params, version, device, first=first)
        times.append(time.perf_counter())
        self._call(self._replicas.everywhere(self._replicas.send))
        times.append(time.perf_counter())
        self._version = version
        self._call(self._verification.make_probes(self._replicas[0].server))
        self._verification.score(params, version)
        found = self._call(self._replicas.everywhere(self._verification.verify))
        times.append(time.perf_counter())
        self._transfer.forget(before)
        phases = ("write", "read", "verify")
        seconds = np.diff(times).tolist()
        return (
            {name: max(one[name] for one in found) for name in found[0]}
            | {
                f"rollout/weights_{phase}_s": took
                for phase, took in zip(phases, seconds, strict=True)
            }
            | sizes
        )

    def submit(self, requests: Sequence[Request]) -> None:
        """Queues requests.

        Raises:
          ValueError: a request can never be answered; see `Request.check`.
        """
        for request in requests:
            request.check(self.arch.vocab_size, self._launch.max_model_len)
        for request in requests:
            samples = request.samples
            if self.dialect.alone(greedy=request.sampling.temperature == 0):
                self._waiting += [(request, range(i, i + 1)) for i in samples]
            else:
                self._waiting.append((request, samples))

    def completions(self, more: More = no_more) -> Iterator[Completion]:
        """Yields completions as they finish, until nothing submitted is outstanding.

        Args:
          more: asked every few hundredths of a second for what is to be submitted
            besides.

        Raises:
          ServerError: a server refuses, or was lost too often.
        """
        if self._version < 0:
            raise ValueError("no weights are loaded; call load(params) first")
        found: queue.SimpleQueue[Completion | Future] = queue.SimpleQueue()
        running: set[Future] = set()
        try:
            while True:
                self.submit(more(not (running or self._waiting)))
                if self._waiting:
                    asked, self._waiting = self._waiting, []
                    answers = self._answer(deque(asked), found)
                    begun = asyncio.run_coroutine_threadsafe(answers, self._loop)
                    running.add(begun)
                    begun.add_done_callback(found.put)
                if not running:
                    return
                try:
                    one = found.get(timeout=None if more is no_more else _LOOK_S)
                except queue.Empty:
                    continue
                if isinstance(one, Completion):
                    yield one
                else:
                    running.remove(one)
                    one.result()
        finally:
            for one in running:
                one.cancel()

    def memory(self, num_rows: int, num_tokens: int) -> dict[str, int]:
        """Nothing: servers have memory of their own."""
        return {}

    def programs(
        self,
        uses: Sequence[Use],
        prompts: Iterable[Sequence[int]],
        resident: Callable[[jax.Device], int] | None = None,
    ) -> dict[str, Callable[[], Lowered]]:
        """Nothing: servers have programs of their own."""
        return {}

    def close(self) -> None:
        """Ends the servers that are ours, and removes what was sent."""
        atexit.unregister(self.close)
        if not self._loop.is_running():
            return
        self._call(self._replicas.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._transfer.close()

    async def _answer(self, waiting: deque, found: queue.SimpleQueue) -> None:
        """Puts one completion for each of `waiting` into `found`."""
        # Twice what a server decodes together: of a group, some end before others.
        samples = sum(len(samples) for _, samples in waiting) / max(1, len(waiting))
        most = math.ceil(2 * self._launch.max_num_seqs / max(1, samples))
        tasks = [
            asyncio.create_task(self._serve(replica, waiting, found))
            for _ in range(min(most, len(waiting)))
            for replica in self._replicas
        ]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _serve(
        self, replica: Replica, waiting: deque, found: queue.SimpleQueue
    ) -> None:
        while waiting:
            asked = waiting.popleft()
            starts = replica.starts
            try:
                completions = await self._complete(replica.server, *asked)
            except Lost as error:
                waiting.appendleft(asked)
                await self._replicas.recover(replica, starts, error)
                continue
            if completions is None:
                waiting.append(asked)
            else:
                for completion in completions:
                    found.put(completion)

    async def _complete(
        self, server: Server, request: Request, samples: range
    ) -> list[Completion] | None:
        """Responses to one prompt; None if the server dropped any."""
        ask = Ask(
            request=request,
            samples=samples,
            stop_token_ids=(
                *self.arch.eos_token_ids,
                *request.sampling.stop_token_ids,
            ),
            skip_special_tokens=self._launch.skip_special_tokens,
            reproducible=self.settings.reproducible,
        )
        answers = await server.complete(ask)
        if any(answer.finish_reason == "abort" for answer in answers):
            return None
        return [self._completion(server, ask, answer) for answer in answers]

    def _completion(self, server: Server, ask: Ask, answer: Answer) -> Completion:
        request, sampling = ask.request, ask.request.sampling
        tokens = np.asarray(answer.tokens, np.int32)
        logprobs = np.asarray(answer.logprobs, np.float32)
        if len(tokens) != len(logprobs) or not len(tokens):
            raise ServerError(
                f"{server.url} gave {len(tokens)} tokens with {len(logprobs)} "
                f"log-probabilities to prompt {request.prompt_id}"
            )
        by_token = int(tokens[-1]) in ask.stop_token_ids
        shown = tokens[:-1] if by_token else tokens
        skips = ask.skip_special_tokens
        text = self.tokenizer.decode(shown, skip_special_tokens=skips)
        ends = [text.index(stop) for stop in sampling.stop if stop in text]
        greedy = sampling.temperature == 0
        raw = logprobs if greedy or sampling.plain else _floats(answer.raw_logprobs)
        more = {}
        if sampling.logprobs:
            more = _most_likely(answer.likeliest, sampling.logprobs)
        if sampling.truncates:
            unknown = np.full_like(logprobs, np.nan)  # told only after what was cut off
            full = _floats(answer.full_logprobs)
            more["full_logprobs"] = unknown if full is None else full
        return Completion(
            prompt_id=request.prompt_id,
            sample=ask.samples[answer.index],
            tokens=tokens,
            logprobs=np.zeros_like(logprobs) if greedy else logprobs,
            raw_logprobs=raw,
            finish_reason=answer.finish_reason,
            weight_version=self._version,
            text=text[: min(ends)] if ends else text,
            prompt_logprobs=_floats(answer.prompt_logprobs),
            **more,
        )

    def _call(self, work: Coroutine) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


def _floats(values: Sequence[float] | None) -> np.ndarray | None:
    return None if values is None else np.asarray(values, np.float32)


def _most_likely(
    told: Sequence[Mapping[int, float]], count: int
) -> dict[str, np.ndarray]:
    """The likeliest tokens at every position, the first first."""
    ranked = [
        sorted(position.items(), key=lambda item: -item[1])[:count] for position in told
    ]
    return {
        "top_tokens": np.array([[t for t, _ in row] for row in ranked], np.int32),
        "top_logprobs": np.array([[x for _, x in row] for row in ranked], np.float32),
    }
