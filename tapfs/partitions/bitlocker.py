"""BitLocker: a volume that Windows has encrypted, known by its boot sector and its metadata (as libbde describes it).

The boot sector of a removable one ("BitLocker To Go") is that of a FAT32 with a program for Windows XP that reads the
volume. So a FAT that shows itself there is not what the volume holds.
"""

from __future__ import annotations

from tapfs.partitions.reader import Reader
from tapfs.partitions.table import FileSystem

_OEM_AT = 3
_SIGNATURE = b"-FVE-FS-"
_OEM_TO_GO = b"MSWIN4.1"
#: Offsets in the boot sector of the identifier; behind it stands the offset of the first block of metadata.
_IDENTIFIER_AT, _IDENTIFIER_TO_GO_AT = 160, 424
#: Wholly encrypted, and "used space only", in the byte order that GUIDs have on disks.
_IDENTIFIERS = frozenset(
    {bytes.fromhex("3bd66749292ed84a8399f6a339e3d001"), bytes.fromhex("3b4da89280dd0e4d9e4eb1e3284eaed8")}
)
#: Windows Vista has no identifier: the metadata stand where NTFS has the copy of its MFT, in clusters.
_VISTA_JUMP = b"\xeb\x52\x90"
_SECTOR_BYTES_AT, _CLUSTER_SECTORS_AT, _MFT_COPY_AT = 11, 13, 56
_VERSIONS = frozenset({1, 2})


def bitlocker(disk: Reader) -> FileSystem | None:
    """The volume, if this is one: its metadata have to be where the boot sector says."""
    boot = disk.read(0, 512)
    oem = boot[_OEM_AT : _OEM_AT + 8]
    if len(boot) < 512 or oem not in {_SIGNATURE, _OEM_TO_GO}:
        return None
    if oem == _SIGNATURE and boot.startswith(_VISTA_JUMP):
        cluster = int.from_bytes(boot[_SECTOR_BYTES_AT : _SECTOR_BYTES_AT + 2], "little") * boot[_CLUSTER_SECTORS_AT]
        offset = int.from_bytes(boot[_MFT_COPY_AT : _MFT_COPY_AT + 8], "little") * cluster
    else:
        at = _IDENTIFIER_AT if oem == _SIGNATURE else _IDENTIFIER_TO_GO_AT
        if boot[at : at + 16] not in _IDENTIFIERS:
            return None
        offset = int.from_bytes(boot[at + 16 : at + 24], "little")
    block = disk.read(offset, 12)
    known = block.startswith(_SIGNATURE) and int.from_bytes(block[10:12], "little") in _VERSIONS
    return FileSystem("BitLocker") if known else None
