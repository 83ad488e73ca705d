"""SGLang. Only its native routes are spoken. Source: SGLang 0.5.20 to 0.5.23,
srt/entrypoints/http_server.py."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxrl_llm import models
from jaxrl_llm.rollout.servers.engine import ServerEngine
from jaxrl_llm.rollout.servers.server import (
    Answer,
    Ask,
    Launch,
    Server,
    ServerError,
    ServerSettings,
)


@dataclass(frozen=True, kw_only=True)
class SglangSettings(ServerSettings):
    """Servers of SGLang."""

    command: Sequence[str] = ("python", "-m", "sglang.launch_server")

    def __post_init__(self) -> None:
        if self.reproducible:
            raise ValueError(
                "SGLang draws from a state of its own: reproducible is true"
            )


class SglangServer(Server):
    """One SGLang server.

    It tells log-probabilities after temperature and before anything is cut off, which
    are `Completion.full_logprobs`.
    """

    name, section = "SGLang", "rollout.sglang"
    known_failures = {
        "No module named sglang": "rollout.sglang.command starts a Python without "
        "SGLang",
        "No module named 'sglang'": "rollout.sglang.command starts a Python without "
        "SGLang",
        "unrecognized arguments": "it does not know one of rollout.sglang.args",
        "Not enough memory": "the device has no room; change --mem-fraction-static in "
        "rollout.sglang.args",
        "out of memory": "the device has no room; lower --mem-fraction-static in "
        "rollout.sglang.args, or XLA_PYTHON_CLIENT_MEM_FRACTION of the trainer",
        "libcuda.so.1": "its kernels want a CUDA driver; see `make sglang-cpu`",
    }

    @classmethod
    def alone(cls, greedy: bool) -> bool:
        """See `Server.alone`: its answers to many say no number of a sample."""
        return True

    @classmethod
    def arguments(cls, model: Path, launch: Launch) -> tuple[str, ...]:
        """See `Server.arguments`."""
        return (
            *("--model-path", str(model), "--served-model-name", "policy"),
            *("--dtype", launch.dtype),
            # It counts the token after the last one too.
            *("--context-length", str(launch.max_model_len + 1)),
            *("--max-running-requests", str(launch.max_num_seqs)),
        )

    @classmethod
    def environment(cls, launch: Launch) -> dict[str, str]:
        """See `Server.environment`."""
        # Its Python environment is not ours; the model's own shorter length is no
        # reason to end.
        return {"PYTHONPATH": "", "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}

    async def check(self, max_len: int, lora: models.Lora | None = None) -> None:
        """See `Server.check`."""
        info = await self.ask("GET", "/server_info")
        if not isinstance(info, dict) or "max_total_num_tokens" not in info:
            raise ServerError(f"{self.url} is no SGLang: its /server_info differs")
        longest = info["max_total_num_tokens"]
        self.check_length(longest, max_len, "--max-total-tokens")
        if info.get("context_length"):
            self.check_length(
                info["context_length"] - 1, max_len, "--context-length (one more than)"
            )
        self.model, self.device = "policy", info.get("device", "")

    async def complete(self, ask: Ask) -> list[Answer]:
        """See `Server.complete`."""
        sampling, request = ask.request.sampling, ask.request
        options = {
            "max_new_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "stop": list(sampling.stop),
            "stop_token_ids": list(ask.stop_token_ids),
            "skip_special_tokens": ask.skip_special_tokens,
            "no_stop_trim": True,
        }
        said = await self._generate(
            request.tokens,
            options,
            start=0 if sampling.prompt_logprobs else -1,
            top=sampling.logprobs,
        )
        info = said["meta_info"]
        told = info["output_token_logprobs"]
        logprobs = [logprob for logprob, *_ in told]
        unknown = [float("nan")] * len(logprobs)
        cut = sampling.truncates and sampling.temperature > 0
        likeliest = info.get("output_top_logprobs") or ()
        return [
            Answer(
                index=0,
                tokens=[token for _, token, *_ in told],
                logprobs=unknown if cut else logprobs,
                full_logprobs=logprobs,
                finish_reason=info["finish_reason"]["type"],
                likeliest=[{t: value for value, t, *_ in row} for row in likeliest],
                prompt_logprobs=_of_prompt(info) if sampling.prompt_logprobs else None,
            )
        ]

    async def _generate(
        self,
        tokens: Sequence[int],
        options: Mapping[str, Any],
        start: int,
        top: int = 0,
    ) -> dict[str, Any]:
        """What /generate says.

        Args:
          options: its sampling_params.
          start: log-probabilities of the prompt from this token on; -1: of none.
          top: log-probabilities of so many tokens at every position.
        """
        body = {
            "input_ids": list(tokens),
            "sampling_params": dict(options),
            "return_logprob": True,
            "logprob_start_len": start,
            "top_logprobs_num": top,
        }
        return await self.ask("POST", "/generate", body)

    async def sample(self, tokens: Sequence[int], count: int) -> list[int]:
        """See `Server.sample`."""
        options = {"max_new_tokens": count, "temperature": 1.0}
        said = await self._generate(tokens, options, start=-1)
        return [token for _, token, *_ in said["meta_info"]["output_token_logprobs"]]

    async def score(self, tokens: Sequence[int]) -> list[float]:
        """See `Server.score`."""
        options = {"max_new_tokens": 1, "temperature": 1.0}
        return _of_prompt((await self._generate(tokens, options, start=0))["meta_info"])

    async def pause(self) -> None:
        """See `Server.pause`: what is being generated is aborted, and asked again."""
        await self.ask("POST", "/pause_generation", {"mode": "abort"})

    async def resume(self) -> None:
        """See `Server.resume`."""
        await self.ask("POST", "/continue_generation", {})

    async def forget(self) -> None:
        """See `Server.forget`. It refuses (400) while anything uses its cache."""
        await self.ask("POST", "/flush_cache")

    async def read_weights(self, directory: Path) -> None:
        """See `Server.read_weights`."""
        version = directory.name
        call = {"model_path": str(directory), "weight_version": version}
        await self.ask("POST", "/update_weights_from_disk", call)
        told = (await self.ask("GET", "/model_info")).get("weight_version")
        if told != version:
            raise ServerError(
                f"{self.url} has weights {told!r} after it took {version!r}"
            )


class SglangEngine(ServerEngine):
    """An `Engine` whose tokens come from SGLang."""

    dialect = SglangServer


def _of_prompt(info: Mapping[str, Any]) -> list[float]:
    """Log-probabilities of the prompt's tokens but the first, nats."""
    return [logprob for logprob, *_ in info["input_token_logprobs"][1:]]
