"""A qcow2 image in which several entries refer to one cluster, or whose refcounts are too low, is not written."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import tapfs
from tapfs import ErrorKind, ImageError
from tapfs.driver import OpenRequest
from tapfs.formats.qcow2 import FORMAT, doubled, owners
from tapfs.testing.model import MemoryFile
from tests.qcow2_images import COPIED, Fields
from tests.scattered_qcow2 import scattered_qcow2, stepped

CLUSTER = 4096
#: Bytes of the disk that an L2 table maps.
TABLE = CLUSTER // 8 * CLUSTER


class Damaged:
    """The bytes of an image to be damaged: clusters 0 to 3 of the disk have data, and one of its second table."""

    def __init__(self, raw: bytes) -> None:
        self.raw = bytearray(raw)
        self.l1_at = Fields(raw).l1_at
        self.table = self.word(self.l1_at) & ~COPIED

    def word(self, at: int) -> int:
        return int.from_bytes(self.raw[at : at + 8], "big")

    def put(self, at: int, word: int) -> None:
        self.raw[at : at + 8] = word.to_bytes(8, "big")

    def entry(self, number: int) -> int:
        return self.word(self.table + 8 * number)

    def count(self, place: int, number: int) -> None:
        at = Fields(bytes(self.raw))
        at_count = at.number(at.reftable_at, 8) + 2 * (place // CLUSTER)
        self.raw[at_count : at_count + 2] = number.to_bytes(2, "big")


def same_cluster(image: Damaged) -> None:
    image.put(image.table + 8, image.entry(0))


def same_cluster_with_the_right_count(image: Damaged) -> None:
    same_cluster(image)
    image.count(image.entry(0) & ~COPIED, 2)


def same_cluster_not_owned(image: Damaged) -> None:
    """A rewrite of one would free the cluster of the other."""
    image.put(image.table, image.entry(0) & ~COPIED)
    same_cluster(image)


def one_of_two_owned(image: Damaged) -> None:
    same_cluster_with_the_right_count(image)
    image.put(image.table, image.entry(0) & ~COPIED)


def same_table(image: Damaged) -> None:
    image.put(image.l1_at + 8, image.word(image.l1_at))


def same_table_with_the_right_count(image: Damaged) -> None:
    same_table(image)
    image.count(image.table, 2)
    for number in range(4):
        image.count(image.entry(number) & ~COPIED, 2)


def free_cluster(image: Damaged) -> None:
    image.count(image.entry(2) & ~COPIED, 0)


DAMAGES = [
    same_cluster,
    same_cluster_with_the_right_count,
    same_cluster_not_owned,
    one_of_two_owned,
    same_table,
    same_table_with_the_right_count,
    free_cluster,
]


def made(path: Path) -> Damaged:
    tapfs.create(path, "qcow2", 4 * TABLE, options={"cluster_size": str(CLUSTER)})
    with tapfs.open(path, writable=True) as disk:
        for number in range(4):
            disk.write(number * CLUSTER, bytes([number + 1]) * CLUSTER)
        disk.write(TABLE, b"\5" * CLUSTER)
    return Damaged(path.read_bytes())


@pytest.mark.parametrize("damage", DAMAGES)
def test_it_is_not_opened_for_writing_until_it_is_repaired(tmp_path: Path, damage: Callable[[Damaged], None]) -> None:
    path = tmp_path / "a"
    image = made(path)
    damage(image)
    path.write_bytes(image.raw)
    with tapfs.open(path) as disk:
        content = disk.read(0, 4 * TABLE)
    with pytest.raises(ImageError, match="cannot be written as it is") as caught:
        tapfs.open(path, writable=True)
    assert (caught.value.kind, caught.value.remedy) == (ErrorKind.CORRUPT, "run tapfs repair")
    with pytest.raises(ImageError) as in_python:  # without the chain, as plugins and tests open
        FORMAT.open(MemoryFile(bytes(image.raw)), OpenRequest(writable=True))
    assert (in_python.value.message, in_python.value.offset) == (caught.value.message, caught.value.offset)
    assert path.read_bytes() == image.raw
    tapfs.repair(path)
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", path], check=True)
    with tapfs.open(path, writable=True) as disk:
        assert disk.read(0, 4 * TABLE) == content
        disk.write(CLUSTER, b"x" * 512)
    with tapfs.open(path) as disk:
        assert disk.read(0, 4 * TABLE) == content[:CLUSTER] + b"x" * 512 + content[CLUSTER + 512 :]
    # One repair was enough, whatever was written after it.
    assert tapfs.check(path).findings == []
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", path], check=True)


def test_qemu_repairs_once_more_after_a_write_where_one_repair_is_enough_here(tmp_path: Path) -> None:
    """qemu-img counts both owners. The write leaves the other one with a refcount of 1, an error to its check."""
    path, own = tmp_path / "a", tmp_path / "own"
    image = made(path)
    same_cluster(image)
    for each in (path, own):
        each.write_bytes(image.raw)
    ran = subprocess.run(["qemu-img", "check", "-q", "-r", "all", "-f", "qcow2", path], check=False)
    assert ran.returncode == 0
    assert tapfs.repair(own).mended == [
        "1 entry of the disk that named a cluster which is another one's, by copies",
        f"leaked space of {CLUSTER} bytes",
    ]
    for each, code in ((path, 2), (own, 0)):
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", f"write {CLUSTER} 512", each], check=True, capture_output=True)
        ran = subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", each], check=False)
        assert ran.returncode == code


@pytest.mark.parametrize("bound", [0, CLUSTER - 1])
def test_where_too_much_would_be_copied_owners_are_counted(
    tmp_path: Path, bound: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    image = made(path)
    same_table(image)
    path.write_bytes(image.raw)
    monkeypatch.setattr(doubled, "MAX_COPIED_BYTES", bound)
    tapfs.repair(path)
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", path], check=True)
    assert path.stat().st_size == len(image.raw)
    tapfs.open(path, writable=True).close()


def test_clusters_that_are_encrypted_by_their_place_are_not_copied(tmp_path: Path) -> None:
    path, key = tmp_path / "a", b"secret"
    options = {"encrypt.format": "luks", "encrypt.iter-time": "10", "cluster_size": str(CLUSTER)}
    tapfs.create(path, "qcow2", 4 * TABLE, options=options, password=key)
    with tapfs.open(path, writable=True, password=key) as disk:
        disk.write(0, b"\1" * 2 * CLUSTER)
    image = Damaged(path.read_bytes())
    same_cluster(image)
    path.write_bytes(image.raw)
    with tapfs.open(path, password=key) as disk:
        content = disk.read(0, 4 * TABLE)
    tapfs.repair(path)
    with tapfs.open(path, writable=True, password=key) as disk:
        assert disk.read(0, 4 * TABLE) == content


def test_an_entry_owns_what_a_snapshot_refers_to(tmp_path: Path) -> None:
    path = tmp_path / "a"
    made(path)
    subprocess.run(["qemu-img", "snapshot", "-c", "s", path], check=True)
    image = Damaged(path.read_bytes())
    image.put(image.table, image.entry(0) | COPIED)
    path.write_bytes(image.raw)
    with pytest.raises(ImageError, match=r"L2 entry 0: .* another entry refers to it"):
        tapfs.open(path, writable=True)


@pytest.mark.parametrize("others", [0, 1, 130, 300], ids=str)
def test_what_is_shared_rightly_and_what_has_leaked_may_be_written(tmp_path: Path, others: int) -> None:
    """Counts of more than 127 and of more than 254 are compared in other ways than small ones."""
    path = tmp_path / "a"
    image = made(path)
    place = image.entry(0) & ~COPIED
    for number in (0, *range(4, 4 + others)) if others else ():
        image.put(image.table + 8 * number, place)
    image.count(place, 1 + others)
    image.count(image.entry(3) & ~COPIED, 9)  # it has leaked
    path.write_bytes(image.raw)
    with tapfs.open(path, writable=True) as disk:
        disk.write(0, b"x" * CLUSTER)
        assert disk.read(CLUSTER, 1) == b"\2"
        assert disk.read((4 if others else 0) * CLUSTER, 1) == (b"\1" if others else b"x")


@pytest.mark.parametrize("damage", [*DAMAGES, same_table, free_cluster])
def test_an_image_is_looked_at_whose_bits_are_of_several_windows(
    tmp_path: Path, damage: Callable[[Damaged], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So is one of many terabytes."""
    path = tmp_path / "a"
    image = made(path)
    damage(image)
    path.write_bytes(image.raw)
    for bits in (2, 3):
        monkeypatch.setattr(owners, "OWNED_BITS", bits)
        with pytest.raises(ImageError, match="cannot be written as it is"):
            tapfs.open(path, writable=True)
    path.write_bytes(made(tmp_path / "b").raw)
    tapfs.open(path, writable=True).close()


