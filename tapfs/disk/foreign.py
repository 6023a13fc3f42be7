"""Name image formats and archives that tapfs does not read, by the first and the last bytes of a file.

The bytes of such a file are no disk: a guest would see the container's header in place of a partition table. So a file
for which the user names no format is looked up here, before the file is taken for a raw disk. `TABLE` is the one list.
A format that gets a driver leaves the list.

Where a file shows both a signature of this table and the start of a raw disk (a partition table, a boot sector, a
file system), the signature counts. Three signatures are so short that a boot sector may hold them by chance: these
do not count in a sector that has a partition table.
A tar archive written straight to a disk, as to a tape, is named as a tar archive.
"""

from __future__ import annotations

from collections.abc import Callable

from tapfs.errors import ErrorKind, ImageError
from tapfs.packages.signs import descriptor_kind
from tapfs.records import NamedTuple

#: Bytes that `recognise` needs of the start and of the end of a file.
HEAD_BYTES = 512
TAIL_BYTES = 1024

_SECTOR = 512
_Test = Callable[[bytes, bytes], bool]


class ForeignFormat(NamedTuple):
    """A format that tapfs recognises and does not read.

    `what` names a file of it, with the article. `remedy` says what reads it. `archive`: it is no image format, but
    images are kept in it. `packed`: it is one file packed as a whole, which `tapfs.host.packed` unpacks. `test` takes
    the first and the last bytes of a file.
    """

    name: str
    what: str
    remedy: str
    test: _Test
    archive: bool = False
    packed: bool = False

    def error(self, path: str, say_raw: str) -> ImageError:
        """The refusal to take `path` for a raw disk; `say_raw` is how the user would say that it is one."""
        message = f"is {self.what}, " + ("not a disk image" if self.archive else "which tapfs does not read")
        return ImageError(
            ErrorKind.UNSUPPORTED,
            message,
            path=path,
            op="recognise the format",
            remedy=f"{self.remedy}, or {say_raw} to take its bytes as they are",
        )


def recognise(head: bytes, tail: bytes) -> ForeignFormat | None:
    """The format of a file with this start and end, or None.

    `head` holds at least `HEAD_BYTES` and `tail` at least `TAIL_BYTES`, or the whole of a shorter file.
    """
    return next((found for found in TABLE if found.test(head, tail)), None)


def may_be_packed(head: bytes) -> bool:
    """Whether a file with this start may be one that is packed as a whole."""
    return any(found.packed and found.test(head, b"") for found in TABLE)


# -- tests -----------------------------------------------------------------------------------------


def _starts(*magics: bytes, at: int = 0) -> _Test:
    return lambda head, _: any(head[at : at + len(magic)] == magic for magic in magics)


def _ends(magic: bytes, *, distance: int) -> _Test:
    """`magic` stands `distance` bytes before the end of the file."""
    return lambda _, tail: len(tail) >= distance and tail[len(tail) - distance :].startswith(magic)


def _any(*tests: _Test) -> _Test:
    return lambda head, tail: any(test(head, tail) for test in tests)


def _qcow_version(head: bytes) -> int | None:
    """The version of a file with the magic of QEMU's qcow formats; 0 if the file ends before it."""
    if not head.startswith(b"QFI\xfb"):
        return None
    return int.from_bytes(head[4:8], "big") if len(head) >= 8 else 0


def _later_qcow(head: bytes, _: bytes) -> bool:
    return _qcow_version(head) not in {None, 1, 2, 3}


def _cloop(head: bytes, _: bytes) -> bool:
    """A shell script whose second line is the format's version."""
    return head.startswith(b"#!/bin/sh\n#V") and b" Format\n" in head[:32]


def _cow(head: bytes, _: bytes) -> bool:
    """The versions 2 and 3 are big-endian, version 1 has the byte order of its host."""
    version = head[4:8]
    return (head.startswith(b"OOOM") and version in {b"\0\0\0\1", b"\0\0\0\2", b"\0\0\0\3"}) or (
        head.startswith(b"MOOO") and version == b"\1\0\0\0"
    )


def _has_partition_table(head: bytes) -> bool:
    if head[510:512] != b"\x55\xaa":
        return False
    entries = [head[at : at + 16] for at in range(446, 510, 16)]
    return all(entry[0] in {0, 0x80} for entry in entries) and any(entry[4] and any(entry[12:]) for entry in entries)


