"""VHDX images after a crash at any moment: the log brings back all that a flush acknowledged, for readers and writers.

The crash model: everything before the last barrier is durable, of everything since any part may be, in
any order, torn at sectors of 512 bytes.
"""

from __future__ import annotations

import random

import pytest

from tapfs.driver import Driver, OpenRequest, Recoverable
from tapfs.errors import ImageError
from tapfs.formats.vhdx import FORMAT
from tapfs.plan import Plan
from tapfs.testing.crash import write_at_random
from tapfs.testing.model import SECTOR, MemoryFile, ModelDisk, read_extents
from tests.vhdx_images import KINDS, REGION_TABLES, make

SIZE = (4 << 20) + 3 * 4096
CRASHES = 16


def replayed(file: MemoryFile, *, writable: bool) -> Driver:
    """The driver of an image whose log is replayed in the file."""
    driver = FORMAT.open(file, OpenRequest(writable=writable))
    if isinstance(driver, Recoverable):
        plan = driver.recovery()
        assert plan
        file.apply(plan)
        driver = FORMAT.open(file, OpenRequest(writable=writable))
    return driver


def crash_anywhere(kind: str, seed: int) -> None:
    choice = random.Random(seed)
    data, backing = make(kind, SIZE, seed)
    file = MemoryFile(bytes(data))
    disk = ModelDisk(FORMAT.open(file, OpenRequest(writable=True)), file, backing)  # type: ignore[arg-type]
    history = write_at_random(disk, choice, 24)
    disk.end()
    history.note()
    for _ in range(CRASHES):
        epoch = choice.randrange(len(file.epochs))
        left = MemoryFile(file.crashed(epoch, choice))
        driver = replayed(left, writable=True)
        report = driver.check()  # type: ignore[attr-defined]
        assert report.corruptions == 0, (epoch, report.findings)
        read = read_extents(driver, left, 0, driver.geometry.virtual_size, backing)
        for at in range(0, len(read), SECTOR):
            piece = read[at : at + SECTOR]
            assert history.allowed(epoch, at, piece), f"sector {at:#x} is wrong after epoch {epoch}"
        if len(left.epochs) > 1:  # the replay is cut off, too
            again = MemoryFile(left.crashed(choice.randrange(len(left.epochs)), choice))
            driver = replayed(again, writable=False)
            assert read_extents(driver, again, 0, driver.geometry.virtual_size, backing) == read


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", KINDS)
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
@pytest.mark.parametrize("kind", ["dynamic", "differencing"])
def test_the_test_notices_a_wrong_order(kind: str, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = "tapfs.formats.vhdx.writer.WritableVhdxDriver"
    right = type(FORMAT.open(MemoryFile(bytes(make(kind, SIZE, 0)[0])), OpenRequest(writable=True))).flush  # type: ignore[attr-defined]
    monkeypatch.setattr(f"{writer}.flush", lambda driver: broken(right(driver), order))
    with pytest.raises((AssertionError, ImageError)):
        crash_many_times(kind)


def test_the_test_notices_a_wrong_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    writer = "tapfs.formats.vhdx.writer.WritableVhdxDriver"
    driver = FORMAT.open(MemoryFile(bytes(make("dynamic", SIZE, 0)[0])), OpenRequest(writable=True))
    right = type(driver).begin  # type: ignore[attr-defined]
    monkeypatch.setattr(f"{writer}.begin", lambda driver: broken(right(driver), "reversed"))
    with pytest.raises((AssertionError, ImageError)):
        crash_many_times("dynamic")


@pytest.mark.parametrize("kind", ["dynamic", "differencing"])
def test_a_crash_in_a_repair_loses_nothing(kind: str) -> None:
    data, backing = make(kind, SIZE, 5)
    data[REGION_TABLES[0] + 20] ^= 1
    data[(64 << 10) + 30] ^= 1
    data += b"leak" * (1 << 18)
    file = MemoryFile(bytes(data))
    damaged = FORMAT.open(file, OpenRequest(lenient=True))
    whole = read_extents(damaged, file, 0, damaged.geometry.virtual_size, backing)
    file.apply_all(list(damaged.repair()))  # type: ignore[attr-defined]
    choice = random.Random(1)
    assert len(file.epochs) > 3
    for epoch in range(len(file.epochs)):
        for _ in range(5):
            left = MemoryFile(file.crashed(epoch, choice))
            driver = FORMAT.open(left, OpenRequest())
            assert read_extents(driver, left, 0, driver.geometry.virtual_size, backing) == whole
            left.apply_all(list(driver.repair()))  # type: ignore[attr-defined]
            again = FORMAT.open(left, OpenRequest())
            report = again.check()  # type: ignore[attr-defined]
            assert (report.corruptions, report.leaks, len(report.findings)) == (0, 0, 0)
            assert not again.repair()  # type: ignore[attr-defined]
            assert read_extents(again, left, 0, again.geometry.virtual_size, backing) == whole
