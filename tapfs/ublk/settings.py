"""The options by which the image of a block device is opened, from the record of the device."""

from __future__ import annotations

from tapfs.disk.chain import DEFAULT_CACHE_BYTES, OpenOptions
from tapfs.host.location import locate
from tapfs.host.lock import SHARING_OF_MODE
from tapfs.ublk.record import DiskRecord


def open_options(record: DiskRecord, *, request_owner: int | None = None) -> OpenOptions:
    """The options for opening the image."""
    return OpenOptions(
        format=record.format,
        writable=record.mode != "r",
        backing_formats=_backing_formats(record),
        direct=record.direct,
        cache_bytes=DEFAULT_CACHE_BYTES if record.cache_bytes is None else record.cache_bytes,
        sharing=SHARING_OF_MODE[record.mode],
        write_base=record.write_base,
        request_owner=request_owner,
    )


def _backing_formats(record: DiskRecord) -> tuple[str, ...]:
    """The formats of the parents: those that a swap has noted, if its overlay has got the name."""
    file, _, formats = record.swap.partition(" ")
    identity = locate(record.path).identity()
    if identity is not None and file == f"{identity[0]}:{identity[1]}":
        return tuple(filter(None, formats.split(",")))
    return record.backing_formats
