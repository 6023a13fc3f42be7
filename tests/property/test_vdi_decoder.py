"""The engine's decoder of a VDI's map against `Driver.map`, for maps that nobody would write."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tapfs
from tapfs import ErrorKind, ImageError
from tapfs.disk.chain_map import map_chain, mapped_extents, merge_mapped
from tapfs.kernel.chain_map import map_blocks
from tests.property.test_table_decoder import AskedError, ask
from tests.vdi_images import FREE, MIB, SMALL, ZERO, VdiImage

BLOCKS = 1200  # two map units


class Damaged(NamedTuple):
    """A map, the bytes before each block, how much the disk and the file lack at their ends."""

    words: tuple[int, ...]
    extra: int
    cut_disk: int
    cut_file: int

    def write(self, path: Path) -> None:
        """The image, with room for 8 slots and no data in them."""
        image = VdiImage(BLOCKS * SMALL - self.cut_disk, self.words, {}, block=SMALL, extra=self.extra)
        path.write_bytes(image.content())
        with path.open("r+b") as file:
            file.truncate(2 * MIB + 8 * (SMALL + self.extra) - self.cut_file)


#: A piece of a map: blocks without a place, blocks in order, and words at the edges of what may be.
PIECES = st.one_of(
    st.tuples(st.sampled_from([FREE, ZERO]), st.sampled_from([1, 8, 300])).map(lambda run: [run[0]] * run[1]),
    st.integers(1, 8).map(lambda length: list(range(length))),
    st.sampled_from([5, 6, 7, 7, 8, 9, 0xFFFFFFFC, 0xFFFFFFFD]).map(lambda word: [word]),
    st.integers(0, 0xFFFFFFFF).map(lambda word: [word]),
)


@st.composite
def images(draw: st.DrawFn) -> Damaged:
    pieces = draw(st.lists(PIECES, max_size=8))
    words = [word for piece in pieces for word in piece][: BLOCKS - 1]
    rest = draw(st.sampled_from([FREE, ZERO]))
    words += [rest] * (BLOCKS - 1 - len(words)) + [draw(st.sampled_from([FREE, 6, 7]))]
    return Damaged(
        tuple(words),
        draw(st.sampled_from([0, 512, SMALL - 512])),
        draw(st.sampled_from([0, 512, 4096])),
        draw(st.sampled_from([0, 512, 4096, SMALL])),
    )


@given(image=images(), writable=st.booleans())
@settings(
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
def test_any_map_means_to_the_engine_what_it_means_to_the_driver(
    tmp_path: Path, image: Damaged, *, writable: bool
) -> None:
    path = tmp_path / "a.vdi"
    image.write(path)
    try:
        disk = tapfs.open(path, writable=writable)
    except ImageError as error:
        if writable and error.kind is ErrorKind.READ_ONLY:
            return  # what is damaged is not written
        raise
    with disk:
        unit = disk.layers[0].driver.geometry.map_unit
        for start in range(0, disk.size, unit):
            length = min(unit, disk.size - start)
            try:
                expected = list(merge_mapped(map_chain(disk.layers, start, length)))
            except ImageError:
                expected = None
            try:
                blocks = list(map_blocks(disk.engine_disk, start, start + length, ask))
                found = list(merge_mapped(run for block in blocks for run in mapped_extents(block, [[str(path)]])))
            except AskedError:
                found = None
            assert found == expected
        disk.abandon()


@pytest.mark.parametrize("extra", [0, 512])
def test_a_good_map_costs_no_question(tmp_path: Path, extra: int) -> None:
    words = tuple(index % 8 if index < 8 else FREE if index % 3 else ZERO for index in range(BLOCKS))
    Damaged(words, extra, 0, 0).write(tmp_path / "a.vdi")
    with tapfs.open(tmp_path / "a.vdi", writable=True) as disk:
        assert sum(len(block) for block in map_blocks(disk.engine_disk, 0, disk.size, ask)) > 100
        disk.write(0, b"x" * 512)  # in place, by the map that the engine has read
        assert disk.unflushed_bytes == 0
