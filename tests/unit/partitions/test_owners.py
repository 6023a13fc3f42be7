"""Owners of ranges: what the tools of each file system say, the bytes of each file, and damage of every kind."""

from __future__ import annotations

import os
import random
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Range
from tapfs.partitions.owners.by_type import Owners, owners_of
from tapfs.partitions.reader import Reader
from tests import filled_file_systems as filled
from tests.filled_file_systems import MIB, FatWriter, run


def _owners(content: bytes, kind: str, wanted: list[Range] | None = None) -> Owners:
    disk = Reader(lambda offset, length: content[offset : offset + length], len(content))
    return owners_of(disk, kind, [Range(0, len(content))] if wanted is None else wanted)


def _bytes_of(content: bytes, found: Owners) -> dict[str, bytes]:
    """The data of each file, in the order of the partition."""
    files: dict[str, bytes] = {}
    for owner in found.owners:
        if owner.part == "data":
            for name in owner.names:
                files[name] = files.get(name, b"") + content[owner.range.offset : owner.range.end]
    return files


def _require_files(content: bytes, found: Owners, files: dict[str, bytes], *, block: int) -> None:
    """Each file has its own blocks, whatever their order, and no others."""
    there = _bytes_of(content, found)
    assert files
    for path, data in files.items():
        padded = data.ljust(-(-len(data) // block) * block, b"\0")
        expected = sorted(padded[at : at + block] for at in range(0, len(padded), block))
        assert sorted(there[path][at : at + block] for at in range(0, len(there[path]), block)) == expected, path


def _tree(folder: Path) -> dict[str, bytes]:
    """Files of several sizes, some of them deep."""
    chance = random.Random(7)
    files = {f"/many/n{number:03}": chance.randbytes(700) for number in range(150)}
    files |= {"/a/b/c/deep": chance.randbytes(5000), "/large": chance.randbytes(500 << 10), "/\u00fcml": b"x" * 2000}
    for path, data in files.items():
        place = folder / path[1:]
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    return files


@pytest.fixture(params=[("ext4", "-b", "4096"), ("ext2", "-b", "1024")])
def ext(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, bytes], int]:
    kind, option, block = request.param
    files = _tree(tmp_path / "files")
    path = tmp_path / "disk"
    run("mke2fs", "-qF", "-t", kind, option, block, "-d", tmp_path / "files", path, "16M")
    return path, files, int(block)


def test_ext_as_its_files_and_debugfs_say(ext: tuple[Path, dict[str, bytes], int]) -> None:
    path, files, block = ext
    content = path.read_bytes()
    found = _owners(content, "ext4")
    assert found.notes == []
    _require_files(content, found, files, block=block)
    blocks = [str(number) for number in random.Random(1).sample(range(1, len(content) // block), 300)]
    said = run("debugfs", "-R", f"icheck {' '.join(blocks)}", path)
    named = {int(place): int(inode) for place, inode in re.findall(r"^(\d+)\t(\d+)$", said, re.MULTILINE)}
    ours: dict[int, int | None] = {}
    for owner in found.owners:
        if owner.part not in {"inode", "metadata"}:
            for place in range(owner.range.offset // block, -(-owner.range.end // block)):
                ours[place] = owner.number
    assert {int(place): ours.get(int(place)) for place in blocks if int(place) in ours} == named
    assert len(named) > 5
    numbers = {owner.number for owner in found.owners if owner.number in set(named.values()) - {7, 8, 11}}
    paths = dict(
        re.findall(r"^(\d+)\t(.*)$", run("debugfs", "-R", f"ncheck {' '.join(map(str, numbers))}", path), re.MULTILINE)
    )
    for owner in found.owners:
        if str(owner.number) in paths:
            assert owner.names == (paths[str(owner.number)].replace("//", "/"),)


def test_an_inode_and_a_directory_are_told_by_the_names_that_they_have(tmp_path: Path) -> None:
    files = _tree(tmp_path / "files")
    path = tmp_path / "disk"
    run("mke2fs", "-qF", "-t", "ext4", "-b", "1024", "-d", tmp_path / "files", path, "16M")
    content = path.read_bytes()
    inode = int(
        run("stat", "-c", "%i", path) and re.findall(r"Inode: (\d+)", run("debugfs", "-R", "stat /large", path))[0]
    )
    place = re.findall(r"located at block (\d+), offset 0x([0-9a-f]+)", run("debugfs", "-R", "imap /large", path))[0]
    at = int(place[0]) * 1024 + int(place[1], 16)
    owners = _owners(content, "ext4", [Range(at, 1)]).owners
    assert ("inode", inode, ("/large",)) in {owner[1:] for owner in owners}
    spoiled = content[:at] + bytes(256) + content[at + 256 :]
    assert ("inode", inode, ("/large",)) in {owner[1:] for owner in _owners(spoiled, "ext4", [Range(at, 1)]).owners}
    directory = next(each.range for each in _owners(content, "ext4").owners if each.names == ("/many",))
    assert _owners(content, "ext4", [directory]).owners[0].names == ("/many",)
    assert files


def test_a_copy_of_the_superblock_is_taken(tmp_path: Path) -> None:
    files = _tree(tmp_path / "files")
    path = tmp_path / "disk"
    run("mke2fs", "-qF", "-t", "ext4", "-b", "1024", "-d", tmp_path / "files", path, "16M")
    content = path.read_bytes()
    spoiled = content[:1024] + bytes(1024) + content[2048:]
    found = _owners(spoiled, "ext4")
    assert any("copy of the superblock" in note for note in found.notes)
    _require_files(spoiled, found, files, block=1024)


@pytest.mark.parametrize("options", [[], ["-m", "crc=0"], ["-n", "size=8192"]])
def test_xfs_as_its_files_say(tmp_path: Path, options: list[str]) -> None:
    files = _tree(tmp_path / "files")
    lines = ["/", "0 0", "d--755 0 0"]
    for folder in ("many", "a/b/c"):
        steps = folder.split("/")
        lines += [f"{step} d--755 0 0" for step in steps]
        inside = tmp_path / "files" / folder
        lines += [f"{each.name} ---644 0 0 {each}" for each in sorted(inside.iterdir())]
        lines += ["$"] * len(steps)
    lines += [f"{name} ---644 0 0 {tmp_path}/files/{name}" for name in ("large", "\u00fcml")]
    prototype = tmp_path / "prototype"
    prototype.write_text("\n".join([*lines, "$", ""]))
    path = filled.empty(tmp_path / "disk", 320 * MIB)
    run("mkfs.xfs", "-qf", *options, "-p", prototype, path)
    with path.open("rb") as file:
        disk = Reader(lambda offset, length: os.pread(file.fileno(), length, offset), 320 * MIB)
        found = owners_of(disk, "xfs", [Range(0, 320 * MIB)])
        assert found.notes == []
        assert {"directory", "data", "inode", "metadata"} <= {owner.part for owner in found.owners}
        data = [owner for owner in found.owners if owner.part == "data"]
        for path_in, content in files.items():
            own = [owner.range for owner in data if owner.names == (path_in,)]
            assert len(own) == 1, path_in
            assert os.pread(file.fileno(), len(content), own[0].offset) == content
            assert own[0].length == -(-len(content) // 4096) * 4096
        assert any(owner.names == ("/many",) and owner.part == "inode" for owner in found.owners)


def test_ntfs_as_its_files_say(tmp_path: Path) -> None:
    path = filled.make_ntfs(tmp_path / "disk", 16 * MIB)
    deleted = filled.write_files(tmp_path / "again")  # the same once more
    files = {f"/{each.name}": each.read_bytes() for each in (tmp_path / "again").iterdir() if each.name not in deleted}
    content = path.read_bytes()
    found = _owners(content, "ntfs")
    assert found.notes == []
    there = _bytes_of(content, found)
    for name, data in files.items():
        if len(data) > 1024:  # a smaller one lies in its record
            padded = data.ljust(-(-len(data) // 4096) * 4096, b"\0")
            assert there[name][: len(data)] == padded[: len(data)]
        assert any(owner.names == (name,) and owner.part == "inode" for owner in found.owners)
    assert not {f"/{name}" for name in deleted} & {name for owner in found.owners for name in owner.names}
    cluster = found.owners[-1].range
    said = run("ntfscluster", "-fc", f"{cluster.offset // 4096}-{cluster.offset // 4096}", path)
    assert f"Inode {found.owners[-1].number} " in said


@pytest.mark.parametrize(("size", "bits"), [(2, "12"), (32, "16"), (64, "32")])
def test_fat_as_its_files_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, bits: str) -> None:
    files: dict[str, bytes] = {}
    put = FatWriter._put

    def recorded(self: FatWriter, name: str, data: bytes, *, folder: bool = False) -> bytes:
        if not folder:
            files[f"/FOLDER/{name}" if name.startswith("IN") else f"/{name}"] = data
        return put(self, name, data, folder=folder)

    monkeypatch.setattr(FatWriter, "_put", recorded)
    path = filled.make_fat(tmp_path / "disk", size * MIB, "-F", bits)
    content = path.read_bytes()
    found = _owners(content, "vfat")
    assert found.notes == []
    block = content[13] * 512
    _require_files(content, found, files, block=block)
    if bits == "32":  # the first copy of the table is not needed
        start = struct.unpack_from("<H", content, 14)[0] * 512

        def read(offset: int, length: int) -> bytes:
            if offset < start + 512 and start < offset + length:
                raise ImageError(ErrorKind.IO, "broken", op="read")
            return content[offset : offset + length]

        again = owners_of(Reader(read, len(content)), "vfat", [Range(0, len(content))])
        assert _bytes_of(content, again) == _bytes_of(content, found)
        assert any("table 1 cannot be read" in note for note in again.notes)


def test_exfat_with_and_without_chains(tmp_path: Path) -> None:
    path = filled.empty(tmp_path / "disk", 8 * MIB)
    run("mkfs.exfat", path)
    content = bytearray(path.read_bytes())
    table, _, heap, _, root = struct.unpack_from("<5I", content, 80)
    sector, cluster = 1 << content[108], 1 << (content[108] + content[109])

    def place(number: int) -> int:
        return heap * sector + (number - 2) * cluster

    def entry(name: str, first: int, size: int, *, chain: bool, folder: bool = False) -> bytes:
        head = struct.pack("<BBHH26x", 0x85, 2, 0, 0x10 if folder else 0x20)
        stream = struct.pack("<BBxBHxxQxxxxIQ", 0xC0, 1 if chain else 3, len(name), 0, size, first, size)
        return head + stream + struct.pack("<BB30s", 0xC1, 0, name.encode("utf-16-le"))

    folder = entry("inner.bin", 120, 3 * cluster, chain=False)
    for number, data in ((100, b"A" * cluster), (105, b"B" * cluster), (110, folder), (120, b"C" * 3 * cluster)):
        content[place(number) : place(number) + len(data)] = data
    for number, following in ((100, 105), (105, 0xFFFFFFFF), (110, 0xFFFFFFFF)):
        struct.pack_into("<I", content, table * sector + 4 * number, following)
    directory = entry("f\u00e4lle.txt", 100, 2 * cluster, chain=True) + entry(
        "F", 110, cluster, chain=True, folder=True
    )
    end = next(at for at in range(place(root), place(root) + cluster, 32) if content[at] == 0)
    content[end : end + len(directory)] = directory
    found = _owners(bytes(content), "exfat")
    assert found.notes == []
    assert _bytes_of(bytes(content), found)["/f\u00e4lle.txt"] == b"A" * cluster + b"B" * cluster
    assert _bytes_of(bytes(content), found)["/F/inner.bin"] == b"C" * 3 * cluster


def _mutants(content: bytes, seed: int, count: int) -> Iterator[bytes]:
    """The content with damage where something lies."""
    chance = random.Random(seed)
    used = [at for at in range(0, len(content), 512) if any(content[at : at + 512])]
    used = used[: len(used) // 4] + chance.sample(used, min(len(used), 50))
    for _ in range(count):
        spoiled = bytearray(content)
        for _ in range(chance.randrange(1, 30)):
            at = chance.choice(used) + chance.randrange(512)
            length = chance.choice((1, 2, 4, 8, 64))
            spoiled[at : at + length] = chance.choice((bytes(length), b"\xff" * length, chance.randbytes(length)))
        yield bytes(spoiled[: len(content)])


@pytest.mark.parametrize("kind", ["ext4", "ext2", "ntfs", "vfat", "xfs"])
def test_damage_is_never_worse_than_a_note(tmp_path: Path, kind: str) -> None:
    size = {"xfs": 300, "vfat": 2}.get(kind, 8) * MIB
    path = tmp_path / "disk"
    if kind == "ntfs":
        run("mkntfs", "-FqQ", filled.empty(path, size))
    elif kind == "vfat":
        filled.make_fat(path, size, "-F", "12")
    elif kind == "xfs":
        filled.make_xfs_of_prototype(path, size)
    else:
        _tree(tmp_path / "files")
        run("mke2fs", "-qF", "-t", kind, "-b", "1024", "-d", tmp_path / "files", path, "8M")
    content = path.read_bytes()[: 8 * MIB]
    chance = random.Random(3)
    for spoiled in _mutants(content, 1, 1 if kind == "xfs" else 4):
        broken = chance.randrange(size)

        def read(offset: int, length: int, spoiled: bytes = spoiled, broken: int = broken) -> bytes:
            if offset <= broken < offset + length:
                raise ImageError(ErrorKind.CORRUPT, "broken", op="read")
            return spoiled[offset : offset + length].ljust(length, b"\0")

        found = owners_of(Reader(read, size), kind, [Range(0, size)])
        assert len(found.notes) <= 21
        assert all(0 <= owner.range.offset < owner.range.end <= size for owner in found.owners)
