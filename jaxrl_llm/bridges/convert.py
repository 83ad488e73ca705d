"""`jaxrl convert-config`: a file of another trainer's settings to one of ours."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxrl_llm.bridges import foreign, from_trl, from_verl
from jaxrl_llm.config import reader
from jaxrl_llm.config.names import ConfigError
from jaxrl_llm.config.peers.lookup import PEERS

_CONVERTERS = {"verl": from_verl.converted, "trl": from_trl.converted}


def convert(source: Path, target: Path) -> list[str]:
    """Writes `target` and returns what somebody still has to decide.

    `source` is read and never executed: YAML, or a shell script with KEY=VALUE words.
    Whether it is veRL's or TRL's is told by its keys.

    Raises:
      ConfigError: no such file, nothing of veRL's or TRL's in it, or `target` exists.
    """
    given = foreign.read(source)
    draft = _CONVERTERS[_trainer(given, source)](given)
    text = draft.text(source.name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(
            f"{target} exists and is not overwritten; name another file: jaxrl "
            f"convert-config {source} OTHER.yaml"
        ) from None
    if reader.read(target).values != draft.tree():
        raise AssertionError(f"{target} does not say what was meant")
    return draft.open_points()


def _trainer(given: Mapping[str, Any], source: Path) -> str:
    """Whose settings these are: of the trainer that knows most of the keys."""
    known = {
        name: sum(key in peer.keys for key in given) for name, peer in PEERS.items()
    }
    name = max(known, key=lambda name: known[name])
    first = ", ".join([*given][:3])
    if not known[name]:
        raise ConfigError(f"{source}: no settings of veRL or TRL; it has {first}")
    if name not in _CONVERTERS:
        raise ConfigError(
            f"{source}: {first} look like {PEERS[name].title}'s, and only veRL's and "
            f"TRL's settings are converted; docs/from_{name}.md says what each key is"
        )
    return name