def test_two_of_millions_of_entries(tmp_path: Path) -> None:
    """Their L2 tables have more than 16 MiB; images of that size were once not looked at."""
    path = tmp_path / "a"
    clusters = 1 << 22
    chosen = [number for number in stepped(1 << 6, clusters) if number not in {0, clusters - 1}]
    scattered_qcow2(path, clusters << 16, [0, clusters - 1, *chosen])
    tapfs.open(path, writable=True).close()
    l2_at = Fields(path.read_bytes()[:65536]).l1_at  # the first word leads to the first table
    with path.open("r+b") as file:
        file.seek(l2_at)
        table = int.from_bytes(file.read(8), "big") & ~COPIED
        file.seek(table)
        first = file.read(8)
        file.seek(table + 8 * (clusters - 1))
        file.write(first)
    with pytest.raises(ImageError, match=r"another entry refers to it: the image cannot be written") as caught:
        tapfs.open(path, writable=True)
    assert caught.value.offset == table + 8 * (clusters - 1)


def displaced(path: Path, cluster: int, extended: str) -> int:
    """An image with a data file, whose second entry names the first cluster; the place of that entry."""
    options = {"cluster_size": str(cluster), "data_file": "outside", "extended_l2": extended}
    tapfs.create(path, "qcow2", 4 * TABLE, options=options)
    with tapfs.open(path, writable=True) as disk:
        for number in range(3):
            disk.write(number * cluster, bytes([number + 1]) * cluster)
    damaged = Damaged(path.read_bytes())
    place = damaged.table + Fields(bytes(damaged.raw)).entry
    damaged.put(place, damaged.entry(0))
    path.write_bytes(damaged.raw)
    return place


@pytest.mark.parametrize(("cluster", "extended"), [(CLUSTER, "off"), (16384, "on")], ids=["plain", "extended"])
def test_two_entries_of_one_cluster_of_a_data_file(tmp_path: Path, cluster: int, extended: str) -> None:
    """QEMU has each cluster at its own offset, too: a write through one would change both."""
    path = tmp_path / "a"
    place = displaced(path, cluster, extended)
    for writable in (False, True):
        with tapfs.open(path, writable=writable) as disk:
            assert disk.read(0, 1) == b"\1"
            with pytest.raises(ImageError, match="is not at its place there") as caught:
                disk.read(cluster, 1)
            assert (caught.value.kind, caught.value.offset) == (ErrorKind.CORRUPT, place)
    with tapfs.open(path, writable=True) as disk:
        with pytest.raises(ImageError, match="is not at its place there"):
            disk.write(cluster, b"x")
        disk.write(0, b"y")
        assert disk.read(0, 1) == b"y"
    found = [finding for finding in tapfs.check(path).findings if "is not at its place" in finding.message]
    assert [finding.host_offset for finding in found] == [place]
    command = ["qemu-io", "-r", "-c", f"read {cluster} 512", path]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "does not match guest cluster offset" in ran.stdout + ran.stderr