def _gzip(head: bytes, _: bytes) -> bool:
    """RFC 1952: method 8 is the only one, the three high flags are zero."""
    return head.startswith(b"\x1f\x8b\x08") and len(head) > 3 and head[3] < 0x20 and not _has_partition_table(head)


def _compress(head: bytes, _: bytes) -> bool:
    """The third byte has the length of the codes, 9 to 16 bits, and no reserved bit."""
    if not head.startswith(b"\x1f\x9d") or len(head) < 3 or _has_partition_table(head):
        return False
    return not head[2] & 0x60 and 9 <= head[2] & 0x1F <= 16


def _lzma(head: bytes, _: bytes) -> bool:
    """The old .lzma: the usual properties, a dictionary that XZ Utils would write, a size, and a coder's first zero."""
    if not head.startswith(b"\x5d") or len(head) < 14 or _has_partition_table(head):
        return False
    dictionary, size = int.from_bytes(head[1:5], "little"), int.from_bytes(head[5:13], "little")
    lowest_bit = dictionary & -dictionary
    known_dictionary = dictionary >= 1 << 12 and dictionary in {lowest_bit, 3 * lowest_bit}
    return known_dictionary and (size == (1 << 64) - 1 or 0 < size < 1 << 38) and head[13] == 0


def _zstd(head: bytes, _: bytes) -> bool:
    """RFC 8878: a frame, or the skippable frame that parallel compressors write first (LZ4 has the same)."""
    return head.startswith(b"\x28\xb5\x2f\xfd") or (head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50)


def _bzip2(head: bytes, _: bytes) -> bool:
    """The digit is the block size; then comes a block or the end of the stream."""
    blocks = (b"\x31\x41\x59\x26\x53\x59", b"\x17\x72\x45\x38\x50\x90")
    return head.startswith(b"BZh") and head[3:4] in b"123456789" and head[4:10] in blocks


def _machine(head: bytes, _: bytes) -> bool:
    return descriptor_kind(head) is not None


def _tar(head: bytes, _: bytes) -> bool:
    """POSIX and GNU archives by their magic, older ones by the sum over the header, which counts itself as blanks."""
    if head[257:262] == b"ustar":
        return True
    header = head[:_SECTOR]
    digits = header[148:156].strip(b" \0")
    if len(header) < _SECTOR or not header[0] or not digits or digits.strip(b"01234567"):
        return False
    return int(digits, 8) == sum(header) - sum(header[148:156]) + 8 * 0x20


# -- the table -------------------------------------------------------------------------------------

_QEMU = "make a raw or qcow image of it with qemu-img convert"
#: The magic and the versions 1 and 2 of bximage's format "sparse".
_BOCHS_SPARSE = b"\xce\x8a\x46\x02"
_MACOS = "make a raw image of it with hdiutil convert on macOS"

