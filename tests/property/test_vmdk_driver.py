"""The VMDK driver against a bytearray: disks of every layout, any operation in any order, and flushes that fail."""

from __future__ import annotations

import random

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tapfs.driver import OpenRequest, Operation
from tapfs.formats.vmdk import FORMAT
from tapfs.testing.laws import check_map
from tapfs.testing.model import MemoryFile, ModelDisk, is_zero
from tests.vmdk_disks import KINDS, make

SIZE = 3 * 512 * 1024 + 1536


class VmdkModel(RuleBasedStateMachine):
    """One disk of some kind and a bytearray that must always read the same."""

    @initialize(kind=st.sampled_from(sorted(KINDS)), seed=st.integers(0, 1000))
    def start(self, kind: str, seed: int) -> None:
        self.file, self.backing = make(kind, SIZE, seed)
        self.disk = self.opened(self.file)
        self.expected = bytearray(self.disk.whole())

    def opened(self, file: MemoryFile) -> ModelDisk:
        driver = FORMAT.open(file, OpenRequest(writable=True, further=file))
        return ModelDisk(driver, file, self.backing)  # type: ignore[arg-type]

    @rule(offset=st.integers(0, SIZE - 1), length=st.integers(1, 300_000), seed=st.integers(0, 255))
    def write(self, offset: int, length: int, seed: int) -> None:
        data = random.Random(seed).randbytes(min(length, SIZE - offset))
        self.disk.write(offset, data)
        self.expected[offset : offset + len(data)] = data

    @rule(
        start=st.floats(0, 0.99),
        length=st.integers(1, 700_000),
        operation=st.sampled_from([Operation.ZERO, Operation.DISCARD]),
    )
    def zero_or_discard(self, start: float, length: int, operation: Operation) -> None:
        granule = self.disk.driver.geometry.granule
        first = int(SIZE * start) // granule * granule
        end = -(-min(SIZE, first + length) // granule) * granule
        self.disk.zero(first, end - first, operation)
        for at in range(first, min(end, SIZE), granule):
            stop = min(at + granule, SIZE)
            now = self.disk.read(at, stop - at)
            kept = operation is Operation.DISCARD and now == self.expected[at:stop]
            assert kept or is_zero(now)
            self.expected[at:stop] = now

    @rule()
    def flush(self) -> None:
        self.disk.flush()

    @rule(share=st.floats(0, 1))
    def fail_a_flush(self, share: float) -> None:
        plan = self.disk.driver.flush()
        for stage in plan.stages[: int(len(plan.stages) * share)]:
            for step in stage:
                self.file.do(step)

    @rule(closed=st.booleans())
    def reopen(self, closed: bool) -> None:  # noqa: FBT001
        if closed:
            self.disk.end()
        else:
            self.disk.flush()
        self.disk = self.opened(self.file)
        report = self.disk.driver.check()  # type: ignore[attr-defined]
        assert (report.corruptions, report.leaks) == (0, 0), report.findings

    @precondition(lambda self: not self.disk._begun)
    @rule()
    def repair_a_good_image(self) -> None:
        lenient = FORMAT.open(self.file, OpenRequest(lenient=True, further=self.file))
        self.file.apply_all(list(lenient.repair()))
        self.disk = self.opened(self.file)

    @invariant()
    def reads_the_same(self) -> None:
        assert self.disk.whole() == self.expected

    @rule(at=st.integers(0, SIZE - 1), length=st.integers(1, SIZE))
    def map_laws(self, at: int, length: int) -> None:
        check_map(self.disk.driver, at, min(length, SIZE - at))


TestVmdkModel = VmdkModel.TestCase
TestVmdkModel.settings = settings(
    max_examples=25,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
