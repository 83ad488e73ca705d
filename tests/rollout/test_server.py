"""What a server is refused for, where no real one can be had."""

import asyncio
import json
import threading
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from jaxrl_llm import models
from jaxrl_llm.rollout.engine import Request, Sampling
from jaxrl_llm.rollout.servers.server import Server, ServerError
from jaxrl_llm.rollout.servers.vllm import VllmEngine, VllmSettings


@pytest.fixture
def answers():
    """What an HTTP server on loopback answers by path, and its address."""
    given = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            body = json.dumps(given[self.path]).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield given, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def check(url):
    async def ask():
        server = Server(url, timeout_s=300.0)
        try:
            await server.check(max_len=512)
        finally:
            await server.close()

    asyncio.run(ask())


def test_a_version_that_is_too_old_is_refused(answers):
    given, url = answers
    given["/version"] = {"version": "0.21.2"}
    with pytest.raises(ServerError, match="is vLLM 0.21.2; 0.22 is the oldest known"):
        check(url)


def test_missing_routes_are_named_with_what_brings_them(answers):
    given, url = answers
    given["/version"] = {"version": "0.22.0"}
    given["/openapi.json"] = {"paths": {"/pause": {}, "/resume": {}}}
    with pytest.raises(
        ServerError,
        match="has no /collective_rpc, /reset_prefix_cache; start it with V",
    ):
        check(url)


def engine(loaded, directory, *command):
    """A vLLM engine whose servers are other programs."""
    return VllmEngine(
        loaded.arch,
        loaded.tokenizer,
        [(1, 2, 3)],
        VllmSettings(command=command, weights_dir=str(directory)),
        directory=directory,
        dtype="float32",
        max_model_len=8,
        max_num_seqs=2,
    )


def test_a_program_that_is_no_server_is_named(tiny_model, tmp_path):
    loaded = models.load(tiny_model)
    with pytest.raises(ServerError, match="command: there is no program 'no-such'"):
        engine(loaded, tmp_path, "no-such")
    with closing(engine(loaded, tmp_path, "sh", "-c", "echo $*; exit 3")) as ended:
        with pytest.raises(ServerError, match="ended while it was starting") as caught:
            ended.load(loaded.params, 0)
    told = "--runner generate --dtype float32 --max-model-len 8 --max-num-seqs 2"
    assert told in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["vllm-0.log"]


def test_a_request_that_no_server_takes_is_refused(tiny_model, tmp_path):
    sampling = Sampling(max_tokens=6)
    request = Request(
        prompt_id=7, tokens=(1, 2, 3), num_samples=1, seed=0, sampling=sampling
    )
    with closing(engine(models.load(tiny_model), tmp_path, "sh")) as made:
        with pytest.raises(ValueError, match="prompt 7 has 3 tokens .*6 more.* is 8"):
            made.submit([request])
