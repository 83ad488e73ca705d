"""The engine `vllm` against real servers, on the CPU, with a real model."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import httpx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import waiting
import yaml
from letters import Letters
from vllm_on_cpu import MODEL, PYTHON, make, processes

from jaxrl_llm import models
from jaxrl_llm.agents import tools
from jaxrl_llm.agents.hosting import Hosted, Settings
from jaxrl_llm.agents.loop import Limits, play
from jaxrl_llm.agents.template import Splicer
from jaxrl_llm.config import parsing
from jaxrl_llm.data import prompts
from jaxrl_llm.data.chat_template import Encoder
from jaxrl_llm.data.types import Prompt
from jaxrl_llm.rollout.engine import Request, Sampling, generate
from jaxrl_llm.rollout.native.engine import JaxEngine
from jaxrl_llm.rollout.servers.server import Server, ServerError
from jaxrl_llm.sharding import mesh

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.vllm
QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about rain.",
    "What is 17 + 25?",
    "Name three primary colours.",
    "Explain gravity to a child.",
    "Translate 'good morning' to Spanish.",
    "Who wrote Romeo and Juliet?",
    "List five fruits.",
    "What is the boiling point of water?",
    "Write a Python function that adds two numbers.",
    "Tell me a short story about a fox.",
    "Is the earth round?",
    "What does DNA stand for?",
    "Give me a recipe for pancakes.",
    "How many days are in a leap year?",
    "What is 9 times 8?",
    "Why is the sky blue?",
    "Suggest a name for a cat. 🐱",
    "Summarise: The quick brown fox jumps over the lazy dog.",
    "Reverse the word 'stressed'.",
]


@pytest.fixture(scope="module")
def model():
    """The weights as they travel, rounded to bfloat16, in float32."""
    loaded = models.load(MODEL)
    rounded = jax.tree.map(
        lambda x: jnp.asarray(x).astype(jnp.bfloat16).astype(jnp.float32), loaded.params
    )
    asked = [
        prompts.tokenize([{"role": "user", "content": text}], loaded.tokenizer)
        for text in QUESTIONS
    ]
    return loaded, rounded, [tuple(tokens) for tokens in asked]


@pytest.fixture(scope="module")
def engine(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    with closing(make(model, directory, request_timeout_s=40.0)) as made:
        made.load(model[1], 0)
        yield made


@pytest.fixture(scope="module")
def ours(model):
    loaded, rounded, _ = model
    made = JaxEngine(
        loaded.arch,
        loaded.tokenizer,
        mesh=mesh.make({"data": 1, "tensor": 1}, jax.devices()[:1]),
        dtype=jnp.float32,
        max_model_len=512,
        max_num_seqs=64,
        decode_chunk=16,
    )
    made.load(rounded, 0)
    return made


def ask(asked, num_samples=1, **sampling):
    sampling = {"max_tokens": 32, "temperature": 0.0} | sampling
    return [
        Request(
            prompt_id=i,
            tokens=tokens,
            num_samples=num_samples,
            seed=7,
            sampling=Sampling(**sampling),
        )
        for i, tokens in enumerate(asked)
    ]


def changed(params, size):
    """Other weights: every matrix with some noise."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    return jax.tree.unflatten(
        tree,
        [
            (x * (1 + size * jax.random.normal(key, x.shape)))
            .astype(jnp.bfloat16)
            .astype(jnp.float32)
            for x, key in zip(leaves, keys, strict=True)
        ],
    )


def test_greedy_responses_are_those_of_the_jax_engine(engine, ours, model):
    theirs = generate(engine, ask(model[2]))
    mine = generate(ours, ask(model[2]))
    ties = 0
    for (got,), (wanted,) in zip(theirs, mine, strict=True):
        same = min(len(got.tokens), len(wanted.tokens))
        differ = np.flatnonzero(got.tokens[:same] != wanted.tokens[:same])
        until = differ[0] if len(differ) else same
        ties += len(differ) > 0
        np.testing.assert_allclose(
            got.raw_logprobs[:until], wanted.raw_logprobs[:until], atol=2e-3
        )
        if not len(differ):
            assert (got.text, got.finish_reason) == (wanted.text, wanted.finish_reason)
            assert not got.logprobs.any()  # greedy: the choice was certain
    print(f"{ties} of {len(mine)} responses part at a tie")
    assert ties <= 1


