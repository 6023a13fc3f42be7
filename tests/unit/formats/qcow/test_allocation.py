"""Freed space: punched by the flush that unlinks it, used again only after the plan of that flush is done."""

from __future__ import annotations

import pytest

from tapfs.driver import Operation
from tapfs.extent import Range
from tapfs.plan import Discard, Grow, Write
from tests.qcow_images import created, opened

MIB = 1 << 20
RUN = 64 * 4096


def test_freed_clusters_are_used_again_only_after_flushed() -> None:
    disk = opened(created(8 * MIB))
    disk.write(0, b"a" * RUN)
    disk.flush()
    freed = disk.driver.map(0, 1)[0].host_offset
    disk.zero(0, RUN, Operation.DISCARD)

    def place(offset: int) -> int:
        reservation = disk.driver.reserve([Range(offset, RUN)], Operation.WRITE)
        disk.driver.commit(reservation)
        return reservation.placements[0].host_offset

    assert place(2 * MIB) != freed
    plan = disk.driver.flush()
    assert Discard(0, freed, RUN) in plan.stages[-1]
    assert place(4 * MIB) != freed
    disk.file.apply(plan)
    disk.driver.flushed(plan)
    reservation = disk.driver.reserve([Range(6 * MIB, RUN)], Operation.WRITE)
    assert reservation.placements[0].host_offset == freed
    assert not reservation.placements[0].fresh


@pytest.mark.parametrize("options", [{}, {"blktap": "on"}])
def test_the_file_is_long_enough_before_anything_points_into_it(options: dict[str, str]) -> None:
    disk = opened(created(8 * MIB, options))
    for offset in (0, RUN):  # a new table, then (in QEMU's layout) new entries in an old one
        reservation = disk.driver.reserve([Range(offset, RUN)], Operation.WRITE)
        disk.driver.commit(reservation)
        plan = disk.driver.flush()
        size = disk.file.size()
        for stage in plan.stages:
            grown = [step.size for step in stage if isinstance(step, Grow)]
            for step in stage:
                if isinstance(step, Write):
                    assert not grown, "a write shares its stage with the growth it may rely on"
            size = max([size, *grown])
            if grown:
                break
        assert size >= max(place.host_offset + place.length for place in reservation.placements)
        disk.file.apply(plan)
        disk.driver.flushed(plan)


def test_a_live_fast_path_stays_alive() -> None:
    disk = opened(created(8 * MIB, {"blktap": "on"}))
    disk.write(5 * MIB, b"x")
    disk.flush()
    assert opened(disk.file).driver.details()["fast_path"]
