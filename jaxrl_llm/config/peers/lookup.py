"""Which key of another trainer somebody may have meant."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from jaxrl_llm.config.peers.key import Peer
from jaxrl_llm.config.peers.openrlhf import OPENRLHF
from jaxrl_llm.config.peers.trl import TRL
from jaxrl_llm.config.peers.trl_offline import TRL_OFFLINE
from jaxrl_llm.config.peers.tunix import TUNIX
from jaxrl_llm.config.peers.verl import VERL

PEERS = {"verl": VERL, "trl": TRL, "openrlhf": OPENRLHF, "tunix": TUNIX}
"""By the name that their pages have."""

OFFLINE = {"trl": TRL_OFFLINE}
"""Those with trainers that learn from rows, for the verbs that do."""


def find(
    path: str, anywhere: bool = False, peers: Mapping[str, Peer] = PEERS
) -> tuple[Peer, str] | None:
    """The trainer, and its whole name of the key, that a path stands for.

    Besides the whole name its end counts, such as actor.grad_clip for veRL's
    actor_rollout_ref.actor.grad_clip, and a name without sections in any section, such
    as actor.learning_rate for TRL's learning_rate.

    Args:
      anywhere: the last word of a name counts too, such as lr.
      peers: trainers to look at.
    """
    last = path.rpartition(".")[2]
    ways = [
        lambda name: name == path,
        lambda name: name.endswith(f".{path}"),
        lambda name: name == last,
    ]
    if anywhere:
        ways.append(lambda name: name.endswith(f".{last}"))
    for fits in ways:
        for peer in peers.values():
            for name in peer.keys:
                if fits(name):
                    return peer, name
    return None


def advice(path: str, value: Any, peers: Mapping[str, Peer] = PEERS) -> dict[str, str]:
    """What to say about an unknown key, by its path; nothing if no trainer has it.

    A section that only another trainer has, such as actor_rollout_ref, is followed down
    to its keys, each of which gets its own advice.
    """
    if not isinstance(value, Mapping) or path in VERL.keys:
        found = find(path, peers=peers)
        return {path: found[0].says(found[1])} if found else {}
    known = {inner: find(inner, peers=peers) for inner in leaves(value, path)}
    if not any(known.values()):
        return {}
    return {
        inner: found[0].says(found[1]) if found else "unknown key"
        for inner, found in known.items()
    }


def of_offline(known: Iterable[str]) -> dict[str, Peer]:
    """`OFFLINE` with the keys that a verb's configuration has a counterpart of.

    Args:
      known: the dotted path of every key of it.
    """
    known = set(known)
    return {
        name: replace(
            peer,
            keys={k: v for k, v in peer.keys.items() if known.issuperset(v.targets)},
        )
        for name, peer in OFFLINE.items()
    }


def setting(
    name: str,
    value: Any,
    known: Iterable[str],
    peers: Mapping[str, Peer] = PEERS,
) -> str:
    """How a configuration says what somebody gave as an argument of that name.

    Args:
      known: the dotted path of every key here.
    """
    own = [key for key in known if key.rpartition(".")[2] == name]
    if own:
        return f"write {' or '.join(_settings(key, value) for key in own)}"
    found = find(name, anywhere=True, peers=peers)
    if found is None:
        example = _settings("actor.optim.lr", 1e-5)
        return f"whatever a configuration says stands in settings, such as {example}"
    peer, whole = found
    said = peer.says(whole)
    targets = peer.keys[whole].targets
    if len(targets) != 1 or peer.keys[whole].note:
        return f"{said}; settings takes such keys"
    return f"{said}; write {_settings(targets[0], value)}"


def _settings(key: str, value: Any) -> str:
    return f"settings={{{key!r}: {value!r:.80}}}"


def leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """The dotted paths of what is no section, or an empty one."""
    for key, value in tree.items():
        here = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping) and value:
            yield from leaves(value, here)
        else:
            yield here
