"""File systems with files in them, some deleted again, made by the tools of each without a mount where these can."""

from __future__ import annotations

import os
import random
import re
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from tapfs.extent import Range
from tapfs.partitions.free_space.by_type import free_ranges
from tapfs.partitions.reader import Reader

MIB = 1 << 20


def run(*command: object) -> str:
    """What a tool prints; it must succeed."""
    done = subprocess.run(list(map(str, command)), check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def empty(path: Path, size: int) -> Path:
    """A file that is all hole."""
    path.unlink(missing_ok=True)
    path.touch()
    os.truncate(path, size)
    return path


def write_files(folder: Path, *, seed: int = 1, large: int = 5, small: int = 60, size: int = 300 << 10) -> list[str]:
    """Files of noise, none of which holds a block of zeros; the names of those that are to be deleted again."""
    source = random.Random(seed)
    folder.mkdir(exist_ok=True)
    names: list[str] = []
    for number in range(large + small):
        length = source.randrange(size // 2, size) if number < large else source.randrange(20, 9000)
        name = f"file{number}"
        (folder / name).write_bytes(source.randbytes(length))
        names.append(name)
    return names[1::2]


@contextmanager
def mounted(path: Path, folder: Path, *command: str) -> Iterator[Path]:
    """A file system mounted for writing: by the kernel, or by a program."""
    folder.mkdir(exist_ok=True)
    run(*(command or ("mount", "-o", "loop")), path, folder)
    try:
        yield folder
    finally:
        run("umount", folder)
        # Where a namespace has a copy of the mount the kernel writes the last of it when that goes.
        patience = time.monotonic() + 60
        while run("losetup", "-j", path):
            assert time.monotonic() < patience, f"the file system in {path} is still mounted elsewhere"
            time.sleep(0.01)


def make_ext(path: Path, size: int, *options: str, kind: str = "ext4") -> Path:
    """An ext file system with files, half of them deleted by debugfs."""
    folder = path.with_name(f"{path.name}.files")
    deleted = write_files(folder)
    run("mke2fs", "-qF", "-t", kind, "-d", folder, *options, empty(path, size))
    script = path.with_name(f"{path.name}.debugfs")
    script.write_text("".join(f"rm /{name}\n" for name in deleted))
    run("debugfs", "-wf", script, path)
    # debugfs leaves counts of 16 bits and flags as they are to be; e2fsck is the judge of that.
    assert subprocess.run(["e2fsck", "-fn", path], check=False, capture_output=True).returncode == 0
    return path


def fill(folder: Path) -> None:
    """Files in a mounted file system, half of them deleted after they have reached the disk."""
    deleted = write_files(folder)
    run("sync", "-f", folder)
    for name in deleted:
        (folder / name).unlink()


def make_xfs(path: Path, size: int, *options: str) -> Path:
    """An XFS with files, half of them deleted."""
    run("mkfs.xfs", "-qf", *options, empty(path, size))
    with mounted(path, path.with_name(f"{path.name}.mount")) as folder:
        fill(folder)
    return path


def make_xfs_of_prototype(path: Path, size: int, *options: str) -> Path:
    """An XFS that no kernel need mount: mkfs copies files into it."""
    folder = path.with_name(f"{path.name}.files")
    write_files(folder)
    files = "".join(f"{name.name} ---644 0 0 {name}\n" for name in sorted(folder.iterdir()))
    prototype = path.with_name(f"{path.name}.prototype")
    prototype.write_text(f"/\n0 0\nd--755 0 0\n{files}$\n")
    run("mkfs.xfs", "-qf", *options, "-p", prototype, empty(path, size))
    return path


def make_ntfs(path: Path, size: int, *options: str) -> Path:
    """An NTFS with files, half of them deleted."""
    run("mkntfs", "-FqQ", "-L", "volume", *options, empty(path, size))
    with mounted(path, path.with_name(f"{path.name}.mount"), "ntfs-3g") as folder:
        fill(folder)
    return path


def make_fat(path: Path, size: int, *options: str) -> Path:
    """A FAT with files in its root directory and in one below, in clusters of no order."""
    run("mkfs.vfat", *options, empty(path, size))
    with path.open("r+b") as file:
        FatWriter(file, random.Random(2)).fill()
    return path


class FatWriter:
    """Files for a FAT that mkfs.vfat has made: enough of a driver for tests, and none of tapfs."""

    def __init__(self, file: BinaryIO, choice: random.Random) -> None:
        self._file = file
        self._choice = choice
        sector = file.read(512)
        self._sector_size, per_cluster, reserved, self._tables = struct.unpack_from("<HBHB", sector, 11)
        roots, small_total, _, small, _, _, _, total, large = struct.unpack_from("<HHBHHHIII", sector, 17)
        self.table_at, self.table_bytes = reserved * self._sector_size, (small or large) * self._sector_size
        self._root_at = self.table_at + self._tables * self.table_bytes
        self._data_at = self._root_at + -(-roots * 32 // self._sector_size) * self._sector_size
        self._cluster = per_cluster * self._sector_size
        self.clusters = ((small_total or total) * self._sector_size - self._data_at) // self._cluster
        self.bits = 32 if not small else 12 if self.clusters < 4085 else 16
        file.seek(self.table_at)
        self._table = int.from_bytes(file.read(self.table_bytes), "little")
        self._root_bytes = roots * 32
        # Clusters of the second half stay free but for a few.
        self._free = choice.sample(range(3, self.clusters // 2), min(self.clusters // 2 - 3, 400))

    def fill(self) -> None:
        """Write all files."""
        inner = b"".join(self._put(f"IN{number}", self._noise()) for number in range(5))
        high, low = divmod(self._free[-1], 1 << 16)  # the folder's own first cluster
        own = struct.pack("<11sB8xH4xHI", b".          ", 0x10, high, low, 0)
        above = struct.pack("<11sB20x", b"..         ", 0x10)
        below = self._put("FOLDER", (own + above + inner).ljust(self._cluster, b"\0"), folder=True)
        count = 30 if self._root_bytes else self._cluster // 32 - 1
        entries = below + b"".join(self._put(f"FILE{number}", self._noise()) for number in range(count))
        if self._root_bytes:
            self._write(self._root_at, entries)
        else:
            self._write(self._data_at, entries)  # the root's one cluster is 2
        for copy in range(self._tables):
            self._write(self.table_at + copy * self.table_bytes, self._table.to_bytes(self.table_bytes, "little"))

    def _noise(self) -> bytes:
        return self._choice.randbytes(self._choice.randrange(1, 4 * self._cluster))

    def _put(self, name: str, content: bytes, *, folder: bool = False) -> bytes:
        """The directory entry of a file that has been written."""
        chain = [self._free.pop() for _ in range(-(-len(content) // self._cluster))]
        for number, cluster in enumerate(chain):
            piece = content[number * self._cluster : (number + 1) * self._cluster]
            self._write(self._data_at + (cluster - 2) * self._cluster, piece)
            following = chain[number + 1] if number + 1 < len(chain) else (1 << min(self.bits, 28)) - 1
            self._table |= following << cluster * self.bits
        high, low = divmod(chain[0], 1 << 16)
        size = 0 if folder else len(content)
        return struct.pack("<11sB8xH4xHI", name.ljust(11).encode(), 0x10 if folder else 0x20, high, low, size)

    def _write(self, at: int, data: bytes) -> None:
        self._file.seek(at)
        self._file.write(data)


def fat_tables(path: Path) -> tuple[int, int]:
    """Where the first of two tables of a FAT begins, and the length of each."""
    with path.open("rb") as file:
        found = FatWriter(file, random.Random(1))
    return found.table_at, found.table_bytes


def free_by_fsck(path: Path) -> int:
    """The free bytes of a FAT as fsck.vfat counts them."""
    # It finds FSInfo wrong, which is right: nobody has kept that.
    said = subprocess.run(["fsck.vfat", "-nv", path], check=False, capture_output=True, text=True).stdout
    assert "lost" not in said.lower()
    assert "unused cluster" not in said.replace("Checking for unused clusters", "")
    counted = re.search(r"(\d+)/(\d+) clusters", said)
    size = re.search(r"(\d+) bytes per cluster", said)
    assert counted is not None
    assert size is not None
    return (int(counted[2]) - int(counted[1])) * int(size[1])


def free_by_ntfscat(path: Path) -> list[Range]:
    """The free clusters of an NTFS: its bitmap as ntfscat reads it."""
    said = run("ntfsinfo", "-fm", path)
    clusters, size = (re.search(rf"{name}: (\d+)", said) for name in ("Volume Size in Clusters", "Cluster Size"))
    assert clusters is not None
    assert size is not None
    bitmap = subprocess.run(["ntfscat", "-fi", "6", path], check=True, capture_output=True).stdout
    free = {number for number in range(int(clusters[1])) if not bitmap[number // 8] >> number % 8 & 1}
    return ranges_of_blocks(free, int(size[1]))


def make_btrfs(path: Path, size: int, *options: str) -> Path:
    """A btrfs with files, half of them deleted."""
    run("mkfs.btrfs", "-qf", *options, empty(path, size))
    with mounted(path, path.with_name(f"{path.name}.mount")) as folder:
        fill(folder)
    return path


def free_in(path: Path, kind: str) -> list[Range]:
    """The free ranges as tapfs reads them."""
    with path.open("rb", buffering=0) as file:

        def read(offset: int, length: int) -> bytes:
            return os.pread(file.fileno(), length, offset)

        return list(free_ranges(Reader(read, path.stat().st_size), kind))


def ranges_of_blocks(blocks: set[int], size: int) -> list[Range]:
    """Numbers of blocks as ranges of bytes, as few as there can be."""
    found: list[Range] = []
    for block in sorted(blocks):
        if found and found[-1].end == block * size:
            found[-1] = Range(found[-1].offset, found[-1].length + size)
        else:
            found.append(Range(block * size, size))
    return found


def free_by_dumpe2fs(path: Path) -> list[Range]:
    """The free blocks of an ext file system as dumpe2fs lists them."""
    said = run("dumpe2fs", path)
    block_size = re.search(r"Block size: +(\d+)", said)
    assert block_size is not None
    cluster_size = re.search(r"Cluster size: +(\d+)", said)
    more = int(cluster_size[1]) // int(block_size[1]) - 1 if cluster_size else 0
    blocks: set[int] = set()
    for line in re.findall(r"^  Free blocks: ?(.*)$", said, re.MULTILINE):
        for part in filter(None, line.split(", ")):
            first, _, last = part.partition("-")
            blocks.update(range(int(first), int(last or first) + 1 + more))  # it says where the last cluster begins
    return ranges_of_blocks(blocks, int(block_size[1]))


def free_by_xfs_db(path: Path) -> list[Range]:
    """The free blocks of an XFS as xfs_db lists them, but for those of its free lists, which it lists, too."""
    fields = run("xfs_db", "-rc", "sb 0", "-c", "p agblocks blocksize agcount", path)
    group_blocks, block_size, groups = map(int, re.findall(r"= (\d+)", fields))
    blocks: set[int] = set()
    for line in run("xfs_db", "-rc", "freesp -d", path).splitlines():
        numbers = line.split()
        if len(numbers) == 3 and all(number.isdigit() for number in numbers):
            group, first, count = map(int, numbers)
            start = group * group_blocks + first
            blocks.update(range(start, start + count))
    for group in range(groups):
        header = run("xfs_db", "-rc", f"agf {group}", "-c", "p flfirst fllast", path)
        first, last = map(int, re.findall(r"= (\d+)", header))
        listed = dict(re.findall(r"(\d+):(\d+)", run("xfs_db", "-rc", f"agfl {group}", "-c", "p bno", path)))
        kept = {group * group_blocks + int(listed[str(at)]) for at in range(first, last + 1)}
        assert kept <= blocks
        blocks -= kept
    return ranges_of_blocks(blocks, block_size)
