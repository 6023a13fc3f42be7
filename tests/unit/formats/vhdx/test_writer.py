"""Writing: the log, the headers, failed flushes, and what becomes of blocks of every state."""

from __future__ import annotations

import random
import struct

import pytest

from tapfs import ImageError
from tapfs.driver import OpenRequest, Operation, Recoverable
from tapfs.errors import ErrorKind
from tapfs.extent import Kind, Range
from tapfs.formats.vhdx import FORMAT
from tapfs.formats.vhdx.guids import NO_GUID
from tapfs.formats.vhdx.header import read_headers
from tapfs.formats.vhdx.writer import WritableVhdxDriver
from tapfs.plan import Write
from tapfs.testing.model import MemoryFile, ModelDisk
from tests.vhdx_images import (
    BAT_AT,
    BLOCKS_AT,
    HEADERS,
    LOG_AT,
    LOG_BYTES,
    METADATA_AT,
    MIB,
    NOT_PRESENT,
    PARTIAL,
    PRESENT,
    UNDEFINED,
    UNMAPPED,
    ZERO,
    Image,
    header,
    named_parent,
)

PAGE = 4096
NOISE = random.Random(1).randbytes(MIB)


def opened(file: MemoryFile, backing: bytes = b"") -> ModelDisk:
    """The image, to be written; its log is replayed."""
    driver = FORMAT.open(file, OpenRequest(writable=True))
    if isinstance(driver, Recoverable):
        file.apply(driver.recovery() or pytest.fail("nothing to be replayed"))
        driver = FORMAT.open(file, OpenRequest(writable=True))
    assert isinstance(driver, WritableVhdxDriver)
    return ModelDisk(driver, file, backing)


def of(image: Image) -> MemoryFile:
    return MemoryFile(bytes(image.build()))


def plain(blocks: int = 6) -> MemoryFile:
    return of(Image(blocks * MIB))


def driver_of(disk: ModelDisk) -> WritableVhdxDriver:
    assert isinstance(disk.driver, WritableVhdxDriver)
    return disk.driver


def test_the_header_says_that_the_image_is_written() -> None:
    file = plain()
    before = read_headers(file).current
    disk = opened(file)
    assert read_headers(file).current == before
    disk.write(5, b"x")
    begun = read_headers(file).current
    assert begun.log != NO_GUID
    assert begun.data_write not in {before.data_write, NO_GUID}
    assert begun.file_write != before.file_write
    assert driver_of(disk).identities != {f"uuid:{before.data_write.hex()}"}
    disk.end()
    ended = read_headers(file).current
    assert (ended.log, ended.data_write) == (NO_GUID, begun.data_write)
    # The two slots agree but for the sequence number.
    first, second = (bytes(file.data[at + 16 : at + 4096]) for at in HEADERS)
    assert first == second


def test_an_image_that_was_not_ended_is_replayed() -> None:
    file = plain()
    disk = opened(file)
    disk.write(MIB, NOISE)
    disk.flush()
    left = MemoryFile(bytes(file.data))
    assert isinstance(FORMAT.open(left, OpenRequest()), Recoverable)
    # The block table in its place is lost, the log brings it back.
    left.data[BAT_AT : BAT_AT + PAGE] = bytes(PAGE)
    assert opened(left).read(MIB, MIB) == NOISE


def test_a_begin_that_failed_is_asked_for_again() -> None:
    file = plain()
    driver = driver_of(opened(file))
    plan = driver.begin()
    for stage in plan.stages[:2]:
        for step in stage:
            file.do(step)
    assert driver.begin() == plan
    file.apply(driver.begin())
    disk = ModelDisk(driver, file)
    disk._begun = True
    disk.write(0, NOISE)
    disk.end()
    assert opened(file).read(0, MIB) == NOISE


def test_writing_begins_anew_after_an_end() -> None:
    file = plain()
    disk = opened(file)
    logs: set[bytes] = set()
    for number in range(5):
        disk.write(number * MIB, NOISE)
        disk.flush()
        logs.add(read_headers(file).current.log)
        disk.end()
        assert read_headers(file).current.log == NO_GUID
    assert len(logs) == 5
    assert opened(file).whole() == (NOISE * 5).ljust(6 * MIB, b"\0")


def fail(disk: ModelDisk, stages: int) -> None:
    """Execute the first stages of a flush, and say nothing to the driver."""
    for stage in disk.driver.flush().stages[:stages]:
        for step in stage:
            disk.file.do(step)


def fail_again_and_again(disk: ModelDisk) -> None:
    for _ in range(1000):
        fail(disk, 2)


def test_plans_that_were_never_executed_take_no_room_in_the_log() -> None:
    disk = opened(plain())
    disk.write(0, NOISE)
    for _ in range(1000):
        disk.driver.flush()
    disk.flush()
    disk.end()
    assert opened(disk.file).read(0, MIB) == NOISE


