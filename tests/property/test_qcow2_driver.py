"""The qcow2 driver against a bytearray: every kind of image, any requests, two readers and two checkers."""

from __future__ import annotations

import random
from typing import cast

import pytest

from tapfs.driver import Checkable, Operation, Reservation, Snapshotted
from tapfs.testing.laws import check_map, check_split
from tapfs.testing.model import ModelDisk, is_zero
from tests.qcow2_images import KINDS, audit, by_hand, make, opened

SIZE = 1_500_000 // 512 * 512 + 512
STEPS = 40


class Run:
    """One image and what its disk must read as."""

    def __init__(self, kind: str, seed: int) -> None:
        self.choice = random.Random(f"{kind}{seed}")
        self.file, self.backing = make(kind, SIZE, seed)
        self.disk: ModelDisk = opened(self.file, self.backing)
        self.expected = bytearray(self.disk.whole())
        self.held: list[tuple[int, bytes, Reservation]] = []
        snapshots = cast("Snapshotted", self.disk.driver).snapshots()
        self.snapshot = by_hand(bytes(self.file.data), self.backing, snapshot=0) if snapshots else None

    def step(self) -> None:
        kinds = [self.write] * 6 + [self.zero] * 3 + [self.discard] * 3
        kinds += [self.reserve] * 3 + [self.settle] * 3 + [self.flush] * 2 + [self.fail_a_flush, self.reopen]
        self.choice.choice(kinds)()
        if not self.held:
            assert self.disk.whole() == self.expected
        offset, end = self.range(SIZE)
        check_map(self.disk.driver, offset, end - offset)
        if not self.held:
            check_split(self.disk.driver, offset, end - offset)

    def range(self, most: int) -> tuple[int, int]:
        offset = self.choice.randrange(SIZE)
        return offset, offset + min(self.choice.randrange(1, most + 1), SIZE - offset)

    def granules(self, most: int, *, whole: bool = True) -> tuple[int, int]:
        geometry = self.disk.driver.geometry
        granule = geometry.packed_unit if whole else geometry.granule
        offset, end = self.range(most)
        return offset // granule * granule, -(-end // granule) * granule

    def busy(self, offset: int, end: int) -> bool:
        return any(offset < each.end and each.offset < end for _, _, held in self.held for each in held.ranges)

    def write(self) -> None:
        offset, end = self.range(self.choice.choice([600, 20_000, 300_000]))
        granule = self.disk.driver.geometry.granule
        if not self.busy(offset - granule, end + granule):
            data = self.choice.randbytes(end - offset)
            self.disk.write(offset, data)
            self.expected[offset:end] = data

    def zero(self) -> None:
        offset, end = self.granules(500_000)
        if not self.busy(offset, end):
            self.disk.zero(offset, end - offset, Operation.ZERO)
            self.expected[offset : min(end, SIZE)] = bytes(min(end, SIZE) - offset)

    def discard(self) -> None:
        offset, end = self.granules(500_000)
        if self.busy(offset, end):
            return
        self.disk.zero(offset, end - offset, Operation.DISCARD)
        for at in range(offset, min(end, SIZE), 512):
            now = self.disk.read(at, 512)
            assert now == self.expected[at : at + 512] or is_zero(now)
            self.expected[at : at + 512] = now

    def reserve(self) -> None:
        offset, end = self.granules(60_000, whole=False)
        inside = min(end, SIZE)
        taken = any(extent.in_place for extent in self.disk.driver.map(offset, inside - offset))
        if not taken and not self.busy(offset, end):
            data = self.choice.randbytes(inside - offset)
            self.held.append((offset, data, self.disk.start_write(offset, data)))

    def settle(self) -> None:
        if not self.held:
            return
        offset, data, reservation = self.held.pop(self.choice.randrange(len(self.held)))
        if self.choice.random() < 0.6:
            self.disk.driver.commit(reservation)
            self.expected[offset : offset + len(data)] = data
        else:
            self.disk.driver.abort(reservation)
            assert self.disk.read(offset, len(data)) == self.expected[offset : offset + len(data)]

    def flush(self) -> None:
        self.disk.flush()

    def fail_a_flush(self) -> None:
        """Execute a part of the plan only: the next flush must bring all of it again."""
        plan = self.disk.driver.flush()
        for stage in plan.stages[: self.choice.randrange(len(plan.stages) + 1)]:
            for step in stage:
                self.file.do(step)

    def reopen(self) -> None:
        if self.held:
            return
        self.disk.flush()
        self.disk.flush()
        data = bytes(self.file.data)
        assert by_hand(data, self.backing) == self.expected
        if self.snapshot is not None:
            assert by_hand(data, self.backing, snapshot=0) == self.snapshot
        found = audit(data)
        assert (found.corruptions, found.leaks) == ([], [])
        self.disk = opened(self.file, self.backing)
        report = cast("Checkable", self.disk.driver).check()
        assert (report.corruptions, report.leaks) == (0, 0), report.findings


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", KINDS)
def test_any_requests_in_any_order(kind: str, seed: int) -> None:
    run = Run(kind, seed)
    for _ in range(STEPS):
        run.step()
    while run.held:
        run.settle()
    run.reopen()
