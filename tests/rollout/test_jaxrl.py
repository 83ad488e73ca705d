"""The engine `jaxrl` against real servers of this package."""

import json
import os
import signal
import subprocess
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import short_run

pytest.importorskip("uvicorn", reason="needs the extra serve")
pytest.importorskip("starlette", reason="needs the extra serve")
from served_on_loopback import LIMITS, serving

from jaxrl_llm import models
from jaxrl_llm.rewards import RewardFunction
from jaxrl_llm.rollout.engine import Request, Sampling, generate
from jaxrl_llm.rollout.native.engine import JaxEngine
from jaxrl_llm.rollout.servers.jaxrl import JaxrlEngine, JaxrlServer, JaxrlSettings
from jaxrl_llm.rollout.servers.server import ServerError
from jaxrl_llm.sharding import mesh
from jaxrl_llm.training import loop
from jaxrl_llm.training.build import build

PROMPTS = [(40, 41, 42), (50, 51, 52, 53), (60,)]
KINDS = [
    {},
    {"temperature": 0.0, "logprobs": 2},
    {"temperature": 0.8, "top_k": 30, "top_p": 0.95, "prompt_logprobs": True},
]


def made(loaded, directory, lora=None, **settings):
    """An engine of servers, with few rows so that little is compiled."""
    return JaxrlEngine(
        loaded.arch,
        loaded.tokenizer,
        PROMPTS,
        JaxrlSettings(**settings),
        directory=directory,
        dtype="float32",
        max_model_len=LIMITS["max_model_len"],
        max_num_seqs=LIMITS["max_num_seqs"],
        lora=lora,
    )


@pytest.fixture(scope="module")
def loaded(tiny_model):
    return models.load(tiny_model)


@pytest.fixture(scope="module")
def ours(loaded):
    engine = JaxEngine(
        loaded.arch,
        loaded.tokenizer,
        mesh=mesh.make({"data": 1, "tensor": 1}, jax.devices()[:1]),
        dtype=jnp.float32,
        **LIMITS,
    )
    engine.load(loaded.params, 0)
    return engine


def asked():
    return [
        Request(
            prompt_id=3 * kind + i,
            tokens=tokens,
            num_samples=3,
            seed=9,
            sampling=Sampling(max_tokens=12, **how),
            first_sample=i,
            turn=i,
        )
        for kind, how in enumerate(KINDS)
        for i, tokens in enumerate(PROMPTS)
    ]


def same(theirs, mine):
    """Whether two engines gave the same completions, field by field."""
    for got, wanted in zip(sum(theirs, []), sum(mine, []), strict=True):
        for name in ("prompt_id", "sample", "text", "finish_reason"):
            assert getattr(got, name) == getattr(wanted, name)
        assert got.tokens.tolist() == wanted.tokens.tolist()
        for name in (
            *("logprobs", "raw_logprobs", "full_logprobs", "prompt_logprobs"),
            "top_logprobs",
        ):
            one, other = getattr(got, name), getattr(wanted, name)
            assert (one is None) == (other is None), name
            if other is not None:
                np.testing.assert_allclose(one, other, atol=1e-5)
    return True


@pytest.mark.slow
def test_completions_are_those_of_the_engine_in_this_process(
    tiny_model, loaded, ours, tmp_path, monkeypatch
):
    with serving(tiny_model) as client:
        url = client.server.url
        with closing(made(loaded, tmp_path, urls=[url])) as engine:
            found = engine.load(loaded.params, 4)
            assert found["rollout/probe_diff_max"] < 1e-4
            theirs = generate(engine, asked())
            assert same(theirs, generate(ours, asked()))
            assert {c.weight_version for group in theirs for c in group} == {4}
            told = client.get("/server_info").json()
            assert (told["weight_version"], told["is_paused"]) == (4, False)

            other = jax.tree.map(lambda x: x * 1.02, loaded.params)
            found = engine.load(other, 5)
            assert found["rollout/probe_followed"] == pytest.approx(1, abs=1e-3)
            ours.load(other, 5)
            assert same(generate(engine, asked()), generate(ours, asked()))
            ours.load(loaded.params, 0)

            async def nothing(self, directory):
                pass

            with monkeypatch.context() as patch:
                patch.setattr(JaxrlServer, "read_weights", nothing)
                with pytest.raises(ServerError, match=r"made -?0\.0\d of the trainer"):
                    engine.load(jax.tree.map(lambda x: x * 1.017, loaded.params), 6)
        with pytest.raises(ServerError, match="--max-model-len 128") as caught:
            with serving(tiny_model, max_model_len=64) as short:
                made(loaded, tmp_path, urls=[short.server.url])
        assert "takes 64 tokens" in str(caught.value)
    with pytest.raises(ServerError, match="no jaxrl serve server answers at"):
        made(loaded, tmp_path, urls=[url])
    with pytest.raises(ValueError, match="sent no adapters alone; set rollout.lora"):
        made(loaded, tmp_path, lora=models.Lora(rank=2))


def group_of(replica):
    found = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(replica.process._guard.pid)],
        capture_output=True,
        text=True,
    )
    return int(found.stdout)


@pytest.mark.slow
def test_servers_of_ours_that_are_killed_or_hang_lose_nothing(loaded, ours, tmp_path):
    settings = {"request_timeout_s": 60.0, "devices": ["0", "1"]}
    with closing(made(loaded, tmp_path, **settings)) as engine:
        engine.load(loaded.params, 0)
        wanted = generate(ours, asked())
        for number in (signal.SIGKILL, signal.SIGSTOP):
            engine._replicas.lost = 0
            replica = engine._replicas[0]
            starts = replica.starts
            engine.submit(asked())
            found = {}
            os.killpg(group_of(replica), number)
            for completion in engine.completions():
                place = completion.prompt_id, completion.sample
                assert place not in found
                found[place] = completion
            assert replica.starts == starts + 1
            theirs = [[found[r.prompt_id, s] for s in r.samples] for r in asked()]
            assert same(theirs, wanted)


def mean_id(completion_ids, **_):
    return [float(np.mean(ids)) / 264 for ids in completion_ids]


@pytest.mark.slow
def test_five_steps_train_as_with_the_engine_in_this_process(tiny_model, tmp_path):
    def run(engine):
        directory = tmp_path / engine
        how = {"rollout.engine": engine, "trainer.total_training_steps": 5}
        config = short_run.make_config(
            tiny_model, directory, **short_run.GRPO | how | {"rollout.n": 4}
        )
        loop.run(build(config, [RewardFunction(name="high", function=mean_id)]))
        kept = directory / "run"
        rollouts = [
            json.loads(line)
            for path in sorted((kept / "rollouts").glob("*.jsonl"))
            for line in path.read_text().splitlines()
        ]
        lines = (kept / "metrics.jsonl").read_text().splitlines()
        return rollouts, [json.loads(line) for line in lines]

    (mine, steps), (theirs, others) = run("jax"), run("jaxrl")
    texts = [[row["completion"] for row in rows] for rows in (mine, theirs)]
    assert len(texts[0]) >= 5 * 8 * 4 and texts[0] == texts[1]
    learned = [n for n in steps[-1] if n.startswith(("actor/", "critic/", "mismatch/"))]
    assert len(learned) > 10
    assert all(step["rollout/probe_diff_max"] < 1e-4 for step in others)
    for one, other in zip(steps[-5:], others[-5:], strict=True):
        for name in learned:
            np.testing.assert_allclose(other[name], one[name], atol=1e-4, rtol=1e-3)
