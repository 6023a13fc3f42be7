"""The engine's decoder of tables against `Driver.map`: for any bytes the same extents, or the unit is left to `map`."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tapfs
from tapfs import ImageError
from tapfs.disk.chain_map import MappedExtent, map_chain, mapped_extents, merge_mapped
from tapfs.extent import Extent, Kind
from tapfs.formats.qcow import writer
from tapfs.kernel.chain_map import map_blocks
from tapfs.kernel.engine import HostDescriptor, Outcome
from tapfs.kernel.tables import set_tables
from tests.table_formats import (
    ExtendedL2,
    ExternalData,
    Grains,
    SeSparse,
    Synthetic,
    Vdi,
    Vhd,
    Vhdx,
    VhdZeros,
    WrongError,
    packed_words,
)
from tests.unit.engine.engine_disks import Disk, open_host

L1_AT = 48
#: Bytes that the last block of a disk lacks.
SHORT = 512


@pytest.fixture(autouse=True)
def any_owners(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images in which entries share clusters are opened for writing, too, without the look that refuses them."""
    monkeypatch.setattr(writer, "require_owners", lambda *_: None)


class Damaged(NamedTuple):
    """A qcow image: its virtual size, cluster bits, and the entries of two L2 tables."""

    size: int
    cluster_bits: int
    tables: tuple[tuple[int, ...], tuple[int, ...]]
    second_table: int

    def content(self) -> bytes:
        cluster = 1 << self.cluster_bits
        first = 4 * cluster
        head = struct.pack(
            ">IIQIIQBBHIQ", 0x514649FB, 1, 0, 0, 0, self.size, self.cluster_bits, self.cluster_bits - 3, 0, 0, L1_AT
        )
        head += struct.pack(">QQ", first, self.second_table)
        tables = b"".join(struct.pack(f">{len(entries)}Q", *entries) for entries in self.tables)
        return head.ljust(first, b"\0") + tables + bytes(20 * cluster)


@st.composite
def entries(draw: st.DrawFn, cluster_bits: int) -> tuple[int, ...]:
    """A table: runs of plain clusters, holes, compressed clusters, and words that cannot be true."""
    cluster, count = 1 << cluster_bits, 1 << (cluster_bits - 3)
    file_size = 26 * cluster
    table: list[int] = []
    while len(table) < count:
        length = draw(st.integers(1, count))
        kind = draw(st.sampled_from(["hole", "run", "run", "compressed", "edge", "any"]))
        if kind == "hole":
            table += [0] * length
        elif kind == "run":
            start = draw(st.integers(6, 25)) * cluster
            table += range(start, min(start + length * cluster, file_size), cluster)
        elif kind == "compressed":
            place = draw(st.integers(cluster, file_size - 1))
            size = draw(st.integers(0, cluster - 1))
            table.append(1 << 63 | size << (63 - cluster_bits) | place)
        elif kind == "edge":
            edges = [1, 47, 48, 64, 512, cluster, file_size - 512, file_size, file_size - cluster, 6 * cluster + 256]
            table.append(draw(st.sampled_from(edges)) | draw(st.sampled_from([0, 1 << 62, 1 << 63])))
        else:
            table.append(draw(st.integers(0, (1 << 64) - 1)))
    return tuple(table[:count])


@st.composite
def images(draw: st.DrawFn) -> Damaged:
    cluster_bits = draw(st.integers(9, 11))
    unit = 1 << (2 * cluster_bits - 3)
    size = draw(st.integers(unit + 1, 2 * unit))
    tables = (draw(entries(cluster_bits)), draw(entries(cluster_bits)))
    good = 5 << cluster_bits
    second = draw(st.sampled_from([good, good, good, 0, 1 << cluster_bits, good + 512, 26 << cluster_bits]))
    return Damaged(size, cluster_bits, tables, second)


class AskedError(Exception):
    """The engine has left the unit to the driver."""


def ask(outcome: Outcome) -> None:
    raise AskedError


