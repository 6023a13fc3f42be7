"""Compact: what is in use reads as before, what is free or zero goes, whatever the format and whatever lies below."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tapfs as api
from tapfs.jobs.giving_back import GivingBack
from tests import filled_file_systems as filled
from tests.filled_file_systems import MIB

Run = Callable[..., Any]

#: The partitions of the sample: number, type of file system, start and size.
_EXT, _FAT, _SWAP, _RAW = (1, 1 * MIB, 16 * MIB), (2, 17 * MIB, 8 * MIB), (3, 25 * MIB, 2 * MIB), (4, 27 * MIB, 3 * MIB)
SIZE = 31 * MIB

#: Name, format, options, whether it is over a parent that has other bytes everywhere.
KINDS: dict[str, tuple[str, dict[str, str], bool]] = {
    "raw": ("raw", {}, False),
    "qcow": ("qcow", {}, False),
    "qcow over a parent": ("qcow", {}, True),
    "qcow2": ("qcow2", {}, False),
    "qcow2 of small clusters": ("qcow2", {"cluster_size": "4096"}, False),
    "qcow2 of large clusters": ("qcow2", {"cluster_size": "2097152"}, False),
    "qcow2 with subclusters": ("qcow2", {"extended_l2": "on"}, True),
    "qcow2 of version 2 over a parent": ("qcow2", {"compat": "0.10"}, True),
    "vmdk over a parent": ("vmdk", {}, True),
    "vmdk": ("vmdk", {}, False),
    "vhd": ("vhd", {}, False),
    "vhd over a parent": ("vhd", {}, True),
    "vhdx over a parent": ("vhdx", {}, True),
    "vhdx": ("vhdx", {}, False),
    "vdi over a parent": ("vdi", {}, True),
    "vdi": ("vdi", {}, False),
}


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A GPT disk with an ext4, a FAT16, swap space and a partition of noise and zeros; no other block is zeros."""
    folder = tmp_path_factory.mktemp("disk")
    path = filled.empty(folder / "disk", SIZE)
    table = "label: gpt\n" + "".join(
        f"start={start // 512}, size={size // 512}\n" for _, start, size in (_EXT, _FAT, _SWAP, _RAW)
    )
    subprocess.run(["sfdisk", "-q", path], input=table, text=True, check=True)
    ext = filled.make_ext(folder / "ext", _EXT[2], "-b", "1024", "-L", "root")
    fat = filled.make_fat(folder / "fat", _FAT[2], "-F", "16", "-s", "1", "-n", "BOOT")
    swap = filled.empty(folder / "swap", _SWAP[2])
    swap.chmod(0o600)
    filled.run("mkswap", swap)
    content = bytearray(random.Random(3).randbytes(SIZE))  # free blocks have bytes in them, as after use
    own = path.read_bytes()
    content[:MIB] = own[:MIB]
    content[-MIB:] = own[-MIB:]
    for place, source in ((_EXT, ext), (_FAT, fat), (_SWAP, swap)):
        _, start, size = place
        inner = bytearray(source.read_bytes())
        kind = {1: "ext4", 2: "vfat", 3: "swap"}[place[0]]
        for offset, length in filled.free_in(source, kind):
            inner[offset : offset + length] = content[start + offset :][:length]
        content[start : start + size] = inner
    content[28 * MIB : 29 * MIB] = bytes(MIB)
    return bytes(content)