def test_responses_end_as_those_of_the_jax_engine(engine, ours, model):
    ends = {"stop": (" is", ","), "stop_token_ids": (30,), "max_tokens": 6}
    theirs = generate(engine, ask(model[2], **ends))
    mine = generate(ours, ask(model[2], **ends))
    for (got,), (wanted,) in zip(theirs, mine, strict=True):
        assert got.tokens.tolist() == wanted.tokens.tolist()
        assert (got.text, got.finish_reason) == (wanted.text, wanted.finish_reason)
    assert {c.finish_reason for (c,) in mine} == {"stop", "length"}


def test_sampled_logprobs_are_those_of_the_distribution_drawn_from(engine, model):
    how = {"temperature": 0.7, "top_k": 20, "max_tokens": 16}
    groups = generate(engine, ask(model[2][:4], num_samples=4, **how))
    assert len({tuple(c.tokens) for c in groups[0]}) > 1
    again = generate(engine, ask(model[2][:4], num_samples=4, **how))
    loaded, rounded, asked = model
    for tokens, group, repeated in zip(asked[:4], groups, again, strict=True):
        assert [c.tokens.tolist() for c in group] == [
            c.tokens.tolist() for c in repeated
        ]
        for completion in group:
            assert completion.raw_logprobs is None  # the server told only one of two
            assert np.isnan(completion.full_logprobs).all()
            row = jnp.asarray([[*tokens, *completion.tokens]])
            places = jnp.arange(row.shape[1])[None]
            hidden = models.forward(
                loaded.arch,
                rounded,
                row,
                places,
                jnp.zeros_like(row),
                dtype=jnp.float32,
            )
            logits = models.logits(loaded.arch, rounded, hidden)[0, len(tokens) - 1 :]
            kept = jnp.sort(logits, axis=-1)[:, -20][:, None]
            cut = jnp.where(logits >= kept, logits / 0.7, -jnp.inf)[:-1]
            wanted = jax.nn.log_softmax(cut)[
                jnp.arange(len(completion.tokens)), completion.tokens
            ]
            np.testing.assert_allclose(completion.logprobs, wanted, atol=5e-3)


def test_every_turn_of_an_episode_reads_what_was_before_it(engine, model, monkeypatch):
    loaded, rounded, _ = model
    asked, completions = [], engine.completions

    def spied(more):
        def noted(idle):
            found = more(idle)
            asked.extend(found)
            return found

        return completions(noted)

    monkeypatch.setattr(engine, "completions", spied)
    hosted = Hosted(
        Settings(environment=Letters, isolation="thread"), tools.FORMATS["bracket"]
    )
    splicer = Splicer(Encoder(tokenizer=loaded.tokenizer))
    content = [{"role": "user", "content": "Say a word."}]
    questions = [
        Prompt(id=i, content=content, tokens=(1,), columns={}) for i in range(4)
    ]
    # The commonest tokens end a turn, so that there are several.
    how = {"temperature": 1.0, "max_tokens": 12, "stop_token_ids": (*range(28, 1000),)}
    requests = ask([(1,)] * 4, num_samples=3, **how)
    limits = Limits(max_turns=3, max_tokens=70, max_prompt_length=58)
    groups = play(engine, hosted, splicer, questions, requests, limits)
    hosted.shutdown()
    by_turn = {(r.prompt_id, r.first_sample, r.turn): r.tokens for r in asked}
    assert len(by_turn) == len(asked)
    several = 0
    for episode in sum(groups, []):
        before, turn = [*episode.opening_tokens], 0
        row = jnp.asarray([[*before, *episode.tokens]])
        places = jnp.arange(row.shape[1])[None]
        how = {"dtype": jnp.float32}
        hidden = models.forward(
            loaded.arch, rounded, row, places, jnp.zeros_like(row), **how
        )
        of_next = jax.nn.log_softmax(models.logits(loaded.arch, rounded, hidden)[0])
        for said in episode.turns:
            if said.finish_reason is not None:
                seen = by_turn[episode.prompt_id, episode.sample, turn]
                assert list(seen) == before
                at = np.arange(len(said.tokens)) + len(before) - 1
                np.testing.assert_allclose(
                    said.logprobs, of_next[at, said.tokens], atol=5e-3
                )
                turn += 1
            before += said.tokens.tolist()
        several += turn > 1
    assert several > 6


