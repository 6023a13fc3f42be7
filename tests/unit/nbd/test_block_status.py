"""Block status: the bitmaps that are offered beside the allocation, and which disks have none to offer."""

from __future__ import annotations

from pathlib import Path

import pytest

import tapfs
from tapfs import NewImage
from tapfs.nbd.block_status import ALLOCATION, contexts_of
from tests import nbd_client as nbd
from tests.unit.nbd.served import Served

MIB = 1 << 20
MONDAY = "qemu:dirty-bitmap:monday"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A snapshot, and since then two ranges of 64 KiB that were written and marked."""
    path = tmp_path / "image.qcow2"
    tapfs.create_image(path, NewImage("qcow2", 4 * MIB))
    tapfs.create_snapshot(path, "before")
    tapfs.add_bitmap(path, "monday")
    with tapfs.open(path, writable=True) as disk:
        disk.write(MIB, b"\1" * 65536)
        disk.write(3 * MIB, b"\2" * 65536)
    return path


@pytest.mark.parametrize("style", [nbd.STRUCTURED, nbd.EXTENDED])
def test_a_client_is_told_what_a_bitmap_marks(image: Path, style: int) -> None:
    with Served(tapfs.open(image)) as server:
        assert server.export.contexts == (ALLOCATION, MONDAY)
        client = server.connect(style, contexts=0b10)
        asked = client.ask(nbd.BLOCK_STATUS, 65536, 4 * MIB - 65536)
        between = 2 * MIB - 65536
        assert asked.states == {1: [(MIB - 65536, 0), (65536, 1), (between, 0), (65536, 1), (MIB - 65536, 0)]}
        asked = client.ask(nbd.BLOCK_STATUS, MIB + 4096, 8192, flags=nbd.REQ_ONE)
        assert asked.states == {1: [(8192, 1)]}


def test_a_snapshot_and_a_disk_that_can_be_written_offer_no_bitmaps(image: Path) -> None:
    """The bitmaps say what has changed in the current disk, not in the snapshot."""
    with tapfs.open(image, snapshot="before") as disk:
        assert list(contexts_of(disk)) == [ALLOCATION]
    with tapfs.open(image, writable=True) as disk:
        assert list(contexts_of(disk)) == [ALLOCATION]


def test_a_bitmap_whose_name_is_no_text_is_not_offered(image: Path) -> None:
    image.write_bytes(image.read_bytes().replace(b"monday", b"mon\xffay"))
    with tapfs.open(image) as disk:
        assert list(contexts_of(disk)) == [ALLOCATION]
