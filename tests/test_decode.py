"""The JAX engine on a small random model, against the whole forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxrl_llm import models
from jaxrl_llm.rollout import decode
from jaxrl_llm.rollout.decode import JaxEngine
from jaxrl_llm.rollout.engine import Request, Sampling, generate
from sharding import mesh

TOKENIZER = tiny.tokenizer()
ARCH = tiny.arch(vocab_size=304)
PARAMS = models.init(ARCH, jax.random.key(0))


def engine(params=PARAMS, *, arch=ARCH, axes=None, dtype=jnp.float32, **options):
    axes = axes or {"data": 1, "tensor": 1}
    devices = jax.devices()[: axes["data"] * axes["tensor"]]
    options = {"max_num_seqs": 64, "decode_chunk": 8} | options
    made = JaxEngine(
        arch, TOKENIZER, mesh=mesh.make(axes, devices), dtype=dtype, **options
    )
    made.load(params, version=0)
    return made


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
    tokens = np.concatenate([request.tokens, completion.tokens])[None].astype(np.int32)
    positions = np.arange(tokens.shape[1], dtype=np.int32)[None]
    hidden = models.forward(
        ARCH,
        PARAMS,
        jnp.asarray(tokens),
        jnp.asarray(positions),
        jnp.zeros_like(tokens),
        dtype=jnp.float32,
    )
    return models.logits(ARCH, PARAMS, hidden)[0, len(request.tokens) - 1 : -1]


def assert_same(some, others):
    for one, other in zip(sum(some, []), sum(others, []), strict=True):
        assert (one.prompt_id, one.sample) == (other.prompt_id, other.sample)
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
        assert one.text == other.text
        assert one.finish_reason == other.finish_reason


REQUESTS = [request(i) for i in range(5)]


def test_greedy_tokens_are_the_argmax_of_the_forward_pass():
    for asked, [completion] in zip(
        REQUESTS,
        generate(engine(), [request(i, n=1, temperature=0.0) for i in range(5)]),
        strict=True,
    ):
        logits = logits_of(asked, completion)
        np.testing.assert_array_equal(completion.tokens, logits.argmax(-1))
        np.testing.assert_array_equal(completion.logprobs, 0.0)


def test_logprobs_are_those_of_the_forward_pass():
    requests = [request(i, temperature=0.7) for i in range(3)]
    for asked, completions in zip(requests, generate(engine(), requests), strict=True):
        for completion in completions:
            logits = logits_of(asked, completion)
            at = (np.arange(len(completion.tokens)), completion.tokens)
            raw, cooled = jax.nn.log_softmax(logits), jax.nn.log_softmax(logits / 0.7)
            np.testing.assert_allclose(completion.raw_logprobs, raw[at], atol=1e-4)
            np.testing.assert_allclose(completion.logprobs, cooled[at], atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_seqs": 3},
        {"decode_chunk": 1},
        {"decode_chunk": 5, "max_num_seqs": 4},
        {"axes": {"data": 4, "tensor": 2}},
        {"axes": {"data": 8, "tensor": 1}},
    ],
    ids=str,
)
def test_a_response_does_not_depend_on_batch_chunk_or_mesh(options):
    assert_same(generate(engine(**options), REQUESTS), generate(engine(), REQUESTS))


def test_a_response_does_not_depend_on_order_or_company():
    whole = generate(engine(), REQUESTS)
    assert_same(generate(engine(), REQUESTS[::-1])[::-1], whole)
    assert_same(generate(engine(), REQUESTS[2:3]), whole[2:3])


def test_samples_prompts_and_seeds_differ():
    [[one, two]] = generate(engine(), [REQUESTS[3]])
    assert one.tokens.tolist() != two.tokens.tolist()
    [[other, _]] = generate(engine(), [request(3, seed=4)])
    assert one.tokens.tolist() != other.tokens.tolist()


def test_a_stop_token_ends_the_response_and_belongs_to_it():
    [[free]] = generate(engine(), [request(1, n=1)])
    stop = int(free.tokens[5])
    first = free.tokens.tolist().index(stop)
    [[stopped]] = generate(engine(), [request(1, n=1, stop_token_ids=(stop,))])
    np.testing.assert_array_equal(stopped.tokens, free.tokens[: first + 1])
    assert (stopped.finish_reason, free.finish_reason) == ("stop", "length")
    assert stopped.text == TOKENIZER.decode(free.tokens[:first])


@pytest.mark.parametrize("chunk", [1, 4, 32])
def test_a_stop_string_ends_with_the_token_that_completes_it(chunk):
    [[free]] = generate(engine(), [request(1, n=1, max_tokens=20)])
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
    lengths = [[len(c.tokens) for c in cs] for cs in generate(engine(), requests)]
    assert lengths == [[1, 1], [7, 7], [20, 20]]


def test_completions_carry_the_version_of_their_weights():
    made = engine()
    assert generate(made, REQUESTS[:1])[0][0].weight_version == 0
    other = jax.tree.map(lambda x: 2 * x, PARAMS)
    made.load(other, version=7)
    [[now, _]] = generate(made, REQUESTS[3:4])
    assert now.weight_version == 7
    assert_same([[now]], [[generate(engine(other), REQUESTS[3:4])[0][0]]])


def test_waves_of_the_same_shape_compile_nothing_new():
    made = engine(max_num_seqs=4)
    generate(made, [request(i, n=4, length=9 + i) for i in range(2)])
    before = decode._decode._cache_size(), decode._prefill._cache_size()
    generate(made, [request(i, n=4, length=9 + i) for i in range(6)])
    assert (decode._decode._cache_size(), decode._prefill._cache_size()) == before


def test_what_cannot_be_answered_is_refused():
    with pytest.raises(ValueError, match="prompt 7 has 10 tokens .* 128 positions"):
        engine(arch=tiny.arch(vocab_size=304, max_positions=128)).submit(
            [request(7, max_tokens=119)]
        )
    with pytest.raises(ValueError, match="prompt ids submitted twice: \\[1\\]"):
        generate(engine(), [request(1), request(1)])
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
