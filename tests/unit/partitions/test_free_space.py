"""Free space is what the tools of each file system say; where a record cannot be trusted nothing is said at all."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Range
from tapfs.partitions.free_space.bit_runs import BitRuns, joined
from tests import filled_file_systems as filled
from tests.filled_file_systems import MIB, free_in

#: Kind, size in MiB, options of mke2fs.
EXT = [
    ("ext2", 16, "-b 1024"),
    ("ext2", 16, "-b 1024 -O ^sparse_super,^resize_inode"),
    ("ext3", 32, "-b 4096 -g 1024"),
    ("ext4", 64, "-b 1024"),
    ("ext4", 64, "-b 1024 -O ^metadata_csum,uninit_bg"),
    ("ext4", 64, "-b 1024 -O ^metadata_csum,^uninit_bg,^64bit"),
    ("ext4", 64, "-b 1024 -O meta_bg,^resize_inode,^flex_bg"),
    ("ext4", 64, "-b 1024 -O meta_bg,^resize_inode,^metadata_csum,uninit_bg"),
    ("ext4", 64, "-b 1024 -O bigalloc -C 16384"),
    ("ext4", 64, "-b 4096 -O bigalloc,metadata_csum_seed"),
    ("ext4", 64, "-b 1024 -O sparse_super2,inline_data,ea_inode,large_dir,casefold,verity,encrypt,project"),
    ("ext4", 64, "-b 65536"),
]


@pytest.mark.parametrize(("kind", "size", "options"), EXT, ids=[f"{kind} {options}" for kind, _, options in EXT])
def test_ext_as_dumpe2fs_says(tmp_path: Path, kind: str, size: int, options: str) -> None:
    path = filled.make_ext(tmp_path / "disk", size * MIB, *options.split(), kind=kind)
    if "seed" in options:
        filled.run("tune2fs", "-U", "random", path)  # the checksums keep the seed of the old UUID
    found = free_in(path, kind)
    assert found == filled.free_by_dumpe2fs(path)
    assert len(found) > 20


@pytest.mark.parametrize("options", ["", "-m crc=1,finobt=0,rmapbt=0,reflink=0", "-m rmapbt=1 -b size=1024"])
def test_xfs_as_xfs_db_says(tmp_path: Path, options: str) -> None:
    path = filled.make_xfs(tmp_path / "disk", 300 * MIB, *options.split())
    found = free_in(path, "xfs")
    assert found == filled.free_by_xfs_db(path)
    assert len(found) > 20


@pytest.mark.parametrize("options", ["-m crc=0", "-m crc=0 -b size=512 -i size=256", "-b size=65536"])
def test_xfs_that_this_kernel_does_not_mount(tmp_path: Path, options: str) -> None:
    path = filled.make_xfs_of_prototype(tmp_path / "disk", 300 * MIB, *options.split())
    assert free_in(path, "xfs") == filled.free_by_xfs_db(path)


def test_xfs_with_trees_of_several_levels(tmp_path: Path) -> None:
    """Every second one of thousands of small files is deleted, so that the records of a group take many blocks."""
    path = tmp_path / "disk"
    filled.run("mkfs.xfs", "-qf", "-b", "size=1024", "-d", "agcount=2", filled.empty(path, 300 * MIB))
    with filled.mounted(path, tmp_path / "mount") as folder:
        for number in range(1200):
            (folder / f"f{number}").write_bytes(b"x" * 1024)
        os.sync()
        for number in range(0, 1200, 2):
            (folder / f"f{number}").unlink()
    found = free_in(path, "xfs")
    assert len(found) > 500
    assert found == filled.free_by_xfs_db(path)


@pytest.mark.parametrize("options", ["", "-c 512", "-c 65536", "-s 4096"])
def test_ntfs_as_ntfscat_says(tmp_path: Path, options: str) -> None:
    path = filled.make_ntfs(tmp_path / "disk", 64 * MIB, *options.split())
    found = free_in(path, "ntfs")
    assert found == filled.free_by_ntfscat(path)
    assert len(found) > 5


@pytest.mark.parametrize(
    ("size", "options"), [(4, "-F 12"), (16, "-F 12 -S 4096"), (20, "-F 16"), (64, "-F 32"), (40, "-F 32 -f 1 -s 2")]
)
def test_fat_as_fsck_counts(tmp_path: Path, size: int, options: str) -> None:
    path = filled.make_fat(tmp_path / "disk", size * MIB, *options.split())
    found = free_in(path, "vfat")
    assert sum(each.length for each in found) == filled.free_by_fsck(path)
    assert len(found) > 20


def test_swap_is_free_behind_its_header(tmp_path: Path) -> None:
    path = filled.empty(tmp_path / "disk", MIB)
    path.chmod(0o600)
    filled.run("mkswap", path)
    assert free_in(path, "swap") == [Range(4096, MIB - 4096)]
    patch(path, 4086, b"S1SUSPEND\0")
    refused(path, "swap", "no signature")


def test_runs_of_bits() -> None:
    bits = BitRuns(b"\x05\xff\x00", 20)
    assert list(bits.runs()) == [(1, 2), (3, 8), (16, 20)]
    assert bits.free == 10
    assert bits.any_free(0, 2)
    assert not bits.any_free(8, 16)
    assert list(joined([Range(0, 4), Range(4, 2), Range(8, 1), Range(9, 0)])) == [Range(0, 6), Range(8, 1)]


# Refusals. Each names its reason, so that a user knows what to do about it.


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def refused(path: Path, kind: str, said: str) -> ImageError:
    with pytest.raises(ImageError, match=said) as caught:
        free_in(path, kind)
    assert caught.value.kind in {ErrorKind.CORRUPT, ErrorKind.UNSUPPORTED}
    return caught.value


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file system of each kind, not to be changed."""
    folder = tmp_path_factory.mktemp("originals")
    filled.make_ext(folder / "ext4", 64 * MIB, "-b", "1024")
    filled.make_ext(folder / "ext4-without-sums", 64 * MIB, "-b", "1024", "-O", "^metadata_csum,^uninit_bg")
    filled.make_xfs(folder / "xfs", 300 * MIB)
    filled.make_xfs_of_prototype(folder / "xfs-of-version-4", 300 * MIB, "-m", "crc=0")
    filled.make_ntfs(folder / "ntfs", 20 * MIB)
    filled.make_fat(folder / "vfat", 20 * MIB, "-F", "16")
    return folder


