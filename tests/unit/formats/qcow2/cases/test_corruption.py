"""QEMU's published case 060, metadata that overlaps, as tests of tapfs: what is damaged stays as it was, and is named.

QEMU marks such an image as corrupt. tapfs stops before it has changed a byte, so there is nothing to mark.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

import tapfs
from tapfs import ErrorKind, ImageError
from tests.qcow2_images import COMPRESSED, COPIED, ZERO, Fields
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


def image(folder: Path) -> Path:
    """Data in the first two clusters, a snapshot, and other data in the first."""
    path = new(folder / "image", 64 * CLUSTER)
    put(path, (1, 0, 2 * CLUSTER))
    tapfs.create_snapshot(path, "one")
    put(path, (2, 0, CLUSTER))
    return path


def l1_at(path: Path) -> int:
    return peek(path, 40)


def old_table(path: Path) -> int:
    """The L2 table of the snapshot."""
    return peek(path, peek(path, peek(path, 64))) & ~COPIED


def self_reference(path: Path) -> None:
    poke(path, l1_at(path), l1_at(path) | COPIED)


def data_in_refcounts(path: Path) -> None:
    poke(path, entry_at(path, 0), peek(path, peek(path, 48)) | COPIED)


def data_in_old_table(path: Path) -> None:
    poke(path, entry_at(path, 0), old_table(path) | COPIED)


def table_off_a_cluster(path: Path) -> None:
    poke(path, l1_at(path), (table_at(path) | COPIED) + 512)


def data_off_a_cluster(path: Path) -> None:
    poke(path, entry_at(path, 0), peek(path, entry_at(path, 0)) + 512)


def zeros_off_a_cluster(path: Path) -> None:
    poke(path, entry_at(path, 0), (peek(path, entry_at(path, 0)) | ZERO) + 512)


def block_off_a_cluster(path: Path) -> None:
    poke(path, peek(path, 48), peek(path, peek(path, 48)) + 512)


def block_is_the_header(path: Path) -> None:
    poke(path, peek(path, 48), 0x200)


def header_is_free(path: Path) -> None:
    poke(path, refcount_at(path, 0), 0, 2)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "an L1 entry leads to its own table": self_reference,
    "data in a refcount block": data_in_refcounts,
    "data in the table of a snapshot": data_in_old_table,
    "a table off a cluster": table_off_a_cluster,
    "data off a cluster": data_off_a_cluster,
    "zeros off a cluster": zeros_off_a_cluster,
    "a refcount block off a cluster": block_off_a_cluster,
    "a refcount block in the header": block_is_the_header,
    "the header is free": header_is_free,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_060_a_write_stops_before_it_spoils_metadata(tmp_path: Path, damage: str) -> None:
    path = image(tmp_path)
    DAMAGES[damage](path)
    before = path.read_bytes()
    assert tapfs.check(path).corruptions > 0
    stopped: list[ImageError] = []
    intact = damage == "the header is free"  # then the entry is, and its cluster is written in place
    for offset in (32 * CLUSTER,) if intact else (0, 32 * CLUSTER):  # to a new cluster; through the damaged entry
        try:
            disk = tapfs.open(path, writable=True)
        except ImageError as error:
            stopped.append(error)
            continue
        try:
            disk.write(offset, b"w" * 512)
        except ImageError as error:
            stopped.append(error)
        disk.abandon()
    assert stopped
    assert {error.kind for error in stopped} == {ErrorKind.CORRUPT}
    after = path.read_bytes()
    # Guest data may have gone to new clusters; no table, refcount or header has changed.
    assert after[: len(before)] == before
    with tapfs.open(path, snapshot="one") as disk:
        assert disk.read(0, CLUSTER) == b"\1" * CLUSTER


@pytest.mark.parametrize(
    "damage", ["a refcount block off a cluster", "a refcount block in the header", "the header is free"]
)
def test_060_what_only_refcounts_say_is_repaired(tmp_path: Path, damage: str) -> None:
    path = image(tmp_path)
    DAMAGES[damage](path)
    report = tapfs.repair(path)
    assert (report.corruptions, report.leaks) == (0, 0), report.findings
    require(path, (2, 0, CLUSTER), (1, CLUSTER, CLUSTER))
    put(path, (3, 0, 4 * CLUSTER))
    clean(path)


@pytest.mark.parametrize("damage", ["data in a refcount block", "data in the table of a snapshot"])
def test_060_a_repair_copies_and_the_write_spoils_nothing(tmp_path: Path, damage: str) -> None:
    """After the repair the entry has a cluster of its own, and the metadata stays."""
    path = image(tmp_path)
    DAMAGES[damage](path)
    tapfs.repair(path)
    table = Fields(path.read_bytes())
    assert table.number(entry_at(path, 0), 8) & COPIED
    clean(path)
    put(path, (4, 0, CLUSTER))
    require(path, (4, 0, CLUSTER), (1, CLUSTER, CLUSTER))
    with tapfs.open(path, snapshot="one") as disk:
        assert disk.read(0, 2 * CLUSTER) == b"\1" * 2 * CLUSTER
    clean(path)


@pytest.mark.parametrize("flags", [COPIED, COPIED | ZERO, COMPRESSED])
def test_060_a_discard_through_an_entry_that_leads_nowhere_frees_nothing_of_others(tmp_path: Path, flags: int) -> None:
    path = image(tmp_path)
    poke(path, entry_at(path, 0), 1 << 40 | flags)
    before = path.read_bytes()
    zeros = flags & ZERO  # which have no place, or forget the one that they name
    refused = nullcontext() if zeros else pytest.raises(ImageError, match="past the end of the file")
    with refused, tapfs.open(path, writable=True) as disk:
        disk.discard(0, CLUSTER)
    assert zeros or path.read_bytes() == before
    for place in range(0, len(before), CLUSTER):  # but for the table no byte of the image differs, and no count
        table = place <= entry_at(path, 0) < place + CLUSTER
        assert table or path.read_bytes()[place : place + CLUSTER] == before[place : place + CLUSTER]
    with tapfs.open(path, snapshot="one") as disk:
        assert disk.read(0, 2 * CLUSTER) == b"\1" * 2 * CLUSTER


def test_060_the_mark_goes_away_only_when_nothing_is_wrong(tmp_path: Path) -> None:
    path = image(tmp_path)
    poke(path, 72, 2)
    with pytest.raises(ImageError, match="is marked as corrupt"):
        tapfs.open(path, writable=True)
    require(path, (2, 0, CLUSTER))
    data_off_a_cluster(path)
    tapfs.repair(path)
    assert peek(path, 72) == 2
    poke(path, entry_at(path, 0), peek(path, entry_at(path, 0)) - 512)
    tapfs.repair(path)
    assert peek(path, 72) == 0
    put(path, (5, 0, CLUSTER))
    clean(path)
