"""What a server is refused for, where no real one can be had."""

import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from jaxrl_llm.rollout.servers.server import Server, ServerError


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
        server = Server(url, timeout_s=5.0)
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
