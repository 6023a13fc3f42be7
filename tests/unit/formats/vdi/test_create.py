"""New VDI images: their layout, their options, and what they refuse."""

from __future__ import annotations

import struct
from itertools import pairwise

import pytest

from tapfs.driver import BackingReference, CreateRequest, OpenRequest
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Extent, Kind
from tapfs.formats.vdi import FORMAT, create
from tapfs.plan import Write
from tapfs.testing.model import MemoryFile
from tests.vdi_images import CREATION, MIB, MODIFICATION, VdiImage


def created(size: int, **options: str) -> MemoryFile:
    file = MemoryFile()
    file.apply(FORMAT.create(CreateRequest(size, options=options)))
    return file


def test_a_new_image_grows_and_is_virtualboxs_in_its_places() -> None:
    file = created(300 * MIB + 1)
    head = bytes(file.data[:512])
    assert head.startswith(b"<<< Oracle VM VirtualBox Disk Image >>>\n")
    assert struct.unpack_from("<IIII", head, 64) == (0xBEDA107F, 0x10001, 0x190, 1)
    map_at, data_at = struct.unpack_from("<II", head, 340)
    size, block, extra, blocks, allocated = struct.unpack_from("<QIIII", head, 368)
    assert (size, block, extra, blocks, allocated) == (300 * MIB + 512, MIB, 0, 301, 0)
    assert (map_at, data_at, file.size()) == (MIB, 2 * MIB, 2 * MIB)
    assert file.data[map_at : map_at + 4 * 301] == b"\xff" * 4 * 301
    assert len({bytes(head[at : at + 16]) for at in (392, 408)} | {bytes(16)}) == 3
    assert head[424:456] == bytes(32)
    assert struct.unpack_from("<IIII", head, 456) == (0, 0, 0, 512)


def test_the_map_of_a_large_disk_ends_before_the_data() -> None:
    file = created(600 << 30)
    driver = FORMAT.open(file, OpenRequest())
    assert driver.details()["data_offset"] == 4 * MIB  # 600 Ki entries, 2.34 MiB
    assert driver.map(0, 600 << 30) == [Extent(0, 600 << 30, Kind.UNALLOCATED)]


@pytest.mark.parametrize("static", ["on", "off"])
def test_a_map_that_is_written_in_several_pieces(static: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def written() -> bytes:
        (*_, steps, _) = FORMAT.create(CreateRequest(11 * MIB, options={"static": static})).stages
        pieces = [(step.host_offset, step.data) for step in steps if isinstance(step, Write)]
        assert all(at + len(data) == after for (at, data), (after, _) in pairwise(pieces))
        return b"".join(data for _, data in pieces)

    whole = written()
    assert len(whole) == 4 * 11
    monkeypatch.setattr(create, "_PIECE_ENTRIES", 4)
    assert written() == whole


@pytest.mark.parametrize("options", [{"static": "on"}, {"preallocation": "metadata"}])
def test_a_fixed_image_has_all_blocks_in_order(options: dict[str, str]) -> None:
    file = created(3 * MIB - 512, **options)
    driver = FORMAT.open(file, OpenRequest())
    assert file.size() == 5 * MIB
    assert driver.details()["type"] == "fixed"
    assert driver.details()["allocated_blocks"] == 3
    assert driver.map(0, 3 * MIB - 512) == [Extent(0, 3 * MIB, Kind.DATA, host_offset=2 * MIB)]
    assert driver.check().findings == []


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        (0, {}, "of 0 bytes"),
        (0x1FFFFF80 * MIB + 1, {}, "too many"),
        (MIB, {"static": "yes"}, "static=yes"),
        (MIB, {"preallocation": "some"}, "preallocation=some"),
        (MIB, {"block_size": "1M"}, "unknown option 'block_size'"),
    ],
)
def test_what_cannot_be_made_is_refused(size: int, options: dict[str, str], message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        FORMAT.create(CreateRequest(size, options=options))
    assert caught.value.op == "create"


def test_encryption_is_refused() -> None:
    with pytest.raises(ImageError, match="encrypted"):
        FORMAT.create(CreateRequest(MIB, encrypted=True))


def test_a_differencing_image_has_the_uuids_of_its_parent() -> None:
    parent = FORMAT.open(MemoryFile(VdiImage(MIB, [0xFFFFFFFF]).content()), OpenRequest())
    file = MemoryFile()
    file.apply(FORMAT.create(CreateRequest(MIB, BackingReference("base.vdi", "vdi"), parent=parent)))
    assert struct.unpack_from("<I", file.data, 76) == (4,)
    assert file.data[424:456] == CREATION.bytes_le + MODIFICATION.bytes_le
    with pytest.raises(ImageError, match="fixed"):
        FORMAT.create(CreateRequest(MIB, BackingReference("base.vdi"), options={"static": "on"}, parent=parent))


def test_a_parent_without_a_uuid_is_refused() -> None:
    null = VdiImage(MIB, [0xFFFFFFFF])
    null.creation = type(null.creation)(int=0)
    parent = FORMAT.open(MemoryFile(null.content()), OpenRequest())
    with pytest.raises(ImageError, match="the parent has none") as caught:
        FORMAT.create(CreateRequest(MIB, BackingReference("base.vdi"), parent=parent))
    assert caught.value.kind is ErrorKind.UNSUPPORTED
