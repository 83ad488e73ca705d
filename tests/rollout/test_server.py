"""What a server is refused for, where no real one can be had."""

import asyncio
import json
import threading
from contextlib import closing
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jax
import numpy as np
import pytest

from jaxrl_llm import models
from jaxrl_llm.data.types import Completion
from jaxrl_llm.rollout.engine import Request, Sampling
from jaxrl_llm.rollout.servers.server import ServerError
from jaxrl_llm.rollout.servers.vllm import VllmEngine, VllmServer, VllmSettings


@pytest.fixture
def answers():
    """What an HTTP server on loopback answers by path, and its address. What is posted
    to it is in `given["posted"]`; it refuses what `given["refused"]` has."""
    given = {"posted": [], "refused": ()}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            self.say(200, given[self.path])

        def do_POST(self):  # noqa: N802
            size = int(self.headers.get("Content-Length", 0))
            body = json.loads(self.rfile.read(size)) if size else None
            given["posted"].append((self.path, body))
            if self.path in given["refused"]:
                self.say(400, {"error": "no such folder"})
            elif "lora" in self.path:
                self.say(200, "Success: a text, no JSON", kind=None)
            else:
                self.say(200, {"success": True})

        def say(self, status, what, kind="application/json"):
            body = json.dumps(what).encode() if kind else what.encode()
            self.send_response(status)
            if kind:
                self.send_header("Content-Type", kind)
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


def asked(url, ask):
    """What `ask` returns of a client of the server."""

    async def run():
        server = VllmServer(url, timeout_s=300.0)
        try:
            return await ask(server)
        finally:
            await server.close()

    return asyncio.run(run())


def check(url, lora=None):
    asked(url, lambda server: server.check(max_len=512, lora=lora))


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


ADAPTERS = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
LORA = models.Lora(rank=12, modules=("q", "down"))


@pytest.mark.parametrize(
    "device, routes, said, message",
    [
        (
            "cuda",
            (),
            {"max_lora_rank": 16},
            "takes no adapters while it runs; start it",
        ),
        ("cuda", ADAPTERS, None, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environ"),
        (
            "cuda",
            ADAPTERS,
            {"max_lora_rank": 8},
            "of rank 8 at most, but actor.lora.rank is 12; start it with "
            "--enable-lora --max-lora-rank 16 --lora-target-modules q_proj down_proj",
        ),
        (
            "cuda",
            ADAPTERS,
            {"max_lora_rank": 16, "target_modules": ["q_proj"]},
            r"takes adapters on \['q_proj'\], not on q_proj, down_proj; start it",
        ),
        ("cpu", ADAPTERS, {"max_lora_rank": 16}, "takes adapters on all matrices, not"),
        # Fit, and are refused for something else later on.
        ("cuda", ADAPTERS, {"max_lora_rank": 16}, "takes 8 tokens"),
        (
            "cpu",
            ADAPTERS,
            {"max_lora_rank": 16, "target_modules": ["q_proj", "down_proj", "o_proj"]},
            "takes 8 tokens",
        ),
    ],
)
def test_what_takes_no_such_adapters_is_refused(answers, device, routes, said, message):
    given, url = answers
    known = ("/pause", "/resume", "/collective_rpc", "/reset_prefix_cache", *routes)
    given["/version"] = {"version": "0.32.0"}
    given["/openapi.json"] = {"paths": dict.fromkeys(known)}
    given["/server_info?config_format=json"] = {
        "vllm_config": {
            "device_config": {"device": device},
            "lora_config": said,
            "model_config": {"max_model_len": 8},
        }
    }
    with pytest.raises(ServerError, match=message):
        check(url, LORA)


def test_an_adapter_takes_the_place_of_the_one_before(answers, tmp_path):
    given, url = answers
    names = [
        "policy",
        "policy-v6",
        "policy-v",
        "policy-v7x",
        "another-v6",
        "policy-v10",
    ]
    given["/v1/models"] = {"data": [{"id": name} for name in names]}

    async def adapt(server):
        await server.adapt("policy-v7", tmp_path)
        return server.model

    assert asked(url, adapt) == "policy-v7"
    load, unload = ADAPTERS
    assert given["posted"] == [
        ("/pause?mode=wait", None),
        (unload, {"lora_name": "policy-v6"}),
        (unload, {"lora_name": "policy-v10"}),
        (load, {"lora_name": "policy-v7", "lora_path": str(tmp_path)}),
        ("/reset_prefix_cache", None),
        ("/resume", None),
    ]
    given["refused"] = (load,)
    with pytest.raises(ServerError, match="no such folder.*weights_dir must be a fold"):
        asked(url, adapt)


def test_adapters_of_a_rank_that_no_server_takes_are_refused(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="rank is 513, but vLLM takes at most 512; lo"):
        engine(models.load(tiny_model), tmp_path, "sh", lora=models.Lora(rank=513))


def test_a_server_is_started_for_adapters(tiny_model, tmp_path):
    loaded = models.load(tiny_model)
    adapters = jax.tree.map(
        lambda x: np.zeros(x.shape, x.dtype),
        models.abstract_adapters(loaded.arch, LORA),
    )
    tell = "echo $*; env | grep LORA; exit 3"
    with closing(engine(loaded, tmp_path, "sh", "-c", tell, lora=LORA)) as ended:
        with pytest.raises(ServerError, match="ended while it was starting") as caught:
            ended.load(models.merge(adapters, loaded.params), 3)
    told = str(caught.value)
    assert "--enable-lora --max-lora-rank 16 --lora-target-modules q_proj down" in told
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in told


def engine(loaded, directory, *command, lora=None, kind=VllmEngine):
    """A vLLM engine whose servers are other programs."""
    return kind(
        loaded.arch,
        loaded.tokenizer,
        [(1, 2, 3)],
        VllmSettings(command=command, weights_dir=str(directory)),
        directory=directory,
        dtype="float32",
        max_model_len=8,
        max_num_seqs=2,
        lora=lora,
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


def test_requests_that_come_up_are_sent_while_others_are_answered(tiny_model, tmp_path):
    class Answered(VllmEngine):
        """Its servers answer at once."""

        async def _answer(self, waiting, found):
            for request, samples in waiting:
                for sample in samples:
                    found.put(answer(request, sample))

    def answer(request, sample):
        values = np.zeros(1, np.float32)
        return Completion(
            prompt_id=request.prompt_id,
            sample=sample,
            tokens=np.array([request.turn], np.int32),
            logprobs=values,
            raw_logprobs=values,
            finish_reason="stop",
            weight_version=0,
            text="",
        )

    def more(idle):
        return [ready.pop()] if ready and idle else []

    first = Request(
        prompt_id=7,
        tokens=(1, 2, 3),
        num_samples=2,
        first_sample=3,
        seed=0,
        sampling=Sampling(max_tokens=2),
    )
    ready = [replace(first, turn=1, num_samples=1)]
    made = engine(models.load(tiny_model), tmp_path, "sh", kind=Answered)
    with closing(made):
        made._version = 0
        made.submit([first])
        found = [(c.sample, c.tokens[0]) for c in made.completions(more)]
    assert found == [(3, 0), (4, 0), (3, 1)]
