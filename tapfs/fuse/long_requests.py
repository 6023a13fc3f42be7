"""Serve the requests of a mounted disk that may take long: looking for data or a hole, and writing zeros.

The kernel holds the lock of the file meanwhile, so other writers wait, and a process that is killed does not end before
its request does. So each request ends early, with EINTR, once nobody waits for it any more.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from tapfs.disk.image import Image

#: Bytes that are zeroed before the next look whether somebody waits for it, and so many looks at most.
_ZERO_STEP, _MOST_ZERO_STEPS = 1 << 30, 4096


class LongRequest(Protocol):
    """A parked request of a disk, for the bytes ``[offset, offset + length)``."""

    @property
    def offset(self) -> int:
        """The first byte."""
        ...

    @property
    def length(self) -> int:
        """Bytes from there on."""
        ...

    @property
    def given_up(self) -> bool:
        """Whether nobody waits for it any more."""
        ...

    def complete(self, found: int = 0) -> None:
        """Answer with success; `found` is what was sought."""
        ...

    def fail(self, number: int) -> None:
        """Answer with an errno."""
        ...


def zero(image: Image, parked: LongRequest) -> None:
    """Make the range read as zeros. Raises ImageError."""
    end, step = parked.offset + parked.length, max(_ZERO_STEP, parked.length // _MOST_ZERO_STEPS)
    for offset in range(parked.offset, end, step):
        if parked.given_up:
            parked.fail(errno.EINTR)
            return
        image.write_zeroes(offset, min(step, end - offset))
    parked.complete()


def seek(image: Image, parked: LongRequest, *, data: bool) -> None:
    """Find the first byte that is data, or in a hole; the end of the range is a hole, too. Raises ImageError."""
    offset, end = parked.offset, parked.offset + parked.length
    while offset < end:
        offset, found = image.disk_map.search(offset, end, data=data)
        if found:
            parked.complete(offset)
            return
        if parked.given_up:
            parked.fail(errno.EINTR)
            return
    if data:
        parked.fail(errno.ENXIO)
    else:
        parked.complete(end)
