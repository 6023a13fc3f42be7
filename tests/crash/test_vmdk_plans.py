"""VMDKs after a crash at any moment: clean or leaking, and both directories have all that a flush acknowledged.

The crash model: everything before the last barrier is durable, of everything since any part may be, in any order, torn
at sectors of 512 bytes.
"""

from __future__ import annotations

import random
import struct

import pytest

from tapfs.driver import OpenRequest
from tapfs.errors import ImageError
from tapfs.formats.vmdk import FORMAT
from tapfs.plan import Plan
from tapfs.testing.crash import write_at_random
from tapfs.testing.model import SECTOR, MemoryFile, ModelDisk, read_extents
from tests.vmdk_disks import KINDS, make

SIZE = (2 << 20) + 1536
CRASHES = 12
#: A wrong order shows only where two halves of one change are torn apart.
MANY_CRASHES = 60


def opened(file: MemoryFile, *, writable: bool = False, lenient: bool = False):  # noqa: ANN201  see FORMAT
    return FORMAT.open(file, OpenRequest(writable=writable, lenient=lenient, further=file))


def whole(file: MemoryFile, backing: bytes) -> bytes:
    driver = opened(file)
    return read_extents(driver, file, 0, driver.geometry.virtual_size, backing)


def crash_anywhere(kind: str, seed: int, crashes: int = CRASHES) -> None:
    choice = random.Random(seed)
    file, backing = make(kind, SIZE, seed)
    disk = ModelDisk(opened(file, writable=True), file, backing)
    history = write_at_random(disk, choice, 24)
    for _ in range(crashes):
        epoch = choice.randrange(len(file.epochs))
        left = file.crashed_files(epoch, choice)
        report = opened(left, writable=True).check()
        assert report.corruptions == 0, (epoch, report.findings)
        for name, read in {"the primary": whole(left, backing), "the redundant": by_redundant(left, backing)}.items():
            for at in range(0, len(read), SECTOR):
                piece = read[at : at + SECTOR]
                assert history.allowed(epoch, at, piece), f"{name} tables: sector {at:#x} after epoch {epoch}"


def by_redundant(file: MemoryFile, backing: bytes) -> bytes:
    """The disk by the redundant tables alone, as a tool reads it that is told that the primary ones are lost."""
    turned = file.copy()
    for each in (turned, *turned.further.values()):
        if each.data[:4] == b"KDMV" and each.data[8] & 2:
            redundant, primary = struct.unpack_from("<QQ", each.data, 48)
            # A table that is in the primary directory only has a twin later: the primary one has all of it.
            (capacity,) = struct.unpack_from("<Q", each.data, 12)
            (entries,) = struct.unpack_from("<I", each.data, 44)
            count = -(-capacity // (entries * each.data[20]))
            for index in range(count):
                at, twin = primary * SECTOR + 4 * index, redundant * SECTOR + 4 * index
                if any(each.data[twin : twin + 4]):
                    each.data[at : at + 4] = each.data[twin : twin + 4]
    return whole(turned, backing)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_crash_leaves_what_was_acknowledged(kind: str, seed: int) -> None:
    crash_anywhere(kind, seed)


def crash_many_times(kind: str) -> None:
    for seed in range(20):
        crash_anywhere(kind, seed, MANY_CRASHES)


def broken(plan: Plan, order: str) -> Plan:
    """The same steps in an order that no driver should choose."""
    stages = list(plan.stages)
    if order == "reversed":
        stages.reverse()
    else:
        stages = [tuple(step for stage in stages for step in stage)]
    return Plan(tuple(stages))


@pytest.mark.parametrize(
    ("kind", "order"),
    [
        ("monolithic-tables-left-out", "reversed"),
        ("cowd", "reversed"),
        ("cowd-delta", "reversed"),
        ("cowd", "one stage"),
    ],
)
def test_the_test_notices_a_wrong_order(kind: str, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tapfs.formats.vmdk.writer import WritableVmdkDriver

    right = WritableVmdkDriver.flush
    monkeypatch.setattr(WritableVmdkDriver, "flush", lambda driver: broken(right(driver), order))
    with pytest.raises((AssertionError, ImageError)):
        crash_many_times(kind)


@pytest.mark.parametrize("kind", ["monolithic", "split-delta", "unclean", "zeroed-delta"])
@pytest.mark.parametrize("damage", ["entry", "table", "directory", "none"])
def test_a_crash_in_a_repair_loses_nothing(kind: str, damage: str) -> None:
    file, backing = make(kind, SIZE, 5)
    right = whole(file, backing)
    for each in (file, *file.further.values()):
        spoil(each, damage)
        # Something that nothing refers to, for the repair to give back.
        if each.data[:4] == b"KDMV":
            each.data.extend(bytes(-len(each.data) % 8192) + b"leak" * 2048)
    assert whole(file, backing) == right
    file = file.copy()
    for _ in range(2):  # leaks are given back once the tables are good
        file.apply_all(list(opened(file, lenient=True).repair()))
    choice = random.Random(1)
    assert len(file.epochs) > 2
    for epoch in range(len(file.epochs)):
        for _ in range(10):
            left = file.crashed_files(epoch, choice)
            assert whole(left, backing) == right
            for _ in range(2):
                left.apply_all(list(opened(left, lenient=True).repair()))
            again = opened(left, writable=True)
            report = again.check()
            assert (report.corruptions, report.leaks) == (0, 0), report.findings
            assert not again.repair()
            assert whole(left, backing) == right


def spoil(file: MemoryFile, damage: str) -> None:
    if file.data[:4] != b"KDMV":
        return
    (directory,) = struct.unpack_from("<Q", file.data, 56)
    (table,) = struct.unpack_from("<I", file.data, directory * SECTOR)
    match damage:
        case "entry":
            struct.pack_into("<I", file.data, directory * SECTOR, 0)
        case "table":
            struct.pack_into("<I", file.data, table * SECTOR + 8, 0xFFFFFFF0)
        case "directory":
            struct.pack_into("<Q", file.data, 56, 1 << 40)
        case _:
            pass
