"""Adapters of a model on a mesh: before training, and added to their matrices."""

import functools

import jax
import jax.numpy as jnp

from jaxrl_llm import models
from jaxrl_llm.models import WeightSource
from jaxrl_llm.models.apply import Params
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
        self._lora = model.settings.lora
        shardings = model.param_shardings()
        matrices = self.matrices(shardings.get("decoder", shardings))
        self._merge = jax.jit(
            functools.partial(models.merged, lora=self._lora),
            out_shardings=matrices,
            compiler_options=COMPILER_OPTIONS,
        )

    def __call__(self, base: Params, adapters: Params) -> Params:
        """The decoder's weights: `models.merged`."""
        found = self._merge(self.matrices(base), adapters)
        return base | {"layers": base["layers"] | found["layers"]}

    def matrices(self, base: Params) -> Params:
        """What of a tree like the decoder's weights is made anew."""
        layers = base["layers"]
        return {"layers": {name: layers[name] for name in self._lora.modules}}

    def lower(self, base: Params, adapters: Params) -> jax.stages.Lowered:
        """The program, from shapes, dtypes and shardings."""
        return self._merge.lower(self.matrices(base), adapters)
