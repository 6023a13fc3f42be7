"""QEMU's published case about options that change, as tests of tapfs: 061."""

from __future__ import annotations

from pathlib import Path

import pytest

import tapfs
from tapfs import ErrorKind, ImageError
from tests.unit.formats.qcow2.cases.small_images import (
    CLUSTER,
    clean,
    new,
    peek,
    poke,
    put,
    raw,
    refcount_at,
    require,
    table_at,
)

VERSION_AT, INCOMPATIBLE_AT, COMPATIBLE_AT, AUTOCLEAR_AT = 4, 72, 80, 88
SIZE = 64 * CLUSTER


def kinds(path: Path) -> set[str]:
    """The kinds of extents that an image itself has."""
    with tapfs.open(path) as disk:
        return {extent.kind.name for extent in disk.layers[0].driver.map(0, disk.size)}


@pytest.mark.parametrize("parent", [False, True])
def test_061_zero_clusters_go_when_an_image_goes_to_version_2(tmp_path: Path, *, parent: bool) -> None:
    """Those with a place and those without, over data of a parent and over nothing; then it goes back to version 3."""
    path = new(tmp_path / "image", SIZE, raw(tmp_path / "base", 0x2A, SIZE), lazy_refcounts="on")
    put(path, (0x55, 8 * CLUSTER, 8 * CLUSTER))
    with tapfs.open(path, writable=True) as disk:
        disk.write_zeroes(0, 4 * CLUSTER)
        disk.write_zeroes(10 * CLUSTER, 2 * CLUSTER)
    if not parent:
        tapfs.rebase(path, None, unsafe=True)
    assert "ZERO" in kinds(path)
    below = 0x2A if parent else 0
    wanted = [(0, 0, 4 * CLUSTER), (below, 4 * CLUSTER, 4 * CLUSTER), (0x55, 8 * CLUSTER, 2 * CLUSTER)]
    wanted += [(0, 10 * CLUSTER, 2 * CLUSTER), (0x55, 12 * CLUSTER, 4 * CLUSTER), (below, 16 * CLUSTER, 48 * CLUSTER)]
    require(path, *wanted)
    tapfs.amend(path, {"compat": "0.10", "lazy_refcounts": "off"})
    assert peek(path, VERSION_AT, 4) == 2
    assert "ZERO" not in kinds(path)
    require(path, *wanted)
    clean(path)
    tapfs.amend(path, {"compat": "1.1", "lazy_refcounts": "on"})
    assert (peek(path, VERSION_AT, 4), peek(path, COMPATIBLE_AT)) == (3, 1)
    require(path, *wanted)
    clean(path)


def test_061_bits_that_nobody_knows_do_not_come_back(tmp_path: Path) -> None:
    """Version 2 has no place for them. QEMU drops unknown compatible ones, too; tapfs leaves that to the user."""
    path = new(tmp_path / "image", SIZE)
    put(path, (0x55, 0, CLUSTER))
    poke(path, COMPATIBLE_AT, 1 << 42)
    poke(path, AUTOCLEAR_AT, 1 << 42)
    with pytest.raises(ImageError, match="has unknown features, which version 2 does not have"):
        tapfs.amend(path, {"compat": "0.10"})
    poke(path, COMPATIBLE_AT, 0)
    tapfs.amend(path, {"compat": "0.10"})
    tapfs.amend(path, {"compat": "1.1"})
    assert [peek(path, at) for at in (INCOMPATIBLE_AT, COMPATIBLE_AT, AUTOCLEAR_AT)] == [0, 0, 0]
    require(path, (0x55, 0, CLUSTER), (0, CLUSTER, SIZE - CLUSTER))
    clean(path)


def test_061_a_dirty_image_keeps_its_version_until_it_is_repaired(tmp_path: Path) -> None:
    path = new(tmp_path / "image", SIZE, lazy_refcounts="on")
    put(path, (0x5A, 0, CLUSTER))
    poke(path, refcount_at(path, table_at(path)), 0, 2)  # what had been deferred
    poke(path, INCOMPATIBLE_AT, 1)
    dirty = path.read_bytes()
    with pytest.raises(ImageError, match="was not closed after writing") as raised:
        tapfs.amend(path, {"compat": "0.10", "lazy_refcounts": "off"})
    assert raised.value.remedy == "run tapfs repair"
    assert path.read_bytes() == dirty
    assert tapfs.repair(path).corruptions == 0
    tapfs.amend(path, {"compat": "0.10", "lazy_refcounts": "off"})
    assert peek(path, VERSION_AT, 4) == 2
    require(path, (0x5A, 0, CLUSTER))
    clean(path)


def test_061_a_snapshot_with_zero_clusters_keeps_its_image_in_version_3(tmp_path: Path) -> None:
    """QEMU writes them out as data of the snapshot; tapfs names the snapshot and changes nothing."""
    path = new(tmp_path / "image", SIZE, raw(tmp_path / "base", 0x2A, SIZE))
    with tapfs.open(path, writable=True) as disk:
        disk.write_zeroes(0, 4 * CLUSTER)
    tapfs.create_snapshot(path, "foo")
    put(path, (0x42, 0, 8 * CLUSTER))
    before = path.read_bytes()
    with pytest.raises(ImageError, match="snapshot foo has zero clusters") as raised:
        tapfs.amend(path, {"compat": "0.10"})
    assert raised.value.kind is ErrorKind.UNSUPPORTED
    assert path.read_bytes() == before
    tapfs.delete_snapshot(path, "foo")
    tapfs.amend(path, {"compat": "0.10"})
    require(path, (0x42, 0, 8 * CLUSTER))
    clean(path)
