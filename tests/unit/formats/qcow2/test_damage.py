"""Damaged qcow2 images: what a check says of them, and that no write lands on metadata."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import tapfs
from tapfs import ErrorKind, ImageError
from tapfs.driver import OpenRequest
from tapfs.formats.qcow2 import FORMAT, owners
from tapfs.testing.model import MemoryFile
from tests.conftest import Ran
from tests.qcow2_images import COPIED, Fields, make

Run = Callable[..., Ran]
SIZE = 1 << 20
CLUSTER = 4096


def image(seed: int = 1, kind: str = "overlay") -> bytearray:
    """An image of 4 KiB clusters with data in it."""
    return bytearray(make(kind, SIZE, seed)[0].data)


def table_of(data: bytes | bytearray) -> int:
    """Where the first L2 table is."""
    fields = Fields(bytes(data))
    return next(
        fields.number(fields.l1_at + 8 * index, 8) & ~COPIED
        for index in range(fields.l1_entries)
        if fields.number(fields.l1_at + 8 * index, 8)
    )


def entry_of(data: bytes | bytearray) -> int:
    """Where the first entry with data is."""
    table = table_of(data)
    return next(at for at in range(table, table + CLUSTER, 8) if any(data[at : at + 8]))


def put(data: bytearray, at: int, number: int, width: int = 8) -> None:
    data[at : at + width] = number.to_bytes(width, "big")


def refcount_at(data: bytearray, cluster: int) -> int:
    fields = Fields(bytes(data))
    return fields.number(fields.reftable_at, 8) + 2 * cluster


def spoil_entry(data: bytearray) -> None:
    put(data, entry_of(data), 1 << 40 | COPIED)


def spoil_refcounts(data: bytearray) -> None:
    for cluster in (2, 5, 7):
        put(data, refcount_at(data, cluster), 0, 2)
    for cluster in (6, 300, 301):
        put(data, refcount_at(data, cluster), 3, 2)


def spoil_bits(data: bytearray) -> None:
    data[entry_of(data)] ^= 0x80
    data[Fields(bytes(data)).l1_at] ^= 0x80


def spoil_two_owners(data: bytearray) -> None:
    at = entry_of(data)
    data[at + 8 : at + 16] = data[at : at + 8]


DAMAGES = {
    "refcounts": spoil_refcounts,
    "bits": spoil_bits,
    "two owners": spoil_two_owners,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_check_counts_as_qemu_img_counts(tmp_path: Path, damage: str) -> None:
    data = image(kind="snapshot")
    DAMAGES[damage](data)
    (tmp_path / "a").write_bytes(data)
    report = tapfs.check(tmp_path / "a")
    ran = subprocess.run(
        ["qemu-img", "check", "-f", "qcow2", "--output=json", tmp_path / "a"],
        capture_output=True,
        text=True,
        check=False,
    )
    theirs = json.loads(ran.stdout)
    assert (report.corruptions, report.leaks) == (theirs.get("corruptions", 0), theirs.get("leaks", 0))
    assert report.corruptions or report.leaks


def test_an_entry_past_the_end_is_found() -> None:
    data = image()
    spoil_entry(data)
    report = FORMAT.open(MemoryFile(bytes(data)), OpenRequest(lenient=True)).check()
    assert any("past the end of the file" in each.message for each in report.findings)


@pytest.mark.parametrize("target", ["L1", "L2", "refcount block", "refcount table"])
def test_no_write_in_place_lands_on_metadata(tmp_path: Path, target: str) -> None:
    """Cloud Hypervisor lost disks in 2026 because guest data went over L2 tables."""
    data = image(kind="snapshot")
    fields = Fields(bytes(data))
    place = {
        "L1": fields.l1_at,
        "L2": table_of(data),
        "refcount block": fields.number(fields.reftable_at, 8),
        "refcount table": fields.reftable_at,
    }[target]
    at = entry_of(data)
    put(data, at, place | COPIED)
    path = tmp_path / "a"
    path.write_bytes(data)
    offset = (at - table_of(data)) // 8 * CLUSTER
    disk = tapfs.open(path, format="qcow2", writable=True)
    with pytest.raises(ImageError) as raised:
        disk.write(offset, b"x" * CLUSTER)
    assert raised.value.kind is ErrorKind.CORRUPT
    disk.abandon()
    assert path.read_bytes() == data


@pytest.mark.parametrize("mapped", [True, False], ids=["mapped before", "mapped after"])
def test_no_write_in_place_lands_on_a_table_that_was_made_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, mapped: bool
) -> None:
    """An entry leads to a cluster without a count. That becomes an L2 table, and the entry is written through."""
    monkeypatch.setattr(owners, "require_owners", lambda *_: None)  # which would refuse the image when it is opened
    path = tmp_path / "a"
    size = 64 << 20
    tapfs.create(path, "qcow2", size, options={"cluster_size": "4096"})
    with tapfs.open(path, writable=True) as disk:
        disk.write(0, b"x" * CLUSTER)
        disk.write(2 * CLUSTER, b"x" * CLUSTER)
    data = bytearray(path.read_bytes())
    entry = entry_of(data)
    lost = int.from_bytes(data[entry + 16 : entry + 24], "big") & ~COPIED
    put(data, entry + 8, lost | COPIED)
    put(data, entry + 16, 0)
    put(data, refcount_at(data, lost // CLUSTER), 0, 2)
    path.write_bytes(data)
    with tapfs.open(path, writable=True) as disk:
        if mapped:
            disk.write(CLUSTER, b"y" * CLUSTER)
        disk.write(32 << 20, b"z" * CLUSTER)
        disk.flush()
        made = [disk.layers[0].driver.l1[index] for index in range(32)]
        assert lost | COPIED in made
        with pytest.raises(ImageError, match="lies over the table") as raised:
            disk.write(CLUSTER, b"w" * CLUSTER)
        assert raised.value.kind is ErrorKind.CORRUPT
    with tapfs.open(path) as disk:
        assert disk.read(32 << 20, CLUSTER) == b"z" * CLUSTER


@pytest.mark.parametrize("target", ["L1", "L2", "refcount table"])
def test_no_new_cluster_is_taken_from_metadata(tmp_path: Path, target: str) -> None:
    """A table in use has a refcount of 0: the allocator would hand it out."""
    data = image(kind="snapshot")
    fields = Fields(bytes(data))
    place = {"L1": fields.l1_at, "L2": table_of(data), "refcount table": fields.reftable_at}[target]
    put(data, refcount_at(data, place // CLUSTER), 0, 2)
    path = tmp_path / "a"
    path.write_bytes(data)
    disk = tapfs.open(path, format="qcow2", writable=True)
    with pytest.raises(ImageError, match="the refcounts say that") as raised:
        fill(disk)
    assert raised.value.kind is ErrorKind.CORRUPT
    disk.abandon()


def fill(disk: tapfs.Image) -> None:
    for offset in range(0, SIZE, CLUSTER):
        disk.write(offset, b"y" * CLUSTER)


def test_free_clusters_are_used_again(tmp_path: Path) -> None:
    path = tmp_path / "a"
    tapfs.create(path, "qcow2", 8 << 20, options={"cluster_size": "4096"})
    for turn in range(4):
        with tapfs.open(path, writable=True) as disk:
            disk.write(turn * CLUSTER * 100, b"z" * CLUSTER * 100)
            disk.flush()
            disk.discard(turn * CLUSTER * 100, CLUSTER * 100)
            disk.flush()
    assert path.stat().st_size < 2 << 20
    report = tapfs.check(path)
    assert (report.corruptions, report.leaks) == (0, 0)


def test_the_refcount_table_grows(tmp_path: Path) -> None:
    """With clusters of 512 bytes and counts of 64 bits a table of one cluster is full after 2 MiB."""
    path = tmp_path / "a"
    options = {"cluster_size": "512", "refcount_bits": "64"}
    tapfs.create(path, "qcow2", 16 << 20, options=options)
    content = random.Random(3).randbytes(16 << 20)
    with tapfs.open(path, writable=True) as disk:
        for offset in range(0, len(content), 3 << 20):
            disk.write(offset, content[offset : offset + (3 << 20)])
            disk.flush()
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", path], check=True)
    with tapfs.open(path) as disk:
        assert disk.read(0, disk.size) == content
        assert disk.info["details"]["refcount_table_clusters"] != 1


def test_a_broken_refcount_table_is_rebuilt(tapfs: Run, tmp_path: Path) -> None:
    data, _ = make("plain", SIZE, 3)
    raw = bytearray(data.data)
    put(raw, 48, 0x123)
    path = tmp_path / "a"
    path.write_bytes(raw)
    assert tapfs("check", path).code == 2
    assert tapfs("repair", path).code == 0
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", path], check=True)


def test_a_table_over_other_metadata_is_not_written(tmp_path: Path) -> None:
    """A change of an entry would change a snapshot."""
    data = image(kind="snapshot")
    fields = Fields(bytes(data))
    put(data, fields.l1_at, fields.snapshots_at | COPIED)
    path = tmp_path / "a"
    path.write_bytes(data)
    with pytest.raises(ImageError, match="lies over other metadata") as raised:
        tapfs.open(path, writable=True)
    assert raised.value.kind is ErrorKind.CORRUPT
    tapfs.open(path).close()
