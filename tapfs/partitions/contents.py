"""Find the contents of a disk: the partition table if there is one, and the file systems."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

from tapfs.errors import ImageError, spelled
from tapfs.partitions.fat import looks_like_boot_sector
from tapfs.partitions.file_systems import identify
from tapfs.partitions.gpt import SECTOR_SIZES, read_gpt
from tapfs.partitions.mbr import SECTOR, is_protective, read_entries, read_mbr
from tapfs.partitions.other_labels import other_label
from tapfs.partitions.reader import Read, Reader
from tapfs.partitions.stated_length import stated_length
from tapfs.partitions.table import DiskContents, FileSystem, PartitionTable
from tapfs.records import replace

#: The other size of sectors that disks have.
_LARGER_SECTOR = 4096

#: Types of MBR partitions that hold a table of their own.
_WITH_A_LABEL = {"a5", "a6", "a9"}

#: The types of encrypted volumes, with the name of each and what opens it.
_OPENED_BY = {
    "crypto_LUKS": ("LUKS", "cryptsetup opens it, and {format=luks} does if the image is raw"),
    "BitLocker": ("BitLocker", "dislocker or cryptsetup's bitlkOpen opens it"),
}

#: Names the contents of a window that it reads itself, of so many bytes.
IdentifyOthers = Callable[[Read, int], Sequence[FileSystem]]


def disk_contents(
    read: Read, size: int, identify_others: IdentifyOthers | None = None, *, sector_size: int | None = None
) -> DiskContents:
    """Look at a disk of `size` bytes; reads a few sectors of it and of each partition.

    Where nothing shows itself `identify_others` is asked, too. `sector_size`: of the disk that the table was
    made on, in bytes; None: as a GPT says, 512 for an MBR. Never raises for what it finds or cannot read: that
    becomes a note.
    """
    disk = Reader(read, size)
    notes: list[str] = []
    file_system = _identified(disk, "the disk", notes, identify_others)
    if file_system is not None and file_system.type in _OPENED_BY:
        name, opens = _OPENED_BY[file_system.type]
        notes.append(f"the disk is encrypted with {name}, and tapfs shows it so: {spelled(opens)}")
    try:
        table = _read_table(disk, sector_size)
        if table.scheme is None:
            notes += _unread_table(disk, empty=file_system is None)
    except ImageError as error:
        table = PartitionTable(notes=[f"the partition table cannot be read: {error}"])
    for index, partition in enumerate(table.partitions):
        if not partition.container:
            window = disk.window(partition.start, partition.size)
            found = _identified(window, f"partition {partition.number}", notes, identify_others)
            table.partitions[index] = replace(partition, file_system=found)
            if found is None and partition.type in _WITH_A_LABEL:
                notes += _label_in(window, f"partition {partition.number}")
    if sector_size is None and table.scheme == "mbr":
        notes += _larger_sectors(disk, table)
    for note in notes:
        table.note(note)
    return DiskContents(table, file_system)


def _read_table(disk: Reader, sector_size: int | None) -> PartitionTable:
    """The table; an empty one, with a note where one is announced, if there is none.

    The first sector of FAT and NTFS ends in 55 aa too, with boot code where a table would be.
    """
    entries = read_entries(disk, 0)
    if entries is None or looks_like_boot_sector(disk):
        return PartitionTable()
    if not is_protective(entries):
        return read_mbr(disk, entries, sector_size or SECTOR) or PartitionTable()
    table = read_gpt(disk, SECTOR_SIZES if sector_size is None else (sector_size,))
    if table is None:
        return PartitionTable(notes=["the MBR announces a GPT, but neither its primary nor its backup header is whole"])
    return table


def _unread_table(disk: Reader, *, empty: bool) -> Iterator[str]:
    """Notes on a table that is there and not read; `empty`: the disk has no file system either."""
    yield from _label_in(disk, "the disk")
    if empty and read_gpt(disk) is not None:
        yield "the disk has a GPT, but no MBR that announces it, so Linux and tapfs do not heed it: gdisk can mend that"


def _label_in(window: Reader, where: str) -> Iterator[str]:
    with suppress(ImageError):
        label = other_label(window)
        if label is not None:
            yield f"{where} has {label}, which tapfs does not read: mount the image and use partx or losetup -P there"


def _larger_sectors(disk: Reader, table: PartitionTable) -> Iterator[str]:
    """A note if a table that leads to nothing would lead to a file system with sectors of 4096 bytes."""
    if any(partition.file_system is not None for partition in table.partitions):
        return
    with suppress(ImageError):
        for partition in table.partitions:
            start = partition.start // SECTOR * _LARGER_SECTOR
            found = [] if start >= disk.size else identify(disk.window(start, disk.size - start))
            if len(found) == 1:
                yield (
                    f"partition {partition.number} would be {found[0].type} with sectors of {_LARGER_SECTOR} bytes:"
                    f" if the disk was one with such sectors, say {spelled(f'{{sector_size={_LARGER_SECTOR}}}')}"
                )
                return


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
    if not found:
        return None
    with suppress(ImageError):
        stated = stated_length(window, found[0].type)
        if stated > window.size:
            notes.append(
                f"the {found[0].type} of {where} has {stated} bytes, and {where} {window.size}:"
                " the image was cut, or is the first of several parts"
            )
    return found[0]
