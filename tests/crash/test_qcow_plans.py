"""qcow images after a crash at any moment: clean or leaking, and all that a flush acknowledged is there.

The crash model: everything before the last barrier is durable, of everything since any part may be, in
any order, torn at sectors of 512 bytes.
"""

from __future__ import annotations

import random

import pytest

from tapfs.driver import OpenRequest
from tapfs.errors import ImageError
from tapfs.formats.qcow import FORMAT
from tapfs.plan import Plan
from tapfs.testing.crash import write_at_random
from tapfs.testing.model import SECTOR, MemoryFile, ModelDisk, read_extents
from tests.qcow_images import KINDS, by_blktap, make

SIZE = 3 * 512 * 1024 + (2 << 20)
CRASHES = 30


def crash_anywhere(kind: str, seed: int) -> None:
    choice = random.Random(seed)
    file, backing = make(kind, SIZE, seed)
    disk = ModelDisk(FORMAT.open(file, OpenRequest(writable=True)), file, backing)  # type: ignore[arg-type]
    history = write_at_random(disk, choice, 24)
    for _ in range(CRASHES):
        epoch = choice.randrange(len(file.epochs))
        left = MemoryFile(file.crashed(epoch, choice))
        driver = FORMAT.open(left, OpenRequest(writable=True))
        report = driver.check()
        assert report.corruptions == 0, (epoch, report.findings)
        readers = {"tapfs": read_extents(driver, left, 0, driver.geometry.virtual_size, backing)}
        # What tapfs found under a stray header copy blktap could not read, until tapfs wrote the image.
        if kind.startswith("blktap") and not has_stray(left):
            readers["blktap"] = by_blktap(bytes(left.data))
        for reader, read in readers.items():
            for at in range(0, len(read), SECTOR):
                piece = read[at : at + SECTOR]
                assert history.allowed(epoch, at, piece), f"{reader} reads sector {at:#x} wrongly after epoch {epoch}"


def has_stray(file: MemoryFile) -> bool:
    return any("stray" in finding.message for finding in FORMAT.open(file, OpenRequest()).check().findings)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_crash_leaves_what_was_acknowledged(kind: str, seed: int) -> None:
    crash_anywhere(kind, seed)


def crash_many_times(kind: str) -> None:
    for seed in range(20):
        crash_anywhere(kind, seed)


def broken(plan: Plan, order: str) -> Plan:
    """The same steps in an order that no driver should choose."""
    stages = list(plan.stages)
    if order == "reversed":
        stages.reverse()
    else:
        stages = [tuple(step for stage in stages for step in stage)]
    return Plan(tuple(stages))


@pytest.mark.parametrize("order", ["reversed", "one stage"])
@pytest.mark.parametrize("kind", ["qemu", "blktap", "overlay"])
def test_the_test_notices_a_wrong_order(kind: str, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = type(FORMAT.open(make(kind, SIZE, 0)[0], OpenRequest(writable=True))).flush  # type: ignore[attr-defined]
    monkeypatch.setattr(
        "tapfs.formats.qcow.writer.WritableQcowDriver.flush", lambda driver: broken(right(driver), order)
    )
    with pytest.raises((AssertionError, ImageError)):
        crash_many_times(kind)


@pytest.mark.parametrize("kind", ["blktap-little", "blktap-stray", "overlay-12byte-little", "overlay-12byte", "qemu"])
def test_a_crash_in_a_repair_loses_nothing(kind: str) -> None:
    file, backing = make(kind, SIZE, 5)
    damaged = FORMAT.open(file, OpenRequest(lenient=True))
    whole = read_extents(damaged, file, 0, damaged.geometry.virtual_size, backing)
    # Something that nothing refers to, for the repair to give back.
    file.data.extend(b"leak" * 2048)
    file = MemoryFile(bytes(file.data))
    file.apply_all(list(FORMAT.open(file, OpenRequest(lenient=True)).repair()))
    choice = random.Random(1)
    assert len(file.epochs) > 2
    for epoch in range(len(file.epochs)):
        for _ in range(10):
            left = MemoryFile(file.crashed(epoch, choice))
            driver = FORMAT.open(left, OpenRequest())
            assert read_extents(driver, left, 0, driver.geometry.virtual_size, backing) == whole
            assert driver.check().corruptions == 0
            left.apply_all(list(FORMAT.open(left, OpenRequest(lenient=True)).repair()))
            again = FORMAT.open(left, OpenRequest())
            report = again.check()
            assert (report.corruptions, report.leaks) == (0, 0)
            assert not again.repair()
            assert read_extents(again, left, 0, again.geometry.virtual_size, backing) == whole
