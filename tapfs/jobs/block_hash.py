"""The block hash of a disk: the checksum of what a guest reads, as `blksum` of the blkhash project computes it.

docs/specs/blkhash.md has the construction. A block that is known to read as zeros is not read: its digest is
known. So the hash of a sparse disk costs what its data costs, whatever the format of its image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from tapfs.jobs.pipeline import WINDOW_BYTES

if TYPE_CHECKING:
    from tapfs.jobs.sources import Source

#: Bytes of a block.
BLOCK_BYTES = 64 << 10

#: Digests of zero blocks that go into the outer hash by one call.
_ZEROS_TOGETHER = 4096

_ZEROS = bytes(BLOCK_BYTES)


class _Digest(Protocol):
    """A message digest that grows."""

    def update(self, data: bytes, /) -> None:
        """Add bytes."""
        ...


def block_hash(source: Source, *, algorithm: str = "sha256", progress: Callable[[int, int], None] | None = None) -> str:
    """The block hash of a disk in hexadecimal digits; `algorithm` is a name that hashlib knows.

    Raises ImageError where the disk cannot be read.
    """
    outer = hashlib.new(algorithm)
    zero = hashlib.new(algorithm, _ZEROS).digest()
    whole = source.size // BLOCK_BYTES * BLOCK_BYTES
    buffer = bytearray(WINDOW_BYTES)
    place = at = 0
    with memoryview(buffer) as view:
        while at < whole:
            found = source.disk_map.data_ranges(at, whole, align=BLOCK_BYTES, most_bytes=WINDOW_BYTES)
            at = found.until
            if found.packed:
                source.read_ranges(found, buffer)
            packed = 0
            for offset, length in found:
                _skip(outer, zero, (offset - place) // BLOCK_BYTES)
                for start in range(packed, packed + length, BLOCK_BYTES):
                    block = view[start : start + BLOCK_BYTES]
                    outer.update(zero if buffer.startswith(_ZEROS, start) else hashlib.new(algorithm, block).digest())
                packed += length
                place = offset + length
            if progress is not None:
                progress(at, source.size)
        _skip(outer, zero, (whole - place) // BLOCK_BYTES)
        if whole < source.size:
            outer.update(hashlib.new(algorithm, _rest(source, whole)).digest())
    outer.update(source.size.to_bytes(8, "little"))
    return outer.hexdigest()


def _skip(outer: _Digest, zero: bytes, count: int) -> None:
    """Have `count` blocks of zeros in the outer hash."""
    many = zero * min(count, _ZEROS_TOGETHER)
    for _ in range(count // _ZEROS_TOGETHER):
        outer.update(many)
    outer.update(zero * (count % _ZEROS_TOGETHER))


def _rest(source: Source, start: int) -> bytes:
    """The last, shorter block."""
    from tapfs.extent import Range
    from tapfs.kernel.ranges import ranges_of

    length = source.size - start
    buffer = bytearray(length)
    source.read_ranges(ranges_of([Range(start, length)], source.size), buffer)
    return bytes(buffer)