@given(image=images(), writable=st.booleans())
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_table_means_to_the_engine_what_it_means_to_the_driver(
    tmp_path: Path, image: Damaged, *, writable: bool
) -> None:
    path = tmp_path / "a.qcow"
    path.write_bytes(image.content())
    try:
        disk = tapfs.open(path, format="qcow", writable=writable)
    except ImageError:
        return  # the L1 table is refused whole
    unit = 1 << (2 * image.cluster_bits - 3)
    with disk:
        for start in range(0, disk.size, unit):
            length = min(unit, disk.size - start)
            expected: list[MappedExtent] | None
            try:
                expected = list(merge_mapped(map_chain(disk.layers, start, length)))
            except ImageError:
                expected = None
            found: list[MappedExtent] | None
            try:
                blocks = list(map_blocks(disk.engine_disk, start, start + length, ask))
                paths = [[str(path)]]
                found = list(merge_mapped(run for block in blocks for run in mapped_extents(block, paths)))
            except AskedError:
                found = None
            assert found == expected
        disk.abandon()


@pytest.mark.parametrize("writable", [False, True])
def test_a_good_table_costs_no_question(tmp_path: Path, *, writable: bool) -> None:
    """The other half of the property: what is right is not left to the driver."""
    cluster = 512
    table = tuple(0 if i % 3 else (6 + i % 20) * cluster for i in range(64))
    image = Damaged(2 * 64 * cluster, 9, (table, table), 5 * cluster)
    (tmp_path / "a.qcow").write_bytes(image.content())
    with tapfs.open(tmp_path / "a.qcow", writable=writable) as disk:
        blocks = list(map_blocks(disk.engine_disk, 0, disk.size, ask))
        assert sum(len(block) for block in blocks) > 64
        assert disk.statistics().cache_fills == 2
        if writable:  # in place, by the table that the engine has read
            disk.write(0, b"x" * 512)
            assert disk.unflushed_bytes == 0


#: Of each shape: words that are likely to mean something, of which a table is made, and masks that disturb them.
WORDS: dict[type[Synthetic], tuple[list[int], list[int]]] = {
    Vhd: ([0xFFFFFFFF, *range(16, 48)], [1 << 31, 1 << 8]),
    VhdZeros: ([0xFFFFFFFF, *range(16, 48)], [1 << 31, 1 << 8]),
    Vhdx: (
        [*range(4), *(place << 12 | state for place in range(2, 7) for state in (6, 7))],
        [0, 1 << 63, 8, 1 << 11, 5, 1 << 40],
    ),
    ExtendedL2: (
        [
            0,
            *(place << 76 | bits for place in range(2, 7) for bits in (0, 0xFFFFFFFF, 0xFFFF0000, 0xF0F00000_0F0F0000)),
            *(1 << 126 | sectors << 120 | place << 64 for sectors in (0, 3, 63) for place in (8192, 9001, 20000)),
        ],
        [1, 1 << 64, 1 << 74, 1 << 32, 1 << 33, 3 << 49, 1 << 77, 1 << 79, 1 << 127, 1 << 110],
    ),
    Vdi: ([0xFFFFFFFF, 0xFFFFFFFE, *range(5)], [1 << 30]),
    Grains: ([*range(2), *range(16, 55)], [1 << 31]),
    SeSparse: (
        [0, 1 << 60, 2 << 60, *(3 << 60 | number << 48 for number in range(8))],
        [1, 4 << 60, 1 << 39, 1 << 47, 1 << 20],
    ),
    ExternalData: ([0, 1, 1 << 63, *(1 << 63 | place << 12 for place in range(10)), 3 << 12], [1, 1 << 62, 2048]),
}


