"""Tables of blocks, over toy formats: byte orders, widths, slots that begin with something else, both ways to free."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import NamedTuple

import pytest

from tapfs.driver import BackingReference, CheckReport, CreateRequest, HostFile, OpenRequest, Operation
from tapfs.errors import ImageError
from tapfs.extent import Kind, Range
from tapfs.formats.blocks.check import BlockCheck
from tapfs.formats.blocks.layout import BlockLayout, Run
from tapfs.formats.blocks.table import BlockTable
from tapfs.formats.blocks.writer import BlockWriter
from tapfs.formats.changed_table import ByteOrder
from tapfs.plan import Discard, Grow, Plan, Write, plan
from tapfs.testing import crash, operations
from tapfs.testing.model import MemoryFile
from tapfs.testing.subject import Subject

BLOCK = 8192
TABLE_AT = 512
MAGIC = b"toy blocks"


class Toy(NamedTuple):
    """A format: a head with the size of the disk, then the table, then the slots."""

    entry_bytes: int
    order: ByteOrder
    gap: int = 0
    zero: int | None = None
    unlinks: bool = True
    overlay: bool = False

    name = "toy"
    create_options: Mapping[str, str] = {}

    def layout(self, size: int) -> BlockLayout:
        table_bytes = -(-size // BLOCK) * self.entry_bytes
        least = -(-(TABLE_AT + table_bytes) // 512) * 512
        return BlockLayout(
            virtual_size=size,
            block_bytes=BLOCK,
            table_offset=TABLE_AT,
            entry_bytes=self.entry_bytes,
            order=self.order,
            slot_bytes=BLOCK + self.gap,
            scale=512,
            free=(1 << 8 * self.entry_bytes) - 1,
            least_place=least,
            zero=self.zero,
            origin=least,
            payload_at=self.gap,
        )

    def probe(self, head: bytes, size: int) -> int:
        return 100 if head.startswith(MAGIC) and size else 0

    def open(self, file: HostFile, request: OpenRequest) -> ToyDriver:
        head = file.read(0, 18)
        layout = self.layout(int.from_bytes(head[10:18], "big"))
        backing = BackingReference("parent") if self.overlay else None
        return (ToyDriver if self.unlinks else DenseToyDriver)(file, request, layout, backing)

    def create(self, request: CreateRequest) -> Plan:
        layout = self.layout(request.virtual_size)
        head = MAGIC + request.virtual_size.to_bytes(8, "big")
        table = b"\xff" * (layout.table_end - layout.table_offset)
        return plan([Grow(0, layout.least_place)], [Write(0, 0, head), Write(0, TABLE_AT, table)])


class ToyDriver(BlockWriter):
    """An image of a toy format."""

    format_name = "toy"

    def details(self) -> Mapping[str, object]:
        return {}

    def check(self, progress: object = None) -> CheckReport:
        del progress
        return BlockCheck(self, (), {}, CheckReport(), entries=self.layout.blocks).report

    def repair(self) -> list[Plan]:
        return []


class DenseToyDriver(ToyDriver):
    """An image whose blocks keep their slots."""

    unlinks = False


TOYS = {
    "little 4": Toy(4, "little", unlinks=False),
    "big 4, gap": Toy(4, "big", gap=512),
    "big 8": Toy(8, "big"),
    "little 8, gap": Toy(8, "little", gap=1024, unlinks=False),
    "overlay with zeros": Toy(4, "little", zero=0xFFFFFFFE, unlinks=False, overlay=True),
    "overlay without zeros": Toy(4, "big", gap=512, overlay=True),
}


def subject(name: str) -> Subject:
    return Subject(TOYS[name], size=3_000_000, overlay=TOYS[name].overlay)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", TOYS)
def test_random_requests_read_as_they_were_written(name: str, seed: int) -> None:
    operations.run(subject(name), seed, 60)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", TOYS)
def test_a_crash_at_any_moment_loses_nothing_that_was_flushed(name: str, seed: int) -> None:
    crash.run(subject(name), seed, 30)


def image(name: str, size: int = 64 * BLOCK) -> tuple[ToyDriver, MemoryFile]:
    file = MemoryFile()
    file.apply(TOYS[name].create(CreateRequest(size)))
    return TOYS[name].open(file, OpenRequest(writable=True)), file


def test_a_run_is_as_long_as_it_can_be() -> None:
    layout = TOYS["big 4, gap"].layout(64 * BLOCK)
    free, step = layout.free, layout.step
    assert step == 17
    table = array("I", [free, free, 0, step, 2 * step, 5 * step, 7, free])
    assert list(layout.runs(table, 10)) == [
        Run(10, 2, Kind.UNALLOCATED, free),
        Run(12, 3, Kind.DATA, 0),
        Run(15, 1, Kind.DATA, 5 * step),
        Run(16, 1, Kind.DATA, 7),
        Run(17, 1, Kind.UNALLOCATED, free),
    ]
    assert list(layout.runs(layout.consecutive(3, 40), 0)) == [Run(0, 40, Kind.DATA, 3)]


def test_a_run_of_places_ends_where_the_values_that_mean_something_else_begin() -> None:
    layout = BlockLayout(64 * BLOCK, BLOCK, TABLE_AT, 4, "little", BLOCK, BLOCK, 0xFFFFFFFF, 4096, zero=0xFFFFFFFE)
    table = array("I", [0xFFFFFFFC, 0xFFFFFFFD, 0xFFFFFFFE, 0xFFFFFFFF])
    kinds = [(run.blocks, run.kind) for run in layout.runs(table, 0)]
    assert kinds == [(2, Kind.DATA), (1, Kind.ZERO), (1, Kind.UNALLOCATED)]


def test_ranges_of_one_reservation_lie_side_by_side() -> None:
    driver, _ = image("little 4")
    reservation = driver.reserve([Range(0, BLOCK), Range(4 * BLOCK, 2 * BLOCK)], Operation.WRITE)
    places = [(place.offset, place.length, place.host_offset) for place in reservation.placements]
    least = driver.layout.least_place
    assert places == [(0, BLOCK, least), (4 * BLOCK, 2 * BLOCK, least + BLOCK)]


def test_the_file_grows_before_an_entry_points_into_it_and_freed_slots_are_used_again_after_the_flush() -> None:
    driver, file = image("big 8")
    least = driver.layout.least_place

    def write(offset: int) -> int:
        reservation = driver.reserve([Range(offset, BLOCK)], Operation.WRITE)
        driver.commit(reservation)
        return reservation.placements[0].host_offset

    assert write(0) == least
    first = driver.flush()
    assert first.stages[0] == (Grow(0, least + BLOCK),)
    assert [type(step) for step in first.stages[1]] == [Write]
    file.apply(first)
    driver.flushed(first)
    assert not driver.flush()
    driver.commit(driver.reserve([Range(0, BLOCK)], Operation.DISCARD))
    assert write(BLOCK) == least + BLOCK
    second = driver.flush()
    assert second.stages[-1] == (Discard(0, least, BLOCK),)
    file.apply(second)
    driver.flushed(second)
    assert write(2 * BLOCK) == least


def test_a_block_past_the_end_of_the_file_is_named_and_the_others_are_read() -> None:
    driver, file = image("big 8")
    driver.commit(driver.reserve([Range(0, 2 * BLOCK)], Operation.WRITE))
    file.apply(driver.flush())
    del file.data[-1:]
    opened = TOYS["big 8"].open(file, OpenRequest(lenient=True))
    assert opened.map(0, BLOCK)[0].kind == Kind.DATA
    with pytest.raises(ImageError, match="the file was cut: it ends 1 bytes before the block") as caught:
        opened.map(BLOCK, BLOCK)
    assert caught.value.offset == TABLE_AT + 8
    assert opened.check().corruptions == 1


def test_two_blocks_in_one_slot_are_a_corruption() -> None:
    driver, file = image("big 8")
    driver.commit(driver.reserve([Range(0, 2 * BLOCK)], Operation.WRITE))
    file.apply(driver.flush())
    file.data[TABLE_AT + 8 : TABLE_AT + 16] = bytes(8)
    report = TOYS["big 8"].open(file, OpenRequest(lenient=True)).check()
    assert (report.corruptions, report.leaks) == (1, 0)
    assert report.findings[0].message == "block 1 overlaps block 0"
    with pytest.raises(ImageError, match="two blocks overlap"):
        TOYS["big 8"].open(file, OpenRequest(writable=True))


def test_the_end_of_a_long_empty_run_is_found_by_whole_pages() -> None:
    blocks = 1 << 19
    toy = TOYS["little 4"]
    layout = toy.layout(blocks * BLOCK)
    file = MemoryFile()
    file.apply(toy.create(CreateRequest(blocks * BLOCK)))
    table = BlockTable(file, layout)
    assert table.free_until(3, blocks) == blocks
    for used in (blocks - 1, 300_001, 2048, 1023, 5, 3):
        table.set(used, layout.same(0, 1))
        assert table.free_until(3, blocks) == used
        assert table.free_until(used + 1, used + 1) == used + 1
    assert BlockTable(file, layout).free_until(0, blocks) == blocks
