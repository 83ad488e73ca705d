"""The policy that a KL term compares with: the initial one, or a later copy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxrl_llm import models
from jaxrl_llm.data.rows import TrainBatch
from jaxrl_llm.models import WeightSource
from jaxrl_llm.models.apply import Params
from jaxrl_llm.roles.policy import Policy
from jaxrl_llm.roles.sharded_model import to_devices, to_host
from jaxrl_llm.sharding import reshard
from jaxrl_llm.sharding import transfer_plan as plan


class Reference:
    """A frozen policy. Its weights have the compute dtype, which is all that they are
    multiplied in; adapters are float32, and rounded as those of the policy are.

    Where only adapters are trained, the base is never changed and need not be a copy:
    what the reference keeps besides is adapters, or nothing, for a base without any.

    Args:
      policy: on the reference's mesh, with adapters or without.
      source: of what the reference keeps before training; None: nothing.
      base: source of what never changes, if there is that; such as `models.ReadOnce`,
        which the policy reads too.
      offload: what it keeps waits in the host's memory while nothing is scored.
    """

    def __init__(
        self,
        policy: Policy,
        source: WeightSource | None,
        *,
        base: WeightSource | None = None,
        offload: bool = False,
    ):
        self.policy, self.base, self.offload = policy, base, offload
        self._source = source
        shardings, _ = self._split(policy.param_shardings())
        like, _ = self._split(policy.abstract_params())
        self._copy = jax.jit(
            lambda params: jax.tree.map(
                lambda x, to: jnp.copy(x.astype(to.dtype)), params, like
            ),
            out_shardings=shardings,
        )

    def _split(self, tree: Params) -> tuple[Params, Params]:
        """What the reference keeps of a tree like all weights, and the rest."""
        if self.base is None:
            return tree, {}
        return models.split_params(tree, models.is_adapter)

    @functools.cached_property
    def initial(self) -> Params:
        """What it keeps before training, where that waits."""
        return self._put_away(self.read())

    @functools.cached_property
    def frozen(self) -> Params:
        """The base, if that never changes. Reads it."""
        if self.base is None:
            return {}
        _, shardings = self._split(self.policy.param_shardings())
        dtype = jnp.dtype(self.policy.settings.dtype)
        return self.base.load(dtype=dtype, shardings=shardings)

    def read(self) -> Params:
        """What it keeps before training, on the devices."""
        if self._source is None:
            return {}
        shardings, _ = self._split(self.policy.param_shardings())
        if self.base is not None:
            return self._source.load(shardings=shardings)
        dtype = jnp.dtype(self.policy.settings.dtype)
        return self._source.load(dtype=dtype, shardings=shardings)

    def copy_of(self, params: Params) -> Params:
        """A copy of what is trained of a policy of this architecture, on whatever mesh,
        where the reference's waits."""
        if jax.tree.leaves(params)[0].sharding.mesh == self.policy.mesh:
            return self._put_away(self._copy(params))
        way = plan.plan(params, self.abstract_params())
        return self._put_away(reshard.reshard(params, way))

    def lower_copy(self) -> jax.stages.Lowered:
        """The program of `copy_of`, of a policy on this mesh."""
        return self._copy.lower(self._split(self.policy.abstract_params("float32"))[0])

    def abstract_params(self) -> Params:
        """Shapes, dtypes and shardings of what it keeps, on the devices."""
        return self._split(self.policy.abstract_params())[0]

    def abstract_frozen(self) -> Params:
        """Shapes, dtypes and shardings of `frozen`."""
        return self._split(self.policy.abstract_params())[1]

    def abstract_weights(self) -> Params:
        """Shapes, dtypes and shardings of all that it is computed with."""
        return models.merge(self.abstract_params(), self.abstract_frozen())

    def score(
        self, batch: TrainBatch, params: Params | None = None
    ) -> Float[np.ndarray, "R T"]:
        """Log-probabilities of all response tokens.

        Args:
          batch: on the host; laid out for this mesh or for another.
          params: of `read` or `copy_of`; the initial ones if not given.
        """
        params = self.initial if params is None else params
        if self.offload:
            params = to_devices(params)
        return self.policy.score(models.merge(params, self.frozen), batch)

    def _put_away(self, params: Params) -> Params:
        return to_host(params) if self.offload else params
