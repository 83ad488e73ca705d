"""Every family computes what transformers computes, in every way it can be run."""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers_models import FAMILIES, WITH_EXPERTS, reference

from jaxrl_llm import models
from jaxrl_llm.algorithms.router_balance import auxiliary_loss
from jaxrl_llm.models.attention import paged
from jaxrl_llm.models.attention.packed import packed
from jaxrl_llm.models.checkpoints import families, peft

T = 24  # longer than every window here
# Small programs run once: compiling them is what takes time.
QUICK = {"xla_llvm_disable_expensive_passes": True, "xla_backend_optimization_level": 0}
# Of the families with experts, the one with most of what there is to get wrong.
SLOW = set(WITH_EXPERTS) - {"glm4-moe"}


def of_all(families, slow):
    return pytest.mark.parametrize(
        "family",
        [
            pytest.param(family, marks=pytest.mark.slow if slow(family) else ())
            for family in families
        ],
    )


every_family = of_all(FAMILIES, SLOW.__contains__)
every_family_with_experts = of_all(WITH_EXPERTS, SLOW.__contains__)
# Ways to turn positions are one table each, which its logits show to be right; how it
# is read does not depend on what is in it. Experts have tests of their own.
every_decoder = of_all(
    FAMILIES,
    # The windows of Mistral stay.
    lambda family: "-rope" in family or "-window" in family or family in WITH_EXPERTS,
)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    @functools.cache
    def from_transformers(family):
        directory = tmp_path_factory.mktemp(family)
        reference(family).save_pretrained(directory)
        return models.load(directory)

    return from_transformers


@functools.cache
def tokens():
    return np.random.default_rng(0).integers(3, 97, (2, T)).astype(np.int32)


def reference_logits(model):
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens().astype(np.int64))).logits.numpy()


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def packed_forward(arch, params, tokens, positions, sequence_ids):
    return models.forward(
        arch, params, tokens, positions, sequence_ids, dtype=jnp.float32
    )


def forward(arch, params):
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (2, T))
    return packed_forward(arch, params, tokens(), positions, np.zeros((2, T), np.int32))


def our_logits(arch, params):
    return models.logits(arch, params, forward(arch, params))


@every_family
def test_loaded_logits_are_those_of_transformers(family, load):
    arch, params, tokenizer = load(family)
    assert tokenizer is None
    assert arch.eos_token_ids == (2,)
    np.testing.assert_allclose(
        our_logits(arch, params), reference_logits(reference(family)), atol=1e-4, rtol=0
    )


@every_family_with_experts
def test_gradients_are_those_of_transformers(family, load, tmp_path):
    import torch

    arch, params, _ = load(family)
    weights = np.random.default_rng(2).standard_normal((2, T, 97)).astype(np.float32)
    theirs = copy.deepcopy(reference(family))
    theirs(torch.from_numpy(tokens().astype(np.int64))).logits.backward(
        torch.from_numpy(weights)
    )
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.grad)
    theirs.save_pretrained(tmp_path)  # gradients by the names of weights
    wanted = models.load(tmp_path).params
    positions = jnp.broadcast_to(jnp.arange(T)[None], (2, T))

    @functools.partial(jax.jit, compiler_options=QUICK)
    @jax.grad
    def found(params):
        given = jnp.asarray(tokens()), positions, jnp.zeros_like(positions)
        how = {"dtype": jnp.float32, "remat": "dots"}
        hidden = models.forward(arch, params, *given, **how)
        return jnp.sum(models.logits(arch, params, hidden) * weights)

    for (path, got), other in zip(
        jax.tree.leaves_with_path(found(params)), jax.tree.leaves(wanted), strict=True
    ):
        name = jax.tree_util.keystr(path)
        if "selection_bias" in name:  # chooses, and is not trained
            assert not np.any(got)
            continue
        scale = np.abs(other).max()
        assert scale > 0
        np.testing.assert_allclose(got, other, rtol=0, atol=1e-4 * scale, err_msg=name)


