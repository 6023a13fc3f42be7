"""The engine's decoder of block tables and sector bitmaps against the VHDX driver's map, over any entries."""

from __future__ import annotations

import struct
from functools import cache
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tapfs
from tapfs import ErrorKind, ImageError
from tapfs.disk.chain_map import MappedExtent, map_chain, mapped_extents, merge_mapped
from tapfs.kernel.chain_map import map_blocks
from tapfs.kernel.engine import Outcome
from tests.vhdx_images import (
    BAT_AT,
    BLOCKS_AT,
    LOG_AT,
    METADATA_AT,
    MIB,
    PARENT_GUID,
    PARTIAL,
    PRESENT,
    Image,
    named_parent,
)

BLOCKS = 70
FILE_BLOCKS = 6


class AskedError(Exception):
    """The engine has left the unit to the driver."""


def ask(outcome: Outcome) -> None:
    raise AskedError


@cache
def empty(*, over_parent: bool) -> bytes:
    image = Image(BLOCKS * MIB - 5 * 512, parent=named_parent("p.vhdx") if over_parent else None)
    return bytes(image.build()) + bytes(FILE_BLOCKS * MIB - 4096)


PLACES = st.sampled_from([
    *(BLOCKS_AT + number * MIB for number in range(FILE_BLOCKS)),
    *(0, LOG_AT, METADATA_AT, BAT_AT, BLOCKS_AT + FILE_BLOCKS * MIB, BLOCKS_AT + 512, 1 << 44, 1 << 63),
])  # fmt: skip
GOOD = st.builds(
    lambda number, state: BLOCKS_AT + number * MIB | state, st.integers(0, 5), st.sampled_from([PRESENT, PARTIAL])
)
ANY = st.one_of(
    st.builds(lambda place, state: place | state, PLACES, st.integers(0, 7)),
    st.integers(0, 3),
    st.integers(0, 2**64 - 1),
)


@given(
    over_parent=st.booleans(),
    entries=st.lists(st.tuples(st.integers(0, BLOCKS - 1), st.one_of(GOOD, GOOD, ANY)), max_size=6),
    bitmap=st.one_of(st.just(BLOCKS_AT | PRESENT), ANY),
    bits=st.binary(min_size=1, max_size=40),
    writable=st.booleans(),
)
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_table_means_to_the_engine_what_it_means_to_the_driver(
    tmp_path: Path, entries: list[tuple[int, int]], bitmap: int, bits: bytes, *, over_parent: bool, writable: bool
) -> None:
    data = bytearray(empty(over_parent=over_parent))
    image = Image(BLOCKS * MIB)
    for number, entry in entries:
        struct.pack_into("<Q", data, image.entry_at(number), entry)
    if over_parent:
        struct.pack_into("<Q", data, image.bitmap_entry_at(0), bitmap)
        data[BLOCKS_AT : BLOCKS_AT + BLOCKS * 256] = (bits * 20000)[: BLOCKS * 256]
    path = tmp_path / "a.vhdx"
    path.write_bytes(data)
    (tmp_path / "p.vhdx").write_bytes(Image(MIB, data=PARENT_GUID).build())
    try:
        disk = tapfs.open(path, writable=writable)
    except ImageError as error:
        if writable and error.kind is ErrorKind.READ_ONLY:
            return  # what is damaged is not written
        raise
    with disk:
        unit = disk.layers[0].driver.geometry.map_unit
        for start in range(0, disk.size, unit):
            end = min(start + unit, disk.size)
            expected: list[MappedExtent] | None
            try:
                expected = list(merge_mapped(map_chain(disk.layers, start, end - start)))
            except ImageError:
                expected = None
            found: list[MappedExtent] | None
            try:
                blocks = list(map_blocks(disk.engine_disk, start, end, ask))
                paths = [[str(path)], [str(tmp_path / "p.vhdx")]][: len(disk.layers)]
                found = list(merge_mapped(run for block in blocks for run in mapped_extents(block, paths)))
            except AskedError:
                found = None
            assert found == expected
        disk.abandon()


def test_a_good_table_costs_no_question(tmp_path: Path) -> None:
    """The other half of the property: what is right is not left to the driver, and a flush brings it back there."""
    image = Image(
        3 * MIB,
        blocks={0: (PRESENT, b"a" * MIB), 2: (PARTIAL, b"b" * MIB)},
        sectors={2: range(0, 2048, 2)},
        parent=named_parent("p.vhdx"),
    )
    (tmp_path / "a.vhdx").write_bytes(image.build())
    (tmp_path / "p.vhdx").write_bytes(Image(MIB, data=PARENT_GUID).build())
    with tapfs.open(tmp_path / "a.vhdx", writable=True) as disk:
        assert sum(map(len, map_blocks(disk.engine_disk, 0, disk.size, ask))) > 1024
        disk.write(2 * MIB, b"in place")
        assert disk.unflushed_bytes == 0
        disk.write(2 * MIB + 512, b"beside it")
        assert disk.unflushed_bytes > 0
        disk.flush()
        disk.write(MIB, b"new")
        disk.flush()
        assert sum(map(len, map_blocks(disk.engine_disk, 0, disk.size, ask))) > 1023
        assert disk.read(2 * MIB, 1024) == (b"in place" + b"b" * 504) + (b"beside it" + bytes(503))
