"""QEMU's published cases about internal snapshots, as tests of tapfs: 029, 062, 261."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

import tapfs
from tapfs import ErrorKind, ImageError
from tapfs.disk.chain import OpenOptions
from tapfs.jobs.resize import resize_image
from tests.qcow2_images import COPIED, by_hand
from tests.unit.formats.qcow2.cases.small_images import (
    CLUSTER,
    clean,
    new,
    peek,
    poke,
    put,
    refcount_at,
    require,
)


@pytest.mark.parametrize(("cluster", "size", "grown"), [("512", 64 << 10, 1 << 20), ("4096", 256 << 10, 16 << 20)])
def test_029_a_snapshot_with_a_smaller_l1_table_is_applied(tmp_path: Path, cluster: str, size: int, grown: int) -> None:
    path = new(tmp_path / "image", size, cluster_size=cluster)
    put(path, (1, 0, 5000))
    tapfs.create_snapshot(path, "foo")
    resize_image(str(path), lambda _: grown, OpenOptions(format="qcow2"))
    put(path, (2, grown - 5000, 5000), (3, 0, 100))
    tapfs.apply_snapshot(path, "foo")
    clean(path)
    assert peek(path, 24) == size
    require(path, (1, 0, 5000), (0, 5000, size - 5000))


def test_029_the_state_of_a_machine_behind_the_disk_survives(tmp_path: Path) -> None:
    """QEMU keeps it in the snapshot's clusters behind the end of the disk, even 1 TiB behind."""
    path = new(tmp_path / "image", 64 * CLUSTER, cluster_size="65536")
    put(path, (1, 0, CLUSTER))
    tapfs.create_snapshot(path, "foo")
    state = 1 << 40
    data = bytearray(path.read_bytes())
    entries = state // (65536 * 8192) + 1
    places = [len(data) + -len(data) % 65536]
    at = peek(path, 64)
    l1 = bytearray(8 * entries)
    l1[:8] = data[peek(path, at) : peek(path, at) + 8]
    l1_bytes = -(-len(l1) // 65536) * 65536
    places += [places[0] + l1_bytes, places[0] + l1_bytes + 65536]
    l1[-8:] = (places[1] | COPIED).to_bytes(8, "big")
    data = data.ljust(places[0], b"\0") + l1.ljust(l1_bytes, b"\0")
    data += (places[2] | COPIED).to_bytes(8, "big").ljust(65536, b"\0") + b"\x11" * 65536
    path.write_bytes(data)
    old = peek(path, at)
    for place in (*range(places[0], places[1], 65536), *places[1:]):
        poke(path, refcount_at(path, place), 1, 2)
    poke(path, refcount_at(path, old), 0, 2)
    poke(path, at, places[0])
    poke(path, at + 8, entries, 4)
    clean(path)
    put(path, (2, 0, 8 * CLUSTER))
    tapfs.create_snapshot(path, "bar")
    tapfs.delete_snapshot(path, "bar")
    clean(path)
    tapfs.apply_snapshot(path, "foo")
    clean(path)
    require(path, (1, 0, CLUSTER))
    kept = peek(path, peek(path, peek(path, 64)) + 8 * (entries - 1)) & ~COPIED
    assert path.read_bytes()[peek(path, kept) & ~COPIED :][:65536] == b"\x11" * 65536


def test_029_a_snapshot_is_read_by_its_own_l1_table(tmp_path: Path) -> None:
    """The current disk has become smaller than one table's part; the snapshot still has all of its own."""
    path = new(tmp_path / "image", 1 << 20, cluster_size="512")
    put(path, (7, (1 << 20) - 512, 512))
    tapfs.create_snapshot(path, "foo")
    poke(path, 24, 512)
    poke(path, 36, 1, 4)
    with tapfs.open(path, snapshot="foo") as disk:
        assert disk.size == 1 << 20
        assert disk.read((1 << 20) - 1024, 1024) == bytes(512) + b"\7" * 512
    assert by_hand(path.read_bytes(), snapshot=0)[-512:] == b"\7" * 512


@pytest.mark.parametrize("snapshots", [1, 2])
def test_062_zero_clusters_without_a_place_in_a_snapshot(tmp_path: Path, snapshots: int) -> None:
    base = new(tmp_path / "base", 64 * CLUSTER)
    put(base, (9, 0, 64 * CLUSTER))
    path = new(tmp_path / "image", 64 * CLUSTER, base)
    with tapfs.open(path, writable=True) as disk:
        disk.write_zeroes(0, 8 * CLUSTER)
    for number in range(snapshots):
        tapfs.create_snapshot(path, f"foo{number}")
        clean(path)
    put(path, (1, 0, 2 * CLUSTER))
    tapfs.apply_snapshot(path, "foo0")
    require(path, (0, 0, 8 * CLUSTER), (9, 8 * CLUSTER, CLUSTER))
    clean(path)


def test_261_too_many_snapshots_are_refused_and_stay(tmp_path: Path) -> None:
    """QEMU's repair throws away what it cannot take; tapfs leaves it for a tool that can."""
    path = new(tmp_path / "image", 64 * CLUSTER, compat="0.10")
    put(path, (1, 0, CLUSTER))
    poke(path, 64, 16 * CLUSTER)
    poke(path, 60, 65537, 4)
    with path.open("r+b") as file:
        file.truncate(16 * CLUSTER + 40 * 65537)
    before = path.read_bytes()
    with pytest.raises(ImageError) as raised:
        tapfs.info(path)
    assert raised.value.kind is ErrorKind.OUT_OF_BOUNDS
    for use in (tapfs.check, tapfs.repair):
        with pytest.raises(ImageError, match="65537 snapshots, the limit is 65536"):
            use(path)
    assert path.read_bytes() == before


def test_261_a_table_of_more_than_64_mib_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = new(tmp_path / "image", 64 * CLUSTER)
    at, entry = 1 << 20, struct.pack(">QIHHIIQII", 0, 0, 65535, 65535, 0, 0, 0, 0, 1024)
    size = 40 + 1024 + 65535 + 65535 + 2
    count = (64 << 20) // size + 1
    with path.open("r+b") as file:
        for number in range(count):
            file.seek(at + number * size)
            file.write(entry)
        file.truncate(at + count * size)
    poke(path, 64, at)
    poke(path, 60, count, 4)
    with pytest.raises(ImageError):
        tapfs.create_snapshot(path, "one")
    with pytest.raises(ImageError):
        tapfs.snapshots(path)