@pytest.fixture
def copy(originals: Path, tmp_path: Path) -> Callable[[str], Path]:
    def copied(name: str) -> Path:
        subprocess.run(["cp", "--sparse=always", originals / name, tmp_path / "disk"], check=True)
        return tmp_path / "disk"

    return copied


def with_superblock_sum(path: Path, offset: int, data: bytes) -> None:
    """Change the superblock of an ext4 and make its checksum fit."""
    filled.run("debugfs", "-wR", f"ssv {offset} {int.from_bytes(data, 'little')}", path)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("feature_incompat", 0x2C6, "journal is to be replayed"),
        ("state", 0, "run e2fsck first"),
        ("state", 3, "met errors"),
        ("feature_ro_compat", 0x1046B, "orphan file"),
        ("feature_incompat", 0x802C2, "features that tapfs does not know"),
        ("feature_ro_compat", 0x104EB, "."),
        ("blocks_count", 70000, "claims"),
        ("checksum_type", 2, "unknown type"),
    ],
)
def test_ext4_that_cannot_be_taken_at_its_word(copy: Callable[[str], Path], field: str, value: int, said: str) -> None:
    path = copy("ext4")
    filled.run("debugfs", "-wR", f"ssv {field} {value}", path)
    refused(path, "ext4", said)


def test_ext4_with_a_damaged_record(copy: Callable[[str], Path]) -> None:
    path = copy("ext4")
    patch(path, 1024 + 0x78, b"label")
    refused(path, "ext4", "checksum of the superblock")
    path = copy("ext4")
    patch(path, 2048 + 12, b"\xff")
    refused(path, "ext4", "checksum of the descriptor of group 0")
    path = copy("ext4")
    bitmap = int.from_bytes(path.read_bytes()[2048:2052], "little") * 1024
    patch(path, bitmap + 1000, b"\x7f")
    refused(path, "ext4", "checksum of the bitmap of group 0")


def test_ext_without_sums_is_held_to_its_counts_and_its_metadata(copy: Callable[[str], Path]) -> None:
    path = copy("ext4-without-sums")
    bitmap = int.from_bytes(path.read_bytes()[2048:2052], "little") * 1024
    patch(path, bitmap + 1000, b"\x7f")
    refused(path, "ext4", "in its bitmap and")
    patch(path, bitmap, bytes(1024))
    refused(path, "ext4", "calls metadata free")
    patch(path, 2048, b"\xff\xff\xff\xff")
    refused(path, "ext4", "behind the end")


