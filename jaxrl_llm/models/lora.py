"""Low-rank adapters: what is trained beside weights that stay as they are.

    y = x W + scale * (x a) b,    scale = alpha / rank, with rslora alpha / sqrt(rank)

Adapters are a tree of their own that `models.merge` joins with the base,

    {"layers": {"lora": {"q": {"a": [L, D, r], "b": [L, r, N, H]}, ...}}}

stacked as the base is, with a letter for each axis as in `architecture`, r = rank. An a
has the axes of its module's input, a b those of the output. `forward` scales b once.

Source: Hu et al. 2021 (arXiv:2106.09685); rslora: Kalajdzievski 2023
(arXiv:2312.03732).
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from jaxrl_llm.models.architecture import Architecture
from jaxrl_llm.models.quantised import are_quantised, plain_matrices

Params = Any
_EXACT = jax.lax.Precision.HIGHEST
_D, _N, _K, _F = ("embed",), ("heads", "head"), ("kv_heads", "head"), ("mlp",)
_ENDS = {
    "q": (_D, _N),
    "k": (_D, _K),
    "v": (_D, _K),
    "o": (_N, _D),
    "gate": (_D, _F),
    "up": (_D, _F),
    "down": (_F, _D),
}
"""Axes of the input and of the output of each matrix."""
MODULES = tuple(_ENDS)
"""The matrices of a layer, each of which can have an adapter."""
_SPLIT_RANK = "split_rank"
GATHERED = ("embed", "expert_embed", _SPLIT_RANK)
"""Axes that are split over devices only to need less memory."""


def modules_of(arch: Architecture) -> tuple[str, ...]:
    """Those of `MODULES` that can have adapters: not what experts take the place of."""
    return MODULES if arch.moe is None else ("q", "k", "v", "o")


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Which adapters there are.

    Raises:
      ValueError: a field that makes no adapter.
    """

    rank: int = 32
    alpha: float = 32.0
    modules: tuple[str, ...] = MODULES
    """Some of `MODULES`."""
    rslora: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}; an adapter has at least rank 1")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha is {self.alpha}; it must be positive")
        strangers = [name for name in self.modules if name not in MODULES]
        if strangers or not self.modules or len(set(self.modules)) < len(self.modules):
            raise ValueError(
                f"modules are {self.modules}; name one or more of {', '.join(MODULES)}"
            )

    @property
    def scale(self) -> float:
        """What (x a) b is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter, by its name: "layers.lora.q.a"."""
    return "lora" in name.split(".")


def adapter_axes(lora: Lora) -> Params:
    """A tuple of axis names for every array of the adapters: those of the base, and
    "rank", which is "split_rank" where there is no axis "embed" to split."""

    def rank(ends):
        return "rank" if ends == _D else _SPLIT_RANK

    return _tree(
        {
            name: {
                "a": ("layers", *inputs, rank(inputs)),
                "b": ("layers", rank(outputs), *outputs),
            }
            for name, (inputs, outputs) in _ENDS.items()
            if name in lora.modules
        }
    )


def abstract_adapters(arch: Architecture, lora: Lora, *, dtype=jnp.float32) -> Params:
    """Shapes and dtypes of `init_adapters`, without computing anything.

    Raises:
      ValueError: they are on matrices that the model does not have in every layer.
    """
    if missing := [name for name in lora.modules if name not in modules_of(arch)]:
        raise ValueError(
            f"modules has {', '.join(missing)}, but a {arch.model_type} model has "
            "experts there, whose adapters are not supported; name some of "
            f"{', '.join(modules_of(arch))}"
        )
    sizes = {
        "layers": arch.num_layers,
        "rank": lora.rank,
        _SPLIT_RANK: lora.rank,
        "embed": arch.hidden_size,
        "heads": arch.num_heads,
        "kv_heads": arch.num_kv_heads,
        "head": arch.head_dim,
        "mlp": arch.intermediate_size,
    }
    return jax.tree.map(
        lambda names: jax.ShapeDtypeStruct([sizes[name] for name in names], dtype),
        adapter_axes(lora),
        is_leaf=lambda x: isinstance(x, tuple),
    )


