"""Reward models and DPO as tasks of the offline loop, which learn from pairs."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from jaxrl_llm import models
from jaxrl_llm.algorithms.preference import BradleyTerry, Dpo, DpoSettings
from jaxrl_llm.algorithms.update import TrainState
from jaxrl_llm.config.schema_offline import (
    DpoConfig,
    PairsLearnerConfig,
    RmConfig,
)
from jaxrl_llm.data import preferences
from jaxrl_llm.data.examples import Example, ExampleSets
from jaxrl_llm.data.packing import Layout
from jaxrl_llm.data.rows import TrainBatch
from jaxrl_llm.data.types import Prompt
from jaxrl_llm.models.apply import Params
from jaxrl_llm.roles.learner import OutputsOf
from jaxrl_llm.roles.sharded_model import ModelSettings, ShardedModel
from jaxrl_llm.sharding import processes
from jaxrl_llm.tracking.step_metrics import accuracy_name
from jaxrl_llm.training import checkpoint, settings
from jaxrl_llm.training.experience import Observe
from jaxrl_llm.training.offline_build import OfflineJob, Reading, Task
from jaxrl_llm.training.reference_logprobs import Stored
from jaxrl_llm.training.sft import SftTask, load, policy_of, recipe


class RewardModelTask(Task):
    """A decoder with a head of one number learns which answer of two is the better."""

    name = "rm"

    def read(
        self, config: RmConfig, reading: Reading, held_out: Sequence[Prompt]
    ) -> ExampleSets:
        """Rows in TRL's preference format; answers need not share a prompt."""
        return _read(config, reading, held_out, needs_prompt=False)

    def objective(self, config: RmConfig) -> BradleyTerry:
        """The chosen answer's score is to be above the rejected one's."""
        return BradleyTerry(config.center_rewards_coefficient)

    def model(
        self,
        config: RmConfig,
        arch: models.Architecture,
        on: jax.sharding.Mesh,
        rows: Layout,
    ) -> tuple[ShardedModel, OutputsOf]:
        """A decoder with a value head, whose values are learned from.

        The bias of the head stays 0: no preference says anything about it, and the
        files of a reward model have no place for one.
        """
        learner = config.learner
        how = ModelSettings(
            dtype=learner.dtype,
            remat=learner.remat,
            attention=learner.attention,
            unroll=learner.unroll,
            rules=learner.rules,
            rows=_shared(rows, learner),
            **settings.adapters(learner.lora),
        )
        keys = settings.keys("learner.mesh", "learner")
        model = ShardedModel(arch, on, how, head="value", keys=keys)

        def values(params: Params, rows: TrainBatch, frozen: Params) -> Any:
            params = model.laid_out(params, frozen)
            bias = jax.lax.stop_gradient(params["bias"])
            return model.values(params | {"bias": bias}, rows)

        return model, values

    def weights(
        self, model: ShardedModel, source: models.WeightSource, dtype: Any
    ) -> Params:
        """The decoder's of the model to start from; the head starts at 0."""
        decoder = source.load(
            dtype=jnp.dtype(dtype), shardings=model.decoder_shardings()
        )
        return jax.tree.map(
            lambda x, s: x if x.sharding == s else processes.place(x, s),
            models.init_critic(model.arch, decoder),
            model.base_shardings(),
        )

    def rows(self, chosen: Sequence[Example], layout: Layout) -> TrainBatch:
        """Both answers of a pair in a row."""
        return preferences.make_rows(chosen, layout)

    def inputs(
        self, source: models.Checkpoint, data: ExampleSets
    ) -> dict[str, dict[str, str]]:
        """Digests of the pairs."""
        return _inputs(data)

    def score(self, metrics: Mapping[str, float]) -> float | None:
        """The share of held-out pairs that it tells right."""
        return metrics.get("val-core/all/rm/accuracy")

    def save(self, job: OfflineJob, params: Params, step: int) -> None:
        """A `...ForSequenceClassification`, in place of an older one, with the
        tokenizer and a card."""
        checkpoint.save_weights(
            job.config.output_dir,
            job.source,
            params,
            recipe(job.config, step),
            job.config.learner.dtype,
            write=models.save_classifier,
        )


