"""Parse the keys that a guest's frontend writes to have its disk connected (xen/include/public/io/blkif.h).

The guest may write anything. A key that does not fit the protocol is an ImageError that names the key.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from tapfs.errors import ErrorKind, ImageError
from tapfs.kernel.xen_ring import Protocol

if TYPE_CHECKING:
    from tapfs.xen.xenstore.client import Store

#: The most that the protocol has of it: pages of a ring as a power of two, and what we ever offer of rings.
MAX_RING_PAGE_ORDER = 4
MAX_QUEUES = 16

_LARGEST_WORD = (1 << 32) - 1

#: The `protocol` key; without it the guest's ABI is that of this process.
_PROTOCOLS = {"x86_32-abi": Protocol.X86_32, "x86_64-abi": Protocol.X86_64}
#: The word of frontends on ARM for either width, and the machines on which that is the ABI of this process.
_ARM, _ARM_MACHINES = "arm-abi", ("aarch64", "armv8l", "armv7l")


class RingKeys(NamedTuple):
    """One ring: the grant references of its pages, and the frontend's port of its event channel."""

    references: tuple[int, ...]
    port: int


class FrontendKeys(NamedTuple):
    """What a frontend asks for. `persistent`: it keeps pages granted."""

    protocol: Protocol
    persistent: bool
    rings: tuple[RingKeys, ...]


async def read_frontend(store: Store, frontend: str, *, page_order: int, queues: int) -> FrontendKeys:
    """The keys of a frontend that is ready, within what was offered to it.

    Raises ImageError(invalid_format, unsupported) for what makes no sense, whatever stands there.
    """
    order = await _number(store, f"{frontend}/ring-page-order", 0, min(page_order, MAX_RING_PAGE_ORDER), default=0)
    count = await _number(store, f"{frontend}/multi-queue-num-queues", 1, min(queues, MAX_QUEUES), default=1)
    named = await store.read(f"{frontend}/protocol")
    native = named is None or (named == _ARM and os.uname().machine in _ARM_MACHINES)
    protocol = Protocol.NATIVE if native else _PROTOCOLS.get(named or "")
    if protocol is None:
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            f"the guest speaks {_shown(named or '')}",
            path=f"{frontend}/protocol",
            op="connect",
            remedy=f"known are {', '.join(_PROTOCOLS)}",
        )
    # One ring has its keys beside the others, several have a directory each.
    places = [frontend] if count == 1 else [f"{frontend}/queue-{queue}" for queue in range(count)]
    rings = [await _read_ring(store, place, order) for place in places]
    ports = {ring.port for ring in rings}
    if len(ports) < len(rings):
        raise ImageError(ErrorKind.INVALID_FORMAT, "two queues have one event channel", path=frontend, op="connect")
    persistent = await store.read(f"{frontend}/feature-persistent") == "1"
    return FrontendKeys(protocol, persistent, tuple(rings))


async def _read_ring(store: Store, place: str, order: int) -> RingKeys:
    names = [f"ring-ref{page}" for page in range(1 << order)]
    if order == 0 and await store.read(f"{place}/ring-ref") is not None:
        names = ["ring-ref"]
    references = [await _number(store, f"{place}/{name}", 0, _LARGEST_WORD) for name in names]
    port = await _number(store, f"{place}/event-channel", 0, _LARGEST_WORD)
    return RingKeys(tuple(references), port)


async def _number(store: Store, path: str, least: int, most: int, default: int | None = None) -> int:
    text = await store.read(path)
    if text is None:
        if default is None:
            raise ImageError(ErrorKind.INVALID_FORMAT, "is missing", path=path, op="connect")
        return default
    value = int(text) if text.isascii() and text.isdigit() and len(text) <= 10 else None
    if value is None or not least <= value <= most:
        message = f"holds {_shown(text)}, not a number from {least} to {most}"
        raise ImageError(ErrorKind.INVALID_FORMAT, message, path=path, op="connect")
    return value


def _shown(text: str) -> str:
    """A guest's text as a short and printable piece of a line."""
    return repr(text[:40]) + ("…" if len(text) > 40 else "")