def init_adapters(arch: Architecture, lora: Lora, key: PRNGKeyArray) -> Params:
    """Adapters that change nothing yet, float32: b is 0, and a is uniform within
    1 / sqrt(inputs) of 0, which is PEFT's `kaiming_uniform_(a, sqrt(5))`."""
    keys = dict(zip(MODULES, jax.random.split(key, len(MODULES)), strict=True))

    def drawn(name, a, b):
        most = math.prod(a.shape[1:-1]) ** -0.5
        return {
            "a": jax.random.uniform(keys[name], a.shape, a.dtype, -most, most),
            "b": jnp.zeros(b.shape, b.dtype),
        }

    found = of_layers(abstract_adapters(arch, lora))
    return _tree({name: drawn(name, **pair) for name, pair in found.items()})


class NewAdapters(NamedTuple):
    """Adapters that have learned nothing, as a source of weights."""

    arch: Architecture
    lora: Lora
    seed: int

    def load(self, *, dtype: Any = jnp.float32, shardings: Any = None) -> Params:
        """Those of `init_adapters`, the same in any layout."""

        def make() -> Params:
            made = init_adapters(self.arch, self.lora, jax.random.key(self.seed))
            return jax.tree.map(lambda x: x.astype(dtype), made)

        return jax.jit(make, out_shardings=shardings)()


def of_layers(params: Params) -> Params:
    """The adapters of all layers, by module."""
    return params["layers"]["lora"]


def scaled(adapters: Params, lora: Lora, dtype: Any) -> Params:
    """The adapters of `of_layers` as products in `dtype` take them: b times the
    scale."""
    return {
        name: {
            "a": pair["a"].astype(dtype),
            "b": (lora.scale * pair["b"].astype(jnp.float32)).astype(dtype),
        }
        for name, pair in adapters.items()
    }


def merged(params: Params, adapters: Params, lora: Lora, dtype: Any = None) -> Params:
    """The base with its adapters added to it, in the base's layout and dtypes.

        W' = W + scale * a b

    Sums are float32, a layer at a time, then rounded once. What has no adapter is the
    base's own array.

    Args:
      params: stacked, without adapters. Of a quantised base all matrices are made anew,
        without scales.
      dtype: of the matrices of a quantised base.
    """
    layers, pairs = params["layers"], of_layers(adapters)
    known = remade(layers, lora)

    def of_layer(here):
        base, pairs = here
        kind = {name: x.dtype for name, x in base.items()}
        if are_quantised(base):
            base = plain_matrices(base, jnp.float32)
            kind = dict.fromkeys(base, dtype)
        return {
            name: (
                _sum(name, x, pairs[name], lora.scale) if name in pairs else x
            ).astype(kind[name])
            for name, x in base.items()
        }

    rest = {name: x for name, x in layers.items() if name not in known}
    return params | {"layers": rest | jax.lax.map(of_layer, (known, pairs))}


def remade(layers: Params, lora: Lora) -> Params:
    """What of the base's layers `merged` makes matrices of."""
    if not are_quantised(layers):
        return {name: layers[name] for name in lora.modules}
    names = [f"{name}{end}" for name in MODULES for end in ("", "_scale")]
    return {name: layers[name] for name in names}


def _sum(name: str, weight: Array, pair: Params, scale: float) -> Array:
    """One matrix of one layer, float32."""
    a, b = (pair[end].astype(jnp.float32) for end in "ab")
    # A matrix begins with its axis "embed", which is here that of a or that of b.
    if _ENDS[name][1] == _D:
        delta = jnp.einsum("...r,rd->d...", a, b, precision=_EXACT)
    else:
        delta = jnp.tensordot(a, b, 1, precision=_EXACT)
    return weight.astype(jnp.float32) + scale * delta


def _tree(modules: Params) -> Params:
    return {"layers": {"lora": modules}}
