"""Supervised fine-tuning as a task of the offline loop."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_llm import models
from jaxrl_llm.algorithms.sft import Sft
from jaxrl_llm.config.schema_offline import OfflineConfig, SftConfig
from jaxrl_llm.data import examples
from jaxrl_llm.data.examples import ExampleSets, Format, Read
from jaxrl_llm.data.packing import Layout
from jaxrl_llm.data.sources import Source
from jaxrl_llm.data.types import Prompt
from jaxrl_llm.models.apply import Params
from jaxrl_llm.roles.learner import OutputsOf
from jaxrl_llm.roles.policy import Policy, PolicySettings
from jaxrl_llm.roles.sharded_model import ShardedModel
from jaxrl_llm.tracking.step_metrics import accuracy_name
from jaxrl_llm.training import checkpoint, settings
from jaxrl_llm.training.offline_build import OfflineJob, Reading, Task


class SftTask(Task):
    """A language model learns the tokens of completions."""

    name = "sft"

    def read(
        self, config: SftConfig, reading: Reading, held_out: Sequence[Prompt]
    ) -> ExampleSets:
        """Rows in TRL's formats."""
        data = config.data
        return load(
            config,
            reading,
            held_out,
            completion_key=data.completion_key,
            messages_key=data.messages_key,
            text_key=data.text_key,
            completion_only=data.completion_only_loss,
            assistant_only=data.assistant_only_loss,
        )

    def objective(self, config: SftConfig) -> Sft:
        """The mean loss of the tokens to learn."""
        return Sft(loss_type=config.loss_type)

    def model(
        self,
        config: SftConfig,
        arch: models.Architecture,
        on: jax.sharding.Mesh,
        rows: Layout,
    ) -> tuple[ShardedModel, OutputsOf]:
        """A policy, whose log-probabilities are learned from."""
        policy = policy_of(config, arch, on, rows, likeliest=True)
        return policy, policy.logprobs

    def weights(
        self, model: ShardedModel, source: models.WeightSource, dtype: Any
    ) -> Params:
        """Those of the model to start from."""
        return source.load(dtype=jnp.dtype(dtype), shardings=model.base_shardings())

    def score(self, metrics: Mapping[str, float]) -> float | None:
        """The accuracy of answers, or the negative held-out loss."""
        if name := accuracy_name(list(metrics)):
            return metrics[name]
        loss = metrics.get("val-core/all/sft/loss")
        return None if loss is None else -loss

    def save(self, job: OfflineJob, params: Params, step: int) -> None:
        """In place of an older one, with the tokenizer and a card."""
        config = job.config
        how = recipe(config, step), config.learner.dtype
        checkpoint.save_weights(config.output_dir, job.source, params, *how)


def load(
    config: OfflineConfig,
    reading: Reading,
    held_out: Sequence[Prompt],
    reader: Callable[..., Read] = examples.read,
    **form: Any,
) -> ExampleSets:
    """The rows that a configuration of an offline run names; see `examples.load`.

    Args:
      reader: makes examples of one source's rows.
      form: fields of `Format` that belong to a task.
    """
    data = config.data
    shared = Format(
        chat_template=data.chat_template,
        stops=reading.stops,
        end=reading.end,
        max_length=data.max_length,
        overlong=data.overlong,
        **form,
    )
    return examples.load(
        Source(**data.train.model_dump()),
        Source(**data.val.model_dump()) if data.val else None,
        reading.encoder,
        shared,
        held_out=held_out,
        template=reading.template,
        reader=reader,
    )


def policy_of(
    config: OfflineConfig,
    arch: models.Architecture,
    on: jax.sharding.Mesh,
    rows: Layout,
    *,
    likeliest: bool = False,
) -> Policy:
    """A language model of an offline run on its mesh.

    Raises:
      ValueError: the model or its rows cannot be split evenly over the mesh.
    """
    learner = config.learner
    how = PolicySettings(
        dtype=learner.dtype,
        remat=learner.remat,
        attention=learner.attention,
        unroll=learner.unroll,
        rules=learner.rules,
        rows=rows,
        **settings.adapters(learner.lora),
        likeliest=likeliest,
    )
    return Policy(arch, on, how, keys=settings.keys("learner.mesh", "learner"))


def recipe(config: OfflineConfig, step: int) -> dict[str, Any]:
    """How an offline run trained its model, for the card of what it exports: settings
    that say what was learned from what, by their keys.

    Args:
      step: after which the weights were saved.
    """
    data, optim = config.data, config.learner.optim
    found = {
        "task": config.task,
        "step": step,
        "trainer.total_training_steps": config.trainer.total_training_steps,
        "data.train.path": data.train.path,
        "data.train_batch_size": data.train_batch_size,
        "data.max_length": data.max_length,
        "learner.optim.name": optim.name,
        "learner.optim.lr": optim.lr,
    }
    if lora := config.learner.lora:
        found["learner.lora"] = lora.model_dump(exclude={"path"})
    if hasattr(config, "loss_type"):
        found["loss_type"] = config.loss_type
    return found
