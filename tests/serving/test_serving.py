"""`jaxrl serve` on loopback: the engine behind vLLM's and OpenAI's routes."""

import asyncio
import json
import socket
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import jax
import numpy as np
import pytest
import waiting

pytest.importorskip("uvicorn", reason="needs the extra serve")
pytest.importorskip("starlette", reason="needs the extra serve")
import httpx
from served_on_loopback import LIMITS, serving

from jaxrl_llm import models
from jaxrl_llm.rollout.engine import Request, Sampling, generate
from jaxrl_llm.rollout.native.engine import JaxEngine
from jaxrl_llm.serving.server import Server, Settings
from jaxrl_llm.sharding import mesh

PROMPT = [40, 41, 42, 43, 44]


@pytest.fixture(scope="module")
def client(tiny_model):
    with serving(tiny_model, max_queued=600) as made:
        yield made


@pytest.fixture(scope="module")
def loaded(tiny_model):
    return models.load(tiny_model)


@pytest.fixture(scope="module")
def engine(loaded):
    """The same engine without a server."""
    made = JaxEngine(
        loaded.arch,
        loaded.tokenizer,
        mesh=mesh.make({"data": 1, "tensor": 1}, jax.devices()[:1]),
        dtype=jax.numpy.float32,
        **LIMITS,
    )
    made.load(loaded.params, 0)
    return made


