"""A step of scrubbing a disk in use: its serving process reads a part of it and compares that with the sidecar.

Who scrubs asks for one step after the other and waits in between as long as it likes. So no request lasts long, and
nothing is kept in the serving process.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING

from tapfs.disk.leaves import WINDOW_BYTES, LeafDigest, Leaves, Window, differing_leaves, ranges_of_leaves
from tapfs.disk.sidecar import USUAL_LEAF_BYTES, Sidecar, usual_name_of
from tapfs.disk.stamps import stamps_of, unchanged
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Range

if TYPE_CHECKING:
    from tapfs.disk.image import Image

#: Data of one step, and windows that it goes through at most, of which many may be empty.
_STEP_BYTES = 8 << 20
_MOST_WINDOWS = 64


def scrub_step(image: Image, offset: int, sidecar: str | None) -> Mapping[str, object]:
    """Read from `offset` on, and compare with the sidecar that is named, else the usual one if the image has one.

    The answer has the disk's `path` and `size`, the bytes that were `read`, where to go on (`until`), the ranges that
    `differ` and those that are `unreadable`, the `sidecar` (None: it has none) and whether the files are `untouched`
    since they were hashed. Raises ImageError for a sidecar that is damaged or of a disk of another size.
    """
    with ExitStack() as stack:
        proof = _sidecar_of(image, sidecar)
        if proof is not None:
            stack.callback(proof.close)
            _require_size(image, proof)
        leaf_bytes = USUAL_LEAF_BYTES if proof is None else proof.hashed.leaf_bytes
        step = _Step(image, leaf_bytes)
        differing: list[int] = []
        until, windows = offset, 0
        for window in step.leaves.windows(offset, image.size):
            digests = step.digests(window)
            if proof is not None:
                differing += differing_leaves(proof, window, digests)
            until, windows = window.end, windows + 1
            if step.read >= _STEP_BYTES or windows == _MOST_WINDOWS:
                break
        lost = {leaf for leaf, _ in step.unreadable}
        return {
            "path": image.path,
            "size": image.size,
            "until": max(until, offset),
            "read": step.read,
            "differ": ranges_of_leaves(sorted(lost.union(differing)), leaf_bytes, image.size),
            "unreadable": [
                (*ranges_of_leaves([leaf], leaf_bytes, image.size)[0], message) for leaf, message in step.unreadable
            ],
            "sidecar": None if proof is None else proof.path,
            "untouched": proof is not None and unchanged(proof.hashed.stamps, stamps_of(image)),
        }


class _Step:
    """Reads windows; a leaf that cannot be read is noted, and the others are hashed."""

    def __init__(self, image: Image, leaf_bytes: int) -> None:
        self._image = image
        self._leaf_bytes = leaf_bytes
        self._buffer = bytearray(WINDOW_BYTES)
        self.leaves = Leaves(image, leaf_bytes)
        self.read = 0
        self.unreadable: list[tuple[int, str]] = []

    def digests(self, window: Window) -> list[LeafDigest]:
        """The digests of the leaves of a window that can be read."""
        self.read += window.ranges.packed
        try:
            return self.leaves.digests(window, self._buffer)
        except ImageError as error:
            _require_passable(error)
        found: list[LeafDigest] = []
        for start, length in window.ranges:
            for offset in range(start, min(start + length, self._image.size), self._leaf_bytes):
                piece = Range(offset, min(self._leaf_bytes, self._image.size - offset))
                try:
                    data = self._image.read(*piece)
                except ImageError as error:
                    _require_passable(error)
                    self.unreadable.append((offset // self._leaf_bytes, str(error)))
                else:
                    found.append(LeafDigest(offset // self._leaf_bytes, self.leaves.digest(data)))
        return found


def _sidecar_of(image: Image, named: str | None) -> Sidecar | None:
    """The open sidecar; None if none is named and the image has none beside it."""
    try:
        top = image.layers[0]
        return Sidecar(usual_name_of(top, top.file.real_path()) if named is None else named)
    except ImageError as error:
        if named is not None or error.kind is not ErrorKind.NOT_FOUND:
            raise
        return None


def _require_size(image: Image, sidecar: Sidecar) -> None:
    hashed = sidecar.hashed.disk_bytes
    if hashed != image.size:
        raise ImageError(
            ErrorKind.CORRUPT,
            f"is of a disk of {hashed} bytes, and this one has {image.size}",
            path=sidecar.path,
            op="scrub",
            remedy="make a new one with tapfs hash, if you trust the image",
        )


def _require_passable(error: ImageError) -> None:
    if error.kind not in {ErrorKind.IO, ErrorKind.CORRUPT}:
        raise error
