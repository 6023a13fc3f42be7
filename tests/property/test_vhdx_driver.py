"""The VHDX driver against a bytearray: every kind of image, every operation, in any order."""

from __future__ import annotations

import random

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tapfs.driver import OpenRequest, Operation, Recoverable, Reservation
from tapfs.extent import clip
from tapfs.formats.vhdx import FORMAT
from tapfs.testing.laws import check_map, check_split
from tapfs.testing.model import MemoryFile, ModelDisk, is_zero
from tests.vhdx_images import KINDS, make

SIZE = (5 << 20) + 3 * 4096


class VhdxModel(RuleBasedStateMachine):
    """One image of some kind and a bytearray that must always read the same."""

    @initialize(kind=st.sampled_from(KINDS), seed=st.integers(0, 1000))
    def start(self, kind: str, seed: int) -> None:
        data, self.backing = make(kind, SIZE, seed)
        self.file = MemoryFile(bytes(data))
        self.disk = self.opened()
        self.expected = bytearray(self.disk.whole())
        self.reserved: list[tuple[int, bytes, Reservation]] = []

    def opened(self) -> ModelDisk:
        driver = FORMAT.open(self.file, OpenRequest(writable=True))
        if isinstance(driver, Recoverable):
            plan = driver.recovery()
            assert plan
            self.file.apply(plan)
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
        self.expected[offset : offset + length] = data

    @rule(
        start=st.floats(0, 0.99),
        length=st.integers(1, 2_500_000),
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
        now = self.disk.read(seen.start, seen.stop - seen.start)
        for at in range(seen.start, seen.stop, 512):
            piece = now[at - seen.start : at - seen.start + 512]
            assert piece == self.expected[at : at + 512] or is_zero(piece)
        self.expected[seen] = now

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

    @rule()
    def flush(self) -> None:
        self.disk.flush()

    @rule(stages=st.integers(0, 5))
    def fail_a_flush(self, stages: int) -> None:
        # The plan may have got anywhere; the next one must bring it all again.
        for stage in self.disk.driver.flush().stages[:stages]:
            for step in stage:
                self.file.do(step)

    @precondition(lambda self: not self.reserved)
    @rule(ended=st.booleans())
    def reopen(self, ended: bool) -> None:  # noqa: FBT001
        self.disk.flush()
        self.disk.flush()
        if ended:
            self.disk.end()
        self.disk = self.opened()
        report = self.disk.driver.check()  # type: ignore[attr-defined]
        assert (report.corruptions, report.leaks) == (0, 0), report.findings
        assert self.disk.whole() == self.expected

    @invariant()
    def reads_the_same(self) -> None:
        if not self.reserved:
            assert self.disk.whole() == self.expected

    @rule(at=st.integers(0, SIZE - 1), length=st.integers(1, SIZE))
    def map_laws(self, at: int, length: int) -> None:
        check_map(self.disk.driver, at, min(length, SIZE - at))
        check_split(self.disk.driver, at, min(length, SIZE - at))


TestVhdxModel = VhdxModel.TestCase
TestVhdxModel.settings = settings(
    max_examples=25,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
