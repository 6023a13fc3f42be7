"""The qcow driver against a bytearray: every kind of image, every operation, in any order."""

from __future__ import annotations

import random
from itertools import pairwise

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tapfs.driver import OpenRequest, Operation, Reservation
from tapfs.extent import clip, joinable
from tapfs.formats.qcow import FORMAT
from tapfs.testing.model import ModelDisk, is_zero, read_extents
from tests.qcow_images import KINDS, by_blktap, make

SIZE = 5 * 512 * 1024 + 1536


class QcowModel(RuleBasedStateMachine):
    """One image of some kind and a bytearray that must always read the same."""

    @initialize(kind=st.sampled_from(sorted(KINDS)), seed=st.integers(0, 1000))
    def start(self, kind: str, seed: int) -> None:
        self.kind = kind
        self.file, self.backing = make(kind, SIZE, seed)
        self.disk = self.opened()
        self.expected = bytearray(self.disk.whole())
        self.written = False
        self.reserved: list[tuple[int, bytes, Reservation]] = []

    def opened(self) -> ModelDisk:
        driver = FORMAT.open(self.file, OpenRequest(writable=True))
        return ModelDisk(driver, self.file, self.backing)  # type: ignore[arg-type]

    def busy(self, offset: int, length: int) -> bool:
        return any(
            offset < each.end and each.offset < offset + length for _, _, held in self.reserved for each in held.ranges
        )

    @rule(offset=st.integers(0, SIZE - 1), length=st.integers(1, 300_000), seed=st.integers(0, 255))
    def write(self, offset: int, length: int, seed: int) -> None:
        granule = self.disk.driver.geometry.granule
        length = min(length, SIZE - offset)
        if self.busy(offset - granule, length + 2 * granule):
            return
        data = random.Random(seed).randbytes(length)
        self.disk.write(offset, data)
        self.written = True
        self.expected[offset : offset + length] = data

    @rule(
        start=st.floats(0, 0.99),
        length=st.integers(1, 700_000),
        operation=st.sampled_from([Operation.ZERO, Operation.DISCARD]),
    )
    def zero_or_discard(self, start: float, length: int, operation: Operation) -> None:
        granule = self.disk.driver.geometry.granule
        first = int(SIZE * start) // granule * granule
        end = -(-min(SIZE, first + length) // granule) * granule
        if self.busy(first, end - first):
            return
        self.disk.zero(first, end - first, operation)
        seen = slice(first, min(end, SIZE))
        if operation is Operation.ZERO:
            self.expected[seen] = bytes(seen.stop - seen.start)
            return
        for at in range(first, seen.stop, granule):
            stop = min(at + granule, SIZE)
            now = self.disk.read(at, stop - at)
            assert now == self.expected[at:stop] or is_zero(now)
            self.expected[at:stop] = now

    @rule(offset=st.integers(0, SIZE - 1), length=st.integers(1, 100_000), seed=st.integers(0, 255))
    def reserve(self, offset: int, length: int, seed: int) -> None:
        granule = self.disk.driver.geometry.granule
        start = offset // granule * granule
        end = -(-min(offset + length, SIZE) // granule) * granule
        extents = list(clip(self.disk.driver.map(start, min(end, SIZE) - start), start, end - start))
        if self.busy(start, end - start) or any(extent.in_place for extent in extents):
            return
        data = random.Random(seed).randbytes(min(end, SIZE) - start)
        self.reserved.append((start, data, self.disk.start_write(start, data)))

    @precondition(lambda self: self.reserved)
    @rule(choice=st.integers(0, 100), succeeds=st.booleans())
    def end_reservation(self, choice: int, succeeds: bool) -> None:  # noqa: FBT001
        start, data, reservation = self.reserved.pop(choice % len(self.reserved))
        if succeeds:
            self.disk.driver.commit(reservation)
            self.expected[start : start + len(data)] = data
        else:
            self.disk.driver.abort(reservation)
            # What was written to a place that became visible meanwhile may be seen: the write failed.
            now = self.disk.read(start, len(data))
            assert now in {bytes(self.expected[start : start + len(data)]), data}
            self.expected[start : start + len(data)] = now

    @rule()
    def flush(self) -> None:
        self.disk.flush()

    @rule()
    def fail_a_flush(self) -> None:
        # The plan may have got anywhere; the next one must bring it all again.
        plan = self.disk.driver.flush()
        for stage in plan.stages[: len(plan.stages) // 2]:
            for step in stage:
                self.file.do(step)

    @precondition(lambda self: not self.reserved)
    @rule()
    def reopen(self) -> None:
        self.disk.flush()
        self.disk.flush()
        self.disk = self.opened()
        report = self.disk.driver.check()  # type: ignore[attr-defined]
        assert (report.corruptions, report.leaks) == (0, 0), report.findings
        assert self.disk.whole() == self.expected
        if self.kind.startswith("blktap") and (self.written or self.kind != "blktap-stray"):
            assert by_blktap(bytes(self.file.data)) == self.expected
        # Writing keeps a live fast path alive: the cksum follows L1.
        live = self.kind in {"blktap", "blktap-little", "blktap-reserve"}
        assert self.disk.driver.details()["fast_path"] == (live or self.live_until_written())
        order = self.disk.driver.details()["l1_byte_order"]
        assert order == ("little" if self.kind.endswith("little") else "big")

    def live_until_written(self) -> bool:
        # Under a cipher blktap's way of allocating cannot be followed: the first change ends it.
        return self.kind == "blktap-live-encrypted" and int.from_bytes(self.file.data[56:60], "big") != 1

    @invariant()
    def reads_the_same(self) -> None:
        if not self.reserved:
            assert self.disk.whole() == self.expected

    @rule(at=st.integers(0, SIZE - 1), length=st.integers(1, SIZE))
    def map_laws(self, at: int, length: int) -> None:
        driver = self.disk.driver
        length = min(length, SIZE - at)
        extents = driver.map(at, length)
        assert extents[0].offset <= at
        assert extents[-1].end >= at + length
        for left, right in pairwise(extents):
            assert left.end == right.offset
            assert not joinable(left, right)
        middle = at + length // 2
        halves = [*clip(driver.map(at, max(1, middle - at)), at, middle - at)]
        halves += clip(driver.map(middle, at + length - middle), middle, at + length - middle)
        rebuilt = [byte for extent in halves for byte in (extent.offset, extent.end)]
        assert rebuilt[0] == at
        assert rebuilt[-1] == at + length
        whole = read_extents(driver, self.file, at, length, self.backing)
        split = read_extents(driver, self.file, at, middle - at, self.backing) if middle > at else b""
        assert whole == split + read_extents(driver, self.file, middle, at + length - middle, self.backing)


TestQcowModel = QcowModel.TestCase
TestQcowModel.settings = settings(
    max_examples=30,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
