"""A crash in the middle of a change of qcow2 snapshots: the image reads as before or as wanted, at worst with leaks.

Version 3 says that it is dirty while a check would find bits that do not fit the counts; a repair mends all of it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from tapfs.driver import OpenRequest
from tapfs.formats.qcow2 import FORMAT, snapshot_edits
from tapfs.formats.qcow2.edited_image import EditedImage
from tapfs.plan import Plan
from tapfs.testing.model import MemoryFile
from tests.qcow2_edits import Edit, done
from tests.qcow2_images import Fields, audit, by_hand, make, opened, snapshots

SIZE = 200_000 // 512 * 512
KINDS = (
    "plain",
    "small clusters",
    "version 2",
    "overlay",
    "snapshot",
    "refcounts of 64 bits",
    "compressed",
    "compressed overlay with a snapshot",
    "subclusters over a parent",
    "compressed subclusters with a snapshot",
)
DIRTY = 1


class Disks(NamedTuple):
    """What an image holds: the current disk, and the snapshots by their names."""

    current: bytes
    kept: dict[str, bytes]


def held(data: bytes, backing: bytes) -> Disks:
    named = [each[3] for each in snapshots(Fields(data))]
    kept = {name: by_hand(data, backing, snapshot=number) for number, name in enumerate(named)}
    return Disks(by_hand(data, backing), kept)


def scribble(file: MemoryFile, backing: bytes, choice: random.Random) -> None:
    disk = opened(file, backing)
    for _ in range(6):
        disk.write(choice.randrange(SIZE - 20_000), choice.randbytes(choice.choice([600, 20_000])))
    disk.flush()


def sound_or_mendable(left: MemoryFile, backing: bytes) -> None:
    """Leaks at worst; where more is wrong version 3 says so, and a repair mends it without a change of any disk."""
    data = bytes(left.data)
    fields, found = Fields(data), audit(data)
    if found.corruptions:
        assert all("refcount says otherwise" in each for each in found.corruptions), found.corruptions
        assert fields.version == 2 or fields.incompatible & DIRTY
    before = held(data, backing)
    left.apply_all(list(FORMAT.open(left, OpenRequest(lenient=True)).repair()))
    found = audit(bytes(left.data))
    assert (found.corruptions, found.leaks) == ([], [])
    assert held(bytes(left.data), backing) == before
    scribble(left, backing, random.Random(1))
    assert held(bytes(left.data), backing).kept == before.kept
    assert audit(bytes(left.data)).corruptions == []


def crash_anywhere(file: MemoryFile, backing: bytes, edit: Edit, choice: random.Random, crashes: int) -> Disks:
    """Cut an edit off at every barrier, a few times each; what it leaves when it is done."""
    file = MemoryFile(bytes(file.data))
    before = held(bytes(file.data), backing)
    done(file, edit)
    after = held(bytes(file.data), backing)
    found = audit(bytes(file.data))
    assert (found.corruptions, found.leaks) == ([], [])
    assert not Fields(bytes(file.data)).incompatible & DIRTY
    for epoch in range(len(file.epochs)):
        for _ in range(crashes):
            left = MemoryFile(file.crashed(epoch, choice))
            now = held(bytes(left.data), backing)
            assert now in (before, after), f"epoch {epoch} of {len(file.epochs)}"
            sound_or_mendable(left, backing)
    return after


def edits(kind: str, seed: int, crashes: int) -> None:
    """Create, apply and delete, each cut off anywhere, with writes between."""
    choice = random.Random(f"{kind}{seed}")
    file, backing = make(kind, SIZE, seed)
    first = held(bytes(file.data), backing)
    steps: list[tuple[Edit, Callable[[Disks], Disks]]] = [
        (lambda each: each.create_snapshot("one", 5), lambda now: Disks(now.current, {**now.kept, "one": now.current})),
        (lambda each: each.create_snapshot("two", 6), lambda now: Disks(now.current, {**now.kept, "two": now.current})),
        (lambda each: each.apply_snapshot("one"), lambda now: Disks(now.kept["one"], now.kept)),
        (lambda each: each.delete_snapshot("two"), lambda now: Disks(now.current, without(now.kept, "two"))),
        (lambda each: each.delete_snapshot("one"), lambda now: Disks(now.current, without(now.kept, "one"))),
    ]
    for edit, wanted in steps:
        before = held(bytes(file.data), backing)
        after = crash_anywhere(file, backing, edit, choice, crashes)
        assert after == wanted(before)
        done(file, edit)
        scribble(file, backing, choice)
        assert held(bytes(file.data), backing).kept == after.kept
    assert held(bytes(file.data), backing).kept == first.kept
    found = audit(bytes(file.data))
    assert (found.corruptions, found.leaks) == ([], [])


def without(kept: dict[str, bytes], name: str) -> dict[str, bytes]:
    return {each: disk for each, disk in kept.items() if each != name}


@pytest.mark.parametrize("kind", KINDS)
def test_a_crash_in_an_edit_of_snapshots_loses_nothing(kind: str) -> None:
    edits(kind, 0, 1)


@pytest.mark.parametrize("order", ["reversed", "without the bits", "counts last"])
def test_the_test_notices_a_wrong_order(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = snapshot_edits.create_snapshot

    def wrong(image: EditedImage, name: str, seconds: int) -> Iterator[Plan]:
        plans = list(right(image, name, seconds))
        if order == "reversed":
            plans.reverse()
        elif order == "counts last":
            plans.append(plans.pop(1))
        else:
            del plans[3]
        return iter(plans)

    monkeypatch.setattr(snapshot_edits, "create_snapshot", wrong)
    with pytest.raises(AssertionError):
        edits("plain", 0, 4)
