"""Stamps of an image's files: they tell later whether anybody has written to the files meanwhile.

A stamp has the length of a file, when its contents were modified, and the identity that the format gives to each change
of the image, where it has one (`tapfs.driver.Identified`). Bits that decay on the host leave all three as they were.
The identity also says which of several disks in the file was meant: a snapshot, or a member of an archive.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from tapfs.disk.blake3_digests import DIGEST_BYTES, blake3_digest
from tapfs.driver import Identified, SnapshotShown
from tapfs.errors import from_os_error

if TYPE_CHECKING:
    from tapfs.disk.chain import Layer
    from tapfs.disk.image import Image

#: The time of a file that does not tell when it was modified: a block device, or what lies elsewhere.
UNKNOWN_TIME = -(1 << 63)
_NO_IDENTITY = bytes(DIGEST_BYTES)


class Stamp(NamedTuple):
    """One file of an image; the time in nanoseconds since 1970. `identity` is a digest, zeros where there is none."""

    size: int
    modified_ns: int
    identity: bytes


def stamps_of(image: Image) -> list[Stamp]:
    """The stamps of all files of the chain: of the image, its further files, its parent and so on."""
    stamps: list[Stamp] = []
    for layer in image.layers:
        driver = layer.driver
        told = sorted([*(driver.identities if isinstance(driver, Identified) else ()), *_part(layer)])
        identity = blake3_digest()("\0".join(told).encode("utf-8", "surrogateescape")) if told else _NO_IDENTITY
        for file in layer.files:
            try:
                status = os.fstat(file.descriptor)
            except OSError as error:
                raise from_os_error(error, path=file.path, op="ask when the image was modified") from error
            silent = file.is_block_device or file.presence is not None
            stamps.append(Stamp(file.size(), UNKNOWN_TIME if silent else status.st_mtime_ns, identity))
            identity = _NO_IDENTITY  # it is that of the layer, noted once
    return stamps


def _part(layer: Layer) -> list[str]:
    """The words for one of several disks that lie in one file; none for the only one, and for the current one."""
    words: list[str] = []
    if (named := layer.snapshot) is not None:
        # One snapshot has several names, and what is the id of one may be the name of another: the driver knows.
        driver = layer.driver
        shown = driver.snapshot_id if isinstance(driver, SnapshotShown) else None
        words.append(f"snapshot:{named if shown is None else shown}")
    if layer.file.window is not None:
        words.append(f"at:{layer.file.window[0]}")
    if layer.file.member is not None:  # disks that lie in chunks begin where their archive does
        words.append(f"member:{layer.file.member}")
    return words


def unchanged(before: list[Stamp], now: list[Stamp]) -> bool:
    """Whether the stamps say that nobody has written to the files; files that tell no time never say so."""
    return before == now and all(stamp.modified_ns != UNKNOWN_TIME for stamp in now)
