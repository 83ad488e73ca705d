"""Adapters of a model on a mesh: before training, and added to their matrices."""

import functools

import jax
import jax.numpy as jnp

from jaxrl_llm import models
from jaxrl_llm.models import WeightSource
from jaxrl_llm.models.apply import Params
from jaxrl_llm.models.lora import MODULES
from jaxrl_llm.roles.sharded_model import COMPILER_OPTIONS, ShardedModel
from jaxrl_llm.sharding import processes


def is_trained(name: str) -> bool:
    """Whether a parameter of a model with adapters is trained, by its name: adapters
    are, and a value head."""
    return models.is_adapter(name) or name in ("weight", "bias")


def before_training(model: ShardedModel, adapters: WeightSource) -> Params:
    """What is trained of a model with adapters: these, and a value head of 0 if it has
    one.

    Args:
      adapters: source of those to start from.
    """
    shardings, _ = models.split_params(model.param_shardings(), is_trained)
    if model.head == "tokens":
        return adapters.load(shardings=shardings)
    head = {"weight": jnp.zeros(model.arch.hidden_size), "bias": jnp.zeros(())}
    return {
        "decoder": adapters.load(shardings=shardings["decoder"]),
        **{name: processes.place(x, shardings[name]) for name, x in head.items()},
    }


class Merging:
    """Adds adapters to the matrices of a decoder, where these lie.

    Args:
      model: with adapters.
    """

    def __init__(self, model: ShardedModel):
        self._lora, dtype = model.settings.lora, jnp.dtype(model.settings.dtype)
        whole = model.abstract_plain()
        layers = whole.get("decoder", whole)["layers"]
        anew = self._lora.modules if model.settings.quantization is None else MODULES
        self.made = {"layers": {name: layers[name] for name in anew}}
        """Shapes, dtypes and shardings of what of the decoder's weights is made
        anew."""
        self._merge = jax.jit(
            functools.partial(models.merged, lora=self._lora, dtype=dtype),
            out_shardings=jax.tree.map(lambda x: x.sharding, self.made),
            compiler_options=COMPILER_OPTIONS,
        )

    def __call__(self, base: Params, adapters: Params) -> Params:
        """The decoder's weights: `models.merged`."""
        read = self._read(base)
        found, layers = self._merge(read, adapters), base["layers"]
        kept = {name: layers[name] for name in layers.keys() - read["layers"].keys()}
        return base | {"layers": kept | found["layers"]}

    def _read(self, base: Params) -> Params:
        """What of the decoder's weights others are made of."""
        return {"layers": models.remade(base["layers"], self._lora)}

    def lower(self, base: Params, adapters: Params) -> jax.stages.Lowered:
        """The program, from shapes, dtypes and shardings."""
        return self._merge.lower(self._read(base), adapters)
