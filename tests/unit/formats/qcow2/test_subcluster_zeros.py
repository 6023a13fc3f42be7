"""Zeros of a part of a cluster with subclusters are bits of its entry, wherever an entry can say so."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

import tapfs
from tapfs.extent import Kind
from tests.qcow2_images import Fields, by_hand

CLUSTER, SUB = 65536, 2048
SIZE = 40 * CLUSTER
CONTENT = random.Random(1).randbytes(SIZE)


def image(tmp_path: Path, *, parent: bool = False, compressed: bool = False, used: bool = True) -> Path:
    """An image that reads as CONTENT, by data of its own if it is `used`, else by a parent."""
    path = tmp_path / "image"
    options = {"extended_l2": "on", "cluster_size": str(CLUSTER)}
    (tmp_path / "source").write_bytes(CONTENT)
    if compressed:
        (tmp_path / "source").write_bytes(b"text " * (SIZE // 5))
        words = {"format": "raw", "target_format": "qcow2", "options": options}
        tapfs.convert(tmp_path / "source", path, compressed=True, **words)  # type: ignore[arg-type]
        return path
    below = ("source", "raw") if parent else (None, None)
    tapfs.create(path, "qcow2", SIZE, backing=below[0], backing_format=below[1], options=options)
    if used:
        with tapfs.open(path, writable=True) as disk:
            disk.write(0, CONTENT)
    return path


def kinds(path: Path, offset: int, length: int) -> list[tuple[Kind, int]]:
    """The kinds of the top layer, and how many bytes have each."""
    with tapfs.open(path) as disk:
        found = disk.layers[0].driver.map(offset, length)
        wanted = [(each.kind, min(each.end, offset + length) - max(each.offset, offset)) for each in found]
        return [each for each in wanted if each[1] > 0]


def proven(path: Path, expected: bytes, parent: bytes = b"") -> None:
    """tapfs, the second reader and QEMU read these bytes, and QEMU finds nothing wrong."""
    with tapfs.open(path) as disk:
        assert disk.read(0, SIZE) == expected
    assert by_hand(path.read_bytes(), parent) == expected
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", path], check=True)
    raw = path.with_name("raw")
    raw.write_bytes(expected)
    subprocess.run(["qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", path, raw], check=True)


@pytest.mark.parametrize(("parent", "used"), [(False, True), (True, True), (True, False)])
def test_the_entry_says_it_and_nothing_is_written(tmp_path: Path, *, parent: bool, used: bool) -> None:
    path = image(tmp_path, parent=parent, used=used)
    before = path.read_bytes()
    expected = bytearray(CONTENT)
    with tapfs.open(path, writable=True) as disk:
        for start, length in ((3 * SUB, 5 * SUB), (9 * CLUSTER - SUB, 2 * SUB), (20 * CLUSTER + 30 * SUB, CLUSTER)):
            disk.write_zeroes(start, length)
            expected[start : start + length] = bytes(length)
    assert kinds(path, 2 * SUB, 8 * SUB)[1] == (Kind.ZERO, 5 * SUB)
    proven(path, bytes(expected), CONTENT if parent else b"")
    if used:
        fields = Fields(before)
        table = fields.number(fields.l1_at, 8) & 0x00FFFFFFFFFFFE00
        after = path.read_bytes()
        assert before[:table] == after[:table]
        assert before[table + CLUSTER :] == after[table + CLUSTER :]


def test_a_cluster_that_a_snapshot_shares_is_not_copied(tmp_path: Path) -> None:
    path = image(tmp_path)
    tapfs.create_snapshot(path, "before")
    length = path.stat().st_size
    with tapfs.open(path, writable=True) as disk:
        disk.write_zeroes(5 * CLUSTER + SUB, 7 * SUB)
    expected = bytearray(CONTENT)
    expected[5 * CLUSTER + SUB : 5 * CLUSTER + 8 * SUB] = bytes(7 * SUB)
    proven(path, bytes(expected))
    assert by_hand(path.read_bytes(), snapshot=0) == CONTENT
    assert path.stat().st_size <= length + CLUSTER  # the table's own copy


def test_what_is_inside_a_subcluster_is_written(tmp_path: Path) -> None:
    path = image(tmp_path)
    with tapfs.open(path, writable=True) as disk:
        disk.write_zeroes(SUB + 100, 3 * SUB)
    expected = bytearray(CONTENT)
    expected[SUB + 100 : 4 * SUB + 100] = bytes(3 * SUB)
    assert [kind for kind, _ in kinds(path, 0, 5 * SUB)] == [Kind.DATA, Kind.ZERO, Kind.DATA]
    proven(path, bytes(expected))


def test_a_compressed_cluster_is_written_anew(tmp_path: Path) -> None:
    path = image(tmp_path, compressed=True)
    with tapfs.open(path, writable=True) as disk:
        disk.write_zeroes(SUB, SUB)
    expected = bytearray(b"text " * (SIZE // 5)).ljust(SIZE, b"\0")
    expected[SUB : 2 * SUB] = bytes(SUB)
    assert kinds(path, 0, 3 * SUB) == [(Kind.DATA, 3 * SUB)]
    proven(path, bytes(expected))


def test_a_write_over_such_zeros_goes_to_the_place_of_the_cluster(tmp_path: Path) -> None:
    path = image(tmp_path)
    length = path.stat().st_size
    with tapfs.open(path, writable=True) as disk:
        disk.write_zeroes(CLUSTER + SUB, 30 * SUB)
        disk.flush()
        disk.write(CLUSTER + 2 * SUB + 7, b"new")
    expected = bytearray(CONTENT)
    expected[CLUSTER + SUB : CLUSTER + 31 * SUB] = bytes(30 * SUB)
    expected[CLUSTER + 2 * SUB + 7 : CLUSTER + 2 * SUB + 10] = b"new"
    proven(path, bytes(expected))
    assert path.stat().st_size == length
