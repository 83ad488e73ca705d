"""The decoder as pure functions: parameters and their layouts, the training pass.

`params` is a nested dict of arrays. Three layouts hold the same numbers: *stacked*
(training; every weight of a layer is one array [L, ...]), *unstacked*
(`params["layers"][i]`), and *fused* (generation; unstacked, with q, k, v and gate, up
joined, perhaps quantised). `unstack` goes from the first to the second, `fuse` on to
the third.

Where only some parameters are trained, they and the frozen ones are two trees:
`split_params` takes them apart, `merge` puts together what `forward` reads.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt

from jaxrl_llm.data.types import RouterUse
from jaxrl_llm.models.architecture import Architecture
from jaxrl_llm.models.attention.packed import PackedAttention, packed
from jaxrl_llm.models.decoder import (
    Decoder,
    Init,
    Layer,
    Lookup,
    RotaryTable,
    Shard,
    anywhere,
    take,
)
from jaxrl_llm.models.layer_loop import Loop, in_place, scan, unrolled
from jaxrl_llm.models.lora import GATHERED, Lora, adapter_axes, of_layers, scaled
from jaxrl_llm.models.moe import (
    PRODUCT,
    SELECTION_BIAS,
    Experts,
    alone,
    recorded,
    replayed,
    route,
    routes_dtype,
    use_of,
)
from jaxrl_llm.models.quantised import (
    DTYPES,
    SUMMED,
    Bits,
    are_quantised,
    matrices,
    plain_matrices,
    quantise,
)

Params = Any
Remat = Literal["none", "dots", "full", "offload"]
"""What the backward pass of a layer computes again. none: nothing. dots: all but matrix
products and attention. full: everything. offload: as dots, with what is kept in the
host's memory meanwhile."""


def init(
    arch: Architecture,
    key: PRNGKeyArray,
    *,
    dtype=jnp.float32,
    stacked: bool = True,
) -> Params:
    """Random weights: normal, deviation 1 / sqrt(fan in)."""
    model = Decoder(arch, Init(nnx.Rngs(key), dtype), stacked=stacked)
    return nnx.to_pure_dict(nnx.state(model))


def abstract_params(
    arch: Architecture,
    *,
    dtype=jnp.float32,
    stacked: bool = True,
    quantised: Bits | None = None,
) -> Params:
    """Shapes and dtypes of `init`, without computing anything.

    Args:
      quantised: how the matrices of layers are, which then have scales.
    """
    scaled = quantised is not None
    model = _abstract(arch, stacked, scaled=scaled, dtype=jnp.dtype(dtype))
    return typed(nnx.to_pure_dict(nnx.state(model)), quantised)


