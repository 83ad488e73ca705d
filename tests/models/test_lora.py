"""Adapters: nothing at first, then what PEFT computes, beside the base or in it."""

import functools
import json
import math
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import transformers_models

from jaxrl_llm import models
from jaxrl_llm.algorithms import logprobs
from jaxrl_llm.models import layer_loop as loop
from jaxrl_llm.sharding import mesh

LORA = models.Lora(rank=4, alpha=8.0)
R, T = 2, 12
TOKENS = np.random.default_rng(0).integers(0, 97, (R, T)).astype(np.int32)
POSITIONS = np.broadcast_to(np.arange(T, dtype=np.int32), (R, T))
# Small programs run once: compiling them is what takes time.
QUICK = {"xla_llvm_disable_expensive_passes": True, "xla_backend_optimization_level": 0}


def arch():
    return tiny.arch(vocab_size=97, qkv_bias=True, output_bias=True)


@functools.cache
def base():
    with jax.ensure_compile_time_eval():
        return models.init(arch(), jax.random.key(0))


def rows():
    """Tokens, positions and sequence ids."""
    return [jnp.asarray(x) for x in (TOKENS, POSITIONS, np.zeros_like(TOKENS))]


def learned(lora=LORA):
    """Adapters of which both halves have been drawn."""
    return jax.tree.map(
        lambda x: 0.1 * jax.random.normal(jax.random.key(x.size), x.shape),
        models.abstract_adapters(arch(), lora),
    )


def forward(params, lora=None, **how):
    how = {"dtype": jnp.float32, "lora": lora} | how
    return models.forward(arch(), params, *rows(), **how)


def logprobs_of(params, lora=None, **how):
    hidden, (tokens, positions, ids) = forward(params, lora, **how), rows()
    matrix = models.output_matrix(params)
    return logprobs.of_tokens(hidden, matrix, tokens, positions, ids == 0).logprobs


@pytest.mark.parametrize(
    ("over", "dtype", "remat"),
    [
        (loop.in_place, jnp.bfloat16, "dots"),
        *(
            pytest.param(over, dtype, remat, marks=pytest.mark.slow)
            for over in (loop.scan, loop.unrolled, loop.in_place)
            for dtype in (jnp.float32, jnp.bfloat16)
            for remat in ("none", "dots", "full")
        ),
    ],
)
def test_adapters_that_have_learned_nothing_change_no_bit(over, dtype, remat):
    fresh = models.init_adapters(arch(), LORA, jax.random.key(1))
    how = {"loop": over, "remat": remat, "dtype": dtype}
    both = jax.jit(
        lambda adapters: (
            logprobs_of(base(), **how),
            logprobs_of(models.merge(adapters, base()), LORA, **how),
        )
    )
    chex.assert_trees_all_equal(*both(fresh))


@pytest.mark.slow
def test_a_merged_base_computes_what_base_and_adapters_do():
    lora = models.Lora(rank=3, alpha=5.0, modules=("k", "o", "down"), rslora=True)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def both(adapters):
        merged = models.merged(base(), adapters, lora)
        return forward(models.merge(adapters, base()), lora), forward(merged)

    beside, inside = both(learned(lora))
    np.testing.assert_allclose(beside, inside, rtol=1e-5, atol=1e-5)
    assert np.abs(beside - forward(base())).max() > 0.1


def test_a_merged_base_is_summed_in_float32_and_rounded_once():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base())
    adapters = learned()
    found = models.merged(params, adapters, LORA)
    assert found["embedding"] is params["embedding"]
    for name, equation in {"v": "dr,rnh->dnh", "o": "nhr,rd->dnh"}.items():
        a, b = (np.asarray(adapters["layers"]["lora"][name][end][1]) for end in "ab")
        wanted = np.asarray(params["layers"][name][1], np.float32)
        wanted = wanted + 2.0 * np.einsum(equation, a, b)
        one = found["layers"][name][1]
        assert one.dtype == jnp.bfloat16
        # A sum that lies between two numbers may be rounded to either.
        same = np.asarray(one) == np.asarray(wanted.astype(jnp.bfloat16))
        assert same.mean() > 0.99
        np.testing.assert_allclose(np.float32(one), wanted, rtol=2**-8)


