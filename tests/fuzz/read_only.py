"""Edits of what tapfs only reads, as a fuzzer gives them: formats, packed streams, packages, tables, file systems.

An input says which image, and what is changed where. A format with checksums has them made true again in most inputs,
as a hostile writer would. Each answer is an ImageError or true to its contract, and takes a few seconds of the
processor at most. A fuzzer slows Python down, and the bound allows for that.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import os
import random
import struct
import subprocess
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from functools import cache
from itertools import islice
from pathlib import Path

import zstandard

import tapfs
from tapfs.disk.probe import format_named
from tapfs.errors import ImageError
from tapfs.extent import Range
from tapfs.partitions.contents import disk_contents
from tapfs.partitions.free_space.by_type import free_ranges
from tapfs.partitions.owners.by_type import owners_of
from tapfs.partitions.reader import Reader
from tapfs.testing.hostile import EDGES, use
from tapfs.testing.model import MemoryFile
from tapfs.testing.processor_time import bounded
from tapfs.testing.subject import Subject
from tests import dmg_images, ewf_images, luks_images, package_files
from tests import filled_file_systems as filled
from tests.fuzz.edits import MOST_EDITS, Input, edit

#: Of the processor, for all that is asked of one image.
MOST_SECONDS = 4.0
_PASSWORD = b"password"
_DISK = 1 << 20
_MIB = 1 << 20


class TooSlowError(Exception):
    """An answer took longer than a hostile image may make it take."""


def quickly(seconds: float) -> AbstractContextManager[None]:
    """Raise TooSlowError once the block has taken so much time of the processor."""
    return bounded(seconds, lambda _frame: TooSlowError(f"more than {seconds} s of the processor"))


def try_one(given: Input, kinds: Sequence[str], folder: Path) -> str:
    """Edit an image of one of the kinds as the input says, and ask for everything; the kind.

    `folder` keeps what was made, and the edited file. Raises whatever is no ImageError, TooSlowError, and
    ViolationError where a driver breaks its contract.
    """
    kind = kinds[given.ConsumeIntInRange(0, len(kinds) - 1)]
    with quickly(MOST_SECONDS):
        KINDS[kind](given, folder)
    return kind


def _edited(given: Input, content: bytes, reseal: Callable[[bytearray], None] | None = None) -> bytearray:
    data = bytearray(content)
    for _ in range(given.ConsumeIntInRange(1, MOST_EDITS)):
        edit(given, data)
    if reseal is not None and given.ConsumeIntInRange(0, 3):
        reseal(data)
    return data


# Formats: the driver alone, in memory


def _of_driver(
    name: str, images: Callable[[Path], Sequence[bytes]], reseal: Callable[[bytearray], None] | None
) -> Callable[[Input, Path], None]:
    made = cache(images)

    def one(given: Input, folder: Path) -> None:
        seeds = made(folder)
        image = _edited(given, seeds[given.ConsumeIntInRange(0, len(seeds) - 1)], reseal)
        found = format_named(name)
        use(Subject(found, images=[bytes(image)]), MemoryFile(bytes(image)), random.Random(1))

    return one


def _by_qemu(name: str, *options: str) -> Callable[[Path], Sequence[bytes]]:
    def make(folder: Path) -> Sequence[bytes]:
        raw, path = folder / "source.raw", folder / f"source.{name}"
        raw.write_bytes(_disk())
        said = ["-o", ",".join(options)] if options else []
        filled.run("qemu-img", "convert", "-f", "raw", "-O", name, *said, raw, path)
        return [path.read_bytes()]

    return make


def _disk() -> bytes:
    choice = random.Random(3)
    return b"".join(choice.randbytes(8192) + bytes(24576) for _ in range(_DISK // 32768))


def _dmg(folder: Path) -> Sequence[bytes]:
    del folder
    some, zeros = random.Random(4).randbytes(2048) + b"a" * 6144, bytes(8192)
    blocks = [
        (kind, some) for kind in (dmg_images.RAW, dmg_images.ADC, dmg_images.ZLIB, dmg_images.BZIP2, dmg_images.LZMA)
    ]
    parts = [(0, [*blocks, (dmg_images.ZERO, zeros)]), (200, [(dmg_images.IGNORED, zeros), (dmg_images.ZLIB, some)])]
    return [dmg_images.image(parts), dmg_images.image(parts[:1], resources=True)]


def _ewf(folder: Path) -> Sequence[bytes]:
    del folder
    return [ewf_images.finished(_disk()[:200_000]), ewf_images.finished(bytes(100_000 // 512 * 512), pack=(True,))]


def _seal_ewf(data: bytearray) -> None:
    """Make the checksums of the sections, of the volume and of the tables true."""
    at = 13
    for _ in range(50):
        if at + 76 > len(data):
            return
        data[at + 72 : at + 76] = struct.pack("<I", zlib.adler32(data[at : at + 72]))
        kind, following, size = struct.unpack_from("<16sQQ", data, at)
        body, end = at + 76, min(at + size, len(data))
        if kind.startswith(b"volume") and end - body > 4:
            data[end - 4 : end] = struct.pack("<I", zlib.adler32(data[body : end - 4]))
        if kind.startswith(b"table") and end - body > 28:
            data[body + 20 : body + 24] = struct.pack("<I", zlib.adler32(data[body : body + 20]))
            data[end - 4 : end] = struct.pack("<I", zlib.adler32(data[body + 24 : end - 4]))
        if following <= at:
            return
        at = following


def _luks(folder: Path) -> Sequence[bytes]:
    del folder
    first = Subject(format_named("luks"), size=_DISK, options={"iter-time": "10"}).new_file()
    return [bytes(first.data), _luks2()]


def _luks2() -> bytes:
    return luks_images.simple_2(_disk()[:65536])


def _seal_luks(data: bytearray) -> None:
    """Make the checksums of both headers of version 2 true."""
    for at in (0, luks_images.HEADER_2):
        size = int.from_bytes(data[at + 8 : at + 16], "big")
        if data[at + 6 : at + 8] == b"\0\2" and size <= _MIB:
            data[at + 448 : at + 512] = bytes(64)
            data[at + 448 : at + 480] = hashlib.sha256(data[at : at + size]).digest()


# Files that are opened whole: packed streams and packages


def _of_file(
    suffix: str, make: Callable[[Path], bytes], reseal: Callable[[bytearray], None] | None = None
) -> Callable[[Input, Path], None]:
    made = cache(make)

    def one(given: Input, folder: Path) -> None:
        path = folder / f"edited{suffix}"
        path.write_bytes(_edited(given, made(folder), reseal))
        _look_at(path)

    return one


def _look_at(path: Path) -> None:
    """Open, map, read and check a file."""
    with suppress(ImageError), tapfs.open(path, password=_PASSWORD) as disk:
        _ = disk.info
        size = min(disk.size, 1 << 40)
        for _ in islice(disk.extents(0, size), 500):
            pass
        for offset in range(0, size, max(4096, size // 4)):
            with suppress(ImageError):
                disk.read(offset, min(size - offset, 20_000))
    with suppress(ImageError):
        tapfs.check(path)


def _qcow2(folder: Path) -> bytes:
    return _by_qemu("qcow2")(folder)[0][: 1 << 19]


def _packed(pack: Callable[[bytes], bytes]) -> Callable[[Path], bytes]:
    return lambda folder: pack(_qcow2(folder))


def _zstd(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(content)


def _ova(folder: Path) -> bytes:
    vmdk = _by_qemu("vmdk", "subformat=streamOptimized")(folder)[0]
    return package_files.ova(folder / "source.ova", {"disk.vmdk": vmdk, "other.vmdk": vmdk}).read_bytes()


def _xva(folder: Path) -> bytes:
    return package_files.xva(folder / "source.xva", {"Ref:7": b"x" * _MIB + bytes(2 * _MIB) + b"y" * _MIB}).read_bytes()


def _seal_tar(data: bytearray) -> None:
    """Make the checksums of the headers of the members true."""
    at = 0
    for _ in range(100):
        header = data[at : at + 512]
        if len(header) < 512 or not any(header):
            return
        header[148:156] = b" " * 8
        data[at + 148 : at + 156] = f"{sum(header):06o}\0 ".encode()
        with suppress(ValueError):
            at += int(header[124:135].strip(b"\0 ") or b"0", 8) + 511 & ~511
        at += 512


def _vmx(folder: Path) -> bytes:
    (folder / "disk.vmdk").write_bytes(_by_qemu("vmdk")(folder)[0])
    lines = {
        "scsi0.present": "TRUE",
        "scsi0:0.present": "TRUE",
        "scsi0:0.fileName": "disk.vmdk",
        "ide0:0.fileName": "x",
    }
    return package_files.vmx(lines)


def _vbox(folder: Path) -> bytes:
    (folder / "disk.vdi").write_bytes(_by_qemu("vdi")(folder)[0])
    first, second = "{11111111-1111-1111-1111-111111111111}", "{22222222-2222-2222-2222-222222222222}"
    inner = f'<HardDisk uuid="{second}" location="disk.vdi" format="VDI"/>'
    disks = f'<HardDisk uuid="{first}" location="disk.vdi" format="VDI">{inner}</HardDisk>'
    return package_files.vbox(disks, [first, second])


# File systems and partition tables: what is read of them is changed


class Changed:
    """A file with changes over it, which notes what is read of it."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        self.size = path.stat().st_size
        self.changes: list[tuple[int, bytes]] = []
        self.looked_at: list[Range] | None = []

    def __call__(self, offset: int, length: int) -> bytes:
        """Read."""
        assert 0 <= offset <= offset + length <= self.size
        assert length <= 64 * _MIB
        if self.looked_at is not None:
            self.looked_at.append(Range(offset, length))
        found = bytearray(os.pread(self._descriptor, length, offset))
        for at, value in self.changes:
            first, last = max(at, offset), min(at + len(value), offset + length)
            if first < last:
                found[first - offset : last - offset] = value[first - at : last - at]
        return bytes(found)


