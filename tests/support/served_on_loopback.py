"""`jaxrl serve` in this process, on one device."""

import threading
from contextlib import contextmanager

import httpx
import jax
import waiting

from jaxrl_llm.serving.server import Server, Settings

LIMITS = {"max_model_len": 128, "max_num_seqs": 8, "decode_chunk": 8}


@contextmanager
def serving(path, **settings):
    """A server on a free port, which ends with the block; its client."""
    given = {"port": 0, "served_model_name": "policy", "dtype": "float32"} | LIMITS
    server = Server(path, Settings(**given | settings), "test", jax.devices()[:1])
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        waiting.until(lambda: server._http.started)
        with httpx.Client(base_url=server.url, timeout=300) as client:
            client.server = server
            yield client
    finally:
        server.end()
        thread.join()
