"""The reward model of a run: frozen weights on a mesh, and what they say of responses.

model = RewardModel(config, source, mesh)
scores = model.score(prompts, completions)
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Float32, Int

from jaxrl_llm import models
from jaxrl_llm.algorithms import masked
from jaxrl_llm.algorithms import update as updates
from jaxrl_llm.config.parsing import ConfigError
from jaxrl_llm.config.schema import Config
from jaxrl_llm.data import packing
from jaxrl_llm.data.rows import TrainBatch
from jaxrl_llm.data.types import Completion, Prompt
from jaxrl_llm.models import Checkpoint, Classifier
from jaxrl_llm.rewards import RewardFunction
from jaxrl_llm.roles.policy import COMPILER_OPTIONS, attention, layout, partition
from jaxrl_llm.sharding import processes


class RewardModel:
    """What a response is worth by a decoder with a head of one number: its value after
    the last token of prompt and response, a stop token included.

    The model reads the very tokens that the policy read and wrote. It has to have the
    policy's vocabulary, and to understand the policy's chat template: prompts are not
    rendered again with one of its own.

    Args:
      source: of the policy's initial weights.
      mesh: axes of `mesh.AXES`, such as "data", "fsdp" and "tensor".

    Raises:
      ConfigError: there is no such model, or it does not fit the policy's, or `mesh`.
    """

    name = "reward_model"
    """In metrics and errors."""

    def __init__(self, config: Config, source: Checkpoint, mesh: Mesh):
        self.config, self.mesh = config, mesh
        self._source = _open(config, source)
        self.arch, section = self._source.arch, config.reward.model
        self.weight, self._dtype = section.weight, jnp.dtype(section.dtype)
        self._axes = models.critic_axes(self.arch)
        self._partition = partition(
            config,
            "reward.model.mesh",
            self.arch,
            models.abstract_critic(self.arch),
            self._axes,
            mesh,
            section.rules,
        )
        micro_batch_size = section.micro_batch_size or config.actor.micro_batch_size
        self._layout = layout(config, self._partition, micro_batch_size)
        self._rows = self._partition.sharding("rows", "tokens")
        self._score = jax.jit(
            self._scores,
            out_shardings=NamedSharding(mesh, P()),
            compiler_options=COMPILER_OPTIONS,
        )

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]
    ) -> Float32[np.ndarray, "P G"]:
        """One number per response. All processes call it with the same ones.

        Never more responses at a time than a training step has, so that held-out
        questions, which may be many, need no more memory.

        Args:
          completions: G of them for every prompt, by sample.
        """
        config, params = self.config, self._params()
        most = config.data.train_batch_size * config.rollout.n
        together, found = max(1, most // len(completions[0])), []
        for i in range(0, len(prompts), together):
            groups = completions[i : i + together]
            unknown = np.zeros((len(groups), len(groups[0])), np.float32)
            rows = packing.make_rows(
                prompts[i : i + together], groups, unknown, layout=self._layout
            )
            scores = self._score(params, processes.place(rows, self._rows))
            found.append(processes.fetch(scores).reshape(unknown.shape))
        return np.concatenate(found)

    def as_function(self, scores: list[float]) -> RewardFunction:
        """A reward function that returns these scores, whatever it is asked."""
        return RewardFunction(
            name=self.name, weight=self.weight, function=lambda completion_ids: scores
        )

    def abstract_params(self) -> Any:
        """Shapes, dtypes and shardings of the weights."""
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            models.abstract_critic(self.arch, dtype=self._dtype),
            self._partition.shardings(self._axes),
        )

    def memory(self, batch: TrainBatch) -> Any:
        """The compiler's memory analysis of scoring these sequences.

        Args:
          batch: on the host; laid out for this mesh or for another.
        """
        own = packing.take(batch, range(batch.num_sequences), layout=self._layout)
        rows = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._rows), own
        )
        lowered = self._score.lower(self.abstract_params(), rows)
        return lowered.compile().memory_analysis()

    def _scores(self, params: Any, rows: TrainBatch) -> Float[Array, " S"]:
        """The value after the last token of every sequence, in micro-batches."""

        def part(params, rows, _):
            ids = rows.sequence_ids
            where = is_last(ids), ids, rows.num_sequences
            return masked.sequence_sum(self._values(params, rows), *where), ()

        found, _ = updates.accumulate(
            part, params, rows, (), self._layout.micro_batch_size
        )
        return found

    def _values(self, params: Any, rows: TrainBatch) -> Float[Array, "R T"]:
        section = self.config.reward.model
        return models.values(
            self.arch,
            params,
            rows.tokens,
            rows.positions,
            rows.sequence_ids,
            dtype=self._dtype,
            attention=attention(
                self._partition, section.dtype, section.attention, rows
            ),
            loop=models.choose_loop(self.mesh, section.unroll),
            shard=self._partition.constrain,
        )

    @functools.cached_property
    def _kept(self) -> Any:
        """The weights, where they wait."""
        params = self._source.load(
            dtype=self._dtype, shardings=self._partition.shardings(self._axes)
        )
        if not self.config.reward.model.offload:
            return params
        return _moved(params, "pinned_host")

    def _params(self) -> Any:
        """The weights on the devices."""
        if not self.config.reward.model.offload:
            return self._kept
        return _moved(self._kept, "device")


def is_last(sequence_ids: Int[Array, "R T"]) -> Bool[Array, "R T"]:
    """Whether a token is the last of its sequence, none of which is split over rows."""
    after = jnp.pad(sequence_ids[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    return (sequence_ids >= 0) & (sequence_ids != after)


def _moved(params: Any, memory: str) -> Any:
    return jax.tree.map(
        lambda x: jax.device_put(x, x.sharding.with_memory_kind(memory)), params
    )


def _open(config: Config, source: Checkpoint) -> Classifier:
    """The checkpoint of the reward model, if it can judge what the policy says."""
    section = config.reward.model
    key = f"reward.model.path {section.path}"
    try:
        found = models.open_classifier(section.path, revision=section.revision)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from error
    arch, wanted = found.arch, source.arch.vocab_size
    if arch.vocab_size != wanted:
        raise ConfigError(
            f"{key} has {arch.vocab_size} tokens in its vocabulary, the policy "
            f"{wanted}; they must read the same tokens"
        )
    if found.tokenizer is not None:
        own, given = found.tokenizer.get_vocab(), source.tokenizer.get_vocab()
        for text in sorted(own.keys() & given.keys()):
            if own[text] != given[text]:
                raise ConfigError(
                    f"{key}: {text!r} is token {own[text]}, of the policy "
                    f"{given[text]}; they must read the same tokens"
                )
    needed = config.data.max_prompt_length + config.rollout.max_response_length
    if needed > arch.max_positions:
        raise ConfigError(
            f"{key} has {arch.max_positions} positions, but data.max_prompt_length + "
            f"rollout.max_response_length is {needed}"
        )
    return found
