"""The snapshots of a mounted image as files of the mount: their names, and how they are opened."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from tapfs.disk.chain import is_encrypted
from tapfs.driver import SnapshotLister, SnapshotRecord
from tapfs.fuse.tree import KeptDisk

if TYPE_CHECKING:
    from tapfs.disk.image import Image

#: Of a file name on Linux, in bytes.
_MAX_NAME = 255
_SECOND_NS = 1_000_000_000


def kept_disks(image: Image, *, depth: int) -> Iterator[tuple[bytes, KeptDisk]]:
    """The snapshots of a layer of an open image, by the names of their files. Raises ImageError.

    Those of an encrypted chain are left out: each opening would need the password, which nobody keeps.
    """
    driver = image.layers[depth].driver
    if is_encrypted(image.layers) or not isinstance(driver, SnapshotLister):
        return
    records = driver.snapshot_records()
    for name, record in zip(file_names(records), records, strict=True):
        wanted = f"snapshot.id={record.id}"
        made_ns = record.seconds * _SECOND_NS + record.nanoseconds
        yield name, KeptDisk(record.virtual_size, made_ns, partial(image.open_snapshot, wanted, depth=depth))


def file_names(records: Sequence[SnapshotRecord]) -> list[bytes]:
    """A file name for each snapshot: its name, or else its id, with what no name can hold as %XX.

    Where two have one name, or a name is too long, the id stands in its place: `id=3`.
    """
    taken: list[bytes] = []
    for number, record in enumerate(records):
        wishes = (_escaped(record.name or record.id), _escaped(f"id={record.id}"), b"number=%d" % number)
        taken.append(next(wish for wish in wishes if 0 < len(wish) <= _MAX_NAME and wish not in taken))
    return taken


def _escaped(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    if raw in (b".", b".."):
        return raw.replace(b".", b"%2E")
    return b"".join(b"%%%02X" % byte if byte < 0x20 or byte in b"/%\x7f" else bytes([byte]) for byte in raw)
