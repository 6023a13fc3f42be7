"""The rule of docs/specs/blktap-qcow.md, "Byte order of L1", case by case, and that it is fast."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import pytest

from tapfs.driver import OpenRequest
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.qcow import FORMAT
from tapfs.formats.qcow.extended import ExtendedHeader, table_cksum
from tapfs.formats.qcow.l1 import ByteOrder, L1Table, decide_order, is_plausible, swapped
from tapfs.testing.model import MemoryFile
from tests.qcow_images import created, make

HUGE = 1 << 62


def table(*entries: int, order: ByteOrder = "big") -> bytearray:
    return bytearray(b"".join(entry.to_bytes(8, order) for entry in entries))


#: In a file of HUGE bytes with clusters of 512 bytes these fit in both orders.
EITHER = table(0x0002_0000_0000_0400, 0)


def decide(
    raw: bytearray, extended: ExtendedHeader | None = None, tables: Callable[[ByteOrder], bool] = lambda _: False
) -> ByteOrder | None:
    return decide_order(raw, extended, cluster_size=512, file_size=HUGE, tables_plausible=tables)


@pytest.mark.parametrize(
    ("raw", "cluster", "size", "big", "little"),
    [
        (table(0, 0), 4096, 8192, True, True),
        (table(0x1000), 4096, 0x1001, True, False),
        (table(0x1000), 4096, 0x1000, False, False),
        (table(0x1000, order="little"), 4096, 0x8000, False, True),
        (table(0x1800), 4096, 0x8000, False, False),
        (table(0x1000, 0x1001), 4096, 0x8000, False, False),
        (table(0x1000, 0x10200), 512, 1 << 20, True, False),
        (table(0x10000, 0x20000), 65536, 1 << 20, True, False),
        (table(0x18000), 65536, 1 << 20, False, False),
        (EITHER, 512, HUGE, True, True),
    ],
)
def test_plausible(raw: bytearray, cluster: int, size: int, big: bool, little: bool) -> None:  # noqa: FBT001
    assert is_plausible(raw, "big", cluster, size) == big
    assert is_plausible(raw, "little", cluster, size) == little


@pytest.mark.parametrize(
    ("cksum_of", "flags", "tables", "order"),
    [
        ("disk", 2, "", "big"),
        ("disk", 2, "little", "big"),
        ("disk", 0, "big", "big"),
        ("disk", 0, "little", "little"),
        ("disk", 0, "", "little"),
        ("swapped", 0, "", "little"),
        ("swapped", 2, "big", "little"),
        ("neither", 0, "little", "little"),
        ("neither", 0, "big", "big"),
        ("neither", 0, "", "big"),
        ("neither", 0, "big little", "big"),
    ],
)
def test_where_both_orders_fit_the_cksum_decides(cksum_of: str, flags: int, tables: str, order: str) -> None:
    cksums = {"disk": table_cksum(EITHER), "swapped": table_cksum(swapped(EITHER)), "neither": 1}
    extended = ExtendedHeader(cksums[cksum_of], 64, flags)
    assert decide(EITHER, extended, lambda asked: asked in tables.split()) == order


def test_without_evidence_it_is_qemus() -> None:
    assert decide(EITHER) == "big"
    assert decide(table(0, 0)) == "big"
    assert decide(table(0x0100_0000_0000_0001)) is None


def test_where_no_order_fits_a_lenient_open_takes_the_better_one() -> None:
    file, _ = make("blktap-little", 8 << 20, 1)
    file.data[0x1000:0x1008] = b"\x01" * 8
    with pytest.raises(ImageError) as refused:
        FORMAT.open(file, OpenRequest())
    assert refused.value.kind is ErrorKind.CORRUPT
    driver = FORMAT.open(file, OpenRequest(lenient=True))
    assert driver.details()["l1_byte_order"] == "little"
    assert driver.check().corruptions > 0


def test_used_entries_are_found_across_pieces() -> None:
    l1 = L1Table(bytearray(8 * 100_000), "little")
    for index in (0, 8191, 8192, 50_000, 99_999):
        l1[index] = index + 1
    assert [index for index, _ in l1.used()] == [0, 8191, 8192, 50_000, 99_999]
    assert all(entry == index + 1 for index, entry in l1.used())
    assert l1.next_used(50_001, 99_999) == 99_999


class SparseFile(MemoryFile):
    """A file of 2 TiB of which only the first 16 MiB are in memory."""

    def size(self) -> int:
        return 2 << 40


@pytest.mark.parametrize("order", ["big", "little"])
def test_two_tebibytes_open_in_little_memory(order: ByteOrder) -> None:
    file = SparseFile(bytes(created(2 << 40, {"blktap": "on"}).data))
    for index in range(0, 1 << 20, 64):
        at = 4096 + 8 * index
        file.data[at : at + 8] = ((16 << 20) + index * 4096).to_bytes(8, order)
    tracemalloc.start()
    try:
        driver = FORMAT.open(file, OpenRequest())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 30 << 20
    assert driver.details()["l1_byte_order"] == order
