"""The replay of logs of every shape: for a writer in the file, for a reader over it, and never of what is not whole."""

from __future__ import annotations

import random
import struct

import pytest

from tapfs import ImageError
from tapfs.driver import Driver, OpenRequest, Recoverable
from tapfs.formats.vhdx import FORMAT
from tapfs.formats.vhdx.header import read_headers
from tapfs.plan import Write
from tapfs.testing.model import MemoryFile, read_extents
from tests.vhdx_images import (
    BAT_AT,
    BLOCKS_AT,
    HEADERS,
    LOG_AT,
    LOG_BYTES,
    MIB,
    PRESENT,
    Entry,
    Image,
    header,
    put_log,
)

PAGE = 4096
OTHER_LOG = "00000000-1111-2222-3333-444444444444"


def page_of(*entries: int) -> bytes:
    """A page of the block table."""
    return struct.pack(f"<{len(entries)}Q", *entries).ljust(PAGE, b"\0")


def block(number: int) -> int:
    """The entry of a block that is the n-th in the file."""
    return (BLOCKS_AT + number * MIB) | PRESENT


def image() -> bytearray:
    """Four blocks in the file, of which the block table on the disk knows none."""
    data = Image(4 * MIB).build()
    for number in range(4):
        data += bytes([number + 1]) * MIB
    return data


def recovery(data: bytes | bytearray, *, writable: bool = True) -> tuple[MemoryFile, Driver]:
    """The file after the replay, and the driver that reads it then."""
    file = MemoryFile(bytes(data))
    driver = FORMAT.open(file, OpenRequest(writable=writable))
    assert isinstance(driver, Recoverable)
    plan = driver.recovery()
    assert plan
    file.apply(plan)
    again = FORMAT.open(file, OpenRequest())
    assert not isinstance(again, Recoverable)
    return file, again


def disk(data: bytes | bytearray) -> list[int]:
    """The first byte of each block once the log is replayed."""
    file, driver = recovery(data)
    assert driver.check().corruptions == 0  # type: ignore[attr-defined]
    return [read_extents(driver, file, at, 1)[0] for at in range(0, driver.geometry.virtual_size, MIB)]


def refused(data: bytes | bytearray) -> ImageError:
    driver = FORMAT.open(MemoryFile(bytes(data)), OpenRequest())
    with pytest.raises(ImageError) as caught:
        driver.recovery()  # type: ignore[attr-defined]
    assert caught.value.op == "replay the log"
    return caught.value


def test_one_entry() -> None:
    data = image()
    put_log(data, [Entry(1, [(BAT_AT, page_of(block(0), 0, block(2)))])])
    assert disk(data) == [1, 0, 3, 0]


def test_only_what_lies_behind_the_tail_of_the_newest_is_replayed() -> None:
    """As in a file that Windows left: five entries, the newest has its tail at the fourth."""
    data = image()
    sequence = [
        Entry(1 << 40, []),
        *(Entry((1 << 40) + at, [(BAT_AT + PAGE * at, page_of(7 << 3))]) for at in (1, 2)),
        Entry((1 << 40) + 3, [(BAT_AT, page_of(block(0), block(1), 0, 0))]),
    ]
    places = put_log(data, sequence)
    sequence.append(Entry((1 << 40) + 4, [(BAT_AT, page_of(block(0), 0, 0, block(3)))], tail=places[3]))
    put_log(data, sequence)
    assert disk(data) == [1, 0, 0, 4]
    file, _ = recovery(data)
    assert not any(file.data[BAT_AT + PAGE : BAT_AT + 3 * PAGE])


def test_an_older_tail_replays_all_from_it_on() -> None:
    data = image()
    first = Entry(5, [(BAT_AT, page_of(block(0), block(1))), (BAT_AT + PAGE, page_of(8, 8, 8))])
    put_log(data, [first, Entry(6, [(BAT_AT, page_of(block(2)))], tail=0)])
    assert disk(data) == [3, 0, 0, 0]
    assert recovery(data)[0].data[BAT_AT + PAGE]


def test_the_sequence_with_the_highest_number_counts() -> None:
    data = image()
    put_log(data, [Entry(9, [(BAT_AT, page_of(block(0)))])])
    put_log(data, [Entry(30, [(BAT_AT, page_of(block(1)))])], start=16 * PAGE)
    put_log(data, [Entry(20, [(BAT_AT, page_of(block(2)))])], start=32 * PAGE)
    assert disk(data)[0] == 2


