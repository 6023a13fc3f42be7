"""Block status: the bitmaps that are offered beside the allocation, and which disks have none to offer."""

from __future__ import annotations

import errno
import random
import struct
from pathlib import Path

import pytest

import tapfs
from tapfs.nbd.block_status import ALLOCATION, contexts_of
from tests import nbd_client as nbd
from tests.unit.nbd.served import Served

MIB = 1 << 20
MONDAY, TUESDAY, STILL = (f"qemu:dirty-bitmap:{name}" for name in ("monday", "tuesday", "still"))


def marked_clusters(states: list[tuple[int, int]]) -> set[int]:
    """The clusters of 64 KiB that a bitmap marks whole."""
    found: set[int] = set()
    at = 0
    for length, bits in states:
        if bits:
            assert (at % 65536, length % 65536) == (0, 0)
            found |= set(range(at >> 16, (at + length) >> 16))
        at += length
    assert at == 4 * MIB
    return found


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A snapshot, and since then two ranges of 64 KiB that were written and marked."""
    path = tmp_path / "image.qcow2"
    tapfs.create(path, "qcow2", 4 * MIB)
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


def test_a_client_may_ask_about_some_of_its_contexts(image: Path) -> None:
    """By a payload: the length that it asks about, and the numbers of contexts that it has selected."""
    with Served(tapfs.open(image)) as server:
        client = server.connect(nbd.EXTENDED, contexts=0b11)

        def asked(*contexts: int, length: int = MIB, more: bytes = b"") -> nbd.Answer:
            payload = struct.pack(f">Q{len(contexts)}I", length, *contexts) + more
            return client.ask(nbd.BLOCK_STATUS, MIB, data=payload, flags=nbd.PAYLOAD_LEN)

        assert asked(1).states == {1: [(65536, 1), (MIB - 65536, 0)]}
        assert set(asked(1, 0).states) == {0, 1}
        assert set(client.ask(nbd.BLOCK_STATUS, MIB, 4096).states) == {0, 1}
        # None, one twice, one that was not selected, no whole numbers, too many, a range behind the end.
        for senseless in (asked(), asked(1, 1), asked(2), asked(1 << 31), asked(1, more=b"\0"), asked(*range(40))):
            assert (senseless.error, senseless.states) == (errno.EINVAL, {})
        assert asked(1, length=4 * MIB).error == errno.EINVAL
        # In two pieces, with the next request behind it.
        request = client.request_bytes(nbd.BLOCK_STATUS, 77, 0, 12, nbd.PAYLOAD_LEN) + struct.pack(">QI", 4096, 0)
        client.connection.sendall(request[:36])
        client.connection.sendall(request[36:] + client.request_bytes(nbd.BLOCK_STATUS, 78, 0, 4096))
        assert set(client.answer(77).states) == {0}
        assert set(client.answer(78).states) == {0, 1}
        structured = server.connect(nbd.STRUCTURED)
        assert structured.ask(nbd.BLOCK_STATUS, 0, 4096, flags=nbd.PAYLOAD_LEN).error == errno.EINVAL


def test_a_snapshot_offers_no_bitmaps(image: Path) -> None:
    """The bitmaps say what has changed in the current disk, not in the snapshot."""
    with tapfs.open(image, snapshot="before") as disk:
        assert list(contexts_of(disk)) == [ALLOCATION]


def test_a_bitmap_of_a_disk_that_is_written_says_what_is_marked_by_then(image: Path) -> None:
    """An answer to a write means that the next question finds it; a disabled bitmap stays as it is."""
    tapfs.add_bitmap(image, "tuesday", granularity=4096)
    tapfs.add_bitmap(image, "still", enabled=False)
    seed = random.Random(3)
    with Served(tapfs.open(image, writable=True)) as server:
        assert server.export.contexts == (ALLOCATION, MONDAY, TUESDAY, STILL)
        client = server.connect(nbd.EXTENDED, contexts=0b1110)
        clusters, since = {MIB >> 16, 3 * MIB >> 16}, set[int]()
        for _ in range(30):
            cluster = seed.randrange(64)
            assert client.ask(nbd.WRITE, (cluster << 16) + seed.randrange(16) * 4096, data=b"3" * 4096).error == 0
            clusters.add(cluster)
            since.add(cluster)
            states = client.ask(nbd.BLOCK_STATUS, 0, 4 * MIB).states
            assert marked_clusters(states[1]) == clusters
            assert marked_clusters(states[2]) == since
            assert states[3] == [(4 * MIB, 0)]
        assert client.ask(nbd.BLOCK_STATUS, MIB + 4096, 8192, flags=nbd.REQ_ONE).states[1] == [(8192, 1)]
    with Served(tapfs.open(image)) as server:
        again = server.connect(nbd.EXTENDED, contexts=0b10).ask(nbd.BLOCK_STATUS, 0, 4 * MIB)
        assert marked_clusters(again.states[1]) == clusters


def test_a_bitmap_whose_name_is_no_text_is_not_offered(image: Path) -> None:
    image.write_bytes(image.read_bytes().replace(b"monday", b"mon\xffay"))
    with tapfs.open(image) as disk:
        assert list(contexts_of(disk)) == [ALLOCATION]
