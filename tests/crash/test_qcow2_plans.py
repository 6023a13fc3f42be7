"""qcow2 images after a crash at any moment: clean or leaking, and all that a flush acknowledged is there."""

from __future__ import annotations

import random

import pytest

from tapfs.driver import OpenRequest
from tapfs.errors import ImageError
from tapfs.formats.qcow2 import FORMAT
from tapfs.formats.qcow2.writer import WritableQcow2Driver
from tapfs.plan import Plan
from tapfs.testing.crash import write_at_random
from tapfs.testing.model import SECTOR, MemoryFile
from tests.qcow2_images import KINDS, Fields, audit, by_hand, make, opened

SIZE = 1_200_000 // 512 * 512
CRASHES = 40


def crash_anywhere(kind: str, seed: int, crashes: int = CRASHES) -> None:
    choice = random.Random(f"{kind}{seed}")
    file, backing = make(kind, SIZE, seed)
    disk = opened(file, backing)
    has_snapshot = Fields(bytes(file.data)).snapshot_count > 0
    snapshot = by_hand(bytes(file.data), backing, snapshot=0) if has_snapshot else b""
    history = write_at_random(disk, choice, 24)
    for _ in range(crashes):
        epoch = choice.randrange(len(file.epochs))
        left = MemoryFile(file.crashed(epoch, choice))
        found = audit(bytes(left.data))
        assert found.corruptions == [], epoch
        report = FORMAT.open(left, OpenRequest(writable=True)).check()
        assert (report.corruptions, report.leaks) == (0, len(found.leaks)), report.findings
        read = by_hand(bytes(left.data), backing)
        for at in range(0, len(read), SECTOR):
            assert history.allowed(epoch, at, read[at : at + SECTOR]), f"sector {at:#x} after a crash in epoch {epoch}"
        if has_snapshot:
            assert by_hand(bytes(left.data), backing, snapshot=0) == snapshot


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", KINDS)
def test_every_crash_leaves_what_was_acknowledged(kind: str, seed: int) -> None:
    crash_anywhere(kind, seed)


def crash_many_times(kind: str) -> None:
    for seed in range(10):
        crash_anywhere(kind, seed, 60)


def broken(plan: Plan, order: str) -> Plan:
    """The same steps in an order that no driver should choose."""
    stages = list(plan.stages)
    if order == "reversed":
        stages.reverse()
    else:
        stages = [tuple(step for stage in stages for step in stage)]
    return Plan(tuple(stages))


@pytest.mark.parametrize("order", ["reversed", "one stage"])
@pytest.mark.parametrize("kind", ["plain", "overlay", "snapshot"])
def test_the_test_notices_a_wrong_order(kind: str, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = WritableQcow2Driver.flush

    def wrong(driver: WritableQcow2Driver) -> Plan:
        return broken(right(driver), order)

    monkeypatch.setattr(WritableQcow2Driver, "flush", wrong)
    with pytest.raises((AssertionError, ImageError)):
        crash_many_times(kind)


@pytest.mark.parametrize("damage", ["leak", "low", "no block", "bits", "dirty"])
@pytest.mark.parametrize("kind", ["plain", "small clusters", "snapshot"])
def test_a_crash_in_a_repair_loses_nothing(kind: str, damage: str) -> None:
    file, backing = make(kind, SIZE, 5)
    whole = by_hand(bytes(file.data), backing)
    spoil(file.data, damage)
    file = MemoryFile(bytes(file.data))
    file.apply_all(list(FORMAT.open(file, OpenRequest(lenient=True)).repair()))
    assert len(file.epochs) > 2
    choice = random.Random(1)
    for epoch in range(len(file.epochs)):
        for _ in range(6):
            left = MemoryFile(file.crashed(epoch, choice))
            assert by_hand(bytes(left.data), backing) == whole
            left.apply_all(list(FORMAT.open(left, OpenRequest(lenient=True)).repair()))
            found = audit(bytes(left.data))
            assert (found.corruptions, found.leaks) == ([], [])
            assert not FORMAT.open(left, OpenRequest(lenient=True)).repair()
            FORMAT.open(left, OpenRequest(writable=True))
            assert by_hand(bytes(left.data), backing) == whole


def spoil(data: bytearray, damage: str) -> None:
    """Damage refcounts, or the bits that follow from them."""
    fields = Fields(bytes(data))
    block = fields.number(fields.reftable_at, 8)
    last = len(data) // fields.cluster - 1
    if damage == "leak":
        data.extend(bytes(fields.cluster))
        at = block + 2 * ((last + 1) % (fields.cluster // 2))
        data[at : at + 2] = b"\0\5"
    elif damage == "low":
        data[block : block + 8] = bytes(8)
    elif damage == "no block":
        data[fields.reftable_at : fields.reftable_at + 8] = (block + 512 + fields.cluster * 1000).to_bytes(8, "big")
    elif damage == "bits":
        data[next(at for at in range(fields.l1_at, len(data), 8) if any(data[at : at + 8]))] ^= 0x80
    else:
        data[79] |= 1
