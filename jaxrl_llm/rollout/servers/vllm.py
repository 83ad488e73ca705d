"""Generation by vLLM servers: ours, or running ones.

Weights travel as bfloat16 safetensors through a folder that trainer and servers see;
of a model with adapters perhaps these alone, as PEFT keeps them.
After each transfer the servers score probes, and so does the trainer: if they differ,
the run stops (`probe`). A server of ours that dies or hangs is started again with the
current weights, and what it had not answered is asked again.
"""

import asyncio
import atexit
import hashlib
import math
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Lowered
from rich.console import Console

from jaxrl_llm import models
from jaxrl_llm.data.types import Completion
from jaxrl_llm.rollout.engine import More, Request, Use, no_more
from jaxrl_llm.rollout.servers import verify_weights as probe
from jaxrl_llm.rollout.servers.server import (
    Lost,
    Process,
    Server,
    ServerError,
    lora_flags,
    of_prompt,
)

_Asked = tuple[Request, range]
"""A request, and which of its samples are asked for together."""
_NUM_PROBES, _PROBE_TOKENS = 16, 32
_LOOK_S = 0.02
"""Longest time for which a later turn of an episode waits to be sent."""
_REMOVE = "import shutil, sys; sys.stdin.read(); shutil.rmtree(sys.argv[1], True)"
"""Removes a folder when standard input closes, even if by the end of a killed trainer:
it may be gigabytes of shared memory."""
_KEPT = (
    "; on a CPU, vLLM keeps the output matrix of a model that ties it to its "
    "embeddings: start the server with "
    """--hf-overrides '{"tie_word_embeddings": false}'"""
)


@dataclass(frozen=True, kw_only=True)
class VllmSettings:
    """Servers that generate: running ones (`urls`), or ours, which end with the run."""

    urls: Sequence[str] = ()
    """Running servers, such as http://host:8000. Requests are spread over them."""
    command: Sequence[str] = ("python", "-m", "vllm.entrypoints.openai.api_server")
    """Starts one of ours: the Python of vLLM's environment, or a container."""
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


@dataclass
class _Replica:
    """One server and what is known of it."""

    server: Server | None
    """None until one of ours is started."""
    process: Process | None = None
    device: str | None = None
    starts: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    verified: tuple[np.ndarray, np.ndarray] | None = None
    """The server's and the trainer's scores of the probes with the last weights that
    arrived, [N, T] each; None after a start."""


