"""Reads of a mounted disk that are proved by a sidecar: bytes that are not what was hashed are an error and no data."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

from tapfs.disk.leaves import Leaves
from tapfs.disk.stamps import stamps_of, unchanged
from tapfs.errors import ErrorKind, ImageError
from tapfs.serving.log import log

if TYPE_CHECKING:
    from tapfs.disk.image import Image
    from tapfs.disk.sidecar import Sidecar

#: Bytes of proved leaves that are kept, because a guest reads small pieces that lie near each other.
_KEPT_BYTES = 8 << 20
#: Bytes that are hashed while other requests wait: 60 microseconds' worth.
_MOST_AT_ONCE = 256 << 10
#: Leaves whose damage is logged; a spoiled disk must not fill the log.
_MOST_LOGGED = 1000


class VerifiedReads:
    """The reads of one read-only image, for any number of threads. The sidecar becomes its own; the image does not.

    Raises ImageError(corrupt) if the sidecar is that of a disk of another size.
    """

    def __init__(self, image: Image, sidecar: Sidecar) -> None:
        self._image = image
        self._sidecar = sidecar
        hashed = sidecar.hashed
        if hashed.disk_bytes != image.size:
            raise ImageError(
                ErrorKind.CORRUPT,
                f"is of a disk of {hashed.disk_bytes} bytes, and {image.path} has {image.size}",
                path=sidecar.path,
                op="verify reads",
                remedy="make a new one with tapfs hash, if you trust the image",
            )
        self._leaf_bytes = hashed.leaf_bytes
        self._leaves = Leaves(image, hashed.leaf_bytes)
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._logged: set[int] = set()
        self._lock = threading.Lock()

    def of(self, image: Image) -> VerifiedReads:
        """Those of the same disk that was opened again, by the sidecar that is open. Raises ImageError(corrupt)."""
        return VerifiedReads(image, self._sidecar)

    @property
    def sidecar_path(self) -> str:
        """The name of the sidecar."""
        return self._sidecar.path

    @property
    def untouched(self) -> bool:
        """Whether the stamps say that nobody has written to the image's files since they were hashed."""
        return unchanged(self._sidecar.hashed.stamps, stamps_of(self._image))

    def close(self) -> None:
        """Close the sidecar."""
        self._sidecar.close()

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes at `offset`, each proved. Raises ImageError(io) for what is not as it was hashed."""
        first, end = self._leaves_of(offset, length)
        pieces = self._kept_leaves(first, end)
        if pieces is None:
            pieces = self._proved(first, self._image.read(*self._range_of(first, end)))
        return self._cut(pieces, first, offset, length)

    def try_read(self, offset: int, length: int) -> bytes | None:
        """The same, or None where that would wait for the host or hash more than a moment's worth of bytes."""
        first, end = self._leaves_of(offset, length)
        pieces = self._kept_leaves(first, end)
        if pieces is None:
            start, count = self._range_of(first, end)
            data = self._image.try_read(start, count) if count <= _MOST_AT_ONCE else None
            if data is None:
                return None
            pieces = self._proved(first, data)
        return self._cut(pieces, first, offset, length)

    def _leaves_of(self, offset: int, length: int) -> tuple[int, int]:
        return offset // self._leaf_bytes, -(-(offset + length) // self._leaf_bytes)

    def _range_of(self, first: int, end: int) -> tuple[int, int]:
        """Offset and length of leaves."""
        start = first * self._leaf_bytes
        return start, min(end * self._leaf_bytes, self._image.size) - start

    def _cut(self, pieces: list[bytes], first: int, offset: int, length: int) -> bytes:
        whole = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        start = offset - first * self._leaf_bytes
        return whole if start == 0 and length == len(whole) else whole[start : start + length]

    def _kept_leaves(self, first: int, end: int) -> list[bytes] | None:
        """Leaves that were proved before, if all of them are kept."""
        with self._lock:
            kept = [each for leaf in range(first, end) if (each := self._kept.get(leaf)) is not None]
        return kept if len(kept) == end - first else None

    def _proved(self, first: int, data: bytes) -> list[bytes]:
        """The leaves in bytes that were read, once each is proved."""
        size = self._leaf_bytes
        pieces = [data[at : at + size] for at in range(0, len(data), size)] if len(data) > size else [data]
        for leaf, piece in enumerate(pieces, first):
            digest = self._leaves.digest(piece)
            with self._lock:
                if self._sidecar.digest_of(leaf) != digest:
                    raise self._spoiled(leaf, len(piece))
        with self._lock:
            for leaf, piece in enumerate(pieces, first):
                self._kept[leaf] = piece
                self._kept.move_to_end(leaf)
            while len(self._kept) * size > _KEPT_BYTES:
                self._kept.popitem(last=False)
        return pieces

    def _spoiled(self, leaf: int, length: int) -> ImageError:
        start = leaf * self._leaf_bytes
        if leaf not in self._logged and len(self._logged) < _MOST_LOGGED:
            self._logged.add(leaf)
            log.error("%s: bytes %d to %d are not what was hashed", self._image.path, start, start + length)
        return ImageError(
            ErrorKind.IO,
            "what was read is not what was hashed",
            path=self._image.path,
            offset=start,
            op="verify reads",
            remedy="tapfs verify says whether it was damaged or changed",
        )
