"""Steps of a plan that have a range of a host file read as zeros: only what holds data now is written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tapfs.driver import HostFile
from tapfs.plan import Plan, Step, Write, plan

#: Zeros that one step writes, and that one plan writes.
_PIECE_BYTES = 4 << 20
_PLAN_BYTES = 16 << 20


def zero_steps(file: HostFile, start: int, stop: int) -> Iterator[Write]:
    """Writes of zeros to all that ``[start, stop)`` of file 0 has which is no hole."""
    for offset, length in file.data_ranges(start, stop - start):
        for at in range(offset, offset + length, _PIECE_BYTES):
            yield Write(0, at, bytes(min(_PIECE_BYTES, offset + length - at)))


def zeroing_plans(steps: Iterable[Write]) -> Iterator[Plan]:
    """Plans of bounded size that write these steps."""
    some: list[Step] = []
    size = 0
    for step in steps:
        some.append(step)
        size += len(step.data)
        if size >= _PLAN_BYTES:
            yield plan(some)
            some, size = [], 0
    if some:
        yield plan(some)