def test_the_most_likely_tokens_are_those_of_the_jax_engine(engine, ours, model):
    asked = ask(model[2][:4], logprobs=3, prompt_logprobs=True, max_tokens=8)
    for (got,), (wanted,) in zip(
        generate(engine, asked), generate(ours, asked), strict=True
    ):
        np.testing.assert_allclose(
            got.prompt_logprobs, wanted.prompt_logprobs, atol=2e-2
        )
        # Two about as likely may change places, so by token.
        for i in range(8):
            mine, theirs = (
                dict(zip(c.top_tokens[i].tolist(), c.top_logprobs[i], strict=True))
                for c in (wanted, got)
            )
            both = mine.keys() & theirs.keys()
            assert len(both) >= 2
            for token in both:
                assert abs(mine[token] - theirs[token]) < 2e-3


def test_new_weights_answer_and_their_version_is_told(engine, ours, model):
    other = changed(model[1], 0.02)
    found = engine.load(other, 5)
    assert found["rollout/probe_diff_mean"] < 1e-3
    assert found["rollout/probe_followed"] == pytest.approx(1.0, abs=0.02)
    ours.load(other, 5)
    theirs = generate(engine, ask(model[2][:8], max_tokens=8))
    mine = generate(ours, ask(model[2][:8], max_tokens=8))
    same = [
        got.tokens.tolist() == wanted.tokens.tolist()
        for (got,), (wanted,) in zip(theirs, mine, strict=True)
    ]
    assert sum(same) >= 7
    assert {c.weight_version for (c,) in theirs} == {5}
    ours.load(model[1], 0)
    assert engine.load(model[1], 6)["rollout/probe_diff_mean"] < 1e-3


def skipped(engine, model, monkeypatch):
    async def nothing(self, directory):
        pass

    monkeypatch.setattr(Server, "reload", nothing)


def partial(engine, model, monkeypatch):
    old = model[1]

    def save(directory, arch, params, tokenizer, saved=models.save, **how):
        half = arch.num_layers // 2
        layers = jax.tree.map(
            lambda new, before: jnp.concatenate(
                [new[:half], before[half:].astype(new.dtype)]
            ),
            params["layers"],
            old["layers"],
        )
        saved(directory, arch, params | {"layers": layers}, tokenizer, **how)

    monkeypatch.setattr(models, "save", save)


def wrong(engine, model, monkeypatch):
    def save(directory, arch, params, tokenizer, saved=models.save, **how):
        layers = jax.tree.map(lambda x: x[::-1], params["layers"])
        saved(directory, arch, params | {"layers": layers}, tokenizer, **how)

    monkeypatch.setattr(models, "save", save)


@pytest.mark.parametrize(
    "fault, size, message",
    [
        # The change is a third of what the threshold allows (0.036 nats): only the
        # direction of what the server did tells.
        (skipped, 2e-3, r"made 0\.00 of the trainer's change"),
        (partial, 2e-3, r"made 0\.\d\d of the trainer's change"),
        (wrong, 0.0, r"they differ by \d+\.\d+, rollout\.vllm\.max_probe_diff is 0\.1"),
    ],
)
def test_weights_that_did_not_arrive_stop_the_run(
    engine, model, monkeypatch, fault, size, message
):
    with monkeypatch.context() as patch:
        fault(engine, model, patch)
        with pytest.raises(ServerError, match=message) as caught:
            engine.load(changed(model[1], size), 7)
    print(caught.value)
    assert "on average, the trainer's -" in str(caught.value)
    assert engine.load(model[1], 8)["rollout/probe_diff_mean"] < 1e-3


