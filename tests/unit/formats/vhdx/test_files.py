"""VHDX through the commands: dirty images, chains of parents, sectors of 4096 bytes, creation, check and repair."""

from __future__ import annotations

import hashlib
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

import tapfs
from tapfs import ImageError
from tests.conftest import Ran
from tests.vhdx_images import (
    BAT_AT,
    BLOCKS_AT,
    DATA_GUID,
    HEADERS,
    MIB,
    PARENT_GUID,
    PARTIAL,
    PRESENT,
    Entry,
    Image,
    named_parent,
    put_log,
)

Run = Callable[..., Ran]
NOISE = random.Random(4).randbytes(MIB)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def dirty(tmp_path: Path) -> Path:
    """An image whose only block is known to its log alone."""
    data = Image(2 * MIB).build()
    data += NOISE
    put_log(data, [Entry(3, [(BAT_AT, struct.pack("<Q", BLOCKS_AT | PRESENT).ljust(4096, b"\0"))], flushed=len(data))])
    path = tmp_path / "dirty.vhdx"
    path.write_bytes(data)
    return path


def test_a_block_that_the_end_of_the_file_cuts_is_said_to_be_so(dirty: Path) -> None:
    data = bytearray(dirty.read_bytes())
    page = struct.pack("<Q", BLOCKS_AT | PRESENT).ljust(4096, b"\0")
    put_log(data, [Entry(3, [(BAT_AT, page)], last=len(data))])
    dirty.write_bytes(data[:-1])
    with tapfs.open(dirty) as disk, pytest.raises(ImageError, match="guest data behind the end of the file"):
        disk.read(0, MIB)


def test_a_log_that_holds_guest_data_is_refused_until_it_is_replayed(tapfs: Run, dirty: Path) -> None:
    data = bytearray(dirty.read_bytes())
    page = struct.pack("<Q", BLOCKS_AT | PRESENT).ljust(4096, b"\0")
    put_log(data, [Entry(3, [(BAT_AT, page), (BLOCKS_AT, b"l" * 4096)], flushed=len(data))])
    dirty.write_bytes(data)
    raw = dirty.with_suffix(".raw")
    refused = tapfs("convert", "-O", "raw", dirty, raw)
    assert refused.code == 2
    assert "guest data where the image's journal has metadata" in refused.err
    assert "run tapfs repair on a copy" in refused.err
    assert tapfs("repair", dirty).code == 0
    assert tapfs("convert", "-O", "raw", dirty, raw).code == 0
    assert raw.read_bytes() == b"l" * 4096 + NOISE[4096:] + bytes(MIB)


def test_a_reader_sees_through_the_log_and_leaves_the_file(tapfs: Run, dirty: Path) -> None:
    before = digest(dirty)
    raw = dirty.with_suffix(".raw")
    raw.write_bytes(NOISE + bytes(MIB))
    for words in (["info"], ["map"], ["check"], ["compare", raw], ["convert", "-O", "raw"]):
        after = [dirty.with_name("out")] if words[0] == "convert" else []
        assert tapfs(*words, dirty, *after).code == 0, words
    assert dirty.with_name("out").read_bytes() == raw.read_bytes()
    assert digest(dirty) == before


def test_a_writer_replays_the_log(dirty: Path) -> None:
    with tapfs.open(dirty, writable=True) as disk:
        assert disk.read(0, MIB) == NOISE
    data = dirty.read_bytes()
    assert data[BAT_AT] & 7 == PRESENT
    assert not any(data[max(HEADERS) + 48 : max(HEADERS) + 64])


def test_a_log_that_is_lost_is_an_error_for_everybody(tapfs: Run, dirty: Path) -> None:
    data = bytearray(dirty.read_bytes())
    data[MIB + 100] ^= 1
    dirty.write_bytes(data)
    for words in (["info"], ["check"], ["repair"]):
        ran = tapfs(*words, dirty)
        assert ran.code == 2
        assert "the log waits to be replayed, and no entry of it is whole" in ran.err + ran.out


def chain(folder: Path, **child: object) -> bytes:
    """parent.vhdx and child.vhdx over it; what the child shows."""
    below = random.Random(5).randbytes(2 * MIB)
    blocks = {number: (PRESENT, below[number * MIB : (number + 1) * MIB]) for number in range(2)}
    (folder / "parent.vhdx").write_bytes(Image(2 * MIB, blocks=blocks, data=PARENT_GUID).build())
    image = Image(
        4 * MIB,
        blocks={1: (PARTIAL, NOISE), 2: (PARTIAL, NOISE)},
        sectors={1: range(100, 200), 2: range(3)},
        parent=named_parent("parent.vhdx"),
        **child,  # type: ignore[arg-type]
    )
    (folder / "child.vhdx").write_bytes(image.build())
    out = bytearray(below + bytes(2 * MIB))
    out[MIB + 51200 : MIB + 102400] = NOISE[51200:102400]
    out[2 * MIB : 2 * MIB + 3 * 512] = NOISE[: 3 * 512]
    return bytes(out)