def test_adapters_begin_as_pefts_do():
    adapters = models.init_adapters(arch(), LORA, jax.random.key(1))
    axes = models.adapter_axes(LORA)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        adapters, models.abstract_adapters(arch(), LORA)
    )
    inputs = {"q": 32, "k": 32, "v": 32, "o": 32, "gate": 32, "up": 32, "down": 64}
    for name, pair in adapters["layers"]["lora"].items():
        assert not pair["b"].any()
        assert [len(x) for x in axes["layers"]["lora"][name].values()] == [
            x.ndim for x in pair.values()
        ]
        most = 1 / math.sqrt(inputs[name])
        assert 0.95 * most < np.abs(pair["a"]).max() <= most
        assert np.std(pair["a"]) == pytest.approx(most / math.sqrt(3), rel=0.15)


def test_the_base_gets_no_gradient_and_what_adapters_add_is_not_kept():
    many = models.Lora(rank=4)

    def loss(adapters, params, lora):
        hidden = forward(
            models.merge(adapters, params), lora, loop=loop.in_place, remat="dots"
        )
        return jnp.sum(hidden)

    def kept(params, lora):
        """Shapes of what the backward pass is handed."""
        _, pullback = jax.vjp(lambda x: loss(x, params, lora), learned(many))
        return [x.shape for x in jax.tree.leaves(pullback)]

    # Of each layer one product of 2 x 12 tokens with gate, and one with up.
    assert kept(base(), many).count((2, R, T, 64)) == 2
    gradients = jax.eval_shape(lambda x: jax.grad(loss)(x, base(), many), learned(many))
    chex.assert_trees_all_equal_shapes(gradients, learned(many))


@functools.cache
def eight_bits(dtype=jnp.float32):
    """The base with matrices of int8."""
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    axes = models.logical_axes(arch(), scaled=True)
    shardings = jax.tree.map(lambda _: one, axes, is_leaf=lambda x: type(x) is tuple)
    with jax.ensure_compile_time_eval():
        source = models.Quantising(Given())
        return source.load(dtype=dtype, shardings=shardings)


class Given:
    """`base` as a source of weights."""

    arch = arch()

    def load(self, *, dtype=jnp.float32, shardings=None):
        return jax.tree.map(lambda x: x.astype(dtype), base())


@pytest.mark.parametrize(
    ("over", "dtype", "remat"),
    [
        (loop.in_place, jnp.float32, "none"),
        *(
            pytest.param(over, dtype, remat, marks=pytest.mark.slow)
            for over in (loop.scan, loop.unrolled, loop.in_place)
            for dtype in (jnp.float32, jnp.bfloat16)
            for remat in ("none", "dots", "full")
        ),
    ],
)
def test_beside_int8_adapters_learn_what_they_do_beside_its_numbers(over, dtype, remat):
    few = models.Lora(rank=4, modules=("q", "up", "down"))

    def loss(adapters, params):
        how = {"loop": over, "remat": remat, "dtype": dtype}
        return -jnp.mean(logprobs_of(models.merge(adapters, params), few, **how))

    own = functools.partial(jax.jit, compiler_options=QUICK)(jax.value_and_grad(loss))
    found = own(learned(few), eight_bits())
    numbers = models.plain(eight_bits(), dtype)
    wanted = own(learned(few), numbers)
    chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-6)
    # They are the numbers of NumPy, and not those that were read.
    for name, summed in {"k": 1, "o": (2, 3), "down": 2}.items():
        x = np.asarray(base()["layers"][name])
        step = np.abs(x).max(axis=summed, keepdims=True) / 127
        near = np.round(x / step) * step
        one = np.asarray(models.plain(eight_bits(), jnp.float32)["layers"][name])
        np.testing.assert_allclose(one, near, rtol=1e-5, atol=1e-7)
        assert np.abs(near - x).max() > 0


def test_beside_int8_the_backward_pass_keeps_int8():
    def kept(params):
        """Bytes that the backward pass is handed."""

        def loss(adapters):
            whole = models.merge(adapters, params)
            return jnp.sum(forward(whole, LORA, loop=loop.in_place, remat="dots"))

        _, pullback = jax.vjp(loss, learned())
        return sum(x.nbytes for x in jax.tree.leaves(pullback))

    layers = models.abstract_params(arch(), quantised="int8")["layers"]
    matrices = {n: x for n, x in layers.items() if f"{n}_scale" in layers}
    assert {x.dtype for x in matrices.values()} == {jnp.dtype("int8")}
    numbers = sum(x.size for x in matrices.values())
    scales = sum(layers[f"{n}_scale"].size for n in matrices)
    less = kept(models.plain(eight_bits(), jnp.float32)) - kept(eight_bits())
    assert less == 3 * numbers - 4 * scales


