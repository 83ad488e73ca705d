"""Which stored tensor holds which part of which parameter, in checkpoint files.

A file keeps one matrix [out, in] per layer, and per expert. Here weights are [in, out],
heads have an axis of their own, and layers and experts are stacked; every device reads
only its own part.
"""

import functools
import math
import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.models.apply import Params, abstract_params, in_layer, init
from jaxrl_llm.models.architecture import Architecture
from jaxrl_llm.models.moe import SELECTION_BIAS
from jaxrl_llm.models.quantised import SUMMED, Bits, are_quantised, matrices
from jaxrl_llm.sharding import processes, rules

Slices = tuple[slice, ...]
_CHUNK = 2**18  # fits a cache


@runtime_checkable
class Tensors(Protocol):
    """Named arrays in one or several files."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors, by name."""
        ...

    def read(self, name: str, part: Slices) -> np.ndarray:
        """A part of a tensor."""
        ...

    def where(self, name: str) -> str:
        """The file that holds a tensor, or should."""
        ...


@runtime_checkable
class WeightSource(Protocol):
    """A model whose weights have not been read or made yet."""

    arch: Architecture

    def load(self, *, dtype: Any = jnp.float32, shardings: Any = None) -> Params:
        """The weights, stacked, every device only what it will hold."""
        ...


class RandomWeights(NamedTuple):
    """A model that has learned nothing, for measurements."""

    arch: Architecture

    def load(self, *, dtype: Any = jnp.float32, shardings: Any = None) -> Params:
        """Weights of `init`, always the same."""
        make = jax.jit(
            lambda: init(self.arch, jax.random.key(0), dtype=dtype),
            out_shardings=shardings,
        )
        return make()


class ReadOnce:
    """Weights that nobody changes: whoever asks for the same layout gets the same
    arrays, as long as anybody holds them."""

    def __init__(self, source: WeightSource):
        self.arch, self._source = source.arch, source
        self._known: dict[Any, list[weakref.ref[jax.Array]]] = {}

    def load(self, *, dtype: Any = jnp.float32, shardings: Any = None) -> Params:
        """The weights, stacked, every device only what it will hold."""
        leaves, form = jax.tree.flatten(shardings)
        key = jnp.dtype(dtype), form, tuple(leaves)
        there = [known() for known in self._known.get(key, [])]
        if not there or any(array is None for array in there):
            found = self._source.load(dtype=dtype, shardings=shardings)
            read, form = jax.tree.flatten(found)
            there = [
                new if old is None else old
                for old, new in zip(there or read, read, strict=True)
            ]
            self._known[key] = [weakref.ref(array) for array in there]
        return jax.tree.unflatten(form, there)


class Quantising(NamedTuple):
    """Weights in the form that is asked for: where `shardings` has scales, matrices of
    layers are of 8 bits. They are quantised one kind after the other, once read."""

    source: WeightSource
    bits: Bits = "int8"

    @property
    def arch(self) -> Architecture:
        """The source's."""
        return self.source.arch

    def load(self, *, dtype: Any = jnp.float32, shardings: Any = None) -> Params:
        """The weights, stacked, every device only what it will hold.

        Args:
          dtype: in which they are read; of those that are not quantised.
        """
        if shardings is None or not are_quantised(shardings["layers"]):
            return self.source.load(dtype=dtype, shardings=shardings)
        wanted = shardings["layers"]
        plain = {name: x for name, x in wanted.items() if not name.endswith("_scale")}
        params = self.source.load(dtype=dtype, shardings=shardings | {"layers": plain})
        layers = dict(params.pop("layers"))
        for name in SUMMED.keys() & layers.keys():
            both = (name, f"{name}_scale")
            made = jax.jit(
                functools.partial(jax.lax.map, lambda x: matrices(x, self.bits)),
                out_shardings={end: wanted[end] for end in both},
            )
            layers |= made({name: layers.pop(name)})
        return params | {"layers": layers}


class Stored(NamedTuple):
    """How a file keeps a parameter (of one layer)."""

    huggingface: str
    gguf: str
    axes: tuple[tuple[int, ...], ...]
    """For each dimension of the stored tensor the parameter's axes folded into it."""


_VECTOR = ((0,),)
_MATRIX = ((1,), (0,))
_MATRIX_IN = ((0,), (1,))
_HEADS_OUT = ((1, 2), (0,))
_HEADS_BIAS = ((0, 1),)
_HEADS_IN = ((0,), (1, 2))

