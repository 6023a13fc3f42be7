"""Choose the file system of a disk that `tapfs mount --files` shows."""

from __future__ import annotations

from collections.abc import Sequence

from tapfs.disk.image import Image
from tapfs.errors import ErrorKind, ImageError
from tapfs.partitions.cleanliness import Unclean, unclean
from tapfs.partitions.reader import Reader
from tapfs.partitions.table import DiskContents, FileSystem, Partition
from tapfs.records import dataclass, replace

#: blkid's names of contents that hold no files by themselves, and a description of each.
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


#: File systems of optical discs. Such a disc may carry a partition table beside its file system, so that
#: it boots from other media, too.
_OF_DISCS = {"iso9660", "udf"}

#: The number of a partition that means the whole disk.
WHOLE_DISK = 0


@dataclass(frozen=True, slots=True)
class FileSystemPlace:
    """A file system of a disk: the bytes ``[offset, offset + size)``, shown as the node `node` of the mount.

    `image` is the image's name, for messages. `type` is blkid's word, None if only blkid might know it.
    `partition` is None for the whole disk. `unclean`: what it needs because it was not unmounted cleanly,
    as far as can be told. `remarks`: what is odd about this place, for who cannot mount it.
    """

    image: str
    node: str
    offset: int
    size: int
    type: str | None
    partition: int | None = None
    unclean: Unclean | None = None
    remarks: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """The place in words."""
        return _where(self.partition)

    def with_remarks(self, text: str) -> str:
        """A message, with the remarks after it."""
        return "; ".join((text, *self.remarks))


def choose_file_system(
    image: Image, partition: int | None, *, name: str, sector_size: int | None = None
) -> FileSystemPlace:
    """The file system of partition number `partition`, 0 for the whole disk; None for the only one that there is.

    `name` is the image's, for messages; `sector_size` as in :meth:`Image.contents`. Raises ImageError(not_found)
    if there is none, (invalid_argument) if there is a choice, (unsupported) for contents that hold no files.
    """
    contents = image.contents(sector_size=sector_size)
    chosen = _only(contents, name) if partition is None else _numbered(contents, partition, name)
    if chosen is None:
        place = FileSystemPlace(name, "disk", 0, image.size, None)
        found = contents.file_system
    else:
        place = FileSystemPlace(name, f"part{chosen.number}", chosen.start, chosen.size, None, chosen.number)
        found = chosen.file_system
    remarks = tuple(note for note in contents.table.notes if note.startswith(f"{place.where} "))
    return _known(image, replace(place, remarks=remarks), found)


def _numbered(contents: DiskContents, number: int, name: str) -> Partition | None:
    """The partition of this number; None for the whole disk."""
    if number == WHOLE_DISK:
        return None
    for partition in _partitions(contents):
        if partition.number == number:
            return partition
    raise ImageError(
        ErrorKind.NOT_FOUND, f"has no partition {number} with data; {_listed(contents)}", path=name, op="mount"
    )


def _only(contents: DiskContents, name: str) -> Partition | None:
    """The only partition with files; None for the whole disk. Raises ImageError(invalid_argument) for a choice."""
    partitions = _partitions(contents)
    whole = contents.file_system
    if not partitions or (whole is not None and _is_of_whole(whole, partitions)):
        return None
    found = [each for each in partitions if each.file_system and not _without_files(each.file_system.type)]
    if whole is None and len(found) == 1:
        return found[0]
    if whole is not None:
        what = "a file system on the whole disk and a partition table, one of which is left from before"
    else:
        what = "several file systems" if found else "no file system that tapfs knows"
    raise ImageError(
        ErrorKind.INVALID_ARGUMENT if found or whole is not None else ErrorKind.NOT_FOUND,
        "; ".join((f"has {what}", _listed(contents), *contents.table.notes)),
        path=name,
        op="mount",
        remedy="choose one with {partition=N}",
    )


def _is_of_whole(whole: FileSystem, partitions: Sequence[Partition]) -> bool:
    """Whether the table is a part of the file system on the whole disk: a disc's, or one that leads to itself."""
    return whole.type in _OF_DISCS or (len(partitions) == 1 and partitions[0].start == 0)


def _partitions(contents: DiskContents) -> list[Partition]:
    return [each for each in contents.table.partitions if not each.container]


def _listed(contents: DiskContents) -> str:
    """All that there is to choose from."""
    partitions = [_named(each) for each in _partitions(contents)]
    if contents.file_system is not None:
        partitions.insert(0, f"partition {WHOLE_DISK} ({_labelled(contents.file_system)} on the whole disk)")
    return "it has " + (", ".join(partitions) if partitions else "no partitions")


def _named(partition: Partition) -> str:
    found = partition.file_system
    what = partition.type_name or partition.type if found is None else _labelled(found)
    return f"partition {partition.number} ({what})"


def _labelled(found: FileSystem) -> str:
    return f"{found.type} {found.label!r}" if found.label else found.type


def _where(partition: int | None) -> str:
    return "the disk" if partition is None else f"partition {partition}"


def _known(image: Image, place: FileSystemPlace, found: FileSystem | None) -> FileSystemPlace:
    """The place with what is known of the file system there."""
    if found is None:
        return place
    what = _without_files(found.type)
    if what is not None:
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            f"{place.where} is {what}, which has no files by itself",
            path=place.image,
            op="mount",
            remedy="mount it without {files} and use it from there",
        )
    window = Reader(image.read, image.size).window(place.offset, place.size)
    return replace(place, type=found.type, unclean=unclean(window, found.type))