#: The signatures are published in: QEMU's block drivers and docs/interop (qcow2, qed, cow, bochs, cloop, dmg,
#: parallels), Microsoft's Virtual Hard Disk Image Format Specification and MS-VHDX, libyal's documentation of EWF,
#: VHD, Parallels and Mac OS images, the notes on ASIF by its readers, afflib.h, Proxmox's vma_spec.txt, Android's
#: sparse_format.h, file(1) for the rest.
TABLE: tuple[ForeignFormat, ...] = (
    ForeignFormat("qcow-later", "a qcow image of an unknown version", _QEMU, _later_qcow),
    ForeignFormat("bochs", "a Bochs image", _QEMU, _starts(b"Bochs Virtual HD Image")),
    ForeignFormat(
        "bochs-sparse", "a sparse image of Bochs", "make a flat image of it with bximage", _starts(_BOCHS_SPARSE)
    ),
    ForeignFormat("cloop", "a cloop image", _QEMU, _cloop),
    ForeignFormat("cow", "a COW image of User-mode Linux", "merge it with uml_moo", _cow),
    ForeignFormat(
        "dmg-encrypted",
        "an encrypted Apple disk image (DMG)",
        _MACOS,
        _any(_starts(b"encrcdsa"), _ends(b"cdsaencr", distance=8)),
    ),
    ForeignFormat("sparseimage", "an Apple sparse image", _MACOS, _starts(b"sprs\0\0\0")),
    ForeignFormat(
        "asif", "an Apple sparse image (ASIF)", "copy its disk with diskutil image on macOS", _starts(b"shdw\0\0\0")
    ),
    ForeignFormat(
        "ewf2",
        "an EnCase image of version 2 (Ex01)",
        "make a raw image of it with ewfexport",
        _starts(b"EVF2\x0d\x0a\x81\0"),
    ),
    ForeignFormat(
        "ewf-logical",
        "EnCase logical evidence (L01), which holds files and no disk",
        "take the files out with ewfexport",
        _starts(b"LVF\x09\x0d\x0a\xff\0", b"LEF2\x0d\x0a\x81\0"),
    ),
    ForeignFormat("aff", "an AFF image", "make a raw image of it with affconvert -r", _starts(b"AFF10\x0d\x0a\0")),
    ForeignFormat(
        "ad1",
        "an AccessData logical image (AD1), which holds files and no disk",
        "take the files out with FTK Imager",
        _starts(b"ADSEGMENTEDFILE\0", b"ADCRYPT\0"),
    ),
    ForeignFormat("vma", "a VMA backup of Proxmox VE", "unpack it with vma extract", _starts(b"VMA\0\0\0\0\1")),
    ForeignFormat(
        "android-sparse",
        "an Android sparse image",
        "make a raw image of it with simg2img",
        _starts(b"\x3a\xff\x26\xed"),
    ),
    ForeignFormat("chd", "a CHD image of MAME", "make a raw image of it with chdman extracthd", _starts(b"MComprHD")),
    ForeignFormat("partclone", "a Partclone image", "restore it with partclone.restore", _starts(b"partclone-image")),
    ForeignFormat("partimage", "a Partimage image", "restore it with partimage", _starts(b"PaRtImAgE-VoLuMe")),
    ForeignFormat("ntfsclone", "an ntfsclone image", "restore it with ntfsclone -r", _starts(b"\0ntfsclone-image")),
    ForeignFormat("ffu", "a Full Flash Update of Windows", "apply it with DISM", _starts(b"SignedImage ", at=4)),
    ForeignFormat("wim", "a WIM archive", "unpack it with wimlib-imagex", _starts(b"MSWIM\0\0\0"), archive=True),
    ForeignFormat("gzip", "a gzip file", "unpack it with gunzip", _gzip, archive=True, packed=True),
    ForeignFormat("xz", "an xz file", "unpack it with unxz", _starts(b"\xfd7zXZ\0"), archive=True, packed=True),
    ForeignFormat("zstd", "a Zstandard file", "unpack it with unzstd", _zstd, archive=True, packed=True),
    ForeignFormat("bzip2", "a bzip2 file", "unpack it with bunzip2", _bzip2, archive=True, packed=True),
    ForeignFormat(
        "lz4", "an LZ4 file", "unpack it with lz4 -d", _starts(b"\x04\x22\x4d\x18", b"\x02\x21\x4c\x18"), archive=True
    ),
    ForeignFormat("lzma", "an LZMA file", "unpack it with unlzma", _lzma, archive=True),
    ForeignFormat("lzip", "an lzip file", "unpack it with lzip -d", _starts(b"LZIP\1"), archive=True),
    ForeignFormat(
        "lzop", "an lzop file", "unpack it with lzop -d", _starts(b"\x89LZO\0\x0d\x0a\x1a\x0a"), archive=True
    ),
    ForeignFormat("compress", "a file of compress", "unpack it with uncompress", _compress, archive=True),
    ForeignFormat(
        "zip", "a ZIP archive", "unpack it with unzip", _starts(b"PK\3\4", b"PK\5\6", b"PK\7\x08"), archive=True
    ),
    ForeignFormat("7z", "a 7z archive", "unpack it with 7z x", _starts(b"7z\xbc\xaf\x27\x1c"), archive=True),
    ForeignFormat("rar", "a RAR archive", "unpack it with unrar x", _starts(b"Rar!\x1a\x07"), archive=True),
    ForeignFormat(
        "machine",
        "the description of a virtual machine (.ovf, .vmx, .vbox) without a disk of its own",
        "name a disk",
        _machine,
        archive=True,
    ),
    ForeignFormat("tar", "a tar archive", "unpack it with tar -x", _tar, archive=True),
)