_LAYER = {
    "attention_norm.scale": Stored(
        "input_layernorm.weight", "attn_norm.weight", _VECTOR
    ),
    "q": Stored("self_attn.q_proj.weight", "attn_q.weight", _HEADS_OUT),
    "k": Stored("self_attn.k_proj.weight", "attn_k.weight", _HEADS_OUT),
    "v": Stored("self_attn.v_proj.weight", "attn_v.weight", _HEADS_OUT),
    "o": Stored("self_attn.o_proj.weight", "attn_output.weight", _HEADS_IN),
    "q_bias": Stored("self_attn.q_proj.bias", "attn_q.bias", _HEADS_BIAS),
    "k_bias": Stored("self_attn.k_proj.bias", "attn_k.bias", _HEADS_BIAS),
    "v_bias": Stored("self_attn.v_proj.bias", "attn_v.bias", _HEADS_BIAS),
    "o_bias": Stored("self_attn.o_proj.bias", "attn_output.bias", _VECTOR),
    "q_norm.scale": Stored("self_attn.q_norm.weight", "attn_q_norm.weight", _VECTOR),
    "k_norm.scale": Stored("self_attn.k_norm.weight", "attn_k_norm.weight", _VECTOR),
    "mlp_norm.scale": Stored(
        "post_attention_layernorm.weight", "ffn_norm.weight", _VECTOR
    ),
    "gate": Stored("mlp.gate_proj.weight", "ffn_gate.weight", _MATRIX),
    "up": Stored("mlp.up_proj.weight", "ffn_up.weight", _MATRIX),
    "down": Stored("mlp.down_proj.weight", "ffn_down.weight", _MATRIX_IN),
    "gate_bias": Stored("mlp.gate_proj.bias", "ffn_gate.bias", _VECTOR),
    "up_bias": Stored("mlp.up_proj.bias", "ffn_up.bias", _VECTOR),
    "down_bias": Stored("mlp.down_proj.bias", "ffn_down.bias", _VECTOR),
}
# With norms after attention and feed-forward too, a name means another norm.
_POST_NORMS = {
    "post_attention_norm.scale": Stored(
        "post_attention_layernorm.weight", "post_attention_norm.weight", _VECTOR
    ),
    "mlp_norm.scale": Stored(
        "pre_feedforward_layernorm.weight", "ffn_norm.weight", _VECTOR
    ),
    "post_mlp_norm.scale": Stored(
        "post_feedforward_layernorm.weight", "post_ffw_norm.weight", _VECTOR
    ),
}
_WHOLE = {
    "embedding": Stored("model.embed_tokens.weight", "token_embd.weight", ((0,), (1,))),
    "norm.scale": Stored("model.norm.weight", "output_norm.weight", _VECTOR),
    "output": Stored("lm_head.weight", "output.weight", ((0,), (1,))),
}
_SHARED = {
    f"moe.shared.{name}": Stored(f"mlp.shared_experts.{name}_proj.weight", "", axes)
    for name, axes in {"gate": _MATRIX, "up": _MATRIX, "down": _MATRIX_IN}.items()
}
_MOE = _SHARED | {
    "moe.router": Stored("mlp.gate.weight", "", _MATRIX),
    "moe.selection_bias": Stored("mlp.gate.e_score_correction_bias", "", _VECTOR),
    "moe.shared_gate": Stored("mlp.shared_expert_gate.weight", "", ((), (0,))),
}
# A file has the matrices of every expert, or of all experts in one tensor.
_EXPERT = {
    "moe.gate": Stored("mlp.experts.{}.gate_proj.weight", "", _MATRIX),
    "moe.up": Stored("mlp.experts.{}.up_proj.weight", "", _MATRIX),
    "moe.down": Stored("mlp.experts.{}.down_proj.weight", "", _MATRIX_IN),
}
_TOGETHER = {
    "moe.gate": ("mlp.experts.gate_up_proj", ((0,), (2,), (1,)), (0, 2)),
    "moe.up": ("mlp.experts.gate_up_proj", ((0,), (2,), (1,)), (1, 2)),
    "moe.down": ("mlp.experts.down_proj", ((0,), (1,), (2,)), (0, 1)),
}
"""Name, axes, and which of how many parts of the tensor's second dimension it is."""
_NAMES = {
    "qwen2_moe": {"mlp.shared_experts.": "mlp.shared_expert."},
    "mixtral": {
        "mlp.": "block_sparse_moe.",
        "gate_proj.": "w1.",
        "up_proj.": "w3.",
        "down_proj.": "w2.",
    },
}
"""What a family calls parts of the experts' names."""
EMBEDDING = _WHOLE["embedding"].huggingface
_PREFIX = {"huggingface": "model.layers.{}.", "gguf": "blk.{}."}


