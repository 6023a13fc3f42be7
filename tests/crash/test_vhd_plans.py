"""VHD images after a crash at any moment: clean or leaking, and all that a flush acknowledged is there."""

from __future__ import annotations

import random

import pytest

from tapfs.driver import OpenRequest
from tapfs.errors import ImageError
from tapfs.formats.vhd import FORMAT
from tapfs.plan import Plan
from tapfs.testing.crash import write_at_random
from tapfs.testing.model import SECTOR, MemoryFile, ModelDisk, read_extents
from tests.vhd_images import KINDS, by_bytes, make

SIZE = 3 * (1 << 17) + (1 << 20)
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
        report = driver.check()  # type: ignore[attr-defined]
        assert report.corruptions == 0, (epoch, report.findings)
        readers = {
            "tapfs": read_extents(driver, left, 0, SIZE, parent),
            "who knows only the copy of the footer": by_bytes(bytes(left.data), parent),
        }
        for reader, read in readers.items():
            for at in range(0, len(read), SECTOR):
                piece = read[at : at + SECTOR]
                assert history.allowed(epoch, at, piece), f"{reader} reads sector {at:#x} wrongly after epoch {epoch}"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", sorted(KINDS))
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
@pytest.mark.parametrize("kind", ["dynamic-small-blocks", "differencing"])
def test_the_test_notices_a_wrong_order(kind: str, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = type(FORMAT.open(make(kind, SIZE, 0)[0], OpenRequest(writable=True))).flush  # type: ignore[attr-defined]
    monkeypatch.setattr(
        "tapfs.formats.vhd.writer.WritableDynamicDriver.flush", lambda driver: broken(right(driver), order)
    )

    def crash_many_times() -> None:
        for seed in range(20):
            crash_anywhere(kind, seed)

    with pytest.raises((AssertionError, ImageError)):
        crash_many_times()


@pytest.mark.parametrize("damage", ["last footer", "copy", "header checksum", "batmap", "leak"])
def test_a_crash_in_a_repair_loses_nothing(damage: str) -> None:
    file, _ = make("batmap", SIZE, 5)
    whole = read_extents(FORMAT.open(file, OpenRequest()), file, 0, SIZE)
    if damage == "last footer":
        file.data[-512:] = bytes(512)
    elif damage == "copy":
        file.data[:8] = bytes(8)
    elif damage == "header checksum":
        file.data[512 + 36] ^= 1
    elif damage == "batmap":
        at = file.data.index(b"tdbatmap")
        file.data[at + 24] ^= 1
    else:
        footer = file.data[-512:]
        file.data[-512:] = b"leak" * 10_000 + footer
    file = MemoryFile(bytes(file.data))
    file.apply_all(list(FORMAT.open(file, OpenRequest(lenient=True)).repair()))  # type: ignore[attr-defined]
    choice = random.Random(1)
    assert len(file.epochs) > 2
    for epoch in range(len(file.epochs)):
        for _ in range(10):
            left = MemoryFile(file.crashed(epoch, choice))
            assert read_extents(FORMAT.open(left, OpenRequest()), left, 0, SIZE) == whole
            left.apply_all(list(FORMAT.open(left, OpenRequest(lenient=True)).repair()))  # type: ignore[attr-defined]
            again = FORMAT.open(left, OpenRequest(writable=True))
            report = again.check()  # type: ignore[attr-defined]
            assert (report.corruptions, report.leaks) == (0, 0), report.findings
            assert not again.repair()  # type: ignore[attr-defined]
            assert read_extents(again, left, 0, SIZE) == whole
