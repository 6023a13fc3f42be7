"""Give a VMDK disk another size: its last extent grows, or gets smaller (docs/specs/vmdk.md, "Descriptor").

The descriptor says the size of the disk; the header of a sparse extent says how much the extent can hold, which may be
more. So a larger extent gets its tables and its capacity first, then the descriptor says the size. A smaller one goes
the other way. All fields of a header that lead to tables stand in its first sector. VMware takes no holes in the
directory of a hosted extent, so tables are made for all of its entries.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

from tapfs.driver import HostFile
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.changed_table import encode
from tapfs.formats.rounding import round_up
from tapfs.formats.vmdk import cowd_header, sparse_header
from tapfs.formats.vmdk.extent_size import size_plans
from tapfs.formats.vmdk.grain_tables import ENTRY_BYTES
from tapfs.formats.vmdk.host_extents import CowdExtent, HostedExtent
from tapfs.formats.vmdk.parts import FlatPart, Part, SparsePart
from tapfs.formats.vmdk.sectors import SECTOR
from tapfs.formats.vmdk.writer import WritableVmdkDriver
from tapfs.plan import Discard, Grow, Plan, Shorten, Step, Write, plan

#: The largest sparse extent, whose entries are sectors in 32 bits, and the largest part of a split disk.
_MAX_SPARSE_BYTES = (2 << 40) - (4 << 30)
_MAX_FLAT_BYTES = 1 << 62
_MAX_SPLIT_BYTES = 2 << 30
#: Zeros that one step writes, and changed tables in memory that are worth a flush.
_PIECE_BYTES = 4 << 20
_FLUSH_BYTES = 4 << 20


def make_room(image: WritableVmdkDriver, size: int) -> Iterator[Plan]:
    """See :meth:`tapfs.driver.Resizable.make_room`."""
    part = _last(image, size)
    _size_plans(image, size)  # what cannot be told is refused before anything is made
    length = round_up(size, SECTOR) - part.offset
    if isinstance(part, FlatPart):
        return _roomy_flat(image, part, length)
    return _roomy_sparse(_extent_of(image, part), length)


def resize(image: WritableVmdkDriver, size: int) -> Iterator[Plan]:
    """See :meth:`tapfs.driver.Resizable.resize`."""
    part = _last(image, size)
    told = _size_plans(image, size)
    length = round_up(size, SECTOR) - part.offset
    return _resized(image, part, length, told)


def _last(image: WritableVmdkDriver, size: int) -> Part:
    """The part that changes. Raises ImageError(unsupported, out_of_bounds)."""
    part = image.parts[-1]
    split = image.descriptor is not None and image.descriptor.create_type.lower().startswith("twogb")
    most = _MAX_SPLIT_BYTES if split else _MAX_FLAT_BYTES if isinstance(part, FlatPart) else _MAX_SPARSE_BYTES
    if not isinstance(part, FlatPart | SparsePart) or not part.writable or image.descriptor is None:
        raise _refused(image, "its last extent is not one that can be written")
    if size <= part.offset:
        message = f"its last extent begins at byte {part.offset}, and a disk of {size} bytes has none of it"
        raise _refused(image, message)
    if size - part.offset > most:
        message = f"its last extent may have {most} bytes, so the disk at most {part.offset + most}"
        raise _refused(image, message, ErrorKind.OUT_OF_BOUNDS)
    return part


def _refused(image: WritableVmdkDriver, message: str, kind: ErrorKind = ErrorKind.UNSUPPORTED) -> ImageError:
    remedy = "convert it to a disk of one extent: tapfs convert -O vmdk"
    return ImageError(kind, message, path=image.file.path, op="resize", remedy=remedy)


def _size_plans(image: WritableVmdkDriver, size: int) -> Iterator[Plan]:
    """The plans that have the descriptor say the size."""
    descriptor = image.descriptor
    if descriptor is None:
        raise AssertionError("a disk without a descriptor was refused")
    line = [each for each in descriptor.extents if each.sectors][-1]
    own = next((each for each in image.disk.sparse if each.number == 0), None)
    room = own.header.descriptor_sectors * SECTOR if isinstance(own, HostedExtent) and descriptor.base else None
    sectors = (round_up(size, SECTOR) - image.parts[-1].offset) // SECTOR
    return size_plans(image.file, descriptor, line.at, sectors, room)


def _extent_of(image: WritableVmdkDriver, part: Part) -> HostedExtent | CowdExtent:
    for extent in image.disk.sparse:
        if (
            isinstance(part, SparsePart)
            and extent.number == part.number
            and isinstance(extent, HostedExtent | CowdExtent)
        ):
            return extent
    raise AssertionError("a writable part is flat, or a hosted extent, or one of ESX")


# -- growing ------------------------------------------------------------------------------------


def _roomy_flat(image: WritableVmdkDriver, part: FlatPart, length: int) -> Iterator[Plan]:
    start, stop = part.host_offset + part.length, part.host_offset + length
    _require_alone(image, part)
    # The file may be longer than the disk, as after a crash while the disk got smaller.
    zeros: list[Step] = [
        Write(part.number, at, bytes(min(_PIECE_BYTES, offset + size - at)))
        for offset, size in part.file.data_ranges(start, min(stop, part.file.size()) - start)
        for at in range(offset, offset + size, _PIECE_BYTES)
    ]
    yield plan([Grow(part.number, stop)], zeros)


def _require_alone(image: WritableVmdkDriver, part: FlatPart) -> None:
    """Raise ImageError(unsupported) if another part of the disk lies behind the last one in its file."""
    if any(isinstance(each, FlatPart) and each.number == part.number and each is not part for each in image.parts):
        raise _refused(image, "its last extent shares a file with another one")


def _roomy_sparse(extent: HostedExtent | CowdExtent, length: int) -> Iterator[Plan]:
    if length <= extent.capacity:
        return
    if isinstance(extent, CowdExtent):
        yield _roomy_cowd(extent, length)
        return
    header = extent.header
    wanted = header._replace(capacity_sectors=length // SECTOR)
    old, new = header.directory_entries, wanted.directory_entries
    number, end = extent.number, round_up(extent.file.size(), SECTOR)
    steps: list[Step] = []
    freed: list[Step] = []
    for redundant, directory in ((True, extent.tables.redundant), (False, extent.tables.directory)):
        if directory is None:
            continue
        place = (header.redundant_sector if redundant else header.directory_sector) * SECTOR
        tables = range(end, end + (new - old) * header.table_bytes, header.table_bytes)
        end = tables.stop if new > old else end
        entries = array("I", [table // SECTOR for table in tables])
        if wanted.directory_bytes == header.directory_bytes:
            steps.append(Write(number, place + ENTRY_BYTES * old, encode(entries, "little")))
            continue
        freed.append(Discard(number, place, header.directory_bytes))
        moved = end // SECTOR
        wanted = wanted._replace(redundant_sector=moved) if redundant else wanted._replace(directory_sector=moved)
        steps.append(Write(number, end, encode(directory + entries, "little").ljust(wanted.directory_bytes, b"\0")))
        end += wanted.directory_bytes
    yield plan(
        [Grow(number, round_up(end, header.grain))],
        [step for step in steps if isinstance(step, Write) and step.data],
        [_header_step(extent.file, number, wanted)],
        freed,
    )


def _header_step(file: HostFile, number: int, header: sparse_header.SparseHeader) -> Step:
    """One write of the capacity and the places of both directories."""
    raw = bytearray(file.read(0, sparse_header.DIRECTORY_AT + 8))
    for at, value in (
        (sparse_header.CAPACITY_AT, header.capacity_sectors),
        (sparse_header.REDUNDANT_AT, header.redundant_sector),
        (sparse_header.DIRECTORY_AT, header.directory_sector),
    ):
        raw[at : at + 8] = value.to_bytes(8, "little")
    return Write(number, sparse_header.CAPACITY_AT, bytes(raw[sparse_header.CAPACITY_AT :]))


def _roomy_cowd(extent: CowdExtent, length: int) -> Plan:
    header, number = extent.header, extent.number
    wanted = header._replace(capacity_sectors=length // SECTOR)
    wanted = wanted._replace(directory_entries=max(header.directory_entries, wanted.needed_entries))
    old_bytes, new_bytes = (round_up(each.needed_entries * ENTRY_BYTES, SECTOR) for each in (header, wanted))
    place, end = header.directory_sector * SECTOR, round_up(extent.file.size(), SECTOR)
    entries = encode(extent.tables.directory, "little")
    freed: list[Step] = []
    if new_bytes > old_bytes:
        freed.append(Discard(number, place, old_bytes))
        place = end
        end += new_bytes
        content = Write(number, place, entries.ljust(new_bytes, b"\0"))
        wanted = wanted._replace(directory_sector=place // SECTOR)
    else:
        content = Write(number, place + len(entries), bytes(new_bytes - len(entries)))
    free = max(header.next_free_sector, end // SECTOR)
    fields = wanted._replace(next_free_sector=min(free, (1 << 32) - 1)).pack()
    return plan(
        [Grow(number, end)],
        [content] if content.data else [],
        [Write(number, _COWD_CAPACITY_AT, fields[_COWD_CAPACITY_AT : cowd_header.NEXT_FREE_AT + 4])],
        freed,
    )


_COWD_CAPACITY_AT = 12


# -- the size -----------------------------------------------------------------------------------


def _resized(image: WritableVmdkDriver, part: Part, length: int, told: Iterator[Plan]) -> Iterator[Plan]:
    yield from told
    if length >= part.length:
        return
    if isinstance(part, FlatPart):
        end = part.host_offset + length
        if not any(
            each is not part and isinstance(each, FlatPart) and each.number == part.number for each in image.parts
        ):
            yield plan([Shorten(part.number, end)])
        return
    extent = _extent_of(image, part)
    yield plan(image.marks(1))  # until they are closed the two tables of a grain may differ
    yield from _cut(image, part, extent, length)
    yield plan(image.marks(0))


def _cut(image: WritableVmdkDriver, part: Part, extent: HostedExtent | CowdExtent, length: int) -> Iterator[Plan]:
    """Clear the entries behind the end, lower the capacity, and give back the tables behind it."""
    tables = extent.tables
    grain = tables.grain
    first, stop = round_up(length, grain) // grain, -(-part.length // grain)
    at = first
    while at < stop:
        index = at // tables.table_entries
        used = tables.next_used(index, -(-stop // tables.table_entries))
        at = max(at, used * tables.table_entries)
        end = min(stop, (at // tables.table_entries + 1) * tables.table_entries)
        if at < end:
            image.drop_grains(extent.number, at, end)
        at = end
        if image.unflushed_bytes > _FLUSH_BYTES:
            yield from _flushed(image)
    yield from _flushed(image)
    number, sectors = extent.number, length // SECTOR
    if isinstance(extent, CowdExtent):
        yield plan([Write(number, _COWD_CAPACITY_AT, sectors.to_bytes(4, "little"))])
        kept = extent.header._replace(capacity_sectors=sectors).needed_entries
    else:
        yield plan([Write(number, sparse_header.CAPACITY_AT, sectors.to_bytes(8, "little"))])
        kept = extent.header._replace(capacity_sectors=sectors).directory_entries
    directories = [each for each in (tables.directory, tables.redundant) if each is not None]
    freed: list[Step] = [
        Discard(number, entry * SECTOR, tables.layout.table_bytes)
        for entry in _behind(directories, kept)
        if tables.table_fault(entry * SECTOR) is None
    ]
    if freed:
        yield plan(freed)


def _behind(directories: Sequence[array[int]], kept: int) -> Iterator[int]:
    """The entries of directories that count no more."""
    for directory in directories:
        yield from (entry for entry in directory[kept:] if entry)


def _flushed(image: WritableVmdkDriver) -> Iterator[Plan]:
    made = image.flush()
    yield made
    image.flushed(made)