def test_a_child_may_be_larger_than_its_parent(tapfs: Run, tmp_path: Path) -> None:
    expected = chain(tmp_path)
    with tapfs_open(tmp_path / "child.vhdx") as disk:
        assert disk.read(0, disk.size) == expected
    assert tapfs("check", tmp_path / "child.vhdx").code == 0


def tapfs_open(path: Path, *, writable: bool = False) -> tapfs.Image:
    return tapfs.open(path, writable=writable)


def test_another_parent_is_refused_unless_it_is_forced(tapfs: Run, tmp_path: Path) -> None:
    expected = chain(tmp_path)
    parent = bytearray((tmp_path / "parent.vhdx").read_bytes())
    blocks = {number: (PRESENT, expected[number * MIB : (number + 1) * MIB]) for number in range(2)}
    (tmp_path / "parent.vhdx").write_bytes(Image(2 * MIB, blocks=blocks, data=DATA_GUID).build())
    ran = tapfs("convert", "-O", "raw", tmp_path / "child.vhdx", tmp_path / "out")
    assert ran.code == 2
    assert PARENT_GUID in ran.err
    assert DATA_GUID in ran.err
    assert tapfs("convert", "--any-parent", "-O", "raw", tmp_path / "child.vhdx", tmp_path / "out").code == 0
    (tmp_path / "parent.vhdx").write_bytes(parent)
    assert tapfs("compare", tmp_path / "child.vhdx", tmp_path / "out").code == 0


@pytest.mark.parametrize("second", [False, True])
def test_a_parent_may_be_the_one_of_either_linkage(tapfs: Run, tmp_path: Path, *, second: bool) -> None:
    """While a disk is merged into its parent the parent has one GUID and then the other."""
    other = {"parent_linkage2": "{" + DATA_GUID + "}"} if second else {}
    child = Image(2 * MIB, parent=named_parent("parent.vhdx") | other)
    (tmp_path / "child.vhdx").write_bytes(child.build())
    (tmp_path / "parent.vhdx").write_bytes(Image(2 * MIB, data=DATA_GUID).build())
    ran = tapfs("convert", "-O", "raw", tmp_path / "child.vhdx", tmp_path / "out")
    assert (ran.code == 0) == second
    assert second or f"it names uuid:{PARENT_GUID}, and that file is uuid:{DATA_GUID}" in ran.err


def test_writing_a_parent_shows_in_its_children(tapfs: Run, tmp_path: Path) -> None:
    chain(tmp_path)
    with tapfs_open(tmp_path / "parent.vhdx", writable=True) as disk:
        disk.write(0, b"changed")
    assert tapfs("check", tmp_path / "child.vhdx").code == 0
    with pytest.raises(ImageError, match="is not the one"):
        tapfs_open(tmp_path / "child.vhdx")


def test_a_parent_that_is_missing_is_no_zeros(tapfs: Run, tmp_path: Path) -> None:
    chain(tmp_path)
    (tmp_path / "parent.vhdx").unlink()
    ran = tapfs("convert", "-O", "raw", tmp_path / "child.vhdx", tmp_path / "out")
    assert ran.code == 17
    assert "parent.vhdx is missing" in ran.err
    assert tapfs("info", tmp_path / "child.vhdx").code == 0


@pytest.mark.parametrize("sector", [512, 4096])
def test_an_overlay_is_made_written_and_read(tapfs: Run, tmp_path: Path, sector: int) -> None:
    base, top = tmp_path / "base.vhdx", tmp_path / "top.vhdx"
    options = f"block_size=1M,logical_sector_size={sector}"
    assert tapfs("create", "-f", "vhdx", "-o", options, base, "3M").code == 0
    with tapfs_open(base, writable=True) as disk:
        disk.write(MIB, NOISE)
    assert tapfs("create", "-f", "vhdx", "-o", "block_size=2M", "-b", base.name, "-F", "vhdx", top).code == 0
    with tapfs_open(top, writable=True) as disk:
        disk.write(MIB + 1000, b"mine")
        disk.write_zeroes(MIB + 8192, 4096)
        disk.flush()
        assert disk.layers[0].driver.geometry.granule == sector
    expected = bytearray(bytes(MIB) + NOISE + bytes(MIB))
    expected[MIB + 1000 : MIB + 1004] = b"mine"
    expected[MIB + 8192 : MIB + 12288] = bytes(4096)
    with tapfs_open(top) as disk:
        assert disk.read(0, disk.size) == expected
    told = json.loads(tapfs("info", "--json", top).out)
    assert told["backing"]["format"] == "vhdx"
    assert told["details"]["subformat"] == "differencing"
    with tapfs_open(base) as disk:
        assert told["details"]["disk_id"] == disk.layers[0].driver.details()["disk_id"]