class Place(NamedTuple):
    """One stored tensor, or a part of it, and the part of a parameter that it holds."""

    name: str
    path: str
    index: tuple[int, ...]
    """The layer and the expert: where in the parameter's first dimensions it is."""
    axes: tuple[tuple[int, ...], ...]
    """The tensor's, see `Stored`."""
    part: tuple[int, int] = (0, 1)
    """Which of how many equal parts of the tensor's second dimension it is."""

    def dtype(self, dtype: Any) -> Any:
        """The dtype that it is stored in where others are in `dtype`."""
        return jnp.float32 if self.path.endswith(SELECTION_BIAS) else dtype


def together(arch: Architecture, names: Iterable[str]) -> bool:
    """Whether a checkpoint with tensors of these names has all experts in one."""
    wanted, _, _ = _TOGETHER["moe.down"]
    return arch.moe is not None and any(name.endswith(wanted) for name in names)


def _renamed(arch: Architecture, name: str, together: bool) -> str:
    """A name as the family has it. Only files of transformers have experts in one, by
    its own names."""
    if together and arch.model_type == "mixtral":
        return name
    for ours, theirs in _NAMES.get(arch.model_type, {}).items():
        name = name.replace(ours, theirs)
    return name


def places(arch: Architecture, form: str, together: bool = False) -> list[Place]:
    """Every tensor of a checkpoint, in a reader's order.

    Args:
      form: "huggingface" or "gguf".
      together: whether all experts of a layer are in one tensor.
    """
    layer = _LAYER | (_POST_NORMS if arch.post_norms else {})
    if arch.qk_norm_together:
        for name in ("q_norm.scale", "k_norm.scale"):
            layer[name] = layer[name]._replace(axes=_HEADS_BIAS)
    paths = flat(abstract_params(arch))
    of_layers = [p.removeprefix("layers.") for p in paths if p.startswith("layers.")]
    found = [
        Place(getattr(stored, form), path, (), stored.axes)
        for path, stored in _WHOLE.items()
        if path in paths
    ]
    rows: Counter[str] = Counter()
    for i in range(arch.num_layers):
        prefix = _PREFIX[form].format(i)
        there = [path for path in of_layers if in_layer(path, arch.has_experts(i))]

        def place(path, name, axes, *expert, prefix=prefix, **part):
            at = rows[path], *expert
            return Place(prefix + name, f"layers.{path}", at, axes, **part)

        for path, stored in layer.items():
            if path in there:
                found.append(place(path, getattr(stored, form), stored.axes))
        if arch.has_experts(i):
            found += _of_experts(arch, there, place, together)
        rows.update(there)
    return found


def _of_experts(
    arch: Architecture,
    there: Sequence[str],
    place: Callable[..., Place],
    together: bool,
) -> Iterator[Place]:
    """What holds the experts of a layer."""
    for path, stored in _MOE.items():
        if path in there:
            name = _renamed(arch, stored.huggingface, together)
            yield place(path, name, stored.axes)
    if together:
        for path, (name, axes, part) in _TOGETHER.items():
            yield place(path, name, axes, part=part)
        return
    for expert in range(arch.moe.num_experts):
        for path, stored in _EXPERT.items():
            name = _renamed(arch, stored.huggingface, together).format(expert)
            yield place(path, name, stored.axes, expert)