def test_flushes_that_fail_fill_the_log_and_lose_nothing() -> None:
    disk = opened(plain())
    disk.write(0, NOISE)
    disk.flush()
    disk.write(MIB, NOISE)
    with pytest.raises(ImageError) as caught:
        fail_again_and_again(disk)
    assert caught.value.kind is ErrorKind.IO
    assert "failed" in caught.value.message
    assert opened(disk.file).read(0, 2 * MIB) == NOISE * 2


def test_a_flush_after_some_that_failed_brings_everything() -> None:
    disk = opened(plain())
    for number in range(4):
        disk.write(number * MIB, NOISE)
        fail(disk, 2)
    disk.flush()
    disk.flush()
    disk.end()
    assert opened(disk.file).whole() == (NOISE * 4).ljust(6 * MIB, b"\0")


def test_the_log_goes_round() -> None:
    disk = opened(plain(2))
    for number in range(300):
        disk.zero(MIB * (number % 2), MIB)
        disk.write(MIB * (number % 2), bytes([number % 255 + 1]))
        disk.flush()
    sequences = {
        int.from_bytes(disk.file.data[at + 16 : at + 24], "little")
        for at in range(LOG_AT, LOG_AT + LOG_BYTES, PAGE)
        if disk.file.data[at : at + 4] == b"loge"
    }
    assert max(sequences) == 301
    left = MemoryFile(bytes(disk.file.data))
    assert opened(left).whole() == disk.whole()
    assert left.size() < 10 * MIB