def _ask_all(disk: Changed, type_name: str) -> None:
    disk_contents(disk, disk.size)
    with suppress(ImageError):
        for _ in free_ranges(Reader(disk, disk.size), type_name):
            pass
    owners_of(Reader(disk, disk.size), type_name, [Range(0, disk.size)])


def _of_file_system(type_name: str, make: Callable[[Path], Path]) -> Callable[[Input, Path], None]:
    @cache
    def made(folder: Path) -> tuple[Changed, list[Range]]:
        disk = Changed(make(folder))
        _ask_all(disk, type_name)
        assert disk.looked_at
        places = sorted({(each.offset, each.length) for each in disk.looked_at})
        disk.looked_at = None
        return disk, [Range(*each) for each in places]

    def one(given: Input, folder: Path) -> None:
        disk, places = made(folder)
        disk.changes = [_change(given, places) for _ in range(given.ConsumeIntInRange(1, MOST_EDITS))]
        _ask_all(disk, type_name)

    return one


def _change(given: Input, places: Sequence[Range]) -> tuple[int, bytes]:
    place = places[given.ConsumeIntInRange(0, len(places) - 1)]
    width = 1 << given.ConsumeIntInRange(0, 3)
    at = place.offset + given.ConsumeIntInRange(0, min(place.length, 1 << 16) - 1) // width * width
    edge = given.ConsumeIntInRange(0, len(EDGES))
    value = given.ConsumeIntInRange(0, (1 << 32) - 1) if edge == len(EDGES) else EDGES[edge]
    return at, (value % (1 << 8 * width)).to_bytes(width, "big" if given.ConsumeIntInRange(0, 1) else "little")