@every_family_with_experts
def test_experts_in_one_tensor_are_read_as_those_one_by_one(family, load, tmp_path):
    reference(family).config.save_pretrained(tmp_path)
    tensors = {k: v.numpy() for k, v in reference(family).state_dict().items()}
    assert any(name.endswith("experts.gate_up_proj") for name in tensors)
    tied = {"lm_head.weight"} if load(family).arch.tie_embeddings else set()
    save_file(
        {k: np.ascontiguousarray(v) for k, v in tensors.items() if k not in tied},
        tmp_path / "model.safetensors",
    )
    for x, y in zip(
        jax.tree.leaves(models.load(tmp_path).params),
        jax.tree.leaves(load(family).params),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)


@pytest.mark.slow
@every_family_with_experts
def test_the_auxiliary_loss_is_that_of_transformers(family, load):
    import torch

    if family == "glm4-moe":
        pytest.skip("transformers has none for it")
    arch, params, _ = load(family)
    there = np.arange(T)[None] < np.array([[T], [T - 7]])
    with torch.no_grad():
        wanted = reference(family)(
            torch.from_numpy(tokens().astype(np.int64)),
            attention_mask=torch.from_numpy(there.astype(np.int64)),
            output_router_logits=True,
        ).aux_loss.item()
    ids = jnp.where(jnp.asarray(there), 0, -1)
    positions = jnp.broadcast_to(jnp.arange(T)[None], (2, T))
    _, use = jax.jit(
        lambda params: models.forward(
            arch,
            params,
            jnp.asarray(tokens()),
            positions,
            ids,
            dtype=jnp.float32,
            counted=jnp.asarray(there),
        )
    )(params)
    np.testing.assert_allclose(auxiliary_loss(use), wanted, rtol=1e-5)


