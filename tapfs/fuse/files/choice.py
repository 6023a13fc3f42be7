"""Which of a disk's file systems `tapfs mount --files` shows."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tapfs.disk.image import Image
from tapfs.errors import ErrorKind, ImageError
from tapfs.partitions.cleanliness import Unclean, unclean
from tapfs.partitions.reader import Reader
from tapfs.partitions.table import DiskContents, FileSystem, Partition

#: What blkid calls contents that hold no files by themselves, and what they are.
_NO_FILES = {
    "swap": "swap space",
    "swsuspend": "the memory of a system that sleeps",
    "LVM1_member": "an LVM physical volume",
    "LVM2_member": "an LVM physical volume",
    "crypto_LUKS": "an encrypted volume (LUKS)",
    "BitLocker": "an encrypted volume (BitLocker)",
    "cs_fvault2": "an encrypted volume (FileVault)",
    "linux_raid_member": "a member of a RAID",
    "zfs_member": "a device of a ZFS pool",
    "bcache": "a device of bcache",
    "drbd": "a device of DRBD",
    "stratis": "a device of a Stratis pool",
    "ceph_bluestore": "a device of Ceph",
    "vdo": "a device of VDO",
    "ubi": "an UBI volume",
    "DM_integrity": "a device of dm-integrity",
    "DM_snapshot_cow": "the changes of a snapshot",
    "DM_verity_hash": "the hashes of another file system",
    "jbd": "the journal of another file system",
    "xfs_external_log": "the journal of another file system",
}


def _without_files(type_name: str) -> str | None:
    """What contents of blkid's type are if they hold no files by themselves; None if they do."""
    if type_name.endswith("_member"):
        return _NO_FILES.get(type_name, "a member of a RAID or of a pool of disks")
    return _NO_FILES.get(type_name)


@dataclass(frozen=True, slots=True)
class FileSystemPlace:
    """A file system of a disk: the bytes ``[offset, offset + size)``, shown as the node `node` of the mount.

    `type` is blkid's word, None if only blkid might know it. `partition` is None for the whole
    disk. `unclean`: what it needs because it was not unmounted cleanly, as far as can be told.
    """

    node: str
    offset: int
    size: int
    type: str | None
    partition: int | None = None
    unclean: Unclean | None = None


def choose_file_system(image: Image, partition: int | None) -> FileSystemPlace:
    """The file system of partition number `partition`; without that the only one on the disk.

    Raises ImageError(not_found) if there is none, (invalid_argument) for a choice, (unsupported) for contents
    that hold no files.
    """
    contents = image.contents()
    if partition is not None:
        chosen = _numbered(contents, partition, image.path)
    elif contents.file_system is not None or not contents.table.partitions:
        return _place(image, FileSystemPlace("disk", 0, image.size, None), contents.file_system)
    else:
        chosen = _only(contents, image.path)
    place = FileSystemPlace(f"part{chosen.number}", chosen.start, chosen.size, None, chosen.number)
    return _place(image, place, chosen.file_system)


def _numbered(contents: DiskContents, number: int, path: str) -> Partition:
    for partition in contents.table.partitions:
        if partition.number == number and not partition.container:
            return partition
    raise ImageError(
        ErrorKind.NOT_FOUND, f"has no partition {number} with data; {_listed(contents)}", path=path, op="mount"
    )


def _only(contents: DiskContents, path: str) -> Partition:
    found = [
        each for each in contents.table.partitions if each.file_system and not _without_files(each.file_system.type)
    ]
    if len(found) == 1:
        return found[0]
    how_many = "several file systems" if found else "no file system that tapfs knows"
    raise ImageError(
        ErrorKind.INVALID_ARGUMENT if found else ErrorKind.NOT_FOUND,
        f"has {how_many}; {_listed(contents)}",
        path=path,
        op="mount",
        remedy="choose one with {partition=N}",
    )


def _listed(contents: DiskContents) -> str:
    partitions = [each for each in contents.table.partitions if not each.container]
    return "it has " + (", ".join(map(_named, partitions)) if partitions else "no partitions")


def _named(partition: Partition) -> str:
    found = partition.file_system
    words = [partition.type_name or partition.type] if found is None else [found.type]
    if found is not None and found.label:
        words.append(repr(found.label))
    return f"partition {partition.number} ({' '.join(words)})"


def _place(image: Image, place: FileSystemPlace, found: FileSystem | None) -> FileSystemPlace:
    """The place with what is known of the file system there."""
    if found is None:
        return place
    what = _without_files(found.type)
    if what is not None:
        where = "the disk" if place.partition is None else f"partition {place.partition}"
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            f"{where} is {what}, which has no files by itself",
            path=image.path,
            op="mount",
            remedy="mount it without {files} and use it from there",
        )
    window = Reader(image.read, image.size).window(place.offset, place.size)
    return replace(place, type=found.type, unclean=unclean(window, found.type))
