"""The VDI driver against a bytearray: every kind of image, every operation, in any order."""

from __future__ import annotations

import random

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tapfs.driver import OpenRequest, Operation, Reservation
from tapfs.extent import clip
from tapfs.formats.vdi import FORMAT
from tapfs.testing.laws import check_map, check_split
from tapfs.testing.model import ModelDisk, is_zero
from tests.vdi_images import KINDS, SMALL, by_bytes, make

SIZE = 9 * SMALL + 1536


class VdiModel(RuleBasedStateMachine):
    """One image of some kind and a bytearray that must always read the same."""

    @initialize(kind=st.sampled_from(sorted(KINDS)), seed=st.integers(0, 1000))
    def start(self, kind: str, seed: int) -> None:
        self.kind = kind
        self.file, self.parent = make(kind, SIZE, seed)
        self.disk = self.opened()
        self.expected = bytearray(self.disk.whole())
        self.reserved: list[tuple[int, bytes, Reservation]] = []

    def opened(self) -> ModelDisk:
        driver = FORMAT.open(self.file, OpenRequest(writable=True))
        return ModelDisk(driver, self.file, self.parent)  # type: ignore[arg-type]

    def busy(self, offset: int, end: int) -> bool:
        return any(offset < each.end and each.offset < end for _, _, held in self.reserved for each in held.ranges)

    @rule(offset=st.integers(0, SIZE - 1), length=st.integers(1, 300_000), seed=st.integers(0, 255))
    def write(self, offset: int, length: int, seed: int) -> None:
        length = min(length, SIZE - offset)
        if self.busy(offset - SMALL, offset + length + SMALL):
            return
        data = random.Random(seed).randbytes(length)
        self.disk.write(offset, data)
        self.expected[offset : offset + length] = data

    @rule(
        first=st.integers(0, SIZE // SMALL),
        blocks=st.integers(1, 6),
        operation=st.sampled_from([Operation.ZERO, Operation.DISCARD]),
    )
    def zero_or_discard(self, first: int, blocks: int, operation: Operation) -> None:
        start, end = first * SMALL, min(first + blocks, -(-SIZE // SMALL)) * SMALL
        if self.busy(start, end):
            return
        self.disk.zero(start, end - start, operation)
        end = min(end, SIZE)
        if operation is Operation.ZERO:
            self.expected[start:end] = bytes(end - start)
            return
        for at in range(start, end, SMALL):
            stop = min(at + SMALL, end)
            now = self.disk.read(at, stop - at)
            assert now == self.expected[at:stop] or is_zero(now)
            self.expected[at:stop] = now

    @rule(first=st.integers(0, SIZE // SMALL), blocks=st.integers(1, 3), seed=st.integers(0, 255))
    def reserve(self, first: int, blocks: int, seed: int) -> None:
        start, end = first * SMALL, min((first + blocks) * SMALL, SIZE)
        extents = clip(self.disk.driver.map(start, end - start), start, end - start)
        if self.busy(start, end) or any(extent.in_place for extent in extents):
            return
        data = random.Random(seed).randbytes(end - start)
        self.reserved.append((start, data, self.disk.start_write(start, data)))

    @precondition(lambda self: self.reserved)
    @rule(choice=st.integers(0, 100), succeeds=st.booleans())
    def end_reservation(self, choice: int, *, succeeds: bool) -> None:
        start, data, reservation = self.reserved.pop(choice % len(self.reserved))
        if succeeds:
            self.disk.driver.commit(reservation)
            self.expected[start : start + len(data)] = data
        else:
            self.disk.driver.abort(reservation)

    @rule()
    def flush(self) -> None:
        self.disk.flush()

    @rule(stages=st.integers(0, 4))
    def fail_a_flush(self, stages: int) -> None:
        # The plan may have got anywhere; the next one must bring it all again.
        for stage in self.disk.driver.flush().stages[:stages]:
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
        assert by_bytes(bytes(self.file.data), self.parent) == self.expected

    @invariant()
    def reads_the_same(self) -> None:
        if not self.reserved:
            assert self.disk.whole() == self.expected

    @rule(at=st.integers(0, SIZE - 1), length=st.integers(1, SIZE))
    def map_laws(self, at: int, length: int) -> None:
        check_map(self.disk.driver, at, min(length, SIZE - at))
        check_split(self.disk.driver, at, min(length, SIZE - at))


TestVdiModel = VdiModel.TestCase
TestVdiModel.settings = settings(
    max_examples=30,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