def typed(shapes: Params, quantised: Bits | None) -> Params:
    """Parameters of these shapes and dtypes, with those of a layer's matrices that are
    quantised, and of their scales."""
    if quantised is None:
        return shapes

    def leaf(path, x):
        name = path[-1].key
        if name in SUMMED:
            return jax.ShapeDtypeStruct(x.shape, DTYPES[quantised])
        is_scale = name.removesuffix("_scale") in SUMMED
        return jax.ShapeDtypeStruct(x.shape, jnp.float32 if is_scale else x.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def logical_axes(
    arch: Architecture,
    *,
    stacked: bool = True,
    fused: bool = False,
    scaled: bool = False,
) -> Params:
    """A tuple of axis names for every parameter, in a tree of the same structure."""
    model = _abstract(arch, stacked, fused, scaled)
    state = nnx.state(model)
    return nnx.to_pure_dict(
        jax.tree.map(
            lambda variable: variable.get_metadata("axes"),
            state,
            is_leaf=lambda x: isinstance(x, nnx.Variable),
        )
    )


def split_params(
    params: Params, is_trained: Callable[[str], bool]
) -> tuple[Params, Params]:
    """Trained and frozen parameters: two trees like `params`, each without what the
    other has.

    Args:
      is_trained: whether a parameter is trained, by its name, such as "layers.q" or
        "norm.scale".
    """

    def part(tree: Params, within: str, wanted: bool) -> Params:
        found = {}
        for key, value in tree.items():
            name = f"{within}{key}"
            if isinstance(value, dict):
                if inner := part(value, f"{name}.", wanted):
                    found[key] = inner
            elif is_trained(name) == wanted:
                found[key] = value
        return found

    return part(params, "", True), part(params, "", False)


def merge(trained: Params, frozen: Params) -> Params:
    """One tree of both, the inverse of `split_params`. What one of them does not have
    at all, such as adapters, the other may have.

    Raises:
      ValueError: both have an array of the same name.
    """
    if trained is None or frozen is None:
        return frozen if trained is None else trained
    if not (isinstance(trained, dict) and isinstance(frozen, dict)):
        raise ValueError(
            f"a parameter is trained and frozen: {jnp.shape(trained)} and "
            f"{jnp.shape(frozen)}; it belongs to one of the two trees"
        )
    names = {**trained, **frozen}
    return {name: merge(trained.get(name), frozen.get(name)) for name in names}


def num_params(arch: Architecture) -> int:
    """How many numbers the model has; a tied output matrix counts once."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(arch)))


def num_matmul_params(arch: Architecture) -> int:
    """How many of them a token is multiplied with: all but an embedding that is not
    also the output matrix, and the experts that it does not go through. Norms and
    biases, a few thousand, are counted too."""
    unused = 0 if arch.tie_embeddings else arch.vocab_size * arch.hidden_size
    if (moe := arch.moe) is not None:
        layers = sum(map(arch.has_experts, range(arch.num_layers)))
        of_expert = 3 * arch.hidden_size * moe.expert_size
        unused += layers * (moe.num_experts - moe.top_k) * of_expert
    return num_params(arch) - unused


def for_products(arch: Architecture, params: Params, dtype) -> Params:
    """Stacked weights as matrix products take them: cast once rather than at each use.

    Norms, the router, and the embedding, whose gradient is a sum over all tokens, stay
    as they are, and so do adapters, which `forward` casts.

    Args:
      params: all of them, either tree of `split_params`, or adapters; not quantised.
    """

    def cast(params, axes):
        if isinstance(params, dict):
            return {name: cast(x, axes.get(name, {})) for name, x in params.items()}
        kept = not axes or not {"norm", "vocab", "router"}.isdisjoint(axes)
        return params if kept else params.astype(dtype)

    return cast(params, logical_axes(arch))


def unstack(arch: Architecture, params: Params, dtype) -> Params:
    """Stacked to unstacked, cast to `dtype`; but for the selection bias of experts."""

    def cast(path, x):
        return x if path[-1].key == SELECTION_BIAS else x.astype(dtype)

    params = jax.tree.map_with_path(cast, params)
    return params | {
        "layers": {
            i: jax.tree.map(
                lambda x: x[0], _layers_of(arch, params["layers"], range(i, i + 1))
            )
            for i in range(arch.num_layers)
        }
    }


def in_layer(path: str, routed: bool) -> bool:
    """Whether a layer has a parameter, such as "gate" or "moe.router".

    Args:
      routed: whether it has experts.
    """
    name, *_ = path.split(".")
    return routed if name == "moe" else not (routed and name in _DENSE)


_DENSE = frozenset(
    f"{name}{end}" for name in ("gate", "up", "down") for end in ("", "_bias")
)


def _layers_of(arch: Architecture, layers: Params, run: range) -> Params:
    """What neighbouring layers that are alike have of a tree like stacked layers. A
    stack has a row for every layer that has the parameter."""
    routed = arch.has_experts(run.start)
    alike = [i for i in range(arch.num_layers) if arch.has_experts(i) == routed]
    first = alike.index(run.start)

    def part(name: str, x: Params) -> Params:
        start = run.start if in_layer(name, not routed) else first
        return jax.tree.map(lambda x: x[start : start + len(run)], x)

    there = {name: x for name, x in layers.items() if in_layer(name, routed)}
    if len(run) == arch.num_layers:
        return there
    return {name: part(name, x) for name, x in there.items()}


def plain(params: Params, dtype) -> Params:
    """Stacked weights whose matrices are not quantised: these themselves, or the
    numbers that they stand for.

    Args:
      dtype: of matrices that were quantised.
    """
    layers = params["layers"]
    if not are_quantised(layers):
        return params
    known = {
        name: x for name, x in layers.items() if name.removesuffix("_scale") in SUMMED
    }
    rest = {name: x for name, x in layers.items() if name not in known}
    made = jax.lax.map(lambda layer: plain_matrices(layer, dtype), known)
    return params | {"layers": rest | made}


def fuse(
    layer: Params, bits: Bits | None = None, kv_copies: int = 1, dtype=None
) -> Params:
    """One unstacked layer's weights to fused; see `decoder.Layer`.

    Args:
      layer: its matrices may be quantised. Those of int8 stay so if `bits` is that.
      bits: quantise the matrices; norms and biases stay as they are.
      kv_copies: copies of every key/value head: see `partitioning.kv_copies`.
      dtype: of matrices that were quantised and are not any more.
    """
    rest = dict(layer)
    for end in ("", "_scale", "_bias"):
        if f"q{end}" in rest:
            parts = (rest.pop(f"{name}{end}") for name in "qkv")
            rest[f"qkv{end}"] = _join_heads(*parts, kv_copies)
        if f"gate{end}" in rest:
            parts = [rest.pop(f"{name}{end}") for name in ("gate", "up")]
            rest[f"gate_up{end}"] = jnp.stack(parts, axis=-2)
    if kv_copies > 1 and "k_norm" in rest and rest["k_norm"]["scale"].ndim == 2:
        rest["k_norm"] = {"scale": jnp.repeat(rest["k_norm"]["scale"], kv_copies, 0)}
    if not (are_quantised(rest) and bits and rest["o"].dtype == DTYPES[bits]):
        rest = plain_matrices(rest, dtype)
        rest = matrices(rest, bits) if bits else rest
    if bits and "moe" in rest:
        moe = _quantised(rest["moe"], {"gate": [1], "up": [1], "down": [2]}, bits)
        if "shared" in moe:
            of_shared = {"gate": [0], "up": [0], "down": [1]}
            moe["shared"] = _quantised(moe["shared"], of_shared, bits)
        rest["moe"] = moe
    return rest


def _quantised(layer: Params, summed: dict[str, list[int]], bits: Bits) -> Params:
    """The layer with values and scales for those of its matrices that `summed` names,
    with the axes that a product sums over."""
    found = dict(layer)
    for name, axes in summed.items():
        if name in layer:
            values, scales = quantise(layer[name], DTYPES[bits], axes)
            found |= {name: values, f"{name}_scale": scales}
    return found


def _join_heads(q: Array, k: Array, v: Array, kv_copies: int) -> Array:
    """For every copy of a key/value head its queries, then its key and value."""
    k, v = (jnp.repeat(x, kv_copies, axis=-2) for x in (k, v))
    q = q.reshape(*k.shape[:-1], -1, k.shape[-1])
    return jnp.concatenate([q, k[..., None, :], v[..., None, :]], axis=-2)


def fuse_adapters(
    arch: Architecture, adapters: Params, lora: Lora, dtype, kv_copies: int = 1
) -> Params:
    """The adapters of one layer for a fused layer, which has them as "lora".

    Those of matrices that are joined become one, of as many ranks as they have
    together: a beside a, and b below b, each in its own columns and 0 elsewhere.

    Args:
      adapters: by module, unstacked.
      dtype: of products; b is multiplied by the scale before it is rounded to it.
      kv_copies: as for `fuse`.
    """
    pairs = scaled(adapters, lora, dtype)
    N, K, H, F = (
        arch.num_heads,
        arch.num_kv_heads,
        arch.head_dim,
        arch.intermediate_size,
    )

    def joined(shapes: dict[str, tuple[int, ...]], join: Callable) -> Params | None:
        there = [pairs.pop(name, None) for name in shapes]
        total = sum(pair["a"].shape[-1] for pair in there if pair)
        if not total:
            return None
        start, blocks = 0, []
        for shape, pair in zip(shapes.values(), there, strict=True):
            block = jnp.zeros((total, *shape), dtype)
            if pair:
                block = jax.lax.dynamic_update_slice_in_dim(block, pair["b"], start, 0)
                start += len(pair["b"])
            blocks.append(block)
        a = jnp.concatenate([pair["a"] for pair in there if pair], axis=-1)
        return {"a": a, "b": join(*blocks)}

    found = {
        "qkv": joined(
            {"q": (N, H), "k": (K, H), "v": (K, H)},
            functools.partial(_join_heads, kv_copies=kv_copies),
        ),
        "gate_up": joined(
            {"gate": (F,), "up": (F,)}, lambda *halves: jnp.stack(halves, axis=-2)
        ),
    }
    return {name: pair for name, pair in found.items() if pair} | pairs


def fused_adapter_axes(lora: Lora) -> Params:
    """A tuple of axis names for every array of `fuse_adapters`."""
    ends = {
        "qkv": (("embed",), ("kv_heads", None, "head")),
        "o": (("heads", "head"), ("embed",)),
        "gate_up": (("embed",), (None, "mlp")),
        "down": (("mlp",), ("embed",)),
    }
    of_joined = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}
    there = {of_joined.get(module, module) for module in lora.modules}
    return {
        name: {"a": (*inputs, "rank"), "b": ("rank", *outputs)}
        for name, (inputs, outputs) in ends.items()
        if name in there
    }


def output_matrix(params: Params) -> Float[Array, "V D"]:
    """What hidden states are multiplied with to give logits: [V, D]."""
    return params["output" if "output" in params else "embedding"]


def logits(
    arch: Architecture, params: Params, hidden: Float[Array, "*B D"]
) -> Float[Array, "*B V"]:
    """float32 scores of the next token, before any temperature."""
    matrix = output_matrix(params).astype(hidden.dtype)
    scores = jnp.einsum(
        "...d,vd->...v", hidden, matrix, preferred_element_type=jnp.float32
    )
    if arch.logit_softcap is not None:
        scores = arch.logit_softcap * jnp.tanh(scores / arch.logit_softcap)
    return scores


def forward(
    arch: Architecture,
    params: Params,
    tokens: Int[Array, "R T"],
    positions: Int[Array, "R T"],
    sequence_ids: Int[Array, "R T"],
    *,
    dtype,
    remat: Remat = "none",
    attention: PackedAttention = packed,
    loop: Loop = scan,
    lookup: Lookup = take,
    experts: Experts = alone,
    shard: Shard = anywhere,
    lora: Lora | None = None,
    replay: UInt[Array, "R T L k"] | None = None,
    counted: Bool[Array, "R T"] | None = None,
    record: bool = False,
) -> Float[Array, "R T D"] | tuple[Float[Array, "R T D"], RouterUse]:
    """Final hidden states (after the last norm) of packed rows.

    Args:
      params: stacked; with adapters, see `lora`, if that is given.
      positions: of each token within its sequence, from 0.
      sequence_ids: tokens see only their own sequence; padding has an id of its own.
      dtype: of activations, and of weights inside matrix products.
      remat: what the backward pass computes again, see `Remat`.
      attention: see `flash.choose`.
      loop: over the layers, see `layer_loop.choose`.
      lookup: of token embeddings, see `embedding.choose`.
      experts: how they are computed, see `expert_parallel.choose`.
      shard: lays out activations by the names of their axes, such as
        `sharding.rules.Partition.constrain`.
      lora: what adapters `params` has.
      replay: experts to which tokens are to go, see `TrainBatch.routes`.
      counted: tokens of which is told how the routers of all layers spread them over
        experts, which then comes beside the hidden states. Layers run in `scan` where
        they would run in `in_place`.
      record: with `counted`, tell also which experts every token went to.
    """
    params, adapters, beside = _taken_apart(params, lora, dtype)
    decoder = model(arch, params, stacked=True)
    tables = decoder.rotary_tables(positions)
    scaled = are_quantised(params["layers"])
    axes = logical_axes(arch, scaled=scaled)["layers"]
    windows = sorted(set(arch.window_of_layer), key=str)

    def looking_back(window):
        def attend_rows(q, k, v):
            return attention(
                q,
                k,
                v,
                sequence_ids,
                positions,
                window=window,
                scale=arch.attention_scale,
                softcap=arch.attention_softcap,
            )

        return attend_rows

    def layer_of(run: range):
        routed, of_run = arch.has_experts(run.start), slice(run.start, run.stop)
        there = {name: x for name, x in axes.items() if in_layer(name, routed)}
        names = jax.tree.leaves([there, beside], is_leaf=lambda x: isinstance(x, tuple))
        ropes = jnp.array(arch.rope_of_layer[of_run], jnp.int32)
        kinds = [windows.index(window) for window in arch.window_of_layer[of_run]]
        kinds = jnp.array(kinds, jnp.int32)
        graph = _layer_graph(arch, routed, scaled)
        before = sum(map(arch.has_experts, range(run.start)))
        return functools.partial(layer, graph, names, ropes, kinds, before)

    def layer(graph, names, ropes, kinds, before, carried, weights, i):
        x, *uses = carried if counted is not None else (carried,)

        def router(moe, logits, bias):
            own = routes = route(moe, logits, bias)
            if replay is not None:
                given = jax.lax.dynamic_index_in_dim(replay, before + i, 2, False)
                routes = replayed(moe, logits, own, given)
            if uses:
                kept = uses[0].routes
                here = use_of(logits, routes, own.chosen, counted)
                uses[0] = jax.tree.map(jnp.add, uses[0]._replace(routes=None), here)
                if record:
                    here = recorded(routes.chosen, moe)
                    kept = jax.lax.dynamic_update_index_in_dim(
                        kept, here, before + i, 2
                    )
                    uses[0] = uses[0]._replace(routes=kept)
            return routes

        @jax.named_scope("attention")
        def attend_rows(q, k, v):
            attends = [looking_back(window) for window in windows]
            if len(attends) == 1:
                return attends[0](q, k, v), None
            return jax.lax.switch(kinds[i], attends, q, k, v), None

        with jax.named_scope("layer"):
            # Weights come together here, layer by layer, where they are split only to
            # need less memory.
            leaves, form = jax.tree.flatten(weights)
            leaves = [
                shard(w, *(None if name in GATHERED else name for name in axes[1:]))
                for w, axes in zip(leaves, names, strict=True)
            ]
            weights, adapters = jax.tree.unflatten(form, leaves)
            table = _pick(tables, ropes, i)
            x, _ = nnx.merge(graph, nnx.State(weights))(
                x, table, attend_rows, shard, adapters, experts, router
            )
        return (x, *uses) if uses else x

    x = shard(decoder.embed(tokens, dtype, shard, lookup), "rows", "residual", None)
    if counted is not None:
        if arch.moe is None:
            raise ValueError(f"a {arch.model_type} model has no experts to count")
        none = jnp.zeros((len(tokens), arch.moe.num_experts))
        use = RouterUse(none, none, none[:, 0], none[:, 0])
        if record:
            count = sum(map(arch.has_experts, range(arch.num_layers)))
            shape, dtype = (
                (*tokens.shape, count, arch.moe.top_k),
                routes_dtype(arch.moe),
            )
            use = use._replace(routes=jnp.zeros(shape, dtype))
        x, loop = (x, use), _carries_more(loop)
    for run in arch.runs:
        made = layer_of(run)
        if remat != "none":
            # Only without a loop could XLA find what is computed again in what was
            # before.
            policy = (_POLICIES if lora is None else _NAMED_POLICIES)[remat]
            made = jax.checkpoint(made, policy=policy, prevent_cse=loop is unrolled)
        weights = _layers_of(arch, params["layers"], run)
        some = adapters
        if len(arch.runs) > 1:
            some = jax.tree.map(lambda x, run=run: x[run.start : run.stop], adapters)
        x = loop(made, x, (weights, some))
    x, *uses = x if counted is not None else (x,)
    hidden = shard(decoder.norm(x), "rows", "tokens", None)
    return (hidden, *uses) if uses else hidden


def _carries_more(loop: Loop) -> Loop:
    return scan if loop is in_place else loop


def _taken_apart(
    params: Params, lora: Lora | None, dtype
) -> tuple[Params, Params | None, Params | None]:
    """The base, and the adapters of its layers with the names of their axes."""
    layers = dict(params["layers"])
    if (layers.pop("lora", None) is None) != (lora is None):
        raise ValueError("weights have adapters if and only if lora is given")
    if lora is None:
        return params, None, None
    return (
        params | {"layers": layers},
        scaled(of_layers(params), lora, dtype),
        of_layers(adapter_axes(lora)),
    )


def _is_dot(primitive, *_, **params) -> bool:
    """Whether `dots` keeps the result: a product with weights, or flash attention."""
    if primitive.name == "dot_general":
        _, (batch, _) = params["dimension_numbers"]
        return not batch
    named = primitive.name == "name" and params["name"] == PRODUCT
    return named or "attention" in f"{primitive.name} {params.get('name')}"


def _is_named(primitive, *_, **params) -> bool:
    """`_is_dot` where adapters add to products: these, with what is added, and not the
    two terms of each."""
    return primitive.name != "dot_general" and _is_dot(primitive, **params)


def _named_to_host(primitive, *inputs, **params):
    """`_is_named`, with the products in the host's memory."""
    if primitive.name == "name":
        return _OFFLOAD_NAMED(primitive, *inputs, **params)
    return _is_named(primitive, *inputs, **params)


def _to_host(primitive, *inputs, **params):
    """`_is_dot`, with the products in the host's memory."""
    if primitive.name == "dot_general":
        return _OFFLOAD_DOTS(primitive, *inputs, **params)
    return _named_to_host(primitive, *inputs, **params)


_OFFLOAD_DOTS = jax.checkpoint_policies.offload_dot_with_no_batch_dims(
    "device", "pinned_host"
)
_OFFLOAD_NAMED = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=[PRODUCT],
    offload_src="device",
    offload_dst="pinned_host",
)
_POLICIES = {"dots": _is_dot, "full": None, "offload": _to_host}
_NAMED_POLICIES = {"dots": _is_named, "full": None, "offload": _named_to_host}