def post(client, route, /, **body):
    answer = client.post(route, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def completed(client, /, **body):
    body = {"prompt": PROMPT, "return_token_ids": True, "logprobs": 0} | body
    return post(client, "/v1/completions", **body)["choices"]


def events(client, route, /, **body):
    """What is streamed."""
    found = []
    with client.stream("POST", route, json=body | {"stream": True}) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line:
                assert line.startswith("data: ")
                found.append(line.removeprefix("data: "))
    assert found.pop() == "[DONE]"
    return [json.loads(line) for line in found]


def queued(client):
    return client.server.worker.state.queued


DRAWN = [
    {"temperature": 1.0},
    pytest.param({"temperature": 0.0}, marks=pytest.mark.slow),
    pytest.param(
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize("drawn", DRAWN)
def test_tokens_are_those_of_the_engine_with_the_same_key(client, engine, drawn):
    key = {"prompt_id": 7, "first_sample": 2, "turn": 0}
    sampling = Sampling(max_tokens=20, logprobs=1, prompt_logprobs=True, **drawn)
    request = Request(
        prompt_id=7,
        tokens=tuple(PROMPT),
        num_samples=3,
        seed=11,
        sampling=sampling,
        first_sample=2,
    )
    [wanted] = generate(engine, [request])
    asked = {"n": 3, "max_tokens": 20, "seed": 11, "key": key, **drawn}
    more = {"prompt_logprobs": 0, "return_all_logprobs": True, "logprobs": 1}
    found = completed(client, **asked, **more, return_tokens_as_token_ids=True)
    for one, mine in zip(found, wanted, strict=True):
        assert one["token_ids"] == mine.tokens.tolist()
        assert (one["text"], one["finish_reason"]) == (mine.text, mine.finish_reason)
        greedy = drawn["temperature"] == 0
        logprobs = mine.raw_logprobs if greedy else mine.logprobs
        told = one["logprobs"]
        np.testing.assert_allclose(told["token_logprobs"], logprobs, atol=1e-5)
        np.testing.assert_allclose(one["raw_logprobs"], mine.raw_logprobs, atol=1e-5)
        if mine.full_logprobs is not None:
            full = one["full_logprobs"]
            np.testing.assert_allclose(full, mine.full_logprobs, atol=1e-5)
        likeliest = [f"token_id:{row[0]}" for row in mine.top_tokens]
        assert all(
            name in row
            for name, row in zip(likeliest, told["top_logprobs"], strict=True)
        )
        assert one["prompt_logprobs"][0] is None
        scored = [
            entry[str(token)]["logprob"]
            for token, entry in zip(PROMPT[1:], one["prompt_logprobs"][1:], strict=True)
        ]
        np.testing.assert_allclose(scored, mine.prompt_logprobs, atol=1e-5)
    params = {"max_tokens": 20, "seed": 11, "key": key, "n": 3, "logprobs": 0, **drawn}
    said = post(
        client, "/inference/v1/generate", token_ids=PROMPT, sampling_params=params
    )
    assert [c["token_ids"] for c in said["choices"]] == [
        mine.tokens.tolist() for mine in wanted
    ]
    for one, other in zip(said["choices"], found, strict=True):
        content = one["logprobs"]["content"]
        values = [entry["logprob"] for entry in content]
        np.testing.assert_allclose(
            values, other["logprobs"]["token_logprobs"], atol=1e-5
        )


def test_what_is_streamed_is_what_is_told_at_once(client):
    words = {"prompt": "a few words", "max_tokens": 60, "seed": 3, "n": 2}
    stop = {"stop": ["\x00", "~~"], "logprobs": 2, "return_token_ids": True}
    asked = words | stop
    whole = post(client, "/v1/completions", **asked)
    options = {"stream_options": {"include_usage": True}}
    pieces = events(client, "/v1/completions", **asked, **options)
    assert pieces.pop()["usage"] == whole["usage"]
    for wanted in whole["choices"]:
        mine = [p["choices"][0] for p in pieces]
        mine = [c for c in mine if c["index"] == wanted["index"]]
        assert len(mine) > 1
        assert "".join(c["text"] for c in mine) == wanted["text"]
        assert sum((c["token_ids"] for c in mine), []) == wanted["token_ids"]
        for name, values in wanted["logprobs"].items():
            assert sum((c["logprobs"][name] for c in mine), []) == values
        reasons = [c["finish_reason"] for c in mine]
        assert reasons == [None] * (len(mine) - 1) + [wanted["finish_reason"]]


def test_a_conversation_is_answered_in_its_template(client, loaded, engine):
    messages = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    asked = {"messages": messages, "seed": 5, "max_completion_tokens": 12}
    how = {"logprobs": True, "top_logprobs": 2, "return_token_ids": True}
    said = post(client, "/v1/chat/completions", **asked, **how)
    plain = [{"role": "user", "content": "hello"}]
    prompt = loaded.tokenizer.apply_chat_template(
        plain, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert said["prompt_token_ids"] == prompt
    [one] = completed(client, prompt=prompt, seed=5, max_tokens=12)
    [choice] = said["choices"]
    assert choice["token_ids"] == one["token_ids"]
    assert choice["message"] == {"role": "assistant", "content": one["text"]}
    assert all(len(e["top_logprobs"]) in (2, 3) for e in choice["logprobs"]["content"])
    pieces = events(client, "/v1/chat/completions", **asked)
    deltas = [p["choices"][0]["delta"]["content"] for p in pieces]
    assert "".join(deltas) == one["text"]


def test_stop_strings_and_tokens_end_a_response(client):
    [free] = completed(client, seed=1, max_tokens=40, temperature=0.0)
    text, tokens = free["text"], free["token_ids"]
    at = text[5:7]
    [cut] = completed(client, max_tokens=40, temperature=0.0, stop=at)
    assert (cut["text"], cut["finish_reason"]) == (text[: text.index(at)], "stop")
    assert tokens[: len(cut["token_ids"])] == cut["token_ids"]
    [cut] = completed(
        client, max_tokens=40, temperature=0.0, stop_token_ids=[tokens[4]]
    )
    assert cut["token_ids"] == tokens[: tokens.index(tokens[4]) + 1]
    assert cut["finish_reason"] == "stop"


def test_prompts_and_samples_have_their_places(client):
    prompts = [[40, 41], [50, 51, 52]]
    found = completed(client, prompt=prompts, n=2, seed=4, max_tokens=6)
    assert [choice["index"] for choice in found] == [0, 1, 2, 3]
    assert [c["prompt_token_ids"] for c in found] == [
        prompts[0],
        prompts[0],
        prompts[1],
        prompts[1],
    ]
    alone = completed(client, prompt=prompts[0], n=2, seed=4, max_tokens=6)
    assert [c["token_ids"] for c in alone] == [c["token_ids"] for c in found[:2]]
    other = completed(client, prompt=prompts[0], n=2, max_tokens=6)
    assert [c["token_ids"] for c in other] != [c["token_ids"] for c in alone]


BODY = {"prompt": PROMPT}
CHAT = {"messages": [{"role": "user", "content": "a"}]}
REFUSED = [
    ("text", {}, "prompt", "prompt is missing"),
    ("text", {"prompt": []}, "prompt", "prompt is empty"),
    ("text", {"prompt": [40, 999]}, "prompt", "token 999, but .* has 264"),
    ("text", {"prompt": [-1]}, "prompt", "-1"),
    ("text", {"prompt": 3}, "prompt", "prompt is 3"),
    ("text", BODY | {"n": 0}, "n", "n is 0: .*greater than or equal to 1"),
    ("text", BODY | {"n": 601}, "n", "holds 600 responses at most"),
    ("text", BODY | {"n": "2"}, "n", "n is '2': .*integer"),
    ("text", BODY | {"max_tokens": 124}, "max_tokens", "together over the 128"),
    ("text", {"prompt": [40] * 128}, "prompt", "has 128 tokens"),
    ("text", BODY | {"temperature": -1}, "temperature", "temperature is -1"),
    ("text", BODY | {"top_p": 0}, "top_p", "top_p is 0"),
    ("text", BODY | {"top_k": -2}, "top_k", "top_k is -2"),
    ("text", BODY | {"min_p": 2}, "min_p", "min_p is 2"),
    ("text", BODY | {"seed": 2**32}, "seed", "seed is 4294967296"),
    ("text", BODY | {"stop": ""}, "stop", "stop has an empty string"),
    ("text", BODY | {"stop": 5}, "stop", "stop is 5"),
    ("text", BODY | {"stop_token_ids": [999]}, "stop_token_ids", "token 999"),
    ("text", BODY | {"logprobs": 21}, "logprobs", "logprobs is 21"),
    ("text", BODY | {"best_of": 4}, "best_of", "best_of is 4, which this server do"),
    ("text", BODY | {"logit_bias": {"5": 1}}, "logit_bias", "leave it out"),
    ("text", BODY | {"echo": True}, "echo", "echo is True"),
    ("text", BODY | {"no_such": 1}, "no_such", "no_such is no field of this route"),
    ("text", BODY | {"skip_special_tokens": False}, "skip_special_tokens", "started"),
    ("text", BODY | {"stream_options": {}}, "stream_options", "needs stream"),
    ("text", BODY | {"key": {"prompt_id": -1}}, "key.prompt_id", "prompt_id is -1"),
    ("chat", {"messages": []}, "messages", "at least 1 item"),
    ("chat", {"messages": [{"content": "a"}]}, "messages.0.role", "role is missing"),
    ("chat", {"messages": [{"role": "user", "content": 3}]}, "messages.0.content", "3"),
    (
        "chat",
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages.0.content",
        "is no text",
    ),
    ("chat", CHAT | {"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
    ("chat", CHAT | {"tools": [{"type": "function"}]}, "tools", "does not do"),
    ("chat", CHAT | {"response_format": {"type": "json_object"}}, None, "does not do"),
    ("tokens", {"sampling_params": {}}, "token_ids", "token_ids is missing"),
    ("tokens", {"token_ids": PROMPT}, "sampling_params", "is missing"),
    (
        "tokens",
        {"token_ids": PROMPT, "sampling_params": {"min_tokens": 3}},
        "sampling_params.min_tokens",
        "min_tokens is 3",
    ),
]
ROUTES = {
    "text": "/v1/completions",
    "chat": "/v1/chat/completions",
    "tokens": "/inference/v1/generate",
}


@pytest.mark.parametrize("route, body, field, message", REFUSED)
def test_what_cannot_be_answered_is_refused_by_field(
    client, route, body, field, message
):
    answer = client.post(ROUTES[route], json=body)
    assert answer.status_code == 400
    said = answer.json()["error"]
    assert field is None or said["param"] == field
    with pytest.raises(ValueError, match=message):
        raise ValueError(said["message"])


def test_other_requests_that_go_wrong_say_why(client, tmp_path):
    def refused(status, message, *given, **how):
        answer = client.request(*given, **how)
        assert answer.status_code == status, answer.text
        assert message in answer.text

    text = "/v1/completions"
    refused(400, "the body is no JSON", "POST", text, content=b"{")
    refused(400, "the body is no JSON", "POST", text, content=b"\xff\xfe")
    refused(400, "must be an object", "POST", text, content=b"[]")
    refused(404, "this server has 'policy'", "POST", text, json=BODY | {"model": "x"})
    refused(404, "", "GET", "/v1/no-such")
    refused(405, "", "GET", text)
    refused(413, "is over", "POST", text, content=b" " * (64 * 2**20 + 1))
    refused(400, "mode is 'keep'", "POST", "/pause?mode=keep")
    call = {"method": "reload_weights", "kwargs": {"weights_path": str(tmp_path / "x")}}
    refused(400, "no such folder", "POST", "/collective_rpc", json=call)
    call["method"] = "anything"
    refused(400, "method is 'anything'", "POST", "/collective_rpc", json=call)
    assert queued(client) == 0
    assert completed(client, max_tokens=2)


def test_a_wrong_key_opens_nothing(tiny_model):
    with serving(tiny_model, api_key="secret") as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            for route in ("/v1/models", "/metrics", "/server_info"):
                assert client.get(route, headers=headers).status_code == 401
            for route in ("/v1/completions", "/pause", "/collective_rpc"):
                answer = client.post(route, headers=headers, json=BODY)
                assert answer.status_code == 401
        assert not client.server.worker.state.paused
        assert client.get("/health").status_code == 200
        right = {"Authorization": "Bearer secret"}
        assert client.get("/v1/models", headers=right).status_code == 200


def test_settings_that_cannot_work_are_refused(tiny_model):
    for name, value in (("max_queued", 0), ("port", 70000), ("api_key", "")):
        with pytest.raises(ValueError, match=name):
            Settings(**{name: value})
    with socket.create_server(("127.0.0.1", 0)) as taken:
        given = Settings(port=taken.getsockname()[1], **LIMITS)
        with pytest.raises(OSError, match="address already in use: 127.0.0.1:"):
            Server(tiny_model, given, "test")


@pytest.mark.slow
def test_500_at_once_lose_nothing_and_change_nothing(client):
    """More than may be queued wait their turn, and all are answered as if alone."""
    seeds = range(500)
    how = {"max_tokens": 4, "n": 2, "return_token_ids": True}
    asked = [{"prompt": [40 + s % 9, 50], "seed": s, **how} for s in seeds]

    async def all_at_once():
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=client.server.url, timeout=300, limits=limits
        ) as many:

            async def one(body):
                while True:
                    answer = await many.post(
                        "/v1/completions",
                        json=body | {"n": 2, "return_token_ids": True},
                    )
                    statuses[answer.status_code] += 1
                    if answer.status_code != 429:
                        return answer.json()["choices"]
                    assert answer.headers["Retry-After"] == "1"
                    await asyncio.sleep(0.2)

            return await asyncio.gather(*map(one, asked))

    statuses = Counter()
    found = asyncio.run(all_at_once())
    assert statuses[200] == 500 and set(statuses) <= {200, 429}
    assert statuses[429] > 0  # 1000 responses, of which 600 may be queued
    tokens = [[c["token_ids"] for c in choices] for choices in found]
    assert all(len(each) == 2 for each in tokens)
    for s in (0, 123, 499):
        alone = completed(client, **asked[s])
        assert [c["token_ids"] for c in alone] == tokens[s]
    assert queued(client) == 0


def raw(client, body, route="/v1/completions"):
    """A connection of which nobody has read anything yet."""
    where = urlsplit(client.server.url)
    connection = socket.create_connection((where.hostname, where.port))
    content = json.dumps(body).encode()
    head = f"POST {route} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)
    return connection


def metric(client, name):
    lines = client.get("/metrics").text.splitlines()
    return sum(float(x.split()[-1]) for x in lines if x.startswith(name))


@pytest.mark.parametrize("stream", [False, True])
def test_what_nobody_waits_for_is_aborted(client, stream):
    before = metric(client, "jaxrl_aborted_total")
    worker = client.server.worker
    held = threading.Event()
    seen = worker._engine.completions

    def slowly(more, told):
        def wait(idle):
            if queued(client) and not idle:
                held.wait()
            return more(idle)

        yield from seen(wait, told)

    worker._engine.completions = slowly  # nothing ends before the clients are gone
    try:
        body = BODY | {"max_tokens": 100, "n": 3, "stream": stream}
        gone = [raw(client, body) for _ in range(4)]
        waiting.until(lambda: queued(client) == 12)
        for connection in gone:
            connection.close()
        waiting.until(lambda: queued(client) == 0)
    finally:
        held.set()
        worker._engine.completions = seen
    assert metric(client, "jaxrl_aborted_total") == before + 12
    assert completed(client, max_tokens=2)


def test_slow_and_broken_clients_hold_nobody_up(client):
    where = urlsplit(client.server.url)
    address = where.hostname, where.port
    slow = [raw(client, BODY | {"max_tokens": 100, "stream": True}) for _ in range(8)]
    half = [socket.create_connection(address) for _ in range(8)]
    for connection in half:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nContent-Length: 99\r\n\r\n{"
        )
    noise = socket.create_connection(address)
    noise.sendall(b"\x00\xff no HTTP at all\r\n\r\n")
    assert noise.recv(100).startswith(b"HTTP/1.1 400")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda s: completed(client, seed=s, n=4), range(16)))
    assert all(len(choices) == 4 for choices in found)
    for connection in slow:  # who reads at last gets everything
        connection.settimeout(60)
        text = b""
        while b"[DONE]" not in text:
            text += (part := connection.recv(2**16))
            assert part
    for connection in (*slow, *half, noise):
        connection.close()
    assert queued(client) == 0


def test_new_weights_change_answers_and_their_version(client, loaded, tmp_path):
    how = {"seed": 2, "max_tokens": 12}
    said = post(client, "/v1/completions", **BODY, **how, return_token_ids=True)
    before = said["choices"][0]["token_ids"], said["weight_version"]
    other = jax.tree.map(lambda x: x + 0.05, loaded.params)
    for name, params in (("new", other), ("old", loaded.params)):
        models.save(
            tmp_path / name, loaded.arch, params, loaded.tokenizer, dtype="float32"
        )

    def take(name, **version):
        call = {"weights_path": str(tmp_path / name), **version}
        post(client, "/pause?mode=wait")
        assert client.get("/is_paused").json() == {"is_paused": True}
        answer = client.post("/v1/completions", json=BODY)
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
        body = {"method": "reload_weights", "kwargs": call}
        told = post(client, "/collective_rpc", **body)["weight_version"]
        assert post(client, "/reset_prefix_cache") == {"success": True}
        post(client, "/resume")
        said = post(client, "/v1/completions", **BODY, **how, return_token_ids=True)
        assert said["weight_version"] == told
        return said["choices"][0]["token_ids"], told

    tokens, version = take("new", weight_version=41)
    assert version == 41 and tokens != before[0]
    assert metric(client, "jaxrl_weight_version") == 41
    assert take("old") == (before[0], 42)


def test_a_pause_waits_for_what_is_generated_or_aborts_it(client):
    body = BODY | {"max_tokens": 100, "n": 2, "temperature": 1.0}
    with ThreadPoolExecutor() as pool:
        for mode, reasons in (("wait", {"stop", "length"}), ("abort", {"abort"})):
            asked = [pool.submit(post, client, "/v1/completions", **body)]
            waiting.until(lambda: queued(client) > 0)
            post(client, f"/pause?mode={mode}")
            assert queued(client) == 0
            post(client, "/resume")
            said = asked[0].result()["choices"]
            assert len(said) == 2
            # What ended in time is no matter of the pause.
            assert {c["finish_reason"] for c in said} <= reasons | {"stop"}


def test_weights_of_another_shape_are_refused(client, tmp_path):
    import tiny

    other = tiny.checkpoint(tmp_path / "other", num_layers=1)
    call = {"method": "reload_weights", "kwargs": {"weights_path": other}}
    answer = client.post("/collective_rpc", json=call)
    assert answer.status_code == 400
    assert "num_layers is 1, but the served model has 2" in answer.text


@pytest.mark.slow
def test_a_server_whose_engine_fails_says_so_and_ends(tiny_model):
    given = Settings(port=0, dtype="float32", **LIMITS)
    server = Server(tiny_model, given, "test", jax.devices()[:1])
    server.worker._engine.completions = lambda *_: 1 / 0
    ended = []

    def run():
        try:
            server.run()
        except RuntimeError as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    waiting.until(lambda: server._http.started)
    answer = httpx.post(f"{server.url}/v1/completions", json=BODY, timeout=60)
    assert (answer.status_code, "division by zero" in answer.text) == (503, True)
    thread.join()
    assert isinstance(ended[0].__cause__, ZeroDivisionError)


def test_the_page_for_prometheus_counts(client):
    before = metric(client, "jaxrl_generation_tokens_total")
    found = completed(client, n=2, max_tokens=5)
    tokens = sum(len(choice["token_ids"]) for choice in found)
    assert metric(client, "jaxrl_generation_tokens_total") == before + tokens
    assert metric(client, "jaxrl_queued") == 0
    [model] = client.get("/v1/models").json()["data"]
    assert (model["id"], model["max_model_len"]) == ("policy", 128)


@pytest.mark.slow
def test_the_openai_package_is_a_client(client):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{client.server.url}/v1", api_key="none") as asker:
        assert [model.id for model in asker.models.list()] == ["policy"]
        how = {"model": "policy", "seed": 3, "n": 2}
        said = asker.completions.create(
            prompt="some words", max_tokens=20, logprobs=2, **how
        )
        texts = ["", ""]
        for piece in asker.completions.create(
            prompt="some words", max_tokens=20, stream=True, **how
        ):
            texts[piece.choices[0].index] += piece.choices[0].text
        assert [choice.text for choice in said.choices] == texts
        assert said.usage.completion_tokens == sum(
            len(choice.logprobs.tokens) for choice in said.choices
        )
        talk = {"messages": [{"role": "user", "content": "hello"}], **how}
        chat = asker.chat.completions.create(
            max_completion_tokens=10, logprobs=True, top_logprobs=1, **talk
        )
        contents = ["", ""]
        for piece in asker.chat.completions.create(
            max_completion_tokens=10, stream=True, **talk
        ):
            [choice] = piece.choices
            contents[choice.index] += choice.delta.content
        assert [choice.message.content for choice in chat.choices] == contents
        assert chat.choices[0].logprobs.content[0].top_logprobs
        with pytest.raises(openai.BadRequestError, match="temperature is -1"):
            asker.completions.create(prompt="a", temperature=-1, model="policy")
        with pytest.raises(openai.NotFoundError, match="this server has 'policy'"):
            asker.completions.create(prompt="a", model="another")
