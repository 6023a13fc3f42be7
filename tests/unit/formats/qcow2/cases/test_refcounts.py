"""QEMU's published cases about refcounts and the check, as tests of tapfs: 039, 044, 108, 112, 138."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import tapfs
from tapfs import ErrorKind, ImageError
from tests.conftest import Ran
from tests.qcow2_images import COPIED, Fields, audit, by_hand
from tests.unit.formats.qcow2.cases.small_images import (
    CLUSTER,
    clean,
    entry_at,
    new,
    peek,
    poke,
    put,
    refcount_at,
    require,
    table_at,
)

Run = Callable[..., Ran]

INCOMPATIBLE_AT = 72


def repaired(path: Path) -> None:
    report = tapfs.repair(path)
    assert (report.corruptions, report.leaks) == (0, 0), report.findings
    clean(path)


def test_039_lazy_refcounts_leave_no_image_dirty(tmp_path: Path) -> None:
    """Nothing is deferred by tapfs, so neither a close nor a crash leaves the mark; the feature stays."""
    path = new(tmp_path / "image", 64 * CLUSTER, lazy_refcounts="on")
    put(path, (0x5A, 0, 512))
    with tapfs.open(path, writable=True) as disk:
        disk.write(8 * CLUSTER, b"x" * CLUSTER)
        disk.flush()
        crashed = path.read_bytes()
    for image in (crashed, path.read_bytes()):
        assert Fields(image).incompatible == 0
        assert Fields(image).number(80, 8) == 1
        assert audit(image).corruptions == []


def test_039_a_dirty_image_is_read_as_it_is_and_written_after_a_repair(tmp_path: Path) -> None:
    path = new(tmp_path / "image", 64 * CLUSTER, lazy_refcounts="on")
    put(path, (0x5A, 0, 512))
    poke(path, refcount_at(path, table_at(path)), 0, 2)  # what had been deferred
    poke(path, INCOMPATIBLE_AT, 1)
    dirty = path.read_bytes()
    require(path, (0x5A, 0, 512))
    with pytest.raises(ImageError, match="was not closed after writing") as raised:
        tapfs.open(path, writable=True)
    assert raised.value.remedy == "run tapfs repair"
    assert path.read_bytes() == dirty
    repaired(path)
    assert peek(path, INCOMPATIBLE_AT) == 0
    put(path, (0x5B, 8 * CLUSTER, 512))
    require(path, (0x5A, 0, 512), (0x5B, 8 * CLUSTER, 512))


def test_039_a_commit_leaves_neither_image_dirty(tmp_path: Path) -> None:
    base = new(tmp_path / "base", 64 * CLUSTER, lazy_refcounts="on")
    path = new(tmp_path / "image", 64 * CLUSTER, base, lazy_refcounts="on")
    put(path, (3, 0, 512))
    tapfs.commit(path)
    for each in (base, path):
        assert peek(each, INCOMPATIBLE_AT) == 0
        clean(each)
    require(base, (3, 0, 512))


def test_044_a_refcount_table_of_many_clusters_moves_and_grows(tmp_path: Path) -> None:
    """Each cluster of the table counts 2 MiB; the old places of the table are free afterwards, and used again."""
    path = new(tmp_path / "image", 8 << 20, cluster_size="512", refcount_bits="64", preallocation="metadata")
    places = {peek(path, 48)}
    with tapfs.open(path, writable=True) as disk:
        for offset in range(0, 8 << 20, 1 << 20):
            disk.write(offset, bytes([1 + (offset >> 20)]) * (1 << 20))
            disk.flush()
            places.add(peek(path, 48))
    before = Fields(path.read_bytes()).reftable_clusters
    tapfs.create_snapshot(path, "one")
    with tapfs.open(path, writable=True) as disk:
        disk.write(0, b"\x77" * (4 << 20))
    fields = Fields(path.read_bytes())
    assert fields.reftable_clusters > before > 1
    assert fields.reftable_at not in places
    require(path, (0x77, 0, 4 << 20), *((1 + number, number << 20, 1 << 20) for number in range(4, 8)))
    found = audit(path.read_bytes())
    assert (found.corruptions, found.leaks) == ([], [])


def test_108_an_image_without_a_refcount_table(tmp_path: Path) -> None:
    path = new(tmp_path / "image", 64 * CLUSTER)
    put(path, (42, 0, CLUSTER))
    poke(path, 48, 0)
    poke(path, 56, 0, 4)
    assert tapfs.check(path).corruptions > 0
    with pytest.raises(ImageError, match="refcount table"):
        tapfs.open(path, writable=True)
    repaired(path)
    require(path, (42, 0, CLUSTER))


def test_108_a_new_refcount_block_does_not_go_over_the_cluster_that_it_is_to_count(tmp_path: Path) -> None:
    """The first block is full, and an entry leads to a cluster behind it, which has no count yet."""
    path = new(tmp_path / "image", 1 << 20, cluster_size="512")
    with tapfs.open(path, writable=True) as disk:
        offset = 0
        while path.stat().st_size + 1024 < 256 * 512:  # one block counts 256 clusters
            disk.write(offset, b"\1" * 512)
            disk.flush()
            offset += 512
    data = bytearray(path.read_bytes().ljust(256 * 512, b"\0"))
    lost = offset // 512
    path.write_bytes(data + b"\x2a" * 512)
    poke(path, entry_at(path, lost), 256 * 512 | COPIED)
    require(path, (42, lost * 512, 512))
    assert tapfs.check(path).corruptions > 0
    repaired(path)
    require(path, (1, 0, lost * 512), (42, lost * 512, 512))


#: Where a second refcount block is said to be, and whether the first block counts it.
BLOCKS = {
    "counted": (256 * CLUSTER, True),
    "not counted": (256 * CLUSTER, False),
    "at the end of a signed number": (0x7FFFFFFFFFFF0000, False),
    "at the end of an unsigned number": (0xFFFFFFFFFFFF0000, False),
}


@pytest.mark.parametrize("case", BLOCKS)
def test_108_a_refcount_block_past_the_end_of_the_file(tmp_path: Path, case: str) -> None:
    """Its clusters must not be taken for free, and a repair counts anew."""
    place, counted = BLOCKS[case]
    path = new(tmp_path / "image", 64 * CLUSTER)
    put(path, (42, 0, CLUSTER))
    if counted:
        poke(path, refcount_at(path, place), 1, 2)
    poke(path, peek(path, 48) + 8, place)
    assert tapfs.check(path).corruptions > 0
    repaired(path)
    require(path, (42, 0, CLUSTER))
    put(path, (43, CLUSTER, 8 * CLUSTER))
    clean(path)


@pytest.mark.parametrize("what", ["table", "block"])
@pytest.mark.parametrize("missing", [CLUSTER, 512])
def test_108_refcounts_that_a_cut_file_lacks_are_not_zeros(tmp_path: Path, what: str, missing: int) -> None:
    """A new cluster would be one that holds data. QEMU reads zeros there."""
    path = new(tmp_path / "image", 64 * CLUSTER)
    put(path, (42, 0, 8 * CLUSTER))
    data = bytearray(path.read_bytes())
    fields = Fields(bytes(data))
    place = fields.reftable_at if what == "table" else fields.number(fields.reftable_at, 8)
    data += data[place : place + CLUSTER]
    path.write_bytes(data)
    end = path.stat().st_size
    poke(path, 48 if what == "table" else fields.reftable_at, end - CLUSTER)
    with path.open("r+b") as file:
        file.truncate(end - missing)
    before = path.read_bytes()
    with pytest.raises(ImageError) as raised, tapfs.open(path, writable=True) as disk:
        disk.write(16 * CLUSTER, b"x" * CLUSTER)
    assert raised.value.kind is ErrorKind.CORRUPT
    assert path.read_bytes() == before
    repaired(path)
    put(path, (43, 16 * CLUSTER, CLUSTER))
    require(path, (42, 0, 8 * CLUSTER), (43, 16 * CLUSTER, CLUSTER))


@pytest.mark.parametrize("number", [1 << 63, (1 << 64) - 1])
def test_112_refcounts_of_64_bits_at_their_end(tmp_path: Path, number: int) -> None:
    """A write goes elsewhere; a snapshot would count one more, which the largest number cannot."""
    path = new(tmp_path / "image", 64 * CLUSTER, refcount_bits="64")
    put(path, (1, 0, CLUSTER))
    at = entry_at(path, 0)
    place = peek(path, at) & ~COPIED
    poke(path, at, place)
    poke(path, peek(path, peek(path, 48)) + 8 * (place // CLUSTER), number)
    before = path.read_bytes()
    if number == (1 << 64) - 1:
        with pytest.raises(ImageError) as raised:
            tapfs.create_snapshot(path, "one")
        assert raised.value.kind in {ErrorKind.OUT_OF_BOUNDS, ErrorKind.CORRUPT}
        assert path.read_bytes() == before
    put(path, (2, 0, 512))
    require(path, (2, 0, 512), (1, 512, CLUSTER - 512))
    assert peek(path, at) != place


def test_112_compressed_clusters_where_a_refcount_has_one_bit(tmp_path: Path) -> None:
    """Two payloads cannot share a host cluster, so each gets its own."""
    (tmp_path / "raw").write_bytes(b"\0\1" * (CLUSTER // 2) + b"\1\2" * (CLUSTER // 2))
    path = tmp_path / "image"
    options = {"refcount_bits": "1", "cluster_size": str(CLUSTER)}
    tapfs.convert(tmp_path / "raw", path, format="raw", target_format="qcow2", compressed=True, options=options)
    assert by_hand(path.read_bytes()) == (tmp_path / "raw").read_bytes()
    clean(path)


def test_112_more_references_than_a_refcount_can_say(tmp_path: Path) -> None:
    """The check says so, and a repair gives each its own cluster."""
    path = new(tmp_path / "image", 64 * CLUSTER, refcount_bits="1")
    put(path, (1, 0, CLUSTER))
    poke(path, entry_at(path, 1), peek(path, entry_at(path, 0)))
    report = tapfs.check(path)
    assert any("2 references" in each.message for each in report.findings)
    assert tapfs.repair(path).corruptions == 0
    clean(path)
    put(path, (2, 0, CLUSTER))
    require(path, (2, 0, CLUSTER), (1, CLUSTER, CLUSTER))
    clean(path)


@pytest.mark.parametrize("place", [0x80000000000000, 2 << 40, 1 << 41 | 512])
def test_138_a_cluster_at_a_multiple_of_two_tebibytes(tmp_path: Path, place: int) -> None:
    """The check needs no memory for what lies between, and cuts no number: the entry leads past the end."""
    path = new(tmp_path / "image", 512, cluster_size="512")
    put(path, (1, 0, 512))
    poke(path, entry_at(path, 0), place | COPIED)
    report = tapfs.check(path)
    assert report.corruptions == 1
    assert "past the end of the file" in report.findings[0].message
    with pytest.raises(ImageError) as raised:
        require(path, (1, 0, 512))
    assert raised.value.kind is ErrorKind.CORRUPT