@pytest.mark.parametrize("start", [LOG_BYTES - PAGE, LOG_BYTES - 2 * PAGE, LOG_BYTES - 3 * PAGE])
def test_an_entry_goes_round_the_end_of_the_ring(start: int) -> None:
    data = image()
    changes: list[tuple[int, bytes | int]] = [(BAT_AT + at * PAGE, page_of(8 * at)) for at in range(1, 6)]
    put_log(data, [Entry(1, []), Entry(2, [*changes, (BAT_AT, page_of(block(3)))])], start=start)
    assert disk(data)[0] == 4


def test_more_descriptors_than_a_sector_has() -> None:
    data = image()
    changes: list[tuple[int, bytes | int]] = [(BAT_AT + at * PAGE, page_of(8 * at)) for at in range(1, 140)]
    put_log(data, [Entry(1, [*changes, (BAT_AT, page_of(block(1)))])])
    file, _ = recovery(data)
    assert disk(data)[0] == 2
    assert int.from_bytes(file.data[BAT_AT + 139 * PAGE : BAT_AT + 139 * PAGE + 8], "little") == 8 * 139


def test_zeros_and_pages_in_their_order() -> None:
    data = image()
    data[BAT_AT : BAT_AT + 3 * PAGE] = b"\xff" * 3 * PAGE
    changes: list[tuple[int, bytes | int]] = [
        (BAT_AT + PAGE, page_of(8)),
        (BAT_AT, 3 * PAGE),
        (BAT_AT, page_of(block(2))),
    ]
    put_log(data, [Entry(1, changes)])
    assert disk(data) == [3, 0, 0, 0]
    assert not any(recovery(data)[0].data[BAT_AT + PAGE : BAT_AT + 3 * PAGE])


def test_an_empty_log_of_one_entry_is_valid() -> None:
    data = image()
    put_log(data, [Entry(1, [])])
    assert disk(data) == [0, 0, 0, 0]


def test_entries_of_another_log_are_stale() -> None:
    data = image()
    put_log(data, [Entry(99, [(BAT_AT, page_of(block(0)))], log=OTHER_LOG)])
    assert "no entry of it is whole" in refused(data).message
    put_log(data, [Entry(1, [(BAT_AT, page_of(block(1)))])], start=8 * PAGE)
    assert disk(data)[0] == 2


def torn(data: bytearray, seed: int, length: int, start: int) -> None:
    """Lose some sectors of 512 bytes of an entry, not all of them."""
    choice = random.Random(seed)
    sectors = range(LOG_AT + start, LOG_AT + start + length, 512)
    for at in choice.sample(sectors, choice.randrange(1, len(sectors))):
        data[at : at + 512] = choice.randbytes(512)


@pytest.mark.parametrize("seed", range(10))
def test_a_torn_newest_entry_leaves_the_one_before(seed: int) -> None:
    data = image()
    good = Entry(1, [(BAT_AT, page_of(block(0)))])
    places = put_log(data, [good, Entry(2, [(BAT_AT, page_of(block(1))), (BAT_AT + PAGE, page_of(block(1)))])])
    torn(data, seed, 3 * PAGE, places[1])
    assert disk(data)[0] == 1


@pytest.mark.parametrize("seed", range(5))
def test_a_torn_only_entry_is_an_error(seed: int) -> None:
    data = image()
    put_log(data, [Entry(1, [(BAT_AT, page_of(block(0)))])])
    torn(data, seed, 2 * PAGE, 0)
    assert "no entry of it is whole" in refused(data).message


@pytest.mark.parametrize(
    "entry",
    [
        Entry(0, [(BAT_AT, page_of(block(0)))]),
        Entry(1, [(BAT_AT, page_of(block(0)))], tail=PAGE),
        Entry(1, [(BAT_AT, page_of(block(0)))], tail=5),
        Entry(1, [(BAT_AT, page_of(block(0)))], tail=LOG_BYTES),
        Entry(1, [(HEADERS[0], bytes(PAGE))]),
        Entry(1, [(0, bytes(PAGE))]),
        Entry(1, [(BAT_AT + 512, bytes(PAGE))]),
        Entry(1, [(LOG_AT + 100 * PAGE, bytes(PAGE))]),
        Entry(1, [(MIB, 3 * MIB)]),
        Entry(1, [(BAT_AT, 512)]),
        Entry(1, [(BAT_AT, 0)]),
        Entry(1, [(BAT_AT, 1 << 63)]),
        Entry(1, [((1 << 64) - PAGE, bytes(PAGE))]),
    ],
    ids=lambda entry: str((entry.sequence, entry.tail, [(at, type(what).__name__) for at, what in entry.changes])),
)
def test_entries_that_cannot_be_are_not_replayed(entry: Entry) -> None:
    data = image()
    put_log(data, [entry])
    assert "no entry of it is whole" in refused(data).message


