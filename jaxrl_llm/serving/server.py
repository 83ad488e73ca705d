"""`jaxrl serve`: loads a model, and answers until it is told to end."""

import dataclasses
import errno
import signal
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from rich.console import Console

import jaxrl_llm.sharding.mesh as meshes
from jaxrl_llm import models
from jaxrl_llm.data.chat_template import Encoder
from jaxrl_llm.rollout.engine import Sampling, Use
from jaxrl_llm.rollout.native.engine import JaxEngine

try:
    import uvicorn

    from jaxrl_llm.serving import app
except ModuleNotFoundError as error:
    raise ImportError(
        f"jaxrl serve needs the package {error.name}, which is not installed: "
        "pip install 'jaxrl-llm[serve]'"
    ) from None
from jaxrl_llm.serving.bodies import Limits
from jaxrl_llm.serving.worker import Worker

_END_S = 10
"""How long answers have to be sent when the server is told to end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How a model is served."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    """Who asks must send it as "Authorization: Bearer KEY"; None: nobody needs one."""
    served_model_name: str | None = None
    """What clients call the model; its path if None."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """float32 on a CPU and bfloat16 elsewhere if None."""
    max_model_len: int | None = None
    """Tokens of the longest prompt with its response; what the model has positions for,
    but at most 8192, if None."""
    max_num_seqs: int = 64
    """Sequences decoded together; more wait."""
    max_queued: int = 1024
    """Responses that wait or are being generated, at most; more are refused (429)."""
    decode_chunk: int = 16
    """Tokens between two looks at what came and went; streams get so many at once."""
    cache_gib: float | None = None
    """Memory for keys and values on each device; see `JaxEngine`."""
    quantization: models.Bits | None = None
    tensor: int = 1
    """Devices that one copy of the weights is split over."""
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_queued", "decode_chunk", "tensor"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, not positive")
        if not 0 <= self.port < 65536:
            raise ValueError(f"port is {self.port}, not from 0 to 65535")
        if self.api_key == "":
            raise ValueError("api_key is empty; leave it out for none")


class Server:
    """A model behind HTTP.

    Args:
      path: of the model, as in a configuration.
      version: of this package.
      devices: those to compute on; all if not given.

    Raises:
      ValueError: the model or a setting does not fit.
      OSError: the address cannot be listened on.
    """

    def __init__(
        self,
        path: str,
        settings: Settings,
        version: str,
        devices: Sequence[jax.Device] | None = None,
    ):
        self._listener = _bound(settings.host, settings.port)
        try:
            self._open(path, settings, version, devices)
        except BaseException:
            self._listener.close()
            raise

    def _open(
        self,
        path: str,
        settings: Settings,
        version: str,
        devices: Sequence[jax.Device] | None,
    ) -> None:
        opened = models.open(path)
        models.need_tokenizer(opened.tokenizer, path, "copy the files of one into it")
        arch = self._arch = opened.arch
        on_cpu = jax.default_backend() == "cpu"
        self._dtype = settings.dtype or ("float32" if on_cpu else "bfloat16")
        longest = settings.max_model_len or min(arch.max_positions, _LONGEST)
        devices = jax.devices() if devices is None else devices
        axes = {
            "data": max(1, len(devices) // settings.tensor),
            "tensor": settings.tensor,
        }
        engine = JaxEngine(
            arch,
            opened.tokenizer,
            mesh=meshes.make(axes, devices),
            dtype=jnp.dtype(self._dtype),
            max_model_len=longest,
            max_num_seqs=settings.max_num_seqs,
            decode_chunk=settings.decode_chunk,
            cache_gib=settings.cache_gib,
            quantization=settings.quantization,
            skip_special_tokens=settings.skip_special_tokens,
        )
        # Room for all that it may ever decode together, whatever comes first.
        sampling = Sampling(max_tokens=max(1, longest - 1))
        most = {"num_prompts": settings.max_num_seqs, "num_samples": 1}
        engine.programs([Use(**most, sampling=sampling)], [])
        engine.load(opened.load(dtype=jnp.dtype(self._dtype)), 0)
        limits = Limits(
            name=settings.served_model_name or path,
            vocab_size=arch.vocab_size,
            max_model_len=longest,
            max_queued=settings.max_queued,
            skip_special_tokens=settings.skip_special_tokens,
        )
        self.worker = Worker(engine, 0, settings.max_queued, self._failed)
        served = app.Served(
            worker=self.worker,
            encoder=Encoder(tokenizer=opened.tokenizer, vocab_size=arch.vocab_size),
            limits=limits,
            info={
                "engine": "jaxrl",
                "version": version,
                "dtype": self._dtype,
                "quantization": settings.quantization,
                "max_num_seqs": settings.max_num_seqs,
                **dataclasses.asdict(limits),
            },
            read=self._read,
            api_key=settings.api_key,
        )
        config = uvicorn.Config(
            app.make(served),
            log_level="warning",
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=_END_S,
        )
        self._http = uvicorn.Server(config)
        self._settings, self.name = settings, limits.name
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        self.url = f"http://{host}:{self._listener.getsockname()[1]}"

    def run(self) -> None:
        """Answers until SIGTERM or Ctrl-C.

        Raises:
          RuntimeError: the engine failed.
        """
        settings, said = self._settings, Console(soft_wrap=True)
        said.print(f"{self.name} at {self.url}", highlight=False)
        if settings.api_key is None and not _is_loopback(settings.host):
            said.print(
                f"whoever reaches {settings.host} can also stop it and give it other "
                "weights; --api-key keeps others out"
            )
        if threading.current_thread() is threading.main_thread():
            # uvicorn raises the signal again when all is answered.
            signal.signal(signal.SIGTERM, lambda *_: None)
        try:
            self._http.run(sockets=[self._listener])
        finally:
            self.worker.close()
            self._listener.close()
        if self.worker.failure:
            raise RuntimeError("the engine failed") from self.worker.failure

    def end(self) -> None:
        """Has `run` return; may be called by any thread."""
        self._http.should_exit = True

    def _failed(self) -> None:
        self.end()

    def _read(self, path: Path) -> Any:
        """The parameters of a directory that has the served model's shape.

        Raises:
          ValueError: it has another, or none.
        """
        if not path.is_dir():
            raise ValueError("there is no such folder here")
        opened = models.open(str(path))
        for one in dataclasses.fields(self._arch):
            ours, theirs = (getattr(a, one.name) for a in (self._arch, opened.arch))
            if one.compare and one.name not in _OF_USE and ours != theirs:
                raise ValueError(
                    f"{one.name} is {theirs}, but the served model has {ours}"
                )
        return opened.load(dtype=jnp.dtype(self._dtype))


_LONGEST = 8192
_OF_USE = ("eos_token_ids",)
"""Fields of an architecture that say how a model is used, and not what it computes."""


def _bound(host: str, port: int) -> socket.socket:
    """A socket at an address, which refuses connections until it is served.

    Raises:
      OSError: it is taken, or none of this host.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
        return found
    except OSError as error:
        found.close()
        if error.errno != errno.EADDRINUSE:
            raise OSError(f"cannot listen on {host}:{port}: {error.strerror}") from None
        raise OSError(
            f"address already in use: {host}:{port}; set another --port"
        ) from None


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")
