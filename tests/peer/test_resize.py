"""Disks that tapfs and qemu-img resize in turns: qemu-img check is clean, and both read the same."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tapfs as tapfs_package
from tests.conftest import Ran
from tests.peer.test_convert import MIB, qemu
from tests.peer.test_qcow2_read import by_qemu

Run = Callable[..., Ran]

#: Options of creation, and whether the disk has a parent, which is longer than it at times.
KINDS: dict[str, tuple[str, bool]] = {
    "plain": ("", False),
    "overlay": ("", True),
    "small clusters": ("cluster_size=512", True),
    "version 2": ("compat=0.10,cluster_size=4096", False),
    "subclusters": ("extended_l2=on", True),
    "data file": ("data_file=outside", True),
    "raw data file": ("data_file=outside,data_file_raw=on", False),
    "refcounts of 1 bit": ("refcount_bits=1,cluster_size=512", False),
}


def clean(image: Path) -> None:
    found = json.loads(qemu("qemu-img", "check", "-f", "qcow2", "--output=json", str(image)))
    assert (found.get("corruptions", 0), found.get("leaks", 0)) == (0, 0), found


@pytest.mark.parametrize("kind", KINDS)
def test_in_turns(tapfs: Run, tmp_path: Path, kind: str) -> None:
    options, overlay = KINDS[kind]
    options = options.replace("outside", str(tmp_path / "outside"))
    choice = random.Random(kind)
    image, parent = tmp_path / "a.qcow2", tmp_path / "parent.raw"
    below = choice.randbytes(5 * MIB)
    parent.write_bytes(below)
    over = ("-b", "parent.raw", "-F", "raw") if overlay else ()
    qemu("qemu-img", "create", "-f", "qcow2", *(("-o", options) if options else ()), *over, str(image), str(3 * MIB))
    expected = bytearray(below[: 3 * MIB] if overlay else bytes(3 * MIB))
    for turn in range(8):
        with tapfs_package.open(image, writable=True) as disk:
            offset = choice.randrange(len(expected) - 512)
            data = choice.randbytes(min(200_000, len(expected) - offset))
            disk.write(offset, data)
        expected[offset : offset + len(data)] = data
        size = choice.choice([len(expected) + choice.randrange(4 * MIB), choice.randrange(MIB, 4 * MIB)]) // 512 * 512
        if turn % 2 and size > len(expected):
            qemu("qemu-img", "resize", "-f", "qcow2", str(image), str(size))
        else:
            assert tapfs("resize", "--shrink", image, size).code == 0
        expected = expected[:size].ljust(size, b"\0")
        clean(image)
        assert tapfs("check", image).code == 0
        with tapfs_package.open(image) as disk:
            assert disk.read(0, disk.size) == expected
        assert by_qemu(image) == expected


#: Formats that QEMU does not resize, and what makes their images.
OTHERS: dict[str, tuple[str, str, str]] = {
    "qcow": ("qcow", "qcow", ""),
    "vdi": ("vdi", "vdi", ""),
    "static vdi": ("vdi", "vdi", "static=on"),
    "vhd": ("vhd", "vpc", ""),
    "exact vhd": ("vhd", "vpc", "force_size=on"),
    "vmdk": ("vmdk", "vmdk", ""),
    "flat vmdk": ("vmdk", "vmdk", "subformat=monolithicFlat"),
    "split vmdk": ("vmdk", "vmdk", "subformat=twoGbMaxExtentSparse"),
    "vmdk with zeroed grains": ("vmdk", "vmdk", "zeroed_grain=on"),
    "vhdx": ("vhdx", "vhdx", ""),
    "small blocks of vhdx": ("vhdx", "vhdx", "block_size=1M"),
    "fixed vhdx": ("vhdx", "vhdx", "subformat=fixed"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_images_that_qemu_made(tapfs: Run, tmp_path: Path, kind: str) -> None:
    name, of_qemu, options = OTHERS[kind]
    choice = random.Random(kind)
    image, raw = tmp_path / "a.img", tmp_path / "a.raw"
    qemu("qemu-img", "create", "-f", of_qemu, *(("-o", options) if options else ()), image, 5 * MIB)
    qemu("qemu-io", "-f", of_qemu, "-c", "write -P 7 0 4M", "-c", "write -P 9 4M 700K", image)
    expected = by_qemu(image, "-f", of_qemu)
    assert expected[: 4 * MIB] == b"\7" * (4 * MIB)
    for _ in range(5):
        size = choice.choice([choice.randrange(40 * MIB), choice.randrange(MIB, 4 * MIB)]) // 512 * 512 + 512
        assert tapfs("resize", "--shrink", "-f", name, image, size).code == 0
        expected = expected[:size].ljust(size, b"\0")
        assert by_qemu(image, "-f", of_qemu) == expected
        assert tapfs("check", "-f", name, image).code == 0
        if name in ("vdi", "vhdx"):
            qemu("qemu-img", "check", "-f", of_qemu, image)
        # Who goes on writing takes no space that is in use.
        offset = choice.randrange(len(expected) // 512) * 512
        qemu("qemu-io", "-f", of_qemu, "-c", f"write -P 5 {offset} 512", image)
        expected = expected[:offset] + b"\5" * 512 + expected[offset + 512 :]
    assert tapfs("convert", "-f", name, "-O", "raw", image, raw).code == 0
    assert raw.read_bytes() == expected


def test_snapshots_keep_their_sizes(tapfs: Run, tmp_path: Path) -> None:
    image = tmp_path / "a.qcow2"
    qemu("qemu-img", "create", "-f", "qcow2", str(image), str(3 * MIB))
    with tapfs_package.open(image, writable=True) as disk:
        disk.write(0, b"then" * (3 * MIB // 4))
    qemu("qemu-img", "snapshot", "-c", "then", str(image))
    for size in (9 * MIB, MIB, 4 * MIB):
        assert tapfs("resize", "--shrink", image, size).code == 0
        clean(image)
    with tapfs_package.open(image) as disk:
        assert disk.read(0, disk.size) == (b"then" * (MIB // 4)).ljust(4 * MIB, b"\0")
    qemu("qemu-img", "snapshot", "-a", "then", str(image))
    assert by_qemu(image) == b"then" * (3 * MIB // 4)
    clean(image)


def test_a_snapshot_of_version_2_keeps_the_size_of_the_disk(tapfs: Run, tmp_path: Path) -> None:
    image = tmp_path / "a.qcow2"
    qemu("qemu-img", "create", "-f", "qcow2", "-o", "compat=0.10", str(image), str(3 * MIB))
    qemu("qemu-img", "snapshot", "-c", "then", str(image))
    before = image.read_bytes()
    ran = tapfs("resize", image, 4 * MIB)
    assert ran.code != 0
    assert "then" in ran.err
    assert image.read_bytes() == before


def test_bitmaps_follow(tapfs: Run, tmp_path: Path) -> None:
    """QEMU loads the bitmaps, which it does only if their tables fit the disk, and resizes them itself then."""
    image = tmp_path / "a.qcow2"
    qemu("qemu-img", "create", "-f", "qcow2", "-o", "cluster_size=512", str(image), str(3 * MIB))
    for name, granularity in (("fine", 512), ("coarse", 65536)):
        qemu("qemu-img", "bitmap", "--add", "-g", str(granularity), str(image), name)
    for size in (90 * MIB, 512, 2 * MIB, 6 * MIB + 512, 5 * MIB):
        assert tapfs("resize", "--shrink", image, size).code == 0
        clean(image)
        listed = bitmaps(image)
        assert {each["name"]: each["flags"] for each in listed} == {"fine": ["auto"], "coarse": ["auto"]}
        qemu("qemu-img", "bitmap", "--disable", str(image), "fine")
        qemu("qemu-img", "bitmap", "--enable", str(image), "fine")
    qemu("qemu-img", "resize", str(image), str(7 * MIB))
    clean(image)


def bitmaps(image: Path) -> list[dict[str, Any]]:
    said = json.loads(qemu("qemu-img", "info", "--output=json", str(image)))
    found: list[dict[str, Any]] = said["format-specific"]["data"]["bitmaps"]
    return found


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
@pytest.mark.usefixtures("each_qemu")
def test_space_for_what_is_added(tapfs: Run, tmp_path: Path, mode: str) -> None:
    """Both take the space of what one adds, in turns, and find the image clean."""
    image = tmp_path / "a.qcow2"
    qemu("qemu-img", "create", "-f", "qcow2", "-o", "cluster_size=4096", str(image), str(MIB))
    qemu("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 1M", "-c", "discard 256k 256k", str(image))
    for size in (2 * MIB, 4 * MIB + 512):
        assert tapfs("resize", "--preallocation", mode, image, size).code == 0
        clean(image)
        qemu("qemu-img", "resize", "-f", "qcow2", "--preallocation", mode, str(image), str(size + MIB))
        assert tapfs("check", image).code == 0
        with tapfs_package.open(image) as disk:
            assert all(each.data for each in disk.extents(MIB))
            assert disk.read(MIB, disk.size - MIB) == bytes(size)
    assert by_qemu(image)[MIB:] == bytes(4 * MIB + 512)
