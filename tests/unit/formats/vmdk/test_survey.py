"""The quick look at an extent before it is written calls none plain in which the thorough one finds a fault."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapfs.errors import ImageError
from tapfs.formats.apart import require_apart
from tapfs.formats.vmdk.extent_writer import ExtentWriter
from tapfs.formats.vmdk.host_extents import CowdExtent, HostedExtent, open_host_extent
from tapfs.formats.vmdk.parts import SparsePart
from tapfs.formats.vmdk.survey import is_plain
from tapfs.testing.model import MemoryFile
from tests.vmdk_images import cowd, hosted, random_grains

MIB = 1 << 20
SIZE = 9 * MIB
GRAIN = 8192
KINDS = {
    "hosted": hosted(random_grains(random.Random(1), SIZE, GRAIN), SIZE, grain_sectors=16),
    "zeroed": hosted(random_grains(random.Random(2), SIZE, GRAIN, zeros=True), SIZE, grain_sectors=16, flags=7),
    "no redundant": hosted(random_grains(random.Random(3), SIZE, GRAIN), SIZE, grain_sectors=16, redundant=False),
    "cowd": cowd(random_grains(random.Random(4), SIZE, 512), SIZE),
}


def writer_of(content: bytes) -> ExtentWriter:
    extent = open_host_extent(0, MemoryFile(content), strict=True)
    assert isinstance(extent, HostedExtent | CowdExtent)
    extent.tables.disk_bytes = SIZE
    return ExtentWriter(extent, SparsePart(0, SIZE, 0, extent.tables, writable=True), has_backing=False)


def is_sound(writer: ExtentWriter) -> bool:
    try:
        require_apart(writer.places(), 512, writer.path, what="grains or tables")
    except ImageError:
        return False
    return True


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_good_extent_is_plain(kind: str) -> None:
    writer = writer_of(KINDS[kind])
    assert is_sound(writer)
    assert is_plain(writer.tables)


@given(
    kind=st.sampled_from(sorted(KINDS)),
    changes=st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 3000), st.integers(0, 2)), min_size=1, max_size=3),
    cut=st.sampled_from([0, 0, 0, 1, 512, GRAIN]),
)
def test_what_is_plain_is_sound(kind: str, changes: list[tuple[int, int, int]], cut: int) -> None:
    content = bytearray(KINDS[kind])
    directory = 4 if kind == "cowd" else struct.unpack_from("<Q", content, 56)[0]
    table = struct.unpack_from("<I", content, directory * 512)[0] * 512
    for at, value, what in changes:
        # An entry becomes another entry, any sector of the file, or any number.
        other = struct.unpack_from("<I", content, table + 4 * (value % 512))[0]
        word = (other, value * 16 % (len(content) // 512), value << 20)[what]
        struct.pack_into("<I", content, table + 4 * (at % 512), word)
    try:
        writer = writer_of(bytes(content[: len(content) - cut]))
        plain = is_plain(writer.tables)
    except ImageError:
        return
    assert is_sound(writer) or not plain