def test_more_pages_than_an_entry_may_have_go_in_rounds() -> None:
    file = of(Image(60_000 * MIB))
    driver = driver_of(opened(file))
    file.apply(driver.begin())
    for block in range(0, 60_000, 512):
        driver.commit(driver.reserve([Range(block * MIB, MIB)], Operation.WRITE))
    plan = driver.flush()
    logged = [step for stage in plan.stages for step in stage if isinstance(step, Write) and step.data[:4] == b"loge"]
    assert len(logged) == 2
    assert all(len(step.data) <= LOG_BYTES // 4 for step in logged)
    # What the log says is what the next stage writes.
    entries = sum(len(step.data) // 4096 - 1 for step in logged)
    assert entries == sum(
        len(step.data) // PAGE
        for stage in plan.stages
        for step in stage
        if isinstance(step, Write) and BAT_AT <= step.host_offset < BAT_AT + MIB
    )


@pytest.mark.parametrize("state", [NOT_PRESENT, UNDEFINED, ZERO, UNMAPPED, PRESENT])
@pytest.mark.parametrize("operation", [Operation.ZERO, Operation.DISCARD])
def test_blocks_of_every_state_are_written_and_zeroed(state: int, operation: Operation) -> None:
    file = of(Image(2 * MIB, blocks={0: (state, NOISE)}))
    disk = opened(file)
    disk.write(100, b"data")
    assert disk.read(98, 8) == (NOISE[98:100] if state == PRESENT else bytes(2)) + b"data" + (
        NOISE[104:106] if state == PRESENT else bytes(2)
    )
    disk.zero(0, MIB, operation)
    disk.flush()
    assert int.from_bytes(file.data[BAT_AT : BAT_AT + 8], "little") == ZERO
    disk.end()
    assert opened(file).whole() == bytes(2 * MIB)


def test_the_place_that_an_unmapped_block_keeps_is_given_back() -> None:
    image = Image(2 * MIB)
    data = image.build() + NOISE
    data[BAT_AT : BAT_AT + 8] = struct.pack("<Q", BLOCKS_AT | UNMAPPED)
    disk = opened(MemoryFile(bytes(data)))
    disk.write(0, b"x")
    disk.flush()
    assert not any(disk.file.data[BLOCKS_AT : BLOCKS_AT + MIB])
    assert disk.driver.check().leaks == 0  # type: ignore[attr-defined]


def test_a_fixed_image_keeps_its_blocks() -> None:
    file = of(Image(2 * MIB, blocks={0: (PRESENT, NOISE), 1: (PRESENT, NOISE)}, flags=1))
    disk = opened(file)
    table = bytes(file.data[BAT_AT : BAT_AT + 16])
    disk.zero(0, MIB)
    disk.zero(MIB, MIB, Operation.DISCARD)
    disk.flush()
    disk.end()
    assert bytes(file.data[BAT_AT : BAT_AT + 16]) == table
    assert disk.read(0, MIB) == bytes(MIB)
    assert disk.read(MIB, MIB) == NOISE


def test_a_last_block_that_the_file_cuts_is_not_allocated_over() -> None:
    size = 2 * MIB + 5120
    data = Image(size, block=MIB, blocks={0: (PRESENT, NOISE), 2: (PRESENT, NOISE)}).build()
    file = MemoryFile(bytes(data[: -MIB + 5120]))
    disk = opened(file)
    disk.write(MIB, NOISE)
    disk.write(2 * MIB + 4000, b"y" * 10)
    disk.flush()
    disk.end()
    assert disk.driver.check().corruptions == 0  # type: ignore[attr-defined]
    again = opened(file)
    assert again.read(MIB, MIB) == NOISE
    assert again.read(2 * MIB, 5120) == NOISE[:4000] + b"y" * 10 + NOISE[4010:5120]


def test_a_file_without_a_log_gets_one() -> None:
    data = Image(2 * MIB).build()
    for sequence, at in enumerate(HEADERS, 7):
        data[at : at + 4096] = header(sequence, log_bytes=0, log_at=0)
    file = MemoryFile(bytes(data))
    disk = opened(file)
    disk.write(0, NOISE)
    disk.flush()
    current = read_headers(file).current
    assert (current.log_length, current.log_offset) == (MIB, BLOCKS_AT)
    assert opened(MemoryFile(bytes(file.data))).read(0, MIB) == NOISE


PARENT = random.Random(2).randbytes(2 * MIB)


@pytest.mark.parametrize("state", [NOT_PRESENT, UNDEFINED, ZERO, UNMAPPED, PRESENT, PARTIAL])
@pytest.mark.parametrize("operation", [Operation.WRITE, Operation.ZERO, Operation.DISCARD])
@pytest.mark.parametrize("whole", [False, True])
def test_blocks_of_every_state_over_a_parent(state: int, operation: Operation, *, whole: bool) -> None:
    image = Image(2 * MIB, blocks={0: (state, NOISE)}, sectors={0: range(4, 40)}, parent=named_parent("p.vhdx"))
    disk = opened(of(image), PARENT)
    expected = bytearray(disk.whole())
    sources = {
        NOT_PRESENT: PARENT[:MIB],
        PRESENT: NOISE,
        PARTIAL: PARENT[:2048] + NOISE[2048:20480] + PARENT[20480:MIB],
    }
    assert expected == sources.get(state, bytes(MIB)) + PARENT[MIB:]
    start, end = (0, MIB) if whole else (512 * 30, 512 * 70)
    if operation is Operation.WRITE:
        disk.write(start + 7, b"w" * (end - start - 9))
        expected[start + 7 : end - 2] = b"w" * (end - start - 9)
    else:
        disk.zero(start, end - start, operation)
        if operation is Operation.ZERO:
            expected[start:end] = bytes(end - start)
    for disk_now in (disk, reopened(disk)):
        read = disk_now.whole()
        if operation is Operation.DISCARD:
            for at in range(start, end, 512):
                assert read[at : at + 512] in {bytes(expected[at : at + 512]), bytes(512)}
            expected[start:end] = read[start:end]
        assert read == expected
        assert disk_now.driver.check().corruptions == 0  # type: ignore[attr-defined]
    if operation is Operation.ZERO and whole:
        assert int.from_bytes(disk.file.data[BAT_AT : BAT_AT + 8], "little") & 7 in {ZERO, UNDEFINED, UNMAPPED}


def reopened(disk: ModelDisk) -> ModelDisk:
    disk.end()
    return opened(disk.file, disk.backing)


def test_old_bits_of_a_block_that_is_absent_do_not_count() -> None:
    """The bits of a block that is not PARTIAL mean nothing; they must not come to mean something."""
    image = Image(2 * MIB, blocks={0: (PARTIAL, NOISE)}, sectors={0: range(2048)}, parent=named_parent("p.vhdx"))
    data = image.build()
    data[BAT_AT : BAT_AT + 8] = bytes(8)
    disk = opened(MemoryFile(bytes(data)), PARENT)
    disk.write(512 * 8, b"x" * 512)
    assert reopened(disk).whole() == PARENT[: 512 * 8] + b"x" * 512 + PARENT[512 * 9 :]


def test_a_reservation_that_takes_a_block_is_as_wide_as_the_block() -> None:
    image = Image(2 * MIB, parent=named_parent("p.vhdx"))
    driver = driver_of(opened(of(image), PARENT))
    reservation = driver.reserve([Range(512 * 3, 1024)], Operation.WRITE)
    assert reservation.ranges == (Range(0, MIB),)
    assert reservation.exact
    driver.abort(reservation)
    assert driver.map(0, 1)[0].kind is Kind.UNALLOCATED
    assert driver.space.allocation.noted == 1


def test_the_space_of_released_blocks_is_used_again() -> None:
    disk = opened(plain(8))
    for round_number in range(6):
        for block in range(4):
            disk.write(block * MIB + 5, bytes([round_number + 1]) * 50)
        disk.flush()
        disk.zero(0, 4 * MIB, Operation.DISCARD)
        disk.flush()
    assert disk.file.size() <= BLOCKS_AT + 8 * MIB
    assert disk.whole() == bytes(8 * MIB)


def test_an_entry_that_cannot_be_is_not_written_over() -> None:
    image = Image(2 * MIB)
    data = image.build()
    data[BAT_AT : BAT_AT + 8] = struct.pack("<Q", METADATA_AT | PRESENT)
    with pytest.raises(ImageError, match="overlaps metadata") as caught:
        opened(MemoryFile(bytes(data)))
    assert caught.value.kind is ErrorKind.READ_ONLY
