"""Parked reads and writes of the native front ends, given what they lack by the image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from tapfs.disk.image import Image
    from tapfs.kernel.engine import Outcome


class ParkedMove(Protocol):
    """A read or write that waits in the engine for a map or a reservation."""

    @property
    def offset(self) -> int:
        """The first byte of the disk that is left to do."""
        ...

    @property
    def data(self) -> memoryview:
        """What a write has left to write."""
        ...

    def outcome(self) -> Outcome:
        """What is missing. Raises the ImageError that it met instead."""
        ...

    def resume(self) -> bool:
        """Try again; whether it is answered now."""
        ...

    def complete(self) -> None:
        """Answer with success."""
        ...


def finish_move(image: Image, parked: ParkedMove) -> None:
    """Give a read or write what it lacks until it is answered. Raises the ImageError that it has met."""
    while True:
        outcome = parked.outcome()
        if outcome.needs_reservation:
            image.write(parked.offset, parked.data)
            parked.complete()
            return
        image.supply_map(outcome)
        if parked.resume():
            return