def test_ext4_in_use_by_another_host(tmp_path: Path) -> None:
    path = filled.empty(tmp_path / "disk", 16 * MIB)
    filled.run("mke2fs", "-qFt", "ext4", "-O", "mmp,^metadata_csum", path)
    assert free_in(path, "ext4")
    content = path.read_bytes()
    block_size = 1024 << content[1024 + 24]
    place = int.from_bytes(content[1024 + 0x168 :][:8], "little") * block_size
    patch(path, place + 4, b"\1\0\0\0")
    refused(path, "ext4", "MMP block")


def test_xfs_that_cannot_be_taken_at_its_word(copy: Callable[[str], Path]) -> None:
    path = copy("xfs")
    patch(path, 512 + 52, b"\1")
    refused(path, "xfs", "checksum of the header of allocation group 0")
    path = copy("xfs")
    patch(path, 108, b"label")
    refused(path, "xfs", "checksum of the superblock")
    path = copy("xfs")
    root = int.from_bytes(path.read_bytes()[528:532], "big") * 4096
    patch(path, root + 60, b"\x55")
    refused(path, "xfs", "wrong checksum")
    path = copy("xfs")
    filled.run("xfs_db", "-xc", "sb 0", "-c", "write -d features_incompat 0x1000", path)
    refused(path, "xfs", "features that tapfs does not know")
    filled.run("xfs_db", "-xc", "sb 0", "-c", "write -d features_incompat 0x1f", path)
    refused(path, "xfs", "xfs_repair")


def test_xfs_with_a_log_to_replay(tmp_path: Path) -> None:
    path = filled.empty(tmp_path / "disk", 300 * MIB)
    filled.run("mkfs.xfs", "-qf", path)
    with filled.mounted(path, tmp_path / "mount") as folder:
        (folder / "file").write_bytes(bytes(10000))
        filled.run("sync", "-f", folder)
        shutil.copy(path, tmp_path / "copy")
    refused(tmp_path / "copy", "xfs", "log is to be replayed")


def test_xfs_of_version_4_is_held_to_its_two_trees(copy: Callable[[str], Path]) -> None:
    """Without checksums: a change in one tree alone, and one in both that the header does not know."""
    path = copy("xfs-of-version-4")
    content = path.read_bytes()[: 64 * 4096]
    by_place, by_size, _ = struct.unpack_from(">III", content, 528)
    start, count = struct.unpack_from(">II", content, by_place * 4096 + 16)
    changed = struct.pack(">II", start - 1, count + 1)
    patch(path, by_place * 4096 + 16, changed)
    refused(path, "xfs", "two trees of free extents of allocation group 0 differ")
    at = content.index(struct.pack(">II", start, count), by_size * 4096)
    patch(path, at, changed)
    refused(path, "xfs", "free blocks in its trees and")


def test_ntfs_that_cannot_be_taken_at_its_word(copy: Callable[[str], Path]) -> None:
    path = copy("ntfs")
    content = path.read_bytes()
    table = int.from_bytes(content[0x30:0x38], "little") * 4096
    volume = table + 3 * 1024
    information = content.index(b"\x70\0\0\0\x28\0\0\0", volume)
    patch(path, information + 24 + 10, b"\x01")
    refused(path, "ntfs", "marked dirty")
    patch(path, information + 24 + 8, b"\x09\x01\x00")
    refused(path, "ntfs", "unknown version")
    path = copy("ntfs")
    patch(path, table + 6 * 1024 + 510, b"\xff\xff")
    refused(path, "ntfs", "torn")
    path = copy("ntfs")
    patch(path, table + 6 * 1024, b"BAAD")
    refused(path, "ntfs", "record 6")
    path = copy("ntfs")
    patch(path, place_of_bitmap(path), bytes(64))
    refused(path, "ntfs", "its own tables")


