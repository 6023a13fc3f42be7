"""Enabled qcow2 bitmaps while the disk is written: they mark every change, and no crash makes one lie."""

from __future__ import annotations

import random

import pytest

from tapfs.driver import OpenRequest, Operation
from tapfs.extent import Extent, Range
from tapfs.formats.qcow2 import FORMAT
from tapfs.formats.qcow2.followed_bitmaps import FollowedBitmaps
from tapfs.testing.laws import check_map, check_split
from tapfs.testing.model import SECTOR, MemoryFile, ModelDisk
from tests.crash.test_qcow2_bitmaps import done
from tests.qcow2_images import KINDS, audit, by_hand, make, opened

SIZE = 700_000 // 512 * 512
VERSION_3 = [kind for kind, (options, _, _) in KINDS.items() if options.get("compat") != "0.10"]
#: Names of bitmaps and their granularities.
BITMAPS = {"fine": 512, "usual": 16384, "wide": 1 << 20}


def with_bitmaps(kind: str, seed: int, names: list[str]) -> tuple[MemoryFile, bytes]:
    file, backing = make(kind, SIZE, seed)
    for name in names:
        done(file, lambda each, name=name: each.add_bitmap(name, BITMAPS[name], enabled=True))  # type: ignore[misc]
    done(file, lambda each: each.add_bitmap("still", 4096, enabled=False))
    return MemoryFile(bytes(file.data)), backing


def change(disk: ModelDisk, choice: random.Random) -> None:
    """One request."""
    offset = choice.randrange(SIZE)
    unit = disk.driver.geometry.packed_unit
    what = choice.choice(["write"] * 6 + ["zero", "discard", "flush"])
    if what == "write":
        disk.write(offset, choice.randbytes(min(choice.choice([100, 700, 30_000]), SIZE - offset)))
    elif what == "flush":
        disk.flush()
    else:
        disk.zero(
            offset // unit * unit, unit * choice.choice([1, 2]) if offset + 2 * unit < SIZE else unit, Operation(what)
        )


def unmarked(before: bytes, after: bytes, marked: list[Range]) -> list[int]:
    """The sectors that have changed and are not marked."""
    inside = bytearray(SIZE)
    for offset, length in marked:
        inside[offset : offset + length] = b"\1" * length
    return [
        at
        for at in range(0, SIZE, SECTOR)
        if before[at : at + SECTOR] != after[at : at + SECTOR] and not all(inside[at : at + SECTOR])
    ]


def ranges(file: MemoryFile, name: str) -> list[Range]:
    return list(FORMAT.open(file, OpenRequest()).bitmap_ranges(name))


@pytest.mark.parametrize("kind", VERSION_3)
def test_every_change_is_marked(kind: str) -> None:
    choice = random.Random(kind)
    names = choice.sample(sorted(BITMAPS), choice.choice([1, 2, 3]))
    file, backing = with_bitmaps(kind, 3, names)
    before = by_hand(bytes(file.data), backing)
    expected = bytearray(before)
    for _ in range(4):  # openings of the image
        disk = opened(file, backing)
        for _ in range(choice.choice([1, 8])):
            change(disk, choice)
            offset = choice.randrange(SIZE)
            check_map(disk.driver, offset, min(90_000, SIZE - offset))
            check_split(disk.driver, offset, min(90_000, SIZE - offset))
        expected[:] = disk.whole()
        disk.end()
        if choice.random() < 0.5:  # and it goes on after its end
            disk.write(choice.randrange(SIZE - 700), choice.randbytes(700))
            assert not any(each.consistent for each in FORMAT.open(file, OpenRequest()).bitmaps() if each.enabled)
            expected[:] = disk.whole()
            disk.end()
        assert by_hand(bytes(file.data), backing) == expected
        for name in names:
            assert unmarked(before, bytes(expected), ranges(file, name)) == []
        assert ranges(file, "still") == []
        assert audit(bytes(file.data)).corruptions == []
        disk.flush()  # brings the plan of the end once more, and knows that it is done
        found = audit(bytes(file.data))
        assert (found.corruptions, found.leaks) == ([], [])


@pytest.mark.parametrize("kind", ["plain", "small clusters", "overlay", "subclusters over a parent", "compressed"])
def test_a_crash_leaves_a_bitmap_that_is_true_or_inconsistent(kind: str) -> None:
    choice = random.Random(kind)
    file, backing = with_bitmaps(kind, 4, ["usual", "fine"])
    before = by_hand(bytes(file.data), backing)
    for _ in range(2):
        disk = opened(file, backing)
        for _ in range(8):
            change(disk, choice)
        disk.end()
    seen = {True: 0, False: 0}
    for epoch in range(len(file.epochs)):
        for _ in range(2):
            left = MemoryFile(file.crashed(epoch, choice))
            assert audit(bytes(left.data)).corruptions == []
            now = by_hand(bytes(left.data), backing)
            for each in FORMAT.open(left, OpenRequest()).bitmaps():
                if each.enabled:
                    seen[each.consistent] += 1
                if each.enabled and each.consistent:
                    assert unmarked(before, now, ranges(left, each.name)) == [], epoch
    assert seen[True]
    assert seen[False]


def test_a_second_write_to_a_marked_cluster_is_in_place() -> None:
    file, backing = with_bitmaps("plain", 3, ["usual", "wide"])
    disk = opened(file, backing)
    disk.write(0, b"x" * 65536)
    disk.end()
    done(file, lambda each: each.store_bitmap("usual", ()))
    disk = opened(file, backing)
    (extent, *_) = disk.driver.map(0, 65536)
    assert not extent.in_place
    disk.write(1000, b"y")
    (marked, *_) = disk.driver.map(0, 65536)
    assert (marked.host_offset, marked.in_place) == (extent.host_offset, True)


@pytest.mark.parametrize("broken", ["mark", "apart"])
def test_the_test_notices_what_is_not_noted(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def as_they_are(_: FollowedBitmaps, extents: list[Extent]) -> list[Extent]:
        return extents

    def nothing(_: FollowedBitmaps, offset: int, length: int) -> None:
        del offset, length

    monkeypatch.setattr(FollowedBitmaps, broken, {"mark": nothing, "apart": as_they_are}[broken])
    with pytest.raises(AssertionError):
        test_every_change_is_marked("plain")