def test_a_file_that_was_cut_is_refused() -> None:
    data = image()
    put_log(data, [Entry(1, [(BAT_AT, page_of(block(0)))], flushed=len(data))])
    assert disk(data)[0] == 1
    assert "has been cut" in refused(data[:-MIB]).message


def test_only_the_newest_entry_says_how_long_the_file_is() -> None:
    data = image()
    put_log(data, [Entry(1, [], flushed=1 << 40, last=1 << 40), Entry(2, [(BAT_AT, page_of(block(0)))], tail=0)])
    assert disk(data)[0] == 1


def test_the_file_becomes_as_long_as_the_log_says() -> None:
    data = image()
    put_log(data, [Entry(1, [(BAT_AT, page_of(block(0)))], last=len(data) + 3 * MIB)])
    assert recovery(data)[0].size() == len(data) + 3 * MIB
    put_log(data, [Entry(1, [(BAT_AT, page_of(block(0)))], last=1 << 60)])
    assert "says that the file has" in refused(data).message


def test_a_range_of_zeros_takes_no_memory() -> None:
    data = image()
    put_log(data, [Entry(1, [(8 * MIB, (1 << 47) - 8 * MIB), (BAT_AT, page_of(block(0)))])])
    driver = FORMAT.open(MemoryFile(bytes(data)), OpenRequest())
    plan = driver.recovery()  # type: ignore[attr-defined]
    assert sum(len(step.data) for stage in plan.stages for step in stage if isinstance(step, Write)) < 64 * 1024


def test_a_replay_is_a_change_of_the_file_and_not_of_the_disk() -> None:
    """For a reader it is neither. That the core leaves its file alone is tested with files (test_files.py)."""
    data = image()
    put_log(data, [Entry(1, [(BAT_AT, page_of(block(0)))])])
    before = read_headers(MemoryFile(bytes(data))).current
    after = read_headers(recovery(data)[0]).current
    assert after.data_write == before.data_write
    assert after.file_write != before.file_write
    assert after.log == bytes(16)
    assert after.sequence == before.sequence + 3
    assert read_headers(recovery(data, writable=False)[0]).current.file_write == before.file_write


def test_every_crash_in_a_replay_is_replayed_again() -> None:
    data = image()
    pages: list[tuple[int, bytes | int]] = [(BAT_AT + PAGE, 2 * PAGE), (BAT_AT, page_of(block(0), 0, block(2)))]
    put_log(data, [Entry(1, pages, last=len(data) + MIB)])
    file = MemoryFile(bytes(data))
    file.apply(FORMAT.open(file, OpenRequest()).recovery())  # type: ignore[attr-defined]
    choice = random.Random(3)
    for epoch in range(len(file.epochs)):
        for _ in range(20):
            left = MemoryFile(file.crashed(epoch, choice))
            driver = FORMAT.open(left, OpenRequest())
            if isinstance(driver, Recoverable):
                left.apply(driver.recovery() or pytest.fail("nothing to be replayed"))
                driver = FORMAT.open(left, OpenRequest())
            assert [read_extents(driver, left, at, 1)[0] for at in range(0, 4 * MIB, MIB)] == [1, 0, 3, 0]


def test_a_log_full_of_false_entries_is_read_once() -> None:
    """Each sector looks like the start of an entry that takes all of the ring."""
    data = image()
    raw = Entry(1, [(BAT_AT + at * PAGE, page_of(block(0))) for at in range(120)]).pack(0)[:PAGE]
    for at in range(0, LOG_BYTES, PAGE):
        data[LOG_AT + at : LOG_AT + at + PAGE] = raw
    for place in HEADERS:
        data[place : place + PAGE] = header(9, log="99999999-8888-7777-6666-555555555555")
    reads = 0

    class Counting(MemoryFile):
        def read(self, offset: int, length: int) -> bytes:
            nonlocal reads
            reads += length
            return super().read(offset, length)

    driver = FORMAT.open(Counting(bytes(data)), OpenRequest())
    with pytest.raises(ImageError):
        driver.recovery()  # type: ignore[attr-defined]
    assert reads < 5 * LOG_BYTES
