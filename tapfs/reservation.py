"""Reservations: the places that a driver has found for bytes that are about to change."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class Operation(Enum):
    """What a reservation is for."""

    WRITE = "write"
    #: The range must read as zeros afterwards.
    ZERO = "zero"
    #: The range's contents are not needed any more; what can be freed is.
    DISCARD = "discard"


class Placement(NamedTuple):
    """Where the engine puts the bytes of one reserved run.

    `fresh`: the host range reads as zeros already, so zeros need not be written there (the
    engine ignores it under a cipher). `in_place`: the run already belongs to the image and
    keeps its bytes where the request does not cover them; otherwise the engine fills what the
    request leaves open in the run from the old contents of the disk (copy-on-write fill).
    """

    offset: int
    length: int
    host_offset: int
    file: int = 0
    fresh: bool = False
    in_place: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Reservation:
    """Granule-aligned guest range ``[offset, offset + length)`` that is about to change.

    It may be wider than what was asked for, where a commit changes the map of more: nobody else
    writes in it as long as it is open.

    WRITE: the placements cover what was asked for; the engine writes the data there.
    ZERO and DISCARD: the engine makes each placement read as zeros (gives its space back
    where the host can, writes zeros where it must); a range without placement needs nothing
    from the engine. Nothing is visible before `commit`.

    `exact`, of a WRITE: `commit` maps the range to its placements, in place, and changes the map
    nowhere else, so nobody need ask for it again.
    """

    offset: int
    length: int
    operation: Operation
    placements: tuple[Placement, ...]
    exact: bool = False

    @property
    def end(self) -> int:
        """The first byte of the virtual disk after the range."""
        return self.offset + self.length
