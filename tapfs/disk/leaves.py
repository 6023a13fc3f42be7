"""The leaves of a disk: pieces of one size, hashed window by window, and compared with what a sidecar says of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol

from tapfs.disk.blake3_digests import blake3_digest
from tapfs.disk.hash_tree import ZERO_DIGEST
from tapfs.extent import Range, merge_runs

if TYPE_CHECKING:
    from tapfs.disk.sidecar import Sidecar
    from tapfs.kernel.engine import Buffer
    from tapfs.kernel.ranges import Ranges

#: Bytes of a window: a multiple of every leaf.
WINDOW_BYTES = 2 << 20


class Mapped(Protocol):
    """A map that tells where a disk has data."""

    def data_ranges(self, offset: int, end: int, *, gap: int = 0, align: int = 1, most_bytes: int) -> Ranges:
        """See :meth:`tapfs.disk.disk_map.DiskMap.data_ranges`."""
        ...


class Disk(Protocol):
    """A disk that is read; an `Image` is one."""

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        ...

    @property
    def disk_map(self) -> Mapped:
        """The map."""
        ...

    def read_ranges(self, ranges: Ranges, buffer: Buffer) -> None:
        """Read ranges into a writable buffer, one behind the other. Past the end of the disk there are zeros."""
        ...


class Window(NamedTuple):
    """A part of the disk ``[start, end)`` and the ranges of whole leaves in it that are not known to be zeros."""

    start: int
    end: int
    ranges: Ranges


class LeafDigest(NamedTuple):
    """The number of a leaf and its digest."""

    leaf: int
    digest: bytes


class Leaves:
    """The leaves of a disk; the last one ends with the disk. Any number of threads may hash them."""

    def __init__(self, disk: Disk, leaf_bytes: int) -> None:
        self._disk = disk
        self._bytes = leaf_bytes
        self._digest = blake3_digest()
        last = disk.size % leaf_bytes
        # What turns out to be zeros has the digest of what is known to be.
        self._of_zeros = {self._digest(bytes(length)) for length in {leaf_bytes, last} if length}

    def windows(self, offset: int, end: int) -> Iterator[Window]:
        """The windows of a range, of bounded length in data."""
        while offset < end:
            ranges = self._disk.disk_map.data_ranges(offset, end, align=self._bytes, most_bytes=WINDOW_BYTES)
            yield Window(offset, ranges.until, ranges)
            offset = ranges.until

    def digest(self, leaf: Buffer) -> bytes:
        """The digest of the bytes of one leaf."""
        digest = self._digest(leaf)
        return ZERO_DIGEST if digest in self._of_zeros else digest

    def digests(self, window: Window, buffer: Buffer) -> list[LeafDigest]:
        """The digests of the leaves in the ranges of a window, which are read into the buffer."""
        self._disk.read_ranges(window.ranges, buffer)
        found: list[LeafDigest] = []
        at = 0
        with memoryview(buffer) as view:
            for start, length in window.ranges:
                for offset in range(start, start + length, self._bytes):
                    count = min(self._bytes, start + length - offset, self._disk.size - offset)
                    if count <= 0:  # a range that was widened past the end of the disk
                        break
                    with view[at + offset - start : at + offset - start + count] as leaf:
                        found.append(LeafDigest(offset // self._bytes, self.digest(leaf)))
                at += length
        return found


def differing_leaves(sidecar: Sidecar, window: Window, digests: Iterable[LeafDigest]) -> list[int]:
    """The leaves of a window that are not as the sidecar has them, ascending.

    Raises ImageError(corrupt) where the sidecar is damaged.
    """
    size = sidecar.hashed.leaf_bytes
    differing: list[int] = []
    seen: set[int] = set()
    for leaf, digest in digests:
        seen.add(leaf)
        if sidecar.digest_of(leaf) != digest:
            differing.append(leaf)
    end = -(-window.end // size) if window.end >= sidecar.hashed.disk_bytes else window.end // size
    expected = sidecar.written_leaves(window.start // size, end)
    return sorted([*differing, *(leaf for leaf in expected if leaf not in seen)])


def ranges_of_leaves(leaves: Iterable[int], leaf_bytes: int, disk_bytes: int) -> list[Range]:
    """Leaves in their order as ranges of the disk, neighbours joined."""
    pieces = (Range(leaf * leaf_bytes, min(leaf_bytes, disk_bytes - leaf * leaf_bytes)) for leaf in leaves)
    return list(merge_runs(pieces, _joined))


def _joined(left: Range, right: Range) -> Range | None:
    return Range(left.offset, right.end - left.offset) if left.end == right.offset else None