@st.composite
def synthetics(draw: st.DrawFn) -> Synthetic:
    """An image of any shape whose words are likely ones but for a few, in a file of random bytes."""
    shape = draw(st.sampled_from(list(WORDS)))
    likely, masks = WORDS[shape]
    width = shape.entry_bytes
    words = draw(st.lists(st.sampled_from(likely), min_size=16, max_size=16))
    if issubclass(shape, Vhdx):  # the words that say where the bits are
        words[4::5] = draw(st.lists(st.sampled_from([2 << 12 | 6, 6 << 12 | 6, 7 << 12 | 6]), min_size=3, max_size=3))
    for at in draw(st.lists(st.integers(0, 15), max_size=3)):
        words[at] = draw(st.one_of(st.sampled_from(masks).map(words[at].__xor__), st.integers(0, (1 << 8 * width) - 1)))
    size = draw(st.integers(28000, 40000))
    noise = random.Random(draw(st.integers(0, 1 << 30))).randbytes(size)
    if draw(st.booleans()):
        noise = bytes(255 if byte & 1 else 0 for byte in noise)  # bits in whole bytes
    table = packed_words(shape.order, width, words)
    content = noise[:4096] + table + noise[4096 + len(table) :]
    short = draw(st.sampled_from([0, 0, shape.granule, shape.block - shape.granule, 1]))
    short = short if short < shape.block else 0
    return shape(content, draw(st.integers(1, 12)), short, data_size=draw(st.sampled_from([50000, 0, 9000, 40000])))


def engine_map(disk: Disk, start: int, end: int) -> list[tuple[int, int, Kind, int, int]] | None:
    try:
        blocks = list(map_blocks(disk, start, end, ask))
    except AskedError:
        return None
    runs = [
        (offset, length, Kind(kind), file, host) for run in blocks for offset, length, host, _, file, kind, _ in run
    ]
    assert sum(length for _, length, *_ in runs) == end - start
    return runs


def as_mapped(extents: list[Extent], end: int) -> list[tuple[int, int, Kind, int, int]]:
    """The extents as `map_blocks` gives them: clipped, compressed ones joined and without a place."""
    runs: list[tuple[int, int, Kind, int, int]] = []
    for extent in extents:
        length, host = min(extent.end, end) - extent.offset, extent.host_offset if extent.kind == Kind.DATA else 0
        if runs and extent.kind == Kind.COMPRESSED == runs[-1][2]:
            runs[-1] = (runs[-1][0], runs[-1][1] + length, *runs[-1][2:])
        else:
            runs.append((extent.offset, length, extent.kind, extent.file, host))
    return runs


def expected_unit(image: Synthetic, number: int) -> list[Extent] | None:
    try:
        return image.unit(number)
    except WrongError:
        return None


def described(folder: Path, image: Synthetic) -> Disk:
    """An engine disk that knows the image by its layout alone."""
    path, data = folder / "image", folder / "data"
    path.write_bytes(image.content)
    data.write_bytes(bytes(image.data_size))
    disk = Disk()
    disk.descriptors = [open_host(path, direct=False), open_host(data, direct=False)]
    files = [HostDescriptor(descriptor, "") for descriptor in disk.descriptors]
    disk.add_layer(image.geometry, files=files)
    set_tables(disk, 0, image.layout, image.places)
    return disk


