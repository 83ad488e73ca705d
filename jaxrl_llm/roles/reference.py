"""The policy that a KL term compares with: the initial one, or a later copy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxrl_llm.data.rows import TrainBatch
from jaxrl_llm.models import WeightSource
from jaxrl_llm.models.apply import Params
from jaxrl_llm.roles.policy import Policy
from jaxrl_llm.roles.sharded_model import to_devices, to_host
from jaxrl_llm.sharding import reshard
from jaxrl_llm.sharding import transfer_plan as plan


class Reference:
    """A frozen policy. Its weights have the compute dtype, which is all that they are
    multiplied in.

    Args:
      policy: on the reference's mesh.
      source: of the weights before training.
      offload: weights wait in the host's memory while nothing is scored.
    """

    def __init__(self, policy: Policy, source: WeightSource, *, offload: bool = False):
        self.policy, self.offload = policy, offload
        self._source = source
        self._copy = jax.jit(
            lambda params: jax.tree.map(
                lambda x: jnp.copy(x.astype(policy.settings.dtype)), params
            ),
            out_shardings=policy.param_shardings(),
        )

    @functools.cached_property
    def initial(self) -> Params:
        """The weights before training, where they wait."""
        return self._put_away(self.read())

    def read(self) -> Params:
        """The weights before training, on the devices."""
        return self._source.load(
            dtype=jnp.dtype(self.policy.settings.dtype),
            shardings=self.policy.param_shardings(),
        )

    def copy_of(self, params: Params) -> Params:
        """A copy of all weights of a policy of this architecture, on whatever mesh,
        where the reference's wait."""
        if jax.tree.leaves(params)[0].sharding.mesh == self.policy.mesh:
            return self._put_away(self._copy(params))
        way = plan.plan(params, self.abstract_params())
        return self._put_away(reshard.reshard(params, way))

    def lower_copy(self) -> jax.stages.Lowered:
        """The program of `copy_of`, of a policy on this mesh."""
        return self._copy.lower(self.policy.abstract_params("float32"))

    def abstract_params(self) -> Params:
        """Shapes, dtypes and shardings of the weights on the devices."""
        return self.policy.abstract_params()

    def score(
        self, batch: TrainBatch, params: Params | None = None
    ) -> Float[np.ndarray, "R T"]:
        """Log-probabilities of all response tokens.

        Args:
          batch: on the host; laid out for this mesh or for another.
          params: of `read` or `copy_of`; the initial ones if not given.
        """
        params = self.initial if params is None else params
        return self.policy.score(to_devices(params) if self.offload else params, batch)

    def _put_away(self, params: Params) -> Params:
        return to_host(params) if self.offload else params