def test_a_merged_int8_base_is_its_numbers_and_what_adapters_add():
    few = models.Lora(rank=4, modules=("q", "down"))
    numbers = models.plain(eight_bits(), jnp.float32)
    wanted = models.merged(numbers, learned(few), few)
    found = models.merged(eight_bits(), learned(few), few, jnp.float32)
    chex.assert_trees_all_close(found, wanted, rtol=1e-6)
    half = models.merged(eight_bits(jnp.bfloat16), learned(few), few, jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"rank": 0}, "rank is 0; an adapter has at least rank 1"),
        ({"alpha": 0.0}, "alpha is 0.0; it must be positive"),
        ({"modules": ()}, "name one or more of q, k, v, o, gate, up, down"),
        ({"modules": ("q", "qkv")}, "modules are .*'qkv'.*; name one or more"),
    ],
)
def test_settings_that_make_no_adapter_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        models.Lora(**wrong)


def test_weights_have_adapters_if_and_only_if_settings_say_so():
    for params, lora in ((base(), LORA), (models.merge(learned(), base()), None)):
        with pytest.raises(ValueError, match="adapters if and only if lora is given"):
            forward(params, lora)


GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "golden_peft_0.21.2.json"
SETTINGS = {
    "all": models.Lora(rank=4, alpha=8.0),
    "some": models.Lora(rank=3, alpha=5.0, modules=("q", "o", "up"), rslora=True),
}


def drawn(tree, seed):
    """Random numbers in the shapes of a tree, the same with any version of JAX."""
    draw = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(0.2 * draw.standard_normal(x.shape), jnp.float32), tree
    )


@functools.cache
def loss_and_gradients(arch, lora, sizes=None):
    """Compiled: the mean log-probability, which is a loss, and its gradient.

    Args:
      sizes: of the axes data, fsdp and tensor of a mesh; one device if not given.
    """
    how, partition = {}, None
    if sizes is not None:
        axes = dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))
        names = models.merge(models.adapter_axes(lora), models.logical_axes(arch))
        shapes = models.merge(
            models.abstract_adapters(arch, lora), models.abstract_params(arch)
        )
        on = mesh.make(axes, jax.devices()[: math.prod(sizes)])
        partition = models.partition(arch, shapes, names, on, {})
        how = {
            "shard": partition.constrain,
            "attention": models.choose_attention(partition, "float32", 1, "xla"),
        }

    def loss(adapters, params):
        whole = models.merge(adapters, params)
        if partition is not None:
            laid_out = partition.shardings(names)
            whole = jax.lax.with_sharding_constraint(whole, laid_out)
        tokens, positions, ids = rows()
        hidden = models.forward(
            arch, whole, tokens, positions, ids, dtype=jnp.float32, lora=lora, **how
        )
        found = logprobs.of_tokens(
            hidden, models.output_matrix(params), tokens, positions, ids == 0,
            logit_softcap=arch.logit_softcap, matrix_gradient=False,
        )  # fmt: skip
        return jnp.sum(found.logprobs) / (R * (T - 1))

    return jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)


