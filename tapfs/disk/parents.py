"""The parent of an image: which file it is among the names that the image gives, and whether it is the right one.

An image may name its parent in several ways, one for each system that it was made on. Some images also say what the
parent must be: an identifier that the parent's metadata has. Another image under the same name would be read
without a word, and its bytes would stand where the guest never wrote them.
"""

from __future__ import annotations

import os

from tapfs.driver import BackingReference, Driver, Identified
from tapfs.errors import ErrorKind, ImageError
from tapfs.host.gate import Gate
from tapfs.host.location import Location, locate_parent


def named_parent(child: str, reference: BackingReference, gate: Gate) -> Location:
    """Where the parent of the image `child` is: at the first of its names that the gate finds a file under.

    Where there is none, the first name of all, so that an error speaks of that. The file is not opened.
    """
    first = locate_parent(child, reference.name)
    if not reference.others:
        return first
    for location in (first, *(locate_parent(child, name) for name in reference.others)):
        if not is_missing(location, gate):
            return location
    return first


def is_missing(location: Location, gate: Gate) -> bool:
    """Whether a parent is not there, as far as the gate lets anybody know. It is not opened.

    What lies elsewhere is not looked for.
    """
    if location.address is not None:
        return False
    try:
        os.close(gate.look_up_parent(location.host_path, trusted=location.trusted))
    except ImageError as error:
        return error.kind is ErrorKind.NOT_FOUND
    return False


def require_identity(child: str, reference: BackingReference, parent: str, driver: Driver, *, op: str) -> None:
    """See that the open parent is the one that the image `child` was made over, where both say what they are.

    Raises ImageError(corrupt).
    """
    wanted = reference.identity
    if wanted is None or not isinstance(driver, Identified):
        return
    allowed = (wanted, *reference.other_identities)
    if not driver.identities.isdisjoint(allowed):
        return
    found = ", ".join(sorted(driver.identities)) or "nothing"
    named = " or ".join(allowed)
    raise ImageError(
        ErrorKind.CORRUPT,
        f"its backing file {parent} is not the one that it was made over: it names {named}, and that file is {found}",
        path=child,
        op=op,
        remedy="name the right one with {backing=FILE}, or say {any_parent} if this one has the same contents",
    )
