"""What lies on a disk: the table if it has one, and the file systems in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from tapfs.errors import ImageError
from tapfs.partitions.fat import looks_like_boot_sector
from tapfs.partitions.file_systems import identify
from tapfs.partitions.gpt import read_gpt
from tapfs.partitions.mbr import is_protective, read_entries, read_mbr
from tapfs.partitions.reader import Read, Reader
from tapfs.partitions.table import DiskContents, FileSystem, PartitionTable

#: Names the contents of a window that it reads itself, of so many bytes.
IdentifyOthers = Callable[[Read, int], Sequence[FileSystem]]


def disk_contents(read: Read, size: int, identify_others: IdentifyOthers | None = None) -> DiskContents:
    """Look at a disk of `size` bytes; reads a few sectors of it and of each partition.

    Where nothing shows itself `identify_others` is asked, too. Never raises for what it finds or
    cannot read: that becomes a note.
    """
    disk = Reader(read, size)
    notes: list[str] = []
    file_system = _identified(disk, "the disk", notes, identify_others)
    if file_system is not None and file_system.type == "crypto_LUKS":
        notes.append("the disk is encrypted with LUKS, and tapfs shows it so: cryptsetup opens it")
    try:
        table = _read_table(disk)
    except ImageError as error:
        table = PartitionTable(notes=[f"the partition table cannot be read: {error}"])
    for index, partition in enumerate(table.partitions):
        if not partition.container:
            window = disk.window(partition.start, partition.size)
            found = _identified(window, f"partition {partition.number}", notes, identify_others)
            table.partitions[index] = replace(partition, file_system=found)
    for note in notes:
        table.note(note)
    return DiskContents(table, file_system)


def _read_table(disk: Reader) -> PartitionTable:
    """The table; an empty one, with a note where one is announced, if there is none.

    The first sector of FAT and NTFS ends in 55 aa too, with boot code where a table would be.
    """
    entries = read_entries(disk, 0)
    if entries is None or looks_like_boot_sector(disk):
        return PartitionTable()
    if not is_protective(entries):
        return read_mbr(disk, entries) or PartitionTable()
    table = read_gpt(disk)
    if table is None:
        return PartitionTable(notes=["the MBR announces a GPT, but neither its primary nor its backup header is whole"])
    return table


def _identified(
    window: Reader, where: str, notes: list[str], identify_others: IdentifyOthers | None
) -> FileSystem | None:
    """The file system if exactly one shows itself."""
    try:
        found = identify(window)
        if not found and identify_others is not None:
            found = list(identify_others(window.read, window.size))
    except ImageError as error:
        notes.append(f"the start of {where} cannot be read: {error}")
        return None
    if len(found) > 1:
        notes.append(f"{where} has the signatures of {' and '.join(each.type for each in found)}")
        return None
    return found[0] if found else None