class DpoTask(SftTask):
    """A language model learns to prefer one answer to another more than a reference
    does, which is the model that the run begins with."""

    name = "dpo"

    def read(
        self, config: DpoConfig, reading: Reading, held_out: Sequence[Prompt]
    ) -> ExampleSets:
        """Rows in TRL's preference format."""
        return _read(config, reading, held_out, needs_prompt=True)

    def objective(self, config: DpoConfig) -> Dpo:
        """The weighted sum of the losses."""
        kinds = config.loss_type
        return Dpo(
            DpoSettings(
                loss_type=kinds,
                loss_weights=config.loss_weights or (1.0,) * len(kinds),
                beta=config.beta,
                label_smoothing=config.label_smoothing,
            )
        )

    def model(
        self,
        config: DpoConfig,
        arch: models.Architecture,
        on: jax.sharding.Mesh,
        rows: Layout,
    ) -> tuple[ShardedModel, OutputsOf]:
        """A policy, whose log-probabilities are learned from."""
        policy = policy_of(config, arch, on, _shared(rows, config.learner))
        return policy, policy.logprobs

    def rows(self, chosen: Sequence[Example], layout: Layout) -> TrainBatch:
        """Both answers of a pair in a row, with what `begun` found of them."""
        return preferences.make_rows(chosen, layout, reference=True)

    def inputs(
        self, source: models.Checkpoint, data: ExampleSets
    ) -> dict[str, dict[str, str]]:
        """Digests of the pairs and of the reference's weights."""
        return _inputs(data) | {"model": {"the weights": source.fingerprint()}}

    def begun(
        self,
        job: OfflineJob,
        state: TrainState,
        step: int,
        waiting: Observe,
        say: Callable[[str], Any],
    ) -> OfflineJob:
        """The job with the reference's log-probabilities of all pairs: those that are
        stored in output_dir, or else computed and stored there.

        Raises:
          ConfigError: those stored are of other pairs or of another model, and the run
            is to go on.
        """
        told = {name: job.inputs[name] for name in ("train", "val", "model")}
        stored = Stored(Path(job.config.output_dir), told)
        pairs = [*job.data.train, *job.data.val]
        anew = not step or job.config.trainer.resume == "force"
        found = stored.read([_answered(pair) for pair in pairs], may_differ=anew)
        if found is None:
            if step:
                say(f"{stored.path} has nothing that fits and is made anew")
            with waiting("log-probabilities of the reference"):
                found = self._reference(job, state, step, pairs)
            stored.write(found)
        known = [
            preferences.with_reference(pair, logprobs)
            for pair, logprobs in zip(pairs, found, strict=True)
        ]
        count = len(job.data.train)
        data = dataclasses.replace(job.data, train=known[:count], val=known[count:])
        return dataclasses.replace(job, data=data)

    def _reference(
        self, job: OfflineJob, state: TrainState, step: int, pairs: Sequence[Example]
    ) -> list[Float32[np.ndarray, " _"]]:
        """What the model that the run begins with says of each pair's answers."""
        learner, size = job.learner, job.config.data.train_batch_size
        if step or job.config.learner.lora:  # the state may have learned since
            weights = learner.first_weights()
        else:
            weights = learner.weights(state)
        found = []
        for i in range(0, len(pairs), size):
            rows = job.rows(pairs[i : i + size])
            scored = learner.model.score(weights, rows)
            found += preferences.by_pair(rows, scored, len(pairs[i : i + size]))
        return found

    def score(self, metrics: Mapping[str, float]) -> float | None:
        """The accuracy of answers, or the share of held-out pairs of which the policy
        prefers the chosen answer more than the reference does."""
        name = accuracy_name(list(metrics)) or "val-core/all/rewards/accuracies"
        return metrics.get(name)


def _read(
    config: RmConfig | DpoConfig,
    reading: Reading,
    held_out: Sequence[Prompt],
    needs_prompt: bool,
) -> ExampleSets:
    reader = functools.partial(preferences.read, needs_prompt=needs_prompt)
    return load(config, reading, held_out, reader)


def _shared(rows: Layout, learner: PairsLearnerConfig) -> Layout:
    """With the prompt of a pair once in its row, if that is wanted."""
    return dataclasses.replace(rows, share_prompts=learner.share_prompts)


def _inputs(data: ExampleSets) -> dict[str, dict[str, str]]:
    return {
        "train": preferences.digests(data.train),
        "val": preferences.digests(data.val),
    }


def _answered(pair: Example) -> int:
    """Tokens of both answers."""
    return sum(len(episode.tokens) for episode in pair.episodes)