def _files(folder: Path) -> Path:
    above = folder / "files"
    if not above.exists():
        (above / "many").mkdir(parents=True)
        choice = random.Random(5)
        for number in range(120):
            (above / "many" / f"a file with a long name {number:03}").write_bytes(choice.randbytes(300))
        for number in range(3):
            (above / f"large{number}").write_bytes(choice.randbytes(90_000))
        (above / "link").symlink_to("large0")
    return above


def _ext(kind: str, *options: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = filled.empty(folder / kind, 4 * _MIB)
        filled.run("mke2fs", "-qF", "-t", kind, "-d", _files(folder), *options, path)
        return path

    return make


def _xfs(folder: Path) -> Path:
    return filled.make_xfs_of_prototype(folder / "xfs", 300 * _MIB, "-m", "crc=0")


def _ntfs(folder: Path) -> Path:
    path = filled.empty(folder / "ntfs", 4 * _MIB)
    filled.run("mkntfs", "-FqQ", path)
    for each in sorted((_files(folder) / "many").iterdir())[:40]:
        filled.run("ntfscp", "-q", path, each, each.name)
    return path


def _fat(folder: Path) -> Path:
    return filled.make_fat(folder / "fat", 16 * _MIB, "-F", "16", "-s", "4")


def _partitioned(label: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = filled.empty(folder / label, 4 * _MIB)
        rows = ["start=64, size=512", "start=1024, size=512", "start=2048, type=5", "start=2112, size=256"]
        script = folder / "script"
        script.write_text("\n".join([f"label: {label}", *rows[: 2 if label == "gpt" else 4]]))
        with script.open("rb") as lines:
            subprocess.run(["sfdisk", "-q", "--no-reread", path], stdin=lines, check=True)
        return path

    return make


KINDS: Mapping[str, Callable[[Input, Path], None]] = {
    "qed": _of_driver("qed", _by_qemu("qed"), None),
    "parallels": _of_driver("parallels", _by_qemu("parallels"), None),
    "dmg": _of_driver("dmg", _dmg, None),
    "ewf": _of_driver("ewf", _ewf, _seal_ewf),
    "luks": _of_driver("luks", _luks, _seal_luks),
    "gz": _of_file(".gz", _packed(gzip.compress)),
    "bz2": _of_file(".bz2", _packed(bz2.compress)),
    "xz": _of_file(".xz", _packed(lzma.compress)),
    "zst": _of_file(".zst", _packed(_zstd)),
    "ova": _of_file(".ova", _ova, _seal_tar),
    "xva": _of_file(".xva", _xva, _seal_tar),
    "vmx": _of_file(".vmx", _vmx),
    "vbox": _of_file(".vbox", _vbox),
    "ext2": _of_file_system("ext2", _ext("ext2")),
    "ext4": _of_file_system("ext4", _ext("ext4", "-O", "^metadata_csum,^resize_inode")),
    "xfs": _of_file_system("xfs", _xfs),
    "ntfs": _of_file_system("ntfs", _ntfs),
    "fat": _of_file_system("vfat", _fat),
    "dos": _of_file_system("swap", _partitioned("dos")),
    "gpt": _of_file_system("swap", _partitioned("gpt")),
}