@every_decoder
def test_transformers_computes_the_logits_of_saved_weights(family, load, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    arch = load(family).arch
    draw = np.random.default_rng(1)
    params = jax.tree.map(
        lambda x: jnp.asarray(0.2 * draw.standard_normal(x.shape), jnp.float32),
        models.abstract_params(arch),
    )
    models.save(tmp_path / "out", arch, params, None, dtype=jnp.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", dtype=torch.float32
    )
    np.testing.assert_allclose(
        our_logits(arch, params), reference_logits(model), atol=1e-4, rtol=0
    )


@every_family
def test_an_architecture_without_its_file_is_written_the_same(family, load):
    arch = load(family).arch
    written = families.config(dataclasses.replace(arch, source="{}"))
    again = families.architecture(written)
    assert dataclasses.replace(again, eos_token_ids=(2,)) == arch


@every_decoder
def test_prefill_and_extension_give_the_hidden_states_of_forward(family, load):
    # Both sequences are read packed in one row, then go on in pieces of three tokens.
    # Pages hold four positions; the tables give them in an order of their own.
    arch, params, _ = load(family)
    whole, size, lengths = forward(arch, params), 4, (9, 5)
    tables = 1 + np.random.default_rng(0).permutation(2 * T // size).reshape(2, -1)
    tables = tables.astype(np.int32)
    row = [
        np.concatenate([part(i)[:n] for i, n in enumerate(lengths)] + [np.zeros(2)])
        for part in (
            lambda i: tokens()[i],
            lambda i: np.arange(T),
            lambda i: np.full(T, i),
            lambda i: tables[i, np.arange(T) // size] * size + np.arange(T) % size,
        )
    ]
    row[2][-2:] = 2  # padding is another sequence
    row = np.asarray(row, np.int32)[:, None]

    @functools.partial(jax.jit, compiler_options=QUICK)
    def read(params, row):
        pages = paged.empty(arch, 1 + tables.size, size, jnp.float32)
        return paged.prefill(
            arch, params, *row, pages, dtype=jnp.float32, attention=packed
        )

    @functools.partial(jax.jit, compiler_options=QUICK)
    def extend(params, more, at, tables, pages):
        return paged.extend(
            arch,
            params,
            more,
            at,
            tables,
            pages,
            dtype=jnp.float32,
            attention=paged.attend,
        )

    params = models.unstack(arch, params, jnp.float32)
    params["layers"] = {i: models.fuse(x) for i, x in params["layers"].items()}
    first, pages = read(params, row)
    rest = []
    for i in range(0, T, 3):
        at = np.array(lengths, np.int32)[:, None] + i + np.arange(3, dtype=np.int32)
        more = np.take_along_axis(tokens(), np.minimum(at, T - 1), axis=1)
        hidden, pages = extend(params, more, np.where(at < T, at, -1), tables, pages)
        rest.append(hidden)
    rest = np.concatenate(rest, axis=1)
    start = 0
    for i, n in enumerate(lengths):
        got = np.concatenate([first[0, start : start + n], rest[i, : T - n]])
        np.testing.assert_allclose(got, whole[i], atol=2e-5)
        start += n


@every_decoder
def test_sequences_packed_in_one_row_do_not_see_each_other(family, load):
    arch, params, _ = load(family)
    # Row 0: ten tokens of the first, thirteen of the second, padding. Row 1: reversed.
    first, second, padding = tokens()[0, :10], tokens()[1, :13], np.zeros(1, np.int32)
    rows = [[first, second, padding], [second, first, padding]]
    ids = np.array([np.repeat([0, 1, 2], [len(x) for x in row]) for row in rows])
    positions = np.array([np.concatenate([range(len(x)) for x in row]) for row in rows])
    packed = packed_forward(
        arch,
        params,
        np.array([np.concatenate(row) for row in rows]),
        positions.astype(np.int32),
        ids.astype(np.int32),
    )
    alone = forward(arch, params)
    for at, sequence in (
        (packed[0, :10], alone[0, :10]),
        (packed[0, 10:23], alone[1, :13]),
        (packed[1, :13], alone[1, :13]),
        (packed[1, 13:23], alone[0, :10]),
    ):
        np.testing.assert_allclose(at, sequence, atol=2e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@every_family
def test_an_adapter_of_peft_is_read_and_written_as_peft_reads_it(family, tmp_path):
    library = pytest.importorskip("peft")
    import torch
    import transformers

    base = tmp_path / "base"
    reference(family).save_pretrained(base)

    def fresh():
        return transformers.AutoModelForCausalLM.from_pretrained(
            base, attn_implementation="eager", dtype=torch.float32
        )

    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    if family not in WITH_EXPERTS:
        names += ["gate_proj", "up_proj", "down_proj"]
    theirs = library.get_peft_model(
        fresh(),
        library.LoraConfig(
            r=3,
            lora_alpha=7,
            target_modules=names,
            use_rslora=family.startswith("qwen"),
            task_type="CAUSAL_LM",
        ),
    ).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:  # zero until it is trained
                parameter.normal_(std=0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    wanted = reference_logits(theirs)
    assert np.abs(wanted - reference_logits(reference(family))).max() > 0.1

    found = models.open(tmp_path / "theirs")
    np.testing.assert_allclose(
        our_logits(found.arch, found.load()), wanted, atol=1e-4, rtol=0
    )
    adapter = found.adapter
    how = {"base": str(base), "dtype": jnp.float32}
    peft.save(tmp_path / "ours", found.arch, adapter.load(), adapter.lora, **how)
    one, other = (
        load_file(tmp_path / who / "adapter_model.safetensors")
        for who in ("theirs", "ours")
    )
    assert one.keys() == other.keys()
    for name, x in one.items():
        assert x.tobytes() == other[name].tobytes()
    again = library.PeftModel.from_pretrained(fresh(), tmp_path / "ours").eval()
    np.testing.assert_array_equal(reference_logits(again), wanted)