def _pick(tables: list[RotaryTable], table_of_layer, i) -> RotaryTable:
    """The table of layer i; one that rotates by nothing stands for None."""
    if len(tables) == 1:
        return tables[0]
    given = next(table for table in tables if table is not None)
    still = (jnp.ones_like(given[0]), jnp.zeros_like(given[1]))
    filled = [still if table is None else table for table in tables]
    return jax.tree.map(lambda *parts: jnp.stack(parts)[table_of_layer[i]], *filled)


@functools.cache
def _abstract(
    arch: Architecture,
    stacked: bool,
    fused: bool = False,
    scaled: bool = False,
    dtype: Any = jnp.float32,
) -> Decoder:
    layout = {"stacked": stacked, "fused": fused, "scaled": scaled}
    return nnx.eval_shape(lambda: Decoder(arch, Init(nnx.Rngs(0), dtype), **layout))


@functools.cache
def _layer_graph(arch: Architecture, routed: bool, scaled: bool) -> nnx.GraphDef:
    """What makes one layer of a kind of its parameters."""

    def make() -> Layer:
        init = Init(nnx.Rngs(0), jnp.float32)
        return Layer.one(arch, init, False, scaled, routed)

    return nnx.graphdef(nnx.eval_shape(make))


def model(arch: Architecture, params: Params, *, stacked: bool = False) -> Decoder:
    """The module that holds `params`, in whichever layout they are."""
    has = params["layers"] if stacked else params["layers"][0]
    graph = nnx.graphdef(_abstract(arch, stacked, "qkv" in has, are_quantised(has)))
    return nnx.merge(graph, nnx.State(params))
