"""Whether a run may go on in a directory that holds one: its facts must be the same."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxrl_llm.config import parsing, renamed
from jaxrl_llm.config.names import ConfigError
from jaxrl_llm.config.schema import Config

# Settings a run may go on with changed: they do not change what it has done so far.
_MAY_CHANGE = (
    "output_dir",
    "trainer.",
    "val.",
    "placement.",
    "actor.mesh.",
    "actor.ref_mesh",
    "actor.rules",
    "actor.micro_batch_size",
    "actor.pack_length",
    "actor.share_prompts",
    "actor.remat",
    "actor.attention",
    "actor.offload",
    "actor.unroll",
    "critic.mesh.",
    "critic.rules",
    "critic.micro_batch_size",
    "critic.remat",
    "critic.attention",
    "critic.unroll",
    "reward.model.mesh.",
    "reward.model.rules",
    "reward.model.micro_batch_size",
    "reward.model.offload",
    "reward.model.attention",
    "reward.model.unroll",
    "rollout.mesh.",
    "rollout.max_num_seqs",
    "rollout.decode_chunk",
    "rollout.checksum_freq",
    "rollout.max_mismatch",
    "rollout.vllm.",
)


def check(directory: Path, config: Config) -> None:
    """Raises ConfigError if `directory` holds a run that this one cannot go on.

    The settings may have been stored by an earlier version: a key that it did not have
    counts as its default, and one that has another name now as that (`renamed.FORMER`).
    """
    stored = settings_of(directory)
    if stored is None:
        return
    if config.trainer.resume == "never":
        raise ConfigError(
            f"trainer.resume is never, but output_dir {directory} holds a run; choose "
            "another output_dir"
        )
    before, now = facts(stored), facts(config)
    changed = [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(_MAY_CHANGE)
    ]
    if changed:
        raise ConfigError(
            f"output_dir {directory} holds a run with other settings; choose another "
            f"output_dir, or go on with the same: {'; '.join(changed)}"
        )


def settings_of(directory: Path) -> Config | None:
    """The settings of the run in `directory`, as this version reads them; None if there
    is none.

    Raises:
      ConfigError: they cannot be read, or a key that is gone changed something.
    """
    path = directory / "config.yaml"
    if not path.exists():
        return None
    values = renamed.translated(parsing.read(path), str(path))
    return parsing.parse(values, str(path))


def facts(config: Config) -> dict[str, Any]:
    """What is compared when a run goes on: every setting by its dotted key."""
    return _flat(config.model_dump(mode="json"))


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings, by dotted path."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    return {
        path: leaf
        for key, value in tree.items()
        for path, leaf in _flat(value, f"{prefix}.{key}" if prefix else key).items()
    }