class VllmEngine:
    """An `Engine` whose tokens come from vLLM.

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
      ValueError: vLLM takes no adapters of this rank.
    """

    def __init__(
        self,
        arch: models.Architecture,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        settings: VllmSettings,
        *,
        directory: str | Path,
        dtype: str,
        max_model_len: int,
        max_num_seqs: int,
        skip_special_tokens: bool = True,
        lora: models.Lora | None = None,
    ):
        self._lora_flags = () if lora is None else lora_flags(lora)
        self.lora = lora
        self._skips = {"skip_special_tokens": skip_special_tokens}
        self.arch, self.tokenizer, self.settings = arch, tokenizer, settings
        self._prompts = [tuple(p) for p in prompts[:_NUM_PROBES]]
        self._directory = Path(directory)
        self._dtype, self._max_num_seqs = dtype, max_num_seqs
        self._max_len = max_model_len
        self._version, self._restarts = -1, 0
        self._waiting: list[_Asked] = []
        self._probes: probe.Probes | None = None
        self._scores: np.ndarray | None = None
        self._weights = self._current = self._shared_folder()
        self._base = self._weights / "base"
        self._replicas = self._running() if settings.urls else self._own()
        self._remover = subprocess.Popen(
            [sys.executable, "-c", _REMOVE, self._weights],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        atexit.register(self.close)
        try:
            self._call(self._check())
        except BaseException:
            self.close()
            raise

    def load(self, params: Any, version: int) -> dict[str, float]:
        """Sends weights to every server, and verifies that they arrived.

        Args:
          params: in the training layout, with adapters if there is a `lora`.

        Returns:
          rollout/probe_diff_mean and _max: |server - trainer| over the probes' tokens,
          nats; rollout/probe_followed: see `probe.followed`, if there was a transfer
          before; rollout/weights_write_s, _read_s and _verify_s: of the trainer
          writing them, the servers taking them (or starting), and the probes, seconds;
          with `lora` also rollout/adapters_mib: of what is sent to each.

        Raises:
          ServerError: a server cannot be used, or holds other weights than these.
        """
        first, self._restarts = self._version < 0, 0
        before, self._current = self._current, self._weights / f"{version}"
        if first:
            shutil.rmtree(self._weights, ignore_errors=True)  # of a run that was killed
        else:
            shutil.rmtree(self._current, ignore_errors=True)  # of a load that failed
        times = [time.perf_counter()]
        sizes = self._write(params, first)
        times.append(time.perf_counter())
        self._call(self._everywhere(self._send))
        times.append(time.perf_counter())
        self._version = version
        if first:
            self._probes = self._call(self._make_probes())
        self._scores = self._score(params)
        found = self._call(self._everywhere(self._verify))
        times.append(time.perf_counter())
        if not first and before != self._current:
            shutil.rmtree(before)
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

    def _write(self, params: Any, first: bool) -> dict[str, float]:
        """Writes what is sent. One tensor at a time is rounded to bfloat16 and comes to
        the host.

        Returns:
          How much it is, of adapters.
        """
        if self.lora is None:
            self._save(self._current, *self._as_taken(params))
            return {}
        adapters, base = models.split_params(params, models.is_adapter)
        if first and not self.settings.urls:
            self._save(self._base, replace(self.arch, generation="{}"), base)
        how = {"base": str(self._base), "dtype": jnp.bfloat16}
        models.save_adapter(self._current, self.arch, adapters, self.lora, **how)
        size = sum(2 * x.size for x in jax.tree.leaves(adapters))
        return {"rollout/adapters_mib": size / 2**20}

    def _save(self, folder: Path, arch: models.Architecture, params: Any) -> None:
        most = 10**9  # that reading and writing overlap
        models.save(folder, arch, params, self.tokenizer, max_shard_bytes=most)

    def submit(self, requests: Sequence[Request]) -> None:
        """Queues requests.

        Raises:
          ValueError: a request can never be answered; see `Request.check`.
        """
        for request in requests:
            request.check(self.arch.vocab_size, self._max_len)
        for request in requests:
            samples = request.samples
            if request.sampling.temperature == 0:  # vLLM: no two at a time
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
        for replica in self._replicas:
            if replica.process:
                replica.process.stop()
            if replica.server:
                self._call(replica.server.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._remover.communicate()

    def _as_taken(self, params: Any) -> tuple[models.Architecture, Any]:
        """The model as servers can take new weights of it, and without a
        generation_config.json, by which they would sample what a request leaves open.

        On a CPU, vLLM keeps a packed copy of the output matrix and packs anew only what
        it reads: embeddings are sent as both.
        """
        servers = [r.server.device for r in self._replicas if r.server]
        device = servers[0] if servers else jax.default_backend()
        plain = replace(self.arch, generation="{}")
        if device != "cpu" or not plain.tie_embeddings:
            return plain, params
        untied = models.untied(plain)
        return untied, params | {"output": params["embedding"]}

    def _shared_folder(self) -> Path:
        """Where weights are sent through: of this run alone, the same each time."""
        settings, memory = self.settings, Path("/dev/shm")
        if settings.weights_dir:
            folder = Path(settings.weights_dir)
        elif memory.is_dir() and not settings.urls:
            folder = memory
        else:
            folder = self._directory
        run = hashlib.sha256(str(self._directory.absolute()).encode()).hexdigest()
        return (folder / f"jaxrl-weights-{run[:12]}").absolute()

    def _running(self) -> list[_Replica]:
        settings = self.settings
        longest = settings.request_timeout_s
        return [_Replica(Server(url, longest)) for url in settings.urls]

    def _own(self) -> list[_Replica]:
        settings = self.settings
        command = settings.command[0]
        if not shutil.which(command):
            raise ServerError(f"rollout.vllm.command: there is no program {command!r}")
        return [_Replica(None, device=device) for device in settings.devices or (None,)]

    async def _check(self) -> None:
        """Reads what the running servers can do."""
        for server in [replica.server for replica in self._replicas if replica.server]:
            try:
                await self._check_one(server)
            except Lost as error:
                raise ServerError(
                    f"no vLLM server answers at {server.url}: {error}"
                ) from None

    async def _check_one(self, server: Server) -> None:
        await server.check(self._max_len, self.lora)

    async def _bring(self, server: Server) -> None:
        """Has a server that is up read the current weights, or adapters."""
        if self.lora is None:
            await server.reload(self._current)
        else:
            await server.adapt(f"policy-v{self._current.name}", self._current)

    async def _everywhere(self, act: Any) -> list[Any]:
        return await asyncio.gather(*map(act, self._replicas))

    async def _send(self, replica: _Replica) -> None:
        """Brings the current weights to a server, which may have to be started."""
        if not self.settings.urls and not replica.process:
            return await self._start(replica)
        starts = replica.starts
        try:
            await self._bring(replica.server)
        except Lost as error:
            await self._recover(replica, starts, error)

    async def _start(self, replica: _Replica) -> None:
        """Starts a server of ours with the current weights; returns when it is up."""
        settings, number = self.settings, self._replicas.index(replica)
        environment = dict(settings.env)
        if self.lora is not None:
            environment |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
        if replica.device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = replica.device
        process = replica.process = Process(
            settings.command,
            (
                *("--model", str(self._base if self.lora else self._current)),
                *("--served-model-name", "policy"),
                *("--runner", "generate", "--dtype", self._dtype),
                *("--max-model-len", str(self._max_len)),
                *("--max-num-seqs", str(self._max_num_seqs)),
                *("--logprobs-mode", "processed_logprobs"),
                *self._lora_flags,
                *settings.args,
            ),
            environment,
            settings.port and settings.port + number,
            self._directory / f"vllm-{number}.log",
        )
        replica.starts += 1
        replica.verified = None
        replica.server = Server(process.url, settings.request_timeout_s)
        await self._until_up(process, replica.server)
        await self._check_one(replica.server)
        if self.lora is not None:
            await self._bring(replica.server)

    async def _until_up(self, process: Process, server: Server) -> None:
        longest = self.settings.start_timeout_s
        console, start, said = Console(), time.monotonic(), 0.0
        console.print(f"starting vLLM, log in {process.log}", soft_wrap=True)
        while not await server.alive():
            passed = time.monotonic() - start
            if not process.running():
                raise process.failure("ended while it was starting")
            if passed > longest:
                process.stop()
                raise process.failure(
                    f"is not up after rollout.vllm.start_timeout_s, {passed:.0f} s"
                )
            if passed > said + 10:
                said = passed
                console.print(
                    f"starting vLLM, {passed:.0f} s: {process.last_words(1)[:160]}",
                    markup=False,
                    highlight=False,
                    soft_wrap=True,
                )
            await asyncio.sleep(0.25)
        console.print(f"vLLM is up after {time.monotonic() - start:.0f} s")

    async def _recover(self, replica: _Replica, starts: int, error: Lost) -> None:
        """Brings back a server that was lost when it had been started `starts` times.

        Raises:
          ServerError: it was lost more often than it may be, or does not come back.
        """
        async with replica.lock:
            if replica.starts != starts:
                return  # another request has seen to it
            settings = self.settings
            self._restarts += 1
            if self._restarts > settings.max_restarts:
                raise ServerError(
                    f"{error}; servers were lost {self._restarts} times in one step, "
                    f"rollout.vllm.max_restarts is {settings.max_restarts}"
                )
            Console().print(f"vLLM is lost: {error}", markup=False, soft_wrap=True)
            if settings.urls:
                await self._wait_for(replica.server, error)
                replica.starts += 1
                replica.verified = None
                await self._bring(replica.server)
            else:
                await asyncio.to_thread(replica.process.stop)
                await replica.server.close()
                await self._start(replica)
            if self._scores is not None:
                await self._verify(replica)

    async def _wait_for(self, server: Server, error: Lost) -> None:
        longest = self.settings.start_timeout_s
        end = time.monotonic() + longest
        while not await server.alive():
            if time.monotonic() > end:
                raise ServerError(
                    f"{error}; it did not come back within "
                    f"rollout.vllm.start_timeout_s, {longest:.0f} s"
                )
            await asyncio.sleep(0.5)

    async def _make_probes(self) -> probe.Probes:
        length = min(_PROBE_TOKENS, self._max_len - max(map(len, self._prompts)))
        server = self._replicas[0].server
        answers = await asyncio.gather(
            *[
                server.complete(tokens, {"max_tokens": length, "seed": 0})
                for tokens in self._prompts
            ]
        )
        return probe.rows(
            [
                [*tokens, *answer["token_ids"]]
                for tokens, [answer] in zip(self._prompts, answers, strict=True)
            ]
        )

    def _score(self, params: Any) -> np.ndarray:
        tokens, asked = self._probes
        return np.asarray(
            probe.score(
                params,
                tokens,
                asked,
                arch=self.arch,
                dtype=jnp.bfloat16,
                lora=self.lora,
            )
        )

    async def _verify(self, replica: _Replica) -> dict[str, float]:
        tokens, asked = self._probes
        ends = asked.sum(axis=1) + 1
        rows = await asyncio.gather(
            *[
                replica.server.score(row[:end].tolist())
                for row, end in zip(tokens, ends, strict=True)
            ]
        )
        server = np.zeros(tokens.shape, np.float32)
        server[asked] = np.concatenate(rows)
        mean, most = probe.difference(server, self._scores, asked)
        found = {"rollout/probe_diff_mean": mean, "rollout/probe_diff_max": most}
        what = (
            f"{replica.server.url} does not hold the weights of step {self._version}: "
            f"its log-probabilities of {asked.sum()} probe tokens are "
            f"{server[asked].mean():.4f} on average, the trainer's "
            f"{self._scores[asked].mean():.4f};"
        )
        attached = self.settings.urls
        stale = replica.server.device == "cpu" and self.arch.tie_embeddings
        hint = _KEPT if attached and stale else ""
        most_allowed = self.settings.max_probe_diff
        if not mean <= most_allowed:
            raise ServerError(
                f"{what} they differ by {mean:.4f}, "
                f"rollout.vllm.max_probe_diff is {most_allowed}{hint}"
            )
        if replica.verified:
            before, wanted = replica.verified
            slope, error = probe.followed(
                (server - before)[asked], (self._scores - wanted)[asked]
            )
            if abs(slope - 1) > 0.25 + 5 * error:
                raise ServerError(
                    f"{what} they made {slope:.2f} of the trainer's change since the "
                    f"last transfer (standard error {error:.2f}){hint}"
                )
            found["rollout/probe_followed"] = slope
        replica.verified = server, self._scores
        return found

    async def _answer(self, waiting: deque, found: queue.SimpleQueue) -> None:
        """Puts one completion for each of `waiting` into `found`."""
        # Twice what a server decodes together: of a group, some end before others.
        samples = sum(len(samples) for _, samples in waiting) / max(1, len(waiting))
        most = math.ceil(2 * self._max_num_seqs / max(1, samples))
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
        self, replica: _Replica, waiting: deque, found: queue.SimpleQueue
    ) -> None:
        while waiting:
            asked = waiting.popleft()
            starts = replica.starts
            try:
                completions = await self._complete(replica.server, *asked)
            except Lost as error:
                waiting.appendleft(asked)
                await self._recover(replica, starts, error)
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
        sampling = request.sampling
        stops = (*self.arch.eos_token_ids, *sampling.stop_token_ids)
        options = {
            "n": len(samples),
            "logprobs": sampling.logprobs,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "stop": list(sampling.stop),
            "stop_token_ids": list(stops),
            **self._skips,
            "ignore_eos": True,  # its idea of the end; ours is in stop_token_ids
        }
        if self.settings.reproducible:
            words = [request.seed, request.prompt_id, samples[0]]
            words += [request.turn] if request.turn else []
            seed = np.random.SeedSequence(words).generate_state(1)[0]
            options["seed"] = int(seed >> 1)
        if sampling.prompt_logprobs:
            options["prompt_logprobs"] = 0
        answers = await server.complete(request.tokens, options)
        if any(answer["finish_reason"] == "abort" for answer in answers):
            return None
        return [
            self._completion(server, request, samples[answer["index"]], stops, answer)
            for answer in answers
        ]

    def _completion(
        self,
        server: Server,
        request: Request,
        sample: int,
        stops: Sequence[int],
        answer: Mapping[str, Any],
    ) -> Completion:
        sampling = request.sampling
        tokens = np.asarray(answer["token_ids"], np.int32)
        logprobs = np.asarray(answer["logprobs"]["token_logprobs"], np.float32)
        if len(tokens) != len(logprobs) or not len(tokens):
            raise ServerError(
                f"{server.url} gave {len(tokens)} tokens with {len(logprobs)} "
                f"log-probabilities to prompt {request.prompt_id}"
            )
        by_token = int(tokens[-1]) in stops
        text = self.tokenizer.decode(tokens[:-1] if by_token else tokens, **self._skips)
        ends = [text.index(stop) for stop in sampling.stop if stop in text]
        greedy = sampling.temperature == 0
        more = {}
        if sampling.logprobs:
            more = _most_likely(answer["logprobs"]["top_logprobs"], sampling.logprobs)
        if sampling.truncates:  # told only after what was cut off
            more["full_logprobs"] = np.full_like(logprobs, np.nan)
        if sampling.prompt_logprobs:
            found = of_prompt(request.tokens, answer)
            more["prompt_logprobs"] = np.asarray(found, np.float32)
        return Completion(
            prompt_id=request.prompt_id,
            sample=sample,
            tokens=tokens,
            logprobs=np.zeros_like(logprobs) if greedy else logprobs,
            raw_logprobs=logprobs if greedy or sampling.plain else None,
            finish_reason=answer["finish_reason"],
            weight_version=self._version,
            text=text[: min(ends)] if ends else text,
            **more,
        )

    def _call(self, work: Coroutine) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


def _most_likely(
    told: Sequence[Mapping[str, float]], count: int
) -> dict[str, np.ndarray]:
    """The likeliest tokens at every position. vLLM tells the sampled token too; it says
    "token_id:<id>" and, where JSON cannot say -inf, -9999."""
    ranked = [
        sorted(position.items(), key=lambda item: -item[1])[:count] for position in told
    ]
    ids = [[int(name.split(":")[1]) for name, _ in row] for row in ranked]
    values = np.array([[value for _, value in row] for row in ranked], np.float32)
    return {
        "top_tokens": np.array(ids, np.int32),
        "top_logprobs": np.where(values <= -9999, -np.inf, values),
    }