def test_adapters_are_sent_alone_and_answer_by_their_version(
    model, tmp_path, monkeypatch
):
    loaded, rounded, asked = model
    few = loaded, rounded, asked[:4]  # adapters are slow on a CPU
    lora = models.Lora(rank=4, alpha=16.0)
    leaves, tree = jax.tree.flatten(models.abstract_adapters(loaded.arch, lora))

    def policy(number, size):
        keys = jax.random.split(jax.random.key(number), len(leaves))
        drawn = [
            (size * jax.random.normal(key, leaf.shape)).astype(jnp.bfloat16)
            for key, leaf in zip(keys, leaves, strict=True)
        ]
        adapters = [x.astype(jnp.float32) for x in drawn]
        return models.merge(jax.tree.unflatten(tree, adapters), rounded)

    async def nothing(self, name, directory):
        pass

    slowly = {"request_timeout_s": 300.0}
    with closing(make(few, tmp_path, lora=lora, **slowly)) as engine:
        found = engine.load(policy(0, 0.0), 0)
        assert found["rollout/probe_diff_mean"] < 1e-3
        assert found["rollout/adapters_mib"] < 10
        for step, size in ((5, 0.03), (6, 0.04)):
            found = engine.load(policy(step, size), step)
            print(found)
            assert found["rollout/probe_diff_mean"] < 1e-3
            assert found["rollout/probe_followed"] == pytest.approx(1.0, abs=0.02)
        url = engine._replicas[0].server.url
        listed = [one["id"] for one in httpx.get(f"{url}/v1/models").json()["data"]]
        assert listed == ["policy", "policy-v6"]
        groups = generate(engine, ask(asked[:4], max_tokens=8))
        assert {c.weight_version for (c,) in groups} == {6}
        os.killpg(processes(engine), signal.SIGKILL)
        again = generate(engine, ask(asked[:4], max_tokens=8))
        assert [c.tokens.tolist() for (c,) in again] == [
            c.tokens.tolist() for (c,) in groups
        ]
        with monkeypatch.context() as patch:
            patch.setattr(Server, "adapt", nothing)
            with pytest.raises(
                ServerError, match="does not hold the weights of step 7"
            ):
                engine.load(policy(7, 0.041), 7)
        url = engine._replicas[0].server.url
        with pytest.raises(ServerError, match="rank 8 at most, but actor.lora.rank is"):
            make(few, tmp_path / "other", lora=models.Lora(rank=16), urls=[url])
        there = {"lora": lora, "urls": [url], **slowly}
        with closing(make(few, tmp_path / "attached", **there)) as attached:
            attached.load(policy(8, 0.03), 0)
            assert len(generate(attached, ask(asked[:2], max_tokens=4))) == 2


def alive(group):
    found = subprocess.run(["ps", "-eo", "pgid=,stat="], capture_output=True, text=True)
    rows = [line.split() for line in found.stdout.splitlines()]
    return any(int(pgid) == group and stat[0] != "Z" for pgid, stat in rows)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_server_that_dies_or_hangs_mid_rollout_loses_nothing(engine, model, number):
    how = {"num_samples": 3, "temperature": 1.0}
    wanted = generate(engine, ask(model[2], **how))
    group, starts = processes(engine), engine._replicas[0].starts
    engine.load(model[1], 9)
    engine.submit(ask(model[2], **how))
    found = []
    for completion in engine.completions():
        if not found:
            os.killpg(group, number)
        found.append(completion)
    assert engine._replicas[0].starts == starts + 1
    assert not alive(group)
    places = [(c.prompt_id, c.sample) for c in found]
    assert sorted(places) == [(p, g) for p in range(len(QUESTIONS)) for g in range(3)]
    assert {c.weight_version for c in found} == {9}
    same = [
        c.tokens.tolist() == wanted[c.prompt_id][c.sample].tokens.tolist()
        for c in found
    ]
    print(f"{np.mean(same):.2f} of the responses are those without the accident")
    assert np.mean(same) > 0.9


def test_a_paused_server_is_waited_for(engine, model):
    url = engine._replicas[0].server.url
    httpx.post(f"{url}/pause?mode=wait").raise_for_status()
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(generate, engine, ask(model[2][:4], max_tokens=4))
        time.sleep(3)
        assert not asked.done()
        httpx.post(f"{url}/resume").raise_for_status()
        assert len(asked.result()) == 4


def test_a_running_server_is_attached_to(engine, model, tmp_path):
    url = engine._replicas[0].server.url
    with closing(make(model, tmp_path, urls=[url, url])) as attached:
        attached.load(model[1], 3)
        groups = generate(attached, ask(model[2], max_tokens=4))
        assert {c.weight_version for (c,) in groups} == {3}
    assert httpx.get(f"{url}/health").is_success  # it is not ours to end
    assert engine.load(model[1], 10)["rollout/probe_diff_mean"] < 1e-3


def test_a_running_server_must_take_the_longest_sequence(engine, model, tmp_path):
    url = engine._replicas[0].server.url
    with pytest.raises(ServerError, match="takes 128 tokens.*--max-model-len 532"):
        make(model, tmp_path, max_model_len=532, urls=[url])


def test_weights_that_a_server_cannot_read_are_an_error(engine, model, monkeypatch):
    def save(directory, *_, **__):
        directory.mkdir(parents=True)

    with monkeypatch.context() as patch:
        patch.setattr(models, "save", save)
        with pytest.raises(ServerError, match="weights_dir must be a folder that"):
            engine.load(model[1], 11)


