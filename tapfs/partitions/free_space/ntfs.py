"""The free clusters of NTFS, from its $Bitmap.

The bitmap has no checksum. So it counts only if the volume is marked clean, if its $LogFile says that Windows has
closed it (a hibernated Windows, or one that "fast startup" has put to sleep, has not), and if every cluster that any
file has is in use in it: the whole master file table is read for that.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from tapfs.extent import Range
from tapfs.partitions.free_space.bit_runs import BitRuns, joined
from tapfs.partitions.free_space.ntfs_records import DATA, MasterFileTable, Volume, attributes, read_volume
from tapfs.partitions.free_space.refusal import damaged, unknown
from tapfs.partitions.reader import Reader

_LOG_FILE, _VOLUME, _BITMAP = 2, 3, 6
_VOLUME_INFORMATION, _DIRTY = 0x70, 0x0001
#: Volumes that Windows 10 has made and unmounted cleanly have it (fixtures/dfvfs); no publication names it.
_WINDOWS_10 = 0x0080
#: Versions 1.2 to 3.1: those of Windows NT 4 to 11.
_VERSIONS = frozenset({(1, 2), (3, 0), (3, 1)})

#: A restart page: signature, sizes of pages, offset of the restart area, version; in that area flags and lists.
_RESTART, _EMPTY = b"RSTR", 0xFF
_PAGE_BYTES = 4096
_CLEAN_FLAG, _NO_CLIENT = 0x0002, 0xFFFF

#: Bytes of the bitmap that are looked at together.
_PIECE = 64 << 10


def ntfs_free_ranges(disk: Reader) -> Iterator[Range]:
    """The free ranges, ascending, in bytes of the partition. Raises ImageError where a record cannot be trusted."""
    volume = read_volume(disk)
    table = MasterFileTable(disk, volume)
    _require_clean(table)
    record = table.record(_BITMAP)
    runs = table.mapped(record, _BITMAP, DATA)
    size, written = table.sizes(record, _BITMAP, DATA)
    if 8 * size < volume.clusters or written < size or size > sum(run.length for run in runs) * volume.cluster_size:
        raise damaged("its bitmap is too short")
    table.require_allocated(record, _BITMAP, DATA, runs)
    bitmap = table.read(runs, 0, -(-volume.clusters // 8))
    mirror = Range(volume.mirror_cluster, -(-4 * volume.record_size // volume.cluster_size))
    boot = Range(0, -(-8192 // volume.cluster_size))
    if not all(_is_used(bitmap, run) for run in (boot, mirror)):
        raise damaged("its bitmap calls clusters free that hold its own tables")
    for number, run in table.every_run():
        if not _is_used(bitmap, run):
            raise damaged(f"its bitmap calls clusters free that the file of record {number} has")
    return joined(_ranges(bitmap, volume))


def _is_used(bitmap: bytes, run: Range) -> bool:
    """Whether every cluster of a run is in use."""
    first, stop = -(-run.offset // 8), run.end // 8
    if first > stop:  # both ends in one byte
        return _has_bits(bitmap[stop], run.offset - 8 * stop, run.end - 8 * stop)
    whole = bitmap[first:stop]
    return (
        whole.count(0xFF) == len(whole)
        and (8 * first == run.offset or _has_bits(bitmap[first - 1], run.offset - 8 * (first - 1), 8))
        and (8 * stop == run.end or _has_bits(bitmap[stop], 0, run.end - 8 * stop))
    )


def _has_bits(byte: int, start: int, stop: int) -> bool:
    wanted = (1 << stop) - (1 << start)
    return byte & wanted == wanted


def _require_clean(table: MasterFileTable) -> None:
    information = next((each for each in attributes(table.record(_VOLUME)) if each.kind == _VOLUME_INFORMATION), None)
    if information is None or not information.resident or len(information.value) < 12:
        raise damaged("it does not say whether it is clean")
    major, minor, flags = struct.unpack_from("<BBH", information.value, 8)
    if (major, minor) not in _VERSIONS:
        raise unknown(f"it is NTFS of the unknown version {major}.{minor}")
    if flags & _DIRTY:
        raise unknown("it is marked dirty: have Windows check it first (chkdsk), or ntfsfix")
    if flags & ~_WINDOWS_10:
        raise unknown(f"it is marked as in the middle of a change (flags {flags:#x})")
    record = table.record(_LOG_FILE)
    runs = table.mapped(record, _LOG_FILE, DATA)
    size, _ = table.sizes(record, _LOG_FILE, DATA)
    pages = [table.read(runs, at, _PAGE_BYTES) for at in (0, _PAGE_BYTES) if at + _PAGE_BYTES <= size]
    if all(page.count(_EMPTY) == len(page) for page in pages):
        return
    restarts = [page for page in pages if page[:4] == _RESTART]
    if not restarts:
        raise damaged("its log has no restart page")
    _require_closed(max(restarts, key=_sequence_number))


def _sequence_number(page: bytes) -> int:
    """The number that is larger in the restart page which was written later."""
    area = int.from_bytes(page[24:26], "little")
    return int.from_bytes(page[area : area + 8], "little")


def _require_closed(page: bytes) -> None:
    """Raise ImageError if a restart page says that somebody uses the volume, or has put it to sleep."""
    area, minor, major = struct.unpack_from("<Hhh", page, 24)
    if major != 1 or minor not in {0, 1}:
        raise unknown("Windows has not shut down but put it to sleep (fast startup, or hibernation)")
    if area + 16 > len(page):
        raise damaged("a restart page of its log is damaged")
    in_use, flags = struct.unpack_from("<HH", page, area + 12)
    if in_use != _NO_CLIENT and not flags & _CLEAN_FLAG:
        raise unknown("it was not unmounted cleanly: its log is to be replayed by Windows first")


def _ranges(bitmap: bytes, volume: Volume) -> Iterator[Range]:
    cluster = volume.cluster_size
    for at in range(0, len(bitmap), _PIECE):
        first = 8 * at
        bits = BitRuns(bitmap[at : at + _PIECE], min(8 * _PIECE, volume.clusters - first))
        for start, stop in bits.runs():
            yield Range((first + start) * cluster, (stop - start) * cluster)
