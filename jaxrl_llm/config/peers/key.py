"""One key of another trainer's configuration, and where to look it up."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Key:
    """What a key of another trainer is here."""

    here: str | None
    """The dotted key here, or two joined by " and "; None if there is none."""
    note: str = ""
    """What is different, or what to do instead."""

    @property
    def targets(self) -> tuple[str, ...]:
        """The dotted keys here."""
        return tuple(self.here.split(" and ")) if self.here else ()


@dataclass(frozen=True)
class Peer:
    """Another trainer and its keys."""

    title: str
    """Its name as its authors write it."""
    version: str
    """The version that the names were read from."""
    keys: Mapping[str, Key]
    """By the dotted name there."""

    def says(self, name: str) -> str:
        """One sentence about a key of `keys`."""
        key = self.keys[name]
        if key.here is None:
            return f"{self.title}'s {name} has no counterpart here; {key.note}"
        verb = "are" if len(key.targets) > 1 else "is"
        note = f" ({key.note})" if key.note else ""
        return f"{self.title}'s {name} {verb} {key.here} here{note}"
