"""Give a qcow image another parent: a new name behind everything else, then the header's words that lead to it."""

from __future__ import annotations

from tapfs.driver import BackingReference
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.qcow.header import BACKING_FILE_OFFSET_AT, LENGTH, MAX_NAME_LENGTH, Header
from tapfs.formats.qcow.reader import QcowReader
from tapfs.formats.rounding import round_up
from tapfs.plan import Grow, Plan, Step, Write, plan

_SECTOR = 512


def rebase_plan(image: QcowReader, backing: BackingReference | None) -> Plan:
    """The plan that has the image name another parent, or none. Raises ImageError(out_of_bounds, unsupported)."""
    file, header = image.file, image.header
    name = b"" if backing is None else backing.name.encode("utf-8", "surrogateescape")
    if len(name) > MAX_NAME_LENGTH:
        message = f"the backing file's name has {len(name)} bytes, the limit is {MAX_NAME_LENGTH}"
        raise ImageError(ErrorKind.OUT_OF_BOUNDS, message, path=file.path, op="rebase")
    if b"\0" in name or (backing is not None and not name):
        message = "the backing file's name is empty or holds a NUL byte"
        raise ImageError(ErrorKind.UNSUPPORTED, message, path=file.path, op="rebase")
    # Blktap has the parent's time in the header. Zero is what QEMU writes there, and nobody compares that.
    old: list[Step] = []
    if header.has_backing and _is_nobody_elses(image, header.backing_file_offset, header.backing_file_size):
        # Nothing refers to the old name any more: what is not zeros would be leaked space.
        old.append(Write(0, header.backing_file_offset, bytes(header.backing_file_size)))
    if not name:
        return plan([_switch(header._replace(backing_file_offset=0, backing_file_size=0, mtime=0))], old)
    place = header.backing_file_offset
    room = header.backing_file_size
    if not place or len(name) > room or place + len(name) > _SECTOR:
        place = round_up(file.size(), _SECTOR)
    named = header._replace(backing_file_offset=place, backing_file_size=len(name), mtime=0)
    if place + len(name) <= _SECTOR:  # fields and name are in one sector, which is never torn
        head = file.read(0, _SECTOR)
        packed = named.pack()
        head = packed + head[LENGTH:place] + name.ljust(room, b"\0") + head[place + room :]
        return plan([Write(0, 0, head)])
    grown = place + round_up(len(name), _SECTOR)
    return plan([Grow(0, grown)], [Write(0, place, name)], [_switch(named)], old)


def _switch(header: Header) -> Write:
    """The words of the name in the header: 16 bytes inside one sector."""
    return Write(0, BACKING_FILE_OFFSET_AT, header.pack()[BACKING_FILE_OFFSET_AT:24])


def _is_nobody_elses(image: QcowReader, start: int, length: int) -> bool:
    """Whether a range of the file has no header, no table and no data in it: a name may be said to be anywhere."""
    header, end = image.header, start + length
    before_l1 = start >= LENGTH and end <= header.l1_table_offset
    if end > image.file.size() or (not before_l1 and start < max(header.l1_end, header.l1_table_offset)):
        return False
    for index, table_at in image.l1.used():
        if table_at < end and start < table_at + header.l2_length:
            return False
        table = image.tables.load(index)
        for run in () if table is None else image.table_runs(index, table):
            used = run.host_length or run.clusters * header.cluster_size
            if run.host_offset and run.host_offset < end and start < run.host_offset + used:
                return False
    return True
