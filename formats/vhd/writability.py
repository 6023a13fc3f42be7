"""The reasons not to write a VHD that grows: what tapfs cannot write, and damage that a write would add to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.driver import Finding, HostFile, Severity
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.apart import require_apart
from tapfs.formats.vhd.disk_size import MAX_SIZE
from tapfs.formats.vhd.dynamic_header import ENTRY_LENGTH, SECTOR, TABLE_OFFSET_AT

if TYPE_CHECKING:
    from tapfs.formats.vhd.reader import DynamicReader


def require_sound(findings: list[Finding], file: HostFile) -> None:
    """Raise ImageError(read_only) for an image that is opened for writing and whose metadata is damaged."""
    for severity, message, offset in findings:
        if severity is Severity.CORRUPTION:
            raise ImageError(
                ErrorKind.READ_ONLY,
                f"{message}: the image can only be read",
                path=file.path,
                offset=offset,
                op="open",
                remedy="run tapfs repair",
            )


def require_writable(image: DynamicReader) -> None:
    """Raise ImageError where an image must not be written: read_only for damage, unsupported, out_of_bounds."""
    path = image.file.path
    if image.old_bitmaps:
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            "cannot write an image of tapdisk 0.1, whose bitmaps have another order of bits",
            path=path,
            op="open",
            remedy="convert it",
        )
    if image.size > MAX_SIZE:
        raise ImageError(
            ErrorKind.OUT_OF_BOUNDS, f"cannot write a VHD of more than {MAX_SIZE} bytes", path=path, op="open"
        )
    require_sound(image.findings, image.file)
    if not image.footers.copy_good:
        raise ImageError(
            ErrorKind.READ_ONLY,
            "the copy of the footer at the start is damaged: a crash while the image grows would leave no footer",
            path=path,
            offset=0,
            op="open",
            remedy="run tapfs repair",
        )
    if image.header.table_offset % ENTRY_LENGTH:
        # An entry across two sectors could be torn into a third value by a crash.
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            "cannot write an image whose block allocation table is not aligned to 4 bytes",
            path=path,
            offset=image.footer.data_offset + TABLE_OFFSET_AT,
            op="open",
        )
    _require_places(image)


def _require_places(image: DynamicReader) -> None:
    """A block past the end of the file would be where the next new block goes."""
    bounds = image.table.bounds()
    if bounds is None:
        return
    lowest, highest = bounds
    length = image.header.bitmap_bytes + image.header.block_size
    blocks = ((place, length) for _, place in image.table.used())
    require_apart(blocks, SECTOR, image.file.path, what="blocks")
    behind_metadata = lowest >= max(stop for _, stop, _ in image.metadata_ranges)
    if behind_metadata and highest + image.header.bitmap_bytes + image.header.block_size <= image.file_size:
        return
    for index, place in image.table.used():
        wrong = image.place_fault(index, place)
        if wrong is not None:
            raise ImageError(
                ErrorKind.READ_ONLY,
                f"block {index}: {wrong}: the image can only be read",
                path=image.file.path,
                offset=image.table.entry_offset(index),
                op="open",
                remedy="copy what can be read with tapfs convert",
            )
