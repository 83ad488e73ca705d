"""What a checkpoint of a run has learned, for others to read."""

from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from jaxrl_llm import models
from jaxrl_llm.config import resume
from jaxrl_llm.config.names import ConfigError
from jaxrl_llm.config.schema import Config
from jaxrl_llm.config.schema_offline import OfflineConfig, RmConfig
from jaxrl_llm.config.schema_training import TrainedConfig
from jaxrl_llm.models.apply import Params
from jaxrl_llm.training import checkpoint, settings, sft
from jaxrl_llm.training.build import read_template
from jaxrl_llm.training.recipe import recipe

Dtype = Literal["bfloat16", "float16", "float32"]


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is RUN/checkpoints/STEP."""
    return (path / "state").is_dir() and (path / "position").is_dir()


def run_of(path: Path) -> Config | OfflineConfig:
    """The settings of the run that a checkpoint is of.

    Raises:
      ConfigError: they are gone.
    """
    run = path.absolute().parent.parent
    found = resume.settings_of(run)
    if found is None:
        raise ConfigError(
            f"{path}: {run} has no config.yaml to say which model it is of"
        )
    return found


def trained_by(config: Config | OfflineConfig) -> TrainedConfig:
    """The section of what a run trains."""
    return config.actor if isinstance(config, Config) else config.learner


def write(path: Path, directory: Path, *, dtype: Dtype | None, merge: bool) -> str:
    """Writes the model of a checkpoint: its weights as a Hugging Face directory; of one
    that trains adapters these, as a directory of PEFT, but a reward model whole.

    Args:
      directory: must not exist, or be empty.
      dtype: of what is written; adapters are float32 and weights bfloat16 if not given.
      merge: write the weights with the adapters added to them.

    Returns:
      What was written.

    Raises:
      ConfigError: there are no adapters to merge, or no settings of the run.
      CheckpointError: the checkpoint is not as it was saved.
    """
    config = run_of(path)
    model, lora = config.model, settings.lora(trained_by(config).lora)
    if merge and lora is None:
        raise ConfigError(f"{path} has no adapters to merge; leave out --merge")
    source = models.open(model.path, revision=model.revision, tokenizer=model.tokenizer)
    if config.data.chat_template_file:
        template = read_template(config.data.chat_template_file)
        source.tokenizer.chat_template = template
    scores = isinstance(config, RmConfig)
    params = checkpoint.read_policy(path, _here(source.arch, lora, scores))
    made = recipe if isinstance(config, Config) else sft.recipe
    how = made(config, int(path.absolute().name))
    if lora is not None and not merge and not scores:
        kind = dtype or "float32"
        checkpoint.write_adapters(directory, source, params, lora, how, kind)
        return f"adapters, {kind}"
    if lora is not None:
        base = _base(source, trained_by(config))
        if scores:
            base = models.init_critic(source.arch, base)["decoder"]
            params["decoder"] = models.merged(base, params["decoder"], lora)
        else:
            params = models.merged(base, params, lora)
    kind = dtype or "bfloat16"
    card = models.model_card(source.origin, how)
    save = models.save_classifier if scores else models.save
    save(directory, source.arch, params, source.tokenizer, dtype=kind, card=card)
    return f"{'a reward model' if scores else 'weights'}, {kind}"


def _base(source: models.WeightSource, section: TrainedConfig) -> Params:
    """What adapters were trained beside, in float32: the numbers that a quantised base
    stands for."""
    bits = section.lora.quantization
    if bits is None:
        return source.load()
    one = SingleDeviceSharding(jax.devices()[0])
    axes = models.logical_axes(source.arch, scaled=True)
    shardings = jax.tree.map(
        lambda _: one, axes, is_leaf=lambda x: isinstance(x, tuple)
    )
    made = models.Quantising(source, bits)
    found = made.load(dtype=jnp.dtype(section.dtype), shardings=shardings)
    found = models.plain(found, jnp.dtype(section.dtype))
    return jax.tree.map(lambda x: x.astype(jnp.float32), found)


def _here(arch: models.Architecture, lora: models.Lora | None, scores: bool) -> Any:
    """What of the model is trained, to be read onto one device.

    Args:
      scores: whether it has a value head in place of the output matrix.
    """
    shapes = (models.abstract_critic if scores else models.abstract_params)(arch)
    if lora is not None:
        adapters = models.abstract_adapters(arch, lora)
        shapes = shapes | {"decoder": adapters} if scores else adapters
    one = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), shapes
    )
