"""Which devices each role computes on, and in which mesh."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from jaxrl_llm.sharding import mesh

EVERYWHERE = "all devices"
"""The group of all roles where no groups are named."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """What one role wants."""

    axes: Mapping[str, int]
    """Devices along each axis of its mesh; one may be -1: what is left."""
    group: str = EVERYWHERE
    """The devices it is placed on."""
    key: str = "mesh"
    """What errors call `axes`."""
    by_process: bool = False
    """Each process computes by itself, on its own devices."""


def make_meshes(
    places: Mapping[str, Place], groups: Mapping[str, Sequence[jax.Device]]
) -> dict[str, Mesh]:
    """The mesh of each role over the devices of its group.

    Raises:
      ValueError: a mesh does not fit its group.
    """
    made = {}
    for role, place in places.items():
        devices = groups[place.group]
        named = place.group != EVERYWHERE
        where = f"{place.key} on {place.group}" if named else place.key
        try:
            axes = mesh.fill(place.axes, len(devices))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        make = mesh.make_by_process if place.by_process else mesh.make
        made[role] = make(axes, devices)
    return made
