"""Images that refer to a place twice, or to one that cannot be, are only read, in every format with such tables."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tapfs
from tapfs import ErrorKind, ImageError
from tapfs.formats import apart
from tapfs.formats.apart import overlaps
from tests.conftest import Ran
from tests.vmdk_images import cowd, write_list

MIB = 1 << 20
SIZE = 16 * MIB

Bytes = bytes | bytearray


def words(raw: Bytes, at: int, kind: str = "<Q") -> int:
    return int(struct.unpack_from(kind, raw, at)[0])


class Tables(NamedTuple):
    """How an image's table is found: the bytes that an entry stands for, the place of an entry, and its struct."""

    unit: int
    place: Callable[[Bytes, int], int]
    entry: str
    options: Mapping[str, str] = {}


def grain_table(raw: Bytes, index: int, directory_at: int = 56) -> int:
    return words(raw, words(raw, directory_at) * 512, "<I") * 512 + 4 * index


def in_vhd(raw: Bytes, index: int) -> int:
    return words(raw, 512 + 16, ">Q") + 4 * index


def in_vhdx(raw: Bytes, index: int) -> int:
    return words(raw, (192 << 10) + 32) + 8 * index


def in_vdi(raw: Bytes, index: int) -> int:
    return words(raw, 340, "<I") + 4 * index


FORMATS = {
    "vhd": Tables(2 * MIB, in_vhd, ">I"),
    "vhdx": Tables(MIB, in_vhdx, "<Q", {"block_size": "1M"}),
    "vdi": Tables(MIB, in_vdi, "<I"),
    "vmdk": Tables(64 << 10, grain_table, "<I"),
}


def damaged(path: Path, name: str, change: Callable[[int], int]) -> int:
    """An image of ten granules, the entry of whose fourth is changed; `change` is given that of the second."""
    tables = FORMATS[name]
    tapfs.create(path, name, SIZE, options=tables.options)
    with tapfs.open(path, writable=True) as disk:
        for number in range(8):
            disk.write(number * tables.unit, bytes([number + 1]) * 4096)
    raw = bytearray(path.read_bytes())
    at = tables.place(raw, 3)
    entry = change(words(raw, tables.place(raw, 1), tables.entry))
    # The tables of a VMDK are there twice, and a repair would take the good ones.
    for place in [at, *([grain_table(raw, 3, 48)] if name == "vmdk" else [])]:
        struct.pack_into(tables.entry, raw, place, entry)
    path.write_bytes(raw)
    return at


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_two_granules_at_one_place(tmp_path: Path, name: str) -> None:
    path = tmp_path / "image"
    damaged(path, name, lambda other: other)
    before = path.read_bytes()
    with pytest.raises(ImageError, match=r"overlap.*the image can only be read") as caught:
        tapfs.open(path, writable=True)
    assert caught.value.kind is ErrorKind.READ_ONLY
    assert caught.value.offset is not None
    assert path.read_bytes() == before
    with tapfs.open(path) as disk:
        assert disk.read(0, 4096) == b"\1" * 4096
        assert disk.read(3 * FORMATS[name].unit, 4096) == b"\2" * 4096
    assert tapfs.check(path).corruptions > 0


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_place_behind_the_end_would_become_that_of_the_next_granule(tmp_path: Path, name: str) -> None:
    path = tmp_path / "image"
    far = {"vhd": 64 * MIB // 512, "vhdx": 64 * MIB | 6, "vdi": 60, "vmdk": 64 * MIB // 512}[name]
    at = damaged(path, name, lambda _: far)
    with pytest.raises(ImageError, match=r"past the end of the file.*the image can only be read") as caught:
        tapfs.open(path, writable=True)
    assert (caught.value.kind, caught.value.offset) == (ErrorKind.READ_ONLY, at)
    tapfs.open(path).close()


def test_grains_over_a_grain_table(tmp_path: Path, tapfs: Callable[..., Ran]) -> None:
    path = tmp_path / "image"
    damaged(path, "vmdk", lambda _: 0)
    raw = bytearray(path.read_bytes())
    table = grain_table(raw, 0)
    struct.pack_into("<I", raw, table + 12, table // 512)
    path.write_bytes(raw)
    ran = tapfs("mount", "--rw", path, tmp_path)
    assert ran.code != 0
    assert "two grains or tables overlap" in ran.err
    assert "the image can only be read" in ran.err


def test_extents_of_esx_are_looked_at_too(tmp_path: Path) -> None:
    content = bytearray(cowd({1: b"a" * 512, 5: b"b" * 512}, MIB))
    table = words(content, 4 * 512, "<I") * 512
    content[table + 4 * 6 : table + 4 * 7] = content[table + 4 : table + 8]
    path = write_list(tmp_path, [("VMFSSPARSE", "d", bytes(content))], sizes=[MIB])
    with pytest.raises(ImageError, match="two grains or tables overlap") as caught:
        tapfs.open(path, writable=True)
    assert caught.value.path == str(tmp_path / "d")
    tapfs.open(path).close()


def test_entries_behind_the_end_of_the_disk_are_nobodys(tmp_path: Path) -> None:
    path = tmp_path / "image"
    tapfs.create(path, "vmdk", MIB)
    with tapfs.open(path, writable=True) as disk:
        disk.write(0, b"x")
    raw = bytearray(path.read_bytes())
    for directory in (48, 56):
        table = grain_table(raw, 0, directory)
        raw[table + 400 : table + 404] = raw[table : table + 4]
    path.write_bytes(raw)
    with tapfs.open(path, writable=True) as disk:
        disk.write(MIB - 1, b"y")
        assert disk.read(MIB - 1, 1) == b"y"


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=12), st.sampled_from([1, 512]))
def test_overlaps_are_those_of_all_pairs(ranges: list[tuple[int, int]], unit: int) -> None:
    found = list(overlaps(((7 + start * unit, length * unit) for start, length in ranges), unit, 7))
    meet = any(
        left < other + length and other < left + size
        for number, (left, size) in enumerate(ranges)
        for other, length in ranges[:number]
    )
    assert bool(found) == meet
    assert all(left <= right for left, right in found)


def test_many_ranges_are_sorted_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "_SORTED_TOGETHER", 16)
    starts = list(range(1000))
    random.Random(1).shuffle(starts)
    assert list(overlaps(((start * 512, 512) for start in starts), 512, 0)) == []
    starts.append(777)
    assert list(overlaps(((start * 512, 512) for start in starts), 512, 0)) == [(777 * 512, 777 * 512)]
    long = [(0, 3 << 20), (4 << 20, 1), ((3 << 20) - 1, 1)]
    assert list(overlaps(long, 1, 0)) == [(3 * ((1 << 20) - 1), (3 << 20) - 1)]
