"""The contents of a disk as data: table, partitions, file systems."""

from __future__ import annotations

from typing import TypedDict

from tapfs.records import NamedTuple, dataclass, field, replace

#: So many partitions of one disk are looked at, as in the Linux kernel.
MAX_PARTITIONS = 256

#: So many remarks are kept of one disk.
MAX_NOTES = 32


class FileSystemInfo(TypedDict):
    """A `FileSystem` as JSON-able data."""

    type: str
    label: str | None
    uuid: str | None


class PartitionInfo(TypedDict):
    """A `Partition` as JSON-able data."""

    number: int
    start: int
    size: int
    type: str
    type_name: str | None
    name: str | None
    uuid: str | None
    bootable: bool
    container: bool
    file_system: FileSystemInfo | None


class PartitionTableInfo(TypedDict):
    """A `PartitionTable` as JSON-able data."""

    scheme: str | None
    sector_size: int | None
    uuid: str | None
    table: list[PartitionInfo]
    notes: list[str]


class ContentsInfo(TypedDict):
    """`DiskContents` as JSON-able data."""

    file_system: FileSystemInfo | None
    partitions: PartitionTableInfo


class FileSystem(NamedTuple):
    """What a superblock says. `type` is the word that blkid uses; an empty label is None."""

    type: str
    label: str | None = None
    uuid: str | None = None


@dataclass(frozen=True, slots=True)
class Partition:
    """One entry of a table; `start` and `size` are bytes, and inside the disk.

    `type` is a GUID (GPT) or two hexadecimal digits (MBR), `name` is GPT's only. `container`:
    an extended partition, which holds others and no data of its own.
    """

    number: int
    start: int
    size: int
    type: str
    type_name: str | None
    name: str | None = None
    uuid: str | None = None
    bootable: bool = False
    container: bool = False
    file_system: FileSystem | None = None

    @property
    def end(self) -> int:
        """The first byte after it."""
        return self.start + self.size


@dataclass(slots=True)
class PartitionTable:
    """A partition table. `scheme` is "gpt", "mbr" or None; `sector_size` in bytes."""

    scheme: str | None = None
    sector_size: int | None = None
    uuid: str | None = None
    partitions: list[Partition] = field(default_factory=list[Partition])
    notes: list[str] = field(default_factory=list[str])

    def note(self, text: str) -> None:
        """Keep a remark while there is room."""
        if len(self.notes) < MAX_NOTES:
            self.notes.append(text)

    def add(self, partition: Partition, disk_size: int) -> None:
        """Add what lies inside the disk of a partition; say what does not."""
        if len(self.partitions) >= MAX_PARTITIONS:
            self.note(f"there are more than {MAX_PARTITIONS} partitions; the rest is left out")
            return
        if partition.start >= disk_size:
            self.note(f"partition {partition.number} lies outside the disk and is left out")
            return
        self.partitions.append(partition)

    def clip(self, disk_size: int) -> None:
        """Cut partitions at the end of the disk, and say which overlap."""
        self.partitions.sort(key=lambda partition: partition.number)
        for index, partition in enumerate(self.partitions):
            if partition.end > disk_size:
                missing = partition.end - disk_size
                self.note(
                    f"partition {partition.number} reaches {missing} bytes past the end of the disk and is cut there"
                )
                self.partitions[index] = replace(partition, size=disk_size - partition.start)
        furthest: Partition | None = None
        for partition in sorted(self.partitions, key=lambda partition: partition.start):
            if partition.container:
                continue
            if furthest is not None and partition.start < furthest.end:
                self.note(f"partitions {furthest.number} and {partition.number} overlap")
            if furthest is None or partition.end > furthest.end:
                furthest = partition


@dataclass(frozen=True, slots=True)
class DiskContents:
    """A disk's partition table, and the file system that starts at its first byte, if there is one."""

    table: PartitionTable
    file_system: FileSystem | None = None

    def description(self) -> ContentsInfo:
        """The keys that `tapfs info --json` has for it."""
        table = self.table
        return {
            "file_system": _described(self.file_system),
            "partitions": {
                "scheme": table.scheme,
                "sector_size": table.sector_size,
                "uuid": table.uuid,
                "table": [_described_partition(partition) for partition in table.partitions],
                "notes": list(table.notes),
            },
        }


def uuid_text(field: bytes) -> str:
    """16 bytes as a UUID is written. The standard library's module for it takes 5 ms to load."""
    digits = field.hex()
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def _described(found: FileSystem | None) -> FileSystemInfo | None:
    return None if found is None else {"type": found.type, "label": found.label, "uuid": found.uuid}


def _described_partition(partition: Partition) -> PartitionInfo:
    return {
        "number": partition.number,
        "start": partition.start,
        "size": partition.size,
        "type": partition.type,
        "type_name": partition.type_name,
        "name": partition.name,
        "uuid": partition.uuid,
        "bootable": partition.bootable,
        "container": partition.container,
        "file_system": _described(partition.file_system),
    }
