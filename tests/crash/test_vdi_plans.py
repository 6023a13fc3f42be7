"""VDI images after a crash at any moment: clean or leaking, and all that a flush acknowledged is there."""

from __future__ import annotations

import random

import pytest

from tapfs.driver import OpenRequest
from tapfs.errors import ImageError
from tapfs.formats.vdi import FORMAT
from tapfs.plan import Plan
from tapfs.testing.crash import write_at_random
from tapfs.testing.model import SECTOR, MemoryFile, ModelDisk, read_extents
from tests.vdi_images import KINDS, SMALL, by_bytes, make

SIZE = 10 * SMALL + 1536
CRASHES = 30


def crash_anywhere(kind: str, seed: int) -> None:
    choice = random.Random(seed)
    file, parent = make(kind, SIZE, seed)
    disk = ModelDisk(FORMAT.open(file, OpenRequest(writable=True)), file, parent)  # type: ignore[arg-type]
    history = write_at_random(disk, choice, 24)
    for _ in range(CRASHES):
        epoch = choice.randrange(len(file.epochs))
        left = MemoryFile(file.crashed(epoch, choice))
        driver = FORMAT.open(left, OpenRequest(writable=True))
        report = driver.check()
        assert report.corruptions == 0, (epoch, report.findings)
        readers = {
            "tapfs": read_extents(driver, left, 0, SIZE, parent),
            "who counts on the header": by_bytes(bytes(left.data), parent),
        }
        for reader, read in readers.items():
            for at in range(0, len(read), SECTOR):
                piece = read[at : at + SECTOR]
                assert history.allowed(epoch, at, piece), f"{reader} reads sector {at:#x} wrongly after epoch {epoch}"


#: The blocks of an image with the old header begin inside a sector of the host, so any sector of the guest may tear.
WHOLE_SECTORS = sorted(KINDS.keys() - {"old"})


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", WHOLE_SECTORS)
def test_every_crash_leaves_what_was_acknowledged(kind: str, seed: int) -> None:
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
@pytest.mark.parametrize("kind", ["dynamic", "differencing-extra"])
def test_the_test_notices_a_wrong_order(kind: str, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = type(FORMAT.open(make(kind, SIZE, 0)[0], OpenRequest(writable=True))).flush
    monkeypatch.setattr("tapfs.formats.vdi.writer.WritableVdiDriver.flush", lambda driver: broken(right(driver), order))

    def crash_many_times() -> None:
        for seed in range(20):
            crash_anywhere(kind, seed)

    with pytest.raises((AssertionError, ImageError)):
        crash_many_times()


@pytest.mark.parametrize("damage", ["count behind", "count ahead", "leak"])
def test_a_crash_in_a_repair_loses_nothing(damage: str) -> None:
    file, _ = make("extra", SIZE, 5)
    whole = read_extents(FORMAT.open(file, OpenRequest()), file, 0, SIZE)
    if damage == "leak":
        file.data += b"leak" * 10_000
    else:
        file.data[388:392] = (1 if damage == "count behind" else 99).to_bytes(4, "little")
    file = MemoryFile(bytes(file.data))
    file.apply_all(list(FORMAT.open(file, OpenRequest(lenient=True)).repair()))
    choice = random.Random(1)
    assert len(file.epochs) > 2
    for epoch in range(len(file.epochs)):
        for _ in range(10):
            left = MemoryFile(file.crashed(epoch, choice))
            assert read_extents(FORMAT.open(left, OpenRequest()), left, 0, SIZE) == whole
            left.apply_all(list(FORMAT.open(left, OpenRequest(lenient=True)).repair()))
            again = FORMAT.open(left, OpenRequest())
            report = again.check()
            assert (report.corruptions, report.leaks) == (0, 0), report.findings
            assert not again.repair()
            assert read_extents(again, left, 0, SIZE) == whole