def test_ntfs_whose_bitmap_calls_a_file_free(copy: Callable[[str], Path]) -> None:
    """The first cluster of a file of noise, whose place every other file system tool would give away next."""
    path = copy("ntfs")
    content = path.read_bytes()
    free = {at for each in free_in(path, "ntfs") for at in range(each.offset, each.end, 4096)}
    first = next(
        at for at in range(4 * MIB, len(content), 4096) if at not in free and len(set(content[at : at + 256])) > 120
    )
    bitmap = place_of_bitmap(path)
    at = bitmap + first // 4096 // 8
    patch(path, at, bytes([content[at] & ~(1 << first // 4096 % 8)]))
    refused(path, "ntfs", "calls clusters free that the file of record")


def test_ntfs_with_the_wrong_size_of_a_cluster(copy: Callable[[str], Path]) -> None:
    path = copy("ntfs")
    content = path.read_bytes()
    table = int.from_bytes(content[0x30:0x38], "little")
    patch(path, 13, b"\x04")  # half of it, so that all places are twice as many clusters
    for at in (0x30, 0x38):
        patch(path, at, (2 * int.from_bytes(content[at : at + 8], "little")).to_bytes(8, "little"))
    assert table
    refused(path, "ntfs", ".")


def test_ntfs_that_windows_has_not_closed(copy: Callable[[str], Path]) -> None:
    """Restart pages as Windows writes them: in use, closed, and put to sleep by fast startup."""
    path = copy("ntfs")
    place = path.read_bytes().index(b"\xff" * 8192)  # ntfs-3g empties the log

    def restart(flags: int, client: int, version: int, number: int) -> bytes:
        page = bytearray(b"RSTR" + bytes(4092))
        struct.pack_into("<Hhh", page, 24, 48, 1 if version == 1 else 0, version)
        struct.pack_into("<QHHHH", page, 48, number, 1, 0xFFFF, client, flags)
        return bytes(page)

    patch(path, place, restart(2, 0xFFFF, 1, 5) + restart(2, 0xFFFF, 1, 4))
    assert free_in(path, "ntfs")
    patch(path, place, restart(0, 0, 1, 5) + restart(2, 0xFFFF, 1, 4))
    refused(path, "ntfs", "log is to be replayed")
    patch(path, place, restart(0, 0, 1, 3))  # the other page is newer
    assert free_in(path, "ntfs")
    patch(path, place, restart(2, 0xFFFF, 2, 5))
    refused(path, "ntfs", "fast startup")
    patch(path, place, bytes(8192))
    refused(path, "ntfs", "no restart page")


def place_of_bitmap(path: Path) -> int:
    """The first byte of the bitmap of an NTFS with clusters of 4096 bytes."""
    said = filled.run("ntfsinfo", "-fi", "6", "-v", path)
    return int(said.split("LCN")[1].split("\n")[1].split()[1], 16) * 4096


def test_fat_that_cannot_be_taken_at_its_word(copy: Callable[[str], Path]) -> None:
    path = copy("vfat")
    start, length = filled.fat_tables(path)

    def entry(number: int, value: int, copies: tuple[int, ...] = (0, 1)) -> None:
        for each in copies:
            patch(path, start + each * length + 2 * number, value.to_bytes(2, "little"))

    content = path.read_bytes()[start:][:length]
    words = struct.unpack(f"<{length // 2}H", content)
    chained = next(number for number in range(2, len(words)) if 2 <= words[number] < 0xFFF0)
    entry(chained, 0, (1,))
    refused(path, "vfat", "copies of the file allocation table differ")
    entry(chained, words[chained])
    entry(words[chained], 0)
    refused(path, "vfat", "which is not in use")
    entry(words[chained], words[words[chained]])
    reached = {word for word in words if 2 <= word < 0xFFF0}
    first = next(number for number in range(2, len(words)) if words[number] and number not in reached)
    for number in (first, *chain_of(words, first)):
        entry(number, 0)
    refused(path, "vfat", "a directory names the cluster")
    path = copy("vfat")
    last = next(number for number in range(2, len(words)) if words[number] >= 0xFFF8 and number in reached)
    before = words.index(last)
    entry(before, 0xFFFF)
    entry(last, 0)
    refused(path, "vfat", "does not fit the length of its file")
    path = copy("vfat")
    entry(1, 0x7FFF)
    refused(path, "vfat", "not unmounted cleanly")
    entry(1, 0xFFFF)
    entry(0, 0xFFF0)
    refused(path, "vfat", "does not begin as it should")


def chain_of(words: tuple[int, ...], first: int) -> list[int]:
    found: list[int] = []
    while 2 <= words[first] < 0xFFF0:
        first = words[first]
        found.append(first)
    return found


def test_members_of_a_raid_are_left_alone(copy: Callable[[str], Path]) -> None:
    for at in (64 * MIB - (64 << 10), 64 * MIB - (8 << 10)):
        path = copy("ext4")
        patch(path, at, b"\xfc\x4e\x2b\xa9")
        refused(path, "ext4", "software RAID")


def test_others_are_named(tmp_path: Path) -> None:
    path = filled.empty(tmp_path / "disk", MIB)
    for kind in ("LVM2_member", "crypto_LUKS", "f2fs"):
        refused(path, kind, kind)
    for kind in ("ext4", "xfs", "ntfs", "vfat", "swap"):
        refused(path, kind, ".")