@given(image=synthetics())
@settings(deadline=None, max_examples=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_shape_of_table_means_to_the_engine_what_its_description_says(tmp_path: Path, image: Synthetic) -> None:
    unit = image.geometry.map_unit
    with described(tmp_path, image) as disk:
        for number in range(-(-image.size // unit)):
            start, end = number * unit, min((number + 1) * unit, image.size)
            expected = expected_unit(image, number)
            assert engine_map(disk, start, end) == (None if expected is None else as_mapped(expected, end))
            for extent in expected or ():
                if extent.kind == Kind.COMPRESSED and isinstance(image, ExtendedL2):
                    with pytest.raises(ImageError) as caught:  # random bytes are no frame; the place is named
                        disk.read(extent.offset, 1)
                    assert caught.value.offset == extent.host_offset
                elif extent.kind == Kind.DATA and extent.file == 0:  # a cached run, from its middle
                    at = extent.offset + (min(extent.end, end) - extent.offset) // 2
                    found = image.content[extent.host_offset + at - extent.offset :][:1]
                    assert disk.read(at, 1) == (found or b"\0")


@pytest.mark.parametrize("shape", WORDS)
def test_a_good_table_of_every_shape_costs_no_question(tmp_path: Path, shape: type[Synthetic]) -> None:
    """The other half of the property for each shape."""
    good: dict[type[Synthetic], list[int]] = {
        Vhd: [0xFFFFFFFF, 16, 30, 45],
        VhdZeros: [0xFFFFFFFF, 16, 30, 45],
        Vhdx: [0, 2, 3 << 12 | 6, 4 << 12 | 7, 5 << 12 | 6],
        ExtendedL2: [0, 2 << 76 | 0xFF00, 4 << 76 | 0xFFFF << 32 | 0xFF0000, 1 << 126 | 2 << 120 | 9001 << 64],
        Vdi: [0xFFFFFFFF, 0xFFFFFFFE, 0, 2],
        Grains: [0, 1, 16, 33],
        SeSparse: [0, 1 << 60, 2 << 60, 3 << 60 | 2 << 48],
        ExternalData: [0, 1, 1 << 63, 1 << 63 | 4096],
    }
    words = [good[shape][i % len(good[shape])] for i in range(5)] * 2
    table = packed_words(shape.order, shape.entry_bytes, words)
    image = shape(bytes([0x5A]) * 4096 + table + bytes([0x5A]) * 40000, 8, data_size=8192)
    with described(tmp_path, image) as disk:
        runs = engine_map(disk, 0, image.size)
        assert runs is not None
        assert len({kind for _, _, kind, _, _ in runs}) > 1
        assert disk.statistics().cache_fills == len(image.places)


class LargeVhdx(Vhdx):
    """Map units of 1024 entries, more than a page of the table, and 1 KiB of bits."""

    unit_blocks = ratio = 1024


def test_a_large_table_is_read_in_pieces(tmp_path: Path) -> None:
    """Tables and bits of more than a page: each piece is right, and a wrong entry costs its own piece alone."""
    choice = random.Random(4)
    places = [place << 12 | state for place in range(2, 15) for state in (6, 7, 7)]
    table = [choice.choice([0, 0, 2, *places]) for _ in range(2 * 1025)]
    table[1024], table[2049] = 2 << 12 | 6, 9 << 12 | 6
    content = choice.randbytes(65536) + packed_words("little", 8, table)
    image = LargeVhdx(content, 1500, short=SHORT, table_at=65536)
    with described(tmp_path, image) as disk:
        for number in range(2):
            start, end = number * image.geometry.map_unit, min((number + 1) * image.geometry.map_unit, image.size)
            assert engine_map(disk, start, end) == as_mapped(image.unit(number), end)
        assert 2 < disk.statistics().cache_fills <= 16
    wrong = bytearray(content)
    wrong[65536 + 700 * 8] = 5
    image = LargeVhdx(bytes(wrong), 1500, short=SHORT, table_at=65536)
    with described(tmp_path, image) as disk:
        assert engine_map(disk, 0, 512 * 4096) is not None
        assert engine_map(disk, 700 * 4096, 701 * 4096) is None
        assert engine_map(disk, 1400 * 4096, image.size) is not None


def test_entries_that_are_the_same_have_bits_of_their_own(tmp_path: Path) -> None:
    """Two blocks of one place, all bits of the first clear: the second was taken for a repetition of it."""
    content = bytearray(28000)
    struct.pack_into("<2Q", content, 4096 + 5 * 8, 0x2007, 0x2007)
    struct.pack_into("<Q", content, 4096 + 9 * 8, 0x2006)
    content[0x2001] = 0xFF
    image = Vhdx(bytes(content), blocks=6, data_size=50000)
    expected = expected_unit(image, 2)
    assert expected is not None
    with described(tmp_path, image) as disk:
        assert engine_map(disk, 16384, 24576) == as_mapped(expected, 24576)
        assert [extent.kind for extent in expected] == [Kind.UNALLOCATED, Kind.DATA]