def flat(params: Params) -> dict[str, Any]:
    """{"layers.q": leaf, ...}."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(p, simple=True, separator="."): x for p, x in leaves}


def read(
    arch: Architecture,
    tensors: Tensors,
    form: str,
    *,
    dtype: Any,
    shardings: Any,
    ignored: Callable[[str], bool],
) -> Params:
    """Stacked parameters, each device reading what it will hold.

    Args:
      shardings: a sharding for every parameter; None: uncommitted, on one device.
      ignored: whether a tensor that no parameter needs is no error.

    Raises:
      ValueError: a tensor is missing, unexpected or of the wrong shape, or a parameter
        cannot be split evenly; nothing has been read then.
    """
    abstract = abstract_params(arch, dtype=dtype)
    if shardings is not None:
        rules.check_divides(abstract, shardings)
    check(arch, tensors, form, ignored)
    stored = places(arch, form, together(arch, tensors.shapes()))
    return assemble(abstract, stored, tensors, shardings)


def assemble(
    abstract: Params, stored: Sequence[Place], tensors: Tensors, shardings: Any
) -> Params:
    """Parameters of these shapes and dtypes, from the tensors that hold them.

    Args:
      stored: for each parameter one tensor, or one for every layer, in their order.
      shardings: as in `read`.

    Raises:
      ValueError: a tensor holds NaN or an infinity.
    """
    of_path: dict[str, list[Place]] = {}
    for place in stored:
        of_path.setdefault(place.path, []).append(place)

    def parameter(path: str, leaf: jax.ShapeDtypeStruct, sharding) -> jax.Array:
        def part(index: Slices) -> np.ndarray:
            return _part(tensors, of_path[path], leaf, index)

        if sharding is None:
            return jnp.asarray(part((slice(None),) * leaf.ndim))
        return jax.make_array_from_callback(leaf.shape, sharding, part)

    leaves = flat(abstract)
    wanted = [None] * len(leaves) if shardings is None else jax.tree.leaves(shardings)
    arrays = [parameter(*x, s) for x, s in zip(leaves.items(), wanted, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(abstract), arrays)


def write(
    arch: Architecture, params: Params, dtype: Any
) -> Iterator[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]]:
    """`disassemble` to the tensors of a Hugging Face checkpoint."""
    return disassemble(params, places(arch, "huggingface"), dtype)


def disassemble(
    params: Params, stored: Sequence[Place], dtype: Any
) -> Iterator[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]]:
    """Name, shape and value of every tensor that holds a part of `params`.

    A value comes to the host, in `dtype`, when it is asked for: by all processes, if
    the parameters are spread over several.
    """
    leaves = flat(params)
    for place in stored:
        leaf, shape = leaves[place.path], stored_shape(place, leaves)

        def value(place=place, leaf=leaf, shape=shape) -> np.ndarray:
            axes = tuple(axis for group in place.axes for axis in group)
            dtype_here = jnp.dtype(place.dtype(dtype))
            how = {"axes": axes, "shape": shape, "dtype": dtype_here}
            return processes.fetch(_as_stored(leaf, place.index, **how))

        yield place.name, shape, value


def programs(
    arch: Architecture, params: Params, dtype: Any
) -> dict[str, Callable[[], jax.stages.Lowered]]:
    """What lowers each program that `write` needs, by its name.

    Args:
      params: shapes, dtypes and shardings of stacked parameters.
    """
    leaves = flat(params)
    found: dict[Any, tuple[str, Callable[[], jax.stages.Lowered]]] = {}
    for place in places(arch, "huggingface"):
        leaf, shape = leaves[place.path], stored_shape(place, leaves)
        axes = tuple(axis for group in place.axes for axis in group)
        how = {"axes": axes, "shape": shape, "dtype": jnp.dtype(place.dtype(dtype))}
        first = (0,) * len(place.index)
        lower = functools.partial(_as_stored.lower, leaf, first, **how)
        kind = leaf.shape, leaf.dtype, leaf.sharding, axes, len(first), how["dtype"]
        found.setdefault(kind, (f"{place.path} as it is saved", lower))
    return dict(found.values())


@functools.partial(jax.jit, static_argnames=("axes", "shape", "dtype"))
def _as_stored(x, index, *, axes, shape, dtype):
    for i in index:
        x = jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
    return x.astype(dtype).transpose(axes).reshape(shape)


def check(
    arch: Architecture, tensors: Tensors, form: str, ignored: Callable[[str], bool]
) -> None:
    """Raises ValueError if a tensor is missing, unexpected or of the wrong shape.

    Arguments as in `read`.
    """
    shapes, leaves = tensors.shapes(), flat(abstract_params(arch))
    needed = {place.name: place for place in places(arch, form, together(arch, shapes))}
    for name, place in needed.items():
        if name not in shapes:
            raise ValueError(f"{tensors.where(name)}: tensor {name} is missing")
        shape = stored_shape(place, leaves)
        if shapes[name] != shape:
            raise ValueError(
                f"{tensors.where(name)}: tensor {name} has shape {shapes[name]}; the "
                f"architecture asks for {shape}"
            )
    for name in shapes:
        if name not in needed and not ignored(name):
            raise ValueError(f"{tensors.where(name)}: unexpected tensor {name}")


def stored_shape(place: Place, leaves: Mapping[str, Any]) -> tuple[int, ...]:
    """Shape of the tensor at `place`, which holds a part of one of `leaves`."""
    shape = leaves[place.path].shape[len(place.index) :]
    found = [math.prod(shape[axis] for axis in group) for group in place.axes]
    if place.part != (0, 1):
        found[1] *= place.part[1]
    return tuple(found)


def _part(
    tensors: Tensors, stored: list[Place], leaf: jax.ShapeDtypeStruct, index: Slices
) -> np.ndarray:
    """The part of a parameter that `index` names, put together from its tensors, of
    several layers at a time: to bring axes into order takes longer than to read."""
    bounds = [range(*s.indices(n)) for s, n in zip(index, leaf.shape, strict=True)]
    out = np.empty([len(r) for r in bounds], leaf.dtype)
    count = len(stored[0].index)
    shape, inner = leaf.shape[count:], bounds[count:]
    of_index = {place.index: place for place in stored}

    def fill(at: tuple[int, ...]) -> None:
        place = of_index[tuple(b[i] for b, i in zip(bounds, at, strict=False))]
        row = out[at]
        with np.errstate(over="ignore", invalid="ignore"):  # named below
            row[...] = _layer_part(tensors, place, shape, inner)
        check_finite(row, tensors, place.name)

    wanted = list(np.ndindex(out.shape[:count]))
    if len(wanted) == 1:
        fill(wanted[0])
        return out
    with ThreadPoolExecutor(min(len(wanted), os.cpu_count() or 1)) as pool:
        for _ in pool.map(fill, wanted):
            pass
    return out


def check_finite(x: np.ndarray, tensors: Tensors, name: str) -> None:
    """Raises ValueError if `x`, read from tensor `name`, holds NaN or an infinity."""
    if not _not_finite(x):
        return
    shape = tensors.shapes()[name]
    rows = max(1, _CHUNK // max(1, math.prod(shape[1:])))
    inner = tuple(slice(0, size) for size in shape[1:])
    found = sum(
        _not_finite(tensors.read(name, (slice(i, min(i + rows, shape[0])), *inner)))
        for i in range(0, shape[0], rows)
    )
    what = f"{tensors.where(name)}: tensor {name} has"
    if not found:
        raise ValueError(f"{what} numbers that are infinite as {x.dtype}")
    raise ValueError(
        f"{what} {found} of {math.prod(shape)} numbers that are NaN or infinite"
    )


def _not_finite(x: np.ndarray) -> int:
    """How many numbers are NaN or infinite, those whose exponent is all ones."""
    bits = np.dtype(f"uint{8 * x.dtype.itemsize}")
    ones = np.array(np.inf, x.dtype).view(bits)
    flat = np.ascontiguousarray(x).reshape(-1).view(bits)
    chunks = (flat[i : i + _CHUNK] & ones for i in range(0, flat.size, _CHUNK))
    return sum(
        int(np.count_nonzero(chunk == ones)) for chunk in chunks if chunk.max() == ones
    )


def _layer_part(
    tensors: Tensors, place: Place, shape: tuple[int, ...], bounds: list[range]
) -> np.ndarray:
    """Reads whole inner axes (heads), cuts them, and brings the axes into order."""
    slices, unfolded, cut = [], [], []
    for number, group in enumerate(place.axes):
        if not group:  # a dimension of size 1
            slices.append(slice(0, 1))
            continue
        first, *inner = group
        width = math.prod(shape[axis] for axis in inner)
        part = place.part[0] if number == 1 else 0
        before = part * shape[first] * width
        start, stop = (
            before + edge * width for edge in (bounds[first].start, bounds[first].stop)
        )
        slices.append(slice(start, stop))
        unfolded += [len(bounds[first]), *(shape[axis] for axis in inner)]
        cut.append(slice(None))
        cut += [slice(bounds[axis].start, bounds[axis].stop) for axis in inner]
    folded = [axis for group in place.axes for axis in group]
    x = tensors.read(place.name, tuple(slices)).reshape(unfolded)[tuple(cut)]
    return x.transpose(np.argsort(folded))
