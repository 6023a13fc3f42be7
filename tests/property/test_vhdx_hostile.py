"""VHDX images with impossible fields under checksums that fit: ImageError, or answers that keep to the contract.

Random damage alone never gets past a checksum. So a field is changed where it counts, and the structure is summed anew.
"""

from __future__ import annotations

import random
import struct

import pytest

from tapfs import ImageError
from tapfs.checksums import crc32c
from tapfs.driver import Driver, OpenRequest, Operation, Recoverable
from tapfs.extent import Range
from tapfs.formats.vhdx import FORMAT
from tapfs.formats.vhdx.writer import WritableVhdxDriver
from tapfs.plan import Grow, Write
from tapfs.testing.laws import check_map
from tapfs.testing.model import MemoryFile
from tests.vhdx_images import (
    BAT_AT,
    HEADERS,
    KIB,
    KINDS,
    LOG_AT,
    METADATA_AT,
    MIB,
    REGION_TABLES,
    Entry,
    make,
    put_log,
)

SIZE = 3 * MIB + 5 * 4096
IMAGES = 40

#: Numbers at the edges of what fields can hold, and of what places and lengths can be.
EDGES = (
    *(0, 1, 2, 3, 4, 5, 6, 7, 8, 511, 512, 4095, 4096, 64 * KIB, 192 * KIB, 2047, 2048),
    *(MIB, 2 * MIB, 3 * MIB, 4 * MIB, 5 * MIB, 4 * MIB + 6, 4 * MIB + 7, 32 * MIB, 256 * MIB, 512 * MIB),
    *((1 << bits) - less for bits in (16, 31, 32, 40, 46, 47, 48, 62, 63, 64) for less in (0, 1)),
    *(1 << 40 | 6, 1 << 44 | 7, (1 << 64) - MIB | 6, (1 << 64) - 4096),
)


def sum_anew(data: bytearray, start: int, length: int) -> None:
    data[start + 4 : start + 8] = bytes(4)
    data[start + 4 : start + 8] = struct.pack("<I", crc32c(bytes(data[start : start + length])))


def put_field(data: bytearray, choice: random.Random, start: int, end: int) -> None:
    width = choice.choice([2, 4, 4, 8, 8])
    at = start + choice.randrange((end - start) // width) * width
    data[at : at + width] = (choice.choice(EDGES) % (1 << 8 * width)).to_bytes(width, "little")


def spoil(data: bytearray, choice: random.Random) -> None:
    """One impossible field somewhere; the checksum over it fits."""
    where = choice.choice(["header", "regions", "metadata", "metadata", "table", "table", "table", "log", "log"])
    if where == "header":
        at = HEADERS[1]
        put_field(data, choice, at + 8, at + 80)
        sum_anew(data, at, 4096)
    elif where == "regions":
        for at in REGION_TABLES[: choice.choice([1, 2])]:
            put_field(data, choice, at + 8, at + 16 + 2 * 32)
            sum_anew(data, at, 64 * KIB)
    elif where == "metadata":
        start = METADATA_AT if choice.random() < 0.5 else METADATA_AT + 64 * KIB
        put_field(data, choice, start, start + 300)
    elif where == "table":
        put_field(data, choice, BAT_AT, BAT_AT + 8 * 5)
    else:
        pages: list[tuple[int, bytes | int]] = [(BAT_AT, bytes(data[BAT_AT : BAT_AT + 4096])), (BAT_AT + 4096, 4096)]
        put_log(data, [Entry(1, []), Entry(2, pages)], start=choice.choice([0, 254 * 4096]))
        at = LOG_AT + (4096 if data[LOG_AT : LOG_AT + 4] == b"loge" and data[LOG_AT + 16] == 1 else 0)
        if data[at : at + 4] == b"loge":
            put_field(data, choice, at + 8, at + 64 + 64)
            length = int.from_bytes(data[at + 8 : at + 12], "little")
            if 64 <= length <= MIB:
                sum_anew(data, at, length)


def replayed(file: MemoryFile, request: OpenRequest) -> Driver | None:
    """The driver once the log is replayed; None where the log makes the file too long to be tried in memory."""
    driver = FORMAT.open(file, request)
    if not isinstance(driver, Recoverable):
        return driver
    plan = driver.recovery()
    assert plan
    steps = [step for stage in plan.stages for step in stage]
    assert sum(len(step.data) for step in steps if isinstance(step, Write)) < 64 * MIB
    if any(step.size > 64 * MIB for step in steps if isinstance(step, Grow)):
        return None
    file.apply(plan)
    return FORMAT.open(file, request)


def use(data: bytes, choice: random.Random) -> None:
    """Everything that a driver is asked for, in each way of opening."""
    for writable, lenient in ((False, False), (True, False), (False, True)):
        file = MemoryFile(data)
        try:
            driver = replayed(file, OpenRequest(writable=writable, lenient=lenient))
            if driver is None:
                continue
            driver.details()
            size, unit = driver.geometry.virtual_size, driver.geometry.map_unit
            for offset in (0, choice.randrange(size), size - 1):
                check_map(driver, offset, min(unit, size - offset))
        except ImageError:
            continue
        if lenient:
            before = driver.check().corruptions  # type: ignore[attr-defined]
            file.apply_all(driver.repair())  # type: ignore[attr-defined]
            again = FORMAT.open(file, OpenRequest(lenient=True))
            assert again.check().corruptions <= before  # type: ignore[attr-defined]
        if isinstance(driver, WritableVhdxDriver):
            write(driver, file, choice)


def write(driver: WritableVhdxDriver, file: MemoryFile, choice: random.Random) -> None:
    """Some changes; what can be opened afterwards must read as the driver said."""
    file.apply(driver.begin())
    granule, size = driver.geometry.granule, driver.geometry.virtual_size
    for _ in range(4):
        offset = choice.randrange(min(size, 8 * MIB)) // granule * granule
        length = min(granule * choice.choice([1, 3]), -(-size // granule) * granule - offset)
        try:
            if any(extent.in_place for extent in driver.map(offset, 1)):
                continue
            operation = choice.choice(list(Operation))
            reservation = driver.reserve([Range(offset, min(length, granule))], operation)
            driver.commit(reservation)
        except ImageError:
            continue
    if driver.space.allocation.end < 64 * MIB:
        plan = driver.flush()
        file.apply(plan)
        driver.flushed(plan)
        file.apply(driver.end())


@pytest.mark.parametrize("seed", range(4))
def test_fields_that_cannot_be_true(seed: int) -> None:
    choice = random.Random(seed)
    data, _ = make(choice.choice(KINDS), SIZE, seed)
    for _ in range(IMAGES):
        image = bytearray(data)
        for _ in range(choice.choice([1, 1, 2, 3])):
            spoil(image, choice)
        use(bytes(image), choice)
