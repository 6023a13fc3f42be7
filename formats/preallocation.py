"""Space for the data of a new image, taken when the image is made: the meaning of `-o preallocation` in every format.

falloc has the host reserve the space. full writes zeros into all of it, also where the host cannot reserve anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tapfs.errors import ErrorKind, ImageError
from tapfs.plan import Allocate, Step, Write

OFF, METADATA, FALLOC, FULL = "off", "metadata", "falloc", "full"

#: Zeros are written in pieces of this size, and so many bytes between two barriers.
_ZEROS = bytes(4 << 20)
_STAGE_BYTES = 256 << 20


def preallocation_of(options: Mapping[str, str], *allowed: str) -> str:
    """The mode that the `-o` pairs ask for, off where they say nothing. Raises ImageError(unsupported) for another."""
    value = options.get("preallocation", OFF)
    if value not in (OFF, *allowed):
        *first, last = OFF, *allowed
        message = f"preallocation={value}: must be {', '.join(first)} or {last}"
        raise ImageError(ErrorKind.UNSUPPORTED, message, op="create")
    return value


def space_stages(mode: str, file: int, start: int, length: int) -> Iterator[list[Step]]:
    """The stages of a plan that take the space of a range, which lies inside the host file."""
    if mode == FALLOC and length:
        yield [Allocate(file, start, length)]
    if mode == FULL:
        for low in range(start, start + length, _STAGE_BYTES):
            high = min(start + length, low + _STAGE_BYTES)
            offsets = range(low, high, len(_ZEROS))
            yield [Write(file, offset, _ZEROS[: min(len(_ZEROS), high - offset)]) for offset in offsets]
