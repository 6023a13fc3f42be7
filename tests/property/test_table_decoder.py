"""The engine's decoder of tables against `Driver.map`: for any bytes the same extents, or the unit is left to `map`."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tapfs
from tapfs import ImageError
from tapfs.disk.chain_map import MappedExtent, map_chain, mapped_extents, merge_mapped
from tapfs.kernel.chain_map import map_blocks
from tapfs.kernel.engine import Outcome

L1_AT = 48


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
