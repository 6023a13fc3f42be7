"""Write zeros as data into a range of a disk, in pieces, so that a long range takes little memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tapfs.disk.image import Image
    from tapfs.extent import Range

#: So many bytes of zeros are written at a time.
_PIECE_BYTES = 2 << 20


def write_zero_data(image: Image, wanted: Range) -> None:
    """Allocate the range and write zeros there; an entry of the format that says zeros is not enough."""
    zeros = memoryview(bytes(min(_PIECE_BYTES, wanted.length)))
    for at in range(wanted.offset, wanted.end, _PIECE_BYTES):
        image.write(at, zeros[: wanted.end - at])
