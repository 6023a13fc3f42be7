"""The engine's decoder of a VMDK's tables against `Driver.map`, for every kind of extent and any words."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tapfs
from tapfs import ImageError
from tapfs.disk.chain_map import MappedExtent, map_chain, mapped_extents, merge_mapped
from tapfs.kernel.chain_map import map_blocks
from tests.property.test_table_decoder import AskedError, ask
from tests.vmdk_images import ZERO, cowd, descriptor, monolithic, random_grains, sectors, sesparse, stream

GRAIN = 16 * 512


class Kind(NamedTuple):
    """A kind of image: its disk, its builder, and the type in its line, if the extent is a file of its own."""

    size: int
    build: Callable[[dict[int, bytes], int], bytes]
    type: str
    grain: int
    entry_bytes: int = 4


def monolithic_zeroed(grains: dict[int, bytes], size: int) -> bytes:
    return monolithic(grains | {3: ZERO}, size)


def monolithic_single(grains: dict[int, bytes], size: int) -> bytes:
    return monolithic(grains, size, redundant=False, entries=128)


KINDS = {
    "monolithic": Kind(600 * GRAIN - 512, monolithic, "", GRAIN),
    "zeroed": Kind(600 * GRAIN, monolithic_zeroed, "", GRAIN),
    "single": Kind(200 * GRAIN - 1024, monolithic_single, "", GRAIN),
    "packed": Kind(600 * GRAIN - 3584, lambda grains, size: stream(grains, size, grain_sectors=16), "", GRAIN),
    "packed, in front": Kind(
        600 * GRAIN, lambda grains, size: stream(grains, size, grain_sectors=16, footer=False), "", GRAIN
    ),
    "cowd": Kind(5000 * 512, cowd, "VMFSSPARSE", 512),
    "sesparse": Kind(5000 * 4096, sesparse, "SESPARSE", 4096, 8),
}


def spoiled(kind: str, content: bytes, words: list[tuple[int, int]]) -> bytes:
    """The image with some entries of its first table and its directory replaced: (place, word) each."""
    data = bytearray(content)
    if kind == "cowd":
        directory = 4 * 512
        table = struct.unpack_from("<I", data, directory)[0] * 512
    elif kind == "sesparse":
        directory = struct.unpack_from("<Q", data, 16 * 8)[0] * 512
        table = struct.unpack_from("<Q", data, 18 * 8)[0] * 512
    else:
        directory = struct.unpack_from("<Q", data, 56)[0] * 512
        if directory > len(data):
            directory = struct.unpack_from("<Q", data, len(data) - 1024 + 56)[0] * 512
        table = struct.unpack_from("<I", data, directory)[0] * 512
    width = KINDS[kind].entry_bytes
    for place, word in words:
        at = directory + width * (place - 1000) if place >= 1000 else table + width * place
        if 512 < at < len(data) - width:
            data[at : at + width] = (word % (1 << 8 * width)).to_bytes(width, "little")
    return bytes(data)


WORDS = st.one_of(
    st.integers(0, 1200),
    st.integers(0, (1 << 32) - 1),
    st.integers(0, (1 << 64) - 1),
    st.builds(lambda top, low: top << 60 | low, st.integers(0, 15), st.integers(0, 1 << 60)),
    st.builds(lambda number: 3 << 60 | (number & 0xFFF) << 48 | number >> 12, st.integers(0, 9000)),
)


@given(
    kind=st.sampled_from(sorted(KINDS)),
    seed=st.integers(0, 50),
    words=st.lists(st.tuples(st.one_of(st.integers(0, 127), st.just(1000)), WORDS), max_size=3),
    cut=st.sampled_from([0, 0, 0, 1, 512, 8192]),
)
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_table_means_to_the_engine_what_it_means_to_the_driver(
    tmp_path: Path, kind: str, seed: int, words: list[tuple[int, int]], cut: int
) -> None:
    of = KINDS[kind]
    grains = random_grains(random.Random(seed), 40 * of.grain, of.grain)
    content = spoiled(kind, of.build(grains, of.size), words)
    content = content[: len(content) - cut]
    path = tmp_path / "a.vmdk"
    if of.type:
        (tmp_path / "extent").write_bytes(content)
        content = descriptor([f'RW {sectors(of.size)} {of.type} "extent"'])
    path.write_bytes(content)
    try:
        disk = tapfs.open(path, format="vmdk")
    except ImageError:
        return  # refused whole
    with disk:
        unit = disk.layers[0].driver.geometry.map_unit
        for start in range(0, disk.size, unit):
            end = min(start + unit, disk.size)
            expected: list[MappedExtent] | None
            try:
                expected = list(merge_mapped(map_chain(disk.layers, start, end - start)))
            except ImageError:
                expected = None
            try:
                blocks = list(map_blocks(disk.engine_disk, start, end, ask))
            except AskedError:
                continue  # the driver says what it is
            paths = [[file.path for file in disk.layers[0].files]]
            assert list(merge_mapped(run for block in blocks for run in mapped_extents(block, paths))) == expected


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_good_tables_cost_no_question(tmp_path: Path, kind: str) -> None:
    """The other half of the property: what is right is not left to the driver."""
    of = KINDS[kind]
    content = of.build(random_grains(random.Random(1), of.size, of.grain), of.size)
    path = tmp_path / "a.vmdk"
    if of.type:
        (tmp_path / "extent").write_bytes(content)
        content = descriptor([f'RW {sectors(of.size)} {of.type} "extent"'])
    path.write_bytes(content)
    with tapfs.open(path) as disk:
        expected = list(merge_mapped(map_chain(disk.layers, 0, disk.size)))
        # The bound of the last packed grain reaches into the directory behind it.
        asked = disk.supply_map if kind.startswith("packed") else ask
        blocks = list(map_blocks(disk.engine_disk, 0, disk.size, asked))
        paths = [[file.path for file in disk.layers[0].files]]
        assert list(merge_mapped(run for block in blocks for run in mapped_extents(block, paths))) == expected
        assert len({each.data for each in expected}) == 2
        assert disk.statistics().cache_fills > 0
