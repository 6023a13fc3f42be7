"""A crash in the middle of a change of qcow2 bitmaps: each says what it said, or what it is to say."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator

import pytest

from tapfs.driver import OpenRequest
from tapfs.errors import ImageError
from tapfs.extent import Range
from tapfs.formats.qcow2 import FORMAT, bitmap_edits
from tapfs.formats.qcow2.edited_image import EditedImage
from tapfs.plan import Plan
from tapfs.testing.model import MemoryFile
from tests.qcow2_edits import Edit, done
from tests.qcow2_images import audit, by_hand, make, opened

SIZE = 800_000 // 512 * 512
KINDS = (
    "plain",
    "small clusters",
    "overlay",
    "snapshot",
    "refcounts of 1 bit",
    "compressed subclusters with a snapshot",
)
#: What each bitmap says, by its name: whether it is enabled, and its ranges; None: it is inconsistent.
Said = dict[str, tuple[bool, list[Range]] | None]

MARKED = [Range(0, 70_000), Range(200_000, 300_000), Range(SIZE - 1, 1)]


def said(file: MemoryFile) -> Said:
    driver = FORMAT.open(file, OpenRequest())
    return {
        each.name: (each.enabled, list(driver.bitmap_ranges(each.name))) if each.consistent else None
        for each in driver.bitmaps()
    }


def crash_anywhere(file: MemoryFile, backing: bytes, edit: Edit, choice: random.Random, *, may_lose: bool) -> Said:
    """Cut an edit off at every barrier; what the bitmaps say when it is done. `may_lose`: inconsistency is allowed."""
    file = MemoryFile(bytes(file.data))
    disk, before = by_hand(bytes(file.data), backing), said(file)
    done(file, edit)
    after = said(file)
    found = audit(bytes(file.data))
    assert (found.corruptions, found.leaks) == ([], [])
    for epoch in range(len(file.epochs)):
        for _ in range(2):
            left = MemoryFile(file.crashed(epoch, choice))
            now = said(left)
            # The first bitmap is there before the bit that vouches for it, the last one still after it.
            lost = (may_lose or not before or not after) and all(each is None for each in now.values())
            assert now in (before, after) or lost, f"epoch {epoch} of {len(file.epochs)}"
            assert audit(bytes(left.data)).corruptions == []
            assert by_hand(bytes(left.data), backing) == disk
            assert (
                FORMAT.open(left, OpenRequest()).geometry.backing == FORMAT.open(file, OpenRequest()).geometry.backing
            )
            scratch = opened(left, backing)
            scratch.write(choice.randrange(SIZE - 70_000), choice.randbytes(70_000))
            scratch.flush()
            assert audit(bytes(left.data)).corruptions == []
    return after


def edits(file: MemoryFile, backing: bytes, choice: random.Random, *, may_lose: bool = False) -> None:
    """Every edit of two bitmaps, each cut off anywhere."""
    start = said(file)
    wide = (False, [Range(0, SIZE)])
    steps: list[tuple[Edit, Callable[[Said], Said]]] = [
        (lambda each: each.add_bitmap("one", 512, enabled=True), lambda now: {**now, "one": (True, [])}),
        (
            lambda each: each.add_bitmap("two", 512, enabled=False, ranges=MARKED),
            lambda now: {**now, "two": (False, rounded(MARKED, 512))},
        ),
        (lambda each: each.store_bitmap("one", MARKED), lambda now: {**now, "one": (True, rounded(MARKED, 512))}),
        (lambda each: each.store_bitmap("two", [Range(0, SIZE)]), lambda now: {**now, "two": wide}),
        (lambda each: each.enable_bitmap("one", enabled=False), lambda now: {**now, "one": (False, now_of(now))}),
        (lambda each: each.store_bitmap("two", ()), lambda now: {**now, "two": (False, [])}),
        (lambda each: each.remove_bitmap("one"), lambda now: {"two": now["two"], **{n: now[n] for n in start}}),
        (lambda each: each.remove_bitmap("two"), lambda _: start),
    ]
    for edit, wanted in steps:
        before = said(file)
        assert crash_anywhere(file, backing, edit, choice, may_lose=may_lose) == wanted(before)
        done(file, edit)
    assert audit(bytes(file.data)).leaks == []


def now_of(now: Said) -> list[Range]:
    one = now["one"]
    assert one is not None
    return one[1]


def rounded(ranges: list[Range], granularity: int) -> list[Range]:
    """Whole pieces, cut at the end of the disk."""
    found: list[Range] = []
    for offset, length in ranges:
        start = offset // granularity * granularity
        end = min(-(-(offset + length) // granularity) * granularity, SIZE)
        found.append(Range(start, end - start))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_crash_in_an_edit_of_bitmaps_makes_none_of_them_lie(kind: str) -> None:
    file, backing = make(kind, SIZE, 3)
    edits(file, backing, random.Random(kind))


def with_extension(file: MemoryFile, kind: int, content: bytes) -> None:
    """Put an unknown header extension before the others' end."""
    header_length = struct.unpack_from(">I", file.data, 100)[0]
    at = header_length
    while struct.unpack_from(">I", file.data, at)[0]:
        at += 8 + -(-struct.unpack_from(">I", file.data, at + 4)[0] // 8) * 8
    piece = struct.pack(">II", kind, len(content)) + content.ljust(-(-len(content) // 8) * 8, b"\0")
    file.data[at : at + len(piece) + 8] = piece + bytes(8)


def test_an_extension_over_the_border_of_a_sector_is_switched_under_the_autoclear_bit() -> None:
    """Its 24 bytes cannot be written at once: a crash leaves the bitmaps inconsistent, and never untrue."""
    file, backing = make("refcounts of 1 bit", SIZE, 3)
    at = struct.unpack_from(">I", file.data, 100)[0]
    # The extension that comes next has its data at byte 496 of the sector.
    with_extension(file, 0x12345678, b"unknown".ljust(488 - at - 8, b"."))
    edits(file, backing, random.Random(1), may_lose=True)


@pytest.mark.parametrize("order", ["reversed", "counts last"])
@pytest.mark.parametrize("name", ["add_bitmap", "store_bitmap", "remove_bitmap"])
def test_the_test_notices_a_wrong_order(name: str, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right: Callable[..., Iterator[Plan]] = getattr(bitmap_edits, name)

    def wrong(image: EditedImage, *words: object, **named: object) -> Iterator[Plan]:
        plans = list(right(image, *words, **named))
        if order == "reversed":
            plans.reverse()
        else:
            plans.append(plans.pop(0))
        return iter(plans)

    monkeypatch.setattr(bitmap_edits, name, wrong)
    file, backing = make("plain", SIZE, 3)
    with pytest.raises((AssertionError, ImageError)):
        edits(file, backing, random.Random(2))
