"""Reservations: the places that a driver has found for bytes that are about to change."""

from __future__ import annotations

from enum import Enum

from tapfs.extent import Range
from tapfs.records import NamedTuple, dataclass


class Operation(Enum):
    """What a reservation is for."""

    WRITE = "write"
    #: The range must read as zeros afterwards.
    ZERO = "zero"
    #: The range's contents are not needed any more; what can be freed is.
    DISCARD = "discard"
    #: The range shows the parent again, as if it had never been written. Only an `Uncovering` driver is asked for it.
    UNCOVER = "uncover"


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


class HostSpace(NamedTuple):
    """``[host_offset, host_offset + length)`` of a host file of the image, which may have no space on the host yet.

    `unused`: nothing refers to the range and no plan has written to it, so zeros may be written there.
    """

    host_offset: int
    length: int
    file: int = 0
    unused: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Reservation:
    """Granule-aligned ranges of the disk that are about to change together.

    The ranges ascend and do not overlap. They may be wider than what was asked for, where a commit changes the map of
    more: nobody else writes in them as long as the reservation is open.

    WRITE: the placements ascend and cover what was asked for; the engine writes the data there. A placement lies in
    one of the ranges.
    ZERO and DISCARD: the engine makes each placement read as zeros (gives its space back
    where the host can, writes zeros where it must); a range without placement needs nothing
    from the engine. Nothing is visible before `commit`.

    `exact`, of a WRITE: `commit` maps the ranges to the placements, in place, and changes the map
    nowhere else, so nobody need ask for it again.

    `metadata` is where the plans after the commit may write tables, and where the host may have no space for them: new
    tables, and pages of old ones that have been zeros (`tapfs.formats.blank_pages`). The core takes the space before
    anything is written, in one step with `reserve`. Where the host has none the write fails with no_space, `abort`
    follows at once, and the plans of earlier commits still need no space that they do not have. Host files whose space
    is shared with a copy (reflinks) are not covered: each change of such a file takes new space.
    """

    ranges: tuple[Range, ...]
    operation: Operation
    placements: tuple[Placement, ...]
    exact: bool = False
    metadata: tuple[HostSpace, ...] = ()
