"""The JAX engine on a small random model, against the whole forward pass."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl_llm import models
from jaxrl_llm.models.attention import paged
from jaxrl_llm.models.attention.packed import packed
from jaxrl_llm.rollout.engine import Request, Sampling, Use, generate
from jaxrl_llm.rollout.native import engine as jax_engine
from jaxrl_llm.rollout.native import programs as decode
from jaxrl_llm.rollout.native import session as running
from jaxrl_llm.rollout.native.engine import JaxEngine
from jaxrl_llm.sharding import compiled_traffic as collectives
from jaxrl_llm.sharding import mesh

TOKENIZER = tiny.tokenizer()
ARCH = tiny.arch(vocab_size=304)
PARAMS = models.init(ARCH, jax.random.key(0))


def engine(params=PARAMS, *, arch=ARCH, axes=None, dtype=jnp.float32, **options):
    axes = axes or {"data": 1, "tensor": 1}
    devices = jax.devices()[: axes["data"] * axes["tensor"]]
    # Eight rows are one compiled program; more are another when some of them end.
    options = {"max_num_seqs": 8, "decode_chunk": 8, "max_model_len": 128} | options
    made = JaxEngine(
        arch, TOKENIZER, mesh=mesh.make(axes, devices), dtype=dtype, **options
    )
    made.load(params, version=0)
    return made


@functools.cache
def plain():
    """An engine for those who do nothing but generate with it."""
    return engine()


@jax.jit
def all_logits(tokens, positions, sequence_ids):
    hidden = models.forward(
        ARCH, PARAMS, tokens, positions, sequence_ids, dtype=jnp.float32
    )
    return models.logits(ARCH, PARAMS, hidden)


def request(prompt_id, *, n=2, length=None, seed=3, **sampling):
    tokens = np.random.default_rng(prompt_id).integers(40, 90, length or prompt_id + 3)
    return Request(
        prompt_id=prompt_id,
        tokens=tuple(tokens.tolist()),
        num_samples=n,
        seed=seed,
        sampling=Sampling(**({"max_tokens": 12} | sampling)),
    )


def logits_of(request, completion):
    """float32 [t, V]: what the forward pass over prompt + response says of each
    response token."""
    tokens = np.concatenate([request.tokens, completion.tokens])
    place = np.arange(128, dtype=np.int32)[None]
    padded = np.zeros((1, 128), np.int32)
    padded[0, : len(tokens)] = tokens
    logits = all_logits(padded, place, np.int32(place >= len(tokens)))
    return np.asarray(logits)[0, len(request.tokens) - 1 : len(tokens) - 1]


def at(completion):
    """The places of its tokens in [t, V]."""
    return np.arange(len(completion.tokens)), completion.tokens


def assert_same(some, others, atol=1e-5):
    for one, other in zip(sum(some, []), sum(others, []), strict=True):
        assert (one.prompt_id, one.sample) == (other.prompt_id, other.sample)
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=atol)
        assert one.text == other.text
        assert one.finish_reason == other.finish_reason


REQUESTS = [request(i) for i in range(5)]


@pytest.mark.slow
def test_weights_come_from_devices_in_another_order():
    # As from a TPU's training mesh, whose axes walk the torus another way.
    turned = mesh.make({"data": 8}, jax.devices()[::-1])
    params = jax.device_put(PARAMS, NamedSharding(turned, P()))
    axes = {"data": 4, "tensor": 2}
    found = engine(params, axes=axes), engine(axes=axes)
    for made in found:
        assert_same(generate(made, REQUESTS), generate(plain(), REQUESTS))


def test_greedy_tokens_are_the_argmax_of_the_forward_pass():
    for asked, [completion] in zip(
        REQUESTS,
        generate(plain(), [request(i, n=1, temperature=0.0) for i in range(5)]),
        strict=True,
    ):
        logits = logits_of(asked, completion)
        np.testing.assert_array_equal(completion.tokens, logits.argmax(-1))
        np.testing.assert_array_equal(completion.logprobs, 0.0)


def test_logprobs_are_those_of_the_forward_pass():
    requests = [request(i, temperature=0.7) for i in range(3)]
    for asked, completions in zip(requests, generate(plain(), requests), strict=True):
        for completion in completions:
            logits = logits_of(asked, completion)
            at = (np.arange(len(completion.tokens)), completion.tokens)
            raw, cooled = jax.nn.log_softmax(logits), jax.nn.log_softmax(logits / 0.7)
            np.testing.assert_allclose(completion.raw_logprobs, raw[at], atol=1e-4)
            np.testing.assert_allclose(completion.logprobs, cooled[at], atol=1e-4)


def test_the_most_likely_tokens_are_told_to_those_who_ask():
    asked = [
        request(0, temperature=0.7, logprobs=3),
        request(1, temperature=0.0, logprobs=2),
        request(2),
    ]
    for one, completions in zip(asked, generate(plain(), asked), strict=True):
        for completion in completions:
            count = one.sampling.logprobs
            if not count:
                assert completion.top_tokens is completion.top_logprobs is None
                continue
            logits = logits_of(one, completion) / (one.sampling.temperature or 1.0)
            ranked = np.argsort(-logits, axis=-1)[:, :count]
            wanted = np.take_along_axis(
                np.asarray(jax.nn.log_softmax(logits)), ranked, axis=-1
            )
            np.testing.assert_array_equal(completion.top_tokens, ranked)
            np.testing.assert_allclose(completion.top_logprobs, wanted, atol=1e-4)


@pytest.mark.slow
def test_a_chunk_ends_when_fewer_rows_would_do(monkeypatch):
    # The first chunk would have taken 16 rows to its end.
    asked = [request(i, n=1, max_tokens=40 if i == 3 else 2) for i in range(16)]
    wanted = generate(plain(), asked)
    resize, counts = decode.resize, []

    def told(rows, count, replicas):
        counts.append(count)
        return resize(rows, count, replicas)

    monkeypatch.setattr(decode, "resize", told)
    assert_same(generate(engine(decode_chunk=32, max_num_seqs=16), asked), wanted)
    assert counts == [8]
    counts.clear()  # where no response is longer than a chunk, one program does it all
    assert_same(generate(engine(decode_chunk=40, max_num_seqs=16), asked), wanted)
    assert counts == []


def sizes(num_rows, **changed):
    known = {"prefill_tokens": 8192, "longest_prompt": 200}
    return running.Sizes(num_rows=num_rows, longest=900, **known | changed)


def test_numbers_of_rows():
    assert sizes(900).row_counts == [
        8, 32, 64, 128, 192, 256, 384, 512, 768, 900,
    ]  # fmt: skip
    assert [sizes(500).fit(n) for n in (0, 9, 129, 257, 400, 999)] == [
        8, 32, 192, 384, 500, 500,
    ]  # fmt: skip
    assert sizes(3).row_counts == [3]


def test_few_shapes_hold_what_is_read():
    made = sizes(500)
    # The longest prompt, rounded up, or all there can be.
    assert {made.prefill_length(n) for n in range(1, 257)} == {256}
    assert {made.prefill_length(n) for n in range(257, 901)} == {1024}
    # 8,192 tokens, a quarter of them, a quarter of that.
    assert made.prefill_counts(256) == [2, 8, 32]
    assert made.prefill_counts(64) == [2, 8, 32, 128]
    assert sizes(500, prefill_tokens=100).prefill_counts(256) == [1]
    assert made.prefill_counts(64, 16) == [32, 128]
    assert made.copies == [16, 128] and sizes(3).copies == [1, 8]
    assert made.continued_lengths(200) == [64, 256]
    assert sizes(500, longest_prompt=20).prefill_length() == 64


def test_rows_are_resized_replica_by_replica():
    rows = decode.no_rows(3, 2)
    slots = np.array([-1, 5, 4, 7, -1, 6], np.int32)
    rows = dataclasses.replace(rows, slots=slots, tokens=10 + slots)
    fewer = decode.resize(rows, 2, 2)
    assert fewer.slots.tolist() == [5, 4, 7, 6]
    assert fewer.tokens.tolist() == [15, 14, 17, 16]
    more = decode.resize(fewer, 3, 2)
    assert more.slots.tolist() == [5, 4, -1, 7, 6, -1]
    assert more.tokens.tolist() == [15, 14, 0, 17, 16, 0]


@pytest.mark.parametrize("replicas", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_prompts_are_scored_for_those_who_ask(replicas):
    asked = [request(0), *(request(i, prompt_logprobs=True) for i in (1, 2))]
    asked.append(dataclasses.replace(asked[1], prompt_id=3))  # from the cache
    made = engine(axes={"data": replicas, "tensor": 1})
    for one, completions in zip(asked, generate(made, asked), strict=True):
        for completion in completions:
            if not one.sampling.prompt_logprobs:
                assert completion.prompt_logprobs is None
                continue
            first = dataclasses.replace(one, tokens=one.tokens[:1])
            rest = dataclasses.replace(completion, tokens=np.array(one.tokens[1:]))
            scores = jax.nn.log_softmax(logits_of(first, rest))
            wanted = scores[np.arange(len(rest.tokens)), rest.tokens]
            np.testing.assert_allclose(completion.prompt_logprobs, wanted, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        # Three rows are those of the last mesh, many those of a chunk that ends early.
        pytest.param({"max_num_seqs": 3}, marks=pytest.mark.slow),
        pytest.param({"max_num_seqs": 64}, marks=pytest.mark.slow),
        # Stop strings ask for the same of chunks of one step.
        pytest.param({"decode_chunk": 1}, marks=pytest.mark.slow),
        {"decode_chunk": 5, "max_num_seqs": 4},
        {"axes": {"data": 2, "tensor": 4}},  # of 2 key/value heads, 4 copies
        # On eight replicas the trainer agrees with the sampler, see test_loop.
        pytest.param({"axes": {"data": 8, "tensor": 1}}, marks=pytest.mark.slow),
        pytest.param(  # rows do not divide
            {"axes": {"data": 1, "tensor": 2}, "max_num_seqs": 3},
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_a_response_does_not_depend_on_batch_chunk_or_mesh(options):
    assert_same(generate(engine(**options), REQUESTS), generate(plain(), REQUESTS))


def test_a_response_does_not_depend_on_order_or_company():
    whole = generate(plain(), REQUESTS)
    assert_same(generate(plain(), REQUESTS[::-1])[::-1], whole)
    assert_same(generate(plain(), REQUESTS[2:3]), whole[2:3])


def test_samples_prompts_and_seeds_differ():
    [[one, two]] = generate(plain(), [REQUESTS[3]])
    assert one.tokens.tolist() != two.tokens.tolist()
    [[other, _]] = generate(plain(), [request(3, seed=4)])
    assert one.tokens.tolist() != other.tokens.tolist()


def test_a_stop_token_ends_the_response_and_belongs_to_it():
    [[free]] = generate(plain(), [request(1, n=1)])
    stop = int(free.tokens[5])
    first = free.tokens.tolist().index(stop)
    [[stopped]] = generate(plain(), [request(1, n=1, stop_token_ids=(stop,))])
    np.testing.assert_array_equal(stopped.tokens, free.tokens[: first + 1])
    assert (stopped.finish_reason, free.finish_reason) == ("stop", "length")
    assert stopped.text == TOKENIZER.decode(free.tokens[:first])


@pytest.mark.parametrize(
    "chunk",
    [
        pytest.param(1, marks=pytest.mark.slow),
        4,
        pytest.param(32, marks=pytest.mark.slow),
    ],
)
def test_a_stop_string_ends_with_the_token_that_completes_it(chunk):
    [[free]] = generate(plain(), [request(1, n=1, max_tokens=20)])
    stop = TOKENIZER.decode(free.tokens[6:8])
    asked = request(1, n=1, max_tokens=20, stop=("never said", stop))
    [[stopped]] = generate(engine(decode_chunk=chunk), [asked])
    end = next(i for i in range(21) if stop in TOKENIZER.decode(free.tokens[:i]))
    np.testing.assert_array_equal(stopped.tokens, free.tokens[:end])
    np.testing.assert_allclose(stopped.logprobs, free.logprobs[:end], atol=1e-5)
    assert stopped.finish_reason == "stop"
    assert stopped.text == free.text[: free.text.index(stop)]


def test_each_request_has_its_own_limits():
    requests = [request(i, max_tokens=m) for i, m in enumerate([1, 7, 20])]
    lengths = [[len(c.tokens) for c in cs] for cs in generate(plain(), requests)]
    assert lengths == [[1, 1], [7, 7], [20, 20]]


def test_completions_carry_the_version_of_their_weights():
    made = engine()
    assert generate(made, REQUESTS[:1])[0][0].weight_version == 0
    other = jax.tree.map(lambda x: 2 * x, PARAMS)
    made.load(other, version=7)
    [[now, _]] = generate(made, REQUESTS[3:4])
    assert now.weight_version == 7
    assert_same([[now]], [[generate(engine(other), REQUESTS[3:4])[0][0]]])


def test_after_the_first_calls_nothing_compiles():
    made = engine(max_num_seqs=4)
    generate(made, [request(i, n=4, length=9 + i) for i in range(3)])
    programs = decode.decode, decode.prefill, decode.copy
    before = [program._cache_size() for program in programs]
    generate(made, [request(i, n=4, length=9 + i) for i in range(6)])
    assert [program._cache_size() for program in programs] == before


@pytest.mark.parametrize(
    "kept", [None, *(pytest.param(x, marks=pytest.mark.slow) for x in ("int8", "fp8"))]
)
def test_responses_preempted_for_want_of_memory_go_on_exactly(kept):
    # A page holds 64 tokens. Six are four sequences of 80, one page of the prompt
    # shared: others wait, and some are preempted after their first page is full.
    asked = [request(i, n=3, length=70, max_tokens=100) for i in range(3)]
    vector = 4 * ARCH.head_dim if kept is None else ARCH.head_dim + 4  # with its scale
    page = 2 * ARCH.num_layers * ARCH.num_kv_heads * 64 * vector / 2**30
    options = {"max_model_len": 192, "kv_cache_dtype": kept}
    tight = engine(cache_gib=7 * page, **options)
    whole = generate(engine(**options), asked)
    tight.submit(asked)
    found, preempted = {}, set()
    for completion in tight.completions():
        found[completion.prompt_id, completion.sample] = completion
        for scheduler in tight._session._schedulers:
            preempted |= {id(r) for r in scheduler.waiting if r.tokens}
    assert preempted
    # Read again, a number may lie on the other side of where two are rounded apart.
    atol = 1e-5 if kept is None else 1e-3
    assert_same([[found[i, n] for n in range(3)] for i in range(3)], whole, atol)


def test_a_long_prompt_is_read_in_pieces():
    asked = [request(i, n=2, length=90 + i, max_tokens=8) for i in range(2)]
    pieces = engine(prefill_tokens=32)
    assert_same(generate(pieces, asked), generate(plain(), asked))


def test_one_sample_can_be_asked_for_and_another_turn_draws_anew():
    both = generate(plain(), [request(4)])[0]
    for sample, wanted in enumerate(both):
        alone = dataclasses.replace(request(4, n=1), first_sample=sample)
        assert_same(generate(plain(), [alone]), [[wanted]])
        later = dataclasses.replace(alone, turn=1)
        [[found]] = generate(plain(), [later])
        assert found.sample == sample
        assert (found.tokens != wanted.tokens).any()
        assert_same(generate(plain(), [later]), [[found]])


@pytest.mark.parametrize(
    "axes", [None, pytest.param({"data": 2, "tensor": 1}, marks=pytest.mark.slow)]
)
def test_turns_that_come_up_meanwhile_are_read_from_where_they_differ(axes):
    made = engine(axes=axes) if axes else plain()
    first = [request(i, n=1, length=95 + i, max_tokens=10) for i in range(2)]
    asked = {r.prompt_id: r for r in first}
    answers, ready, waited = {0: [], 1: []}, [], []

    def more(idle):
        waited.append(idle)
        # Nothing is left to do at first: pages must outlast that.
        return [ready.pop()] if ready and idle else []

    made.submit(first)
    for completion in made.completions(more):
        before = asked[completion.prompt_id]
        answers[completion.prompt_id].append(completion)
        if before.turn < 2:
            tokens = (*before.tokens, *completion.tokens.tolist(), 44)
            asked[before.prompt_id] = dataclasses.replace(
                before, tokens=tokens, turn=before.turn + 1
            )
            ready.append(asked[before.prompt_id])
    assert True in waited and False in waited
    assert made._session is None
    for last, turns in zip(asked.values(), answers.values(), strict=True):
        assert len(turns) == 3
        prefilled = [turn.prefilled for turn in turns]
        assert prefilled[0] == 94 + last.prompt_id
        assert all(n <= 1 + running.PAGE_SIZE for n in prefilled[1:])
        # Reading everything again gives the same.
        assert_same([[turns[-1]]], generate(plain(), [last]))


@pytest.mark.slow
@pytest.mark.parametrize("axes", [None, {"data": 2, "tensor": 1}])
def test_a_session_that_began_with_little_makes_room_for_more(axes, monkeypatch):
    asked = [request(i, n=3, max_tokens=30) for i in range(14)]
    made, rows, chunks = engine(axes=axes, max_num_seqs=64), [], []
    start, advance = made._start, running.Session.advance

    def started(num_responses):
        session = start(num_responses)
        rows.append(made._sizes.num_rows * made.replicas)
        return session

    monkeypatch.setattr(made, "_start", started)
    monkeypatch.setattr(
        running.Session, "advance", lambda self: chunks.append(self) or advance(self)
    )
    later = [asked[1:6], asked[6:]]

    def more(idle):
        # The first has tokens, and others wait, when much more comes.
        return later.pop(0) if later and len(chunks) in (2, 4) else ()

    made.submit(asked[:1])
    found = {(c.prompt_id, c.sample): c for c in made.completions(more)}
    taken = len(chunks)
    groups = [[found[r.prompt_id, s] for s in r.samples] for r in asked]
    assert_same(groups, generate(plain(), asked))
    assert rows[0] <= 16 and rows[-1] >= 42 and len(rows) <= 3
    # Thirty tokens are four chunks of eight, and each is looked at one chunk later.
    assert taken <= 4 + 5 + 5
    assert_same(generate(made, asked), groups)  # it has the room from now on
    assert len(set(rows)) == len(rows) - 1


@pytest.mark.parametrize("between", [0, 20])
def test_rows_are_added_where_short_turns_come_up_one_by_one(between):
    made = engine(max_num_seqs=48)
    use = Use(
        num_prompts=20,
        num_samples=2,
        sampling=Sampling(max_tokens=4),
        continued=between,
    )
    names = made.programs([use], [(1, 2, 3)])
    known = [name for name in names if name.startswith("decode")]
    assert known == [f"decode {n} rows" for n in ((48, 32, 8) if between else (48,))]
    made.submit([request(0, n=1, max_tokens=4)])
    session = made._start(1)
    lines = session._slot_tables[0].tables(session._schedulers[0])
    sizes = []
    for ready in (1, 20, 40, 1):
        waiting = dataclasses.replace(lines, tail=np.full_like(lines.tail, ready))
        session._fit_rows(waiting)
        sizes.append((session._num_rows, len(session._rows.slots)))
    session.close()
    assert sizes == [(8, 8), (32, 32), (48, 48), (48, 48)]


@pytest.mark.slow
def test_a_replica_may_have_nothing_to_do_at_first():
    made = engine(axes={"data": 2, "tensor": 1})
    ends = tuple(range(40, 60))
    asked = [request(i, n=1, stop_token_ids=ends) for i in range(3)]
    ready = list(asked)
    found = made.completions(lambda idle: [ready.pop()] if ready else [])
    answers = {c.prompt_id: c for c in found}
    wanted = generate(plain(), asked)
    assert_same([[answers[r.prompt_id]] for r in asked], wanted)


def test_aborted_responses_do_not_come():
    made = engine(max_num_seqs=2)
    made.submit([request(i, n=2, max_tokens=30 + i) for i in range(4)])
    assert made.abort([3]) == 2
    seen = []
    for completion in made.completions():
        seen.append((completion.prompt_id, completion.sample))
        if len(seen) == 1:
            assert made.abort({1}) == 2
    assert sorted(seen) == [(0, 0), (0, 1), (2, 0), (2, 1)]
    assert_same(generate(made, REQUESTS[:2]), generate(plain(), REQUESTS[:2]))


@pytest.mark.parametrize(
    "kept, name, size",
    [(None, "f32", 4), pytest.param("int8", "s8", 1, marks=pytest.mark.slow)],
)
def test_the_cache_is_written_in_place(kept, name, size):
    made = engine(decode_chunk=4, kv_cache_dtype=kept, max_num_seqs=64)
    with jax.debug_nans(False):  # which keeps what is donated
        compiled = {
            name: program.compile()
            for name, program in made.lower(
                64, num_prompts=64, prompt_length=30
            ).items()
        }
    for program in compiled.values():
        text = program.as_text()
        cache = re.search(rf"{name}(\[2,\d+,64,8\])", text)
        assert not re.search(rf"{re.escape(cache[0])}\S* copy\(", text)
        sizes = program.memory_analysis()
        assert sizes.alias_size_in_bytes >= 4 * size * math.prod(
            map(int, re.findall(r"\d+", cache[1]))
        )


@pytest.mark.parametrize(
    "bits, off", [("int8", 0.03), pytest.param("fp8", 0.15, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("what", ["quantization", "kv_cache_dtype"])
def test_a_quantised_engine_is_smaller_and_near_the_forward_pass(what, bits, off):
    made = engine(**{what: bits})
    found = [
        np.abs(jax.nn.log_softmax(logits_of(asked, c))[at(c)] - c.logprobs)
        for asked, group in zip(REQUESTS, generate(made, REQUESTS), strict=True)
        for c in group
    ]
    assert 0 < np.concatenate(found).mean() < off
    before, after = plain().memory(64, 100), made.memory(64, 100)
    weights, cache = (
        after[f"generation {name}"] / before[f"generation {name}"]
        for name in ("weights", "cache")
    )
    # A head has 8 numbers of 4 bytes: 8 of 1 and a scale of 4 instead. The embedding,
    # two thirds of the rest, keeps its 4 bytes.
    assert cache == (12 / 32 if what == "kv_cache_dtype" else 1)
    assert (weights < 0.7) == (what == "quantization")


@functools.cache
def params_with_experts():
    params = models.init(WITH_EXPERTS, jax.random.key(1))
    draw = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: x + jnp.asarray(0.1 * draw.standard_normal(x.shape), x.dtype), params
    )


WITH_EXPERTS = tiny.arch(vocab_size=304, **tiny.with_experts())


def rounded_to_int8(params):
    """The numbers that an int8 engine has: a scale for each column of a matrix."""
    summed = {
        "moe.gate": 2, "moe.up": 2, "moe.down": 3, "moe.shared.gate": 1,
        "moe.shared.up": 1, "moe.shared.down": 2, "gate": 1, "up": 1, "down": 2, "q": 1,
        "k": 1, "v": 1, "o": (2, 3),
    }  # fmt: skip

    def one(path, x):
        axes = summed.get(jax.tree_util.keystr(path, simple=True, separator="."))
        if axes is None:
            return x
        scale = jnp.abs(x).max(axes, keepdims=True) / 127
        return jnp.floor(x / scale + 0.5) * scale

    return params | {"layers": jax.tree.map_with_path(one, params["layers"])}


def over_the_mesh(params):
    """As a trainer has them that splits experts."""
    on = mesh.make({"data": 1, "fsdp": 2, "expert": 2, "context": 1, "tensor": 2})
    axes = models.logical_axes(WITH_EXPERTS)
    laid_out = models.partition(WITH_EXPERTS, params, axes, on, {})
    return jax.device_put(params, laid_out.shardings(axes))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axes", "bits", "off"),
    [
        ({"data": 1, "tensor": 1}, None, 1e-4),
        ({"data": 2, "tensor": 4}, None, 1e-4),
        ({"data": 1, "tensor": 1}, "int8", 1e-3),
        ({"data": 2, "tensor": 4}, "int8", 1e-3),
        # What is multiplied is rounded too, and other experts are chosen.
        ({"data": 1, "tensor": 1}, "fp8", 1.0),
    ],
)
def test_experts_are_decoded_as_the_forward_pass_computes_them(axes, bits, off):
    # One row needs three experts of eight, eight rows 24: both ways are taken.
    params = params_with_experts()
    given = over_the_mesh(params) if axes["data"] > 1 else params
    made = engine(given, arch=WITH_EXPERTS, axes=axes, quantization=bits)
    asked = [request(0, n=1, max_tokens=20), *(request(i, n=3) for i in range(1, 4))]
    place = jnp.arange(128)[None]

    @jax.jit
    def logits(tokens, ids):
        used = rounded_to_int8(params) if bits == "int8" else params
        how = {"dtype": jnp.float32}
        hidden = models.forward(WITH_EXPERTS, used, tokens, place, ids, **how)
        return models.logits(WITH_EXPERTS, used, hidden)

    largest = 0.0
    for one, completions in zip(asked, generate(made, asked), strict=True):
        for completion in completions:
            tokens = np.concatenate([one.tokens, completion.tokens])
            padded = np.zeros((1, 128), np.int32)
            padded[0, : len(tokens)] = tokens
            found = logits(padded, np.int32(place >= len(tokens)))[0]
            found = jax.nn.log_softmax(found[len(one.tokens) - 1 : len(tokens) - 1])
            wanted = np.asarray(found)[at(completion)]
            largest = max(largest, np.abs(completion.raw_logprobs - wanted).max())
    assert largest < off


def test_weights_do_not_change_under_responses_in_the_making():
    made = engine()
    made.submit(REQUESTS[:2])
    completions = made.completions()
    next(completions)
    with pytest.raises(ValueError, match="3 responses are being made with weights 0"):
        made.load(PARAMS, 1)
    assert len(list(completions)) == 3
    made.load(PARAMS, 1)


def test_completions_that_nobody_took_are_there_the_next_time():
    made = engine()
    made.submit(REQUESTS[:4])
    first = next(made.completions())  # many finish in the same chunk
    found = [first, *made.completions()]
    asked = [(r.prompt_id, i) for r in REQUESTS[:4] for i in range(r.num_samples)]
    assert sorted((c.prompt_id, c.sample) for c in found) == sorted(asked)


def test_a_cache_leaves_free_what_programs_need(monkeypatch):
    made = engine(max_num_seqs=64, prefill_tokens=64)
    programs = made.lower(64, num_prompts=64, prompt_length=128).values()
    sizes = [program.compile().memory_analysis() for program in programs]
    working = max(size.temp_size_in_bytes for size in sizes)
    page = made.memory(1, 1)["generation cache"] // made._wanted_pages(
        made._sized(1).num_rows
    )
    wanted = made._wanted_pages(64)
    assert wanted * page > working  # so that there is something to share out
    for free in (working + wanted * page // 2, 4 * wanted * page):
        monkeypatch.setattr(jax_engine, "_free_bytes", lambda device, free=free: free)
        pages = made._num_pages_for(made._sized(64, 128))
        assert pages * page + working <= free
        assert pages == min(wanted, int(0.95 * (free - working) / page))


def test_too_little_memory_for_one_sequence_is_said():
    with pytest.raises(ValueError, match="one sequence of 128 tokens needs .* allows"):
        generate(engine(cache_gib=1e-5), REQUESTS[:1])


def test_special_tokens_are_kept_by_a_switch():
    asked = [request(1, n=8, max_tokens=20)]
    special = set(TOKENIZER.all_special_ids)
    [kept] = generate(engine(skip_special_tokens=False), asked)
    [left_out] = generate(plain(), asked)
    assert any(special & set(c.tokens.tolist()) for c in kept)
    for one, other in zip(kept, left_out, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        assert one.text == TOKENIZER.decode(one.tokens)
        assert other.text == TOKENIZER.decode(one.tokens, skip_special_tokens=True)


def test_what_cannot_be_answered_is_refused():
    with pytest.raises(
        ValueError, match="prompt 7 has 10 tokens .* max_model_len is 128"
    ):
        engine().submit([request(7, max_tokens=119)])
    with pytest.raises(ValueError, match="max_model_len 128: the model has 127 pos"):
        engine(arch=tiny.arch(vocab_size=304, max_positions=127))
    with pytest.raises(ValueError, match="prompt ids submitted twice: \\[1\\]"):
        generate(plain(), [request(1), request(1)])
    with pytest.raises(ValueError, match="top_p must be in \\(0, 1\\], got 1.5"):
        request(1, top_p=1.5)
    with pytest.raises(ValueError, match="prompt 2 is empty"):
        empty = Request(
            prompt_id=2,
            tokens=(),
            num_samples=1,
            seed=0,
            sampling=Sampling(max_tokens=1),
        )
        engine().submit([empty])


def test_a_device_receives_the_logits_of_its_own_rows_only():
    made = engine(axes={"data": 1, "tensor": 2})
    program = made.lower(8, num_prompts=8, prompt_length=30)["decode"].compile()
    found = re.findall(r"= \(?\w+\[([\d,]+)\]\S* all-gather\(", program.as_text())
    assert found and all(
        math.prod(map(int, shape.split(","))) < 8 * ARCH.vocab_size / 2
        for shape in found
    )


@pytest.mark.slow
def test_collectives_of_a_chunk_are_those_of_its_steps():
    def received(chunk):
        made = engine(axes={"data": 1, "tensor": 2}, decode_chunk=chunk)
        program = made.lower(8, num_prompts=8, prompt_length=30)["decode"].compile()
        return collectives.received(program.as_text(), num_devices=2)

    # Eight steps pass between two looks at whether to go on, or one.
    assert received(8) * 7 == pytest.approx(received(7) * 8, rel=0.01)
    assert received(16) == pytest.approx(2 * received(8), rel=0.01)


def adapters(lora, seed):
    draw = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(0.2 * draw.standard_normal(x.shape), jnp.float32),
        models.abstract_adapters(ARCH, lora),
    )


@pytest.mark.slow
def test_adapters_beside_the_weights_are_adapters_added_to_them():
    # Two key/value heads on four devices are copied, and so are their adapters.
    lora = models.Lora(rank=3, alpha=5.0)
    first, second = adapters(lora, 1), adapters(lora, 2)
    separate = engine(
        models.merge(first, PARAMS), axes={"data": 1, "tensor": 4}, lora=lora
    )
    merged = engine(models.merged(PARAMS, first, lora))
    for found in (first, second):
        sent = separate.load(models.merge(found, PARAMS), version=1)
        merged.load(models.merged(PARAMS, found, lora), version=1)
        assert_same(generate(separate, REQUESTS), generate(merged, REQUESTS))
    size = sum(4 * x.size for x in jax.tree.leaves(second))
    assert sent == {"rollout/adapters_mib": size / 2**20}


@pytest.mark.slow
def test_adapters_beside_a_fused_layer_are_adapters_added_to_it():
    lora, copies = models.Lora(rank=3, alpha=5.0), 2
    held = dataclasses.replace(ARCH, num_kv_heads=copies * ARCH.num_kv_heads)
    found = adapters(lora, 1)

    def fused(params):
        layers = models.unstack(ARCH, params, jnp.float32)["layers"]
        return {i: models.fuse(layer, kv_copies=copies) for i, layer in layers.items()}

    beside = {
        i: layer
        | {
            "lora": models.fuse_adapters(
                ARCH,
                jax.tree.map(lambda x, i=i: x[i], found["layers"]["lora"]),
                lora,
                jnp.float32,
                kv_copies=copies,
            )
        }
        for i, layer in fused(PARAMS).items()
    }
    added = fused(models.merged(PARAMS, found, lora))
    places = jnp.arange(16)[None]
    tokens = 5 * places

    @jax.jit
    def hidden(layers):
        pages = paged.empty(held, 2, 16, jnp.float32)
        how = {"dtype": jnp.float32, "attention": packed}
        alike = jnp.zeros_like(places)
        params = PARAMS | {"layers": layers}
        return paged.prefill(held, params, tokens, places, alike, places, pages, **how)

    for one, other in zip(
        *map(jax.tree.leaves, map(hidden, (beside, added))), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-5)
    plain = jax.tree.leaves(hidden(fused(PARAMS)))[0]
    assert np.abs(plain - jax.tree.leaves(hidden(beside))[0]).max() > 0.1


def test_weights_beside_adapters_are_taken_once():
    lora = models.Lora(rank=3, modules=("v", "gate"))
    made = engine(models.merge(adapters(lora, 1), PARAMS), lora=lora)
    before = made._params["layers"][1]
    made.load(models.merge(adapters(lora, 2), PARAMS), version=1)
    after = made._params["layers"][1]
    assert after["qkv"] is before["qkv"] and after["lora"] is not before["lora"]
    other = jax.tree.map(lambda x: x + 1, PARAMS)
    made.load(models.merge(adapters(lora, 2), other), version=2)
    held = made._params["layers"][1]["gate_up"]
    np.testing.assert_array_equal(held[:, 0], other["layers"]["gate"][1])


@pytest.mark.parametrize("modules", [("k", "up", "down"), ("q", "v", "gate", "o")])
def test_joined_adapters_are_those_of_each_matrix(modules):
    lora, copies = models.Lora(rank=2, alpha=6.0, modules=modules), 2
    one = jax.tree.map(lambda x: x[0], adapters(lora, 0))["layers"]["lora"]
    whole = {
        name: 3.0 * jnp.tensordot(pair["a"], pair["b"], 1) for name, pair in one.items()
    }
    base = jax.tree.map(lambda x: jnp.zeros_like(x[0]), PARAMS["layers"])
    o = {"o": jnp.moveaxis(whole.pop("o"), -1, 0)} if "o" in whole else {}
    down = {"down": whole.pop("down").T} if "down" in whole else {}
    wanted = models.fuse(base | whole | o | down, kv_copies=copies)
    found = models.fuse_adapters(ARCH, one, lora, jnp.float32, kv_copies=copies)
    axes = models.fused_adapter_axes(lora)
    assert found.keys() == axes.keys()
    for name, pair in found.items():
        sizes = [{end: len(axes[name][end]) for end in "ab"}]
        assert sizes == [{end: pair[end].ndim for end in "ab"}]
        delta = jnp.tensordot(pair["a"], pair["b"], 1)
        delta = jnp.moveaxis(delta, -1, 0) if name in ("o", "down") else delta
        np.testing.assert_allclose(delta, wanted[name], atol=1e-5)
