"""The engine `sglang` against real servers, on the CPU."""

import os
import signal
import subprocess
import sys
from contextlib import closing

import httpx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sglang_on_cpu import ARGS, ENVIRONMENT, make

from jaxrl_llm import models
from jaxrl_llm.rollout.engine import Request, Sampling, generate
from jaxrl_llm.rollout.native.engine import JaxEngine
from jaxrl_llm.rollout.servers.server import ServerError
from jaxrl_llm.rollout.servers.sglang import SglangServer
from jaxrl_llm.sharding import mesh

pytestmark = pytest.mark.sglang
PROMPTS = [tuple(range(40 + i, 45 + 2 * i)) for i in range(8)]


@pytest.fixture(scope="module")
def loaded(tiny_model):
    """The weights as they travel, rounded to bfloat16, in float32."""
    found = models.load(tiny_model)
    return found._replace(params=rounded(found.params))


def rounded(params):
    return jax.tree.map(
        lambda x: jnp.asarray(x).astype(jnp.bfloat16).astype(jnp.float32), params
    )


@pytest.fixture(scope="module")
def engine(loaded, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    with closing(make(loaded, PROMPTS, directory, request_timeout_s=40.0)) as made:
        made.load(loaded.params, 0)
        yield made


@pytest.fixture(scope="module")
def ours(loaded):
    made = JaxEngine(
        loaded.arch,
        loaded.tokenizer,
        mesh=mesh.make({"data": 1, "tensor": 1}, jax.devices()[:1]),
        dtype=jnp.float32,
        max_model_len=128,
        max_num_seqs=8,
        decode_chunk=8,
    )
    made.load(loaded.params, 0)
    return made


def ask(num_samples=1, **sampling):
    sampling = {"max_tokens": 24, "temperature": 0.0} | sampling
    return [
        Request(
            prompt_id=i,
            tokens=tokens,
            num_samples=num_samples,
            seed=7,
            sampling=Sampling(**sampling),
        )
        for i, tokens in enumerate(PROMPTS)
    ]


def changed(params, size):
    """Other weights: every matrix with some noise."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    noisy = [
        x * (1 + size * jax.random.normal(key, x.shape))
        for x, key in zip(leaves, keys, strict=True)
    ]
    return rounded(jax.tree.unflatten(tree, noisy))


def test_greedy_responses_are_those_of_the_jax_engine(engine, ours):
    ties = 0
    for (got,), (wanted,) in zip(
        generate(engine, ask()), generate(ours, ask()), strict=True
    ):
        same = min(len(got.tokens), len(wanted.tokens))
        differ = np.flatnonzero(got.tokens[:same] != wanted.tokens[:same])
        until = differ[0] if len(differ) else same
        ties += len(differ) > 0
        np.testing.assert_allclose(
            got.raw_logprobs[:until], wanted.raw_logprobs[:until], atol=1e-3
        )
        if not len(differ):
            assert (got.text, got.finish_reason) == (wanted.text, wanted.finish_reason)
            assert not got.logprobs.any()  # greedy: the choice was certain
    assert ties <= 1


def test_responses_end_as_those_of_the_jax_engine(engine, ours):
    free = generate(ours, ask())
    words = {c.text[6:8] for (c,) in free if len(c.text) > 8} - {""}
    tokens = {int(c.tokens[9]) for (c,) in free[:3]}
    ends = {"stop": tuple(sorted(words)[:3]), "stop_token_ids": tuple(tokens)}
    theirs, mine = generate(engine, ask(**ends)), generate(ours, ask(**ends))
    for (got,), (wanted,) in zip(theirs, mine, strict=True):
        assert got.tokens.tolist() == wanted.tokens.tolist()
        assert (got.text, got.finish_reason) == (wanted.text, wanted.finish_reason)
    assert "stop" in {c.finish_reason for (c,) in mine}


def scored(loaded, prompt, completion, temperature):
    """The log-probabilities of its tokens, before anything is cut off."""
    row = jnp.asarray([[*prompt, *completion.tokens]])
    places = jnp.arange(row.shape[1])[None]
    hidden = models.forward(
        loaded.arch,
        loaded.params,
        row,
        places,
        jnp.zeros_like(row),
        dtype=jnp.float32,
    )
    logits = models.logits(loaded.arch, loaded.params, hidden)[0, len(prompt) - 1 : -1]
    told = jax.nn.log_softmax(logits / temperature)
    return told[jnp.arange(len(completion.tokens)), completion.tokens]


def test_sampled_logprobs_are_those_of_the_trainer(engine, loaded):
    warm = {"temperature": 0.7, "max_tokens": 12}
    for how in (warm, warm | {"top_k": 20}):
        groups = generate(engine, ask(num_samples=4, **how))
        assert len({tuple(c.tokens) for c in groups[0]}) > 1
        for prompt, group in zip(PROMPTS, groups, strict=True):
            assert sorted(c.sample for c in group) == [0, 1, 2, 3]
            for one in group:
                wanted = scored(loaded, prompt, one, 0.7)
                if "top_k" in how:
                    assert np.isnan(one.logprobs).all()  # SGLang does not tell
                    np.testing.assert_allclose(one.full_logprobs, wanted, atol=1e-3)
                else:
                    np.testing.assert_allclose(one.logprobs, wanted, atol=1e-3)


def test_the_most_likely_tokens_are_those_of_the_jax_engine(engine, ours):
    asked = ask(logprobs=3, prompt_logprobs=True, max_tokens=8)
    for (got,), (wanted,) in zip(
        generate(engine, asked), generate(ours, asked), strict=True
    ):
        np.testing.assert_allclose(
            got.prompt_logprobs, wanted.prompt_logprobs, atol=1e-3
        )
        same = min(len(got.tokens), len(wanted.tokens))
        np.testing.assert_allclose(
            got.top_logprobs[:same], wanted.top_logprobs[:same], atol=1e-3
        )


def test_new_weights_answer_and_their_version_is_told(engine, ours, loaded):
    other = changed(loaded.params, 0.05)
    found = engine.load(other, 5)
    assert found["rollout/probe_diff_mean"] < 1e-3
    assert found["rollout/probe_followed"] == pytest.approx(1.0, abs=0.02)
    url = engine._replicas[0].server.url
    assert httpx.get(f"{url}/model_info").json()["weight_version"] == "5"
    ours.load(other, 5)
    theirs = generate(engine, ask(max_tokens=8))
    mine = generate(ours, ask(max_tokens=8))
    same = [
        got.tokens.tolist() == wanted.tokens.tolist()
        for (got,), (wanted,) in zip(theirs, mine, strict=True)
    ]
    assert sum(same) >= 7
    assert {c.weight_version for (c,) in theirs} == {5}
    ours.load(loaded.params, 0)
    assert engine.load(loaded.params, 6)["rollout/probe_diff_mean"] < 1e-3


def skipped(loaded, patch):
    async def nothing(self, directory):
        pass

    patch.setattr(SglangServer, "read_weights", nothing)


def partial(loaded, patch):
    old = loaded.params

    def save(directory, arch, params, tokenizer, saved=models.save, **how):
        layers = jax.tree.map(
            lambda new, before: before.astype(new.dtype),
            params["layers"],
            old["layers"],
        )
        saved(directory, arch, params | {"layers": layers}, tokenizer, **how)

    patch.setattr(models, "save", save)


def wrong(loaded, patch):
    def save(directory, arch, params, tokenizer, saved=models.save, **how):
        layers = jax.tree.map(lambda x: x[::-1] * 3, params["layers"])
        saved(directory, arch, params | {"layers": layers}, tokenizer, **how)

    patch.setattr(models, "save", save)


@pytest.mark.parametrize(
    "fault, size, message",
    [
        (skipped, 0.02, r"made -?0\.0\d of the trainer's change"),
        (partial, 0.02, r"made 0\.\d\d of the trainer's change"),
        (wrong, 0.0, r"they differ by \d+\.\d+, rollout\.sglang\.max_probe_diff is 0"),
    ],
)
def test_weights_that_did_not_arrive_stop_the_run(
    engine, loaded, monkeypatch, fault, size, message
):
    with monkeypatch.context() as patch:
        fault(loaded, patch)
        with pytest.raises(ServerError, match=message) as caught:
            engine.load(changed(loaded.params, size), 7)
    print(caught.value)
    assert engine.load(loaded.params, 8)["rollout/probe_diff_mean"] < 1e-3


def alive(group):
    found = subprocess.run(["ps", "-eo", "pgid=,stat="], capture_output=True, text=True)
    rows = [line.split() for line in found.stdout.splitlines()]
    return any(int(pgid) == group and stat[0] != "Z" for pgid, stat in rows)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_server_that_dies_or_hangs_mid_rollout_loses_nothing(engine, loaded, number):
    replica = engine._replicas[0]
    found = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(replica.process._guard.pid)],
        capture_output=True,
        text=True,
    )
    group, starts = int(found.stdout), replica.starts
    engine.load(loaded.params, 9)
    wanted = generate(engine, ask())
    engine.submit(ask(num_samples=3))
    completions = []
    for completion in engine.completions():
        if not completions:
            os.killpg(group, number)
        completions.append(completion)
    assert replica.starts == starts + 1
    assert not alive(group)
    places = sorted((c.prompt_id, c.sample) for c in completions)
    assert places == [(p, g) for p in range(len(PROMPTS)) for g in range(3)]
    same = [
        c.tokens.tolist() == wanted[c.prompt_id][0].tokens.tolist() for c in completions
    ]
    assert np.mean(same) > 0.9


def test_a_running_server_is_attached_to(engine, loaded, tmp_path):
    url = engine._replicas[0].server.url
    with closing(make(loaded, PROMPTS, tmp_path, urls=[url])) as attached:
        attached.load(loaded.params, 3)
        assert {c.weight_version for (c,) in generate(attached, ask())} == {3}
    with pytest.raises(ValueError, match="draws from a state of its own: reproducib"):
        make(loaded, PROMPTS, tmp_path, urls=[url], reproducible=True)
    assert httpx.get(f"{url}/health").is_success  # it is not ours to end
    with pytest.raises(ServerError, match="takes 128 tokens.*--context-length"):
        make(loaded, PROMPTS, tmp_path, max_model_len=200, urls=[url])
    assert engine.load(loaded.params, 10)["rollout/probe_diff_mean"] < 1e-3


@pytest.mark.parametrize(
    "sglang, message",
    [
        ({"command": ["no-such-program"]}, "rollout.sglang.command: there is no prog"),
        (
            {"command": [sys.executable, "-m", "sglang.launch_server"]},
            "starts a Python without SGLang",
        ),
        ({"args": [*ARGS, "--no-such-flag"]}, "does not know one of rollout.sglang.ar"),
        (
            {"env": ENVIRONMENT | {"LD_LIBRARY_PATH": ""}},
            "its kernels want a CUDA driver",
        ),
        ({"urls": ["http://127.0.0.1:9"]}, "no SGLang server answers at http://127.0"),
    ],
)
def test_a_server_that_cannot_work_is_one_clear_error(
    loaded, tmp_path, sglang, message
):
    with pytest.raises(ServerError, match=message) as caught:
        with closing(make(loaded, PROMPTS, tmp_path, **sglang)) as engine:
            engine.load(loaded.params, 0)
    print(str(caught.value)[:300])