@pytest.fixture(scope="module")
def free(disk: bytes, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A 1 for each byte of the disk that is free, as dumpe2fs and the table of the FAT have it; swap is in use."""
    folder = tmp_path_factory.mktemp("free")
    flags = bytearray(SIZE)
    for (_, start, size), kind in ((_EXT, "ext4"), (_FAT, "vfat")):
        path = folder / kind
        path.write_bytes(disk[start : start + size])
        for offset, length in filled.free_by_dumpe2fs(path) if kind == "ext4" else filled.free_in(path, kind):
            flags[start + offset : start + offset + length] = b"\1" * length
    return bytes(flags)


def written(folder: Path, disk: bytes, format_name: str, options: dict[str, str], *, over_parent: bool) -> Path:
    """An image with every byte of the disk in its own files, zeros too."""
    backing = below = None
    if over_parent:
        below = format_name if format_name in {"vdi", "vhdx", "vmdk"} else "raw"
        backing = folder / f"parent.{below}"
        api.create(backing, below, SIZE)
        with api.open(backing, format=below, writable=True) as image:
            image.write(0, b"\xa5" * SIZE)
    path = folder / f"disk.{format_name}"
    api.create(
        path, format_name, SIZE, backing=backing and str(backing), backing_format=backing and below, options=options
    )
    with api.open(path, format=format_name, writable=True) as image:
        for at in range(0, SIZE, MIB):
            image.write(at, disk[at : at + MIB])
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_used_bytes_stay_and_free_ones_go(tmp_path: Path, disk: bytes, free: bytes, kind: str) -> None:
    format_name, options, over_parent = KINDS[kind]
    path = written(tmp_path, disk, format_name, options, over_parent=over_parent)
    before = path.stat().st_blocks
    expected = api.compact(path, format=format_name, dry_run=True)
    assert path.stat().st_blocks == before
    report = api.compact(path, format=format_name)
    assert [each.given_back for each in report.file_systems] == [each.given_back for each in expected.file_systems]
    assert report.zero_bytes == expected.zero_bytes
    assert report.given_back == expected.given_back > 10 * MIB
    assert (report.host_bytes_before, report.host_bytes_after) == (before * 512, path.stat().st_blocks * 512)
    with api.open(path, format=format_name) as image:
        after = image.read(0, SIZE)
        granule = max(image.layers[0].driver.geometry.packed_unit, 4096)
    for at in range(0, SIZE, 512):
        if not free[at]:
            assert after[at : at + 512] == disk[at : at + 512], at
        else:
            assert after[at : at + 512] in (disk[at : at + 512], bytes(512)), at
    assert after != disk
    # All granules go that have nothing but free blocks and zeros, within what a block of the host is.
    piece = min(granule, 64 << 10)
    wanted = 0
    for at in range(0, SIZE, piece):
        here = zip(disk[at : at + piece], free[at : at + piece], strict=True)
        wanted += 0 if any(byte for byte, is_free in here if not is_free) else piece
    assert report.given_back == wanted
    assert before * 512 - path.stat().st_blocks * 512 >= wanted * 9 // 10
    found = api.check(path, format=format_name)
    assert not found.corruptions
    assert not found.leaks
    again = api.compact(path, format=format_name)
    assert again.host_bytes_after == report.host_bytes_after


def test_the_report_names_what_is_left_alone(tapfs: Run, tmp_path: Path, disk: bytes) -> None:
    path = written(tmp_path, disk, "qcow2", {}, over_parent=False)
    ran = tapfs("compact", "--no-zeros", path)
    assert ran.code == 0
    lines = ran.out.splitlines()
    assert lines[0].startswith('partition 1 (ext4, "root"): ')
    assert lines[0].endswith("given back")
    assert lines[1].startswith('partition 2 (vfat, "BOOT"): ')
    assert lines[2] == "partition 3 (swap): left alone: swap space is given back only if that is asked for"
    assert lines[3] == "partition 4: left alone: nothing in it shows what it is"
    assert lines[4].startswith(f"{path}: ")
    assert "zeros" not in ran.out
    ran = tapfs("compact", "--json", "--swap", "--partition", 3, path)
    assert [(each["partition"], each["left_alone"]) for each in json.loads(ran.out)["file_systems"]] == [(3, None)]
    assert json.loads(ran.out)["file_systems"][0]["given_back"] >= 2 * MIB - 65536
    assert json.loads(ran.out)["zero_bytes"] >= MIB


def test_nothing_is_changed_by_a_dry_run(tapfs: Run, tmp_path: Path, disk: bytes) -> None:
    path = written(tmp_path, disk, "qcow2", {}, over_parent=False)
    content = path.read_bytes()
    path.chmod(0o444)
    ran = tapfs("compact", "-n", path)
    assert ran.code == 0
    assert "would be given back of" in ran.out
    assert path.read_bytes() == content


def test_partitions_that_overlap_are_left_alone(tapfs: Run, tmp_path: Path, disk: bytes) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(disk)
    entries = [struct.pack("<4xB3xII", 0x83, start // 512, size // 512) for _, start, size in (_EXT, (2, 9 * MIB, MIB))]
    with path.open("r+b") as file:
        file.seek(446)
        file.write(b"".join(entries).ljust(64, b"\0"))
    ran = tapfs("compact", "-f", "raw", "--json", path)
    assert {each["left_alone"] for each in json.loads(ran.out)["file_systems"]} >= {"it overlaps partition 2"}
    assert path.read_bytes()[MIB : 17 * MIB] == disk[MIB : 17 * MIB]


def test_an_unknown_partition_is_an_error(tapfs: Run, tmp_path: Path, disk: bytes) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(disk)
    ran = tapfs("compact", "-f", "raw", "--partition", 9, path)
    assert ran.code == 17
    assert "there is no partition 9" in ran.err


def test_a_file_system_that_is_not_clean_is_left_alone(tapfs: Run, tmp_path: Path, disk: bytes) -> None:
    content = bytearray(disk)
    content[MIB + 1024 + 96] |= 4  # an ext4 whose journal is to be replayed
    path = written(tmp_path, bytes(content), "qcow2", {}, over_parent=False)
    ran = tapfs("compact", path)
    assert 'partition 1 (ext4, "root"): left alone: it was not unmounted cleanly' in ran.out
    with api.open(path) as image:
        assert image.read(MIB, 16 * MIB) == bytes(content)[MIB : 17 * MIB]


def test_zeros_alone(tapfs: Run, tmp_path: Path, disk: bytes) -> None:
    path = written(tmp_path, disk, "qcow2", {}, over_parent=False)
    ran = tapfs("compact", "--no-free", "--json", path)
    assert json.loads(ran.out)["file_systems"] == []
    with api.open(path) as image:
        assert image.read(0, SIZE) == disk


def test_raw_must_be_named(tapfs: Run, tmp_path: Path, disk: bytes) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(disk)
    ran = tapfs("compact", path)
    assert ran.code != 0
    assert "-f raw" in ran.err
    assert path.read_bytes() == disk


def test_an_encrypted_image(tmp_path: Path, disk: bytes, free: bytes) -> None:
    path = tmp_path / "disk.qcow"
    api.create(path, "qcow", SIZE, password=b"secret")
    with api.open(path, writable=True, password=b"secret") as image:
        image.write(0, disk)
    report = api.compact(path, password=b"secret")
    assert report.given_back > 10 * MIB
    with api.open(path, password=b"secret") as image:
        after = image.read(0, SIZE)
    assert all(is_free or a == b for a, b, is_free in zip(after, disk, free, strict=True))


def test_what_only_a_parent_has_stays(tmp_path: Path, disk: bytes) -> None:
    """An overlay that has nothing of its own gets no entries for what is free in it."""
    parent = tmp_path / "parent.raw"
    parent.write_bytes(disk)
    path = tmp_path / "overlay.qcow2"
    api.create(path, "qcow2", SIZE, backing=str(parent), backing_format="raw")
    content = path.read_bytes()
    report = api.compact(path)
    assert report.given_back == 0
    assert report.file_systems[0].free
    assert path.read_bytes() == content


def test_a_walk_in_pieces_of_any_length(tmp_path: Path) -> None:
    """Free ranges that begin and end anywhere, data in runs of any length: a model of bytes says what is to go."""
    choice = random.Random(5)
    for _ in range(12):
        size = choice.randrange(1, 6 * MIB)
        path = filled.empty(tmp_path / "disk.raw", size)
        content = bytearray(size)
        with path.open("r+b") as file:
            for _ in range(choice.randrange(1, 12)):
                at, length = choice.randrange(size), choice.randrange(1, MIB)
                data = bytes([choice.choice((0, 7))]) * min(length, size - at)
                content[at : at + len(data)] = data
                file.seek(at)
                file.write(data)
        cuts = sorted(choice.sample(range(size + 1), min(2 * choice.randrange(9), size // 2 * 2)))
        flags = bytearray(size)
        ranges = list(zip(cuts[::2], cuts[1::2], strict=True))
        for start, end in ranges:
            flags[start:end] = b"\1" * (end - start)
        os.sync()
        owner = api.FileSystemSpace(None, "ext4", None, 0, size)
        with api.open(path, format="raw", writable=True) as image:
            from tapfs.extent import Range
            from tapfs.jobs.free_space import FreeRange

            free = [FreeRange(Range(start, end - start), owner) for start, end in ranges]
            walk = GivingBack(image, free, zeros=True, dry_run=False)
            walk.run(lambda _done, _total: None)
            after = image.read(0, size)
            left = [extent for extent in image.extents() if extent.data]
        for at in range(0, size, 4096):
            old, new, is_free = content[at : at + 4096], after[at : at + 4096], flags[at : at + 4096]
            gone = not any(byte for byte, each in zip(old, is_free, strict=True) if not each)
            assert new == (bytes(len(old)) if gone else old), at
            if at + 4096 <= size:  # the host does not punch a part of a block
                assert gone != any(extent.offset <= at < extent.end for extent in left), at