def of_peft(folder, lora, adapters, dtype="float32"):
    """The same of PEFT and transformers, of a Hugging Face directory."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        use_rslora=lora.rslora,
        target_modules=[f"{name}_proj" for name in lora.modules],
    )
    model = peft.get_peft_model(model, config).to(getattr(torch, dtype))
    named, pairs = dict(model.named_parameters()), adapters["layers"]["lora"]

    def weight(name, i, end):
        part = "mlp" if name in ("gate", "up", "down") else "self_attn"
        return named[
            f"base_model.model.model.layers.{i}.{part}.{name}_proj.lora_{end}.default"
            ".weight"
        ]

    def stored(x, end):
        """[L, ..., r] or [L, r, ...] as PEFT has it, [L, r, in] or [L, out, r]."""
        rank = lora.rank
        flat = (
            x.reshape(len(x), -1, rank) if end == "A" else x.reshape(len(x), rank, -1)
        )
        return np.array(flat).swapaxes(1, 2)

    with torch.no_grad():
        for name, pair in pairs.items():
            for end, x in zip("AB", (pair["a"], pair["b"]), strict=True):
                for i, one in enumerate(stored(x, end)):
                    weight(name, i, end).copy_(torch.from_numpy(one))
    tokens = torch.from_numpy(TOKENS.astype(np.int64))
    logits = model(tokens).logits[:, :-1]
    loss = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).mean()
    loss.backward()
    gradients = {
        name: {
            end.lower(): np.stack(
                [weight(name, i, end).grad.numpy().T for i in range(len(pair["a"]))]
            ).reshape(pair[end.lower()].shape)
            for end in "AB"
        }
        for name, pair in pairs.items()
    }
    return loss.item(), {"layers": {"lora": gradients}}


def example(lora):
    """Weights of a small Llama, and adapters."""
    params = drawn(models.abstract_params(arch()), 1)
    return params, drawn(models.abstract_adapters(arch(), lora), 2)


@pytest.mark.parametrize("name", SETTINGS)
def test_loss_and_gradients_are_the_stored_ones_of_peft(name):
    params, adapters = example(SETTINGS[name])
    loss, found = loss_and_gradients(arch(), SETTINGS[name])(adapters, params)
    stored = json.loads(GOLDEN.read_text())[name]
    assert loss == pytest.approx(stored["loss"], rel=1e-5)
    for path, wanted in stored["gradients"].items():
        module, end = path.split(".")
        value = np.asarray(found["layers"]["lora"][module][end])
        # Sums with weights that differ from place to place.
        weights = np.cos(np.arange(value.size)).reshape(value.shape)
        got = [np.abs(value).sum(), (weights * value).sum()]
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


# Of a name of transformers' that PEFT still asks for.
of_old_name = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")


@pytest.mark.slow
@of_old_name
def test_the_stored_numbers_are_pefts(tmp_path):
    """Writes them anew if the file is not there."""
    made = {}
    for name, lora in SETTINGS.items():
        params, adapters = example(lora)
        models.save(tmp_path / name, arch(), params, None, dtype=jnp.float32)
        loss, gradients = of_peft(tmp_path / name, lora, adapters)
        sums = {}
        for module, pair in gradients["layers"]["lora"].items():
            for end, x in pair.items():
                weights = np.cos(np.arange(x.size)).reshape(x.shape)
                sums[f"{module}.{end}"] = [
                    float(np.abs(x).sum()), float((weights * x).sum())
                ]  # fmt: skip
        made[name] = {"loss": loss, "gradients": sums}
    if not GOLDEN.exists():
        GOLDEN.write_text(json.dumps(made, indent=1) + "\n")
    stored = json.loads(GOLDEN.read_text())
    for name, of_name in made.items():
        assert of_name["loss"] == pytest.approx(stored[name]["loss"], rel=1e-6)
        for path, sums in of_name["gradients"].items():
            wanted = stored[name]["gradients"][path]
            np.testing.assert_allclose(sums, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_gpus_way_to_a_wide_product_gives_the_same(monkeypatch):
    lora = SETTINGS["all"]
    params, adapters = example(lora)
    wanted = loss_and_gradients(arch(), lora)(adapters, params)
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *given, cuda, default: cuda(*given)
    )
    found = loss_and_gradients.__wrapped__(arch(), lora)(adapters, params)
    chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert any(
        not np.array_equal(*pair)
        for pair in zip(*map(jax.tree.leaves, (found, wanted)), strict=True)
    )


@pytest.mark.slow
@of_old_name
@pytest.mark.parametrize("family", transformers_models.FAMILIES)
def test_every_family_has_the_loss_and_the_gradients_of_peft(family, tmp_path):
    lora = SETTINGS["all"]
    transformers_models.reference(family).save_pretrained(tmp_path)
    arch, params, _ = models.load(tmp_path)
    adapters = drawn(models.abstract_adapters(arch, lora), 2)
    wanted_loss, wanted = of_peft(tmp_path, lora, adapters)
    exact_loss, exact = of_peft(tmp_path, lora, adapters, "float64")
    # Every tensor is near PEFT's, by the size of both, and as near to the same sums in
    # float64 as PEFT's own; single numbers in them are what is left of larger terms.
    for sizes in (None, (1, 2, 2)):
        loss, found = loss_and_gradients(arch, lora, sizes)(adapters, params)
        assert loss == pytest.approx(wanted_loss, rel=1e-5)
        assert loss == pytest.approx(exact_loss, rel=1e-5)
        assert max(distances(found, wanted)) < 1e-5
        assert max(distances(found, exact)) < 1e-5
    assert {x.dtype for x in jax.tree.leaves(exact)} == {np.dtype(np.float64)}
    assert max(distances(wanted, exact)) < 1e-5


def distances(found, wanted):
    """|x - y| / |y| of each tensor, summed in float64."""
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        off = np.linalg.norm(np.asarray(x, np.float64) - np.asarray(y, np.float64))
        yield off / np.linalg.norm(np.asarray(y, np.float64))
