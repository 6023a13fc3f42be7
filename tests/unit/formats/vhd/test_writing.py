"""Writing a VHD that grows: where new blocks go, what is set when, and the order in which it becomes durable."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import tapfs
from tapfs.driver import OpenRequest, Operation
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Kind, Range
from tapfs.formats.vhd import FORMAT
from tapfs.plan import Discard, Plan, Write
from tapfs.testing.model import MemoryFile, ModelDisk
from tests.vhd_images import Block, Vhd, by_bytes, differencing, ignoring_bitmaps

CHOICE = random.Random(1)
BLOCK = 16384
EMPTY = Vhd(size=8 * BLOCK)


def disk_of(image: Vhd | bytes, parent: bytes = b"") -> ModelDisk:
    file = MemoryFile(image if isinstance(image, bytes) else image.content())
    driver: Any = FORMAT.open(file, OpenRequest(writable=True))
    return ModelDisk(driver, file, parent)


def places(disk: ModelDisk) -> list[int]:
    """The host offsets of the bitmaps, by block; -1 for one that is not there."""
    table = [int.from_bytes(disk.file.data[at : at + 4], "big") for at in range(1536, 1536 + 4 * 8, 4)]
    return [-1 if entry == 0xFFFFFFFF else entry * 512 for entry in table]


def footers(disk: ModelDisk) -> int:
    return bytes(disk.file.data).count(b"conectix")


def test_a_new_block_of_a_dynamic_image_is_mapped_whole() -> None:
    disk = disk_of(EMPTY)
    disk.write(3 * BLOCK + 100, b"x")
    (extent,) = disk.driver.map(3 * BLOCK, BLOCK)
    assert (extent.kind, extent.in_place, extent.length) == (Kind.DATA, True, BLOCK)
    disk.flush()
    place = places(disk)[3]
    assert (place + 512) % 4096 == 0
    assert disk.file.data[place : place + 4] == b"\xff" * 4
    assert ignoring_bitmaps(bytes(disk.file.data)) == by_bytes(bytes(disk.file.data)) == disk.whole()


def test_a_new_block_of_a_differencing_image_has_the_sectors_that_were_written() -> None:
    parent = CHOICE.randbytes(8 * BLOCK)
    disk = disk_of(differencing(size=8 * BLOCK, blocks={}), parent)
    disk.write(3 * BLOCK + 600, b"x" * 900)
    kinds = [(each.offset - 3 * BLOCK, each.kind) for each in disk.driver.map(3 * BLOCK, BLOCK)]
    assert kinds == [(0, Kind.UNALLOCATED), (512, Kind.DATA), (1536, Kind.UNALLOCATED)]
    disk.flush()
    assert bytes(disk.file.data[places(disk)[3] :][:4]) == bytes([0b01100000, 0, 0, 0])
    assert disk.whole() == parent[: 3 * BLOCK + 600] + b"x" * 900 + parent[3 * BLOCK + 1500 :]


def test_the_last_sectors_of_a_block_name_nothing_behind_its_bitmap() -> None:
    size = 2 << 20  # 4096 sectors: the bits fill a sector, whose end is that of a page
    disk = disk_of(differencing(size=size, block_size=size, blocks={}), bytes(size))
    disk.write(0, b"x" * 512)
    disk.flush()
    reservation = disk.reserve([Range(size - 4096, 4096)], Operation.WRITE)
    assert reservation.metadata == ()


def test_the_footer_is_behind_the_data_and_nowhere_else_but_at_the_start() -> None:
    disk = disk_of(EMPTY)
    for index in (5, 0, 7):
        disk.write(index * BLOCK, b"x" * 512)
        disk.flush()
        assert disk.file.data[-512:] == EMPTY.footer() == disk.file.data[:512]
        assert footers(disk) == 2
    assert len(disk.file.data) == max(places(disk)) + 512 + BLOCK + 512


def test_footer_and_bitmap_come_before_the_entry() -> None:
    disk = disk_of(EMPTY)
    disk.write(BLOCK, b"x" * 512)
    plan = disk.driver.flush()
    first, second, *_ = [[step.host_offset for step in stage if isinstance(step, Write)] for stage in plan.stages]
    assert len(first) == 2
    assert min(first) >= 2048
    assert second == [1536]
    disk.file.apply(plan)
    disk.driver.flushed(plan)
    disk.write(BLOCK + 512, b"y" * 512)
    assert disk.driver.flush() == Plan(), "in place, and nothing to be said"


def test_a_block_that_is_zeroed_whole_is_given_up_and_used_again_when_that_is_durable() -> None:
    disk = disk_of(EMPTY)
    disk.write(0, CHOICE.randbytes(2 * BLOCK))
    disk.flush()
    place = places(disk)[0]
    disk.zero(0, BLOCK)
    assert [each.kind for each in disk.driver.map(0, BLOCK)] == [Kind.UNALLOCATED]
    disk.write(3 * BLOCK, b"x" * 512)
    disk.flush()
    assert places(disk)[0] == -1
    assert places(disk)[3] != place, "its place was not free before"
    disk.write(4 * BLOCK, b"y" * 512)
    disk.flush()
    assert places(disk)[4] == place
    assert ignoring_bitmaps(bytes(disk.file.data)) == disk.whole()


@pytest.mark.parametrize("operation", [Operation.ZERO, Operation.DISCARD])
def test_a_part_of_a_block_stays(operation: Operation) -> None:
    disk = disk_of(EMPTY)
    disk.write(0, b"x" * BLOCK)
    disk.zero(512, BLOCK - 512, operation)
    assert disk.whole() == b"x" * 512 + bytes(8 * BLOCK - 512)
    disk.flush()
    assert places(disk)[0] > 0


def test_a_host_that_cannot_punch_leaves_no_old_bytes_in_a_block_mapped_whole() -> None:
    """Its place reads otherwise than zeros, so only the sectors that are written get their bits."""
    disk = disk_of(EMPTY)
    old = CHOICE.randbytes(BLOCK)
    disk.driver.abort(disk.start_write(BLOCK, old))
    plan = disk.driver.flush()
    stages = [tuple(step for step in stage if not isinstance(step, Discard)) for stage in plan.stages]
    disk.file.apply(Plan(tuple(stages)))
    disk.driver.flushed(plan)
    disk.write(2 * BLOCK + 512, b"x" * 512)
    disk.flush()
    assert old[1024:2048] in bytes(disk.file.data)
    assert disk.whole() == bytes(2 * BLOCK + 512) + b"x" * 512 + bytes(6 * BLOCK - 1024)
    assert by_bytes(bytes(disk.file.data)) == disk.whole()


def test_room_before_the_footer_is_used_as_on_a_block_device() -> None:
    """The footer of an image in a volume stands at the end of the volume, and there it stays."""
    content = Vhd(size=8 * BLOCK, blocks={0: Block(CHOICE.randbytes(BLOCK))}).content()
    room = CHOICE.randbytes(3 * (BLOCK + 4096))
    disk = disk_of(content[:-512] + room + content[-512:])
    size = len(disk.file.data)
    before = disk.whole()
    disk.write(5 * BLOCK, b"x" * 512)
    disk.flush()
    assert len(disk.file.data) == size
    assert disk.file.data[-512:] == content[-512:]
    assert (
        disk.whole() == by_bytes(bytes(disk.file.data)) == before[: 5 * BLOCK] + b"x" * 512 + before[5 * BLOCK + 512 :]
    )


def test_two_reservations_in_one_block_of_a_differencing_image() -> None:
    parent = CHOICE.randbytes(8 * BLOCK)
    disk = disk_of(differencing(size=8 * BLOCK, blocks={}), parent)
    first, second = disk.start_write(BLOCK, b"a" * 512), disk.start_write(BLOCK + 1024, b"b" * 512)
    assert first.placements[0].host_offset + 1024 == second.placements[0].host_offset
    disk.driver.abort(first)
    assert disk.whole() == parent
    disk.driver.commit(second)
    expected = parent[: BLOCK + 1024] + b"b" * 512 + parent[BLOCK + 1536 :]
    assert disk.whole() == expected
    disk.flush()
    assert by_bytes(bytes(disk.file.data), parent) == expected


def test_several_ranges_in_one_block_are_one_reservation() -> None:
    disk = disk_of(EMPTY)
    reservation = disk.driver.reserve([Range(BLOCK, 512), Range(BLOCK + 2048, 512)], Operation.WRITE)
    assert reservation.ranges == (Range(BLOCK, BLOCK),)
    assert len({placement.host_offset - placement.offset for placement in reservation.placements}) == 1
    disk.driver.commit(reservation)
    assert not any(disk.whole())


def test_a_new_block_is_one_place_however_many_ranges_are_in_it() -> None:
    """A fragmented disk has thousands of them, and each place costs the copy as much as a block does."""
    disk = disk_of(EMPTY)
    ranges = [Range(BLOCK + at, 512) for at in range(0, BLOCK - 1024, 2048)]
    ranges.append(Range(2 * BLOCK - 512, 1024))  # into the next block
    ranges.append(Range(3 * BLOCK - 512, 512))
    reservation = disk.driver.reserve(ranges, Operation.WRITE)
    assert reservation.ranges == (Range(BLOCK, 2 * BLOCK),)
    assert [(place.offset, place.length, place.fresh) for place in reservation.placements] == [
        (BLOCK, BLOCK, True),
        (2 * BLOCK, BLOCK, True),
    ]
    disk.driver.commit(reservation)
    assert reservation.exact
    for place in reservation.placements:
        (extent,) = disk.driver.map(place.offset, place.length)
        assert (extent.offset, extent.length, extent.host_offset) == place[:3]


def test_tapdisks_batmap_forgets_a_block_before_it_goes() -> None:
    image = Vhd(
        size=8 * BLOCK,
        blocks={2: Block(b"x" * BLOCK)},
        creator=b"tap\0",
        creator_version=0x10003,
        batmap=(False, False, True),
    )
    disk = disk_of(image)
    disk.zero(2 * BLOCK, BLOCK)
    plan = disk.driver.flush()
    at = bytes(disk.file.data).index(b"tdbatmap")
    assert {step.host_offset for step in plan.stages[0] if isinstance(step, Write)} == {at, at + 512}
    disk.file.apply(plan)
    disk.driver.flushed(plan)
    assert disk.file.data[at + 512] == 0
    driver: Any = FORMAT.open(disk.file, OpenRequest())
    assert driver.check().findings == []
    assert driver.batmap.valid


def test_a_file_has_at_most_two_tib() -> None:
    disk = disk_of(EMPTY)
    driver: Any = disk.driver
    driver.places.end = 0xFFFFFFFF * 512
    with pytest.raises(ImageError, match="at most 2 TiB") as caught:
        driver.reserve([Range(0, 512)], Operation.WRITE)
    assert caught.value.kind is ErrorKind.NO_SPACE
    driver.places.end = 4096
    disk.write(0, b"x")
    disk.flush()
    assert disk.read(0, 1) == b"x"


def test_an_image_whose_blocks_overlap_is_only_read(tmp_path: Path) -> None:
    """A write to one of them would have changed the other, without a word."""
    path = tmp_path / "a.vhd"
    tapfs.create(path, "vhd", 16 << 20)
    with tapfs.open(path, writable=True) as disk:
        for at in range(0, 16 << 20, 2 << 20):
            disk.write(at, bytes([at >> 21]) * 4096)
    raw = bytearray(path.read_bytes())
    table = int.from_bytes(raw[512 + 16 : 512 + 24], "big")
    first = int.from_bytes(raw[table : table + 4], "big")
    raw[table + 8 : table + 12] = (first + 8).to_bytes(4, "big")
    path.write_bytes(raw)
    with pytest.raises(ImageError, match="two blocks overlap") as caught:
        tapfs.open(path, writable=True)
    assert caught.value.kind is ErrorKind.READ_ONLY
    tapfs.open(path).close()
    assert tapfs.check(path).corruptions > 0