def test_only_a_vhdx_image_can_be_the_parent_of_one(tapfs: Run, tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(bytes(MIB))
    ran = tapfs("create", "-f", "vhdx", "-b", "base.raw", "-F", "raw", tmp_path / "top.vhdx")
    assert ran.code == 12
    assert "must be a VHDX image" in ran.err


def test_partitions_count_in_the_sectors_of_the_image(tapfs: Run, tmp_path: Path) -> None:
    """A partition table of a disk with sectors of 4096 bytes: nothing in an MBR says so, the image does."""
    table = bytearray(512)
    table[446:462] = struct.pack("<8B2I", 0, 0, 0, 0, 0x83, 0, 0, 0, 256, 128)
    table[510:] = b"\x55\xaa"
    for sector in (512, 4096):
        path = tmp_path / f"{sector}.vhdx"
        path.write_bytes(Image(2 * MIB, sector=sector, blocks={0: (PRESENT, bytes(table))}).build())
        (partition,) = json.loads(tapfs("info", "--json", path).out)["partitions"]["table"]
        assert (partition["start"], partition["size"]) == (256 * sector, 128 * sector)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("block_size=3M", "power of two"),
        ("block_size=512K", "power of two"),
        ("block_size=1G", "power of two"),
        ("block_size=x", "no number of bytes"),
        ("log_size=1000", "multiple of 1 MiB"),
        ("subformat=sparse", "dynamic or fixed"),
        ("logical_sector_size=520", "512 or 4096"),
        ("preallocation=falloc", "subformat=fixed only"),
        ("colour=blue", "unknown option"),
        ("block_state_zero=maybe", "on or off"),
    ],
)
def test_impossible_options_are_refused(tapfs: Run, tmp_path: Path, options: str, words: str) -> None:
    ran = tapfs("create", "-f", "vhdx", "-o", options, tmp_path / "a.vhdx", "1G")
    assert ran.code == 12
    assert words in ran.err
    assert not (tmp_path / "a.vhdx").exists()


def test_impossible_sizes_are_refused(tapfs: Run, tmp_path: Path) -> None:
    for size in ("0", "65T"):
        assert tapfs("create", "-f", "vhdx", tmp_path / "a.vhdx", size).code == 13
    assert tapfs("create", "-f", "vhdx", "-o", "block_size=1M", tmp_path / "a.vhdx", "64T").code == 13
    words = ["-o", "block_size=1M,block_state_zero=off"]
    assert tapfs("create", "-f", "vhdx", *words, tmp_path / "a.vhdx", "64T").code == 0
    with tapfs_open(tmp_path / "a.vhdx", writable=True) as disk:
        disk.write(disk.size - 5, b"last")
        assert disk.read(disk.size - 6, 6) == b"\0last\0"


def test_a_fixed_image_has_every_block_and_no_holes_if_that_is_wanted(tapfs: Run, tmp_path: Path) -> None:
    path = tmp_path / "a.vhdx"
    words = ["-o", "subformat=fixed,preallocation=falloc,block_size=1M"]
    assert tapfs("create", "-f", "vhdx", *words, path, "5M").code == 0
    assert path.stat().st_blocks * 512 >= path.stat().st_size >= 5 * MIB
    with tapfs_open(path, writable=True) as disk:
        assert [extent.in_place for extent in disk.layers[0].driver.map(0, disk.size)] == [True]


def test_repair_mends_copies_and_leaks(tapfs: Run, tmp_path: Path) -> None:
    path = tmp_path / "a.vhdx"
    data = Image(2 * MIB, blocks={0: (PRESENT, NOISE)}).build()
    data[HEADERS[0] + 30] ^= 1
    data[(256 << 10) + 30] ^= 1
    data += b"leak" * 4096
    path.write_bytes(data)
    assert tapfs("check", path).code == 3
    ran = tapfs("repair", path)
    assert ran.code == 0, ran
    assert tapfs("check", path).out.startswith(f"{path}: no errors")
    with tapfs_open(path) as disk:
        assert disk.read(0, 2 * MIB) == NOISE + bytes(MIB)


def test_zeros_inside_a_block_take_no_space_when_it_is_filled(tapfs: Run, tmp_path: Path) -> None:
    raw, path = tmp_path / "a.raw", tmp_path / "a.vhdx"
    with raw.open("wb") as file:
        for number in range(64):
            file.write(NOISE[: 64 << 10] + bytes(960 << 10) if number % 8 == 0 else bytes(MIB))
    assert tapfs("convert", "-O", "vhdx", "-o", "block_size=32M", raw, path).code == 0
    assert tapfs("compare", raw, path).code == 0
    assert path.stat().st_blocks * 512 < 2 * MIB


def test_a_log_that_waits_is_said_and_replayed_by_a_repair(tapfs: Run, dirty: Path) -> None:
    path, before = dirty, dirty.read_bytes()
    ran = tapfs("info", path)
    assert "its journal waits, because its writer was killed" in ran.out
    ran = tapfs("check", path)
    assert (ran.code, "its journal waits" in ran.out) == (0, True)
    ran = tapfs("repair", "--dry-run", path)
    assert "its journal, which was not replayed" in ran.out
    assert path.read_bytes() == before
    ran = tapfs("repair", path)
    assert "mended: its journal, which was not replayed" in ran.out
    ran = tapfs("check", path)
    assert ran.out.count("\n") == 1
    assert "journal" not in tapfs("info", path).out
