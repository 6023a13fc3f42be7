"""The engine's decoder of a VHD's table and bitmaps against `Driver.map`, for tables that nobody would write."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tapfs
from tapfs import ImageError
from tapfs.disk.chain_map import map_chain, mapped_extents, merge_mapped
from tapfs.kernel.chain_map import map_blocks
from tests.property.test_table_decoder import AskedError, ask
from tests.vhd_images import Block, Vhd

BLOCK = 4096
#: Where the first block of the images lies that have no batmap.
FIRST = 2048


@dataclass(frozen=True)
class Damaged:
    """An image of 12 blocks in a file of noise; `words` are the entries of its table."""

    words: tuple[int, ...]
    noise: int
    cut: int
    creator: bytes
    version: int
    batmap: tuple[bool, ...] | None

    def content(self) -> bytes:
        choice = random.Random(self.noise)
        blocks = {index: Block(choice.randbytes(BLOCK)) for index in range(12)}
        image = Vhd(
            size=12 * BLOCK - self.cut,
            block_size=BLOCK,
            blocks=blocks,
            creator=self.creator,
            creator_version=self.version,
            batmap=self.batmap,
        )
        raw = bytearray(image.content())
        for at in range(FIRST, len(raw) - 512, 512):  # any of these may be a bitmap
            raw[at] = choice.choice([0, 255, choice.randrange(256)])
        if self.batmap is not None:
            raw[FIRST : FIRST + 1024] = image.content()[FIRST : FIRST + 1024]
        for index, word in enumerate(self.words):
            raw[1536 + 4 * index : 1540 + 4 * index] = word.to_bytes(4, "big")
        return bytes(raw)


@st.composite
def images(draw: st.DrawFn) -> Damaged:
    likely = [0xFFFFFFFF, *range(4, 110)]
    words = draw(st.lists(st.sampled_from(likely), min_size=12, max_size=12))
    for at in draw(st.lists(st.integers(0, 11), max_size=3)):
        words[at] = draw(st.one_of(st.integers(0, 6), st.integers(95, 120), st.integers(0, 0xFFFFFFFF)))
    creator, version, batmap = draw(
        st.sampled_from([(b"win ", 0, False), (b"tap\0", 0x10003, True), (b"tap\0", 1, False)])
    )
    full = tuple(draw(st.lists(st.booleans(), min_size=12, max_size=12))) if batmap else None
    return Damaged(
        tuple(words),
        draw(st.integers(0, 1000)),
        draw(st.sampled_from([0, 512, 3584, 100])),
        creator,
        version,
        full,
    )


@given(image=images(), writable=st.booleans())
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_table_means_to_the_engine_what_it_means_to_the_driver(
    tmp_path: Path, image: Damaged, *, writable: bool
) -> None:
    path = tmp_path / "a.vhd"
    path.write_bytes(image.content())
    try:
        disk = tapfs.open(path, format="vhd", writable=writable)
    except ImageError:
        return  # not to be written
    with disk:
        for index in range(12):
            start, end = index * BLOCK, min((index + 1) * BLOCK, disk.size)
            try:
                expected = list(merge_mapped(map_chain(disk.layers, start, end - start)))
            except ImageError:
                expected = None
            try:
                blocks = list(map_blocks(disk.engine_disk, start, end, ask))
                found = list(merge_mapped(run for block in blocks for run in mapped_extents(block, [[str(path)]])))
            except AskedError:
                found = None
            if found is None and image.batmap is not None and image.batmap[index]:
                continue  # the bitmap of a full block does not count, and only the driver knows that
            assert found == expected
        disk.abandon()


@pytest.mark.parametrize("writable", [False, True])
def test_good_blocks_cost_no_question(tmp_path: Path, *, writable: bool) -> None:
    """The other half of the property: what is right is not left to the driver."""
    choice = random.Random(1)
    blocks = {
        index: Block(choice.randbytes(BLOCK), (True,) * 3 + (False,) * 5 if index % 2 else None) for index in (0, 3, 5)
    }
    path = tmp_path / "a.vhd"
    path.write_bytes(Vhd(size=8 * BLOCK, block_size=BLOCK, blocks=blocks).content())
    with tapfs.open(path, writable=writable) as disk:
        list(map_blocks(disk.engine_disk, 0, disk.size, ask))
        assert disk.statistics().cache_fills == 8
        if writable:  # in place, by the table and the bitmap that the engine has read
            disk.write(5 * BLOCK + 512, b"x" * 1024)
            assert disk.unflushed_bytes == 0
            disk.write(5 * BLOCK + 2048, b"x" * 512)
            assert disk.unflushed_bytes > 0


def test_what_is_not_flushed_is_left_to_the_driver(tmp_path: Path) -> None:
    path = tmp_path / "a.vhd"
    path.write_bytes(Vhd(size=8 * BLOCK, block_size=BLOCK).content())
    with tapfs.open(path, writable=True) as disk:
        for index in (1, 6, 2):
            disk.write(index * BLOCK, bytes([index]) * 700)
            assert disk.read(index * BLOCK, 700) == bytes([index]) * 700
            disk.flush()
            list(map_blocks(disk.engine_disk, 0, disk.size, ask))
        disk.discard(BLOCK, BLOCK)
        assert not any(disk.read(BLOCK, BLOCK))
        disk.flush()
        list(map_blocks(disk.engine_disk, 0, disk.size, ask))
        assert disk.read(6 * BLOCK, 700) == bytes([6]) * 700
