"""Apply the difference between two disks to a base: into a new image, or in place.

A base is proved while the stream is read: where the stream says that bytes change it must have the old ones, and where
it says that bytes stay it must have those. A new image gets its name only after the last record, so a wrong base, a
damaged stream or a crash leaves nothing of it. In place the whole stream is read twice: everything is proved before the
first byte changes.

A difference replaces whole ranges and never depends on what it replaces. So one that was cut off in place may be
applied again. A range that has the new bytes already is right then. One that a crash of the host has torn is neither
old nor new, and is taken only with `resume`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from tapfs.errors import ErrorKind, ImageError
from tapfs.host.location import locate
from tapfs.jobs.diff_stream import DiffReader, Record, RecordKind, digest_of
from tapfs.jobs.pipeline import WINDOW_BYTES
from tapfs.kernel.segments import find_segments
from tapfs.records import NamedTuple, dataclass, field

if TYPE_CHECKING:
    from tapfs.disk.image import Image
    from tapfs.jobs.diff_stream import Readable

_Progress = Callable[[int, int], None]


class ApplyReport(NamedTuple):
    """The bytes of the disk that were replaced by data, that were cleared, and that were proved to be right before."""

    data_bytes: int
    zero_bytes: int
    proved_bytes: int


@dataclass(slots=True)
class _Sums:
    """Counts of the bytes of records, by their kinds."""

    of: dict[RecordKind, int] = field(default_factory=lambda: dict.fromkeys(RecordKind, 0))

    def add(self, record: Record) -> None:
        self.of[record.kind] += record.length

    def report(self) -> ApplyReport:
        kept = self.of[RecordKind.KEEP] + self.of[RecordKind.KEEP_ZERO]
        return ApplyReport(self.of[RecordKind.DATA], self.of[RecordKind.ZERO], kept)


def verify_base(
    base: Image,
    file: Readable,
    *,
    path: str | None = None,
    resume: bool = False,
    progress: _Progress | None = None,
) -> ApplyReport:
    """Read a whole stream and prove that it is whole and that `base` is the disk, or has the changes already.

    Raises ImageError: corrupt for a damaged stream, invalid_argument for another base. Changes nothing.
    """
    reader = DiffReader(file, path)
    _require_size(base, reader)
    sums = _Sums()
    for record in reader.records():
        _prove(base, record, applied=True, resume=resume)
        sums.add(record)
        _tell(progress, record, reader)
    return sums.report()


def apply_in_place(
    base: Image,
    open_stream: Callable[[], Readable],
    *,
    path: str | None = None,
    resume: bool = False,
    progress: _Progress | None = None,
) -> ApplyReport:
    """Change `base`, open for writing, into the new disk; everything is durable when this returns.

    `open_stream` gives the stream from its start, each time that it is called. After a crash each range of the
    difference has old or new bytes, and a part of it that was being written may be torn: apply it again. `resume`:
    ranges that change need not have the old bytes. Raises ImageError, before anything is changed if the stream or the
    base is not right; unsupported if the new disk is of another size.
    """
    verify_base(base, open_stream(), path=path, resume=resume)
    reader = DiffReader(open_stream(), path)
    if base.size != reader.header.new_size:
        larger = reader.header.new_size > base.size
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            f"has {base.size} bytes, and the new disk {reader.header.new_size}: in place its size does not change",
            path=base.path,
            op="apply",
            remedy=f"resize it to {reader.header.new_size} bytes first" if larger else "make a new image",
        )
    sums = _Sums()
    for record in reader.records():
        _change(base, record)
        sums.add(record)
        _tell(progress, record, reader)
    base.flush()
    return sums.report()


def apply_to_new(
    base: Image,
    file: Readable,
    target: str,
    *,
    target_format: str,
    overlay: bool = False,
    options: Mapping[str, str] | None = None,
    path: str | None = None,
    progress: _Progress | None = None,
) -> ApplyReport:
    """Make the new disk as the new image `target`, which appears under its name only when it is complete and durable.

    `overlay`: over `base`, so that it has what changes only; else it has everything. The stream is read once, so it
    may come through a pipe. Raises ImageError: corrupt for a damaged stream, invalid_argument for another base.
    """
    from tapfs.jobs.convert import refuse_own_chain
    from tapfs.jobs.create import NewImage, new_image

    reader = DiffReader(file, path)
    _require_size(base, reader)
    refuse_own_chain(base, target)
    new = NewImage(
        target_format,
        reader.header.new_size,
        backing=locate(base.path).absolute().host_path if overlay else None,
        backing_format=base.format_name if overlay else None,
        options=dict(options or {}),
    )
    sums = _Sums()
    with new_image(target, new, overwrite=True) as made:
        if not overlay:
            _copy(base, made, min(base.size, made.size))
        for record in reader.records():
            _prove(base, record, applied=False, resume=False)
            _change(made, record)
            sums.add(record)
            _tell(progress, record, reader)
    return sums.report()


def _copy(base: Image, made: Image, end: int) -> None:
    """Copy the data of the base, as far as it goes."""
    buffer = bytearray(WINDOW_BYTES)
    offset = 0
    while offset < end:
        ranges = base.disk_map.data_ranges(offset, end, most_bytes=WINDOW_BYTES)
        offset = ranges.until
        if ranges.count:
            base.read_ranges(ranges, buffer)
            segments, _ = find_segments(ranges, buffer, 4096)
            made.write_segments(segments)


def _change(image: Image, record: Record) -> None:
    if record.kind is RecordKind.DATA:
        image.write(record.offset, record.payload)
    elif record.kind is RecordKind.ZERO:
        image.write_zeroes(record.offset, record.length)


def _prove(base: Image, record: Record, *, applied: bool, resume: bool) -> None:
    """Raise ImageError unless the base has the old bytes in a range, or, if it may be `applied`, the new ones."""
    changes = record.kind in {RecordKind.DATA, RecordKind.ZERO}
    if changes and resume:
        return
    if record.kind is RecordKind.KEEP_ZERO:
        if _reads_as_zeros(base, record):
            return
    else:
        found = _read(base, record)
        digest = digest_of(found)
        if digest == record.old or (applied and record.kind is RecordKind.DATA and digest == record.new):
            return
        if applied and record.kind is RecordKind.ZERO and not any(found):
            return
    hint = "; if an earlier apply of it was cut off, say {resume}" if changes and applied else ""
    raise ImageError(
        ErrorKind.INVALID_ARGUMENT,
        f"is not the disk that the difference was made of: other bytes in [{record.offset}, {record.end})",
        path=base.path,
        op="apply",
        remedy=f"apply it to the old disk that 'tapfs diff' was given{hint}",
    )


def _read(base: Image, record: Record) -> bytes:
    """What the base has in the range, with zeros behind its end."""
    inside = max(min(record.end, base.size) - record.offset, 0)
    found = base.read(record.offset, inside) if inside else b""
    return found.ljust(record.length, b"\0")


def _reads_as_zeros(base: Image, record: Record) -> bool:
    offset, end = record.offset, min(record.end, base.size)
    buffer = bytearray(WINDOW_BYTES)
    while offset < end:
        ranges = base.disk_map.data_ranges(offset, end, most_bytes=WINDOW_BYTES)
        offset = ranges.until
        if ranges.count:
            base.read_ranges(ranges, buffer)
            if find_segments(ranges, buffer, 4096)[0].count:
                return False
    return True


def _require_size(base: Image, reader: DiffReader) -> None:
    sizes = reader.header
    if base.size not in {sizes.old_size, sizes.new_size}:
        raise ImageError(
            ErrorKind.INVALID_ARGUMENT,
            f"has {base.size} bytes, and the disk that the difference was made of {sizes.old_size}",
            path=base.path,
            op="apply",
            remedy="apply it to the old disk that 'tapfs diff' was given",
        )


def _tell(progress: _Progress | None, record: Record, reader: DiffReader) -> None:
    if progress is not None:
        progress(record.end, reader.header.new_size)
