"""A chain that ends early, because a parent is missing, is refused, or is not to be looked at."""

from __future__ import annotations

from enum import StrEnum

from tapfs.disk.chain import Layer, add_parents, parent_location
from tapfs.disk.open_options import OpenOptions
from tapfs.driver import BackingReference
from tapfs.errors import ErrorKind, ImageError
from tapfs.records import NamedTuple


class ParentState(StrEnum):
    """What became of a parent that a chain should have."""

    OPEN = "open"
    MISSING = "missing"
    REFUSED = "refused"
    NOT_LOOKED_AT = "not looked at"


class UnopenedParent(NamedTuple):
    """A parent that is not open: its place and what its child says of it.

    `error` says why it is not open; None: it was not to be looked at.
    """

    path: str
    reference: BackingReference | None
    error: ImageError | None

    @property
    def state(self) -> ParentState:
        """Why it is not open."""
        if self.error is None:
            return ParentState.NOT_LOOKED_AT
        return ParentState.MISSING if self.error.kind is ErrorKind.NOT_FOUND else ParentState.REFUSED


def open_what_is_there(layers: list[Layer], options: OpenOptions) -> UnopenedParent | None:
    """Open the parents of the last layer, and append those that could be; the one at which it ends early."""
    error: ImageError | None = None
    if options.gate.roots != ():
        try:
            add_parents(layers, options)
        except ImageError as raised:
            error = raised
        else:
            return None
    reference = layers[-1].driver.geometry.backing
    if reference is not None and reference.search is not None and (len(layers) > 1 or options.backing is None):
        return UnopenedParent(reference.said, reference, error)
    location = parent_location(layers, options)
    return None if location is None else UnopenedParent(location.name, reference, error)