def test_two_servers_share_the_work(model, tmp_path):
    with closing(make(model, tmp_path, devices=["0", "1"])) as engine:
        engine.load(model[1], 0)
        groups = generate(engine, ask(model[2], num_samples=2, temperature=1.0))
        assert [len(group) for group in groups] == [2] * len(QUESTIONS)
        for replica in engine._replicas:
            said = httpx.get(f"{replica.server.url}/metrics").text
            (line,) = [
                x for x in said.splitlines() if x.startswith("vllm:generation_tokens_t")
            ]
            assert float(line.split()[-1]) > 100
    assert "127.0.0.1" in (tmp_path / "vllm-1.log").read_text()


@pytest.mark.parametrize(
    "vllm, message",
    [
        ({"command": ["no-such-program"]}, "there is no program 'no-such-program'"),
        (
            {"command": [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]},
            "starts a Python without vLLM",
        ),
        ({"args": ["--no-such-flag"]}, "does not know one of rollout.vllm.args"),
        ({"args": ["--model", "/nowhere"]}, "ended while it was starting"),
        ({"env": {"VLLM_CPU_KVCACHE_SPACE": "500"}}, "the host has no room; lower"),
        ({"port": "taken"}, "its port is taken; set another rollout.vllm.port"),
        ({"start_timeout_s": 2.0}, "is not up after rollout.vllm.start_timeout_s"),
        ({"urls": ["http://127.0.0.1:9"]}, "no vLLM server answers at http://127.0.0"),
    ],
)
def test_a_server_that_cannot_work_is_one_clear_error(model, tmp_path, vllm, message):
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(ServerError, match=message) as caught,
    ):
        if "port" in vllm:
            vllm = {"port": taken.getsockname()[1]}
        with closing(make(model, tmp_path, **vllm)) as engine:
            engine.load(model[1], 0)
    print(str(caught.value)[:300])
    if "port" in vllm or "args" in vllm:
        assert f"The end of {tmp_path}/vllm-0.log:" in str(caught.value)


def test_nothing_outlives_a_trainer_that_is_killed(tmp_path):
    program = f"""
        import sys, pathlib
        sys.path[:0] = {[str(ROOT), str(ROOT / "tests" / "support")]!r}
        import vllm_on_cpu
        from jaxrl_llm import models
        loaded = models.load(vllm_on_cpu.MODEL)
        model = loaded, loaded.params, [(1, 2, 3)] * 4
        engine = vllm_on_cpu.make(model, pathlib.Path({str(tmp_path)!r}))
        engine.load(loaded.params, 0)
        print("up", vllm_on_cpu.processes(engine), engine._weights, flush=True)
        import time; time.sleep(600)
    """
    trainer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    timer = threading.Timer(300, trainer.kill)
    timer.start()
    lines = (line for line in trainer.stdout if line.startswith("up"))
    _, group, weights = next(lines).split()
    group, weights = int(group), pathlib.Path(weights)
    timer.cancel()
    assert alive(group) and weights.exists()
    trainer.kill()
    trainer.communicate()
    waiting.until(lambda: not alive(group) and not weights.exists())


def test_five_steps_learn_as_with_the_jax_engine(tmp_path):
    vllm = parsing.load(
        ROOT / "configs/quickstart_smollm2_vllm_cpu.yaml",
        [f"--rollout.vllm.command.0={PYTHON}"],
    ).model_dump(mode="json")
    rollout = {k: v for k, v in vllm["rollout"].items() if k != "vllm"}
    jax_engine = vllm | {"rollout": rollout | {"engine": "jax"}}
    steps = {
        "vllm": launched(vllm, tmp_path / "vllm"),
        "jax": launched(jax_engine, tmp_path / "jax"),
    }
    assert all(step["rollout/probe_diff_mean"] < 0.02 for step in steps["vllm"])
    assert all(step["rollout/probe_followed"] > 0.9 for step in steps["vllm"][1:])
    name = "val-core/all/acc/mean@4"
    gains = {which: all[-1][name] - all[0][name] for which, all in steps.items()}
    print(gains)
    assert min(gains.values()) > 0.2
    assert abs(gains["vllm"] - gains["jax"]) < 0.25


def launched(values: dict, directory: pathlib.Path) -> list[dict[str, float]]:
    """The metrics of a run by the launcher, step by step."""
    path = directory.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(values | {"output_dir": str(directory)}))
    # Compiled as users do, not as for tests.
    mine = ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS")
    env = {name: value for name, value in os.environ.items() if name not in mine}
    command = [sys.executable, "-m", "jaxrl_llm", "train", str(path)]
    subprocess.run(command, env=env, check=True)
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
